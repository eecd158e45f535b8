"""What is on the disk for good when a function returns, and what only one process may have."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """A new file with this text, on the disk when this returns."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """A file, or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def try_lock(handle: int) -> bool | None:
    """Whether what is open is now locked for us alone, until it is closed or the process ends; None where there are no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without them
        return None
    return True
