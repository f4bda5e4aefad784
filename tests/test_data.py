import pytest
import torch
from torch import nn

from comparison.data import normalize, resize, shift, synthetic, whole_batches


def test_shift_moves_and_reflects_at_the_edges():
    images = torch.arange(2 * 5 * 5 * 3).view(2, 5, 5, 3)
    padded = nn.functional.pad(images.permute(0, 3, 1, 2).float(), (2, 2, 2, 2), mode="reflect").permute(0, 2, 3, 1)
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            out = shift(images, torch.tensor([dy, 0]), torch.tensor([dx, 0]), torch.tensor([False, True]))
            assert torch.equal(out[0].float(), padded[0, 2 - dy : 7 - dy, 2 - dx : 7 - dx])
            assert torch.equal(out[1], images[1].flip(1))


def test_a_smaller_image_holds_means_over_areas():
    x = normalize(torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8))
    y = resize(x, 16)
    torch.testing.assert_close(y, x.unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5)))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_batches_hold_every_image_once_and_depend_only_on_seed_and_epoch(data):
    # Without shifts, an image is known by its pixels, mirrored or not.
    data = data.limit(300)
    sums = normalize(data.train_images).sum((1, 2, 3)).sort().values
    epochs = [[torch.cat(t) for t in zip(*data.batches(seed, epoch, 100))] for seed in (0, 1) for epoch in (0, 1)]
    for x, _ in epochs:
        torch.testing.assert_close(x.sum((1, 2, 3)).sort().values, sums, rtol=1e-4, atol=1e-2)
    again = [torch.cat(t) for t in zip(*data.batches(1, 1, 100))]
    assert all(torch.equal(a, b) for a, b in zip(epochs[3], again))
    labels = [y.tolist() for _, y in epochs]
    assert all(labels[i] != labels[j] for i in range(4) for j in range(i))


def test_every_image_is_mirrored_in_every_other_epoch(data):
    data = data.limit(64)
    plain = normalize(data.train_images)

    def mirrored(epoch):
        x, _ = next(data.batches(0, epoch, 64))
        return {i for i in range(64) for image in x if torch.equal(image, plain[i].flip(2))}

    even, odd = mirrored(0), mirrored(1)
    assert even | odd == set(range(64))
    assert not even & odd
    assert mirrored(2) == even


@pytest.mark.parametrize(("n", "sizes"), [(250, [100, 100]), (100, [100]), (30, [30])])
def test_a_partial_batch_is_left_out_unless_it_is_the_only_one(n, sizes, data):
    assert [len(y) for _, y in data.limit(n).batches(0, 0, 100)] == sizes
    assert whole_batches(n, 100) == len(sizes)


def test_batches_are_channels_last_and_normalised():
    mean, deviation = torch.tensor([125, 123, 114], dtype=torch.uint8), torch.tensor([63, 62, 67], dtype=torch.uint8)
    x = normalize((mean + deviation).expand(2, 32, 32, 3))
    assert x.shape == (2, 3, 32, 32)
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x, torch.ones_like(x), rtol=0, atol=0.01)


def test_hold_out_tests_on_training_images_that_are_not_trained_on(data):
    held = data.hold_out(1000)
    assert torch.equal(torch.cat([held.train_images, held.test_images]), data.train_images)
    assert torch.equal(torch.cat([held.train_labels, held.test_labels]), data.train_labels)
    assert len(held.test_labels) == 1000
    assert "held-out" in held.name


def test_synthetic_set_has_the_shapes_of_cifar10_and_is_the_same_each_time(data):
    assert data.name == "SYNTHETIC"
    assert data.train_images.shape[1:] == data.test_images.shape[1:] == (32, 32, 3)
    assert data.train_images.dtype == data.train_labels.dtype == torch.uint8
    assert set(data.train_labels.tolist()) == set(range(10))
    assert torch.equal(data.train_images, synthetic().train_images)
