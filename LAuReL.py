"""LAuReL-RW, the residual connection with learned weights:

    x_{i+1} = α · f(x_i) + β · x_i                                        §2.1; per dimension: §2.4

An unofficial implementation (MIT licence) of Menghani, Kumar, Kumar, "LAuReL: Learned Augmented Residual Layer",
ICML 2025 (arXiv 2411.07501). This file needs torch alone: copy it into your project and replace one line.

    x = x + self.f(x)                   # before
    x = self.residual(x, self.f(x))     # after, with self.residual = LAuReL()
"""

import math

import torch
from torch import Tensor, nn

BOUNDS = ("softmax", "sigmoid", "single", "none")
# What a branch may end in for `fold`: weight and bias multiply and add to each channel of the output.
AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
AFFINE += (nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def add_scaled(y: Tensor, weight: Tensor, t: Tensor) -> Tensor:
    """y + weight · t."""
    # In one pass, unless autocast on a GPU might lift several dtypes to float32 for it, and keep the copies.
    return torch.addcmul(y, weight, t) if t.is_cpu or y.dtype == weight.dtype == t.dtype else y + weight * t


def weighted_sum(alpha: Tensor | None, t: Tensor, beta: Tensor, x: Tensor) -> Tensor:
    """α t + β x, with the dtype of t + x; α is None where it is in t already."""
    dtype = torch.promote_types(t.dtype, x.dtype)
    if alpha is None:
        return add_scaled(t.to(dtype), beta, x).to(dtype)
    return add_scaled(beta * x.to(dtype), alpha, t).to(dtype)


class Recompute(torch.autograd.Function):
    """weighted_sum, but the backward pass has t back from the sum, (sum − β x) / α, so that t need not be kept."""

    generate_vmap_rule = True
    forward = staticmethod(weighted_sum)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        alpha, _, beta, x = inputs
        ctx.save_for_backward(alpha, beta, x, output)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, *tangents: Tensor | None) -> Tensor:
        alpha, t, beta, x = ctx.saved_tensors
        return sum(tangent * other for tangent, other in zip(tangents, (t, alpha, x, beta)) if tangent is not None)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        alpha, beta, x, y = ctx.saved_tensors
        t = (y - beta * x.to(y.dtype)) / alpha
        return (grad * t).sum_to_size(alpha.shape), alpha * grad, (grad * x).sum_to_size(beta.shape), beta * grad


def recoverable(alpha: Tensor | None, beta: Tensor, dtype: torch.dtype) -> bool:
    """Whether α is learned and large enough, and the dtype exact enough, to have t back from α t + β x."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or alpha is None or not alpha.requires_grad:
        return False
    try:
        return dtype in (torch.float32, torch.float64) and bool((8 * alpha.abs() > beta.abs()).all())
    except RuntimeError:  # on the meta device, or of many models under vmap, there is no one value to look at
        return False


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
        recompute: keep the output for the backward pass, which has f(x) back from it, in place of f(x). Saves memory
            where the next layer keeps its input anyway, as in a pre-norm model; the output must not be changed in place
            then. f(x) is kept all the same in half precision, and where |α| ≤ |β| / 8, which would multiply rounding
            errors; this is looked up at each call, for which a GPU has to be waited for. Without effect where a
            compiler chooses what is kept.

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
        self,
        dim: int | None = None,
        *,
        bound: str = "softmax",
        scale: float = 2.0,
        channel_dim: int = -1,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if dim is not None and dim < 1:
            raise ValueError(f"dim must be at least 1, or None for scalar weights, got {dim}")
        if bound not in BOUNDS:
            raise ValueError(f"bound must be one of {', '.join(BOUNDS)}, got {bound!r}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.dim, self.bound, self.scale, self.channel_dim, self.recompute = dim, bound, scale, channel_dim, recompute
        rows = 1 if bound == "single" else 2
        self.w = nn.Parameter(torch.empty(rows) if dim is None else torch.empty(rows, dim))
        self.register_buffer("folded_beta", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.w is not None:
            nn.init.constant_(self.w, 1.0 if self.bound == "none" else 0.0)
        if self.folded_beta is not None:
            nn.init.ones_(self.folded_beta)

    def weights(self) -> tuple[Tensor | None, Tensor]:
        """α and β, bounded: scalars, or vectors of length D. After `fold` α is None."""
        if self.w is None:
            return None, self.folded_beta
        if self.bound == "single":
            alpha = self.scale * torch.sigmoid(self.w[0])
            return alpha, self.scale - alpha
        pair = self.w
        if self.bound == "softmax":
            pair = self.scale * torch.softmax(self.w, dim=0)
        elif self.bound == "sigmoid":
            pair = self.scale * torch.sigmoid(self.w)
        return pair[0], pair[1]  # a sharded pair can be indexed, not unpacked

    @property
    def alpha(self) -> Tensor | None:
        """α, the weight of the branch f(x); None after `fold`."""
        return self.weights()[0]

    @property
    def beta(self) -> Tensor:
        """β, the weight of the input x."""
        return self.weights()[1]

    def forward(self, x: Tensor, fx: Tensor) -> Tensor:
        if x.shape != fx.shape:
            raise ValueError(f"x and fx must have the same shape, got {tuple(x.shape)} and {tuple(fx.shape)}")
        alpha, beta = self.weights()
        dtype = torch.promote_types(x.dtype, fx.dtype)
        if self.dim is not None:
            if not -x.ndim <= self.channel_dim < x.ndim or x.shape[self.channel_dim] != self.dim:
                raise ValueError(f"x must have dim={self.dim} at channel_dim={self.channel_dim}, got {tuple(x.shape)}")
            shape = [1] * x.ndim
            shape[self.channel_dim] = self.dim
            # A float32 vector would lift a bfloat16 stream to float32, so the weights take the dtype of x + fx.
            alpha = None if alpha is None else alpha.view(shape).to(dtype)
            beta = beta.view(shape).to(dtype)
        combine = Recompute.apply if self.recompute and recoverable(alpha, beta, dtype) else weighted_sum
        return combine(alpha, fx, beta, x)

    def extra_repr(self) -> str:
        text = f"dim={self.dim}, bound={self.bound!r}, scale={self.scale}, channel_dim={self.channel_dim}"
        return text + (", recompute=True" if self.recompute else "") + (", folded" if self.w is None else "")


@torch.no_grad()
def fold(block: LAuReL, layer: nn.Module) -> None:
    """Moves α of a trained block into the layer that the branch ends in, so that it costs nothing at inference.

    Changes both in place: the layer's weight and bias are multiplied by α, and the block then computes
    f(x) + β · x, with β a constant. The outputs stay the same, to rounding.

    Args:
        block: with α and β that were not folded before.
        layer: the last one of f, where it is linear, a convolution or a norm with a weight: Linear, Conv1d to 3d,
            BatchNorm1d to 3d, SyncBatchNorm, LayerNorm, GroupNorm, RMSNorm. It must belong to this branch alone, and
            its channels must be those of the block.

    Raises:
        TypeError: another kind of layer, such as an activation, through which α can't be moved, or a weight that is
            not the layer's own: sharded, quantised, pruned, parametrized. Fold first.
        ValueError: a block without α, or one α for each channel where the layer has another number of them.

    Example:
        >>> f, residual, x = nn.Linear(64, 64), LAuReL(dim=64), torch.randn(8, 64)
        >>> _ = nn.init.normal_(residual.w)
        >>> before = residual(x, f(x))
        >>> fold(residual, f)
        >>> torch.allclose(residual(x, f(x)), before, atol=1e-5)
        True
    """
    params = [p for p in (getattr(layer, "weight", None), getattr(layer, "bias", None)) if p is not None]
    affine = type(layer).forward in [kind.forward for kind in AFFINE]  # a subclass with its own may do more
    if not affine or layer.weight is None or not all(type(p) is nn.Parameter for p in params):
        allowed = ", ".join(kind.__name__ for kind in AFFINE)
        raise TypeError(f"layer must be one of {allowed} with a plain parameter as its weight, got {layer}")
    if block.w is not None and type(block.w) is not nn.Parameter:
        raise TypeError(f"w must be a plain parameter, got a {type(block.w).__name__}")
    alpha, beta = block.weights()
    if alpha is None:
        raise ValueError("block has no α: it was folded before")
    norm = isinstance(layer, (nn.LayerNorm, nn.RMSNorm))  # its channels are the last dimension: it must have no other
    if block.dim is not None and (layer.weight.shape if norm else layer.weight.shape[:1]) != (block.dim,):
        raise ValueError(f"layer must have dim={block.dim} output channels, got {layer}")
    for p in params:
        p.mul_(alpha.view(-1, *[1] * (p.ndim - 1)) if alpha.ndim else alpha)
    block.w, block.folded_beta = None, beta.clone()


if __name__ == "__main__":
    f = nn.Linear(64, 64)
    for residual in (LAuReL(), LAuReL(dim=64)):
        x = torch.randn(8, 10, 64)
        y = residual(x, f(x))
        print(residual)
        print(f"  x {tuple(x.shape)} -> {tuple(y.shape)}, parameters {sum(p.numel() for p in residual.parameters())}")
        print(f"  alpha {residual.alpha.mean():.3f}, beta {residual.beta.mean():.3f}")
        print(f"  starts as x + f(x): {torch.equal(y, x + f(x))}")
