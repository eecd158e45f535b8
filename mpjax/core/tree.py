"""Verbs over pytrees: cast, all_finite, select, nbytes, paths."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from mpjax.core.dtypes import canonical, is_float
from mpjax.core.types import DTypeLike, PyTree

_INDEXED = re.compile(r"_(?=\d+(?:_\d+)*(?:/|$))")


def cast_floating(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """Every real float array of `tree` in `dtype`; every other leaf as it came, by identity.

    Left alone: ints, bools, keys, complex, None, strings, Python scalars, float0. A float `ShapeDtypeStruct` is cast
    like its array. A leaf that already has the dtype is the very same object.

    >>> cast_floating({"w": np.ones(2, np.float32), "n": 3}, "bf16")["w"].dtype
    dtype(bfloat16)
    """
    dtype = canonical(dtype)
    return jax.tree.map(lambda x: _cast_leaf(x, dtype), tree)


def cast_by_path(tree: PyTree, dtype_of: Callable[[str], DTypeLike | None]) -> PyTree:
    """Each float leaf in the dtype that `dtype_of` gives for its canonical path (None: as it is)."""

    def leaf(keys: tuple, x: Any) -> Any:
        dtype = dtype_of(path_of(keys))
        return x if dtype is None else _cast_leaf(x, canonical(dtype))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Each float leaf of `tree` in the dtype of its twin in `like` (same structure)."""
    return jax.tree.map(lambda x, ref: _cast_leaf(x, ref.dtype) if is_float(ref) else x, tree, like)


def _cast_leaf(x: Any, dtype: np.dtype) -> Any:
    if not is_float(x) or x.dtype == dtype:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=dtype, weak_type=False)  # as `astype` leaves it
    return x.astype(dtype)


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether no element of any float or complex leaf is NaN or infinite; True for a tree without such leaves.

    >>> bool(all_finite({"a": np.ones(2), "b": np.float32("inf")}))
    False
    """
    leaves = [x for x in jax.tree.leaves(tree) if _is_inexact(x)]
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all() if leaves else jnp.array(True)


_SMALL = 2**16


def bundled(tree: PyTree) -> list[Any]:
    """The leaves, but small vectors of one dtype (biases, the scales of norms) joined to one, for reductions over them all.

    A GPU takes longer to start a reduction than to read 2^16 numbers, and each leaf takes two: the norm of the gradients of
    GPT-2's 148 leaves, and whether its new params are finite, were 248 launches a step. On one device only: GSPMD moved
    rows of a batch between devices for a gradient that was to be joined to others.

    >>> [x.shape for x in bundled([np.zeros(2), np.zeros((2, 2)), np.ones(3)])]
    [(2, 2), (5,)]
    """
    small: dict[Any, list[Any]] = {}
    rest = []
    for x in jax.tree.leaves(tree):
        if jnp.ndim(x) == 1 and jnp.size(x) <= _SMALL:
            small.setdefault(jnp.result_type(x), []).append(x)
        else:
            rest.append(x)
    return rest + [jnp.concatenate(some) if len(some) > 1 else some[0] for some in small.values()]


def _is_inexact(x: Any) -> bool:
    return isinstance(x, (float, complex)) or (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact))


def select_tree(pred: Bool[Array, ""], on_true: PyTree, on_false: PyTree) -> PyTree:
    """`on_true` where the scalar `pred` holds, else `on_false`, leaf by leaf; nothing is blended, so NaN cannot leak.

    Strings must be equal in both trees and are kept; Python numbers that differ are selected as arrays.

    Raises:
      ValueError: two strings differ.

    >>> select_tree(jnp.array(False), {"w": jnp.float32(jnp.nan)}, {"w": jnp.float32(1)})
    {'w': Array(1., dtype=float32)}
    """
    assert jnp.ndim(pred) == 0 and jnp.result_type(pred) == jnp.bool_, "expected boolean scalar"

    def leaf(new: Any, old: Any) -> Any:
        if hasattr(new, "dtype") and hasattr(old, "dtype"):
            return jax.lax.select(pred, new, old) if new.dtype != jax.dtypes.float0 else new
        if isinstance(new, str) or isinstance(old, str):
            if new != old:
                raise ValueError(
                    f"got {new!r} and {old!r} to select from; only arrays and numbers may differ, make them equal"
                )
        elif new is not old:
            return jax.lax.select(pred, jnp.asarray(new), jnp.asarray(old))
        return new

    return jax.tree.map(leaf, on_true, on_false)


def nbytes(tree: PyTree) -> int:
    """Bytes that the array leaves of `tree` take (arrays or `ShapeDtypeStruct`s); keys and scalars count nothing.

    >>> nbytes({"w": np.ones((2, 3), np.float16), "name": "x"})
    12
    """
    sized = [x for x in jax.tree.leaves(tree) if hasattr(x, "shape") and isinstance(x.dtype, np.dtype)]
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in sized)


def canonical_path(path: str) -> str:
    """One spelling for a module path: an index behind a name is a segment of its own.

    Linen names the members of a list `layers_0`, NNX has them at `layers/0`; both are `layers/0` here. A canonical path
    is its own canonical path, so that parts of one may be joined and spelled again.

    >>> canonical_path("layers_0/Dense_1/kernel")
    'layers/0/Dense/1/kernel'
    """
    return _INDEXED.sub("/", path)


def path_of(keys: tuple) -> str:
    """The canonical path of a leaf from the key path that `jax.tree_util` gives.

    >>> path_of(jax.tree_util.tree_flatten_with_path({"a_1": [0.0]})[0][0][0])
    'a/1/0'
    """
    return canonical_path(jax.tree_util.keystr(keys, simple=True, separator="/"))
