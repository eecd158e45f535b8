"""One sum of gradients over devices, in a dtype of choice, which GSPMD does not make: each device differentiates for itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from mpjax.core.dtypes import canonical, wide
from mpjax.core.types import Batch, DTypeLike, MState, Params, PyTree
from mpjax.numerics.loss_scale import LossScale
from mpjax.train.accumulate import Gathered, check_batch, cut as micro_batches, gather
from mpjax.train.fully_sharded import along, boxes_opened, dtypes_used, made_whole, summed_and_cut
from mpjax.train.specs import Axis, automatic, devices_along
from mpjax.train.state import merge_trainable, split_trainable

SUMS = ("float32", "bfloat16")
"""Not float16: small gradients are zero there without a loss scale, and a policy that computes in bfloat16 has none."""


def sum_dtype(reduce_dtype: DTypeLike | None, mesh: Mesh | None) -> np.dtype | None:
    """In which gradients are to be summed over devices.

    Raises:
      ValueError: a dtype that is none of `SUMS`, or one without a mesh.
    """
    if reduce_dtype is None:
        return None
    dtype = canonical(reduce_dtype)
    if dtype.name not in SUMS:
        legal = ", ".join(map(repr, SUMS))
        raise ValueError(f"got reduce_dtype={reduce_dtype!r}; legal are {legal}, or None for what GSPMD does")
    if mesh is None:
        raise ValueError(
            f"reduce_dtype={dtype.name!r} came without a mesh; give mesh= (and axis=) on which the batch lies"
        )
    return dtype


def gather_apart(
    mesh: Mesh,
    axis: Axis,
    placed: Sequence[Any],
    reduce_dtype: np.dtype,
    loss_fn: Callable,
    trained: Params,
    frozen: Params,
    mstate: MState,
    batch: Batch,
    rng: jax.Array,
    loss_scale: LossScale,
    accumulate: int,
) -> Gathered:
    """`gather`, each device of `axis` for its own rows, then one sum over the devices.

        on device d:  loss_d, g_d, w_d = gather(loss_fn, …, rows of d, fold_in(rng, d))      w_d = 1 without weights
        loss = Σ_d w_d · loss_d / Σ_d w_d;  metrics likewise;  mstate = its mean over d
        grads = float32(Σ_d reduce_dtype(g_d))               g_d is the part of d in the gradient of that mean

    Left to GSPMD, the sum over devices is part of the product that makes a gradient and runs in that product's dtype.
    Axes of the mesh other than `axis` stay with GSPMD (tensor parallelism goes on inside). Params cut over `axis` itself
    are made whole for the length of the step, and of the sum each device gets the part that it holds.

    Args:
      mesh, axis: on which the batch lies.
      placed: where each leaf of the params lies; none: on every device.
      reduce_dtype: in which gradients are summed: float32 (their own dtype) or bfloat16. All else is summed in its own.
      loss_fn, trained, frozen, mstate, batch, rng, loss_scale, accumulate: as `gather` takes them.
    """
    mesh = automatic(mesh)
    names = axis if isinstance(axis, tuple) else (axis,)
    devices = devices_along(mesh, axis, "the batch")
    if devices == 1:  # nothing to sum, and where another axis has several devices XLA fails on a sum over one
        rng = jax.random.fold_in(rng, 0)
        return gather(loss_fn, trained, frozen, mstate, batch, rng, loss_scale, accumulate)

    check_batch(batch, devices)  # a table beside the rows would be cut as they are
    loss_fn = boxes_opened(loss_fn, names)
    params = merge_trainable(trained, frozen)
    leaves: list[jax.Array] = jax.tree.leaves(params)
    structure: Any = jax.tree.structure(params)
    # A None among the params themselves is no leaf, and neither trained nor frozen.
    mask = tuple(jax.tree.leaves(jax.tree.map(lambda _, x: x is not None, params, trained)))
    cuts = [along(place, axis) for place in placed] or [[] for _ in leaves]
    specs = [PartitionSpec(*(entry or None for entry in cut)) for cut in cuts]
    whole, rows = PartitionSpec(), PartitionSpec(axis)
    # At a sum of bfloat16 over some axes of a mesh of CPUs XLA ends the process (AllReducePromotion, jax 0.10 to 0.12),
    # which there would make it one of float32.
    widened = mesh.devices.flat[0].platform == "cpu" and len(names) < len(mesh.axis_names)

    def on_each(batch: Batch, params: list[jax.Array], mstate: MState, *rest: Any) -> Gathered:
        rng, loss_scale = rest
        index = jax.lax.axis_index(names)
        rng = jax.random.fold_in(rng, index)  # or each device would drop the same units
        if any(map(any, cuts)):
            shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
            micro = jax.tree.map(lambda x: x[0], micro_batches(batch, accumulate))
            used = dtypes_used(loss_fn, structure.unflatten(shapes), mstate, micro, rng)
            params = list(map(made_whole, params, cuts, used))
        trained, frozen = split_trainable(structure.unflatten(params), mask)
        found = gather(loss_fn, trained, frozen, mstate, batch, rng, loss_scale, accumulate, names)
        kept = [cut for cut, keep in zip(cuts, mask, strict=True) if keep]
        grads = _summed(found.grads, kept, names, reduce_dtype, widened)
        return _combined(found, names, devices, index == 0)._replace(grads=grads)

    out = Gathered._make([whole] * len(Gathered._fields))._replace(
        grads=split_trainable(structure.unflatten(specs), mask)[0]
    )
    # Without check_vma=False jax itself sums the gradient of a replicated param, in the dtype to which it was cast.
    apart = jax.shard_map(
        on_each,
        mesh=mesh,
        in_specs=(jax.tree.map(lambda x: rows if jnp.ndim(x) else whole, batch), specs, whole, whole, whole),
        out_specs=out,
        axis_names=set(names),
        check_vma=False,
    )
    return apart(batch, leaves, mstate, rng, loss_scale)


def _summed(
    grads: Params, cuts: list[list[tuple[str, ...]]], axis: tuple[str, ...], reduce_dtype: np.dtype, widened: bool
) -> Params:
    """Gradients added up over the devices in `reduce_dtype`, or, widened, in float32 of what that holds."""

    def summed(g: jax.Array, cut: list[tuple[str, ...]]) -> jax.Array:
        if reduce_dtype != jnp.bfloat16:
            return summed_and_cut(g, cut, axis)
        if widened:
            return _rounded(summed_and_cut(_rounded(g), cut, axis))
        return summed_and_cut(g.astype(reduce_dtype), cut, axis).astype(g.dtype)

    leaves: list[jax.Array] = jax.tree.leaves(grads)
    structure: Any = jax.tree.structure(grads)
    return structure.unflatten([summed(g, cut) for g, cut in zip(leaves, cuts, strict=True)])


def _combined(found: Gathered, axis: tuple[str, ...], devices: int, first: jax.Array) -> Gathered:
    """What the devices found, as if one had: means by weight, and the same on every device. Gradients are left as they are."""

    def added(tree: PyTree) -> PyTree:
        return jax.lax.psum(tree, axis)

    total, finite = added(found.total), found.mstate_finite
    if jax.tree.leaves(found.mstate):  # a state that does not exist is finite on every device
        finite = added((~finite).astype(jnp.int32)) == 0
    weight = None if found.weight is None else added(found.weight)
    share = jnp.ones_like(found.loss) if found.weight is None else found.weight
    all_shares = jnp.asarray(devices, share.dtype) if weight is None else weight

    def mean(x: jax.Array) -> jax.Array:  # a device without weight has no say in a metric, whatever its value
        part = share.astype(x.dtype)
        return added(jnp.where(part == 0, jnp.zeros_like(x), part * x)) / all_shares.astype(x.dtype)

    return found._replace(
        loss=total / all_shares,
        total=total,
        mstate=jax.tree.map(lambda x: _agreed(x, axis, first), found.mstate),
        sinks=added(found.sinks),
        metrics=jax.tree.map(mean, found.metrics),
        weight=weight,
        mstate_finite=finite,
    )


def _rounded(x: jax.Array) -> jax.Array:
    """To what bfloat16 holds, in the dtype of `x`: XLA leaves out a cast there and back."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _agreed(x: jax.Array, axis: tuple[str, ...], first: jax.Array) -> jax.Array:
    """One value for all devices: the mean of floats; of anything else (counters, keys) what the first device has."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _agreed(jax.random.key_data(x), axis, first)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jax.lax.pmean(x.astype(wide(x.dtype)), axis).astype(x.dtype)
    number = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
    return jax.lax.psum(jnp.where(first, number, jnp.zeros_like(number)), axis).astype(x.dtype)
