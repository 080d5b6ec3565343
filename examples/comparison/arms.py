"""Which methods a command compares: ``--methods`` and ``--arm``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bayesagg import LikelihoodRule
from examples.comparison.catalogue import SINGLE_TASK, Method, bayesagg, methods, more_methods

_ARM = (
    "another arm; JSON gives settings of the default rule and of the heads of each kind, "
    """as in '{"rule": {"lag": 30}, "regression": {"readout": "gradient"}}', or settings of """
    """another method, as in '{"method": "uw", "rate": 10}'; may be repeated"""
)


def add_methods(parser: argparse.ArgumentParser, default: Sequence[str], text: str) -> None:
    """The two options.

    Args:
        parser: Of the command.
        default: Names without the option.
        text: What it says of the names that there are.
    """
    own: dict[str, Any] = {"nargs": "+", "metavar": "NAME", "default": [*default], "help": text}
    parser.add_argument("--methods", **own)
    own = {"nargs": 2, "metavar": ("NAME", "JSON"), "action": "append", "default": [], "help": _ARM}
    parser.add_argument("--arm", **own)


def chosen_methods(
    options: argparse.Namespace,
    parser: argparse.ArgumentParser,
    preset: str,
    lists: Mapping[str, Sequence[str]],
) -> dict[str, Method]:
    """Methods by name, the arms of the command line last; a bad one ends the program.

    Args:
        options: With those of :func:`add_methods`.
        parser: Of the command.
        preset: Entry of :data:`bayesagg.presets.PAPER` for the paper's arm.
        lists: Names that a first name such as ``all`` stands for.
    """
    known = methods(preset) | more_methods(preset)
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
    return chosen


def _arm(name: str, given: dict[str, Any], known: Mapping[str, Method]) -> Method:
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
