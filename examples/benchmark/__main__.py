"""``python -m examples.benchmark``: time and memory of BayesAgg at the paper's shapes."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from examples.benchmark import report
from examples.benchmark.models import MissingDependencyError
from examples.benchmark.parts import aggregation_rows, memory_rows, step_rows
from examples.benchmark.report import Row
from examples.benchmark.shapes import SHAPES, Layout, Shape
from examples.benchmark.timing import CLOCKS, Clock

PARTS = ("aggregation", "step", "memory")  # what runs by default
METHODS = "methods"
SMALL = ("small", "small_mixture")
CHOICES = [name for name in SHAPES if name not in SMALL] + ["small"]

_EPILOG = """\
parts:
  aggregation  posterior of the batch, moments and Eq. 7 by themselves: the library against the
               paper's formulas as printed (dense moments, J samples, a joint covariance)
  step         a whole training step against the same network without BayesAgg
  memory       extra peak memory of a step, from the allocations PyTorch makes
  methods      time and peak memory of a step of every method of the comparisons, and the ratio to
               linear scalarization (the paper's Table 4); only where it is asked for

All arms of a comparison take turns in one run, so compare ratios, not seconds. The networks of
qm9 need torch_geometric, those of chestxray14 and utkface torchvision. The full run takes the
better part of an hour on two cores; `--shapes small` takes seconds.
"""


@dataclass(frozen=True)
class Options:
    """What to measure and how often."""

    shapes: list[Shape]
    parts: list[str]
    methods: list[str] | None
    layout: Layout
    repeats: int | None
    samples: int
    rss: bool
    threads: int
    clock: Clock


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0, or 2 where a package is missing."""
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    layout: Layout = args.heads
    options = Options(
        _selected(args.shapes, args.step_batch),
        args.parts,
        args.methods,
        layout,
        args.repeats,
        args.samples,
        args.rss,
        args.threads,
        args.clock,
    )
    setting = _setting(args)
    print("  ".join(f"{key}: {value}" for key, value in setting.items()), file=sys.stderr)
    rows: list[Row] = []
    try:
        for part in _run(options):
            rows += part
            for row in part:
                print(report.line(row), file=sys.stderr, flush=True)
    except (MissingDependencyError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if rows and args.output is not None:
            report.write(args.output, rows, setting)
    print(report.markdown(rows))
    return 0


def _run(options: Options) -> Iterator[list[Row]]:
    """One list of rows per shape and part, as they come."""
    for shape in options.shapes:
        if "aggregation" in options.parts:
            yield aggregation_rows(shape, options.repeats or 5, options.samples, options.clock)
        laid_out = shape.with_layout(options.layout)
        if "step" in options.parts:
            rounds = 200 if shape.backbone == "mlp" else 15
            yield step_rows(laid_out, options.repeats or rounds, options.clock)
        if "memory" in options.parts:
            yield memory_rows(laid_out, options.threads if options.rss else None)
        if METHODS in options.parts:
            from examples.benchmark.methods import method_rows  # needs TorchJD and SciPy

            rounds = 15 if shape.backbone == "mlp" else 5
            yield method_rows(laid_out, options.repeats or rounds, options.methods, options.clock)


def _selected(names: list[str], step_batch: int | None) -> list[Shape]:
    expanded = [n for name in names for n in (SMALL if name == "small" else (name,))]
    shapes = [SHAPES[name] for name in dict.fromkeys(expanded)]
    return [replace(s, step_batch=step_batch or s.step_batch) for s in shapes]


def _setting(args: argparse.Namespace) -> dict[str, object]:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": args.threads,
        "dtype": "float32",
        "clock": args.clock,
        "heads": args.heads,
        "samples": args.samples,
        "step batch": args.step_batch or "the shape's",
        "load at start": f"{load:.2f}",
    }


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmark",
        description="Time and memory of BayesAgg at the paper's shapes and at a small one (CPU).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shapes", nargs="+", choices=CHOICES, default=CHOICES, metavar="SHAPE",
        help=f"any of {', '.join(CHOICES)} (default: all)")  # fmt: skip
    add("--parts", nargs="+", choices=[*PARTS, METHODS], default=list(PARTS), metavar="PART",
        help=f"any of {', '.join(PARTS)}, {METHODS} (default: all but {METHODS})")  # fmt: skip
    add("--methods", nargs="+", metavar="NAME",
        help="for the part methods: some of them, as in examples.compare (default: all but the "
             "ensembles)")  # fmt: skip
    add("--repeats", type=_positive, metavar="N",
        help="rounds in which every arm takes its turn (default: 5 for aggregation, 15 for "
             "steps, 200 for steps of the small network; of methods 5 and 15)")  # fmt: skip
    add("--step-batch", type=_positive, metavar="B",
        help="data of a step (default: the paper's batch; 16 for chestxray14)")  # fmt: skip
    add("--samples", type=_positive, default=1024, metavar="J",
        help="weight samples of the literal arm (default: the paper's %(default)s)")  # fmt: skip
    add("--heads", choices=("separate", "grouped"), default="separate",
        help="one linear head per task as in the paper, or one head with an output per task "
             "(default: %(default)s)")  # fmt: skip
    add("--rss", action="store_true",
        help="cross-check memory by the resident size of fresh processes (Linux)")  # fmt: skip
    add("--threads", type=_positive, default=torch.get_num_threads(), metavar="N",
        help="threads of PyTorch (default: %(default)s)")  # fmt: skip
    add("--clock", choices=tuple(CLOCKS), default="wall",
        help="wall time, or this process's CPU time, which is steadier on a busy machine "
             "(with --threads 1 only)")  # fmt: skip
    add("--output", type=_output, metavar="FILE",
        help="also write the results to this .json or .md file")  # fmt: skip
    args = parser.parse_args(argv)
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu counts waiting threads as busy: add --threads 1")
    return args


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix not in report.FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} must end in {' or '.join(report.FORMATS)}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder of {text!r} does not exist")
    return path


if __name__ == "__main__":
    sys.exit(main())
