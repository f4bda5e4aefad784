import csv
import json
import math
import os
import re
import shlex
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from script import PICTURES, POSIX, SYNTHETIC, one_layer, results, run, start
from torchvision.datasets import CIFAR10
from torchvision.transforms.functional import to_pil_image

import Test
import TrainUtil
from comparison.console import UserError
from comparison.models import MODELS
from comparison.sources import ARCHIVE_URLS
from comparison.study import configuration
from comparison.text import LENGTH


def test_a_whole_run_leaves_its_files(finished):
    _, out = finished
    stored = json.loads((out / "results.json").read_text())
    config, runs = stored["config"], stored["runs"]
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
        assert one["step_ratio"] > 0
        assert one["bits_per_byte"] is None
        fields = {"epoch", "train_loss", "test_loss", "test_accuracy", "seconds", "learned"}
        assert one["history"][0].keys() == fields
        assert one["test_loss"] == one["history"][0]["test_loss"] > 0
        assert one["learned"] == one["history"][0]["learned"]
    assert runs[1]["learned"].keys() == {"alpha", "beta"}
    assert runs[2]["learned"].keys() == {"alpha", "beta", "gamma[0]", "gamma[1]"}
    assert list(runs[2]["learned"]["gamma[1]"]) == ["1.2", "2.2", "3.2", "3.3"]
    rows = list(csv.DictReader((out / "results.csv").open()))
    for name in ("test_loss", "test_accuracy", "step_ratio"):
        assert [float(row[name]) for row in rows] == [one[name] for one in runs]
    assert config["seeds"] == [0, 1]
    for name in PICTURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == sorted([".locks", "results.csv", "results.json", *PICTURES])


def test_the_table_is_that_of_the_results(finished):
    said, out = finished
    runs = results(out)
    table = {
        cells[0]: cells[1:]
        for line in said.splitlines()
        if line.startswith("| r") and len(cells := [cell.strip() for cell in line.split("|")[1:-1]]) == 13
    }
    assert list(table)[-3:] == ["residual", "rw", "rw+lr+pa@4/2"]
    assert table["residual"][0] == f"{runs[0]['parameters']:,}"
    for i, name, factor, digits in ((2, "test_loss", 1, 4), (6, "test_accuracy", 100, 2)):
        a, b = (factor * one[name] for one in (runs[1], runs[4]))
        assert table["rw"][i] == f"{(a + b) / 2:.{digits}f} ± {abs(a - b) / 2**0.5:.{digits}f}"
        c, d = (factor * one[name] for one in (runs[0], runs[3]))
        assert table["rw"][i + 1].startswith(f"{(a - c + b - d) / 2:+.{digits}f} [")
        assert table["residual"][i + 1] == "–"
    assert table["rw"][10].startswith(f"{(runs[1]['step_ratio'] + runs[4]['step_ratio']) / 2:.3f} (")
    assert "SYNTHETIC" in said
    assert re.search(r"^\| rw \(1 of 2 seeds\) ", said, flags=re.MULTILINE)  # after the first seed already
    for name in ("results.json", "results.csv", *PICTURES):
        assert str(out / name) in said.replace("\n", "")


def test_a_study_of_text_has_bits_per_byte_in_place_of_accuracy(tmp_path, capsys, pictures):
    options = ["--dataset", "synthetic", "--arch", "gpt6", "--limit", "16", "--hold-out", "16", "--epochs", "1"]
    options += ["--seeds", "2"]
    assert Test.main([*options, "--models", "residual", "pa:rank=none", "--out", str(tmp_path)]) == 0
    runs = results(tmp_path)
    for one in runs:
        assert one["test_accuracy"] is one["history"][-1]["test_accuracy"] is None
        assert one["bits_per_byte"] == pytest.approx(one["test_loss"] / math.log(2))
        assert one["bytes_per_second"] == pytest.approx(16 * LENGTH / one["train_seconds"])
        assert one["history"][-1]["test_loss"] == one["test_loss"] < math.log(256) + 1
    said = capsys.readouterr().out
    assert f"{16 * LENGTH:,} training bytes an epoch" in said
    assert re.search(r"\d+ bytes/s", said)
    header = next(line for line in said.splitlines() if line.startswith("| model"))
    assert "bits per byte" in header
    assert "accuracy" not in header
    assert (tmp_path / "loss.png").exists()
    assert not (tmp_path / "accuracy.png").exists()
    assert Test.main(["--draw", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(said[said.rindex("SYNTHETIC") :])


def test_text_and_images_have_networks_of_their_own(capsys):
    assert Test.parse(["--dataset", "enwik8"]).arch == "gpt"
    assert Test.parse(["--arch", "gpt24"]).dataset == "enwik8"
    assert (Test.parse([]).arch, Test.parse([]).dataset) == ("small", "cifar10")
    for options in (["--dataset", "enwik8", "--arch", "small"], ["--dataset", "cifar10", "--arch", "gpt"]):
        with pytest.raises(SystemExit) as error:
            Test.parse(options)
        assert error.value.code == 2
        assert f"{' '.join(options[:2])} goes with --arch " in capsys.readouterr().err


def test_one_optimizer_has_a_rate_of_its_own(data, capsys):
    recipe = Test.recipe_for(Test.parse(["--optimizer", "sgd", "--lr", "0.2"]), data)
    assert (recipe.optimizer, recipe.lr, recipe.scale_lr, recipe.pair_lr) == ("sgd", 0.2, 0.2, 0.2)
    for options, lr in (
        (["--optimizer", "sgd"], 0.1),
        (["--optimizer", "adamw"], 0.001),
        (["--optimizer", "sgd", "--lr", "3"], 3.0),
    ):
        assert configuration(vars(Test.parse(options)))["lr"] == lr  # as results.json has it
    for options, part in (
        (["--lr", "0.1"], "--lr goes with --optimizer"),
        (["--lr", "0"], "must be a positive number up to 1e+06, got '0'"),
        (["--lr", "1e39"], "up to 1e+06, got '1e39'"),  # no optimiser takes it
    ):
        with pytest.raises(SystemExit):
            Test.parse(options)
        assert part in capsys.readouterr().err


def test_devices_of_one_kind_may_share_a_study(tmp_path):
    options = [*SYNTHETIC, "--limit", "20", "--models", "rw", "--out", str(tmp_path)]
    for device, seeds in (("cpu", "1"), ("cpu:0", "2")):
        assert Test.main([*options, "--device", device, "--seeds", seeds]) == 0


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--models", "resnet"], ["'resnet'", *MODELS]),
        (["--models", "rw@8"], ["rw@8", "no rank"]),
        (["--models", "lr/3"], ["lr/3", "no k"]),
        (["--models", "lr@0"], ["lr@0", "from 1 to"]),
        (["--seeds", "0"], ["--seeds", "FIRST-LAST", "'0'"]),
        (["--seeds", "7-5"], ["--seeds", "FIRST-LAST", "'7-5'"]),
        (["--seeds", "4000-4096"], ["--seeds", "from 0 to 4095", "'4000-4096'"]),
        (["--seeds", "5-"], ["--seeds", "'5-'"]),
        (["--epochs", "-1"], ["--epochs", "from 1", "-1"]),
        (["--epochs", "2.5"], ["--epochs", "whole number", "2.5"]),
        (["--device", "tpu"], ["'tpu'", "auto, cpu"]),
        (["--device", "cuda:99"], ["'cuda:99'", "auto, cpu"]),
        (["--precision", "float8"], ["float8", "float32", "bfloat16"]),
        (["--dataset", "mnist"], ["mnist", "cifar10", "synthetic"]),
        (["--models", "rw:norm=3"], ["'norm=3'", "bound=softmax|sigmoid|single|none", "dim=D"]),
        (["--models", "rw:bound=tanh"], ["'bound=tanh'", "softmax|sigmoid|single|none"]),
        (["--models", "rw:dim=64"], ["'dim=64'", "dim=D"]),
        (["--models", "rw:scale=0"], ["'rw:scale=0'", "positive"]),
        (["--models", "rw:scale=1,scale=2"], ["'rw:scale=1,scale=2'", "twice"]),
        (["--models", "pa@8:rank=none"], ["'pa@8:rank=none'", "twice"]),
        (["--models", "rw:scale=-1"], ["'scale=-1'", "scale=NUMBER"]),
        (["--models", "lr:shared=true"], ["'lr:shared=true'", "shared"]),
        (["--models", "rw+lr+pa:rank=none"], ["'rw+lr+pa:rank=none'", "rank would be ignored"]),
        (["--seconds", "9"], ["--seconds goes with --profile"]),
        (["--profile", "--hold-out", "5"], ["does not go with --profile"]),
        (["--draw", "x", "--models", "rw"], ["does not go with --draw"]),
        (["--models", "pa:shared=no"], ["'shared=no'", "shared=true|false"]),
        (["--models", "pa:rank=2.5"], ["'rank=2.5'", "rank=none"]),
        (["--models", "rw:decay=-1"], ["'decay=-1'", "decay=NUMBER"]),
        (["--models", "rw:rate=1e300"], ["'rate=1e300'", "numbers up to 1e+06"]),
        (["--models", "deeper:scale=1"], ["'deeper:scale=1'", "scale would be ignored"]),
        (["--models", "residual:decay=1"], ["decay would be ignored"]),
        (["--models", "lr:bound=sigmoid"], ["bound would be ignored"]),
        (["--models", "lr:rank=none"], ["rank would be ignored"]),
        (["--models", "rw+lr:dim=D"], ["dim would be ignored"]),
        (["--models", "rw:init=orthogonal"], ["init would be ignored"]),
        (["--models", "rw:bound=none,scale=7"], ["scale would be ignored"]),
        (["--models", "pa:rank=none,init=orthogonal"], ["init would be ignored"]),
        (["--models", "pa:rank=none,shared=false"], ["shared would be ignored"]),
        (["--workers", "2"], ["--workers", "imagefolder"]),
        (["--image-size", "64"], ["--image-size", "imagefolder", "--profile"]),
        (["--limit", "10" * 20], ["--limit", "to 999999999"]),  # more than 64 bits
        (["--models", "lr@" + "9" * 30], ["to 999999999"]),
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
    ("name", "options"),
    [
        ("lr", ["--optimizer", "sgd", "--lr", "0.01"]),
        ("accumulate", ["--accumulate", "2"]),
        ("arch", ["--arch", "vit"]),
        ("precision", ["--precision", "bfloat16"]),
        ("compile", ["--compile"]),
    ],
)
def test_processes_that_train_together_must_have_the_same_options(name, options, data, monkeypatch):
    """Otherwise each would have weights of its own, and nobody would see it."""
    monkeypatch.setattr(Test, "load_data", lambda options: data)
    first, mine = (
        Test.parse(["--optimizer", "sgd", "--lr", "0.1", "--precision", "float32", *more]) for more in ([], options)
    )
    recipes = [Test.recipe_for(each, data) for each in (first, mine)]
    told = Test.common_settings(first, data, recipes[0])
    monkeypatch.setattr(Test, "broadcast", lambda _: (told, 0, ["residual"]))
    monkeypatch.setattr(Test, "train_seed", lambda *_: pytest.fail("it trains"))
    with pytest.raises(UserError, match=rf"^{name}: this process has .*, the first one "):
        Test.run_follower(mine)


def test_a_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = Test.parse(["--out=~/x", "--data-dir", "~/data"])
    assert (options.out, options.data_dir) == (tmp_path / "x", tmp_path / "data")
    with pytest.raises(SystemExit):
        Test.parse(["--out=~nobody-of-this-name/x"])


def test_options_are_parsed_without_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Test.parse(["--out", "runs/x"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--limit", "1"], ["--batch-size", "1"], ["--accumulate", "20"]], ids=" ".join)
def test_a_single_image_before_a_batch_norm_is_refused(options, tmp_path, capsys):
    command = [*SYNTHETIC, "--limit", "20", "--models", "rw", *options, "--out", str(tmp_path)]
    assert Test.main(command) == 2
    error = capsys.readouterr().err
    assert "two examples, for batch norm" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "results.json").exists()  # a study that can't be trained is not started


def test_a_transformer_takes_a_single_image(tmp_path):
    assert Test.main([*SYNTHETIC, "--limit", "1", "--models", "rw", "--arch", "vit", "--out", str(tmp_path)]) == 0


def test_a_vit_learns_at_a_tenth_of_the_rate_of_the_others(data):
    rates = [Test.recipe_for(Test.parse(["--arch", arch]), data) for arch in ("resnet18", "vit")]
    assert [rate.lr for rate in rates] == [rate.pair_lr for rate in rates] == [0.01, 0.001]


def test_as_many_threads_are_used_as_are_asked_for(monkeypatch):
    monkeypatch.setattr(Test, "compare", lambda options, argv: torch.get_num_threads())
    assert Test.main(["--threads", "3"]) == 3


@pytest.mark.parametrize("options", [["--models", "rw"], ["--profile", "--seconds", "1"]], ids=" ".join)
def test_training_and_profiling_keep_memory_and_take_the_same_convolutions(options, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(Test, "keep_memory", lambda: calls.append(1))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    for work in ("compare", "profile"):
        monkeypatch.setattr(Test, work, lambda *_: calls.append(torch.backends.cudnn.deterministic))
    Test.main([*options, "--out", str(tmp_path)])
    assert calls == [1, True]


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP")
def test_openmps_threads_do_not_wait_long_without_sleeping():
    """What OpenMP says when torch loads it."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    said = run("--help", env={**environment, "OMP_DISPLAY_ENV": "verbose"}).stderr
    assert "GOMP_SPINCOUNT = '10000'" in said


@pytest.mark.parametrize(("instructions", "precision"), [({}, "float32"), ({"avx512_bf16": True}, "bfloat16")])
def test_bfloat16_is_the_default_where_the_processor_has_instructions_for_it(instructions, precision, monkeypatch):
    monkeypatch.setattr("comparison.device.cpu_capabilities", lambda: instructions)
    assert Test.parse(["--device", "cpu"]).precision == precision


def test_images_that_fit_into_no_memory_are_refused_before_a_study_is_started(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Test, "load_data", lambda options: data)
    monkeypatch.setattr(TrainUtil, "IMAGES", replace(TrainUtil.IMAGES, sizes=((400_000, 1.0),)))
    assert Test.main(["--arch", "resnet18", "--out", str(tmp_path)]) == 1
    assert "out of memory: try another --arch" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_rank_that_fits_into_no_memory_is_refused(tmp_path, capsys):
    assert Test.main([*SYNTHETIC, "--models", "lr@999999999", "--out", str(tmp_path)]) == 1
    assert "out of memory: lr@" in capsys.readouterr().err


def without_a_compiler(cache: Path) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    import_module("torch._inductor.config").cpp.cxx = ("no-such-compiler",)
    one_layer()


@pytest.mark.slow
@POSIX
def test_without_a_compiler_compile_is_refused(tmp_path):
    options = [*SYNTHETIC, "--limit", "8", "--batch-size", "8", "--models", "rw", "--compile", "--device", "cpu"]
    options += ["--arch", "gpt6"]
    options += ["--out", str(tmp_path / "out")]
    process = start(*options, output=tmp_path / "said", before=partial(without_a_compiler, tmp_path / "cache"))
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 2, said
    assert "--compile does not work here: InvalidCxxCompiler: No working C++ compiler" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--out", str(Path(__file__))], f"{Path(__file__)}"),
        (["--hold-out", "5000"], "--hold-out must be below the 5000 training images, got 5000"),
    ],
)
def test_options_that_the_data_do_not_allow_are_refused(options, part, tmp_path, capsys):
    assert Test.main([*SYNTHETIC, "--out", str(tmp_path), *options]) == 2
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
    options = [*data, "--batch-size", "8", "--epochs", "1", "--seeds", "1", "--out", str(tmp_path / "out")]
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
    runs = results(tmp_path / "out")
    assert [(run["model"], run["step_ratio"]) for run in runs] == [("residual", 1.0), ("rw", None)]


def test_no_data_ends_with_what_was_tried(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ARCHIVE_URLS, CIFAR10, ("http://127.0.0.1:1/archive",))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    assert Test.main(["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    for part in ("127.0.0.1", "npm is not installed", "MD5", "--dataset synthetic", str(tmp_path / "data")):
        assert part in error
    assert len(error.splitlines()) < 12
    assert not (tmp_path / "out" / "results.json").exists()


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


def test_the_decay_in_a_models_name_reaches_the_training(tmp_path, monkeypatch):
    seen = {}

    def optimizers(model, recipe, precision):
        seen[sum(p.numel() for p in model.parameters())] = recipe.block_decay
        return made(model, recipe, precision)

    made = TrainUtil.optimizers
    monkeypatch.setattr(TrainUtil, "optimizers", optimizers)
    assert Test.main([*SYNTHETIC, "--models", "residual", "rw:decay=0.1", "lr", "--out", str(tmp_path)]) == 0
    assert [seen[parameters] for parameters in sorted(seen)] == [0.0, 0.1, 0.0]


def test_seeds_are_a_number_or_a_range():
    assert Test.parse(["--out", "x"]).seeds == [0, 1, 2]
    assert Test.parse(["--out", "x", "--seeds", "2"]).seeds == [0, 1]
    assert Test.parse(["--out", "x", "--seeds", "100-102"]).seeds == [100, 101, 102]
