"""``python -m examples.benchmark``: what a step of BayesAgg costs, and its aggregation alone."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from dataclasses import replace
from pathlib import Path

import torch

from examples.arguments import Parser, whole
from examples.benchmark import parts
from examples.benchmark.cases import CASES, Case
from examples.benchmark.measuring import CLOCKS
from examples.benchmark.parts import Row
from examples.data import DataUnavailableError

PARTS = ("counts", "time", "memory", "aggregation")  # what runs by default
SMALL = [name for name, case in CASES.items() if case.max_operators]

_EPILOG = """\
parts:
  counts       operator calls and looks at the device of a step beyond those of a plain one, as the
               profiler counts them; of small networks
  time         a training step against the same network without BayesAgg
  memory       extra peak memory of a step, from the allocations PyTorch makes
  aggregation  posterior of the batch, moments and Eq. 7 by themselves: the library against the
               paper's formulas as printed (dense moments, J samples, a joint covariance)
  methods      time and peak memory of a step of every method of the comparisons, and the ratio to
               linear scalarization (the paper's Table 4); only where it is asked for

All arms of a comparison take turns in one run, so compare ratios, not seconds. qm9 needs
torch_geometric, chestxray14 and utkface timm. The full run takes the better part of an hour
on two cores; `--shapes small` takes a minute.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0, or 2 where a package is missing."""
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    setting = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": args.threads,
        "clock": args.clock,
        "device": args.device,
        "step batch": args.step_batch or "the shape's",
        "load at start": f"{load:.2f}",
    }
    print("  ".join(f"{key}: {value}" for key, value in setting.items()), file=sys.stderr)
    names = [n for name in args.shapes for n in (SMALL if name == "small" else (name,))]
    rows: list[Row] = []
    try:
        for part in args.parts:
            for case in (CASES[name] for name in dict.fromkeys(names)):
                case = replace(
                    case, step_batch=args.step_batch or case.step_batch, device=args.device
                )
                for row in _rows(part, case, args):
                    rows.append(row)
                    print(parts.line(row), file=sys.stderr, flush=True)
    except (DataUnavailableError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if rows and args.output is not None:
            parts.write(args.output, rows, setting)
    print(parts.markdown(rows))
    return 0


def _rows(part: str, case: Case, args: argparse.Namespace) -> list[Row]:
    """A part of one case; nothing where it does not apply."""
    if part == "counts":
        return parts.count_rows(case) if case.small else []
    if part == "time":
        return parts.time_rows(case, args.repeats or (25 if case.small else 9), args.clock)
    if part == "memory":
        return parts.memory_rows(case)
    if part == "aggregation":
        if case.min_speedup is None:
            return []
        return parts.aggregation_rows(case, args.repeats or 5, args.samples, args.clock)
    from examples.benchmark.methods import method_rows  # needs TorchJD and SciPy

    return method_rows(case, args.repeats or (15 if case.small else 5), args.methods, args.clock)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    about = "Operator calls, time and memory of BayesAgg."
    parser = Parser("benchmark", about, epilog=_EPILOG)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=[*CASES, "small"], default=list(CASES), metavar="SHAPE",
        help=f"any of {', '.join(CASES)}; small: the first three (default: all)")  # fmt: skip
    add("--parts", nargs="+", choices=[*PARTS, "methods"], default=list(PARTS), metavar="PART",
        help="any of those below (default: all but methods)")  # fmt: skip
    add("--methods", nargs="+", metavar="NAME",
        help="for the part methods: some of them, as in examples.compare (default: all but the "
             "ensembles)")  # fmt: skip
    add("--repeats", type=whole(1), metavar="N",
        help="rounds in which every arm takes its turn (default: 5 to 25)")  # fmt: skip
    add("--step-batch", type=whole(1), metavar="B",
        help="data of a step (default: the paper's batch; 16 for chestxray14)")  # fmt: skip
    add("--samples", type=whole(1), default=1024, metavar="J",
        help="weight samples of the literal arm (default: the paper's %(default)s)")  # fmt: skip
    add("--threads", type=whole(1), default=torch.get_num_threads(), metavar="N",
        help="threads of PyTorch (default: %(default)s)")  # fmt: skip
    add("--device", default="cpu", metavar="NAME",
        help="of counts and time, such as cuda (default: %(default)s)")  # fmt: skip
    add("--clock", choices=tuple(CLOCKS), default="wall",
        help="wall time, or this process's CPU time, which is steadier on a busy machine "
             "(with --threads 1 only)")  # fmt: skip
    add("--output", type=Path, metavar="FILE", help="also write the results to this .json file")
    args = parser.parse_args(argv)
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu counts waiting threads as busy: add --threads 1")
    if args.output is not None and not (
        args.output.suffix == ".json" and args.output.parent.is_dir()
    ):
        parser.error(
            f"argument --output: '{args.output}' is not a .json file in a folder that exists"
        )
    return args


if __name__ == "__main__":
    sys.exit(main())
