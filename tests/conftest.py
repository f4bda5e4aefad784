import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: threads that wait for each other take most of the time

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    """`variant` runs a block's property for all its options, `path` for one of each way through forward."""
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", metafunc.cls.variants)
    if "path" in metafunc.fixturenames:
        metafunc.parametrize("path", metafunc.cls.paths)
