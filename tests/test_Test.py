import copy
import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from packaging.requirements import Requirement

import Test
import TrainUtil
from Test import GPT, MODELS, Model, SmallCNN

ROOT = Path(__file__).parents[1]
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


@pytest.fixture(scope="module")
def networks(data) -> dict[str, SmallCNN]:
    names = (*MODELS, "lr@8", "pa/5", "rw+lr+pa@4/2")
    return {name: SmallCNN(Model.parse(name), 3, data.train_images) for name in names}


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

    batches = TrainUtil.batches
    monkeypatch.setattr(TrainUtil, "batches", recording)
    recipe = TrainUtil.Recipe(epochs=2, batch_size=100)
    for name in ("residual", "rw+lr+pa", "deeper"):
        seen[name] = []
        TrainUtil.train(SmallCNN(Model.parse(name), 0, data.train_images), data.limit(200), recipe, 0)
    assert len(seen["residual"]) == 4
    for mine, theirs in zip(seen["rw+lr+pa"], seen["residual"]):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs))
    for mine, theirs in zip(seen["deeper"], seen["residual"]):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs))


def test_a_wide_network_trains_too(data):
    network = SmallCNN(Model.parse("rw+lr+pa"), 0, data.train_images, Test.ARCHS["wide"])
    assert [stage.down[0].out_channels for stage in network.stages] == [64, 256, 256]
    recipe = TrainUtil.Recipe(epochs=4, batch_size=16, sizes=((16, 0.5), (32, 1.0)))
    history = TrainUtil.train(network, data.limit(64), recipe, 0)["history"]
    assert history[3]["train_loss"] < history[0]["train_loss"]


def test_seeds_differ_and_building_a_model_leaves_the_random_numbers_alone(data):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    states = [SmallCNN(Model.parse("rw+lr+pa"), seed, data.train_images).state_dict() for seed in (0, 1)]
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
    images = TrainUtil.synthetic().train_images
    baseline = sum(p.numel() for p in SmallCNN(Model.parse("residual"), 0, images).parameters())
    layers = [
        (d, j + 1) for d, n in zip(Test.ARCHS["small"], SmallCNN.layers) for j in range(n)
    ]  # D, activations there
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
        parameters = sum(p.numel() for p in SmallCNN(Model.parse(name), 0, images).parameters())
        assert parameters - baseline == expected, name


def test_what_the_gpt_keeps_for_the_backward_pass():
    """Ratios to the plain residual connection. They are exact, so that the bounds leave room for rounding alone."""
    tokens = torch.zeros(4, 256, dtype=torch.long)

    def saved(name: str, recompute: bool = False) -> int:
        model = GPT(Model.parse(name), 768, 4, 256, recompute)
        return TrainUtil.saved_bytes(model, lambda: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))

    plain = saved("residual")
    for name, keeping, recomputing in [
        ("rw", 1.1204, 1.0000),
        ("lr", 1.0050, 1.0050),
        ("pa", 1.0000, 1.0000),
        ("rw+lr", 1.1292, 1.0088),
        ("rw+pa", 1.1204, 1.0000),
        ("rw+lr+pa", 1.1435, 1.0231),
    ]:
        assert saved(name) / plain < keeping + 0.0001, name
        assert saved(name, recompute=True) / plain < recomputing + 0.0001, name


def test_whitened_patches_are_uncorrelated_with_unit_variance(networks, data):
    """For natural images; the noise of 5e-4 that is added to the variances is far below those of the made-up ones."""
    out = networks["residual"].whitening(TrainUtil.normalize(data.train_images[:5000]))[:, :8, ::2, ::2]
    covariance = out.transpose(0, 1).flatten(1).double()
    covariance = covariance @ covariance.T / covariance.shape[1]
    torch.testing.assert_close(covariance, torch.eye(8).double(), rtol=0, atol=0.05)


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
    for name in ("accuracy.png", "learned.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["accuracy.png", "learned.png", "results.csv", "results.json"]


def test_the_table_is_that_of_the_results(finished):
    done, out = finished
    runs = json.loads((out / "results.json").read_text())["runs"]
    table = {
        cells[0]: cells[1:]
        for line in done.stdout.splitlines()
        if len(cells := [cell.strip() for cell in re.split("[│|]", line)[1:-1]]) == 7
    }
    assert list(table) == ["residual", "rw", "rw+lr+pa@4/2"]
    assert table["residual"][0] == f"{runs[0]['parameters']:,}"
    a, b = (100 * one["test_accuracy"] for one in (runs[1], runs[4]))
    assert table["rw"][2] == f"{(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f}"
    c, d = (100 * one["test_accuracy"] for one in (runs[0], runs[3]))
    assert table["rw"][3] == f"{(a - c + b - d) / 2:+.2f} ± {abs(a - c - b + d) / 2**0.5:.2f}"
    assert table["residual"][3] == "–"
    assert "SYNTHETIC" in done.stdout
    for name in ("results.json", "results.csv", "accuracy.png", "learned.png"):
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
    assert [entry["model"] for entry in gpt] == ["residual", "rw", "pa/2", "rw, recompute"]
    for costs in networks.values():
        for name in ("step_seconds", "inference_1_seconds", "inference_128_seconds"):
            rounds = {len(entry[name]) for entry in costs}
            assert len(rounds) == 1
            assert rounds.pop() >= 3
        for entry in costs:
            assert entry["peak_bytes"] is None
            assert entry["flops"] >= costs[0]["flops"]
            assert f"{entry['parameters']:,}" in done.stdout
    assert (
        gpt[0]["saved_bytes"] < gpt[3]["saved_bytes"] < 1.001 * gpt[0]["saved_bytes"]
    )  # scalars are all that is added
    assert gpt[1]["saved_bytes"] > 1.05 * gpt[0]["saved_bytes"]


@pytest.mark.parametrize(
    ("chosen", "measured"), [("both", ["small CNN", "GPT"]), ("cnn", ["small CNN"]), ("gpt", ["GPT"])]
)
@pytest.mark.parametrize("compile", [False, True])
def test_profile_measures_the_networks_that_are_asked_for(chosen, measured, compile, tmp_path, monkeypatch):
    monkeypatch.setattr(Test, "measure", lambda models, example, batch, options: list(models))
    options = Test.parse(["--profile", "--network", chosen, "--gpt", "64", "1", "8", "2", "--out", str(tmp_path)])
    options.compile = compile
    measure = {network.split(",")[0]: names for network, names in Test.networks(options)}
    assert list(measure) == measured
    for network, names in measure.items():
        assert [name for name in names if "recompute" not in name] == list(MODELS)
        assert any("recompute" in name for name in names) == (network == "GPT" and not compile)


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
    """On a CPU with the same number of threads a run, as another number of threads adds up in another order."""
    results = {}
    for n in ("1", "2"):
        options = ("--models", "residual", "pa", "--seeds", "2", "--parallel", n, "--out", str(tmp_path / n))
        done = run(*SYNTHETIC, *options, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        results[n] = json.loads((tmp_path / n / "results.json").read_text())["runs"]
        assert len(re.findall(r"^\[[1-4]/4\] .* epoch 1/1", done.stdout, flags=re.MULTILINE)) == 4
    assert "2 runs at a time" in done.stdout
    for mine, theirs in zip(results["2"], results["1"]):
        for key in ("model", "seed", "test_accuracy", "learned"):
            assert mine[key] == theirs[key]
        assert mine["history"][0]["train_loss"] == theirs["history"][0]["train_loss"]


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
        (["--hold-out", "5000"], ["--hold-out", "below the 5000"]),
        (["--out", str(Path(__file__))], ["--out", Path(__file__).name]),
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


def test_results_are_never_overwritten(finished, capsys):
    before = (finished[1] / "results.json").read_bytes()
    with pytest.raises(SystemExit) as end:
        Test.main([*SYNTHETIC, "--out", str(finished[1])])
    assert end.value.code == 2
    assert str(finished[1]) in capsys.readouterr().err
    assert (finished[1] / "results.json").read_bytes() == before


def test_no_data_ends_with_what_was_tried(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TrainUtil, "ARCHIVE_URLS", ("http://127.0.0.1:1/archive",))
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
    process = subprocess.Popen(command, preexec_fn=heed, **pipes)
    try:
        deadline = time.monotonic() + 120
        while not (out / "results.json").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert f"{len(runs)} runs have finished" in stderr
    assert "Traceback" not in stderr
    assert f"│ {runs[0]['model']}" in stdout
    assert sorted(path.name for path in out.iterdir()) == ["accuracy.png", "learned.png", "results.csv", "results.json"]


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
        python, script, *options = shlex.split(command)
        assert python == "python"
        if script == "Test.py" and "synthetic" not in options and "--help" not in options:
            Test.parse([*options, "--out", str(tmp_path / "parsed")])
            continue
        if script == "Test.py" and "--out" not in options and "--help" not in options:
            options += ["--out", str(tmp_path / str(i))]
        done = subprocess.run([sys.executable, ROOT / script, *options], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)


def test_readme_code_runs(monkeypatch):
    blocks = readme_blocks("python")
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.download
def test_one_short_run_on_the_real_data(tmp_path):
    options = ["--models", "residual", "--epochs", "1", "--limit", "10000", "--data-dir", str(tmp_path / "data")]
    done = run(*options, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (one,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert one["test_accuracy"] > 0.25
    assert "CIFAR-10, 10,000 training images" in done.stdout
    data = TrainUtil.load_cifar10(tmp_path / "data")  # what it left for the next time, checked against its SHA-256
    assert data.train_labels.bincount().tolist() == [5000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
