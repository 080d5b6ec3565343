"""Synthetic scenes, 64×64, with maps of classes and depth.

Objects of four kinds stand at random distances, solids in front of a receding floor. The nearer of
two hides the other, size falls with distance, a haze takes the colours away, and every kind has a
paint that it tends to wear: image, classes and depth hang together. Borders of objects have no
class, holes of the depth sensor no depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CLASSES", "IGNORED", "SIZE", "Scenes", "make_scenes"]

CLASSES = ("floor", "disc", "square", "triangle", "ring")
SIZE = 64
IGNORED = -100
_MAX_OBJECTS = 6
_HAZE = torch.tensor([0.75, 0.8, 0.85])
# What each kind tends to be painted with, without floor.
_PAINTS = torch.tensor([[0.9, 0.2, 0.2], [0.2, 0.3, 0.9], [0.9, 0.8, 0.1], [0.1, 0.7, 0.3]])


@dataclass(frozen=True)
class Scenes:
    """Images with two maps of labels."""

    images: Tensor  # ``[N, 3, 64, 64]``, colours in 0 to 1 with noise
    # ``[N, 64, 64]`` indices into :data:`CLASSES`; ``IGNORED`` at the objects' borders
    classes: Tensor
    depth: Tensor  # ``[N, 1, 64, 64]``, 0 (near) to 1 (far); NaN in the holes of the sensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        return Scenes(self.images[index], self.classes[index], self.depth[index])


def make_scenes(count: int, *, seed: int) -> Scenes:
    """``count`` scenes, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    scenes = [_draw(generator) for _ in range(count)]
    return Scenes(*(torch.stack(part) for part in zip(*scenes, strict=True)))


def _draw(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """One scene, painted from the back to the front."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    tilt = 0.3 * torch.rand((), generator=generator)
    depth = 1.0 - (0.5 + tilt) * y / SIZE
    colour = (0.3 + 0.4 * torch.rand(3, 1, 1, generator=generator)).expand(3, SIZE, SIZE).clone()
    classes = torch.zeros(SIZE, SIZE, dtype=torch.long)
    border = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    count = int(torch.randint(2, _MAX_OBJECTS + 1, (), generator=generator))
    distances = torch.rand(count, generator=generator).sort(descending=True).values
    for distance in distances.tolist():
        kind = int(torch.randint(1, len(CLASSES), (), generator=generator))
        centre = torch.rand(2, generator=generator) * SIZE
        radius = 16 - 10 * distance
        u, v = (x - centre[0]) / radius, (y - centre[1]) / radius
        inside, outer = _contains(kind, u, v), _contains(kind, u / 1.12, v / 1.12)
        border = (border & ~inside) | (outer & ~inside)
        classes = torch.where(inside, kind, classes)
        depth = torch.where(inside, 0.1 + 0.7 * distance, depth)
        paint = 0.5 * _PAINTS[kind - 1] + 0.5 * torch.rand(3, generator=generator)
        shade = (1 - 0.3 * v).clamp(0.4, 1.3)
        colour = torch.where(inside, paint.view(3, 1, 1) * shade, colour)
    haze = (0.8 * depth)[None]
    image = colour * (1 - haze) + _HAZE.view(3, 1, 1) * haze
    image = image + 0.05 * torch.randn(image.shape, generator=generator)
    classes = torch.where(border, IGNORED, classes)
    return image, classes, torch.where(_hole(x, y, generator), torch.nan, depth)[None]


def _contains(kind: int, u: Tensor, v: Tensor) -> Tensor:
    """Which points lie in an object of radius one."""
    r2 = u.square() + v.square()
    if kind == 1:
        return r2 < 1
    if kind == 2:
        return (u.abs() < 0.85) & (v.abs() < 0.85)
    if kind == 3:
        return (v < 0.8) & (v > 2 * u.abs() - 1)
    return (r2 < 1) & (r2 > 0.3)


def _hole(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """A disc in which the depth sensor sees nothing."""
    centre = torch.rand(2, generator=generator) * SIZE
    radius = 4 + 8 * torch.rand((), generator=generator)
    return (x - centre[0]).square() + (y - centre[1]).square() < radius.square()
