"""The way back: from an exported file to the variables of a model."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.core.dtypes import canonical, is_float
from mpjax.core.types import DTypeLike, MState, Params, PyTree
from mpjax.store import tensors
from mpjax.store.export.formats import KIND, VERSION, dequantise
from mpjax.store.trees import as_jax, by_path, cast_finite, listed, nested, pair, put_into


@dataclasses.dataclass(frozen=True)
class Exported:
    """What `load_export` read.

    Args:
      params: nested dicts with the keys that were exported, or the structure of `like`.
      mstate: likewise; `{}` where none was exported.
      policy: the policy it was exported with, in words (`mpjax.policy.written`); None where none was given.
      formats: from a tensor's name in the file to the format it is stored in.

    >>> Exported({"w": np.ones(2)}, {}).formats
    {}
    """

    params: Params
    mstate: MState
    policy: dict[str, Any] | None = None
    formats: dict[str, str] = dataclasses.field(default_factory=dict)


def load_export(path: str | os.PathLike, like: PyTree = None, *, dtype: DTypeLike | None = None) -> Exported:
    """Read weights that `export_weights` wrote.

    float8 and int8 come back multiplied out in float32; all else in the dtype in which it is stored.

    Args:
      path: of the file.
      like: `(params, mstate)` of arrays or shapes, such as `jax.eval_shape(model.init, key, *sample)` or `forward.like`:
        what was read takes its structure and its float dtypes. Paths are compared as a policy map spells them, so Linen's
        `layers_0` fits NNX's `layers/0`.
      dtype: of all float params, by name or not, instead of those of the file. With `like` there is none to choose.

    Returns:
      `Exported(params, mstate, policy, formats)`, of jax arrays. Without `like`, params and mstate are nested dicts as
      `model.apply` takes them, and `model.merge` of an NNX model. (Of a checkpoint of Linen's boxes, and of a State of NNX,
      each array lies one key deeper, under `value`: give `like`.)

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no such file, is damaged, or does not fit `like` or `dtype`. A pickle is refused unread.

    >>> import tempfile
    >>> from mpjax.store.export.weights import export_weights
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = export_weights({"w": jnp.ones(3)}, f"{folder}/net.safetensors", "bfloat16", policy="mixed_bfloat16")
    ...     found = load_export(f"{folder}/net.safetensors")
    >>> found.params["w"].dtype, found.policy["default"]
    (dtype(bfloat16), 'p=full,c=bf16,o=full')
    """
    file = Path(path)
    if like is not None and dtype is not None:
        raise ValueError("got both like= and dtype=; `like` has dtypes of its own; leave one of them out")
    arrays, metadata = tensors.read(file)
    tensors.check_kind(file, metadata, KIND, VERSION)
    try:
        entries, policy = json.loads(metadata["tensors"]), json.loads(metadata["policy"])
        leaves = {tuple(entry["keys"]): _read(arrays, name, entry) for name, entry in entries.items()}
        formats = {name: entry["format"] for name, entry in entries.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"got {file}, whose metadata are not what mpjax writes ({error!r}); legal is a file of mpjax.export_weights; export "
            "it again"
        ) from error
    if like is not None:
        params, mstate = pair(like)
        mend = "export params and mstate of the same model, or give the `like` of the model that was exported"
        filled, _ = put_into({"params": params, "mstate": mstate}, by_path(leaves), str(file), mend)
        return Exported(filled["params"], filled["mstate"], policy, formats)
    if dtype is not None:
        chosen = canonical(dtype)
        floats = [keys for keys, x in leaves.items() if keys[0] == "params" and is_float(x)]
        leaves |= {keys: cast_finite(leaves[keys], chosen) for keys in floats}
        beyond = ["/".join(keys) for keys in floats if leaves[keys] is None]
        if beyond:
            raise ValueError(
                f"got dtype={chosen.name}, which cannot hold {listed(beyond)}; legal is one that holds all float params; give a "
                "wider one, or `like` with a dtype for each"
            )
    whole = nested({keys: as_jax(value, "/".join(keys)) for keys, value in leaves.items()})
    return Exported(whole.get("params", {}), whole.get("mstate", {}), policy, formats)


def _read(arrays: Mapping[str, np.ndarray], name: str, entry: Mapping[str, Any]) -> Any:
    if entry["format"] == "key":
        return jax.random.wrap_key_data(jnp.asarray(arrays[name]), impl=entry["key_impl"])
    return dequantise(arrays[name], arrays[entry["scale"]]) if "scale" in entry else arrays[name]
