import os
import re
import select
from pathlib import Path

import pytest
from script import CONFIG, POSIX, SYNTHETIC, runs_of, start

from comparison.monitor import Monitor
from comparison.study import Study

EPOCH = {"train_loss": 1.0, "test_loss": 0.75, "test_accuracy": 0.5}
DIVERGED = {"train_loss": None, "test_loss": None, "test_accuracy": 0.1}


@pytest.fixture
def study(tmp_path) -> Study:
    study = Study(tmp_path, {**CONFIG, "seeds": [0, 1], "models": ["residual", "rw"]})
    study.write()
    for seed in (0, 1):
        study.folder(seed).mkdir(parents=True)
    return study


def test_plain_lines_where_the_output_is_no_terminal(finished):
    lines = [line for line in finished[0].splitlines() if line.startswith("[")]
    assert len(lines) == 2
    one = r"\d+\.\d{3} \d+\.\d\d %"
    models = rf"residual {one}, rw {one}, rw\+lr\+pa@4/2 {one}"
    assert re.fullmatch(rf"\[1/2\] seed 0, epoch 1/1: {models}; \d+ images/s, \d+:\d\d min left", lines[0])
    assert "0:00 min left" in lines[-1]
    assert "\x1b" not in finished[0]


def test_the_time_left_is_that_of_what_was_done_since(study, capsys, monkeypatch):
    """What a resumed seed had done before says nothing of the speed."""
    for seed, resumed, expected in ((0, False, "1:00 min left"), (1, True, "0:50 min left")):
        monitor, clock = Monitor(study, [seed], ["residual"], 4, "images"), [0.0]
        monitor.bar.get_time = lambda clock=clock: clock[0]
        monkeypatch.setattr("comparison.monitor.time.monotonic", monitor.bar.get_time)
        reports = [(0, 0.25, 1), (10, 0.3, 1), (30, 0.5, 2)] if resumed else [(0, 0.25, 0), (30, 0.5, 1)]
        for clock[0], work, epochs in reports:
            monitor.report(seed, work, 100.0, {"residual": [EPOCH] * epochs})
        assert expected in capsys.readouterr().out


def test_what_another_process_reports_is_shown_too(study, capsys):
    here, there = (Monitor(study, [0, 1], ["residual", "rw"], 4, "images") for _ in range(2))
    here.report(0, 0.1, 100.0, {"residual": [], "rw": []})
    there.report(1, 0.1, 100.0, {"residual": [], "rw": []})
    here.refresh()
    there.report(1, 0.25, 100.0, {"residual": [EPOCH], "rw": [DIVERGED]})
    capsys.readouterr()
    here.refresh()
    assert "[2/2] seed 1, epoch 1/4: residual 0.750 50.00 %, rw diverged; 100 images/s" in capsys.readouterr().out
    assert here.bar.tasks[0].completed == pytest.approx(0.35)
    here.refresh()
    assert capsys.readouterr().out == ""  # once
    runs = runs_of({"residual": [0.5, 0.5], "rw": [0.5, 0.5]}, learned={}, history=[])
    Study.read(study.out).add(1, [run for run in runs if run["seed"] == 1])
    here.refresh()
    assert here.bar.tasks[0].completed == pytest.approx(1.1)


def test_a_seed_is_reported_once_a_second_and_after_each_epoch(study, monkeypatch):
    reports, clock = [], [0.0]
    monkeypatch.setattr(Study, "report", lambda self, seed, progress: reports.append((clock[0], progress["tested"])))
    monkeypatch.setattr("comparison.monitor.time.monotonic", lambda: clock[0])
    monitor = Monitor(study, [0], ["residual"], 4, "images")
    for clock[0], epochs in ((0.0, 0), (0.5, 0), (0.9, 1), (1.5, 1), (2.0, 1)):
        monitor.report(0, 0.1, 100.0, {"residual": [EPOCH] * epochs})
    assert reports == [(0.0, 0), (0.9, 1), (2.0, 1)]


def take_eighty_columns() -> None:
    os.environ.update(COLUMNS="80", TERM="xterm")


@pytest.mark.slow
@POSIX
def test_a_terminal_has_a_live_line_of_which_nothing_is_cut(tmp_path):
    main, end = pytest.importorskip("pty").openpty()
    options = (*SYNTHETIC, "--models", "residual", "--out", str(tmp_path))
    process = start(*options, output=Path(os.ttyname(end)), before=take_eighty_columns)
    text = b""
    while process.is_alive() or select.select([main], [], [], 0)[0]:
        if select.select([main], [], [], 0.1)[0]:
            text += os.read(main, 4096)
    os.close(end)
    os.close(main)
    live = text.decode()
    assert process.exitcode == 0, live
    assert "\x1b[2K" in live
    assert "images/s" in live
    assert "…" not in live
