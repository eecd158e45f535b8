"""What a backward pass keeps of the forward pass, in bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex

from mpjax.core.tree import nbytes


def saved_residual_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """Bytes that the backward pass of `fn` keeps from its forward pass, beyond the arguments and constants themselves.

    `jax.vjp` is traced abstractly: its pullback is a pytree whose leaves are what is kept. A leaf that is an argument,
    or an array that `fn` closes over, costs nothing more and is not counted; the same array kept twice counts once. It
    is the sum of what `jax.ad_checkpoint.print_saved_residuals` prints, whose data jax does not give out. XLA may keep
    less (it rematerialises), not know of more.

    Args:
      fn: any differentiable function.
      *args: its arguments, arrays or `ShapeDtypeStruct`s.

    >>> import jax.numpy as jnp
    >>> saved_residual_bytes(lambda x: jnp.exp(x).sum(), jnp.ones(8, jnp.float32))
    32
    """
    closed = jax.make_jaxpr(lambda *args: jax.tree.leaves(jax.vjp(fn, *args)[1]))(*args)
    given = {*closed.jaxpr.invars, *closed.jaxpr.constvars}
    kept = {v for v in closed.jaxpr.outvars if not isinstance(v, jex.Literal) and v not in given}
    return nbytes([v.aval for v in kept])
