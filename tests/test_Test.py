import copy
import csv
import hashlib
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import warnings
import weakref
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import torch.nn.functional as F
import torchvision
from packaging.requirements import Requirement
from rich.console import Console
from scipy import stats
from torchvision.datasets import CIFAR10
from torchvision.transforms.functional import to_pil_image

import Test
import TrainUtil
from Test import GPT, MODELS, Model, SmallCNN

resource = pytest.importorskip("resource") if os.name == "posix" else None
ROOT = Path(__file__).parents[1]
PICTURES = ("accuracy.png", "differences.png", "parameters.png", "learned.png")
SYNTHETIC = ("--dataset", "synthetic", "--limit", "400", "--batch-size", "100", "--epochs", "1")


def run(*options: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "Test.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# The models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> TrainUtil.Dataset:
    return TrainUtil.synthetic()


@pytest.fixture(scope="module", params=["small", "resnet20", "vit", "resnet18", "resnet50"])
def networks(data, request) -> dict[str, torch.nn.Module]:
    names = (*MODELS, "lr@8", "pa/5", "rw+lr+pa@4/2", "rw:dim=D", "pa:rank=none", "pa:shared=false")
    if request.param == "resnet50":  # 100 MB each
        names = ("residual", "rw+lr+pa", "deeper")
    return {name: Test.ARCHS[request.param](Model.parse(name), 3, data) for name in names}


def test_all_models_share_f_to_the_bit(networks):
    shared = networks["residual"].state_dict()
    for name, network in networks.items():
        state = network.state_dict()
        assert shared.keys() <= state.keys(), name
        for key, value in shared.items():
            assert torch.equal(state[key], value), (name, key)


def test_all_models_start_as_the_same_function(networks, data):
    x = TrainUtil.normalize(data.test_images[:64])
    for training in (True, False):
        outputs = {name: network.train(training)(x) for name, network in networks.items()}
        for name, output in outputs.items():
            assert torch.equal(output, outputs["residual"]), name


def test_all_models_take_the_same_batches(networks, data, monkeypatch):
    seen: dict[str, list] = {}

    def recording(*args):
        for x, y in batches(*args):
            seen[name].append((x, y))
            yield x, y

    batches = TrainUtil.Dataset.batches
    monkeypatch.setattr(TrainUtil.Dataset, "batches", recording)
    recipe = TrainUtil.Recipe(epochs=2, batch_size=100)
    for name in ("residual", "rw+lr+pa", "deeper"):
        seen[name] = []
        TrainUtil.train(SmallCNN(Model.parse(name), 0, data), data.limit(200), recipe, 0)
    assert len(seen["residual"]) == 4
    for mine, theirs in zip(seen["rw+lr+pa"], seen["residual"]):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs))
    for mine, theirs in zip(seen["deeper"], seen["residual"]):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs))


def test_a_wide_network_trains_too(data):
    network = SmallCNN(Model.parse("rw+lr+pa"), 0, data, (64, 256, 256))
    assert [stage.down[0].out_channels for stage in network.stages] == [64, 256, 256]
    recipe = TrainUtil.Recipe(epochs=4, batch_size=16, sizes=((16, 0.5), (32, 1.0)))
    history = TrainUtil.train(network, data.limit(64), recipe, 0)["history"]
    assert history[3]["train_loss"] < history[0]["train_loss"]


def test_seeds_differ_and_building_a_model_leaves_the_random_numbers_alone(data):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    states = [SmallCNN(Model.parse("rw+lr+pa"), seed, data).state_dict() for seed in (0, 1)]
    assert torch.equal(torch.rand(3), expected)
    for key in ("stages.0.branches.0.0.weight", "stages.0.residuals.0.A"):
        assert not torch.equal(states[0][key], states[1][key])


def test_every_trainable_parameter_gets_a_gradient(networks, data):
    """No γ and no low-rank pair waits for an activation that is never there. B and a gain of 0 are moved first."""
    x = TrainUtil.normalize(data.train_images[:64])
    for name, network in networks.items():
        network = copy.deepcopy(network)
        with torch.no_grad():
            for key, p in network.named_parameters():
                if key.endswith(".B") or (p == 0).all():
                    p.normal_(std=0.01)
        network.train()(x).square().sum().backward()
        for key, p in network.named_parameters():
            assert not p.requires_grad or (p.grad is not None and p.grad.abs().sum() > 0), (name, key)


def test_added_parameters_are_the_papers():
    """2 a layer for RW, 2rD for LR; PA 2rD + k with the k that the stage has; eq. 6: 2rkD + k + 2."""
    data = TrainUtil.synthetic()
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
@pytest.mark.parametrize("name", ["residual", "rw", "lr", "pa"])
def test_imagenet_resnets_are_torchvisions_with_its_weights(arch, name, data):
    theirs = getattr(torchvision.models, arch)(num_classes=data.classes)
    ours = Test.ARCHS[arch](Model.parse(name), 0, data)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert unexpected == []
    assert all(".residual." in key for key in missing)
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))


def test_parameters_added_to_resnet_50():
    """Table 1 of the paper has 4.37 % for one more layer, 0.003 for RW, 1.68 for RW+LR, 2.40 for RW+LR+PA.

    It does not say where its blocks stand; these are in each of the 16 layers, at the width of the layer's output.
    """
    data = replace(TrainUtil.synthetic(), classes=1000)
    names = ("residual", "deeper", "rw", "rw+lr", "rw+lr+pa")
    parameters = [sum(p.numel() for p in Test.ARCHS["resnet50"](Model.parse(n), 0, data).parameters()) for n in names]
    plain, *others = parameters
    assert plain == 25_557_032  # torchvision's
    layers = [(d, i + 1) for d, n in zip((256, 512, 1024, 2048), (3, 4, 6, 3)) for i in range(n)]
    pairs = sum(2 * 16 * d * min(3, i) + min(3, i) for d, i in layers)
    expected = [1_117_184, 2 * 16, sum(2 * 16 * d + 2 for d, _ in layers), pairs + 2 * 16]
    assert [n - plain for n in others] == expected
    assert round(100 * expected[0] / plain, 2) == 4.37


def test_parameters_added_to_the_language_model_of_table_5():
    """24 layers, D = 768, r = 32, k = 3, one block a layer: 1.20M for LR and 3.63M for RW+LR+PA, of rounded totals."""
    for name, paper in (("lr@32", 1.20e6), ("rw+lr+pa@32/3", 3.63e6)):
        block = Model.parse(name).residual(768, available=3, channel_dim=-1)
        assert 24 * sum(p.numel() for p in block.parameters()) == pytest.approx(paper, rel=0.03)


@pytest.mark.parametrize(("name", "most"), [("residual", 2), ("rw+lr", 2), ("pa/2", 9)])
def test_only_pa_keeps_activations_at_inference(name, most):
    alive, counts = weakref.WeakSet(), []

    def branch(x):
        alive.add(x)
        counts.append(len(alive))
        return x.cos()

    residuals = [Model.parse(name).residual(4, available=i + 1, channel_dim=-1) for i in range(9)]
    with torch.inference_mode():
        x = torch.zeros(2, 4)
        Test.residual_layers(x, x, [branch] * 9, residuals)
    assert max(counts) <= most
    assert (max(counts) == 9) == name.startswith("pa")


@pytest.mark.parametrize("name", ["residual", "rw", "lr", "pa", "rw+lr", "rw+lr+pa", "deeper"])
def test_a_gpt_learns_characters_from_pythons_documentation(name):
    """A few hundred steps bring it below what the frequencies of the characters alone allow."""
    text = torch.tensor(list("".join(topics.values()).encode()))
    frequencies = text.bincount().double() / len(text)
    entropy = -(frequencies * frequencies.log()).nansum()
    net = GPT(Model.parse(name), 64, 2, 64)
    adam = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.0)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(200):
        start = torch.randint(len(text) - 65, (16, 1), generator=generator)
        tokens = text[start + torch.arange(65)]
        loss = F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert statistics.mean(losses[-20:]) < entropy - 0.3
    start = {"gamma": 0.0 if name == "pa" else 1.0}  # of the weights that are not bounded
    for key, p in net.named_parameters():
        if re.search(r"residuals\.\d+\.(w|B|gamma)$", key):
            assert (p != start.get(key.rpartition(".")[2], 0.0)).any(), key


def test_a_vit_sees_images_of_every_size_of_the_recipe(data):
    net = Test.ARCHS["vit"](Model.parse("residual"), 0, data)
    for size in (16, 24, 32):
        assert net(torch.zeros(2, 3, size, size)).shape == (2, 10)


def test_what_the_gpt_keeps_for_the_backward_pass():
    """Ratios to the plain residual connection. They are exact, so that the bounds leave room for rounding alone."""
    tokens = torch.zeros(4, 256, dtype=torch.long)

    def saved(name: str) -> int:
        model = GPT(Model.parse(name), 768, 4, 256)
        return TrainUtil.saved_bytes(model, lambda: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))

    plain = saved("residual")
    for name, most in {
        "rw": 1.1204,
        "lr": 1.0050,
        "pa": 1.0000,
        "rw+lr": 1.1292,
        "rw+pa": 1.1204,
        "rw+lr+pa": 1.1435,
    }.items():
        assert saved(name) / plain < most + 0.0001, name


@pytest.mark.parametrize(("arch", "parameters"), [("resnet20", 0.27), ("resnet32", 0.46), ("resnet56", 0.85)])
def test_resnets_have_the_parameters_and_the_depth_of_he_et_al(arch, parameters, data):
    """Table 6 of "Deep residual learning for image recognition", in millions."""
    net = Test.ARCHS[arch](Model.parse("residual"), 0, data)
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
    y = Test.Shortcut(16, 32)(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert y.shape == (2, 32, 4, 4)
    assert not y[:, 16:].any()


def test_a_models_name_sets_the_arguments_of_its_blocks():
    blocks = {
        name: Model.parse(name).residual(8, available=3, channel_dim=1)
        for name in (
            "rw:bound=none",
            "rw:scale=1,bound=sigmoid",
            "rw:dim=D",
            "rw+lr@2:init=orthogonal,scale=0.5",
            "pa/2:rank=none",
            "pa:shared=false",
        )
    }
    unbounded, sigmoid, vectors, lr, identity, apart = blocks.values()
    assert unbounded.bound == "none"
    assert (sigmoid.scale, sigmoid.bound, sigmoid.dim) == (1, "sigmoid", None)
    assert vectors.w.shape == (16,)
    assert (lr.init, lr.scale, lr.rank, lr.residual_weights) == ("orthogonal", 0.5, 2, True)
    assert (identity.rank, identity.k) == (None, 2)
    assert apart.A.shape[0] == 3
    assert Model.parse("rw+lr:decay=0.1").decay == 0.1


def test_weight_decay_in_a_models_name_is_its_blocks_alone(data):
    net = SmallCNN(Model.parse("rw+lr"), 0, data)
    _, adam = TrainUtil.optimizers(net, TrainUtil.Recipe(block_decay=0.1))
    decayed = [id(p) for group in adam.param_groups for p in group["params"] if group["weight_decay"] == 0.1]
    assert sorted(decayed) == sorted(id(p) for stage in net.stages for p in stage.residuals.parameters())
    assert {group["weight_decay"] for group in adam.param_groups} == {0.0, 0.1}


def test_whitened_patches_are_uncorrelated_with_unit_variance(data):
    """For natural images; the noise of 5e-4 that is added to the variances is far below those of the made-up ones."""
    net = SmallCNN(Model.parse("residual"), 0, data)
    out = net.whitening(TrainUtil.normalize(data.train_images[:5000]))[:, :8, ::2, ::2]
    covariance = out.transpose(0, 1).flatten(1).double()
    covariance = covariance @ covariance.T / covariance.shape[1]
    torch.testing.assert_close(covariance, torch.eye(8).double(), rtol=0, atol=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


def runs_of(accuracies: dict[str, list[float]], **more) -> list[dict]:
    common = {"parameters": 10, "train_seconds": 1.0, "images_per_second": 1.0, "compile_seconds": 0.0, **more}
    return [
        {"model": model, "seed": seed, "test_accuracy": value, **common}
        for model, values in accuracies.items()
        for seed, value in enumerate(values)
    ]


def test_paired_test_is_that_of_a_known_study():
    """Student's own example (1908), the hours of sleep that two drugs gained; the numbers are those of R's manual."""
    drug_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    drug_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    result = Test.paired_test(drug_1, drug_2)
    assert result["p"] == pytest.approx(0.002833, abs=1e-6)
    assert result["interval"] == pytest.approx((-2.4598858, -0.7001142))


def test_paired_test_is_a_one_sample_test_of_the_differences():
    a, b = torch.randn(2, 7, generator=torch.Generator().manual_seed(0)).tolist()
    differences = [x - y for x, y in zip(a, b)]
    expected = stats.ttest_1samp(differences, 0)
    result = Test.paired_test(a, b)
    assert result["p"] == pytest.approx(expected.pvalue)
    assert result["interval"] == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert result["paired_sd"] == pytest.approx(stats.tstd(differences))


def test_nothing_is_tested_where_there_is_one_pair_or_no_difference():
    for a, b in [((), ()), ([1.0], [2.0]), ([1.0, 2.0], [0.5, 1.5])]:
        assert Test.paired_test(a, b)["p"] is Test.paired_test(a, b)["interval"] is None


def test_holms_correction():
    """Worked by hand: the smallest p times their number, the next times one less, and none below one before it."""
    assert Test.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert Test.holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert Test.holm([0.7, 0.8]) == [1.0, 1.0]
    assert Test.holm([]) == []


def test_studies_without_an_effect_show_one_in_five_of_a_hundred():
    """1000 studies of equal models. Uncorrected, 5 % of the differences are false; corrected, 5 % of the studies."""
    generator = torch.Generator().manual_seed(0)
    raw, shown, inside = [], [], []
    for _ in range(1000):
        seeds = 0.87 + 0.002 * torch.randn(6, generator=generator)  # what all models of a seed have in common
        noise = 0.002 * torch.randn(5, 6, generator=generator)
        names = ("residual", "rw", "lr", "pa", "deeper")
        entries = Test.summarize(runs_of({name: (seeds + own).tolist() for name, own in zip(names, noise)}))[1:]
        raw += [entry["p"] < 0.05 for entry in entries]
        inside += [entry["interval"][0] < 0 < entry["interval"][1] for entry in entries]
        shown.append(any(entry["p_holm"] < 0.05 for entry in entries))
    assert 0.03 < statistics.mean(raw) < 0.07
    assert 0.93 < statistics.mean(inside) < 0.97
    assert 0.02 < statistics.mean(shown) < 0.065


def test_a_difference_that_may_be_none_is_shown_as_such():
    base = [0.870, 0.872, 0.868, 0.871, 0.869]
    better = [value + gain for value, gain in zip(base, (0.011, 0.009, 0.010, 0.012, 0.008))]
    unclear = [value + gain for value, gain in zip(base, (0.004, -0.002, 0.003, -0.001, 0.002))]
    worse = [value - gain for value, gain in zip(base, (0.011, 0.009, 0.010, 0.012, 0.008))]
    alone = runs_of({"residual": base, "rw": better, "lr": unclear, "pa": worse})
    columns = {c.header: list(c.cells) for c in Test.table({**CONFIG, "seeds": 5}, alone).columns}
    assert columns["significant"] == ["–", "higher", "no", "lower"]
    assert columns["difference to residual"] == ["–", "+1.00", "+0.12", "-1.00"]
    low, high = map(float, columns["95 % interval"][2].strip("\\[]").split(","))
    assert low < 0 < high


def test_many_comparisons_make_a_small_p_count_for_less():
    """p = 0.03 alone shows a difference; one of six such does not."""
    base = [0.870, 0.872, 0.868, 0.871, 0.869]
    slightly = [value + gain for value, gain in zip(base, (0.0012, 0.0030, 0.0004, 0.0024, 0.0010))]
    for others, expected in [((), "higher"), (("lr", "pa", "rw+lr", "rw+pa", "deeper"), "no")]:
        noise = [value + gain for value, gain in zip(base, (0.004, -0.002, 0.003, -0.003, 0.002))]
        runs = runs_of({"residual": base, "rw": slightly, **dict.fromkeys(others, noise)})
        columns = {c.header: list(c.cells) for c in Test.table({**CONFIG, "seeds": 5}, runs).columns}
        assert columns["significant"][1] == expected


def test_pairing_takes_out_what_the_seeds_have_in_common():
    seeds = [0.86, 0.87, 0.88, 0.89]
    own = [0.004, -0.004, 0.002, 0.0]
    mine = [a + b for a, b in zip(seeds, own)]
    _, entry = Test.summarize(runs_of({"residual": seeds, "rw": mine}))
    assert entry["paired_sd"] == pytest.approx(100 * stats.tstd(own))
    assert entry["unpaired_sd"] == pytest.approx(100 * (stats.tstd(seeds) ** 2 + stats.tstd(mine) ** 2) ** 0.5)


def test_a_run_that_diverged_is_counted_and_left_out():
    runs = runs_of({"residual": [0.87, 0.88, 0.89], "rw": [0.88, 0.1, 0.90]})
    runs[4]["diverged"] = 2
    rows = list(zip(*(column.cells for column in Test.table({**CONFIG, "seeds": 3}, runs).columns)))
    assert rows[1][3] == "89.00 ± 1.41 (2 of 3 seeds, 1 diverged)"
    assert rows[1][4] == "+1.00"


CONFIG = {
    "data": "", "training_images": 0, "epochs": 1, "device_name": "", "precision": "", "compile": False, "parallel": 1,
    "processes": 1,
    "arch": "small", "seeds": 1, "against": "residual",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    out = tmp_path_factory.mktemp("runs") / "finished"
    return run(*SYNTHETIC, "--models", "residual", "rw", "rw+lr+pa@4/2", "--seeds", "2", "--out", str(out)), out


def test_a_whole_run_leaves_its_files(finished):
    done, out = finished
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    config, runs = results["config"], results["runs"]
    assert {
        "models",
        "epochs",
        "batch_size",
        "seeds",
        "device",
        "precision",
        "compile",
        "dataset",
        "limit",
    } <= config.keys()
    assert {"recipe", "torch", "torchvision", "python", "device_name", "git_commit"} <= config.keys()
    assert [(run["model"], run["seed"]) for run in runs] == [
        (model, seed) for seed in (0, 1) for model in ("residual", "rw", "rw+lr+pa@4/2")
    ]
    for one in runs:
        assert one["epochs"] == len(one["history"]) == 1
        assert one["parameters"] > 600_000
        assert 0 <= one["test_accuracy"] <= 1
        assert one["train_seconds"] > 0
        assert one["images_per_second"] > 0
        assert one["history"][0].keys() == {"epoch", "train_loss", "test_accuracy", "seconds"}
    assert runs[1]["learned"].keys() == {"alpha", "beta"}
    assert runs[2]["learned"].keys() == {"alpha", "beta", "gamma[0]", "gamma[1]"}
    assert list(runs[2]["learned"]["gamma[1]"]) == ["1.2", "2.2", "3.2", "3.3"]
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [float(row["test_accuracy"]) for row in rows] == [one["test_accuracy"] for one in runs]
    for name in PICTURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == sorted([".lock", "results.csv", "results.json", *PICTURES])


def test_the_table_is_that_of_the_results(finished):
    done, out = finished
    runs = json.loads((out / "results.json").read_text())["runs"]
    table = {
        cells[0]: cells[1:]
        for line in done.stdout.splitlines()
        if line.startswith("| r") and len(cells := [cell.strip() for cell in line.split("|")[1:-1]]) == 12
    }
    assert list(table) == ["residual", "rw", "rw+lr+pa@4/2"]
    assert table["residual"][0] == f"{runs[0]['parameters']:,}"
    a, b = (100 * one["test_accuracy"] for one in (runs[1], runs[4]))
    assert table["rw"][2] == f"{(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f}"
    c, d = (100 * one["test_accuracy"] for one in (runs[0], runs[3]))
    assert table["rw"][3] == f"{(a - c + b - d) / 2:+.2f}"
    assert table["rw"][7] == f"{abs(a - c - b + d) / 2**0.5:.2f}"
    assert table["residual"][3] == "–"
    assert "SYNTHETIC" in done.stdout
    for name in ("results.json", "results.csv", *PICTURES):
        assert str(out / name) in done.stdout.replace("\n", "")


def test_compilation_is_shown_apart_from_training(finished):
    results = json.loads((finished[1] / "results.json").read_text())
    runs = [{**one, "train_seconds": 1.0, "compile_seconds": 20.0} for one in results["runs"]]
    for compile in (False, True):
        columns = {c.header: list(c.cells) for c in Test.table({**results["config"], "compile": compile}, runs).columns}
        assert columns["training s"][0] == "1.0 ± 0.0"
        assert columns.get("compilation s", [None])[0] == ("20.0 ± 0.0" if compile else None)


def test_plain_lines_where_the_output_is_no_terminal(finished):
    lines = [line for line in finished[0].stdout.splitlines() if line.startswith("[")]
    assert len(lines) == 6
    assert re.fullmatch(
        r"\[2/6\] rw, seed 0, epoch 1/1, loss \d+\.\d+, accuracy \d+\.\d+ %, \d+ images/s, \d+:\d\d min left", lines[1]
    )
    assert "0:00 min left" in lines[-1]
    assert "\x1b" not in finished[0].stdout


def test_what_is_left_is_told_when_something_has_been_done(capsys, monkeypatch):
    history, clock = [{"train_loss": 1.0, "test_accuracy": 0.5}], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    for first, expected in ((0.5, None), (0.0, "1:00 min left")):  # the part of the run that its first report has done
        clock[0] = 0.0
        monitor = Test.Monitor(["residual, seed 0"], [False], 2)
        clock[0] = 59.7
        monitor.report(0, first, 100, 1.0, history[:0])
        monitor.report(0, 0.5, 100, 1.0, history)
        printed = capsys.readouterr().out
        assert (expected in printed) if expected else ("left" not in printed)


def test_a_table_has_names_as_they_are(finished):
    results = json.loads((finished[1] / "results.json").read_text())
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(Test.table({**results["config"], "data": "photos[small]"}, results["runs"]))
    assert "photos[small], 400 training images" in console.export_text()


@pytest.fixture(scope="module")
def profiled(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    out = tmp_path_factory.mktemp("profile")
    small = ("--seconds", "1", "--gpt", "64", "2", "16", "2", "--batch-size", "8")
    return run("--profile", *small, "--models", "rw", "pa/2", "--precision", "float32", "--out", str(out)), out


def test_profile_measures_every_model_in_the_same_rounds(profiled):
    done, out = profiled
    assert done.returncode == 0, done.stderr
    networks = json.loads((out / "profile.json").read_text())["networks"]
    cnn, gpt = networks.values()
    assert [entry["model"] for entry in cnn] == ["residual", "rw", "pa/2"]
    assert [entry["model"] for entry in gpt] == ["residual", "rw", "pa/2"]
    for costs in networks.values():
        for name in ("step_seconds", "inference_1_seconds", "inference_128_seconds"):
            rounds = {len(entry[name]) for entry in costs}
            assert len(rounds) == 1
            assert rounds.pop() >= 3
        for entry in costs:
            assert entry["peak_bytes"] is None
            assert f"{entry['parameters']:,}" in done.stdout
            assert entry["flops"] >= costs[0]["flops"]
    assert gpt[1]["saved_bytes"] > 1.05 * gpt[0]["saved_bytes"]


@pytest.mark.parametrize(
    ("chosen", "measured"), [("both", ["small CNN", "GPT"]), ("cnn", ["small CNN"]), ("gpt", ["GPT"])]
)
def test_profile_measures_the_networks_that_are_asked_for(chosen, measured, tmp_path, monkeypatch):
    monkeypatch.setattr(Test, "measure", lambda models, example, batch, options: list(models))
    options = Test.parse(["--profile", "--network", chosen, "--gpt", "64", "1", "8", "2", "--out", str(tmp_path)])
    measure = {network.split(",")[0]: names for network, names in Test.networks(options)}
    assert list(measure) == measured
    for network, names in measure.items():
        assert names == list(MODELS), network


def test_profile_shows_medians_of_ratios_within_a_round():
    base = {"model": "residual", "parameters": 9, "flops": 2e9, "saved_bytes": 4e6, "peak_bytes": None}
    other = {**base, "model": "rw", "parameters": 10, "flops": 3e9, "saved_bytes": 5e6}
    for name in ("step_seconds", "inference_1_seconds", "inference_128_seconds"):
        base[name], other[name] = [1.0, 2.0, 4.0, 8.0, 16.0], [1.1, 2.4, 5.2, 11.2, 24.0]  # a machine that slows down
    table = Test.profile_table({"device_name": "", "precision": "", "compile": False}, "GPT", [base, other])
    rows = list(zip(*(column.cells for column in table.columns)))
    assert rows[0][1:5] == ("9", "2 GFLOP", "4000 ms", "4000 ms")
    assert rows[1][1:4] == ("10", "1.5000", "1.300 (1.150–1.450)")
    assert rows[1][6:] == ("1.2500", "1.000", "1.024")  # and what table 5 has


def test_the_same_command_gives_the_same_numbers(finished, tmp_path):
    out = tmp_path / "again"
    run(*SYNTHETIC, "--models", "rw", "--out", str(out))
    (again,) = json.loads((out / "results.json").read_text())["runs"]
    before = json.loads((finished[1] / "results.json").read_text())["runs"][1]
    assert again["test_accuracy"] == before["test_accuracy"]
    assert again["history"][0]["train_loss"] == before["history"][0]["train_loss"]
    assert again["learned"] == before["learned"]


def test_runs_side_by_side_give_the_numbers_of_one_after_the_other(tmp_path):
    results = {}
    for n in ("1", "2"):
        options = ("--models", "residual", "pa", "--seeds", "2", "--parallel", n, "--threads", "1")
        options += ("--out", str(tmp_path / n))
        done = run(*SYNTHETIC, *options)
        assert done.returncode == 0, done.stderr
        results[n] = json.loads((tmp_path / n / "results.json").read_text())["runs"]
        assert len(re.findall(r"^\[[1-4]/4\] .* epoch 1/1", done.stdout, flags=re.MULTILINE)) == 4
    assert "2 runs at a time" in done.stdout
    for mine, theirs in zip(results["2"], results["1"]):
        for key in ("model", "seed", "test_accuracy", "learned", "weights_sha256"):
            assert mine[key] == theirs[key]
        assert mine["history"][0]["train_loss"] == theirs["history"][0]["train_loss"]


def test_a_cpu_may_have_a_number(tmp_path):
    options = [*SYNTHETIC, "--limit", "20", "--models", "rw", "--device", "cpu:0", "--out", str(tmp_path)]
    assert Test.main(options) == 0


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--models", "resnet"], ["'resnet'", *MODELS]),
        (["--models", "rw@8"], ["rw@8", "no rank"]),
        (["--models", "lr/3"], ["lr/3", "no k"]),
        (["--models", "lr@0"], ["lr@0", "at least 1"]),
        (["--seeds", "0"], ["--seeds", "at least 1", "'0'"]),
        (["--epochs", "-1"], ["--epochs", "at least 1", "-1"]),
        (["--epochs", "2.5"], ["--epochs", "whole number", "2.5"]),
        (["--device", "tpu"], ["'tpu'", "auto, cpu"]),
        (["--device", "cuda:99"], ["'cuda:99'", "auto, cpu"]),
        (["--precision", "float8"], ["float8", "float32", "bfloat16"]),
        (["--dataset", "mnist"], ["mnist", "cifar10", "synthetic"]),
        (["--out", str(Path(__file__))], ["--out", Path(__file__).name]),
        (["--models", "rw:norm=3"], ["'norm=3'", "bound=softmax|sigmoid|single|none", "dim=D"]),
        (["--models", "rw:bound=tanh"], ["'bound=tanh'", "softmax|sigmoid|single|none"]),
        (["--models", "rw:dim=64"], ["'dim=64'", "dim=D"]),
        (["--models", "rw:scale=0"], ["'rw:scale=0'", "positive"]),
        (["--models", "rw:scale=1,scale=2"], ["'rw:scale=1,scale=2'", "twice"]),
        (["--models", "pa@8:rank=none"], ["'pa@8:rank=none'", "twice"]),
        (["--models", "rw:scale=-1"], ["'scale=-1'", "scale=NUMBER"]),
        (["--models", "lr:shared=true"], ["'lr:shared=true'", "shared"]),
        (["--models", "pa:shared=no"], ["'shared=no'", "shared=true|false"]),
        (["--models", "pa:rank=2.5"], ["'rank=2.5'", "rank=none"]),
        (["--models", "rw:decay=-1"], ["'decay=-1'", "decay=NUMBER"]),
        (["--models", "deeper:scale=1"], ["'deeper:scale=1'", "scale would have no effect"]),
        (["--models", "residual:decay=1"], ["decay would have no effect"]),
        (["--models", "lr:bound=sigmoid"], ["bound would have no effect"]),
        (["--models", "lr:rank=none"], ["rank would have no effect"]),
        (["--models", "rw+lr:dim=D"], ["dim would have no effect"]),
        (["--models", "rw:init=orthogonal"], ["init would have no effect"]),
        (["--models", "rw:bound=none,scale=7"], ["scale would have no effect"]),
        (["--models", "pa:rank=none,init=orthogonal"], ["init would have no effect"]),
        (["--models", "pa:rank=none,shared=false"], ["shared would have no effect"]),
        (["--workers", "2"], ["--workers", "imagefolder"]),
        (["--image-size", "64"], ["--image-size", "imagefolder"]),
        (["--gpt", "100", "4", "256", "4"], ["--gpt", "100", "multiple of 64"]),
        (["--gpt", "64", "0", "256", "4"], ["--gpt", "at least 1", "'0'"]),
    ],
    ids=" ".join,
)
def test_bad_options_end_in_one_line_before_any_work(options, parts, capsys):
    with pytest.raises(SystemExit) as end:
        Test.main([*SYNTHETIC, *options])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    for part in parts:
        assert part in captured.err


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--hold-out", "5000"], "--hold-out must be below the 5000 training images, got 5000"),
        (["--limit", "7", "--accumulate", "8"], "a batch must have 8 images"),
    ],
)
def test_options_that_the_data_do_not_allow_are_refused(options, part, tmp_path, capsys):
    assert Test.main([*SYNTHETIC, *options, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert len(error.splitlines()) == 1


def test_an_image_that_is_broken_ends_a_study_with_what_it_had(tmp_path, capsys):
    """A folder of files: one is broken after the first run; whole again, the study goes on."""
    for part, n in (("train", 12), ("val", 4)):
        for label in range(2):
            (tmp_path / "images" / part / str(label)).mkdir(parents=True)
            for i in range(n):
                image = torch.full((3, 40, 40), 60 + 100 * label + i, dtype=torch.uint8)
                to_pil_image(image).save(tmp_path / "images" / part / str(label) / f"{i}.png")
    data = ["--dataset", "imagefolder", "--data-dir", str(tmp_path / "images"), "--image-size", "32", "--workers", "1"]
    options = [*data, "--batch-size", "8", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert Test.main([*options, "--models", "residual"]) == 0
    path = tmp_path / "images" / "train" / "1" / "3.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    assert Test.main([*options, "--models", "residual", "rw"]) == 2
    captured = capsys.readouterr()
    assert f"{path} can't be read as an image" in captured.err
    assert "| residual |" in captured.out  # its table is printed
    path.write_bytes(whole)
    assert Test.main([*options, "--models", "residual", "rw"]) == 0
    assert [run["model"] for run in json.loads((tmp_path / "out" / "results.json").read_text())["runs"]] == [
        "residual",
        "rw",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, started by torchrun
# ---------------------------------------------------------------------------------------------------------------------

TOGETHER = (*SYNTHETIC, "--limit", "200", "--device", "cpu", "--precision", "float32", "--arch", "vit")
TOGETHER += ("--models", "residual", "rw+lr+pa", "--threads", "1")


def torchrun(*options: str, restarts: int = 0) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*command, f"--max-restarts={restarts}", str(ROOT / "Test.py"), *options]


def workers(torchrun: int) -> list[int]:
    """The processes of a torchrun, in order of their rank."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(torchrun)], capture_output=True, text=True).stdout
    return sorted(int(line.split()[0]) for line in listed.splitlines() if "Test.py" in line)


def results(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())["runs"]


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    out = tmp_path_factory.mktemp("together")
    command = torchrun(*TOGETHER, "--epochs", "3", "--out", str(out))
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8"), out


def test_torchrun_gives_the_numbers_of_one_process_once(together, tmp_path):
    done, out = together
    assert done.returncode == 0, done.stderr
    assert len(re.findall("epoch 3/3", done.stdout)) == 2  # of two models: the first process alone prints
    assert done.stdout.count("2 processes") == 1
    assert Test.main([*TOGETHER, "--epochs", "3", "--out", str(tmp_path)]) == 0
    for mine, one in zip(results(out), results(tmp_path)):
        losses = ([entry["train_loss"] for entry in run["history"]] for run in (mine, one))
        torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
        assert mine["parameters"] == one["parameters"]
    assert json.loads((out / "results.json").read_text())["config"]["processes"] == 2
    assert Test.main([*TOGETHER, "--epochs", "3", "--out", str(out)]) == 2  # another number of processes


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_torchrun_compiles_and_accumulates_without_changing_the_losses(together, tmp_path):
    more = ("--epochs", "3", "--models", "rw+lr+pa", "--compile", "--accumulate", "2", "--out", str(tmp_path))
    done = subprocess.run(torchrun(*TOGETHER, *more), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = (
        [entry["train_loss"] for entry in runs[-1]["history"]] for runs in (results(tmp_path), results(together[1]))
    )
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    assert results(tmp_path)[0]["compile_seconds"] > 0


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps to find the processes")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_of_torchrun_that_dies_ends_the_run(rank, tmp_path):
    command = torchrun(*TOGETHER, "--epochs", "1000", "--models", "residual", "--out", str(tmp_path))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if "epoch 2/1000" in line:
                os.kill(workers(process.pid)[rank], signal.SIGKILL)
                break
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "SIGKILL" in errors
    assert results(tmp_path) == []  # and can be read


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps to find the processes")
@pytest.mark.parametrize("machines", [1, 2])
def test_torchruns_restart_goes_on_from_the_checkpoint(machines, together, tmp_path):
    command = torchrun(*TOGETHER, "--epochs", "3", "--out", str(tmp_path), restarts=1)
    if machines == 2:  # what each of them would run
        with socket.socket() as free:
            free.bind(("localhost", 0))
            at = f"--rdzv-endpoint=localhost:{free.getsockname()[1]}"
        command[3:5] = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", at]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(machines - 1)}
    output, end = os.pipe()
    pipes = {"stdout": end, "stderr": subprocess.STDOUT, "env": environment}
    agents = [subprocess.Popen(command, **pipes) for _ in range(machines)]
    os.close(end)
    printed, killed = [], False
    try:
        with open(output) as lines:
            for line in lines:
                printed.append(line)
                if "rw+lr+pa, seed 0, epoch 1/3" in line and not killed:
                    os.kill(workers(agents[-1].pid)[-1], signal.SIGKILL)
                    killed = True
        assert [agent.wait() for agent in agents] == [0] * machines, printed
    finally:
        for agent in agents:
            agent.kill()
    assert "1 of 2 runs are in" in "".join(printed)
    for mine, whole in zip(results(tmp_path), results(together[1]), strict=True):
        assert mine["weights_sha256"] == whole["weights_sha256"]


def test_restarts_over_several_machines_need_a_store_that_is_not_kept_over_them(tmp_path, monkeypatch, capsys):
    together = {"RUN_ID": "1", "MAX_RESTARTS": "1", "USE_AGENT_STORE": "True"}
    started = {f"TORCHELASTIC_{name}": value for name, value in together.items()}
    for name, value in {**started, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        Test.parse(["--out", str(tmp_path)])
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    Test.parse(["--out", str(tmp_path), "--device", "cpu"])


@pytest.mark.parametrize(
    ("options", "restarts", "part"),
    [
        (["--parallel", "2"], 0, "no --parallel"),
        (["--profile"], 0, "no --profile"),
        ([], 1, "name the folder with --out"),
        (["--models", "nothing"], 0, "'nothing'"),
        (["--dataset", "imagefolder", "--data-dir", "/nowhere", "--out"], 0, "/nowhere/train"),
    ],
    ids=str,
)
def test_what_torchrun_cannot_do_is_said_once(options, restarts, part, tmp_path):
    if options[-1:] == ["--out"]:
        options = [*options, str(tmp_path / "out")]
    done = subprocess.run(torchrun(*options, restarts=restarts), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if part in line]
    assert len(said) == 1 + restarts
    assert "Traceback" not in done.stderr.partition(said[-1])[0]


# ---------------------------------------------------------------------------------------------------------------------
# Studies that go on
# ---------------------------------------------------------------------------------------------------------------------

STUDY = (*SYNTHETIC, "--epochs", "3", "--models", "residual", "rw+lr+pa@4/2", "--seeds", "2", "--threads", "1")
POSIX = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals and limits")


def numbers(out: Path) -> list[dict]:
    """All that a run ended with but how long it took."""
    runs = json.loads((out / "results.json").read_text())["runs"]
    kept = ("model", "seed", "epochs", "test_accuracy", "diverged", "learned", "weights_sha256")
    history = ("train_loss", "test_accuracy")
    return [{k: run[k] for k in kept} | {k: [e[k] for e in run["history"]] for k in history} for run in runs]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("uninterrupted")
    assert run(*STUDY, "--out", str(out)).returncode == 0
    return numbers(out)


@pytest.fixture(autouse=True)
def process_stays_as_it_was(monkeypatch):
    """Whatever Test.main does in the process of the tests: memory that is kept would add up over all of them."""
    monkeypatch.setattr(TrainUtil, "keep_memory", lambda: None)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_what_has_finished_is_read_and_not_repeated(finished, tmp_path, capsys):
    out = shutil.copytree(finished[1], tmp_path / "out")
    before = json.loads((out / "results.json").read_text())["runs"]
    options = [*SYNTHETIC, "--models", "residual", "rw", "rw+lr+pa@4/2", "--seeds", "2", "--out", str(out)]
    assert Test.main(options) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 runs are in" in printed
    assert "images/s," not in printed
    assert json.loads((out / "results.json").read_text())["runs"] == before
    assert Test.main([*SYNTHETIC, "--models", "lr", "residual", "--seeds", "3", "--out", str(out)]) == 0
    assert "2 of 6 runs are in" in capsys.readouterr().out
    after = json.loads((out / "results.json").read_text())
    assert [run for run in after["runs"] if run in before] == before
    assert len(after["runs"]) == 6 + 3 + 1
    assert after["config"]["models"] == ["residual", "rw", "rw+lr+pa@4/2", "lr"]


OTHERS = "--epochs 2,--batch-size 50,--limit 300,--arch wide,--hold-out 9,--threads 7,--precision float32,--compile"


@pytest.mark.parametrize("options", [each.split() for each in OTHERS.split(",")], ids=" ".join)
def test_a_study_with_other_options_is_refused(options, finished, tmp_path, capsys):
    out = shutil.copytree(finished[1], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert Test.main([*SYNTHETIC, *options, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    for part in (*options, str(out)):
        assert part in error
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_a_study_with_another_recipe_is_refused(finished, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(finished[1], tmp_path / "out")
    monkeypatch.setattr(TrainUtil, "Recipe", partial(TrainUtil.Recipe, lr=0.5))
    assert Test.main([*SYNTHETIC, "--out", str(out)]) == 2
    assert "recipe.lr 0.01, not 0.5" in capsys.readouterr().err


def test_what_the_others_are_compared_with_must_be_there(finished, tmp_path, capsys):
    out = shutil.copytree(finished[1], tmp_path / "out")
    assert Test.main([*SYNTHETIC, "--models", "residual", "--against", "pa", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "--against pa must be one of the models: residual, rw, rw+lr+pa@4/2" in error
    assert Test.main([*SYNTHETIC, "--models", "residual", "--against", "rw", "--out", str(out)]) == 0
    assert "difference to rw" in capsys.readouterr().out
    assert Test.main([*SYNTHETIC, "--models", "residual", "--out", str(out)]) == 0
    assert "difference to rw" in capsys.readouterr().out  # as the study had it


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": [], "runs": []}', '{"config": {"models": '])
def test_results_that_are_none_are_left_alone(text, tmp_path, capsys):
    (tmp_path / "results.json").write_text(text)
    assert Test.main([*SYNTHETIC, "--out", str(tmp_path)]) == 2
    assert str(tmp_path / "results.json") in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == text


def test_a_second_process_on_one_folder_is_refused(tmp_path, capsys):
    command = [sys.executable, str(ROOT / "Test.py"), *STUDY, "--epochs", "50", "--out", str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        first.stdout.readline()
        second = run(*STUDY, "--epochs", "50", "--out", str(tmp_path))
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    assert second.returncode == 2
    assert "in use by another process" in second.stderr
    assert second.stdout == ""
    json.loads((tmp_path / "results.json").read_text())


@POSIX
def test_killed_at_random_moments_a_study_ends_with_the_same_bits(uninterrupted, tmp_path):
    generator = random.Random(0)
    kills, studies = 0, 0
    while kills < 20:
        out = tmp_path / str(studies)
        command = [sys.executable, str(ROOT / "Test.py"), *STUDY, "--out", str(out)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        if generator.random() < 0.5:
            process.stdout.readline()  # what comes before the first epoch has ended takes most of the time
        try:
            process.communicate(timeout=generator.uniform(0, 3))
            assert process.returncode == 0
            assert numbers(out) == uninterrupted
            studies += 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert run(*STUDY, "--out", str(out)).returncode == 0
    assert numbers(out) == uninterrupted
    assert not list(out.rglob(TrainUtil.PARTIAL + "*"))
    assert not (out / "checkpoints").exists()


@POSIX
def test_killed_while_a_file_is_written_a_study_ends_with_the_same_bits(uninterrupted, tmp_path):
    """In the n-th write, before it is flushed and before it is renamed, until a run gets to its end."""
    program = """if True:
        import os, signal, sys, Test
        name, n = sys.argv[1], int(sys.argv[2])
        original, calls = getattr(os, name), 0

        def kill(*args):
            global calls
            calls += 1
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        setattr(os, name, kill)
        sys.exit(Test.main(sys.argv[3:]))
    """
    codes = []
    for name, n in [
        ("fsync", 1),
        ("replace", 1),
        ("fsync", 3),
        ("replace", 4),
        ("fsync", 6),
        ("replace", 6),
        ("fsync", 99),
    ]:
        command = [sys.executable, "-c", program, name, str(n), *STUDY, "--out", str(tmp_path)]
        codes.append(subprocess.run(command, cwd=ROOT, capture_output=True).returncode)
    assert codes == 6 * [-signal.SIGKILL] + [0]
    assert numbers(tmp_path) == uninterrupted
    assert not list(tmp_path.rglob(TrainUtil.PARTIAL + "*"))
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_of_a_study_that_is_gone_is_not_used(half_finished, uninterrupted, tmp_path, capsys):
    (tmp_path / "results.json").unlink()
    capsys.readouterr()
    assert Test.main([*STUDY, "--out", str(tmp_path)]) == 0
    assert "[1/4] residual, seed 0, epoch 1/3" in capsys.readouterr().out


def processes_of(parent: int) -> list[int]:
    """The training processes of one with --parallel."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found += [int(path.name)] * (b"spawn_main" in (path / "cmdline").read_bytes())
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("victim", ["parent", "worker"])
def test_side_by_side_killed_processes_take_nothing_with_them(victim, uninterrupted, tmp_path):
    options = (*STUDY, "--parallel", "2", "--out", str(tmp_path))
    command = [sys.executable, str(ROOT / "Test.py"), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    workers = processes_of(process.pid)
    assert len(workers) == 2
    os.kill(process.pid if victim == "parent" else workers[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    if victim == "worker":
        assert process.returncode == 1
        assert "was killed" in stderr
        assert "Traceback" not in stderr
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert run(*options).returncode == 0
    assert numbers(tmp_path) == uninterrupted


@pytest.fixture
def half_finished(tmp_path, monkeypatch, uninterrupted) -> Path:
    """A study that was stopped after the second epoch of its first run; its checkpoint."""

    def stop(checkpoint, parts, history):
        save(checkpoint, parts, history)
        if len(history) == 2:
            raise KeyboardInterrupt

    save = TrainUtil.save
    with monkeypatch.context() as patch:
        patch.setattr(TrainUtil, "save", stop)
        assert Test.main([*STUDY, "--out", str(tmp_path)]) == 130
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    return checkpoint


@pytest.mark.parametrize("damage", ["none", "cut short", "empty", "one bit", "code", "other weights", "other shape"])
def test_a_damaged_checkpoint_is_set_aside(damage, half_finished, uninterrupted, tmp_path, capsys):
    content = half_finished.read_bytes()
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self):
            return Path.touch, (ran,)

    def saved(state, digest=None) -> bytes:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return (digest or hashlib.sha256(buffer.getvalue()).digest()) + buffer.getvalue()

    state = torch.load(io.BytesIO(content[32:]), weights_only=True)
    if damage == "cut short":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = b""
    elif damage == "one bit":
        middle = len(content) // 2
        content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    elif damage == "code":
        content = saved({"parts": Code(), "history": []})
    elif damage == "other weights":
        state["parts"][0]["classifier.weight"].zero_()
        content = saved(state, content[:32])
    elif damage == "other shape":
        state["parts"][0]["classifier.weight"] = torch.zeros(10, 64)
        content = saved(state)
    half_finished.write_bytes(content)
    capsys.readouterr()
    assert Test.main([*STUDY, "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert numbers(tmp_path) == uninterrupted
    assert not ran.exists()
    aside = half_finished.with_suffix(".damaged")
    if damage == "none":
        assert captured.err == ""
        assert "epoch 1/3" not in captured.out.split("[2/4]")[0]
    else:
        assert f"{half_finished} is damaged" in captured.err
        assert "Traceback" not in captured.err
        assert aside.exists()
        assert "epoch 1/3" in captured.out.split("[2/4]")[0]


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def build(model, seed, data):
        net = SmallCNN(model, seed, data)
        if (model.name, seed) == ("rw", 1):
            net.classifier.weight.register_hook(lambda grad: grad * math.inf)
        return net

    monkeypatch.setitem(Test.ARCHS, "small", build)
    options = [*SYNTHETIC, "--epochs", "3", "--models", "residual", "rw", "lr", "--seeds", "2", "--out", str(tmp_path)]
    assert Test.main(options) == 0
    printed = capsys.readouterr().out
    runs = {(run["model"], run["seed"]): run for run in json.loads((tmp_path / "results.json").read_text())["runs"]}
    assert len(runs) == 6
    assert [key for key, run in runs.items() if run["diverged"]] == [("rw", 1)]
    bad = runs["rw", 1]
    assert bad["diverged"] == len(bad["history"]) == bad["epochs"] == 1
    assert bad["history"][0]["train_loss"] is None
    assert "rw, seed 1, epoch 1/3, diverged" in printed
    assert "(1 of 2 seeds, 1 diverged)" in printed
    assert Test.main(options) == 0  # and is not tried again
    assert "6 of 6" in capsys.readouterr().out


def test_a_study_of_nothing_but_diverged_runs_is_shown_too(tmp_path, monkeypatch, capsys):
    def build(model, seed, data):
        net = SmallCNN(model, seed, data)
        with torch.no_grad():
            net.stages[0].residuals[0].w.fill_(math.inf)
        return net

    monkeypatch.setitem(Test.ARCHS, "small", build)
    assert Test.main([*SYNTHETIC, "--models", "rw", "--out", str(tmp_path)]) == 0
    assert "(0 of 1 seeds, 1 diverged)" in capsys.readouterr().out
    text = (tmp_path / "results.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["runs"][0]["diverged"] == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, expected):
    assert TrainUtil.out_of_memory(error) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_out_of_memory_names_the_model_and_what_to_try(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))

    options = (
        "--dataset",
        "synthetic",
        "--models",
        "rw",
        "--arch",
        "wide",
        "--batch-size",
        "5000",
        "--precision",
        "float32",
    )
    done = run(*options, "--out", str(tmp_path), preexec_fn=limit)
    assert done.returncode == 1, done.stderr
    for part in ("rw, seed 0", "out of memory", "--batch-size 5000", "smaller"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


@POSIX
@pytest.mark.parametrize("size", [100_000, 5_000])
def test_a_full_disk_ends_with_what_was_computed(size, finished, tmp_path):
    """A limit to the size of files: below that of a checkpoint, and below that of results.json with some runs in it."""
    out = shutil.copytree(finished[1], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    options = ("--models", "residual", "rw", "rw+lr+pa@4/2", "--seeds", "3", "--out", str(out))
    done = run(*SYNTHETIC, *options, preexec_fn=limit)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"\| rw +\|", done.stdout)
    after = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    if size == 5_000:
        assert after == before
    assert json.loads(after["results.json"])["runs"] == json.loads(before["results.json"])["runs"]
    assert run(*SYNTHETIC, *options).returncode == 0
    assert len(json.loads((out / "results.json").read_text())["runs"]) == 9


@POSIX
def test_a_folder_that_is_read_only_is_an_error_before_any_work(tmp_path, capsys, monkeypatch):
    tmp_path.chmod(0o555)
    for folder in tmp_path.parents:
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)  # pytest's folders are their owner's alone
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        assert Test.main([*SYNTHETIC, "--out", str(tmp_path)]) == 2
    finally:
        if root:
            os.seteuid(0)
    captured = capsys.readouterr()
    assert "Permission denied" in captured.err
    assert str(tmp_path) in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

STORED = sorted(path.parent for path in (ROOT / "results").glob("*/results.json"))


@pytest.mark.parametrize("study", STORED, ids=lambda path: path.name)
def test_every_stored_study_can_be_drawn_again_from_its_file_alone(study, tmp_path, capsys):
    shutil.copy(study / "results.json", tmp_path)
    assert Test.main(["--draw", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name in json.loads((study / "results.json").read_text())["config"]["models"]:
        assert f"| {name} " in printed
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in study.glob("*.png")}
    for name in drawn:
        assert str(tmp_path / name) in printed.replace("\n", "")
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_pictures_show_the_numbers_of_the_table(tmp_path, monkeypatch):
    """Rows of a forest plot, points and intervals; curves with their means; axes with units."""
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    base, rw = [0.870, 0.872, 0.868], [0.881, 0.882, 0.876]
    history = [[{"seconds": 2.0, "test_accuracy": a - 0.1}, {"seconds": 3.0, "test_accuracy": a}] for a in base + rw]
    values = [{}] * 3 + [
        {"alpha": {"1.1": a}, "beta": {"1.1": 2 - a}, "gamma[0]": {"1.1": 5.0}} for a in (1.0, 1.1, 1.2)
    ]
    runs = runs_of({"residual": base, "rw": rw})
    runs = [{**run, "history": h, "learned": v} for run, h, v in zip(runs, history, values)]
    runs[3]["parameters"] = runs[4]["parameters"] = runs[5]["parameters"] = 110
    assert [path.name for path in Test.draw(tmp_path, {**CONFIG, "seeds": 3}, runs)] == list(PICTURES)
    accuracy, differences, parameters, learned = (figure.axes for figure in figures)
    assert accuracy[0].get_xlabel() == "training time (s)"
    assert accuracy[0].get_ylabel() == "test accuracy (%)"
    lines = {line.get_label(): line for line in accuracy[0].lines}
    assert list(lines["rw"].get_xdata()) == [2.0, 5.0]
    assert lines["rw"].get_ydata() == pytest.approx([100 * (sum(rw) / 3 - 0.1), 100 * sum(rw) / 3])
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines.values()}) == 2
    entry = Test.summarize(runs)[1]
    (bar,) = differences[0].collections
    (segment,) = bar.get_segments()
    assert segment[:, 0] == pytest.approx(entry["interval"])
    assert [text.get_text() for text in differences[0].get_yticklabels()] == ["rw"]
    assert "percentage points" in differences[0].get_xlabel()
    assert parameters[0].get_xlabel() == "parameters added to those of residual"
    assert 100.0 in [line.get_xdata()[0] for line in parameters[0].lines]
    alpha, beta, heat = learned[:3]
    assert (alpha.get_ylabel(), beta.get_ylabel()) == ("α", "β")
    assert alpha.lines[0].get_ydata() == pytest.approx([1.1])
    assert beta.lines[0].get_ydata() == pytest.approx([0.9])
    assert heat.images[0].get_array().tolist() == [[5.0]]


def test_drawing_without_a_study(tmp_path, capsys):
    assert Test.main(["--draw", str(tmp_path)]) == 2
    assert str(tmp_path / "results.json") in capsys.readouterr().err
    (tmp_path / "results.json").write_text(json.dumps({"config": CONFIG, "runs": []}))
    assert Test.main(["--draw", str(tmp_path)]) == 2
    assert "no run has finished" in capsys.readouterr().err


def test_a_study_can_be_drawn_against_another_model(finished, tmp_path, capsys):
    shutil.copy(finished[1] / "results.json", tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    assert Test.main(["--draw", str(tmp_path), "--against", "rw"]) == 0
    assert "difference to rw" in capsys.readouterr().out
    assert (tmp_path / "results.json").read_bytes() == before
    assert Test.main(["--draw", str(tmp_path), "--against", "lr"]) == 2
    error = capsys.readouterr().err
    assert "--against lr" in error
    assert "residual, rw, rw+lr+pa@4/2" in error


def test_no_data_ends_with_what_was_tried(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TrainUtil.ARCHIVE_URLS, CIFAR10, ("http://127.0.0.1:1/archive",))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    assert Test.main(["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    for part in ("127.0.0.1", "npm is not installed", "MD5", "--dataset synthetic", str(tmp_path / "data")):
        assert part in error
    assert len(error.splitlines()) < 12
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("parallel", ["1", "2"])
def test_interrupting_keeps_what_has_finished(parallel, tmp_path):
    out = tmp_path / "out"
    options = ("--seeds", "500", "--parallel", parallel, "--out", str(out))
    command = [sys.executable, str(ROOT / "Test.py"), *SYNTHETIC, *options]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job starts by ignoring it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    process = subprocess.Popen(command, preexec_fn=heed, start_new_session=True, **pipes)
    try:
        deadline = time.monotonic() + 120
        while not ((out / "results.json").exists() and numbers(out)) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert f"{len(runs)} runs have finished" in stderr
    assert "Traceback" not in stderr
    assert f"| {runs[0]['model']} " in stdout
    assert {"accuracy.png", "results.csv", "results.json"} <= {path.name for path in out.iterdir()}


def test_help_has_examples_that_parse(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        Test.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^  python Test\.py((?: \S+)*)", text, flags=re.MULTILINE)
    assert len(examples) >= 3
    for example in examples:
        Test.parse(shlex.split(example))


# ---------------------------------------------------------------------------------------------------------------------
# The project around it
# ---------------------------------------------------------------------------------------------------------------------


def test_both_requirement_files_say_the_same():
    tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(project["dependencies"]) == sorted((ROOT / "requirements.txt").read_text().split())


def test_the_lock_file_holds_no_address_and_fits_the_project():
    tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")
    text = (ROOT / "uv.lock").read_text()
    if "[package.metadata" in text:
        pytest.skip("uv has filled in uv.lock for this machine; .ci/lock takes the addresses out")
    assert "://" not in text
    lock = tomllib.loads(text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    versions: dict[str, list[str]] = {}
    for package in lock["package"]:
        assert not {"sdist", "wheels"} & package.keys()
        assert package["source"] in ({"registry": "index"}, {"virtual": "."})
        versions.setdefault(package["name"], []).append(package["version"])
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    for requirement in map(Requirement, wanted):
        assert versions[requirement.name]
        assert all(requirement.specifier.contains(version) for version in versions[requirement.name])


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)


def test_readme_commands_run(tmp_path):
    """Those that download nothing run; the others parse, and the files that they name are there."""
    commands = [line.split("#")[0].strip() for block in readme_blocks("sh") for line in block.splitlines()]
    commands = [
        command.replace("uv run ", "python ", 1) for command in commands if "Test.py" in command or "LAuReL" in command
    ]
    commands = [command.split("&&")[-1].strip() for command in commands]
    assert any("--dataset synthetic" in command for command in commands)
    for i, command in enumerate(dict.fromkeys(commands)):
        program, *rest = shlex.split(command)
        assert program in ("python", "torchrun")
        script, *options = rest if program == "python" else rest[rest.index("Test.py") :]
        if program == "torchrun" and "synthetic" in options:
            command = torchrun(*options, "--limit", "400", "--out", str(tmp_path / str(i)))
            assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
            continue
        if script == "Test.py" and "synthetic" not in options and "--help" not in options:
            Test.parse([*options, "--out", str(tmp_path / "parsed")])
            continue
        if script == "Test.py" and "--out" not in options and "--help" not in options:
            options += ["--out", str(tmp_path / str(i))]
        done = subprocess.run([sys.executable, ROOT / script, *options], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.parametrize("block", readme_blocks("python"), ids=lambda block: re.sub(r"\W+", " ", block)[:60])
def test_readme_code_runs(block, tmp_path, monkeypatch):
    for name in ("transformers", "timm", "hyper_connections", "onnxruntime"):
        if name in block:
            pytest.importorskip(name, reason=f"{name} is in the dependency group interop: pip install --group interop")
    monkeypatch.chdir(tmp_path)
    if "fully_shard" in block:  # in two processes
        pytest.importorskip("torch", "2.6")
        leave = "torch.distributed.barrier()\ntorch.distributed.destroy_process_group()\n"
        (tmp_path / "train.py").write_text(block + leave)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries about themselves
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.download
def test_one_short_run_on_the_real_data(tmp_path):
    options = ["--models", "residual", "--epochs", "1", "--limit", "10000", "--data-dir", str(tmp_path / "data")]
    done = run(*options, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (one,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert one["test_accuracy"] > 0.25
    assert "CIFAR-10, 10,000 training images" in done.stdout
    # What it left for the next time, checked against its SHA-256
    data = TrainUtil.load_cifar(CIFAR10, tmp_path / "data")
    assert data.train_labels.bincount().tolist() == [5000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
