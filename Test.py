"""Compares the plain residual connection with LAuReL, LAuReL-LR and LAuReL-PA: by default in small CNNs on CIFAR-10.

`python Test.py` trains four models on all of CIFAR-10 and leaves a table and two pictures; `--help` has the rest.
"""

import argparse
import csv
import importlib
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import rich
import rich.box
import torch
import torch.nn.functional as F
import torchvision
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor, nn
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.models.resnet import BasicBlock, Bottleneck

import TrainUtil
from LAuReL import LAuReL

if TYPE_CHECKING:  # matplotlib takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAuReL_LR = importlib.import_module("LAuReL-LR").LAuReL_LR
LAuReL_PA = importlib.import_module("LAuReL-PA").LAuReL_PA

# ---------------------------------------------------------------------------------------------------------------------
# The models
# ---------------------------------------------------------------------------------------------------------------------

MODELS = ("residual", "rw", "lr", "pa", "rw+lr", "rw+pa", "rw+lr+pa", "deeper")
# The arguments of a block that a model's name may set, and decay: weight decay on the block's parameters
ARGUMENTS = {
    "dim": {"D": "D"},  # α and β for each channel
    "rank": {"none": None},  # the identity for h
    "shared": {"true": True, "false": False},
    "bound": {name: name for name in ("softmax", "sigmoid", "single", "none")},
    "init": {name: name for name in ("xavier", "orthogonal")},
    "scale": float,
    "decay": float,
}


@dataclass(frozen=True)
class Model:
    """A model's name, such as rw+lr+pa@16/3 or rw:scale=1,decay=0.1, taken apart."""

    name: str
    base: str
    rank: int | None = None  # None: what the network has by default
    k: int = 3
    arguments: dict = field(default_factory=dict)  # of the block
    decay: float = 0.0  # weight decay on the block's parameters

    @staticmethod
    def parse(name: str) -> "Model":
        match = re.fullmatch(r"([a-z+]+)(?:@([1-9]\d*))?(?:/([1-9]\d*))?(?::(.+))?", name)
        base, rank, k, rest = match.groups() if match else (None, None, None, None)
        if base not in MODELS:
            raise argparse.ArgumentTypeError(
                f"unknown model {name!r}; allowed are {', '.join(MODELS)}, with @RANK after lr or pa and /K after pa, "
                "both at least 1, as in lr@8, pa/5, rw+lr+pa@16/3, and then a block's arguments, as in rw:scale=1"
            )
        if rank and "lr" not in base and "pa" not in base:
            raise argparse.ArgumentTypeError(f"{name!r}: {base} has no rank; @RANK goes with lr and pa")
        if k and "pa" not in base:
            raise argparse.ArgumentTypeError(f"{name!r}: {base} has no k; /K goes with pa")
        given = [argument(text) for text in rest.split(",")] if rest else []
        arguments = dict(given)
        if len(arguments) < len(given) or (rank and "rank" in arguments):
            raise argparse.ArgumentTypeError(f"{name!r} sets an argument twice")
        low_rank = ("lr" in base or "pa" in base) and "rank" not in arguments
        effective = {
            "dim": base == "rw",
            "rank": "pa" in base,
            "shared": "pa" in base and low_rank,
            "bound": "rw" in base,
            "init": low_rank,
            "scale": "rw" in base and arguments.get("bound") != "none",
            "decay": base not in ("residual", "deeper"),
        }
        for each in arguments:
            if not effective[each]:
                raise argparse.ArgumentTypeError(f"{name!r}: {each} would have no effect")
        decay = arguments.pop("decay", 0.0)
        model = Model(name, base, int(rank) if rank else None, int(k or 3), arguments, decay)
        try:
            with torch.device("meta"):  # which draws no random numbers
                model.residual(8, available=1, channel_dim=1)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{name!r}: {error}") from None
        return model

    def residual(
        self, dim: int, available: int, *, channel_dim: int, rank: int = 16, pa_rank: int | None = 16
    ) -> nn.Module:
        """The residual connection of a layer that has `available` activations to look at.

        rank and pa_rank, the latter for pa and rw+pa, are the ranks where the name gives none; None: h(x) = x.
        """
        k = min(self.k, available)  # a γ for an activation that is never there would not be trained
        given = {name: dim if value == "D" else value for name, value in self.arguments.items()}
        options = {"channel_dim": channel_dim, **given}
        if self.base == "rw":
            return LAuReL(**options)
        options["residual_weights"] = self.base.startswith("rw+")
        match self.base:
            case "lr" | "rw+lr":
                return LAuReL_LR(dim, **{"rank": self.rank or rank, **options})
            case "pa" | "rw+pa":
                return LAuReL_PA(dim, k, **{"rank": self.rank or pa_rank, **options})
            case "rw+lr+pa":  # eq. 6: a low-rank pair for each activation
                return LAuReL_PA(dim, k, **{"rank": self.rank or rank, "shared": False, **options})
        return Residual()


def argument(text: str) -> tuple[str, object]:
    """NAME=VALUE taken apart."""
    name, _, value = text.partition("=")
    allowed = ARGUMENTS.get(name)
    if isinstance(allowed, dict) and value in allowed:
        return name, allowed[value]
    with suppress(ValueError):
        if allowed is float and 0 <= float(value) < math.inf:
            return name, float(value)
    forms = (f"{n}={'|'.join(v) if isinstance(v, dict) else 'NUMBER'}" for n, v in ARGUMENTS.items())
    raise argparse.ArgumentTypeError(f"{text!r} sets no argument of a block; allowed are {', '.join(forms)}")


class Residual(nn.Module):
    """The plain residual connection."""

    def forward(self, x: Tensor, fx: Tensor) -> Tensor:
        return x + fx


# Every network has `stages`, each with its `branches` f and its `residuals`. All models share f: the same layers with
# the same initial weights for a seed. A residual connection draws its random numbers apart, so it shifts none of f's:
# with seed 1000 · seed + 100 · stage + layer, the layer counted from 1, and `deeper`'s further layer with 999.


class SmallCNN(nn.Module):
    """A residual network of three stages, 32, 64 and 128 channels wide, with 2, 2 and 3 residual layers.

    Whitened 2×2 patches (N, 16, 31, 31) → per stage a 3×3 convolution that halves the image, then residual layers
    x' = residual(x, f(x)), f = 3×3 convolution, batch norm, GELU → maximum over the image → linear classifier.

    `deeper` has one more layer in the second stage, the last but one, as the 4.37 % that the paper's naive scaling adds
    are one more bottleneck in ResNet-50's last but one. That layer's batch norm starts with gain 0 (Goyal et al. 2017),
    so that `deeper` too starts as the same function.
    """

    layers = (2, 2, 3)

    def __init__(self, model: Model, seed: int, data: TrainUtil.Data, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        with TrainUtil.seeded(seed):
            self.whitening = nn.Conv2d(3, 16, kernel_size=2, bias=False)
            self.whitening.weight = nn.Parameter(whitening_filters(data), requires_grad=False)
            self.stages = nn.ModuleList()
            channels = 16
            for i, (width, n) in enumerate(zip(widths, self.layers)):
                down = nn.Sequential(conv(channels, width), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.GELU())
                branches = [self.branch(width) for _ in range(n)]
                self.stages.append(Stage(down, branches, width, model, seed=1000 * seed + 100 * i + 1))
                channels = width
            self.classifier = nn.Linear(channels, data.classes)
        if model.base == "deeper":
            with TrainUtil.seeded(1000 * seed + 999):
                self.stages[1].deepen(self.branch(widths[1]))

    @staticmethod
    def branch(width: int) -> nn.Sequential:
        """f: the same for every model."""
        return nn.Sequential(conv(width, width), nn.BatchNorm2d(width), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.whitening(x))
        for stage in self.stages:
            x = stage(x)
        return self.classifier(x.amax(dim=(2, 3)))


class ResNet(nn.Module):
    """The ResNet of He et al. 2016 for CIFAR-10 (§4.2) with n = 3, 5, 9 layers a stage: ResNet-20, -32, -56.

    3×3 convolution (N, 16, 32, 32) → three stages of 16, 32 and 64 channels, the later two at half the size of the one
    before, with n residual layers x' = ReLU(residual(x, f(x))), f = two 3×3 convolutions with batch norm and a ReLU
    between → mean over the image → linear classifier. Where the shape changes the shortcut takes every other pixel and
    fills the new channels with zeros (their option A); PA's history starts anew there. `deeper` as in the small CNN.
    """

    widths = (16, 32, 64)

    def __init__(self, model: Model, seed: int, data: TrainUtil.Data, n: int = 3) -> None:
        super().__init__()
        with TrainUtil.seeded(seed):
            self.stem = nn.Sequential(conv(3, 16), nn.BatchNorm2d(16), nn.ReLU())
            self.stages = nn.ModuleList()
            channels = 16
            for i, width in enumerate(self.widths):
                branches = [self.branch(channels, width), *(self.branch(width, width) for _ in range(n - 1))]
                shortcut = Shortcut(channels, width)
                self.stages.append(PostActivationStage(shortcut, branches, width, model, 1000 * seed + 100 * i + 1))
                channels = width
            self.classifier = nn.Linear(channels, data.classes)
        if model.base == "deeper":
            with TrainUtil.seeded(1000 * seed + 999):
                self.stages[1].deepen(self.branch(self.widths[1], self.widths[1]))

    @staticmethod
    def branch(channels: int, width: int) -> nn.Sequential:
        first = (conv(channels, width, stride=width // channels), nn.BatchNorm2d(width), nn.ReLU())
        return nn.Sequential(*first, conv(width, width), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.classifier(x.mean(dim=(2, 3)))


class Shortcut(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.stride, self.new = width // channels, width - channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new)) if self.new else x


class Stage(nn.Module):
    """Residual layers of one shape, which `down` brings its input to; `options` are those of Model.residual."""

    def __init__(
        self, down: nn.Module, branches: list[nn.Sequential], width: int, model: Model, seed: int, **options
    ) -> None:
        super().__init__()
        self.down, self.branches, self.residuals = down, nn.ModuleList(branches), nn.ModuleList()
        for i in range(len(branches)):
            with TrainUtil.seeded(seed + i):
                self.residuals.append(model.residual(width, available=i + 1, **{"channel_dim": 1, **options}))

    def deepen(self, *branches: nn.Sequential) -> None:
        """Adds residual layers that start with f(x) = 0."""
        for branch in branches:
            *_, affine = (layer for layer in branch.modules() if getattr(layer, "weight", None) is not None)
            nn.init.zeros_(affine.weight)
            nn.init.zeros_(affine.bias)
            self.branches.append(branch)
            self.residuals.append(Residual())

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return residual_layers(x, x, self.branches, self.residuals)


class PostActivationStage(Stage):
    """Its first branch brings its input to the stage's shape, and `down` the input that is added to it."""

    def forward(self, x: Tensor) -> Tensor:
        return residual_layers(x, self.down(x), self.branches, self.residuals, activation=F.relu)


def conv(channels: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, kernel_size=3, stride=stride, padding=1, bias=False)


class ImageNetResNet(torchvision.models.ResNet):
    """torchvision's ResNet with another residual connection in each block, and its own names for all other weights.

    So `load_state_dict(torchvision.models.resnet50(weights=…).state_dict(), strict=False)` leaves out the residual
    connections alone. They stand before the block's last ReLU, and PA's history starts anew in each stage with what
    the stage's first block adds, its down-sampled input. `deeper` has one more block in the third stage: the 4.37 % of
    the paper's table 1.
    """

    def __init__(
        self,
        model: Model,
        seed: int,
        data: TrainUtil.Data,
        block: type[BasicBlock | Bottleneck] = Bottleneck,
        layers: tuple[int, ...] = (3, 4, 6, 3),
    ) -> None:
        with TrainUtil.seeded(seed):
            super().__init__(block, layers, num_classes=data.classes)
        for i, name in enumerate(("layer1", "layer2", "layer3", "layer4")):
            setattr(self, name, BlockStage(getattr(self, name), model, 1000 * seed + 100 * i + 1))
        if model.base == "deeper":
            with TrainUtil.seeded(1000 * seed + 999):
                self.layer3.deepen(block(256 * block.expansion, 256))

    @property
    def stages(self) -> list["BlockStage"]:
        return [self.layer1, self.layer2, self.layer3, self.layer4]


class BlockStage(nn.Sequential):
    """A stage of torchvision's blocks, each with its residual connection in `residual`."""

    def __init__(self, blocks: nn.Sequential, model: Model, seed: int) -> None:
        super().__init__(*blocks)
        width = self.last_layers()[0].num_features
        for i, block in enumerate(self):
            with TrainUtil.seeded(seed + i):
                block.residual = model.residual(width, available=i + 1, channel_dim=1)

    def deepen(self, block: BasicBlock | Bottleneck) -> None:
        block.residual = Residual()
        self.append(block)
        nn.init.zeros_(self.last_layers()[-1].weight)

    @property
    def residuals(self) -> list[nn.Module]:
        return [block.residual for block in self]

    @property
    def branches(self) -> list[Callable[[Tensor], Tensor]]:
        return [partial(self.branch, block) for block in self]

    def last_layers(self) -> list[nn.BatchNorm2d]:
        return [block.bn3 if isinstance(block, Bottleneck) else block.bn2 for block in self]

    @staticmethod
    def branch(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor:
        x = block.conv2(block.relu(block.bn1(block.conv1(x))))
        return block.bn3(block.conv3(block.relu(block.bn2(x)))) if isinstance(block, Bottleneck) else block.bn2(x)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self[0].downsample is None else self[0].downsample(x)
        return residual_layers(x, shortcut, self.branches, self.residuals, activation=F.relu)


class Attention(nn.Module):
    """Self-attention with heads of 64 channels."""

    def __init__(self, dim: int, causal: bool) -> None:
        super().__init__()
        self.causal, self.qkv, self.out = causal, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)  # (N, heads, length, 64) each
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


def transformer_layer(dim: int, causal: bool) -> tuple[nn.Sequential, nn.Sequential]:
    """The two branches of a pre-norm layer: LayerNorm, attention; LayerNorm, linear D → 4D, GELU, linear 4D → D."""
    mlp = (nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
    return nn.Sequential(nn.LayerNorm(dim), Attention(dim, causal)), nn.Sequential(nn.LayerNorm(dim), *mlp)


class ViT(nn.Module):
    """A pre-norm vision transformer (Dosovitskiy et al. 2021) for small images: D = 128, 6 layers, 2 heads.

    Patches of 4×4 pixels, about 16×16 of them in images above 64×64 pixels → linear, learned position → layers with two
    residual connections each, around attention and MLP → LayerNorm → mean over the patches → linear classifier. Smaller
    images than the data's take the means of the positions over areas. `deeper` has one more layer, at the end.
    """

    def __init__(self, model: Model, seed: int, data: TrainUtil.Data, dim: int = 128, layers: int = 6) -> None:
        super().__init__()
        self.patch = max(4, data.size // 16)
        grid = data.size // self.patch
        with TrainUtil.seeded(seed):
            self.embedding = nn.Linear(3 * self.patch**2, dim)
            self.position = nn.Parameter(0.02 * torch.randn(dim, grid, grid))
            branches = [branch for _ in range(layers) for branch in transformer_layer(dim, causal=False)]
            self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, data.classes))
        stage = Stage(nn.Identity(), branches, dim, model, 1000 * seed + 1, channel_dim=-1)
        self.stages = nn.ModuleList([stage])
        if model.base == "deeper":
            with TrainUtil.seeded(1000 * seed + 999):
                stage.deepen(*transformer_layer(dim, causal=False))

    def forward(self, x: Tensor) -> Tensor:
        position = TrainUtil.resize(self.position, x.shape[-1] // self.patch).flatten(1)  # (D, patches)
        patches = F.unfold(x, self.patch, stride=self.patch)  # (N, 3 · patch², patches)
        x = self.embedding(patches.transpose(1, 2)) + position.T
        return self.head(self.stages[0](x).mean(dim=1))


class GPT(nn.Module):
    """A pre-norm transformer (N, length) → (N, length, 256 logits), whose costs `--profile` sets beside table 5's.

    Each layer has two residual connections, around attention with a causal mask and around the MLP. The vocabulary is
    that of bytes, so that embedding and logits hardly add to the costs that the residual connections are compared with.
    `deeper` has one more layer.
    """

    vocabulary = 256

    def __init__(self, model: Model, dim: int, layers: int, length: int) -> None:
        super().__init__()
        with TrainUtil.seeded(0):
            self.embedding = nn.Embedding(self.vocabulary, dim)
            self.position = nn.Parameter(0.02 * torch.randn(length, dim))
            branches = [branch for _ in range(layers) for branch in transformer_layer(dim, causal=True)]
            self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, self.vocabulary, bias=False))
        options = {"channel_dim": -1, "rank": 32, "pa_rank": None}
        stage = Stage(nn.Identity(), branches, dim, model, seed=1, **options)
        self.stages = nn.ModuleList([stage])
        if model.base == "deeper":
            with TrainUtil.seeded(999):
                stage.deepen(*transformer_layer(dim, causal=True))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.stages[0](self.embedding(tokens) + self.position[: tokens.shape[-1]]))


def residual_layers(
    x: Tensor,
    shortcut: Tensor,
    branches: Sequence[Callable[[Tensor], Tensor]],
    residuals: Sequence[nn.Module],
    activation: Callable[[Tensor], Tensor] = lambda y: y,
) -> Tensor:
    """x, what the first branch gets, and shortcut, what its output is added to, through layer after layer.

    PA's history begins with the shortcut.
    """
    xs = [shortcut]
    for f, residual in zip(branches, residuals):
        history = isinstance(residual, LAuReL_PA)
        x = activation(residual(xs if history else xs[-1], f(x)))
        xs = [*xs, x] if history else [x]  # without need no activation is kept at inference
    return x


ARCHS: dict[str, Callable[..., nn.Module]] = {
    "small": SmallCNN,
    "medium": partial(SmallCNN, widths=(64, 128, 256)),
    "wide": partial(SmallCNN, widths=(64, 256, 256)),
    "resnet20": ResNet,
    "resnet32": partial(ResNet, n=5),
    "resnet56": partial(ResNet, n=9),
    "vit": ViT,
    "resnet18": partial(ImageNetResNet, block=BasicBlock, layers=(2, 2, 2, 2)),
    "resnet50": ImageNetResNet,
}


def learned(network: nn.Module) -> dict[str, dict[str, float]]:
    """What the residual connections learned: for each of alpha, beta, gamma[0], gamma[1], …, its value by layer.

    Where α and β are vectors: their means.
    """
    values: dict[str, dict[str, float]] = {}
    for i, stage in enumerate(network.stages, 1):
        for j, residual in enumerate(stage.residuals, 1):
            found = {name: getattr(residual, name, None) for name in ("alpha", "beta")}
            found |= {f"gamma[{n}]": gamma for n, gamma in enumerate(getattr(residual, "gamma", ()))}
            for name, value in found.items():
                if value is not None:
                    values.setdefault(name, {})[f"{i}.{j}"] = value.mean().item()
    return values


def whitening_filters(data: TrainUtil.Data) -> Tensor:
    """16 filters (16, 3, 2, 2): ± the 8 main principal axes of the images' 2×2 patches, scaled to unit variance.

    All twelve axes were no better on the held-out images, and the convolution that follows is the most expensive one.
    """
    n_images = 5000 * 32**2 // data.size**2
    patches = F.unfold(data.normalize(data.sample(n_images)), kernel_size=2, stride=2)  # (N, 12, patches)
    patches = patches.transpose(0, 1).flatten(1)  # (12, N · patches)
    variance, axes = torch.linalg.eigh(patches @ patches.T / patches.shape[1])  # ascending
    filters = (axes / (variance + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)[-8:]
    return torch.cat([filters, -filters])


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

EXAMPLES = f"""\
models: {", ".join(MODELS)}
  lr@8 sets the rank, pa/5 sets k, rw+lr+pa@16/3 both; the defaults are 16 and 3
  rw:dim=D has α and β for each channel; bound=, scale=, init=, shared= and rank=none set a block's other arguments
  in the same way, and decay=0.1 weight decay on its parameters: rw+lr@8:scale=1,init=orthogonal
  in --profile's GPT the default rank is 32, and pa and rw+pa without a rank have h(x) = x, as in the paper's table 5

longer training, residual, mean of three seeds on 2 CPU cores with bfloat16: 87.65 % in 49 s with the default 5 epochs,
  90.22 % in 141 s with 15, 92.31 % in 324 s with --arch medium --epochs 12 (results/README.md has commands and machine)

examples:
  python Test.py                                        residual, rw, lr and pa, one seed
  python Test.py --models residual rw+lr deeper --seeds 10 --out runs/study    again: goes on where it was stopped
  python Test.py --draw runs/study                      its table and pictures, from its files alone
  python Test.py --models residual --epochs 15          longer training, higher accuracy
  python Test.py --dataset synthetic --epochs 2         no download, done in a minute
  python Test.py --profile                              time and memory of every residual connection
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        told = TrainUtil.launched() and os.environ["LOCAL_RANK"] != "0"  # by another process of the same machine
        self.exit(2, None if told else f"{self.prog}: {message}\n")


def first_process() -> bool:
    """Of those that torchrun starts; it alone writes and prints."""
    return not TrainUtil.launched() or os.environ["RANK"] == "0"


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    add("--arch", choices=ARCHS, default="small", help="medium trains longer, wide is for a GPU (default: small)")
    add("--epochs", type=count, default=default.epochs, metavar="N", help="(default: %(default)s)")
    add("--batch-size", type=count, default=default.batch_size, metavar="N", help="(default: %(default)s)")
    add("--seeds", type=count, default=1, metavar="N", help="train every model with seeds 0 to N-1 (default: 1)")
    add("--parallel", type=count, default=1, metavar="N", help="train N at a time, side by side (default: 1)")
    add("--threads", type=count, metavar="N", help="CPU threads of each run (default: the cores divided by --parallel)")
    add("--accumulate", type=count, default=1, metavar="N", help="train on a batch in N parts, for less memory")
    add("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="(default: the device's fastest)")
    add("--compile", action="store_true", help="compile the model with torch.compile; its time is reported apart")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where the data are kept (default: data)")
    kinds = ("cifar10", "cifar100", "imagefolder", "synthetic")
    add(
        "--dataset",
        choices=kinds,
        default="cifar10",
        help="imagefolder: --data-dir's train/ and val/; synthetic: made up",
    )
    add("--image-size", type=count, metavar="N", help="imagefolder: crops of N pixels (default: 224); --profile")
    add("--workers", type=count, metavar="N", help="imagefolder: processes that read images (default: a core each)")
    add("--limit", type=count, metavar="N", help="the first N training images only, for a quick try")
    add("--hold-out", type=count, metavar="N", help="test on the last N training images, to choose a recipe by")
    add("--profile", action="store_true", help="measure what each residual connection costs, in place of training")
    add("--seconds", type=count, default=60, metavar="N", help="--profile: at least so long on training (default: 60)")
    add("--network", choices=("both", "cnn", "gpt"), default="both", help="--profile: (default: both)")
    shape = ("DIM", "LAYERS", "LENGTH", "BATCH")
    add("--gpt", type=count, nargs=4, default=[768, 4, 256, 4], metavar=shape, help="--profile: (default: 768 4 256 4)")
    add("--out", type=Path, metavar="DIR", help="where results go; goes on with a study (default: runs/ and time)")
    add("--against", metavar="MODEL", help="what the others are compared with (default: residual)")
    add("--draw", type=Path, metavar="DIR", help="show the table and draw the pictures of an earlier --out, and end")
    options = parser.parse_args(argv)
    if options.draw:
        return options
    models = options.models or [Model.parse(name) for name in (MODELS if options.profile else MODELS[:4])]
    if options.profile:
        models.insert(0, Model.parse("residual"))  # what the others are compared with
    options.models = list({model.name: model for model in models}.values())
    here = 1  # processes of this machine
    if TrainUtil.launched():
        here, world, restarts = (
            int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS")
        )
        if options.parallel > 1 or options.profile:
            parser.error("torchrun trains one model at a time with all its processes: no --parallel, no --profile")
        if restarts and options.out is None:
            parser.error("with torchrun --max-restarts name the folder with --out, so that a restart finds it")
        if restarts and world > here and TrainUtil.agent_store():  # each counts its restarts apart
            parser.error(
                "over several machines torchrun --max-restarts needs --rdzv-backend=c10d and the environment variable "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (pytorch issue 135712)"
            )
        if options.device.type == "mps":
            parser.error("torchrun works with --device cpu and cuda, not with mps")
        if options.device.type == "cuda":
            options.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if options.device.type == "cuda" and options.device.index is not None:
        torch.cuda.set_device(options.device)
    options.out = options.out or Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
    # Another number of threads adds up in another order: numbers are the same to the bit for the same --threads alone.
    threads = cores() // here if here > 1 else torch.get_num_threads()  # torchrun would have one thread in each
    options.threads = options.threads or max(1, threads // options.parallel)
    if options.precision == "auto":
        options.precision = TrainUtil.default_precision(options.device)
    if options.dataset == "imagefolder":
        options.image_size = options.image_size or 224
        options.workers = options.workers or max(1, cores() // (here * options.parallel))
    elif options.workers or (options.image_size and not options.profile):
        name = "--workers" if options.workers else "--image-size"
        parser.error(f"{name} goes with --dataset imagefolder")
    if options.gpt[0] % 64:
        parser.error(f"--gpt {options.gpt[0]} …: the width must be a multiple of 64, the channels of a head")
    if options.profile and (options.out / "profile.json").exists():
        parser.error(f"--out {options.out} holds another profile; name a new folder")
    try:
        if first_process():
            options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror or error}")
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
        "processes": TrainUtil.processes()[1],
        "device_name": TrainUtil.device_name(options.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "git_commit": commit,
    }


class Monitor:
    """What runs now and how long it will take: one moving line in a terminal, a line an epoch elsewhere."""

    def __init__(self, titles: list[str], finished: list[bool], epochs: int) -> None:
        self.titles, self.epochs = titles, epochs
        self.done: list[float | None] = [1.0 if there else None for there in finished]  # the part of each run
        self.tested = [0] * len(titles)  # its epochs
        self.before = float(sum(finished))  # what was done before this process
        self.plain = not rich.get_console().is_terminal
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(20), transient=True, disable=self.plain)
        self.task = self.bar.add_task("", total=len(titles))
        self.start = time.perf_counter()

    def report(self, run: int, work: float, images: int, seconds: float, history: list[dict]) -> None:
        if self.done[run] is None:
            self.before += work
            self.tested[run] = len(history)
        self.done[run] = work
        done = sum(filter(None, self.done))
        epoch_ended, self.tested[run] = len(history) > self.tested[run], len(history)
        epoch = len(history) + (0 if epoch_ended else 1)
        text = f"[{run + 1}/{len(self.titles)}] {self.titles[run]}, epoch {epoch}/{self.epochs}"
        if history:
            loss = history[-1]["train_loss"]
            text += ", diverged" if loss is None else f", loss {loss:.3f}"
            text += f", accuracy {100 * history[-1]['test_accuracy']:.2f} %"
        text += f", {images / seconds:.0f} images/s"
        if done > self.before:
            left = round((time.perf_counter() - self.start) * (len(self.done) - done) / (done - self.before))
            text += f", {left // 60}:{left % 60:02} min left"
        self.bar.update(self.task, completed=done, description=text)
        if self.plain and epoch_ended:
            print(text, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves
# ---------------------------------------------------------------------------------------------------------------------


def summarize(runs: list[dict], against: str = "residual") -> list[dict]:
    """One entry a model: values over seeds, differences to the model `against` paired by seed, and what they show.

    Runs that diverged are counted, and left out of everything else.
    """
    baseline = {run["seed"]: run for run in runs if run["model"] == against and not run.get("diverged")}
    parameters = next((run["parameters"] for run in runs if run["model"] == against), None)
    summary = []
    for name in dict.fromkeys(run["model"] for run in runs):
        mine = [run for run in runs if run["model"] == name]
        finite = [run for run in mine if not run.get("diverged")]
        paired = [(run, baseline[run["seed"]]) for run in finite if run["seed"] in baseline and name != against]
        summary.append(
            {
                "model": name,
                "parameters": mine[0]["parameters"],
                "added": mine[0]["parameters"] - parameters if name != against and parameters else None,
                "accuracy": [100 * run["test_accuracy"] for run in finite],
                "diverged": len(mine) - len(finite),
                "difference": [100 * (run["test_accuracy"] - base["test_accuracy"]) for run, base in paired],
                **paired_test(*([100 * each["test_accuracy"] for each in pair] for pair in zip(*paired))),
                "seconds": [run["train_seconds"] for run in finite],
                "images_per_second": [run["images_per_second"] for run in finite],
                "compile_seconds": [run["compile_seconds"] for run in finite],
            }
        )
    tested = [entry for entry in summary if entry["p"] is not None]
    for entry, p in zip(tested, holm([entry["p"] for entry in tested])):
        entry["p_holm"] = p
    return summary


def paired_test(mine: Sequence[float] = (), base: Sequence[float] = ()) -> dict:
    """Student's t-test of the paired differences: p, their mean's 95 % interval, their standard deviation.

    And the standard deviation that they would have if they were not paired. None where there is nothing to test: fewer
    than two pairs, or differences that are all the same.
    """
    paired_sd = statistics.stdev(a - b for a, b in zip(mine, base)) if len(mine) > 1 else 0.0
    if paired_sd < 1e-9:  # 0 but for rounding
        return {"p": None, "p_holm": None, "interval": None, "paired_sd": None, "unpaired_sd": None}
    from scipy.stats import ttest_rel  # here, as it takes a second to import

    test = ttest_rel(mine, base)
    return {
        "p": float(test.pvalue),
        "p_holm": None,
        "interval": tuple(map(float, test.confidence_interval(0.95))),
        "paired_sd": paired_sd,
        "unpaired_sd": math.hypot(statistics.stdev(mine), statistics.stdev(base)),
    }


def holm(ps: list[float]) -> list[float]:
    """p-values corrected for being several (Holm 1979), which SciPy does not have."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    corrected = accumulate((min(1.0, (len(ps) - rank) * ps[i]) for rank, i in enumerate(order)), max)
    return [p for _, p in sorted(zip(order, corrected))]


def spread(values: list[float], form: str) -> str:
    """The mean, and the standard deviation where there are several."""
    if not values:
        return "–"
    text = format(statistics.mean(values), form)
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):{form}}"


def title(config: dict) -> str:
    seeds, epochs = config["seeds"], config["epochs"]
    return ", ".join(
        [
            config["data"],
            f"{config['training_images']:,} training images",
            f"{epochs} epoch{'s' * (epochs > 1)}",
            f"{config['device_name']}, {config['precision']}",
            *([f"{config['processes']} processes"] if config["processes"] > 1 else []),
            *([f"{config['parallel']} runs at a time"] if config["parallel"] > 1 else []),
            "one seed" if seeds == 1 else f"{seeds} seeds: mean ± standard deviation",
        ]
    )


def table(config: dict, runs: list[dict]) -> Table:
    several, against = config["seeds"] > 1, config["against"]
    result = Table("model", title=escape(title(config)), box=rich.box.MARKDOWN)
    columns = ["parameters", "added %", "test accuracy %", f"difference to {against}"]
    columns += ["95 % interval", "p (Holm)", "significant", "s.d. of differences", "if not paired"] * several
    for name in columns + ["training s", "images/s"] + ["compilation s"] * config["compile"]:
        result.add_column(name, justify="right")
    notes = ["Differences paired by seed; intervals for each alone, p and significance (0.05) after Holm's correction."]
    if not several:
        notes = ["One seed shows little: repeat with --seeds 5 or more."]
    if against not in (run["model"] for run in runs):
        notes.append(f"No differences: there is no {against} among the models.")
    if len({run.get("git_commit") for run in runs}) > 1:
        notes.append("The runs are of several commits, see results.json.")
    result.caption = " ".join(notes)
    for entry in summarize(runs, against):
        n, pairs, diverged = len(entry["accuracy"]), len(entry["difference"]), entry["diverged"]
        fewer = f" ({n} of {config['seeds']} seeds{f', {diverged} diverged' if diverged else ''})"
        added = entry["added"] and 100 * entry["added"] / (entry["parameters"] - entry["added"])
        row = [
            f"{entry['parameters']:,}",
            "–" if added is None else f"{added:.3f}",
            spread(entry["accuracy"], ".2f") + fewer * (n < config["seeds"]),
            f"{statistics.mean(entry['difference']):+.2f}" + f" ({pairs} pairs)" * (pairs < n) if pairs else "–",
        ]
        if several and entry["p"] is None:
            row += ["–"] * 5
        elif several:
            low, high = entry["interval"]
            significant = "no" if entry["p_holm"] >= 0.05 else "higher" if low > 0 else "lower"
            row += [f"[{low:+.2f}, {high:+.2f}]", f"{entry['p_holm']:.2g}", significant]
            row += [f"{entry['paired_sd']:.2f}", f"{entry['unpaired_sd']:.2f}"]
        row += [spread(entry["seconds"], ".1f"), spread(entry["images_per_second"], ".0f")]
        row += [spread(entry["compile_seconds"], ".1f")] * config["compile"]
        result.add_row(entry["model"], *(escape(cell) for cell in row))
    return result


def write_results(out: Path, config: dict, runs: list[dict]) -> None:
    with TrainUtil.replacing(out / "results.json") as path:
        path.write_text(json.dumps({"config": config, "runs": runs}, indent=2, allow_nan=False) + "\n")
    names = [name for name in runs[0] if name not in ("learned", "history")] if runs else []
    with TrainUtil.replacing(out / "results.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(runs)


def draw(out: Path, config: dict, runs: list[dict]) -> list[Path]:
    """accuracy.png, differences.png, parameters.png and learned.png, and the paths of those there is something for."""
    import matplotlib  # here, as it takes a second to import

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    summary = [entry for entry in summarize(runs, config["against"]) if entry["accuracy"]]
    runs = [run for run in runs if not run.get("diverged")]
    by_model = {entry["model"]: [run for run in runs if run["model"] == entry["model"]] for entry in summary}
    style = {
        name: {"color": f"C{i % 10}", "marker": "osD^vPX*"[i % 8], "linestyle": ("-", "--", "-.", ":")[i % 4]}
        for i, name in enumerate(by_model)
    }
    subplots = partial(plt.subplots, layout="constrained")
    figures = {
        "accuracy.png": draw_accuracy(subplots, by_model, style) if summary else None,
        "differences.png": draw_differences(subplots, summary, config["against"]),
        "parameters.png": draw_parameters(subplots, summary, config["against"], style),
        "learned.png": draw_learned(subplots, by_model, style),
    }
    drawn = {out / name: figure for name, figure in figures.items() if figure}
    for to, figure in drawn.items():
        figure.suptitle(title(config), fontsize="small")
        with TrainUtil.replacing(to) as path:
            figure.savefig(path, dpi=120)
        plt.close(figure)
    return list(drawn)


def draw_accuracy(subplots: Callable, by_model: dict[str, list[dict]], style: dict) -> "Figure":
    """Test accuracy over training time: mean and standard deviation over the seeds after each epoch."""
    figure, axes = subplots(figsize=(8, 5))
    for name, mine in by_model.items():
        seconds = over_seeds([list(accumulate(e["seconds"] for e in run["history"])) for run in mine])[0]
        mean, sd = over_seeds([[100 * e["test_accuracy"] for e in run["history"]] for run in mine])
        axes.plot(seconds, mean, label=name, **style[name])
        axes.fill_between(seconds, mean - sd, mean + sd, alpha=0.15, color=style[name]["color"])
    axes.set(xlabel="training time (s)", ylabel="test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_differences(subplots: Callable, summary: list[dict], against: str) -> "Figure | None":
    """Differences to the model that the others are compared with: those of the seeds, their mean, its 95 % interval."""
    tested = [entry for entry in reversed(summary) if entry["interval"]]
    if not tested:
        return None
    figure, axes = subplots(figsize=(8, 1.5 + 0.4 * len(tested)))
    for y, entry in enumerate(tested):
        mean, (low, high) = statistics.mean(entry["difference"]), entry["interval"]
        axes.plot(entry["difference"], [y] * len(entry["difference"]), "|", color="0.6", markersize=10)
        fill = "black" if entry["p_holm"] < 0.05 else "white"
        errors = [[mean - low], [high - mean]]
        axes.errorbar(mean, y, xerr=errors, fmt="o", color="black", markerfacecolor=fill, capsize=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(tested)), [entry["model"] for entry in tested])
    axes.set(ylim=(-0.6, len(tested) - 0.4))
    axes.set_xlabel(
        f"difference to {against} in test accuracy (percentage points)\n"
        "seeds, mean and its 95 % interval; filled: p < 0.05 after Holm's correction"
    )
    axes.grid(axis="x", alpha=0.3)
    return figure


def draw_parameters(subplots: Callable, summary: list[dict], against: str, style: dict) -> "Figure | None":
    """Test accuracy over the parameters that a model adds, with the one that it is compared with as a band."""
    base = next((entry for entry in summary if entry["model"] == against), None)
    added = [entry for entry in summary if entry["added"] and entry["added"] > 0]
    if not base or not added:
        return None
    figure, axes = subplots(figsize=(8, 5))
    mean, sd = over_seeds([[value] for value in base["accuracy"]])
    axes.axhline(mean[0], color="0.4", linestyle="--", label=against)
    axes.axhspan(mean[0] - sd[0], mean[0] + sd[0], color="0.85")
    for entry in added:
        mean, sd = over_seeds([[value] for value in entry["accuracy"]])
        look = style[entry["model"]] | {"linestyle": "none"}
        axes.errorbar(entry["added"], mean[0], yerr=sd[0], capsize=4, label=entry["model"], **look)
    axes.set(xscale="log", xlabel=f"parameters added to those of {against}", ylabel="test accuracy (%)")
    axes.grid(alpha=0.3)
    how = "mean ± standard deviation" if max(len(entry["accuracy"]) for entry in summary) > 1 else None
    axes.legend(title=how, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the panel, over no error bar
    return figure


def draw_learned(subplots: Callable, by_model: dict[str, list[dict]], style: dict) -> "Figure | None":
    """α and β by layer, mean and standard deviation; γ by layer and activation, mean over the seeds."""
    learned = [values for runs in by_model.values() for run in runs for values in run["learned"].values()]
    layers = sorted({layer for values in learned for layer in values}, key=lambda layer: [*map(int, layer.split("."))])
    if not layers:
        return None

    def by_layer(runs: list[dict], key: str) -> tuple:
        return over_seeds([[run["learned"][key].get(layer, math.nan) for layer in layers] for run in runs])

    def nothing(panel: "Axes", symbol: str) -> None:
        panel.text(0.5, 0.5, f"no model here learns {symbol}", ha="center", transform=panel.transAxes)
        panel.set_axis_off()

    figure, (*lines, heat) = subplots(1, 3, figsize=(14, 4.5))
    rotation = 90 if len(layers) > 9 else 0
    for panel, symbol, key in zip(lines, "αβ", ("alpha", "beta")):
        for name, runs in by_model.items():
            if any(key in run["learned"] for run in runs):
                mean, sd = by_layer(runs, key)
                panel.errorbar(layers, mean, yerr=sd, capsize=3, label=name, **style[name])
        panel.set(xlabel="layer (stage.layer)", ylabel=symbol)
        panel.tick_params(axis="x", rotation=rotation)
        panel.grid(alpha=0.3)
        if panel.has_data():
            panel.legend(fontsize="small")
        else:
            nothing(panel, symbol)
    rows = {
        f"{name} γ{key[6:-1]}": by_layer(runs, key)[0]
        for name, runs in by_model.items()
        for key in runs[0]["learned"]
        if key.startswith("gamma")
    }
    if rows:
        image = heat.imshow(list(rows.values()), cmap="Greys", aspect="auto")
        middle = sum(image.get_clim()) / 2
        for y, row in enumerate(rows.values()):
            for x, value in enumerate(row):
                if not math.isnan(value):
                    color = "white" if value > middle else "black"
                    heat.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
        heat.set_yticks(range(len(rows)), list(rows), fontsize="small")
        heat.set_xticks(range(len(layers)), layers, rotation=rotation)
        heat.set(xlabel="layer (stage.layer)", title="γ, mean over seeds")
        figure.colorbar(image, ax=heat)
    else:
        nothing(heat, "γ")
    return figure


def over_seeds(values: list[list[float]]) -> tuple:
    """Mean and standard deviation of each column, as arrays; 0 for the latter where there is one seed."""
    import numpy as np

    array = np.array(values)
    return array.mean(axis=0), array.std(axis=0, ddof=1) if len(array) > 1 else np.zeros(array.shape[1])


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
    data = TrainUtil.synthetic()
    if options.image_size:
        images = data.sample(256).permute(0, 3, 1, 2).float()
        images = F.interpolate(images, options.image_size).to(torch.uint8).permute(0, 2, 3, 1)
        data = replace(data.limit(256), train_images=images)

    def cnn_example(n: int) -> tuple[Tensor, Tensor]:
        i = torch.arange(n) % data.train_size
        return data.normalize(data.train_images[i]), i % data.classes

    def gpt_example(n: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(GPT.vocabulary, (n, length), generator=torch.Generator().manual_seed(0))
        return tokens, tokens.roll(-1, dims=1)

    if options.network != "gpt":
        models = {model.name: ARCHS[options.arch](model, 0, data) for model in options.models}
        kind = "ViT" if options.arch == "vit" else f"{options.arch} CNN"
        name = f"{kind}, {data.size}×{data.size} pixels, batch {options.batch_size}"
        yield name, measure(models, cnn_example, options.batch_size, options)
    if options.network != "cnn":
        models = {model.name: GPT(model, dim, layers, length) for model in options.models}
        name = f"GPT, D = {dim}, {layers} layers, length {length}, batch {batch}"
        yield name, measure(models, gpt_example, batch, options)


def measure(models: dict[str, nn.Module], example: Callable, batch: int, options: argparse.Namespace) -> list[dict]:
    """An entry a model; example(n) gives n inputs and their labels."""
    device = options.device
    for model in models.values():
        model.train().to(device, memory_format=torch.channels_last)
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
    result = Table("model", title=f"{network}; {config['device_name']}, {how}", box=rich.box.MARKDOWN)
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
        if base["peak_bytes"] is not None:
            row.append(amount(entry, "peak_bytes", "MB", 1e6))
        if network.startswith("GPT"):
            row += [f"{ratio:.3f}" for ratio in PAPER.get(entry["model"], ())] or ["–", "–"]
        result.add_row(entry["model"], *row)
    return result


def profile(options: argparse.Namespace) -> int:
    TrainUtil.keep_memory()
    config, found = configuration(options), {}
    try:
        for network, costs in networks(options):
            found[network] = costs
            rich.get_console().print(profile_table(config, network, costs))
            with TrainUtil.replacing(options.out / "profile.json") as path:
                path.write_text(json.dumps({"config": config, "networks": found}) + "\n")
    except KeyboardInterrupt:
        print(f"Interrupted: networks measured so far: {len(found)}.", file=sys.stderr)
        return 130
    finally:
        if found:
            print(options.out / "profile.json")
    return 0


# ---------------------------------------------------------------------------------------------------------------------


class RefusedError(Exception):
    """The study can't begin; the message says why."""


class RunError(Exception):
    """The study can't go on; the message says why and what to try."""


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
        for half_written in out.glob(f"{folder}{TrainUtil.PARTIAL}*"):
            shutil.rmtree(half_written, ignore_errors=True)
    finished = {checkpoint(out, run["model"], run["seed"]) for run in runs}
    for path in out.glob("checkpoints/*.pt"):
        if path in finished or not (out / "results.json").exists():
            path.unlink()


def train_one(
    model: Model,
    seed: int,
    data: TrainUtil.Data,
    recipe: TrainUtil.Recipe,
    options: argparse.Namespace,
    report: Callable = lambda *so_far: None,
) -> dict:
    """The entry in results.json of one model with one seed."""
    TrainUtil.keep_memory()
    torch.backends.cudnn.deterministic = True
    net = ARCHS[options.arch](model, seed, data)
    settings = {"precision": options.precision, "compile": options.compile, "accumulate": options.accumulate}
    settings |= {"report": report, "checkpoint": checkpoint(options.out, model.name, seed)}
    try:
        recipe = replace(recipe, block_decay=model.decay)
        measured = TrainUtil.train(net, data.to(options.device), recipe, seed, **settings)
    except (MemoryError, RuntimeError) as error:
        if not TrainUtil.out_of_memory(error):
            raise
        fewer = f", or --parallel below {options.parallel} with --threads {options.threads}" * (options.parallel > 1)
        raise RunError(
            f"{model.name}, seed {seed}: out of memory with --batch-size {recipe.batch_size}. Try --accumulate "
            f"{2 * options.accumulate} or a smaller batch, with another --out{fewer}"
        ) from None
    parameters = sum(p.numel() for p in net.parameters())
    weights = {"learned": {} if measured["diverged"] else learned(net), "weights_sha256": TrainUtil.digest(net)}
    return {"model": model.name, "seed": seed, "parameters": parameters, **measured, **weights}


def train_all(
    pairs: dict[int, tuple[Model, int]],
    data: TrainUtil.Data,
    recipe: TrainUtil.Recipe,
    options: argparse.Namespace,
    monitor: Monitor,
) -> Iterator[dict]:
    """The entry of each pair, by its number, as they finish; `--parallel` at a time, each in a process of its own."""
    if options.parallel == 1:
        for i, pair in pairs.items():
            yield train_one(*pair, data, recipe, options, partial(monitor.report, i))
        return
    context = multiprocessing.get_context("spawn")
    reports = context.SimpleQueue()

    def listen() -> None:
        while True:
            message = reports.get()
            with suppress(OSError):  # where nobody reads the output any more, the processes must not wait for that
                monitor.report(*message)

    threading.Thread(target=listen, daemon=True).start()
    start = {"initializer": start_worker, "initargs": (options.threads, reports)}
    with ProcessPoolExecutor(options.parallel, mp_context=context, **start) as pool:
        try:
            heed = signal.signal(
                signal.SIGINT, signal.SIG_IGN
            )  # Ctrl-C is this process's: those that start now ignore it
            try:
                futures = [pool.submit(work, i, *pair, data, recipe, options) for i, pair in pairs.items()]
            finally:
                signal.signal(signal.SIGINT, heed)
            for future in as_completed(futures):
                yield future.result()
        except BaseException as error:  # the pool would wait for what it has begun
            for process in multiprocessing.active_children():
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise RunError(
                    "a training process was killed, perhaps for lack of memory. Try --parallel below "
                    f"{options.parallel} with --threads {options.threads}"
                ) from None
            raise


def start_worker(threads: int, reports: "multiprocessing.SimpleQueue") -> None:
    """Sets up a process of --parallel."""
    global worker_reports
    worker_reports = reports
    torch.set_num_threads(threads)

    def die_with_parent() -> None:  # a pool's processes outlive a parent that was killed (CPython issue 111873)
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()


def work(i: int, *pair_and_settings) -> dict:
    """train_one in a process of --parallel, which reports to the other one once a second and once an epoch."""
    sent = {"epochs": -1, "at": 0.0}

    def report(part: float, images: int, seconds: float, history: list[dict]) -> None:
        if len(history) > sent["epochs"] or time.monotonic() > sent["at"] + 1:
            sent.update(epochs=len(history), at=time.monotonic())
            worker_reports.put((i, part, images, seconds, history))

    return train_one(*pair_and_settings, report)


def load(options: argparse.Namespace) -> TrainUtil.Data:
    match options.dataset:
        case "synthetic":
            data = TrainUtil.synthetic()
        case "imagefolder":
            data = TrainUtil.load_folder(options.data_dir, options.image_size, options.workers)
        case cifar:
            data = TrainUtil.load_cifar(CIFAR100 if cifar == "cifar100" else CIFAR10, options.data_dir)
    if options.hold_out and options.hold_out >= data.train_size:
        raise RefusedError(f"--hold-out must be below the {data.train_size} training images, got {options.hold_out}")
    data = data.hold_out(options.hold_out) if options.hold_out else data
    data = data.limit(options.limit) if options.limit else data
    least = TrainUtil.processes()[1] * options.accumulate
    if min(options.batch_size, data.train_size) < least:
        raise RefusedError(f"a batch must have {least} images, one for each process and each part of --accumulate")
    return data


TRANSFORMER_LR = 0.001  # for the ViT: a tenth of what the batch norms of the others bear


def recipe_for(options: argparse.Namespace, data: TrainUtil.Data) -> TrainUtil.Recipe:
    recipe = TrainUtil.Recipe(epochs=options.epochs, batch_size=options.batch_size)
    if isinstance(data, TrainUtil.Folder):  # the workers crop
        recipe = replace(recipe, sizes=((data.size, 1.0),))
    return replace(recipe, lr=TRANSFORMER_LR) if options.arch == "vit" else recipe


def compare(options: argparse.Namespace) -> int:
    runs: dict[tuple[str, int], dict] = {}
    left: dict[int, tuple[Model, int]] | None = None
    code, again = 0, f"The same command with --out {options.out} goes on."

    def in_order() -> list[dict]:
        return sorted(runs.values(), key=lambda run: (run["seed"], config["models"].index(run["model"])))

    try:
        try:
            data = load(options)
            recipe = recipe_for(options, data)
            config = {
                **configuration(options),
                "against": options.against or "residual",
                "data": data.name,
                "training_images": data.train_size,
                "test_images": data.test_size,
                "recipe": asdict(recipe),
            }
            commit = config["git_commit"]
            runs = {(run["model"], run["seed"]): run for run in earlier_runs(options, config)}
            check_against(options.against, config["models"])
            tidy(options.out, in_order())
            write_results(options.out, config, in_order())  # no checkpoint without the options that it belongs to
            (options.out / "checkpoints").mkdir(exist_ok=True)
            pairs = [(model, seed) for seed in range(options.seeds) for model in options.models]
            finished = [(model.name, seed) in runs for model, seed in pairs]
            left = {i: pair for i, (pair, there) in enumerate(zip(pairs, finished)) if not there}
        finally:
            TrainUtil.agree(left and (left, facts(options, data)))  # see follow
        if any(finished):
            print(f"{sum(finished)} of {len(pairs)} runs are in {options.out} already.")
        monitor = Monitor([f"{model.name}, seed {seed}" for model, seed in pairs], finished, recipe.epochs)
        with monitor.bar:
            for run in train_all(left, data, recipe, options, monitor):
                runs[run["model"], run["seed"]] = {**run, "git_commit": commit}
                write_results(options.out, config, in_order())
                checkpoint(options.out, run["model"], run["seed"]).unlink()
        with suppress(OSError):  # not empty: damaged checkpoints are kept
            (options.out / "checkpoints").rmdir()
    except RefusedError as error:
        print(error, file=sys.stderr)
        return 2
    except TrainUtil.DataError as error:  # a file may turn out to be broken after hours
        code = 2
        print(error, file=sys.stderr)
    except RunError as error:
        code = 1
        print(f"{error}. What has finished is kept. {again}", file=sys.stderr)
    except OSError as error:
        code = 1
        where, what = error.filename or options.out, error.strerror or error
        print(f"{where}: {what}. {again}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        print(f"Interrupted: {len(runs)} runs have finished. {again}", file=sys.stderr)
    return show(options.out, config, in_order()) or code if runs else code


def check_against(against: str | None, models: Iterable[str]) -> None:
    if against not in (None, *models):
        raise RefusedError(f"--against {against} must be one of the models: {', '.join(models)}")


def facts(options: argparse.Namespace, data: TrainUtil.Data) -> dict:
    """What all processes must have alike."""
    sizes = {"training images": data.train_size, "test images": data.test_size, "classes": data.classes}
    return {**sizes, "precision": options.precision, "torch": torch.__version__}


def follow(options: argparse.Namespace) -> int:
    """What torchrun's other processes do: the runs of the first one, which keeps the results."""
    agreed = TrainUtil.agree(None)
    if not agreed:  # nothing is left to do, or the first process has said why it can't be done
        return 0
    try:
        left, first = agreed
        data = load(options)
        if facts(options, data) != first:
            raise RefusedError(f"this process has {facts(options, data)}, the first one {first}")
        for pair in left.values():
            train_one(*pair, data, recipe_for(options, data), options)
    except (TrainUtil.DataError, RefusedError, RunError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def redraw(options: argparse.Namespace) -> int:
    try:
        config, runs = read_results(options.draw)
        if not runs:
            raise RefusedError(f"--draw {options.draw}: no run has finished yet")
        check_against(options.against, dict.fromkeys(run["model"] for run in runs))
    except RefusedError as error:
        print(error, file=sys.stderr)
        return 2
    return show(options.draw, {**config, "against": options.against or config["against"]}, runs)


def show(out: Path, config: dict, runs: list[dict]) -> int:
    """The table and the pictures."""
    rich.get_console().print(table(config, runs))
    try:
        drawn = draw(out, config, runs)
    except OSError as error:
        print(f"The pictures could not be written: {error.filename or out}: {error.strerror or error}", file=sys.stderr)
        return 1
    for path in (out / "results.json", out / "results.csv", *drawn):
        if path.exists():
            print(path)
    return 0


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if not rich.get_console().is_terminal:
        rich.reconfigure(width=220)  # a file has no width of its own to fold the tables to
    if options.draw:
        return redraw(options) if first_process() else 0
    torch.set_num_threads(options.threads)
    if TrainUtil.launched():
        rich.get_console().quiet = not first_process()
        with TrainUtil.process_group(options.device):
            code = begin(options) if first_process() else follow(options)
            if code:  # leaving the group could wait for the others
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        return code
    return begin(options)


def begin(options: argparse.Namespace) -> int:
    try:
        with filelock.FileLock(options.out / ".lock", timeout=0):
            return profile(options) if options.profile else compare(options)
    except filelock.Timeout:
        print(f"--out {options.out} is in use by another process; name another folder", file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or options.out}: {error.strerror or error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
