"""A map from the names that others gave to the paths of a model, with what must be done to an array on the way."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from mpjax.core.tree import canonical_path
from mpjax.core.types import MState, Params, PyTree
from mpjax.store.trees import Casts, named_leaves, pair, put_into

Names: TypeAlias = Sequence[Any]
"""Rows of `(regex, path)` or `(regex, path, transform)`; see `mpjax.load_safetensors`."""

TRANSFORMS = ("transpose", "conv", "split", "reshape")


@dataclasses.dataclass(frozen=True)
class Imported:
    """What was read from a file of others.

    Args:
      params: in the structure and dtypes of `like`.
      mstate: likewise.
      casts: from path to the dtypes before and after, for each array that was cast.

    >>> Imported({}, {}, {"params/w": ("bfloat16", "float32")}).casts
    {'params/w': ('bfloat16', 'float32')}
    """

    params: Params
    mstate: MState
    casts: Casts


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a map, parsed. `paths` is empty for a row that drops what it names."""

    pattern: re.Pattern[str]
    paths: tuple[str, ...]
    transforms: tuple[Any, ...]

    def paths_for(self, name: str) -> list[str] | None:
        """Where the array of this name goes; None where the row does not name it."""
        match = self.pattern.fullmatch(name)
        try:
            return None if match is None else [match.expand(path) for path in self.paths]
        except (re.error, IndexError) as error:
            raise ValueError(
                f"got the paths {list(self.paths)} for {name} ({error}); legal are groups that {self.pattern.pattern!r} has; "
                "mend the row"
            ) from error


def parse_names(names: Names) -> list[Row]:
    """The rows of a map.

    Raises:
      ValueError: one that is none; the message shows it.

    >>> parse_names([(r"h\\.(\\d+)\\.w", r"params/h_\\1/kernel", "transpose")])[0].paths_for("h.7.w")
    ['params/h_7/kernel']
    """
    return [_parse(row) for row in names]


def _parse(row: Any) -> Row:
    legal = (
        "legal is (regex, path), (regex, path, transform), or (regex, None) to drop it; path may be a list, transform one of "
        f"{', '.join(TRANSFORMS)}, a function from array to array, or a list of such; mend this row"
    )
    if not isinstance(row, tuple | list) or len(row) not in (2, 3):
        raise ValueError(f"got {row!r} as a row of names; {legal}")
    pattern, paths, transforms = row[0], *(_listed(x) for x in (*row[1:], None)[:2])
    known = all(callable(t) or t in TRANSFORMS for t in transforms)
    if not known or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"got {row!r} as a row of names; {legal}")
    try:
        return Row(re.compile(pattern), paths, transforms)
    except (re.error, TypeError) as error:
        raise ValueError(f"got {pattern!r} as the regex of a row of names, which is none ({error}); {legal}") from error


def _listed(x: Any) -> tuple:
    return () if x is None else tuple(x) if isinstance(x, list | tuple) else (x,)


def import_into(
    like: PyTree,
    available: Iterable[str],
    read: Callable[[list[str]], Mapping[str, np.ndarray]],
    rows: Sequence[Row],
    source: str,
    keep_names: bool = False,
) -> Imported:
    """Fill `like` from named arrays.

    Args:
      like: `(params, mstate)` of arrays or shapes.
      available: the names that there are.
      read: reads the arrays of some of them.
      rows: which name goes where: the first row that names it holds.
      source: what is read, for errors.
      keep_names: whether a name that no row has is taken for a path.

    Raises:
      ValueError: one error for all that does not fit.
    """
    params, mstate = pair(like)
    whole = {"params": params, **mstate}
    wanted = {canonical_path("/".join(keys)): tuple(leaf.shape) for keys, leaf in named_leaves(whole).items()}
    plan: dict[str, tuple[list[str], tuple]] = {}
    found: dict[str, Any] = {}
    troubles: list[str] = []
    for name in available:
        row = next((row for row in rows if row.pattern.fullmatch(name)), None)
        paths = row.paths_for(name) if row else [name] if keep_names else None
        if paths is None:
            found[f"{name} (no row of names has it)"] = None
        elif paths:
            plan[name] = ([canonical_path(path) for path in paths], row.transforms if row else ())
    readable = [name for name, (paths, _) in plan.items() if any(path in wanted for path in paths)]
    arrays = read(readable)
    for name, (paths, transforms) in plan.items():
        shapes = [wanted.get(path) for path in paths]
        parts: Sequence[Any] = [None] * len(paths)
        if name in arrays:
            try:
                parts = transformed(arrays[name], transforms, shapes)
            except Exception as error:  # a user's own function may raise anything
                troubles.append(f"{name} {_told(transforms)}: {error}")
                parts = [np.zeros(shape or ()) for shape in shapes]  # taken, so not missing as well
        for path, part in zip(paths, parts, strict=True):
            if path in found:
                troubles.append(f"{path} is given twice, by {name} too")
            found[path if path in wanted else f"{path} (from {name})"] = part
    mend = (
        "add or mend rows of names; (regex, None) drops what is not wanted. A path is that of the model's variables: "
        "params/..., batch_stats/..."
    )
    filled, casts = put_into(whole, found, source, mend, troubles)
    return Imported(filled.pop("params"), filled, casts)


def transformed(array: np.ndarray, transforms: Sequence[Any], shapes: Sequence[Any]) -> list[np.ndarray]:
    """The array as each of its paths gets it.

        transpose   the axes in reverse: torch keeps Linear as (out, in)
        conv        OIHW → HWIO, and OIW, OIDHW likewise
        split       cut along the last axis into as many equal parts as there are paths
        reshape     to the shape in `like`, where the number of elements agrees
        a function  whatever it does

    Without `split`, each of several paths gets the whole array (tied weights).

    >>> [x.tolist() for x in transformed(np.arange(4), ["split", "reshape"], [(2, 1), (2,)])]
    [[[0], [1]], [2, 3]]
    """
    parts = [array]
    for transform in transforms:
        if transform == "split":
            if len(parts) > 1 or len(shapes) < 2:
                raise ValueError("split cuts one array for several paths, once; list the paths, and split once")
            parts = np.split(parts[0], len(shapes), axis=-1)
        elif transform == "reshape":
            parts = parts * len(shapes) if len(parts) < len(shapes) else parts
            parts = [x if shape is None else x.reshape(shape) for x, shape in zip(parts, shapes, strict=True)]
        else:
            parts = [_one(x, transform) for x in parts]
    return parts * len(shapes) if len(parts) < len(shapes) else parts


def _one(x: np.ndarray, transform: Any) -> np.ndarray:
    if transform == "transpose":
        return x.T
    if transform == "conv":
        if x.ndim < 3:
            raise ValueError(f"conv takes a kernel of three or more dimensions, not {x.shape}")
        return np.moveaxis(x, (1, 0), (-2, -1))
    return np.asarray(transform(x))


def _told(transforms: Sequence[Any]) -> str:
    return "under " + ", ".join(t if isinstance(t, str) else getattr(t, "__name__", "a function") for t in transforms)
