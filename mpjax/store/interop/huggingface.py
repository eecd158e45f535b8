"""Safetensors that others wrote, one file or many, into a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mpjax.core.types import PyTree
from mpjax.store import tensors
from mpjax.store.interop.names import Imported, Names, import_into, parse_names

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
"""What Hugging Face calls the list of the shards, and the file where there is only one."""


def load_safetensors(path: str | os.PathLike | Sequence[str | os.PathLike], like: PyTree, names: Names) -> Imported:
    """Read safetensors that others wrote into a model, by a map of names; each param in the dtype that `like` has.

    A row of `names` is `(regex, path)` or `(regex, path, transform)`. The first row whose regex matches a tensor's whole
    name says which leaf of `like` it becomes (`params/h_\\\\1/mlp/kernel`; `\\\\1` is the regex's first group, an index may be
    written either way). A list of paths gives the tensor to each of them, or, with `"split"`, a part to each; None drops it.
    Transforms, one or a list that is worked off in order:

        transpose   the axes in reverse: torch keeps Linear as (out, in)
        conv        OIHW → HWIO, and OIW, OIDHW likewise
        split       cut along the last axis into as many equal parts as there are paths (a fused q, k, v)
        reshape     to the shape in `like`, where the number of elements agrees
        a function  from array to array

    Args:
      path: a file, several, a `model.safetensors.index.json`, or a folder with one of these.
      like: `(params, mstate)` of arrays or shapes, such as `jax.eval_shape(model.init, key, *sample)` of a wrapped model.
      names: the rows.

    Returns:
      `Imported(params, mstate, casts)`. bfloat16 and float16 are exact in float32 params; ints are never cast.

    Raises:
      FileNotFoundError: a file is not there.
      ValueError: no safetensors (a pickle is refused unread), or one error for all that does not fit: a param that no row
        fills, a tensor that no row takes, wrong shapes.

    >>> import jax, tempfile
    >>> from safetensors.numpy import save_file
    >>> like = {"Dense_0": {"kernel": jax.ShapeDtypeStruct((3, 2), "float32")}}, {}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"fc.0.weight": np.ones((2, 3), np.float16)}, f"{folder}/model.safetensors")
    ...     found = load_safetensors(folder, like, [(r"fc\\.(\\d+)\\.weight", r"params/Dense_\\1/kernel", "transpose")])
    >>> found.params["Dense_0"]["kernel"].shape, found.casts
    ((3, 2), {'params/Dense/0/kernel': ('float16', 'float32')})
    """
    rows = parse_names(names)
    where: dict[str, Path] = {}
    for file in _files(path):
        with tensors.opened(file) as opened:
            twice = sorted(where.keys() & set(opened.names))
            if twice:
                raise ValueError(
                    f"got {twice[0]} in {where[twice[0]]} and in {file}; legal is one of them; leave a file out"
                )
            where |= dict.fromkeys(opened.names, file)

    def read(wanted: list[str]) -> Mapping[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for file in dict.fromkeys(where[name] for name in wanted):
            with tensors.opened(file) as opened:
                found |= {name: opened.array(name) for name in wanted if where[name] == file}
        return found

    return import_into(like, where, read, rows, str(path) if isinstance(path, str | os.PathLike) else "these files")


def _files(path: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Path]:
    if not isinstance(path, str | os.PathLike):
        return [Path(one) for one in path]
    place = Path(path)
    if place.is_dir():
        if (place / INDEX).exists():
            return _shards(place / INDEX)
        files = [place / SINGLE] if (place / SINGLE).exists() else sorted(place.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"got the folder {place} without safetensors; legal is one with {SINGLE}, {INDEX} or *.safetensors "
                "(pickles are not read); convert or download them"
            )
        return files
    return _shards(place) if place.suffix == ".json" else [place]


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"got {index}, which is no index of shards ({error!r}); legal is Hugging Face's, with a weight_map from tensor to "
            "file; download it again"
        ) from error
    if outside:
        raise ValueError(
            f"got {index}, which names {outside[0]!r}; legal are files beside it; it is not read: mend the index"
        )
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise FileNotFoundError(f"got {index}, whose shard {missing[0]} is not beside it; download all {len(names)}")
    return [index.parent / name for name in names]
