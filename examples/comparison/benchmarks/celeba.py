"""CelebA: 40 binary attributes of a face, by the protocol of FAMO (Liu et al., 2023)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from examples.comparison.benchmark import Benchmark, Source
from examples.comparison.images import CODE, image_benchmark
from examples.comparison.tasks import Task
from examples.data import celeba
from examples.data.folder import listing_digest
from examples.data.images import ImageFiles
from examples.image_models import nine_layers, timm
from examples.training import TrainSettings

_SIZE = 64  # pixels
_WIDTHS = (64, 128, 256, 512)


def load(size: int | None = None, max_train: int | None = None) -> Benchmark:
    """Read the lists; the parts are the official ones. Images are read when needed, to 64×64."""
    faces = celeba.read()
    scaled = timm("data").create_transform(
        _SIZE, is_training=False, crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3
    )

    def part(number: int, most: int | None = None) -> ImageFiles:
        rows: Tensor = (faces.parts == number).nonzero()[:most, 0]
        return ImageFiles(faces.files, rows, faces.targets[rows], scaled, _SIZE)

    return image_benchmark(
        [Task(name, "binary", "f1") for name in faces.names],
        (part(0, max_train), part(1), part(2)),
        partial(nine_layers, _WIDTHS),
        _WIDTHS[-1],
        network="CNN of nine layers, random initialisation",
        version={
            "files": listing_digest(faces.files),
        },
    )


SOURCE = Source(
    title="CelebA",
    load=load,
    settings=TrainSettings(epochs=15, batch_size=256),
    preset="chestxray14",
    paper=TrainSettings(
        epochs=15, batch_size=256, learning_rate=3e-4, schedule="constant", selection="best"
    ),
    code=(celeba, *CODE),
)
