"""LAuReL-PA, the residual connection with learned weights on the previous activations:

    x_{i+1} = f(x_i) + x_i + Σ_{j=0..k-1} γ_j h(x_{i-j})                  §2.3, eq. 4, h(x) = B A x, or x itself
    x_{i+1} = α · f(x_i) + β · (x_i + Σ γ_j h(x_{i-j}))      RW+PA,       §2.4
    x_{i+1} = α · f(x_i) + β · (x_i + Σ γ_j B_j A_j x_{i-j})  RW+LR+PA,   eq. 6, where the paper prints A B

An unofficial implementation (MIT licence) of Menghani, Kumar, Kumar, "LAuReL: Learned Augmented Residual Layer",
ICML 2025 (arXiv 2411.07501). This file needs only torch: copy it into your project and replace one line.

    LAuReL_PA = importlib.import_module("LAuReL-PA").LAuReL_PA     # or give the file a name without a hyphen

    x = x + self.f(x)                                # before
    xs.append(self.residual(xs, self.f(xs[-1])))     # after, with xs = [x_0, …, x_i] and
                                                     # self.residual = LAuReL_PA(D), or LAuReL_PA(D, channel_dim=1)
"""

from collections.abc import Sequence

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


class LAuReL_PA(nn.Module):
    r"""Adds a branch, its input and the last k activations: f(x_i) + x_i + Σ γ_j h(x_{i-j}) (LAuReL-PA, §2.3, eq. 4).

    The sum runs over j = 0 … k−1, so x_i itself is in it. The block keeps nothing between calls: the caller owns the
    list of activations, and the block looks at its last k, or at as many as there are: the first blocks of a list leave
    their last γ_j, and pairs that are not shared, unused. Start a new one where the shape changes (a down-sampling
    stage), which the paper leaves open. Give what is checkpointed (with ``use_reentrant=False``) or compiled alone, the
    block or its layer, the slice ``xs[-k:]``: with the list itself, which grows, gradients may be wrong, and each of
    its lengths is compiled anew.

    It adds 2rD + k parameters, or k with ``rank=None``, h(x) = x. ``residual_weights=True`` is RW+PA, and with
    ``shared=False`` RW+LR+PA (eq. 6), which adds 2rkD + k + 2.

    B starts at zero and gamma at 1, or, with the identity h, gamma at 0, which the paper leaves open, and the block as
    the plain residual, to the last bit, unless ``scale`` is changed. ``gamma_gain``, a factor on gamma, is 1/k where h
    is low-rank, so that its terms move as fast as LR's one. After a loop that fills every matrix of a model, such as
    nn.Transformer's, call ``reset_parameters()``. Let Adam train A and B (0.0003 to 0.003 were tried in a GPT, 0.003 to
    0.01 in CNNs), not Muon at the rate of other matrices; give gamma and ``w`` a group without weight decay, at 0.003
    (in a GPT) to 0.01 (in a CNN).

    Args:
        dim: D, the size of the channel dimension.
        k, rank: how many activations to look at, in the paper 3; r, or ``None``: h is the identity.
        shared: one pair A, B for all k activations (§2.3), or one for each (eq. 6); ``rank=None`` ignores it.
        residual_weights: learn α and β too.
        init: how A starts. ``"orthogonal"``: the paper's column-orthogonal pattern for LLMs, A[i mod r, i] = 1/√(rD),
            else 0; rows beyond D repeat it. ``"xavier"``: uniform within ±√(6 / (r + D)), as for ResNet-50; A x is up
            to 1.4 r times as large.
        bound: ``"softmax"``: (α, β) = scale · softmax(w); ``"sigmoid"``: scale · σ(w); ``"single"``: α = scale · σ(w),
            β = scale − α; ``"none"``: w. They start at scale / 2, or 1. Ignored without residual weights, as scale is.
        scale: the factor above; ``"none"`` ignores it.
        channel_dim: where D stands: -1 for (…, D), 1 for (N, D, H, W); no error shows a wrong one where W = D.

    Shape:
        - xs: a list or tuple of activations x_0, …, x_i, oldest first, not empty. The last k, f(x_i) and the output
          have the same shape, with size D at ``channel_dim``; the output has the dtype of ``x_i + f(x_i)``.
        - gamma: (k,); γ_j, the weight of x_{i-j}, is gamma_gain · gamma[j]. w: (2,), or (1,) for ``"single"``.
          A: (r, D), B: (D, r), or (k, r, D) and (k, D, r) where not shared.

    Raises:
        ValueError, TypeError: an option out of its range, ``xs`` empty or no list, shapes that do not fit; integers.

    Example:
        >>> residual, xs = LAuReL_PA(64, k=3, rank=8), [torch.randn(4, 10, 64)]
        >>> for _ in range(3):
        ...     xs.append(residual(xs, torch.sin(xs[-1])))
        >>> torch.equal(xs[-1], xs[-2] + torch.sin(xs[-2]))
        True
    """

    def __init__(
        self, dim: int, k: int = 3, rank: int | None = 16, *, shared: bool = True, residual_weights: bool = False,
        init: str = "orthogonal", bound: str = "softmax", scale: float = 2.0, channel_dim: int = -1,
    ) -> None:  # fmt: skip
        super().__init__()
        if dim < 1 or k < 1 or (rank is not None and rank < 1):
            raise ValueError(f"dim, k and rank must be at least 1, or rank None, got {dim}, {k} and {rank}")
        for name, value, allowed in (("init", init, INITS), ("bound", bound, BOUNDS)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.dim, self.k, self.rank, self.shared, self.residual_weights = dim, k, rank, shared, residual_weights
        self.init, self.bound, self.scale, self.channel_dim = init, bound, scale, channel_dim
        self.gamma_gain = 1.0 if rank is None else 1 / k
        pairs = () if shared else (k,)
        self.gamma = nn.Parameter(torch.empty(k))
        self.A = None if rank is None else nn.Parameter(torch.empty(*pairs, rank, dim))
        self.B = None if rank is None else nn.Parameter(torch.empty(*pairs, dim, rank))
        self.w = nn.Parameter(torch.empty(1 if bound == "single" else 2)) if residual_weights else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, 0.0 if self.rank is None else 1.0)
        if self.rank is not None:
            nn.init.zeros_(self.B)
            if self.init == "xavier":
                limit = (6 / (self.rank + self.dim)) ** 0.5  # xavier_uniform_ takes a leading k for a filter size
                nn.init.uniform_(self.A, -limit, limit)
            else:
                ones = torch.ones_like(self.A, dtype=torch.long)  # of A itself, which may be sharded
                pattern = (ones.cumsum(-1) - ones.cumsum(-2)) % min(self.rank, self.dim) == 0  # component i mod r
                self.A.data.copy_(pattern / (self.rank * self.dim) ** 0.5)
        if self.w is not None:
            nn.init.constant_(self.w, 1.0 if self.bound == "none" else 0.0)

    def weights(self) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.w is None else bounded(self.w, self.bound, self.scale)

    alpha = property(lambda self: self.weights()[0], doc="α, the bounded weight of f(x), if there is one.")
    beta = property(lambda self: self.weights()[1], doc="β, the bounded weight of all else, if there is one.")

    def forward(self, xs: Sequence[Tensor], fx: Tensor) -> Tensor:
        if not isinstance(xs, (list, tuple)) or not xs:
            got = "none" if isinstance(xs, (list, tuple)) else f"a {type(xs).__name__}"
            raise ValueError(f"xs must be a list or tuple of at least one activation, got {got}")
        xs, n = xs[-self.k :][::-1], fx.ndim  # x_i, x_{i-1}, …
        channels = fx.shape[self.channel_dim] if -n <= self.channel_dim < n else None
        if channels != self.dim or any(x.shape != fx.shape for x in xs):
            raise ValueError(
                f"xs and fx must have the same shape with dim={self.dim} at channel_dim={self.channel_dim}, "
                f"got {[tuple(x.shape) for x in xs[::-1]]} and {tuple(fx.shape)}; start a new list where it changes"
            )
        if not all(t.is_floating_point() or t.is_complex() for t in (*xs, fx)):
            raise TypeError(f"activations must be floating-point or complex, got {[t.dtype for t in (*xs[::-1], fx)]}")
        x, device, dtype = xs[0], fx.device.type, torch.promote_types(xs[0].dtype, fx.dtype)
        if not x.is_meta and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            with torch.autocast(device, enabled=False):  # A x may leave the range of float16 where x + f(x) does not
                return self.forward(xs[::-1], fx)
        alpha, beta = self.weights()
        y = x + fx if beta is None else (fx * alpha + x * beta).to(dtype)  # alpha * fx: a CPU would round α to bfloat16
        gamma = (self.gamma_gain if beta is None else beta * self.gamma_gain) * self.gamma[: len(xs)]
        if self.rank is None:
            for weight, each in zip(gamma.unbind(), xs):
                y = y + each * weight
            return y.to(dtype)  # an earlier activation may be float32 where x_i and f(x_i) are bfloat16

        # β and γ are multiplied into what is small, A x and B: no weighted activation is kept for the backward pass.
        ts, d = [x.to(torch.float32 if x.dtype == torch.float16 else x.dtype) for x in xs], self.channel_dim
        A = [self.A] * len(xs) if self.shared else self.A[: len(xs)]
        us = [product(a.to(t.dtype), t, d) for t, a in zip(ts, A)]  # A x_{i-j}, r channels each
        if self.shared:
            u, B = sum(u * weight for weight, u in zip(gamma.unbind(), us)), self.B
        else:
            u = torch.cat(us, dim=d)  # kr channels
            B = (gamma[:, None, None] * self.B[: len(xs)]).movedim(0, 1).flatten(1)  # (D, kr)
        return y + product(B.to(u.dtype), u, d).to(y.dtype)

    def extra_repr(self) -> str:
        names = ("dim", "k", "rank", "shared", "residual_weights", "init", "bound", "scale", "channel_dim")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
