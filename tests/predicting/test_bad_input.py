"""What cannot be predicted is refused with the task and the remedy."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import BayesAggWrapper, MulticlassHead, RegressionHead
from bayesagg.errors import (
    CaptureError,
    CheckpointError,
    FeatureError,
    HeadError,
    NumericalError,
    NumericalWarning,
    PredictionError,
    TargetError,
    UnknownTaskError,
)
from bayesagg.predicting import Predictor
from tests.helpers.data import make_batch
from tests.helpers.nets import plain_net
from tests.helpers.training import train, wrap
from tests.predicting.cases import heads_of, loader


def fit(data, net=None):
    net = plain_net() if net is None else net
    return Predictor.fit(net, heads_of(net), data)


def changed(**targets):
    return [(x, {**y, **targets}) for x, y in loader(batches=2)]


def lacking(name):
    return [(x, {n: v for n, v in y.items() if n != name}) for x, y in loader(batches=2)]


def test_without_data_there_must_have_been_training(rule):
    net = plain_net()
    optimizer = wrap(net, rule=rule)
    with pytest.raises(PredictionError, match=r"'reg'.*pass data"):
        optimizer.predictor(net)
    optimizer.predictor(net, loader())  # with data there is something to go by
    train(net, optimizer, 5)
    with pytest.raises(ValueError, match=r"prior_variance.*Pass data"):
        optimizer.predictor(net, prior_variance=3.0)


@pytest.mark.filterwarnings("ignore:task 'reg'. its loss is not the likelihood")
@pytest.mark.parametrize(
    ("loss", "unit", "error", "match"),
    [
        (F.l1_loss, 1.0, PredictionError, r"'reg'.*not the head's likelihood"),
        (F.mse_loss, 0.0, NumericalError, r"'reg'.*labels.*were zero"),
    ],
)
def test_training_that_tells_no_noise(loss, unit, error, match):
    net = plain_net(outputs={"reg": 1})
    heads = {"reg": RegressionHead(net.heads["reg"])}
    optimizer = BayesAggWrapper(torch.optim.Adam(net.parameters()), None, heads)
    for i in range(3):
        x, y = make_batch(seed=i, outputs={"reg": 1})
        y["reg"] *= unit
        optimizer.step({"reg": loss(net(x)["reg"], y["reg"])}, targets=y)
    with pytest.raises(error, match=match):
        optimizer.predictor(net)


def test_a_model_without_the_heads(rule):
    net = plain_net()
    optimizer = wrap(net, rule=rule)
    train(net, optimizer, 4)
    with pytest.raises(HeadError, match=r"'reg'.*wrap it"):
        optimizer.predictor(plain_net())
    net.heads["bin"] = nn.Linear(4, 2).double()
    with pytest.raises(HeadError, match="'bin'"):
        optimizer.predictor(net)


def test_heads_that_change_later():
    net = plain_net()
    predictor = fit(loader(), net)
    x = make_batch()[0]
    net.heads["bin"] = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    assert predictor(x)  # reads the same features
    net.trunk = nn.Linear(5, 7).double()
    net.heads = nn.ModuleDict({n: nn.Linear(7, 2).double() for n in ("reg", "bin", "cls")})
    with pytest.raises(HeadError, match="received 7 features"):
        predictor(x)
    del net.heads["cls"]
    with pytest.raises(HeadError, match=r"'cls'.*no module"):
        predictor(x)


class Uses(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x, a=1, b=1):
        out = [self.a(x) for _ in range(a)] + [self.b(x) for _ in range(b)]
        return sum(out)


def test_a_head_used_several_times_or_never():
    net = Uses()
    heads = {"a": RegressionHead(net.a), "b": RegressionHead(net.b)}
    x, y = torch.randn(20, 3), {"a": torch.randn(20, 1), "b": torch.randn(20)}
    predictor = Predictor.fit(net, heads, [(x, y)])
    with pytest.raises(CaptureError, match="'b': its head was used 2 times"):
        predictor(x, b=2)
    with pytest.raises(CaptureError, match="'a': its head was not used"):
        predictor(x, a=0)
    with pytest.raises(CaptureError, match="'a'"):
        Predictor.fit(net, heads, [((x, 0), y)])
    # In a fit, a head without targets in a batch need not run.
    Predictor.fit(net, heads, [((x, 0), {"b": y["b"]}), ((x, 1, 0), {"a": y["a"]})])


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        ([], TargetError, "'reg': the loader has no label"),
        (lacking("bin"), TargetError, "'bin': the loader has no label"),
        (changed(other=torch.zeros(30)), UnknownTaskError, "'other'.*'reg', 'bin', 'cls'"),
        (changed(bin=torch.full((30, 2), torch.nan)), TargetError, "'bin': the loader has no"),
        (changed(cls=torch.full((30,), -100)), TargetError, "'cls': the loader has no"),
        (changed(reg=torch.zeros(30, 3)), TargetError, r"'reg': \[60, 3\] targets for 60 data"),
        (changed(reg=torch.full((30, 2), torch.inf)), TargetError, "'reg': targets must be finite"),
        (changed(bin=torch.full((30, 2), 2.0)), TargetError, "'bin': targets must be between"),
        (changed(cls=torch.full((30,), 3)), TargetError, "'cls': class indices"),
        (changed(cls=torch.zeros(29).long()), TargetError, r"'cls': \[29\] targets"),
        ([torch.zeros(3, 5)], TargetError, "must be a pair"),
        ([(torch.zeros(3, 5), torch.zeros(3))], TargetError, "must be a mapping"),
    ],
)
def test_bad_data(data, error, match):
    with pytest.raises(error, match=match):
        fit(data)
    predictor = fit(loader())
    before = {k: v for k, v in predictor.state_dict().items() if k.startswith("post")}
    with pytest.raises(error, match=match):
        predictor.calibrate(data)
    assert all(torch.equal(before[k], predictor.state_dict()[k]) for k in before)


class Tokens(nn.Module):
    """Heads of values and of classes at every position."""

    def __init__(self):
        super().__init__()
        self.trunk, self.r, self.c = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x):
        h = self.trunk(x)
        return self.r(h), self.c(h)


@pytest.mark.parametrize(
    ("task", "change", "match"),
    [
        # As F.cross_entropy wants probabilities of tokens.
        ("c", lambda y: y.movedim(-1, 1), r"'c': \[4, 3, 5\] targets.*shape of the head"),
        ("r", lambda y: y.movedim(-1, 1), r"'r': \[4, 2, 5\] targets.*shape of the head"),
        ("r", lambda y: y.flatten(0, 1).mT, r"'r': \[2, 20\] targets"),
        ("c", lambda y: y.argmax(-1).mT, r"'c': \[5, 4\] targets"),
        ("c", lambda y: y / 2, "'c'.*sum to one"),
        ("c", lambda y: y.argmax(-1) + 0.5, "'c'.*class indices"),
    ],
)
def test_targets_in_another_order(task, change, match):
    """As many as there are outputs, but it is not to be seen which is whose."""
    net, x = Tokens(), torch.randn(4, 5, 3)
    targets = {"r": torch.randn(4, 5, 2), "c": torch.randn(4, 5, 3).softmax(-1)}
    heads = {"r": RegressionHead(net.r), "c": MulticlassHead(net.c)}
    for same in (lambda y: y, lambda y: y.flatten(0, 1)):
        Predictor.fit(net, heads, [(x, {name: same(y) for name, y in targets.items()})])
    targets[task] = change(targets[task])
    with pytest.raises(TargetError, match=match):
        Predictor.fit(net, heads, [(x, targets)])


def test_an_output_that_the_loader_lacks():
    data = loader(batches=2)
    for _, y in data:
        y["bin"][:, 1] = torch.nan
    with pytest.raises(TargetError, match="'bin': the loader has no label of output 1"):
        fit(data)
    data[1][1]["bin"][3, 1] = 1.0
    fit(data)


def test_batches_without_data_have_no_labels():
    [(x, y)] = loader(batches=1)
    nothing = x[:0], {task: labels[:0] for task, labels in y.items()}
    with pytest.raises(TargetError, match=r"'reg'.*no label"):
        fit([nothing])
    predictor = fit([nothing, (x, y), nothing])
    with pytest.raises(TargetError, match=r"'reg'.*no label"):
        predictor.calibrate([nothing])
    whole = fit([(x, y)])
    assert all(torch.equal(predictor(x)[task].stddev, whole(x)[task].stddev) for task in y)


def test_labels_that_are_all_zero():
    [(x, y)] = loader(batches=1)
    predictor = fit([(x, {**y, "reg": torch.zeros_like(y["reg"])})])
    assert (predictor(x)["reg"].mean == 0).all() and (predictor(x)["reg"].stddev > 0).all()
    predictor.calibrate([(x, {**y, "reg": torch.zeros_like(y["reg"])})])
    assert all(end.isfinite().all() for end in predictor(x)["reg"].interval(0.9))


def test_values_that_are_not_finite():
    predictor = fit(loader())
    x = make_batch()[0]
    x[0, 0] = torch.nan
    with pytest.raises(FeatureError, match=r"'reg'.*not finite"):
        predictor(x)
    with pytest.raises(FeatureError, match="not finite"):
        fit([(x, make_batch()[1])])


def test_a_state_of_other_heads():
    net = plain_net()
    state = fit(loader(), net).state_dict()
    fewer = Predictor(net, {"reg": RegressionHead(net.heads["reg"])})
    with pytest.raises(CheckpointError, match="tasks"):
        fewer.load_state_dict(state, strict=False)
    wider = plain_net(width=6)
    predictor = Predictor(wider, heads_of(wider))
    with pytest.raises(CheckpointError, match="weights"):
        predictor.load_state_dict(state)
    for use in (lambda: predictor(make_batch()[0]), lambda: predictor.calibrate(loader())):
        with pytest.raises(PredictionError, match=r"no posterior yet.*load_state_dict"):
            use()  # nothing of it was taken


@pytest.mark.parametrize(
    ("setting", "value"),
    [*(("prior_variance", value) for value in (0, -1.0, torch.nan, "ml")), ("passes", -1)],
)
def test_settings_of_a_fit_out_of_range(setting, value):
    net = plain_net()
    with pytest.raises(ValueError, match=setting):
        Predictor.fit(net, heads_of(net), loader(batches=1), **{setting: value})


def test_too_few_passes_are_told():
    net = plain_net()
    with pytest.warns(NumericalWarning, match=r"'(bin|cls)'.*passes="):
        Predictor.fit(net, heads_of(net), loader(), passes=1)


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_labels_beyond_the_numbers_of_the_model(unit):
    """Their square is."""
    net = plain_net().float()
    [(x, y)] = loader(batches=1, dtype=torch.float32)
    with pytest.raises(NumericalError, match=r"'reg'.*float32.*labels"):
        Predictor.fit(net, {"reg": heads_of(net)["reg"]}, [(x, {"reg": unit * y["reg"]})])


def test_levels_and_numbers_of_draws_out_of_range():
    found = fit(loader(batches=1))(make_batch()[0])
    for level in (0, 1.0, 95, torch.nan, "most", torch.tensor([0.5, 0.9])):
        with pytest.raises(ValueError, match="level must be one number"):
            found["reg"].interval(level)
    with pytest.raises(ValueError, match="-1"):
        found["bin"].sample(-1)
    with pytest.raises(TypeError, match="integer"):
        found["bin"].sample(2.5)
