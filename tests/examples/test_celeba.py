"""CelebA: its lists, its images as the network gets them, and training on them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from examples.comparison.benchmarks import celeba
from examples.comparison.catalogue import methods, more_methods
from examples.image_models import nine_layers
from tests.examples.image_files import ATTRIBUTES, write_celeba
from tests.examples.small import run_of

pytestmark = pytest.mark.usefixtures("data")
KNOWN = methods("chestxray14") | more_methods("chestxray14")


def test_attributes_and_parts_are_those_of_the_lists(data):
    pytest.importorskip("timm")
    labels = write_celeba(data)
    loaded = celeba.load()
    assert [(task.name, task.metric) for task in loaded.tasks] == [(n, "f1") for n in ATTRIBUTES]
    parts = loaded.train, loaded.val, loaded.test
    assert [len(part) for part in parts] == [24, 8, 8]
    assert (torch.cat([part.y for part in parts]).numpy() == labels).all()
    x, y = loaded.val.batch(torch.tensor([3]))  # the images follow each other as the parts do
    assert (y[0].numpy() == labels[27]).all()
    with Image.open(data / "celeba" / "img_align_celeba" / "000028.jpg") as image:
        expected = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR)) / 255
    np.testing.assert_allclose(x[0].numpy(), expected.transpose(2, 0, 1), atol=1e-6)
    assert len(celeba.load(None, 10).train) == 10


def test_the_network_has_nine_layers():
    network = nine_layers((4, 8, 8, 16))
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [layer.weight.shape[0] for layer in layers] == [4, 8, 8, 8, 8, 16, 16, 16, 16]
    assert network(torch.randn(3, 3, 64, 64)).shape == (3, 16)


@pytest.mark.parametrize("method", ["ls", "si-readout", "mgda-ub", "bayesagg", "bayesagg-paper"])
def test_it_trains(method, data, monkeypatch):
    pytest.importorskip("timm")
    write_celeba(data, width=20, height=20)
    monkeypatch.setattr(celeba, "_SIZE", 16)
    monkeypatch.setattr(celeba, "_WIDTHS", (4, 4, 4, 8))
    settings = {"epochs": 2, "batch_size": 12, "warmup_steps": 1, "selection": "best"}
    run = run_of("celeba", method, known=KNOWN, **settings)
    assert len(run.test) == 40 and all(0 <= task["f1"] <= 1 for task in run.test)
