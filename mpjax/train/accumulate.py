"""Loss and scaled gradients of a batch, whole or in micro-batches whose sums are float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpjax.core.dtypes import wide
from mpjax.core.model import SINKS
from mpjax.core.tree import all_finite, path_of
from mpjax.core.types import Batch, MState, Params, PyTree
from mpjax.numerics.loss_scale import LossScale
from mpjax.numerics.scaled_grad import value_and_scaled_grad
from mpjax.train.state import Aux, merge_trainable


class Gathered(NamedTuple):
    """What one batch gave: everything float32, gradients still scaled, means over the batch's whole weight."""

    loss: jax.Array
    total: jax.Array
    """The loss before its division by the weight, known also where that is zero; the loss itself where there is none."""
    grads: Params
    mstate: MState
    sinks: PyTree
    """What came back for the reserved collection: its cotangent, not scaled back, added up over micro-batches."""
    metrics: dict[str, jax.Array]
    weight: jax.Array | None
    """The total weight; None where the loss function gives none, so that nothing need be checked."""
    mstate_finite: jax.Array
    """Whether `mstate` was finite after every micro-batch: a later one may overwrite what an earlier one spoiled."""


def gather(
    loss_fn: Callable,
    trained: Params,
    frozen: Params,
    mstate: MState,
    batch: Batch,
    rng: jax.Array,
    loss_scale: LossScale,
    accumulate: int,
    over: tuple[str, ...] = (),
) -> Gathered:
    """Differentiate `loss_fn` over a batch.

        for each micro-batch i:  g += w_i · float32(∇ scale · s_i / w_i);  s += s_i;  w += w_i
        loss = s / w;  grads = g / w         (a loss without a weight has w_i = 1; where w_i is 0, s_i is taken by 1)

    `mstate` runs through the micro-batches in order, and the scale is constant within them.

    Args:
      over: axes of the `shard_map` in which this device has its rows of a batch. `grads` are then its part of the mean over all
        rows, g / Σ w over the devices, so that their sum is that mean; all else is of its own rows. Micro-batches are
        differentiated as without, each by its own weight: a sum of weights in each would be one more wait for all devices.
    """
    rest = {name: tree for name, tree in mstate.items() if name != SINKS}
    sinks = mstate.get(SINKS, {})

    def differentiate(
        mstate: MState, batch: Batch, rng: jax.Array, over: tuple[str, ...] = ()
    ) -> tuple[tuple, tuple[Params, PyTree]]:
        loss_of = mean_loss(loss_fn, frozen, mstate, batch, rng, over)
        (_, parts), grads = value_and_scaled_grad(loss_of, loss_scale, (0, 1), has_aux=True)(trained, sinks)
        return parts, grads

    if accumulate == 1:
        check_batch(batch, 1)
        (total, weight, new, metrics), (grads, sunk) = differentiate(rest, batch, rng, over)
        loss = total if weight is None else total / weight
        sunk = as_stored(sunk, sinks, SINKS)
        return Gathered(loss, total, grads, new, sunk, _float32(metrics), weight, all_finite(new))

    def micro(carry: tuple, index_and_batch: tuple) -> tuple[tuple, tuple]:
        grads, sunk, mstate = carry
        index, part = index_and_batch
        (total, weight, new, metrics), (g, s) = differentiate(mstate, part, jax.random.fold_in(rng, index))
        # What it was divided by: a sum may have a gradient where its weight is zero (a penalty on params, signed weights).
        share = jnp.ones_like(total) if weight is None else jnp.asarray(_divisor(weight, ()))
        carry = jax.tree.map(lambda a, b: a + share.astype(b.dtype) * b, grads, g), jax.tree.map(jnp.add, sunk, s), new
        return carry, (total, weight, _float32(metrics), all_finite(new))

    parts = (jnp.arange(accumulate), cut(batch, accumulate))
    carry, (totals, weights, metrics, finite) = jax.lax.scan(micro, (*map(_zeros, (trained, sinks)), rest), parts)
    grads, sunk, new = carry
    shares = jnp.ones_like(totals) if weights is None else weights
    whole = shares.sum()
    means = jax.tree.map(lambda m: _weighted_mean(m, shares), metrics)
    divisor = _divisor(accumulate if weights is None else whole, over)
    grads = jax.tree.map(lambda g: g / jnp.asarray(divisor, g.dtype), grads)
    loss = totals.sum() / whole
    return Gathered(
        loss,
        loss if weights is None else totals.sum(),
        grads,
        new,
        as_stored(sunk, sinks, SINKS),
        means,
        None if weights is None else whole,
        finite.all(),
    )


def mean_loss(
    loss_fn: Callable, frozen: Params, mstate: MState, batch: Batch, rng: jax.Array, over: tuple[str, ...] = ()
) -> Callable:
    """What a step differentiates: `(trained, sinks) -> (mean loss, (total, weight, new mstate, metrics))`.

    Args:
      mstate: without the reserved collection, which `sinks` is.
      over: as `gather` takes it; the mean loss is then this device's part of it.
    """

    def loss_of(trained: Params, sinks: PyTree) -> tuple[jax.Array, tuple]:
        full = {**mstate, SINKS: sinks} if sinks else mstate
        total, weight, aux = _read(loss_fn(merge_trainable(trained, frozen), full, batch, rng), full)
        mean = total / _divisor(1 if weight is None else weight, over)
        return mean, (total, weight, _without_sinks(aux.mstate, mstate), aux.metrics)

    return loss_of


def _divisor(weight: jax.Array | int, over: tuple[str, ...]) -> jax.Array | int:
    """By what a sum of losses is divided: their weight on all devices, or 1 where that is zero.

    A number stays one: jax multiplies it by the number of devices, which else would wait for each other before the backward pass.
    """
    whole = jax.lax.psum(weight, over) if over else weight
    return whole if isinstance(whole, int) else jnp.where(whole == 0, jnp.ones_like(whole), whole)


def cut(batch: Batch, parts: int) -> Batch:
    """The batch as `parts` micro-batches along a new leading axis; leaves without an axis are repeated.

    Micro-batch i takes every `parts`-th row from row i on: `reshape(n / k, k).swapaxes(0, 1)`. Under data parallelism each
    device then cuts the rows that it holds; cut the other way, every device computed all rows.

    >>> cut(jnp.arange(6), 2).tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    check_batch(batch, parts)

    def leaf(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        if x.ndim == 0:
            return jnp.broadcast_to(x, (parts,))
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(leaf, batch)


def check_batch(batch: Batch, parts: int) -> None:
    """Refuse an empty batch, one that `parts` does not divide, and leaves whose leading axes differ where it is cut."""
    rows = {path_of(k): x.shape[0] for k, x in jax.tree_util.tree_flatten_with_path(batch)[0] if jnp.ndim(x) > 0}
    for path, n in rows.items():
        where = f"batch[{path}]" if path else "the batch"
        if n == 0:
            raise ValueError(f"{where} has 0 rows; a step needs at least one: drop the empty batch")
        if n % parts:
            raise ValueError(
                f"{where} has {n} rows, which accumulate={parts} does not divide; "
                f"use a batch of {n // parts * parts or parts} rows, or another accumulate"
            )
    if parts > 1 and len(set(rows.values())) > 1:
        raise ValueError(
            f"the batch cannot be cut: its leading axes differ, {rows}; give every leaf the same number of rows"
        )


def _read(out: Any, mstate: MState) -> tuple[jax.Array, jax.Array | None, Aux]:
    """(loss or sum, weight or None, aux) from any of the four forms that a loss function may return."""
    loss, aux = (
        (out[0], out[1]) if isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Aux) else (out, None)
    )
    total, weight = loss if isinstance(loss, tuple) and len(loss) == 2 else (loss, None)
    if not _is_scalar(total) or not (weight is None or _is_scalar(weight)):
        shapes = jax.tree.map(lambda x: jnp.shape(x) if hasattr(x, "shape") else x, out)
        raise ValueError(
            f"loss_fn returned {shapes} (shapes); legal is a scalar loss or (sum, weight), each "
            "alone or as (loss, Aux(mstate, metrics)): reduce the loss to a scalar, put what else there is into an Aux"
        )
    total = _at_least_float32(total)
    if weight is not None:  # in the sum's dtype: under x64 a Python number would make the loss float64
        weight = jax.lax.stop_gradient(jnp.asarray(weight).astype(total.dtype))
    return total, weight, aux if aux is not None else Aux(mstate, {})


def _is_scalar(x: Any) -> bool:
    return _is_number(x) and jnp.ndim(x) == 0


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) or (hasattr(x, "dtype") and hasattr(x, "ndim"))


def _zeros(tree: PyTree) -> PyTree:
    """What sums start from: zeros in float32 or wider."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), tree)


def _at_least_float32(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(wide(x.dtype))


def _float32(metrics: Any) -> dict[str, jax.Array]:
    if not isinstance(metrics, Mapping) or not all(_is_number(x) for x in metrics.values()):
        raise ValueError(f"loss_fn returned the metrics {metrics}; legal is a dict from name to number: flatten it")
    return {name: jnp.asarray(x).astype(jnp.float32) for name, x in metrics.items()}


def _weighted_mean(values: jax.Array, shares: jax.Array) -> jax.Array:
    """Over the leading axis; a micro-batch of weight zero has no say, whatever its value."""
    shares = shares.astype(jnp.float32).reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.where(shares == 0, jnp.zeros_like(values), shares * values).sum(0) / shares.sum()


def _without_sinks(new: Any, old: MState) -> MState:
    rest = {name: tree for name, tree in new.items() if name != SINKS} if isinstance(new, Mapping) else new
    return as_stored(rest, old, "mstate")


def as_stored(new: PyTree, old: PyTree, what: str) -> PyTree:
    """`new` in the dtypes of `old`, strongly typed: a state whose dtypes drift is compiled again at every step."""
    came: Any = jax.tree.structure(new)
    if came != jax.tree.structure(old):
        raise ValueError(
            f"{what} changed its structure in the step: {came} came where "
            f"{jax.tree.structure(old)} is stored; return the tree that was passed in, with new values"
        )
    for (keys, x), ref in zip(jax.tree_util.tree_flatten_with_path(new)[0], jax.tree.leaves(old), strict=True):
        if jnp.shape(x) != jnp.shape(ref):
            raise ValueError(
                f"{what} changed its shape in the step: {path_of(keys)} came with {jnp.shape(x)} where {jnp.shape(ref)} "
                "is stored; return the shapes that were passed in"
            )
    return jax.tree.map(lambda x, ref: jax.lax.convert_element_type(x, ref.dtype) if _has_dtype(ref) else x, new, old)


def _has_dtype(x: Any) -> bool:
    """Whether it can be converted: a number, not a key."""
    return hasattr(x, "dtype") and not jnp.issubdtype(x.dtype, jax.dtypes.extended)
