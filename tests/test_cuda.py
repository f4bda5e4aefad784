"""On a GPU, which no other test sees: python -m pytest -m cuda"""

import json
import time
from dataclasses import replace

import pytest
import torch
from block_properties import Layers
from kinds import ALL_KINDS, D, branches, gradients, randomize_blocks
from script import made_up, results
from torch import nn

import Test
import TrainUtil
from comparison.device import Stopwatch
from comparison.models import Model
from comparison.networks import ARCHS
from comparison.text import synthetic_text
from TrainUtil import train

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
MODELS = ("residual", "rw", "rw+lr+pa@4/2", "denseformer")
ON_GPU = ("--device", "cuda", "--dataset", "synthetic", "--limit", "400", "--batch-size", "100", "--epochs", "2")


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """Not the ten bits of mantissa that a GPU takes for convolutions in float32 by default; the same in every run."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def step(model: nn.Module, x: torch.Tensor, precision: torch.dtype | None = None) -> tuple[torch.Tensor, dict]:
    with torch.autocast("cuda", precision, enabled=precision is not None):
        y = model(x)
    y.float().square().mean().backward()
    return y.detach().float().cpu(), {name: grad.cpu() for name, grad in gradients(model).items()}


@pytest.mark.parametrize("kind", ALL_KINDS)
class TestBlocks:
    @pytest.fixture
    def models(self, kind) -> list[nn.Module]:
        made = []
        for device in ("cpu", "cuda"):
            torch.manual_seed(0)
            model = Layers(branches(), ALL_KINDS[kind])
            randomize_blocks(model)
            made.append(model.to(device))
        return made

    def test_has_the_values_and_gradients_of_a_cpu(self, models):
        x = torch.randn(8, 10, D)
        torch.testing.assert_close(step(models[1], x.cuda()), step(models[0], x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
    def test_autocast_comes_close(self, models, precision):
        x = torch.randn(8, 10, D)
        values, grads = step(models[1], x.cuda(), precision)
        exact, exact_grads = step(models[0], x)
        assert (values - exact).norm() < 0.03 * exact.norm()
        for name, grad in grads.items():
            assert (grad - exact_grads[name]).norm() < 0.1 * exact_grads[name].norm() + 1e-3, name

    def test_compiles_to_cuda_graphs(self, models):
        compiled = torch.compile(models[1], mode="reduce-overhead", fullgraph=True)
        for _ in range(4):  # the graph is recorded in the second call, and replayed from the third on
            models[1].zero_grad()
            x = torch.randn(8, 10, D)
            found = step(compiled, x.cuda())
            models[0].zero_grad()
            expected = step(models[0], x)
            torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
            for name, grad in found[1].items():
                expected_grad = expected[1][name.removeprefix("_orig_mod.")]
                torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-4)


def trained(arch: str, device: str, names: tuple[str, ...] = MODELS, **options) -> dict[str, dict]:
    data = synthetic_text().limit(64) if arch == "gpt6" else made_up().limit(400).hold_out(100)
    # At the recipe's rates the convolutional networks are so far from settled that rounding moves losses by per cents.
    slow = replace(TrainUtil.IMAGES, batch_size=100, filter_lr=0.02, lr=0.001)
    recipe = TrainUtil.TEXT if arch == "gpt6" else slow
    models = {name: ARCHS[arch](Model.parse(name), 0, data) for name in names}
    return train(models, data.to(torch.device(device)), replace(recipe, epochs=2), 0, **options)


def assert_alike(on_gpu: dict[str, dict], on_cpu: dict[str, dict], rel: float) -> None:
    for name, run in on_gpu.items():
        for mine, other in zip(run["history"], on_cpu[name]["history"], strict=True):
            assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=rel), name
            assert mine["test_loss"] == pytest.approx(other["test_loss"], rel=5 * rel), name


@pytest.mark.parametrize("arch", ["small", "resnet20", "gpt6"])
def test_networks_train_as_on_a_cpu(arch):
    on_cpu = trained(arch, "cpu")
    assert_alike(trained(arch, "cuda"), on_cpu, rel=0.02)
    assert_alike(trained(arch, "cuda", precision="bfloat16"), on_cpu, rel=0.1)


def test_networks_train_as_cuda_graphs():
    names = ("residual", "rw+lr+pa@4/2")
    assert_alike(trained("small", "cuda", names, compile=True), trained("small", "cpu", names), rel=0.02)


def test_a_stopwatch_has_the_seconds_of_the_device():
    """Not of the CPU, which goes on while the device still works."""
    x = torch.randn(8192, 8192, device="cuda")
    torch.mm(x, x)
    watch = Stopwatch(torch.device("cuda"))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    with watch:
        for _ in range(20):
            torch.mm(x, x)
    left = time.perf_counter() - begin
    (seconds,) = watch.seconds()
    assert left < 0.5 * seconds
    assert 0.8 * seconds < time.perf_counter() - begin < 1.5 * seconds


@pytest.mark.parametrize("options", [(), ("--compile",), ("--accumulate", "2"), ("--parallel", "2")], ids=str)
def test_the_script_runs(tmp_path, options):
    """To a table and files; two processes may share a GPU."""
    study = [*ON_GPU, "--models", "residual", "rw+lr+pa@4/2", "--seeds", "2", "--out", str(tmp_path), *options]
    assert Test.main(study) == 0
    runs = results(tmp_path)
    assert len(runs) == 4
    assert all(run["train_seconds"] > 0 and run["step_ratio"] > 0 for run in runs)
    for first, last in (run["history"] for run in runs):
        assert last["test_loss"] < first["test_loss"]
    config = json.loads((tmp_path / "results.json").read_text())["config"]
    assert config["device_name"] == torch.cuda.get_device_name()
    assert config["precision"] == "bfloat16" or not torch.cuda.is_bf16_supported(including_emulation=False)


def test_a_run_that_was_interrupted_resumes(tmp_path, monkeypatch):
    options = [*ON_GPU, "--models", "residual", "pa@4", "--seeds", "1", "--precision", "float32"]
    assert Test.main([*options, "--out", str(tmp_path / "whole")]) == 0
    save, saved = TrainUtil.save, []

    def save_and_stop(*args: object) -> None:
        save(*args)
        saved.append(args)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainUtil, "save", save_and_stop)
    assert Test.main([*options, "--out", str(tmp_path / "parts")]) == 130
    assert Test.main([*options, "--out", str(tmp_path / "parts")]) == 0
    assert len(saved) == 2  # once an epoch
    for whole, parts in zip(results(tmp_path / "whole"), results(tmp_path / "parts"), strict=True):
        assert parts["test_loss"] == pytest.approx(whole["test_loss"], rel=0.1)


@pytest.mark.parametrize("arch", ["small", "gpt6"])
@pytest.mark.parametrize("compile", [(), ("--compile",)], ids=str)
def test_a_profile_has_the_peak_memory(tmp_path, arch, compile):
    """Of the model and one step, which at least keeps what it saves for the backward pass."""
    options = ("--arch", arch, "--batch-size", "64", "--seconds", "1", *compile, "--out", str(tmp_path))
    assert Test.main(["--profile", "--models", "rw", "lr", *options]) == 0
    for entry in json.loads((tmp_path / "profile.json").read_text())["costs"]:
        assert entry["peak_bytes"] > entry["parameters"] * 4
        assert compile or entry["peak_bytes"] > entry["saved_bytes"]
