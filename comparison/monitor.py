"""How far a study is, and how long it will take."""

import time
from collections.abc import Iterable, Mapping

from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from comparison.console import progress, say
from comparison.study import Study


class Monitor:
    """Shows the progress of all processes of a study: a live line in a terminal, a line an epoch elsewhere."""

    def __init__(self, study: Study, seeds: Iterable[int], models: list[str], epochs: int, unit: str) -> None:
        """Takes what is counted in a second: images or bytes."""
        self.study, self.seeds, self.models, self.epochs, self.unit = study, list(seeds), models, epochs, unit
        self.seen: dict[int, int] = {}  # how many epochs of each seed have been shown
        self.reported, self.reported_at = None, 0.0  # seed and epoch of the last report, and its time
        text = TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold"))
        self.bar = progress(text, BarColumn(20), TimeRemainingColumn(), speed_estimate_period=600)
        self.task = self.bar.add_task("", total=len(self.seeds), completed=self.done({}))

    def done(self, training: Mapping[int, dict]) -> float:
        """How many seeds' work is done."""
        whole = sum(not self.study.lacking(seed, self.models) for seed in self.seeds)
        return whole + sum(each["work"] for each in training.values())

    def report(self, seed: int, work: float, speed: float, histories: Mapping[str, list[dict]]) -> None:
        """Writes the progress of a seed that this process trains: after each epoch, and at most once a second."""
        tested = max(map(len, histories.values()))
        if self.reported == (seed, tested) and time.monotonic() < self.reported_at + 1:
            return
        self.reported, self.reported_at = (seed, tested), time.monotonic()
        models = [f"{name} {state(history)}" for name, history in histories.items() if history]
        shown = f"{', '.join(models)}; " if models else ""
        text = f"{shown}{speed:.0f} {self.unit}/s"
        self.study.report(seed, {"models": list(histories), "work": work, "tested": tested, "text": text})
        self.refresh()

    def refresh(self) -> None:
        training = {seed: self.study.progress(seed) for seed in self.seeds}
        if any(not training[seed] and self.study.lacking(seed, self.models) for seed in self.seen):
            self.study.refresh()  # another process has finished a seed
        training = {seed: each for seed, each in training.items() if each and self.study.lacking(seed, self.models)}
        done, lines = self.done(training), {}
        for seed, each in training.items():
            if seed not in self.seen and each["tested"]:  # what was done before says nothing about the time left
                self.bar.reset(self.task, completed=done)
            new = each["tested"] > self.seen.setdefault(seed, each["tested"])
            epoch = each["tested"] + (0 if new and self.bar.disable else 1)
            place = f"[{self.seeds.index(seed) + 1}/{len(self.seeds)}] seed {seed}"
            lines[seed] = f"{place}, epoch {min(epoch, self.epochs)}/{self.epochs}: {each['text']}", new
            self.seen[seed] = each["tested"]
        self.bar.update(self.task, completed=done, description="\n".join(text for text, _ in lines.values()))
        left = self.bar.tasks[0].time_remaining
        for text, new in lines.values():
            if new and self.bar.disable:
                say(text if left is None else f"{text}, {int(left) // 60}:{int(left) % 60:02} min left")


def state(history: list[dict]) -> str:
    last = history[-1]
    if last["train_loss"] is None:
        return "diverged"
    accuracy = "" if last["test_accuracy"] is None else f" {100 * last['test_accuracy']:.2f} %"
    return f"{last['test_loss']:.3f}{accuracy}"
