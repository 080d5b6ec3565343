"""The layouts of the paper's Tables 1 to 7, filled from the files that comparisons write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from examples.comparison.catalogue import SINGLE_TASK
from examples.comparison.report import spread
from examples.comparison.tasks import LOWER_IS_BETTER

_OURS = "bayesagg-paper"
_FULL = ("ls", "si", "rlw", "dwa", "uw", "mgda", "pcgrad", "cagrad", "imtl-g", "nash-mtl", "igbv2")
_BASELINES = (*_FULL, "aligned-mtl-ub")
_REPRESENTATION = ("mgda-ub", "imtl-g-ub", "aligned-mtl-ub", _OURS)
_NONE = "–"

Cells = dict[str, str]  # by name of the method
Column = tuple[str, Cells]  # its title, and its cells


class ResultsError(ValueError):
    """A file has not what a table is made from; the message says what to do."""


@dataclass(frozen=True)
class Grid:
    """A table before it is written down."""

    header: list[str]  # names of the columns; the first is that of the methods
    # Groups of rows, each with a title, which may be empty
    blocks: list[tuple[str, list[list[str]]]]
    notes: list[str]  # what to read with it


@dataclass(frozen=True)
class Layout:
    """One of the paper's tables."""

    caption: str  # what it shows
    # Blocks of methods, each with a title, which may be empty
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    columns: Callable[[Mapping[str, Any]], list[Column]]  # makes the columns of one file of results
    together: bool = False  # whether several files are columns of one table, and not a table each


def read(place: Path) -> dict[str, Any]:
    """Read ``results.json`` of a folder, or a JSON file.

    Raises:
        ResultsError: If there is none, or it is not of a comparison or of the benchmark.
    """
    path = place / "results.json" if place.is_dir() else place
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ResultsError(
            f"{path}: no such file; python -m examples.compare BENCHMARK writes one"
        ) from None
    except ValueError as error:
        raise ResultsError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict) or not content.keys() & {"runs", "rows"}:
        raise ResultsError(f"{path}: neither a comparison's results.json nor a benchmark's report")
    return content


def grids(number: int, contents: Mapping[Path, Mapping[str, Any]], others: bool) -> list[Grid]:
    """Fill a table of the paper.

    Args:
        number: Of the table, 1 to 7.
        contents: What :func:`read` gives, by place.
        others: Add the methods that the paper's table does not have.

    Returns:
        One table, or one per file where every benchmark has columns of its own.

    Raises:
        ResultsError: If a file has not what the table needs.
    """
    layout = LAYOUTS[number]
    each = [contents] if layout.together else [{place: c} for place, c in contents.items()]
    return [_grid(layout, group, others) for group in each]


def _grid(layout: Layout, by_place: Mapping[Path, Mapping[str, Any]], others: bool) -> Grid:
    contents, columns = list(by_place.values()), []
    for place, content in by_place.items():
        try:
            columns += layout.columns(content)
        except ResultsError as error:
            raise ResultsError(f"{place}: {error}") from None
    found = dict.fromkeys(name for _, cells in columns for name in cells)
    labels = {n: runs[0]["label"] for c in contents for n, runs in c.get("runs", {}).items()}
    known = [name for _, names in layout.rows for name in names]
    rest = [name for name in found if name not in known] if others else []
    notes = [layout.caption, *(_described(content) for content in contents)]
    missing = [name for name in known if name not in found]
    if missing:
        notes.append(f"Not among the results: {', '.join(missing)}.")
    blocks = []
    for title, names in (*layout.rows, ("Not in the paper's table", rest)):
        shown = [name for name in names if name in found]
        rows = [[labels.get(n, n), *(cells.get(n, _NONE) for _, cells in columns)] for n in shown]
        blocks += [(title, rows)] if rows else []
    return Grid(["", *(title for title, _ in columns)], blocks, notes)


def _described(content: Mapping[str, Any]) -> str:
    """Where the figures come from, in a line."""
    if "rows" in content:
        setting = {key: content["setting"][key] for key in ("torch", "threads", "clock")}
        return f"Random data. {_pairs(setting)}."
    settings = content["settings"]
    counts = {key: settings[key] for key in ("seeds", "trials", "epochs", "batch_size")}
    return (
        f"`{settings['benchmark']}`: {settings['network']}; "
        f"{_pairs(counts)}; {_pairs(settings['data'])}."
    )


def _pairs(values: Mapping[str, Any]) -> str:
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
    return ", ".join(f"{key.replace('_', ' ')} {text}" for key, text in texts.items())


# --- columns -------------------------------------------------------------------------------------


def _runs(content: Mapping[str, Any]) -> dict[str, Any]:
    if not content.get("runs"):
        raise ResultsError("this table needs the results.json of a comparison")
    return dict(content["runs"])


def _cells(content: Mapping[str, Any], cell: Callable[[str], str]) -> Cells:
    """What ``cell`` makes of the name of a method, or ``failed`` where a run did."""
    runs = _runs(content)
    done = {SINGLE_TASK, *content["summary"]}
    return {name: cell(name) if name in done else "failed" for name in runs}


def _delta(content: Mapping[str, Any], digits: int, deviation: bool = True) -> Column:
    def cell(name: str) -> str:
        if name == SINGLE_TASK:
            return _NONE
        delta = content["summary"][name]["delta"]
        return spread(delta if deviation else [mean(delta)], digits)

    return "Δm [%] ↓", _cells(content, cell)


def _delta_of_benchmark(content: Mapping[str, Any], digits: int) -> list[Column]:
    title, cells = _delta(content, digits)
    del cells[SINGLE_TASK]
    return [(f"{content['settings']['benchmark']}, {title}", cells)]


def _classification(content: Mapping[str, Any]) -> list[Column]:
    """Accuracy of the classes that exclude each other, where a benchmark has it, or Δm."""
    runs = _runs(content)
    extra = next((name for name in runs[SINGLE_TASK][0]["extra"] if "accuracy" in name), None)
    if extra is None:
        return _delta_of_benchmark(content, 2)
    cells = _cells(content, lambda name: spread([100 * run["extra"][extra] for run in runs[name]]))
    del cells[SINGLE_TASK]
    return [(f"{content['settings']['benchmark']}, Acc. [%] ↑", cells)]


def _tasks(content: Mapping[str, Any], digits: int, deviation: bool = False) -> list[Column]:
    """A column per task, by the metric that Δm uses, and Δm."""
    columns, runs = [], _runs(content)
    for k, task in enumerate(content["tasks"]):
        metric = task["metric"]
        better = "↓" if metric in LOWER_IS_BETTER else "↑"
        unit = "%" if metric == "accuracy" else task["unit"]

        def cell(name: str, k: int = k, metric: str = metric) -> str:
            return _value([run["test"][k][metric] for run in runs[name]], metric, deviation)

        short = "Acc." if metric == "accuracy" else metric.upper()
        title = f"{task['name']}, {short}{f' [{unit}]' if unit else ''} {better}"
        columns.append((title, _cells(content, cell)))
    return [*columns, _delta(content, digits, deviation)]


def _value(values: Sequence[float], metric: str, deviation: bool) -> str:
    shown = values if deviation else [mean(values)]
    if metric == "accuracy":
        return spread([100 * value for value in shown])
    if metric == "auroc":
        return spread(shown, 4)
    text = f"{mean(shown):.4g}"
    return text if len(shown) < 2 else f"{text} ± {stdev(shown):.2g}"


def _times(content: Mapping[str, Any]) -> list[Column]:
    """Seconds × 10² of a step and their ratio to linear scalarization, per benchmark."""
    columns = []
    for title, costs in _costs(content).items():
        seconds = {name: f"{100 * cost['seconds']:.4g}" for name, cost in costs.items()}
        ratios = {name: f"{cost['ratio']:.2f}" for name, cost in costs.items()}
        columns += [(f"{title}, sec. × 10²", seconds), ("ratio to LS", ratios)]
    return columns


def _costs(content: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds and ratio of each method, by benchmark or shape."""
    if content.get("costs"):
        return {content["settings"]["benchmark"]: content["costs"]}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in content.get("rows", []):
        if row["part"] == "methods":
            name, _, what = row["quantity"].partition(" ")
            cost = found.setdefault(row["shape"], {}).setdefault(name, {})
            cost |= {"seconds": row["value"] / 1e3} if what == "time" else {what: row["value"]}
    if not found:
        what = "measure them with python -m examples.compare … --costs, or python -m"
        raise ResultsError(f"no times of methods: {what} examples.benchmark --parts methods")
    return found


_SEEDS = "Test part, mean over the seeds."
_SPREAD = "Test part, mean over the seeds ± standard deviation."
_MTL = (("", (*_BASELINES, _OURS)),)
_WITH_STL = (("", (SINGLE_TASK, *_BASELINES, _OURS)),)

LAYOUTS: dict[int, Layout] = {
    1: Layout(_SPREAD, _MTL, partial(_delta_of_benchmark, digits=1), together=True),
    2: Layout(_SPREAD, _MTL, _classification, together=True),
    3: Layout(_SPREAD, _WITH_STL, partial(_tasks, digits=2, deviation=True)),
    4: Layout(
        "Time of a training step, median.",
        (("", _FULL), ("Gradients at the representation", _REPRESENTATION)),
        _times,
        together=True,
    ),
    5: Layout(
        _SPREAD,
        (("", ("ensemble-heads", "ensemble-networks", _OURS)),),
        partial(_delta_of_benchmark, digits=2),
        together=True,
    ),
    6: Layout(_SEEDS, _WITH_STL, partial(_tasks, digits=1)),
    7: Layout(_SEEDS, _WITH_STL, partial(_tasks, digits=2)),
}
