"""Trains the models of a seed side by side: recipe, optimisers, steps, evaluation, checkpoint."""

import contextlib
import copy
import hashlib
import importlib
import io
import math
import os
import statistics
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from comparison.connections import X0, DenseFormer, LayerScale, ReZero
from comparison.console import UserError
from comparison.data import Dataset, resize, whole_batches
from comparison.device import Stopwatch, autocast, compile_all, compiler_errors, out_of_memory, rotated
from comparison.distributed import all_reduce_sum, broadcast, processes, synchronize_batch_norm
from comparison.files import atomic_write, save_torch
from comparison.folder import Data
from comparison.muon import Muon
from comparison.networks import cross_entropy, learned
from comparison.text import LENGTH, Text
from LAuReL import LAuReL

LAuReL_LR = importlib.import_module("LAuReL-LR").LAuReL_LR
LAuReL_PA = importlib.import_module("LAuReL-PA").LAuReL_PA
BLOCKS = (LAuReL, LAuReL_LR, LAuReL_PA, ReZero, LayerScale, X0, DenseFormer)


@dataclass(frozen=True)
class Recipe:
    """How every model is trained."""

    epochs: int = 3
    batch_size: int = 500
    optimizer: str = "muon"  # with AdamW; "adamw" or "sgd": all parameters in one
    filter_lr: float = 0.24  # Muon, for the filters of the convolutions
    matrix_lr: float = 0.0  # Muon, for the matrices of the branches; 0: AdamW
    momentum: float = 0.6  # Muon's
    lr: float = 0.01  # AdamW without weight decay, for all else: batch norm, embedding, head
    norm_bias_rate: float = 4.0  # a factor on it for the biases of batch norms (64 in Jordan 2024)
    # AdamW for the blocks' own parameters, w and gamma, A and B. Of 0.03, 0.01 and 0.003 for all of them, 0.03 was the
    # worst in the small CNN; the other two could not be told apart.
    scale_lr: float = 0.01
    pair_lr: float = 0.01
    block_rate: float = 1.0  # a factor on both
    block_decay: float = 0.0  # weight decay on these parameters
    warmup: float = 0.05  # learning rates fall linearly to zero, times a rise over this part of the steps
    label_smoothing: float = 0.1
    max_shift: int = 2  # pixels
    # The images' size up to which part of the steps, by averaging over areas: early steps on small images cost little
    # (progressive resizing: Howard 2018, "Training Imagenet in 3 hours for USD 25; and CIFAR10 for USD 0.26").
    sizes: tuple[tuple[int, float], ...] = ((16, 0.3), (20, 0.5), (32, 1.0))

    def with_one(self, optimizer: str, lr: float) -> "Recipe":
        """All parameters in one "adamw" or "sgd" (momentum 0.9), at one learning rate."""
        return replace(self, optimizer=optimizer, lr=lr, scale_lr=lr, pair_lr=lr, norm_bias_rate=1.0)

    def size(self, part: float) -> int:
        """The images' size after a part of the steps, from 0 to below 1."""
        return next(size for size, until in self.sizes if part < until)

    def work(self, part: float) -> float:
        """The fraction of a run's cost that is in this fraction of its steps: about that of its pixels."""
        seen, all_, begin = 0.0, 0.0, 0.0
        for size, until in self.sizes:
            seen += size**2 * max(0.0, min(part, until) - begin)
            all_ += size**2 * (until - begin)
            begin = until
        return seen / all_


IMAGES = Recipe()  # chosen on the last 5,000 training images, held out
TEXT = Recipe(  # chosen on the validation part of enwik8
    batch_size=8,
    matrix_lr=0.02,
    momentum=0.95,
    scale_lr=0.003,
    pair_lr=0.0003,
    warmup=0.02,
    label_smoothing=0.0,
    max_shift=0,
    sizes=((LENGTH, 1.0),),
)


def optimizers(model: nn.Module, recipe: Recipe, precision: str = "float32") -> list[torch.optim.Optimizer]:
    """Muon for filters and, with a matrix_lr, the branches' matrices; AdamW for all else, the blocks in groups."""
    blocks = {p for module in model.modules() if isinstance(module, BLOCKS) for p in module.parameters()}
    biases = {module.bias for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    hidden = set()
    if recipe.matrix_lr:
        hidden = {p for stage in model.stages for branch in stage.branches for p in branch.parameters() if p.ndim == 2}

    def group(p: nn.Parameter) -> str:
        if p in blocks:
            return "scales" if p.ndim < 2 else "pairs"
        if p in biases:
            return "biases"
        if recipe.optimizer != "muon":
            return "others"
        return "filters" if p.ndim == 4 else "matrices" if p in hidden else "others"

    params: dict[str, list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            params.setdefault(group(p), []).append(p)

    def groups(**options: dict) -> list[dict]:
        return [{"params": params[name], **each} for name, each in options.items() if name in params]

    rest = groups(
        others={"lr": recipe.lr},
        biases={"lr": recipe.lr * recipe.norm_bias_rate},
        scales={"lr": recipe.scale_lr * recipe.block_rate, "weight_decay": recipe.block_decay},
        pairs={"lr": recipe.pair_lr * recipe.block_rate, "weight_decay": recipe.block_decay},
    )
    muon = groups(filters={"lr": recipe.filter_lr}, matrices={"lr": recipe.matrix_lr})
    if recipe.optimizer == "sgd":
        return [torch.optim.SGD(rest, momentum=0.9)]
    found = [torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)]
    return [Muon(muon, recipe.filter_lr, recipe.momentum, getattr(torch, precision)), *found] if muon else found


def digest(model: nn.Module) -> str:
    """SHA-256 of the weights and buffers: the same where two runs ended with the same bits."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def check_batch(model: nn.Module, batch: int, accumulate: int) -> None:
    """Raises a UserError where a part of a batch has too few examples for the model or for the processes."""
    world = processes()[1]
    norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    single = norm and batch < 2 * accumulate
    if single or batch < world * accumulate:
        least = "two examples, for batch norm" if single else "an example for each process"
        raise UserError(
            f"each part of a batch must have {least}, got {batch} examples a batch in {accumulate} parts and {world} "
            "processes"
        )


class TrainState:
    """A model with its optimisers, learning rates and history: all that changes during training."""

    def __init__(self, model: nn.Module, compiled: nn.Module, recipe: Recipe, steps: int, precision: str) -> None:
        """Takes the model, and the compiled one, or the model again."""
        self.model, self.compiled, self.recipe, self.precision = model, compiled, recipe, precision
        self.distributed = nn.parallel.DistributedDataParallel(compiled) if processes()[1] > 1 else compiled
        self.optimizers = optimizers(model, recipe, precision)

        def schedule(step: int) -> float:
            return min(1.0, (step + 1) / (recipe.warmup * steps)) * (1 - step / steps)

        self.schedulers = [torch.optim.lr_scheduler.LambdaLR(opt, schedule) for opt in self.optimizers]
        self.history: list[dict] = []  # an entry an epoch
        self.seconds: list[float] = []  # of every step

    @property
    def diverged(self) -> bool:
        return bool(self.history) and self.history[-1]["train_loss"] is None

    def step(self, x: Tensor, y: Tensor, batch: int, accumulate: int) -> Tensor:
        """Trains on this process's shard of a batch; returns the shard's part of the loss, without label smoothing."""
        world, total = processes()[1], torch.zeros((), device=x.device)
        for i, (part, labels) in enumerate(zip(x.tensor_split(accumulate), y.tensor_split(accumulate))):
            local = world > 1 and i < accumulate - 1  # gradients are averaged once a batch
            with self.distributed.no_sync() if local else contextlib.nullcontext():
                with autocast(x.device, self.precision):
                    logits = self.distributed(part)
                smoothed = cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
                (smoothed * (len(labels) * world / batch)).backward()  # the part's weight in the mean over the batch
            total += cross_entropy(logits.detach(), labels) * (len(labels) / batch)
        for opt, scheduler in zip(self.optimizers, self.schedulers):
            opt.step()
            scheduler.step()
            opt.zero_grad()
        return total

    def end_epoch(self, train_loss: float, tested: dict[str, float], seconds: list[float]) -> None:
        finite = all(map(math.isfinite, (train_loss, tested["test_loss"])))
        found = {**tested, "train_loss": train_loss, "learned": learned(self.model) if finite else {}}
        if not finite:
            found |= {"train_loss": None, "test_loss": None}
        self.history.append({"epoch": len(self.history) + 1, **found, "seconds": sum(seconds)})
        self.seconds += seconds

    def state_dict(self) -> dict:
        parts = [part.state_dict() for part in (self.model, *self.optimizers, *self.schedulers)]
        return {"parts": parts, "history": self.history, "seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        for part, saved in zip((self.model, *self.optimizers, *self.schedulers), state["parts"], strict=True):
            part.load_state_dict(saved)
        self.history, self.seconds = state["history"], state["seconds"]


def train(
    models: Mapping[str, nn.Module],
    data: Data,
    recipe: Recipe,
    seed: int,
    *,
    own: Mapping[str, dict] = MappingProxyType({}),
    precision: str = "float32",
    compile: bool = False,
    accumulate: int = 1,
    checkpoint: Path | None = None,
    report: Callable[[float, float, dict[str, list[dict]]], None] = lambda *so_far: None,
) -> dict[str, dict]:
    """Trains the models side by side on the device of the data, and tests them after every epoch.

    Each batch is made once, and every model takes its step on it before the next one is made, in an order that turns.
    The numbers of a model do not depend on the others, on a CPU to the bit; but for its step_ratio. Nothing is chosen
    by the test set. A model whose loss is not finite leaves after that epoch, and the others go on.

    Within a process_group each process trains on its part of every batch, and all have the same weights: to float error
    those of one process that has the whole batch.

    Args:
        own: for a model's name, the fields of the recipe that are its own.
        precision: "float32" or "bfloat16", by autocast.
        compile: with torch.compile, the training step before the first one.
        accumulate: in how many parts, one after the other, a batch is trained on, for less memory. Gradients are the
            whole batch's, but for batch norm, which has the statistics of each part.
        checkpoint: a file that is written after every epoch; of several processes only the first is given one. Where it
            is there already, training resumes from it, on a CPU with the bits of a run that was not interrupted.
        report: called after every step and every test with the part of the work that is done, 0 to 1, the images or
            bytes a second, of all models together, and the histories, all so far.

    Returns:
        for each model epochs, test_loss and test_accuracy (the last epoch's; None for text), bits_per_byte (of text),
        diverged (the epoch in which that happened, or None), train_seconds (its steps), images_per_second or
        bytes_per_second, compile_seconds, step_ratio (the median over the steps of its time to residual's on the
        same batch, None without it), step_ratio_quartiles and history: for each epoch its number from 1,
        train_loss (mean over the batches) and test_loss, both plain cross-entropies in nats and None where it diverged,
        test_accuracy, 0 to 1, the seconds of its steps, and what the residual connections have learned, by layer.

    Raises:
        UserError: a part of a batch has too few examples, --compile does not work here, an image can't be read.
    """
    device, n = data.device, data.train_size
    world = processes()[1]
    batch = min(recipe.batch_size, n)
    text = isinstance(data, Text)
    test_batch = 1000 if isinstance(data, Dataset) else batch // (world * accumulate)  # what is trained on fits
    for model in models.values():
        check_batch(model, batch, accumulate)
        model.to(device, memory_format=torch.channels_last)
        if world > 1:
            synchronize_batch_norm(model)
    calls, compile_seconds = models, dict.fromkeys(models, 0.0)
    if compile:
        calls = compile_all(models, accumulate)
        for name, model in models.items():
            compile_seconds[name] = warm_up(model, calls[name], data, recipe, precision, accumulate)
    steps_per_epoch = whole_batches(n, recipe.batch_size)
    steps = recipe.epochs * steps_per_epoch
    states = {
        name: TrainState(model, calls[name], replace(recipe, **own.get(name, {})), steps, precision)
        for name, model in models.items()
    }
    restore(checkpoint, states)
    histories = {name: state.history for name, state in states.items()}

    for epoch in range(max(map(len, histories.values())), recipe.epochs):
        training = {name: state for name, state in states.items() if not state.diverged}
        if not training:
            break
        for state in training.values():
            state.model.train()
        begin, watches = time.perf_counter(), {name: Stopwatch(device) for name in training}
        # Not a list of tensors: each would lie in the middle of memory that a step has freed, and the heap would grow.
        losses = {name: torch.zeros(steps_per_epoch, device=device) for name in training}
        for step, (x, y) in enumerate(data.batches(seed, epoch, recipe.batch_size, recipe.max_shift)):
            done = (epoch + step / steps_per_epoch) / recipe.epochs
            x = resize(x, recipe.size(done))
            for name in rotated(training, step):
                with watches[name]:
                    losses[name][step] = training[name].step(x, y, batch, accumulate)
            speed = (step + 1) * batch * data.units * len(training) / (time.perf_counter() - begin)
            report(recipe.work(done + 1 / steps), speed, histories)
        tested = evaluate({name: state.compiled for name, state in training.items()}, data, precision, test_batch)
        for name, state in training.items():
            loss = all_reduce_sum(losses[name].mean()).item()
            state.end_epoch(loss, tested[name], watches[name].seconds())
        try:
            if checkpoint:
                save(checkpoint, states)
        finally:
            report(recipe.work((epoch + 1) / recipe.epochs), speed, histories)
    base = states["residual"].seconds if "residual" in states else []
    return {
        name: {
            "epochs": len(state.history),
            "test_loss": last["test_loss"],
            "test_accuracy": last["test_accuracy"],
            "bits_per_byte": last["test_loss"] / math.log(2) if text and not state.diverged else None,
            "diverged": last["epoch"] if state.diverged else None,
            "train_seconds": sum(state.seconds),
            "images_per_second": None,  # for text; for images the next line has it
            f"{data.unit}_per_second": len(state.seconds) * batch * data.units / sum(state.seconds),
            **step_ratio(state.seconds, base),
            "compile_seconds": compile_seconds[name],
            "history": state.history,
        }
        for name, state in states.items()
        for last in state.history[-1:]
    }


def step_ratio(mine: list[float], base: list[float]) -> dict:
    """Median and quartiles of the ratios of two models' times on the same batches."""
    ratios = [a / b for a, b in zip(mine, base)]
    if not ratios:
        return {"step_ratio": None, "step_ratio_quartiles": None}
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
    return {"step_ratio": median, "step_ratio_quartiles": [low, high]}


def save(checkpoint: Path, states: Mapping[str, TrainState]) -> None:
    with atomic_write(checkpoint) as path:
        save_torch({name: state.state_dict() for name, state in states.items()}, path)


def restore(checkpoint: Path | None, states: Mapping[str, TrainState]) -> None:
    """Sets the states to what the checkpoint holds, if there is one; a damaged checkpoint is set aside.

    Of several processes only the first has one, and reads it for all.
    """
    content = broadcast(checkpoint.read_bytes() if checkpoint and checkpoint.exists() else None)
    if content is None:
        return
    before = copy.deepcopy({name: state.state_dict() for name, state in states.items()})
    try:
        if zipfile.ZipFile(io.BytesIO(content)).testzip():  # torch writes check sums, and does not compare them
            raise ValueError("its check sum differs")
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if saved.keys() != states.keys():
            raise ValueError(f"it is of {', '.join(saved)}")
        for name, state in states.items():
            state.load_state_dict(saved[name])
    except Exception as error:  # whatever is wrong with it, the run can start over
        if out_of_memory(error):
            raise
        for name, state in states.items():
            state.load_state_dict(before[name])
        if checkpoint:
            aside = checkpoint.with_suffix(".damaged")
            os.replace(checkpoint, aside)
            reason = str(error).strip().partition("\n")[0]
            print(f"{checkpoint} is damaged ({reason}): kept as {aside.name}, and the run starts over", file=sys.stderr)


def warm_up(
    model: nn.Module, network: Callable, data: Data, recipe: Recipe, precision: str, accumulate: int = 1
) -> float:
    """Compiles the training step of network, which is the model under torch.compile; the test is compiled in the first.

    Leaves weights and buffers as they were, and returns the seconds that it took.

    Raises:
        UserError: it can't be compiled, for lack of a C++ compiler for one.
    """
    start, state = time.perf_counter(), copy.deepcopy(model.state_dict())
    model.train()
    x, y = next(data.batches(seed=0, epoch=0, batch_size=recipe.batch_size))
    parts, labels = x.tensor_split(accumulate), y.tensor_split(accumulate)
    with compiler_errors():
        # The larger parts and the smaller, in every process as many: synchronised batch norms wait for each other.
        # Twice, as a CUDA graph is recorded in the second call.
        for i in {0, accumulate - 1}:
            for size, _ in 2 * recipe.sizes:
                with autocast(y.device, precision):
                    logits = network(resize(parts[i], size))
                cross_entropy(logits, labels[i]).backward()
                model.zero_grad()
    model.load_state_dict(state)
    return time.perf_counter() - start


@torch.no_grad()
def evaluate(
    models: Mapping[str, nn.Module], data: Data, precision: str = "float32", batch_size: int = 1000
) -> dict[str, dict[str, float]]:
    """test_loss (cross-entropy, nats) and test_accuracy (0 to 1) of each model, without test-time augmentation.

    Of text the loss is per byte, and there is no accuracy.
    """
    sums = {name: torch.zeros(2, device=data.device) for name in models}
    for model in models.values():
        model.eval()
    for x, y in data.test_batches(batch_size):
        for name, model in models.items():
            with autocast(y.device, precision):
                logits = model(x)
            right = (logits.argmax(dim=-1) == y).sum()
            sums[name] += torch.stack((cross_entropy(logits, y, reduction="sum"), right))
    found = {}
    for name, both in sums.items():
        loss, accuracy = (all_reduce_sum(both).cpu().double() / (data.test_size * data.units)).tolist()
        found[name] = {"test_loss": loss, "test_accuracy": None if isinstance(data, Text) else accuracy}
    return found
