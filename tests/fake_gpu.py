"""Autocast on a GPU that need not be there."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


@cache
def has_fake_gpu() -> bool:
    """Whether this torch has fake tensors on a GPU that is not there; one that has not may abort the process."""
    probe = "with FakeTensorMode(): torch.zeros(2, device='cuda', requires_grad=True)[0] + 1"
    imports = "import torch; from torch._subclasses.fake_tensor import FakeTensorMode"
    return subprocess.run([sys.executable, "-c", f"{imports}\n{probe}"], capture_output=True).returncode == 0


@contextmanager
def gpu_autocast() -> Iterator[None]:
    """Autocast to bfloat16 on a GPU that need not be there: tensors have shapes and dtypes, and no values."""
    if not has_fake_gpu():
        pytest.skip("this torch has fake tensors on a GPU only where there is one")
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode(), torch.device("cuda"):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
