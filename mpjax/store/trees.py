"""Leaves by name: a pytree taken apart into named arrays, and filled again by name in the likeness of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.core.dtypes import is_float
from mpjax.core.tree import canonical_path
from mpjax.core.types import MState, Params, PyTree

Keys: TypeAlias = tuple[str, ...]
"""The way to a leaf, as its tree spells it: `("params", "Dense_0", "kernel")`."""

Casts: TypeAlias = dict[str, tuple[str, str]]
"""From path to the dtypes before and after."""


def is_key(x: Any) -> bool:
    """Whether it is a typed rng key, or the `ShapeDtypeStruct` of one."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def named_leaves(tree: PyTree) -> dict[Keys, Any]:
    """Every leaf by the way to it. Flax's boxes (sharding annotations) are opened; None is no leaf.

    >>> named_leaves({"Dense_0": {"kernel": 1}, "layers": [2]})
    {('Dense_0', 'kernel'): 1, ('layers', '0'): 2}
    """
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_box)[0]
    return {keys_of(keys): _opened(value) for keys, value in flat}


def nested(leaves: Mapping[Keys, Any]) -> dict[str, Any]:
    """Nested dicts, as Linen and our NNX door take them.

    >>> nested({("a", "b"): 1, ("a", "c"): 2})
    {'a': {'b': 1, 'c': 2}}
    """
    tree: dict[str, Any] = {}
    for keys, value in leaves.items():
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
    return tree


def refilled(tree: PyTree, leaves: Mapping[Keys, Any]) -> PyTree:
    """The tree with other leaves, from what `named_leaves` makes of a tree of its structure.

    >>> refilled({"a": [1, 2]}, {("a", "1"): 4, ("a", "0"): 3})
    {'a': [3, 4]}
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_box)
    return jax.tree.unflatten(structure, [_closed(box, leaves[keys_of(keys)]) for keys, box in flat])


def by_path(leaves: Mapping[Keys, Any]) -> dict[str, Any]:
    """Leaves by canonical path.

    Raises:
      ValueError: two have the same.

    >>> by_path({("layers_0", "w"): 1})
    {'layers/0/w': 1}
    """
    found: dict[str, Any] = {}
    for keys, value in leaves.items():
        path = canonical_path("/".join(keys))
        if path in found:
            raise ValueError(
                f"got two leaves that are both spelled {path}; legal is a path for each, where an index may follow a name or a "
                "slash; rename one"
            )
        found[path] = value
    return found


def as_jax(value: Any, path: str) -> jax.Array:
    """The array on jax's side, in its own dtype.

    Raises:
      ValueError: jax would cut it to 32 bits.
    """
    if not isinstance(value, np.ndarray) or jax.dtypes.canonicalize_dtype(value.dtype) == value.dtype:
        return jnp.asarray(value)
    raise ValueError(
        f"got {value.dtype} at {path}; without x64 mode jax has no such arrays and would cut it to 32 bits in silence; "
        "set jax_enable_x64, or read the file with plain safetensors"
    )


def put_into(
    like: PyTree, found: Mapping[str, Any], source: str, mend: str, troubles: Sequence[str] = ()
) -> tuple[PyTree, Casts]:
    """`like` with every leaf taken from `found`, by canonical path; floats in the dtype of `like`, all else as it is.

    Args:
      like: arrays or `ShapeDtypeStruct`s.
      found: arrays (or keys) by canonical path.
      source: what they come from, for the error.
      mend: what to do about it, for the error.
      troubles: what is known already not to fit.

    Returns:
      The tree, of jax arrays, and which of them were cast.

    Raises:
      ValueError: leaves that are missing, left over, of another shape, of another kind of dtype, or that the dtype in
        `like` cannot hold; one error names them all.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(like, is_leaf=_is_box)
    wanted = [(canonical_path("/".join(keys_of(keys))), box) for keys, box in flat]
    left = dict(found)
    complaints: dict[str, list[str]] = {"missing": [], "left over": [], "misfits": [*troubles]}
    values: list[Any] = []
    casts: Casts = {}
    for path, box in wanted:
        if path not in left and f"{path}/value" in left:
            left[path] = left.pop(f"{path}/value")  # of a tree whose boxes, or Variables of NNX, were taken for nodes
        if path not in left:
            complaints["missing"].append(path)
            continue
        value, spec = left.pop(path), _spec(_opened(box))
        misfit = _misfit(value, spec)
        if misfit:
            complaints["misfits"].append(f"{path} {misfit}")
        elif value.dtype != spec.dtype:
            casts[path], given = (value.dtype.name, spec.dtype.name), value
            value = cast_finite(given, spec.dtype)
            if value is None:
                complaints["misfits"].append(f"{path} is beyond what {spec.dtype.name} can hold")
        values.append(value)
    complaints["left over"] = sorted(left)
    if any(complaints.values()):
        said = "; ".join(f"{what}: {listed(names)}" for what, names in complaints.items() if names)
        raise ValueError(
            f"{source} does not fit `like`: {said}. Legal is one array for each leaf of `like`, of its shape and kind "
            f"(floats are cast, ints never); {mend}"
        )
    filled = [_closed(box, as_jax(value, path)) for value, (path, box) in zip(values, wanted, strict=True)]
    return jax.tree.unflatten(structure, filled), casts


def finite(x: Any) -> Any:
    """Where an array is neither NaN nor infinite; numpy has no such function for the narrow formats."""
    xp = jnp if isinstance(x, jax.Array) else np
    return xp.isfinite(x.astype(np.float32) if x.dtype.itemsize < 4 else x)


def cast_finite(x: Any, dtype: np.dtype) -> Any:
    """Floats in another dtype, rounded to nearest; None where a finite one would become infinite, or no number.

    >>> cast_finite(np.float32([1.0, np.inf]), np.dtype("float16")), cast_finite(np.float32([1e6, np.inf]), np.dtype("float16"))
    (array([ 1., inf], dtype=float16), None)
    """
    with np.errstate(all="ignore"):  # an overflow is looked for below
        y = x.astype(dtype)
    return y if bool((finite(y) == finite(x)).all()) else None


def pair(like: PyTree) -> tuple[Params, MState]:
    """`(params, mstate)`.

    Raises:
      ValueError: it is no pair, but params alone for one.

    >>> pair(({"w": 1}, {}))
    ({'w': 1}, {})
    """
    if isinstance(like, tuple | list) and len(like) == 2:
        return like[0], like[1]
    raise ValueError(
        f"got a {type(like).__name__} for `like`; legal is the pair (params, mstate), as jax.eval_shape(model.init, ...) gives "
        "it; give both, {} where there is no mstate"
    )


def listed(names: list[str], most: int = 12) -> str:
    """Names for an error, not more of them than anyone reads.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _misfit(value: Any, spec: Any) -> str:
    if tuple(value.shape) != tuple(spec.shape):
        return f"has the shape {tuple(value.shape)}, in `like` {tuple(spec.shape)}"
    if value.dtype != spec.dtype and not (is_float(value) and is_float(spec)):
        return f"is {value.dtype}, in `like` {spec.dtype}"
    return ""


def _spec(x: Any) -> Any:
    return x if hasattr(x, "shape") and hasattr(x, "dtype") else jnp.asarray(x)


def keys_of(keys: tuple) -> Keys:
    """The way to a leaf from the key path that `jax.tree_util` gives."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def _is_box(x: Any) -> bool:
    """Whether it is one of Flax's metadata boxes (`Partitioned`, `LogicallyPartitioned`), told by their interface."""
    return hasattr(x, "unbox") and hasattr(x, "replace_boxed")


def _opened(x: Any) -> Any:
    # Not `unbox`, which may put a sharding constraint on what is no array.
    return jax.tree.leaves(x)[0] if _is_box(x) else x


def _closed(box: Any, value: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(box), [value]) if _is_box(box) else value
