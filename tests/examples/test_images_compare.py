"""Models of the image benchmarks, and the comparison command on each of them."""

import copy
import types
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from examples import compare, image_models
from examples.comparison.benchmarks import chestxray14, cifar_mtl, utkface
from examples.comparison.images import RecomputedNets
from examples.comparison.networks import TaskNet
from examples.comparison.tasks import Task
from examples.data import DataFileError, DataUnavailableError
from tests.examples.image_files import write_chest, write_cifar, write_faces
from tests.examples.small import compared

pytestmark = pytest.mark.usefixtures("data")
MIXTURE = (
    Task("r", "regression", "mae"),
    Task("a", "binary", "accuracy"),
    Task("b", "binary", "accuracy"),
    Task("c", "multiclass", "accuracy", classes=3),
)


def small(width=8):
    """Batch normalisation first, in the middle and last."""
    layers = [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ELU()]
    return nn.Sequential(
        *layers,
        nn.Conv2d(4, width, 3),
        nn.BatchNorm2d(width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def net(tasks):
    return TaskNet(small(), 8, tasks)


# --- models --------------------------------------------------------------------------------------


def test_the_cnn_is_that_of_the_paper():
    network = image_models.cnn(160)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 160)
    kinds = [type(layer) for layer in network]
    assert kinds == [nn.Conv2d, nn.ELU, nn.MaxPool2d] * 3 + [nn.BatchNorm2d, nn.Flatten]
    convolutions = [layer for layer in network if isinstance(layer, nn.Conv2d)]
    assert [c.in_channels for c in convolutions] == [3, 160, 160]
    assert {(c.out_channels, c.kernel_size) for c in convolutions} == {(160, (3, 3))}
    assert network[2].kernel_size == 3


def test_single_task_networks_are_independent_of_one_another():
    nets = RecomputedNets.of(MIXTURE, net).train()
    alone = copy.deepcopy(list(nets.networks))
    x = torch.randn(6, 3, 12, 12)
    outputs = nets(x)
    expected = [next(iter(network(x).values())) for network in alone]
    assert {name: tuple(o.shape) for name, o in outputs.items()} == {
        "regression": (6, 1),
        "binary": (6, 2),
        "c": (6, 3),
    }
    assert outputs["binary"].equal(torch.cat(expected[1:3], 1))
    torch.stack([output.square().sum() for output in outputs.values()]).sum().backward()
    sum(output.square().sum() for output in expected).backward()
    for network, reference in zip(nets.networks, alone, strict=True):
        for p, q in zip(network.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        # Activations were computed twice, and batch statistics counted once.
        for p, q in zip(network.buffers(), reference.buffers(), strict=True):
            if p.is_floating_point():
                assert p.equal(q)
    assert [sum(p.grad is not None for p in n.parameters()) for n in nets.networks] == [12] * 4
    assert all(m.momentum == 0.1 for m in nets.modules() if isinstance(m, nn.BatchNorm2d))


def test_single_task_networks_keep_one_network_s_activations():
    x = torch.randn(6, 3, 12, 12)

    def kept(network):
        """Images that the graph keeps, besides the input."""
        found = []

        def keep(t):
            found.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            network.train()(x)
        images = {t.data_ptr() for t in found if t.ndim == 4 and len(t) == len(x)}
        return images - {x.data_ptr()}

    assert kept(net(MIXTURE))
    assert not kept(RecomputedNets.of(MIXTURE, net))


@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 8), ("resnet34", 16)])
def test_resnets_end_in_an_elu_layer(name, blocks):
    resnet = pytest.importorskip("timm.models.resnet")
    network = image_models.resnet(name, 256)
    found = [m for m in network.modules() if isinstance(m, resnet.BasicBlock)]
    assert len(found) == blocks and isinstance(network[-1], nn.ELU)
    assert network[0].fc.weight.shape == (256, 512)
    assert network.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 256)


# --- weights -------------------------------------------------------------------------------------


def test_weights_come_from_the_data_folder(data):
    """They are torchvision's, which fit timm's network and give the same features."""
    torchvision = pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    (data / "weights").mkdir(parents=True)
    path = data / "weights" / "resnet18-f37072fd.pth"
    source = torchvision.models.resnet18(weights=None)
    torch.save(source.state_dict(), path)
    assert image_models.imagenet_weights("resnet18") == path
    network = image_models.resnet("resnet18", 256, path)[0]
    for (name, ours), theirs in zip(
        network.state_dict().items(), source.state_dict().values(), strict=True
    ):
        assert ours.equal(theirs) or name.startswith("fc."), name
    assert network.fc.out_features == 256
    x, source.fc = torch.randn(2, 3, 64, 64), nn.Identity()
    features = network.forward_head(network.forward_features(x), pre_logits=True)
    torch.testing.assert_close(features, source(x))
    assert len(image_models.weights_digest(path)) == 8


@pytest.mark.parametrize("content", [b"", b"<html>", "others"])
def test_a_file_that_holds_no_weights_is_named(content, tmp_path):
    pytest.importorskip("timm")
    path = tmp_path / "resnet18.pth"
    if content == "others":
        torch.save(nn.Linear(2, 2).state_dict(), path)
    else:
        path.write_bytes(content)
    with pytest.raises(DataFileError, match="does not hold weights of resnet18") as failure:
        image_models.resnet("resnet18", 256, path)
    assert str(path) in str(failure.value)


def test_without_weights_it_says_so(data, monkeypatch):
    pytest.importorskip("timm")
    write_chest(data)
    with pytest.warns(UserWarning, match="random weights and not from ImageNet's.*no route") as got:
        benchmark = chestxray14.load()
    assert str(data / "weights") in str(got[0].message)
    assert "random initialisation" in benchmark.network
    assert benchmark.version["weights"] == "none, random initialisation"

    refuse = torch.hub.download_url_to_file
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, to, **_: torch.save({}, to))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "ImageNet weights" in chestxray14.load().network
        monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
        assert chestxray14.load().version["weights"] != "none, random initialisation"


# --- the command ---------------------------------------------------------------------------------


SMALL = ["--seeds", "1", "--epochs", "2", "--warmup-steps", "0", "--batch-size", "12"]
SMALL += ["--methods", "ls", "bayesagg-paper"]
SHARES = ("accuracy", "auroc", "ece")


@pytest.fixture
def tiny(monkeypatch):
    """Few pixels and a small network."""

    def resnet(name, width, weights=None):
        return nn.Sequential(small(), nn.Linear(8, width), nn.ELU())

    monkeypatch.setattr(cifar_mtl, "_CHANNELS", 8)
    for module in (utkface, chestxray14):
        monkeypatch.setattr(module, "_SIZE", 36)
        monkeypatch.setattr(module, "_CROP", 32)
    for module in (utkface, image_models):
        monkeypatch.setattr(module, "resnet", resnet)


def refused(name, folder):
    """The comparison ends with an error, and nothing is left of it."""
    assert compare.main([name, *SMALL, "--jobs", "1", "--output", str(folder)]) == 1
    assert not list(folder.iterdir())


@pytest.mark.filterwarnings("ignore:.*random weights:UserWarning")
@pytest.mark.parametrize(
    ("name", "write", "parts", "measures"),
    [
        ("cifar-mtl", partial(write_cifar, train=40), [36, 4, 20], [{"accuracy", "auroc"}] * 20),
        ("utkface", write_faces, [24, 4, 8], [{"mae", "rmse"}, {"accuracy", "ece"}, {"brier"}]),
        ("chestxray14", partial(write_chest, patients=60), [24, 10, 30], [{"auroc"}] * 14),
    ],
)
def test_the_command(name, write, parts, measures, data, tiny, tmp_path):
    if name != "cifar-mtl":
        pytest.importorskip("timm")
    write(data)
    limit = [] if name == "cifar-mtl" else ["--train-size", "24"]
    content = compared(tmp_path / "out", name, *SMALL, *limit)
    assert content["settings"]["data"]["parts"] == parts
    assert set(content["summary"]) == {"ls", "bayesagg-paper"}
    for runs in content["runs"].values():
        [run] = runs
        for found, names in zip(run["test"], measures, strict=True):
            assert names <= set(found)
            assert all(0 <= value <= 1 for key, value in found.items() if key in SHARES)
    if name == "cifar-mtl":
        assert 0 <= run["extra"]["accuracy of the best-scoring task"] <= 1
    if name == "utkface":
        assert run["test"][0]["mae"] > 1  # in years, from random pixels
    if name == "chestxray14":
        assert "random initialisation" in content["settings"]["network"]


def test_a_corrupt_image_ends_the_command_with_one_line(data, tiny, tmp_path, capsys):
    pytest.importorskip("timm")
    names = sorted(write_faces(data))
    path = data / "UTKFace" / names[utkface.load().test.rows[0]]
    path.write_bytes(path.read_bytes()[:500])
    refused("utkface", tmp_path / "out")
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and str(path) in last


def test_missing_data_ends_the_command_with_one_line(tmp_path, capsys):
    refused("cifar-mtl", tmp_path / "out")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cifar-100-python" in error and "https://" in error


def test_torchvision_for_another_torch_is_reported(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(image_models, "importlib", types.SimpleNamespace(import_module=broken))
    with pytest.raises(DataUnavailableError, match=r"fits torch.*nms"):
        image_models.timm("models")
