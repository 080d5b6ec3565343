"""NYUv2: depth, surface normals and 13 classes of every pixel of a room, by a SegNet.

All methods minimise the likelihoods of the heads: cross-entropy, and squared errors of the depth
and of the unit normal (whose half is 1 - cosine where the output has length 1). The published
losses of depth and normals, absolute error and 1 - cosine, are no likelihoods of a linear head.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.comparison.benchmark import Benchmark, Source
from examples.comparison.images import CODE, image_benchmark
from examples.comparison.tasks import Outputs, Task
from examples.data import DataFileError, DataUnavailableError, data_folder, listing_digest, require
from examples.image_models import SegNet
from examples.training import Losses, TrainSettings

FOLDER, PARTS = "nyuv2", ("train", "val")
SIZE = 288, 384
MAPS = {"image": (*SIZE, 3), "label": SIZE, "depth": (*SIZE, 1), "normal": (*SIZE, 3)}
CLASSES = 13
LAYOUT = (
    "NYUv2 as preprocessed for MTAN is downloaded by the link on https://github.com/lorenmt/mtan; "
    f"its folders {PARTS[0]}/ and {PARTS[1]}/, with {', '.join(MAPS)} in each and files 0.npy, "
    f"1.npy, … in these, belong into {FOLDER}/ in the data folder."
)
_SCALES = (1.0, 1.2, 1.5)  # of the augmentation of MTAN's code
_TASKS = (
    Task("depth", "regression", "mae", "m"),
    Task("normals", "regression", "angle", "°", classes=3),
    Task("segmentation", "multiclass", "miou", classes=CLASSES),
)
_WIDTHS = (64, 128, 256, 512, 512)
_DEGREES = (11.25, 22.5, 30.0)
_IGNORED = -1
_HELD_OUT = 10  # one of so many training scenes validates


@dataclass(frozen=True)
class Scenes:
    """Scenes of a part, read when a batch asks for them.

    The random numbers of the augmentation follow from the rows of the batch and their order.
    """

    folder: Path  # that of the part
    places: Tensor  # numbers of the files, shape ``(n,)``
    augment: bool = False  # random crops scaled up by 1, 1.2 or 1.5, and flips
    chunk: int = 2  # scenes at once in evaluation

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images, ``(B, 3, 288, 384)``, and targets, ``(B, 5, 288, 384)``.

        Targets are the class from 0 to 12, depth in metres and a unit normal; NaN where not known.

        Raises:
            DataFileError: If a file is not what it should be; the message names it.
        """
        x, y = zip(*(read(self.folder, int(place)) for place in self.places[rows]), strict=True)
        if self.augment:
            generator = torch.Generator().manual_seed(zlib.crc32(rows.numpy().tobytes()))
            x, y = zip(*(changed(*pair, generator) for pair in zip(x, y, strict=True)), strict=True)
        return torch.stack(x), torch.stack(y)


def part(name: str) -> tuple[Path, int]:
    """Folder of a part, and the number of its scenes.

    Raises:
        DataUnavailableError: If a file is not in the data folder.
    """
    folder = data_folder(FOLDER) / name
    require(folder, MAPS, LAYOUT)
    count = sum(1 for _ in (folder / "image").glob("*.npy"))
    if count == 0:
        raise DataUnavailableError(f"{folder / 'image'} has no files. {LAYOUT}")
    for kind in MAPS:
        require(folder / kind, [f"{place}.npy" for place in range(count)], LAYOUT)
    return folder, count


def read(folder: Path, place: int) -> tuple[Tensor, Tensor]:
    """Image, ``(3, 288, 384)``, and targets, ``(5, 288, 384)``, of a scene."""
    image, label, depth, normal = (
        _array(folder / kind / f"{place}.npy", shape) for kind, shape in MAPS.items()
    )
    if not (label.frac().eq(0) & (label >= -1) & (label < CLASSES)).all():
        raise DataFileError(
            f"{folder / 'label' / f'{place}.npy'}: labels should be -1 to {CLASSES - 1}; download "
            "it again"
        )
    label = label.where(label >= 0, torch.nan)[None]
    depth = depth.where(depth > 0, torch.nan)
    normal = F.normalize(normal, dim=0).where(normal.ne(0).any(0), torch.nan)
    return image, torch.cat([label, depth, normal])


def _array(path: Path, shape: tuple[int, ...]) -> Tensor:
    """An array, float32, channels first."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataFileError(
            f"{path} cannot be read as an array ({error}); download it again"
        ) from error
    if found.shape != shape or found.dtype.kind not in "fiu" or not np.isfinite(found).all():
        raise DataFileError(
            f"{path}: {found.dtype} of shape {found.shape}; it should hold finite numbers of shape "
            f"{shape}, as MTAN's release does. Download it again"
        )
    array = torch.from_numpy(found.astype(np.float32))
    return array.movedim(-1, 0) if array.dim() == 3 else array


def changed(image: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random crop scaled up to the whole, mirrored or not: a crop at 1.2 is as much nearer."""
    scale = _SCALES[int(torch.randint(len(_SCALES), (), generator=generator))]
    corner = []
    for side in SIZE:
        length = int(side / scale)
        start = int(torch.randint(side - length + 1, (), generator=generator))
        corner.append(slice(start, start + length))
    window = (None, slice(None), *corner)
    x = F.interpolate(image[window], SIZE, mode="bilinear", align_corners=True)[0]
    y = F.interpolate(targets[window], SIZE)[0]
    y[1] /= scale
    if torch.rand((), generator=generator) < 0.5:
        x, y = x.flip(-1), y.flip(-1)
        y[2] = -y[2]  # the normal's part along the width
    return x, y


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
    (folder, count), (test_folder, test_count) = map(part, PARTS)
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
    code=CODE,
)
