import hashlib
import io
import json
import math
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import TrainUtil
from TrainUtil import Muon, Recipe, orthogonalize, train


def test_images_grow_in_the_course_of_a_run(data):
    recipe = Recipe(epochs=2, batch_size=100, sizes=((16, 0.3), (24, 0.65), (32, 1.0)))
    net, shapes = network(), []
    net.register_forward_pre_hook(lambda net, args: shapes.append(args[0].shape) if net.training else None)
    train(net, data.limit(1000), recipe, 0)
    assert shapes == [(100, 3, 16, 16)] * 6 + [(100, 3, 24, 24)] * 7 + [(100, 3, 32, 32)] * 7
    assert recipe.pixels(1.0) == pytest.approx((6 * 16**2 + 7 * 24**2 + 7 * 32**2) / 20)
    assert recipe.pixels(0.5) == pytest.approx((6 * 16**2 + 4 * 24**2) / 20)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


@pytest.mark.parametrize("shape", [(32, 288), (288, 32), (64, 64)])
def test_orthogonalize_brings_all_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonalize(matrix, steps=5))
    assert values.max() < 1.3
    assert values.median() > 0.6
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert (left.T @ orthogonalize(matrix, steps=5) @ right.T).diag().min() > 0  # along the singular vectors


def test_muon_keeps_the_norm_of_a_filter_bank_and_ignores_the_scale_of_its_gradient():
    results = []
    for scale in (1.0, 100.0):
        p = nn.Parameter(torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0)))
        optimizer = Muon([p], lr=0.1, momentum=0.6)
        for step in range(3):
            p.grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=0, atol=0.02)
    assert 3.5 < results[0].norm() < 4.5  # √16, before the last update


def test_every_trainable_parameter_is_in_one_optimizer_without_weight_decay():
    model = network()
    model[0].bias.requires_grad_(False)
    groups = [group for opt in TrainUtil.optimizers(model, Recipe()) for group in opt.param_groups]
    params = [id(p) for group in groups for p in group["params"]]
    assert sorted(params) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all(group.get("weight_decay", 0) == 0 for group in groups)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_freed_memory_is_kept_for_the_next_step():
    program = """if True:
        import resource, sys, torch
        from comparison.device import keep_memory

        def page_faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(20):
                torch.ones(4_000_000)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        given_back = page_faults()
        keep_memory()
        page_faults()
        print(given_back, page_faults())
    """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(TrainUtil.__file__).parent, check=True
    )
    given_back, kept = map(int, done.stdout.split())
    assert kept < given_back / 10


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_learns_and_repeats_to_the_bit(precision, data):
    recipe = Recipe(epochs=4, batch_size=50)
    models = [network(), network()]
    results = [train(model, data.limit(1000), recipe, 0, precision=precision) for model in models]
    assert results[0]["test_accuracy"] > 0.3
    losses = [entry["train_loss"] for entry in results[0]["history"]]
    assert losses == [entry["train_loss"] for entry in results[1]["history"]]
    assert losses[-1] < losses[0]
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values()):
        assert torch.equal(a, b)


def test_training_reports_what_it_did(data):
    reports = []
    recipe = Recipe(epochs=2, batch_size=100)
    result = train(
        network(), data.limit(250), recipe, 0, report=lambda *state: reports.append((*state[:3], len(state[3])))
    )
    work = [work for work, _, _, _ in reports]
    assert work == sorted(work)
    assert work[-1] == pytest.approx(1.0)
    assert [(images, epochs) for _, images, _, epochs in reports] == [
        (100, 0),
        (200, 0),
        (200, 1),
        (300, 1),
        (400, 1),
        (400, 2),
    ]
    assert result["epochs"] == 2
    assert [entry["epoch"] for entry in result["history"]] == [1, 2]
    assert result["test_accuracy"] == result["history"][-1]["test_accuracy"]
    assert result["train_seconds"] == pytest.approx(sum(entry["seconds"] for entry in result["history"]))
    assert result["images_per_second"] == pytest.approx(400 / result["train_seconds"])


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_training_goes_on_from_a_checkpoint_to_the_same_bits(stop, data, tmp_path):
    """Stopped in an epoch or after the last one."""
    recipe, data = Recipe(epochs=4, batch_size=50), data.limit(500)
    expected_model = network()
    expected = train(expected_model, data, recipe, 0)

    def interrupt(work, images, seconds, history):
        if len(history) == stop and (images > 500 * stop or stop == 4):
            raise KeyboardInterrupt

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        train(network(), data, recipe, 0, checkpoint=path, report=interrupt)
    model, trained_on = network(), []
    result = train(model, data, recipe, 0, checkpoint=path, report=lambda *state: trained_on.append(state[1]))
    assert all(images > 500 * stop for images in trained_on)
    for key in ("train_loss", "test_accuracy", "epoch"):
        assert [entry[key] for entry in result["history"]] == [entry[key] for entry in expected["history"]]
    assert result["images_per_second"] == pytest.approx(2000 / result["train_seconds"])
    assert TrainUtil.digest(model) == TrainUtil.digest(expected_model)


def test_a_checkpoint_that_does_not_fit_leaves_all_parts_as_they_were(data, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    train(network(), data.limit(100), Recipe(epochs=1, batch_size=100), 0, checkpoint=path)
    state = torch.load(io.BytesIO(path.read_bytes()[32:]), weights_only=True)
    state["parts"][1]["param_groups"] = []  # the first part fits, the second does not
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
    parts = [network(), *TrainUtil.optimizers(network(), Recipe())]
    before = TrainUtil.digest(parts[0])
    assert TrainUtil.restore(path, parts) == []
    assert TrainUtil.digest(parts[0]) == before
    assert str(path) in capsys.readouterr().err
    assert not path.exists()
    assert path.with_suffix(".damaged").exists()


def test_a_checkpoint_is_not_given_up_for_lack_of_memory(data, tmp_path, monkeypatch):
    def load_state_dict(*args, **kwargs):
        monkeypatch.undo()
        raise torch.OutOfMemoryError("CUDA out of memory")

    path = tmp_path / "checkpoint.pt"
    train(network(), data.limit(100), Recipe(epochs=1, batch_size=100), 0, checkpoint=path)
    content = path.read_bytes()
    monkeypatch.setattr(nn.Module, "load_state_dict", load_state_dict)
    with pytest.raises(torch.OutOfMemoryError):
        train(network(), data.limit(100), Recipe(epochs=2, batch_size=100), 0, checkpoint=path)
    assert path.read_bytes() == content


def test_a_digest_tells_one_bit():
    models = [network(), network()]
    assert TrainUtil.digest(models[0]) == TrainUtil.digest(models[1].to(memory_format=torch.channels_last))
    with torch.no_grad():
        models[1][5].bias[0] = torch.nextafter(models[1][5].bias[0], torch.tensor(1.0))
    assert TrainUtil.digest(models[0]) != TrainUtil.digest(models[1])


def test_a_loss_that_is_not_finite_ends_the_run_and_is_recorded(data, tmp_path):
    model = network()
    calls = []
    model[5].weight.register_hook(lambda grad: calls.append(1) or (grad * math.inf if len(calls) == 7 else grad))
    recipe, path = Recipe(epochs=4, batch_size=100), tmp_path / "checkpoint.pt"
    result = train(model, data.limit(500), recipe, 0, checkpoint=path)
    assert result["diverged"] == result["epochs"] == len(result["history"]) == 2
    assert result["history"][0]["train_loss"] > 0
    assert result["history"][1]["train_loss"] is None
    json.dumps(result, allow_nan=False)
    again = train(network(), data.limit(500), recipe, 0, checkpoint=path)
    assert again["history"] == result["history"]


def test_warming_up_leaves_the_model_as_it_was(data):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert TrainUtil.warm_up(model, model, data.limit(100), Recipe(batch_size=100), "float32") > 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_compiling_changes_no_starting_point_and_is_timed_apart(data):
    recipe = Recipe(epochs=2, batch_size=100)
    data = data.limit(300)
    results = [train(network(), data, recipe, 0, compile=compile) for compile in (False, True)]
    assert results[0]["compile_seconds"] == 0 < results[1]["compile_seconds"]
    for a, b in zip(*(result["history"] for result in results)):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-2)


def test_evaluate_counts_the_right_answers(data):
    class Answers(nn.Module):
        def forward(self, x):
            i = self.seen
            self.seen += len(x)
            return nn.functional.one_hot(labels[i : self.seen], 10).float()

    model = Answers()
    for wrong in (0, 7):
        model.seen, labels = 0, data.test_labels.long()
        labels[:wrong] = (labels[:wrong] + 1) % 10
        assert TrainUtil.evaluate(model, data, batch_size=300) == pytest.approx(1 - wrong / 1000)


class Around(nn.Module):
    """A layer whose block has a name of its own."""

    def __init__(self, **blocks: nn.Module) -> None:
        super().__init__()
        self.f = nn.Conv2d(8, 8, 3, padding=1)
        for name, block in blocks.items():
            setattr(self, name, block)


def test_every_parameter_is_in_one_group_whatever_blocks_are_called():
    options = {"channel_dim": 1}
    model = nn.Sequential(
        Around(residual1=TrainUtil.LAuReL(**options), skip=TrainUtil.LAuReL_LR(8, norm=nn.GroupNorm(1, 8), **options)),
        Around(residuals=nn.ModuleList([TrainUtil.LAuReL_PA(8, shared=False, **options)])),
        nn.BatchNorm2d(8),
    )
    muon, adam = TrainUtil.optimizers(model, Recipe(block_decay=0.1))
    others, blocks = (group["params"] for group in adam.param_groups)
    (filters,) = (group["params"] for group in muon.param_groups)
    every = [id(p) for group in (filters, others, blocks) for p in group]
    assert sorted(every) == sorted(id(p) for p in model.parameters())
    assert {id(p) for p in filters} == {id(layer.f.weight) for layer in model[:2]}
    inside = [model[0].residual1, model[0].skip, model[1].residuals]
    assert {id(p) for p in blocks} == {id(p) for block in inside for p in block.parameters()}
    assert [group["weight_decay"] for group in adam.param_groups] == [0.0, 0.1]


def test_evaluating_changes_nothing(data):
    model = network().train()
    before = TrainUtil.digest(model)
    TrainUtil.evaluate(model, data)
    assert TrainUtil.digest(model) == before
