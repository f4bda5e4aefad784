"""LAuReL-PA, the residual connection with learned weights on the previous activations:

    x_{i+1} = f(x_i) + x_i + Σ_{j=0..k-1} γ_j h(x_{i-j})                  §2.3, eq. 4, h(x) = B A x, or x itself
    x_{i+1} = α · f(x_i) + β · (x_i + Σ γ_j h(x_{i-j}))      RW+PA,       §2.4
    x_{i+1} = α · f(x_i) + β · (x_i + Σ γ_j B_j A_j x_{i-j})  RW+LR+PA,   eq. 6, where the paper prints A B

An unofficial implementation (MIT licence) of Menghani, Kumar, Kumar, "LAuReL: Learned Augmented Residual Layer",
ICML 2025 (arXiv 2411.07501). This file needs torch alone: copy it into your project and replace one line.

    LAuReL_PA = importlib.import_module("LAuReL-PA").LAuReL_PA     # or give the file a name without a hyphen

    x = x + self.f(x)                                # before
    xs.append(self.residual(xs, self.f(xs[-1])))     # after, with xs = [x_0, …, x_i] and
                                                     # self.residual = LAuReL_PA(D), or LAuReL_PA(D, channel_dim=1)
"""

import math
from collections.abc import Sequence

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


class LAuReL_PA(nn.Module):
    r"""Adds a branch, its input and the last k activations: f(x_i) + x_i + Σ γ_j h(x_{i-j}) (LAuReL-PA, §2.3, eq. 4).

    The sum runs over j = 0 … k−1, so x_i itself is in it. The block keeps nothing between calls: the caller owns the
    list of activations, and the block looks at its last k, or at as many as there are. Start a new list where the
    shape changes (a down-sampling stage); the paper leaves open how PA crosses one. Two cases need a copy:

    - ``checkpoint(residual, tuple(xs), fx, use_reentrant=False)``: activation checkpointing calls the block again
      when a list that it was given has grown, and would compute other values, and gradients, without an error.
    - ``residual(xs[-k:], fx)`` where blocks are compiled one by one: each length of a list is compiled anew.

    ================================================ ============================ ================
    options                                          equation                     new parameters
    ================================================ ============================ ================
    default                                          eq. 4, h(x) = B A x          2rD + k
    ``rank=None``                                    eq. 4, h(x) = x              k
    ``residual_weights=True``                        §2.4, RW+PA                  2rD + k + 2
    ``residual_weights=True, shared=False``          eq. 6, RW+LR+PA              2rkD + k + 2
    ================================================ ============================ ================

    The 2 are those of ``w``, 1 for ``bound="single"``. The paper leaves weight decay on the new parameters open: keep
    it off ``gamma``, which it draws to 0, and off ``w``, which it draws to scale / 2, or to 0 for ``bound="none"``.

    The paper leaves open where γ starts. B starts at zero and γ at 1; with the identity h, γ starts at 0. Either way
    the block with default options starts as the plain residual, to the last bit.

    Args:
        dim: D, the size of the channel dimension.
        k: how many activations to look at; the paper has 3.
        rank: r. ``None``: h is the identity.
        shared: one pair A, B for all k activations (§2.3), or one for each (eq. 6). Without effect for ``rank=None``.
        residual_weights: learn α and β too.
        init: how A starts. ``"xavier"``: uniform within ±√(6 / (r + D)), as the paper has it on ResNet-50.
            ``"orthogonal"``: the paper's column-orthogonal pattern for LLMs, 1/√(rD) where channel i meets component
            i mod r, else 0. Written for A of shape (r, D), that is A[i mod r, i]: every channel is used. Without
            effect for ``rank=None``.
        bound: how ``w`` becomes α and β: ``"softmax"``: scale · softmax(w); ``"sigmoid"``: scale · σ(w), each on its
            own; ``"single"``: one parameter, α = scale · σ(w), β = scale − α; ``"none"``: w itself. All start at
            scale / 2, and ``"none"`` at 1. The paper leaves the start open; ``scale=2`` is the plain residual.
        scale: the factor above. Without effect for ``bound="none"``, as both are without ``residual_weights``.
        channel_dim: where D stands: -1 for (…, D), 1 for (N, D, H, W).
        recompute: with α and β, keep the output for the backward pass, which has f(x) back from it, in place of f(x).
            Saves memory where the next layer keeps its input anyway, as in a pre-norm model; the output must not be
            changed in place then. f(x) is kept all the same in half precision, and where |α| ≤ |β| / 8, for
            ``rank=None`` |β| (1 + Σ|γ|) / 8, which would multiply rounding errors; this is looked up at each call, for
            which a GPU has to be waited for. Without effect where a compiler chooses what is kept.

    Shape:
        - xs: a list or tuple of activations x_0, …, x_i, oldest first, not empty. The last k and f(x_i) have the same
          shape, with size D at ``channel_dim``.
        - Output: that shape, with the dtype of ``x_i + f(x_i)``.
        - gamma: (k,), gamma[j] belonging to x_{i-j}. A: (r, D), B: (D, r), or (k, r, D) and (k, D, r) where not shared.
          w: (2,) or (1,).

    Raises:
        ValueError: ``dim``, ``k`` or ``rank`` below 1, an unknown ``init`` or ``bound``, a ``scale`` that is not
            positive and finite, ``xs`` that is empty or no list, or shapes that do not fit.
        TypeError: activations of whole numbers.

    Example:
        >>> residual = LAuReL_PA(64, k=3, rank=8)
        >>> f = nn.Linear(64, 64)
        >>> xs = [torch.randn(4, 10, 64)]
        >>> for _ in range(3):
        ...     xs.append(residual(xs, f(xs[-1])))
        >>> torch.equal(xs[-1], xs[-2] + f(xs[-2]))
        True
        >>> sum(p.numel() for p in residual.parameters())  # 2rD + k
        1027
    """

    def __init__(
        self,
        dim: int,
        k: int = 3,
        rank: int | None = 16,
        *,
        shared: bool = True,
        residual_weights: bool = False,
        init: str = "xavier",
        bound: str = "softmax",
        scale: float = 2.0,
        channel_dim: int = -1,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be at least 1, or None for the identity, got {rank}")
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
        if bound not in BOUNDS:
            raise ValueError(f"bound must be one of {', '.join(BOUNDS)}, got {bound!r}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.dim, self.k, self.rank, self.shared, self.residual_weights = dim, k, rank, shared, residual_weights
        self.init, self.bound, self.scale, self.channel_dim, self.recompute = init, bound, scale, channel_dim, recompute
        self.gamma = nn.Parameter(torch.empty(k))
        pairs = () if shared else (k,)
        self.A = None if rank is None else nn.Parameter(torch.empty(*pairs, rank, dim))
        self.B = None if rank is None else nn.Parameter(torch.empty(*pairs, dim, rank))
        self.w = nn.Parameter(torch.empty(1 if bound == "single" else 2)) if residual_weights else None
        self.register_buffer("folded_beta", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, 0.0 if self.rank is None else 1.0)
        if self.rank is not None:
            if self.init == "xavier":
                limit = math.sqrt(6 / (self.rank + self.dim))  # xavier_uniform_ takes a leading k for a filter size
                nn.init.uniform_(self.A, -limit, limit)
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
        """α, the weight of the branch f(x_i); None without residual weights and after `fold`."""
        return self.weights()[0]

    @property
    def beta(self) -> Tensor | None:
        """β, the weight of x_i + Σ γ_j h(x_{i-j}); None without residual weights."""
        return self.weights()[1]

    def add(self, y: Tensor, B: Tensor, u: Tensor) -> Tensor:
        """y + B u, for y with D at channel_dim and u of shape (…, r)."""
        y, B = y.movedim(self.channel_dim, -1), B.to(u.dtype)
        if y.is_contiguous() and y.dtype == u.dtype:  # in one pass over y; under autocast u may be of a lower dtype
            y = torch.addmm(y.reshape(-1, self.dim), u.reshape(-1, u.shape[-1]), B.T).view(y.shape)
        else:
            y = y + F.linear(u, B).to(y.dtype)
        return y.movedim(-1, self.channel_dim)

    def forward(self, xs: Sequence[Tensor], fx: Tensor) -> Tensor:
        if not isinstance(xs, (list, tuple)) or len(xs) == 0:
            got = "none" if isinstance(xs, (list, tuple)) else f"a {type(xs).__name__}"
            raise ValueError(f"xs must be a list or tuple of at least one activation, got {got}")
        xs = xs[-self.k :][::-1]  # x_i, x_{i-1}, …
        x = xs[0]
        if any(each.shape != fx.shape for each in xs):
            shapes = [tuple(each.shape) for each in reversed(xs)]
            raise ValueError(
                f"the activations in xs and fx must have the same shape, got {shapes} and {tuple(fx.shape)}; "
                "start a new list where the shape changes"
            )
        if not -x.ndim <= self.channel_dim < x.ndim or x.shape[self.channel_dim] != self.dim:
            raise ValueError(f"xs must have dim={self.dim} at channel_dim={self.channel_dim}, got {tuple(x.shape)}")
        if not (x.is_floating_point() or x.is_complex()):
            raise TypeError(f"the activations must be floating-point or complex numbers, got {x.dtype}")
        alpha, beta = self.weights()
        dtype = torch.promote_types(x.dtype, fx.dtype)
        gamma = self.gamma[: len(xs)]
        recompute = self.recompute and self.w is not None
        if recompute:
            recompute = recoverable(alpha, beta if self.rank is not None else beta * (1 + gamma.abs().sum()), dtype)
        factor = 1 if beta is None else beta / alpha if recompute else beta
        if self.rank is None:  # x_i + Σ γ_j x_{i-j} = (1 + γ_0) x_i + γ_1 x_{i-1} + …
            if beta is None:
                y = add_scaled(fx, 1 + gamma[0], x)
            else:
                y = fx if recompute else weighted_sum(alpha, fx, beta * (1 + gamma[0]), x)
            for weight, each in zip((factor * gamma).unbind()[1:], xs[1:]):
                y = add_scaled(y, weight, each)
            y = y.to(dtype)  # an earlier activation may be float32 where x_i and f(x_i) are bfloat16
            return Recompute.apply(alpha, y, beta * (1 + gamma[0]), x) if recompute else y

        # γ and β are multiplied into what is small, A x and B: no weighted activation is kept for the backward pass.
        A = [self.A] * len(xs) if self.shared else self.A[: len(xs)]
        us = [F.linear(each.movedim(self.channel_dim, -1), a.to(each.dtype)) for each, a in zip(xs, A)]  # (…, r) each
        if self.shared:
            u = gamma[0] * us[0]  # (…, r)
            for weight, each in zip(gamma.unbind()[1:], us[1:]):
                u = add_scaled(u, weight, each)
            B = factor * self.B
        else:
            u = torch.cat(us, dim=-1)  # (…, kr)
            B = ((factor * gamma)[:, None, None] * self.B[: len(xs)]).movedim(0, 1).flatten(1)  # (D, kr)
        if beta is None:
            return self.add(x + fx, B, u)
        if recompute:
            return Recompute.apply(alpha, self.add(fx.to(dtype), B, u), beta, x)
        return self.add(weighted_sum(alpha, fx, beta, x), B, u)

    def extra_repr(self) -> str:
        text = f"dim={self.dim}, k={self.k}, rank={self.rank}"
        if self.rank is not None:
            text += f", shared={self.shared}, init={self.init!r}"
        if self.residual_weights:
            text += f", bound={self.bound!r}, scale={self.scale}"
        text += f", channel_dim={self.channel_dim}" + (", recompute=True" if self.recompute else "")
        return text + (", folded" if self.folded_beta is not None else "")


@torch.no_grad()
def fold(block: LAuReL_PA, layer: nn.Module) -> None:
    """Moves α of a trained block into the layer that the branch ends in, so that it costs nothing at inference.

    Changes both in place: the layer's weight and bias are multiplied by α, and the block then computes
    f(x_i) + β · (x_i + Σ γ_j h(x_{i-j})), with β a constant. The outputs stay the same, to rounding.

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
        >>> f, residual, xs = nn.Linear(64, 64), LAuReL_PA(64, residual_weights=True), [torch.randn(8, 64)]
        >>> _ = nn.init.normal_(residual.w)
        >>> before = residual(xs, f(xs[-1]))
        >>> fold(residual, f)
        >>> torch.allclose(residual(xs, f(xs[-1])), before, atol=1e-5)
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
    for options in ({}, {"rank": None}, {"residual_weights": True, "shared": False}):
        residual = LAuReL_PA(64, **options)
        xs = [torch.randn(8, 10, 64)]
        for _ in range(3):
            xs.append(residual(xs, f(xs[-1])))
        print(residual)
        print(f"  {len(xs)} activations of {tuple(xs[-1].shape)}", end=", ")
        print(f"parameters {sum(p.numel() for p in residual.parameters())}")
        if residual.residual_weights:
            print(f"  alpha {residual.alpha:.3f}, beta {residual.beta:.3f}")
        print(f"  gamma {residual.gamma.tolist()}")
        print(f"  starts as x + f(x): {torch.equal(xs[-1], xs[-2] + f(xs[-2]))}")
