"""Several runs side by side, each in a process of its own."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial

import torch

from comparison.console import UserError


def run_all(
    train: Callable[..., dict], runs: dict[int, tuple], report: Callable[..., None], processes: int, threads: int
) -> Iterator[dict]:
    """Yields train(*runs[i], report=…) for each i, as they finish.

    Args:
        train: a function that can be pickled.
        report: called with i and the arguments of each report.
        processes: how many run at a time; a single one is this process.
        threads: CPU threads of each process.
    """
    if processes == 1:
        for i, run in runs.items():
            yield train(*run, report=partial(report, i))
        return
    context = multiprocessing.get_context("spawn")
    reports = context.SimpleQueue()

    def listen() -> None:
        while True:
            message = reports.get()
            with suppress(OSError):  # where nobody reads the output any more, the processes must not wait for that
                report(*message)

    threading.Thread(target=listen, daemon=True).start()
    start = {"initializer": start_worker, "initargs": (threads, reports)}
    with ProcessPoolExecutor(max(1, min(processes, len(runs))), mp_context=context, **start) as pool:
        try:
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is this process's: the others inherit that
            try:
                futures = [pool.submit(work, i, train, run) for i, run in runs.items()]
            finally:
                signal.signal(signal.SIGINT, handler)
            for future in as_completed(futures):
                yield future.result()
        except BaseException as error:  # the pool would wait for what it has begun
            for process in multiprocessing.active_children():
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    "a training process was killed, perhaps for lack of memory. Try --parallel below "
                    f"{processes} with --threads {threads}",
                    code=1,
                ) from None
            raise


def start_worker(threads: int, reports: "multiprocessing.SimpleQueue") -> None:
    global worker_reports
    worker_reports = reports
    torch.set_num_threads(threads)

    def die_with_parent() -> None:  # a pool's processes outlive a parent that was killed (CPython issue 111873)
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()


def work(i: int, train: Callable[..., dict], run: tuple) -> dict:
    """Trains in a process of the pool, and reports once a second and once an epoch."""
    sent = {"epochs": -1, "at": 0.0}

    def report(part: float, images: int, seconds: float, history: list[dict]) -> None:
        if len(history) > sent["epochs"] or time.monotonic() > sent["at"] + 1:
            sent.update(epochs=len(history), at=time.monotonic())
            worker_reports.put((i, part, images, seconds, history))

    return train(*run, report=report)
