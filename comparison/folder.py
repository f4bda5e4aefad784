"""Images in files, read by worker processes."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from comparison.console import UserError
from comparison.data import Dataset, epoch_generator, normalize, seeded, whole_batches
from comparison.distributed import shard
from comparison.text import Text


class Images(torch.utils.data.Dataset):
    """Images of an ImageFolder as uint8 (3, size, size) with their labels; in place of a broken one a UserError.

    A number i beyond the samples stands for sample i % N, with the random numbers of i: an epoch gives its own, and
    these depend neither on the process nor on the worker that reads the image.
    """

    def __init__(self, samples: list[tuple[str, int]], transform: v2.Transform, seed: int) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, int] | UserError:
        path, label = self.samples[i % len(self)]
        try:
            image = default_loader(path)
        except Exception as error:  # Pillow has many for a broken file
            empty = os.path.exists(path) and not os.path.getsize(path)
            return UserError(f"{path} can't be read as an image: {'it is empty' if empty else error}")
        # A hash, as torch takes no more than 32 bits of a seed.
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {i}".encode()).digest()[:4], "big")
        with seeded(seed):
            return self.transform(image), label

    @staticmethod
    def collate(items: list) -> object:
        return next((item for item in items if isinstance(item, UserError)), None) or default_collate(items)


@dataclass(frozen=True)
class Folder:
    """Images in files, as torchvision's ImageFolder has them: PATH/train/CLASS/NAME.jpg and PATH/val/CLASS/NAME.jpg.

    Has the methods of Dataset; those that read images raise a UserError which names the file that could not be read.
    """

    name: str
    train: list[tuple[str, int]]  # files and labels, shuffled once
    test: list[tuple[str, int]]
    classes: int
    size: int
    workers: int
    device: torch.device

    examples, unit, units = Dataset.examples, Dataset.unit, Dataset.units

    @property
    def train_size(self) -> int:
        return len(self.train)

    hold_out_size = train_size

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
        return torch.cat([x for x, _ in self.load(self.train[:n], [range(min(n, len(self.train)))])])

    def normalize(self, images: Tensor) -> Tensor:
        return normalize(images, "ImageNet")

    def load(self, samples: list, batches: Iterable[Sequence[int]], seed: int | None = None) -> Iterator:
        """Batches of uint8 (N, size, size, 3) and labels on the device; with a seed cropped and mirrored at random."""
        crop = [v2.RandomResizedCrop(self.size, antialias=True), v2.RandomHorizontalFlip()]
        if seed is None:
            crop = [v2.Resize(self.size * 8 // 7, antialias=True), v2.CenterCrop(self.size)]  # 256 for 224
        images = Images(samples, v2.Compose([v2.PILToTensor(), *crop]), seed or 0)
        settings = {"num_workers": self.workers, "pin_memory": self.device.type == "cuda"}
        for batch in DataLoader(images, batch_sampler=batches, collate_fn=Images.collate, **settings):
            if isinstance(batch, UserError):
                raise batch
            x, y = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            yield x.permute(0, 2, 3, 1).contiguous(), y

    def batches(self, seed: int, epoch: int, batch_size: int, max_shift: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """As those of Dataset, but cropped at random in place of shifted."""
        n = self.train_size
        order = torch.randperm(n, generator=epoch_generator(seed, epoch)).split(batch_size)
        numbers = [(shard(i) + epoch * n).tolist() for i in order[: whole_batches(n, batch_size)]]
        for x, y in self.load(self.train, numbers, seed):
            yield self.normalize(x), y

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        mine = shard(torch.arange(self.test_size)).split(batch_size)
        for x, y in self.load(self.test, [i.tolist() for i in mine if len(i)]):
            yield self.normalize(x), y


Data = Dataset | Folder | Text


def load_folder(path: Path, size: int, workers: int) -> Folder:
    """Images in path/train and path/val, in a folder for each class, to be cropped to size×size pixels.

    Raises:
        UserError: a folder or a class is missing, or there is only one class.
    """
    parts = []
    for part in (path / "train", path / "val"):
        try:
            parts.append(ImageFolder(str(part)))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{part}: {error}. Expected: {part}/CLASS/NAME.jpg") from None
    train, test = parts
    for here, there in ((train, test), (test, train)):
        missing = sorted(set(here.classes) - set(there.classes))
        if missing:
            raise UserError(f"{there.root} has no folder for {', '.join(missing)}, which {here.root} has")
    if len(train.classes) < 2:
        raise UserError(f"{train.root} has only one class, {train.classes[0]}; there is nothing to tell apart")
    order = torch.randperm(len(train.samples), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled_once = [train.samples[i] for i in order]  # for --limit and --hold-out: the files are sorted by class
    return Folder(
        path.resolve().name, shuffled_once, test.samples, len(train.classes), size, workers, torch.device("cpu")
    )
