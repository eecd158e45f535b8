"""Attention for half precision: a float32 softmax between two products in the compute dtype."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mpjax.core.cautions import PrecisionWarning
from mpjax.core.dtypes import canonical, wide
from mpjax.core.scopes import attention_scope
from mpjax.core.types import DTypeLike
from mpjax.numerics.remat import ATTENTION


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def softmax_float32(scores: jax.Array, mask: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    """Softmax over the last axis, computed in float32 (float64 for float64 scores) and handed out in `dtype`.

        w = exp(s − max s) / Σ exp(s − max s), s = −3.4e38 where the mask is False

    Only the result in `dtype` is kept for the backward pass, `ds = w (t − Σ w t)` in float32. A row whose mask is all
    False is uniform, and has no gradient.

    Args:
      scores: `[..., keys]`, any float dtype.
      mask: bool, broadcastable to `scores`, True where a key may be attended to; None for no mask.
      dtype: of the result.

    >>> softmax_float32(jnp.array([1.0, 1.0]), jnp.array([True, False]), jnp.bfloat16)
    Array([1, 0], dtype=bfloat16)
    """
    scores = scores.astype(wide(scores.dtype))
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.asarray(jnp.finfo(jnp.float32).min, scores.dtype))
    return jax.nn.softmax(scores).astype(dtype)


@softmax_float32.defjvp
def _softmax_float32_jvp(dtype: DTypeLike, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    weights, mask = softmax_float32(*primals, dtype), primals[1]
    alive = jnp.array(True) if mask is None else mask.any(-1, keepdims=True)

    @jax.checkpoint  # keeps `weights` and not its float32 copy; masked weights of a live row are 0, so no mask is kept
    def tangent(weights: jax.Array, t: jax.Array) -> jax.Array:
        w = jnp.where(alive, weights, jnp.zeros_like(weights)).astype(wide(t.dtype))
        t = t.astype(w.dtype)
        return (w * (t - jnp.sum(w * t, -1, keepdims=True))).astype(dtype)

    return weights, tangent(weights, tangents[0])


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | np.ndarray | None = None,
    mask: jax.Array | np.ndarray | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
) -> jax.Array:
    """Dot-product attention with both products in the compute dtype and the softmax in float32.

        out = softmax(q kᵀ / √depth + bias, where the mask is True) v, with dropout between the two

    A wrapped model gets it in place of `dot_product_attention` of `flax.linen` and `flax.nnx`, and therefore it has their
    parameter names: Linen passes only the keywords that it finds in the signature. In a module of your own, call it: a
    policy cannot reach a function. Without dropout and bias, on a GPU, in half precision, cuDNN's fused kernel computes
    the same (see `fits_cudnn`); `mpjax.audit` tells where it does.

    Args:
      query: `[batch..., queries, heads, depth]`.
      key: `[batch..., keys, heads, depth]`, or with fewer heads, each shared by a group of neighbouring query heads.
      value: `[batch..., keys, heads, value depth]`, as many heads as the key.
      bias: broadcastable to `[batch..., heads, queries, keys]`, added to the scores in float32.
      mask: bool (or 0/1), same shape, True where a key may be attended to.
      broadcast_dropout: one dropout mask for all batch elements and heads.
      dropout_rng: key for dropout; needed where `dropout_rate` > 0 and not `deterministic`.
      dropout_rate: probability of dropping an attention weight.
      deterministic: no dropout.
      dtype: the compute dtype; the query's by default.
      precision: of both products, as in `jax.lax.dot_general`.
      module: a Flax module that sows `attention_weights`.
      is_causal: a query attends to no key behind its own position, on top of what the mask allows.

    Returns:
      `[batch..., queries, heads, value depth]` in the compute dtype.

    Raises:
      ValueError: heads that do not fit each other, or dropout without a key.

    Source: Vaswani et al., Attention Is All You Need (2017).

    >>> x = jnp.ones((1, 3, 2, 4), jnp.bfloat16)
    >>> attention(x, x, x, is_causal=True).dtype
    dtype(bfloat16)
    """
    compute = query.dtype if dtype is None else canonical(dtype)
    query, key, value = (x.astype(compute) for x in (query, key, value))
    mask = None if mask is None else jnp.asarray(mask).astype(bool)
    heads, shared = query.shape[-2], key.shape[-2]
    if value.shape[-2] != shared or not shared or heads % shared:
        raise ValueError(
            f"got {heads} query heads, {shared} key heads and {value.shape[-2]} value heads; legal are as many for value as for "
            "key, and a multiple of them for query; give each key head a whole group of query heads"
        )
    if shared != heads:
        key, value = (jnp.repeat(x, heads // shared, axis=-2) for x in (key, value))
    drops = not deterministic and dropout_rate > 0.0
    if drops and dropout_rng is None:
        raise ValueError(
            f"got dropout_rate={dropout_rate} without a key; legal is dropout_rng=jax.random.key(…); give one, or "
            "deterministic=True for no dropout"
        )
    if not drops and bias is None and module is None and precision is None and fits_cudnn(query, key, value, mask):
        return checkpoint_name(_cudnn(query, key, value, mask, is_causal), ATTENTION)
    with jax.named_scope(attention_scope(compute.name)):
        if is_causal:
            causal = _causal(query, key)
            mask = causal if mask is None else mask & causal
        scores = _scores(query, key, precision)
        if bias is not None:
            scores = scores.astype(wide(compute)) + bias.astype(wide(compute))
        weights = softmax_float32(scores, mask, compute)
        if module is not None:
            module.sow("intermediates", "attention_weights", weights)
        if drops and dropout_rng is not None:
            shape = (1,) * (key.ndim - 2) + weights.shape[-2:] if broadcast_dropout else weights.shape
            keep = jax.random.bernoulli(dropout_rng, 1.0 - dropout_rate, shape).astype(compute)
            weights = weights * jnp.broadcast_to(keep / jnp.asarray(1.0 - dropout_rate, compute), weights.shape)
        return checkpoint_name(jnp.einsum("...hqk,...khd->...qhd", weights, value, precision=precision), ATTENTION)


def warn_of_float16_on_cpu(attention_fn: Any, compute: np.dtype) -> None:
    """A caution where a user's layer has jax's attention for its own, which does not compile in float16 on a CPU.

    It is no error: only under jit does it raise, and what is traced here may run on a GPU.
    """
    while isinstance(attention_fn, functools.partial):
        attention_fn = attention_fn.func
    if attention_fn is jax.nn.dot_product_attention and compute == np.float16 and jax.default_backend() == "cpu":
        warnings.warn(
            "got attention_fn=jax.nn.dot_product_attention in float16 on a CPU, for which jax asks XLA for a product that it "
            "does not have there (jitted, it raises 'F16_F16_F32 is not supported'); legal are bfloat16 and a GPU; leave "
            "attention_fn out, or pass mpjax.attention, which runs",
            PrecisionWarning,
            stacklevel=2,
        )


def _scores(query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
    scale = jnp.asarray(1 / np.sqrt(query.shape[-1]), query.dtype)
    return jnp.einsum("...qhd,...khd->...hqk", query * scale, key, precision=precision)


_fused_allowed = contextvars.ContextVar("fused_allowed", default=True)


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """What is traced in here takes no fused kernel: a program for several platforms, or for a file, can hold none.

    >>> with unfused():
    ...     x = jnp.ones((1, 64, 2, 64), jnp.bfloat16)
    ...     fits_cudnn(x, x, x, None)
    False
    """
    token = _fused_allowed.set(False)
    try:
        yield
    finally:
        _fused_allowed.reset(token)


def fits_cudnn(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> bool:
    """Whether this runs on a GPU and cuDNN's fused kernel takes these shapes, `[batch, length, heads, depth]`.

    Decided while tracing: jax refuses to trace the kernel on a machine that has no cuDNN. Its documented limits (cuDNN
    developer guide, "Fused Flash Attention", 2024): float16 or bfloat16, a depth that is a multiple of 8 and at most 128.
    Lengths are held to multiples of 64: what is shorter gains nothing from it.

    >>> x = jnp.ones((1, 64, 2, 64), jnp.float32)
    >>> fits_cudnn(x, x, x, None)
    False
    """
    depth = query.shape[-1]
    halves = all(x.dtype in (jnp.bfloat16, jnp.float16) and x.dtype == query.dtype for x in (query, key, value))
    shapes = query.ndim == 4 and value.shape == key.shape and depth % 8 == 0 and depth <= 128
    lengths = all(x.ndim > 1 and x.shape[1] % 64 == 0 for x in (query, key))
    here = _fused_allowed.get() and jax.default_backend() == "gpu"
    return here and halves and shapes and lengths and (mask is None or mask.ndim == 4)


def _causal(query: jax.Array, key: jax.Array) -> jax.Array:
    """True where a key is not behind the query's position, `[1..., queries, keys]`."""
    return jnp.tril(jnp.ones((*(1,) * (query.ndim - 2), query.shape[-3], key.shape[-3]), bool))


def _cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None, is_causal: bool = False
) -> jax.Array:
    if mask is not None:
        mask, is_causal = (mask & _causal(query, key) if is_causal else mask), False
        # A fully masked row is uniform and has no gradient: a zero query sees all keys alike, and its scores reach neither
        # q nor k. (Left to the kernel's large negative bias, the gradient of such rows in bfloat16 was wrong.)
        alive = mask.any(-1, keepdims=True)
        query = jnp.where(alive[..., 0].swapaxes(1, 2)[..., None], query, jnp.zeros_like(query))
        mask = mask | ~alive
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], query.shape[1], key.shape[1]))  # cuDNN broadcasts no length
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal, implementation="cudnn")
