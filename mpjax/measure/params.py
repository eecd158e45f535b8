"""How many params a model has, in which dtypes, and where."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np

from mpjax.core.tree import path_of
from mpjax.core.types import Params


@dataclasses.dataclass(frozen=True)
class ParamCount:
    """The params of one top-level module: how many numbers, and from dtype to their bytes."""

    module: str
    count: int
    bytes_by_dtype: Mapping[str, int]


def count_params(params: Params) -> tuple[ParamCount, ...]:
    """The params by the first segment of their canonical path, in the order of the tree.

    A list of layers is one module (`layers`), a scanned stack too. Param arrays at the root stand under their own name.

    >>> count_params({"head": {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)}})
    (ParamCount(module='head', count=9, bytes_by_dtype={'float32': 36}),)
    """
    counts: dict[str, int] = {}
    sizes: dict[str, collections.Counter[str]] = {}
    for keys, x in jax.tree_util.tree_flatten_with_path(params)[0]:
        module, n = path_of(keys).partition("/")[0], math.prod(np.shape(x))
        counts[module] = counts.get(module, 0) + n
        sizes.setdefault(module, collections.Counter())[x.dtype.name] += n * x.dtype.itemsize
    return tuple(ParamCount(module, n, dict(sizes[module])) for module, n in counts.items())
