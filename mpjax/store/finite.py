"""NaN and infinities in a state: looked for on the device, leaf by leaf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.policy.patterns import governs
from mpjax.store.leaves import Leaf
from mpjax.store.manifest import CheckpointError
from mpjax.store.trees import finite


def refuse_nonfinite(leaves: Mapping[str, tuple[Leaf, Any]], allow: bool | Sequence[str]) -> None:
    """Refuse leaves that hold a NaN or an infinity.

    Args:
      leaves: as `leaves_of` gives them.
      allow: True: any may; or globs over the paths of those that may.

    Raises:
      CheckpointError: it names the paths.
    """
    if allow is True:
        return
    globs = [] if allow is False else [allow] if isinstance(allow, str) else list(allow)
    bad = [path for path in _nonfinite_paths(leaves) if not any(governs(glob, path, {}) for glob in globs)]
    if bad:
        raise CheckpointError(
            f"the state is not finite, in {', '.join(bad)}; a run that goes on from it is lost: save an earlier state, or name "
            "the paths in allow_nonfinite if it belongs there"
        )


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return finite(x).all()


def _nonfinite_paths(leaves: Mapping[str, tuple[Leaf, Any]]) -> Sequence[str]:
    """The paths of the leaves that hold a NaN or an infinity."""
    asked = {
        path: _all_finite(x) if isinstance(x, jax.Array) else bool(finite(np.asarray(x)).all())
        for path, (leaf, x) in leaves.items()
        if not leaf.is_key and (leaf.dtype == "float" or _is_inexact(leaf))
    }
    return [path for path, is_finite in jax.device_get(asked).items() if not is_finite]


def _is_inexact(leaf: Leaf) -> bool:
    return not leaf.is_number and jnp.issubdtype(np.dtype(leaf.dtype), jnp.inexact)
