"""What lies in `mstate` beside the user's own collections, and how a call of the model finds it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from mpjax.core.model import SINKS
from mpjax.core.types import MState
from mpjax.numerics.delayed import COLLECTION, scaled_by
from mpjax.numerics.probe import Sinks, probing, sinks_in

RESERVED = (SINKS, COLLECTION)


def apart(mstate: MState) -> tuple[MState, MState]:
    """The module's own collections, and those of the wrap, which a call hands back as they came.

    >>> apart({"cache": 1, "sinks": 2})
    ({'cache': 1}, {'sinks': 2})
    """
    if not isinstance(mstate, Mapping):
        raise TypeError(
            f"got {type(mstate).__name__} for mstate; legal is a dict of collections, {{}} where there is none: "
            "apply(params, mstate, *inputs)"
        )
    own = {name: tree for name, tree in mstate.items() if name not in RESERVED}
    return own, {name: mstate[name] for name in RESERVED if name in mstate}


@contextlib.contextmanager
def reserved(kept: MState) -> Iterator[Sinks]:
    """For the length of a call: float8 histories are where layers look for them. Gives the probe's sinks, if there are any.

    What is traced in here refers to arrays of this call, so that no other call may take it out of a jit cache.
    """
    with probing(object() if kept else None), scaled_by(kept):
        yield sinks_in(kept)
