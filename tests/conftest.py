"""What every test shares: device, dtype, seeds, threads and the hypothesis profiles.

BAYESAGG_TEST_DEVICE   any torch device, "cpu" by default
BAYESAGG_TEST_DTYPE    a floating dtype by name, "float64" by default
HYPOTHESIS_PROFILE     "ci" (default: the same examples every time) or "explore" (new ones)
"""

import os
import re

import hypothesis
import pytest
import torch

from tests.helpers.data import make_batch
from tests.helpers.nets import make_net

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


DEVICE = torch.device(os.environ.get("BAYESAGG_TEST_DEVICE", "cpu"))
DTYPE = getattr(torch, os.environ.get("BAYESAGG_TEST_DTYPE", "float64"), None)


def pytest_configure(config):
    if not (isinstance(DTYPE, torch.dtype) and DTYPE.is_floating_point):
        raise pytest.UsageError("BAYESAGG_TEST_DTYPE is not the name of a floating torch dtype")
    # Small tensors: with a pool of threads in every process, they wait for one another.
    torch.set_num_threads(1)


# Tests whose set-up is most of their time, by their names: one process runs those of a group.
TOGETHER = re.compile(
    r"(ddp|distributed|fsdp|ranks)|(huggingface)|(/test_site)|(packaging)|(/test_compare)"
    r"|(/test_tables)|(_qm9\.)|(_qm9_mpnn)|(movielens)"
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """By name, as marks of groups are lost between some versions of pytest and pytest-xdist."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            found = TOGETHER.search(nodeid)
            return nodeid if found is None else str(found.lastindex)

    # In the order of the files: the site shows the notebooks, which are executed side by side.
    config.option.loadscopereorder = False
    return Scheduling(config, log)


# Session-wide, so that hypothesis accepts them: it refuses fixtures made anew per test function.
@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(scope="session")
def dtype() -> torch.dtype:
    return DTYPE


@pytest.fixture(scope="session")
def like() -> tuple[torch.device, torch.dtype]:
    """Both, as the first two arguments of the helpers that make networks and data."""
    return DEVICE, DTYPE


@pytest.fixture(scope="session", params=["likelihood", "paper"])
def rule(request) -> str:
    """The name of either rule; ``tests.helpers.RULES`` has their settings."""
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def net(like):
    """A small network of every kind of head."""
    return make_net(*like)


@pytest.fixture
def batch(like):
    """A batch for it that no step of :func:`tests.helpers.training.train` has."""
    return make_batch(*like, seed=99)
