"""What a study leaves on disk, and how it is continued."""

import argparse
import csv
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torchvision

from comparison.console import RefusedError
from comparison.device import device_name
from comparison.distributed import processes
from comparison.files import PARTIAL, replacing


def configuration(options: argparse.Namespace) -> dict:
    """All that the numbers depend on but the data and the recipe."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    plain = {
        name: value if value is None or isinstance(value, (int, list)) else str(value)
        for name, value in vars(options).items()
    }
    return {
        **plain,
        "models": [model.name for model in options.models],
        "processes": processes()[1],
        "device_name": device_name(options.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "git_commit": commit,
    }


def write_results(out: Path, config: dict, runs: list[dict]) -> None:
    with replacing(out / "results.json") as path:
        path.write_text(json.dumps({"config": config, "runs": runs}, indent=2, allow_nan=False) + "\n")
    names = [name for name in runs[0] if name not in ("learned", "history")] if runs else []
    with replacing(out / "results.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(runs)


# What may change while a study goes on: which pairs it has, and what no number depends on.
FREE = ("models", "seeds", "against", "parallel", "workers", "data_dir", "out", "draw", "seconds", "network", "gpt")


FREE += ("python", "torchvision", "git_commit")


def read_results(out: Path) -> tuple[dict, list[dict]]:
    """The configuration and the runs of a study."""
    path = out / "results.json"
    try:
        study = json.loads(path.read_text())
        return {"against": "residual", "accumulate": 1, "processes": 1, **study["config"]}, study["runs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{path} can't be read as the results of a study: {error!r}") from None


def earlier_runs(options: argparse.Namespace, config: dict) -> list[dict]:
    """The runs that --out holds. config takes from its study what may change while it goes on."""
    if not (options.out / "results.json").exists():
        return []
    before, runs = read_results(options.out)

    def flat(config: dict) -> dict:
        return {
            **config,
            **{f"recipe.{name}": value for name, value in config.get("recipe", {}).items()},
            "recipe": None,
        }

    now, then = flat(json.loads(json.dumps(config))), flat(before)
    for name, value in now.items():
        if name not in FREE and then.get(name) != value:
            option = f"--{name.replace('_', '-')}" if hasattr(options, name) else name
            raise RefusedError(
                f"--out {options.out} holds a study with {option} {then.get(name)}, not {value}; name another folder"
            )
    if before["git_commit"] != config["git_commit"]:
        print(f"--out {options.out} was begun with the code of commit {before['git_commit']}", file=sys.stderr)
    config["models"] = list(dict.fromkeys([*before["models"], *config["models"]]))
    config["seeds"] = max(before["seeds"], config["seeds"])
    config["against"] = options.against or before["against"]
    config["git_commit"] = before["git_commit"]
    return runs


def checkpoint(out: Path, model: str, seed: int) -> Path:
    return out / "checkpoints" / f"{re.sub('[/:]', '_', model)}, seed {seed}.pt"


def tidy(out: Path, runs: list[dict]) -> None:
    """Removes what a killed process left, and checkpoints that belong to no run that is still to be done."""
    for folder in ("", "checkpoints/"):
        for half_written in out.glob(f"{folder}{PARTIAL}*"):
            shutil.rmtree(half_written, ignore_errors=True)
    finished = {checkpoint(out, run["model"], run["seed"]) for run in runs}
    for path in out.glob("checkpoints/*.pt"):
        if path in finished or not (out / "results.json").exists():
            path.unlink()


def check_against(against: str | None, models: Iterable[str]) -> None:
    if against not in (None, *models):
        raise RefusedError(f"--against {against} must be one of the models: {', '.join(models)}")
