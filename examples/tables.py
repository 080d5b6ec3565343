"""Print a table of the paper from finished comparisons.

``python -m examples.tables 3 --from output/compare/nhefs`` reads ``results.json`` of the folder.
Several folders are columns of one table (1, 2, 4, 5) or a table each (3, 6, 7). Table 4 also reads
the report of ``python -m examples.benchmark --parts methods --output FILE.json``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from examples.arguments import Parser
from examples.comparison import report
from examples.comparison.layouts import LAYOUTS, Grid, ResultsError, grids, read

_TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "%": r"\%",
        "_": r"\_",
        "^": r"\^{}",
        "&": r"\&",
        "±": r"$\pm$",
        "×": r"$\times$",
        "²": r"$^2$",
        "Δ": r"$\Delta$",
        "↓": r"$\downarrow$",
        "↑": r"$\uparrow$",
        "–": "--",
    }
)


def markdown(grid: Grid) -> str:
    """The table in Markdown, with its notes below."""
    lines = []
    for title, rows in grid.blocks:
        if title:
            lines.append([f"*{title}*", *[""] * (len(grid.header) - 1)])
        lines += rows
    return "\n\n".join([report.markdown(grid.header, lines), *grid.notes])


def latex(grid: Grid) -> str:
    r"""The table as a ``tabular`` for the package booktabs, with its notes as comments."""
    width = len(grid.header)
    lines = [rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}", r"\toprule", _tex_row(grid.header)]
    for title, rows in grid.blocks:
        lines.append(r"\midrule")
        if title:
            lines.append(rf"\multicolumn{{{width}}}{{l}}{{\emph{{{title.translate(_TEX)}}}}} \\")
        lines += map(_tex_row, rows)
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *(f"% {n}" for n in grid.notes)])


def _tex_row(cells: Sequence[str]) -> str:
    return rf"{' & '.join(cell.translate(_TEX) for cell in cells)} \\"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = Parser("tables", __doc__)
    parser.add_argument("number", type=int, choices=LAYOUTS, metavar="N", help="number, 1 to 7")
    text = "folders of comparisons, or JSON files"
    places = {"dest": "places", "nargs": "+", "required": True, "metavar": "FOLDER", "help": text}
    parser.add_argument("--from", type=Path, **places)
    text = "add methods that the paper's table has not"
    parser.add_argument("--all-methods", action="store_true", help=text)
    parser.add_argument("--latex", action="store_true", help="LaTeX in place of Markdown")
    options = parser.parse_args(arguments)
    try:
        contents = {place: read(place) for place in options.places}
        found = grids(options.number, contents, options.all_methods)
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n\n".join(map(latex if options.latex else markdown, found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
