from dataclasses import replace

import numpy as np
import pytest
import torch
from block_properties import randomize
from torch import nn

import TrainUtil
from comparison.models import Model, residual_layers
from comparison.networks import SmallCNN
from comparison.text import synthetic_text
from comparison.transformers import GPT

NAMES = ("rezero", "layerscale", "x0", "denseformer")
LAYERS, D = 4, 6


def layers(name: str, channel_dim: int = -1) -> list[nn.Module]:
    model = Model.parse(name)
    return [model.residual(D, available=i + 1, channel_dim=channel_dim) for i in range(LAYERS)]


def f(x):
    return x.cos() * 0.7


def reading(name: str, into_f: np.ndarray, x: np.ndarray, residuals: list[nn.Module]) -> np.ndarray:
    """The equations with the sums written out, and a ReLU after each addition, as in a ResNet."""
    weights = [{key: p.detach().numpy() for key, p in each.named_parameters()} for each in residuals]
    first, ys = x, [x]
    for w in weights:
        fx = 0.7 * np.cos(into_f)
        match name:
            case "rezero" | "layerscale":
                x = np.maximum(x + w["alpha"] * fx, 0)
            case "x0":
                x = np.maximum(w["beta"] * x + w["mu"] * first + fx, 0)
            case "denseformer":
                ys.append(np.maximum(x + fx, 0))
                x = np.tensordot(w["a"], np.stack(ys), axes=1)
        into_f = x
    return x


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_has_the_equation_of_its_source(name, channel_dim):
    residuals, inputs = layers(name, channel_dim), torch.randn(2, 3, 5, D)
    for each in residuals:
        randomize(each)
    both = (each.movedim(-1, channel_dim) for each in inputs)
    y = residual_layers(*both, [f] * LAYERS, residuals, activation=torch.relu)
    expected = reading(name, *inputs.numpy(), residuals)
    np.testing.assert_allclose(y.movedim(channel_dim, -1).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)])
def test_has_the_dtype_of_x_plus_f(name, dtypes):
    """A stream in float32 with f in bfloat16 is that of a GPT under autocast."""
    x = torch.randn(3, 5, D, dtype=dtypes[0])
    assert residual_layers(x, x, [lambda x: f(x).to(dtypes[1])] * LAYERS, layers(name)).dtype == dtypes[0]


@pytest.mark.parametrize("name", ["residual", *NAMES])
def test_every_parameter_of_a_gpt_is_trained(name):
    """Its f start at zero, which an α at zero would leave there."""
    data = synthetic_text()
    net = GPT(Model.parse(name), 0, dim=64, layers=2)
    before = {key: p.clone() for key, p in net.named_parameters()}
    tokens = next(data.batches(0, 0, 8))[0]
    torch.testing.assert_close(net(tokens), net.head(net.embedding(tokens)), rtol=0, atol=0)
    TrainUtil.train({name: net}, data.limit(24), replace(TrainUtil.TEXT, epochs=2), 0)
    assert not [key for key, p in net.named_parameters() if torch.equal(p, before[key])]


@pytest.mark.parametrize("name", NAMES)
def test_is_trained_as_a_scale_with_its_own_rate(name, data):
    net = SmallCNN(Model.parse(name), 0, data)
    own = [id(p) for stage in net.stages for p in stage.residuals.parameters()]
    _, adam = TrainUtil.optimizers(net, TrainUtil.Recipe(scale_lr=0.5, block_rate=3.0))
    assert own == [id(p) for group in adam.param_groups for p in group["params"] if group["lr"] == 1.5]
