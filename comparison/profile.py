"""What a residual connection costs: time, memory, floating-point operations."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from comparison.data import synthetic
from comparison.device import Stopwatch, autocast, compiled, synchronize, turned
from comparison.models import Model
from comparison.networks import build
from comparison.transformers import GPT

# Table 5 of the paper as ratios to its baseline of 24 layers: step time, peak memory
PAPER = {
    "residual": (1.000, 1.000),
    "rw": (1.000, 1.024),
    "lr": (1.032, 1.055),
    "pa:rank=none": (1.053, 1.077),
    "rw+lr": (1.042, 1.079),
    "rw+lr+pa": (1.095, 1.107),
}


class Measured(NamedTuple):
    """A network whose residual connections are compared; example(n) gives n inputs and their labels."""

    name: str
    models: dict[str, nn.Module]
    example: Callable[[int], tuple[Tensor, Tensor]]
    batch: int


def cnn(models: list[Model], arch: str, batch: int, image_size: int | None) -> Measured:
    data = synthetic()
    if image_size:
        images = F.interpolate(data.sample(256).permute(0, 3, 1, 2).float(), image_size)
        data = replace(data.limit(256), train_images=images.to(torch.uint8).permute(0, 2, 3, 1))

    def example(n: int) -> tuple[Tensor, Tensor]:
        i = torch.arange(n) % data.train_size
        return data.normalize(data.train_images[i]), i % data.classes

    kind = "ViT" if arch == "vit" else f"{arch} CNN"
    name = f"{kind}, {data.size}×{data.size} pixels, batch {batch}"
    built = {model.name: build(arch, model, 0, data) for model in models}
    return Measured(name, built, example, batch)


def gpt(models: list[Model], dim: int, layers: int, length: int, batch: int) -> Measured:
    def example(n: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(GPT.vocabulary, (n, length), generator=torch.Generator().manual_seed(0))
        return tokens, tokens.roll(-1, dims=1)

    name = f"GPT, D = {dim}, {layers} layers, length {length}, batch {batch}"
    built = {model.name: GPT(model, 0, dim=dim, layers=layers) for model in models}
    return Measured(name, built, example, batch)


def measure(measured: Measured, device: torch.device, precision: str, compile: bool, seconds: float) -> list[dict]:
    """Returns an entry a model: parameters, FLOPs, bytes, and the seconds of every call in rounds of all models."""
    models, example = measured.models, measured.example
    for model in models.values():
        model.train().to(device, memory_format=torch.channels_last)
    called = compiled(models) if compile else models
    x, y = (tensor.to(device) for tensor in example(measured.batch))

    def loss(model: nn.Module) -> Tensor:
        with autocast(device, precision):
            logits = model(x)
        return F.cross_entropy(logits.float().flatten(0, -2), y.flatten())

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
    for n in (1, 128):
        x_n = example(n)[0].to(device)
        calls = {name: partial(infer, model, x_n) for name, model in called.items()}
        times[f"inference_{n}_seconds"] = interleave(calls, seconds / 4, device)
    return [{**entry, **{name: each[entry["model"]] for name, each in times.items()}} for entry in costs]


def profile_table(config: dict, network: str, costs: list[dict]) -> dict:
    """The arguments of console.print_table."""
    base = costs[0]
    how = f"{config['precision']}, compiled" if config["compile"] else config["precision"]
    columns = ["model", "parameters", "FLOPs", "training step", "inference, batch 1", "inference, batch 128"]
    columns += ["saved for backward"] + ["peak memory"] * (base["peak_bytes"] is not None)
    columns += ["paper: time", "paper: memory"] * network.startswith("GPT")
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
            *(times(entry, name) for name in ("step_seconds", "inference_1_seconds", "inference_128_seconds")),
            amount(entry, "saved_bytes", "MB", 1e6),
        ]
        if base["peak_bytes"] is not None:
            row.append(amount(entry, "peak_bytes", "MB", 1e6))
        if network.startswith("GPT"):
            row += [f"{ratio:.3f}" for ratio in PAPER.get(entry["model"], ())] or ["–", "–"]
        rows.append(row)
    notes = "Times: medians of the ratios to residual within a round of calls, and their quartiles."
    return {"title": f"{network}; {config['device_name']}, {how}", "columns": columns, "rows": rows, "notes": notes}


def interleave(functions: Mapping[str, Callable[[], object]], seconds: float, device: torch.device) -> dict:
    """The seconds of every call: one round to warm up, then rounds until `seconds` have passed, three at least."""
    for function in functions.values():
        function()
    watches = {name: Stopwatch(device) for name in functions}
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - start < seconds:
        for name in turned(functions, rounds):
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
    model.zero_grad()
    others = torch.cuda.memory_allocated(device) - sum(p.untyped_storage().nbytes() for p in model.parameters())
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - others


def flops(step: Callable[[], object]) -> int:
    """Floating-point operations of the products and convolutions in one step; sums and activations are not counted."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
