"""Text as bytes, in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from comparison.data import epoch_generator, whole_batches
from comparison.distributed import shard

LENGTH = 128  # bytes of a sequence, of which each is predicted from those before it
EPOCH = 3072  # sequences: a pass over all of enwik8 would take hours on a CPU
TESTED = 2048  # sequences of a test part that may be larger, always the same ones


@dataclass(frozen=True)
class Text:
    """Bytes in memory: uint8 of shape (N,). Has the methods of Dataset; a sequence takes the place of an image."""

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    tested: int = TESTED

    examples, unit, units, classes = "sequences", "bytes", LENGTH, 256

    @property
    def device(self) -> torch.device:
        return self.train.device

    @property
    def train_size(self) -> int:
        """Sequences of an epoch."""
        return min(EPOCH, (len(self.train) - 1) // LENGTH)

    @property
    def hold_out_size(self) -> int:
        """Sequences of the validation part."""
        return (len(self.validation) - 1) // LENGTH

    @property
    def test_size(self) -> int:
        return min(self.tested, (len(self.test) - 1) // LENGTH)

    def to(self, device: torch.device) -> "Text":
        return replace(self, **{part: getattr(self, part).to(device) for part in ("train", "validation", "test")})

    def limit(self, n: int) -> "Text":
        """The first n sequences to train on, and the whole test set."""
        return replace(self, train=self.train[: n * LENGTH + 1])

    def hold_out(self, n: int) -> "Text":
        """Tests on n sequences of the validation part: for choosing a recipe."""
        name = f"{self.name}, tested on {n} sequences of its validation part"
        return replace(self, name=name, test=self.validation, tested=n)

    def batches(self, seed: int, epoch: int, batch_size: int, max_shift: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The sequences of one epoch, from random places, and the byte that follows each of theirs.

        Depends only on the seed and the epoch; each process has its shard of every batch.
        """
        batch = min(batch_size, self.train_size)
        shape = (whole_batches(self.train_size, batch_size), batch)
        places = torch.randint(len(self.train) - LENGTH, shape, generator=epoch_generator(seed, epoch))
        for part in places.to(self.device):
            yield sequences(self.train, shard(part))

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's shard of sequences that are spread evenly over the test part: always the same."""
        step = (len(self.test) - 1 - LENGTH) // max(1, self.test_size - 1)
        for part in shard(torch.arange(self.test_size, device=self.device) * step).split(batch_size):
            yield sequences(self.test, part)


def sequences(text: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes from each place on, (N, length), and those one further."""
    found = text[places[:, None] + torch.arange(LENGTH + 1, device=places.device)].long()
    return found[:, :-1], found[:, 1:]


def synthetic_text() -> Text:
    """A small made-up text: words of two to eleven letters, each followed by one of four that are its own."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (200, 11), generator=generator).tolist()
    words = [bytes(word[: 2 + i // 20]) + b" " for i, word in enumerate(letters)]
    next_ones = torch.randint(200, (200, 4), generator=generator).tolist()
    text, word = bytearray(), 0
    for choice in torch.randint(4, (40_000,), generator=generator).tolist():
        word = next_ones[word][choice]
        text += words[word]
    every = torch.frombuffer(text, dtype=torch.uint8)
    return Text("SYNTHETIC", *every.split([len(every) - 40_000, 20_000, 20_000]))
