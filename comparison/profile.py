"""What a residual connection costs: time, memory, floating-point operations."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import rich
import rich.box
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from comparison.data import synthetic
from comparison.device import autocast, compiled, keep_memory, synchronize
from comparison.files import replacing
from comparison.networks import ARCHS
from comparison.study import configuration
from comparison.transformers import GPT

# Table 5 of the paper as ratios to its baseline of 24 layers: step time, peak memory. Its PA has the identity for h.
PAPER = {
    "residual": (1.000, 1.000),
    "rw": (1.000, 1.024),
    "lr": (1.032, 1.055),
    "pa": (1.053, 1.077),
    "rw+lr": (1.042, 1.079),
    "rw+lr+pa": (1.095, 1.107),
}


def networks(options: argparse.Namespace) -> Iterator[tuple[str, list[dict]]]:
    """The name of a network, and what every model of it costs."""
    dim, layers, length, batch = options.gpt
    data = synthetic()
    if options.image_size:
        images = data.sample(256).permute(0, 3, 1, 2).float()
        images = F.interpolate(images, options.image_size).to(torch.uint8).permute(0, 2, 3, 1)
        data = replace(data.limit(256), train_images=images)

    def cnn_example(n: int) -> tuple[Tensor, Tensor]:
        i = torch.arange(n) % data.train_size
        return data.normalize(data.train_images[i]), i % data.classes

    def gpt_example(n: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(GPT.vocabulary, (n, length), generator=torch.Generator().manual_seed(0))
        return tokens, tokens.roll(-1, dims=1)

    if options.network != "gpt":
        models = {model.name: ARCHS[options.arch](model, 0, data) for model in options.models}
        kind = "ViT" if options.arch == "vit" else f"{options.arch} CNN"
        name = f"{kind}, {data.size}×{data.size} pixels, batch {options.batch_size}"
        yield name, measure(models, cnn_example, options.batch_size, options)
    if options.network != "cnn":
        models = {model.name: GPT(model, dim, layers, length) for model in options.models}
        name = f"GPT, D = {dim}, {layers} layers, length {length}, batch {batch}"
        yield name, measure(models, gpt_example, batch, options)


def measure(models: dict[str, nn.Module], example: Callable, batch: int, options: argparse.Namespace) -> list[dict]:
    """An entry a model; example(n) gives n inputs and their labels."""
    device = options.device
    for model in models.values():
        model.train().to(device, memory_format=torch.channels_last)
    called = compiled(models) if options.compile else models
    x, y = (tensor.to(device) for tensor in example(batch))

    def loss(model: nn.Module) -> Tensor:
        with autocast(device, options.precision):
            logits = model(x)
        return F.cross_entropy(logits.float().flatten(0, -2), y.flatten())

    def step(model: nn.Module) -> None:
        loss(model).backward()
        model.zero_grad()  # or the gradients of all models would take memory at once

    @torch.inference_mode()
    def infer(model: nn.Module, x: Tensor) -> None:
        with autocast(device, options.precision):
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
    times = {"step_seconds": interleave(steps, options.seconds, device)}
    for model in models.values():
        model.eval()
    for n in (1, 128):
        x_n = example(n)[0].to(device)
        calls = {name: partial(infer, model, x_n) for name, model in called.items()}
        times[f"inference_{n}_seconds"] = interleave(calls, options.seconds / 4, device)
    return [{**entry, **{name: each[entry["model"]] for name, each in times.items()}} for entry in costs]


def profile_table(config: dict, network: str, costs: list[dict]) -> Table:
    base = costs[0]
    how = f"{config['precision']}, compiled" if config["compile"] else config["precision"]
    result = Table("model", title=f"{network}; {config['device_name']}, {how}", box=rich.box.MARKDOWN)
    result.caption = "Times: medians of the ratios to residual within a round of calls, and their quartiles."
    columns = [
        "parameters",
        "FLOPs",
        "training step",
        "inference, batch 1",
        "inference, batch 128",
        "saved for backward",
    ]
    columns += ["peak memory"] * (base["peak_bytes"] is not None)
    columns += ["paper: time", "paper: memory"] * network.startswith("GPT")
    for name in columns:
        result.add_column(name, justify="right")

    def times(entry: dict, name: str) -> str:
        if entry is base:
            return f"{1000 * statistics.median(entry[name]):.4g} ms"
        low, median, high = statistics.quantiles((a / b for a, b in zip(entry[name], base[name])), n=4)
        return f"{median:.3f} ({low:.3f}–{high:.3f})"

    def amount(entry: dict, name: str, unit: str, size: float) -> str:
        return f"{entry[name] / size:.4g} {unit}" if entry is base else f"{entry[name] / base[name]:.4f}"

    for entry in costs:
        row = [
            f"{entry['parameters']:,}",
            amount(entry, "flops", "GFLOP", 1e9),
            *(times(entry, name) for name in ("step_seconds", "inference_1_seconds", "inference_128_seconds")),
            amount(entry, "saved_bytes", "MB", 1e6),
        ]
        if base["peak_bytes"] is not None:
            row.append(amount(entry, "peak_bytes", "MB", 1e6))
        if network.startswith("GPT"):
            row += [f"{ratio:.3f}" for ratio in PAPER.get(entry["model"], ())] or ["–", "–"]
        result.add_row(entry["model"], *row)
    return result


def profile(options: argparse.Namespace) -> int:
    keep_memory()
    config, found = configuration(options), {}
    try:
        for network, costs in networks(options):
            found[network] = costs
            rich.get_console().print(profile_table(config, network, costs))
            with replacing(options.out / "profile.json") as path:
                path.write_text(json.dumps({"config": config, "networks": found}) + "\n")
    except KeyboardInterrupt:
        print(f"Interrupted: networks measured so far: {len(found)}.", file=sys.stderr)
        return 130
    finally:
        if found:
            print(options.out / "profile.json")
    return 0


def interleave(functions: Mapping[str, Callable[[], object]], seconds: float, device: torch.device) -> dict:
    """The seconds of every call, in rounds A B C, B C A, …, so that a machine whose speed drifts slows all alike.

    One round to warm up, then rounds until `seconds` have passed, three at least.
    """
    for function in functions.values():
        function()
    names, times = list(functions), {name: [] for name in functions}
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - start < seconds:
        for i in range(len(names)):
            name = names[(i + rounds) % len(names)]
            synchronize(device)
            begin = time.perf_counter()
            functions[name]()
            synchronize(device)
            times[name].append(time.perf_counter() - begin)
        rounds += 1
    return times


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that `forward` keeps for the backward pass, by distinct storage, the model's own parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, Tensor] = {}  # the tensors themselves too, so that no storage takes the place of a freed one

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
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
