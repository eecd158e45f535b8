"""What the weight of an example does to its loss: zero takes it out, value and gradient, whatever stands in it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float


def sum_and_weight(losses: ArrayLike, weights: ArrayLike) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The pair `(Σ losses, Σ weights)` in float32, from which `make_train_step` takes an exact weighted mean.

    Args:
      losses: `[...]`, already multiplied by `weights`, as the functions of `mpjax.losses` return them.
      weights: `[...]`, float, int or bool: the same that were given to the loss.

    Returns:
      `(sum, weight)`, two scalars, float32 (float64 for float64 losses).

    Raises:
      ValueError: shapes that differ.

    >>> import mpjax
    >>> mask = jnp.array([True, True, False])
    >>> losses = mpjax.losses.squared_error(jnp.array([1.0, 3.0, jnp.nan]), jnp.zeros(3), mask)
    >>> mpjax.losses.sum_and_weight(losses, mask)
    (Array(10., dtype=float32), Array(2., dtype=float32))
    """
    losses, weights = jnp.asarray(losses), jnp.asarray(weights)
    if losses.shape != weights.shape:
        raise ValueError(
            f"losses are {shown(losses)} and weights {shown(weights)}; legal is one weight for each loss; "
            "give the weights that the loss function was given"
        )
    return wide(losses).sum(), weights.astype(wide_dtype(losses)).sum()


def checked_weights(weights: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
    """The weights as an array of exactly this shape: the sum of a broadcast weight is not the weight of the sum."""
    if weights is None:
        return None
    weights = jnp.asarray(weights)
    if weights.shape != shape or jnp.issubdtype(weights.dtype, jnp.complexfloating):
        raise ValueError(
            f"weights are {shown(weights)}; legal is one real weight for each loss, {list(shape)}; "
            "broadcast them with jnp.broadcast_to"
        )
    return weights


def present(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """`x` with 0 where the weight is 0: put in before the loss, since 0 · NaN in the backward pass would be NaN.

    >>> present(jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf]]), jnp.array([0.5, 0.0]))
    Array([[1., 2.],
           [0., 0.]], dtype=float32)
    """
    if weights is None:
        return x
    counts = weights.astype(bool).reshape(weights.shape + (1,) * (x.ndim - weights.ndim))  # NaN counts
    return jnp.where(counts, x, jnp.zeros_like(x))


def weighted(losses: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Each loss times its weight; exactly 0, and flat, where the weight is 0."""
    return losses if weights is None else present(losses * weights.astype(losses.dtype), weights)


def wide_dtype(x: jax.Array) -> np.dtype:
    """The dtype in which a loss of `x` is reduced: float64 for float64, float32 for everything else."""
    return jnp.dtype("float64" if x.dtype == "float64" else "float32")


def wide(x: jax.Array) -> jax.Array:
    """`x` in the dtype in which it is reduced."""
    return x.astype(wide_dtype(x))


def shown(x: jax.Array) -> str:
    """An array in an error message.

    >>> shown(jnp.zeros((2, 3), jnp.bfloat16))
    'bfloat16[2, 3]'
    """
    return f"{x.dtype}{list(x.shape)}"
