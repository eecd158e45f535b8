"""Losses whose reductions are float32 whatever the logits are, and whose gradients come back in the logits' dtype.

Each function returns one loss per example, so that the caller chooses the mean: `losses.mean()`, or
`sum_and_weight(losses, weights)` where examples weigh differently. (`linear_softmax_cross_entropy`, which never holds
all logits, returns that pair itself.) An example of weight exactly zero is not there: whatever stands in it (NaN,
infinity, a label of −1) reaches neither value nor gradient.

Half-precision inputs are kept for the backward pass as they came; their float32 copies are made again there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mpjax.numerics.cross_entropy import softmax_cross_entropy
from mpjax.numerics.example_weights import checked_weights, present, shown, sum_and_weight, weighted, wide, wide_dtype
from mpjax.numerics.linear_cross_entropy import linear_softmax_cross_entropy

__all__ = [
    "ctc",
    "linear_softmax_cross_entropy",
    "mean_squared_error",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "squared_error",
    "sum_and_weight",
]


def sigmoid_cross_entropy(
    logits: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None
) -> Float[Array, "*shape"]:
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


def squared_error(
    predictions: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None
) -> Float[Array, "*shape"]:
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
) -> Float[Array, "*examples"]:
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
