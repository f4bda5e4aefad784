"""One block of each kind, for the models of other libraries and for what a model goes through."""

import importlib
from functools import partial

import pytest
import torch
from block_properties import LAuReL_PA, randomize
from torch import Tensor, nn

from LAuReL import LAuReL

LAuReL_LR = importlib.import_module("LAuReL-LR").LAuReL_LR
D, R = 16, 4
KINDS = {
    "RW": LAuReL,
    "RW per dimension": partial(LAuReL, D),
    "LR": partial(LAuReL_LR, D, R),
    "RW+LR": partial(LAuReL_LR, D, R, residual_weights=True),
    "PA": partial(LAuReL_PA, D, rank=R),
    "PA identity": partial(LAuReL_PA, D, rank=None),
    "RW+LR+PA": partial(LAuReL_PA, D, rank=R, residual_weights=True, shared=False),
}
ALL_KINDS = {
    **KINDS,
    "RW single": partial(LAuReL, bound="single"),
    "LR with a norm": lambda **options: LAuReL_LR(D, R, norm=Norm(options.get("channel_dim", -1)), **options),
    "RW+PA": partial(LAuReL_PA, D, rank=R, residual_weights=True),
}


class Norm(nn.RMSNorm):
    """Over the channels, wherever they stand."""

    def __init__(self, channel_dim: int) -> None:
        super().__init__(D, eps=1e-6)
        self.channel_dim = channel_dim

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.movedim(self.channel_dim, -1)).movedim(-1, self.channel_dim)


def library(name: str):
    return pytest.importorskip(name, reason=f"{name} is in the dependency group interop: pip install --group interop")


def random_(module: nn.Module) -> nn.Module:
    """Every parameter away from its start, for a model whose size must not explode."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return module


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters()}


def randomize_blocks(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (LAuReL, LAuReL_LR, LAuReL_PA)):
            randomize(module)


def branches(n: int = 3) -> list[nn.Module]:
    return [nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.GELU()) for _ in range(n)]
