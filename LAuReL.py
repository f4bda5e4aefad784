"""LAuReL-RW, the residual connection with learned weights:

    x_{i+1} = α · f(x_i) + β · x_i                                        §2.1; per dimension: §2.4

An unofficial implementation (MIT licence) of Menghani, Kumar, Kumar, "LAuReL: Learned Augmented Residual Layer",
ICML 2025 (arXiv 2411.07501). This file needs only torch: copy it into your project and replace one line.

    x = x + self.f(x)                   # before
    x = self.residual(x, self.f(x))     # after, with self.residual = LAuReL()
"""

import torch
from torch import Tensor, nn

BOUNDS = ("softmax", "sigmoid", "single", "none")


def bounded(w: Tensor, bound: str, scale: float) -> tuple[Tensor, Tensor]:
    """Returns α and β for a w whose first dimension holds the parameters of α, then those of β."""
    w = w.to(torch.promote_types(w.dtype, torch.float32))  # bfloat16 has no number between 1 and 1 + 1/128
    if bound == "single":
        w = torch.stack((w[0], -w[0]))  # scale · σ(−w) = scale − scale · σ(w)
    if bound != "none":
        w = scale * (torch.softmax(w, dim=0) if bound == "softmax" else torch.sigmoid(w))
    return w[0], w[1]


class LAuReL(nn.Module):
    r"""Adds a branch to its input with learned weights: α · f(x) + β · x (LAuReL-RW, §2.1).

    The paper asks that α and β stay bounded. ``bound`` says how the parameter ``w`` becomes α and β:

    - ``"softmax"``: (α, β) = scale · softmax(w), so that α + β = scale
    - ``"sigmoid"``: scale · σ(w), each on its own
    - ``"single"``: one parameter, α = scale · σ(w), β = scale − α
    - ``"none"``: w itself

    They start at scale / 2, or 1 for ``"none"``, by default as x + f(x); ``scale=1`` halves the stream in every layer.
    Give ``w`` a group without weight decay, at 0.003 to 0.01 in a transformer, up to 0.03 in a CNN: Adam at 0.001 moves
    it little in some hundred steps.

    Args:
        dim: D, the size of the channel dimension: α and β of length D (§2.4). ``None``: scalars.
        bound: one of the four above.
        scale: the factor above; ``"none"`` ignores it.
        channel_dim: where D stands: -1 for (…, D), 1 for (N, D, H, W); where W = D no error shows a wrong one.
            Scalars ignore it.

    Shape:
        - x, f(x): the same shape, any number of dimensions, with size D at ``channel_dim`` where ``dim`` is given.
        - Output: that shape, with the dtype of ``x + f(x)``.
        - w: (2,) or (2D,), α's values first; for ``"single"`` (1,) or (D,).

    Raises:
        ValueError, TypeError: an option out of its range, shapes that do not fit; integer or boolean activations.

    Example:
        >>> residual, x, fx = LAuReL(dim=64, channel_dim=1), torch.randn(8, 64, 9, 9), torch.randn(8, 64, 9, 9)
        >>> torch.equal(residual(x, fx), x + fx)
        True
    """

    def __init__(
        self, dim: int | None = None, *, bound: str = "softmax", scale: float = 2.0, channel_dim: int = -1
    ) -> None:
        super().__init__()
        if dim is not None and dim < 1:
            raise ValueError(f"dim must be at least 1, or None for scalar weights, got {dim}")
        if bound not in BOUNDS:
            raise ValueError(f"bound must be one of {', '.join(BOUNDS)}, got {bound!r}")
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.dim, self.bound, self.scale, self.channel_dim = dim, bound, scale, channel_dim
        self.w = nn.Parameter(torch.empty((1 if bound == "single" else 2) * (dim or 1)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.w, 1.0 if self.bound == "none" else 0.0)

    def weights(self) -> tuple[Tensor, Tensor]:
        w, D = self.w, self.dim
        rows = w if D is None else torch.stack([w[i : i + D] for i in range(0, len(w), D)])  # of a sharded w too
        return bounded(rows, self.bound, self.scale)

    alpha = property(lambda self: self.weights()[0], doc="α, the bounded weight of f(x): a scalar or of length D.")
    beta = property(lambda self: self.weights()[1], doc="β, the bounded weight of x: a scalar or of length D.")

    def forward(self, x: Tensor, fx: Tensor) -> Tensor:
        if x.shape != fx.shape:
            raise ValueError(f"x and fx must have one shape, got {tuple(x.shape)} and {tuple(fx.shape)}")
        if not all(t.is_floating_point() or t.is_complex() for t in (x, fx)):
            raise TypeError(f"x and fx must be floating-point or complex numbers, got {x.dtype} and {fx.dtype}")
        (alpha, beta), dtype = self.weights(), torch.promote_types(x.dtype, fx.dtype)
        if self.dim is not None:
            if not -x.ndim <= self.channel_dim < x.ndim or x.shape[self.channel_dim] != self.dim:
                raise ValueError(f"x must have dim={self.dim} at channel_dim={self.channel_dim}, got {tuple(x.shape)}")
            shape = [self.dim if i == self.channel_dim % x.ndim else 1 for i in range(x.ndim)]
            alpha, beta = alpha.view(shape).to(dtype), beta.view(shape).to(dtype)  # float32 would lift a bfloat16 x
        return (fx * alpha + x * beta).to(dtype)  # alpha * fx: a CPU would round a scalar α to bfloat16

    def extra_repr(self) -> str:
        return f"dim={self.dim}, bound={self.bound!r}, scale={self.scale}, channel_dim={self.channel_dim}"
