"""Orbax: a flat dict of arrays to a folder and back, each with the dtype and shape that it has there."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpjax.core.processes import WAIT, is_local, several

Place = jax.sharding.Sharding | None
"""Where an array is to lie; None: in numpy."""

FILE_BYTES: int | None = 2**26
"""Orbax begins a new file after so many bytes (None: 2 GiB): a file is hashed by one thread, and several by several."""


def write(folder: Path, arrays: Mapping[str, Any], seconds: float = WAIT) -> Callable[[], None]:
    """Begin to write arrays into a new folder; what is returned waits for the end, and raises what went wrong.

    The arrays may be donated or changed as soon as this returns. Of several processes each writes the parts that it holds;
    what each of them holds whole is written by process 0. All call this, and each waits `seconds` for the others.

    Raises:
      OSError: the disk is full, read-only or broken.
    """
    if not arrays:  # which Orbax refuses
        return functools.partial(folder.mkdir, exist_ok=several())
    import orbax.checkpoint as ocp

    options: dict[str, Any] = {}
    if several():  # Orbax takes numpy arrays for those that all have, and no jax array of one process
        arrays = {name: np.asarray(x) if is_local(x) else x for name, x in arrays.items()}
        options = {"async_options": ocp.options.AsyncOptions(timeout_secs=math.ceil(seconds))}
    processes = _processes(range(jax.process_count()), 0, folder.parent.name) if several() else {}
    checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(**processes), **options, **processes)
    try:
        # A save reads the state, whatever guards the steps.
        with jax.transfer_guard_device_to_host("allow"), _disk_errors():
            checkpointer.save(folder, args=ocp.args.PyTreeSave(dict(arrays), ocdbt_target_data_file_size=FILE_BYTES))
    except BaseException:
        checkpointer.close()
        raise

    def finish() -> None:
        try:
            with _disk_errors():
                checkpointer.wait_until_finished()
        finally:
            checkpointer.close()

    return finish


def _processes(who: Iterable[int], first: int, name: str | None) -> dict[str, Any]:
    """Orbax's word for the processes that take part. Where they are named it waits by the clock, not by a collective."""
    import orbax.checkpoint as ocp

    options = ocp.options.MultiprocessingOptions(
        primary_host=first, active_processes=set(who), barrier_sync_key_prefix=name
    )
    return {"multiprocessing_options": options}


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """TensorStore raises a ValueError whatever it is; where the system gave it a number, the OSError of that number."""
    try:
        yield
    except ValueError as error:
        if number := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(number[1]), str(error)) from error
        raise


def read(folder: Path, places: Mapping[str, Place]) -> dict[str, Any]:
    """The arrays of these names: on devices where a sharding is given, in numpy elsewhere. No process waits for another."""
    if not places:
        return {}
    import orbax.checkpoint as ocp

    restore_args = {
        name: ocp.RestoreArgs(restore_type=np.ndarray) if place is None else ocp.ArrayRestoreArgs(sharding=place)
        for name, place in places.items()
    }
    processes = _processes([jax.process_index()], jax.process_index(), None) if several() else {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**processes), **processes) as checkpointer:
        args = ocp.args.PyTreeRestore(item=dict.fromkeys(places, 0), restore_args=restore_args, partial_restore=True)
        return dict(checkpointer.restore(folder, args=args))
