import importlib
import inspect
import itertools

import pytest
import torch
from block_properties import BlockProperties, D, bounded, randomize
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

LAuReL_PA = importlib.import_module("LAuReL-PA").LAuReL_PA
R, K = 4, 3
BASE = {"dim": D, "k": K, "rank": R}
WEIGHTED = {**BASE, "residual_weights": True}


class TestLAuReLPA(BlockProperties):
    module, name = "LAuReL-PA", "LAuReL_PA"
    takes_history = True
    variants = {
        "PA": (BASE, 2 * R * D + K),  # eq. 4
        "PA xavier": ({**BASE, "init": "xavier"}, 2 * R * D + K),
        "PA rank above D": ({**BASE, "rank": D + 2}, 2 * (D + 2) * D + K),
        "PA k = 1": ({**BASE, "k": 1}, 2 * R * D + 1),
        "PA k = 2": ({**BASE, "k": 2}, 2 * R * D + 2),
        "PA identity": ({**BASE, "rank": None}, K),
        "PA not shared": ({**BASE, "shared": False}, 2 * R * K * D + K),
        "RW+PA": (WEIGHTED, 2 * R * D + K + 2),  # §2.4
        "RW+PA identity": ({**WEIGHTED, "rank": None}, K + 2),
        "RW+PA scale 1": ({**WEIGHTED, "scale": 1.0}, 2 * R * D + K + 2),
        "RW+PA sigmoid": ({**WEIGHTED, "bound": "sigmoid"}, 2 * R * D + K + 2),
        "RW+PA single": ({**WEIGHTED, "bound": "single"}, 2 * R * D + K + 1),
        "RW+PA none": ({**WEIGHTED, "bound": "none"}, 2 * R * D + K + 2),
        "RW+LR+PA": ({**WEIGHTED, "shared": False}, 2 * R * K * D + K + 2),  # eq. 6
    }
    paths = ("PA", "PA identity", "PA not shared", "RW+PA", "RW+PA identity", "RW+LR+PA")
    errors = [
        ({"dim": 0}, "dim.*0"),
        ({"dim": D, "k": 0}, "k.*0"),
        ({"dim": D, "rank": 0}, "rank.*None.*0"),
        ({"dim": D, "init": "zeros"}, "init.*xavier, orthogonal.*zeros"),
        ({"dim": D, "bound": "tanh"}, "bound.*softmax, sigmoid, single, none.*tanh"),
        ({"dim": D, "scale": float("inf")}, "scale.*inf"),
    ]

    def equation(self, state, options, xs, fx):
        g = xs[-1].clone()
        for j in range(min(options["k"], len(xs))):
            x = xs[len(xs) - 1 - j]  # x_{i-j}
            if options["rank"] is None:
                h = x
            elif options.get("shared", True):
                h = torch.einsum("dr,re,...e->...d", state["B"], state["A"], x)
            else:
                h = torch.einsum("dr,re,...e->...d", state["B"][j], state["A"][j], x)
            mean = 1 if options["rank"] is None else 1 / options["k"]
            g = g + mean * state["gamma"][j] * h
        if not options.get("residual_weights"):
            return fx + g
        alpha, beta = bounded(state["w"], options.get("bound", "softmax"), options.get("scale", 2.0))
        return alpha * fx + beta * g

    @pytest.mark.parametrize("n", [1, 2, 3, 4])
    def test_takes_as_many_activations_as_there_are_and_leaves_the_list_as_it_was(self, path, n):
        block = randomize(self.make(path)).double()
        xs, fx = self.inputs((4, D), torch.float64)
        expected = self.expected(block, path, xs[:n], fx)
        before = [x.clone() for x in xs[:n]]
        for history in (xs[:n], tuple(xs[:n])):
            torch.testing.assert_close(block(history, fx).detach(), expected, rtol=1e-12, atol=1e-12)
            assert len(history) == n
            assert all(torch.equal(x, y) for x, y in zip(history, before))


def test_looks_only_at_the_last_k():
    block = randomize(LAuReL_PA(D, k=2, rank=R))
    xs = [torch.randn(4, D) for _ in range(5)]
    expected = block(xs[-2:], xs[0])
    assert torch.equal(block(xs, xs[0]), expected)
    xs[-3] = torch.zeros(1)
    assert torch.equal(block(xs, torch.zeros(4, D)), block(xs[-2:], torch.zeros(4, D)))


def test_floating_point_operations_grow_by_one_narrow_product_an_activation():
    """2rD operations a position for A and each activation, and for each B: k + 1 times where B is shared, else 2k."""
    x = torch.randn(8, D)
    for k, shared in itertools.product((1, 4), (True, False)):
        with FlopCounterMode(display=False) as counter:
            LAuReL_PA(D, k=k, rank=R, shared=shared)([x] * 4, x)
        assert counter.get_total_flops() == 2 * 8 * R * D * (k + 1 if shared else 2 * k)


@pytest.mark.parametrize("shared", [True, False])
def test_orthogonal_init_has_the_papers_pattern(shared):
    dim, rank = 10, 4
    block = LAuReL_PA(dim, 3, rank, shared=shared, init="orthogonal")
    for A in [block.A] if shared else block.A:
        for i in range(dim):
            for j in range(rank):
                assert A[j, i].item() == pytest.approx((rank * dim) ** -0.5 if i % rank == j else 0.0)


@pytest.mark.parametrize("shared", [True, False])
def test_xavier_fills_its_range(shared):
    block = LAuReL_PA(512, 3, 64, shared=shared, init="xavier")
    limit = (6 / (512 + 64)) ** 0.5
    assert 0.99 * limit < block.A.abs().max() <= limit
    assert (block.B == 0).all()
    assert (block.gamma == 1).all()
    assert (LAuReL_PA(512, 3, None).gamma == 0).all()


def test_refuses_a_history_that_does_not_fit():
    block = LAuReL_PA(D, rank=R)
    x = torch.zeros(4, D)
    with pytest.raises(ValueError, match=r"xs.*at least one.*none"):
        block([], x)
    with pytest.raises(ValueError, match=r"xs.*list.*Tensor"):
        block(x, x)
    with pytest.raises(ValueError, match=r"same shape.*\(2, 6\).*\(4, 6\).*new list"):
        block([torch.zeros(2, D), x], x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.residual = nn.Linear(D, D), LAuReL_PA(D, 3, R)

    def forward(self, xs: list[torch.Tensor]) -> torch.Tensor:
        return self.residual(xs, self.f(xs[-1]))


def test_layers_that_take_slices_are_compiled_once_for_each_length():
    torch.compiler.reset()
    layers, xs, graphs = [Layer() for _ in range(12)], [torch.randn(4, D, requires_grad=True)], []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    for layer in layers:
        layer.compile(fullgraph=True, backend=backend)
        xs.append(layer(xs[-3:]))
    assert len(graphs) == 3


def test_earlier_activations_in_float32_leave_a_bfloat16_stream_bfloat16():
    for rank in (None, R):
        block = randomize(LAuReL_PA(D, rank=rank))
        xs = [torch.randn(4, D), torch.randn(4, D, dtype=torch.bfloat16)]
        assert block(xs, xs[-1]).dtype == torch.bfloat16


def test_the_text_that_the_files_share_is_the_same():
    """Each file stands alone, so that the weighted sum stands in all three; none may go its own way."""
    modules = [importlib.import_module(name) for name in ("LAuReL", "LAuReL-LR", "LAuReL-PA")]
    assert len({inspect.getsource(module.bounded) for module in modules}) == 1
    assert inspect.getsource(modules[1].product) == inspect.getsource(modules[2].product)
    assert inspect.getsource(modules[1].LAuReL_LR.weights) == inspect.getsource(modules[2].LAuReL_PA.weights)


def test_a_bfloat16_stream_takes_a_gamma_that_bfloat16_has_not():
    block, zero, x = LAuReL_PA(16, rank=None), torch.zeros(64, 16).bfloat16(), torch.randn(64, 16).bfloat16()
    torch.nn.init.constant_(block.gamma, 1.003)
    assert torch.equal(block([x, zero], zero), (x.double() * block.gamma[1].double()).bfloat16())
