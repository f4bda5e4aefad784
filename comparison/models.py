"""From the name of a model to its residual connections."""

import argparse
import importlib
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor, nn

from comparison.connections import X0, DenseFormer, LayerScale, Residual, ReZero
from comparison.data import seeded
from LAuReL import BOUNDS, LAuReL

INITS = importlib.import_module("LAuReL-LR").INITS
LAuReL_LR = importlib.import_module("LAuReL-LR").LAuReL_LR
LAuReL_PA = importlib.import_module("LAuReL-PA").LAuReL_PA


LARGEST = 1e6  # of the numbers that a user sets
MODELS = ("residual", "rw", "lr", "pa", "rw+lr", "rw+pa", "rw+lr+pa", "deeper")
MODELS += ("rezero", "layerscale", "x0", "denseformer")  # what people would take in LAuReL's place
# The arguments of a block that a model's name may set; decay: weight decay on the block's parameters; rate: a factor on
# their learning rate
ARGUMENTS = {
    "dim": {"D": "D"},  # α and β for each channel
    "rank": {"none": None},  # the identity for h
    "shared": {"true": True, "false": False},
    "bound": {name: name for name in BOUNDS},
    "init": {name: name for name in INITS},
    "scale": float,
    "decay": float,
    "rate": float,
}


@dataclass(frozen=True)
class Model:
    """A model's name, such as rw+lr+pa@16/3 or rw:scale=1,decay=0.1, taken apart."""

    name: str
    base: str
    rank: int | None  # None: what the network has by default
    k: int
    arguments: dict  # of the block
    own: dict  # the recipe's fields that are its own

    @staticmethod
    def parse(name: str) -> "Model":
        match = re.fullmatch(r"([a-z0+]+)(?:@([1-9]\d{0,8}))?(?:/([1-9]\d{0,8}))?(?::(.+))?", name)
        base, rank, k, rest = match.groups() if match else (None, None, None, None)
        if base not in MODELS:
            raise argparse.ArgumentTypeError(
                f"unknown model {name!r}; allowed are {', '.join(MODELS)}, with @RANK after lr or pa and /K after pa, "
                "both from 1 to 999999999, as in lr@8, pa/5, rw+lr+pa@16/3, and a block's arguments, as in rw:scale=1"
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
            "rank": base in ("pa", "rw+pa"),  # rank=none, which leaves no LR in rw+lr+pa
            "shared": base in ("pa", "rw+pa") and low_rank,
            "bound": "rw" in base,
            "init": low_rank,
            "scale": "rw" in base and arguments.get("bound") != "none",
            "decay": base not in ("residual", "deeper"),
            "rate": base not in ("residual", "deeper"),
        }
        for each in arguments:
            if not effective[each]:
                raise argparse.ArgumentTypeError(f"{name!r}: {each} would be ignored")
        if arguments.get("scale") == 0:
            raise argparse.ArgumentTypeError(f"{name!r}: scale must be positive")
        own = {f"block_{each}": arguments.pop(each) for each in ("decay", "rate") if each in arguments}
        return Model(name, base, int(rank) if rank else None, int(k or 3), arguments, own)

    def residual(self, dim: int, available: int, *, channel_dim: int, rank: int = 16) -> nn.Module:
        """The residual connection of a layer that has `available` activations to look at.

        rank is that of models whose name gives none.
        """
        k = min(self.k, available)  # a γ for an activation that is never there would not be trained
        given = {name: dim if value == "D" else value for name, value in self.arguments.items()}
        options = {"channel_dim": channel_dim, **given}
        if self.base == "rw":
            return LAuReL(**options)
        options = {"rank": self.rank or rank, "residual_weights": self.base.startswith("rw+"), **options}
        match self.base:
            case "lr" | "rw+lr":
                return LAuReL_LR(dim, **options)
            case "pa" | "rw+pa":
                return LAuReL_PA(dim, k, **options)
            case "rw+lr+pa":  # eq. 6: a low-rank pair for each activation
                return LAuReL_PA(dim, k, shared=False, **options)
            case "rezero":
                return ReZero()
            case "layerscale":
                return LayerScale(dim, channel_dim)
            case "x0":
                return X0()
            case "denseformer":
                return DenseFormer(available)
        return Residual()


def argument(text: str) -> tuple[str, object]:
    """NAME=VALUE taken apart."""
    name, _, value = text.partition("=")
    allowed = ARGUMENTS.get(name)
    if isinstance(allowed, dict) and value in allowed:
        return name, allowed[value]
    with suppress(ValueError):
        if allowed is float and 0 <= float(value) <= LARGEST:
            return name, float(value)
    forms = (f"{n}={'|'.join(v) if isinstance(v, dict) else 'NUMBER'}" for n, v in ARGUMENTS.items())
    allowed = f"allowed are {', '.join(forms)}, numbers up to {LARGEST:g}"
    raise argparse.ArgumentTypeError(f"{text!r} sets no argument of a block; {allowed}")


class Stage(nn.Module):
    """Residual layers of one shape, which `down` brings its input to."""

    def __init__(
        self,
        down: nn.Module,
        branches: list[nn.Sequential],
        width: int,
        model: Model,
        seed: int,
        channel_dim: int = 1,
        rank: int = 16,
    ) -> None:
        super().__init__()
        self.down, self.branches, self.residuals = down, nn.ModuleList(branches), nn.ModuleList()
        for i in range(len(branches)):
            with seeded(seed + i):
                self.residuals.append(model.residual(width, available=i + 1, channel_dim=channel_dim, rank=rank))

    def deepen(self, *branches: nn.Sequential) -> None:
        """Adds residual layers that start with f(x) = 0."""
        for branch in branches:
            start_at_zero(branch)
            self.branches.append(branch)
            self.residuals.append(Residual())

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return residual_layers(x, x, self.branches, self.residuals)


def start_at_zero(branch: nn.Module) -> None:
    """Makes f(x) = 0, by its last layer."""
    *_, last = (layer for layer in branch.modules() if getattr(layer, "weight", None) is not None)
    for p in last.parameters():
        nn.init.zeros_(p)


def residual_layers(
    x: Tensor,
    shortcut: Tensor,
    branches: Sequence[Callable[[Tensor], Tensor]],
    residuals: Sequence[nn.Module],
    activation: Callable[[Tensor], Tensor] = lambda y: y,
) -> Tensor:
    """x, what the first branch gets, and shortcut, what its output is added to, through layer after layer.

    The list of activations begins with the shortcut.
    """
    xs = [shortcut]
    for f, residual in zip(branches, residuals):
        if isinstance(residual, DenseFormer):
            xs.append(activation(shortcut + f(x)))
            x = residual(xs)
        else:
            history = isinstance(residual, (LAuReL_PA, X0))
            x = activation(residual(xs if history else shortcut, f(x)))
            xs = [*xs, x] if history else []  # without a list no activation is kept at inference
        shortcut = x
    return x
