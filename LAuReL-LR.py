"""LAuReL-LR, the residual connection with a learned low-rank map of its input:

    x_{i+1} = f(x_i) + x_i + B A x_i                                      §2.2, eq. 3
    x_{i+1} = α · f(x_i) + β · (x_i + B A x_i)        RW+LR,              eq. 5

An unofficial implementation (MIT licence) of Menghani, Kumar, Kumar, "LAuReL: Learned Augmented Residual Layer",
ICML 2025 (arXiv 2411.07501). This file needs only torch: copy it into your project and replace one line.

    LAuReL_LR = importlib.import_module("LAuReL-LR").LAuReL_LR     # or give the file a name without a hyphen

    x = x + self.f(x)                   # before
    x = self.residual(x, self.f(x))     # after, with self.residual = LAuReL_LR(D), or LAuReL_LR(D, channel_dim=1)
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INITS, BOUNDS = ("xavier", "orthogonal"), ("softmax", "sigmoid", "single", "none")


def bounded(w: Tensor, bound: str, scale: float) -> tuple[Tensor, Tensor]:
    """Returns α and β for a w whose first dimension holds the parameters of α, then those of β."""
    w = w.to(torch.promote_types(w.dtype, torch.float32))  # bfloat16 has no number between 1 and 1 + 1/128
    if bound == "single":
        w = torch.stack((w[0], -w[0]))  # scale · σ(−w) = scale − scale · σ(w)
    if bound != "none":
        w = scale * (torch.softmax(w, dim=0) if bound == "softmax" else torch.sigmoid(w))
    return w[0], w[1]


def product(W: Tensor, x: Tensor, d: int) -> Tensor:
    """W x over the channels, dimension d of x."""
    t = x.movedim(d, -1)
    if d % x.ndim != 1 or x.ndim < 3 or t.is_contiguous():
        return F.linear(t, W).movedim(-1, d)
    # Of (N, D, H, W) F.linear would make a copy, and keep it for the backward pass.
    return F.conv1d(x.flatten(2), W[..., None]).unflatten(2, x.shape[2:])


class LAuReL_LR(nn.Module):
    r"""Adds a branch, its input and a low-rank map of its input: f(x) + x + B A x (LAuReL-LR, §2.2, eq. 3).

    With ``residual_weights=True`` it is RW+LR: α · f(x) + β · (x + B A x) (eq. 5). B starts at zero, and the block as
    the plain residual, to the last bit, unless ``scale`` is changed. After a loop that fills every matrix of a model,
    such as nn.Transformer's, call ``reset_parameters()``. Let Adam train A and B (0.0003 to 0.003 were tried in a GPT,
    0.003 to 0.01 in CNNs), not Muon at the rate of other matrices; give ``w`` a group without weight decay, at 0.003 to
    0.01.

    Args:
        dim: D, the size of the channel dimension.
        rank: r. The paper: best at 16 and 32 on ResNet-50; 32, 48 and 64 in LLMs.
        residual_weights: learn α and β too.
        init: how A starts. ``"orthogonal"``: the paper's column-orthogonal pattern for LLMs, A[i mod r, i] = 1/√(rD),
            else 0; rows beyond D repeat it. ``"xavier"``: uniform within ±√(6 / (r + D)), as for ResNet-50; A x is up
            to 1.4 r times as large.
        norm: a module applied to B A x, in its layout; Gemma 3n has ``nn.RMSNorm(D)``. After one step its output has
            full size, however small B is.
        bound: ``"softmax"``: (α, β) = scale · softmax(w); ``"sigmoid"``: scale · σ(w); ``"single"``: α = scale · σ(w),
            β = scale − α; ``"none"``: w. They start at scale / 2, or 1. Ignored without residual weights, as scale is.
        scale: the factor above; ``"none"`` ignores it.
        channel_dim: where D stands: -1 for (…, D), 1 for (N, D, H, W); no error shows a wrong one where W = D.

    Shape:
        - x, f(x), output: the same shape, with size D at ``channel_dim``; the output has the dtype of ``x + f(x)``.
        - A: (r, D), B: (D, r), w: (2,), or (1,) for ``"single"``.

    Raises:
        ValueError, TypeError: an option out of its range, shapes that do not fit; integer or boolean activations.

    Example:
        >>> residual, x, fx = LAuReL_LR(64, rank=8), torch.randn(4, 10, 64), torch.randn(4, 10, 64)
        >>> torch.equal(residual(x, fx), x + fx)
        True
    """

    def __init__(
        self, dim: int, rank: int = 16, *, residual_weights: bool = False, init: str = "orthogonal",
        norm: nn.Module | None = None, bound: str = "softmax", scale: float = 2.0, channel_dim: int = -1,
    ) -> None:  # fmt: skip
        super().__init__()
        if dim < 1 or rank < 1:
            raise ValueError(f"dim and rank must be at least 1, got {dim} and {rank}")
        for name, value, allowed in (("init", init, INITS), ("bound", bound, BOUNDS)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be positive and finite, got {scale}")
        if not isinstance(norm, nn.Module | None):
            raise TypeError(f"norm must be a module, such as nn.RMSNorm({dim}), or None, got {norm!r}")
        self.dim, self.rank, self.residual_weights, self.init = dim, rank, residual_weights, init
        self.norm, self.bound, self.scale, self.channel_dim = norm, bound, scale, channel_dim
        self.A, self.B = nn.Parameter(torch.empty(rank, dim)), nn.Parameter(torch.empty(dim, rank))
        self.w = nn.Parameter(torch.empty(1 if bound == "single" else 2)) if residual_weights else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init == "xavier":
            nn.init.xavier_uniform_(self.A)
        else:
            ones = torch.ones_like(self.A, dtype=torch.long)  # of A itself, which may be sharded
            pattern = (ones.cumsum(-1) - ones.cumsum(-2)) % min(self.rank, self.dim) == 0  # component i mod r
            self.A.data.copy_(pattern / (self.rank * self.dim) ** 0.5)
        nn.init.zeros_(self.B)
        if self.w is not None:
            nn.init.constant_(self.w, 1.0 if self.bound == "none" else 0.0)

    def weights(self) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.w is None else bounded(self.w, self.bound, self.scale)

    alpha = property(lambda self: self.weights()[0], doc="α, the bounded weight of f(x), if there is one.")
    beta = property(lambda self: self.weights()[1], doc="β, the bounded weight of all else, if there is one.")

    def forward(self, x: Tensor, fx: Tensor) -> Tensor:
        if x.shape != fx.shape or not -x.ndim <= self.channel_dim < x.ndim or x.shape[self.channel_dim] != self.dim:
            got = f"got {tuple(x.shape)} and {tuple(fx.shape)}"
            raise ValueError(f"x and fx must have one shape, dim={self.dim} at channel_dim={self.channel_dim}, {got}")
        if not all(t.is_floating_point() or t.is_complex() for t in (x, fx)):
            raise TypeError(f"x and fx must be floating-point or complex numbers, got {x.dtype} and {fx.dtype}")
        device, dtype = x.device.type, torch.promote_types(x.dtype, fx.dtype)
        half = not x.is_meta and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        alpha, beta = self.weights()
        y = x + fx if beta is None else (fx * alpha + x * beta).to(dtype)  # alpha * fx: a CPU would round α to bfloat16
        x, d = x.to(torch.float32 if x.dtype == torch.float16 else x.dtype), self.channel_dim
        B = self.B if beta is None or self.norm is not None else beta * self.B
        with torch.autocast(device, enabled=False) if half else nullcontext():  # A x may leave the range of float16
            h = product(B.to(x.dtype), product(self.A.to(x.dtype), x, d), d)
        if self.norm is None:
            return y + h.to(dtype)
        return (y + self.norm(h if half else h.to(dtype)) * (1 if beta is None else beta)).to(dtype)

    def extra_repr(self) -> str:
        names = ("dim", "rank", "residual_weights", "init", "bound", "scale", "channel_dim")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
