"""timm's models and augmentation: ``python -m examples.loops.timm_images``.

Two overlaid digits of MNIST and a class for each. The backbone is any model of timm's registry
(``--model resnet18``, ``--pretrained`` for its weights where they can be downloaded), and the
augmentation is of its ``create_transform``.
"""

from __future__ import annotations

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from bayesagg import BayesAggWrapper, MulticlassHead
from examples.loops import data

SIZE = 36  # pixels
# A flipped digit is none, and one that is cut off is another.
SHAPE = {"input_size": (1, SIZE, SIZE), "mean": (0.2,), "std": (0.35,), "interpolation": "bilinear"}
AUGMENTED = create_transform(
    **SHAPE,
    is_training=True,
    scale=(0.85, 1.0),
    ratio=(0.9, 1.1),
    hflip=0.0,
    color_jitter=None,
    re_prob=0.25,
    re_mode="pixel",
)
PLAIN = create_transform(**SHAPE, is_training=False, crop_pct=1.0)


class Digits(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images as timm's transforms want them, and the classes of both digits."""

    def __init__(
        self, images: np.ndarray, targets: dict[str, Tensor], transform: nn.Module
    ) -> None:
        self.images, self.targets, self.transform = images, targets, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.transform(Image.fromarray(self.images[row]))
        return x, {task: y[row] for task, y in self.targets.items()}


class Model(nn.Module):
    """A backbone without its classifier, and two heads."""

    def __init__(self, name: str, pretrained: bool) -> None:
        super().__init__()
        self.backbone = timm.create_model(name, pretrained=pretrained, in_chans=1, num_classes=0)
        width = self.backbone.num_features
        self.heads = nn.ModuleDict({task: nn.Linear(width, 10) for task in ("left", "right")})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.backbone(x)
        return {task: head(h) for task, head in self.heads.items()}


@torch.no_grad()
def accuracy(model: Model, loader: DataLoader) -> dict[str, float]:
    model.eval()
    right = {task: 0 for task in model.heads}
    for x, targets in loader:
        for task, z in model(x).items():
            right[task] += int((z.argmax(1) == targets[task]).sum())
    return {task: n / len(loader.dataset) for task, n in right.items()}


@data.in_one_line
def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = data.parser("timm_images", images=3000, epochs=6, lr=3e-3)
    parser.add_argument("--model", default="test_resnet", help="of timm.list_models()")
    parser.add_argument("--pretrained", action="store_true")
    args = parser.parse_args(arguments)
    images, targets = data.two_digits(args.images)
    torch.manual_seed(args.seed)
    rows, test = (part.numpy() for part in data.split(len(images)))
    train = Digits(images[rows], {t: y[rows] for t, y in targets.items()}, AUGMENTED)
    plain = Digits(images[test], {t: y[test] for t, y in targets.items()}, PLAIN)
    loader = DataLoader(train, batch_size=64, shuffle=True)
    model = Model(args.model, args.pretrained)
    optimizer = BayesAggWrapper(
        create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05),
        shared_rep_hook=model.backbone,
        heads={task: MulticlassHead(head) for task, head in model.heads.items()},
        rule=args.rule,
    )
    for epoch in range(args.epochs):
        model.train()
        for x, y in loader:
            losses = {task: F.cross_entropy(z, y[task]) for task, z in model(x).items()}
            optimizer.zero_grad()
            total = optimizer.step(losses)
        print(f"epoch {epoch}: loss {float(total):.3f}")
    found = accuracy(model, DataLoader(plain, batch_size=256))
    print("accuracy of the test part:", found)
    return found


if __name__ == "__main__":
    main()
