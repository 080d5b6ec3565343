"""What is transformers' own: a Trainer that compiles, and layers that are computed again.

Its other settings, and its checkpoints, are in ``test_clients.py``.
"""

import pytest
import torch
from torch import nn

from tests.helpers.data import LOSSES, make_batch
from tests.helpers.nets import make_net
from tests.helpers.settings import EPOCH, SAMPLED
from tests.helpers.states import snapshot, tensors_of
from tests.helpers.training import wrap
from tests.loops.clients import Job, batches_of, huggingface, losses_of

transformers = pytest.importorskip("transformers")


@pytest.mark.filterwarnings("ignore")  # torch.compile's, about parts of torch itself
def test_a_trainer_may_compile_the_model(tmp_path):
    """``torch_compile=True``, the whole of it: graphs break where the engine of any rule looks."""
    ends = []
    for compiled in (False, True):
        torch._dynamo.reset()
        net = make_net()
        wrapper = wrap(net, "adam", "likelihood", settings=SAMPLED)
        how = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        huggingface(Job(net, wrapper, batches_of(EPOCH), losses_of, tmp_path, 2), **how)
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
