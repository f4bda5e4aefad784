"""The properties that all blocks share. test_LAuReL*.py name the variants of each block and its equation."""

import copy
import doctest
import importlib
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).parents[1]
D = 6
SHAPES = {  # shape and channel_dim
    "2d": ((5, D), -1),
    "3d": ((2, 5, D), -1),
    "3d channels first": ((2, D, 5), 1),
    "4d": ((2, 3, 4, D), -1),
    "4d channels first": ((2, D, 3, 4), 1),
    "5d channels first": ((2, D, 2, 3, 4), 1),
    "4d channels first, counted from the end": ((2, D, 3, 4), -3),
}


LAST_LAYERS = {  # what a branch may end in, the shape and channel_dim of its output
    "linear": (lambda: nn.Linear(D, D), (2, 5, D), -1),
    "linear without bias": (lambda: nn.Linear(D, D, bias=False), (2, 5, D), -1),
    "convolution": (lambda: nn.Conv2d(D, D, 3, padding=1), (2, D, 3, 4), 1),
    "convolution in groups": (lambda: nn.Conv1d(D, D, 1, groups=2), (2, D, 5), 1),
    "batch norm": (lambda: nn.BatchNorm2d(D), (2, D, 3, 4), 1),
    "synchronised batch norm": (lambda: nn.SyncBatchNorm(D).eval(), (2, D, 3, 4), 1),
    "layer norm": (lambda: nn.LayerNorm(D), (2, 5, D), -1),
    "group norm": (lambda: nn.GroupNorm(2, D), (2, D, 3, 4), 1),
    "RMS norm": (lambda: nn.RMSNorm(D), (2, 5, D), -1),
}


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


def double_state(block: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double() for name, p in block.named_parameters()}


def randomize(block: nn.Module) -> nn.Module:
    """Away from the start, where B is zero and α and β are one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return block


BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


@cache
def has_fake_gpu() -> bool:
    """Whether this torch has fake tensors on a GPU that is not there; one that has not may abort the process."""
    probe = "with FakeTensorMode(): torch.zeros(2, device='cuda', requires_grad=True)[0] + 1"
    imports = "import torch; from torch._subclasses.fake_tensor import FakeTensorMode"
    return subprocess.run([sys.executable, "-c", f"{imports}\n{probe}"], capture_output=True).returncode == 0


@contextmanager
def gpu_autocast() -> Iterator[None]:
    """Autocast to bfloat16 on a GPU that need not be there: tensors have shapes and dtypes, and no values."""
    if not has_fake_gpu():
        pytest.skip("this torch has fake tensors on a GPU only where there is one")
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode(), torch.device("cuda"):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


class Activated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class Chain(nn.Module):
    """Three layers around the block, with a history where the block takes one; as a user has it in a model."""

    def __init__(self, blocks: list[nn.Module], takes_history: bool) -> None:
        super().__init__()
        self.f = nn.ModuleList(nn.Linear(D, D) for _ in blocks)
        self.residuals = nn.ModuleList(blocks)
        self.takes_history = takes_history

    def forward(self, x: Tensor) -> Tensor:
        xs = [x]
        for f, residual in zip(self.f, self.residuals):
            xs.append(residual(xs if self.takes_history else xs[-1], f(xs[-1])))
        return xs[-1]


def train_in_two_processes(rank: int, chain: Chain, port_file: str, result: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    model = DistributedDataParallel(chain)
    x = torch.arange(8 * D, dtype=torch.float32).view(8, D).sin()[4 * rank : 4 * rank + 4]
    model(x).square().mean().backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in chain.named_parameters()}, result)
    dist.barrier()  # neither leaves while the other still talks to it
    dist.destroy_process_group()


class BlockProperties:
    module: str  # the file's name without .py
    name: str  # the class's name
    variants: dict[str, tuple[dict, int]]  # options, and the number of parameters by the paper
    starts_plain: dict[str, dict]  # options that start as the plain residual
    errors: list[tuple[dict, str]]  # options that are refused, and what the message names
    takes_history = False

    @property
    def block_class(self) -> type[nn.Module]:
        return getattr(importlib.import_module(self.module), self.name)

    def make(self, options: dict, channel_dim: int = -1) -> nn.Module:
        torch.manual_seed(0)
        return self.block_class(**options, channel_dim=channel_dim)

    def call(self, block: nn.Module, xs: list[Tensor], fx: Tensor) -> Tensor:
        return block(xs if self.takes_history else xs[-1], fx)

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(0)
        *xs, fx = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(5))
        return xs, fx

    def equation(self, state: dict[str, Tensor], options: dict, xs: list[Tensor], fx: Tensor) -> Tensor:
        """The paper's equation on (…, D) tensors, written the obvious way."""
        raise NotImplementedError

    def expected(self, block: nn.Module, options: dict, xs: list[Tensor], fx: Tensor, channel_dim: int) -> Tensor:
        xs, fx = [x.double().movedim(channel_dim, -1) for x in xs], fx.double().movedim(channel_dim, -1)
        return self.equation(double_state(block), options, xs, fx).movedim(-1, channel_dim)

    @pytest.mark.parametrize(("shape", "channel_dim"), SHAPES.values(), ids=SHAPES)
    def test_is_the_equation(self, variant, shape, channel_dim):
        options, _ = self.variants[variant]
        block = randomize(self.make(options, channel_dim)).double()
        xs, fx = self.inputs(shape, torch.float64)
        expected = self.expected(block, options, xs, fx, channel_dim)
        torch.testing.assert_close(self.call(block, xs, fx).detach(), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(("shape", "channel_dim"), SHAPES.values(), ids=SHAPES)
    def test_starts_as_the_plain_residual_to_the_last_bit(self, shape, channel_dim):
        xs, fx = self.inputs(shape)
        for options in self.starts_plain.values():
            assert torch.equal(self.call(self.make(options, channel_dim), xs, fx), xs[-1] + fx), options

    def test_has_the_papers_number_of_parameters(self, variant):
        options, parameters = self.variants[variant]
        assert sum(p.numel() for p in self.make(options).parameters()) == parameters

    def test_gradients_are_right(self, variant):
        block = randomize(self.make(self.variants[variant][0], channel_dim=1)).double()
        xs, fx = self.inputs((2, D, 3), torch.float64)
        names, params = zip(*((n, p.detach().requires_grad_()) for n, p in block.named_parameters()))

        def f(*tensors):
            params, (*xs, fx) = dict(zip(names, tensors)), tensors[len(names) :]
            return torch.func.functional_call(block, params, (xs if self.takes_history else xs[-1], fx))

        tensors = [*params, *(t.requires_grad_() for t in (*xs[-2:], fx))]
        assert torch.autograd.gradcheck(f, tensors)
        assert torch.autograd.gradgradcheck(f, tensors)

    @pytest.mark.parametrize("alpha", [1.0, 1e-3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gradients_are_as_exact_as_those_of_the_obvious_form(self, variant, dtype, alpha):
        options, _ = self.variants[variant]
        block = randomize(self.make(options))
        if "w" in dict(block.named_parameters()):
            with torch.no_grad():  # β stays near 1
                bound = options.get("bound", "softmax")
                block.w[0] = alpha if bound == "none" else math.log(alpha)
        block.to(dtype)
        xs, fx = self.inputs((512, D), dtype)
        names = [name for name, _ in block.named_parameters()]
        weigh = torch.randn(fx.shape, generator=torch.Generator().manual_seed(2)).to(dtype)

        def gradients(form, dtype):
            tensors = [t.detach().to(dtype).requires_grad_() for t in (*block.parameters(), *xs, fx)]
            y = form(dict(zip(names, tensors)), tensors[len(names) : -1], tensors[-1])
            grads = torch.autograd.grad(y, tensors, weigh.to(dtype), allow_unused=True)
            return [grad.double() for grad in grads if grad is not None]

        def ours(state, xs, fx):
            return torch.func.functional_call(block, state, (xs if self.takes_history else xs[-1], fx))

        def obvious(state, xs, fx):
            return self.equation(state, options, xs, fx)

        exact = gradients(obvious, torch.float64)
        for mine, plain, right in zip(gradients(ours, dtype), gradients(obvious, dtype), exact):
            # The gradient of a scalar is a sum of products, whose rounding errors do not shrink when the sum does.
            # In bfloat16 they are set beside the size that such a sum has by chance.
            scale = weigh.norm() * fx.norm() / (4 if dtype == torch.float32 else fx.numel() ** 0.5)
            allowed = 2 * (plain - right).norm() + torch.finfo(dtype).eps * (right.norm() + scale)
            assert (mine - right).norm() <= allowed

    def test_keeps_only_what_the_backward_pass_needs(self, variant):
        """f(x) where α is learned and not had back from the output, and apart from that no tensor of its size."""
        options, _ = self.variants[variant]
        torch.manual_seed(0)
        block = self.block_class(**{**options, **({"dim": 64} if options.get("dim") else {})})
        *xs, fx = (torch.randn(256, 64, requires_grad=True) for _ in range(5))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = self.call(block, xs, fx)
        known = {t.untyped_storage().data_ptr(): name for t, name in [*((x, "x") for x in xs), (fx, "fx"), (y, "y")]}
        known |= {p.untyped_storage().data_ptr(): "parameter" for p in block.parameters()}
        others = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        names = {known.get(at) for at in others}
        recompute, weighted = options.get("recompute", False), "w" in dict(block.named_parameters())
        assert ("fx" in names) == (weighted and not recompute)
        assert "y" not in names or recompute
        assert sum(size for at, size in others.items() if at not in known) < 0.5 * y.untyped_storage().nbytes()

    def test_frozen_weights_keep_no_activation_of_the_branch(self, variant):
        block = self.make(self.variants[variant][0]).requires_grad_(False)
        *xs, fx = (torch.randn(4, D, requires_grad=True) for _ in range(5))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = self.call(block, xs, fx)
        assert not {t.data_ptr() for t in kept} & {t.data_ptr() for t in (*xs, fx, y)}

    def test_an_activation_in_place_may_follow(self, variant):
        """As in many a ResNet; where the output is kept for the backward pass, it is an error and no wrong gradient."""
        options, _ = self.variants[variant]
        block = randomize(self.make(options))
        xs, fx = self.inputs((4, D))
        leaf = fx.clone().requires_grad_()
        y = self.call(block, xs, leaf).relu_()
        if options.get("recompute") and block.alpha.min() >= block.beta.max() / 8:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
            return
        y.sum().backward()
        other = fx.clone().requires_grad_()
        self.call(block, xs, other).relu().sum().backward()
        assert torch.equal(leaf.grad, other.grad)

    def test_every_parameter_gets_a_gradient(self, variant):
        block = randomize(self.make(self.variants[variant][0]))
        xs, fx = self.inputs((4, D))
        self.call(block, xs, fx).square().sum().backward()
        for name, p in block.named_parameters():
            assert p.grad is not None, name
            assert (p.grad != 0).all(), name

    def test_learns_from_its_start(self, variant):
        """B starts at zero, but no parameter is stuck there: all have moved after three steps."""
        block = self.make(self.variants[variant][0])
        start = copy.deepcopy(block)
        optimizer = torch.optim.SGD(block.parameters(), lr=0.01)
        for _ in range(3):
            xs, fx = self.inputs((4, D))
            optimizer.zero_grad()
            (self.call(block, xs, fx) - 2 * xs[-1] - 3 * xs[-2]).square().sum().backward()
            optimizer.step()
        for (name, p), q in zip(block.named_parameters(), start.parameters()):
            assert not torch.equal(p, q), name

    @pytest.mark.parametrize("block_dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("fx_dtype", [torch.float32, torch.bfloat16])
    def test_result_has_the_dtype_of_the_sum(self, variant, block_dtype, x_dtype, fx_dtype):
        options, _ = self.variants[variant]
        block = randomize(self.make(options)).to(block_dtype)
        xs, _ = self.inputs((4, D), x_dtype)
        _, fx = self.inputs((4, D), fx_dtype)
        y = self.call(block, xs, fx)
        assert y.dtype == (xs[-1] + fx).dtype
        coarse = torch.bfloat16 in (block_dtype, x_dtype, fx_dtype)
        expected = self.expected(block, options, xs, fx, -1)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=0.15 if coarse else 1e-5)

    def test_autocast_keeps_the_dtype_of_the_sum(self, variant):
        options, _ = self.variants[variant]
        block = randomize(self.make(options))
        for x_dtype, fx_dtype in [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]:
            xs, _ = self.inputs((4, D), x_dtype)
            _, fx = self.inputs((4, D), fx_dtype)
            with torch.autocast("cpu", torch.bfloat16):
                y = self.call(block, xs, fx)
                assert y.dtype == (xs[-1] + fx).dtype
            y.float().sum().backward()
            expected = self.expected(block, options, xs, fx, -1)
            torch.testing.assert_close(y.double(), expected, rtol=0, atol=0.15)

    def test_keeps_the_memory_layout(self, variant):
        block = randomize(self.make(self.variants[variant][0], channel_dim=1))
        xs, fx = self.inputs((2, D, 4, 4))
        y = self.call(block, xs, fx)
        assert y.is_contiguous()
        last = [t.contiguous(memory_format=torch.channels_last) for t in (*xs, fx)]
        z = self.call(block, last[:-1], last[-1])
        assert z.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, z)

    def test_compiles_without_a_graph_break(self, variant):
        torch.compiler.reset()  # the variants share their code, and only so many versions of one are compiled
        block = randomize(self.make(self.variants[variant][0]))
        compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
        xs, fx = self.inputs((4, D))
        y, z = self.call(block, xs, fx), self.call(compiled, xs, fx)
        torch.testing.assert_close(y, z)
        y.square().sum().backward()
        z.square().sum().backward()
        for p, q in zip(block.parameters(), compiled.parameters()):
            torch.testing.assert_close(p.grad, q.grad)

    @pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
    def test_compiles_in_a_model(self, first_variant):
        chain = self.chain(first_variant)
        x = torch.randn(4, D)
        torch.testing.assert_close(torch.compile(chain, fullgraph=True)(x), chain(x))

    def chain(self, variant: str) -> Chain:
        return Chain([randomize(self.make(self.variants[variant][0])) for _ in range(3)], self.takes_history)

    def test_exports(self, variant):
        chain = self.chain(variant)
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(chain, (torch.randn(4, D),), dynamic_shapes=({0: batch},))
        x = torch.randn(7, D)
        torch.testing.assert_close(program.module()(x), chain(x))

    def test_works_under_activation_checkpointing(self, variant):
        block = randomize(self.make(self.variants[variant][0]))
        xs, fx = self.inputs((4, D))
        grads = []
        for call in (self.call, partial(checkpoint, self.call, use_reentrant=False)):
            block.zero_grad()
            leaf = fx.clone().requires_grad_()
            call(block, xs, leaf).square().sum().backward()
            grads.append([leaf.grad, *(p.grad for p in block.parameters())])
        for a, b in zip(*grads):
            assert torch.equal(a, b)

    def test_keeps_nothing_between_calls(self, variant):
        block = randomize(self.make(self.variants[variant][0]))
        xs, fx = self.inputs((4, D))
        first = self.call(block, xs, fx)
        self.call(block, self.inputs((3, D))[0], torch.zeros(3, D))
        assert torch.equal(self.call(block, xs, fx), first)
        assert not list(block.buffers())

    def test_copies_and_restores(self, variant):
        options, _ = self.variants[variant]
        block = randomize(self.make(options))
        xs, fx = self.inputs((4, D))
        expected = self.call(block, xs, fx)
        assert torch.equal(self.call(copy.deepcopy(block), xs, fx), expected)
        other = self.make(options)
        other.load_state_dict(block.state_dict())
        assert torch.equal(self.call(other, xs, fx), expected)

    def test_starts_on_the_meta_device(self, variant):
        options, _ = self.variants[variant]
        with torch.device("meta"):
            block = self.make(options)
        assert all(p.is_meta for p in block.parameters())
        block.to_empty(device="cpu")
        torch.manual_seed(0)
        for module in block.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        expected = self.make(options).state_dict()
        for name, value in block.state_dict().items():
            assert torch.equal(value, expected[name]), name

    def test_works_under_torch_func(self, variant):
        """Gradients of single samples by vmap are those of samples taken one by one."""
        block = randomize(self.make(self.variants[variant][0]))
        params = dict(block.named_parameters())
        xs, fx = self.inputs((4, D))

        def loss(params, xs, fx):
            return torch.func.functional_call(block, params, (xs if self.takes_history else xs[-1], fx)).square().sum()

        by_vmap = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, xs, fx)
        for i in range(4):
            one = torch.func.grad(loss)(params, [x[i] for x in xs], fx[i])
            for name in params:
                torch.testing.assert_close(by_vmap[name][i], one[name])

    @pytest.mark.parametrize("dtypes", [(BFLOAT16, BFLOAT16), (FLOAT32, BFLOAT16), (FLOAT32, FLOAT32)], ids=str)
    def test_autocast_on_a_gpu_lifts_nothing_to_float32(self, variant, dtypes):
        """There addcmul takes the widest dtype of its arguments, which on a CPU it does not."""
        kept = []
        with gpu_autocast():
            block = self.make(self.variants[variant][0])
            xs = [torch.empty(4, D, dtype=dtypes[0], requires_grad=True) for _ in range(4)]
            fx = torch.empty(4, D, dtype=dtypes[1], requires_grad=True)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
                y = self.call(block, xs, fx)
        assert y.is_cuda
        assert y.dtype == dtypes[0]
        kept = {id(t): t for t in kept if t.shape == fx.shape and t.dtype == FLOAT32}
        assert not [t for t in kept.values() if all(t is not each for each in (*xs, fx, y))]

    def test_works_for_an_ensemble_under_vmap(self, variant):
        """Gradients of several models by vmap over their parameters are those of the models one by one."""
        blocks = [self.make(self.variants[variant][0]) for _ in range(3)]
        for i, block in enumerate(blocks):
            with torch.no_grad():
                for p in randomize(block).parameters():
                    p.mul_(1 + i / 10)
        params, _ = torch.func.stack_module_state(blocks)
        xs, fx = self.inputs((4, D))

        def loss(params):
            return torch.func.functional_call(block, params, (xs if self.takes_history else xs[-1], fx)).square().sum()

        by_vmap = torch.func.vmap(torch.func.grad(loss))(params)
        for i, each in enumerate(blocks):
            for name, grad in torch.func.grad(loss)(dict(each.named_parameters())).items():
                torch.testing.assert_close(by_vmap[name][i], grad)

    def test_has_forward_mode_derivatives(self, variant):
        """Forward over reverse gives the second derivatives that reverse over reverse gives."""
        block = randomize(self.make(self.variants[variant][0])).double()
        params = {name: p.detach() for name, p in block.named_parameters()}
        xs, fx = self.inputs((2, D), torch.float64)

        def loss(params, fx):
            older = [x * fx.sum() for x in xs]
            y = torch.func.functional_call(block, params, (older if self.takes_history else older[-1], fx))
            return y.square().sum()

        for argnum in (0, 1):
            forward = torch.func.hessian(loss, argnum)(params, fx)
            reverse = torch.func.jacrev(torch.func.jacrev(loss, argnum), argnum)(params, fx)
            for a, b in zip(torch.utils._pytree.tree_leaves(forward), torch.utils._pytree.tree_leaves(reverse)):
                torch.testing.assert_close(a, b)

    def test_trains_under_distributed_data_parallel(self, first_variant, tmp_path):
        """Two processes with half of the batch each have the gradients of one with all of it."""
        chain = self.chain(first_variant)
        mp.spawn(train_in_two_processes, (copy.deepcopy(chain), f"{tmp_path}/init", f"{tmp_path}/grads"), nprocs=2)
        chain(torch.arange(8 * D, dtype=torch.float32).view(8, D).sin()).square().mean().backward()
        distributed = torch.load(tmp_path / "grads", weights_only=True)
        for name, p in chain.named_parameters():
            torch.testing.assert_close(distributed[name], p.grad)

    def test_file_runs_alone_in_an_empty_folder(self, tmp_path):
        shutil.copy(ROOT / f"{self.module}.py", tmp_path)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [sys.executable, f"{self.module}.py"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "parameters" in done.stdout
        assert "starts as x + f(x): True" in done.stdout

    def test_docstring_examples_run(self):
        result = doctest.testmod(importlib.import_module(self.module))
        assert result.attempted > 0
        assert result.failed == 0

    def test_shows_its_options(self, variant):
        options, _ = self.variants[variant]
        text = repr(self.make(options))
        assert text.startswith(self.name)
        for name in options.keys() - {"residual_weights", "norm"}:
            shown = options[name]
            assert f"{name}={shown!r}" in text, text

    def test_refuses_bad_options(self):
        for options, message in self.errors:
            with pytest.raises(ValueError, match=message):
                self.block_class(**options)

    def test_refuses_shapes_that_clash(self):
        options = {**next(iter(self.variants.values()))[0], "dim": D}
        for x_shape, fx_shape, channel_dim, sizes in [
            ((4, D), (4, 1), -1, r"\(4, 6\).*\(4, 1\)"),
            ((4, D), (D,), -1, r"\(4, 6\).*\(6,\)"),
            ((4, 5), (4, 5), -1, r"dim=6.*\(4, 5\)"),
            ((2, 5, D), (2, 5, D), 1, r"dim=6.*channel_dim=1.*\(2, 5, 6\)"),
            ((D,), (D,), 1, r"channel_dim=1.*\(6,\)"),
        ]:
            with pytest.raises(ValueError, match=sizes):
                self.call(self.make(options, channel_dim), [torch.zeros(x_shape)], torch.zeros(fx_shape))

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.bool], ids=str)
    def test_whole_numbers_are_added_right_or_refused(self, variant, dtype):
        """A and B would be rounded to them."""
        block = randomize(self.make(self.variants[variant][0]))
        xs, fx = self.inputs((4, D))
        whole = [(3 * x).to(dtype) for x in xs]
        if self.module == "LAuReL":
            y = self.call(block, whole, fx)
            torch.testing.assert_close(y, self.call(block, [x.to(fx.dtype) for x in whole], fx))
            return
        with pytest.raises(TypeError, match=str(dtype)):
            self.call(block, whole, fx)

    def test_is_traced(self, variant):
        block = randomize(self.make(self.variants[variant][0]))
        xs, fx = self.inputs((4, D))
        args = (xs if self.takes_history else xs[-1], fx)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is deprecated, and that shapes become constants
            traced = torch.jit.trace(block, args)
        torch.testing.assert_close(traced(*args), block(*args))

    def fold(self, block: nn.Module, layer: nn.Module) -> None:
        importlib.import_module(self.module).fold(block, layer)

    @pytest.mark.parametrize(("make", "shape", "channel_dim"), LAST_LAYERS.values(), ids=LAST_LAYERS)
    def test_folding_moves_alpha_into_the_branch(self, variant, make, shape, channel_dim):
        block = randomize(self.make(self.variants[variant][0], channel_dim)).double()
        layer = randomize(make()).double()
        xs, t = self.inputs(shape, torch.float64)
        if getattr(block, "w", None) is None:
            with pytest.raises(ValueError, match="no α"):
                self.fold(block, layer)
            return
        alpha, beta, before, branch = block.alpha, block.beta, self.call(block, xs, layer(t)).detach(), layer(t)
        self.fold(block, layer)
        torch.testing.assert_close(self.call(block, xs, layer(t)).detach(), before, rtol=1e-12, atol=1e-12)
        shaped = (
            alpha if alpha.ndim == 0 else alpha.view([D if i == channel_dim % t.ndim else 1 for i in range(t.ndim)])
        )
        torch.testing.assert_close(layer(t), shaped * branch, rtol=1e-12, atol=1e-12)
        assert block.alpha is None
        assert torch.equal(block.beta, beta)
        assert "folded" in repr(block)
        with pytest.raises(ValueError, match="folded before"):
            self.fold(block, layer)

    @pytest.mark.parametrize(
        "layer",
        [
            nn.GELU(),
            nn.LayerNorm(D, elementwise_affine=False),
            nn.Dropout(),
            Activated(D, D),
            nn.utils.parametrizations.weight_norm(nn.Linear(D, D)),
            nn.utils.parametrize.register_parametrization(nn.Linear(D, D), "bias", nn.Tanh()),
            prune.l1_unstructured(nn.Linear(D, D), "bias", 0.3),
        ],
        ids=repr,
    )
    def test_nothing_is_folded_through_a_layer_that_is_not_affine(self, first_variant, layer):
        block, before = self.make(self.variants[first_variant][0]), copy.deepcopy(layer.state_dict())
        with pytest.raises(TypeError, match=r"(?s)Linear.*LayerNorm.*got"):
            self.fold(block, layer)
        torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)

    def test_pruned_weights_are_not_folded(self, variant):
        """Pruning would bring w back."""
        block = self.make(self.variants[variant][0])
        if getattr(block, "w", None) is None:
            return
        prune.identity(block, "w")
        with pytest.raises(TypeError, match="w must be a plain parameter"):
            self.fold(block, nn.Linear(D, D))

    def test_a_folded_block_is_reset_to_the_plain_residual(self, variant):
        block = randomize(self.make(self.variants[variant][0]))
        if getattr(block, "w", None) is None:
            return
        self.fold(block, nn.Linear(D, D))
        block.reset_parameters()
        xs, fx = self.inputs((4, D))
        assert torch.equal(self.call(block, xs, fx), xs[-1] + fx)

    def test_weights_of_a_folded_model_do_not_load_into_one_that_is_not(self, variant):
        options, _ = self.variants[variant]
        block, layer = randomize(self.make(options)), nn.Linear(D, D)
        if getattr(block, "w", None) is None:
            return
        self.fold(block, layer)
        with pytest.raises(RuntimeError, match=r'Missing.*"w"[\s\S]*folded_beta'):
            self.make(options).load_state_dict(block.state_dict())
        again = copy.deepcopy(block)
        again.load_state_dict(block.state_dict())

    @pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)], ids=str)
    def test_a_folded_block_keeps_the_dtype_of_the_sum(self, variant, dtypes):
        block = randomize(self.make(self.variants[variant][0]))
        if getattr(block, "w", None) is None:
            return
        self.fold(block, nn.Linear(D, D))
        xs, fx = self.inputs((2, 5, D))
        xs, fx = [x.to(dtypes[0]) for x in xs], fx.to(dtypes[1])
        assert self.call(block, xs, fx).dtype == (xs[-1] + fx).dtype
