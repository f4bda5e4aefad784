"""The blocks in models of other libraries, and in what a model goes through on its way to users.

The other libraries are the dependency group interop: pip install --group interop. What they are not needed for runs
without them. Every model here is built from a configuration; nothing is downloaded.
"""

import copy
import importlib
import io
import shutil
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from block_properties import randomize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from LAuReL import LAuReL

LAuReL_LR = importlib.import_module("LAuReL-LR").LAuReL_LR
LAuReL_PA = importlib.import_module("LAuReL-PA").LAuReL_PA
D, R = 16, 4
KINDS = {
    "RW": lambda **options: LAuReL(**options),
    "RW per dimension": lambda **options: LAuReL(dim=D, **options),
    "LR": partial(LAuReL_LR, D, R),
    "RW+LR": partial(LAuReL_LR, D, R, residual_weights=True),
    "PA": partial(LAuReL_PA, D, rank=R),
    "PA identity": partial(LAuReL_PA, D, rank=None),
    "RW+LR+PA": partial(LAuReL_PA, D, rank=R, residual_weights=True, shared=False),
}
ALL_KINDS = {
    **KINDS,
    "RW single": lambda **options: LAuReL(bound="single", **options),
    "LR with a norm": lambda **options: LAuReL_LR(D, R, norm=Norm(options.get("channel_dim", -1)), **options),
    "RW+PA": partial(LAuReL_PA, D, rank=R, residual_weights=True),
}


class Norm(nn.RMSNorm):
    """Over the channels, wherever they stand."""

    def __init__(self, channel_dim: int) -> None:
        super().__init__(D, eps=1e-6)
        self.channel_dim = channel_dim

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.movedim(self.channel_dim, -1)).movedim(-1, self.channel_dim)


def library(name: str):
    return pytest.importorskip(name, reason=f"{name} is in the dependency group interop: pip install --group interop")


def random_(module: nn.Module) -> nn.Module:
    """Every parameter away from its start, for a model whose size must not explode."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return module


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters()}


def assert_starts_as(plain: nn.Module, model: nn.Module, *inputs: Tensor) -> None:
    """The same function to the last bit; and what starts where the gradient reaches it gets one: A waits for B."""
    with torch.no_grad():
        expected = model_output(plain(*inputs))
    output = model_output(model(*inputs))
    assert expected.std() > 0
    assert torch.equal(output, expected)
    (output * torch.randn(output.shape)).sum().backward()
    blocks = [module for module in model.modules() if isinstance(module, (LAuReL, LAuReL_LR, LAuReL_PA))]
    assert blocks
    for block in blocks:
        for name, p in block.named_parameters():
            assert p.grad is not None, name
            assert p.grad.any() or name == "A" or (name == "gamma" and block.rank), name
            p.grad = None
    randomize_blocks(model)
    assert not torch.allclose(model_output(model(*inputs)), expected, atol=1e-3)


def model_output(output) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def randomize_blocks(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (LAuReL, LAuReL_LR, LAuReL_PA)):
            randomize(module)


# Hugging Face Gemma 3n, which has LAuReL-LR in its layers


def gemma_config(**options):
    return library("transformers").Gemma3nTextConfig(
        vocab_size=40,
        vocab_size_per_layer_input=40,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_kv_shared_layers=0,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        laurel_rank=8,
        rms_norm_eps=1e-3,  # large enough to be seen
        **options,
    )


def gemma_laurel(dtype: torch.dtype = torch.float32) -> nn.Module:
    config = gemma_config()
    modeling = importlib.import_module("transformers.models.gemma3n.modeling_gemma3n")
    laurel = modeling.Gemma3nTextLaurelBlock(config).to(dtype)
    with torch.no_grad():
        for p in laurel.parameters():
            p.copy_(torch.randn(p.shape))
    return laurel


def from_gemma(laurel: nn.Module) -> nn.Module:
    left, right, norm = laurel.linear_left.weight, laurel.linear_right.weight, laurel.post_laurel_norm
    block = LAuReL_LR(*reversed(left.shape), norm=nn.RMSNorm(len(right), eps=norm.eps)).to(left.dtype)
    block.load_state_dict({"A": left, "B": right, "norm.weight": norm.weight})
    return block


def to_gemma(block: nn.Module, laurel: nn.Module) -> None:
    state = {"linear_left": block.A, "linear_right": block.B, "post_laurel_norm": block.norm.weight}
    laurel.load_state_dict({f"{name}.weight": value for name, value in state.items()})


NAMES = {"linear_left.weight": "A", "linear_right.weight": "B", "post_laurel_norm.weight": "norm.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemma_3n_laurel_block_is_lr_with_a_norm(dtype):
    """x + RMSNorm(B A x), and with f(x) that added: the same numbers and the same gradients from the same weights."""
    laurel = gemma_laurel(dtype)
    block = from_gemma(laurel)
    x, fx = torch.randn(2, 4, 7, 32).to(dtype).requires_grad_()
    weigh = torch.randn(4, 7, 32).to(dtype)
    for branch in (torch.zeros_like(fx), fx):
        tensors = [x, *laurel.parameters()], [x, *(block.get_parameter(NAMES[n]) for n, _ in laurel.named_parameters())]
        theirs, ours = branch + laurel(x), block(x, branch)
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-6}
        torch.testing.assert_close(ours, theirs, **close)
        for a, b in zip(torch.autograd.grad(theirs, tensors[0], weigh), torch.autograd.grad(ours, tensors[1], weigh)):
            torch.testing.assert_close(b, a, rtol=close["rtol"], atol=close["atol"] * a.abs().max().item())


def test_conversion_to_gemma_3n_and_back_keeps_every_weight():
    block = from_gemma(gemma_laurel())
    laurel = gemma_laurel()
    assert not torch.equal(laurel.linear_left.weight, block.A)
    to_gemma(block, laurel)
    x = torch.randn(4, 7, 32)
    torch.testing.assert_close(laurel(x), block(x, torch.zeros_like(x)))
    again = from_gemma(laurel)
    for name, p in block.state_dict().items():
        assert torch.equal(again.state_dict()[name], p), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemma_3n_norm_is_the_rms_norm_of_torch(dtype):
    """weight · h, not (1 + weight) · h as in other Gemmas; eps within the mean; in float32 whatever comes in."""
    theirs = gemma_laurel(dtype).post_laurel_norm
    ours = nn.RMSNorm(32, eps=theirs.eps).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    h = 0.03 * torch.randn(64, 32).to(dtype)  # h² is of the size of eps
    exact = h.double() * (h.double().square().mean(-1, keepdim=True) + theirs.eps).rsqrt() * theirs.weight.double()
    for norm in (theirs, ours):
        assert norm(h).dtype == dtype
        close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 0}
        torch.testing.assert_close(norm(h).double(), exact, **close)


class Laurel(nn.Module):
    """In place of a Gemma 3n layer's laurel, which has no f(x): the layer adds that itself, and divides by √2."""

    def __init__(self, laurel: nn.Module) -> None:
        super().__init__()
        self.residual = from_gemma(laurel)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x, torch.zeros_like(x))


def gemma_pair() -> tuple[nn.Module, nn.Module]:
    model = random_(library("transformers").Gemma3nForCausalLM(gemma_config())).eval()
    ours = copy.deepcopy(model)
    for layer in ours.model.layers:
        layer.laurel = Laurel(layer.laurel)
    return model, ours


def test_gemma_3n_with_lr_for_its_laurel_has_the_same_logits_and_gradients():
    model, ours = gemma_pair()
    tokens = torch.randint(0, 40, (2, 6))
    logits = []
    for each in (model, ours):
        logits.append(each(tokens).logits)
        F.cross_entropy(logits[-1].flatten(0, 1), tokens.flatten()).backward()
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    for theirs, mine in zip(model.model.layers, ours.model.layers):
        for name, p in theirs.laurel.named_parameters():
            assert p.grad.any()
            torch.testing.assert_close(
                mine.laurel.residual.get_parameter(NAMES[name]).grad, p.grad, rtol=1e-3, atol=1e-6
            )
    with torch.no_grad():  # the blocks matter
        for layer in ours.model.layers:
            layer.laurel.residual.B.zero_()
    assert (ours(tokens).logits - logits[0]).abs().max() > 0.01


def test_gemma_3n_with_lr_has_the_same_gradients_under_its_own_gradient_checkpointing():
    _, ours = gemma_pair()
    plain = copy.deepcopy(ours).train()
    getattr(ours.train(), "activation_checkpointing_enable", ours.gradient_checkpointing_enable)()
    calls = []
    ours.model.layers[0].laurel.register_forward_hook(lambda *_: calls.append(1))
    tokens = torch.randint(0, 40, (2, 6))
    for each in (plain, ours):
        F.cross_entropy(each(tokens, use_cache=False).logits.flatten(0, 1), tokens.flatten()).backward()
    assert len(calls) == 2
    for name, grad in gradients(ours.model.layers).items():
        torch.testing.assert_close(grad, gradients(plain.model.layers)[name], msg=name)


# Models that have a plain residual: Llama of Hugging Face, ViT and ResNet of timm


def give_residuals(layers: list[nn.Module], cls: type[nn.Module], make) -> None:
    """To layers that are there already, with their weights, another forward and the blocks that it calls."""
    for layer in layers:
        layer.__class__ = cls
        layer.residual1, layer.residual2 = make(), make()


def llama_pair(make, folder) -> tuple[nn.Module, nn.Module]:
    """A trained model, read from a folder, and the same with blocks."""
    transformers = library("transformers")

    class Layer(importlib.import_module("transformers.models.llama.modeling_llama").LlamaDecoderLayer):
        def forward(self, x, **kwargs):
            x = self.residual1(x, self.self_attn(self.input_layernorm(x), **kwargs)[0])
            return self.residual2(x, self.mlp(self.post_attention_layernorm(x)))

    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=D, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    random_(transformers.LlamaForCausalLM(config)).save_pretrained(folder)
    plain, model = (transformers.LlamaForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    give_residuals(model.model.layers, Layer, make)
    return plain, model


WITHOUT_HISTORY = [kind for kind in KINDS if "PA" not in kind]


@pytest.mark.parametrize("kind", WITHOUT_HISTORY)
def test_a_pretrained_llama_with_blocks_starts_as_the_same_function(kind, tmp_path):
    plain, model = llama_pair(KINDS[kind], tmp_path)
    assert_starts_as(plain, model, torch.randint(0, 40, (2, 6)))


def test_a_llama_with_blocks_generates_the_same_text_with_its_cache_as_without(tmp_path):
    _, model = llama_pair(KINDS["RW+LR"], tmp_path)
    randomize_blocks(model)
    prompt = torch.randint(3, 40, (1, 5))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (model.generate(prompt, use_cache=use_cache, **options) for use_cache in (True, False))
    assert with_cache.shape == (1, 13)
    assert torch.equal(with_cache, without)


class PABlocks(nn.Sequential):
    """In place of the blocks of a timm ViT, with the list of activations."""

    def forward(self, x):
        xs = [x]
        for block in self:
            xs.append(block.residual1(xs, block.drop_path1(block.ls1(block.attn(block.norm1(xs[-1]))))))
            xs.append(block.residual2(xs, block.drop_path2(block.ls2(block.mlp(block.norm2(xs[-1]))))))
        return xs[-1]


def vit_pair(kind: str) -> tuple[nn.Module, nn.Module]:
    timm = library("timm")

    class Layer(importlib.import_module("timm.models.vision_transformer").Block):
        def forward(self, x, **mask):
            x = self.residual1(x, self.drop_path1(self.ls1(self.attn(self.norm1(x), **mask))))
            return self.residual2(x, self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))

    options = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": 3, "num_heads": 2, "num_classes": 10}
    plain = random_(timm.create_model("vit_tiny_patch16_224", init_values=0.5, **options)).eval()
    model = copy.deepcopy(plain)
    give_residuals(model.blocks, Layer, KINDS[kind])
    if kind not in WITHOUT_HISTORY:
        model.blocks = PABlocks(*model.blocks)
    return plain, model


@pytest.mark.parametrize("kind", KINDS)
def test_a_vit_of_timm_with_blocks_starts_as_the_same_function(kind):
    assert_starts_as(*vit_pair(kind), torch.randn(2, 3, 32, 32))


def test_a_vit_of_timm_with_blocks_has_the_same_gradients_under_its_own_gradient_checkpointing():
    _, model = vit_pair("RW+LR")
    randomize_blocks(model)
    checkpointed = copy.deepcopy(model)
    checkpointed.set_grad_checkpointing()
    calls = []
    checkpointed.blocks[0].residual1.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 32, 32)
    for each in (model, checkpointed):
        each(x).square().sum().backward()
    assert len(calls) == 2
    for name, grad in gradients(checkpointed).items():
        torch.testing.assert_close(grad, gradients(model)[name], msg=name)


@pytest.mark.parametrize(
    "make",
    [
        lambda dim: LAuReL(),
        lambda dim: LAuReL(dim=dim, channel_dim=1),
        partial(LAuReL_LR, rank=R, channel_dim=1),
        partial(LAuReL_LR, rank=R, channel_dim=1, residual_weights=True),
    ],
    ids=WITHOUT_HISTORY,
)
def test_a_resnet_of_timm_with_blocks_starts_as_the_same_function(make):
    """Also where the image shrinks: there x is the shortcut after its convolution, so that shapes fit."""
    timm = library("timm")
    basic = importlib.import_module("timm.models.resnet").BasicBlock

    class Layer(basic):
        def forward(self, x):
            shortcut = x if self.downsample is None else self.downsample(x)
            x = self.act1(self.bn1(self.conv1(x)))
            return self.act2(self.residual(shortcut, self.bn2(self.conv2(x))))

    plain = timm.create_model("resnet18", num_classes=10, channels=(8, 16, 24, 32)).eval()
    layers = [module for module in plain.modules() if isinstance(module, basic)]
    assert len(layers) == 8
    for layer in layers:
        nn.init.uniform_(layer.bn2.weight, 0.5, 1.5)  # it starts at zero, without a branch
    model = copy.deepcopy(plain)
    for layer in [module for module in model.modules() if isinstance(module, basic)]:
        layer.__class__ = Layer
        layer.residual = make(layer.bn2.num_features)
    assert_starts_as(plain, model, torch.randn(2, 3, 64, 64))


# hyper-connections of lucidrains


class Streams(nn.Module):
    """The same layers with hyper-connections."""

    def __init__(self, branches, streams: int, **options) -> None:
        super().__init__()
        hyper = library("hyper_connections")
        init, self.expand, self.reduce = hyper.get_init_and_expand_reduce_stream_functions(streams, **options)
        self.layers = nn.ModuleList(init(dim=D, branch=f, layer_index=i) for i, f in enumerate(branches))

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        for layer in self.layers:
            x = layer(x)
        return self.reduce(x)


class Layers(nn.Module):
    """The same layers with a block for each."""

    def __init__(self, branches, make) -> None:
        super().__init__()
        self.branches, self.residuals = nn.ModuleList(branches), nn.ModuleList(make() for _ in branches)

    def forward(self, x: Tensor) -> Tensor:
        xs = [x]
        for f, residual in zip(self.branches, self.residuals):
            xs.append(residual(xs if isinstance(residual, LAuReL_PA) else xs[-1], f(xs[-1])))
        return xs[-1]


def branches(n: int = 3) -> list[nn.Module]:
    return [nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.GELU()) for _ in range(n)]


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_hyper_connections_start_but_for_the_number_of_streams(kind):
    """Without streams they are the plain residual, to the last bit; s of them, summed, are s times that."""
    fs, x = branches(), torch.randn(2, 5, D)
    ours = Layers(fs, KINDS[kind])(x)
    assert torch.equal(Streams(fs, 4, disable=True)(x), ours)
    torch.testing.assert_close(Streams(fs, 4)(x), 4 * ours)


@pytest.mark.parametrize("kind", KINDS)
def test_learns_beside_hyper_connections(kind):
    """From the same branches, on the same data: the loss falls with either."""
    fs, x, target = branches(), torch.randn(2, 64, 5, D)[0], torch.randn(64, 5, D)
    for model in (Layers(copy.deepcopy(fs), KINDS[kind]), Streams(copy.deepcopy(fs), 2)):
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
        for _ in range(20):
            optimizer.zero_grad()
            losses.append((model(x) - target).square().mean())
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.8 * losses[0]


# What a model goes through on its way to users


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
    """Convolutions on images, then attention on their pixels; in layer i of either a block of kind i."""

    def __init__(self, kinds: list[str], **options) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, D, 3, padding=1)
        self.convolutions, self.layers = nn.ModuleList(), nn.ModuleList()
        for i, kind in enumerate(kinds):
            f = nn.Sequential(nn.Conv2d(D, D, 3, padding=1), nn.BatchNorm2d(D), nn.ReLU())
            self.convolutions.append(Layer(f, ALL_KINDS[kind](channel_dim=1, **options)))
            f = Attention() if i % 2 == 0 else nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
            self.layers.append(Layer(nn.Sequential(nn.LayerNorm(D), f), ALL_KINDS[kind](**options)))
        self.head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 10))

    def forward(self, x: Tensor, run=run) -> Tensor:
        xs = [self.stem(x)]
        for layer in self.convolutions:
            xs.append(run(layer, tuple(xs)))
        xs = [xs[-1].flatten(2).transpose(1, 2)]  # pixels as tokens: the shape changes, so the list starts anew
        for layer in self.layers:
            xs.append(run(layer, tuple(xs)))
        return self.head(xs[-1].mean(1))


def trained(kinds: list[str], **options) -> Model:
    """As if trained: no parameter is where it started. Batch norm takes the averages that it has learned."""
    torch.manual_seed(0)
    return random_(Model(kinds, **options)).eval()


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


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_read_from_its_file_takes_every_batch_size(kind):
    model = trained([kind] * 3)
    assert_same(model, exported(model, images(4)), (1, 4, 7))


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_takes_every_memory_format(kind):
    if "flatten" not in str(torch.export.export(nn.Flatten(0), (images(4),)).graph):
        pytest.skip("this torch exports a flattening as the view that it is for the memory format of the example")
    model = trained([kind] * 2)
    program = exported(model, images(4).contiguous(memory_format=torch.channels_last))
    assert_same(model, lambda x: program(x.contiguous(memory_format=torch.channels_last)), (4, 7))
    assert_same(model, program, (4, 7))


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_has_the_same_output_for_every_batch_size(kind, tmp_path):
    library("onnxscript")
    onnxruntime = library("onnxruntime")
    model, file = trained([kind] * 2), tmp_path / "model.onnx"
    options = {"dynamo": True, "dynamic_shapes": {"x": {0: BATCH}}, "input_names": ["x"], "verbose": False}
    torch.onnx.export(model, (images(4),), file, **options)
    session = onnxruntime.InferenceSession(file)
    assert_same(model, lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), (1, 4, 7))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_once_for_every_batch_size(kind):
    torch.compiler.reset()
    graphs = []
    model = trained([kind] * 3)
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


@pytest.mark.parametrize("kind", KINDS)
def test_int8_linear_layers_leave_the_blocks_as_they_are(kind):
    """Dynamic quantisation, which torch is about to hand over to torchao: linear layers only, no block is one."""
    quantize = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if quantize is None or torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no dynamic quantisation on this CPU")
    model = trained([kind] * 3)
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_whose_layers_are_checkpointed_has_the_same_gradients(kind):
    """A layer with its block is called again as a whole, from the tuple of activations that it was given."""
    model, calls = trained([kind] * 3), []
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


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    results = {"start": whole(start_sharded().state_dict()), "weights": sharded_weights()}
    results["replicated"] = replicated()
    model = shard(trained(list(ALL_KINDS)).double())
    loss = train(model, images(8).double()[4 * rank : 4 * rank + 4])
    dist.all_reduce(loss)
    shares = {name: len(p.to_local()) for name, p in model.named_parameters()}
    results["trained"] = (loss / 2, shares, whole(dict(model.named_parameters())), whole(gradients(model)))
    if rank == 0:
        torch.save(results, f"{folder}/results")
    dist.barrier()  # neither leaves while the other still talks to it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    if not dist.is_available() or not hasattr(importlib.import_module("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("fully_shard is in torch 2.6 and newer")
    folder = tmp_path_factory.mktemp("sharded")
    mp.spawn(work, (str(folder),), nprocs=2)
    return torch.load(folder / "results", weights_only=True)


def test_trains_sharded_in_two_processes_as_in_one(two_processes):
    """All kinds of blocks in one model, half of the batch and half of each block's parameters in each process."""
    loss, shares, trained_weights, grads = two_processes["trained"]
    model = trained(list(ALL_KINDS)).double()  # AdamW makes much of rounding errors
    torch.testing.assert_close(loss, train(model, images(8).double()))
    for name, p in model.named_parameters():
        assert shares[name] == (len(p) + 1) // 2, name
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
