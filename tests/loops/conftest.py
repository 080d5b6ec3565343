"""Two ranks for all tests of a process."""

import pytest
import torch

from tests.loops.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch was built without gloo")
    both = Ranks()
    yield both
    both.stop()
