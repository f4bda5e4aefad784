"""What a study leaves on disk, and how it is resumed."""

import csv
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
import torchvision

from comparison.console import UserError
from comparison.device import device_name
from comparison.distributed import processes
from comparison.files import atomic_write, remove_partial, write_json

ROOT = Path(__file__).resolve().parents[1]
# What may change while a study goes on: which runs it has, and what no number depends on.
FREE = ("models", "seeds", "against", "parallel", "workers", "data_dir", "out", "draw", "seconds", "network", "gpt")
FREE += ("python", "torchvision", "git_commit")
FACTS = ("data", "training_images", "test_images", "processes", "device_name", "torch")  # all else is an option
# What the table and the pictures need of results.json
NUMBER = (int, float)
CONFIG_FIELDS = {"data": str, "training_images": int, "epochs": int, "seeds": int, "models": list, "device_name": str}
CONFIG_FIELDS |= {"precision": str, "compile": bool, "parallel": int}
RUN_FIELDS = {"model": str, "seed": int, "parameters": int, "test_accuracy": NUMBER, "train_seconds": NUMBER}
RUN_FIELDS |= {"images_per_second": NUMBER, "compile_seconds": NUMBER, "learned": dict, "history": list}
EPOCH_FIELDS = {"seconds": NUMBER, "test_accuracy": NUMBER}


def git_commit() -> str | None:
    """The commit of the script, with -dirty if files have changed; None where no repository tracks it."""
    git = ["git", "-C", str(ROOT)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", "Test.py"], capture_output=True).returncode == 0
        describe = [*git, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        return (tracked and subprocess.run(describe, capture_output=True, text=True).stdout.strip()) or None
    except OSError:  # git is not installed
        return None


def configuration(options: Mapping) -> dict:
    """All options and versions, as JSON has them."""
    plain = {
        name: value if value is None or isinstance(value, (int, list)) else str(value)
        for name, value in options.items()
    }
    return {
        **plain,
        "models": [model.name for model in options["models"]],
        "against": options["against"] or "residual",
        "processes": processes()[1],
        "device_name": device_name(options["device"]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "git_commit": git_commit(),
    }


def check_fields(place: str, content: object, fields: dict) -> None:
    for name, kind in fields.items():
        value = content.get(name) if isinstance(content, dict) else None
        if not isinstance(value, kind):
            raise UserError(f"{place} has {'no ' if value is None else f'{value!r} for '}{name}")


def checkpoint_path(out: Path, model: str, seed: int) -> Path:
    return out / "checkpoints" / f"{re.sub('[/:]', '_', model)}, seed {seed}.pt"


def check_against(against: str | None, models: Iterable[str]) -> None:
    if against not in (None, *models):
        raise UserError(f"--against {against} must be one of the models: {', '.join(models)}")


class Study:
    """A folder with results.json, results.csv and, while it goes on, checkpoints.

    Attributes:
        config: the options and versions that the numbers depend on.
        runs: an entry for each model and seed that has finished, by (model, seed).
    """

    def __init__(self, out: Path, config: dict, runs: Iterable[dict] = ()) -> None:
        self.out, self.config = out, config
        self.runs = {(run["model"], run["seed"]): run for run in runs}

    @staticmethod
    def read(out: Path) -> "Study":
        """Reads a study, for which its results.json has to be whole.

        Raises:
            UserError: results.json could not be read, or a field is missing.
        """
        path = out / "results.json"
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} can't be read as the results of a study: {error!r}") from None
        check_fields(str(path), content, {"config": dict, "runs": list})
        config = {"against": "residual", "accumulate": 1, "processes": 1, **content["config"]}
        check_fields(f"{path}: config", config, CONFIG_FIELDS)
        for i, run in enumerate(content["runs"], 1):
            check_fields(f"{path}: run {i}", run, RUN_FIELDS)
            for epoch in run["history"]:
                check_fields(f"{path}: the history of run {i}", epoch, EPOCH_FIELDS)
        return Study(out, config, content["runs"])

    @staticmethod
    def resume(out: Path, config: dict, against: str | None) -> "Study":
        """Opens the study in a folder, or a new one, for training.

        Raises:
            UserError: the folder holds a study with other options.
        """
        study, commit = Study(out, config), config["git_commit"]
        if (out / "results.json").exists():
            study = Study.read(out)
            study.refuse_changes(config)
            first = study.config.get("git_commit")
            if first != commit:
                print(f"--out {out} was begun with the code of commit {first}", file=sys.stderr)
            config = {**study.config, **config, "git_commit": first}
            config["models"] = list(dict.fromkeys([*study.config["models"], *config["models"]]))
            config["seeds"] = max(study.config["seeds"], config["seeds"])
            config["against"] = against or study.config["against"]
            study.config = config
        study.commit = commit  # of the runs that are added
        check_against(against, study.config["models"])
        remove_partial(out)
        remove_partial(out / "checkpoints")
        finished = {checkpoint_path(out, *run) for run in study.runs}
        for path in out.glob("checkpoints/*.pt"):
            if path in finished or not (out / "results.json").exists():
                path.unlink()
        study.write()  # no checkpoint without the options that it belongs to
        (out / "checkpoints").mkdir(exist_ok=True)
        return study

    def refuse_changes(self, config: dict) -> None:
        def flat(config: dict) -> dict:
            recipe = {f"recipe.{name}": value for name, value in (config.get("recipe") or {}).items()}
            return {**config, **recipe, "recipe": None}

        now, then = flat(json.loads(json.dumps(config))), flat(self.config)
        for name, value in now.items():
            if name not in FREE and then.get(name) != value:
                option = name if "." in name or name in FACTS else f"--{name.replace('_', '-')}"
                raise UserError(
                    f"--out {self.out} holds a study with {option} {then.get(name)}, not {value}; name another folder"
                )

    def in_order(self) -> list[dict]:
        models = list(dict.fromkeys([*self.config["models"], *(model for model, _ in self.runs)]))
        return sorted(self.runs.values(), key=lambda run: (run["seed"], models.index(run["model"])))

    def add(self, run: dict) -> None:
        """Adds a finished run, and removes its checkpoint."""
        self.runs[run["model"], run["seed"]] = {**run, "git_commit": self.commit}
        self.write()
        checkpoint_path(self.out, run["model"], run["seed"]).unlink()

    def finish(self) -> None:
        with suppress(OSError):  # not empty: damaged checkpoints are kept
            (self.out / "checkpoints").rmdir()

    def write(self) -> None:
        runs = self.in_order()
        write_json(self.out / "results.json", {"config": self.config, "runs": runs}, indent=2)
        names = [name for name in runs[0] if name not in ("learned", "history")] if runs else []
        with atomic_write(self.out / "results.csv") as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(runs)
