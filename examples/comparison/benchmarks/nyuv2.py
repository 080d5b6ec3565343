"""NYUv2: depth, surface normals and 13 classes of every pixel of a room, by a SegNet.

All methods minimise the likelihoods of the heads: cross-entropy, and squared errors of the depth
and of the unit normal (whose half is 1 - cosine where the output has length 1). The published
losses of depth and normals, absolute error and 1 - cosine, are no likelihoods of a linear head.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.comparison.benchmark import Benchmark, Source
from examples.comparison.images import CODE, image_benchmark
from examples.comparison.tasks import Outputs, Task
from examples.data import nyuv2
from examples.data.folder import listing_digest
from examples.data.nyuv2 import CLASSES, Scenes
from examples.image_models import SegNet
from examples.training import Losses, TrainSettings

_TASKS = (
    Task("depth", "regression", "mae", "m"),
    Task("normals", "regression", "angle", "°", classes=3),
    Task("segmentation", "multiclass", "miou", classes=CLASSES),
)
_WIDTHS = (64, 128, 256, 512, 512)
_DEGREES = (11.25, 22.5, 30.0)
_IGNORED = -1
_HELD_OUT = 10  # one of so many training scenes validates


def split(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Classes ``(B, H, W)``, depth ``(B, 1, H, W)`` and normals ``(B, 3, H, W)``."""
    return y[:, 0].nan_to_num(_IGNORED).long(), y[:, 1:2], y[:, 2:]


def losses(outputs: Outputs, y: Tensor) -> Losses:
    """Means over the pixels with a label; of the normals over their components, too."""
    classes, depth, normals = split(y)
    seen, facing = ~depth.isnan(), ~normals.isnan()
    return {
        "depth": F.mse_loss(outputs["regression"][seen], depth[seen]),
        "normals": F.mse_loss(outputs["normals"][facing], normals[facing]),
        "segmentation": F.cross_entropy(outputs["segmentation"], classes, ignore_index=_IGNORED),
    }


@torch.no_grad()
def evaluate(model: nn.Module, part: Scenes) -> list[dict[str, float]]:
    """Metrics of each task over all pixels with a label; angles are in degrees."""
    # Takes seconds to import, and every comparison imports this file.
    from torchmetrics import MeanAbsoluteError, MeanAbsolutePercentageError
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    model.eval()
    absolute, relative = MeanAbsoluteError(), MeanAbsolutePercentageError()
    iou = MulticlassJaccardIndex(CLASSES, ignore_index=_IGNORED)
    accuracy = MulticlassAccuracy(CLASSES, average="micro", ignore_index=_IGNORED)
    angles = []
    for rows in torch.arange(len(part)).split(part.chunk):
        x, y = part.batch(rows)
        outputs = {name: output.cpu() for name, output in model(x).items()}
        classes, depth, normals = split(y.cpu())
        for metric in (iou, accuracy):
            metric.update(outputs["segmentation"], classes)
        seen = ~depth.isnan()
        for metric in (absolute, relative):
            metric.update(outputs["regression"][seen], depth[seen])
        cosine = F.cosine_similarity(outputs["normals"], normals)
        angles.append(cosine[~normals[:, 0].isnan()].clamp(-1, 1).acos().rad2deg())
    angle = torch.cat(angles)
    within = {f"within {most:g}°": (angle < most).double().mean().item() for most in _DEGREES}
    return [
        {"mae": absolute.compute().item(), "relative error": relative.compute().item()},
        {"angle": angle.mean().item(), "median angle": angle.median().item(), **within},
        {"miou": iou.compute().item(), "accuracy": accuracy.compute().item()},
    ]


def load(size: int | None = None, max_train: int | None = None) -> Benchmark:
    """Look for the files; ``val`` is the test part, a tenth of ``train`` validates."""
    (folder, count), (test_folder, test_count) = map(nyuv2.part, nyuv2.PARTS)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held_out = max(count // _HELD_OUT, 1)
    train = Scenes(folder, order[held_out:][:max_train], augment=True)
    return image_benchmark(
        _TASKS,
        (train, Scenes(folder, order[:held_out]), Scenes(test_folder, torch.arange(test_count))),
        partial(SegNet, _WIDTHS),
        _WIDTHS[0],
        head=partial(nn.Conv2d, kernel_size=1),
        network=f"SegNet of {'-'.join(map(str, _WIDTHS))} channels, 1×1 convolutions",
        version={
            "files": listing_digest([*folder.rglob("*.npy"), *test_folder.rglob("*.npy")]),
            "split_seed": 0,
        },
        losses=losses,
        evaluate=evaluate,
    )


SOURCE = Source(
    title="NYUv2",
    load=load,
    settings=TrainSettings(epochs=20, batch_size=2, learning_rate=1e-4),
    preset="utkface",
    paper=TrainSettings(epochs=200, batch_size=2, learning_rate=1e-4, schedule="half"),
    dense=True,
    code=(nyuv2, *CODE),
)
