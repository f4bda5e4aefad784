"""What a study leaves on disk, and how it is resumed."""

import csv
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import filelock
import torch
import torchvision

from comparison.console import UserError
from comparison.device import device_name
from comparison.distributed import processes
from comparison.files import atomic_write, remove_partial, write_json

ROOT = Path(__file__).resolve().parents[1]
# What may change from command to command: which runs a study has, and what no number depends on.
FREE = ("models", "seeds", "against", "parallel", "workers", "data_dir", "out", "draw", "seconds")
FREE += ("device", "python", "torchvision", "git_commit")
NOT_OPTIONS = ("data", "training_images", "test_images", "training_bytes", "test_bytes")  # all else is
NOT_OPTIONS += ("processes", "device_name", "torch")
# What the table and the pictures need of results.json
NUMBER, NONE = (int, float), type(None)
CONFIG_FIELDS = {"data": str, "epochs": int, "seeds": list, "models": list, "device_name": str}
CONFIG_FIELDS |= {"precision": str, "compile": bool, "against": str, "processes": int}
RUN_FIELDS = {"model": str, "seed": int, "parameters": int, "train_seconds": NUMBER, "compile_seconds": NUMBER}
RUN_FIELDS |= dict.fromkeys(("test_loss", "test_accuracy", "bits_per_byte", "step_ratio"), (*NUMBER, NONE))
RUN_FIELDS |= {"step_ratio_quartiles": (list, NONE), "diverged": (int, NONE), "learned": dict, "history": list}
EPOCH_FIELDS = {"seconds": NUMBER, "test_accuracy": (*NUMBER, NONE)}
NOT_IN_CSV = ("learned", "history", "step_ratio_quartiles")


def git_commit() -> str | None:
    """The commit of the script, with -dirty if Python files have changed; None where no repository tracks it."""

    def git(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)

    try:
        if git("ls-files", "--error-unmatch", "Test.py").returncode:
            return None
        commit = git("rev-parse", "--verify", "--quiet", "HEAD").stdout.strip()
        return commit + "-dirty" * bool(git("diff", "--quiet", "HEAD", "--", "*.py").returncode) if commit else None
    except OSError:  # git is not installed
        return None


def configuration(options: Mapping) -> dict:
    """All options and versions, as JSON has them."""
    plain = {
        name: value if value is None or isinstance(value, (int, float, list)) else str(value)
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
        value = content.get(name, ...) if isinstance(content, dict) else ...
        if not isinstance(value, kind):
            raise UserError(f"{place} has {'no ' if value is ... else f'{value!r} for '}{name}")


def check_against(against: str | None, models: Iterable[str]) -> None:
    if against not in (None, *models):
        raise UserError(f"--against {against} must be one of the models: {', '.join(models)}")


class Study:
    """A folder with results.json, results.csv and, while it is worked on, checkpoints.

    Several processes may work on one: a seed is trained by the process that has its lock, which the system releases
    when the process dies.

    Attributes:
        config: all options and versions.
        runs: an entry for each model and seed that has finished, by (model, seed).
    """

    def __init__(self, out: Path, config: dict, runs: Iterable[dict] = ()) -> None:
        self.out, self.config, self.commit = out, config, config.get("git_commit")
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
        config, runs = content["config"], content["runs"]
        size = "training_bytes" if "training_bytes" in config else "training_images"
        check_fields(f"{path}: config", config, {size: int, **CONFIG_FIELDS})
        for i, run in enumerate(runs, 1):
            check_fields(f"{path}: run {i}", run, RUN_FIELDS)
            for epoch in run["history"]:
                check_fields(f"{path}: the history of run {i}", epoch, EPOCH_FIELDS)
        return Study(out, config, runs)

    @staticmethod
    def open(out: Path, config: dict, against: str | None) -> "Study":
        """Opens the study in a folder, or a new one, for training.

        Raises:
            UserError: the folder holds a study with other options, or checkpoints of none.
        """
        checkpoints = out / "checkpoints"
        if checkpoints.exists() and not (out / "results.json").exists():  # which is written before any checkpoint
            raise UserError(f"{checkpoints} belongs to no study in {out}; remove it, or name another folder")
        out.mkdir(parents=True, exist_ok=True)
        study, commit = Study(out, config), config["git_commit"]
        with study.lock("study"):
            if (out / "results.json").exists():
                study = Study.read(out)
                study.refuse_changes(config)
                for name in ("models", "seeds"):
                    study.config[name] = list(dict.fromkeys([*study.config[name], *config[name]]))
                study.config["against"] = against or study.config["against"]
                study.commit = commit  # of the runs that are added
                for seed in filter(lambda seed: study.folder(seed).exists(), study.config["seeds"]):
                    with suppress(filelock.Timeout), study.lock(f"seed {seed}", wait=False):  # no process trains it
                        if study.progress(seed) and not study.checkpointed(seed):
                            study.clear(seed)
            check_against(against, study.config["models"])
            remove_partial(out)
            study.write()  # no checkpoint without the options that it belongs to
        return study

    def lock(self, name: str, wait: bool = True) -> filelock.FileLock:
        (self.out / ".locks").mkdir(exist_ok=True)
        return filelock.FileLock(self.out / ".locks" / name, timeout=-1 if wait else 0)

    def refresh(self) -> None:
        """Reads what other processes have added."""
        study = Study.read(self.out)
        self.config, self.runs = study.config, study.runs

    def lacking(self, seed: int, models: Iterable[str]) -> list[str]:
        return [name for name in models if (name, seed) not in self.runs]

    def take(
        self, seeds: Iterable[int], models: list[str], waiting: Callable[[], None] | None
    ) -> Iterator[tuple[int, list[str]]]:
        """Yields seeds, each with the models to train on it, until all of them are there.

        A seed is this process's until the next one is asked for, by when the runs have to be added. It yields what no
        other process works on; then it waits for these, calling `waiting`, or ends, if that is None.
        """
        while left := [seed for seed in seeds if self.lacking(seed, models)]:
            for seed in left:
                with suppress(filelock.Timeout), self.lock(f"seed {seed}", wait=False):  # another process may have it
                    self.refresh()
                    while group := self.checkpointed(seed) or self.lacking(seed, models):
                        with self.lock("study"):
                            self.folder(seed).mkdir(parents=True, exist_ok=True)
                        remove_partial(self.folder(seed))
                        yield seed, group
            if waiting is None:
                return
            self.refresh()
            waiting()
        with self.lock("study"):  # whoever has added the last seed may not have written all of it yet
            pass

    def folder(self, seed: int) -> Path:
        """Where a seed's checkpoint and progress are while it is trained."""
        return self.out / "checkpoints" / f"seed {seed}"

    def checkpoint(self, seed: int) -> Path:
        return self.folder(seed) / "checkpoint.pt"

    def checkpointed(self, seed: int) -> list[str]:
        """The models of the seed's checkpoint, which are trained together to the end."""
        models = self.progress(seed).get("models", []) if self.checkpoint(seed).exists() else []
        return models if self.lacking(seed, models) else []

    def progress(self, seed: int) -> dict:
        """What `report` was given last for a seed that is being trained; empty if there is none."""
        try:
            return json.loads((self.folder(seed) / "progress.json").read_text())
        except (OSError, ValueError):
            return {}

    def report(self, seed: int, progress: dict) -> None:
        """Writes progress.json of a seed that this process trains, with the commits of all code that has trained it."""
        before = self.progress(seed).get("commits", []) if progress["tested"] else []  # it may have to start over
        commits = list(dict.fromkeys([*before, *filter(None, [self.commit])]))
        write_json(self.folder(seed) / "progress.json", {**progress, "commits": commits})

    def refuse_changes(self, config: dict) -> None:
        def flat(config: dict) -> dict:
            recipe = {f"recipe.{name}": value for name, value in (config.get("recipe") or {}).items()}
            return {**config, **recipe, "recipe": None}

        now, then = flat(json.loads(json.dumps(config))), flat(self.config)
        for name, value in now.items():
            if name not in FREE and then.get(name) != value:
                option = name if "." in name or name in NOT_OPTIONS else f"--{name.replace('_', '-')}"
                raise UserError(
                    f"--out {self.out} holds a study with {option} {then.get(name)}, not {value}; name another folder"
                )

    def in_order(self) -> list[dict]:
        models = list(dict.fromkeys([*self.config["models"], *(model for model, _ in self.runs)]))
        return sorted(self.runs.values(), key=lambda run: (run["seed"], models.index(run["model"])))

    def add(self, seed: int, runs: Iterable[dict]) -> None:
        """Adds the finished runs of a seed, and removes their checkpoint."""
        with self.lock("study"):
            self.refresh()
            commits = ", ".join(self.progress(seed).get("commits", [])) or None
            for run in runs:
                self.runs[run["model"], seed] = {**run, "git_commit": commits}
            self.write()
            self.clear(seed)

    def clear(self, seed: int) -> None:
        """Removes what is no longer needed when a seed's models have finished; a damaged checkpoint is kept."""
        for path in (self.checkpoint(seed), self.folder(seed) / "progress.json"):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            self.folder(seed).rmdir()
            self.folder(seed).parent.rmdir()

    def write(self) -> None:
        runs = self.in_order()
        write_json(self.out / "results.json", {"config": self.config, "runs": runs}, indent=2)
        names = [name for name in runs[0] if name not in NOT_IN_CSV] if runs else []
        with atomic_write(self.out / "results.csv") as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(runs)
