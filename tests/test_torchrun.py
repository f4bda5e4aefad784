import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from script import ROOT, SYNTHETIC, free_port, join, one_layer, results, start

import Test
from comparison.networks import ARCHS

pytestmark = pytest.mark.slow  # they start many processes

TOGETHER = (*SYNTHETIC, "--epochs", "2", "--device", "cpu", "--arch", "gpt6", "--limit", "16", "--batch-size", "8")
TOGETHER += ("--models", "residual", "rw+lr+pa", "--threads", "1")


def workers(torchrun: int) -> list[int]:
    """The processes of a torchrun, in order of their rank."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(torchrun)], capture_output=True, text=True).stdout
    return sorted(int(line.split()[0]) for line in listed.splitlines() if "Test.py" in line)


def started_together(said: Path, *options: str, then: Callable | None = None) -> list[multiprocessing.Process]:
    """Two processes, that write to files in a folder."""
    port = free_port()
    return [start(*options, output=said / str(rank), before=partial(join, rank, port, then)) for rank in (0, 1)]


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("together")
    for process in started_together(out, *TOGETHER, "--out", str(out)):
        process.join()
    return out


def test_two_processes_give_the_numbers_of_one_once(together, tmp_path):
    said = [(together / rank).read_text() for rank in "01"]
    assert [text.count("epoch 2/2") for text in said] == [1, 0]  # only the first process prints
    assert said[0].count("2 processes") == 1
    assert Test.main([*TOGETHER, "--out", str(tmp_path)]) == 0
    for mine, one in zip(results(together), results(tmp_path), strict=True):
        losses = ([entry["train_loss"] for entry in run["history"]] for run in (mine, one))
        torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
        assert mine["parameters"] == one["parameters"]
    assert json.loads((together / "results.json").read_text())["config"]["processes"] == 2
    assert Test.main([*TOGETHER, "--out", str(together)]) == 2  # another number of processes


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_two_processes_compile_and_accumulate_without_changing_the_losses(tmp_path, monkeypatch):
    options = (*TOGETHER, "--models", "residual", "--accumulate", "2")
    processes = started_together(tmp_path, *options, "--compile", "--out", str(tmp_path / "two"), then=one_layer)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "0").read_text()
    monkeypatch.setitem(ARCHS, "gpt6", ARCHS["gpt6"])
    one_layer()
    assert Test.main([*options, "--out", str(tmp_path / "one")]) == 0
    (compiled,), (plain,) = (results(tmp_path / name) for name in ("two", "one"))
    losses = ([entry["train_loss"] for entry in run["history"]] for run in (compiled, plain))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    assert compiled["compile_seconds"] > 0


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps to find the processes")
@pytest.mark.parametrize("machines", [1, 2])
def test_torchruns_restart_resumes_from_the_checkpoint(machines, together, tmp_path):
    how = ["--standalone", "--nproc-per-node=2"]
    if machines == 2:  # what each of them would run
        how = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}"]
    script = [str(ROOT / "Test.py"), *TOGETHER, "--out", str(tmp_path)]
    command = [sys.executable, "-m", "torch.distributed.run", *how, "--max-restarts=1", *script]
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
                if "seed 0, epoch 1/2" in line and not killed:
                    os.kill(workers(agents[-1].pid)[-1], signal.SIGKILL)
                    killed = True
        assert [agent.wait() for agent in agents] == [0] * machines, printed
    finally:
        for agent in agents:
            agent.kill()
    assert "".join(printed).count("epoch 1/2") == 1
    for mine, whole in zip(results(tmp_path), results(together), strict=True):
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


def test_what_the_first_process_refuses_is_said_once(tmp_path):
    options = ("--dataset", "imagefolder", "--data-dir", "/nowhere", "--device", "cpu", "--out", str(tmp_path / "out"))
    processes = started_together(tmp_path, *options)
    for process in processes:
        process.join()
    assert all(process.exitcode for process in processes)
    said = "".join((tmp_path / name).read_text() for name in "01")
    assert len([line for line in said.splitlines() if "/nowhere/train" in line]) == 1
    assert "Traceback" not in (tmp_path / "0").read_text()


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("options", "restarts", "part"),
    [
        (["--parallel", "2"], "0", "no --parallel"),
        (["--profile"], "0", "no --profile"),
        ([], "1", "name the folder with --out"),
        (["--models", "nothing"], "0", "'nothing'"),
        (["--device", "cuda"], "0", "2 processes on this machine, which has 1 GPUs"),
    ],
    ids=str,
)
def test_what_torchrun_cannot_do_is_said_by_one_process(rank, options, restarts, part, monkeypatch, capsys):
    started = {"TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_MAX_RESTARTS": restarts, "WORLD_SIZE": "2", "RANK": rank}
    for name, value in {**started, "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit) as end:
        Test.parse(options)
    assert end.value.code == 2
    assert (part in capsys.readouterr().err) == (rank == "0")
