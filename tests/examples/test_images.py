"""Loaders of the image benchmarks, on small files in the formats of the real ones."""

import csv
import pickle
import random
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from examples.comparison.benchmarks import SOURCES, chestxray14, cifar_mtl, utkface
from examples.data import DataFileError, DataUnavailableError, data_folder
from tests.examples.image_files import (
    COARSE,
    python2_pickle,
    write_celeba,
    write_chest,
    write_cifar,
    write_faces,
)

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation
EVERY = {
    "cifar-mtl": write_cifar,
    "utkface": write_faces,
    "chestxray14": write_chest,
    "celeba": write_celeba,
}


pytestmark = pytest.mark.usefixtures("data", "no_weights")
with_timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")


@pytest.fixture
def no_weights(monkeypatch):
    """None are at hand, and none are asked for."""
    monkeypatch.setattr(chestxray14.image_models, "imagenet_weights", lambda name: None)


def everything(part):
    return part.batch(torch.arange(len(part)))


# --- folder --------------------------------------------------------------------------------------


def test_the_data_folder_is_that_of_the_environment(data, monkeypatch):
    assert data_folder("x") == data / "x"
    monkeypatch.delenv("BAYESAGG_DATA")
    assert data_folder("x").parts == ("data", "x")


@pytest.mark.parametrize("name", EVERY)
def test_missing_data_say_where_they_are_downloaded(name):
    with pytest.raises(DataUnavailableError, match=r"not found.*https://.*belong.*BAYESAGG_DATA"):
        SOURCES[name].load(None, None)


@pytest.mark.parametrize("name", ["utkface", "chestxray14", "celeba"])
def test_without_timm_the_message_says_so(name, data, monkeypatch):
    EVERY[name](data)
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(DataUnavailableError, match="pip install timm"):
        SOURCES[name].load(None, None)


def test_cifar_needs_no_timm(data, monkeypatch):
    write_cifar(data)
    monkeypatch.setitem(sys.modules, "timm", None)
    loaded = cifar_mtl.load()
    x, _ = loaded.train.batch(torch.arange(3))
    assert loaded.model()(x)["binary"].shape == (3, 20)


@pytest.mark.parametrize("name", EVERY)
def test_the_version_tells_data_apart(name, data):
    if name != "cifar-mtl":
        pytest.importorskip("timm")
    EVERY[name](data)
    versions = [SOURCES[name].load(None, limit).version for limit in (None, 20, 20)]
    assert versions[0] != versions[1] == versions[2]
    if name == "cifar-mtl":
        path = data / "cifar-100-python" / "test"
        path.write_bytes(
            python2_pickle({"data": np.zeros((2, 3072), "u1"), "coarse_labels": [1] * 2})
        )
    else:
        pixels = Image.fromarray(np.zeros((48, 48), "u1"))
        pixels.save(next(path for path in data.rglob("*g") if path.is_file()))
    assert SOURCES[name].load(None, 20).version != versions[1]


# --- CIFAR-MTL -----------------------------------------------------------------------------------


def test_cifar_images_keep_their_labels(data):
    pixels, labels = write_cifar(data)
    loaded = cifar_mtl.load()
    assert [task.name for task in loaded.tasks] == COARSE
    assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [54, 6, 20]
    x = torch.cat([everything(part)[0] for part in (loaded.train, loaded.val)])
    y = torch.cat([everything(part)[1] for part in (loaded.train, loaded.val)])
    assert y.sum(1).eq(1).all()
    mean, std = (np.array(v)[:, None, None] for v in (cifar_mtl._MEAN, cifar_mtl._STD))
    found = {
        (image.round().astype(int).tobytes(), label)
        for image, label in zip((x.numpy() * std + mean) * 255, y.argmax(1).tolist(), strict=True)
    }
    written = {
        (image.reshape(3, 32, 32).astype(int).tobytes(), label)
        for image, label in zip(pixels, labels, strict=True)
    }
    assert found == written  # every image once, with its own label
    small = cifar_mtl.load(None, 10)  # the other parts are as they were
    assert small.train.x.equal(loaded.train.x[:10]) and small.val.x.equal(loaded.val.x)


def test_pickles_of_this_numpy_are_read_too(data):
    write_cifar(data)
    pixels = np.arange(2 * 3072, dtype=np.uint64).astype(np.uint8).reshape(2, 3072)
    content = pickle.dumps({"data": pixels, "coarse_labels": [3, 4]}, 2)
    (data / "cifar-100-python" / "test").write_bytes(content)
    _, test, _ = cifar_mtl.read()
    assert test.images.flatten(1).equal(torch.from_numpy(pixels))


# --- UTKFace -------------------------------------------------------------------------------------


@with_timm
def test_labels_of_faces_are_those_of_their_names(data):
    labels = write_faces(data)
    loaded = utkface.load()
    assert [task.kind for task in loaded.tasks] == ["regression", "binary", "multiclass"]
    parts = (loaded.train, loaded.val, loaded.test)
    assert [len(part) for part in parts] == [28, 4, 8]
    names = sorted(labels)
    mean = np.mean([labels[names[row]][0] for row in loaded.train.rows])
    for part in parts:
        _, y = everything(part)
        raw = y * loaded.scale + torch.tensor([mean, 0, 0])
        expected = torch.tensor([labels[names[row]] for row in part.rows], dtype=torch.float)
        torch.testing.assert_close(raw.float(), expected, rtol=0, atol=1e-3)
    rows = torch.cat([part.rows for part in parts])
    assert sorted(rows.tolist()) == list(range(40))
    assert loaded.train.y[:, 0].std().item() == pytest.approx(1, rel=1e-4)


def test_parts_have_the_same_ages():
    ages = torch.arange(1000.0) // 10
    train, val, test = utkface.stratified(ages[torch.randperm(1000)], seed=0)
    assert [len(part) for part in (train, val, test)] == [700, 100, 200]
    shuffled = ages[torch.randperm(1000)]
    parts = utkface.stratified(shuffled, seed=0)
    for part, share in zip(parts, (7, 1, 2), strict=True):
        assert shuffled[part].long().bincount().tolist() == [share] * 100
    other = utkface.stratified(shuffled, seed=1)
    assert not other[1].equal(parts[1])
    again = utkface.stratified(shuffled, seed=0)
    assert all(a.equal(b) for a, b in zip(again, parts, strict=True))


@with_timm
def test_faces_without_a_label_are_left_out_and_counted(data):
    write_faces(data, 20)
    image = next((data / "UTKFace").iterdir()).read_bytes()
    # Two of the three of the real archive; the other two names have all labels.
    for name in (
        "39_1_20170116174525125.jpg.chip.jpg",
        "61_3_20170109150557335.jpg.chip.jpg",
        "53__0_3_20170116184028385.jpg",
        "24_0_1_20170116220224657 .jpg.chip.jpg",
    ):
        (data / "UTKFace" / name).write_bytes(image)
    (data / "UTKFace" / "README.txt").write_text("")
    loaded = utkface.load()
    assert loaded.version["without_a_label"] == 2
    assert sum(loaded.version["parts"]) == 22


def test_a_folder_without_faces_or_with_few_is_an_error(data):
    (data / "UTKFace").mkdir(parents=True)
    with pytest.raises(DataUnavailableError, match="has no images"):
        utkface.read()
    with pytest.raises(ValueError, match="9 images cannot be split"):
        utkface.stratified(torch.arange(9.0), seed=0)


@with_timm
def test_augmentation_follows_from_the_batch_alone(data):
    write_faces(data)
    loaded = utkface.load()
    rows = torch.tensor([3, 1, 2])
    before, drawn = torch.get_rng_state(), random.getstate()
    x, y = loaded.train.batch(rows)
    assert torch.get_rng_state().equal(before) and random.getstate() == drawn
    torch.manual_seed(7)
    random.seed(7)
    again, _ = loaded.train.batch(rows)
    assert again.equal(x) and x.shape == (3, 3, 128, 128) and x.min() >= 0 and x.max() <= 1
    other, y_other = loaded.train.batch(torch.tensor([3, 4, 2]))  # as in another epoch
    assert y_other[[0, 2]].equal(y[[0, 2]])
    assert not (other[0].equal(x[0]) and other[2].equal(x[2]))


@with_timm
def test_faces_are_cropped_and_not_scaled(data):
    """A training image is a window of the file's, or its mirror image; others are its middle."""
    names = sorted(write_faces(data, size=140))
    loaded = utkface.load()
    x, _ = loaded.test.batch(torch.tensor([2]))
    with Image.open(data / "UTKFace" / names[loaded.test.rows[2]]) as image:
        expected = np.asarray(image)[6:134, 6:134].transpose(2, 0, 1) / 255
    np.testing.assert_allclose(x[0].numpy(), expected, atol=1e-6)
    part = loaded.train
    for place, x in zip(part.rows[:4], part.batch(torch.arange(4))[0], strict=True):
        with Image.open(data / "UTKFace" / names[place]) as image:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        windows = pixels.unfold(1, 128, 1).unfold(2, 128, 1)  # channel, top, left, y, x
        windows = windows.flatten(1, 2).transpose(0, 1)
        near = [((windows - y).abs().amax((1, 2, 3)) < 1e-6).any() for y in (x, x.flip(2))]
        assert any(near)


@pytest.mark.parametrize("content", [b"", b"no image", "cut"])
@with_timm
def test_a_corrupt_face_is_named(content, data):
    names = sorted(write_faces(data))
    loaded = utkface.load()
    path = data / "UTKFace" / names[loaded.train.rows[5]]
    path.write_bytes(path.read_bytes()[:600] if content == "cut" else content)
    loaded.train.batch(torch.arange(5))
    with pytest.raises(DataFileError, match="cannot be read as an image") as failure:
        loaded.train.batch(torch.tensor([0, 5]))
    assert str(path) in str(failure.value)


# --- ChestX-ray14 --------------------------------------------------------------------------------


@with_timm
def test_findings_and_parts_are_those_of_table_and_lists(data):
    rows = write_chest(data)
    loaded = chestxray14.load()
    with (data / "ChestX-ray14" / "Data_Entry_2017_v2020.csv").open() as file:
        table = {r["Image Index"]: r for r in csv.DictReader(file)}
    names = list(rows)
    patients = []
    parts = (loaded.train, loaded.val, loaded.test)
    for part in parts:
        for row, y in zip(part.rows, part.y, strict=True):
            found = {t.name for t, value in zip(loaded.tasks, y, strict=True) if value}
            assert found == set(table[names[row]]["Finding Labels"].split("|")) - {"No Finding"}
        patients.append({table[names[row]]["Patient ID"] for row in part.rows})
    assert [len(part) for part in parts] == [32, 4, 12]
    assert [len(p) for p in patients] == [16, 2, 6]
    assert set.union(*patients) == {str(k) for k in range(1, 25)}
    assert patients[2] == {str(k) for k in range(19, 25)}
    assert loaded.version["patients"] == 24
    assert "random initialisation" in loaded.network
    fewer = chestxray14.load(15, None).version
    assert fewer["patients"] == 15 and sum(fewer["parts"]) == 30


@with_timm
def test_chest_images_are_normalised_as_imagenet_s(data):
    names = list(write_chest(data, size=256))
    loaded = chestxray14.load()
    # As some of the real ones, it has four channels.
    row = [names[place] for place in loaded.test.rows].index("00000020_000.png")
    x, _ = loaded.test.batch(torch.tensor([row]))
    assert x.shape == (1, 3, 224, 224)
    with Image.open(data / "ChestX-ray14" / "images" / names[loaded.test.rows[row]]) as image:
        grey = np.asarray(image.convert("L"))[16:240, 16:240] / 255
    expected = [(grey - m) / s for m, s in zip(*IMAGENET, strict=True)]
    np.testing.assert_allclose(x[0].numpy(), np.stack(expected), atol=1e-5)
    augmented, _ = loaded.train.batch(torch.arange(4))
    assert augmented.shape == (4, 3, 224, 224) and augmented.isfinite().all()
