"""The leaves of a pytree as a checkpoint knows them: a path, a dtype, a shape; arrays for Orbax, numbers for JSON."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import jax
import numpy as np

from mpjax.core.tree import path_of
from mpjax.core.types import PyTree
from mpjax.store.trees import is_key, keys_of

NUMBERS: dict[str, type] = {"bool": bool, "int": int, "float": float}
"""Python numbers, which JSON holds exactly, by the dtype under which they stand."""

STORED = frozenset(
    {
        "bool", "int4", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bfloat16", "float16",
        "float32", "float64", "complex64", "complex128", "float4_e2m1fn", "float8_e3m4", "float8_e4m3b11fnuz",
        "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
    }
)  # fmt: skip
"""The dtypes that came back from Orbax bit for bit when each was tried; no other is written or believed."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What stands in a checkpoint about one leaf.

    Args:
      path: its canonical path, the same for Linen and NNX: `params/layers/0/kernel`.
      keys: the segments of the path as the tree spells them: `("params", "layers_0", "kernel")`.
      dtype: the name of a numpy dtype; of a Python number its type; of a key `key<IMPL>`.
      shape: of the array; of an array of keys, that of the keys.
      value: of a Python number, itself.
    """

    path: str
    keys: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    value: bool | int | float | None = None

    @property
    def is_key(self) -> bool:
        """Whether it is a typed key of jax.random."""
        return self.dtype.startswith("key<")

    @property
    def is_number(self) -> bool:
        """Whether it is a Python number."""
        return self.dtype in NUMBERS and self.value is not None

    @property
    def is_stored(self) -> bool:
        """Whether Orbax holds bytes of it; a number stands in the metadata, and an empty array has none."""
        return not self.is_number and math.prod(self.shape) > 0

    @property
    def name(self) -> str:
        """Its name in the Orbax tree: the path, with dots for slashes, and nothing in it that a file system minds."""
        return ".".join(quote(part, safe="").replace(".", "%2E") for part in self.path.split("/")) or "%"

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


def leaves_of(tree: PyTree) -> dict[str, tuple[Leaf, Any]]:
    """From path to (what it is, the leaf itself), in the tree's order.

    A path is canonical where that tells the leaves apart; leaves whose canonical paths are one (`a_1` beside `a/1`) go by
    the tree's own spelling.

    Raises:
      TypeError: a leaf that is no array and no number (a string, a function, an array of objects), or of a dtype that
        cannot be stored.

    >>> [str(leaf) for leaf, _ in leaves_of({"w": np.ones((2, 3), np.float16), "n": 3}).values()]
    ['int[]', 'float16[2, 3]']
    """
    keyed = jax.tree_util.tree_flatten_with_path(tree)[0]
    canonical = Counter(path_of(keys) for keys, _ in keyed)
    found = {}
    for keys, x in keyed:
        path = path_of(keys)
        path = path if canonical[path] == 1 else jax.tree_util.keystr(keys)
        found[path] = (_describe(path, keys_of(keys), x), x)
    return found


def _describe(path: str, keys: tuple[str, ...], x: Any) -> Leaf:
    if isinstance(x, bool | int | float) and not isinstance(x, np.generic):  # np.float64 is a float too
        return Leaf(path, keys, type(x).__name__, (), x)
    dtype = getattr(x, "dtype", None)
    if is_key(x):
        tag = str(dtype).removeprefix("key<").removesuffix(">")
        return Leaf(path, keys, f"key<{_IMPLS.get(tag, tag)}>", tuple(x.shape))
    if dtype is None or np.dtype(dtype).name not in STORED:
        raise TypeError(
            f"{path} is {'a' if dtype is None else 'an array of'} {type(x).__name__ if dtype is None else dtype}, which a "
            f"checkpoint does not hold; legal are numbers, keys, and arrays of {', '.join(sorted(STORED))}: leave it out, "
            "or make it one"
        )
    return Leaf(path, keys, np.dtype(dtype).name, tuple(x.shape))


_IMPLS = {"fry": "threefry2x32", "rbg": "rbg", "urbg": "unsafe_rbg"}
"""From the tag in a key's dtype to the name that `jax.random.wrap_key_data` takes."""


def to_arrays(leaves: Mapping[str, tuple[Leaf, Any]]) -> dict[str, Any]:
    """What Orbax is to write: from name to array, keys as their data, numpy's as copies that nobody else can change."""
    return {
        leaf.name: jax.random.key_data(x) if leaf.is_key else x if isinstance(x, jax.Array) else np.array(x)
        for leaf, x in leaves.values()
        if leaf.is_stored
    }


def leaf_to_words(leaf: Leaf) -> dict[str, Any]:
    """A leaf as JSON holds it."""
    words = dataclasses.asdict(leaf)
    return words if leaf.is_number else {key: value for key, value in words.items() if key != "value"}


def leaf_from_words(words: Mapping[str, Any]) -> Leaf:
    """The inverse of `leaf_to_words`.

    Raises:
      ValueError: it is no such dict, or has a dtype that no checkpoint of ours holds.
    """
    try:
        leaf = Leaf(
            str(words["path"]),
            tuple(map(str, words["keys"])),
            str(words["dtype"]),
            tuple(map(int, words["shape"])),
            words.get("value"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"got {words!r} for a leaf; legal is what a checkpoint writes") from error
    if leaf.dtype not in STORED and not leaf.is_key and type(leaf.value) is not NUMBERS.get(leaf.dtype):
        raise ValueError(f"{leaf.path} has the dtype {leaf.dtype!r}, which no checkpoint holds")
    return leaf
