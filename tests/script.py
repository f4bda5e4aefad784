"""The script as the tests run it, and results that were not run."""

import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from comparison.data import Dataset, synthetic
from comparison.networks import ARCHS
from comparison.transformers import GPT

ROOT = Path(__file__).parents[1]


PICTURES = ("accuracy.png", "curves.png", "differences.png", "parameters.png", "learned.png", "learned_by_epoch.png")


SYNTHETIC = ("--dataset", "synthetic", "--limit", "200", "--batch-size", "100", "--epochs", "1", "--seeds", "1")
SYNTHETIC += ("--hold-out", "100")  # a smaller test set than the whole one
SYNTHETIC += ("--precision", "float32")  # whatever is the machine's fastest


def run(*options: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "Test.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", **kwargs)


def in_child(options: tuple[str, ...], output: str, before: Callable[[], None] | None) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    lines = {"mode": "w", "buffering": 1, "encoding": "utf-8", "closefd": False}
    sys.stdout, sys.stderr = (open(stream, **lines) for stream in (1, 2))  # noqa: SIM115
    with plain_script():
        if before:
            before()
        sys.exit(importlib.import_module("Test").main(list(options)))


@contextlib.contextmanager
def plain_script() -> Iterator[None]:
    """Test.main draws no pictures, which take long, and lets memory go, which would add up over the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("Test.keep_memory", lambda: None)
        patch.setattr("Test.draw", lambda *_: [])
        patch.setattr("Test.synthetic", made_up)
        yield


@functools.cache
def made_up() -> Dataset:
    """The synthetic data, which take a second to make."""
    return synthetic()


@functools.cache
def forkserver() -> multiprocessing.context.ForkServerContext:
    """Starts processes that have imported the script already, which takes longer than most of what they do."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["Test"])
    return context


def start(*options: str, output: Path, before: Callable[[], None] | None = None) -> multiprocessing.Process:
    """Starts the script in another process, whose output goes to a file; before is called there first."""
    process = forkserver().Process(target=in_child, args=(options, str(output), before))
    process.start()
    return process


def together(work: Callable[..., None], *args: object) -> None:
    """work(*args) in two processes that torchrun might have started."""
    forkserver()
    torch.multiprocessing.start_processes(join, (free_port(), work, *args), nprocs=2, start_method="forkserver")


def join(rank: int, port: int, then: Callable[..., None] | None = None, *args: object) -> None:
    """Makes this process one of two, by what torchrun tells a process."""
    told = {"TORCHELASTIC_RUN_ID": 1, "TORCHELASTIC_MAX_RESTARTS": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    told |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in told.items()})
    if then:
        then(*args)


def wait_for(there: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def one_layer() -> None:
    """A gpt6 with less to compile."""
    ARCHS["gpt6"] = functools.partial(GPT, layers=1)


def results(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())["runs"]


STUDY = (*SYNTHETIC, "--epochs", "3", "--models", "residual", "rw+lr+pa@4/2", "--seeds", "2", "--threads", "1")
STUDY += ("--limit", "100", "--batch-size", "50", "--hold-out", "50")


POSIX = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals and limits")


def numbers(out: Path) -> list[dict]:
    """All that a run ended with but how long it took."""
    runs = json.loads((out / "results.json").read_text())["runs"]
    kept = ("model", "seed", "epochs", "test_loss", "test_accuracy", "diverged", "weights_sha256")
    history = ("train_loss", "test_loss", "test_accuracy", "learned")
    return [{k: run[k] for k in kept} | {k: [e[k] for e in run["history"]] for k in history} for run in runs]


def columns_of(table: dict) -> dict[str, list[str]]:
    """The cells of each column of a table, by its heading; those of a measure's comparison with its name."""
    columns, measure = {}, ""
    for name, *cells in zip(table["columns"], *table["rows"]):
        measure = name if name.startswith("test ") else measure
        own = name.startswith(("difference", "p (Holm)", "verdict"))
        columns[f"{measure}: {name.partition(' ')[0]}" if own else name] = list(cells)
    return columns


def runs_of(accuracies: dict[str, list[float]], **more) -> list[dict]:
    """Runs with these accuracies, and losses that are one minus these."""
    common = {"parameters": 10, "train_seconds": 1.0, "compile_seconds": 0.0}
    common |= {"diverged": None, "step_ratio": 1.0, "step_ratio_quartiles": [0.9, 1.2], **more}
    return [
        {"model": model, "seed": seed, "test_accuracy": value, "test_loss": 1 - value, "bits_per_byte": None, **common}
        for model, values in accuracies.items()
        for seed, value in enumerate(values)
    ]


CONFIG = {"data": "", "training_images": 0, "epochs": 1, "seeds": [0], "models": [], "device_name": "", "precision": ""}
CONFIG |= {"compile": False, "processes": 1, "against": "residual"}
