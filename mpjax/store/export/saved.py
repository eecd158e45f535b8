"""What a checkpoint has for serving: params, or their average, and mstate, under the keys that they had."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpjax.core.dtypes import is_float
from mpjax.core.types import MState, Params
from mpjax.store.checkpoint import Checkpointer
from mpjax.store.manifest import CheckpointError
from mpjax.store.matching import read_leaves
from mpjax.store.meta import CheckpointInfo
from mpjax.store.saving import ARRAYS
from mpjax.store.trees import listed, nested


def saved_weights(
    checkpointer: Checkpointer, step: int | None = None, *, averaged: bool = True
) -> tuple[Params, MState, CheckpointInfo]:
    """The weights of a step, verified; nothing else of it is read.

    Args:
      checkpointer: of the directory.
      step: its number; None: the newest that is whole.
      averaged: take the moving average of the params where there is one, as `mpjax.evaluate` does.

    Returns:
      (params, mstate) as nested dicts, and what the step says of itself.

    Raises:
      FileNotFoundError: there is no such step.
      CheckpointError: it is damaged, or holds no params.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpointer = Checkpointer(folder)
    ...     _ = checkpointer.save({"params": {"layers_0": {"w": np.ones(2)}}, "opt_state": np.ones(2)}, step=3)
    ...     params, mstate, info = saved_weights(checkpointer)
    >>> params, mstate, info.step
    ({'layers_0': {'w': array([1., 1.])}}, {}, 3)
    """
    info = checkpointer.info(step)
    served = {leaf.keys: leaf for leaf in info.leaves.values() if leaf.keys[:1] in (("params",), ("mstate",))}
    if not any(keys[0] == "params" for keys in served):
        raise CheckpointError(
            f"step {info.step} has no params; legal is a state with params/..., such as a TrainState; it has "
            f"{listed(list(info.leaves))}: export its arrays by mpjax.export_weights"
        )
    sources = {keys: leaf.path for keys, leaf in served.items()}
    if averaged:
        sources |= {("params", *leaf.keys[1:]): path for path, leaf in info.leaves.items() if leaf.keys[:1] == ("ema",)}
    there = {path: info.leaves[path] for path in sources.values()}
    found = read_leaves(checkpointer.directory / str(info.step) / ARRAYS, there, dict.fromkeys(there, np.empty(0)))
    # An average is of float32 where its params are narrower.
    whole = nested({keys: _in(served[keys].dtype, found[path]) for keys, path in sources.items()})
    return whole["params"], whole.get("mstate", {}), info


def _in(dtype: str, x: Any) -> Any:
    return x.astype(np.dtype(dtype)) if is_float(x) else x
