"""Finished runs on disk: one line of JSON each, by the hash of all they depend on."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path

from examples.comparison.runs import Run, key_of


class Store:
    """Runs of a file; a run that is there is not computed again.

    A run is found by its key only, so runs of other settings, data or code in the same file are
    never taken for it.

    Args:
        path: File of the runs; made at the first run.

    Raises:
        ValueError: If a line is not a run, or its content does not have its key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._runs: dict[str, Run] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        lines = self._path.read_text(encoding="utf-8").split("\n")
        if lines[-1]:  # a run is written with the end of its line: this one was cut short
            warnings.warn(f"{self._path}: the last line is incomplete and is dropped", stacklevel=3)
            self._path.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
        for number, line in enumerate(lines[:-1], 1):
            try:
                run = Run(**json.loads(line))
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(
                    f"{self._path}, line {number}: not a run of a comparison ({error}); "
                    "move the file away or choose another folder"
                ) from error
            if key_of(run.identity) != run.key:
                raise ValueError(f"{self._path}, line {number}: the run was changed by hand")
            self._runs[run.key] = run

    def get(self, key: str) -> Run | None:
        """The run of that key, if it is finished."""
        return self._runs.get(key)

    def add(self, run: Run) -> None:
        """Keep a run and write its line."""
        self._runs[run.key] = run
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(run)) + "\n")
