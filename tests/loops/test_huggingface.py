"""The scalar in ``Trainer.compute_loss``; the wrapper is the Trainer's optimizer.

So the posterior is in the checkpoint's ``optimizer.pt``, and the paper's epochs are counted.
"""

import pytest
import torch
from torch import nn

from tests.helpers.data import LOSSES, make_batch
from tests.helpers.nets import make_net
from tests.helpers.settings import MEMORY, SAMPLED
from tests.helpers.states import assert_finite, assert_same, snapshot, tensors_of
from tests.helpers.training import wrap
from tests.loops.clients import batches_of, huggingface, losses_of, state_of

transformers = pytest.importorskip("transformers")

STEPS, EPOCHS = 3, 3
BATCHES = batches_of(STEPS)


def start(rule, seed=0, **kwargs):
    net = make_net(seed=seed)
    return net, wrap(net, "adam", rule, settings=SAMPLED, **kwargs)


def trained(rule, folder, *, seed=0, **arguments):
    net, wrapper = start(rule, seed)
    huggingface(net, wrapper, BATCHES, losses_of, folder, EPOCHS, **arguments)
    return state_of(net, wrapper)


def accumulated(rule, parts, epochs, clip):
    """By hand; the last step of an epoch has what batches are left, and divides by their number."""
    net, wrapper = start(rule)
    for _ in range(epochs):
        for first in range(0, STEPS, parts):
            batches = BATCHES[first : first + parts]
            for batch in batches:
                (wrapper.loss(losses_of(net, batch)) / len(batches)).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
            wrapper.step()
            wrapper.zero_grad()
    return state_of(net, wrapper)


@pytest.mark.parametrize(("parts", "counts"), [(2, True), (3, False)])
def test_a_trainer_accumulates_and_clips_as_a_loop_does(parts, counts, rule, tmp_path):
    """Also where it counts the items of ``labels`` and would leave the division to the model."""
    net, wrapper = start(rule)
    net.accepts_loss_kwargs = counts  # what it deduces from a ``forward(..., **kwargs)``
    batches = [{**b, "labels": b["cls"]} for b in BATCHES]
    accumulate = {"gradient_accumulation_steps": parts, "max_grad_norm": 0.1}
    huggingface(net, wrapper, batches, losses_of, tmp_path, EPOCHS, **accumulate)
    found, expected = state_of(net, wrapper), accumulated(rule, parts, EPOCHS, 0.1)
    torch.testing.assert_close(*map(tensors_of, (expected, found)))


@pytest.mark.parametrize("stop", [3, 4], ids=["at_an_end", "in_an_epoch"])
def test_a_trainer_resumes_in_the_same_bits(stop, rule, tmp_path):
    """From its own checkpoint, in and between epochs; nothing else is saved or loaded."""
    keep = {"save_strategy": "steps", "save_steps": stop}
    whole = trained(rule, tmp_path / "whole", **keep)
    checkpoint = tmp_path / "whole" / f"checkpoint-{stop}"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert saved["bayesagg"]["rule"] == rule
    assert_same(whole, trained(rule, tmp_path / "resumed", seed=5, resume=checkpoint))


def test_a_trainer_may_use_half_precision(rule, tmp_path):
    """``bf16=True``: parameters differ by rounding from those of single precision.

    Labels that are recovered in half precision do not tell data apart, so the memory is fixed.
    """
    batches = [
        {k: v.float() if v.is_floating_point() else v for k, v in b.items()} for b in BATCHES
    ]
    ends = []
    for half in (True, False):
        net = make_net(dtype=torch.float32)
        wrapper = wrap(net, "adam", rule, settings=SAMPLED, **MEMORY[rule])
        huggingface(net, wrapper, batches, losses_of, tmp_path, EPOCHS, bf16=half)
        assert_finite(snapshot(net, wrapper))
        ends.append(list(net.parameters()))
    assert not torch.equal(ends[0][0], ends[1][0])
    torch.testing.assert_close(*ends, rtol=0.1, atol=0.05)


@pytest.mark.filterwarnings("ignore")  # torch.compile's, about parts of torch itself
def test_a_trainer_may_compile_the_model(tmp_path):
    """``torch_compile=True``, the whole of it: graphs break where the engine of any rule looks."""
    ends = []
    for compiled in (False, True):
        torch._dynamo.reset()
        net, wrapper = start("likelihood")
        how = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        trainer = huggingface(net, wrapper, BATCHES, losses_of, tmp_path, EPOCHS, **how)
        assert hasattr(trainer.model_wrapped, "_orig_mod") == compiled
        ends.append(list(net.parameters()))
    torch._dynamo.reset()
    torch.testing.assert_close(*ends)


class Sentences(nn.Module):
    """A small BERT, and two heads on the state of its first token."""

    def __init__(self, checkpointing):
        super().__init__()
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(vocab_size=11, num_hidden_layers=2, **sizes, **rates)
        self.trunk = transformers.BertModel(config, add_pooling_layer=False).double()
        self.heads = nn.ModuleDict({"reg": nn.Linear(8, 2), "cls": nn.Linear(8, 3)}).double()
        if checkpointing:
            self.trunk.activation_checkpointing_enable()

    def forward(self, ids):
        h = self.trunk(ids).last_hidden_state[:, 0]
        return {name: head(h) for name, head in self.heads.items()}


def test_gradient_checkpointing_of_a_transformer(rule):
    """Its layers are computed again in the backward pass; the steps are the same."""
    ends = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = Sentences(checkpointing)
        wrapper = wrap(net, "adam", rule, settings=SAMPLED)
        for index in range(6):
            _, labels = make_batch(seed=index)
            ids = torch.randint(11, (6, 5), generator=torch.Generator().manual_seed(index))
            wrapper.zero_grad()
            wrapper.step({n: LOSSES[n](z, labels[n]) for n, z in net(ids).items()})
        ends.append(snapshot(net)["parameters"])
    torch.testing.assert_close(*map(tensors_of, ends))
