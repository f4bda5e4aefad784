import contextlib
import io
import os
import sys
from functools import partial

import pytest
import rich
from rich.console import Console
from script import POSIX, start

import Test
from comparison import console
from comparison.console import print_table
from comparison.report import table
from comparison.study import Study


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


def set_encoding(name: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=name)


@pytest.mark.slow
@POSIX
@pytest.mark.parametrize(("encoding", "options"), [("ascii", "--help"), ("cp1252", "--draw")])
def test_output_fits_its_encoding(encoding, options, finished, tmp_path):
    out = [str(finished[1])] * (options == "--draw")
    process = start(options, *out, output=tmp_path / "said", before=partial(set_encoding, encoding))
    process.join()
    said = (tmp_path / "said").read_text(encoding)
    assert process.exitcode == 0, said
    assert ("±" if encoding == "cp1252" else "?") in said


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
        bar = console.progress()
        assert bar.disable == (not expected)
        with bar:
            pass
        assert ("\x1b" in capsys.readouterr().out) == expected
    finally:
        monkeypatch.undo()
        console.set_up_output(quiet=False)


def test_an_output_that_nobody_reads_any_more_ends_the_script(finished, monkeypatch, capsys):
    """As after `python Test.py --draw runs/study | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, contextlib.suppress(BrokenPipeError), open(writer, "w") as closed:
        patch.setattr(sys, "stdout", closed)
        assert Test.main(["--draw", str(finished[1])]) == 1
    assert capsys.readouterr().err == "Nobody reads the output any more.\n"
