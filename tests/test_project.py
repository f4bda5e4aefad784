import json
import os
import re
import shlex
import subprocess
import sys
import warnings

import pytest
from packaging.requirements import Requirement
from script import ROOT, run, torchrun
from torchvision.datasets import CIFAR10

import Test
from comparison.sources import load_cifar


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
        program, *rest = shlex.split(command)
        assert program in ("python", "torchrun")
        script, *options = rest if program == "python" else rest[rest.index("Test.py") :]
        if program == "torchrun" and "synthetic" in options:
            command = torchrun(*options, "--limit", "400", "--out", str(tmp_path / str(i)))
            assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
            continue
        if script == "Test.py" and "synthetic" not in options and "--help" not in options:
            Test.parse([*options, "--out", str(tmp_path / "parsed")])
            continue
        if script == "Test.py" and "--out" not in options and "--help" not in options:
            options += ["--out", str(tmp_path / str(i))]
        done = subprocess.run([sys.executable, ROOT / script, *options], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.parametrize("block", readme_blocks("python"), ids=lambda block: re.sub(r"\W+", " ", block)[:60])
def test_readme_code_runs(block, tmp_path, monkeypatch):
    for name in ("transformers", "timm", "hyper_connections", "onnxruntime"):
        if name in block:
            pytest.importorskip(name, reason=f"{name} is in the dependency group interop: pip install --group interop")
    monkeypatch.chdir(tmp_path)
    if "fully_shard" in block:  # in two processes
        pytest.importorskip("torch", "2.6")
        leave = "torch.distributed.barrier()\ntorch.distributed.destroy_process_group()\n"
        (tmp_path / "train.py").write_text(block + leave)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries about themselves
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.download
def test_one_short_run_on_the_real_data(tmp_path):
    options = ["--models", "residual", "--epochs", "1", "--limit", "10000", "--data-dir", str(tmp_path / "data")]
    done = run(*options, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (one,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert one["test_accuracy"] > 0.25
    assert "CIFAR-10, 10,000 training images" in done.stdout
    # What it left for the next time, checked against its SHA-256
    data = load_cifar(CIFAR10, tmp_path / "data")
    assert data.train_labels.bincount().tolist() == [5000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
