import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

from comparison.console import UserError
from comparison.data import NORMALIZATION
from comparison.folder import Images, load_folder
from TrainUtil import Recipe, train


@pytest.fixture
def images(tmp_path) -> Path:
    """ImageNet's layout: two classes of images of several sizes, modes and formats; dogs are darker than cats."""
    generator = torch.Generator().manual_seed(0)
    modes = ("RGB", "L", "P", "CMYK", "RGBA", "1", "RGB", "RGB")
    for part, n in (("train", 16), ("val", 8)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(n):
                shape = (3, 20 + 3 * i, 60 - 2 * i)
                pixels = 40 + 120 * (1 - label) + torch.randint(40, shape, generator=generator)
                image = to_pil_image(pixels.to(torch.uint8)).convert(modes[i % 8])
                suffix = "tif" if image.mode == "CMYK" else "jpg" if image.mode in ("RGB", "L") else "png"
                image.save(tmp_path / "images" / part / name / f"{i:02d}.{suffix}")
    return tmp_path / "images"


def test_an_image_folder_is_trained_on(images):
    data = load_folder(images, size=32, workers=2)
    assert (data.name, data.classes, data.size) == ("images", 2, 32)
    assert (data.train_size, data.test_size) == (32, 16)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    recipe = Recipe(epochs=8, batch_size=8, lr=0.1, sizes=((32, 1.0),))
    history = train({"": net}, data, recipe, 0)[""]["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 0.1
    assert history[-1]["test_accuracy"] == 1
    assert data.hold_out(8).limit(12).train_size == 12
    assert data.hold_out(8).test_size == 8
    assert data.sample(5).shape == (5, 32, 32, 3)


def test_what_is_read_from_a_folder_depends_only_on_seed_and_epoch(images):
    def read(workers: int, seed: int, epoch: int) -> list:
        torch.manual_seed(workers)
        return [torch.cat(t) for t in zip(*load_folder(images, 32, workers).batches(seed, epoch, 8))]

    first = read(0, seed=1, epoch=0)
    for workers in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(first, read(workers, seed=1, epoch=0)))
    for other in (read(0, seed=2, epoch=0), read(0, seed=1, epoch=1)):
        assert not torch.equal(first[0], other[0])
        assert sorted(other[1].tolist()) == sorted(first[1].tolist())
    crop = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(32)])
    one, again, other_seed, other_epoch = (
        Images(load_folder(images, 32, 0).train, crop, seed)[i][0] for seed, i in ((1, 5), (1, 5), (2, 5), (1, 5 + 32))
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other_seed)
    assert not torch.equal(one, other_epoch)


def test_tested_images_are_resized_and_cropped_in_the_middle(images):
    (x, y), *rest = load_folder(images, 32, workers=0).test_batches(16)
    assert (x.shape, rest) == ((16, 3, 32, 32), [])
    assert y.tolist() == [0] * 8 + [1] * 8
    image = Image.open(images / "val" / "cat" / "00.jpg")  # 20×60: 36×108, of which the middle 32×32
    expected = v2.functional.center_crop(v2.functional.resize(v2.functional.pil_to_tensor(image), [36]), [32, 32])
    mean, std = (torch.tensor(each)[:, None, None] for each in NORMALIZATION["ImageNet"])
    torch.testing.assert_close(x[0], (expected - mean) / std, rtol=0, atol=0.02)


def test_a_process_without_a_shard_of_the_test_images_has_no_batch(images, monkeypatch):
    monkeypatch.setattr("comparison.distributed.processes", lambda: (20, 21))
    data = load_folder(images, 32, workers=0)
    assert list(data.test_batches(8)) == []


def break_folder(images: Path, fault: str) -> Path:
    """Returns what the message has to name."""
    path = images / "train" / "dog" / "06.jpg"
    if fault == "link to nowhere":
        path.unlink()
        path.symlink_to(images / "nowhere")
    elif fault in ("cut short", "empty", "no image"):
        content = {"cut short": path.read_bytes()[:-300], "empty": b"", "no image": b"<html>"}[fault]
        path.write_bytes(content)
    elif fault == "no val":
        path = images / "val"
        shutil.rmtree(path)
    elif fault == "class missing in val":
        path = images / "val"
        shutil.rmtree(path / "dog")
    elif fault == "class missing in train":
        path = images / "train"
        shutil.rmtree(path / "dog")
    elif fault == "class without images":
        path = images / "val"
        for each in (path / "dog").iterdir():
            each.unlink()
    else:
        path = images / "train"
        for part in ("train", "val"):
            shutil.rmtree(images / part / "dog")
    return path


FAULTS = {
    "cut short": "(?i)can't be read as an image: .*truncated",
    "empty": "can't be read as an image: it is empty",
    "no image": "can't be read as an image: cannot identify",
    "link to nowhere": "can't be read as an image: .*No such file",
    "no val": "CLASS/NAME.jpg",
    "class missing in val": "has no folder for dog",
    "class missing in train": "has no folder for dog",
    "class without images": "dog",
    "one class": "only one class, cat",
}


@pytest.mark.parametrize(("fault", "reason"), FAULTS.items(), ids=FAULTS)
def test_what_is_wrong_with_a_folder_is_said(fault, reason, images):
    path = break_folder(images, fault)
    with pytest.raises(UserError, match=reason) as error:
        for _ in load_folder(images, 32, workers=2).batches(0, 0, 8):
            pass
    assert str(path) in str(error.value)
    assert "Traceback" not in str(error.value)
