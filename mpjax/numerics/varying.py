"""Arrays in a `jax.shard_map`: over which axes of the mesh each may differ from device to device."""

from __future__ import annotations

from typing import Any

import jax


def varying_alike(*arrays: Any) -> tuple[Any, ...]:
    """The same arrays, each varying over every axis over which one of them does; None stays None.

    `jax.lax`'s own operations do this by themselves. A function with a gradient of its own must hand each gradient back as
    its argument came, and a scan its carry; and what this adds is, backward, the sum over devices that is then due.

    >>> varying_alike(1.0, None)
    (1.0, None)
    """
    axes = [frozenset() if x is None else jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = frozenset().union(*axes)
    missing = [tuple(sorted(every - own)) for own in axes]
    return tuple(
        jax.lax.pcast(x, more, to="varying") if more and x is not None else x
        for x, more in zip(arrays, missing, strict=True)
    )
