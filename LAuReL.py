"""LAuReL-RW, the residual connection with learned weights:

    x_{i+1} = α · f(x_i) + β · x_i                                        §2.1; per dimension: §2.4

An unofficial implementation (MIT licence) of Menghani, Kumar, Kumar, "LAuReL: Learned Augmented Residual Layer",
ICML 2025 (arXiv 2411.07501). This file needs torch alone: copy it into your project and replace one line.

    x = x + self.f(x)                   # before
    x = self.residual(x, self.f(x))     # after, with self.residual = LAuReL()
"""

import functools
import math

import torch
from torch import Tensor, nn

BOUNDS = ("softmax", "sigmoid", "single", "none")


class WeightedSum(torch.autograd.Function):
    """w_0 t_0 + w_1 t_1 + …, called as (w_0, t_0, w_1, t_1, …); any weight but the first may be None for 1.

    Takes fewer passes over memory than autograd's own form: a product is added as it is made, and the gradient of a
    scalar weight is one dot product.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Tensor | None) -> Tensor:
        weights, terms = args[::2], args[1::2]
        dtype = functools.reduce(torch.promote_types, (term.dtype for term in terms))
        y = weights[0] * terms[0].to(dtype)
        for weight, term in zip(weights[1:], terms[1:]):
            y = y.add_(term) if weight is None else y.addcmul_(weight, term)
        return y

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, *tangents: Tensor | None) -> Tensor:
        by_term = [t if w is None else w * t for w, t in zip(ctx.saved_tensors[::2], tangents[1::2]) if t is not None]
        by_weight = [w * t for w, t in zip(tangents[::2], ctx.saved_tensors[1::2]) if w is not None]
        return sum(by_term + by_weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        order = sorted(range(grad.ndim), key=grad.stride, reverse=True)  # that of memory: flatten copies nothing
        flat = grad.permute(order).flatten()
        grads: list[Tensor | None] = []
        for i, (weight, term) in enumerate(zip(saved[::2], saved[1::2])):
            by_weight, by_term = ctx.needs_input_grad[2 * i : 2 * i + 2]
            if not by_weight:
                grads.append(None)
            elif weight.ndim == 0:
                grads.append(torch.dot(flat, term.to(grad.dtype).permute(order).flatten()))
            else:
                grads.append((grad * term).sum_to_size(weight.shape))
            grads.append((grad if weight is None else weight * grad) if by_term else None)
        return tuple(grads)


def weighted_sum(*args: Tensor | None) -> Tensor:
    # A compiler fuses the passes by itself, forward and backward.
    return (WeightedSum.forward if torch.compiler.is_compiling() else WeightedSum.apply)(*args)


class LAuReL(nn.Module):
    r"""Adds a branch to its input with learned weights: α · f(x) + β · x (LAuReL-RW, §2.1).

    The paper asks that α and β cannot grow without limit; ``bound`` says how the parameter ``w`` is turned into them:

    ============= ================================= =================== ==========
    ``bound``     (α, β)                            shape of ``w``      starts at
    ============= ================================= =================== ==========
    ``"softmax"`` scale · softmax(w), so that       (2,) or (2, D)      scale / 2
                  α + β = scale
    ``"sigmoid"`` scale · σ(w), each on its own     (2,) or (2, D)      scale / 2
    ``"single"``  α = scale · σ(w), β = scale − α   (1,) or (1, D)      scale / 2
    ``"none"``    w itself, unbounded               (2,) or (2, D)      1
    ============= ================================= =================== ==========

    The paper leaves open where α and β start. With ``scale=2`` both start at 1: the block is the plain residual to
    the last bit. ``scale=1`` is the bare softmax or sigmoid, which halves the stream at every layer at the start.
    Weight decay is left open too: keep it off ``w``, which it draws to scale / 2, or to 0 for ``bound="none"``.

    Args:
        dim: D, the size of the channel dimension: α and β are vectors of length D (§2.4). ``None``: scalars.
        bound: one of the four above.
        scale: the factor in the table above; without effect for ``bound="none"``.
        channel_dim: where D stands: -1 for (…, D), 1 for (N, D, H, W). Matters only where ``dim`` is given.

    Shape:
        - x, f(x): the same shape, any number of dimensions, with size D at ``channel_dim`` where ``dim`` is given.
        - Output: that shape, with the dtype of ``x + f(x)``.

    Raises:
        ValueError: ``dim`` below 1, an unknown ``bound``, a ``scale`` that is not positive and finite, or shapes that
            do not fit.

    Example:
        >>> residual = LAuReL(dim=64, channel_dim=1)
        >>> x, fx = torch.randn(8, 64, 32, 32), torch.randn(8, 64, 32, 32)
        >>> torch.equal(residual(x, fx), x + fx)
        True
        >>> residual.alpha.shape
        torch.Size([64])
    """

    def __init__(
        self, dim: int | None = None, *, bound: str = "softmax", scale: float = 2.0, channel_dim: int = -1
    ) -> None:
        super().__init__()
        if dim is not None and dim < 1:
            raise ValueError(f"dim must be at least 1, or None for scalar weights, got {dim}")
        if bound not in BOUNDS:
            raise ValueError(f"bound must be one of {', '.join(BOUNDS)}, got {bound!r}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.dim, self.bound, self.scale, self.channel_dim = dim, bound, scale, channel_dim
        rows = 1 if bound == "single" else 2
        self.w = nn.Parameter(torch.empty(rows) if dim is None else torch.empty(rows, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.w, 1.0 if self.bound == "none" else 0.0)

    def weights(self) -> tuple[Tensor, Tensor]:
        """α and β, bounded: scalars, or vectors of length D."""
        if self.bound == "single":
            alpha = self.scale * torch.sigmoid(self.w[0])
            return alpha, self.scale - alpha
        if self.bound == "softmax":
            alpha, beta = self.scale * torch.softmax(self.w, dim=0)
        elif self.bound == "sigmoid":
            alpha, beta = self.scale * torch.sigmoid(self.w)
        else:
            alpha, beta = self.w
        return alpha, beta

    @property
    def alpha(self) -> Tensor:
        """α, the weight of the branch f(x)."""
        return self.weights()[0]

    @property
    def beta(self) -> Tensor:
        """β, the weight of the input x."""
        return self.weights()[1]

    def forward(self, x: Tensor, fx: Tensor) -> Tensor:
        if x.shape != fx.shape:
            raise ValueError(f"x and fx must have the same shape, got {tuple(x.shape)} and {tuple(fx.shape)}")
        alpha, beta = self.weights()
        if self.dim is not None:
            if not -x.ndim <= self.channel_dim < x.ndim or x.shape[self.channel_dim] != self.dim:
                raise ValueError(f"x must have dim={self.dim} at channel_dim={self.channel_dim}, got {tuple(x.shape)}")
            shape = [1] * x.ndim
            shape[self.channel_dim] = self.dim
            # A float32 vector would lift a bfloat16 stream to float32, so the weights take the dtype of x + fx.
            dtype = torch.promote_types(x.dtype, fx.dtype)
            alpha, beta = alpha.view(shape).to(dtype), beta.view(shape).to(dtype)
        return weighted_sum(alpha, fx, beta, x)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, bound={self.bound!r}, scale={self.scale}, channel_dim={self.channel_dim}"


if __name__ == "__main__":
    f = nn.Linear(64, 64)
    for residual in (LAuReL(), LAuReL(dim=64)):
        x = torch.randn(8, 10, 64)
        y = residual(x, f(x))
        print(residual)
        print(f"  x {tuple(x.shape)} -> {tuple(y.shape)}, parameters {sum(p.numel() for p in residual.parameters())}")
        print(f"  alpha {residual.alpha.mean():.3f}, beta {residual.beta.mean():.3f}")
        print(f"  starts as x + f(x): {torch.equal(y, x + f(x))}")
