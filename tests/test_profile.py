import gc
import json
import weakref
from functools import partial

import pytest
import torch
from torch import nn

import Test
from comparison.device import Stopwatch
from comparison.profile import flops, interleave, profile_table, saved_bytes


@pytest.mark.parametrize("arch", ["small", "gpt6"])
def test_profile_measures_every_model_in_the_same_rounds(arch, tmp_path, capsys):
    options = ["--profile", "--arch", arch, "--seconds", "1", "--batch-size", "2", "--precision", "float32"]
    options += ["--models", "rw", "pa/2", "--out", str(tmp_path)]
    assert Test.main(options) == 0
    printed, profile = capsys.readouterr().out, json.loads((tmp_path / "profile.json").read_text())
    costs = profile["costs"]
    assert [entry["model"] for entry in costs] == ["residual", "rw", "pa/2"]
    for name in ("step_seconds", "inference_seconds", "inference_1_seconds"):
        (rounds,) = {len(entry[name]) for entry in costs}
        assert rounds >= 3
    for entry in costs:
        assert entry["peak_bytes"] is None
        assert f"{entry['parameters']:,}" in printed
        assert entry["flops"] >= costs[0]["flops"]
    assert costs[1]["saved_bytes"] > 1.05 * costs[0]["saved_bytes"]
    assert profile["config"]["dataset"] == "synthetic"
    assert Test.main(options) == 2  # a profile is not overwritten


@pytest.mark.parametrize(("size", "arch"), [("1", "small"), ("2", "small"), ("2", "vit")])
def test_images_that_are_too_small_are_refused(size, arch, tmp_path, capsys):
    assert Test.main(["--profile", "--image-size", size, "--arch", arch, "--out", str(tmp_path)]) == 2
    assert f"{size}×{size} pixels are too small" in capsys.readouterr().err


def test_what_is_saved_is_freed_once_it_is_counted():
    """Of every model in turn: together they may be more than a GPU has."""
    p, intermediate = nn.Parameter(torch.ones(1000)), []

    def forward() -> torch.Tensor:
        x = p * p
        y = x * x
        intermediate.extend(map(weakref.ref, (x, y)))
        return (y * y).sum()

    assert saved_bytes(nn.ParameterList([p]), forward) == 8000
    gc.collect()
    assert [tensor() for tensor in intermediate] == [None, None]


@pytest.mark.parametrize(
    ("size", "reason"), [("5001", "5000 images, fewer than --batch-size 5001"), ("1", "two examples, for batch norm")]
)
def test_a_batch_that_is_too_large_or_too_small_is_refused(size, reason, tmp_path, capsys):
    assert Test.main(["--profile", "--batch-size", size, "--out", str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err


def test_profile_shows_medians_of_ratios_within_a_round():
    base = {"model": "residual", "parameters": 9, "flops": 2e9, "saved_bytes": 4e6, "peak_bytes": None}
    other = {**base, "model": "rw", "parameters": 10, "flops": 3e9, "saved_bytes": 5e6}
    for name in ("step_seconds", "inference_seconds", "inference_1_seconds"):
        base[name], other[name] = [1.0, 2.0, 4.0, 8.0, 16.0], [1.1, 2.4, 5.2, 11.2, 24.0]  # a machine that slows down
    config = {"arch": "gpt", "batch_size": 8, "image_size": None, "device_name": "", "precision": "", "compile": False}
    table = profile_table(config, [base, other])
    rows = table["rows"]
    assert rows[0][1:5] == ["9", "2 GFLOP", "4000 ms", "4000 ms"]
    assert rows[1][1:4] == ["10", "1.5000", "1.300 (1.150–1.450)"]
    assert rows[1][6:] == ["1.2500"]


def test_interleaving_lets_every_function_begin_a_round():
    calls = []
    functions = {name: partial(calls.append, name) for name in "ABC"}
    times = interleave(functions, 0.0, torch.device("cpu"))
    assert {len(each) for each in times.values()} == {3}
    assert "".join(calls) == "ABC" + "ABC" + "BCA" + "CAB"


def test_saved_bytes_count_a_storage_once_and_no_parameters():
    linear = torch.nn.Linear(3, 5, bias=False)
    x = torch.ones(7, 3)
    assert saved_bytes(linear, lambda: linear(x)) == 7 * 3 * 4  # x; the weight is a parameter
    y = torch.ones(7, 5, requires_grad=True)
    assert saved_bytes(linear, lambda: y * y.view(5, 7).view(7, 5)) == 7 * 5 * 4


def test_flops_of_a_training_step():
    linear, x = torch.nn.Linear(3, 5, bias=False), torch.ones(7, 3, requires_grad=True)
    assert flops(lambda: linear(x).sum().backward()) == 3 * 2 * 7 * 3 * 5  # forward, and two products backward


def test_steps_on_a_gpu_are_timed_by_events_and_wait_for_nothing(monkeypatch):
    """With a GPU whose clock is a number: it gets an event before and after each step, and is waited for at the end."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")
            self.at = 250.0 * len(calls)  # milliseconds

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(2):
        with watch:
            calls.append("step")
    assert watch.seconds() == [0.5, 0.5]
    assert calls == ["record", "step", "record"] * 2 + ["wait"]
