"""To eight bits and back: a scale for a tensor (or for each of its rows), and the rounded values."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.core.dtypes import facts


def largest(x: jax.Array, axes: Sequence[int] | None = None) -> jax.Array:
    """The largest magnitude in float32, of the whole tensor or over some axes, which stay with length 1; NaN if one is there.

    >>> largest(jnp.array([1.0, -3.0], jnp.bfloat16))
    Array(3., dtype=float32)
    """
    most = jnp.max(jnp.abs(x), axis=None if axes is None else tuple(axes), keepdims=axes is not None, initial=0)
    return most.astype(jnp.float32)


def exponent(most: jax.Array) -> jax.Array:
    """The stored exponent of a non-negative float32, 0 to 255: `2^(e-127) <= most < 2^(e-126)`, 0 for zero.

    >>> exponent(jnp.float32([0.0, 1.0, 1.9, 2.0, jnp.inf])).tolist()
    [0, 127, 127, 128, 255]
    """
    return jax.lax.bitcast_convert_type(most, jnp.int32) >> 23 & 0xFF  # a NaN may have a sign


def power_of_two(e: jax.Array) -> jax.Array:
    """`2^(e-127)` as a float32, for a stored exponent from 1 to 254.

    >>> power_of_two(jnp.int32(128))
    Array(2., dtype=float32)
    """
    return jax.lax.bitcast_convert_type(e.astype(jnp.int32) << 23, jnp.float32)


def current_scale(most: jax.Array, dtype: np.dtype) -> jax.Array:
    """The smallest power of two by which a tensor is divided to fit a format: `most / scale <= max(dtype)`.

    A power of two, so that scaling rounds nothing, here and where the product is scaled back: the one rounding is the
    one to eight bits. 1 for a tensor of zeros, and no less than the smallest normal float32.
    Not finite where `most` is not: the product is then NaN as a whole, and a train step skips it.

    >>> current_scale(jnp.float32([448.0, 449.0, 0.0]), jnp.dtype("float8_e4m3fn")).tolist()
    [1.0, 2.0, 1.0]
    """
    share = most / np.float32(facts(dtype).max)
    below = jax.lax.bitcast_convert_type(share, jnp.int32)
    up = jax.lax.bitcast_convert_type((below + 0x7FFFFF) & 0x7F800000, jnp.float32)  # to the next power of two
    up = jnp.maximum(up, np.finfo(np.float32).tiny)  # a CPU takes a subnormal share for zero, and 0 · 1/0 is NaN
    sensible = jnp.where(most > 0, up, jnp.ones_like(up))
    return jnp.where(jnp.isfinite(most), sensible, jnp.full_like(up, jnp.nan))


def scale_for_exponent(e: jax.Array, dtype: np.dtype) -> jax.Array:
    """The power of two with which every number below `2^(e-126)` fits a format: for a scale that was seen in advance.

    >>> scale_for_exponent(jnp.int32(127), jnp.dtype("float8_e4m3fn")) * 448 >= 1.99
    Array(True, dtype=bool)
    """
    # The format's own largest power of two is at most its largest number: there is up to a factor of two to spare.
    return power_of_two(jnp.clip(e + 1 - int(np.floor(np.log2(facts(dtype).max))), 1, 254))


def to_float8(x: jax.Array, scale: jax.Array, dtype: np.dtype) -> jax.Array:
    """`x / scale`, rounded to nearest even; what is too large becomes the largest number (e4m3fn would make it NaN).

    So does an infinity: for a scale that tells of one itself, as `current_scale` does.

    >>> to_float8(jnp.array([1.0, 1000.0]), jnp.float32(1.0), jnp.dtype("float8_e4m3fn"))
    Array([1, 448], dtype=float8_e4m3fn)
    """
    bound = np.float32(facts(dtype).max)
    return jnp.clip(x.astype(jnp.float32) * (1 / scale), -bound, bound).astype(dtype)


def to_float8_or_nan(x: jax.Array, scale: jax.Array, dtype: np.dtype) -> jax.Array:
    """`to_float8`, but an infinity becomes NaN: no large number, but a fault that a train step must see.

    For scales that know nothing of this tensor. Its mask is not free: of weights XLA (jax 0.11) turns it round for the
    GEMM in a pass of its own.

    >>> to_float8_or_nan(jnp.array([1000.0, jnp.inf]), jnp.float32(1.0), jnp.dtype("float8_e4m3fn"))
    Array([448, nan], dtype=float8_e4m3fn)
    """
    rounded = to_float8(x, scale, dtype)
    return jnp.where(jnp.isfinite(x), rounded, jnp.full_like(rounded, jnp.nan))


def to_int8(x: jax.Array, axes: Sequence[int], bound: int = 127) -> tuple[jax.Array, jax.Array]:
    """`(q, scale)` with `x ~ q * scale`, symmetric, a scale for each row over `axes`; q in -bound..bound, scale float32.

    A row of zeros has scale 1; one that is not finite has scale NaN.

    >>> q, scale = to_int8(jnp.array([[1.0, -2.0]]), axes=(1,))
    >>> q.tolist(), float(scale[0, 0] * 127)
    ([[64, -127]], 2.0)
    """
    most = largest(x, axes)
    scale = jnp.where(most > 0, most, jnp.full_like(most, bound)) / np.float32(bound)
    scale = jnp.where(jnp.isfinite(most), scale, jnp.full_like(scale, jnp.nan))
    q = jnp.round(x.astype(jnp.float32) / scale)
    return jnp.clip(q, -bound, bound).astype(jnp.int8), scale
