"""Rows of results, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

FORMATS = (".json", ".md")


@dataclass(frozen=True)
class Row:
    """One measured quantity; ``passed`` is ``None`` where there is no target."""

    part: str
    shape: str
    quantity: str
    value: float
    unit: str
    target: str = ""
    passed: bool | None = None
    note: str = ""


def at_least(bound: float | None, value: float, unit: str = "×") -> tuple[str, bool | None]:
    """Target text and verdict for a quantity that should be at least ``bound``."""
    return ("", None) if bound is None else (f"≥ {bound:g} {unit}", value >= bound)


def at_most(bound: float | None, value: float, unit: str = "×") -> tuple[str, bool | None]:
    """Target text and verdict for a quantity that should be at most ``bound``."""
    return ("", None) if bound is None else (f"≤ {bound:g} {unit}", value <= bound)


def markdown(rows: list[Row]) -> str:
    """A Markdown table of the rows, padded so that it reads as plain text too."""
    header = ["part", "shape", "quantity", "value", "target", "verdict", "note"]
    cells = [header, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(_line(line, widths) for line in cells)


def _line(line: list[str], widths: list[int]) -> str:
    return "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"


def _cells(row: Row) -> list[str]:
    verdict = "" if row.passed is None else "pass" if row.passed else "FAIL"
    value = f"{row.value:.4g} {row.unit}"
    return [row.part, row.shape, row.quantity, value, row.target, verdict, row.note]


def write(path: Path, rows: list[Row], setting: Mapping[str, object]) -> None:
    """Write rows and settings to a ``.json`` or ``.md`` file."""
    if path.suffix == ".json":
        content = {"setting": dict(setting), "rows": [asdict(row) for row in rows]}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return
    lines = [f"- {key}: {value}" for key, value in setting.items()]
    path.write_text("\n".join([*lines, "", markdown(rows), ""]))


def line(row: Row) -> str:
    """One row as it is printed while the benchmark runs."""
    return "  ".join(cell for cell in _cells(row) if cell)
