"""Several processes, as torchrun starts them."""

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import NoReturn

import torch
from torch import Tensor, distributed, nn


def launched() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def agent_store() -> bool:
    """Whether the processes meet in torchrun's own store, which it keeps over restarts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def first_process() -> bool:
    """Of those that torchrun starts; only it writes and prints."""
    return not launched() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun has started: through NCCL where each has a GPU, else through gloo.

    Does nothing in a process that it has not started. Where it has, call `leave` at the end: the group is not left in
    order, as that can wait for processes that wait for this one.
    """
    if not launched():
        yield
        return
    store, rank, world = next(distributed.rendezvous("env://"))
    if agent_store():  # after a restart it still has the addresses of the processes before it
        store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    wait = timedelta(hours=2)  # while the first process fetches the data; torchrun itself sees a process that dies
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    yield
    distributed.barrier()  # none leaves while another still talks to it


def leave(code: int) -> NoReturn:
    """Ends this process at once, without the end of the interpreter.

    A group lives on where something refers to it: functions of torch.distributed.nn do, by a default argument, if
    DistributedDataParallel is the first to import them. A thread of gloo that needs the GIL when the interpreter ends
    then aborts the process (pytorch issue 190489). After an error the end could also wait for the other processes.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def processes() -> tuple[int, int]:
    """This process's rank, and how many processes there are."""
    together = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)


def shard(tensor: Tensor) -> Tensor:
    """This rank's slice of dimension 0."""
    rank, world = processes()
    return tensor[rank::world]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes."""
    if processes()[1] > 1:
        distributed.all_reduce(tensor)
    return tensor


def broadcast(value: object) -> object:
    """The first process's value, in every process."""
    values = [value]
    if processes()[1] > 1:
        distributed.broadcast_object_list(values)
    return values[0]


class AllReduceSum(torch.autograd.Function):
    """all_reduce_sum, with a gradient."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad.clone())


class SynchronizedBatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of the whole batch, of which each process has a part.

    For a CPU: torch.nn.SyncBatchNorm, which does this, works only on GPUs.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        t = x.to(torch.promote_types(x.dtype, torch.float32))
        n = all_reduce_sum(torch.tensor(t.numel() / t.shape[1], dtype=t.dtype))
        mean = AllReduceSum.apply(t.sum(dim=(0, 2, 3))) / n
        t = t - mean[:, None, None]
        variance = AllReduceSum.apply(t.square().sum(dim=(0, 2, 3))) / n
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        factor = self.weight * torch.rsqrt(variance + self.eps)
        return (t * factor[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronize_batch_norm(model: nn.Module) -> None:
    """Gives every batch norm the statistics of all processes' images, under the names that its weights had."""
    if next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SynchronizedBatchNorm
