"""What uncertainty costs: ``python -m examples.uncertainty.cost``.

CPU time of a prediction with standard deviations over that of the plain forward pass, and of the
exact pass over the training data over that of an evaluation epoch, both medians of interleaved
runs, on random data of the shapes of the paper's networks. laplace-torch (last layer, full
covariance, on the same network) beside it where it has the likelihood.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bayesagg import BinaryHead, MulticlassHead, RegressionHead
from bayesagg.predicting import Predictor
from examples.uncertainty.peers import package

RUNS = 15
BATCHES = 16


class Net(nn.Module):
    """A trunk and one head."""

    def __init__(self, trunk: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def mlp() -> nn.Module:
    """That of the QM9 proxy."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((274, 256), (256, 256), (256, 64)):
        layers += [nn.Linear(inputs, outputs), nn.ELU()]
    return nn.Sequential(*layers)


def resnet() -> nn.Module:
    """ResNet-18 without its last layer."""
    from torchvision.models import resnet18

    net = resnet18()
    net.fc = nn.Identity()
    return net


def cpu(action: Callable[[], Any]) -> float:
    """Seconds of CPU time."""
    start = time.process_time()
    action()
    return time.process_time() - start


def compare(actions: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Median seconds of each, one after the other in turn."""
    for action in actions.values():
        action()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(runs):
        for name, action in actions.items():
            seconds[name].append(cpu(action))
    return {name: median(values) for name, values in seconds.items()}


def both(p: Any) -> tuple[Tensor, Tensor]:
    """What a user looks at."""
    return p.mean, p.stddev


def case(
    name: str, head: Any, trunk: nn.Module, width: int, outputs: int, x: Tensor, runs: int
) -> None:
    """Print one case."""
    net = Net(trunk, width, outputs).eval()
    kind = head.kind
    label = {
        "regression": torch.randn(len(x), outputs),
        "binary": (torch.rand(len(x), outputs) > 0.5).float(),
        "multiclass": torch.randint(outputs, (len(x),)),
    }[kind]
    heads = {"task": head(net.head)}
    batches = [(x, {"task": label})] * BATCHES
    predictor = Predictor.fit(net, heads, batches)

    @torch.no_grad()
    def plain() -> None:
        net(x)

    @torch.no_grad()
    def epoch() -> None:
        for inputs, _ in batches:
            net(inputs)

    actions = {"forward": plain, "predict": lambda: both(predictor(x)["task"])}
    fits = {"epoch": epoch, "fit": lambda: Predictor.fit(net, heads, batches)}
    library = package("laplace") if kind != "binary" else None
    if library is not None:
        task = "regression" if kind == "regression" else "classification"
        loader = DataLoader(
            TensorDataset(
                x.repeat(BATCHES, *(1 for _ in x.shape[1:])),
                label.repeat(BATCHES, *(1 for _ in label.shape[1:])),
            ),
            batch_size=len(x),
        )

        def fitted() -> Any:
            own = library.Laplace(
                net, task, subset_of_weights="last_layer", hessian_structure="full"
            )
            own.fit(loader)
            return own

        own = fitted()
        actions["laplace-torch"] = lambda: own(x)
        fits["laplace-torch"] = fitted
    seconds, fit = compare(actions, runs), compare(fits, 3)
    size = sum(b.numel() * b.element_size() for b in predictor.posteriors.buffers()) / 2**20
    print(
        f"{name}: {len(x)} data, {width + 1} weights an output, {outputs} outputs, {size:.1f} MiB"
    )
    for what, found in (("prediction", seconds), ("fit", fit)):
        first = next(iter(found.values()))
        rows = ", ".join(f"{key} {1e3 * v:.1f} ms ({v / first:.2f})" for key, v in found.items())
        print(f"  {what}: {rows}", flush=True)


def main() -> None:
    """All cases."""
    torch.manual_seed(0)
    case("QM9 proxy", RegressionHead, mlp(), 64, 11, torch.randn(120, 274), 40)
    images = torch.randn(64, 3, 32, 32)
    case("CIFAR-MTL, ResNet-18", BinaryHead, resnet(), 512, 20, images, RUNS)
    images = torch.randn(16, 3, 128, 128)
    case("larger images, 5 classes", MulticlassHead, resnet(), 512, 5, images, RUNS // 3)


if __name__ == "__main__":
    main()
