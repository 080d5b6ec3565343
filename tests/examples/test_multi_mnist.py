"""MultiMNIST: how two digits are composed, and that no part has a digit of another."""

import pytest
import torch

from examples.comparison.benchmarks import multi_mnist
from tests.examples.small import run_of


def test_the_brighter_of_two_shifted_digits_is_taken_at_the_nearest_pixel():
    left, right = torch.randint(256, (2, 3, 28, 28), dtype=torch.uint8)
    found = multi_mnist.overlay(left, right)
    assert found.shape == (3, 1, 28, 28) and found.dtype == torch.uint8
    for n in range(3):
        canvas = torch.zeros(36, 36, dtype=torch.uint8)
        canvas[:28, :28] = left[n]
        for y in range(28):
            for x in range(28):
                canvas[6 + y, 6 + x] = max(canvas[6 + y, 6 + x], right[n, y, x])
        nearest = [36 * place // 28 for place in range(28)]
        assert found[n, 0].equal(canvas[nearest][:, nearest])


def test_no_digit_is_in_two_parts(monkeypatch):
    marks = torch.arange(100)
    images = torch.zeros(100, 784, dtype=torch.int64)
    images[:, 0] = marks  # in the corner, where only the digit on the left is
    monkeypatch.setattr(multi_mnist, "read_digits", lambda: (images, marks))
    loaded, again = multi_mnist.load(), multi_mnist.load()
    parts = loaded.train, loaded.val, loaded.test
    seen = [part.y.unique() for part in parts]
    assert [len(own) for own in seen] == [60, 20, 20] and len(torch.cat(seen).unique()) == 100
    for part in parts:
        left, right = part.y.unbind(1)
        assert (left != right).all() and len(part.y.unique(dim=0)) == len(part)
        assert part.x[:, 0, 0, 0].long().equal(left)  # the label is that of the image
        for side in (left, right):
            assert set(side.bincount().tolist()) - {0} == {2}
    assert again.train.x.equal(loaded.train.x) and again.train.y.equal(loaded.train.y)
    assert len(multi_mnist.load(None, 30).train) == 30


@pytest.mark.parametrize("method", ["ls", "uw", "si-readout", "bayesagg", "bayesagg-paper"])
def test_real_digits_train(method):
    settings = {"epochs": 2, "batch_size": 100, "warmup_steps": 2, "learning_rate": 1e-2}
    run = run_of("multi-mnist", method, None, 1000, **settings)
    assert all(task["accuracy"] > 0.3 for task in run.test)  # by chance: 0.1
