import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: threads that wait for each other take most of the time

import subprocess
from pathlib import Path

import pytest
import torch
from script import STUDY, SYNTHETIC, made_up, numbers, plain_script, run

import Test
from comparison.data import Dataset
from comparison.pictures import draw


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    """`variant` runs a block's property for all its options, `path` for one of each way through forward.

    `weighted` is for those of these that have α and β.
    """
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", metafunc.cls.variants)
    if "path" in metafunc.fixturenames:
        metafunc.parametrize("path", metafunc.cls.paths)
    if "weighted" in metafunc.fixturenames:
        metafunc.parametrize("weighted", [path for path in metafunc.cls.paths if not path.startswith(("LR", "PA"))])


@pytest.fixture(scope="session")
def data() -> Dataset:
    return made_up()


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    out = tmp_path_factory.mktemp("runs") / "finished"
    options = (*SYNTHETIC, "--models", "residual", "rw", "rw+lr+pa@4/2", "--seeds", "2", "--out", str(out))
    notebook = {"MPLBACKEND": "module://a_notebook_of_another_project"}  # which must not matter
    return run(*options, env={**os.environ, **notebook}), out


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("uninterrupted")
    with plain_script():
        assert Test.main([*STUDY, "--out", str(out)]) == 0
    return numbers(out)


@pytest.fixture(autouse=True)
def process_stays_as_it_was():
    before = torch.get_num_threads()
    with plain_script():
        yield
    torch.set_num_threads(before)


@pytest.fixture
def pictures(monkeypatch):
    monkeypatch.setattr(Test, "draw", draw)
