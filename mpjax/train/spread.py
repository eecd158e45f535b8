"""What each of several processes puts on a mesh of them all: a state that is the same everywhere, rows of its own."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpjax.core.processes import digest, gather, is_local
from mpjax.core.tree import path_of
from mpjax.core.types import Batch, PyTree
from mpjax.train.specs import Axis

B = TypeVar("B", bound=Batch)


def refuse_different(tree: PyTree) -> None:
    """Refuse leaves that the processes hold whole, and not alike: each fills its own devices from its own copy.

    Raises:
      ValueError: it names the leaves.
      TimeoutError: another process did not come.
    """
    keyed = jax.tree_util.tree_flatten_with_path(tree)[0]
    digests = {path_of(keys): digest(x) for keys, x in keyed if is_local(x)}
    found = [json.loads(word) for word in gather("state", "the placing of a state", json.dumps(digests))]
    if odd := sorted({path for other in found for path, _ in other.items() ^ found[0].items()}):
        more = f" and {len(odd) - 8} more" if len(odd) > 8 else ""
        raise ValueError(
            f"the processes hold different values at {', '.join(odd[:8])}{more}; legal is one state, alike on all; make it "
            "from the same seed everywhere, or restore it"
        )


def own_rows(batch: B, mesh: Mesh, axis: Axis) -> B:
    """The batch of which this process has the rows of its own devices. Shapes are compared when they are new; then nothing
    is sent, and nobody waits."""
    parts = blocks(mesh, axis)
    for keys, x in jax.tree_util.tree_flatten_with_path(batch)[0]:
        if jnp.ndim(x) and (x.shape[0] % parts or not x.shape[0]):
            path, rows = path_of(keys), x.shape[0]
            raise ValueError(
                f"{f'batch[{path}]' if path else 'the batch'} has {rows} rows of this process, which its {parts} parts of mesh "
                f"axis {axis!r} cannot share evenly; use a multiple of {parts} rows, the same number on every process"
            )
    with _meeting:
        _meet_at(str(jax.tree.map(jnp.shape, batch)))
    rows, whole = NamedSharding(mesh, PartitionSpec(axis)), NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(rows if jnp.ndim(x) else whole, np.asarray(x)), batch
    )


_meeting = threading.Lock()
"""Of the threads of `prefetch` one meets the other processes; two would speak twice, and be waited for in vain."""


@functools.cache
def _meet_at(shapes: str) -> None:
    """Once for each shape: processes with other rows would run other programs, and wait for one another in vain."""
    topic = f"rows/{hashlib.sha256(shapes.encode()).hexdigest()[:16]}"
    gather(topic, f"the first batch where each process has the shapes {shapes[:500]}")


def blocks(mesh: Mesh, axis: Axis) -> int:
    """Into how many parts along an axis the rows of this process fall."""
    names = (axis,) if isinstance(axis, str) else axis
    along = [mesh.axis_names.index(name) for name in names]
    me = jax.process_index()
    places = np.argwhere(np.vectorize(lambda device: device.process_index == me, otypes=[bool])(mesh.devices))
    return len({tuple(place[along]) for place in places})
