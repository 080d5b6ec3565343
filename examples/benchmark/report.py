"""Rows of results, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measured quantity, with what it should be at most, or at least."""

    part: str
    shape: str
    quantity: str
    value: float
    unit: str = ""
    most: float | None = None
    least: float | None = None
    note: str = ""

    def cells(self) -> list[str]:
        """As it is printed."""
        bounds = (("≤", self.most), ("≥", self.least))
        aim = " ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
        verdict = ("pass" if self.passed else "FAIL") if aim else ""
        value = f"{self.value:.4g} {self.unit}".strip()
        return [self.part, self.shape, self.quantity, value, aim, verdict, self.note]

    @property
    def passed(self) -> bool:
        """Whether the value is within its bounds."""
        least = self.value if self.least is None else self.least
        return least <= self.value <= (self.value if self.most is None else self.most)


def markdown(rows: list[Row]) -> str:
    """A Markdown table of the rows, padded so that it reads as plain text too."""
    header = ["part", "shape", "quantity", "value", "aim", "verdict", "note"]
    cells = [header, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def write(path: Path, rows: list[Row], setting: Mapping[str, object]) -> None:
    """Write rows and settings to a ``.json`` file."""
    content = {"setting": dict(setting), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def line(row: Row) -> str:
    """One row as it is printed while the benchmark runs."""
    return "  ".join(cell for cell in row.cells() if cell)
