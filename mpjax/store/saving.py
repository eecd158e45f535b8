"""One save, from the right to write to the folder in its place: what makes a step appear whole or not at all."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mpjax.store import arrays, folders
from mpjax.store.disk import write_durably
from mpjax.store.leaves import Leaf, to_arrays
from mpjax.store.manifest import MANIFEST, DamagedError, check, seal
from mpjax.store.meta import META

ARRAYS = "arrays"
"""The folder of a step that Orbax writes."""

logger = logging.getLogger("mpjax")


def begin(
    directory: Path, step: int, leaves: Mapping[str, tuple[Leaf, Any]], words: str, keep: int | None
) -> Callable[[], None]:
    """Take the right to write and begin; the leaves may change as soon as this returns.

    Args:
      directory: of the steps; made if it is not there.
      step: the number under which the leaves are to appear.
      leaves: as `leaves_of` gives them.
      words: the text of `meta.json`.
      keep: how many steps stay, this one among them; None: all.

    Returns:
      What waits for Orbax, seals the folder and puts it in its place.

    Raises:
      CheckpointError: another save is in progress.
      FileExistsError: the step is there already.
      OSError: the disk refuses. Nothing of the step stays, nor if it refuses later on.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = folders.Lock(directory)
    with _released_on_error(lock):
        if lock.alone:
            folders.sweep(directory)
        _make_room(directory, step)
        folder = folders.temporary(directory, step)
        with folders.discarded_on_error(folder):
            write_durably(folder / META, words)
            written = arrays.write(folder / ARRAYS, to_arrays(leaves))

    def finish() -> None:
        with contextlib.closing(lock):
            with folders.discarded_on_error(folder):
                written()
                seal(folder)
                folders.publish(folder, directory, step)
            others = [old for old in folders.steps(directory) if old != step]
            for old in others[: max(len(others) + 1 - keep, 0)] if keep else []:
                folders.remove(directory, old)

    return finish


def _make_room(directory: Path, step: int) -> None:
    """Take away a damaged step of the same number, which a run that fell back behind it comes to again."""
    target = directory / str(step)
    if not any((target / name).is_file() for name in (META, MANIFEST)):
        return  # nothing there, or nothing of ours: then putting the step there is refused
    try:
        check(target)
    except DamagedError as error:
        logger.warning("%s; it is replaced", error)
        folders.remove(directory, step)
    else:
        raise folders.step_exists(directory, step)


@contextlib.contextmanager
def _released_on_error(lock: folders.Lock) -> Iterator[None]:
    try:
        yield
    except BaseException:
        lock.close()
        raise
