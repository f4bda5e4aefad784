import contextlib
import io
import os
import re
import subprocess
import sys

import pytest
import rich
from rich.console import Console
from script import POSIX, ROOT, SYNTHETIC

import Test
from comparison import console
from comparison.console import Monitor, print_table
from comparison.report import table
from comparison.study import Study

EPOCH = {"train_loss": 1.0, "test_accuracy": 0.5}


def test_plain_lines_where_the_output_is_no_terminal(finished):
    lines = [line for line in finished[0].stdout.splitlines() if line.startswith("[")]
    assert len(lines) == 6
    assert re.fullmatch(
        r"\[2/6\] rw, seed 0, epoch 1/1, loss \d+\.\d+, accuracy \d+\.\d+ %, \d+ images/s, \d+:\d\d min left", lines[1]
    )
    assert "0:00 min left" in lines[-1]
    assert "\x1b" not in finished[0].stdout


def test_the_time_left_is_that_of_what_this_process_has_done(capsys):
    """What a resumed run had done before says nothing of the speed."""
    for resumed, expected in ((False, "1:00 min left"), (True, "0:50 min left")):
        monitor, clock = Monitor(["residual, seed 0"], [False], 4), [0.0]
        monitor.bar.get_time = lambda clock=clock: clock[0]
        reports = [(0, 0.25, 1), (10, 0.3, 1), (30, 0.5, 2)] if resumed else [(0, 0.25, 0), (30, 0.5, 1)]
        for clock[0], work, epochs in reports:
            monitor.report(0, work, 100, 1.0, [EPOCH] * epochs)
        assert expected in capsys.readouterr().out


def shown(width: int, **content) -> str:
    before = rich.get_console()
    rich._console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    try:
        with contextlib.redirect_stdout(rich.get_console().file):
            print_table(**content)
        return rich.get_console().file.getvalue()
    finally:
        rich._console = before


@pytest.mark.parametrize("width", [40, 80, 100, 120, 220])
def test_no_number_of_a_table_is_cut(width, finished):
    content = table(Study.read(finished[1]).config, Study.read(finished[1]).in_order())
    text = shown(width, **content)
    assert "…" not in text
    for row in content["rows"]:
        for cell in row:
            assert cell in text
    if width >= 80:
        assert max(map(len, text.splitlines()[1:-1])) <= width


def test_names_are_shown_as_they_are():
    content = {"title": "photos[small]", "columns": ["model", "a"], "rows": [["[b]", ":smile:"]], "notes": "[/]"}
    assert all(part in shown(80, **content) for part in ("photos[small]", "[b]", ":smile:", "[/]"))


@pytest.mark.slow
@pytest.mark.parametrize(("encoding", "options"), [("ascii", "--help"), ("cp1252", "--draw")])
def test_output_fits_its_encoding(encoding, options, finished):
    command = [sys.executable, ROOT / "Test.py", options, *[str(finished[1])] * (options == "--draw")]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, env=environment, encoding=encoding)
    assert done.returncode == 0, done.stderr
    assert "?" not in done.stdout
    assert options == "--help" or "±" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "cp932", "cp1251", "cp1252", "utf-8"])
def test_every_text_of_the_script_has_a_spelling(encoding, finished):
    content = table(Study.read(finished[1]).config, Study.read(finished[1]).in_order())
    for text in (Test.EXAMPLES, shown(300, **content), "α β γ ± – × …"):
        assert b"?" not in text.encode(encoding, errors="spell")


def in_terminal(*options: str, **environment: str) -> str:
    """What a terminal of 80 columns gets."""
    pty = pytest.importorskip("pty")
    main, end = pty.openpty()
    command = [sys.executable, ROOT / "Test.py", *options]
    variables = {**os.environ, "COLUMNS": "80", "TERM": "xterm", **environment}
    process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, env=variables)
    os.close(end)
    text = b""
    try:
        while part := os.read(main, 4096):
            text += part
    except OSError:  # Linux's way to say that the other end is closed
        pass
    assert process.wait() == 0, text
    return text.decode()


@pytest.mark.slow
@POSIX
def test_a_terminal_has_a_live_line_of_which_nothing_is_cut(tmp_path):
    live = in_terminal(*SYNTHETIC, "--models", "residual", "--out", str(tmp_path))
    assert "\x1b[2K" in live
    assert "images/s" in live
    assert "…" not in live


@pytest.mark.parametrize(
    ("tty", "variables", "expected"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "dumb"}, False),
        (False, {"TERM": "xterm", "FORCE_COLOR": "1"}, False),
        (True, {"TERM": "dumb", "FORCE_COLOR": "1"}, False),
    ],
    ids=str,
)
def test_only_a_terminal_that_can_show_it_gets_a_live_line(tty, variables, expected, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: tty, raising=False)
    console.set_up_output(quiet=False)
    try:
        assert Monitor([""], [False], 1).bar.disable == (not expected)
        monitor = Monitor(["residual"], [False], 1)
        monitor.report(0, 0.5, 1, 1.0, [])
        monitor.report(0, 1.0, 1, 1.0, [EPOCH])
        printed = capsys.readouterr().out
        assert ("epoch 1/1, loss" in printed) == (not expected)
        assert "\x1b" not in printed
    finally:
        monkeypatch.undo()
        console.set_up_output(quiet=False)


def test_what_an_encoding_lacks_is_spelled():
    assert "α ± 0.1 – β × γ … é".encode("ascii", errors="spell") == b"alpha +/- 0.1 - beta x gamma ... ?"
    assert console.UserError("message").code == 2
