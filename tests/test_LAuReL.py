import itertools

import numpy as np
import pytest
import torch
from block_properties import BlockProperties, D, bounded

from LAuReL import LAuReL, fold


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


def gradient_of_w(block: LAuReL, x: torch.Tensor, fx: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(block(x, fx), block.w, grad)[0]


def test_recomputing_loses_nothing_where_x_is_coarser_than_fx():
    x, fx, grad = (30 * torch.randn(512, 64)).bfloat16(), torch.randn(512, 64), torch.randn(512, 64)
    blocks = [LAuReL(bound="none", recompute=recompute) for recompute in (False, True)]
    kept, recomputed = (gradient_of_w(block, x, fx, grad) for block in blocks)
    torch.testing.assert_close(recomputed, kept, rtol=1e-3, atol=0.01)


@pytest.mark.parametrize("dim", [None, D])
def test_weights_of_zero_have_gradients(dim):
    """A pruned channel: nothing can be had back from an output of zero, so f(x) is kept."""
    block = LAuReL(dim=dim, bound="none", recompute=True)
    torch.nn.init.zeros_(block.w)
    x, fx, grad = torch.randn(3, 4, D)
    torch.testing.assert_close(
        gradient_of_w(block, x, fx, grad).view(2, -1).sum(1), torch.stack([fx, x]).mul(grad).sum((1, 2))
    )


@pytest.mark.parametrize("dim", [None, D])
def test_complex_numbers_have_the_gradients_of_the_obvious_form(dim):
    block = LAuReL(dim=dim, bound="none")
    x, fx, grad = torch.randn(3, 4, D, dtype=torch.complex64)
    plain = torch.autograd.grad(block.w[0] * fx + block.w[1] * x, block.w, grad)[0]
    torch.testing.assert_close(gradient_of_w(block, x, fx, grad), plain)


def test_a_single_number_keeps_its_dtype():
    one = torch.tensor(1.0, dtype=torch.bfloat16)
    assert LAuReL()(one, one).dtype == torch.bfloat16


def test_gradients_can_be_taken_in_batches():
    x, fx = torch.randn(2, 4, D)
    jacobian = torch.autograd.functional.jacobian(lambda fx: LAuReL()(x, fx), fx, vectorize=True)
    torch.testing.assert_close(jacobian.view(4 * D, 4 * D), torch.eye(4 * D))


def test_folding_weights_for_each_channel_asks_for_a_layer_with_these_channels():
    block, layer = LAuReL(dim=D), torch.nn.Linear(D, 2 * D)
    with pytest.raises(ValueError, match=f"dim={D}.*out_features={2 * D}"):
        fold(block, layer)
    assert block.alpha is not None
