"""Accuracy over training seconds: this script's networks and recipe against those of airbench94_muon.

    python results/airbench94/race.py [--seeds N] [--data-dir DIR] [--out DIR] [NETWORK:EPOCHS …]

All of a seed train side by side, on the same batches, in turns of order. Those with fewer epochs end earlier, so ratios
of their seconds can be trusted where nothing else uses the machine. Prints when each recipe reaches an accuracy, and
leaves race.png and race.json in --out; further seeds of the same race are added there, by one process at a time.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as Test.py, before torch

import torch
import torch.nn.functional as F
from matplotlib.ticker import LogFormatter
from torch import Tensor, nn
from torchvision.datasets import CIFAR10

from comparison.data import Dataset, resize, seeded, whole_batches
from comparison.device import Stopwatch, autocast, default_precision, device_name, keep_memory, rotated
from comparison.files import atomic_write
from comparison.models import Model
from comparison.muon import Muon
from comparison.networks import build, whitening_filters
from comparison.pictures import subplots
from comparison.sources import load_cifar
from Test import seeds
from TrainUtil import IMAGES, TrainState, evaluate

CONTESTANTS = ["small:3", "small:6", "medium:5", "medium:11", "airbench:1", "airbench:2", "airbench:4", "airbench:6"]
LEVELS = (0.85, 0.87, 0.88, 0.89, 0.90, 0.91, 0.92, 0.93)
BATCH = 500


class Head(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.in_features


class Airbench:
    """The network and the recipe of airbench94_muon.

    From https://github.com/KellerJordan/cifar10-airbench (airbench94_muon.py, commit 096d14d, 2.59 s on an A100).
    Its rates are for a loss that is summed over a batch. Here a batch has 500 images in place of 2,000, for more steps
    in the few epochs that a CPU affords, and float32 or bfloat16 takes the place of float16. Batches, augmentation and
    evaluation are this script's, without test-time augmentation.
    """

    bias_lr, head_lr, decay = 0.053, 0.67, 2e-6 * BATCH

    def __init__(self, data: Dataset, seed: int, epochs: int, precision: str) -> None:
        self.precision = precision
        steps = whole_batches(data.train_size, BATCH)
        self.step_number, self.steps, self.bias_steps = 0, epochs * steps, 3 * steps
        with seeded(seed):
            self.model = self.network(data).to(memory_format=torch.channels_last)
        self.whitening, head = self.model[0], self.model[-1]
        filters = [p for p in self.model.parameters() if p.ndim == 4 and p.requires_grad]
        norms = [m.bias for m in self.model if isinstance(m, nn.BatchNorm2d)]
        rates = [([self.whitening.bias], self.bias_lr), (norms, self.bias_lr), ([head.weight], self.head_lr)]
        groups = [{"params": ps, "lr": lr, "weight_decay": self.decay / lr} for ps, lr in rates]
        self.sgd = torch.optim.SGD(groups, momentum=0.85, nesterov=True)
        self.muon = Muon(filters, lr=0.24, momentum=0.6, dtype=getattr(torch, precision))
        self.groups = [*self.sgd.param_groups, *self.muon.param_groups]
        self.rates = [group["lr"] for group in self.groups]

    @staticmethod
    def network(data: Dataset) -> nn.Sequential:
        def convolution(channels: int, width: int) -> nn.Conv2d:
            layer = nn.Conv2d(channels, width, 3, padding="same", bias=False)
            nn.init.dirac_(layer.weight.data[:channels])  # its first filters start as the identity
            return layer

        def norm(width: int) -> nn.BatchNorm2d:
            layer = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
            layer.weight.requires_grad = False
            return layer

        whitening, layers = nn.Conv2d(3, 24, 2), []
        whitening.weight = nn.Parameter(whitening_filters(data, axes=12), requires_grad=False)
        for channels, width in ((24, 64), (64, 256), (256, 256)):
            layers += [convolution(channels, width), nn.MaxPool2d(2), norm(width), nn.GELU()]
            layers += [convolution(width, width), norm(width), nn.GELU()]
        head = Head(256, 10, bias=False)
        head.weight.data /= head.weight.data.std()
        return nn.Sequential(whitening, nn.GELU(), *layers, nn.MaxPool2d(3), nn.Flatten(), head)

    def step(self, x: Tensor, y: Tensor) -> None:
        self.whitening.bias.requires_grad = self.step_number < self.bias_steps
        with autocast(x.device, self.precision):
            logits = self.model(x)
        F.cross_entropy(logits.float(), y, label_smoothing=0.2, reduction="sum").backward()
        for i, (group, rate) in enumerate(zip(self.groups, self.rates)):
            group["lr"] = rate * (1 - self.step_number / (self.bias_steps if i == 0 else self.steps))
        for optimizer in (self.sgd, self.muon):
            optimizer.step()
            optimizer.zero_grad()
        self.step_number += 1


class Ours:
    """A network of Test.py with the plain residual connection and the default recipe."""

    def __init__(self, arch: str, data: Dataset, seed: int, epochs: int, precision: str) -> None:
        self.recipe = replace(IMAGES, epochs=epochs, batch_size=BATCH)
        self.step_number, self.steps = 0, epochs * whole_batches(data.train_size, BATCH)
        self.model = build(arch, Model.parse("residual"), seed, data).to(memory_format=torch.channels_last)
        self.state = TrainState(self.model, self.model, self.recipe, self.steps, precision)

    def step(self, x: Tensor, y: Tensor) -> None:
        x = resize(x, self.recipe.size(self.step_number / self.steps))
        self.state.step(x, y, len(y), accumulate=1)
        self.step_number += 1


def race(contestants: Mapping[str, int], data: Dataset, seed: int, precision: str) -> list[dict]:
    """The runs of one seed; contestants are NETWORK:EPOCHS and the epochs."""
    runners = {}
    for name, epochs in contestants.items():
        arch = name.partition(":")[0]
        how = (data, seed, epochs, precision)
        runners[name] = Airbench(*how) if arch == "airbench" else Ours(arch, *how)
    watches = {name: Stopwatch(data.device) for name in runners}
    runs = []
    for epoch in range(max(contestants.values())):
        training = [name for name, epochs in contestants.items() if epochs > epoch]
        for name in training:
            runners[name].model.train()
        for step, (x, y) in enumerate(data.batches(seed, epoch, BATCH, IMAGES.max_shift)):
            for name in rotated(training, step):
                with watches[name]:
                    runners[name].step(x, y)
        for name in training:
            if contestants[name] == epoch + 1:
                tested = evaluate({name: runners.pop(name).model}, data, precision)[name]
                run = {"network": name.partition(":")[0], "epochs": epoch + 1, "seed": seed, **tested}
                runs.append({**run, "train_seconds": sum(watches[name].seconds())})
                print("{network}, {epochs} epochs, seed {seed}: ".format(**run), end="")
                print(f"{tested['test_accuracy']:.2%} after {runs[-1]['train_seconds']:.1f} s", flush=True)
    return runs


def curve(runs: list[dict], networks: set[str]) -> list[tuple[float, float]]:
    """Seconds and accuracy, means over the seeds, of all that no shorter training surpasses."""
    points: dict[tuple, list[tuple[float, float]]] = {}
    for run in runs:
        if run["network"] in networks:
            key = (run["network"], run["epochs"])
            points.setdefault(key, []).append((run["train_seconds"], run["test_accuracy"]))
    best = []
    for seconds, accuracy in sorted(tuple(map(statistics.mean, zip(*found))) for found in points.values()):
        if not best or accuracy > best[-1][1]:
            best.append((seconds, accuracy))
    return best


def seconds_at(level: float, points: list[tuple[float, float]]) -> float | None:
    """By linear interpolation; None outside of what was trained."""
    for (s, a), (t, b) in pairwise(points):
        if a <= level <= b:
            return s + (t - s) * (level - a) / (b - a)
    return None


def main(argv: list[str] | None = None, data: Dataset | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("contestants", nargs="*", default=CONTESTANTS, metavar="NETWORK:EPOCHS")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], help="as Test.py's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("runs/airbench94"))
    options = parser.parse_args(argv)
    keep_memory()
    torch.set_num_threads(options.threads)
    data = data or load_cifar(CIFAR10, options.data_dir)
    precision = default_precision(data.device)
    config = {"precision": precision, "device_name": device_name(data.device), "torch": torch.__version__}
    config["contestants"] = options.contestants
    contestants = {name: int(name.partition(":")[2]) for name in options.contestants}
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        stored(options.out, config)  # refuses what could not be added, before the work
        runs = race(contestants, data, seed, precision)
        runs += [run for run in stored(options.out, config) if run["seed"] != seed]
        with atomic_write(options.out / "race.json") as path:
            path.write_text(json.dumps({"config": config, "runs": runs}, indent=1) + "\n")
    show(config, runs, options.out / "race.png")


def stored(out: Path, config: dict) -> list[dict]:
    """The runs of earlier seeds."""
    path = out / "race.json"
    found = json.loads(path.read_text()) if path.exists() else {"config": config, "runs": []}
    if found["config"] != config:
        sys.exit(f"{path} is of another race ({found['config']}); --out names another folder")
    return found["runs"]


def show(config: dict, runs: list[dict], path: Path) -> None:
    """Draws the picture, and prints when each recipe reaches an accuracy."""
    ours, theirs = curve(runs, {run["network"] for run in runs} - {"airbench"}), curve(runs, {"airbench"})
    figure, (axes,) = subplots(1, 6, 4)
    for label, points in {"Test.py": ours, "airbench94_muon": theirs}.items():
        axes.plot(*zip(*((s, 100 * a) for s, a in points)), "o-", label=label)
    title = f"{config['device_name']}, {config['precision']}"
    axes.set(xscale="log", xlabel="training s", ylabel="test accuracy %", title=title)
    axes.xaxis.set_major_formatter(LogFormatter())
    axes.xaxis.set_minor_formatter(LogFormatter())
    axes.legend()
    figure.savefig(path, dpi=120)
    print("| test accuracy % | Test.py, s | airbench94_muon, s | ratio |\n|---|---|---|---|")
    for level in LEVELS:
        mine, other = seconds_at(level, ours), seconds_at(level, theirs)
        cells = [f"{s:.0f}" if s else "–" for s in (mine, other)]
        print(f"| {100 * level:.0f} | {' | '.join(cells)} | {f'{mine / other:.2f}' if mine and other else '–'} |")


if __name__ == "__main__":
    main()
