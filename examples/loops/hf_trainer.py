"""Hugging Face ``Trainer``: ``python -m examples.loops.hf_trainer``.

A small BERT reads molecules of QM9 as text and predicts properties of which labels are missing. The
wrapper is the Trainer's optimizer: checkpoints hold the posterior, in ``optimizer.pt``, and resume
from it. ``compute_loss`` returns the one scalar, to be divided and differentiated as any loss.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

from bayesagg import BayesAggWrapper, RegressionHead
from examples.loops import data

TASKS = ("mu", "alpha", "homo", "lumo")
PAD, START = 0, 1


class MoleculeBert(nn.Module):
    """A BERT on characters; every task has a head on the state of the first token."""

    def __init__(self, characters: int, width: int = 64) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=characters,
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in TASKS})

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        states = self.bert(input_ids, attention_mask=(input_ids != PAD).long())
        h = states.last_hidden_state[:, 0]
        return {task: head(h) for task, head in self.heads.items()}


class MultiTaskTrainer(Trainer):
    """Takes a :class:`BayesAggWrapper` as optimizer."""

    # A Trainer that counts the items of "labels" expects a loss that is divided already.
    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, optimizer: BayesAggWrapper, **kwargs: Any) -> None:
        super().__init__(*args, optimizers=(optimizer, None), **kwargs)
        self.wrapper = optimizer  # `self.optimizer` will be Accelerate's proxy of it

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any
    ) -> Any:
        out = model(inputs["input_ids"])
        losses = {}
        for task, z in out.items():
            known = ~inputs[task].isnan()
            if known.any():  # the mean over no label is NaN: leave the task out of this batch
                losses[task] = F.mse_loss(z[known], inputs[task][known])
        # Evaluation is not training: there the losses are added up.
        loss = self.wrapper.loss(losses) if model.training else sum(losses.values())
        return (loss, out) if return_outputs else loss


def tokens(smiles: list[str]) -> Tensor:
    """Numbers of the characters, ``(n, longest)``, behind one that every molecule begins with."""
    number = {c: n for n, c in enumerate(sorted(set("".join(smiles))), START + 1)}
    rows = [torch.tensor([START, *map(number.__getitem__, text)]) for text in smiles]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def make_trainer(args: argparse.Namespace) -> MultiTaskTrainer:
    smiles, y = data.molecules(args.molecules, TASKS)
    ids = tokens(smiles)
    labels = data.without(dict(zip(TASKS, y.split(1, 1), strict=True)), args.missing)
    rows = [{"input_ids": ids[i], **{t: labels[t][i] for t in TASKS}} for i in range(len(ids))]
    train, test = data.split(len(rows))
    torch.manual_seed(args.seed)
    model = MoleculeBert(int(ids.max()) + 1)
    optimizer = BayesAggWrapper(
        torch.optim.AdamW(model.parameters(), lr=args.lr),
        shared_rep_hook=None,
        heads={task: RegressionHead(head) for task, head in model.heads.items()},
        rule=args.rule,
    )
    settings = TrainingArguments(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=args.accumulate,
        bf16=args.bf16,
        save_strategy="epoch",
        logging_steps=5,
        disable_tqdm=True,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        label_names=list(TASKS),  # entries of a batch that are targets: kept, and evaluated
        seed=args.seed,
    )
    return MultiTaskTrainer(
        model,
        settings,
        train_dataset=[rows[i] for i in train],
        eval_dataset=[rows[i] for i in test],
        optimizer=optimizer,
    )


@data.in_one_line
def main(arguments: list[str] | None = None) -> MultiTaskTrainer:
    parser = data.parser(
        "hf_trainer", molecules=2000, epochs=3, lr=1e-3, output=Path("output/hf_trainer")
    )
    parser.add_argument("--missing", type=float, default=0.3, help="share of missing labels")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--resume", help="folder of a checkpoint")
    args = parser.parse_args(arguments)
    trainer = make_trainer(args)
    trainer.train(resume_from_checkpoint=args.resume)
    print("loss of the test part:", trainer.evaluate()["eval_loss"])
    print("task weights:", {t: float(w) for t, w in trainer.wrapper.task_weights.items()})
    return trainer


if __name__ == "__main__":
    main()
