import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: threads that wait for each other take most of the time

from functools import partial
from pathlib import Path

import pytest
import torch
from script import STUDY, SYNTHETIC, made_up, numbers, plain_script, start

import Test
from comparison.data import Dataset
from comparison.pictures import draw


def pytest_configure(config):
    if "cuda" not in config.getoption("-m").replace("not cuda", ""):  # the others ask for the bits of a CPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


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


def in_a_notebook(backend: str) -> None:
    """Of another project, whose plots must not matter; and with pictures."""
    os.environ["MPLBACKEND"] = backend
    Test.draw = draw


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[str, Path]:
    """What a whole run said, and its folder."""
    folder = tmp_path_factory.mktemp("runs")
    out, said = folder / "finished", folder / "said"
    options = (*SYNTHETIC, "--models", "residual", "rw", "rw+lr+pa@4/2", "--seeds", "2", "--out", str(out))
    process = start(*options, output=said, before=partial(in_a_notebook, "module://a_notebook_of_another_project"))
    process.join()
    assert process.exitcode == 0, said.read_text()
    return said.read_text(), out


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
