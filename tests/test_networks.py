import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision

from comparison.data import normalize
from comparison.models import MODELS, Model
from comparison.networks import ARCHS, Conv, Shortcut, SmallCNN, whitening_filters


@pytest.fixture(scope="module", params=["small", "resnet20", "vit", "resnet18", "resnet50"])
def networks(data, request) -> dict[str, torch.nn.Module]:
    names = ["residual", "rw+lr+pa", "deeper", "denseformer"]
    if request.param == "small":
        names = [*MODELS, "lr@8", "pa/5", "rw+lr+pa@4/2", "rw:dim=D", "pa:rank=none", "pa:shared=false"]
    few = data.limit(100)  # to find the whitening filters from
    return {name: ARCHS[request.param](Model.parse(name), 3, few) for name in names}


def test_all_models_share_f_to_the_bit(networks):
    shared = networks["residual"].state_dict()
    for name, network in networks.items():
        state = network.state_dict()
        assert shared.keys() <= state.keys(), name
        for key, value in shared.items():
            assert torch.equal(state[key], value), (name, key)


def test_all_models_start_as_the_same_function(networks, data):
    x = normalize(data.test_images[:8])
    for training in (True, False):
        outputs = {name: network.train(training)(x) for name, network in networks.items()}
        for name, output in outputs.items():
            same = name not in ("rezero", "layerscale")  # which start with less of f
            assert torch.equal(output, outputs["residual"]) == same, name


def test_seeds_differ_and_building_a_model_leaves_the_random_numbers_alone(data):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    states = [SmallCNN(Model.parse("rw+lr+pa:init=xavier"), seed, data).state_dict() for seed in (0, 1)]
    assert torch.equal(torch.rand(3), expected)
    for key in ("stages.0.branches.0.0.weight", "stages.0.residuals.0.A"):
        assert not torch.equal(states[0][key], states[1][key])
    first, second = (states[0][f"stages.0.residuals.{i}.A"] for i in (0, 1))
    assert not torch.equal(first[0], second[0])


def test_of_a_single_pixel_a_convolution_is_that_of_the_whole_filters():
    convolution, x = Conv(5, 7).double(), torch.randn(4, 5, 1, 1, dtype=torch.float64, requires_grad=True)
    found, expected = convolution(x), F.conv2d(x, convolution.weight, padding=1)
    torch.testing.assert_close(found, expected)
    g = torch.randn_like(found)
    for mine, whole in zip(*(torch.autograd.grad(y, (x, convolution.weight), g) for y in (found, expected))):
        torch.testing.assert_close(mine, whole)


def test_every_trainable_parameter_gets_a_gradient(networks, data):
    """No γ and no low-rank pair waits for an activation that is never there. B and a gain of 0 are moved first."""
    x = normalize(data.train_images[:8])
    for name, network in networks.items():
        network = copy.deepcopy(network)
        with torch.no_grad():
            for key, p in network.named_parameters():
                if key.endswith(".B") or (p == 0).all():
                    p.normal_(std=0.01)
        network.train()(x).square().sum().backward()
        for key, p in network.named_parameters():
            assert not p.requires_grad or (p.grad is not None and p.grad.abs().sum() > 0), (name, key)


def test_added_parameters_are_the_papers(data):
    """2 a layer for RW, 2rD for LR; PA 2rD + k with the k that the stage has; eq. 6: 2rkD + k + 2."""
    data = data.limit(100)
    baseline = sum(p.numel() for p in SmallCNN(Model.parse("residual"), 0, data).parameters())
    layers = [(d, j + 1) for d, n in zip((32, 64, 128), SmallCNN.layers) for j in range(n)]  # D, activations there
    for name, expected in {
        "rw": 2 * len(layers),
        "lr@8": sum(2 * 8 * d for d, _ in layers),
        "rw+lr": sum(2 * 16 * d + 2 for d, _ in layers),
        "pa": sum(2 * 16 * d + min(3, n) for d, n in layers),
        "pa/2": sum(2 * 16 * d + min(2, n) for d, n in layers),
        "rw+pa@4": sum(2 * 4 * d + min(3, n) + 2 for d, n in layers),
        "rw+lr+pa@4/2": sum(2 * 4 * min(2, n) * d + min(2, n) + 2 for d, n in layers),
        "deeper": 9 * 64 * 64 + 2 * 64,
    }.items():
        parameters = sum(p.numel() for p in SmallCNN(Model.parse(name), 0, data).parameters())
        assert parameters - baseline == expected, name


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("name", ["residual", "pa"])
def test_imagenet_resnets_are_torchvisions_with_its_weights(arch, name, data):
    theirs = getattr(torchvision.models, arch)(num_classes=data.classes)
    ours = ARCHS[arch](Model.parse(name), 0, data)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert unexpected == []
    assert all(".residual." in key for key in missing)
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))


def test_large_images_are_whitened_by_one_of_them_at_least():
    images = torch.rand(1, 3, 8, 8)
    data = SimpleNamespace(size=3000, sample=lambda n: images[:n], normalize=lambda images: images)
    assert whitening_filters(data).isfinite().all()


def test_parameters_added_to_resnet_50(data):
    """Table 1 of the paper has 4.37 % for one more layer, 0.003 for RW, 1.68 for RW+LR, 2.40 for RW+LR+PA.

    It does not say where its blocks stand; these are in each of the 16 layers, at the width of the layer's output.
    """
    data = replace(data, classes=1000)
    names = ("residual", "deeper", "rw", "rw+lr", "rw+lr+pa")
    parameters = [sum(p.numel() for p in ARCHS["resnet50"](Model.parse(n), 0, data).parameters()) for n in names]
    plain, *others = parameters
    assert plain == 25_557_032  # torchvision's
    layers = [(d, i + 1) for d, n in zip((256, 512, 1024, 2048), (3, 4, 6, 3)) for i in range(n)]
    pairs = sum(2 * 16 * d * min(3, i) + min(3, i) for d, i in layers)
    expected = [1_117_184, 2 * 16, sum(2 * 16 * d + 2 for d, _ in layers), pairs + 2 * 16]
    assert [n - plain for n in others] == expected
    assert round(100 * expected[0] / plain, 2) == 4.37


@pytest.mark.parametrize(("arch", "parameters"), [("resnet20", 0.27), ("resnet32", 0.46), ("resnet56", 0.85)])
def test_resnets_have_the_parameters_and_the_depth_of_he_et_al(arch, parameters, data):
    """Table 6 of "Deep residual learning for image recognition", in millions."""
    net = ARCHS[arch](Model.parse("residual"), 0, data)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == parameters
    layers = [m for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert f"resnet{len(layers)}" == arch
    shapes = [stage(x).shape[1:] for stage, x in [(net.stages[0], torch.rand(2, 16, 32, 32))]]
    shapes += [
        stage(torch.rand(2, c, size, size)).shape[1:] for stage, c, size in zip(net.stages[1:], (16, 32), (32, 16))
    ]
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_a_shortcut_takes_every_other_pixel_and_adds_empty_channels():
    x = torch.rand(2, 16, 8, 8)
    y = Shortcut(16, 32)(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert y.shape == (2, 32, 4, 4)
    assert not y[:, 16:].any()


def test_whitened_patches_are_uncorrelated_with_unit_variance(data):
    """For natural images; the noise of 5e-4 that is added to the variances is far below those of the made-up ones."""
    net = SmallCNN(Model.parse("residual"), 0, data)
    out = net.whitening(normalize(data.train_images[:5000]))[:, :8, ::2, ::2]
    covariance = out.transpose(0, 1).flatten(1).double()
    covariance = covariance @ covariance.T / covariance.shape[1]
    torch.testing.assert_close(covariance, torch.eye(8).double(), rtol=0, atol=0.05)
