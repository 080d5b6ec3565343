"""The same numbers as laplace-torch: last layer, full covariance, one prior and noise."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bayesagg.predicting import Predictor
from tests.helpers.nets import plain_net
from tests.predicting.cases import Single, all_of, heads_of, loader

laplace = pytest.importorskip("laplace")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of what it imports
    pytest.mark.usefixtures("default_double"),
]
GAMMA, NOISE = 0.5, 0.4


@pytest.fixture
def default_double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def ours(net, task, x, y, gamma=GAMMA):
    heads = heads_of(net, reg={"noise_variance": NOISE})
    return Predictor.fit(net, heads, [(x, {task: y})], prior_variance=gamma)(x[:20])[task]


def theirs(net, task, x, y):
    """Mean and covariance of the outputs, expanded at the mode of the head's prior."""
    head, regression = net.heads[task], task == "reg"
    with torch.no_grad():
        h = net.trunk(x)
    own = {"max_iter": 1000, "tolerance_grad": 1e-12, "tolerance_change": 0}
    optimizer = torch.optim.LBFGS(head.parameters(), **own)

    def closure():
        optimizer.zero_grad()
        z = head(h)
        if regression:
            fit = F.mse_loss(z, y, reduction="sum") / (2 * NOISE)
        else:
            fit = F.cross_entropy(z, y, reduction="sum")
        value = fit + sum(p.square().sum() for p in head.parameters()) / (2 * GAMMA)
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    model = laplace.Laplace(
        Single(net, task).eval(),
        "regression" if regression else "classification",
        subset_of_weights="last_layer",
        hessian_structure="full",
        prior_precision=1 / GAMMA,
        sigma_noise=NOISE**0.5 if regression else 1.0,
    )
    model.fit(DataLoader(TensorDataset(x, y), batch_size=64))
    return model._glm_predictive_distribution(x[:20])


def test_a_regression():
    net, (x, labels) = plain_net(outputs={"reg": 1}), all_of(loader())
    y = labels["reg"][:, :1]
    mean, variance = theirs(net, "reg", x, y)
    p = ours(net, "reg", x, y)
    torch.testing.assert_close(p.mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(p.epistemic, variance[:, 0], rtol=1e-5, atol=1e-8)


def test_a_classification():
    net, (x, labels) = plain_net(outputs={"cls": 3}), all_of(loader())
    mean, covariance = theirs(net, "cls", x, labels["cls"])
    p = ours(net, "cls", x, labels["cls"])
    centre = torch.eye(3) - 1 / 3  # the common mode is left out here
    variance = (centre @ covariance @ centre).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(p.output @ centre, mean @ centre, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(p.output_variance, variance, rtol=1e-5, atol=1e-8)


def test_a_binary_output_is_half_a_classification_of_two():
    # Logits z and -z: z has the prior variance γ, as the difference of two classes of γ / 2.
    net, (x, labels) = plain_net(outputs={"bin": 1}), all_of(loader())
    y = labels["bin"][:, :1]
    p = ours(net, "bin", x, y, 2 * GAMMA)
    two = plain_net(outputs={"cls": 2})
    two.trunk.load_state_dict(net.trunk.state_dict())
    mean, covariance = theirs(two, "cls", x, y[:, 0].long())
    difference = torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(p.output[:, 0], mean @ difference, rtol=1e-5, atol=1e-5)
    variance = difference @ covariance @ difference
    torch.testing.assert_close(p.output_variance[:, 0], variance, rtol=1e-5, atol=1e-8)
