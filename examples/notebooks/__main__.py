"""Execute the notebooks, into build/notebooks/: ``python -m examples.notebooks [NAME …]``.

An executed copy is kept until the notebook, the code that it imports or a version changes. For a
quick look at whether everything runs, ``--epochs N`` trains for less, into build/notebooks-N/.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
BUILD = ROOT / "build"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
_VERSIONS = ("torch", "numpy", "pandas", "matplotlib", "ipykernel", "nbclient")


def digest(name: str) -> str:
    """Hash of all that the outputs of a notebook depend on, but for the epochs."""
    result = hashlib.sha256(platform.python_version().encode())
    for package in _VERSIONS:
        result.update(importlib.metadata.version(package).encode())
    code = [path for part in ("bayesagg", "examples") for path in (ROOT / part).rglob("*.py")]
    for path in (FOLDER / f"{name}.ipynb", *sorted(code)):
        result.update(path.relative_to(ROOT).as_posix().encode())
        result.update(path.read_bytes())
    return result.hexdigest()


def shorten(notebook: nbformat.NotebookNode, epochs: int) -> None:
    """Add a cell behind the one with the tag ``parameters``, as papermill does."""
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    place = next(i for i, own in enumerate(tags) if "parameters" in own) + 1
    source = f"epochs, pretrain_epochs = {epochs}, 1"
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(place, cell)


def execute(name: str, epochs: int | None) -> None:
    """Execute a notebook as Jupyter does, in its folder, and write the copy in one go.

    Raises:
        CellExecutionError: If a cell fails; nothing is written then.
    """
    output = BUILD / ("notebooks" if epochs is None else f"notebooks-{epochs}")
    wanted, copy = digest(name), output / f"{name}.ipynb"
    with suppress(OSError, ValueError):  # where there is none, or not a whole one
        if nbformat.read(copy, as_version=4).metadata.get("digest") == wanted:
            return
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    if epochs is not None:
        shorten(notebook, epochs)
    NotebookClient(
        notebook,
        timeout=None,
        startup_timeout=300,  # on a loaded machine importing takes its time, and so do outputs
        iopub_timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=40"],  # errors only
    ).execute()
    notebook.metadata["digest"] = wanted
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        nbformat.write(notebook, Path(folder, copy.name))
        os.replace(Path(folder, copy.name), copy)


def prepare(settings: str) -> None:
    """Let the kernels see this code, no settings of the user's, and say nothing of themselves."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ["IPYTHONDIR"] = os.environ["JUPYTER_CONFIG_DIR"] = settings
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks, and several at a time
    import matplotlib.font_manager  # noqa: F401  builds its cache here; in a notebook it says so


def main(arguments: Sequence[str] | None = None) -> int:
    """Execute the notebooks that are named, or all; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.notebooks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--epochs", type=int, metavar="N", help="instead of the notebook's own")
    given = parser.parse_args(arguments)
    names = given.names or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"no notebook {', '.join(sorted(unknown))}; there are: {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory() as settings:
        prepare(settings)
        for name in names:
            try:
                execute(name, given.epochs)
            except (CellExecutionError, DeadKernelError) as error:
                print(f"{name}.ipynb failed:\n{error}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
