"""What a residual connection costs: time, memory, floating-point operations."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from comparison.console import UserError
from comparison.device import Stopwatch, autocast, compile_all, rotated, synchronize
from comparison.folder import Data
from comparison.networks import cross_entropy


def made_up(data: Data, batch: int, image_size: int | None) -> Data:
    """As many of the made-up bytes or images as a batch has.

    Raises:
        UserError: there are not so many.
    """
    if batch > data.train_size:
        raise UserError(f"--profile has {data.train_size} {data.examples}, fewer than --batch-size {batch}")
    data = data.limit(batch)
    if image_size:
        images = F.interpolate(data.train_images.permute(0, 3, 1, 2).float(), image_size)
        data = replace(data, train_images=images.to(torch.uint8).permute(0, 2, 3, 1))
    return data


def measure(
    models: Mapping[str, nn.Module], data: Data, device: torch.device, precision: str, compile: bool, seconds: float
) -> list[dict]:
    """Returns an entry a model: parameters, FLOPs, bytes, and the seconds of every call in rounds of all models."""
    for model in models.values():
        model.train().to(device, memory_format=torch.channels_last)
    called = compile_all(models) if compile else models
    x, y = next(data.to(device).batches(seed=0, epoch=0, batch_size=data.train_size))

    def loss(model: nn.Module) -> Tensor:
        with autocast(device, precision):
            logits = model(x)
        return cross_entropy(logits, y)

    def step(model: nn.Module) -> None:
        loss(model).backward()
        model.zero_grad()  # or the gradients of all models would take memory at once

    @torch.inference_mode()
    def infer(model: nn.Module, x: Tensor) -> None:
        with autocast(device, precision):
            model(x)

    costs = [
        {
            "model": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "flops": flops(partial(step, model)),
            "saved_bytes": saved_bytes(model, partial(loss, called[name])),
            "peak_bytes": peak_bytes(model, partial(step, called[name]), device),
        }
        for name, model in models.items()
    ]
    steps = {name: partial(step, model) for name, model in called.items()}
    times = {"step_seconds": interleave(steps, seconds, device)}
    for model in models.values():
        model.eval()
    for name, inputs in (("inference_1_seconds", x[:1]), ("inference_seconds", x)):
        calls = {model: partial(infer, called[model], inputs) for model in called}
        times[name] = interleave(calls, seconds / 4, device)
    return [{**entry, **{name: each[entry["model"]] for name, each in times.items()}} for entry in costs]


def profile_table(config: dict, costs: list[dict]) -> dict:
    """The arguments of console.print_table."""
    base = costs[0]
    how = f"{config['precision']}, compiled" if config["compile"] else config["precision"]
    columns = ["model", "parameters", "FLOPs", "forward and backward", "inference", "inference, batch 1"]
    columns += ["saved for backward"] + ["peak memory"] * (base["peak_bytes"] is not None)
    rows = []

    def times(entry: dict, name: str) -> str:
        if entry is base:
            return f"{1000 * statistics.median(entry[name]):.4g} ms"
        low, median, high = statistics.quantiles((a / b for a, b in zip(entry[name], base[name])), n=4)
        return f"{median:.3f} ({low:.3f}–{high:.3f})"

    def amount(entry: dict, name: str, unit: str, size: float) -> str:
        return f"{entry[name] / size:.4g} {unit}" if entry is base else f"{entry[name] / base[name]:.4f}"

    for entry in costs:
        row = [
            entry["model"],
            f"{entry['parameters']:,}",
            amount(entry, "flops", "GFLOP", 1e9),
            *(times(entry, name) for name in ("step_seconds", "inference_seconds", "inference_1_seconds")),
            amount(entry, "saved_bytes", "MB", 1e6),
        ]
        if base["peak_bytes"] is not None:
            row.append(amount(entry, "peak_bytes", "MB", 1e6))
        rows.append(row)
    notes = "Times: medians of the ratios to residual within a round of calls, and their quartiles."
    size = f" of {config['image_size']}×{config['image_size']} pixels" if config["image_size"] else ""
    title = f"{config['arch']}, batch {config['batch_size']}{size}; {config['device_name']}, {how}"
    return {"title": title, "columns": columns, "rows": rows, "notes": notes}


def interleave(functions: Mapping[str, Callable[[], object]], seconds: float, device: torch.device) -> dict:
    """The seconds of every call: one round to warm up, then rounds until `seconds` have passed, three at least."""
    for function in functions.values():
        function()
    watches = {name: Stopwatch(device) for name in functions}
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - start < seconds:
        for name in rotated(functions, rounds):
            with watches[name]:
                functions[name]()
        synchronize(device)
        rounds += 1
    return {name: watch.seconds() for name, watch in watches.items()}


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that `forward` keeps for the backward pass, by distinct storage, the model's own parameters left out."""
    own = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}
    saved: dict[StorageWeakRef, Tensor] = {}  # the tensors too, so that no storage takes the place of a freed one

    def pack(tensor: Tensor) -> Tensor:
        saved[StorageWeakRef(tensor.untyped_storage())] = tensor.detach()  # which does not keep the graph that keeps it
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    size = sum(tensor.untyped_storage().nbytes() for at, tensor in saved.items() if at not in own)
    del output
    return size


def peak_bytes(model: nn.Module, step: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that the model and one step of it take on a CUDA device; None elsewhere."""
    if device.type != "cuda":
        return None
    others = torch.cuda.memory_allocated(device) - sum(p.untyped_storage().nbytes() for p in model.parameters())
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - others


def flops(step: Callable[[], object]) -> int:
    """Floating-point operations of the products and convolutions in one step; sums and activations are not counted."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
