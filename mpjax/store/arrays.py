"""Orbax: a flat dict of arrays to a folder and back, each with the dtype and shape that it has there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

Place = jax.sharding.Sharding | None
"""Where an array is to lie; None: in numpy."""


def write(folder: Path, arrays: Mapping[str, Any]) -> Callable[[], None]:
    """Begin to write arrays into a new folder; what is returned waits for the end, and raises what went wrong.

    The arrays may be donated or changed as soon as this returns.
    """
    if not arrays:  # which Orbax refuses
        return folder.mkdir
    import orbax.checkpoint as ocp

    checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    try:
        with jax.transfer_guard_device_to_host("allow"):  # a save reads the state, whatever guards the steps
            checkpointer.save(folder, args=ocp.args.PyTreeSave(dict(arrays)))
    except BaseException:
        checkpointer.close()
        raise

    def finish() -> None:
        try:
            checkpointer.wait_until_finished()
        finally:
            checkpointer.close()

    return finish


def read(folder: Path, places: Mapping[str, Place]) -> dict[str, Any]:
    """The arrays of these names: on devices where a sharding is given, in numpy elsewhere."""
    if not places:
        return {}
    import orbax.checkpoint as ocp

    restore_args = {
        name: ocp.RestoreArgs(restore_type=np.ndarray) if place is None else ocp.ArrayRestoreArgs(sharding=place)
        for name, place in places.items()
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeRestore(item=dict.fromkeys(places, 0), restore_args=restore_args, partial_restore=True)
        return dict(checkpointer.restore(folder, args=args))
