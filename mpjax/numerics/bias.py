"""The gradient of a bias: a sum over all rows of a batch, in float32 where the layer computes in half."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


@jax.custom_jvp
def has_added(out: jax.Array, bias: jax.Array) -> jax.Array:
    """`out`, to which a layer has added `bias` in half, behind a `stop_gradient`: its derivative by `bias` is given here.

    jax undoes a broadcast by a sum in the dtype that was broadcast, and for an H100 XLA adds up in that dtype: of 4,096 rows
    in bfloat16 128 one after another, so that rows of 0.3 come to 0.27 each. PyTorch adds up in float32, and so does this.
    The forward pass is as it was.

    Args:
      out: `(..., *bias.shape)`, in half precision.
      bias: `bias.shape`, as the params have it: float32 as a rule.

    Returns:
      `out`. Its tangent is `out`'s own and, row by row, that of `bias`.

    >>> rows = jnp.full((4096, 1), 0.3, jnp.bfloat16)
    >>> _, gradient = jax.vjp(lambda bias: has_added(rows, bias), jnp.zeros(1))
    >>> float(gradient(rows)[0][0] / 4096) == float(rows[0, 0])
    True
    """
    del bias
    return out


def _tangents(primals: tuple, tangents: tuple) -> tuple[jax.Array, Any]:
    (out, bias), (by_out, by_bias) = primals, tangents
    out = has_added(out, bias)  # not the bare array, which has no second derivative
    if isinstance(by_bias, SymbolicZero):
        return out, by_out
    if isinstance(by_out, SymbolicZero):
        by_out = jnp.zeros_like(out)
    wide = jnp.promote_types(bias.dtype, jnp.float32)
    added = jnp.reshape(by_bias, (1,) * (out.ndim - bias.ndim) + bias.shape).astype(wide)
    return out, (by_out.astype(wide) + added).astype(out.dtype)


has_added.defjvp(_tangents, symbolic_zeros=True)
