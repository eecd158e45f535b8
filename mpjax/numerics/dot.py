"""Products in eight bits that take the place of `jax.lax.dot_general`, with gradients that are products in eight bits.

    fp8    y  = s_x s_w · (e4m3(x / s_x) · e4m3(w / s_w))     a scale for each tensor, a power of two, from its own largest
           dx = s_g s_w · (e5m2(g / s_g) · e4m3(w / s_w)ᵀ)    magnitude: current scaling
           dw = s_x s_g · (e4m3(x / s_x)ᵀ · e5m2(g / s_g))
    int8   each of the three with operands that are quantised anew, a scale for each row over what is contracted

The scales stand behind the product, on its result: written so, XLA makes float8 GEMMs of all three (jax 0.11, compiled
for sm_90). Scales by row before a float8 product, or two e5m2 operands, give a half-precision GEMM.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.core.types import DTypeLike
from mpjax.numerics.quantize import current_scale, largest, to_float8, to_int8
from mpjax.numerics.varying import varying_alike

FORWARD, BACKWARD = jnp.dtype("float8_e4m3fn"), jnp.dtype("float8_e5m2")
"""Values need precision, gradients need range (Micikevicius et al., FP8 Formats for Deep Learning, 2022)."""

TILE = 16
"""A float8 or int8 GEMM wants sizes that are multiples of it (cuBLAS documentation, "Narrow Precision Data Types", 2025)."""

Numbers = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]
"""Which axes are contracted and which are batch, of both sides: as in `jax.lax.dot_general`."""


@dataclasses.dataclass(frozen=True)
class QuantizedDot:
    """A `jax.lax.dot_general` whose products, forward and backward, run in eight bits.

    For `dot_general=` of Flax's layers (`nn.Dense`, `nn.DenseGeneral`, `nnx.Linear`, `nnx.LinearGeneral`) and for
    modules of your own; a policy with `dot=fp8` or `dot=int8` puts it there by path. The result and the gradients come
    in the dtypes that the same call of `jax.lax.dot_general` gives. The right side is taken for the weights: where its sizes
    are no multiples of 16, or where there are batch axes, the product runs in the dtype that came, since no eight-bit
    GEMM takes those.

    A second derivative is taken with int8, its products quantised like the others; with fp8 it raises, since of the operands
    only eight bits are kept, through which no gradient of theirs could pass.

    What is not finite in an operand makes the product NaN: with fp8 the whole, with int8 the rows that it is in.

    Args:
      recipe: `"fp8"` or `"int8"`: see the module.

    Raises:
      ValueError: another recipe.

    Source: Micikevicius et al., FP8 Formats for Deep Learning (2022); Jacob et al., Quantization and Training of Neural
    Networks for Efficient Integer-Arithmetic-Only Inference (2018).

    >>> x, w = jnp.ones((2, 16), jnp.bfloat16), jnp.ones((16, 16), jnp.bfloat16)
    >>> QuantizedDot("fp8")(x, w, (((1,), (0,)), ((), ())))[0, 0]
    Array(16, dtype=bfloat16)
    """

    recipe: str = "fp8"

    def __post_init__(self) -> None:
        if self.recipe not in _PRODUCTS:
            raise ValueError(f"got recipe {self.recipe!r}; legal are {', '.join(_PRODUCTS)}")

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: DTypeLike | None = None,
        *,
        out_sharding: Any = None,
    ) -> jax.Array:
        """`jax.lax.dot_general` of float operands; `precision` has no meaning in eight bits and is not read."""
        numbers = plain(dimension_numbers)
        if not fits_tiles(rhs.shape, numbers) or out_sharding is not None:
            return jax.lax.dot_general(
                lhs, rhs, numbers, precision, preferred_element_type, out_sharding=out_sharding
            )  # fmt: skip
        out = jnp.dtype(preferred_element_type or jnp.promote_types(lhs.dtype, rhs.dtype))
        return _PRODUCTS[self.recipe](*varying_alike(lhs, rhs), numbers, out)


def fits_tiles(weights: tuple[int, ...], numbers: Numbers) -> bool:
    """Whether an eight-bit GEMM takes weights of this shape: see `misfit`.

    >>> fits_tiles((64, 4, 16), (((2,), (0,)), ((), ()))), fits_tiles((64, 10), (((1,), (0,)), ((), ())))
    (True, False)
    """
    (_, contracted), (_, batch) = numbers
    return misfit(weights, contracted, batch) is None


def misfit(weights: tuple[int, ...], contracted: tuple[int, ...], batch: tuple[int, ...] = ()) -> str | None:
    """Why no eight-bit GEMM takes weights of this shape; None: one does, both sizes are multiples of 16 and no axis is batch.

    Args:
      weights: their shape.
      contracted, batch: which of its axes are summed over, and which count products of their own.

    >>> misfit((64, 10), (0,)), misfit((64, 4, 16), (0,))
    ('64×10 is no multiple of 16', None)
    """
    if batch:
        return "it has batch axes"
    inner = int(np.prod([weights[axis] for axis in contracted]))
    outer = int(np.prod(weights)) // max(inner, 1)
    fits = inner > 0 and inner % TILE == 0 and outer > 0 and outer % TILE == 0
    return None if fits else f"{inner}×{outer} is no multiple of {TILE}"


def plain(dimension_numbers: Any) -> Numbers:
    """Dimension numbers as hashable tuples of ints."""
    (lhs, rhs), (lhs_batch, rhs_batch) = dimension_numbers
    return (tuple(map(int, lhs)), tuple(map(int, rhs))), (tuple(map(int, lhs_batch)), tuple(map(int, rhs_batch)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _float8_dot(lhs: jax.Array, rhs: jax.Array, numbers: Numbers, out: np.dtype) -> jax.Array:
    return _float8_forward(lhs, rhs, numbers, out)[0]


def _float8_forward(lhs: jax.Array, rhs: jax.Array, numbers: Numbers, out: np.dtype) -> tuple[jax.Array, tuple]:
    scales = current_scale(largest(lhs), FORWARD), current_scale(largest(rhs), FORWARD)
    x, w = to_float8(lhs, scales[0], FORWARD), to_float8(rhs, scales[1], FORWARD)
    return float8_product(x, w, scales[0] * scales[1], numbers, out), (x, w, *scales, like(lhs), like(rhs))


def _float8_backward(numbers: Numbers, out: np.dtype, kept: tuple, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w, x_scale, w_scale, lhs, rhs = kept
    g_scale = current_scale(largest(cotangent), BACKWARD)
    g = to_float8(cotangent, g_scale, BACKWARD)
    return gradients(g, x, w, g_scale * w_scale, g_scale * x_scale, numbers, (lhs.dtype, rhs.dtype))


_float8_dot.defvjp(_float8_forward, _float8_backward)


def gradients(
    g: jax.Array,
    x: jax.Array,
    w: jax.Array,
    x_scale: jax.Array,
    w_scale: jax.Array,
    numbers: Numbers,
    dtypes: tuple[np.dtype, np.dtype],
) -> tuple[jax.Array, jax.Array]:
    """Both gradients of a product, from its quantised operands and its quantised cotangent `g`.

    Args:
      x_scale, w_scale: of the results, what they are multiplied with.
      dtypes: of the results.
    """
    for_x, x_axes = transposed(numbers, x.ndim, w.ndim)
    for_w, w_axes = transposed(numbers, x.ndim, w.ndim, right=True)
    by_x = float8_product(g, w, x_scale, for_x, dtypes[0]).transpose(x_axes)
    by_w = float8_product(x, g, w_scale, for_w, dtypes[1]).transpose(w_axes)
    return by_x, by_w


def float8_product(x: jax.Array, w: jax.Array, scale: jax.Array, numbers: Numbers, out: np.dtype) -> jax.Array:
    """The product of float8 operands, times a scale.

    A power of two times a bfloat16 rounds nothing, and the GEMM writes half the bytes; in float16 the product of what was
    scaled up to 448 might overflow, so it stays in float32 until it is scaled.
    """
    narrow = out if out == jnp.bfloat16 else jnp.dtype("float32")
    y = jax.lax.dot_general(x, w, numbers, preferred_element_type=narrow)
    return _once((y * scale.astype(narrow)).astype(out))


@jax.custom_jvp
def _once(x: jax.Array) -> jax.Array:
    """`x` itself, which no second derivative passes: cotangents of float8 operands would be float8, and NaN over 448."""
    return x


@_once.defjvp
def _once_jvp(primals: tuple, tangents: tuple) -> Any:
    raise NotImplementedError(
        "a second derivative goes through a float8 product, of whose operands eight bits are kept; legal is one derivative; "
        "use dot=int8, or dot=none for the layers in question"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _int8_dot(lhs: jax.Array, rhs: jax.Array, numbers: Numbers, out: np.dtype) -> jax.Array:
    return _int8_product(lhs, rhs, numbers, out)


def _int8_forward(lhs: jax.Array, rhs: jax.Array, numbers: Numbers, out: np.dtype) -> tuple[jax.Array, tuple]:
    return _int8_dot(lhs, rhs, numbers, out), (lhs, rhs)  # a second derivative differentiates this very line


def _int8_backward(numbers: Numbers, out: np.dtype, kept: tuple, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    lhs, rhs = kept
    for_lhs, lhs_axes = transposed(numbers, lhs.ndim, rhs.ndim)
    for_rhs, rhs_axes = transposed(numbers, lhs.ndim, rhs.ndim, right=True)
    # By the function that has a gradient of its own: that of its product would be that of rounding, zero.
    by_lhs = _int8_dot(cotangent, rhs, for_lhs, lhs.dtype).transpose(lhs_axes)
    return by_lhs, _int8_dot(lhs, cotangent, for_rhs, rhs.dtype).transpose(rhs_axes)


_int8_dot.defvjp(_int8_forward, _int8_backward)


def _int8_product(lhs: jax.Array, rhs: jax.Array, numbers: Numbers, out: np.dtype) -> jax.Array:
    """Each row over the contracted axes has a scale of its own, which the product of the others leaves alone.

    Over more than 133,152 summands, as many tokens in the gradient of the weights, fewer than 127 steps are used: 127² so
    many times is more than an int32 holds, and it would wrap round in silence.
    """
    (lhs_over, rhs_over), _ = numbers
    summands = math.prod(lhs.shape[axis] for axis in lhs_over)
    bound = min(127, max(1, math.isqrt((2**31 - 1) // max(summands, 1))))
    (x, x_scale), (w, w_scale) = to_int8(lhs, lhs_over, bound), to_int8(rhs, rhs_over, bound)
    y = jax.lax.dot_general(x, w, numbers, preferred_element_type=jnp.int32).astype(jnp.float32)
    x_scale, w_scale = jnp.squeeze(x_scale, lhs_over), jnp.squeeze(w_scale, rhs_over)
    x_scale = x_scale.reshape(x_scale.shape + (1,) * w_scale.ndim)
    return (y * x_scale * w_scale.reshape((1,) * (y.ndim - w_scale.ndim) + w_scale.shape)).astype(out)


@jax.custom_vjp
def apart(x: jax.Array) -> jax.Array:
    """`x` itself, into whose making XLA fuses nothing that follows; its gradient passes freely.

    XLA (jax 0.11) takes the GELU behind a product and its bias into the GEMM, and cannot do so for float8 where the GELU's input
    is needed again, as under `nn.remat`: compiling failed with "RET_CHECK failure !has_aux_output".
    """
    return jax.lax.optimization_barrier(x)


apart.defvjp(lambda x: (apart(x), None), lambda _, cotangent: (cotangent,))


def transposed(numbers: Numbers, x_ndim: int, w_ndim: int, right: bool = False) -> tuple[Numbers, tuple[int, ...]]:
    """How a product is differentiated: `(numbers, axes)` with `d lhs = dot_general(g, rhs, numbers).transpose(axes)`.

    With `right` it is `d rhs = dot_general(lhs, g, numbers).transpose(axes)`. (jax itself has g on the left there, too, and
    XLA turns the result round inside the GEMM. It cannot do so for float8: the whole update of AdamW then ran in the other
    layout, and params and moments were copied back; see experiments/records/2026-11-24-bench-h100.)

    >>> transposed((((1,), (0,)), ((), ())), 2, 2), transposed((((1,), (0,)), ((), ())), 2, 2, right=True)
    (((((1,), (1,)), ((), ())), (0, 1)), ((((0,), (0,)), ((), ())), (0, 1)))
    """
    (x_over, w_over), (x_batch, w_batch) = numbers
    x_kept = [axis for axis in range(x_ndim) if axis not in x_over + x_batch]
    w_kept = [axis for axis in range(w_ndim) if axis not in w_over + w_batch]
    batch = tuple(range(len(x_batch)))
    first = tuple(len(batch) + i for i in range(len(x_kept)))
    second = tuple(len(batch) + len(first) + i for i in range(len(w_kept)))
    if right:
        order = [*w_batch, *(w_over[i] for i in np.argsort(x_over)), *w_kept]
        found = ((tuple(x_kept), first), (x_batch, batch))
    else:
        order = [*x_batch, *x_kept, *(x_over[i] for i in np.argsort(w_over))]
        found = ((second, tuple(w_kept)), (batch, w_batch))
    return found, tuple(int(i) for i in np.argsort(order))


def like(x: jax.Array) -> jax.Array:
    """Nothing of x but its dtype, as something that a backward pass may hold."""
    return jnp.zeros((0,), x.dtype)


_PRODUCTS = {"fp8": _float8_dot, "int8": _int8_dot}
