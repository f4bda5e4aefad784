"""Compares the plain residual connection with LAuReL, LAuReL-LR and LAuReL-PA in small CNNs on CIFAR-10.

`python Test.py` trains four models on all of CIFAR-10 and leaves a table and two pictures; `--help` has the rest.
"""

import argparse
import csv
import importlib
import json
import multiprocessing
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import rich
import torch
import torch.nn.functional as F
import torchvision
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor, nn

import TrainUtil
from LAuReL import LAuReL

LAuReL_LR = importlib.import_module("LAuReL-LR").LAuReL_LR
LAuReL_PA = importlib.import_module("LAuReL-PA").LAuReL_PA

# ---------------------------------------------------------------------------------------------------------------------
# The models
# ---------------------------------------------------------------------------------------------------------------------

MODELS = ("residual", "rw", "lr", "pa", "rw+lr", "rw+pa", "rw+lr+pa", "deeper")


@dataclass(frozen=True)
class Model:
    """A model's name, such as rw+lr+pa@16/3, taken apart."""

    name: str
    base: str
    rank: int | None = None  # None: what the network has by default
    k: int = 3

    @staticmethod
    def parse(name: str) -> "Model":
        match = re.fullmatch(r"([a-z+]+)(?:@([1-9]\d*))?(?:/([1-9]\d*))?", name)
        base, rank, k = match.groups() if match else (None, None, None)
        if base not in MODELS:
            raise argparse.ArgumentTypeError(
                f"unknown model {name!r}; allowed are {', '.join(MODELS)}, with @RANK after lr or pa and /K after pa, "
                "both at least 1, as in lr@8, pa/5, rw+lr+pa@16/3"
            )
        if rank and "lr" not in base and "pa" not in base:
            raise argparse.ArgumentTypeError(f"{name!r}: {base} has no rank; @RANK goes with lr and pa")
        if k and "pa" not in base:
            raise argparse.ArgumentTypeError(f"{name!r}: {base} has no k; /K goes with pa")
        return Model(name, base, int(rank) if rank else None, int(k or 3))

    def residual(
        self,
        dim: int,
        available: int,
        *,
        channel_dim: int,
        rank: int = 16,
        pa_rank: int | None = 16,
        recompute: bool = False,
    ) -> nn.Module:
        """The residual connection of a layer that has `available` activations to look at.

        rank and pa_rank, the latter for pa and rw+pa, are the ranks where the name gives none; None: h(x) = x.
        """
        k = min(self.k, available)  # a γ for an activation that is never there would not be trained
        common = {"channel_dim": channel_dim, "recompute": recompute}
        options = {"residual_weights": self.base.startswith("rw+"), **common}
        match self.base:
            case "rw":
                return LAuReL(**common)
            case "lr" | "rw+lr":
                return LAuReL_LR(dim, self.rank or rank, **options)
            case "pa" | "rw+pa":
                return LAuReL_PA(dim, k, self.rank or pa_rank, **options)
            case "rw+lr+pa":  # eq. 6: a low-rank pair for each activation
                return LAuReL_PA(dim, k, self.rank or rank, shared=False, **options)
        return Residual()


class Residual(nn.Module):
    """The plain residual connection."""

    def forward(self, x: Tensor, fx: Tensor) -> Tensor:
        return x + fx


ARCHS = {"small": (32, 64, 128), "medium": (64, 128, 256), "wide": (64, 256, 256)}  # channels of the three stages


class SmallCNN(nn.Module):
    """A residual network of three stages, 32, 64 and 128 channels wide, with 2, 2 and 3 residual layers.

    Whitened 2×2 patches (N, 16, 31, 31) → per stage a 3×3 convolution that halves the image, then residual layers
    x' = residual(x, f(x)), f = 3×3 convolution, batch norm, GELU → maximum over the image → linear classifier.

    All models share f: the same layers with the same initial weights for a seed. A residual connection draws its own
    random numbers apart, so it shifts none of f's. `deeper` has one more layer in the second stage, the last but one,
    as the 4.37 % that the paper's naive scaling adds are one more bottleneck in ResNet-50's last but one. That layer's
    batch norm starts with gain 0 (Goyal et al. 2017), so that `deeper` too starts as the same function.
    """

    layers = (2, 2, 3)

    def __init__(self, model: Model, seed: int, images: Tensor, widths: tuple[int, ...] = ARCHS["small"]) -> None:
        super().__init__()
        with seeded(seed):
            self.whitening = nn.Conv2d(3, 16, kernel_size=2, bias=False)
            self.whitening.weight = nn.Parameter(whitening_filters(images), requires_grad=False)
            self.stages = nn.ModuleList()
            channels = 16
            for i, (width, n) in enumerate(zip(widths, self.layers)):
                self.stages.append(Stage(channels, width, n, model, seed=1000 * seed + 100 * i + 1))
                channels = width
            self.classifier = nn.Linear(channels, 10)
        if model.base == "deeper":
            self.stages[1].deepen(seed=1000 * seed + 999)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.whitening(x))
        for stage in self.stages:
            x = stage(x)
        return self.classifier(x.amax(dim=(2, 3)))

    def learned(self) -> dict[str, dict[str, float]]:
        """What the residual connections learned: for each of alpha, beta, gamma[0], gamma[1], …, its value by layer."""
        values: dict[str, dict[str, float]] = {}
        for i, stage in enumerate(self.stages, 1):
            for j, residual in enumerate(stage.residuals, 1):
                scalars = {name: getattr(residual, name, None) for name in ("alpha", "beta")}
                scalars |= {f"gamma[{n}]": gamma for n, gamma in enumerate(getattr(residual, "gamma", ()))}
                for name, value in scalars.items():
                    if value is not None:
                        values.setdefault(name, {})[f"{i}.{j}"] = value.item()
        return values


class Stage(nn.Module):
    def __init__(self, channels: int, width: int, layers: int, model: Model, seed: int) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(width),
            nn.GELU(),
        )
        self.branches = nn.ModuleList(branch(width) for _ in range(layers))
        self.residuals = nn.ModuleList()
        for i in range(layers):
            with seeded(seed + i):
                self.residuals.append(model.residual(width, available=i + 1, channel_dim=1))

    def deepen(self, seed: int) -> None:
        with seeded(seed):
            self.branches.append(branch(self.branches[0][0].out_channels))
        nn.init.zeros_(self.branches[-1][1].weight)
        self.residuals.append(Residual())

    def forward(self, x: Tensor) -> Tensor:
        # PA's history starts anew where the shape changes.
        return residual_layers(self.down(x), self.branches, self.residuals)


def branch(width: int) -> nn.Sequential:
    """f: the same for every model."""
    convolution = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.GELU())


class GPT(nn.Module):
    """A pre-norm transformer (…, length) → (…, length, 256 logits), whose costs `--profile` sets beside table 5's.

    Each layer has two residual connections, around f = LayerNorm, causal attention with heads of 64 channels, and
    around f = LayerNorm, linear D → 4D, GELU, linear 4D → D. The vocabulary is that of bytes, so that embedding and
    logits hardly add to the costs that the residual connections are compared with. `deeper` has one more layer.
    """

    vocabulary = 256

    def __init__(self, model: Model, dim: int, layers: int, length: int, recompute: bool = False) -> None:
        super().__init__()
        layers += model.base == "deeper"
        with seeded(0):
            self.embedding = nn.Embedding(self.vocabulary, dim)
            self.position = nn.Parameter(0.02 * torch.randn(length, dim))
            self.branches = nn.ModuleList()
            for _ in range(layers):
                mlp = (nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
                self.branches.append(nn.Sequential(nn.LayerNorm(dim), Attention(dim)))
                self.branches.append(nn.Sequential(nn.LayerNorm(dim), *mlp))
            self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, self.vocabulary, bias=False))
        options = {"channel_dim": -1, "rank": 32, "pa_rank": None, "recompute": recompute}
        self.residuals = nn.ModuleList(model.residual(dim, available=i + 1, **options) for i in range(2 * layers))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(residual_layers(self.embedding(tokens) + self.position, self.branches, self.residuals))


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)  # (N, heads, length, 64) each
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def residual_layers(x: Tensor, branches: nn.ModuleList, residuals: nn.ModuleList) -> Tensor:
    xs = [x]
    for f, residual in zip(branches, residuals):
        x = xs[-1]
        xs.append(residual(xs if isinstance(residual, LAuReL_PA) else x, f(x)))
    return xs[-1]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from the seed within, and none taken from the stream around."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def whitening_filters(images: Tensor, n: int = 16) -> Tensor:
    """n filters (n, 3, 2, 2): ± the n/2 main principal axes of the images' 2×2 patches, scaled to unit variance.

    All twelve axes were no better on the held-out images, and the convolution that follows is the most expensive one.
    """
    patches = F.unfold(TrainUtil.normalize(images[:5000].cpu()), kernel_size=2, stride=2)  # (N, 12, 256)
    patches = patches.transpose(0, 1).flatten(1)  # (12, N · 256)
    variance, axes = torch.linalg.eigh(patches @ patches.T / patches.shape[1])  # ascending
    filters = (axes / (variance + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)[-n // 2 :]
    return torch.cat([filters, -filters])


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

EXAMPLES = f"""\
models: {", ".join(MODELS)}
  lr@8 sets the rank, pa/5 sets k, rw+lr+pa@16/3 both; the defaults are 16 and 3
  in --profile's GPT the default rank is 32, and pa and rw+pa without a rank have h(x) = x, as in the paper's table 5

longer training, residual, mean of three seeds on 2 CPU cores with bfloat16: 87.65 % in 49 s with the default 5 epochs,
  90.22 % in 141 s with 15, 91.85 % in 348 s with 38 (results/README.md has commands and machine)

examples:
  python Test.py                                        residual, rw, lr and pa, one seed
  python Test.py --models residual rw+lr deeper --seeds 3
  python Test.py --models residual --epochs 15          longer training, higher accuracy
  python Test.py --dataset synthetic --epochs 2         no download, done in a minute
  python Test.py --profile                              time and memory of every residual connection
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def device(text: str) -> torch.device:
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if text == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if there[name]))
    try:
        chosen = torch.device(text)
    except RuntimeError:
        chosen = None
    if chosen is None or not there.get(chosen.type) or (chosen.index or 0) >= max(1, torch.cuda.device_count()):
        allowed = ", ".join(["auto", *(name for name in there if there[name])])
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here; allowed are {allowed}")
    return chosen


def parse(argv: list[str] | None) -> argparse.Namespace:
    default = TrainUtil.Recipe()
    parser = Parser(
        prog="Test.py",
        description="Trains small CNNs that differ in the residual connection alone, and compares them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", type=Model.parse, metavar="MODEL", help="(default: residual rw lr pa; --profile: all)")
    add("--arch", choices=ARCHS, default="small", help="medium for longer training, wide for a GPU (default: small)")
    add("--epochs", type=count, default=default.epochs, metavar="N", help="(default: %(default)s)")
    add("--batch-size", type=count, default=default.batch_size, metavar="N", help="(default: %(default)s)")
    add("--seeds", type=count, default=1, metavar="N", help="train every model with seeds 0 to N-1 (default: 1)")
    add("--parallel", type=count, default=1, metavar="N", help="train N at a time, side by side (default: 1)")
    add("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="(default: the device's fastest)")
    add("--compile", action="store_true", help="compile the model with torch.compile; its time is reported apart")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where CIFAR-10 is kept (default: data)")
    add("--dataset", choices=("cifar10", "synthetic"), default="cifar10", help="synthetic: made up, no download")
    add("--limit", type=count, metavar="N", help="the first N training images only, for a quick try")
    add("--hold-out", type=count, metavar="N", help="test on the last N training images, to choose a recipe by")
    add("--profile", action="store_true", help="measure what each residual connection costs, in place of training")
    add("--seconds", type=count, default=60, metavar="N", help="--profile: at least so long on training (default: 60)")
    add("--network", choices=("both", "cnn", "gpt"), default="both", help="--profile: (default: both)")
    shape = ("DIM", "LAYERS", "LENGTH", "BATCH")
    add("--gpt", type=count, nargs=4, default=[768, 4, 256, 4], metavar=shape, help="--profile: (default: 768 4 256 4)")
    add("--out", type=Path, metavar="DIR", help="where results go (default: runs/ and the date and time)")
    options = parser.parse_args(argv)
    models = options.models or [Model.parse(name) for name in (MODELS if options.profile else MODELS[:4])]
    if options.profile:
        models.insert(0, Model.parse("residual"))  # what the others are compared with
    options.models = list({model.name: model for model in models}.values())
    options.out = options.out or Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
    if options.precision == "auto":
        options.precision = TrainUtil.default_precision(options.device)
    training_images = 5000 if options.dataset == "synthetic" else 50_000
    if options.hold_out and options.hold_out >= training_images:
        parser.error(f"--hold-out must be below the {training_images} training images, got {options.hold_out}")
    if options.gpt[0] % 64:
        parser.error(f"--gpt {options.gpt[0]} …: the width must be a multiple of 64, the channels of a head")
    if any((options.out / name).exists() for name in ("results.json", "profile.json")):
        parser.error(f"--out {options.out} holds the results of another run; name a new folder")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    return options


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
        "device_name": TrainUtil.device_name(options.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "git_commit": commit,
    }


class Monitor:
    """What runs now and how long it will take: one moving line in a terminal, a line an epoch elsewhere."""

    def __init__(self, titles: list[str], epochs: int) -> None:
        self.titles, self.epochs = titles, epochs
        self.done, self.tested = [0.0] * len(titles), [0] * len(titles)  # the part of each run; its epochs
        self.plain = not rich.get_console().is_terminal
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(20), transient=True, disable=self.plain)
        self.task = self.bar.add_task("", total=len(titles))
        self.start = time.perf_counter()

    def report(self, run: int, work: float, images: int, seconds: float, history: list[dict]) -> None:
        self.done[run] = work
        left = (time.perf_counter() - self.start) * (len(self.done) / sum(self.done) - 1)
        epoch_ended, self.tested[run] = len(history) > self.tested[run], len(history)
        epoch = len(history) + (0 if epoch_ended else 1)
        text = f"[{run + 1}/{len(self.titles)}] {self.titles[run]}, epoch {epoch}/{self.epochs}"
        if history:
            text += f", loss {history[-1]['train_loss']:.3f}, accuracy {100 * history[-1]['test_accuracy']:.2f} %"
        text += f", {images / seconds:.0f} images/s, {left // 60:.0f}:{left % 60:02.0f} min left"
        self.bar.update(self.task, completed=sum(self.done), description=text)
        if self.plain and epoch_ended:
            print(text, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves
# ---------------------------------------------------------------------------------------------------------------------


def summarize(runs: list[dict]) -> list[dict]:
    """One entry a model: means and standard deviations over seeds, differences to `residual` paired by seed."""
    baseline = {run["seed"]: run for run in runs if run["model"] == "residual"}
    summary = []
    for name in dict.fromkeys(run["model"] for run in runs):
        mine = [run for run in runs if run["model"] == name]
        paired = [(run, baseline[run["seed"]]) for run in mine if run["seed"] in baseline and name != "residual"]
        summary.append(
            {
                "model": name,
                "parameters": mine[0]["parameters"],
                "added": [100 * (run["parameters"] / base["parameters"] - 1) for run, base in paired[:1]],
                "accuracy": [100 * run["test_accuracy"] for run in mine],
                "difference": [100 * (run["test_accuracy"] - base["test_accuracy"]) for run, base in paired],
                "seconds": [run["train_seconds"] for run in mine],
                "images_per_second": [run["images_per_second"] for run in mine],
                "compile_seconds": [run["compile_seconds"] for run in mine],
            }
        )
    return summary


def spread(values: list[float], form: str) -> str:
    """The mean, and the standard deviation where there are several."""
    if not values:
        return "–"
    text = format(statistics.mean(values), form)
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):{form.lstrip('+')}}"


def title(config: dict) -> str:
    seeds, epochs = config["seeds"], config["epochs"]
    return ", ".join(
        [
            config["data"],
            f"{config['training_images']:,} training images",
            f"{epochs} epoch{'s' * (epochs > 1)}",
            f"{config['device_name']}, {config['precision']}",
            *([f"{config['parallel']} runs at a time"] if config["parallel"] > 1 else []),
            "one seed" if seeds == 1 else f"{seeds} seeds: mean ± standard deviation",
        ]
    )


def table(config: dict, runs: list[dict]) -> Table:
    caution = "One seed shows little: repeat with --seeds 5 or more." if config["seeds"] == 1 else None
    result = Table("model", title=title(config), caption=caution)
    columns = ["parameters", "added %", "test accuracy %", "difference to residual", "training s", "images/s"]
    for name in columns + ["compilation s"] * config["compile"]:
        result.add_column(name, justify="right")
    for entry in summarize(runs):
        result.add_row(
            entry["model"],
            f"{entry['parameters']:,}",
            spread(entry["added"], ".3f"),
            spread(entry["accuracy"], ".2f"),
            spread(entry["difference"], "+.2f"),
            spread(entry["seconds"], ".1f"),
            spread(entry["images_per_second"], ".0f"),
            *[spread(entry["compile_seconds"], ".1f")] * config["compile"],
        )
    return result


def write_results(out: Path, config: dict, runs: list[dict]) -> None:
    with TrainUtil.replacing(out / "results.json") as path:
        path.write_text(json.dumps({"config": config, "runs": runs}, indent=2) + "\n")
    names = [name for name in runs[0] if name not in ("learned", "history")]
    with TrainUtil.replacing(out / "results.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(runs)


def draw(out: Path, config: dict, runs: list[dict]) -> None:
    """accuracy.png and learned.png."""
    import matplotlib  # here, as it takes a second to import

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(run["model"] for run in runs))
    style = {name: {"color": f"C{i % 10}", "marker": "osD^vPX*"[i % 8]} for i, name in enumerate(names)}

    # Test accuracy over training time, a line a run
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for run in runs:
        seconds = [0.0]
        for entry in run["history"]:
            seconds.append(seconds[-1] + entry["seconds"])
        label = run["model"] if run is next(r for r in runs if r["model"] == run["model"]) else None
        accuracy = [100 * entry["test_accuracy"] for entry in run["history"]]
        axes.plot(seconds[1:], accuracy, label=label, alpha=0.8, **style[run["model"]])
    axes.set(xlabel="training time (s)", ylabel="test accuracy (%)")
    axes.set_title(title(config), fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend()
    with TrainUtil.replacing(out / "accuracy.png") as path:
        figure.savefig(path, dpi=120)

    # α, β and γ by layer, means over the seeds
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    figure.suptitle(title(config), fontsize="small")
    layers = sorted({layer for run in runs for values in run["learned"].values() for layer in values})
    for panel, symbol, key in zip(panels, "αβγ", ("alpha", "beta", "gamma")):
        for name in names:
            seeds = [run["learned"] for run in runs if run["model"] == name]
            for j, learned in enumerate(learned for learned in seeds[0] if learned.startswith(key)):
                gap = {layer: float("nan") for layer in layers}
                means = [statistics.mean((gap | seed[learned])[layer] for seed in seeds) for layer in layers]
                look = style[name] | ({"marker": f"${j}$", "markersize": 9} if key == "gamma" else {})
                panel.plot(layers, means, linestyle=("-", "--", ":", "-.")[j % 4], label=f"{name} {learned}", **look)
        panel.set(xlabel="layer (stage.layer)", ylabel=symbol)
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(fontsize="small")
        else:
            panel.text(0.5, 0.5, f"no model here learns {symbol}", ha="center", transform=panel.transAxes)
    with TrainUtil.replacing(out / "learned.png") as path:
        figure.savefig(path, dpi=120)
    plt.close("all")


# ---------------------------------------------------------------------------------------------------------------------
# What a residual connection costs
# ---------------------------------------------------------------------------------------------------------------------

# Table 5 of the paper as ratios to its baseline of 24 layers: step time, peak memory. Its PA has the identity for h.
PAPER = {
    "residual": (1.000, 1.000),
    "rw": (1.000, 1.024),
    "lr": (1.032, 1.055),
    "pa": (1.053, 1.077),
    "rw+lr": (1.042, 1.079),
    "rw+lr+pa": (1.095, 1.107),
}


def networks(options: argparse.Namespace) -> Iterator[tuple[str, list[dict]]]:
    """The name of a network, and what every model of it costs."""
    dim, layers, length, batch = options.gpt
    images = TrainUtil.synthetic().train_images

    def cnn_example(n: int) -> tuple[Tensor, Tensor]:
        i = torch.arange(n) % len(images)
        return TrainUtil.normalize(images[i]), i % 10

    def gpt_example(n: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(GPT.vocabulary, (n, length), generator=torch.Generator().manual_seed(0))
        return tokens, tokens.roll(-1, dims=1)

    if options.network != "gpt":
        models = {model.name: SmallCNN(model, 0, images, ARCHS[options.arch]) for model in options.models}
        name = f"{options.arch} CNN, batch {options.batch_size}"
        yield name, measure(models, cnn_example, options.batch_size, options)
    if options.network != "cnn":
        models = {model.name: GPT(model, dim, layers, length) for model in options.models}
        if not options.compile:  # a compiler chooses by itself what is kept
            weighted = [model for model in options.models if model.base.startswith("rw")]
            models |= {
                f"{model.name}, recompute": GPT(model, dim, layers, length, recompute=True) for model in weighted
            }
        name = f"GPT, D = {dim}, {layers} layers, length {length}, batch {batch}"
        yield name, measure(models, gpt_example, batch, options)


def measure(models: dict[str, nn.Module], example: Callable, batch: int, options: argparse.Namespace) -> list[dict]:
    """An entry a model; example(n) gives n inputs and their labels."""
    device = options.device
    for model in models.values():
        model.to(device, memory_format=torch.channels_last)
    called = TrainUtil.compiled(models) if options.compile else models
    x, y = (tensor.to(device) for tensor in example(batch))

    def loss(model: nn.Module) -> Tensor:
        with TrainUtil.autocast(device, options.precision):
            logits = model(x)
        return F.cross_entropy(logits.float().flatten(0, -2), y.flatten())

    def step(model: nn.Module) -> None:
        loss(model).backward()
        model.zero_grad()  # or the gradients of all models would take memory at once

    @torch.inference_mode()
    def infer(model: nn.Module, x: Tensor) -> None:
        with TrainUtil.autocast(device, options.precision):
            model(x)

    costs = [
        {
            "model": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "flops": TrainUtil.flops(partial(step, model)),
            "saved_bytes": TrainUtil.saved_bytes(model, partial(loss, called[name])),
            "peak_bytes": TrainUtil.peak_bytes(model, partial(step, called[name]), device),
        }
        for name, model in models.items()
    ]
    steps = {name: partial(step, model) for name, model in called.items()}
    times = {"step_seconds": TrainUtil.interleave(steps, options.seconds, device)}
    for model in models.values():
        model.eval()
    for n in (1, 128):
        x_n = example(n)[0].to(device)
        calls = {name: partial(infer, model, x_n) for name, model in called.items()}
        times[f"inference_{n}_seconds"] = TrainUtil.interleave(calls, options.seconds / 4, device)
    return [{**entry, **{name: each[entry["model"]] for name, each in times.items()}} for entry in costs]


def profile_table(config: dict, network: str, costs: list[dict]) -> Table:
    base = costs[0]
    how = f"{config['precision']}, compiled" if config["compile"] else config["precision"]
    result = Table("model", title=f"{network}; {config['device_name']}, {how}")
    result.caption = "Times: medians of the ratios to residual within a round of calls, and their quartiles."
    columns = [
        "parameters",
        "FLOPs",
        "training step",
        "inference, batch 1",
        "inference, batch 128",
        "saved for backward",
    ]
    columns += ["peak memory"] * (base["peak_bytes"] is not None)
    columns += ["paper: time", "paper: memory"] * network.startswith("GPT")
    for name in columns:
        result.add_column(name, justify="right")

    def times(entry: dict, name: str) -> str:
        if entry is base:
            return f"{1000 * statistics.median(entry[name]):.4g} ms"
        low, median, high = statistics.quantiles((a / b for a, b in zip(entry[name], base[name])), n=4)
        return f"{median:.3f} ({low:.3f}–{high:.3f})"

    def amount(entry: dict, name: str, unit: str, size: float) -> str:
        return f"{entry[name] / size:.4g} {unit}" if entry is base else f"{entry[name] / base[name]:.4f}"

    for entry in costs:
        row = [
            f"{entry['parameters']:,}",
            amount(entry, "flops", "GFLOP", 1e9),
            *(times(entry, name) for name in ("step_seconds", "inference_1_seconds", "inference_128_seconds")),
            amount(entry, "saved_bytes", "MB", 1e6),
        ]
        if entry["peak_bytes"] is not None:
            row.append(amount(entry, "peak_bytes", "MB", 1e6))
        if network.startswith("GPT"):
            row += [f"{ratio:.3f}" for ratio in PAPER.get(entry["model"].removesuffix(", recompute"), ())] or ["–", "–"]
        result.add_row(entry["model"], *row)
    return result


def profile(options: argparse.Namespace) -> int:
    TrainUtil.keep_memory()
    config, found = configuration(options), {}
    try:
        for network, costs in networks(options):
            found[network] = costs
            with TrainUtil.replacing(options.out / "profile.json") as path:
                path.write_text(json.dumps({"config": config, "networks": found}) + "\n")
            rich.get_console().print(profile_table(config, network, costs))
    except KeyboardInterrupt:
        print(f"Interrupted: networks measured so far: {len(found)}.", file=sys.stderr)
        return 130
    finally:
        if found:
            print(options.out / "profile.json")
    return 0


# ---------------------------------------------------------------------------------------------------------------------


def train_one(
    model: Model,
    seed: int,
    data: TrainUtil.Dataset,
    recipe: TrainUtil.Recipe,
    options: argparse.Namespace,
    report: Callable = lambda *so_far: None,
) -> dict:
    """The entry in results.json of one model with one seed."""
    TrainUtil.keep_memory()
    torch.backends.cudnn.deterministic = True
    network = SmallCNN(model, seed, data.train_images, ARCHS[options.arch])
    settings = {"precision": options.precision, "compile": options.compile, "report": report}
    measured = TrainUtil.train(network, data.to(options.device), recipe, seed, **settings)
    parameters = sum(p.numel() for p in network.parameters())
    return {"model": model.name, "seed": seed, "parameters": parameters, **measured, "learned": network.learned()}


def train_all(
    pairs: list[tuple[Model, int]],
    data: TrainUtil.Dataset,
    recipe: TrainUtil.Recipe,
    options: argparse.Namespace,
    monitor: Monitor,
) -> Iterator[tuple[int, dict]]:
    """The number of each pair and its entry, as they finish; `--parallel` at a time, each in a process of its own."""
    if options.parallel == 1:
        data = data.to(options.device)
        for i, pair in enumerate(pairs):
            yield i, train_one(*pair, data, recipe, options, partial(monitor.report, i))
        return
    threads = max(1, torch.get_num_threads() // options.parallel)
    workers = {"mp_context": multiprocessing.get_context("spawn"), "initializer": torch.set_num_threads}
    with ProcessPoolExecutor(options.parallel, **workers, initargs=(threads,)) as pool:
        try:
            futures = {pool.submit(train_one, *pair, data, recipe, options): i for i, pair in enumerate(pairs)}
            for future in as_completed(futures):
                i, run = futures[future], future.result()
                monitor.report(i, 1.0, recipe.images(len(data.train_labels)), run["train_seconds"], run["history"])
                yield i, run
        except BaseException:  # the pool would wait for what it has begun
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def compare(options: argparse.Namespace) -> int:
    recipe = TrainUtil.Recipe(epochs=options.epochs, batch_size=options.batch_size)
    finished: dict[int, dict] = {}
    runs: list[dict] = []
    code = 0
    try:
        data = TrainUtil.synthetic() if options.dataset == "synthetic" else TrainUtil.load_cifar10(options.data_dir)
        data = data.hold_out(options.hold_out) if options.hold_out else data
        data = data.limit(options.limit) if options.limit else data
        config = {
            **configuration(options),
            "data": data.name,
            "training_images": len(data.train_labels),
            "test_images": len(data.test_labels),
            "recipe": asdict(recipe),
        }
        pairs = [(model, seed) for seed in range(options.seeds) for model in options.models]
        monitor = Monitor([f"{model.name}, seed {seed}" for model, seed in pairs], recipe.epochs)
        with monitor.bar:
            for i, run in train_all(pairs, data, recipe, options, monitor):
                finished[i] = run
                runs = [finished[i] for i in sorted(finished)]
                write_results(options.out, config, runs)
    except TrainUtil.DataError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        code = 130
        print(f"Interrupted: {len(runs)} runs have finished.", file=sys.stderr)
    if runs:
        rich.get_console().print(table(config, runs))
        draw(options.out, config, runs)
        for name in ("results.json", "results.csv", "accuracy.png", "learned.png"):
            print(options.out / name)
    return code


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if not rich.get_console().is_terminal:
        rich.reconfigure(width=160)  # a file has no width of its own to fold the tables to
    return profile(options) if options.profile else compare(options)


if __name__ == "__main__":
    sys.exit(main())
