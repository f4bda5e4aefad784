"""Files that are whole or not there."""

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

PARTIAL = ".partial-"  # prefix of the temporary folders


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Atomic write: yields a path in a temporary folder, then fsync and rename."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=PARTIAL) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # and the rename itself
            directory = os.open(path.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)


def write_json(path: Path, content: object, indent: int | None = None) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent, allow_nan=False) + "\n")


def save_torch(content: object, path: Path) -> None:
    """torch.save by way of memory: to a file it makes a RuntimeError of a full disk."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())


def describe(error: OSError, place: Path) -> str:
    """FILE: REASON, with `place` where the error names no file."""
    return f"{error.filename or place}: {error.strerror or error}"


def remove_partial(folder: Path) -> None:
    """Removes what killed processes left."""
    for partial in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(partial, ignore_errors=True)
