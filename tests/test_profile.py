import gc
import json
import weakref
from functools import partial

import pytest
import torch
from torch import nn

import Test
from comparison.models import MODELS
from comparison.profile import flops, interleave, profile_table, saved_bytes


@pytest.mark.parametrize(("network", "option"), [("gpt", "--arch wide"), ("cnn", "--gpt 64 1 8 1")])
def test_options_of_the_other_network_are_refused(network, option, capsys):
    with pytest.raises(SystemExit):
        Test.parse(["--profile", "--network", network, *option.split()])
    assert f"{option.split()[0]} has no effect with --profile --network {network}" in capsys.readouterr().err


def test_profile_measures_every_model_in_the_same_rounds(tmp_path, capsys):
    small = ["--seconds", "1", "--gpt", "64", "2", "16", "2", "--batch-size", "8", "--precision", "float32"]
    assert Test.main(["--profile", *small, "--models", "rw", "pa/2", "--out", str(tmp_path)]) == 0
    out, printed = tmp_path, capsys.readouterr().out
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
            assert f"{entry['parameters']:,}" in printed
            assert entry["flops"] >= costs[0]["flops"]
    assert gpt[1]["saved_bytes"] > 1.05 * gpt[0]["saved_bytes"]


@pytest.mark.parametrize(("chosen", "measured"), [("both", ["small CNN", "GPT"]), ("gpt", ["GPT"])])
def test_profile_measures_the_networks_that_are_asked_for(chosen, measured, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(Test, "measure", lambda network, device, **how: asked.update({network.name: network.models}))
    monkeypatch.setattr(Test, "profile_table", lambda *_: {"title": "", "columns": ["model"], "rows": [], "notes": ""})
    options = ["--profile", "--network", chosen, "--gpt", "64", "1", "8", "2", "--out", str(tmp_path)]
    assert Test.main(options) == 0
    assert [name.split(",")[0] for name in asked] == measured
    for models in asked.values():
        assert list(models) == list(MODELS)
    assert Test.main(options) == 2  # a profile is not overwritten


@pytest.mark.parametrize("options", [["--image-size", "2"], ["--image-size", "2", "--arch", "vit"]], ids=" ".join)
def test_images_that_are_too_small_are_refused(options, tmp_path, capsys):
    assert Test.main(["--profile", "--network", "cnn", *options, "--out", str(tmp_path)]) == 2
    assert "2×2 pixels are too small" in capsys.readouterr().err


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


def test_a_width_that_is_no_whole_number_of_heads_is_refused(capsys):
    with pytest.raises(SystemExit):
        Test.parse(["--profile", "--gpt", "100", "4", "256", "4"])
    assert "--gpt 100 …: the width must be a multiple of 64" in capsys.readouterr().err


def test_profile_shows_medians_of_ratios_within_a_round():
    base = {"model": "residual", "parameters": 9, "flops": 2e9, "saved_bytes": 4e6, "peak_bytes": None}
    other = {**base, "model": "rw", "parameters": 10, "flops": 3e9, "saved_bytes": 5e6}
    for name in ("step_seconds", "inference_1_seconds", "inference_128_seconds"):
        base[name], other[name] = [1.0, 2.0, 4.0, 8.0, 16.0], [1.1, 2.4, 5.2, 11.2, 24.0]  # a machine that slows down
    table = profile_table({"device_name": "", "precision": "", "compile": False}, "GPT", [base, other])
    rows = table["rows"]
    assert rows[0][1:5] == ["9", "2 GFLOP", "4000 ms", "4000 ms"]
    assert rows[1][1:4] == ["10", "1.5000", "1.300 (1.150–1.450)"]
    assert rows[1][6:] == ["1.2500", "1.000", "1.024"]  # and what table 5 has


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
