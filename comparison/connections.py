"""The plain residual connection, and alternatives to LAuReL.

Residual, ReZero and LayerScale take x and f(x), X0 the list of activations and f(x), DenseFormer the list. Their
parameters are scales, named as LAuReL's values where they do the same: `alpha` weights f(x), `beta` x.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """x + f(x): the plain residual connection."""

    def forward(self, x: Tensor, fx: Tensor) -> Tensor:
        return x + fx


class ReZero(nn.Module):
    """x + α·f(x), α a scalar that starts at 0 (Bachlechner et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(()))  # without dimensions it lifts no bfloat16 to float32

    def forward(self, x: Tensor, fx: Tensor) -> Tensor:
        return x + fx * self.alpha


class LayerScale(nn.Module):
    """x + α ⊙ f(x), α of length D that starts at 0.1 (Touvron et al. 2021)."""

    def __init__(self, dim: int, channel_dim: int) -> None:
        super().__init__()
        self.alpha, self.channel_dim = nn.Parameter(torch.full((dim,), 0.1)), channel_dim

    def forward(self, x: Tensor, fx: Tensor) -> Tensor:
        after = fx.ndim - 1 - self.channel_dim % fx.ndim  # dimensions behind the channels
        return x + fx * self.alpha.to(fx.dtype).view(-1, *after * (1,))


class X0(nn.Module):
    """β·x_i + μ·x_0 + f(x_i), scalars that start at 1 and 0 (modded-nanogpt, nanochat).

    There f reads the weighted sum of x_i and x_0, once for attention and MLP together; here it reads x_i.
    """

    def __init__(self) -> None:
        super().__init__()
        self.beta, self.mu = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, xs: Sequence[Tensor], fx: Tensor) -> Tensor:
        return xs[-1] * self.beta + xs[0] * self.mu + fx


class DenseFormer(nn.Module):
    """Σ_{j≤i} a_j y_j, y_0 the first activation, y_i = x_{i-1} + f(x_{i-1}) (Pagliardini et al. 2024).

    It starts as y_i. The list is that of the y; the next layer has the sum as its x_i. In the source a layer is
    attention and MLP together; here it is each of them.
    """

    def __init__(self, available: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.0] * available + [1.0]))

    def forward(self, ys: Sequence[Tensor]) -> Tensor:
        *weights, last = self.a.unbind()
        return sum((y * weight for y, weight in zip(ys[:-1], weights, strict=True)), start=ys[-1] * last)
