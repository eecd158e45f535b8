"""The last linear layer and its softmax cross-entropy in one, chunk by chunk: the logits are never all there.

The gradient is formed in the forward pass, where a chunk's logits are at hand, so that nothing of them is kept and
nothing is computed twice (Hsu et al., Liger Kernel, 2024; Wijmans et al., Cut Your Losses, 2024). That takes a loss
which is already summed: what comes back later is one number, and it only scales.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mpjax.core.dtypes import canonical
from mpjax.core.types import DTypeLike
from mpjax.numerics.cross_entropy import check_options, rows_cross_entropy
from mpjax.numerics.example_weights import checked_weights, present, shown, wide_dtype
from mpjax.numerics.varying import varying_alike


def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    transposed: bool = False,
    label_smoothing: float = 0.0,
    weights: ArrayLike | None = None,
    z_loss: float = 0.0,
    chunk: int = 2048,
    compute_dtype: DTypeLike | None = None,
    logits_dtype: DTypeLike | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of `softmax_cross_entropy(hidden @ kernel + bias, labels)`, and the sum of weights.

        for each chunk of tokens:  logits = hidden · kernel + bias     products in the compute dtype, sums float32
                                   total += Σ loss(logits, labels)     as in `softmax_cross_entropy`, float32
                                   and, only where a gradient is asked for, g = ∂total/∂logits in the compute dtype:
                                   ∂hidden = g · kernelᵀ,  ∂kernel += hiddenᵀ · g,  ∂bias += Σ g

    At most `chunk` rows of logits exist at a time, in float32: here they are not rounded to a half format, which the
    head of a wrapped model does, unless `logits_dtype` says so: then no float32 logit is written to memory, and what is
    computed from each is float32 all the same. All three products have operands in the compute dtype and float32 sums;
    `∂kernel` and `∂bias` are float32 until the last chunk. Between the passes `∂hidden` lies in the compute dtype, each row times a
    power of two of its own, and `g` is formed at a power of two that fits the weights: float16 loses no small gradient
    here, whatever the loss scale, and what does not fit in the end is inf, as it should be.

    Tokens may be spread over devices; the gradient of a whole kernel is then summed over them once a chunk, in float32, and a
    chunk is of the tokens of all: give as many times `chunk` as there are devices. With a `reduce_dtype` (`make_train_step`)
    each device has chunks of its own, and nothing is summed before the last.

    Masked classes, a label that is no class and tokens of weight zero are as in `softmax_cross_entropy`. Its
    differences: the labels are integers (soft ones would be as large as the logits), the result is the pair that
    `make_train_step` takes, and there is no forward-mode derivative (`jax.jvp`).

    Args:
      hidden: `[..., features]`, any float dtype: what the head would be given.
      kernel: `[features, classes]`, any float dtype: the float32 master, or one that is cast already.
      labels: integer class indices `[...]`.
      bias: `[classes]`, added in float32.
      transposed: the kernel is `[classes, features]`, as the table of an embedding that is the head, too.
      label_smoothing: ε in [0, 1), a Python number.
      weights: `[...]`, float, int or bool; each loss is multiplied by its weight. 1 by default.
      z_loss: coefficient, a Python number, of the square of log Σ exp(logits).
      chunk: tokens at a time; a smaller one takes less memory and makes smaller products.
      compute_dtype: of the products; hidden's by default. Name it where a policy hands hidden out in float32, as
        `mixed_bfloat16` does.
      logits_dtype: in which a chunk's logits are stored; float32 by default. In bfloat16 the passes over them move half
        the bytes, and the loss is that of the head of a model under `mixed_bfloat16`.

    Returns:
      `(Σ weight · loss, Σ weight)`, float32 scalars (float64 for float64 products); their quotient is the mean. Gradients
      have the dtypes of hidden, kernel, bias and weights.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.

    Source: Hsu et al., Liger Kernel: Efficient Triton Kernels for LLM Training (2024), section 3.

    >>> table = jnp.eye(3)  # params["embed"]["embedding"]
    >>> hidden = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 2.0]], jnp.bfloat16)
    >>> total, weight = linear_softmax_cross_entropy(hidden, table, jnp.array([0, 2]), transposed=True)
    >>> (total / weight).round(4)
    Array(0.2395, dtype=float32)
    """
    hidden, kernel, labels = jnp.asarray(hidden), jnp.asarray(kernel), jnp.asarray(labels)
    bias = None if bias is None else jnp.asarray(bias)
    _check_arrays(hidden, kernel, labels, bias, transposed)
    check_options(label_smoothing, z_loss)
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; legal is a number of tokens >= 1; try 2048")
    compute = hidden.dtype if compute_dtype is None else canonical(compute_dtype)
    if compute.itemsize < 2:
        raise ValueError(f"compute_dtype is {compute}; legal is a float dtype of 16 bits or more; try bfloat16")
    wide = wide_dtype(hidden.astype(compute))
    weights = checked_weights(weights, labels.shape)
    weights = jnp.ones(labels.shape, wide) if weights is None else weights.astype(wide)
    stored = wide if logits_dtype is None else canonical(logits_dtype)
    if stored.itemsize < 2:
        raise ValueError(f"logits_dtype is {stored}; legal is a float dtype of 16 bits or more, or None for float32")
    bias_dtype = None if bias is None else bias.dtype
    dtypes = hidden.dtype, kernel.dtype, bias_dtype, compute, stored
    plan = _Plan(chunk, transposed, float(label_smoothing), float(z_loss), *dtypes)
    # The gradient by a logit is at most its token's weight, or 2 z |log Σ exp| times that. With the largest weight at
    # 2⁸ float16 has room for seven bits of a z-loss below 65504, and a probability of 2⁻²² is still a normal number.
    scale = _scale_to(2.0**8, jnp.abs(weights).max(initial=0))
    rows = hidden.reshape(labels.size, hidden.shape[-1])
    total = _total(plan, *varying_alike(rows, kernel, bias, labels.ravel(), weights.ravel() * scale))
    return total / scale, weights.sum()


def _check_arrays(
    hidden: jax.Array, kernel: jax.Array, labels: jax.Array, bias: jax.Array | None, transposed: bool
) -> None:
    floats = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (hidden, kernel))
    features = kernel.shape[-1 if transposed else 0] if kernel.ndim == 2 else None
    if not (floats and hidden.ndim and hidden.shape[-1] == features and kernel.size):
        form = "[classes, features] with transposed=True" if transposed else "[features, classes]"
        raise ValueError(
            f"hidden is {shown(hidden)} and kernel {shown(kernel)}; legal are float [..., features] and float {form}; "
            "cast them, or say transposed=True for the table of an embedding and False for a Dense kernel"
        )
    if not (jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == hidden.shape[:-1]):
        raise ValueError(
            f"labels are {shown(labels)} for hidden {shown(hidden)}; legal are integer class indices "
            f"{list(hidden.shape[:-1])}; cast or reshape them (for soft labels there is softmax_cross_entropy)"
        )
    classes = kernel.shape[0 if transposed else 1]
    if bias is not None and not (jnp.issubdtype(bias.dtype, jnp.floating) and bias.shape == (classes,)):
        raise ValueError(
            f"bias is {shown(bias)} for {classes} classes; legal is a float for each class, [{classes}]; "
            "cast or reshape it, or leave it out"
        )


class _Plan(NamedTuple):
    """What is known while tracing."""

    chunk: int
    transposed: bool
    label_smoothing: float
    z_loss: float
    hidden_dtype: np.dtype
    kernel_dtype: np.dtype
    bias_dtype: np.dtype | None
    compute_dtype: np.dtype
    logits_dtype: np.dtype


class _Chunk(NamedTuple):
    """The tokens of one chunk, or of all along a first axis."""

    hidden: jax.Array
    labels: jax.Array
    weights: jax.Array


class _Slopes(NamedTuple):
    """∂total by each input; the one by hidden is `rows / scales`."""

    rows: jax.Array
    scales: jax.Array
    kernel: jax.Array
    bias: jax.Array | None
    weights: jax.Array


def _cut(plan: _Plan, hidden: jax.Array, labels: jax.Array, weights: jax.Array) -> _Chunk:
    """Padded with tokens of weight zero, and dealt out like cards: token t is in chunk t mod n.

    Where tokens are spread over devices every chunk then lies on all of them; neighbours in one chunk would leave all
    devices but one idle. Chunks are made equal, and of whole tiles of 64 rows, rather than the last one almost empty.
    """
    tokens = labels.size
    parts = max(-(-tokens // plan.chunk), 1)
    rows = min(plan.chunk, -(-tokens // (64 * parts)) * 64) if parts > 1 else tokens

    def deal(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, rows * parts - tokens),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(rows, parts, *x.shape[1:]).swapaxes(0, 1)

    return _Chunk(deal(hidden), deal(labels), deal(weights))


def _together(x: jax.Array, tokens: int) -> jax.Array:
    """Undoes `_cut`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:tokens]


def _product(x: jax.Array, y: jax.Array, over: tuple[int, int], stored: np.dtype | None = None) -> jax.Array:
    contracted = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(x, y, contracted, preferred_element_type=stored or wide_dtype(x))


def _scale_to(target: float, most: jax.Array) -> jax.Array:
    """The power of two that brings `most` near `target`, itself one: from 3/4 of it to 3/2. 1 if nothing sensible does.

    Being a power of two, it rounds nothing that it scales.

    >>> _scale_to(256.0, jnp.array([1.0, 0.3, 0.0, jnp.inf])).tolist()
    [256.0, 1024.0, 1.0, 1.0]
    """
    most = jax.lax.stop_gradient(most)
    power = jax.lax.reduce_precision(most, jnp.finfo(most.dtype).nexp, mantissa_bits=0)
    usable = (power > 2.0**-100) & jnp.isfinite(power)
    return jnp.where(usable, target / jnp.where(usable, power, jnp.ones_like(power)), jnp.ones_like(power))


def _zeros(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Where a sum over chunks starts, in the dtype of `like` and, in a shard_map, varying over the same axes."""
    return varying_alike(jnp.zeros(shape, like.dtype), like)[0]


def _logits(plan: _Plan, hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """In float32, of what was stored in `logits_dtype`."""
    logits = _product(hidden, kernel, (1, 1 if plan.transposed else 0), plan.logits_dtype)
    logits = logits.astype(wide_dtype(hidden))
    return logits if bias is None else logits + bias.astype(logits.dtype)[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(
    plan: _Plan, hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None, labels: jax.Array, weights: jax.Array
) -> jax.Array:
    hidden, narrow = hidden.astype(plan.compute_dtype), kernel.astype(plan.compute_dtype)

    def body(total: jax.Array, chunk: _Chunk) -> tuple[jax.Array, None]:
        logits = _logits(plan, chunk.hidden, narrow, bias)
        losses = rows_cross_entropy(logits, chunk.labels, chunk.weights, plan.label_smoothing, plan.z_loss)
        return total + losses.sum(), None

    return jax.lax.scan(body, _zeros((), weights), _cut(plan, hidden, labels, weights))[0]


def _total_and_slopes(
    plan: _Plan, hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None, labels: jax.Array, weights: jax.Array
) -> tuple[jax.Array, _Slopes]:
    hidden, narrow = hidden.astype(plan.compute_dtype), kernel.astype(plan.compute_dtype)

    def body(sums: tuple, chunk: _Chunk) -> tuple[tuple, tuple]:
        total, by_kernel, by_bias = sums
        seen = present(chunk.hidden, chunk.weights)  # 0 · NaN would reach the gradient of the kernel

        def losses_of(logits: jax.Array, weights: jax.Array) -> jax.Array:
            return rows_cross_entropy(logits, chunk.labels, weights, plan.label_smoothing, plan.z_loss)

        losses, pull = jax.vjp(losses_of, _logits(plan, seen, narrow, bias), chunk.weights)
        by_logits, by_weights = pull(jnp.ones_like(losses))
        if by_bias is not None:
            by_bias = by_bias + by_logits.sum(0)
        by_logits = by_logits.astype(narrow.dtype)
        by_hidden = _product(by_logits, narrow, (1, 0 if plan.transposed else 1))
        left, right = (by_logits, seen) if plan.transposed else (seen, by_logits)
        by_kernel = by_kernel + _product(left, right, (0, 0))
        scales = _scale_to(2.0**14, jnp.abs(by_hidden).max(-1, keepdims=True, initial=0))
        rows = (by_hidden * scales).astype(narrow.dtype)
        return (total + losses.sum(), by_kernel, by_bias), (rows, scales, by_weights)

    start = (_zeros((), weights), _zeros(kernel.shape, weights), None if bias is None else _zeros(bias.shape, weights))
    (total, by_kernel, by_bias), by_token = jax.lax.scan(body, start, _cut(plan, hidden, labels, weights))
    rows, scales, by_weights = (_together(x, labels.size) for x in by_token)
    return total, _Slopes(rows, scales, by_kernel, by_bias, by_weights)


def _scaled(plan: _Plan, slopes: _Slopes, by_total: jax.Array) -> tuple:
    """The cotangents: every slope times one number, in float32, and then to the dtype of what it belongs to."""
    hidden = slopes.rows.astype(by_total.dtype) * (by_total / slopes.scales)
    bias = None if slopes.bias is None else (slopes.bias * by_total).astype(plan.bias_dtype)
    kernel = (slopes.kernel * by_total).astype(plan.kernel_dtype)
    return hidden.astype(plan.hidden_dtype), kernel, bias, None, slopes.weights * by_total


_total.defvjp(_total_and_slopes, _scaled)
