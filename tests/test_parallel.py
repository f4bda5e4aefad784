import os
import re
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from script import POSIX, STUDY, SYNTHETIC, forkserver, numbers, plain_script, results, start, wait_for

import Test
from comparison.console import UserError
from comparison.parallel import PARENT, helpers
from comparison.pictures import draw
from comparison.study import Study

pytestmark = pytest.mark.slow  # they start many processes

LONG = (*STUDY, "--epochs", "5")


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("long")
    with plain_script():
        assert Test.main([*LONG, "--out", str(out)]) == 0
    return numbers(out)


def progress(out: Path, seed: int) -> dict:
    return Study(out, {}).progress(seed)


def hold(out: Path, seed: int, other: int) -> None:
    """Lets this process wait, after the first epoch of a seed, until another one has tested the other seed."""
    report, held = Study.report, []

    def holding(study: Study, mine: int, word: dict) -> None:
        report(study, mine, word)
        if mine == seed and word["tested"] == 1 and not held:
            held.append(True)
            wait_for(lambda: progress(out, other).get("tested"))

    Study.report = holding


def test_processes_that_share_a_study_give_the_numbers_of_one(long, tmp_path):
    options = (*LONG, "--parallel", "2", "--out", str(tmp_path / "out"))
    process = start(*options, output=tmp_path / "said", before=partial(hold, tmp_path / "out", 0, 1))
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 0, said
    assert "A process of --parallel" not in said
    assert numbers(tmp_path / "out") == long
    seen = set(re.findall(r"^\[\d/2\] seed (\d), epoch ", said, flags=re.MULTILINE))
    assert seen == {"0", "1"}  # of the other process too
    assert not (tmp_path / "out" / "checkpoints").exists()


@POSIX
def test_the_same_command_started_twice_shares_the_work(long, tmp_path):
    each_has_one = partial(hold, tmp_path, 0, 1)
    options = (*LONG, "--out", str(tmp_path))
    processes = [start(*options, output=tmp_path / name, before=each_has_one) for name in ("first", "second")]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert numbers(tmp_path) == long
    for name in ("first", "second"):
        text = (tmp_path / name).read_text()
        assert re.search(r"^\| rw\+lr\+pa@4/2 ", text, flags=re.MULTILINE)  # both end with the whole table
        assert "of 2 seeds" not in text.rpartition("| model")[2]


@POSIX
def test_another_process_resumes_the_seed_of_one_that_was_killed(long, tmp_path):
    never = partial(hold, tmp_path, 0, 99)
    first = start(*LONG, "--out", str(tmp_path), output=tmp_path / "first", before=never)
    wait_for(lambda: progress(tmp_path, 0).get("tested"))
    second = start(*LONG, "--out", str(tmp_path), output=tmp_path / "second")
    wait_for(lambda: progress(tmp_path, 1).get("tested"))
    first.kill()
    first.join()
    assert progress(tmp_path, 0)["tested"] == 1
    second.join()
    assert second.exitcode == 0
    assert numbers(tmp_path) == long
    text = (tmp_path / "second").read_text()
    after = text.rpartition("seed 1, epoch 5/5")[2]
    assert "seed 0, epoch 5/5" in after
    assert "seed 0, epoch 1/5" not in after  # from its checkpoint


def helpers_of(parent: int) -> list[int]:
    """The further processes of one with --parallel."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found += [int(path.name)] * (b"Test.py" in (path / "cmdline").read_bytes())
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("victim", ["parent", "helper"])
def test_killed_processes_take_nothing_with_them(victim, long, tmp_path):
    out = tmp_path / "out"
    options = (*LONG, "--parallel", "2", "--out", str(out))
    process = start(*options, output=tmp_path / "said", before=partial(hold, out, 0, 1))
    wait_for(lambda: progress(out, 1).get("tested"))
    helpers = helpers_of(process.pid)
    assert len(helpers) == 1
    os.kill(process.pid if victim == "parent" else helpers[0], signal.SIGKILL)
    process.join()
    if victim == "helper":
        said = (tmp_path / "said").read_text()
        assert process.exitcode == 0, said  # it did the other's work
        assert "SIGKILL" in said
        assert "Traceback" not in said
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in helpers))
    assert Test.main([*LONG, "--out", str(out)]) == 0
    assert numbers(out) == long


def lead_a_group() -> None:
    """Makes this process the first of a group of its own, which obeys Ctrl-C as one that a shell starts, and draws."""
    Test.draw = draw
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)


@POSIX
def test_interrupting_keeps_what_has_finished(tmp_path):
    out = tmp_path / "out"
    options = ("--models", "residual", "rw", "--seeds", "500", "--parallel", "2", "--out", str(out))
    process = start(*SYNTHETIC, *options, output=tmp_path / "said", before=lead_a_group)
    try:
        wait_for(lambda: (out / "results.json").exists() and len(results(out)) >= 4)
        helpers = helpers_of(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        process.join(300)
    finally:
        process.kill()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 130, said
    runs = results(out)
    assert f"{len(runs)} runs have finished" in said
    assert "Traceback" not in said
    assert f"| {runs[0]['model']} " in said
    assert "[" in said.rpartition("| rw ")[2]  # an interval
    assert {"accuracy.png", "results.csv", "results.json"} <= {path.name for path in out.iterdir()}
    assert not any(Path(f"/proc/{pid}").exists() for pid in helpers)


def test_a_helper_has_the_options_of_the_process_that_starts_it(data, tmp_path, monkeypatch):
    """The number of workers too, among which --parallel divides the cores; and it starts no helpers itself."""
    options = ["--dataset", "imagefolder", "--parallel", "2", "--seeds", "4", "--out", str(tmp_path)]
    started = []

    def start_nothing(command, **_):
        started.append(vars(Test.parse(command[2:])))
        train_nothing()

    def train_nothing(*_, **__):
        raise UserError("This test trains nothing")

    monkeypatch.setattr("comparison.parallel.subprocess", SimpleNamespace(Popen=start_nothing, DEVNULL=None))
    monkeypatch.setattr(Test, "train_seed", train_nothing)
    monkeypatch.setattr(Test, "load_data", lambda options: data)
    monkeypatch.setattr(Test, "cores", lambda: 8)
    mine = vars(Test.parse(options))
    assert Test.main(options) == 2
    assert started == [mine]
    assert mine["workers"] == 4
    monkeypatch.setenv(PARENT, str(os.getppid()))
    assert Test.main(options) == 2
    assert len(started) == 1


def test_what_a_helper_says_is_printed_at_the_end(tmp_path, monkeypatch, capsys):
    """That a checkpoint was damaged, for one, though all went well."""
    (tmp_path / "Test.py").write_text(
        "import pathlib, sys; print('set aside', file=sys.stderr, flush=True); pathlib.Path(sys.argv[1]).touch()"
    )
    monkeypatch.setattr("comparison.parallel.ROOT", tmp_path)
    with helpers(1, [str(tmp_path / "said")]):
        wait_for((tmp_path / "said").exists)
    assert capsys.readouterr().err == "set aside\n"


def look_for_scipy() -> None:
    sys.exit("scipy.stats" not in sys.modules)


@POSIX
def test_what_the_table_needs_is_imported_before_any_work():
    """After Ctrl-C amid its import the table of what has finished would be lost."""
    process = forkserver().Process(target=look_for_scipy)  # which has imported the script and done nothing
    process.start()
    process.join()
    assert process.exitcode == 0


def test_models_that_are_added_wait_for_what_was_begun(tmp_path, monkeypatch):
    """A seed goes on with the models that it was started with, and then with the others."""
    report = Study.report

    def stop(study, seed, progress):
        report(study, seed, progress)
        if progress["tested"] == 2:
            raise KeyboardInterrupt

    options = [*STUDY, "--seeds", "1", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(Study, "report", stop)
        assert Test.main(options) == 130
    assert results(tmp_path) == []
    assert Test.main([*options, "--models", "rw", "residual"]) == 0
    runs = {run["model"]: run for run in results(tmp_path)}
    assert list(runs) == ["residual", "rw+lr+pa@4/2", "rw"]
    assert runs["rw+lr+pa@4/2"]["step_ratio"] > 0
    assert runs["rw"]["step_ratio"] is None
