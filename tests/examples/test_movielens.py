"""MovieLens 100k: its file, its split, torch-rechub's networks and methods."""

import pytest
import torch

from examples.comparison import rechub
from examples.comparison.benchmarks import SOURCES
from examples.comparison.rechub import RecommenderNet
from examples.comparison.tasks import Task, criterion
from examples.data.movielens import ITEMS, RATINGS, USERS, load_movielens
from examples.training import TrainSettings
from tests.examples.small import run_of

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


def test_the_parts_follow_each_other_in_time(ratings):
    pytest.importorskip("torch_rechub")
    data = SOURCES["movielens-mmoe"].load(None, None)
    sizes = [len(part) for part in (data.train, data.val, data.test)]
    assert sizes == [80_000, 10_000, 10_000]
    x = torch.cat([part.x for part in (data.train, data.val, data.test)])
    y = torch.cat([part.y for part in (data.train, data.val, data.test)])
    assert torch.equal(x[:, 0], ratings.users) and torch.equal(x[:, 1], ratings.items)
    assert torch.equal(y[:, 1], (ratings.ratings >= 4).float())
    assert data.train.y[:, 0].mean().abs() < 1e-5
    stars = y[:, 0] * data.scale[0] + ratings.ratings[:80_000].mean()
    assert torch.allclose(stars, ratings.ratings, atol=1e-5)
    # Saturday, 20 September 1997, 03:05:10; the first day of 1970, day 0 here, was a Thursday.
    assert x[ratings.times == 874724710][0, 2:].tolist() == [3, 2]


def net(name, kinds, seed=0):
    torch.manual_seed(seed)
    experts = {
        "MMOE": {"n_expert": 3},
        "PLE": {"n_level": 2, "n_expert_specific": 1, "n_expert_shared": 1},
    }
    metrics = {"regression": "rmse", "binary": "auroc"}
    tasks = [Task(f"{kind}{k}", kind, metrics[kind]) for k, kind in enumerate(kinds)]
    shape = (name, {"user": 20, "item": 30}, 4, 5, tasks)
    return RecommenderNet(*shape, expert_params={"dims": [6]}, **experts[name]), tasks


def batch(count=40):
    x = torch.stack([torch.randint(20, (count,)), torch.randint(30, (count,))], 1)
    return x, torch.randn(count, 2)


@pytest.mark.parametrize("name", ["MMOE", "PLE"])
def test_a_binary_task_has_the_logit_of_what_the_package_predicts(name):
    pytest.importorskip("torch_rechub")
    model, _ = net(name, ["regression", "binary"])
    x, _ = batch()
    model.eval()
    ours = model(x)
    model.network.predict_layers[1].task_type = "classification"
    theirs = model.network({"user": x[:, 0], "item": x[:, 1]})
    assert torch.allclose(ours["regression"][:, 0], theirs[:, 0])
    assert torch.allclose(ours["binary"][:, 0].sigmoid(), theirs[:, 1])
    heads = [group.module for group in model.groups]
    assert [head.out_features for head in heads] == [1, 1] and heads[0] is not heads[1]


# In float64: a bias before a batch norm has a gradient of rounding errors, which Adam enlarges to
# up to 1e-5; a parameter moves by 0.03.
@pytest.mark.parametrize("name", ["MMOE", "PLE"])
def test_a_step_of_uncertainty_is_that_of_the_package_s_trainer(name):
    trainers = pytest.importorskip("torch_rechub.trainers")
    (model, tasks), (other, _) = net(name, ["regression"] * 2), net(name, ["regression"] * 2)
    settings = TrainSettings(warmup_steps=0, learning_rate=0.01)
    ours = rechub.Uncertainty(model.double(), settings, 3)
    theirs = trainers.MTLTrainer(
        other.network.double(),
        ["regression"] * 2,
        optimizer_params={"lr": 0.01},
        adaptive_params={"method": "uwl"},
    )
    for w in (*ours.trainer.loss_weight, *theirs.loss_weight):
        torch.nn.init.constant_(w, 0.5)  # at 0, where they start, PyTorch 2.14 clamps the gradient
    batches = [batch() for _ in range(3)]
    theirs.train_one_epoch([({"user": x[:, 0], "item": x[:, 1]}, y) for x, y in batches])
    for x, y in batches:
        ours.step(criterion(tasks)(model(x), y))
    for (key, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-4), key
    assert len(set(ours.weights.tolist())) == 2  # they have left their start


@pytest.mark.parametrize("name", ["MMOE", "PLE"])
def test_balanced_gradients_have_the_norm_of_the_first_task_s(name):
    pytest.importorskip("torch_rechub")
    model, tasks = net(name, ["regression"] * 2)
    ours = rechub.MetaBalance(model.double(), TrainSettings(warmup_steps=0), 3)
    x, y = batch()
    losses = criterion(tasks)(model(x), y)
    first, second = (
        torch.autograd.grad(loss, model.network.embedding.parameters(), retain_graph=True)
        for loss in losses.values()
    )
    ours.step(losses)
    for p, a, b in zip(model.network.embedding.parameters(), first, second, strict=True):
        # 70 % of the gradient at the first task's norm, 30 % as it is.
        expected = a + b * (0.7 * a.norm() / b.norm() + 0.3)
        assert torch.allclose(p.grad, expected, rtol=0.05, atol=0.01 * expected.abs().max())


@pytest.mark.parametrize("name", ["MMOE", "PLE"])
def test_gradient_norms_set_the_weights_after_the_warm_up(name):
    pytest.importorskip("torch_rechub")
    model, tasks = net(name, ["regression"] * 2)
    ours = rechub.GradNorm(model, TrainSettings(warmup_steps=1, learning_rate=0.01), 3)
    weights = list(model.network.get_submodule("loss weight"))
    x, y = batch()
    y[:, 1] *= 100
    ours.step(criterion(tasks)(model(x), y))
    assert [w.item() for w in weights] == [1, 1]
    for _ in range(5):
        ours.step(criterion(tasks)(model(x), y))
    assert weights[0] > 1 > weights[1]  # that of the large gradient falls
    assert sum(w.item() for w in weights) == pytest.approx(2)


@pytest.mark.parametrize("method", ["si-readout", "bayesagg"])
@pytest.mark.parametrize("name", ["movielens-mmoe", "movielens-ple"])
def test_the_library_trains_them(name, method):
    pytest.importorskip("torch_rechub")
    run = run_of(name, method, None, 400, epochs=1, batch_size=50, warmup_steps=2)
    assert set(run.test[0]) == {"mae", "rmse"} and "auroc" in run.test[1]
    assert len(run.weights) == 2
