"""Weights for serving: a safetensors file that says by itself how each tensor is stored."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mpjax.core.dtypes import is_float
from mpjax.core.tree import canonical_path
from mpjax.core.types import MState, Params
from mpjax.policy.written import policy_to_words
from mpjax.store import tensors
from mpjax.store.export.formats import (
    KIND,
    VERSION,
    formats_by_path,
)
from mpjax.store.export.report import ExportReport, TensorReport, errors
from mpjax.store.export.storing import Stored, as_array, is_weight, store
from mpjax.store.trees import Keys, as_jax, is_key, named_leaves, refilled


def export_weights(
    params: Params,
    path: str | os.PathLike,
    to: str | Mapping[str, str] = "bfloat16",
    *,
    mstate: MState | None = None,
    policy: Any = None,
    per: Literal["channel", "tensor"] = "channel",
    metric: Callable[[Params], Mapping[str, float]] | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write params, and what else serving needs, as one safetensors file, and say what that cost.

        float32, bfloat16, float16    rounded to nearest
        float8_e4m3, int8             stored = round(x / scale), scale = max|x| / 448 or 127, in float32

    Under float8 and int8, biases and norms keep float32 (what has fewer than two dimensions, or is called `bias` or
    `scale`): they are few, and their errors reach every output. `mstate` (batch statistics) keeps its dtypes whatever `to`
    says, and so do ints, bools and keys. The channel axis is a kernel's last, the output (so heads of an attention share
    theirs); an `embedding` has a scale for each row. The file is written under a temporary name and renamed when it is on
    disk. Plain safetensors reads it: a tensor of float8 or int8 has its scale beside it as `<name>.scale`, to be multiplied
    by broadcasting.

    Args:
      params: any pytree of arrays.
      path: of the file to write.
      to: `float32`, `bfloat16`, `float16`, `float8_e4m3` or `int8`; or a mapping from glob to one of them, as in a policy
        map: `{"head": "float32", "**": "int8"}`. The first that names a weight or a module around it holds; what none
        names keeps float32.
      mstate: what the model needs beside its params.
      policy: under which the model computes (`model.policy`, or text): kept in words.
      per: a scale for each output channel, or for each whole tensor.
      metric: such as an accuracy on held-out data; called with the params as given and as they will be read back, both in
        the dtypes given.
      overwrite: whether an existing file may be replaced.

    Returns:
      The report: `print` it.

    Raises:
      ValueError: NaN or infinity in a weight, or one that the format cannot hold, with its path; an unknown format; a rule
        that acts nowhere; an existing file; a whole train state.
      OSError: the file could not be written; nothing is left behind.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> report = export_weights({"Dense_0": {"kernel": np.ones((8, 4), np.float32)}}, f"{folder.name}/net.safetensors", "int8")
    >>> report.bytes_before, report.bytes_after
    (128, 48)
    >>> folder.cleanup()
    """
    if per not in ("channel", "tensor"):
        raise ValueError(f"got per={per!r}; legal are 'channel' and 'tensor'; name one")
    if hasattr(params, "opt_state"):  # its moments would be written as weights, and quantised
        raise ValueError(
            f"got a {type(params).__name__} for params; legal are params alone: give state.params, or state.averaged_params"
        )
    target = Path(path)
    leaves = named_leaves({"params": params, "mstate": {} if mstate is None else mstate})
    names = _names(leaves)
    weights = {keys: canonical_path(_below(keys)) for keys, leaf in leaves.items() if is_weight(keys, leaf)}
    formats = formats_by_path(to, list(weights.values()))
    asked = {keys: formats[path] for keys, path in weights.items()}
    arrays: dict[str, np.ndarray] = {}
    entries: dict[str, Any] = {}
    rows, back = [], dict[Keys, Any]()
    for keys, leaf in leaves.items():
        name = names[keys]
        stored = store(name, leaf, asked.get(keys), per)
        if stored.scale is not None and f"{name}.scale" in names.values():
            raise ValueError(f"got a leaf called {name}.scale, where the scale of {name} is to stand; rename it")
        entries[name] = {"keys": keys, "format": stored.format, **stored.more}
        arrays[name] = stored.array
        if stored.scale is not None:
            arrays[f"{name}.scale"] = stored.scale
            entries[name] |= {"scale": f"{name}.scale", "per": per}
        back[keys] = stored.read_back() if keys in asked else leaf
        rows.append(_row(name, leaf, back[keys], stored))
    metadata = {
        "kind": KIND,
        "version": str(VERSION),
        "policy": json.dumps(words_of(policy)),
        "tensors": json.dumps(entries),
    }
    before = None if metric is None else dict(metric(params))
    after = None if metric is None else dict(metric(_as_given(params, back)))
    tensors.write(target, arrays, metadata, overwrite)
    return ExportReport(str(target), tuple(rows), before, after)


def words_of(policy: Any) -> dict[str, Any] | None:
    """A policy in words, see `mpjax.policy.written`; what is in words already, as a checkpoint has it, stays; None for None.

    >>> words_of("mixed_bfloat16")["default"]
    'p=full,c=bf16,o=full'
    """
    in_words = isinstance(policy, Mapping) and policy.keys() == {"default", "rules", "islands"}
    return None if policy is None else dict(policy) if in_words else policy_to_words(policy)


def _row(name: str, leaf: Any, back: Any, stored: Stored) -> TensorReport:
    after = stored.array.nbytes + (0 if stored.scale is None else stored.scale.nbytes)
    if is_key(leaf):
        return TensorReport(name, tuple(leaf.shape), str(leaf.dtype), stored.format, stored.array.nbytes, after)
    x = as_array(leaf)
    cost = (math.inf, 0.0) if back is leaf else errors(x, back)
    return TensorReport(name, x.shape, x.dtype.name, stored.format, x.nbytes, after, *cost, stored.note)


def _names(leaves: Mapping[Keys, Any]) -> dict[Keys, str]:
    names = {keys: "/".join(keys) for keys in leaves}
    if len(set(names.values())) < len(names):
        twice = sorted(name for name in names.values() if list(names.values()).count(name) > 1)
        raise ValueError(
            f"got two leaves with the path {twice[0]}; legal is a path for each; rename a key that holds a slash"
        )
    return names


def _below(keys: Keys) -> str:
    return "/".join(keys[1:])


def _as_given(params: Params, back: Mapping[Keys, Any]) -> Params:
    """What will be read back, in the structure and dtypes that were given."""
    given = named_leaves(params)
    leaves = {keys: back["params", *keys] for keys in given}
    cast = {keys: x.astype(given[keys].dtype) if is_float(given[keys]) else x for keys, x in leaves.items()}
    return refilled(params, {keys: as_jax(x, "/".join(keys)) for keys, x in cast.items()})
