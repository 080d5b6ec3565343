"""Small training runs under the paper's rule, as plain data.

All settings that matter are given, because defaults are the library's to change; none that does
not, which the library may warn of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, NamedTuple

from bayesagg import BinaryHead, MulticlassHead, RegressionHead
from bayesagg.heads import Head


class HeadCase(NamedTuple):
    """Kind, outputs (or classes), whether it has a bias, and keywords of the description."""

    kind: type[Head]
    outputs: int
    bias: bool
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A training run; ``rule_seed`` is of samples and subsets, the data have one of their own."""

    name: str
    heads: Mapping[str, HeadCase]
    _: KW_ONLY
    seed: int = 0  # the number of the case
    rule_seed: int = 0
    layout: str = "rows"  # [N, c]; "tokens": [2, N/2, c]; "maps": [2, c, 2, N/4], 1×1 convolutions
    sizes: Sequence[int] = (12,)  # data in a batch, in turn
    steps: int = 7  # of the optimizer, plain SGD
    steps_per_epoch: int = 3
    accumulate: int = 1  # backward passes a step
    lr: float = 0.05
    missing: float = 0.0  # share of the labels, every output's for itself
    targets: bool = False  # whether labels are passed, or read off the losses
    soft: bool = False  # labels are probabilities
    weights: str | None = None  # of examples: "smooth" from 0.5 to 1.5, "zero" of 0 or 1
    reduction: str = "mean"
    factors: Mapping[str, float] = field(default_factory=dict)  # on losses
    absent: Mapping[int, Sequence[str]] = field(default_factory=dict)  # tasks by step
    rule: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pretraining_steps(self) -> int:
        """Steps of linear scalarization."""
        return self.rule.get("pretrain_epochs", 1) * self.steps_per_epoch


def reg(outputs=1, s=0.85, prior=1.0, noise=1.0, readout="posterior", bias=True) -> HeadCase:
    """A regression, by default with the paper's settings for QM9."""
    settings = {"s": s, "prior_variance": prior, "readout": readout, "noise_variance": noise}
    return HeadCase(RegressionHead, outputs, bias, settings)


def two(
    outputs=1, s=0.05, prior=1.0, readout="gradient", bias=True, kind=BinaryHead, **moments
) -> HeadCase:
    """Binary outputs, by default with a small exponent, as the paper's for classification."""
    settings = {"s": s, "prior_variance": prior, "readout": readout, "moments": "quadrature"}
    return HeadCase(kind, outputs, bias, {**settings, **moments})


def cls(classes=3, *args, **settings) -> HeadCase:
    """Classes; otherwise as :func:`two`."""
    return two(classes, *args, kind=MulticlassHead, **settings)


MIXED = {"reg": reg(2), "bin": two(2), "cls": cls(3)}
# Exponents at which every task has a say.
LEVEL = {"reg": reg(2, 0.5), "bin": two(2, 0.5), "cls": cls(3, 0.5)}
LEARNED = {"reg": reg(2, noise="learned")}
SAMPLED = {"moments": "monte_carlo", "num_samples": 16}
WIDE = {"s": 0.3, "prior": 30.0}
POSTERIOR = {"readout": "posterior"}
MEAN, FULL = {"gradient_scale": "mean"}, {"covariance": "full"}


def heads(**own: HeadCase) -> Mapping[str, HeadCase]:
    return own


CASES = [
    # Kinds, exponents, noise, priors and read-outs.
    Case("mixed", MIXED),
    Case("mixed_level", LEVEL, rule=MEAN),
    Case("uniform", heads(reg=reg(2, 0.0), bin=two(1, 0.0), cls=cls(4, 0.0))),
    Case("regression_fixed_noise", heads(a=reg(3, noise=0.5), b=reg(noise=0.5)), rule=MEAN),
    Case(
        "regression_learned_noise",
        heads(a=reg(2, 1.0, noise="learned"), b=reg(1, 1.0, 1.0, "learned", "gradient")),
    ),
    Case(
        "regression_every_noise",
        heads(a=reg(2, 0.85, 0.3, "learned"), b=reg(1, 0.85, 4.0, 0.2))
        | heads(c=reg(2, 0.4, 1.0, 3.0, "gradient")),
    ),
    Case("binary", heads(a=two(3, 1.0), b=two(1, 0.5, 0.2), c=two(1, 0.7))),
    Case(
        "binary_posterior_readout",
        heads(a=two(2, 0.5, **POSTERIOR), b=two(1, 0.5, 0.5, **POSTERIOR), c=two(1, 0.5)),
    ),
    Case("multiclass", heads(a=cls(3, 0.5), b=cls(4, 0.5), c=cls(3, 0.5, 0.3), d=cls(2, 0.5))),
    Case(
        "multiclass_posterior_readout",
        heads(a=cls(3, 0.3, **POSTERIOR), b=cls(3, 0.8), c=cls(4, 0.3, 0.5, **POSTERIOR)),
    ),
    # Wide posteriors: every kind of nodes, Sobol points and panels among them, has its turn.
    Case(
        "wide_posteriors",
        heads(
            bin=two(2, **WIDE), two=cls(2, **WIDE), cls=cls(4, **WIDE), reg=reg(noise=5.0, **WIDE)
        ),
        sizes=(12, 4, 30),
        rule={"pretrain_epochs": 0},
    ),
    Case(
        "without_biases",
        heads(reg=reg(2, bias=False), bin=two(2, bias=False), cls=cls(3, bias=False, **POSTERIOR)),
    ),
    Case(
        "with_and_without_biases",
        heads(a=reg(2, noise="learned"), b=two(1, 0.5, bias=False))
        | heads(c=reg(noise="learned", bias=False), d=two(2, 0.5), e=cls(3, 0.5, bias=False)),
    ),
    # Epochs, batches and losses.
    Case("no_pretraining", LEVEL, steps_per_epoch=2, rule={"pretrain_epochs": 0}),
    # Noise is learned from the last epoch of pre-training on.
    Case("long_pretraining", MIXED | LEARNED, steps_per_epoch=2, rule={"pretrain_epochs": 2}),
    Case("batches_of_all_sizes", MIXED | LEARNED, sizes=(12, 3, 1, 20, 7), steps=9),
    # Tasks differ in their exponents, so that the factor common to all losses must not matter.
    Case("sums_and_factors", MIXED, lr=0.005, reduction="sum", factors={"reg": 0.3, "cls": 2.0}),
    Case("accumulated", MIXED, accumulate=2, sizes=(6, 9)),
    # Eq. 6.
    Case("full_covariance", heads(reg=reg(2, 1.0), bin=two(2, 1.0), cls=cls(3, 1.0)), rule=FULL),
    Case("full_covariance_powers", MIXED, missing=0.3, rule=FULL | MEAN),
    # Eq. 11. Samples come from one generator a step, block by block, and are drawn in every step
    # that is not pre-training.
    Case(
        "monte_carlo",
        heads(reg=reg(2, 0.5), a=two(2, 0.5, **SAMPLED), b=two(1, 0.5), c=cls(3, 0.5, **SAMPLED))
        | heads(d=cls(3, 0.5, **SAMPLED), e=two(1, 0.5, **SAMPLED)),
        rule_seed=5,
    ),
    Case(
        "monte_carlo_full_covariance",
        heads(reg=reg(2, 0.5), bin=two(2, 0.5, **SAMPLED), cls=cls(3, 0.5, **SAMPLED)),
        rule_seed=6,
        missing=0.2,
        targets=True,
        rule=FULL,
    ),
    # Labels: missing, given, absent, weighted, soft.
    Case("missing", LEVEL, missing=0.4),
    Case(
        "missing_targets",
        LEVEL | heads(reg=reg(2, 0.5, noise="learned")),
        missing=0.4,
        targets=True,
    ),
    Case("targets", MIXED, targets=True),
    # A whole epoch, of steps 2 and 3, passes without `b` and `cls`.
    Case(
        "absent",
        heads(a=reg(2, 0.5, noise="learned"), b=reg(1, 0.5, noise="learned"))
        | heads(bin=two(2, 0.5), cls=cls(3, 0.5, **POSTERIOR)),
        steps_per_epoch=2,
        steps=8,
        absent={0: ["bin"], 2: ["b", "cls"], 3: ["b", "cls", "bin"], 5: ["a"], 6: ["cls"]},
    ),
    Case(
        "absent_and_missing_targets",
        LEVEL | heads(more=two(1, 0.5)),
        missing=0.3,
        targets=True,
        absent={1: ["reg"], 4: ["bin", "cls"], 5: ["more"], 6: ["reg", "more"]},
    ),
    # Weights of examples are in their gradients and in the evidence.
    Case("example_weights", MIXED, targets=True, weights="smooth"),
    Case("example_weights_of_zero", LEVEL, targets=True, weights="zero"),
    Case("soft_labels", LEVEL, targets=True, soft=True),
    # Dense heads: every position is a datum.
    Case("tokens", LEVEL, layout="tokens", missing=0.2, targets=True),
    Case("maps", MIXED, layout="maps", missing=0.3),
    Case("maps_targets", LEVEL, layout="maps", missing=0.3, targets=True),
    Case(
        "maps_subset",
        MIXED | LEARNED,
        rule_seed=7,
        layout="maps",
        sizes=(24,),
        rule={"max_data": 9, **MEAN},
    ),
    Case("subset_missing", LEVEL, rule_seed=8, sizes=(16, 5), missing=0.4, rule={"max_data": 6}),
    # Heads without any evidence are not written when the others are.
    Case(
        "absent_at_first",
        heads(a=reg(1, 0.5), b=reg(1, 0.5, noise="learned"), bin=two(2, 0.5, **POSTERIOR)),
        steps=8,
        absent={0: ["b", "bin"], 1: ["b", "bin"], 2: ["b", "bin"], 3: ["bin"], 4: ["bin"]},
    ),
]
CASES = [replace(case, seed=number) for number, case in enumerate(CASES)]
