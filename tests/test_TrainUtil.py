import gc
import json
import math
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import TrainUtil
from comparison.data import Dataset
from comparison.models import Model
from comparison.networks import SmallCNN
from comparison.text import synthetic_text
from comparison.transformers import GPT
from TrainUtil import Recipe, train


def test_images_grow_in_the_course_of_a_run(data):
    recipe = Recipe(epochs=2, batch_size=100, sizes=((16, 0.3), (24, 0.65), (32, 1.0)))
    net, shapes = network(), []
    net.register_forward_pre_hook(lambda net, args: shapes.append(args[0].shape) if net.training else None)
    train_one(net, data.limit(1000), recipe, 0)
    assert shapes == [(100, 3, 16, 16)] * 6 + [(100, 3, 24, 24)] * 7 + [(100, 3, 32, 32)] * 7
    assert recipe.work(0.5) == pytest.approx((6 * 16**2 + 4 * 24**2) / (6 * 16**2 + 7 * 24**2 + 7 * 32**2))
    assert recipe.work(1.0) == 1.0


def train_one(model: nn.Module, *args, **options) -> dict:
    return train({"residual": model}, *args, **options)["residual"]


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
    models, dtypes = [network(), network()], set()
    models[0].register_forward_hook(lambda model, args, logits: dtypes.add((model.training, logits.dtype)))
    results = [train_one(model, data.limit(1000), recipe, 0, precision=precision) for model in models]
    assert dtypes == {(training, getattr(torch, precision)) for training in (True, False)}
    assert results[0]["test_accuracy"] > 0.3
    losses = [entry["train_loss"] for entry in results[0]["history"]]
    assert losses == [entry["train_loss"] for entry in results[1]["history"]]
    assert losses[-1] < losses[0]
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values()):
        assert torch.equal(a, b)


def test_a_step_leaves_no_tensor_behind(data):
    """Which would lie in the middle of freed memory, so that the heap of a long study grows and grows."""
    alive = []

    def report(*so_far):
        alive.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))

    train({"residual": network(), "rw": network()}, data.limit(500), Recipe(epochs=1, batch_size=50), 0, report=report)
    assert alive[9] <= alive[0]  # after the tenth step and the first


def test_training_reports_what_it_did(data):
    reports = []

    def report(work, speed, histories):
        reports.append((work, speed, {name: len(history) for name, history in histories.items()}))

    models, recipe = {"residual": network(), "rw": network()}, Recipe(epochs=2, batch_size=100)
    result = train(models, data.limit(250), recipe, 0, report=report)
    works, speeds, epochs = zip(*reports)
    assert list(works) == sorted(works)
    assert works[-1] == pytest.approx(1.0)
    assert min(speeds) > 0
    assert list(epochs) == [{"residual": n, "rw": n} for n in (0, 0, 1, 1, 1, 2)]  # two steps and a test an epoch
    for run in result.values():
        last = run["history"][-1]
        assert run["epochs"] == 2
        assert [entry["epoch"] for entry in run["history"]] == [1, 2]
        assert (run["test_loss"], run["test_accuracy"]) == (last["test_loss"], last["test_accuracy"])
        assert run["train_seconds"] == pytest.approx(sum(entry["seconds"] for entry in run["history"]))
        assert run["images_per_second"] == pytest.approx(400 / run["train_seconds"])


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))


def test_learning_rates_rise_over_the_warm_up_and_fall_linearly_to_zero(data, monkeypatch):
    step, rates = torch.optim.AdamW.step, []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    train_one(network(), data.limit(200), Recipe(epochs=2, batch_size=40, lr=1.0, warmup=0.2), 0)
    assert rates == pytest.approx([0.5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_a_step_descends_the_smoothed_loss(data):
    model, recipe = linear(), Recipe(epochs=1, batch_size=100, sizes=((32, 1.0),), label_smoothing=0.3, warmup=1.0)
    x, y = next(data.limit(100).batches(0, 0, 100, recipe.max_shift))
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y, label_smoothing=0.3), model[1].bias)
    expected = model[1].bias.detach() - 0.1 * gradient
    train_one(model, data.limit(100), recipe.with_one("sgd", 0.1), 0)
    torch.testing.assert_close(model[1].bias.detach(), expected)


def test_losses_are_plain_cross_entropies(data):
    """The training loss is the mean over the epoch's batches; with a learning rate of 0 that over its images."""
    model, recipe = linear(), Recipe(epochs=1, batch_size=50, lr=0.0)
    recipe = replace(recipe, sizes=((32, 1.0),), label_smoothing=0.5)
    result = train_one(model, data.limit(200), recipe, 0, accumulate=3)
    with torch.no_grad():
        (x, y), (tested, labels) = next(data.limit(200).batches(0, 0, 200, 2)), next(data.test_batches(1000))
        expected = {"train_loss": F.cross_entropy(model(x), y), "test_loss": F.cross_entropy(model(tested), labels)}
        expected["test_accuracy"] = (model(tested).argmax(dim=1) == labels).float().mean()
    for name, value in expected.items():
        assert result["history"][0][name] == pytest.approx(value.item(), rel=1e-5)


def test_a_models_numbers_do_not_depend_on_the_others(data):
    """To the bit, and not on one that leaves either."""
    recipe, results, digests = Recipe(epochs=3, batch_size=50), [], []
    for others in ((), ("bad", "rw"), ("rw",)):
        models = {**{name: network() for name in others}, "residual": network()}
        if "bad" in models:
            calls = []
            bad = models["bad"][5].weight
            bad.register_hook(lambda grad, calls=calls: calls.append(1) or (math.inf if len(calls) == 9 else 1) * grad)
        if "rw" in models:
            nn.init.normal_(models["rw"][5].weight)
        result = train(models, data.limit(400), recipe, 0)
        results.append([{**entry, "seconds": 0} for entry in result["residual"]["history"]])
        digests.append(TrainUtil.digest(models["residual"]))
        if "bad" in models:
            assert result["bad"]["diverged"] == len(result["bad"]["history"]) == 2
            assert result["rw"]["diverged"] is None
    assert results[0] == results[1] == results[2]
    assert len(set(digests)) == 1


def test_each_batch_is_made_once_and_taken_in_turns(data, monkeypatch):
    order, made = [], []

    def recording(self, *args):
        for batch in batches(self, *args):
            made.append(batch)
            yield batch

    batches = Dataset.batches
    monkeypatch.setattr(Dataset, "batches", recording)
    models = {name: network() for name in "ABC"}
    for name, model in models.items():
        model.register_forward_pre_hook(
            lambda m, args, name=name: order.append((name, args[0])) if m.training else None
        )
    train(models, data.limit(200), Recipe(epochs=1, batch_size=50, sizes=((32, 1.0),)), 0)
    assert "".join(name for name, _ in order) == "ABCBCACABABC"
    assert len(made) == 4
    for i, (_, x) in enumerate(order):
        assert x.data_ptr() == made[i // 3][0].data_ptr()


def test_the_fields_of_a_recipe_may_be_a_models_own(data):
    models = {name: network() for name in ("a", "b", "c")}
    train(models, data.limit(100), Recipe(epochs=1, batch_size=50), 0, own={"b": {"lr": 0.02}, "c": {"lr": 0.01}})
    digests = [TrainUtil.digest(model) for model in models.values()]
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_training_resumes_from_a_checkpoint_to_the_same_bits(stop, data, tmp_path):
    """Stopped in an epoch or after the last one."""
    recipe, data = Recipe(epochs=4, batch_size=50), data.limit(500)

    def models() -> dict[str, nn.Module]:
        other = network()
        nn.init.ones_(other[5].weight)
        return {"residual": network(), "rw": other}

    expected_models = models()
    expected = train(expected_models, data, recipe, 0)

    def interrupt(work, speed, histories):
        if len(histories["rw"]) == stop and (work > recipe.work(stop / 4) or stop == 4):
            raise KeyboardInterrupt

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        train(models(), data, recipe, 0, checkpoint=path, report=interrupt)
    trained, done = models(), []
    result = train(trained, data, recipe, 0, checkpoint=path, report=lambda work, *_: done.append(work))
    assert all(work > recipe.work(stop / 4) for work in done)
    for name, run in result.items():
        for key in ("train_loss", "test_loss", "test_accuracy", "epoch"):
            assert [entry[key] for entry in run["history"]] == [entry[key] for entry in expected[name]["history"]]
        assert run["images_per_second"] == pytest.approx(2000 / run["train_seconds"])
        assert TrainUtil.digest(trained[name]) == TrainUtil.digest(expected_models[name])


def test_a_step_ratio_is_the_median_over_all_steps_of_resumed_training_too(data, tmp_path, monkeypatch):
    """With a clock that each model's step moves by its own time, and other work by far more."""
    clock = [0.0]
    monkeypatch.setattr("comparison.device.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    step = TrainUtil.TrainState.step

    def timed(self, *args):
        calls.append(1)
        slow = 10 if (len(calls) - 1) // 2 % 3 == 0 else 1  # other work, in every third batch
        clock[0] += slow * (1.25 if self.model is models["rw"] else 1.0)
        return step(self, *args)

    def interrupt(work, speed, histories):
        clock[0] += 100  # what is not a step
        if len(histories["rw"]) == 1 and not resumed:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainUtil.TrainState, "step", timed)
    calls, resumed, path = [], False, tmp_path / "checkpoint.pt"
    how = {"checkpoint": path, "report": interrupt}
    models = {"residual": network(), "rw": network()}
    with pytest.raises(KeyboardInterrupt):
        train(models, data.limit(400), Recipe(epochs=2, batch_size=50), 0, **how)
    models, resumed = {"residual": network(), "rw": network()}, True
    result = train(models, data.limit(400), Recipe(epochs=2, batch_size=50), 0, **how)
    assert result["rw"]["step_ratio"] == pytest.approx(1.25)
    assert result["rw"]["step_ratio_quartiles"] == pytest.approx([1.25, 1.25])
    assert result["residual"]["step_ratio"] == 1.0
    assert result["residual"]["train_seconds"] == pytest.approx(6 * 10 + 10)  # 16 batches, 6 of them slow
    alone = train({"rw": network()}, data.limit(400), Recipe(epochs=1, batch_size=50), 0)["rw"]
    assert alone["step_ratio"] is alone["step_ratio_quartiles"] is None


def restore_from(path: Path, **models: nn.Module) -> dict[str, TrainUtil.TrainState]:
    states = {name: TrainUtil.TrainState(model, model, Recipe(), 10, "float32") for name, model in models.items()}
    TrainUtil.restore(path, states)
    return states


def test_a_checkpoint_that_does_not_fit_leaves_all_parts_as_they_were(data, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    train({"a": network(), "b": network()}, data.limit(100), Recipe(epochs=1, batch_size=100), 0, checkpoint=path)
    state = torch.load(path, weights_only=True)
    state["b"]["parts"][1]["param_groups"] = []  # the first model fits, and the first part of the second
    torch.save(state, path)
    states = restore_from(path, a=network(), b=network())
    for state in states.values():
        assert TrainUtil.digest(state.model) == TrainUtil.digest(network())
        assert state.history == state.seconds == []
    assert str(path) in capsys.readouterr().err
    assert not path.exists()
    assert path.with_suffix(".damaged").exists()


def test_a_checkpoint_of_other_models_is_set_aside(data, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    train({"a": network()}, data.limit(100), Recipe(epochs=1, batch_size=100), 0, checkpoint=path)
    assert restore_from(path, b=network())["b"].history == []
    assert "it is of a" in capsys.readouterr().err


def test_a_checkpoint_is_not_given_up_for_lack_of_memory(data, tmp_path, monkeypatch):
    def load_state_dict(*args, **kwargs):
        monkeypatch.undo()
        raise torch.OutOfMemoryError("CUDA out of memory")

    path = tmp_path / "checkpoint.pt"
    train_one(network(), data.limit(100), Recipe(epochs=1, batch_size=100), 0, checkpoint=path)
    content = path.read_bytes()
    monkeypatch.setattr(nn.Module, "load_state_dict", load_state_dict)
    with pytest.raises(torch.OutOfMemoryError):
        train_one(network(), data.limit(100), Recipe(epochs=2, batch_size=100), 0, checkpoint=path)
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
    result = train_one(model, data.limit(500), recipe, 0, checkpoint=path)
    assert result["diverged"] == result["epochs"] == len(result["history"]) == 2
    assert result["history"][0]["train_loss"] > 0
    assert result["history"][1]["train_loss"] is result["test_loss"] is None
    json.dumps(result, allow_nan=False)
    again = train_one(network(), data.limit(500), recipe, 0, checkpoint=path)
    assert again["history"] == result["history"]


def test_warming_up_leaves_the_model_as_it_was(data):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert TrainUtil.warm_up(model, model, data.limit(100), Recipe(batch_size=100), "float32") > 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_compiling_changes_no_starting_point_and_is_timed_apart(data, monkeypatch):
    """In bfloat16: the gradient of amax looks for numbers equal to the rounded maximum, finds none, and is NaN."""
    monkeypatch.setattr(SmallCNN, "layers", (0,))  # less to compile
    recipe, data = Recipe(epochs=2, batch_size=100, sizes=((20, 1.0),)), data.limit(300)
    models = [SmallCNN(Model.parse("residual"), 0, data, widths=(8,)) for _ in range(2)]
    how = ({"precision": "bfloat16", "compile": compile} for compile in (False, True))
    results = [train_one(model, data, recipe, 0, **each) for model, each in zip(models, how)]
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
        assert TrainUtil.evaluate({"": model}, data, batch_size=300)[""]["test_accuracy"] == pytest.approx(
            1 - wrong / 1000
        )


def test_evaluate_has_the_loss_of_a_byte():
    data, net = synthetic_text(), GPT(Model.parse("residual"), 0, dim=64, layers=1)
    x, y = next(data.test_batches(10**6))
    loss = F.cross_entropy(net(x).flatten(0, 1), y.flatten()).item()
    found = TrainUtil.evaluate({"": net}, data, batch_size=100)[""]
    assert found == {"test_loss": pytest.approx(loss), "test_accuracy": None}


class Around(nn.Module):
    """A layer whose block has a name of its own."""

    def __init__(self, **blocks: nn.Module) -> None:
        super().__init__()
        self.f = nn.Conv2d(8, 8, 3, padding=1)
        for name, block in blocks.items():
            setattr(self, name, block)


def test_every_trainable_parameter_is_in_one_group_whatever_blocks_are_called():
    options = {"channel_dim": 1}
    model = nn.Sequential(
        Around(residual1=TrainUtil.LAuReL(**options), skip=TrainUtil.LAuReL_LR(8, norm=nn.GroupNorm(1, 8), **options)),
        Around(residuals=nn.ModuleList([TrainUtil.LAuReL_PA(8, shared=False, **options)])),
        nn.BatchNorm2d(8),
    )
    model[2].weight.requires_grad_(False)
    recipe = Recipe(block_decay=0.1, block_rate=2.0, scale_lr=0.003, pair_lr=0.001)
    muon, adam = TrainUtil.optimizers(model, recipe)
    others, biases, scales, pairs = (group["params"] for group in adam.param_groups)
    (filters,) = (group["params"] for group in muon.param_groups)
    every = [id(p) for group in (filters, others, biases, scales, pairs) for p in group]
    assert sorted(every) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {id(p) for p in filters} == {id(layer.f.weight) for layer in model[:2]}
    inside = [model[0].residual1, model[0].skip, model[1].residuals]
    assert {id(p) for p in scales + pairs} == {id(p) for block in inside for p in block.parameters()}
    assert {id(p) for p in pairs} == {id(p) for block in inside for n, p in block.named_parameters() if n[-1] in "AB"}
    assert [id(p) for p in biases] == [id(model[2].bias)]
    assert [group["weight_decay"] for group in adam.param_groups] == [0.0, 0.0, 0.1, 0.1]
    assert [group["lr"] for group in adam.param_groups] == [0.01, 0.04, 0.006, 0.002]
    assert adam.defaults["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_everything_may_be_in_one_optimizer_at_one_rate(data, name, kind):
    model = SmallCNN(Model.parse("rw+lr"), 0, data)
    (optimizer,) = TrainUtil.optimizers(model, replace(Recipe(), block_rate=3.0).with_one(name, 0.02))
    assert isinstance(optimizer, kind)
    of_blocks = {id(p) for stage in model.stages for p in stage.residuals.parameters()}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {id(p): 0.06 if id(p) in of_blocks else 0.02 for p in model.parameters() if p.requires_grad}


def test_muon_takes_only_the_matrices_of_a_gpts_branches():
    model = GPT(Model.parse("rw+lr"), 0, dim=64, layers=2)
    muon, _ = TrainUtil.optimizers(model, TrainUtil.TEXT)
    (group,) = muon.param_groups
    assert sorted(map(id, group["params"])) == sorted(
        id(module.weight)
        for branch in model.stages[0].branches
        for module in branch.modules()
        if type(module) is nn.Linear
    )
    (adam,) = TrainUtil.optimizers(model, replace(TrainUtil.TEXT, matrix_lr=0.0))
    assert isinstance(adam, torch.optim.AdamW)


def test_evaluating_changes_nothing(data):
    model = network().train()
    before = TrainUtil.digest(model)
    TrainUtil.evaluate({"": model}, data)
    assert TrainUtil.digest(model) == before
