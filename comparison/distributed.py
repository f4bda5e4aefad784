"""Several processes, as torchrun starts them."""

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn


def launched() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def agent_store() -> bool:
    """Whether the processes meet in torchrun's own store, which it keeps over restarts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def first_process() -> bool:
    """Of those that torchrun starts; it alone writes and prints."""
    return not launched() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun has started: through NCCL where each has a GPU, else through gloo.

    On an error the group is not left in order, as that can wait for processes that wait for this one.
    """
    store, rank, world = next(distributed.rendezvous("env://"))
    if agent_store():  # after a restart it still has the addresses of the processes before it
        store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    wait = timedelta(hours=2)  # while the first process fetches the data; torchrun itself sees a process that dies
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    yield
    distributed.barrier()  # none leaves while another still talks to it
    # torch 2.5 holds the GIL while it waits for gloo's threads, and one that still frees a tensor waits for the GIL.
    time.sleep(0.2)
    distributed.destroy_process_group()


def processes() -> tuple[int, int]:
    """This process's number, and how many there are."""
    together = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)


def share(tensor: Tensor) -> Tensor:
    """What this process has to do of a tensor whose first dimension is divided."""
    rank, world = processes()
    return tensor[rank::world]


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes."""
    if processes()[1] > 1:
        distributed.all_reduce(tensor)
    return tensor


def agree(value: object) -> object:
    """The first process's value, in every process."""
    values = [value]
    if processes()[1] > 1:
        distributed.broadcast_object_list(values)
    return values[0]


class Total(torch.autograd.Function):
    """`total`, with a gradient."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return total(tensor.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return total(grad.clone())


class SynchronizedBatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of the whole batch, of which each process has a part.

    For a CPU: torch.nn.SyncBatchNorm, which does this, works on GPUs alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        t = x.to(torch.promote_types(x.dtype, torch.float32))
        n = total(torch.tensor(t.numel() / t.shape[1], dtype=t.dtype))
        mean = Total.apply(t.sum(dim=(0, 2, 3))) / n
        t = t - mean[:, None, None]
        variance = Total.apply(t.square().sum(dim=(0, 2, 3))) / n
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
