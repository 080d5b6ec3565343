"""Δm and mean rank against values worked out by hand, and their errors."""

import numpy as np
import pytest
import torch
from scipy import stats

from bayesagg.metrics import delta_m, mean_rank


def test_delta_m_by_hand():
    # (0.3 - 0.2) / 0.2 = +50 %; an AUC from 0.8 to 0.9 is better: -12.5 %. Mean: 18.75 %.
    assert delta_m([0.3, 0.9], [0.2, 0.8], [False, True]) == pytest.approx(18.75)


def test_delta_m_reproduces_a_row_of_the_paper():
    # Table 6, STL and SI on QM9: the paper prints 77.8 from unrounded values.
    single = [0.067, 0.181, 60.57, 53.91, 0.503, 4.53, 58.80, 64.20, 63.80, 66.20, 0.072]
    si = [0.309, 0.346, 149.8, 135.7, 1.003, 4.51, 55.32, 55.75, 55.82, 55.27, 0.112]
    assert delta_m(si, single) == pytest.approx(77.8, abs=0.5)


@pytest.mark.parametrize("higher", [False, True])
def test_delta_m_is_negative_for_a_better_method(higher):
    better = [2.0, 3.0] if higher else [0.5, 1.0]
    assert delta_m(better, [1.0, 2.0], higher) < 0 < delta_m([1.0, 2.0], better, higher)
    assert delta_m([1.0, 2.0], [1.0, 2.0], higher) == 0


def test_delta_m_takes_tensors_arrays_and_integers_of_any_unit():
    expected, scale = delta_m([3.0, 1.0], [2.0, 2.0]), torch.tensor([1e-6, 1e6]).double()
    method = torch.tensor([3.0, 1.0], requires_grad=True)
    assert delta_m(method, np.array([2, 2])) == expected
    assert isinstance(delta_m(torch.tensor([3, 1]), torch.tensor([2, 2])), float)
    assert delta_m(method * scale, 2 * scale) == pytest.approx(expected)


def test_mean_rank_by_hand():
    # Task 1 ranks the methods 1, 2, 3; task 2 ranks them 3, 1.5, 1.5 (a tie).
    assert mean_rank([[1.0, 9.0], [2.0, 5.0], [3.0, 5.0]]).tolist() == [2.0, 1.75, 2.25]
    table = torch.tensor([[1.0, 0.9], [2.0, 0.8]])  # with a direction per task, and one for all
    assert mean_rank(table, [False, True]).tolist() == [1.0, 2.0]
    assert mean_rank(table, True).tolist() == [1.5, 1.5]


def test_mean_rank_agrees_with_scipy():
    table = torch.randint(0, 4, (6, 9), generator=torch.Generator().manual_seed(0))
    expected = stats.rankdata(table.numpy(), axis=0).mean(1)
    np.testing.assert_allclose(mean_rank(table).numpy(), expected)


def test_a_flag_of_numpy():
    values = [1.0, 2.0], [2.0, 2.0]
    for flag in (True, False):
        assert delta_m(*values, np.bool_(flag)) == delta_m(*values, flag)


@pytest.mark.parametrize(
    ("metric", "arguments", "message"),
    [
        (delta_m, ([1.0], [1.0, 2.0]), "1 tasks and single_task_values 2"),
        (delta_m, ([1.0, 1.0], [1.0, 0.0]), "task 1 is 0"),
        (delta_m, ([1.0], [-1.0]), "task 0 is -1"),
        (delta_m, ([], []), "shape"),
        (delta_m, ([[1.0]], [[1.0]]), "shape"),
        (delta_m, ([float("nan"), 1.0], [1.0, 1.0]), "not finite"),
        (delta_m, ([1.0, 1.0], [1.0, float("inf")]), "not finite"),
        (delta_m, ([1.0, 1.0], [1.0, 1.0], [True]), "higher_is_better has 1 entries for 2 tasks"),
        (mean_rank, ([1.0, 2.0],), "shape"),
        (mean_rank, ([[]],), "shape"),
        (mean_rank, ([[1.0, float("nan")]],), "not finite"),
    ],
)
def test_what_has_no_value_is_refused(metric, arguments, message):
    with pytest.raises(ValueError, match=message):
        metric(*arguments)
