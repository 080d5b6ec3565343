"""The dense example: its scenes, and a run in the small."""

import re
from argparse import Namespace

import pytest
import torch

from examples.data.scenes import CLASSES, IGNORED, SIZE, make_scenes
from examples.dense import METHODS, losses_of, main, train


def test_scenes_depend_on_the_seed_and_hang_together():
    scenes, again, other = (make_scenes(12, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(scenes.images, again.images)
    assert not torch.equal(scenes.images, other.images)
    assert scenes.images.shape == (12, 3, SIZE, SIZE)
    assert set(scenes.classes.unique().tolist()) == {IGNORED, *range(len(CLASSES))}
    known = scenes.depth[~scenes.depth.isnan()]
    assert len(known) < scenes.depth.numel()
    assert known.min() >= 0 and known.max() <= 1
    with pytest.raises(AssertionError):
        torch.testing.assert_close(scenes.depth, other.depth, equal_nan=True)


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_losses(method):
    scenes = make_scenes(2, seed=0)
    args = Namespace(seed=0, width=4, epochs=1, batch=2)
    before = losses_of(train(method, scenes, args)[0].train()(scenes.images), scenes)
    args.epochs = 80  # past the warm-up
    after = losses_of(train(method, scenes, args)[0].train()(scenes.images), scenes)
    assert all(after[name] < 0.9 * before[name] for name in before)


def test_a_run_in_the_small(tmp_path, capsys):
    """All parts, and a figure."""
    sizes = "--scenes 4 --test-scenes 2 --epochs 2 --batch 2 --width 4"
    main([*sizes.split(), "--out", str(tmp_path / "figures" / "dense.png")])
    said = capsys.readouterr().out
    assert len(re.findall(r"mIoU 0\.\d{3}  depth error \d\.\d{4}  \d+ ms a step", said)) == 2
    assert (tmp_path / "figures" / "dense.png").stat().st_size > 10_000
