"""What the user hears and sees while the script runs."""

import time

import rich
import rich.box
from rich import get_console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn


class DataError(Exception):
    """The data could not be had or read; the message says why."""


class RefusedError(Exception):
    """The study can't begin; the message says why."""


class RunError(Exception):
    """The study can't go on; the message says why and what to try."""


def progress(*columns: ProgressColumn) -> Progress:
    """A bar that leaves no trace, and is not there at all where the output is no terminal."""
    hidden = not get_console().is_terminal
    return Progress(*Progress.get_default_columns(), *columns, transient=True, disable=hidden)


class Monitor:
    """What runs now and how long it will take: one moving line in a terminal, a line an epoch elsewhere."""

    def __init__(self, titles: list[str], finished: list[bool], epochs: int) -> None:
        self.titles, self.epochs = titles, epochs
        self.done: list[float | None] = [1.0 if there else None for there in finished]  # the part of each run
        self.tested = [0] * len(titles)  # its epochs
        self.before = float(sum(finished))  # what was done before this process
        self.plain = not rich.get_console().is_terminal
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(20), transient=True, disable=self.plain)
        self.task = self.bar.add_task("", total=len(titles))
        self.start = time.perf_counter()

    def report(self, run: int, work: float, images: int, seconds: float, history: list[dict]) -> None:
        if self.done[run] is None:
            self.before += work
            self.tested[run] = len(history)
        self.done[run] = work
        done = sum(filter(None, self.done))
        epoch_ended, self.tested[run] = len(history) > self.tested[run], len(history)
        epoch = len(history) + (0 if epoch_ended else 1)
        text = f"[{run + 1}/{len(self.titles)}] {self.titles[run]}, epoch {epoch}/{self.epochs}"
        if history:
            loss = history[-1]["train_loss"]
            text += ", diverged" if loss is None else f", loss {loss:.3f}"
            text += f", accuracy {100 * history[-1]['test_accuracy']:.2f} %"
        text += f", {images / seconds:.0f} images/s"
        if done > self.before:
            left = round((time.perf_counter() - self.start) * (len(self.done) - done) / (done - self.before))
            text += f", {left // 60}:{left % 60:02} min left"
        self.bar.update(self.task, completed=done, description=text)
        if self.plain and epoch_ended:
            print(text, flush=True)
