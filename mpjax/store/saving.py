"""One save, from the right to write to the folder in its place: what makes a step appear whole or not at all."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpjax.store import arrays, folders
from mpjax.store.disk import write_durably
from mpjax.store.leaves import Leaf, to_arrays
from mpjax.store.manifest import MANIFEST, DamagedError, check, seal
from mpjax.store.meta import META, read_meta
from mpjax.store.together import Together

ARRAYS = "arrays"
"""The folder of a step that Orbax writes."""

logger = logging.getLogger("mpjax")


def begin(
    directory: Path,
    step: int,
    leaves: Mapping[str, tuple[Leaf, Any]],
    words: str,
    keep: int | None,
    processes: Together,
) -> Callable[[], None]:
    """Take the right to write and begin; the leaves may change as soon as this returns.

    Of several processes each writes its own parts of the arrays. All else process 0 does for all: the lock, `meta.json`,
    the manifest once every part is on the disk, the rename, and the removal of what is old.

    Args:
      directory: of the steps; made if it is not there.
      step: the number under which the leaves are to appear.
      leaves: as `leaves_of` gives them.
      words: the text of `meta.json`.
      keep: how many steps stay, this one among them; None: all.
      processes: who saves together.

    Returns:
      What waits for Orbax, seals the folder and puts it in its place.

    Raises:
      CheckpointError: another save is in progress.
      FileExistsError: the step is there already.
      OSError: the disk refuses. Nothing of the step stays, nor if it refuses later on.
    """
    alone = contextlib.ExitStack()  # what process 0 holds: the right to write, and the folder until it is a step

    def prepare() -> str:
        directory.mkdir(parents=True, exist_ok=True)
        lock = alone.enter_context(contextlib.closing(folders.Lock(directory)))
        if lock.alone:
            folders.sweep(directory)
        _make_room(directory, step)
        folder = folders.temporary(directory, step)
        alone.enter_context(folders.discarded_on_error(folder))
        write_durably(folder / META, words)
        return folder.name

    def publish() -> str:
        seal(folder)
        folders.publish(folder, directory, step)
        others = [old for old in folders.steps(directory) if old != step]
        for old in others[: max(len(others) + 1 - keep, 0)] if keep else []:
            folders.remove(directory, old)
        return folder.name

    def finish() -> None:
        with held:
            processes.all(f"the end of the writing of step {step}", written)
            processes.first(f"the publication of step {step}", publish)

    with alone:
        folder = directory / processes.first(f"the beginning of the save of step {step}", prepare)
        written = processes.all(
            f"the writing of step {step}", lambda: arrays.write(folder / ARRAYS, to_arrays(leaves), processes.seconds)
        )
        held = alone.pop_all()
    return finish


def _make_room(directory: Path, step: int) -> None:
    """Take away a damaged step of the same number, which a run that fell back behind it comes to again."""
    target = directory / str(step)
    if not any((target / name).is_file() for name in (META, MANIFEST)):
        return  # nothing there, or nothing of ours: then putting the step there is refused
    try:
        check(target)
        read_meta(target)  # a copy of another step is whole, and no step
    except DamagedError as error:
        logger.warning("%s; it is replaced", error)
        folders.remove(directory, step)
    else:
        raise folders.step_exists(directory, step)
