"""An Orbax tree that others wrote, into a model: in the dtypes in which it is stored, and no other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpjax.core.types import PyTree
from mpjax.store.interop.names import Imported, Names, import_into, parse_names
from mpjax.store.trees import named_leaves


def load_orbax(path: str | os.PathLike, like: PyTree, rename: Names = ()) -> Imported:
    """Read an Orbax checkpoint that others wrote into a model; each param in the dtype that `like` has.

    What StandardCheckpointer, PyTreeCheckpointer and CheckpointManager (`3/default`) of Orbax wrote is read. Orbax itself
    casts to whatever dtype it is asked for, an int to a float that cannot hold it among them; here arrays are read as they
    are stored, then floats are cast, and the result says which. Only what goes into `like` is read.

    Args:
      path: the folder of the tree, or of a step with one item in it.
      like: `(params, mstate)` of arrays or shapes, such as `jax.eval_shape(model.init, key, *sample)` of a wrapped model.
      rename: rows of `(regex, path)` or `(regex, path, transform)` as in `mpjax.load_safetensors`, over paths such as
        `params/Dense_0/kernel`; `(regex, None)` drops what is not wanted, an optimizer's state. A path that no row has is kept:
        `params/...` for params, `batch_stats/...` and the like for mstate. `("(.*)", r"params/\\1")` takes a tree that is
        params alone.

    Returns:
      `Imported(params, mstate, casts)`.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it is none of these, or one error for all that does not fit.

    >>> import orbax.checkpoint as ocp, tempfile
    >>> with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as theirs:
    ...     theirs.save(f"{folder}/theirs", {"params": {"w": np.ones(2, np.float32)}, "step": np.int32(7)})
    ...     theirs.wait_until_finished()
    ...     like = {"w": jax.ShapeDtypeStruct((2,), "bfloat16")}, {}
    ...     found = load_orbax(f"{folder}/theirs", like, [("step", None)])
    >>> found.params["w"].dtype, found.casts
    (dtype(bfloat16), {'params/w': ('float32', 'bfloat16')})
    """
    import orbax.checkpoint as ocp

    rows = parse_names(rename)
    folder = _item(Path(path).absolute())
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as theirs:
        try:
            stored = theirs.metadata(folder).item_metadata
            tree = getattr(stored, "tree", stored)
        except Exception as error:
            raise _unreadable(folder, error) from error
        names = {keys: "/".join(keys) for keys in named_leaves(tree)}

        def read(wanted: list[str]) -> Mapping[str, np.ndarray]:
            structure = jax.tree.structure(tree)
            chosen = set(wanted)
            item = [0 if name in chosen else ocp.PLACEHOLDER for name in names.values()]
            how = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(item)
            args = ocp.args.PyTreeRestore(
                item=jax.tree.unflatten(structure, item), restore_args=jax.tree.unflatten(structure, how)
            )
            try:
                found = named_leaves(theirs.restore(folder, args=args))
            except Exception as error:
                raise _unreadable(folder, error) from error
            return {names[keys]: np.asarray(x) for keys, x in found.items() if names[keys] in chosen}

        return import_into(like, names.values(), read, rows, str(path), keep_names=True)


def _item(folder: Path) -> Path:
    """The folder that holds the tree: this one, or the only item of a step."""
    if not folder.is_dir():
        raise FileNotFoundError(f"got {folder}, where no folder is; legal is one that Orbax wrote; mend the path")
    items = [folder] if _holds_tree(folder) else sorted(below for below in folder.iterdir() if _holds_tree(below))
    if len(items) == 1:
        return items[0]
    deeper = sorted(found.parent.relative_to(folder).as_posix() for found in folder.glob("*/*/_METADATA"))
    has = f"several items: {', '.join(item.name for item in items)}" if items else "no tree of Orbax (no _METADATA)"
    below = f" (below it: {', '.join(deeper)})" if deeper else ""
    raise ValueError(f"got {folder}, which holds {has}{below}; legal is the folder of one tree; name it")


def _holds_tree(folder: Path) -> bool:
    return (folder / "_METADATA").is_file()


def _unreadable(folder: Any, error: Exception) -> ValueError:
    first = str(error).strip().partition("\n")[0]
    return ValueError(
        f"got {folder}, which Orbax cannot read ({first}); legal is a whole checkpoint; try an older step"
    )
