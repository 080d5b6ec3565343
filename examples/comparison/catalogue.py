"""The methods by name. An arm with other settings is one more line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from torch import nn

from bayesagg import LikelihoodRule
from bayesagg.presets import PAPER
from examples.comparison import gradients, rechub, weighting
from examples.comparison.ablations import InSampleRule, PriorInNoiseRule, Readout
from examples.comparison.benchmark import Source
from examples.comparison.ensembles import Ensemble, HeadEnsemble, NetworkEnsemble, per_member
from examples.comparison.gap import ImprovableGapBalancing
from examples.methods import BayesAggregation, LinearScalarization, PaperAggregation, ScaleInvariant
from examples.training import Criterion, TrainSettings

SINGLE_TASK = "stl"
_UB = {"representation": True}  # gradients with respect to the shared representation
_KINDS = ("regression", "binary", "multiclass")
# All heads have to read one tensor.
_COMMON = (gradients.GradientWeighting, PaperAggregation, Ensemble)


@dataclass(frozen=True)
class Method:
    """An arm of a comparison."""

    label: str  # name in tables and figures
    update: type[LinearScalarization]  # its update
    settings: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the update
    # Values of its own settings that are tried, the default among them; a dot reaches into a
    # mapping (``heads.binary.s``)
    space: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    # Settings of the training that are its own, such as a learning rate
    training: dict[str, Any] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """All settings, those of rules written out, in the types that JSON has."""
        found = _plain(self.settings)
        if issubclass(self.update, BayesAggregation) and not issubclass(self.update, Readout):
            found.setdefault("rule", _plain(LikelihoodRule()))
        return found

    def with_settings(self, own: dict[str, Any]) -> Method:
        """The method with some settings replaced; a dot reaches into a mapping."""
        settings = dict(self.settings)
        for name, value in own.items():
            *outer, last = name.split(".")
            place = settings
            for part in outer:
                place[part] = dict(place.get(part, {}))
                place = place[part]
            place[last] = value
        return replace(self, settings=settings)

    def trained(self, settings: TrainSettings) -> TrainSettings:
        """Settings of the training with its own in place."""
        return replace(settings, **self.training)

    def code(self) -> list[type]:
        """Classes that its result depends on."""
        classes = [self.update, *(v for v in self.settings.values() if isinstance(v, type))]
        return [base for cls in classes for base in cls.__mro__[:-1]]

    def network(self, make: Callable[[], nn.Module]) -> nn.Module:
        """The network to train: one of the benchmark's, or an ensemble of them."""
        if issubclass(self.update, Ensemble):
            return self.update.network(make, **self.settings)
        return make()

    def criterion(self, losses: Criterion) -> Criterion:
        """The criterion for what :meth:`network` returns."""
        return per_member(losses) if issubclass(self.update, Ensemble) else losses


def unsuited(method: Method, source: Source) -> str:
    """Why a method cannot train the networks of a benchmark; empty where it can."""
    if issubclass(method.update, _COMMON) and not source.common:
        return "needs a network whose heads all read one tensor"
    if issubclass(method.update, Ensemble) and source.dense:
        return "needs one output per datum and task"
    if issubclass(method.update, rechub.Adaptive) and rechub not in source.code:
        return "needs a network of torch-rechub"
    return ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
        return {"name": type(value).__name__, **own}
    return value.__name__ if isinstance(value, type) else value


def bayesagg(
    label: str, *, rule: LikelihoodRule | None = None, memory: int | None = None, **heads: Any
) -> Method:
    """The library's default; settings of the rule and of heads by kind for another arm."""
    given = {"rule": rule, "memory": memory, "heads": heads or None}
    return Method(label, BayesAggregation, {k: v for k, v in given.items() if v is not None})


def paper(label: str, preset: str) -> Method:
    """The paper's arm with the settings of a benchmark; its exponents are searched as there.

    Two departures: a shorter training has the same share of pre-training, and moments of
    classification are taken by quadrature, which is what the paper's 1,024 samples estimate and is
    faster.
    """
    chosen = PAPER[preset]
    heads = {kind: dict(getattr(chosen, kind)) for kind in _KINDS}
    for settings in heads.values():
        if settings.pop("num_samples", None):
            settings["moments"] = "quadrature"
    settings = {"rule": chosen.rule, "heads": heads, "epochs": chosen.training["epochs"]}
    space = {f"heads.{kind}.s": grid for kind, grid in chosen.s_grid.items()}
    return Method(label, PaperAggregation, settings, space)


# What every comparison has besides; its losses share no parameter, so their sum trains each alone.
SINGLE_TASK_METHOD = Method("STL", LinearScalarization)


def methods(preset: str) -> dict[str, Method]:
    """All methods, the paper's with the preset of a benchmark."""
    return {
        "ls": Method("LS", LinearScalarization),
        "si": Method("SI", ScaleInvariant),
        "rlw": Method("RLW", weighting.RandomLossWeighting),
        "dwa": Method(
            "DWA", weighting.DynamicWeightAverage, space={"temperature": (2.0, 1.0, 5.0)}
        ),
        "uw": Method("UW", weighting.UncertaintyWeighting, space={"rate": (1.0, 10.0)}),
        "famo": Method(
            "FAMO", weighting.FAMO, space={"rate": (0.025, 0.005), "decay": (1e-3, 1e-2)}
        ),
        "igbv2": Method("IGBv2", ImprovableGapBalancing, space={"rate": (3e-4, 3e-3)}),
        "mgda": Method("MGDA", gradients.MGDA, space={"normalize": (False, True)}),
        "pcgrad": Method("PCGrad", gradients.PCGrad),
        "cagrad": Method("CAGrad", gradients.CAGrad, space={"c": (0.4, 0.2, 0.8)}),
        "imtl-g": Method("IMTL-G", gradients.IMTLG),
        # The same equation as FairGrad's with α = 1.
        "nash-mtl": Method("Nash-MTL", gradients.FairGrad, {"alpha": 1.0}),
        "fairgrad": Method("FairGrad", gradients.FairGrad, space={"alpha": (2.0, 0.5, 5.0)}),
        "aligned-mtl": Method("Aligned-MTL", gradients.AlignedMTL),
        "uw-so": Method(
            "UW-SO", weighting.UncertaintySoftOptimal, space={"temperature": (20.0, 5.0, 100.0)}
        ),
        "stch": Method("STCH", weighting.STCH, space={"mu": (1.0, 0.5, 0.1)}),
        "go4align": Method("GO4Align", weighting.GO4Align, space={"groups": (2, 3, 5)}),
        "excess-mtl": Method("ExcessMTL", gradients.ExcessMTL, space={"rate": (0.01, 0.1, 1.0)}),
        "db-mtl": Method("DB-MTL", gradients.DBMTL, space={"decay": (0.9, 0.5, 0.1)}),
        "ntkmtl-sr": Method("NTKMTL-SR", gradients.NTKMTL),
        "mgda-ub": Method("MGDA-UB", gradients.MGDA, _UB, space={"normalize": (False, True)}),
        "imtl-g-ub": Method("IMTL-G-UB", gradients.IMTLG, _UB),
        "aligned-mtl-ub": Method("Aligned-MTL-UB", gradients.AlignedMTL, _UB),
        "bayesagg-paper": paper("BayesAgg, paper", preset),
        "bayesagg": bayesagg("BayesAgg"),
    }


def more_methods(preset: str) -> dict[str, Method]:
    """Read-outs of others, ablations and ensembles: a comparison has them where it names them."""
    zero = paper("BayesAgg, paper, s = 0", preset)
    for kind in zero.space:
        zero = zero.with_settings({kind: 0.0})
    return {
        "ls-readout": Method("LS, same read-out", Readout, {"base": LinearScalarization}),
        "si-readout": Method("SI, same read-out", Readout, {"base": ScaleInvariant}),
        "uw-readout": Method(
            "UW, same read-out", Readout, {"base": weighting.UncertaintyWeighting}
        ),
        **ablations(),
        "bayesagg-paper-s0": replace(zero, space={}),
        "rechub-uwl": Method("UWL of torch-rechub", rechub.Uncertainty),
        "rechub-metabalance": Method("MetaBalance of torch-rechub", rechub.MetaBalance),
        "rechub-gradnorm": Method("GradNorm of torch-rechub", rechub.GradNorm),
        "ensemble-heads": Method("Ensemble (heads)", HeadEnsemble, {"members": 1024}),
        "ensemble-networks": Method("Ensemble (networks)", NetworkEnsemble, {"members": 10}),
    }


def ablations() -> dict[str, Method]:
    """The default without one of its parts, or with another setting of it."""
    by_gradients = {kind: {"readout": "gradient"} for kind in _KINDS}
    rule = LikelihoodRule()
    return {
        "bayesagg-free": bayesagg("BayesAgg, free length", rule=replace(rule, keep_length=False)),
        "without-readout": bayesagg("without read-out", **by_gradients),
        "without-noise": bayesagg("without learned noise", regression={"noise_variance": 1.0}),
        "without-student-t": bayesagg(
            "without Student-t", rule=replace(rule, degrees_of_freedom=1e6)
        ),
        "without-leave-one-out": bayesagg("without leave-one-out", rule=InSampleRule()),
        "without-lag": bayesagg("without lag", rule=replace(rule, lag=10)),
        "without-warmup": bayesagg("without warm-up", rule=replace(rule, warmup=0)),
        "without-prior-in-labels": bayesagg("prior in units of the noise", rule=PriorInNoiseRule()),
        "fixed-prior": bayesagg(
            "one prior for any number of data", rule=replace(rule, prior_variance=0.05)
        ),
        **{
            f"memory-{factor}": bayesagg(f"memory of {factor} D", memory=factor)
            for factor in (2, 5, 10, 20, 40)
        },
    }
