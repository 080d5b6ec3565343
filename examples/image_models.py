"""Networks for images: CNNs, SegNet, and timm's ResNets with the paper's last shared layer."""

from __future__ import annotations

import hashlib
import importlib
import pickle
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.data import DataFileError, DataUnavailableError, data_folder


def timm(module: str) -> ModuleType:
    """A module of timm.

    Raises:
        DataUnavailableError: If timm cannot be imported, or torchvision, which it needs.
    """
    try:
        return importlib.import_module(f"timm.{module}")
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise DataUnavailableError(
            f"this benchmark needs timm, and torchvision in the version that fits torch "
            f"{torch.__version__}; get them with: pip install timm torchvision ({error})"
        ) from error


def cnn(channels: int = 160) -> nn.Sequential:
    """The CNN of CIFAR-MTL: ``(B, 3, 32, 32)`` to ``(B, channels)``.

    Three times convolution, ELU and 3×3 max-pooling (32 → 10 → 3 → 1), batch norm at last.
    """
    layers: list[nn.Module] = []
    for inputs in (3, channels, channels):
        conv = nn.Conv2d(inputs, channels, 3, padding=1, padding_mode="reflect")
        layers += [conv, nn.ELU(), nn.MaxPool2d(3)]
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.Flatten())


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A 3×3 convolution, batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def nine_layers(widths: Sequence[int] = (64, 128, 256, 512)) -> nn.Sequential:
    """The network of FAMO for CelebA: ``(B, 3, H, W)`` to ``(B, widths[-1])``.

    A block of the first width, two of each other, with 2×2 max-pooling in between; their mean over
    the image goes through two linear layers.
    """
    last = widths[-1]
    layers: list[nn.Module] = [block(3, widths[0])]
    for inputs, outputs in pairwise(widths):
        layers += [nn.MaxPool2d(2), block(inputs, outputs), block(outputs, outputs)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for _ in range(2):
        layers += [nn.Linear(last, last, bias=False), nn.BatchNorm1d(last), nn.ReLU()]
    return nn.Sequential(*layers)


class SegNet(nn.Module):
    """SegNet as MTAN has it: ``(B, 3, H, W)`` to ``(B, widths[0], H, W)``.

    VGG-16's convolutions with batch normalisation and 2×2 max-pooling, and their mirror image, in
    which values go back to the places of the maxima.

    Args:
        widths: Channels of each level; ``H`` and ``W`` are multiples of two to their number.
    """

    def __init__(self, widths: Sequence[int] = (64, 128, 256, 512, 512)) -> None:
        super().__init__()
        more = [1 if level < 2 else 2 for level in range(len(widths))]
        down, up = (3, *widths), (widths[0], *widths)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            own = (block(width, width) for _ in range(more[level]))
            self.down.append(nn.Sequential(block(down[level], width), *own))
            own = (block(up[level], up[level]) for _ in range(more[level]))
            self.up.append(nn.Sequential(block(width, up[level]), *own))

    def forward(self, x: Tensor) -> Tensor:
        """Shared features of every pixel."""
        places = []
        for layers in self.down:
            x, place = F.max_pool2d(layers(x), 2, return_indices=True)
            places.append(place)
        for layers, place in zip(reversed(self.up), reversed(places), strict=True):
            x = layers(F.max_unpool2d(x, place, 2))
        return x


def resnet(name: str, width: int = 256, weights: Path | None = None) -> nn.Sequential:
    """A ResNet whose classifier is replaced by a linear layer and an ELU: to ``(B, width)``.

    Args:
        name: ``"resnet18"``, or another that timm has under torchvision's weights too.
        width: Dimensions of the last layer.
        weights: File of torchvision's weights; ``None``: random initialisation.

    Raises:
        DataUnavailableError: If timm is not installed.
        DataFileError: If the file does not hold the weights of that network.
    """
    network = timm("models").create_model(name, pretrained=False)
    if weights is not None:
        try:
            network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, EOFError, TypeError, pickle.UnpicklingError) as error:
            raise DataFileError(f"{weights} does not hold weights of {name}: {error}") from error
    network.reset_classifier(width)
    return nn.Sequential(network, nn.ELU())


def imagenet_weights(name: str) -> Path | None:
    """File of the ImageNet weights of a ResNet: torchvision's, which timm's registry names too.

    Taken from ``weights`` in the data folder, else from torch's cache, else downloaded into it.

    Returns:
        The file; ``None``, with a warning, where there is none and it cannot be downloaded.
    """
    url = timm("models").get_pretrained_cfg(f"{name}.tv_in1k").url
    file = Path(url).name
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file
    for path in (data_folder("weights") / file, cached):
        if path.exists():
            return path
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(cached), hash_prefix=cached.stem.split("-")[-1])
    except (OSError, RuntimeError) as error:  # RuntimeError: not the file that was asked for
        warnings.warn(
            f"{name} starts from random weights and not from ImageNet's: {file} could not be "
            f"downloaded ({error}). Put it into {data_folder('weights')} to have it",
            stacklevel=2,
        )
        return None
    return cached


def weights_digest(path: Path | None) -> str:
    """Start of the hash of a file of weights: torchvision's file names end with it."""
    if path is None:
        return "none, random initialisation"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]
