"""ChestX-ray14: 14 findings from an X-ray image of the chest."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from examples import image_models
from examples.comparison.benchmark import Benchmark, Source, paper_settings
from examples.comparison.images import CODE, image_benchmark
from examples.comparison.tasks import Task
from examples.data import chestxray14
from examples.data.folder import data_folder, listing_digest
from examples.data.images import ImageFiles, Transform
from examples.training import TrainSettings

_NETWORK, _WIDTH = "resnet34", 256
_SIZE, _CROP = 256, 224  # pixels
_ALL_PATIENTS = 30_805


def load(patients: int | None = None, max_train: int | None = None) -> Benchmark:
    """Read table and lists; the official test part, the rest split by patient 7 : 1.

    Images are read when needed. The network starts from ImageNet's weights where they are at hand.
    """
    data = chestxray14.read(patients, seed=0)
    train, val, test = chestxray14.parts(data, seed=0)
    weights = image_models.imagenet_weights(_NETWORK)
    folder = data_folder(chestxray14.FOLDER) / chestxray14.IMAGES
    files = [folder / name for name in data.names]
    create_transform = image_models.timm("data").create_transform
    erase = {"re_prob": 0.25, "re_mode": "pixel"}
    augment = create_transform(_CROP, is_training=True, color_jitter=0.4, **erase)
    plain = create_transform(_CROP, is_training=False, crop_pct=_CROP / _SIZE)

    def part(rows: Tensor, transform: Transform) -> ImageFiles:
        return ImageFiles(files, rows, data.findings[rows], transform, _SIZE, "L")

    start = "random initialisation" if weights is None else "ImageNet weights"
    return image_benchmark(
        [Task(name, "binary", "auroc") for name in chestxray14.FINDINGS],
        (part(train[:max_train], augment), part(val, plain), part(test, plain)),
        partial(image_models.resnet, _NETWORK, _WIDTH, weights),
        _WIDTH,
        network=f"{_NETWORK}, {start}, {_WIDTH} ELU units",
        version={
            "files": listing_digest(files),
            "patients": len(data.patients.unique()),
            "weights": image_models.weights_digest(weights),
            "split_seed": 0,
        },
    )


SOURCE = Source(
    title="ChestX-ray14",
    load=load,
    settings=TrainSettings(epochs=100, batch_size=256),
    preset="chestxray14",
    size_name="patients",
    size_range=(100, _ALL_PATIENTS),
    paper=paper_settings("chestxray14", "steps"),
    code=(chestxray14, *CODE),
)
