"""NYUv2: its arrays, what they do not know, losses and metrics, and training by every method."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import vgg16_bn

from examples import methods as updates
from examples import tables
from examples.comparison import runs
from examples.comparison.benchmarks import SOURCES, nyuv2
from examples.comparison.catalogue import unsuited
from examples.data import DataFileError, DataUnavailableError
from examples.image_models import SegNet
from examples.training import DivergedError
from tests.examples.image_files import write_nyuv2
from tests.examples.small import KNOWN, compared, run_of

pytestmark = pytest.mark.usefixtures("data")
CLASSES = nyuv2.CLASSES


@pytest.fixture
def small(monkeypatch):
    """Arrays of 32×64 pixels, and few channels."""
    size = (32, 64)
    monkeypatch.setattr(nyuv2, "SIZE", size)
    monkeypatch.setattr(nyuv2, "MAPS", {k: (*size, *s[2:]) for k, s in nyuv2.MAPS.items()})
    monkeypatch.setattr(nyuv2, "_WIDTHS", (4, 4, 8, 8, 8))
    monkeypatch.setattr(updates, "_PIXELS", 100)


# --- files ---------------------------------------------------------------------------------------


def test_arrays_become_maps_with_what_is_not_known(data):
    write_nyuv2(data, train=3, val=2)
    loaded = nyuv2.load()
    assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [2, 1, 2]
    assert sorted([*loaded.train.places.tolist(), *loaded.val.places.tolist()]) == [0, 1, 2]
    assert loaded.train.augment and not loaded.val.augment and not loaded.test.augment
    x, y = loaded.test.batch(torch.tensor([1, 0]))
    assert x.shape == (2, 3, 288, 384) and y.shape == (2, 5, 288, 384)
    assert x.dtype == y.dtype == torch.float32
    for place, image, targets in zip((1, 0), x, y, strict=True):
        found = {}
        for kind in nyuv2.MAPS:
            found[kind] = np.load(data / "nyuv2" / "val" / kind / f"{place}.npy")
        np.testing.assert_allclose(image.permute(1, 2, 0), found["image"], rtol=1e-6)
        label, depth, normal = targets[0], targets[1], targets[2:]
        unknown = found["label"] == -1
        assert unknown.any() and (label.isnan().numpy() == unknown).all()
        assert (label.numpy()[~unknown] == found["label"][~unknown]).all()
        assert depth[:, :9].isnan().all() and normal[:, :5].isnan().all()
        np.testing.assert_allclose(depth[:, 9:], found["depth"][:, 9:, 0], rtol=1e-6)
        np.testing.assert_allclose(
            normal[:, 5:].permute(1, 2, 0), found["normal"][5:], rtol=1e-5, atol=1e-6
        )
    version = loaded.version
    np.save(data / "nyuv2" / "val" / "depth" / "1.npy", np.zeros((1, 2)))
    assert nyuv2.load().version != version


def save(array):
    return lambda path: np.save(path, array)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("image", save(np.zeros((3, 288, 384))), r"float64 of shape \(3, 288, 384\)"),
        ("depth", save(np.zeros((288, 384))), r"shape \(288, 384, 1\), as MTAN's release"),
        ("normal", save(np.full((288, 384, 3), np.nan)), "finite"),
        ("label", save(np.full((288, 384), 13.0)), "labels should be -1 to 12"),
        ("label", save(np.full((288, 384), 0.5)), "labels should be -1 to 12"),
        ("label", save(np.full((288, 384), "a")), "<U1"),
        ("image", lambda path: path.write_bytes(b""), "cannot be read as an array"),
        ("image", lambda path: path.write_bytes(path.read_bytes()[:99]), "cannot be read"),
        ("image", lambda path: np.save(path, np.array([{}]), allow_pickle=True), "cannot be read"),
    ],
)
def test_a_wrong_array_is_named(kind, change, message, data):
    write_nyuv2(data, train=2, val=1)
    path = data / "nyuv2" / "val" / kind / "0.npy"
    change(path)
    with pytest.raises(DataFileError, match=message) as failure:
        nyuv2.load().test.batch(torch.tensor([0]))
    assert str(path) in str(failure.value) and "ownload it again" in str(failure.value)


@pytest.mark.parametrize("name", ["train/depth/1.npy", "val/normal/0.npy"])
def test_a_missing_array_is_named_with_the_place_to_get_it(name, data, small):
    with pytest.raises(DataUnavailableError, match=r"image.* not found.*https://.*BAYESAGG_DATA"):
        nyuv2.load()
    write_nyuv2(data, train=3, val=1)
    (data / "nyuv2" / name).unlink()
    with pytest.raises(DataUnavailableError, match=rf"{name} not found.*https://.*belong into"):
        nyuv2.load()
    write_nyuv2(data, train=2, val=1)
    (data / "nyuv2" / "val" / "image" / "0.npy").unlink()
    with pytest.raises(DataUnavailableError, match="has no files"):
        nyuv2.load()


def test_augmentation_moves_all_maps_alike(small):
    """Maps of their own coordinates: a target is that of the pixel which the image shows."""
    rows, columns = torch.meshgrid(*map(torch.arange, nyuv2.SIZE), indexing="ij")
    image = torch.stack([rows, columns, rows]).float()
    targets = torch.stack([rows, 1 + columns, columns, rows, columns]).float()
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(40):
        x, y = nyuv2.changed(image, targets, generator)
        mirrored = bool(x[1, 0, 0] > x[1, 0, -1])
        shown = 63 / float(x[1].max() - x[1].min())
        scale = min((1.0, 1.2, 1.5), key=lambda s: abs(s - shown))
        seen.add((mirrored, scale))
        normal = -y[2] if mirrored else y[2]
        for a, b in ((x[0], y[0]), (x[0], y[3]), (x[1], normal)):  # nearest against bilinear
            assert (a - b).abs().max() < 1.01
        torch.testing.assert_close(y[1] * scale, 1 + y[4])
    assert len(seen) == 6


def test_augmentation_follows_from_the_batch_alone(data, small):
    write_nyuv2(data, train=5, val=1)
    part = nyuv2.load().train
    state = torch.get_rng_state()
    x, y = part.batch(torch.tensor([2, 0]))
    assert torch.get_rng_state().equal(state)
    again = part.batch(torch.tensor([2, 0]))
    assert again[0].equal(x) and again[1].nan_to_num().equal(y.nan_to_num())
    drawn = [part.batch(torch.tensor([2, other]))[0][0] for other in (0, 1, 3)]
    assert not all(image.equal(drawn[0]) for image in drawn)  # as in other epochs


# --- losses and metrics --------------------------------------------------------------------------


class Answers(nn.Module):
    """Gives fixed outputs for the scenes, in order."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs, self.place = outputs, 0

    def forward(self, x):
        own = slice(self.place, self.place + len(x))
        self.place += len(x)
        return {name: values[own] for name, values in self.outputs.items()}


def made_up(count=3):
    shape = {"regression": 1, "normals": 3, "segmentation": CLASSES}
    outputs = {name: torch.randn(count, channels, *nyuv2.SIZE) for name, channels in shape.items()}
    outputs["regression"] = outputs["regression"].abs() + 0.5
    return outputs


def naive(outputs, y):
    """Losses and metrics of the pixels that have a label, by NumPy."""
    z = {name: values.movedim(1, -1).double().numpy() for name, values in outputs.items()}
    classes, depth, normals = np.split(y.movedim(1, -1).double().numpy(), [1, 2], axis=-1)
    seen, known, facing = (~np.isnan(part[..., 0]) for part in (depth, classes, normals))
    label, scores = classes[known][:, 0].astype(int), z["segmentation"][known]
    error = np.abs(z["regression"] - depth)[seen]
    u, v = z["normals"][facing], normals[facing]
    cosine = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
    angles, guess = np.degrees(np.arccos(np.clip(cosine, -1, 1))), scores.argmax(1)
    ious = [
        ((label == c) & (guess == c)).sum() / ((label == c) | (guess == c)).sum()
        for c in range(CLASSES)
    ]
    likely = np.take_along_axis(scores, label[:, None], 1)[:, 0]
    losses = {
        "depth": (error**2).mean(),
        "normals": ((u - v) ** 2).mean(),
        "segmentation": (np.log(np.exp(scores).sum(1)) - likely).mean(),
    }
    within = {f"within {most:g}°": (angles < most).mean() for most in (11.25, 22.5, 30.0)}
    median = np.sort(angles)[(len(angles) - 1) // 2]
    return losses, [
        {"mae": error.mean(), "relative error": (error / depth[seen]).mean()},
        {"angle": angles.mean(), "median angle": median, **within},
        {"miou": np.mean(ious), "accuracy": (label == guess).mean()},
    ]


def test_losses_and_metrics_are_those_of_every_pixel_with_a_label(data, small):
    write_nyuv2(data, train=2, val=3)
    part, outputs = nyuv2.load().test, made_up()
    _, y = part.batch(torch.arange(3))
    expected, metrics = naive(outputs, y)
    losses = nyuv2.losses(outputs, y)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-4)
    assert [task.name for task in nyuv2.load().tasks] == list(losses)
    found = nyuv2.evaluate(Answers(outputs), part)
    for ours, theirs, task in zip(found, metrics, nyuv2.load().tasks, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6) and task.metric in ours


def test_perfect_outputs_have_perfect_metrics(data, small):
    write_nyuv2(data, train=2, val=1)
    part = nyuv2.load().test
    classes, depth, normals = nyuv2.split(part.batch(torch.tensor([0]))[1])
    scores = nn.functional.one_hot(classes.clamp(min=0), CLASSES).movedim(-1, 1).float()
    outputs = {"regression": depth, "normals": 7 * normals, "segmentation": scores}
    outputs = {name: values.nan_to_num(3.0) for name, values in outputs.items()}
    depth, normal, segmentation = nyuv2.evaluate(Answers(outputs), part)
    assert depth == {"mae": 0, "relative error": 0} and segmentation == {"miou": 1, "accuracy": 1}
    assert normal["angle"] < 0.1 and normal["within 11.25°"] == 1


def test_outputs_that_are_no_numbers_have_no_metrics(data, small):
    write_nyuv2(data, train=2, val=1)
    outputs = {name: values * torch.nan for name, values in made_up(1).items()}
    with pytest.raises(DivergedError, match="not finite"):
        runs._evaluate(Answers(outputs), nyuv2.load(), final=False)


# --- network and training ------------------------------------------------------------------------


def test_the_encoder_is_vgg_s_and_the_decoder_its_mirror_image():
    with torch.device("meta"):
        network, vgg = SegNet(), vgg16_bn()
    down, up = (
        [tuple(m.weight.shape[:2]) for m in part.modules() if isinstance(m, nn.Conv2d)]
        for part in (network.down, network.up[::-1])
    )
    assert down == [tuple(m.weight.shape[:2]) for m in vgg.features if isinstance(m, nn.Conv2d)]
    assert [outputs for outputs, _ in up] == [
        *(512, 512, 512, 256, 256, 256, 128, 128, 128, 64, 64, 64, 64)
    ]
    assert up[0] == (512, 512) and up[3] == (256, 512) and up[-1] == (64, 64)
    assert SegNet((4, 6, 8))(torch.randn(2, 3, 16, 24)).shape == (2, 4, 16, 24)


def test_ensembles_have_no_maps():
    refused = [name for name, method in KNOWN.items() if unsuited(method, SOURCES["nyuv2"])]
    assert refused == [
        *("rechub-uwl", "rechub-metabalance", "rechub-gradnorm"),
        *("ensemble-heads", "ensemble-networks"),
    ]


@pytest.mark.parametrize(
    "method", [n for n, m in KNOWN.items() if not unsuited(m, SOURCES["nyuv2"])]
)
def test_it_trains(method, data, small):
    write_nyuv2(data, train=3, val=1)
    run = run_of("nyuv2", method, epochs=2, batch_size=1, warmup_steps=1, schedule="half")
    assert len(run.weights) in (0, 3)
    assert [len(values) for values in run.test] == [2, 5, 2]


def test_the_command_writes_its_tables(data, small, tmp_path, capsys):
    write_nyuv2(data, train=3, val=1)
    assert [task.higher_is_better for task in nyuv2._TASKS] == [False, False, True]
    arguments = ["--methods", "ls", "bayesagg", "--seeds", "2", "--epochs", "2"]
    content = compared(tmp_path, "nyuv2", *arguments, "--warmup-steps", "1")
    assert set(content["summary"]) == {"ls", "bayesagg"}
    assert "normals, ANGLE [°]" in (tmp_path / "results.md").read_text()
    assert tables.main(["3", "--from", str(tmp_path)]) == 0
    assert "| depth, MAE [m] ↓ | normals, ANGLE [°] ↓ | segm" in capsys.readouterr().out
    assert not (tmp_path / "results-calibration.png").exists()
