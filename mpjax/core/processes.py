"""Several processes of one program (`jax.distributed`): how they hear what the others found, in a time that is stated.

Every process runs the same program and makes the same calls in the same order. What they say to one another goes through
the coordination service, not the devices: it waits no longer than it is told, and may be said from any thread.
"""

from __future__ import annotations

import collections
import hashlib
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # jax has no public door to its key-value store; Orbax and Flax come in here too
from jax.sharding import NamedSharding, PartitionSpec

WAIT = 600.0
"""Seconds for which a process waits for the others, unless it is told otherwise."""

_said: collections.Counter[str] = collections.Counter()
"""How often this process spoke, by topic: what makes a key that was never used before."""


def several() -> bool:
    """Whether `jax.distributed` runs more than one process. Without it no backend is started to know."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes what all would write alike."""
    return not several() or jax.process_index() == 0


def gather(topic: str, about: str, word: str = "", seconds: float = WAIT) -> list[str]:
    """What each process says, in the order of the processes; none goes on before all have spoken.

    Args:
      topic: the words on one topic are heard in the order in which they are said.
      about: what the word is about, for the error; it must be the same everywhere.
      word: up to about a megabyte.
      seconds: how long to wait for all the others together.

    Raises:
      TimeoutError: some did not come; it says which.
      RuntimeError: some speak about something else.

    >>> gather("greeting", "the morning", "good day")  # alone
    ['good day']
    """
    if not several():
        return [word]
    client, me, number = _client(), jax.process_index(), _said[topic]
    _said[topic] += 1
    client.key_value_set(_key(topic, number, me), json.dumps([about, word]))
    deadline = time.monotonic() + seconds
    found: list[Any] = []
    lost = []
    for other in range(jax.process_count()):
        left = max(int(1000 * (deadline - time.monotonic())), 1)
        try:
            found.append(json.loads(client.blocking_key_value_get(_key(topic, number, other), left)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            lost.append(other)
    if lost:
        raise TimeoutError(
            f"process {', '.join(map(str, lost))} of {jax.process_count()} did not come to {about} within {seconds:g} s, and "
            f"process {me} waited; all make the same calls in the same order: look in the log of the one that did not come, "
            "and start all of them again"
        )
    if strangers := [f"process {i} at {what}" for i, (what, _) in enumerate(found) if what != about]:
        raise RuntimeError(
            f"process {me} is at {about}, {', '.join(strangers)}; legal are the same calls in the same order on every process: "
            "call it everywhere, and start all of them again"
        )
    if number:  # all are here, so that all have heard what was said before
        client.key_value_delete(_key(topic, number - 1, me))
    return [word for _, word in found]


def post(topic: str, word: str) -> None:
    """Say a word to whoever looks for it, and wait for nobody. The first word on a topic stays; a later one is dropped."""
    try:
        _client().key_value_set(f"mpjax/{topic}", word)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise


def posted(topic: str) -> str | None:
    """The word that was posted, if there is one by now."""
    try:
        return _client().key_value_try_get(f"mpjax/{topic}")
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return None


def _client() -> Any:
    return distributed.global_state.client


def _key(topic: str, number: int, process: int) -> str:
    return f"mpjax/{topic}/{number}/{process}"


def put(x: Any, sharding: Any) -> Any:
    """`jax.device_put`, also to devices of other processes: each fills its own from an `x` that must be the same on all.

    (jax's own does so for numpy arrays, and compares them by a broadcast of each.)

    >>> put(np.arange(2), None)
    Array([0, 1], dtype=int32)
    """
    if sharding is None or sharding.is_fully_addressable or not is_local(x):
        return jax.device_put(x, sharding)
    if _is_key(x):
        data = put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])


def is_local(x: Any) -> bool:
    """Whether this process holds the whole of it, and nobody else knows it.

    >>> is_local(np.arange(2)), is_local(3)
    (True, True)
    """
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def fetched(tree: Any) -> Any:
    """A tree whose leaves this process can read: what is spread over several is sent to all, and all ask for it alike.

    >>> fetched({"mine": np.arange(2), "number": 3})
    {'mine': array([0, 1]), 'number': 3}
    """

    def leaf(x: Any) -> Any:
        if is_local(x):
            return x
        return jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec())).addressable_data(0)

    return jax.tree.map(leaf, tree)


def digest(x: Any) -> str:
    """Of the bytes of what this process holds whole: to compare it without sending it.

    >>> digest(np.zeros(2)) == digest(np.zeros(2)), digest(np.zeros(2)) == digest(-np.zeros(2))
    (True, False)
    """
    return hashlib.sha256(np.asarray(jax.random.key_data(x) if _is_key(x) else x).tobytes()).hexdigest()[:16]


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
