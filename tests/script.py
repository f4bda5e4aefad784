"""The script as the tests run it, and results that were not run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


PICTURES = ("accuracy.png", "differences.png", "parameters.png", "learned.png")


SYNTHETIC = ("--dataset", "synthetic", "--limit", "200", "--batch-size", "100", "--epochs", "1")


def run(*options: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "Test.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", **kwargs)


def torchrun(*options: str, restarts: int = 0) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*command, f"--max-restarts={restarts}", str(ROOT / "Test.py"), *options]


def results(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())["runs"]


STUDY = (*SYNTHETIC, "--epochs", "3", "--models", "residual", "rw+lr+pa@4/2", "--seeds", "2", "--threads", "1")


POSIX = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals and limits")


def numbers(out: Path) -> list[dict]:
    """All that a run ended with but how long it took."""
    runs = json.loads((out / "results.json").read_text())["runs"]
    kept = ("model", "seed", "epochs", "test_accuracy", "diverged", "learned", "weights_sha256")
    history = ("train_loss", "test_accuracy")
    return [{k: run[k] for k in kept} | {k: [e[k] for e in run["history"]] for k in history} for run in runs]


def columns_of(table: dict) -> dict[str, list[str]]:
    """The cells of each column of a table, by its heading."""
    return {name: list(cells) for name, *cells in zip(table["columns"], *table["rows"])}


def runs_of(accuracies: dict[str, list[float]], **more) -> list[dict]:
    common = {"parameters": 10, "train_seconds": 1.0, "images_per_second": 1.0, "compile_seconds": 0.0, **more}
    return [
        {"model": model, "seed": seed, "test_accuracy": value, **common}
        for model, values in accuracies.items()
        for seed, value in enumerate(values)
    ]


CONFIG = {"data": "", "training_images": 0, "epochs": 1, "seeds": 1, "models": [], "device_name": "", "precision": ""}
CONFIG |= {"compile": False, "parallel": 1, "processes": 1, "against": "residual"}
