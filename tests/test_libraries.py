"""The blocks in models of other libraries: the dependency group interop, pip install --group interop.

Every model here is built from a configuration; nothing is downloaded.
"""

import copy
import importlib
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from block_properties import Layers
from kinds import KINDS, D, LAuReL_LR, LAuReL_PA, R, branches, gradients, library, random_, randomize_blocks
from torch import Tensor, nn

from LAuReL import LAuReL


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


def layer_of_the_page(head: str) -> type[nn.Module]:
    """The class that docs/other-libraries.md has its readers copy."""
    page = (Path(__file__).parents[1] / "docs" / "other-libraries.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if head in block)
    names: dict = {}
    exec(code.partition("\nmodel = ")[0], names)
    return names[re.match(r"class (\w+)", head)[1]]


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
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=D, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    random_(transformers.LlamaForCausalLM(config)).save_pretrained(folder)
    plain, model = (transformers.LlamaForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    give_residuals(model.model.layers, layer_of_the_page("class LlamaDecoderLayer"), make)
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
    options = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": 3, "num_heads": 2, "num_classes": 10}
    plain = random_(timm.create_model("vit_tiny_patch16_224", init_values=0.5, **options)).eval()
    model = copy.deepcopy(plain)
    give_residuals(model.blocks, layer_of_the_page("class Layer(timm"), KINDS[kind])
    if kind not in WITHOUT_HISTORY:
        model.blocks = PABlocks(*model.blocks)
    return plain, model


@pytest.mark.parametrize("kind", KINDS)
def test_a_vit_of_timm_with_blocks_starts_as_the_same_function(kind):
    assert_starts_as(*vit_pair(kind), torch.randn(2, 3, 32, 32))


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
    plain = timm.create_model("resnet18", num_classes=10, channels=(8, 16, 24, 32)).eval()
    layers = [module for module in plain.modules() if isinstance(module, basic)]
    assert len(layers) == 8
    for layer in layers:
        nn.init.uniform_(layer.bn2.weight, 0.5, 1.5)  # it starts at zero, without a branch
    model, layer_class = copy.deepcopy(plain), layer_of_the_page("class Layer(BasicBlock)")
    for layer in [module for module in model.modules() if isinstance(module, basic)]:
        layer.__class__ = layer_class
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


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_hyper_connections_start_but_for_the_number_of_streams(kind):
    """Without streams they are the plain residual, to the last bit; s of them, summed, are s times that."""
    fs, x = branches(), torch.randn(2, 5, D)
    ours = Layers(fs, KINDS[kind])(x)
    assert torch.equal(Streams(fs, 4, disable=True)(x), ours)
    torch.testing.assert_close(Streams(fs, 4)(x), 4 * ours)
