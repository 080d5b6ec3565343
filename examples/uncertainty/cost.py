"""What uncertainty costs: ``python -m examples.uncertainty.cost``.

CPU time of a prediction with standard deviations over that of the plain forward pass, and of the
exact pass over the training data over that of an evaluation epoch, both medians of interleaved
runs, on random data of the shapes of the paper's networks, and of an MLP so small that only
overhead is left, with trained last layers. laplace-torch (last layer, full covariance, on the same
network) beside it where it has the likelihood.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bayesagg.predicting import Predictor
from examples.arguments import Parser
from examples.benchmark.cases import CASES, Task, several
from examples.benchmark.measuring import interleave
from examples.benchmark.networks import CRITERIA, NETWORKS, MultiHead
from examples.comparison.networks import dense_layers
from examples.methods import HEADS
from examples.uncertainty.arms import package

RUNS, SLOW = 15, 0.5  # runs of each; a third of them where it takes so many seconds


def resnet() -> nn.Module:
    """ResNet-18 without its last layer."""
    from torchvision.models import resnet18

    net = resnet18()
    net.fc = nn.Identity()
    return net


def compare(actions: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Median seconds of CPU time of each, in turn; short ones several times in a run."""
    first = interleave(actions, rounds=range(1), warmup=0, clock="cpu")
    times = {name: 1 + int(0.02 / seconds) for name, [seconds] in first.items()}
    runs = runs if min(seconds for [seconds] in first.values()) < SLOW else max(3, runs // 3)
    found = interleave(actions, rounds=range(runs), calls=times, warmup=0, clock="cpu")
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


def labels(kind: str, z: Tensor) -> Tensor:
    """Random ones that depend on a network's outputs."""
    z = (z - z.mean(0)) / z.std(0)
    if kind == "multiclass":
        return torch.distributions.Categorical(logits=2 * z).sample()
    noisy = z + torch.randn_like(z)
    return noisy if kind == "regression" else (noisy > 0).float()


def case(title: str, tasks: tuple[Task, ...], trunk: nn.Module, inputs: list[Any]) -> None:
    """Print one case, of batches of inputs."""
    with torch.no_grad():
        width = trunk.eval()(inputs[0]).shape[1]
        guide = MultiHead(trunk, width, tasks).eval()
        targets = [
            {task.name: labels(task.kind, z[task.name]) for task in tasks}
            for z in map(guide, inputs)
        ]
    net = MultiHead(trunk, width, tasks).eval()
    heads = {task.name: HEADS[task.kind](net.heads[task.name]) for task in tasks}
    batches = list(zip(inputs, targets, strict=True))
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
    alone = len(tasks) == 1 and tasks[0].kind != "binary"
    library = package("laplace") if alone else None
    if library is not None:
        [name] = heads
        likelihood = "regression" if tasks[0].kind == "regression" else "classification"
        model = nn.Sequential(trunk, net.heads[name])
        data = TensorDataset(torch.cat(inputs), torch.cat([y[name] for y in targets]))
        loader = DataLoader(data, batch_size=len(first))

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
    count = [len(y[tasks[0].name]) for y in targets]
    outputs = ", ".join(str(task.outputs) for task in tasks)
    print(f"{title}: {count[0]} of {sum(count)} data, heads of {outputs} outputs, ", end="")
    print(f"{width + 1} weights an output, {size:.1f} MiB")
    for what, found in (("prediction", seconds), ("exact pass", fit)):
        unit = next(iter(found.values()))
        rows = ", ".join(f"{key} {1e3 * v:.1f} ms ({v / unit:.2f})" for key, v in found.items())
        print(f"  {what}: {rows}", flush=True)


def main() -> None:
    """All cases."""
    Parser("uncertainty.cost", __doc__).parse_args()
    torch.manual_seed(0)
    x = list(torch.randn(7680, 274).split(120))
    trunk = dense_layers(274, (256, 256, 64))
    case("QM9 proxy", (Task("all", "regression", 11),), trunk, x)
    case("QM9 proxy", several("regression", 11), trunk, x)
    for name in ("qm9", "cifar_mtl", "utkface"):
        paper = CASES[name]
        backbone, draw = NETWORKS[paper.network](paper)
        assert backbone is not None
        case(f"the paper's {name}", paper.tasks, backbone, [draw() for _ in range(4)])
    images = list(torch.randn(512, 3, 128, 128).split(16))
    case("larger images, ResNet-18", (Task("label", "multiclass", 5),), resnet(), images)


if __name__ == "__main__":
    main()
