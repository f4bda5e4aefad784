import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from script import ROOT, STUDY, SYNTHETIC, numbers, results, run

import Test

pytestmark = pytest.mark.slow  # they start many processes


def test_runs_side_by_side_give_the_numbers_of_one_after_the_other(tmp_path):
    options = [*SYNTHETIC, "--models", "residual", "pa", "--seeds", "2", "--threads", "1"]
    assert Test.main([*options, "--out", str(tmp_path / "1")]) == 0
    done = run(*options, "--parallel", "2", "--out", str(tmp_path / "2"))
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\[[1-4]/4\] .* epoch 1/1", done.stdout, flags=re.MULTILINE)) == 4
    assert "2 runs at a time" in done.stdout
    for mine, theirs in zip(results(tmp_path / "2"), results(tmp_path / "1"), strict=True):
        for key in ("model", "seed", "test_accuracy", "learned", "weights_sha256"):
            assert mine[key] == theirs[key]
        assert mine["history"][0]["train_loss"] == theirs["history"][0]["train_loss"]


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
    assert Test.main([*STUDY, "--out", str(tmp_path)]) == 0  # by itself
    assert numbers(tmp_path) == uninterrupted


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
