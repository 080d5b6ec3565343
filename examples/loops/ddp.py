"""Data-parallel training: ``torchrun --nproc-per-node=2 -m examples.loops.ddp``.

Age, sex, race and education of the people of a survey; every process has its part of each batch.
Evidence is summed over the processes, so all have one posterior, that of the whole batch. Without
``torchrun`` one process trains on the same batches. On a machine without GPUs the backend is gloo.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from bayesagg import BayesAggWrapper
from examples.loops import data
from examples.loops.data import SURVEY_LOSSES, SurveyNet


def losses_of(model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
    x, *targets = batch
    return {t: SURVEY_LOSSES[t](z, y) for (t, z), y in zip(model(x).items(), targets, strict=True)}


def train(
    net: SurveyNet, part: TensorDataset, args: argparse.Namespace, device: torch.device
) -> None:
    """All processes go through the same epochs; each takes its share of every batch."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    sampler = DistributedSampler(part, ranks, rank, seed=args.seed, drop_last=True)
    loader = DataLoader(part, args.batch // ranks, sampler=sampler, drop_last=True)
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    # Of the model itself, whose heads the engine watches; the ranks are those of the forward pass.
    adam = torch.optim.Adam(net.parameters(), lr=args.lr)
    optimizer = BayesAggWrapper(adam, net.backbone, net.described(), rule=args.rule)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            losses = losses_of(model, [part.to(device) for part in batch])
            optimizer.zero_grad()
            optimizer.step(losses)
    if rank == 0:  # the state is the same on all
        args.output.mkdir(parents=True, exist_ok=True)
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, args.output / "checkpoint.pt")


@data.in_one_line
def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = data.parser("ddp", epochs=10, lr=2e-3, output=Path("output/ddp"))
    parser.add_argument("--batch", type=int, default=64, help="of all processes together")
    args = parser.parse_args(arguments)
    x, targets = data.survey()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    launched = "RANK" in os.environ  # torchrun's
    if launched:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    net = SurveyNet(x.shape[1]).to(device)
    rows, test = data.split(len(x))
    train(net, TensorDataset(x[rows], *(y[rows] for y in targets.values())), args, device)
    with torch.no_grad():
        batch = [part[test].to(device) for part in (x, *targets.values())]
        losses = {task: float(loss) for task, loss in losses_of(net.eval(), batch).items()}
    if not launched or dist.get_rank() == 0:
        print("losses of the test part:", losses)
    if launched:
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
