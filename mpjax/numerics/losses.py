"""Losses whose reductions are float32 whatever the logits are, and whose gradients come back in the logits' dtype.

Each function returns one loss per example, so that the caller chooses the mean: `losses.mean()`, or
`sum_and_weight(losses, weights)` where examples weigh differently. An example of weight exactly zero is not there:
whatever stands in it (NaN, infinity, a label of −1) reaches neither value nor gradient.

Half-precision inputs are kept for the backward pass as they came; their float32 copies are made again there.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mpjax.numerics.example_weights import checked_weights, present, shown, sum_and_weight, weighted, wide, wide_dtype

__all__ = [
    "ctc",
    "mean_squared_error",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "squared_error",
    "sum_and_weight",
]

# Two float32 numbers a row spare the backward pass both reductions over the classes.
_SAVED = "mpjax_cross_entropy_row"
_rows_saved = jax.checkpoint_policies.save_only_these_names(_SAVED)


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    label_smoothing: float = 0.0,
    weights: ArrayLike | None = None,
    z_loss: float = 0.0,
) -> Float[Array, ...]:
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
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; legal is 0 <= label_smoothing < 1; try 0.1")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss is {z_loss}; legal is a finite number >= 0; try 1e-4, or 0 for none")
    weights = checked_weights(weights, logits.shape[:-1])
    return _softmax_cross_entropy(logits, labels, weights, float(label_smoothing), float(z_loss))


@functools.partial(jax.checkpoint, policy=_rows_saved, static_argnums=(3, 4))
def _softmax_cross_entropy(
    logits: jax.Array, labels: jax.Array, weights: jax.Array | None, label_smoothing: float, z_loss: float
) -> jax.Array:
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


def _picked(x: jax.Array, labels: jax.Array) -> jax.Array:
    """`x` at its label; NaN where there is no such class."""
    if labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)  # an int8 cannot count 1000 classes
    # A gather would collect logits whose class axis is sharded, and scatter their gradient; this joins the other sum.
    here = jax.lax.broadcasted_iota(labels.dtype, x.shape, x.ndim - 1) == labels[..., None]
    found = jnp.where(here, x, jnp.zeros_like(x)).sum(-1)
    return jnp.where((labels >= 0) & (labels < x.shape[-1]), found, jnp.full_like(found, jnp.nan))


def sigmoid_cross_entropy(logits: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None) -> Float[Array, ...]:
    """Binary cross-entropy of each logit by itself, in float32.

        loss = −t log σ(x) − (1 − t) log σ(−x)

    Args:
      logits: `[...]`, finite, any float dtype; take an output out with weight zero, not with −inf.
      targets: `[...]`, probabilities in [0, 1]: float, int or bool.
      weights: `[...]`, float, int or bool; each loss is multiplied by its weight.

    Returns:
      `[...]` float32 (float64 for float64 logits).

    Raises:
      ValueError: shapes or dtypes that do not fit.

    Source: `optax.sigmoid_binary_cross_entropy` on float32 logits.

    >>> sigmoid_cross_entropy(jnp.array([-100.0, 100.0], jnp.bfloat16), jnp.array([1, 1]))
    Array([100.,   0.], dtype=float32)
    """
    logits, targets = _same_shape("logits", logits, targets)
    return _sigmoid_cross_entropy(logits, targets, checked_weights(weights, logits.shape))


@jax.checkpoint
def _sigmoid_cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array | None) -> jax.Array:
    x = present(wide(logits), weights)
    return weighted(optax.sigmoid_binary_cross_entropy(x, present(targets.astype(x.dtype), weights)), weights)


def squared_error(predictions: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None) -> Float[Array, ...]:
    """The square of each difference, taken and squared in float32.

    Args:
      predictions: `[...]`, any float dtype.
      targets: `[...]`, float, int or bool.
      weights: `[...]`, float, int or bool; each square is multiplied by its weight.

    Returns:
      `[...]` float32 (float64 for float64 predictions).

    Raises:
      ValueError: shapes or dtypes that do not fit.

    >>> squared_error(jnp.array([300.0], jnp.float16), jnp.array([-100.0], jnp.float16))  # over 65504
    Array([160000.], dtype=float32)
    """
    predictions, targets = _same_shape("predictions", predictions, targets)
    return _squared_error(predictions, targets, checked_weights(weights, predictions.shape))


def mean_squared_error(
    predictions: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None
) -> Float[Array, ...]:
    """The mean square of the differences over the last axis, one float32 number per example, as Keras has it.

    Args:
      predictions: `[..., features]`, any float dtype.
      targets: `[..., features]`, float, int or bool.
      weights: `[...]`, float, int or bool; each example's mean is multiplied by its weight.

    Returns:
      `[...]` float32 (float64 for float64 predictions).

    Raises:
      ValueError: shapes or dtypes that do not fit.

    >>> mean_squared_error(jnp.array([[1.0, 3.0]], jnp.bfloat16), jnp.zeros((1, 2)))
    Array([5.], dtype=float32)
    """
    predictions, targets = _same_shape("predictions", predictions, targets)
    if not (predictions.ndim and predictions.shape[-1]):
        raise ValueError(
            f"predictions are {shown(predictions)}; legal is [..., features] with at least one feature; "
            "use squared_error for numbers without a feature axis"
        )
    weights = checked_weights(weights, predictions.shape[:-1])
    if weights is not None:
        weights = jnp.broadcast_to(weights[..., None], predictions.shape)
    return _squared_error(predictions, targets, weights).mean(-1)


@jax.checkpoint
def _squared_error(predictions: jax.Array, targets: jax.Array, weights: jax.Array | None) -> jax.Array:
    x = present(wide(predictions), weights)
    return weighted(jnp.square(x - present(targets.astype(x.dtype), weights)), weights)


def ctc(
    logits: ArrayLike,
    logit_paddings: ArrayLike,
    labels: ArrayLike,
    label_paddings: ArrayLike,
    blank_id: int = 0,
    weights: ArrayLike | None = None,
) -> Float[Array, " batch"]:
    """Connectionist temporal classification: −log of the probability of all alignments of a sequence, in float32.

    A sequence with more labels (and blanks between repeated ones) than frames has no alignment: its loss is about 1e5,
    optax's stand-in for infinity.

    Args:
      logits: `[batch, frames, classes]`, any float dtype; −inf counts as −1e9.
      logit_paddings: `[batch, frames]`, 1 where a frame is padding.
      labels: `[batch, labels]` integers, padded on the right.
      label_paddings: `[batch, labels]`, 1 where a label is padding.
      blank_id: class of the blank.
      weights: `[batch]`, float, int or bool; each loss is multiplied by its weight.

    Returns:
      `[batch]` float32 (float64 for float64 logits).

    Raises:
      ValueError: shapes or dtypes that do not fit, or a blank that is no class.

    Source: Graves et al., Connectionist Temporal Classification (2006); `optax.ctc_loss` on float32 logits.

    >>> no_padding = jnp.zeros((1, 2)), jnp.zeros((1, 1))
    >>> ctc(jnp.zeros((1, 2, 2), jnp.bfloat16), no_padding[0], jnp.array([[1]]), no_padding[1])  # log 4/3
    Array([0.2876821], dtype=float32)
    """
    x, frames, labels, tail = (jnp.asarray(a) for a in (logits, logit_paddings, labels, label_paddings))
    fits = x.ndim == 3 and frames.shape == x.shape[:2] and labels.ndim == 2 and labels.shape == tail.shape
    if not (fits and labels.shape[0] == x.shape[0] and jnp.issubdtype(x.dtype, jnp.floating)):
        raise ValueError(
            f"logits, their paddings, labels, their paddings are {', '.join(map(shown, (x, frames, labels, tail)))}; "
            "legal is float [batch, frames, classes], [batch, frames], integer [batch, labels], [batch, labels]; "
            "cast, or pad all sequences of a batch to one length"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer) or not 0 <= blank_id < x.shape[-1]:
        raise ValueError(
            f"labels are {labels.dtype} and blank_id is {blank_id}; legal are integer labels and a blank in "
            f"[0, {x.shape[-1]}); cast the labels, or name the blank's class"
        )
    weights = checked_weights(weights, x.shape[:1])
    # optax makes its constants in the default float, which is float64 under x64: a float32 carry would not fit, and its
    # one cast to float32 needs promotion.
    working = jnp.zeros(()).dtype
    usable = jnp.maximum(present(x.astype(working), weights), -1e9)  # −inf · 0 in its one-hot product would be NaN
    with jax.numpy_dtype_promotion("standard"):
        found = optax.ctc_loss(usable, frames.astype(working), labels, tail.astype(working), blank_id=blank_id)
    return weighted(found.astype(wide_dtype(x)), weights)


def _same_shape(name: str, x: ArrayLike, targets: ArrayLike) -> tuple[jax.Array, jax.Array]:
    x, targets = jnp.asarray(x), jnp.asarray(targets)
    real = jnp.issubdtype(x.dtype, jnp.floating) and not jnp.issubdtype(targets.dtype, jnp.complexfloating)
    if x.shape != targets.shape or not real:
        raise ValueError(
            f"{name} are {shown(x)} and targets {shown(targets)}; legal are float {name} and real targets of the same "
            f"shape; cast the {name}, or reshape (nothing is broadcast)"
        )
    return x, targets
