"""The methods by name. An arm with other settings is one more line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from bayesagg.presets import PAPER
from examples.comparison.ablations import PARTS, Ablation
from examples.comparison.ensembles import Ensemble, HeadEnsemble, NetworkEnsemble, per_member
from examples.comparison.gap import ImprovableGapBalancing
from examples.comparison.gradients import IMTLG, MGDA, AlignedMTL, CAGrad, FairGrad, PCGrad
from examples.comparison.weighting import (
    FAMO,
    DynamicWeightAverage,
    RandomLossWeighting,
    UncertaintyWeighting,
)
from examples.methods import (
    BayesAggregation,
    LinearScalarization,
    ScaleInvariant,
    library_settings,
)
from examples.training import Criterion

SINGLE_TASK = "stl"
_UB = {"representation": True}  # gradients with respect to the shared representation


@dataclass(frozen=True)
class Method:
    """An arm of a comparison.

    Attributes:
        label: Name in tables and figures.
        update: Its update.
        settings: Keyword arguments of the update; those of an update of the library are
            ``wrapper`` and one mapping per kind of head.
        space: Values of its own settings that are tried, the default among them; a dot reaches into
            a mapping (``binary.s``).
    """

    label: str
    update: type[LinearScalarization]
    settings: dict[str, Any] = field(default_factory=dict)
    space: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """All settings, with the library's defaults filled in."""
        if not issubclass(self.update, BayesAggregation):
            return self.settings
        own = {k: v for k, v in self.settings.items() if k not in ("wrapper", "heads")}
        return own | library_settings(self.settings["wrapper"], self.settings["heads"])

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
        return Method(self.label, self.update, settings, self.space)

    def network(self, make: Callable[[], nn.Module]) -> nn.Module:
        """The network to train: one of the benchmark's, or an ensemble of them."""
        if issubclass(self.update, Ensemble):
            return self.update.network(make, **self.settings)
        return make()

    def criterion(self, losses: Criterion) -> Criterion:
        """The criterion for what :meth:`network` returns."""
        return per_member(losses) if issubclass(self.update, Ensemble) else losses


def bayesagg(
    label: str,
    wrapper: dict[str, Any] | None = None,
    *,
    space: dict[str, tuple[Any, ...]] | None = None,
    **heads: dict[str, Any],
) -> Method:
    """An arm of the library: settings of the wrapper, and of ``regression``, ``binary`` and
    ``multiclass`` heads; what is not given is the library's default.
    """
    kinds = {kind: heads.get(kind, {}) for kind in ("regression", "binary", "multiclass")}
    return Method(label, BayesAggregation, {"wrapper": wrapper or {}, "heads": kinds}, space or {})


def paper(label: str, preset: str) -> Method:
    """The paper's arm with the settings of a benchmark; its exponents are searched as there.

    Two departures: the pre-training is that of every arm, and moments of classification are taken
    by quadrature, which is what the paper's 1,024 samples estimate and is faster.
    """
    chosen = PAPER[preset]
    heads: dict[str, dict[str, Any]] = {}
    for kind in ("regression", "binary", "multiclass"):
        heads[kind] = dict(getattr(chosen, kind))
        if heads[kind].pop("num_samples", None):
            heads[kind]["moments"] = "quadrature"
    return bayesagg(
        label,
        {key: value for key, value in chosen.wrapper.items() if key != "pretrain_epochs"},
        space={f"heads.{kind}.s": grid for kind, grid in chosen.s_grid.items()},
        **heads,
    )


# What every comparison has besides; its losses share no parameter, so their sum trains each alone.
SINGLE_TASK_METHOD = Method("STL", LinearScalarization)


def methods(preset: str) -> dict[str, Method]:
    """All methods, the paper's with the preset of a benchmark."""
    return {
        "ls": Method("LS", LinearScalarization),
        "si": Method("SI", ScaleInvariant),
        "rlw": Method("RLW", RandomLossWeighting),
        "dwa": Method("DWA", DynamicWeightAverage, space={"temperature": (2.0, 1.0, 5.0)}),
        "uw": Method("UW", UncertaintyWeighting, space={"rate": (1.0, 10.0)}),
        "famo": Method("FAMO", FAMO, space={"rate": (0.025, 0.005), "decay": (1e-3, 1e-2)}),
        "igbv2": Method("IGBv2", ImprovableGapBalancing, space={"rate": (3e-4, 3e-3)}),
        "mgda": Method("MGDA", MGDA, space={"normalize": (False, True)}),
        "pcgrad": Method("PCGrad", PCGrad),
        "cagrad": Method("CAGrad", CAGrad, space={"c": (0.4, 0.2, 0.8)}),
        "imtl-g": Method("IMTL-G", IMTLG),
        # The same equation as FairGrad's with α = 1.
        "nash-mtl": Method("Nash-MTL", FairGrad, {"alpha": 1.0}),
        "fairgrad": Method("FairGrad", FairGrad, space={"alpha": (2.0, 0.5, 5.0)}),
        "aligned-mtl": Method("Aligned-MTL", AlignedMTL),
        "mgda-ub": Method("MGDA-UB", MGDA, _UB, space={"normalize": (False, True)}),
        "imtl-g-ub": Method("IMTL-G-UB", IMTLG, _UB),
        "aligned-mtl-ub": Method("Aligned-MTL-UB", AlignedMTL, _UB),
        "bayesagg-paper": paper("BayesAgg, paper", preset),
        "bayesagg": bayesagg("BayesAgg"),
    }


def more_methods(preset: str) -> dict[str, Method]:
    """Ensembles and ablations: a comparison has them where it names them."""
    kinds: dict[str, dict[str, Any]] = {"regression": {}, "binary": {}, "multiclass": {}}
    zero = paper("BayesAgg, paper, s = 0", preset)
    for kind in zero.space:
        zero = zero.with_settings({kind: 0.0})
    return {
        "ensemble-heads": Method("Ensemble (heads)", HeadEnsemble, {"members": 1024}),
        "ensemble-networks": Method("Ensemble (networks)", NetworkEnsemble, {"members": 10}),
        "bayesagg-paper-s0": replace(zero, space={}),
        "without-readout": bayesagg("without read-out", regression={"readout": "gradient"}),
    } | {
        f"without-{part}": Method(
            f"without {part.replace('-', ' ')}",
            Ablation,
            {"without": part, "wrapper": {}, "heads": kinds},
        )
        for part in PARTS
    }
