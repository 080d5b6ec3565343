"""Command lines of the examples: a parser, and types of arguments with clear errors."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line.

    Args:
        module: Of ``examples``, whose command it is.
        about: Description, printed as it is.
        more: As of the base.
    """

    def __init__(self, module: str, about: str | None, **more: Any) -> None:
        kept = argparse.RawDescriptionHelpFormatter
        prog = f"python -m examples.{module}"
        super().__init__(prog=prog, description=about, formatter_class=kept, **more)

    def option(self, name: str, default: Any, text: str = "") -> None:
        """An option of the type of its default."""
        text = f"{text} (default: {default})".strip()
        self.add_argument(f"--{name}", type=type(default), default=default, help=text)

    def error(self, message: str) -> NoReturn:
        """Leave with one line; argparse would print the usage before it."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def whole(low: int, high: int | None = None) -> Any:
    """Type of an argument that is a whole number in a range."""

    def convert(text: str) -> int:
        wanted = f"a whole number from {low}" + (f" to {high}" if high else "")
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{value} is not {wanted}")
        return value

    return convert


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """The number of processes."""
    cores = min(4, os.cpu_count() or 1)
    text = "processes (default: cores, at most 4)"
    parser.add_argument("--jobs", type=whole(1), default=cores, metavar="N", help=text)


def positive(text: str) -> float:
    """Type of an argument that is a positive number."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def make_folder(path: Path, parser: argparse.ArgumentParser) -> None:
    """Make the folder for results before minutes of training find that it cannot be made."""
    if path.is_file():
        parser.error(f"argument --output: '{path}' is a file; name a folder to write into")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: cannot write into '{path}': {error.strerror}")
    if not os.access(path, os.W_OK):
        parser.error(f"argument --output: cannot write into '{path}': no permission")
