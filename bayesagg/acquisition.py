"""What to measure next: functions of predictions, the larger the more worthwhile.

Each takes a :class:`bayesagg.predicting.Prediction` of one task at the candidates; several tasks
are added up by the caller, who knows what they are worth.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesagg.predicting import MulticlassPrediction, Prediction, RegressionPrediction
from bayesagg.predicting.prediction import in_full_precision
from bayesagg.predicting.student import NORMAL, student_cdf, student_density

__all__ = ["bald", "expected_improvement", "select", "variance"]


def variance(prediction: Prediction) -> Tensor:
    """Epistemic variance, summed over the outputs of the head (the classes).

    Args:
        prediction: of one task.

    Returns:
        a number for each datum (position), in squared units of the labels.

    Raises:
        TypeError: for what is no prediction of one task.
    """
    dimension = _outputs(prediction)
    return prediction.epistemic.sum(dimension)


def bald(
    prediction: Prediction,
    *,
    joint: bool = False,
    samples: int = 256,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Information that the labels would give of the weights, in nats (Houlsby et al., 2011).

    Regressions in closed form, ``1/2 log(1 + h̃ᵀSh̃ / τ²)``, jointly ``1/2 log det(1 + H̃SH̃ᵀ / τ²)``,
    given the scale of the noise. Classifications by drawing weights; jointly (Kirsch et al., 2019)
    the entropy of all labels together is estimated from as many draws of them, which bounds it by
    ``log samples``.

    Args:
        prediction: of one task.
        joint: of all data of the prediction together, a scalar; data that repeat each other then
            count once.
        samples: draws of the weights of a classification.
        generator: of them.

    Returns:
        a number for each datum (position), summed over outputs, or a scalar.

    Raises:
        TypeError: for what is no prediction of one task.
        ValueError: for no samples.
    """
    dimension = _outputs(prediction)
    if samples < 1:
        raise ValueError(f"samples must be a positive number, got {samples!r}.")
    if isinstance(prediction, RegressionPrediction):
        return _regression_information(prediction, joint)
    p = prediction.sample(samples, generator=generator)
    p = p.movedim(2, -1) if dimension == 1 else p
    # Drawn probabilities of the classes of every output, [n, …, outputs, classes].
    many = isinstance(prediction, MulticlassPrediction)
    p = p[..., None, :] if many else torch.stack([1 - p, p], -1)
    expected = _entropy(p).mean(0)
    if joint:
        total = sum(_joint_entropy(one, generator) for one in p.flatten(1, -3).unbind(2))
        return torch.as_tensor(total - expected.sum()).clamp_min(0)
    return (_entropy(p.mean(0)) - expected).clamp_min(0).sum(-1)


def expected_improvement(
    prediction: Prediction, best: Tensor | float, *, maximize: bool = True
) -> Tensor:
    """How far a regression's value is expected to exceed the best one known (Jones et al., 1998).

    With location ``m``, scale ``s`` and ``u = (m - best)/s`` it is ``s (u Φ(u) + φ(u))`` of a
    normal, and ``s (u F(u) + f(u) (ν + u²)/(ν - 1))`` of a Student-t value. The value is that of
    the function, without the noise of a label.

    Args:
        prediction: of a regression.
        best: value to exceed, a number or one for each output.
        maximize: whether larger values are better.

    Returns:
        of the shape of the head's output, in units of the labels.

    Raises:
        TypeError: for a classification.
        ValueError: for a best value that is neither one number nor one for each output.
    """
    _outputs(prediction)
    if not isinstance(prediction, RegressionPrediction):
        raise TypeError(
            f"expected_improvement needs a regression, got a {type(prediction).__name__}: rank "
            f"candidates of a classification by its mean."
        )
    scale = prediction.output_variance.sqrt().clamp_min(torch.finfo(prediction.mean.dtype).tiny)
    outputs = prediction.posterior.head.out_features
    mean = prediction.mean
    known = torch.as_tensor(best, dtype=mean.dtype, device=mean.device)
    if known.dim() > 1 or known.numel() not in (1, outputs):
        raise ValueError(
            f"best must be one number or one for each output, [{outputs}], got shape "
            f"{list(known.shape)}: pass the best label so far, such as y.max(0).values."
        )
    gain = mean - known.expand(outputs).view_as(prediction.dof)
    u = (gain if maximize else -gain) / scale
    nu = prediction.dof.expand_as(u)
    tail = torch.where(nu < NORMAL, (nu + u.square()) / (nu - 1), 1.0)
    return scale * (u * student_cdf(u, nu) + tail * student_density(u, nu)).clamp_min(0)


def select(prediction: Prediction, count: int) -> Tensor:
    """A batch to label together, by greedy choice: each datum given the labels of those before.

    The next one adds most to ``1/2 log det(1 + W H̃SH̃ᵀ)`` over the outputs, ``W = 1/τ²`` of a
    regression, ``p (1 - p)`` of a binary output (its Laplace approximation), so that data which say
    the same are not chosen twice. A greedy batch has at least 63 % of the information of the best.

    Args:
        prediction: of a regression or of binary outputs.
        count: data to choose, at most those of the prediction.

    Returns:
        their places among the data (positions), ``[count]``, in the order of the choice.

    Raises:
        TypeError: for a head of classes.
        ValueError: for a count out of range.
    """
    dimension = _outputs(prediction)
    if isinstance(prediction, MulticlassPrediction):
        raise TypeError("select needs a regression or binary outputs: rank classes by bald().")
    if not 0 < count <= len(prediction.rows):
        raise ValueError(f"count must be 1 to {len(prediction.rows)}, got {count!r}.")
    posterior = prediction.posterior
    if isinstance(prediction, RegressionPrediction):
        weight = (1 / posterior.noise.to(prediction.rows))[:, None]
    else:
        p = prediction.mean.movedim(dimension, 0).flatten(1)
        weight = p * (1 - p) / posterior.scale.to(p).square()[:, None]
    with in_full_precision(prediction.rows.device):
        return _greedy(posterior.whitened(prediction.rows), weight, count)


def _greedy(a: Tensor, weight: Tensor, count: int) -> Tensor:
    """The choice, given rows ``[o, N, D]`` whose inner products are ``h̃ᵢᵀSh̃ⱼ``."""
    chosen: list[int] = []
    for _ in range(count):
        spread = a.square().sum(2)
        gain = (weight * spread).log1p().sum(0)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        one = a[:, chosen[-1], :, None]
        own = one.square().sum(1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
        w = weight[:, chosen[-1] if weight.shape[1] > 1 else 0][:, None, None]
        # Root of the rank-one change of S that a label makes.
        factor = (1 - (1 + w * own).rsqrt()) / own
        a = a - factor * (a @ one) * one.mT
    return torch.tensor(chosen, device=a.device)


def _outputs(prediction: Prediction) -> int:
    """The dimension of the outputs; a TypeError for what is no prediction of one task."""
    if not isinstance(prediction, Prediction):
        raise TypeError(
            f"expected the prediction of one task, as in predictor(x)['age'], got a "
            f"{type(prediction).__name__}."
        )
    return 1 if prediction.posterior.head.channels_first else -1


def _regression_information(prediction: RegressionPrediction, joint: bool) -> Tensor:
    posterior = prediction.posterior
    noise = posterior.noise.to(prediction.mean.dtype)
    if not joint:
        # The calibration scales either alike.
        ratio = prediction.epistemic / prediction.aleatoric
        return 0.5 * ratio.log1p().sum(_outputs(prediction))
    with in_full_precision(prediction.rows.device):
        ratio = posterior.covariance(prediction.rows) / noise[:, None, None]
    identity = torch.eye(ratio.shape[1], dtype=ratio.dtype, device=ratio.device)
    return 0.5 * torch.logdet(identity + ratio).sum()


def _entropy(p: Tensor) -> Tensor:
    """In nats, over the last dimension."""
    entropy: Tensor = torch.special.entr(p).sum(-1)
    return entropy


def _joint_entropy(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """Of labels of all data, from probabilities under drawn weights, ``[n, N, C]``."""
    number, data, _ = p.shape
    labels = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(number, data)
    logs = p.clamp_min(torch.finfo(p.dtype).tiny).log()
    # Of every drawn labelling its probability under every draw of the weights.
    each = torch.stack(
        [logs.gather(2, y[None, :, None].expand(number, -1, 1))[..., 0].sum(1) for y in labels]
    )
    entropy: Tensor = -(each.logsumexp(1) - math.log(number)).mean()
    return entropy
