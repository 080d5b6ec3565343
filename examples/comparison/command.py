"""The command line of a comparison: what to train, and how."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bayesagg import LikelihoodRule
from examples.arguments import Parser, make_folder, whole
from examples.comparison import rates
from examples.comparison.benchmarks import SOURCES
from examples.comparison.catalogue import (
    SINGLE_TASK,
    SINGLE_TASK_METHOD,
    Method,
    bayesagg,
    methods,
    more_methods,
    unsuited,
)
from examples.comparison.pipeline import Plan
from examples.comparison.runs import Data
from examples.data import DATA_VARIABLE
from examples.training import OPTIMIZERS

_ABOUT = """
Trains every method on one benchmark with several seeds under the same conditions, optionally tuned
with the same number of trials each, and writes tables, a figure and every run. A command that is
stopped goes on where it was when it is started again: finished runs are not repeated. A search
goes on where its best learning rate is the lowest or the highest of those tried.
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad argument ends the program with one line and status 2."""
    parser = Parser(
        prog="python -m examples.compare",
        description=_ABOUT,
        epilog="The commands of the documentation are beside its figures: docs/default.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_what(parser)
    _add_how(parser)
    options = parser.parse_args(arguments)
    _check_size(options, parser)
    options.plan = _plan(options, parser)
    make_folder(options.output, parser)
    return options


def _add_what(parser: argparse.ArgumentParser) -> None:
    """Benchmark, size and methods."""
    names = list(methods("qm9"))
    parser.add_argument(
        "benchmark", choices=SOURCES, metavar="BENCHMARK", help=f"one of: {', '.join(SOURCES)}"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["all"],
        metavar="NAME",
        help=f"all, none or some of: {', '.join(names)} (default: all); or of "
        f"{', '.join(more_methods('qm9'))}, which all leaves out",
    )
    parser.add_argument(
        "--arm",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "JSON"),
        help="another arm; JSON gives settings of the default rule and of the heads of each kind, "
        """as in '{"rule": {"lag": 30}, "regression": {"readout": "gradient"}}', or settings of """
        """another method, as in '{"method": "uw", "rate": 10}'; may be repeated""",
    )
    for name in ("molecules", "patients"):
        sources = {key: s for key, s in SOURCES.items() if s.size_name == name}
        low, high = next(iter(sources.values())).size_range
        sizes = ", ".join(f"{source.size} for {key}" for key, source in sources.items())
        parser.add_argument(
            f"--{name}",
            type=whole(low, high),
            metavar="N",
            help=f"{name}, chosen at random, {low} to {high} (default: {sizes})",
        )
    parser.add_argument(
        "--train-size",
        type=whole(10),
        metavar="N",
        help="use N data of the training part (default: all of it)",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="FOLDER",
        help=f"downloaded data sets, a subfolder each, in place of the environment variable "
        f"{DATA_VARIABLE} (default: what packages ship)",
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    """Seeds, trials, training, processes and output."""

    def add(name: str, kind: Any, default: Any, text: str) -> None:
        parser.add_argument(name, type=kind, default=default, metavar="N", help=text)

    add("--seeds", whole(1), 5, "trainings of each method with its settings (default: 5)")
    add("--trials", whole(1), 1, "settings tried for each method; 1: the default (default: 1)")
    add("--search-seeds", whole(1), 1, "trainings of each trial (default: 1)")
    parser.add_argument(
        "--untuned",
        nargs="+",
        default=[],
        metavar="NAME",
        help="methods that keep their default settings while the others are tuned",
    )
    parser.add_argument(
        "--reference",
        default="ls",
        metavar="NAME",
        help="method that the others' Δm are subtracted from in the table (default: ls)",
    )
    parser.add_argument(
        "--protocol",
        choices=("small", "paper"),
        default="small",
        help="default settings and size: those for a small machine, or the published "
        "(default: small); the options below override single ones",
    )
    add("--epochs", whole(1), None, "epochs of each training (default: the protocol's)")
    text = "of the single-task models, where a shorter training is yardstick enough (default: all)"
    add("--single-task-epochs", whole(1), None, text)
    text = "steps of linear scalarization first, of all but the paper's rule (default: 50)"
    add("--warmup-steps", whole(0), None, text)
    add("--batch-size", whole(2), None, "data per step (default: the protocol's)")
    parser.add_argument(
        "--learning-rate",
        type=float,
        nargs="+",
        metavar="N",
        help="of the methods (default: the protocol's); several: every method at each of them. The "
        "single-task models have the protocol's, so that all are measured by the same",
    )
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help="of the methods; sgd has momentum 0.9 (default: adam, as the single-task models)",
    )
    parser.add_argument(
        "--part",
        choices=("test", "val"),
        default="test",
        help="part that the tables are of; with val, for choices, no run looks at the test part "
        "(default: test)",
    )
    add("--clip-norm", float, None, "largest norm of the gradient (default: no clipping)")
    add("--device", str, "cpu", "where to train, such as cuda (default: cpu)")
    add("--jobs", whole(1), min(4, os.cpu_count() or 1), "processes (default: cores, at most 4)")
    parser.add_argument(
        "--costs",
        action="store_true",
        help="measure time and memory of a step of every method, one after the other",
    )
    parser.add_argument(
        "--output",
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where runs, tables and figure are written (default: output/compare/BENCHMARK)",
    )


def _check_size(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    source = SOURCES[options.benchmark]
    for name in ("molecules", "patients"):
        if getattr(options, name) is not None and source.size_name != name:
            parser.error(f"argument --{name}: {options.benchmark} has none; see --train-size")
    for name, values in (
        ("learning-rate", options.learning_rate or []),
        ("clip-norm", [] if options.clip_norm is None else [options.clip_norm]),
    ):
        for value in values:
            if not 0 < value < float("inf"):
                parser.error(f"argument --{name}: {value} is not a positive number")
    if options.trials > 1 and len(options.learning_rate or []) > 1:
        parser.error("argument --learning-rate: one, around which the --trials are, not several")
    if options.protocol == "paper" and source.paper is None:
        known = ", ".join(key for key, s in SOURCES.items() if s.paper is not None)
        parser.error(
            f"argument --protocol: no published settings for {options.benchmark}; there are some "
            f"for: {known}"
        )
    if options.data_dir is not None:
        if not options.data_dir.is_dir():
            parser.error(f"argument --data-dir: there is no folder '{options.data_dir}'")
        # Where worker processes find it too.
        os.environ[DATA_VARIABLE] = str(options.data_dir.resolve())
    if options.output is None:
        options.output = Path("output/compare") / options.benchmark


def _plan(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Plan:
    source = SOURCES[options.benchmark]
    chosen = _methods(options, parser)
    if options.reference not in chosen and options.reference != "ls":
        parser.error(f"argument --reference: {options.reference!r} is not among the methods")
    for name in options.untuned:
        if name not in chosen:
            parser.error(f"argument --untuned: {name!r} is not among the methods of the comparison")
    size = getattr(options, source.size_name) if source.size_name else None
    settings, default_size = source.settings, source.size
    if options.protocol == "paper":
        assert source.paper is not None
        settings, default_size = source.paper, source.paper_size or source.size
    learning_rates = options.learning_rate or [settings.learning_rate]
    given = {
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate": learning_rates[0],
        "clip_norm": options.clip_norm,
        "warmup_steps": options.warmup_steps,
        "optimizer": options.optimizer,
    }
    single: dict[str, Any] = {
        "learning_rate": settings.learning_rate,
        "optimizer": settings.optimizer,
    }
    if options.single_task_epochs:
        single["epochs"] = options.single_task_epochs
    return Plan(
        data=Data(options.benchmark, size or default_size, options.train_size),
        methods=chosen if len(learning_rates) == 1 else rates.at_rates(chosen, learning_rates),
        training=replace(settings, **{k: v for k, v in given.items() if v is not None}),
        seeds=options.seeds,
        trials=options.trials,
        search_seeds=options.search_seeds,
        untuned=tuple(options.untuned),
        reference=options.reference,
        part=options.part,
        workers=options.jobs,
        device=options.device,
        single_task=replace(SINGLE_TASK_METHOD, training=single),
    )


def _methods(options: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Method]:
    """Methods by name, the arms of the command line last."""
    source = SOURCES[options.benchmark]
    every = methods(source.preset)
    known = every | more_methods(source.preset)
    lists = {"all": [n for n, m in every.items() if not unsuited(m, source)], "none": []}
    first, *others = options.methods
    names = dict.fromkeys([*lists.get(first, [first]), *others])
    for name in names:
        if name not in known:
            parser.error(f"argument --methods: unknown method {name!r}; known: {', '.join(known)}")
    chosen = {name: known[name] for name in names}
    for name, text in options.arm:
        if name in known or name == SINGLE_TASK:
            parser.error(f"argument --arm: {name!r} is the name of a method; choose another")
        try:
            chosen[name] = _arm(name, json.loads(text), known)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            parser.error(f"argument --arm: {name}: {error}")
    for name, method in chosen.items():
        if why := unsuited(method, source):
            parser.error(f"{name} {why}; {options.benchmark} has another: leave the method out")
    if not chosen:
        parser.error("no methods: name some with --methods or --arm")
    return chosen


def _arm(name: str, given: dict[str, Any], known: dict[str, Method]) -> Method:
    """An arm of the library, or a method of the catalogue with other settings."""
    if "method" in given:
        own = dict(given)
        base = known[own.pop("method")]
        return replace(base.with_settings(own), label=name, space={})
    unknown = given.keys() - {"rule", "memory", "regression", "binary", "multiclass"}
    if unknown:
        raise ValueError(f"unknown part {sorted(unknown)[0]!r}")
    rule = LikelihoodRule(**given.pop("rule")) if "rule" in given else None
    arm = bayesagg(name, rule=rule, **given)
    arm.described()
    return arm
