import importlib

import pytest
import torch
from block_properties import BlockProperties, D, bounded, randomize
from torch import nn

LAuReL_LR = importlib.import_module("LAuReL-LR").LAuReL_LR
R = 4
WEIGHTED = {"dim": D, "rank": R, "residual_weights": True}


class TestLAuReLLR(BlockProperties):
    module, name = "LAuReL-LR", "LAuReL_LR"
    variants = {
        "LR": ({"dim": D, "rank": R}, 2 * R * D),  # eq. 3
        "LR xavier": ({"dim": D, "rank": R, "init": "xavier"}, 2 * R * D),
        "LR rank 1": ({"dim": D, "rank": 1}, 2 * D),
        "LR rank above D": ({"dim": D, "rank": D + 2}, 2 * (D + 2) * D),
        "RW+LR": (WEIGHTED, 2 * R * D + 2),  # eq. 5
        "RW+LR scale 1": ({**WEIGHTED, "scale": 1.0}, 2 * R * D + 2),
        "RW+LR sigmoid": ({**WEIGHTED, "bound": "sigmoid"}, 2 * R * D + 2),
        "RW+LR single": ({**WEIGHTED, "bound": "single"}, 2 * R * D + 1),
        "RW+LR none": ({**WEIGHTED, "bound": "none"}, 2 * R * D + 2),
    }
    paths = ("LR", "RW+LR", "RW+LR single")
    errors = [
        ({"dim": 0}, "dim.*0"),
        ({"dim": D, "rank": 0}, "rank.*0"),
        ({"dim": D, "init": "zeros"}, "init.*xavier, orthogonal.*zeros"),
        ({"dim": D, "bound": "tanh"}, "bound.*softmax, sigmoid, single, none.*tanh"),
        ({"dim": D, "scale": -1.0}, "scale.*-1"),
        ({"dim": D, "norm": nn.RMSNorm}, r"norm.*RMSNorm\(6\).*RMSNorm"),
    ]

    def equation(self, state, options, xs, fx):
        g = xs[-1] + torch.einsum("dr,re,...e->...d", state["B"], state["A"], xs[-1])
        if not options.get("residual_weights"):
            return fx + g
        alpha, beta = bounded(state["w"], options.get("bound", "softmax"), options.get("scale", 2.0))
        return alpha * fx + beta * g


def test_xavier_fills_its_range():
    block = LAuReL_LR(512, rank=64, init="xavier")
    limit = (6 / (512 + 64)) ** 0.5
    assert 0.99 * limit < block.A.abs().max() <= limit
    assert abs(block.A.mean()) < 0.02 * limit
    assert (block.B == 0).all()


def test_orthogonal_init_has_the_papers_pattern():
    dim, rank = 10, 4
    A = LAuReL_LR(dim, rank, init="orthogonal").A
    for i in range(dim):
        for j in range(rank):
            assert A[j, i].item() == pytest.approx((rank * dim) ** -0.5 if i % rank == j else 0.0)
    gram = A @ A.T
    assert torch.equal(gram, gram.diag().diag())


@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_norm_is_applied_only_to_the_low_rank_path(channel_dim):
    """Gemma 3n's form: x + f(x) + RMSNorm(B A x); channels first with a norm that takes channels first."""
    norm = nn.RMSNorm(D, eps=1e-6) if channel_dim == -1 else nn.GroupNorm(1, D)
    block = LAuReL_LR(D, rank=R, norm=norm, channel_dim=channel_dim)
    x, fx = torch.randn(2, D, D), torch.randn(2, D, D)
    assert torch.equal(block(x, fx), x + fx)
    randomize(block)
    low_rank = torch.einsum("dr,re,...e->...d", block.B, block.A, x.movedim(channel_dim, -1)).movedim(-1, channel_dim)
    torch.testing.assert_close(block(x, fx), x + fx + norm(low_rank))


class Float32Norm(nn.Module):
    def forward(self, x):
        return nn.functional.rms_norm(x.float(), x.shape[-1:])


@pytest.mark.parametrize("residual_weights", [False, True])
def test_a_half_stream_with_a_norm_is_finite_where_the_sum_is(residual_weights):
    block = LAuReL_LR(D, rank=R, norm=nn.RMSNorm(D).half(), residual_weights=residual_weights)
    nn.init.ones_(block.A)
    x = torch.full((4, D), 30_000.0).half()
    assert torch.equal(block(x, x), x + x)


@pytest.mark.parametrize("residual_weights", [False, True])
def test_norm_in_float32_leaves_a_bfloat16_stream_bfloat16(residual_weights):
    block = randomize(LAuReL_LR(D, rank=R, norm=Float32Norm(), residual_weights=residual_weights))
    x = torch.randn(4, D, dtype=torch.bfloat16)
    assert block(x, x).dtype == torch.bfloat16


def test_without_residual_weights_there_are_none():
    block = LAuReL_LR(D)
    assert block.alpha is None
    assert block.beta is None
    assert set(block.state_dict()) == {"A", "B"}


def test_a_norm_runs_under_the_autocast_that_it_is_called_in():
    """A norm in float32 behind a half stream, which autocast makes fit."""
    block = LAuReL_LR(D, rank=R, norm=nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D)))
    x = torch.full((4, D), 30_000.0).half()
    with torch.autocast("cpu", torch.float16):
        assert block(x, x).isfinite().all()


def test_a_norm_gets_what_float16_does_not_hold():
    """B A x, under autocast."""
    block = LAuReL_LR(D, rank=R, norm=nn.RMSNorm(D))
    for p in (block.A, block.B):
        nn.init.constant_(p, 10.0)
    x = torch.full((4, D), 500.0).half()
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(block(x, x), 2 * x + 1)
