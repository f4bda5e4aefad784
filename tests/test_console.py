import re
import time

from comparison.console import Monitor


def test_plain_lines_where_the_output_is_no_terminal(finished):
    lines = [line for line in finished[0].stdout.splitlines() if line.startswith("[")]
    assert len(lines) == 6
    assert re.fullmatch(
        r"\[2/6\] rw, seed 0, epoch 1/1, loss \d+\.\d+, accuracy \d+\.\d+ %, \d+ images/s, \d+:\d\d min left", lines[1]
    )
    assert "0:00 min left" in lines[-1]
    assert "\x1b" not in finished[0].stdout


def test_what_is_left_is_told_when_something_has_been_done(capsys, monkeypatch):
    history, clock = [{"train_loss": 1.0, "test_accuracy": 0.5}], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    for first, expected in ((0.5, None), (0.0, "1:00 min left")):  # the part of the run that its first report has done
        clock[0] = 0.0
        monitor = Monitor(["residual, seed 0"], [False], 2)
        clock[0] = 59.7
        monitor.report(0, first, 100, 1.0, history[:0])
        monitor.report(0, 0.5, 100, 1.0, history)
        printed = capsys.readouterr().out
        assert (expected in printed) if expected else ("left" not in printed)
