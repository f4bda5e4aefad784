from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier, Event

import pytest
import torch
from script import forkserver, made_up

from comparison.device import Stopwatch, cores
from comparison.models import Model
from comparison.networks import SmallCNN
from TrainUtil import Recipe, train


def test_steps_on_a_gpu_are_timed_by_events_and_wait_for_nothing(monkeypatch):
    """With a GPU whose clock is a number: it gets an event before and after each step, and is waited for at the end."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")
            self.at = 250.0 * len(calls)  # milliseconds

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(2):
        with watch:
            calls.append("step")
    assert watch.seconds() == [0.5, 0.5]
    assert calls == ["record", "step", "record"] * 2 + ["wait"]


def take_a_core(on: Event, ready: Barrier) -> None:
    torch.set_num_threads(1)
    matrix = torch.randn(512, 512)
    ready.wait()
    while True:
        on.wait()
        torch.mm(matrix, matrix)


@contextmanager
def other_work() -> Iterator[Event]:
    """A process a core, that work while the event is set."""
    context = forkserver()
    on, ready = context.Event(), context.Barrier(1 + cores())
    processes = [context.Process(target=take_a_core, args=(on, ready), daemon=True) for _ in range(cores())]
    for process in processes:
        process.start()
    ready.wait()
    try:
        yield on
    finally:
        for process in processes:
            process.kill()


def step_ratios(on: Event, loaded: bool) -> dict[str, dict]:
    data = made_up().hold_out(100).limit(1500)
    models = {
        name: SmallCNN(Model.parse(name.partition(" ")[0]), 0, data) for name in ("residual", "residual again", "rw")
    }

    def report(work: float, *_: object) -> None:
        on.set() if loaded and 0.25 < work < 0.75 else on.clear()

    return train(models, data, Recipe(epochs=2, batch_size=50, sizes=((16, 1.0),)), 0, report=report)


@pytest.mark.slow
def test_ratios_of_steps_do_not_depend_on_other_work():
    """That takes all cores for half of the run."""
    with other_work() as on:
        quiet, loaded = (step_ratios(on, loaded) for loaded in (False, True))
    assert loaded["residual again"]["step_ratio"] == pytest.approx(1, abs=0.03)
    assert loaded["rw"]["step_ratio"] == pytest.approx(quiet["rw"]["step_ratio"], rel=0.05)
