"""What a model with blocks goes through on its way to users: export, compilation, quantisation, sharding."""

import importlib
import io
import os
import shutil
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from block_properties import Layers
from kinds import (
    ALL_KINDS,
    KINDS,
    D,
    LAuReL_LR,
    LAuReL_PA,
    R,
    branches,
    gradients,
    library,
    random_,
    randomize_blocks,
)
from script import together
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from comparison.distributed import leave
from LAuReL import LAuReL


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # two heads
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, f: nn.Module, residual: nn.Module) -> None:
        super().__init__()
        self.f, self.residual = f, residual

    def forward(self, xs: tuple[Tensor, ...]) -> Tensor:
        return self.residual(xs if isinstance(self.residual, LAuReL_PA) else xs[-1], self.f(xs[-1]))


def run(layer: Layer, xs: tuple[Tensor, ...]) -> Tensor:
    return layer(xs)


class Model(nn.Module):
    """Convolutions on images, then attention and MLP on their pixels; in layer i of either a block of kind i."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, D, 3, padding=1)
        self.convolutions, self.layers = nn.ModuleList(), nn.ModuleList()
        for i, kind in enumerate(ALL_KINDS.values()):
            f = nn.Sequential(nn.Conv2d(D, D, 3, padding=1), nn.BatchNorm2d(D), nn.ReLU())
            self.convolutions.append(Layer(f, kind(channel_dim=1)))
            f = Attention() if i % 2 == 0 else nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
            self.layers.append(Layer(nn.Sequential(nn.LayerNorm(D), f), kind()))
        self.head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 10))

    def forward(self, x: Tensor, run=run) -> Tensor:
        xs = [self.stem(x)]
        for layer in self.convolutions:
            xs.append(run(layer, xs[-3:]))
        xs = [xs[-1].flatten(2).transpose(1, 2)]  # pixels as tokens: the shape changes, so the list starts anew
        for layer in self.layers:
            xs.append(run(layer, xs[-3:]))
        return self.head(xs[-1].mean(1))


def trained() -> Model:
    """As if trained: no parameter is where it started. Batch norm takes the averages that it has learned."""
    torch.manual_seed(0)
    return random_(Model()).eval()


def images(n: int) -> Tensor:
    return torch.arange(n * 3 * 8 * 8, dtype=torch.float32).view(n, 3, 8, 8).sin()


def assert_same(model: nn.Module, other, sizes: tuple[int, ...]) -> None:
    for n in sizes:
        torch.testing.assert_close(other(images(n)), model(images(n)), rtol=1e-4, atol=1e-4)


BATCH = torch.export.Dim("batch", min=1, max=1024)


def exported(model: nn.Module, example: Tensor) -> nn.Module:
    """By way of a file."""
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=({0: BATCH},)), file)
    return torch.export.load(io.BytesIO(file.getvalue())).module()


def test_an_exported_model_read_from_its_file_takes_every_batch_size():
    model = trained()
    assert_same(model, exported(model, images(4)), (1, 4, 7))


def test_an_exported_model_takes_every_memory_format():
    if "flatten" not in str(torch.export.export(nn.Flatten(0), (images(4),)).graph):
        pytest.skip("this torch exports a flattening as the view that it is for the memory format of the example")
    model = trained()
    program = exported(model, images(4).contiguous(memory_format=torch.channels_last))
    assert_same(model, lambda x: program(x.contiguous(memory_format=torch.channels_last)), (4, 7))
    assert_same(model, program, (4, 7))


@pytest.mark.slow
def test_onnxruntime_has_the_same_output_for_every_batch_size(tmp_path):
    library("onnxscript")
    onnxruntime = library("onnxruntime")
    model, file = trained(), tmp_path / "model.onnx"
    options = {"dynamo": True, "dynamic_shapes": {"x": {0: BATCH}}, "input_names": ["x"], "verbose": False}
    torch.onnx.export(model, (images(4),), file, **options)
    session = onnxruntime.InferenceSession(file)
    assert_same(model, lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), (1, 4, 7))


def test_compiles_once_for_every_batch_size():
    torch.compiler.reset()
    graphs = []
    model = trained()
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)

    def call(x):
        torch._dynamo.mark_dynamic(x, 0)
        return compiled(x)

    assert_same(model, call, (4, 7, 2, 13))  # of 16 and more a convolution of torch takes another way
    assert len(graphs) == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_inductor_has_the_same_output_for_every_batch_size():
    torch.compiler.reset()
    model = Layers(branches(2), KINDS["RW+LR+PA"]).requires_grad_(False)
    randomize_blocks(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for n in (4, 7):
        x = torch.randn(n, 5, D)
        torch.testing.assert_close(compiled(x), model(x))


def test_int8_linear_layers_leave_the_blocks_as_they_are():
    """Dynamic quantisation, which torch is about to hand over to torchao: linear layers only, no block is one."""
    quantize = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if quantize is None or torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no dynamic quantisation on this CPU")
    model = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its removal
        quantized = quantize(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(isinstance(module, nn.Linear) for module in quantized.modules())
    weights = {name: p for name, p in model.named_parameters() if "residual" in name}
    assert weights
    for name, p in weights.items():
        assert torch.equal(quantized.get_parameter(name), p), name
    with torch.no_grad():
        exact = model(images(4))
        error = quantized(images(4)) - exact
    assert 0 < error.norm() < 0.05 * exact.norm()


def test_a_model_whose_layers_are_checkpointed_has_the_same_gradients():
    """A layer with its block is called again as a whole, from the slice of the list that it was given."""
    model, calls = trained(), []
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    grads = []
    for how in (run, partial(checkpoint, use_reentrant=False)):
        model.zero_grad()
        model(images(4), how).square().sum().backward()
        grads.append(gradients(model))
    assert len(calls) == 3
    for name in grads[0]:
        assert torch.equal(grads[0][name], grads[1][name]), name


def shard(model: nn.Module) -> nn.Module:
    """FSDP2: the parameters of each layer, its block's included, lie divided among the processes."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in [*model.convolutions, *model.layers, model]:
        fully_shard(layer, mesh=mesh)
    return model


def train(model: nn.Module, x: Tensor) -> Tensor:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
    return loss.detach()


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.full_tensor().detach() for name, t in tensors.items()}


def start_sharded() -> nn.Module:
    """As a model too large for one machine: made on the meta device, sharded, then filled share by share."""
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        blocks = orthogonal()
    for block in blocks:
        fully_shard(block, mesh=dist.init_device_mesh("cpu", (2,)))
    blocks.to_empty(device="cpu")
    for block in blocks:
        for p in block.parameters():
            nn.init.constant_(p, torch.nan)
        block.reset_parameters()
    return blocks


def orthogonal() -> nn.Sequential:
    blocks = [LAuReL(dim=D), LAuReL_LR(D, R, init="orthogonal", residual_weights=True)]
    return nn.Sequential(*blocks, *(LAuReL_PA(D, rank=R, init="orthogonal", shared=shared) for shared in (True, False)))


def sharded_weights() -> dict[str, list[Tensor]]:
    """α and β that are looked at where a process has a share of them."""
    from torch.distributed.fsdp import fully_shard

    found = {}
    for bound in ("softmax", "sigmoid", "single", "none"):
        blocks = nn.Sequential(LAuReL(dim=D, bound=bound), LAuReL_LR(D, R, residual_weights=True, bound=bound))
        for block in blocks:
            fully_shard(block, mesh=dist.init_device_mesh("cpu", (2,)))
            found[f"{type(block).__name__}, {bound}"] = [w.full_tensor().detach() for w in (block.alpha, block.beta)]
    return found


def replicated() -> list[Tensor]:
    """The gradients of a PA whose parameters and activations are DTensors, and have a process each of them."""
    from torch.distributed.tensor import distribute_module, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (2,))
    block = distribute_module(few(), mesh)
    x = distribute_tensor(torch.ones(4, D), mesh)
    block([x], x).square().sum().backward()
    return [p.grad.full_tensor() for p in block.parameters()]


def few() -> nn.Module:
    torch.manual_seed(0)
    block = LAuReL_PA(D, k=3, rank=R, shared=False)
    nn.init.normal_(block.B)
    return block


def replicas(rank: int) -> dict[str, Tensor]:
    """Gradients under DistributedDataParallel, of half of the batch in each process."""
    model = trained().double()
    distributed = DistributedDataParallel(model)
    distributed(half(images(8).double(), rank)).square().mean().backward()
    return gradients(model)


def half(x: Tensor, rank: int) -> Tensor:
    return x[4 * rank : 4 * rank + 4]


def work(folder: str) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    results = {"replicas": replicas(rank), "start": whole(start_sharded().state_dict()), "weights": sharded_weights()}
    results["replicated"] = replicated()
    model = shard(trained().double())
    loss = train(model, half(images(8).double(), rank))
    dist.all_reduce(loss)
    shards = {name: len(p.to_local()) for name, p in model.named_parameters()}
    results["trained"] = (loss / 2, shards, whole(dict(model.named_parameters())), whole(gradients(model)))
    if rank == 0:
        torch.save(results, f"{folder}/results")
    dist.barrier()  # neither leaves while the other still talks to it
    leave(0)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    if not dist.is_available() or not hasattr(importlib.import_module("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("fully_shard is in torch 2.6 and newer")
    folder = tmp_path_factory.mktemp("sharded")
    together(work, str(folder))
    return torch.load(folder / "results", weights_only=True)


def test_trains_under_distributed_data_parallel(two_processes):
    """Two processes with half of the batch each have the gradients of one with all of it."""
    model = trained().double()
    model(images(8).double()).square().mean().backward()
    torch.testing.assert_close(two_processes["replicas"], gradients(model), rtol=1e-6, atol=1e-9)


def test_trains_sharded_in_two_processes_as_in_one(two_processes):
    """All kinds of blocks in one model, half of the batch and half of each block's parameters in each process."""
    loss, shards, trained_weights, grads = two_processes["trained"]
    model = trained().double()  # AdamW makes much of rounding errors
    torch.testing.assert_close(loss, train(model, images(8).double()))
    for name, p in model.named_parameters():
        assert shards[name] == (len(p) + 1) // 2, name
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(trained_weights[name], p.detach(), rtol=1e-6, atol=1e-6)


def test_starts_sharded_as_it_starts_whole(two_processes):
    for name, p in orthogonal().state_dict().items():
        assert torch.equal(two_processes["start"][name], p), name


def test_weights_can_be_looked_at_where_they_are_sharded(two_processes):
    assert len(two_processes["weights"]) == 8
    for weights in two_processes["weights"].values():
        for each in weights:
            assert torch.equal(each, torch.ones_like(each))


def test_dtensors_through_fewer_activations_than_k(two_processes):
    block, x = few(), torch.ones(4, D)
    block([x], x).square().sum().backward()
    torch.testing.assert_close(two_processes["replicated"], [p.grad for p in block.parameters()])
