"""A directory of steps: which folders are steps, who may write, and how one appears and goes at a single stroke."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mpjax.store.disk import sync, try_lock
from mpjax.store.manifest import MANIFEST, CheckpointError

_LOCK, _SAVING, _REMOVING = ".lock", ".saving-", ".removing-"


def local_folder(directory: Any) -> Path:
    """An absolute path, so that a later change of the working directory moves nothing.

    Raises:
      ValueError: it names a bucket or a server.
    """
    if "://" in str(directory):
        raise ValueError(
            f"got the directory {str(directory)!r}; legal is a folder of this machine: mount what is remote"
        )
    return Path(directory).absolute()


def step_number(step: Any) -> int:
    """A step as an int.

    Raises:
      ValueError: it is none, or negative.

    >>> step_number(np.int32(5))
    5
    """
    if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or step < 0:
        raise ValueError(f"got the step {step!r}; legal is an int from 0: one of those that `steps()` lists")
    return int(step)


def steps(directory: Path) -> list[int]:
    """The steps that are there, in order: folders with a plain number for a name and a manifest. Nothing else counts."""
    if not directory.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in directory.iterdir()
        if path.name.isascii() and path.name.isdecimal() and str(int(path.name)) == path.name
        and path.is_dir() and not path.is_symlink() and (path / MANIFEST).is_file()
    )  # fmt: skip


class Lock:
    """The right to write into a directory, for the time of one save. It ends with the process, however that ends."""

    def __init__(self, directory: Path):
        self._file = (directory / _LOCK).open("a")
        ours = try_lock(self._file.fileno())
        if ours is False:
            self._file.close()
            raise CheckpointError(
                f"another save to {directory} is in progress, by another process or Checkpointer; give each run a directory "
                "of its own, or wait for the other"
            )
        self.alone = ours is True  # without locks one step still appears at one stroke

    def close(self) -> None:
        """Let others write."""
        if self.alone:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # a forked child may still have the file open
        self._file.close()


def temporary(directory: Path, step: int) -> Path:
    """A new folder in which a step is prepared; its name is no step's."""
    folder = directory / f"{_SAVING}{step}-{uuid.uuid4().hex}"
    folder.mkdir()
    return folder


def step_exists(directory: Path, step: int) -> FileExistsError:
    """The error of who would write a step twice."""
    return FileExistsError(
        f"step {step} is already in {directory}; a step is written once: save another, or into another directory"
    )


def publish(folder: Path, directory: Path, step: int) -> Path:
    """Make a sealed folder the step, at one stroke.

    Raises:
      FileExistsError: the step is there already.
    """
    target = directory / str(step)
    try:
        os.rename(folder, target)  # replaces an empty folder, and no other
    except OSError as error:
        if target.exists():
            raise step_exists(directory, step) from error
        raise
    try:
        sync(directory)
    except OSError:  # a save that failed must leave no step, or it could not be made again
        os.rename(target, folder)
        raise
    return target


def remove(directory: Path, step: int) -> None:
    """Take a step away: out of sight at one stroke, then file by file."""
    gone = directory / f"{_REMOVING}{step}-{uuid.uuid4().hex}"
    try:
        os.rename(directory / str(step), gone)
    except FileNotFoundError:  # where there are no locks, another may have been as quick
        return
    shutil.rmtree(gone)


def sweep(directory: Path) -> None:
    """Take away what saves that were killed left behind. Only for one who holds the lock."""
    for path in directory.iterdir():
        if path.name.startswith((_SAVING, _REMOVING)) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def discarded_on_error(folder: Path) -> Iterator[None]:
    """A folder that goes if the block fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
