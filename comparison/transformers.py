"""Pre-norm transformers: a ViT for images and a GPT for bytes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comparison.data import resize, seeded
from comparison.folder import Data
from comparison.models import Model, Stage


class Attention(nn.Module):
    """Self-attention with heads of 64 channels."""

    def __init__(self, dim: int, causal: bool) -> None:
        super().__init__()
        self.causal, self.qkv, self.out = causal, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)  # (N, heads, length, 64) each
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


def transformer_layer(dim: int, causal: bool) -> tuple[nn.Sequential, nn.Sequential]:
    """The two branches of a pre-norm layer: LayerNorm, attention; LayerNorm, linear D → 4D, GELU, linear 4D → D."""
    mlp = (nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
    return nn.Sequential(nn.LayerNorm(dim), Attention(dim, causal)), nn.Sequential(nn.LayerNorm(dim), *mlp)


class ViT(nn.Module):
    """A pre-norm vision transformer (Dosovitskiy et al. 2021) for small images: D = 128, 6 layers, 2 heads.

    Patches of 4×4 pixels, about 16×16 of them in images above 64×64 pixels → linear, learned position → layers with two
    residual connections each, around attention and MLP → LayerNorm → mean over the patches → linear classifier. Smaller
    images than the data's take the means of the positions over areas. `deeper` has one more layer, at the end.
    """

    def __init__(self, model: Model, seed: int, data: Data, dim: int = 128, layers: int = 6) -> None:
        super().__init__()
        self.patch = max(4, data.size // 16)
        grid = data.size // self.patch
        with seeded(seed):
            self.embedding = nn.Linear(3 * self.patch**2, dim)
            self.position = nn.Parameter(0.02 * torch.randn(dim, grid, grid))
            branches = [branch for _ in range(layers) for branch in transformer_layer(dim, causal=False)]
            self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, data.classes))
        stage = Stage(nn.Identity(), branches, dim, model, 1000 * seed + 1, channel_dim=-1)
        self.stages = nn.ModuleList([stage])
        if model.base == "deeper":
            with seeded(1000 * seed + 999):
                stage.deepen(*transformer_layer(dim, causal=False))

    def forward(self, x: Tensor) -> Tensor:
        position = resize(self.position, x.shape[-1] // self.patch).flatten(1)  # (D, patches)
        patches = F.unfold(x, self.patch, stride=self.patch)  # (N, 3 · patch², patches)
        x = self.embedding(patches.transpose(1, 2)) + position.T
        return self.head(self.stages[0](x).mean(dim=1))


class GPT(nn.Module):
    """A pre-norm transformer (N, length) → (N, length, 256 logits), whose costs `--profile` sets beside table 5's.

    Each layer has two residual connections, around attention with a causal mask and around the MLP. The vocabulary is
    that of bytes, so that embedding and logits hardly add to the costs that the residual connections are compared with.
    `deeper` has one more layer.
    """

    vocabulary = 256

    def __init__(self, model: Model, dim: int, layers: int, length: int) -> None:
        super().__init__()
        with seeded(0):
            self.embedding = nn.Embedding(self.vocabulary, dim)
            self.position = nn.Parameter(0.02 * torch.randn(length, dim))
            branches = [branch for _ in range(layers) for branch in transformer_layer(dim, causal=True)]
            self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, self.vocabulary, bias=False))
        options = {"channel_dim": -1, "rank": 32, "pa_rank": None}
        stage = Stage(nn.Identity(), branches, dim, model, seed=1, **options)
        self.stages = nn.ModuleList([stage])
        if model.base == "deeper":
            with seeded(999):
                stage.deepen(*transformer_layer(dim, causal=True))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.stages[0](self.embedding(tokens) + self.position[: tokens.shape[-1]]))
