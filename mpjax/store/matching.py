"""Whether what a checkpoint holds is what the caller wants: strictly, leaf by leaf; and how each leaf comes back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.core.processes import is_local, put
from mpjax.store import arrays
from mpjax.store.leaves import Leaf
from mpjax.store.manifest import CheckpointError
from mpjax.store.trees import cast_finite

_TOLD = 8
"""How many leaves an error lists."""


def refuse_misfits(step: int, there: Mapping[str, Leaf], here: Mapping[str, Leaf], cast: bool) -> list[str]:
    """Refuse a leaf that is missing, too many, or of another dtype or shape.

    Args:
      step: for the message.
      there, here: the leaves of the checkpoint, and of what the caller wants.
      cast: let one float dtype stand for another.

    Returns:
      In words, the leaves that are to be cast.

    Raises:
      CheckpointError: it names the leaves, and what each is on either side.
    """
    wrong = [f"{path}: not in the checkpoint, {here[path]} here" for path in here.keys() - there.keys()]
    wrong += [f"{path}: {there[path]} in the checkpoint, not here" for path in there.keys() - here.keys()]
    casts: list[str] = []
    for path in here.keys() & there.keys():
        if str(here[path]) == str(there[path]):
            continue
        words = f"{path}: {there[path]} in the checkpoint, {here[path]} here"
        castable = here[path].shape == there[path].shape and _is_float(here[path]) and _is_float(there[path])
        (casts if cast and castable else wrong).append(words)
    if wrong:
        more = f"; and {len(wrong) - _TOLD} more" if len(wrong) > _TOLD else ""
        raise CheckpointError(
            f"step {step} does not fit: {'; '.join(sorted(wrong)[:_TOLD])}{more}. Give a state made as the saved one was "
            "(same model, optimizer and options); cast=True lets float dtypes differ"
        )
    return sorted(casts)


def _is_float(leaf: Leaf) -> bool:
    return not leaf.is_number and not leaf.is_key and jnp.issubdtype(np.dtype(leaf.dtype), jnp.floating)


def place_of(x: Any) -> arrays.Place:
    """Where a leaf like `x` is to lie. What was never put on a device by name is not: it would be bound to it."""
    if isinstance(x, jax.Array):
        return x.sharding if x.committed else None
    return getattr(x, "sharding", None)


def read_leaves(folder: Path, there: Mapping[str, Leaf], like: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves at the paths of `like`, from path to leaf: in the checkpoint's dtype, of the kind and at the place of `like`'s.

    Raises:
      CheckpointError: Orbax gave something other than what the checkpoint says, or jax has no such arrays.
    """
    stored = {path: there[path] for path in like if there[path].is_stored}
    # Orbax places the data of a key, which has a dimension more than the key: keys go through numpy.
    places = {leaf.name: None if leaf.is_key else place_of(like[path]) for path, leaf in stored.items()}
    found = arrays.read(folder, places)
    return {path: _as_like(there[path], found.get(there[path].name), x) for path, x in like.items()}


def _as_like(leaf: Leaf, found: Any, like: Any) -> Any:
    if leaf.is_number:
        return leaf.value
    if leaf.is_key:
        return _key(leaf, found, like)
    if found is None:
        found = np.zeros(leaf.shape, np.dtype(leaf.dtype))
    if str(found.dtype) != leaf.dtype or tuple(found.shape) != leaf.shape:
        raise CheckpointError(
            f"{leaf.path} came back from Orbax as {found.dtype}{list(found.shape)}, and was written as {leaf}; use the "
            "versions that the checkpoint was written with"
        )
    if isinstance(like, np.generic):
        return found[()]
    if isinstance(like, np.ndarray) or isinstance(found, jax.Array):
        return found
    if not _jax_holds(found):
        found = cast_leaf(leaf.path, found, like)  # by numpy, where it was asked for: jax would cut it unasked
    if not _jax_holds(found):
        raise CheckpointError(
            f"{leaf.path} is {leaf}, which jax would cut to 32 bits in silence; legal without x64 mode is a numpy array in its "
            "place in `like`: give one, or set jax_enable_x64"
        )
    return put(found, place_of(like))


def _jax_holds(x: np.ndarray) -> bool:
    return jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype


def _key(leaf: Leaf, found: Any, like: Any) -> Any:
    impl = leaf.dtype.removeprefix("key<").removesuffix(">")
    if found is None:  # an array of no keys
        found = np.zeros((*leaf.shape, *jax.random.key_data(jax.random.key(0, impl=impl)).shape), np.uint32)
    return put(jax.random.wrap_key_data(jax.device_put(found), impl=impl), place_of(like))


def cast_leaf(path: str, x: Any, like: Any) -> Any:
    """A float leaf in the dtype of `like`, rounded to nearest.

    Raises:
      CheckpointError: a finite number would become infinite, or no number.
    """
    if x.dtype == like.dtype:
        return x
    y = cast_finite(x, like.dtype)
    if y is None:
        raise CheckpointError(
            f"{path} holds numbers up to {_amax(x):g}, which {like.dtype} cannot "
            "hold; restore it as it is, and scale it"
        )
    return y


def _amax(x: Any) -> float:
    """The largest finite magnitude."""
    xp = np if is_local(x) else jnp  # no process holds all of what is spread over several
    wide = xp.abs(xp.asarray(x, np.float64 if xp is np else np.promote_types(x.dtype, np.float32)))
    return float(xp.where(xp.isfinite(wide), wide, 0).max())
