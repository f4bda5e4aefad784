import itertools

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
        if bound != "none" or scale == 2.0  # which it ignores
    }
    paths = ("dim=None, softmax, scale=2.0", "dim=6, softmax, scale=2.0", "dim=6, single, scale=2.0")
    errors = [
        ({"dim": 0}, "dim.*0"),
        ({"bound": "tanh"}, "bound.*softmax, sigmoid, single, none.*tanh"),
        ({"scale": 0.0}, "scale.*0"),
        ({"scale": float("nan")}, "scale.*nan"),
    ]

    def equation(self, state, options, xs, fx):
        w = state["w"] if options["dim"] is None else state["w"].reshape(-1, D)
        alpha, beta = bounded(w, options["bound"], options["scale"])
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


def test_scalar_weights_take_any_shape():
    for shape in [(), (3,), (2, 0), (2, 3, 4)]:
        assert LAuReL()(torch.ones(shape), torch.ones(shape)).shape == shape


def test_complex_numbers_have_the_gradients_of_the_obvious_form():
    block = LAuReL(bound="none")
    x, fx, grad = torch.randn(3, 4, D, dtype=torch.complex64)
    plain, ours = (torch.autograd.grad(y, block.w, grad)[0] for y in (block.w[0] * fx + block.w[1] * x, block(x, fx)))
    torch.testing.assert_close(ours, plain)


def test_a_single_number_keeps_its_dtype():
    one = torch.tensor(1.0, dtype=torch.bfloat16)
    assert LAuReL()(one, one).dtype == torch.bfloat16
