"""Images in memory, and how they are augmented.

CIFAR lives on the device as one uint8 tensor and is augmented there a whole batch at a time. Every random choice of a
run is drawn on the CPU and depends only on its seed, so that all models of a run see the same batches."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from comparison.distributed import shard

# Mean and standard deviation of the channels of the training images
NORMALIZATION = {
    "CIFAR-10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "CIFAR-100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    "ImageNet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),  # torchvision's weights expect these
}


@dataclass(frozen=True)
class Dataset:
    """Images in memory: uint8 of shape (N, H, W, 3), square; labels uint8 of shape (N,), 0 to classes − 1."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int = 10
    normalization: str = "CIFAR-10"

    examples = unit = "images"  # what is trained on, and what is counted
    units = 1  # of those in an example

    @property
    def device(self) -> torch.device:
        return self.train_labels.device

    @property
    def size(self) -> int:
        return self.train_images.shape[1]

    @property
    def train_size(self) -> int:
        return len(self.train_labels)

    hold_out_size = train_size

    @property
    def test_size(self) -> int:
        return len(self.test_labels)

    def to(self, device: torch.device) -> "Dataset":
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def limit(self, n: int) -> "Dataset":
        """The first n training images, and the whole test set."""
        return replace(self, train_images=self.train_images[:n], train_labels=self.train_labels[:n])

    def hold_out(self, n: int) -> "Dataset":
        """Train on all but the last n training images and test on those: for choosing a recipe."""
        train = {"train_images": self.train_images[:-n], "train_labels": self.train_labels[:-n]}
        test = {"test_images": self.train_images[-n:], "test_labels": self.train_labels[-n:]}
        return replace(self, name=f"{self.name}, tested on {n} held-out training images", **train, **test)

    def sample(self, n: int) -> Tensor:
        """The first n training images."""
        return self.train_images[:n]

    def normalize(self, images: Tensor) -> Tensor:
        return normalize(images, self.normalization)

    def batches(self, seed: int, epoch: int, batch_size: int, max_shift: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The augmented batches of one epoch, of which this process has its shard; a last partial batch is left out.

        Depends only on the seed and the epoch. Flips take turns: half of the images, drawn once for the seed, are
        mirrored in even epochs, the others in odd ones (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single
        GPU").
        """
        n, device = self.train_size, self.device
        flip = (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5) ^ bool(epoch % 2)
        generator = epoch_generator(seed, epoch)
        order = torch.randperm(n, generator=generator)
        offset = torch.randint(-max_shift, max_shift + 1, (2, n), generator=generator)
        flip, order, offset = flip.to(device), order.to(device), offset.to(device)
        for i in order.split(batch_size)[: whole_batches(n, batch_size)]:
            i = shard(i)
            yield self.normalize(shift(self.train_images[i], *offset[:, i], flip[i])), self.train_labels[i].long()

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's shard of the test images."""
        images, labels = shard(self.test_images), shard(self.test_labels)
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


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """For all that is drawn in an epoch."""
    return torch.Generator().manual_seed((seed << 20) + epoch + 1)


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
def channel_statistics(name: str, device: torch.device) -> Tensor:
    """NORMALIZATION[name], (2, 3); cached for each device, as making it synchronizes with a GPU."""
    return torch.tensor(NORMALIZATION[name], device=device)


def normalize(images: Tensor, name: str = "CIFAR-10") -> Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) in channels_last layout, about zero mean and unit variance."""
    mean, std = channel_statistics(name, images.device)
    return ((images - mean) / std).permute(0, 3, 1, 2)


def resize(images: Tensor, size: int) -> Tensor:
    """(…, H, W) to (…, size, size), each pixel the mean of the area that it covers."""
    return images if images.shape[-1] == size else F.adaptive_avg_pool2d(images, size)
