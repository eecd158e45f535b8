"""Softmax cross-entropy of logits that are there: float32 inside, and the logits kept as they came."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mpjax.numerics.example_weights import checked_weights, present, shown, weighted, wide

# Two float32 numbers a row spare the backward pass both reductions over the classes.
_SAVED = "mpjax_cross_entropy_row"


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    label_smoothing: float = 0.0,
    weights: ArrayLike | None = None,
    z_loss: float = 0.0,
) -> Float[Array, "*examples"]:
    """Cross-entropy between softmax(logits) and integer or soft labels, one float32 number per example.

        m = max x,  S = Σⱼ exp(xⱼ − m)                          in float32
        loss = Σⱼ yⱼ (log S − (xⱼ − m)) + z_loss · (m + log S)²,  0 · ∞ = 0
        y ← (1 − ε) y + ε / classes                             label smoothing ε, as in Keras and optax

    `m` is taken off before the logarithm and not added again, so that logits of ±65504 lose nothing: there
    `logsumexp(x) − x_y` rounds to 2⁻⁸. The backward pass keeps the logits in their own dtype, with `m` and `S`, and its
    gradient `Σy · softmax(x) − y` is float32 until it leaves.

    A class masked by −1e9 or −inf has gradient 0; if it is the label, the loss is 1e9 or inf. Label smoothing puts
    ε/classes on every class, masked ones too, so that −inf then makes the loss inf. A row of nothing but −inf has no
    distribution, and its loss is NaN: give it weight zero.

    An integer label outside [0, classes) cannot raise while tracing; its loss is NaN, so that `make_train_step` skips
    the step instead of learning a wrong class (−1 is not the last one). Give padding weight zero.

    Args:
      logits: `[..., classes]`, any float dtype.
      labels: integer class indices `[...]`, or float probabilities `[..., classes]` (gradients reach these too).
      label_smoothing: ε in [0, 1), a Python number.
      weights: `[...]`, float, int or bool; each loss is multiplied by its weight.
      z_loss: coefficient, a Python number, of the term that holds log Σ exp x near 0, where half-precision logits have
        their resolution; PaLM used 1e-4.

    Returns:
      `[...]` float32 (float64 for float64 logits). With weights, `losses.mean()` divides by the number of examples and
      not by their weight: `sum_and_weight` is what a weighted mean needs.

    Raises:
      ValueError: shapes or dtypes that do not fit, label_smoothing outside [0, 1), negative z_loss.

    Source: Szegedy et al., Rethinking the Inception Architecture (2016) for smoothing; Chowdhery et al., PaLM (2022),
    section 5, for the z-loss.

    >>> logits = jnp.array([[65504.0, 65504.0, -65504.0]], jnp.float16)
    >>> softmax_cross_entropy(logits, jnp.array([1])).round(4)
    Array([0.6931], dtype=float32)
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if not (jnp.issubdtype(logits.dtype, jnp.floating) and logits.ndim and logits.shape[-1]):
        raise ValueError(
            f"logits are {shown(logits)}; legal is a float array [..., classes] with at least one class; "
            "cast them, or give the class axis as the last one"
        )
    integer = jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == logits.shape[:-1]
    soft = jnp.issubdtype(labels.dtype, jnp.floating) and labels.shape == logits.shape
    if not (integer or soft):
        raise ValueError(
            f"labels are {shown(labels)} for logits {shown(logits)}; legal are integer class indices "
            f"{list(logits.shape[:-1])} or float probabilities {list(logits.shape)}; cast or reshape the labels"
        )
    check_options(label_smoothing, z_loss)
    weights = checked_weights(weights, logits.shape[:-1])
    return _softmax_cross_entropy(logits, labels, weights, float(label_smoothing), float(z_loss))


def check_options(label_smoothing: float, z_loss: float) -> None:
    """ValueError for a smoothing or a z-loss that has no meaning."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; legal is 0 <= label_smoothing < 1; try 0.1")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss is {z_loss}; legal is a finite number >= 0; try 1e-4, or 0 for none")


def rows_cross_entropy(
    logits: jax.Array, labels: jax.Array, weights: jax.Array | None, label_smoothing: float, z_loss: float
) -> jax.Array:
    """`softmax_cross_entropy` of arguments that fit, which keeps for its backward pass whatever it likes."""
    x = present(wide(logits), weights)
    peak = checkpoint_name(jax.lax.stop_gradient(x).max(-1, keepdims=True), _SAVED)
    x = x - peak
    log_total = jnp.log(checkpoint_name(jnp.exp(x).sum(-1), _SAVED))
    labels = present(labels, weights)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        losses = log_total - (1 - label_smoothing) * _picked(x, labels)
        if label_smoothing:
            losses = losses - label_smoothing * x.mean(-1)
    else:
        y = (1 - label_smoothing) * labels.astype(x.dtype) + label_smoothing / x.shape[-1]
        impossible = jnp.isneginf(x) & (y == 0)
        losses = y.sum(-1) * log_total - (y * jnp.where(impossible, jnp.zeros_like(x), x)).sum(-1)
    if z_loss:
        losses = losses + z_loss * jnp.square(peak.squeeze(-1) + log_total)
    return weighted(losses, weights)


_rows_saved = jax.checkpoint_policies.save_only_these_names(_SAVED)
_softmax_cross_entropy = jax.checkpoint(rows_cross_entropy, policy=_rows_saved, static_argnums=(3, 4))


def _picked(x: jax.Array, labels: jax.Array) -> jax.Array:
    """`x` at its label; NaN where there is no such class."""
    if labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)  # an int8 cannot count 1000 classes
    # A gather would collect logits whose class axis is sharded, and scatter their gradient; this joins the other sum.
    here = jax.lax.broadcasted_iota(labels.dtype, x.shape, x.ndim - 1) == labels[..., None]
    found = jnp.where(here, x, jnp.zeros_like(x)).sum(-1)
    return jnp.where((labels >= 0) & (labels < x.shape[-1]), found, jnp.full_like(found, jnp.nan))
