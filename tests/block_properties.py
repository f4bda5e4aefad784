"""The properties that all blocks share. test_LAuReL*.py name the options of each block and its equation."""

import copy
import importlib
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_gpu import gpu_autocast
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LAuReL_PA = importlib.import_module("LAuReL-PA").LAuReL_PA
ROOT = Path(__file__).parents[1]
D = 6
SHAPES = {  # shape and channel_dim
    "2d": ((5, D), -1),
    "3d": ((2, 5, D), -1),
    "3d channels first": ((2, D, 5), 1),
    "4d channels first": ((2, D, 3, 4), 1),
    "5d channels first": ((2, D, 2, 3, 4), 1),
    "4d channels first, counted from the end": ((2, D, 3, 4), -3),
}
BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def bounded(w: Tensor, bound: str, scale: float) -> tuple[Tensor, Tensor]:
    """α and β by the table of the docstrings."""
    if bound == "softmax":
        e = w.exp()
        return scale * e[0] / (e[0] + e[1]), scale * e[1] / (e[0] + e[1])
    if bound == "sigmoid":
        return scale / (1 + (-w[0]).exp()), scale / (1 + (-w[1]).exp())
    if bound == "single":
        alpha = scale / (1 + (-w[0]).exp())
        return alpha, scale - alpha
    return w[0], w[1]


def randomize(block: nn.Module) -> nn.Module:
    """Away from the start, where B is zero and α and β are one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return block


class Layers(nn.Module):
    """A residual layer around each f, with a history where the block takes one; as a user has it in a model."""

    def __init__(self, branches, make) -> None:
        super().__init__()
        self.branches, self.residuals = nn.ModuleList(branches), nn.ModuleList(make() for _ in branches)

    def forward(self, x: Tensor) -> Tensor:
        xs = [x]
        for f, residual in zip(self.branches, self.residuals):
            xs.append(residual(xs if isinstance(residual, LAuReL_PA) else xs[-1], f(xs[-1])))
        return xs[-1]


class BlockProperties:
    module: str  # the file's name without .py
    name: str  # the class's name
    variants: dict[str, tuple[dict, int]]  # options, and the number of parameters by the paper
    paths: tuple[str, ...]  # the variants that take different ways through forward
    errors: list[tuple[dict, str]]  # options that are refused, and what the message names
    takes_history = False

    @property
    def block_class(self) -> type[nn.Module]:
        return getattr(importlib.import_module(self.module), self.name)

    def make(self, variant: str, channel_dim: int = -1) -> nn.Module:
        torch.manual_seed(0)
        return self.block_class(**self.variants[variant][0], channel_dim=channel_dim)

    def call(self, block: nn.Module, xs: list[Tensor], fx: Tensor) -> Tensor:
        return block(xs if self.takes_history else xs[-1], fx)

    def functional(self, block: nn.Module, state: dict[str, Tensor], xs: list[Tensor], fx: Tensor) -> Tensor:
        return torch.func.functional_call(block, state, (xs if self.takes_history else xs[-1], fx))

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype = FLOAT32) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(0)
        *xs, fx = (torch.randn(shape, generator=generator, dtype=FLOAT64).to(dtype) for _ in range(5))
        return xs, fx

    def equation(self, state: dict[str, Tensor], options: dict, xs: list[Tensor], fx: Tensor) -> Tensor:
        """The paper's equation on (…, D) tensors, written the obvious way."""
        raise NotImplementedError

    def expected(self, block: nn.Module, variant: str, xs: list[Tensor], fx: Tensor, channel_dim: int = -1) -> Tensor:
        xs, fx = [x.double().movedim(channel_dim, -1) for x in xs], fx.double().movedim(channel_dim, -1)
        state = {name: p.detach().double() for name, p in block.named_parameters()}
        return self.equation(state, self.variants[variant][0], xs, fx).movedim(-1, channel_dim)

    # What it computes

    @pytest.mark.parametrize(("shape", "channel_dim"), SHAPES.values(), ids=SHAPES)
    def test_is_the_equation(self, variant, shape, channel_dim):
        block = randomize(self.make(variant, channel_dim)).double()
        xs, fx = self.inputs(shape, FLOAT64)
        expected = self.expected(block, variant, xs, fx, channel_dim)
        torch.testing.assert_close(self.call(block, xs, fx).detach(), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(("shape", "channel_dim"), SHAPES.values(), ids=SHAPES)
    def test_starts_as_the_plain_residual_to_the_last_bit(self, variant, shape, channel_dim):
        xs, fx = self.inputs(shape)
        options = self.variants[variant][0]
        start = 1.0 if options.get("bound") == "none" else options.get("scale", 2.0) / 2
        assert torch.equal(self.call(self.make(variant, channel_dim), xs, fx), start * xs[-1] + start * fx)

    def test_has_the_papers_number_of_parameters(self, variant):
        assert sum(p.numel() for p in self.make(variant).parameters()) == self.variants[variant][1]

    def test_scales_have_one_dimension_and_matrices_more(self, variant):
        """What rules by the number of dimensions go by: no weight decay below two, Muon from two on."""
        for name, p in self.make(variant).named_parameters():
            assert (p.ndim == 1) == (name in ("w", "gamma")), name

    def test_reset_parameters_mends_what_a_loop_over_all_matrices_did(self, variant):
        block, start = self.make(variant), self.make(variant)
        for p in block.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
        torch.manual_seed(0)
        block.reset_parameters()
        assert all(torch.equal(p, q) for p, q in zip(block.parameters(), start.parameters()))

    def test_keeps_nothing_between_calls(self, path):
        block = randomize(self.make(path))
        xs, fx = self.inputs((4, D))
        first = self.call(block, xs, fx)
        self.call(block, self.inputs((3, D))[0], torch.zeros(3, D))
        assert torch.equal(self.call(block, xs, fx), first)
        assert not list(block.buffers())

    # Gradients, and what is kept for them

    def test_gradients_are_right(self, path):
        block = randomize(self.make(path, channel_dim=1)).double()
        xs, fx = self.inputs((2, D, 3), FLOAT64)
        names, params = zip(*((n, p.detach().requires_grad_()) for n, p in block.named_parameters()))

        def f(*tensors):
            params, (*xs, fx) = dict(zip(names, tensors)), tensors[len(names) :]
            return self.functional(block, params, xs, fx)

        tensors = [*params, *(t.requires_grad_() for t in (*xs[-2:], fx))]
        assert torch.autograd.gradcheck(f, tensors)
        assert torch.autograd.gradgradcheck(f, tensors)

    @pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
    def test_gradients_are_as_exact_as_those_of_the_obvious_form(self, path, dtype):
        block = randomize(self.make(path)).to(dtype)
        xs, fx = self.inputs((512, D), dtype)
        names = [name for name, _ in block.named_parameters()]
        weigh = torch.randn(fx.shape, generator=torch.Generator().manual_seed(2)).to(dtype)

        def gradients(form, dtype):
            tensors = [t.detach().to(dtype).requires_grad_() for t in (*block.parameters(), *xs, fx)]
            y = form(dict(zip(names, tensors)), tensors[len(names) : -1], tensors[-1])
            grads = torch.autograd.grad(y, tensors, weigh.to(dtype), allow_unused=True)
            return [grad.double() for grad in grads if grad is not None]

        def obvious(state, xs, fx):
            return self.equation(state, self.variants[path][0], xs, fx)

        exact, ours = gradients(obvious, FLOAT64), gradients(partial(self.functional, block), dtype)
        for mine, plain, right in zip(ours, gradients(obvious, dtype), exact):
            # The gradient of a scalar is a sum of products, whose rounding errors do not shrink when the sum does.
            # In bfloat16 they are set beside the size that such a sum has by chance.
            scale = weigh.norm() * fx.norm() / (4 if dtype == FLOAT32 else fx.numel() ** 0.5)
            allowed = 2 * (plain - right).norm() + torch.finfo(dtype).eps * (right.norm() + scale)
            assert (mine - right).norm() <= allowed

    @pytest.mark.parametrize(("shape", "channel_dim"), [((256, 64), -1), ((4, 64, 8, 8), 1)], ids=str)
    def test_keeps_only_what_the_backward_pass_needs(self, path, shape, channel_dim):
        """f(x) where α is learned, and apart from that no tensor of its size; nothing where all weights are frozen."""
        options = {name: value and 64 if name == "dim" else value for name, value in self.variants[path][0].items()}
        block = self.block_class(**options, channel_dim=channel_dim)
        *xs, fx = (torch.randn(shape, requires_grad=True) for _ in range(5))

        def call() -> tuple[Tensor, dict[int, Tensor]]:
            kept = {}
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
            ):
                return self.call(block, xs, fx), kept

        y, kept = call()
        known = {t.untyped_storage().data_ptr(): name for t, name in [*((x, "x") for x in xs), (fx, "fx"), (y, "y")]}
        known |= {p.untyped_storage().data_ptr(): "parameter" for p in block.parameters()}
        assert ("fx" in {known.get(at) for at in kept}) == ("w" in dict(block.named_parameters()))
        assert "y" not in {known.get(at) for at in kept}
        others = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in known)
        assert others < 0.5 * y.untyped_storage().nbytes()
        block.requires_grad_(False)
        needless = {"fx", "y"} if channel_dim == 1 else {"x", "fx", "y"}  # a convolution keeps its input all the same
        assert not {known.get(at) for at in call()[1]} & needless

    def test_every_parameter_gets_a_gradient_and_learns_from_its_start(self, variant):
        """B starts at zero, but no parameter is stuck there: all have moved after three steps."""
        block = self.make(variant)
        start = copy.deepcopy(block)
        optimizer = torch.optim.SGD(block.parameters(), lr=0.01)
        for _ in range(3):
            xs, fx = self.inputs((4, D))
            optimizer.zero_grad()
            (self.call(block, xs, fx) - 2 * xs[-1] - 3 * xs[-2]).square().sum().backward()
            optimizer.step()
        for (name, p), q in zip(block.named_parameters(), start.parameters()):
            assert (p != q).all(), name
        randomize(block).zero_grad()
        self.call(block, xs, fx).square().sum().backward()
        for name, p in block.named_parameters():
            assert (p.grad != 0).all(), name

    def test_an_activation_in_place_may_follow(self, path):
        """As in many a ResNet."""
        block = randomize(self.make(path))
        xs, fx = self.inputs((4, D))
        grads = []
        for activation in (torch.relu_, torch.relu):
            leaf = fx.clone().requires_grad_()
            activation(self.call(block, xs, leaf)).sum().backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)

    # Dtypes, devices, layouts

    @pytest.mark.parametrize("block_dtype", [FLOAT32, FLOAT64, BFLOAT16], ids=str)
    def test_result_has_the_dtype_of_the_sum(self, path, block_dtype):
        """With and without autocast."""
        for x_dtype, fx_dtype in [(FLOAT32, FLOAT32), (FLOAT32, BFLOAT16), (BFLOAT16, BFLOAT16), (FLOAT64, FLOAT32)]:
            block = randomize(self.make(path)).to(block_dtype)
            xs, fx = self.inputs((4, D), x_dtype)[0], self.inputs((4, D), fx_dtype)[1]
            expected = self.expected(block, path, xs, fx)
            coarse = BFLOAT16 in (block_dtype, x_dtype, fx_dtype)
            for autocast in (False, True):
                with torch.autocast("cpu", BFLOAT16, enabled=autocast):
                    y = self.call(block, xs, fx)
                assert y.dtype == (xs[-1] + fx).dtype
                torch.testing.assert_close(y.double(), expected, rtol=0, atol=0.2 if coarse or autocast else 1e-5)

    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("x_dtype", [FLOAT16, FLOAT32], ids=str)
    def test_float16_is_finite_where_the_sum_is(self, path, x_dtype, autocast):
        """A x leaves its range before x + f(x) does, and under autocast x itself; there B = 0 would make it NaN."""
        largest = 60_000.0 if x_dtype == FLOAT16 else 1e6
        xs, fx = [torch.full((4, D), largest).to(x_dtype) for _ in range(4)], torch.full((4, D), -10.0).half()
        block = self.make(path)
        for _ in range(2):
            with torch.autocast("cpu", FLOAT16, enabled=autocast):
                y = self.call(block, xs, fx)
            assert torch.equal(y, xs[-1] + fx)
            for name, p in block.named_parameters():
                if name == "A":
                    p.data.fill_(1.0)

    def test_weights_of_a_bfloat16_block_are_as_fine_as_w_is(self, weighted):
        block = self.make(weighted).bfloat16()
        with torch.no_grad():
            block.w.fill_(0.001)[0] = 0.003  # bfloat16 has no number between 1 and 1 ± 1/256
        assert 1.0005 < block.alpha.max() < 1.005

    def test_a_bfloat16_stream_takes_weights_that_bfloat16_has_not(self, weighted):
        block, zero, values = self.make(weighted), torch.zeros(64, D).bfloat16(), torch.randn(64, D).bfloat16()
        block.w.data[: len(block.w) // 2 or 1] += 0.007
        for xs, fx, weight in (([zero] * 4, values, block.alpha), ([zero] * 3 + [values], zero, block.beta)):
            weight = weight.bfloat16() if weight.ndim else weight  # vectors are in the dtype of x
            assert torch.equal(self.call(block, xs, fx), (values.double() * weight.double()).bfloat16())

    @pytest.mark.parametrize("dtypes", [(BFLOAT16, BFLOAT16), (FLOAT32, BFLOAT16), (FLOAT32, FLOAT32)], ids=str)
    def test_autocast_on_a_gpu_lifts_nothing_to_float32(self, path, dtypes):
        """Its dtype rules are others than a CPU's: addcmul, for one, takes the widest dtype of its arguments."""
        kept = []
        with gpu_autocast():
            block = self.make(path)
            xs = [torch.empty(4, D, dtype=dtypes[0], requires_grad=True) for _ in range(4)]
            fx = torch.empty(4, D, dtype=dtypes[1], requires_grad=True)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
                y = self.call(block, xs, fx)
        assert y.is_cuda
        assert y.dtype == dtypes[0]
        kept = {id(t): t for t in kept if t.shape == fx.shape and t.dtype == FLOAT32}
        assert not [t for t in kept.values() if all(t is not each for each in (*xs, fx, y))]

    def test_sequences_may_have_several_lengths(self, path):
        block, offsets = randomize(self.make(path)), torch.tensor([0, 3, 8])
        xs, fx = self.inputs((8, D))
        *nested, last = (torch.nested.nested_tensor_from_jagged(t, offsets) for t in (*xs, fx))
        torch.testing.assert_close(self.call(block, nested, last).values(), self.call(block, xs, fx))

    def test_keeps_the_memory_layout(self, path):
        block = randomize(self.make(path, channel_dim=1))
        xs, fx = self.inputs((2, D, 4, 4))
        y = self.call(block, xs, fx)
        assert y.is_contiguous()
        last = [t.contiguous(memory_format=torch.channels_last) for t in (*xs, fx)]
        z = self.call(block, last[:-1], last[-1])
        assert z.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, z)

    def test_starts_and_runs_on_the_meta_device(self, path):
        with torch.device("meta"):
            block = self.make(path)
            assert self.call(block, [torch.zeros(2, D, dtype=FLOAT16)] * 4, torch.zeros(2, D)).shape == (2, D)
        assert all(p.is_meta for p in block.parameters())
        block.to_empty(device="cpu")
        torch.manual_seed(0)
        for module in block.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        expected = self.make(path).state_dict()
        for name, value in block.state_dict().items():
            assert torch.equal(value, expected[name]), name

    def test_copies_and_restores(self, path):
        block = randomize(self.make(path))
        xs, fx = self.inputs((4, D))
        expected = self.call(block, xs, fx)
        assert torch.equal(self.call(copy.deepcopy(block), xs, fx), expected)
        other = self.make(path)
        other.load_state_dict(block.state_dict())
        assert torch.equal(self.call(other, xs, fx), expected)

    # What torch does to layers

    def test_compiles_without_a_graph_break(self):
        """All ways through forward in one model, under float16 autocast too."""
        blocks = [randomize(self.make(path)) for path in self.paths]
        chain = Layers([nn.Linear(D, D) for _ in blocks], iter(blocks).__next__)
        compiled = torch.compile(copy.deepcopy(chain), fullgraph=True, backend="aot_eager")
        x = self.inputs((4, D))[1]
        for dtype in (FLOAT32, FLOAT16):
            outputs = []
            for model in (chain, compiled):
                model.zero_grad()
                with torch.autocast("cpu", FLOAT16, enabled=dtype == FLOAT16):
                    outputs.append(model(x))
                outputs[-1].square().mean().backward()
            close = {"rtol": 1e-5, "atol": 1e-5} if dtype == FLOAT32 else {"rtol": 0.05, "atol": 0.1}
            torch.testing.assert_close(*outputs, **close)
            for p, q in zip(chain.parameters(), compiled.parameters()):
                torch.testing.assert_close(p.grad, q.grad, **close)

    def test_works_under_activation_checkpointing(self, path):
        block = randomize(self.make(path))
        xs, fx = self.inputs((4, D))
        grads = []
        for call in (self.call, partial(checkpoint, self.call, use_reentrant=False)):
            block.zero_grad()
            leaf = fx.clone().requires_grad_()
            call(block, xs, leaf).square().sum().backward()
            grads.append([leaf.grad, *(p.grad for p in block.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*grads))

    def test_works_under_vmap_over_samples_and_over_models(self, path):
        """Gradients by vmap are those of samples, and of models, taken one by one."""
        blocks = [self.make(path) for _ in range(3)]
        for i, block in enumerate(blocks):
            with torch.no_grad():
                for p in randomize(block).parameters():
                    p.mul_(1 + i / 10)
        xs, fx = self.inputs((4, D))

        def loss(params, xs, fx):
            return self.functional(blocks[0], params, xs, fx).square().sum()

        states = [{name: p.detach() for name, p in block.named_parameters()} for block in blocks]
        over_samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(states[0], xs, fx)
        stacked, _ = torch.func.stack_module_state(blocks)
        over_models = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, None))(stacked, xs, fx)
        for name in states[0]:
            for i in range(4):
                one = torch.func.grad(loss)(states[0], [x[i] for x in xs], fx[i])
                torch.testing.assert_close(over_samples[name][i], one[name])
            for i, state in enumerate(states):
                torch.testing.assert_close(over_models[name][i], torch.func.grad(loss)(state, xs, fx)[name])

    def test_has_forward_mode_derivatives(self, path):
        """Forward over reverse gives the second derivatives that reverse over reverse gives."""
        block = randomize(self.make(path)).double()
        params = {name: p.detach() for name, p in block.named_parameters()}
        xs, fx = self.inputs((2, D), FLOAT64)

        def loss(fx):
            return self.functional(block, params, [x * fx.sum() for x in xs], fx).square().sum()

        torch.testing.assert_close(torch.func.hessian(loss)(fx), torch.func.jacrev(torch.func.jacrev(loss))(fx))

    # What its user sees

    def test_examples_run_from_a_copy_of_only_the_file(self, tmp_path):
        shutil.copy(ROOT / f"{self.module}.py", tmp_path)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [sys.executable, "-m", "doctest", "-v", f"{self.module}.py"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout

    def test_shows_its_options(self, variant):
        text = repr(self.make(variant))
        assert text.startswith(self.name)
        for name, value in self.variants[variant][0].items():
            assert f"{name}={value!r}" in text, text

    def test_refuses_bad_options(self):
        for options, message in self.errors:
            with pytest.raises((ValueError, TypeError), match=message):
                self.block_class(**options)

    def test_refuses_shapes_that_clash(self):
        for variant in self.paths[1:]:
            for x_shape, fx_shape, channel_dim, sizes in [
                ((4, D), (4, 1), -1, r"\(4, 6\).*\(4, 1\)"),
                ((4, D), (D,), -1, r"\(4, 6\).*\(6,\)"),
                ((4, 5), (4, 5), -1, r"dim=6.*\(4, 5\)"),
                ((2, 5, D), (2, 5, D), 1, r"dim=6.*channel_dim=1.*\(2, 5, 6\)"),
                ((D,), (D,), 1, r"channel_dim=1.*\(6,\)"),
            ]:
                with pytest.raises(ValueError, match=sizes):
                    self.call(self.make(variant, channel_dim), [torch.zeros(x_shape)], torch.zeros(fx_shape))

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.bool], ids=str)
    def test_integers_are_refused(self, path, dtype):
        """The weights would be rounded to them."""
        whole, real = torch.ones(4, D, dtype=dtype), torch.ones(4, D)
        for xs, fx in ([[real, whole], whole], [[real, whole], real], [[real, real], whole], [[whole, real], real]):
            if self.takes_history or xs[-1] is whole or fx is whole:
                with pytest.raises(TypeError, match=str(dtype)):
                    self.call(self.make(path), xs, fx)
