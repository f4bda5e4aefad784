import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from script import POSIX, STUDY, SYNTHETIC, numbers, plain_script, results, start
from torch import nn

import Test
import TrainUtil
from comparison.device import out_of_memory
from comparison.files import PARTIAL
from comparison.networks import ARCHS, SmallCNN
from comparison.study import Study, git_commit

resource = pytest.importorskip("resource") if os.name == "posix" else None


def test_what_has_finished_is_read_and_not_repeated(finished, tmp_path, capsys):
    out = shutil.copytree(finished[1], tmp_path / "out")
    before = results(out)
    options = [*SYNTHETIC, "--models", "residual", "rw", "rw+lr+pa@4/2", "--seeds", "2", "--out", str(out)]
    assert Test.main(options) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 runs are in" in printed
    assert "images/s," not in printed
    assert results(out) == before
    assert Test.main([*SYNTHETIC, "--models", "lr", "residual", "--seeds", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "2 of 6 runs are in" in printed
    assert "not trained side by side with residual" in printed
    after = json.loads((out / "results.json").read_text())
    assert [run for run in after["runs"] if run in before] == before
    added = [(run["model"], run["seed"], run["step_ratio"] is None) for run in after["runs"] if run not in before]
    assert added == [("lr", 0, True), ("lr", 1, True), ("residual", 2, False), ("lr", 2, False)]
    assert after["config"]["models"] == ["residual", "rw", "rw+lr+pa@4/2", "lr"]
    assert after["config"]["seeds"] == [0, 1, 2]


def test_a_model_that_is_added_has_the_numbers_that_it_would_have_had(finished, tmp_path):
    out = shutil.copytree(finished[1], tmp_path / "out")
    assert Test.main([*SYNTHETIC, "--models", "lr", "--out", str(out)]) == 0
    assert Test.main([*SYNTHETIC, "--models", "residual", "lr", "--out", str(tmp_path / "both")]) == 0
    assert numbers(out)[3] == numbers(tmp_path / "both")[1]


OTHERS = "--epochs 2,--batch-size 50,--limit 300,--arch wide,--hold-out 9,--threads 7,--precision bfloat16,--compile,"
OTHERS += "--accumulate 2,--optimizer sgd"


@pytest.mark.parametrize("options", [each.split() for each in OTHERS.split(",")], ids=" ".join)
def test_a_study_with_other_options_is_refused(options, finished, tmp_path, capsys):
    out = shutil.copytree(finished[1], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert Test.main([*SYNTHETIC, *options, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    option, value = (*options, "True")[:2]
    assert re.search(rf"{re.escape(str(out))} holds a study with {option} .*, not {value};", error)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_a_study_with_another_recipe_is_refused(finished, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(finished[1], tmp_path / "out")
    monkeypatch.setattr(TrainUtil, "IMAGES", replace(TrainUtil.IMAGES, lr=0.5))
    assert Test.main([*SYNTHETIC, "--out", str(out)]) == 2
    assert "recipe.lr 0.01, not 0.5" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["torch", "device_name"])
def test_a_study_of_another_torch_or_processor_is_refused(name, finished, tmp_path, capsys):
    study = Study.read(shutil.copytree(finished[1], tmp_path / "out"))
    study.config[name] = "another"
    study.write()
    assert Test.main([*SYNTHETIC, "--out", str(study.out)]) == 2
    assert f"{name} another, not" in capsys.readouterr().err


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
def test_a_file_that_is_no_study_is_not_overwritten(text, tmp_path, capsys):
    (tmp_path / "results.json").write_text(text)
    assert Test.main([*SYNTHETIC, "--out", str(tmp_path)]) == 2
    assert str(tmp_path / "results.json") in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == text


@pytest.mark.slow
@POSIX
def test_killed_at_random_moments_a_study_ends_with_the_same_bits(uninterrupted, tmp_path):
    generator = random.Random(0)
    kills, studies, resumed = 0, 0, 0
    while kills < 20 or not resumed:
        out = tmp_path / str(studies)
        resumed += any(out.glob("checkpoints/*/checkpoint.pt"))
        process = start(*STUDY, "--out", str(out), output=tmp_path / "output")
        process.join(generator.uniform(0, 1.5 + kills / 20))  # at last it is long enough, however slow the machine
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
            assert numbers(out) == uninterrupted
            studies += 1
    process = start(*STUDY, "--out", str(out), output=tmp_path / "output")
    process.join()
    assert numbers(out) == uninterrupted
    assert not list(out.rglob(PARTIAL + "*"))
    assert not (out / "checkpoints").exists()


def kill_at(name: str, n: int) -> None:
    """Kills this process in the n-th call of a function of os."""
    original, calls = getattr(os, name), 0

    def counting(*args):
        nonlocal calls
        calls += 1
        if calls == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(os, name, counting)


@pytest.mark.slow
@POSIX
def test_killed_while_a_file_is_written_a_study_ends_with_the_same_bits(uninterrupted, tmp_path):
    """In the n-th write, before it is flushed and before it is renamed, until a run gets to its end."""
    out, codes = tmp_path / "out", []
    moments = {"fsync": (1, 3, 6), "replace": (1, 4, 6)}
    for name, n in [*((name, n) for name, ns in moments.items() for n in ns), ("fsync", 99)]:
        process = start(*STUDY, "--out", str(out), output=tmp_path / "output", before=partial(kill_at, name, n))
        process.join()
        codes.append(process.exitcode)
    assert codes == 6 * [-signal.SIGKILL] + [0]
    assert numbers(out) == uninterrupted
    assert not list(out.rglob(PARTIAL + "*"))
    assert not (out / "checkpoints").exists()


def test_checkpoints_of_no_study_are_neither_used_nor_removed(tmp_path, capsys):
    mine = tmp_path / "checkpoints" / "my model" / "epoch90.pt"
    mine.parent.mkdir(parents=True)
    mine.touch()
    assert Test.main([*STUDY, "--out", str(tmp_path)]) == 2
    assert "belongs to no study" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]


def test_a_run_names_all_the_code_that_trained_it(half_finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("comparison.study.git_commit", lambda: "later")
    assert Test.main([*STUDY, "--out", str(tmp_path)]) == 0
    named = {run["seed"]: run["git_commit"] for run in results(tmp_path)}
    assert named == {0: "earlier, later", 1: "later"}
    assert "The runs are of several commits" in capsys.readouterr().out


def test_a_study_ends_when_all_of_it_is_written(finished, tmp_path):
    """Also by another process, which ends with this one's."""
    study = Study.read(shutil.copytree(finished[1], tmp_path / "out"))
    last = [study.runs.pop((model, 1)) for model in study.config["models"]]
    study.write()
    waited = threading.Event()
    with study.lock("seed 1"):  # as the other process has
        take = study.take([0, 1], study.config["models"], waited.set)
        thread = threading.Thread(target=lambda: list(take), daemon=True)
        thread.start()
        waited.wait()
        with study.lock("study"):
            Study(study.out, study.config, [*study.runs.values(), *last]).write()
            thread.join(0.5)
            assert thread.is_alive()  # results.json is there; results.csv might not be
        thread.join()


def test_what_a_killed_process_reported_is_not_taken_for_one_that_trains(finished, tmp_path):
    """It was killed before its first checkpoint; one that trains has the lock of its seed."""
    out = shutil.copytree(finished[1], tmp_path / "out")
    study, config = Study.read(out), json.loads((out / "results.json").read_text())["config"]
    for seed in (5, 6):
        study.folder(seed).mkdir(parents=True)
        study.report(seed, {"models": ["rw"], "work": 0.5, "tested": 0, "text": ""})
    with study.lock("seed 6"):
        Study.open(out, {**config, "seeds": [5, 6]}, None)
    assert [study.progress(seed).get("work") for seed in (5, 6)] == [None, 0.5]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A study that was stopped after the second epoch of its first seed."""
    out, save = tmp_path_factory.mktemp("stopped"), TrainUtil.save

    def stop(checkpoint, states):
        save(checkpoint, states)
        if len(states["residual"].history) == 2:
            raise KeyboardInterrupt

    with plain_script(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainUtil, "save", stop)
        patch.setattr("comparison.study.git_commit", lambda: "earlier")
        assert Test.main([*STUDY, "--seeds", "1", "--out", str(out)]) == 130
    return out


@pytest.fixture
def half_finished(stopped, tmp_path) -> Path:
    """The checkpoint of a copy of it."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    return tmp_path / "checkpoints" / "seed 0" / "checkpoint.pt"


@pytest.mark.parametrize("damage", ["none", "no progress.json", "one bit", "code"])
def test_a_damaged_checkpoint_is_set_aside(damage, half_finished, uninterrupted, tmp_path, capsys):
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self):
            return Path.touch, (ran,)

    if damage == "no progress.json":
        half_finished.with_name("progress.json").unlink()
    elif damage == "one bit":
        content = bytearray(half_finished.read_bytes())
        content[len(content) // 2] ^= 1
        half_finished.write_bytes(content)
    elif damage == "code":
        torch.save({"residual": Code(), "rw+lr+pa@4/2": {}}, half_finished)
    capsys.readouterr()
    assert Test.main([*STUDY, "--seeds", "1", "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert numbers(tmp_path) == uninterrupted[:2]
    _, one = results(tmp_path)
    assert one["learned"] == one["history"][-1]["learned"] != one["history"][0]["learned"]
    assert not ran.exists()
    assert ("earlier" in (one["git_commit"] or "")) == (damage == "none")  # that code's training is lost
    aside = half_finished.with_suffix(".damaged")
    if damage.startswith("no"):
        assert "is damaged" not in captured.err
        assert "epoch 1/3" not in captured.out
    else:
        assert f"{half_finished} is damaged" in captured.err
        assert "Traceback" not in captured.err
        assert aside.exists()
        assert "epoch 1/3" in captured.out


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def build(model, seed, data):
        net = SmallCNN(model, seed, data)
        if (model.name, seed) == ("rw", 1):
            net.classifier.weight.register_hook(lambda grad: grad * math.inf)
        return net

    monkeypatch.setitem(ARCHS, "small", build)
    options = [*STUDY, "--epochs", "2", "--models", "residual", "rw", "--out", str(tmp_path)]
    assert Test.main(options) == 0
    printed = capsys.readouterr().out
    runs = {(run["model"], run["seed"]): run for run in results(tmp_path)}
    assert len(runs) == 4
    assert [key for key, run in runs.items() if run["diverged"]] == [("rw", 1)]
    bad = runs["rw", 1]
    assert bad["diverged"] == len(bad["history"]) == bad["epochs"] == 1
    assert bad["history"][0]["train_loss"] is None
    assert re.search(r"seed 1, epoch 1/2: residual \d.*, rw diverged;", printed)
    assert re.search(r"seed 1, epoch 2/2: residual \d.*, rw diverged;", printed)  # the others go on
    assert "(1 of 2 seeds, 1 diverged)" in printed
    assert len(runs["residual", 1]["history"]) == 2
    assert Test.main(options) == 0  # and is not tried again
    assert "4 of 4" in capsys.readouterr().out


def test_a_study_of_nothing_but_diverged_runs_is_shown_too(tmp_path, monkeypatch, capsys):
    def build(model, seed, data):
        net = SmallCNN(model, seed, data)
        if model.base == "rw":
            nn.init.constant_(net.stages[0].residuals[0].w, math.inf)
        return net

    monkeypatch.setitem(ARCHS, "small", build)
    assert Test.main([*SYNTHETIC, "--models", "rw", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "(0 of 1 seeds, 1 diverged)" in printed
    assert "All runs have diverged." in printed
    assert "Equal:" not in printed  # there is no measure of which to say so
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
        (RuntimeError("It is possible that dataloader's workers are out of shared memory."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, expected):
    assert out_of_memory(error) == expected


def limit(kind: str, size: int) -> None:
    resource.setrlimit(getattr(resource, kind), (size, size))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_out_of_memory_names_the_model_and_what_to_try(tmp_path):
    options = ["--dataset", "synthetic", "--models", "residual", "rw", "--arch", "wide", "--batch-size", "5000"]
    options += ["--precision", "float32", "--out", str(tmp_path / "out")]
    process = start(*options, output=tmp_path / "output", before=partial(limit, "RLIMIT_DATA", 2 << 30))
    process.join()
    text = (tmp_path / "output").read_text()
    assert process.exitcode == 1, text
    for part in ("residual, rw, seed 0", "out of memory", "--batch-size than 5000", "smaller"):
        assert part in text
    assert "Traceback" not in text


@pytest.mark.slow
@POSIX
@pytest.mark.parametrize("size", [100_000, 5_000])
def test_a_full_disk_ends_with_what_was_computed(size, finished, tmp_path):
    """A limit to the size of files: below that of a checkpoint, and below that of results.json with some runs in it."""
    out = shutil.copytree(finished[1], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    options = [*SYNTHETIC, "--models", "residual", "rw", "rw+lr+pa@4/2", "--seeds", "3", "--out", str(out)]
    process = start(*options, output=tmp_path / "output", before=partial(limit, "RLIMIT_FSIZE", size))
    process.join()
    text = (tmp_path / "output").read_text()
    assert process.exitcode == (1 if size == 100_000 else 2), text
    assert "File too large" in text
    assert "Traceback" not in text
    after = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    if size == 5_000:
        assert after == before
    else:
        assert re.search(r"^\| rw ", text, flags=re.MULTILINE)
    assert json.loads(after["results.json"])["runs"] == json.loads(before["results.json"])["runs"]
    assert Test.main(options) == 0
    assert len(results(out)) == 9


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


def test_the_commit_is_that_of_a_repository_that_tracks_the_script(tmp_path, monkeypatch):
    """And not of one that the script merely lies in."""

    def git(*arguments):
        identity = ["-c", "user.name=test", "-c", "user.email=test"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    monkeypatch.setattr("comparison.study.ROOT", tmp_path)
    assert git_commit() is None
    git("init")
    (tmp_path / "Test.py").touch()
    git("commit", "--allow-empty", "-m", "another project")
    assert git_commit() is None
    (tmp_path / "README.md").touch()
    git("add", ".")
    git("commit", "-m", "the script")
    (tmp_path / "README.md").write_text("changed")
    assert re.fullmatch("[0-9a-f]{40}", git_commit())  # the code is the commit's
    (tmp_path / "Test.py").write_text("changed")
    assert git_commit().endswith("-dirty")
