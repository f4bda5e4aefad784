"""Trains a model: recipe, optimisers, steps, evaluation, checkpoint. Knows nothing of the command line."""

import contextlib
import copy
import hashlib
import importlib
import io
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comparison.console import UserError
from comparison.data import Dataset, resize, whole_batches
from comparison.device import autocast, compiled, compiler_errors, out_of_memory
from comparison.distributed import all_reduce_sum, broadcast, processes, synchronize_batch_norm
from comparison.files import atomic_write
from comparison.folder import Data
from LAuReL import LAuReL

LAuReL_LR = importlib.import_module("LAuReL-LR").LAuReL_LR
LAuReL_PA = importlib.import_module("LAuReL-PA").LAuReL_PA
BLOCKS = (LAuReL, LAuReL_LR, LAuReL_PA)


@dataclass(frozen=True)
class Recipe:
    """How every model is trained. Chosen on the last 5,000 training images, held out, never on the test images."""

    epochs: int = 5
    batch_size: int = 500
    filter_lr: float = 0.24  # Muon, for the filters of the convolutions
    filter_momentum: float = 0.6
    # AdamW without weight decay, for all else: batch norm, classifier, the blocks' own parameters. Of 0.03, 0.01 and
    # 0.003 for the latter, 0.03 was the worst; the other two could not be told apart.
    lr: float = 0.01
    block_decay: float = 0.0  # weight decay on the blocks' own parameters
    warmup: float = 0.05  # part of the steps over which the learning rates rise; then they fall linearly to zero
    label_smoothing: float = 0.1
    max_shift: int = 2  # pixels
    # The images' size up to which part of the steps, by averaging over areas: early steps on small images cost little
    # (progressive resizing: Howard 2018, "Training Imagenet in 3 hours for USD 25; and CIFAR10 for USD 0.26").
    sizes: tuple[tuple[int, float], ...] = ((16, 0.3), (24, 0.65), (32, 1.0))

    def steps_per_epoch(self, n: int) -> int:
        return whole_batches(n, self.batch_size)

    def size(self, part: float) -> int:
        """The images' size after a part of the steps, 0 to 1."""
        return next((size for size, until in self.sizes if part < until), self.sizes[-1][0])

    def pixels(self, part: float) -> float:
        """Pixels of an image that the first part of the steps sees, mean over all steps: about what the steps cost."""
        seen, begin = 0.0, 0.0
        for size, until in self.sizes:
            seen += size**2 * max(0.0, min(part, until) - begin)
            begin = until
        return seen

    def images(self, n: int) -> int:
        """How many images a run over n training images trains on."""
        return self.epochs * self.steps_per_epoch(n) * min(self.batch_size, n)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised (Jordan et al. 2024, "Muon"), for filters with a batch norm behind them.

    torch.optim.Muon takes only matrices, and torch 2.5 does not have it. A batch norm makes the scale of its filters
    irrelevant but for the step size relative to it, so the filters are kept at a root-mean-square norm of 1.
    """

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.dtype = dtype  # of the orthogonalisation

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = orthogonalize(p.grad.add(buffer, alpha=group["momentum"]).flatten(1), self.dtype).view_as(p)
                p.mul_(len(p) ** 0.5 / p.norm()).add_(update, alpha=-group["lr"])


def orthogonalize(matrix: Tensor, dtype: torch.dtype = torch.bfloat16, steps: int = 3) -> Tensor:
    """About U Vᵀ of the singular value decomposition U S Vᵀ, by a quintic Newton–Schulz iteration."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.mT, dtype, steps).mT
    X = matrix.to(dtype) / (matrix.norm() + 1e-7)
    for _ in range(steps):
        XXt = X @ X.mT
        X = torch.addmm(X, torch.addmm(XXt, XXt, XXt, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X.to(matrix.dtype)


def optimizers(model: nn.Module, recipe: Recipe, precision: str = "float32") -> list[torch.optim.Optimizer]:
    """Returns Muon for the filters and AdamW for all else, in which the blocks' parameters are a group of their own."""
    blocks = {p: None for module in model.modules() if isinstance(module, BLOCKS) for p in module.parameters()}
    filters, others = [], []
    for p in model.parameters():
        if p.requires_grad and p not in blocks:
            (filters if p.ndim == 4 else others).append(p)
    blocks = [p for p in blocks if p.requires_grad]
    groups = [{"params": others}, {"params": blocks, "weight_decay": recipe.block_decay}]
    adam = torch.optim.AdamW(groups, recipe.lr, betas=(0.9, 0.95), weight_decay=0.0)
    if not filters:
        return [adam]
    return [Muon(filters, recipe.filter_lr, recipe.filter_momentum, getattr(torch, precision)), adam]


def digest(model: nn.Module) -> str:
    """SHA-256 of the weights and buffers: the same where two runs ended with the same bits."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def check_batch(model: nn.Module, batch: int, accumulate: int) -> None:
    """Raises a UserError where a part of a batch has too few images for the model or for the processes."""
    world = processes()[1]
    norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if batch < world * accumulate or (norm and batch < 2 * accumulate):
        least = "two images, for batch norm" if norm else "an image for each process"
        raise UserError(
            f"each part of a batch must have {least}, got {batch} images a batch in {accumulate} parts and {world} "
            "processes"
        )


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    seed: int,
    *,
    precision: str = "float32",
    compile: bool = False,
    accumulate: int = 1,
    checkpoint: Path | None = None,
    report: Callable[[float, int, float, list[dict]], None] = lambda *so_far: None,
) -> dict:
    """Trains the model on the device of the data and tests it after every epoch. Nothing is chosen by test accuracy.

    A run whose loss or weights are not finite ends with that epoch. Within a process_group each process trains on its
    part of every batch, and all have the same weights: to float error those of one process that has the whole batch.

    Args:
        precision: "float32" or "bfloat16", by autocast.
        compile: with torch.compile, before the first step.
        accumulate: in how many parts, one after the other, a batch is trained on, for less memory. Gradients are the
            whole batch's, but for batch norm, which has the statistics of each part.
        checkpoint: a file that is written after every epoch, by the first process. Where it is there already, training
            resumes from it, and on a CPU ends with the bits of a run that was not interrupted.
        report: called after every step and every test with the part of the work that is done, 0 to 1, the images
            trained on, the seconds that took, and the history, all so far.

    Returns:
        epochs, test_accuracy (the last epoch's), diverged (the epoch in which that happened, or None), train_seconds
        (training alone, without evaluation and compilation), images_per_second, compile_seconds and history (for each
        epoch: its number from 1, train_loss, None where it diverged, test_accuracy, 0 to 1, seconds).

    Raises:
        UserError: a part of a batch has too few images, --compile does not work here, an image can't be read.
    """
    device, n = data.device, data.train_size
    rank, world = processes()
    batch = min(recipe.batch_size, n)
    check_batch(model, batch, accumulate)
    test_batch = 1000 if isinstance(data, Dataset) else batch // (world * accumulate)  # what is trained on fits
    model.to(device, memory_format=torch.channels_last)
    if world > 1:
        synchronize_batch_norm(model)
    call = compiled({"model": model}, accumulate)["model"] if compile else model
    compile_seconds = warm_up(model, call, data, recipe, precision, accumulate, test_batch) if compile else 0.0
    network = nn.parallel.DistributedDataParallel(call) if world > 1 else call

    opts = optimizers(model, recipe, precision)
    steps_per_epoch = recipe.steps_per_epoch(n)
    steps = recipe.epochs * steps_per_epoch

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / (recipe.warmup * steps)) * (1 - step / steps)

    schedulers = [torch.optim.lr_scheduler.LambdaLR(opt, schedule) for opt in opts]
    parts = [model, *opts, *schedulers]  # all that changes during training: random numbers depend on seed and epoch
    history = restore(checkpoint, parts) if checkpoint else []
    images = len(history) * recipe.images(n) // recipe.epochs
    train_seconds = sum(entry["seconds"] for entry in history)

    def report_so_far(seconds: float) -> None:
        work = recipe.pixels(images / recipe.images(n)) / recipe.pixels(1.0)
        report(work, images, seconds, history)

    for epoch in range(len(history), recipe.epochs):
        if history and history[-1]["train_loss"] is None:
            break
        model.train()
        start, losses = time.perf_counter(), []
        for step, (x, y) in enumerate(data.batches(seed, epoch, recipe.batch_size, recipe.max_shift)):
            x = resize(x, recipe.size((epoch + step / steps_per_epoch) / recipe.epochs))
            for i, (part, labels) in enumerate(zip(x.tensor_split(accumulate), y.tensor_split(accumulate))):
                local = world > 1 and i < accumulate - 1  # gradients are averaged once a batch
                with network.no_sync() if local else contextlib.nullcontext():
                    with autocast(device, precision):
                        logits = network(part)
                    loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
                    loss = loss * (len(labels) * world / batch)  # the part's weight in the mean over the batch
                    loss.backward()
                losses.append(loss.detach())
            for opt, scheduler in zip(opts, schedulers):
                opt.step()
                scheduler.step()
                opt.zero_grad()
            images += batch
            report_so_far(train_seconds + time.perf_counter() - start)
        train_loss = torch.stack(losses).mean() * (accumulate / world)
        train_loss = all_reduce_sum(train_loss).item()  # the only synchronization with the device
        seconds = time.perf_counter() - start
        train_seconds += seconds
        finite = math.isfinite(train_loss) and all(p.isfinite().all() for p in model.parameters())
        entry = {"epoch": epoch + 1, "train_loss": train_loss if finite else None}
        history.append({**entry, "test_accuracy": evaluate(call, data, precision, test_batch), "seconds": seconds})
        try:
            if checkpoint and rank == 0:
                save(checkpoint, parts, history)
        finally:
            report_so_far(train_seconds)
    return {
        "epochs": len(history),
        "test_accuracy": history[-1]["test_accuracy"],
        "diverged": history[-1]["epoch"] if history[-1]["train_loss"] is None else None,
        "train_seconds": train_seconds,
        "images_per_second": images / train_seconds,
        "compile_seconds": compile_seconds,
        "history": history,
    }


def save(checkpoint: Path, parts: list, history: list[dict]) -> None:
    buffer = io.BytesIO()
    torch.save({"parts": [part.state_dict() for part in parts], "history": history}, buffer)
    with atomic_write(checkpoint) as path:
        path.write_bytes(hashlib.sha256(buffer.getbuffer()).digest() + buffer.getvalue())


def restore(checkpoint: Path, parts: list) -> list[dict]:
    """Sets the parts to what the checkpoint holds and returns its history; a damaged checkpoint is set aside.

    Of several processes the first reads it for all.
    """
    first = processes()[0] == 0
    content = broadcast(checkpoint.read_bytes() if first and checkpoint.exists() else None)
    if content is None:
        return []
    before = copy.deepcopy([part.state_dict() for part in parts])
    try:
        if hashlib.sha256(content[32:]).digest() != content[:32]:  # torch does not compare its own check sums
            raise ValueError("its SHA-256 differs")
        state = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
        for part, saved in zip(parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        return state["history"]
    except Exception as error:  # whatever is wrong with it, the run can start over
        if out_of_memory(error):
            raise
        for part, saved in zip(parts, before):
            part.load_state_dict(saved)
        if first:
            aside = checkpoint.with_suffix(".damaged")
            os.replace(checkpoint, aside)
            reason = str(error).strip().partition("\n")[0]
            print(f"{checkpoint} is damaged ({reason}): kept as {aside.name}, and the run starts over", file=sys.stderr)
        return []


def warm_up(
    model: nn.Module,
    network: Callable,
    data: Data,
    recipe: Recipe,
    precision: str,
    accumulate: int = 1,
    test_batch: int = 1000,
) -> float:
    """Compiles the training and the test step of network, which is the model under torch.compile.

    Leaves the model as it was, and returns the seconds that it took.

    Raises:
        UserError: it can't be compiled, for lack of a C++ compiler for one.
    """
    start, state = time.perf_counter(), copy.deepcopy(model.state_dict())
    model.train()
    x, y = next(data.batches(seed=0, epoch=0, batch_size=recipe.batch_size))
    parts, labels = x.tensor_split(accumulate), y.tensor_split(accumulate)
    with compiler_errors():
        # The larger parts and the smaller, in every process as many: synchronised batch norms wait for each other.
        for i in {0, accumulate - 1}:
            for size, _ in recipe.sizes:
                with autocast(y.device, precision):
                    logits = network(resize(parts[i], size))
                F.cross_entropy(logits.float(), labels[i]).backward()
                model.zero_grad()
        evaluate(network, data, precision, test_batch)
    model.load_state_dict(state)
    return time.perf_counter() - start


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, precision: str = "float32", batch_size: int = 1000) -> float:
    """Accuracy on the test images, 0 to 1, without test-time augmentation."""
    model.eval()
    correct = torch.zeros((), dtype=torch.long, device=data.device)
    for x, y in data.test_batches(batch_size):
        with autocast(y.device, precision):
            correct += (model(x).argmax(dim=1) == y).sum()
    return all_reduce_sum(correct).item() / data.test_size
