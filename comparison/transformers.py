"""Pre-norm transformers: a ViT for images and a GPT for bytes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comparison.data import resize, seeded
from comparison.folder import Data
from comparison.models import Model, Stage, start_at_zero


class Attention(nn.Module):
    """Self-attention with heads of 64 channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads(self.qkv(x), 64)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CausalAttention(nn.Module):
    """Self-attention under a causal mask, with normalised queries and keys and rotary positions (Su et al. 2021)."""

    def __init__(self, dim: int, head: int) -> None:
        super().__init__()
        self.head, self.qkv, self.out = head, nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads(self.qkv(x), self.head)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * 10000 ** (
            torch.arange(0, -self.head, -2, device=x.device) / self.head
        )
        cos, sin = angles.cos().to(v.dtype), angles.sin().to(v.dtype)  # (length, head / 2)
        q, k = (rotate(F.rms_norm(each, (self.head,)), cos, sin) for each in (q, k))
        return self.out(causal_attention(q, k, v).transpose(1, 2).flatten(2))


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √size + mask) v, of (N, heads, length, size)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # On a CPU that takes two to three times as long in bfloat16, forward and backward.
    mask = torch.full((q.shape[-2], k.shape[-2]), -torch.inf, dtype=q.dtype).triu(1)
    return torch.softmax((q / q.shape[-1] ** 0.5) @ k.mT + mask, dim=-1) @ v


def heads(qkv: Tensor, size: int) -> Tensor:
    """(N, length, 3D) to queries, keys and values (N, heads, length, size) each."""
    return qkv.unflatten(-1, (3, -1, size)).permute(2, 0, 3, 1, 4)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def mlp(dim: int, bias: bool) -> tuple[nn.Module, ...]:
    return nn.LayerNorm(dim, bias=bias), nn.Linear(dim, 4 * dim, bias), nn.GELU(), nn.Linear(4 * dim, dim, bias)


class ViT(nn.Module):
    """A pre-norm vision transformer (Dosovitskiy et al. 2021) for small images: D = 128, 6 layers, 2 heads.

    Patches of 4×4 pixels, about 16×16 of them in images above 64×64 pixels → linear, learned position → layers with two
    residual connections each, around attention and MLP → LayerNorm → mean over the patches → linear classifier. Smaller
    images than the data's take the means of the positions over areas. `deeper` has one more layer, at the end.
    """

    def __init__(self, model: Model, seed: int, data: Data) -> None:
        super().__init__()
        dim, layers = 128, 6
        self.patch = max(4, data.size // 16)
        grid = data.size // self.patch
        with seeded(seed):
            self.embedding = nn.Linear(3 * self.patch**2, dim)
            self.position = nn.Parameter(0.02 * torch.randn(dim, grid, grid))
            branches = [branch for _ in range(layers) for branch in self.layer(dim)]
            self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, data.classes))
        stage = Stage(nn.Identity(), branches, dim, model, 1000 * seed + 1, channel_dim=-1)
        self.stages = nn.ModuleList([stage])
        if model.base == "deeper":
            with seeded(1000 * seed + 999):
                stage.deepen(*self.layer(dim))

    @staticmethod
    def layer(dim: int) -> tuple[nn.Sequential, nn.Sequential]:
        return nn.Sequential(nn.LayerNorm(dim), Attention(dim)), nn.Sequential(*mlp(dim, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        position = resize(self.position, x.shape[-1] // self.patch).flatten(1)  # (D, patches)
        patches = F.unfold(x, self.patch, stride=self.patch)  # (N, 3 · patch², patches)
        x = self.embedding(patches.transpose(1, 2)) + position.T
        return self.head(self.stages[0](x).mean(dim=1))


class GPT(nn.Module):
    """A pre-norm transformer for bytes, (N, length) → logits (N, length, 256): D = 128, 12 layers, 2 heads.

    Embedding → layers with two residual connections each, around attention and around LayerNorm, linear D → 4D, GELU,
    linear 4D → D → LayerNorm → linear, without biases. Every f starts at zero, as its last projection does (nanochat,
    modded-nanogpt), but for ReZero's. The logits hardly add to the costs that the residual connections are compared
    with. `deeper` has one more layer, at the end.
    """

    vocabulary = 256

    def __init__(
        self, model: Model, seed: int, data: Data | None = None, dim: int = 128, layers: int = 12, head: int = 64
    ) -> None:
        super().__init__()
        with seeded(seed):
            self.embedding = nn.Embedding(self.vocabulary, dim)
            branches = [branch for _ in range(layers) for branch in self.layer(dim, head)]
            self.head = nn.Sequential(nn.LayerNorm(dim, bias=False), nn.Linear(dim, self.vocabulary, bias=False))
        if model.base != "rezero":  # whose α = 0 would get no gradient from an f that is zero
            for branch in branches:
                start_at_zero(branch)
        stage = Stage(nn.Identity(), branches, dim, model, 1000 * seed + 1, channel_dim=-1, rank=32)
        self.stages = nn.ModuleList([stage])
        if model.base == "deeper":
            with seeded(1000 * seed + 999):
                stage.deepen(*self.layer(dim, head))

    @staticmethod
    def layer(dim: int, head: int) -> tuple[nn.Sequential, nn.Sequential]:
        attention = nn.Sequential(nn.LayerNorm(dim, bias=False), CausalAttention(dim, head))
        return attention, nn.Sequential(*mlp(dim, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.stages[0](self.embedding(tokens)))
