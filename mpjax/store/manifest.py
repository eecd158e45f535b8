"""A SHA-256 of every file of a checkpoint, written last: what makes it a checkpoint, and what it is checked by."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mpjax.store.disk import sync, write_durably

MANIFEST = "manifest.json"
FORMAT = "mpjax checkpoint"
VERSION = 1
"""Of the layout of a step's folder. A reader refuses what is newer than itself, and reads all that is older."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found, believed or fitted; the message names the step and the file or leaf."""


class CheckpointWarning(UserWarning):
    """A checkpoint was passed over, and an older one used."""


class DamagedError(CheckpointError):
    """A step's files are not those that were written."""


def seal(folder: Path) -> None:
    """Make a folder a checkpoint: every file on the disk for good, then the manifest that lists their digests.

    Raises:
      OSError: the disk refuses; the folder is then no checkpoint.
    """
    files = dict(_files(folder))
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter's lock
        digests = list(pool.map(_durable_digest, files.values()))
    listed = {
        name: {"sha256": digest, "bytes": path.stat().st_size}
        for (name, path), digest in zip(files.items(), digests, strict=True)
    }
    text = json.dumps({"format": FORMAT, "version": VERSION, "files": listed}, indent=1, sort_keys=True)
    write_durably(folder / MANIFEST, text + "\n")
    for inner, _, _ in os.walk(folder, topdown=False):
        sync(Path(inner))


def check(folder: Path, *, deep: bool = True) -> None:
    """Refuse a folder whose files are not those of its manifest: none missing, none more, none other.

    Args:
      deep: compare digests too; else names and sizes only, which costs no reading.

    Raises:
      DamagedError: the manifest or a file is missing, cut off, changed, or there is one too many.
      CheckpointError: it was written by a later mpjax.
    """
    listed = _listed(folder)
    try:
        files = {name: path for name, path in _files(folder) if name != MANIFEST}
        for name in sorted(listed.keys() ^ files.keys()):
            what = "is missing" if name in listed else "is not in the manifest"
            raise DamagedError(f"{folder.name}: {name} {what}")
        for name, path in files.items():
            if (size := path.stat().st_size) != listed[name]["bytes"]:
                raise DamagedError(f"{folder.name}: {name} has {size} bytes, and had {listed[name]['bytes']}")
        if deep:
            with ThreadPoolExecutor() as pool:
                digests = dict(zip(files, pool.map(_digest, files.values()), strict=True))
            for name, digest in digests.items():
                if digest != listed[name]["sha256"]:
                    raise DamagedError(f"{folder.name}: {name} is not what was written (its SHA-256 differs)")
    except OSError as error:
        raise DamagedError(f"{folder.name} cannot be read: {error}") from error


def _listed(folder: Path) -> dict[str, Any]:
    """The files of a manifest: from name to digest and size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedError(f"{folder.name}: {MANIFEST} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedError(f"{folder.name}: {MANIFEST} is none of an mpjax checkpoint")
    version, files = manifest.get("version"), manifest.get("files")
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(
            f"step {folder.name} has format {version}; this mpjax reads formats up to {VERSION}: use a later mpjax"
        )
    entries = files if isinstance(files, dict) else {"": None}
    whole = all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and isinstance(entry.get("bytes"), int)
        for entry in entries.values()
    )
    if not whole or not isinstance(version, int) or version < 1:
        raise DamagedError(f"{folder.name}: {MANIFEST} is not what was written")
    return entries


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file below a folder, by its relative name. Links and devices are no part of a checkpoint."""
    for inner, folders, names in os.walk(folder):
        for name in sorted(names) + [name for name in folders if Path(inner, name).is_symlink()]:
            path = Path(inner, name)
            if not stat.S_ISREG(path.lstat().st_mode):
                raise DamagedError(f"{folder.name}: {name} is no ordinary file")
            yield path.relative_to(folder).as_posix(), path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _durable_digest(path: Path) -> str:
    sync(path)
    return _digest(path)
