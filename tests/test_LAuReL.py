import itertools

import numpy as np
import pytest
import torch
from block_properties import BlockProperties, D, bounded

from LAuReL import LAuReL


class TestLAuReL(BlockProperties):
    module = name = "LAuReL"
    variants = {
        f"dim={dim}, {bound}, scale={scale}": (
            {"dim": dim, "bound": bound, "scale": scale},
            (1 if bound == "single" else 2) * (dim or 1),  # §2.1, §2.4
        )
        for dim, bound, scale in itertools.product((None, D), ("softmax", "sigmoid", "single", "none"), (2.0, 1.0))
    }
    variants |= {
        f"dim={dim}, {bound}, recompute": (
            {"dim": dim, "bound": bound, "scale": 2.0, "recompute": True},
            2 * (dim or 1),
        )
        for dim, bound in itertools.product((None, D), ("softmax", "none"))
    }
    starts_plain = {name: options for name, (options, _) in variants.items() if options["scale"] == 2.0}
    errors = [
        ({"dim": 0}, "dim.*0"),
        ({"bound": "tanh"}, "bound.*softmax, sigmoid, single, none.*tanh"),
        ({"scale": 0.0}, "scale.*0"),
        ({"scale": float("nan")}, "scale.*nan"),
    ]

    def equation(self, state, options, xs, fx):
        alpha, beta = bounded(state["w"], options["bound"], options["scale"])
        return alpha * fx + beta * xs[-1]


@pytest.mark.parametrize("bound", ["softmax", "sigmoid", "single"])
def test_weights_stay_bounded_whatever_w_is(bound):
    block = LAuReL(dim=D, bound=bound, scale=2.0)
    with torch.no_grad():
        block.w.copy_(1000 * torch.randn(block.w.shape))
    for weight in (block.alpha, block.beta):
        assert ((weight >= 0) & (weight <= 2)).all()
    if bound != "sigmoid":
        torch.testing.assert_close(block.alpha + block.beta, torch.full((D,), 2.0))


@pytest.mark.parametrize("bound", ["softmax", "sigmoid", "single"])
def test_scale_one_starts_at_one_half(bound):
    x, fx = torch.randn(4, D), torch.randn(4, D)
    assert torch.equal(LAuReL(bound=bound, scale=1.0)(x, fx), 0.5 * fx + 0.5 * x)


def test_scalar_weights_take_any_shape():
    for shape in [(), (3,), (2, 0), (2, 3, 4)]:
        assert LAuReL()(torch.ones(shape), torch.ones(shape)).shape == shape


def test_alpha_weighs_the_branch_and_beta_the_input():
    block = LAuReL(bound="none")
    with torch.no_grad():
        block.w.copy_(torch.tensor([3.0, 5.0]))
    assert block.alpha == 3
    assert block.beta == 5
    np.testing.assert_array_equal(block(torch.zeros(2), torch.ones(2)).detach(), [3, 3])
