"""What uncertainty costs: ``python -m examples.uncertainty.cost``.

CPU time of a prediction with standard deviations over that of the plain forward pass, and of the
exact pass over the training data over that of an evaluation epoch, both medians of interleaved
runs, on random data of the shapes of the paper's networks with trained last layers. laplace-torch
(last layer, full covariance, on the same network) beside it where it has the likelihood.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bayesagg import BinaryHead, MulticlassHead, RegressionHead
from bayesagg.predicting import Predictor
from examples.benchmark.cases import Task
from examples.benchmark.measuring import interleave
from examples.benchmark.networks import CRITERIA, MultiHead
from examples.comparison.networks import elu_layers
from examples.uncertainty.arms import package

RUNS = 15


def resnet() -> nn.Module:
    """ResNet-18 without its last layer."""
    from torchvision.models import resnet18

    net = resnet18()
    net.fc = nn.Identity()
    return net


def compare(actions: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Median seconds of CPU time of each, in turn; short ones several times in a run."""
    first = interleave(actions, rounds=1, warmup=0, clock="cpu")
    times = {name: 1 + int(0.02 / seconds) for name, [seconds] in first.items()}
    found = interleave(actions, rounds=runs, calls=times, warmup=0, clock="cpu")
    return {name: median(seconds) for name, seconds in found.items()}


def trained(net: MultiHead, heads: dict[str, Any], batches: list[Any]) -> None:
    """The last layers trained on what the trunk gives, as they are where predictions are made."""
    with torch.no_grad():
        seen = [(net.backbone(x), y) for x, y in batches]
    optimizer = torch.optim.Adam(net.heads.parameters(), lr=1e-2)
    for _ in range(20):
        for h, y in seen:
            optimizer.zero_grad()
            for name, head in heads.items():
                CRITERIA[head.kind](net.heads[name](h), y[name]).backward()
            optimizer.step()


def labels(kind: str, outputs: int, z: Tensor) -> Tensor:
    """Random ones that depend on a network's outputs."""
    z = (z - z.mean(0)) / z.std(0)
    if kind == "multiclass":
        return torch.distributions.Categorical(logits=2 * z).sample()
    noisy = z + torch.randn_like(z)
    return noisy if kind == "regression" else (noisy > 0).float()


def case(title: str, head: Any, trunk: nn.Module, outputs: list[int], x: Tensor, size: int) -> None:
    """Print one case, of batches of a size."""
    with torch.no_grad():
        width = trunk.eval()(x[:2]).shape[1]
    kind = head.kind
    tasks = tuple(Task(f"task {i}", kind, count) for i, count in enumerate(outputs))
    net = MultiHead(trunk, width, tasks).eval()
    heads = {name: head(module) for name, module in net.heads.items()}
    with torch.no_grad():
        guides = MultiHead(trunk, width, tasks).eval()(x)
    targets = {name: labels(kind, z.shape[1], z) for name, z in guides.items()}
    batches = [
        (x[rows], {name: y[rows] for name, y in targets.items()})
        for rows in torch.arange(len(x)).split(size)
    ]
    trained(net, heads, batches)
    predictor, first = Predictor.fit(net, heads, batches), batches[0][0]

    @torch.no_grad()
    def plain() -> None:
        net(first)

    @torch.no_grad()
    def epoch() -> None:
        for inputs, _ in batches:
            net(inputs)

    def predict() -> list[tuple[Tensor, Tensor]]:
        """What a user looks at."""
        return [(p.mean, p.stddev) for p in predictor(first).values()]

    actions = {"forward": plain, "predict": predict}
    fits = {"epoch": epoch, "fit": lambda: Predictor.fit(net, heads, batches)}
    library = package("laplace") if kind != "binary" and len(outputs) == 1 else None
    if library is not None:
        [name] = heads
        likelihood = "regression" if kind == "regression" else "classification"
        model = nn.Sequential(trunk, net.heads[name])
        loader = DataLoader(TensorDataset(x, targets[name]), batch_size=len(first))

        def fitted() -> Any:
            own = library.Laplace(
                model, likelihood, subset_of_weights="last_layer", hessian_structure="full"
            )
            own.fit(loader)
            return own

        own = fitted()
        actions["laplace-torch"] = lambda: own(first)
        fits["laplace-torch"] = fitted
    seconds, fit = compare(actions, RUNS), compare(fits, 3)
    size = sum(b.numel() * b.element_size() for b in predictor.posteriors.buffers()) / 2**20
    print(
        f"{title}: {len(first)} of {len(x)} data, {len(outputs)} heads of {outputs[0]} outputs, ",
        end="",
    )
    print(f"{width + 1} weights an output, {size:.1f} MiB")
    for what, found in (("prediction", seconds), ("exact pass", fit)):
        unit = next(iter(found.values()))
        rows = ", ".join(f"{key} {1e3 * v:.1f} ms ({v / unit:.2f})" for key, v in found.items())
        print(f"  {what}: {rows}", flush=True)


def main() -> None:
    """All cases."""
    torch.manual_seed(0)
    x = torch.randn(7680, 274)
    case("QM9 proxy", RegressionHead, elu_layers(274, (256, 256, 64)), [11], x, 120)
    case("QM9 proxy", RegressionHead, elu_layers(274, (256, 256, 64)), [1] * 11, x, 120)
    images = torch.randn(1024, 3, 32, 32)
    case("CIFAR-MTL, ResNet-18", BinaryHead, resnet(), [20], images, 64)
    images = torch.randn(512, 3, 128, 128)
    case("larger images, ResNet-18", MulticlassHead, resnet(), [5], images, 16)


if __name__ == "__main__":
    main()
