"""Tables and figures of the regimes: lines, wins and losses, a critical-difference diagram."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import mean

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from bayesagg.diagnostics import Advice
from bayesagg.plots.style import line_style, polish
from examples.comparison.report import markdown, p_value
from examples.comparison.statistics import holm, paired_p_value, relative_interval

REFERENCE, OURS = "ls", "bayesagg"
_STYLES = {
    REFERENCE: (6, "v"),
    "uw": (1, "s"),
    "ntkmtl-sr": (4, "P"),
    "si": (2, "^"),
    "si-readout": (3, "D"),
    "bayesagg": (0, "o"),
}  # colour and marker
_OTHERS = ((5, "X"), (1, "*"), (2, "p"))  # of further methods, in turn
_WORDS = ("better", "level", "worse", "failed")
FEWEST = 6  # regimes that a test by signed ranks can tell two methods apart from, at 5 %
_HIGHEST = 600.0  # percent, in figures
_FONT = 13  # points: legible where a figure of 6.4 inches is 400 pixels wide


@dataclass(frozen=True)
class Line:
    """Regimes that differ in one thing, as a table and a figure show them."""

    title: str
    what: str
    percent: bool = False
    at_rates: bool = False  # every method at the same learning rates, not each at its best


LINES = {
    "tasks": Line("Number of tasks", "tasks"),
    "noise": Line("Noise in all labels", "noise in units of the labels [%]", percent=True),
    "scale": Line("Labels of every second task times a factor", "factor"),
    "missing": Line("Missing labels", "labels missing [%]", percent=True),
    "size": Line("Training data, 400 steps each", "molecules"),
    "Adam": Line("Learning rate of Adam", "learning rate", at_rates=True),
    "SGD": Line("Learning rate of SGD with momentum", "learning rate", at_rates=True),
    "optimizer": Line("SGD with momentum in place of Adam", "optimizer"),
    "benchmark": Line("Other benchmarks", "benchmark"),
}


@dataclass(frozen=True)
class Point:
    """A regime as it was measured."""

    line: str
    value: float | str
    place: str  # the same for two points that are the same regime
    rates: Mapping[str, float]  # learning rate of every method
    scores: Mapping[str, Sequence[float]]  # log errors of every method, by seed
    reference: Sequence[float]  # of linear scalarization at its best learning rate
    advice: Advice  # of the library, after a short run

    def against(self, name: str) -> tuple[float, float, float] | None:
        """Difference to the reference and its 95 % interval, in percent; ``None`` if a run failed.

        From the paired differences of log errors.
        """
        if not all(map(math.isfinite, [*self.scores[name], *self.reference])):
            return None
        return relative_interval(self.scores[name], self.reference)

    def p_value(self, name: str) -> float | None:
        """Of the paired t-test against the reference; ``None`` if a run failed."""
        if not self.against(name):
            return None
        return paired_p_value(self.scores[name], self.reference)

    def verdict(self, name: str) -> str:
        """``better``, ``level``, ``worse``, or ``failed`` where a run did."""
        found = self.against(name)
        if not found:
            return "failed"
        if paired_p_value(self.scores[name], self.reference) >= 0.05:
            return "level"
        return "better" if found[0] < 0 else "worse"

    def shown(self, name: str) -> str:
        """The difference to the reference with its interval, in percent."""
        found = self.against(name)
        return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*found) if found else "failed"

    def named(self) -> str:
        """Line and value."""
        return f"{LINES[self.line].title}: {_text(self.value, LINES[self.line].percent)}"


def line_table(points: Sequence[Point], labels: Mapping[str, str]) -> str:
    """A row for each value: error of LS at its best rate, and what the others differ by."""
    line, names = LINES[points[0].line], list(points[0].scores)
    shown = names if line.at_rates else [name for name in names if name != REFERENCE]
    rows = []
    for point in points:
        base = f"{mean(map(math.exp, point.reference)):.4f}"
        if not line.at_rates:
            base += f" ({point.rates[REFERENCE]:g})"
        cells = []
        for name in shown:
            cell = point.shown(name)
            cells.append(cell if line.at_rates else f"{cell} ({point.rates[name]:g})")
        rows.append([_text(point.value, line.percent), base, *cells])
    header = [line.what, f"error of {labels[REFERENCE]}", *(labels[name] for name in shown)]
    return markdown(header, rows)


def _text(value: float | str, percent: bool) -> str:
    if isinstance(value, str):
        return value
    return f"{100 * value:g}" if percent else f"{value:,g}" if value < 1e5 else f"{value:g}"


def plot_line(path: Path, points: Sequence[Point], labels: Mapping[str, str]) -> None:
    """Draw the difference to LS over the values, a line and a band per method."""
    line = LINES[points[0].line]
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    places = list(range(len(points)))  # values are ordered, and lie at equal distances
    others = cycle(_OTHERS)
    for k, name in enumerate(points[0].scores):
        if name == REFERENCE and not line.at_rates:
            axes.axhline(0, color="black", lw=1.5, label=labels[name])
            continue
        found = [(x, *f) for x, p in zip(places, points, strict=True) if (f := p.against(name))]
        if not found:
            continue
        x, middle, low, high = np.array(found).T
        colour, marker = _STYLES.get(name) or next(others)
        style = line_style(colour, len(points)) | {"marker": marker}
        errors, shift = (middle - low, high - middle), 0.06 * (k - 2)
        axes.errorbar(x + shift, middle, errors, label=labels[name], capsize=3, **style)
    if line.at_rates:
        axes.axhline(0, color="black", lw=1, ls=":")
    axes.set_xticks(places, [_text(point.value, line.percent) for point in points])
    axes.set_yscale("symlog", linthresh=40)
    low, high = axes.get_ylim()
    high = min(high, _HIGHEST)  # a method that diverged leaves the picture
    axes.set_ylim(max(low, -100), high)
    axes.set_yticks(
        [t for t in (-90, -60, -40, -20, -10, 0, 10, 20, 50, 100, 200, 500) if low < t < high]
    )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_yticks([], minor=True)
    axes.set_xlabel(line.what)
    axes.set_ylabel("error against LS\nat its best rate [%]")
    axes.set_title(line.title)
    polish(axes, own=True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=_FONT - 1)
    figure.savefig(path, dpi=150)


def verdicts(points: Sequence[Point], name: str = OURS) -> str:
    """How often a method is better and worse than LS, and a row per regime where not better."""
    words = [point.verdict(name) for point in points]
    counts = ", ".join(f"{word} in {words.count(word)}" for word in _WORDS)
    rows = [
        [point.named(), word, point.shown(name), p_value(point.p_value(name))]
        for point, word in zip(points, words, strict=True)
        if word != "better"
    ]
    text = (
        f"{name} against LS, each at its best learning rate, {len(points)} regimes, paired t-tests "
        f"at 5 %, without correction: {counts}."
    )
    return f"{text}\n\n{markdown(['not better', '', 'difference [%]', 'p'], rows)}"


def advice_table(points: Sequence[Point], name: str = OURS) -> str:
    """What the library advises in each regime, beside what was measured."""
    rows, held = [], 0
    for point in points:
        found, verdict = point.advice, point.verdict(name)
        held += found.weigh == (verdict == "better")
        numbers = [f"{found.ratio:.3g}", f"{found.cosine:.2f}", f"{found.agreement:.2f}"]
        says = "weigh" if found.weigh else "LS"
        rows.append([point.named(), *numbers, says, verdict, point.shown(name)])
    header = ["regime", "ratio of scales", "cosine", "agreement", "advice"]
    table = markdown([*header, "measured", "difference [%]"], rows)
    return f"{table}\n\nThe advice holds in {held} of {len(points)} regimes."


def differences(table: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """Friedman's test, mean ranks, and p-values of all pairs: Wilcoxon's signed ranks with Holm."""
    names = list(table)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    ranked = table.rank(axis=1)
    raw = []
    for a, b in pairs:
        gap = (table[a] - table[b]).clip(-1e3, 1e3).fillna(0.0)  # both failed: no difference
        raw.append(float(stats.wilcoxon(gap).pvalue) if gap.any() else 1.0)
    matrix = pd.DataFrame(1.0, index=names, columns=names)
    for (a, b), p in zip(pairs, holm(raw), strict=True):
        matrix.loc[a, b] = matrix.loc[b, a] = p
    friedman = stats.friedmanchisquare(*(ranked[name] for name in names))
    rows = [
        [
            name,
            f"{ranked[name].mean():.2f}",
            *(p_value(matrix.loc[name, o]) if o != name else "" for o in names),
        ]
        for name in ranked.mean().sort_values().index
    ]
    text = (
        f"Mean ranks over {len(table)} regimes; Friedman's test: p {p_value(friedman.pvalue)}. "
        "p-values of Wilcoxon's signed-rank tests of all pairs, with Holm's correction:"
    )
    return f"{text}\n\n{markdown(['', 'mean rank', *names], rows)}", matrix


def plot_ranks(path: Path, table: pd.DataFrame, matrix: pd.DataFrame) -> None:
    """Draw the critical-difference diagram: methods that a bar joins are not told apart."""
    import scikit_posthocs

    with matplotlib.rc_context({"font.size": _FONT}):
        figure = Figure(figsize=(6.4, 2.6), layout="constrained")
        axes = figure.subplots()
        ranks = table.rank(axis=1).mean()
        scikit_posthocs.critical_difference_diagram(
            ranks,
            matrix,
            ax=axes,
            label_fmt_left="{label} ({rank:.2f})",
            label_fmt_right="({rank:.2f}) {label}",
            color_palette=dict.fromkeys(ranks.index, "black"),
        )
        axes.set_title("Mean rank of the error, lower is better")
        figure.savefig(path, dpi=150)


def write(folder: Path, points: Sequence[Point], labels: Mapping[str, str]) -> str:
    """Write the tables to ``results.md`` and the figures beside it; returns the tables."""
    parts = []
    for name, line in LINES.items():
        own = [point for point in points if point.line == name]
        if own:
            parts += [f"## {line.title}", line_table(own, labels)]
        if len(own) > 2 and name != "benchmark":
            plot_line(folder / f"regimes-{name.lower()}.png", own, labels)
    # Each regime once, though it be on several lines.
    first: dict[str, Point] = {}
    for point in points:
        if not LINES[point.line].at_rates:
            first.setdefault(point.place, point)
    once = list(first.values())
    # A failed run is infinite: the last rank.
    means = [{labels[name]: mean(scores) for name, scores in p.scores.items()} for p in once]
    table = pd.DataFrame(means)
    if once and OURS in labels:
        parts += ["## Against linear scalarization", verdicts(once)]
    if len(once) >= FEWEST and len(labels) > 2:
        text, matrix = differences(table)
        parts += ["## All together", text]
        plot_ranks(folder / "regimes-ranks.png", table, matrix)
    if once and OURS in labels:
        parts += ["## What advise says", advice_table(once)]
    page = "\n\n".join(parts) + "\n"
    (folder / "results.md").write_text(page, encoding="utf-8")
    return page
