import numpy as np
import pytest
import torch
from block_properties import randomize
from torch import nn

import TrainUtil
from comparison.models import Model, residual_layers
from comparison.networks import SmallCNN

NAMES = ("rezero", "layerscale", "x0", "denseformer")
LAYERS, D = 4, 6


def layers(name: str, channel_dim: int = -1) -> list[nn.Module]:
    model = Model.parse(name)
    return [model.residual(D, available=i + 1, channel_dim=channel_dim) for i in range(LAYERS)]


def f(x):
    return x.cos() * 0.7


def reading(name: str, x: np.ndarray, residuals: list[nn.Module]) -> np.ndarray:
    """The equations as their papers have them, with the sums written out."""
    weights = [{key: p.detach().numpy() for key, p in each.named_parameters()} for each in residuals]
    first, ys = x, [x]
    for w in weights:
        fx = 0.7 * np.cos(x)
        match name:
            case "rezero" | "layerscale":
                x = x + w["alpha"] * fx
            case "x0":
                x = w["beta"] * x + w["mu"] * first + fx
            case "denseformer":
                ys.append(x + fx)
                x = np.tensordot(w["a"], np.stack(ys), axes=1)
    return x


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_has_the_equation_of_its_source(name, channel_dim):
    residuals, x = layers(name, channel_dim), torch.randn(3, 5, D)
    for each in residuals:
        randomize(each)
    y = x if channel_dim == -1 else x.movedim(-1, 1)
    y = residual_layers(y, y, [f] * LAYERS, residuals)
    y = y if channel_dim == -1 else y.movedim(1, -1)
    np.testing.assert_allclose(y.detach().numpy(), reading(name, x.numpy(), residuals), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_has_the_dtype_of_x_and_f(name, dtype):
    x = torch.randn(3, 5, D, dtype=dtype)
    assert residual_layers(x, x, [f] * LAYERS, layers(name)).dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_is_trained_as_a_scale_with_its_own_rate(name, data):
    net = SmallCNN(Model.parse(name), 0, data)
    own = [id(p) for stage in net.stages for p in stage.residuals.parameters()]
    _, adam = TrainUtil.optimizers(net, TrainUtil.Recipe(scale_lr=0.5, block_rate=3.0))
    assert own == [id(p) for group in adam.param_groups for p in group["params"] if group["lr"] == 1.5]
