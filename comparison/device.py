"""What depends on the device: memory, precision, compilation."""

import contextlib
import ctypes
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from comparison.console import UserError


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_memory() -> None:
    """Lets the process keep the memory that it frees, where the C library is glibc.

    glibc gives a large block back to the system at once, and each page of the next one costs a page fault: a fifth of
    a training step on a CPU, and much of what a residual connection seems to cost beside the plain one.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block apart from the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def cpu_capabilities() -> Mapping:
    """What torch knows of the CPU; nothing where torch is too old to tell."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        name = cpu_capabilities().get("cpu_name") or platform.processor() or "CPU"
        return f"{name}, {torch.get_num_threads()} threads"
    return device.type


def default_precision(device: torch.device) -> str:
    """Which of "bfloat16" and "float32" is the faster on the device."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        instructions = ("avx512_bf16", "amx_bf16", "bf16")
        fast = device.type == "cpu" and any(map(cpu_capabilities().get, instructions))
    return "bfloat16" if fast else "float32"


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no more memory, for which there are many exceptions."""
    texts = ("allocate memory", "not enough memory", "out of memory", "out of shared memory", "alloc_failed")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def compile_all(models: dict[str, nn.Module], accumulate: int = 1) -> dict[str, Callable]:
    """The models under torch.compile, on CUDA as CUDA graphs; it would give up on a class after eight versions.

    No graphs where gradients are accumulated: the next one reuses their memory (pytorch issue 169545).
    """
    torch.compiler.reset()
    torch._dynamo.config.cache_size_limit = 16 * len(models)
    cuda = any(p.is_cuda for model in models.values() for p in model.parameters())
    options = {"dynamic": False, "mode": "reduce-overhead" if cuda and accumulate == 1 else "default"}
    return {name: torch.compile(model, **options) for name, model in models.items()}


@contextlib.contextmanager
def compiler_errors() -> Iterator[None]:
    """Raises a UserError where torch.compile fails, for lack of a C++ compiler for one."""
    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        cause = error.inner_exception
        reason = f"{type(cause).__name__}: {cause}".partition("\n")[0]
        raise UserError(f"--compile does not work here: {reason}") from None


@contextlib.contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"out of memory: {advice}", code=1) from None


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def rotated(names: Iterable[str], round: int) -> list[str]:
    """The order of a round: A B C, B C A, …, so that a machine whose speed drifts slows all alike."""
    names = list(names)
    first = round % len(names)
    return names[first:] + names[:first]


class Stopwatch:
    """Seconds of what runs under it, each time apart.

    On a CPU by the clock, on CUDA by events, so that nothing waits for the device before `seconds` is called.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.laps = device, []

    def mark(self) -> float | torch.cuda.Event:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        synchronize(self.device)
        return time.perf_counter()

    def __enter__(self) -> None:
        self.begin = self.mark()

    def __exit__(self, *error: object) -> None:
        self.laps.append((self.begin, self.mark()))

    def seconds(self) -> list[float]:
        synchronize(self.device)
        cuda = self.device.type == "cuda"
        return [begin.elapsed_time(end) / 1000 if cuda else end - begin for begin, end in self.laps]
