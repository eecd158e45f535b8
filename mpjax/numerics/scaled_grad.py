"""Gradients through a scaled loss: the backward pass runs on loss × scale, and nobody else notices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from mpjax.core.types import PyTree
from mpjax.numerics.loss_scale import LossScale, at_least_float32


def scaled_value_and_grad(
    fun: Callable, loss_scale: LossScale, argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable:
    """`jax.value_and_grad` whose backward pass runs on the scaled loss: value and gradients come back unscaled, float32.

        value, grads = value_and_grad(scale · float32(fun(…)));  return value, float32(grads) / scale

    Args:
      fun: as for `jax.value_and_grad`: returns a scalar loss, or `(loss, aux)` with `has_aux`.
      loss_scale: one of the three; may be a traced part of a train state.
      argnums, has_aux: as for `jax.value_and_grad`.

    Returns:
      A function that returns `(value, grads)`, or `((value, aux), grads)`. `value` is not touched by the scale; a
      gradient leaf that overflowed is inf or NaN here, which `mpjax.all_finite(grads)` finds.

    >>> import jax.numpy as jnp
    >>> from mpjax.numerics.loss_scale import static_loss_scale
    >>> loss_fn = lambda w: w.astype(jnp.float16) * 2.0**-15 * 2.0**-15  # 2⁻³⁰ is zero in float16
    >>> float(jax.grad(loss_fn)(1.0)), float(scaled_value_and_grad(loss_fn, static_loss_scale(2.0**15))(1.0)[1]) == 2.0**-30
    (0.0, True)
    """

    differentiate = value_and_scaled_grad(fun, loss_scale, argnums, has_aux)

    def value_and_grad(*args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        value, grads = differentiate(*args, **kwargs)
        return value, loss_scale.unscale(grads)

    return value_and_grad


def value_and_scaled_grad(
    fun: Callable, loss_scale: LossScale, argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable:
    """As `scaled_value_and_grad`, but the gradients come back scaled, for a caller who adds several up first."""

    def scaled(*args: Any, **kwargs: Any) -> tuple[jax.Array, tuple]:
        out = fun(*args, **kwargs)
        value, aux = out if has_aux else (out, None)
        value = at_least_float32(value)
        return loss_scale.scale(value), (value, aux)

    differentiate = jax.value_and_grad(scaled, argnums, has_aux=True)

    def value_and_grad(*args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        (_, (value, aux)), grads = differentiate(*args, **kwargs)
        return ((value, aux) if has_aux else value), jax.tree.map(at_least_float32, grads)

    return value_and_grad
