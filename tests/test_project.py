import json
import math
import re
import runpy
import shlex
import statistics
import warnings
from dataclasses import asdict

import pytest
from packaging.requirements import Requirement
from script import ROOT, results, run, together
from torchvision.datasets import CIFAR10

import Test
import TrainUtil
from comparison.device import cores
from comparison.models import Model
from comparison.networks import ARCHS
from comparison.profile import profile_table
from comparison.report import table
from comparison.sources import load_cifar
from comparison.study import Study


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


def test_every_file_can_be_read_in_one_sitting():
    for folder in (".", "comparison", "tests", "results/airbench94"):
        for path in (ROOT / folder).glob("*.py"):
            assert len(path.read_text().splitlines()) <= 450, path
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted(ROOT.glob("results/*.md")), *sorted(ROOT.glob("docs/*.md"))]
}
EXTERNAL = ("transformers", "timm", "hyper_connections", "onnxruntime", "torch.distributed", "torch.ao", "compile(")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The lines that start Test.py, on all pages."""
    lines = [
        line.split("  #")[0].strip() for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()
    ]
    lines = [line.split("&&")[-1].strip().replace("uv run ", "python ", 1) for line in lines if "Test.py" in line]
    return list(dict.fromkeys(lines))


STORED = sorted(ROOT.glob("results/*/results.json"))


@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.parent.name)
def test_the_pages_have_the_rows_of_every_stored_study(stored):
    study = Study.read(stored.parent)
    rows = table(study.config, study.in_order())["rows"]
    if len(rows) == 1:  # stands in a table of several studies
        _, parameters, _, accuracy, *_, seconds = rows[0]
        rows = [[f"`{stored.parent.name}`", parameters, accuracy, seconds]]
    for row in rows:
        assert any(f"| {' | '.join(row)} |" in text for page, text in PAGES.items() if page.startswith("results/"))


def costs(name: str) -> list[list[str]]:
    return profile_table(**json.loads((ROOT / "results" / name / "profile.json").read_text()))["rows"]


@pytest.mark.parametrize("name", sorted(path.parent.name for path in ROOT.glob("results/*/profile.json")))
def test_the_pages_have_the_rows_of_every_stored_profile(name):
    for row in costs(name):
        assert f"| {' | '.join(row)} |" in PAGES["results/costs.md"]


@pytest.mark.parametrize(
    ("network", "name"),
    [("small CNN", "cnn"), ("ResNet-32", "resnet"), ("ResNet-56", "resnet56"), ("GPT", "gpt-12-long")],
)
def test_the_table_of_the_readme_has_their_rows(network, name):
    study = Study.read(ROOT / "results" / name)
    steps = {model: step.split()[0] for model, _, _, step, *_ in costs("profile-cnn")} | {"residual": "1.000"}
    rows = table(study.config, study.in_order())["rows"]
    for model, _, added, value, difference, _, verdict, *accuracy, ratio, _ in rows:
        alone = steps.get(re.sub("[:,]rate=.*", "", model))  # the study had ten processes on one GPU
        step = alone if name == "cnn" else ratio.split()[0]
        row = [network, model, added, value, difference, verdict, accuracy[0] if accuracy else "–", step]
        assert f"| {' | '.join(row)} |" in PAGES["README.md"]


@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.parent.name)
def test_the_networks_are_those_of_the_stored_results(stored, data):
    study = Study.read(stored.parent)
    for name, parameters in {one["model"]: one["parameters"] for one in study.runs.values()}.items():
        network = ARCHS[study.config["arch"]](Model.parse(name), 0, data.limit(100))
        assert sum(p.numel() for p in network.parameters()) == parameters, name


@pytest.mark.parametrize(
    ("name", "recipe"), [("default", TrainUtil.IMAGES), ("cnn", TrainUtil.IMAGES), ("gpt-12-long", TrainUtil.TEXT)]
)
def test_the_recipe_is_that_of_the_stored_results(name, recipe):
    assert Study.read(ROOT / "results" / name).config["recipe"] == json.loads(json.dumps(asdict(recipe)))


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    words = shlex.split(command)
    options = words[words.index("Test.py") + 1 :]
    if "--help" not in options:
        Test.parse(options)


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in commands() if "synthetic" in command])
def test_commands_that_download_nothing_run(command, tmp_path):
    """Without torchrun, which test_torchrun starts."""
    words = shlex.split(command)
    options = words[words.index("Test.py") + 1 :]
    less = ["--limit", "100", "--hold-out", "100", "--seeds", "1"]
    assert Test.main([*options, *less, "--out", str(tmp_path / "out")]) == 0


def code() -> list:
    """The Python of all pages; what needs other libraries, processes or a compiler is slow."""
    found = [(page, block) for page in PAGES for block in blocks(page, "python")]
    return [
        pytest.param(page, block, id=f"{page} {i}", marks=[pytest.mark.slow] * any(name in block for name in EXTERNAL))
        for i, (page, block) in enumerate(found)
    ]


@pytest.mark.parametrize(("page", "block"), code())
def test_code_of_the_pages_runs(page, block, tmp_path, monkeypatch, capsys):
    for name in ("transformers", "timm", "hyper_connections", "onnxruntime"):
        if name in block:
            pytest.importorskip(name, reason=f"{name} is in the dependency group interop: pip install --group interop")
    monkeypatch.chdir(ROOT if "results/" in block else tmp_path)
    if "fully_shard" in block:  # in two processes
        pytest.importorskip("torch", "2.6")
        end = "torch.distributed.barrier()\nimport comparison.distributed\ncomparison.distributed.leave(0)\n"
        together(exec, block + end, {})
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries about themselves
        exec(compile(block, page, "exec"), {})
    assert "False" not in capsys.readouterr().out.split()  # of torch.equal and torch.allclose


@pytest.mark.slow
def test_the_script_beside_the_results_runs(tmp_path, monkeypatch, data):
    monkeypatch.syspath_prepend(ROOT)
    main = runpy.run_path(str(ROOT / "results" / "airbench94" / "race.py"))["main"]
    contestants = ["small:1", "small:2", "airbench:1", "airbench:2"]
    for seeds in ("1", "1-1"):  # the second is added to the first
        main(["--seeds", seeds, "--out", str(tmp_path), *contestants], data.limit(150).hold_out(50))
    with pytest.raises(SystemExit, match="another race"):
        main(["--out", str(tmp_path), *contestants[:2]], data)
    runs = json.loads((tmp_path / "race.json").read_text())["runs"]
    assert sorted(run["seed"] for run in runs) == [0] * 4 + [1] * 4
    finished = [f"{run['network']}:{run['epochs']}" for run in runs if run["seed"] == 0]
    assert finished == ["small:1", "airbench:1", "small:2", "airbench:2"]
    assert all(run["test_loss"] > 0 and run["train_seconds"] > 0 for run in runs)
    assert (tmp_path / "race.png").exists()


def printed(capsys) -> list[list[str]]:
    """The cells of the tables that have been printed."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_differences_by_epoch_are_those_of_the_runs_and_end_as_the_table(capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    runpy.run_path(str(ROOT / "results" / "epochs.py"))["main"](str(ROOT / "results" / "gpt-12-long"))
    rows = printed(capsys)
    study = Study.read(ROOT / "results" / "gpt-12-long")
    assert {row[0]: row[5:] for row in rows if row[1] == "3"} == {
        row[0]: row[4:7] for row in table(study.config, study.in_order())["rows"][1:]
    }
    first = {key: run["history"][0]["train_loss"] / math.log(2) for key, run in study.runs.items()}
    mean = statistics.mean(first["rw", seed] - first["residual", seed] for seed in study.config["seeds"])
    assert next(row[2] for row in rows if row[:2] == ["rw", "1"]).startswith(f"{mean:+.4f} [")


def test_at_equal_time_counts_what_a_model_gains_beyond_more_steps(tmp_path, monkeypatch, capsys):
    """rw becomes the plain residual of four epochs, which takes 4/3 of the time of three; lr takes no more time."""
    monkeypatch.syspath_prepend(ROOT)
    study = json.loads((ROOT / "results" / "default" / "results.json").read_text())
    plain = [one for one in study["runs"] if one["model"] == "residual"]
    longer = [{**one, "test_loss": 0.9 * one["test_loss"], "test_accuracy": 0.9} for one in plain]
    rw = [{**one, "model": "rw", "step_ratio": 4 / 3} for one in longer]
    lr = [{**one, "step_ratio": 1} for one in study["runs"] if one["model"] == "lr"]
    for name, epochs, runs in (("study", 3, [*plain, *rw, *lr]), ("longer", 4, longer)):
        (tmp_path / name).mkdir()
        content = {"config": {**study["config"], "epochs": epochs}, "runs": runs}
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    runpy.run_path(str(ROOT / "results" / "equal_time.py"))["main"](str(tmp_path / "study"), str(tmp_path / "longer"))
    *_, rw, lr = printed(capsys)
    assert rw[:2] == ["rw", "1.333"]
    assert float(rw[2].split()[0]) < -0.04
    assert float(rw[3].split()[0]) == float(rw[7].split()[0]) == 0
    assert lr[:2] == ["lr", "1.000"]
    assert lr[2] == lr[3]


@pytest.mark.parametrize(
    ("page", "study", "longer"),
    [("README", "resnet", "resnet-epochs-4"), ("gpt", "gpt-6-long", "gpt-6-epochs-4")],
)
def test_the_pages_have_the_rows_at_equal_time(page, study, longer, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    folders = (str(ROOT / "results" / name) for name in (study, longer))
    runpy.run_path(str(ROOT / "results" / "equal_time.py"))["main"](*folders)
    _, _, *rows = printed(capsys)
    assert rows
    for row in rows:
        assert f"| {' | '.join(row)} |" in PAGES[f"results/{page}.md"]


@pytest.mark.download
def test_one_short_run_on_the_real_data(tmp_path):
    options = ["--models", "residual", "--epochs", "1", "--seeds", "1", "--limit", "5000", "--batch-size", "250"]
    options += ["--hold-out", "1000", "--threads", str(cores())]
    options += ["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    done = run(*options)
    assert done.returncode == 0, done.stderr
    (one,) = results(tmp_path / "out")
    assert one["test_accuracy"] > 0.25
    assert "CIFAR-10, tested on 1000 held-out training images, 5,000 training images" in done.stdout
    # What it left for the next time, checked against its SHA-256
    data = load_cifar(CIFAR10, tmp_path / "data")
    assert data.train_labels.bincount().tolist() == [5000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
