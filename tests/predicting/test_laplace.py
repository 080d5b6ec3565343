"""The same numbers as laplace-torch: last layer, full covariance, one prior and noise."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bayesagg import BinaryHead, MulticlassHead, RegressionHead
from bayesagg.predicting import Predictor
from tests.helpers.nets import plain_net
from tests.predicting.cases import Single, all_of, loader

laplace = pytest.importorskip("laplace")
pytestmark = pytest.mark.filterwarnings("ignore")  # of what it imports

GAMMA = 0.5


def at_mode(net, task, loss, x, y):
    """The head alone trained to the mode of its prior, where laplace-torch expands."""
    head = net.heads[task]
    with torch.no_grad():
        h = net.trunk(x)
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=1000, tolerance_grad=1e-12, tolerance_change=0
    )

    def closure():
        optimizer.zero_grad()
        prior = sum(p.square().sum() for p in head.parameters()) / (2 * GAMMA)
        value = loss(head(h), y) + prior
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)


def theirs(model, kind, x, y, noise=1.0):
    own = laplace.Laplace(
        model,
        kind,
        subset_of_weights="last_layer",
        hessian_structure="full",
        prior_precision=1 / GAMMA,
        sigma_noise=noise**0.5,
    )
    own.fit(DataLoader(TensorDataset(x, y), batch_size=64))
    return own


@pytest.fixture
def default_double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def test_a_regression(default_double):
    data, net, noise = loader(), plain_net(outputs={"reg": 1}), 0.4
    x, y = all_of(data)
    y = y["reg"][:, :1]
    at_mode(net, "reg", lambda z, t: (z - t).square().sum() / (2 * noise), x, y)
    own = Predictor.fit(
        net,
        {"reg": RegressionHead(net.heads["reg"], noise_variance=noise)},
        [(x, {"reg": y})],
        prior_variance=GAMMA,
    )
    model = Single(net, "reg").eval()
    mean, variance = theirs(model, "regression", x, y, noise)._glm_predictive_distribution(x[:20])
    p = own(x[:20])["reg"]
    torch.testing.assert_close(p.mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(p.epistemic, variance[:, 0], rtol=1e-5, atol=1e-8)


def test_a_classification(default_double):
    data, net = loader(), plain_net(outputs={"cls": 3})
    x, y = all_of(data)
    y = y["cls"]
    at_mode(net, "cls", lambda z, t: F.cross_entropy(z, t, reduction="sum"), x, y)
    heads = {"cls": MulticlassHead(net.heads["cls"])}
    own = Predictor.fit(net, heads, [(x, {"cls": y})], prior_variance=GAMMA)
    model = Single(net, "cls").eval()
    mean, covariance = theirs(model, "classification", x, y)._glm_predictive_distribution(x[:20])
    centre = torch.eye(3) - 1 / 3  # the common mode is left out here
    variance = (centre @ covariance @ centre).diagonal(dim1=1, dim2=2)
    p = own(x[:20])["cls"]
    torch.testing.assert_close(
        p.output - p.output.mean(1, keepdim=True),
        mean - mean.mean(1, keepdim=True),
        rtol=1e-5,
        atol=1e-6,
    )
    torch.testing.assert_close(p.output_variance, variance, rtol=1e-5, atol=1e-8)


def test_a_binary_output_is_half_a_classification_of_two(default_double):
    # Logits z and -z: z has the prior variance γ, as the difference of two classes of γ / 2.
    data, net = loader(), plain_net(outputs={"bin": 1})
    x, y = all_of(data)
    y = y["bin"][:, :1]
    own = Predictor.fit(
        net, {"bin": BinaryHead(net.heads["bin"])}, [(x, {"bin": y})], prior_variance=2 * GAMMA
    )
    two = plain_net(outputs={"cls": 2})
    two.trunk.load_state_dict(net.trunk.state_dict())
    label = y[:, 0].long()
    at_mode(two, "cls", lambda z, t: F.cross_entropy(z, t, reduction="sum"), x, label)
    model = Single(two, "cls").eval()
    mean, covariance = theirs(model, "classification", x, label)._glm_predictive_distribution(
        x[:20]
    )
    p, difference = own(x[:20])["bin"], torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(p.output[:, 0], mean @ difference, rtol=1e-5, atol=1e-5)
    variance = difference @ covariance @ difference
    torch.testing.assert_close(p.output_variance[:, 0], variance, rtol=1e-5, atol=1e-8)
