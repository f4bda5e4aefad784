"""LAuReL-LR, the residual connection with a learned low-rank map of its input:

    x_{i+1} = f(x_i) + x_i + B A x_i                                      §2.2, eq. 3
    x_{i+1} = α · f(x_i) + β · (x_i + B A x_i)        RW+LR,              eq. 5

An unofficial implementation (MIT licence) of Menghani, Kumar, Kumar, "LAuReL: Learned Augmented Residual Layer",
ICML 2025 (arXiv 2411.07501). This file needs torch alone: copy it into your project and replace one line.

    LAuReL_LR = importlib.import_module("LAuReL-LR").LAuReL_LR     # or give the file a name without a hyphen

    x = x + self.f(x)                   # before
    x = self.residual(x, self.f(x))     # after, with self.residual = LAuReL_LR(D), or LAuReL_LR(D, channel_dim=1)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BOUNDS = ("softmax", "sigmoid", "single", "none")
# What a branch may end in for `fold`: weight and bias multiply and add to each channel of the output.
AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
AFFINE += (nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
INITS = ("xavier", "orthogonal")


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


class LAuReL_LR(nn.Module):
    r"""Adds a branch, its input and a low-rank map of its input: f(x) + x + B A x (LAuReL-LR, §2.2, eq. 3).

    With ``residual_weights=True`` it is RW+LR: α · f(x) + β · (x + B A x) (eq. 5). B starts at zero, so with the
    default options the block starts as the plain residual, to the last bit. It adds 2rD parameters, and with
    ``residual_weights`` those of ``w``: 2, or 1 for ``bound="single"``. The paper leaves weight decay on them open:
    keep it off ``w``, which it draws to scale / 2, or to 0 for ``bound="none"``.

    Args:
        dim: D, the size of the channel dimension.
        rank: r. The paper: 16 and 32 are best on ResNet-50, 32 to 64 on LLMs.
        residual_weights: learn α and β too.
        init: how A starts. ``"xavier"``: uniform within ±√(6 / (r + D)), as the paper has it on ResNet-50.
            ``"orthogonal"``: the paper's column-orthogonal pattern for LLMs, 1/√(rD) where channel i meets component
            i mod r, else 0. Written for A of shape (r, D), that is A[i mod r, i]: every channel is used.
        norm: a module applied to B A x before it is added, in the layout of x: ``nn.RMSNorm(D)`` for (…, D), as in
            Gemma 3n, ``nn.GroupNorm(1, D)`` for channels first. As B starts at zero, its first gradient is up to
            1/√eps times as large, and one step brings the path to the norm's full size.
        bound: how ``w`` becomes α and β: ``"softmax"``: scale · softmax(w); ``"sigmoid"``: scale · σ(w), each on its
            own; ``"single"``: one parameter, α = scale · σ(w), β = scale − α; ``"none"``: w itself. All start at
            scale / 2, and ``"none"`` at 1. The paper leaves the start open; ``scale=2`` is the plain residual.
        scale: the factor above. Without effect for ``bound="none"``, as both are without ``residual_weights``.
        channel_dim: where D stands: -1 for (…, D), 1 for (N, D, H, W).
        recompute: with α and β, keep the output for the backward pass, which has f(x) back from it, in place of f(x).
            Saves memory where the next layer keeps its input anyway, as in a pre-norm model; the output must not be
            changed in place then. f(x) is kept all the same in half precision, and where |α| ≤ |β| / 8, which would
            multiply rounding errors; this is looked up at each call, for which a GPU has to be waited for. Without
            effect where a compiler chooses what is kept. Without effect with a ``norm``.

    Shape:
        - x, f(x): the same shape, any number of dimensions, with size D at ``channel_dim``.
        - Output: that shape, with the dtype of ``x + f(x)``.
        - A: (r, D), B: (D, r), w: (2,) or (1,).

    Raises:
        ValueError: ``dim`` or ``rank`` below 1, an unknown ``init`` or ``bound``, a ``scale`` that is not positive
            and finite, or shapes that do not fit.
        TypeError: activations of whole numbers.

    Example:
        >>> residual = LAuReL_LR(64, rank=8)
        >>> x, fx = torch.randn(4, 10, 64), torch.randn(4, 10, 64)
        >>> torch.equal(residual(x, fx), x + fx)
        True
        >>> sum(p.numel() for p in residual.parameters())  # 2rD
        1024
    """

    def __init__(
        self,
        dim: int,
        rank: int = 16,
        *,
        residual_weights: bool = False,
        init: str = "xavier",
        norm: nn.Module | None = None,
        bound: str = "softmax",
        scale: float = 2.0,
        channel_dim: int = -1,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
        if bound not in BOUNDS:
            raise ValueError(f"bound must be one of {', '.join(BOUNDS)}, got {bound!r}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.dim, self.rank, self.residual_weights, self.init = dim, rank, residual_weights, init
        self.bound, self.scale, self.channel_dim, self.recompute = bound, scale, channel_dim, recompute
        self.A = nn.Parameter(torch.empty(rank, dim))
        self.B = nn.Parameter(torch.empty(dim, rank))
        self.w = nn.Parameter(torch.empty(1 if bound == "single" else 2)) if residual_weights else None
        self.register_buffer("folded_beta", None)
        self.norm = norm
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init == "xavier":
            nn.init.xavier_uniform_(self.A)
        else:
            # Made of A itself, so that a sharded A can be filled too.
            ones = torch.ones_like(self.A, dtype=torch.long)
            pattern = (ones.cumsum(-1) - ones.cumsum(-2)) % self.rank == 0  # (r, D): component i mod r, channel i
            with torch.no_grad():
                self.A.copy_(pattern / math.sqrt(self.rank * self.dim))
        nn.init.zeros_(self.B)
        if self.w is not None:
            nn.init.constant_(self.w, 1.0 if self.bound == "none" else 0.0)
        if self.folded_beta is not None:
            nn.init.ones_(self.folded_beta)

    def weights(self) -> tuple[Tensor | None, Tensor | None]:
        """α and β, bounded; None without residual weights, where both are fixed at 1. After `fold` α is None."""
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
        """α, the weight of the branch f(x); None without residual weights and after `fold`."""
        return self.weights()[0]

    @property
    def beta(self) -> Tensor | None:
        """β, the weight of x + B A x; None without residual weights."""
        return self.weights()[1]

    def add(self, y: Tensor, B: Tensor, u: Tensor) -> Tensor:
        """y + B u, for y with D at channel_dim and u of shape (…, r)."""
        y, B = y.movedim(self.channel_dim, -1), B.to(u.dtype)
        if y.is_contiguous() and y.dtype == u.dtype:  # in one pass over y; under autocast u may be of a lower dtype
            y = torch.addmm(y.reshape(-1, self.dim), u.reshape(-1, u.shape[-1]), B.T).view(y.shape)
        else:
            y = y + F.linear(u, B).to(y.dtype)
        return y.movedim(-1, self.channel_dim)

    def forward(self, x: Tensor, fx: Tensor) -> Tensor:
        if x.shape != fx.shape:
            raise ValueError(f"x and fx must have the same shape, got {tuple(x.shape)} and {tuple(fx.shape)}")
        if not -x.ndim <= self.channel_dim < x.ndim or x.shape[self.channel_dim] != self.dim:
            raise ValueError(f"x must have dim={self.dim} at channel_dim={self.channel_dim}, got {tuple(x.shape)}")
        if not (x.is_floating_point() or x.is_complex()):
            raise TypeError(f"x must be floating-point or complex numbers, got {x.dtype}")
        alpha, beta = self.weights()
        dtype = torch.promote_types(x.dtype, fx.dtype)
        u = F.linear(x.movedim(self.channel_dim, -1), self.A.to(x.dtype))  # A x, (…, r)
        if self.norm is not None:
            h = self.norm(F.linear(u, self.B.to(u.dtype)).movedim(-1, self.channel_dim))
            # A norm may return float32 where x and fx are bfloat16.
            return (x + fx + h if beta is None else weighted_sum(alpha, fx, beta, x + h)).to(dtype)
        if beta is None:
            return self.add(x + fx, self.B, u)
        # β is multiplied into B, which is smaller than x + B A x and need not be kept for the backward pass.
        if self.recompute and recoverable(alpha, beta, dtype):
            return Recompute.apply(alpha, self.add(fx.to(dtype), beta / alpha * self.B, u), beta, x)
        return self.add(weighted_sum(alpha, fx, beta, x), beta * self.B, u)

    def extra_repr(self) -> str:
        text = f"dim={self.dim}, rank={self.rank}, init={self.init!r}, channel_dim={self.channel_dim}"
        text += f", bound={self.bound!r}, scale={self.scale}" if self.residual_weights else ""
        text += ", recompute=True" if self.recompute else ""
        return text + (", folded" if self.folded_beta is not None else "")


@torch.no_grad()
def fold(block: LAuReL_LR, layer: nn.Module) -> None:
    """Moves α of a trained block into the layer that the branch ends in, so that it costs nothing at inference.

    Changes both in place: the layer's weight and bias are multiplied by α, and the block then computes
    f(x) + β · (x + B A x), with β a constant. The outputs stay the same, to rounding.

    Args:
        block: with α and β that were not folded before.
        layer: the last one of f, where it is linear, a convolution or a norm with a weight: Linear, Conv1d to 3d,
            BatchNorm1d to 3d, SyncBatchNorm, LayerNorm, GroupNorm, RMSNorm. It must belong to this branch alone, and
            its channels must be those of the block.

    Raises:
        TypeError: another kind of layer, such as an activation, through which α can't be moved, or a weight that is
            not the layer's own: sharded, quantised, pruned, parametrized. Fold first.
        ValueError: a block without α.

    Example:
        >>> f, residual, x = nn.Linear(64, 64), LAuReL_LR(64, residual_weights=True), torch.randn(8, 64)
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
        raise ValueError("block has no α: it has no residual weights, or was folded before")
    for p in params:
        p.mul_(alpha)
    block.w, block.folded_beta = None, beta.clone()


if __name__ == "__main__":
    f = nn.Linear(64, 64)
    for residual in (LAuReL_LR(64, rank=8), LAuReL_LR(64, rank=8, residual_weights=True)):
        x = torch.randn(8, 10, 64)
        y = residual(x, f(x))
        print(residual)
        print(f"  x {tuple(x.shape)} -> {tuple(y.shape)}, parameters {sum(p.numel() for p in residual.parameters())}")
        if residual.residual_weights:
            print(f"  alpha {residual.alpha:.3f}, beta {residual.beta:.3f}")
        print(f"  starts as x + f(x): {torch.equal(y, x + f(x))}")
