"""What a step on several devices does not leave to GSPMD: float32 sums of gradients, and when cut params are made whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpjax.core.dtypes import wide
from mpjax.core.types import Batch, MState, Params, PyTree
from mpjax.numerics.loss_scale import LossScale
from mpjax.train.accumulate import Gathered, gather
from mpjax.train.specs import Axis, automatic, devices_along


def gather_apart(
    mesh: Mesh,
    axis: Axis,
    loss_fn: Callable,
    trained: Params,
    frozen: Params,
    mstate: MState,
    batch: Batch,
    rng: jax.Array,
    loss_scale: LossScale,
    accumulate: int,
) -> Gathered:
    """`gather`, each device of `axis` for its own rows, then one float32 sum over the devices.

        on device d:  loss_d, g_d, w_d = gather(loss_fn, …, rows of d, fold_in(rng, d))      w_d = 1 without weights
        loss = Σ_d w_d · loss_d / Σ_d w_d;  grads = Σ_d w_d · g_d / Σ_d w_d;  metrics likewise;  mstate = its mean over d

    Left to GSPMD, the sum over devices is part of the product that makes a gradient and runs in that product's dtype.
    Axes of the mesh other than `axis` stay with GSPMD (tensor parallelism goes on inside), and params cut over `axis`
    itself are made whole for the length of the step.
    """
    mesh = automatic(mesh)
    names = axis if isinstance(axis, tuple) else (axis,)
    devices = devices_along(mesh, axis, "the batch")
    whole, rows = PartitionSpec(), PartitionSpec(axis)
    if devices == 1:  # nothing to sum, and where another axis has several devices XLA fails on a sum over one
        rng = jax.random.fold_in(rng, 0)
        return gather(loss_fn, trained, frozen, mstate, batch, rng, loss_scale, accumulate)

    def on_each(batch: Batch, trained: Params, frozen: Params, mstate: MState, *rest: Any) -> Gathered:
        rng, loss_scale = rest
        index = jax.lax.axis_index(names)
        rng = jax.random.fold_in(rng, index)  # or each device would drop the same units
        found = gather(loss_fn, trained, frozen, mstate, batch, rng, loss_scale, accumulate)
        return _combined(found, names, devices, index == 0)

    # Without check_vma=False jax itself sums the gradient of a replicated param, in the dtype to which it was cast.
    apart = jax.shard_map(
        on_each,
        mesh=mesh,
        in_specs=(jax.tree.map(lambda x: rows if jnp.ndim(x) else whole, batch), *[whole] * 5),
        out_specs=whole,
        axis_names=set(names),
        check_vma=False,
    )
    return apart(batch, trained, frozen, mstate, rng, loss_scale)


def _combined(found: Gathered, axis: tuple[str, ...], devices: int, first: jax.Array) -> Gathered:
    """What the devices found, as if one had: means by weight, and the same on every device."""

    def added(tree: PyTree) -> PyTree:
        return jax.lax.psum(tree, axis)

    weight = None if found.weight is None else added(found.weight)
    share = jnp.ones_like(found.loss) if found.weight is None else found.weight
    all_shares = jnp.asarray(devices, share.dtype) if weight is None else weight
    divisor = jnp.where(all_shares == 0, jnp.ones_like(all_shares), all_shares)  # no weight: no gradient

    def mean(x: jax.Array) -> jax.Array:  # a device without weight has no say in a metric, whatever its value
        part = share.astype(x.dtype)
        return added(jnp.where(part == 0, jnp.zeros_like(x), part * x)) / all_shares.astype(x.dtype)

    grads = added(jax.tree.map(lambda g: share.astype(g.dtype) * g, found.grads))
    return Gathered(
        loss=added(found.total) / all_shares,
        total=added(found.total),
        grads=jax.tree.map(lambda g: g / divisor.astype(g.dtype), grads),
        mstate=jax.tree.map(lambda x: _agreed(x, axis, first), found.mstate),
        sinks=added(found.sinks),
        metrics=jax.tree.map(mean, found.metrics),
        weight=weight,
        mstate_finite=added((~found.mstate_finite).astype(jnp.int32)) == 0,
    )


def _agreed(x: jax.Array, axis: tuple[str, ...], first: jax.Array) -> jax.Array:
    """One value for all devices: the mean of floats; of anything else (counters, keys) what the first device has."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _agreed(jax.random.key_data(x), axis, first)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jax.lax.pmean(x.astype(wide(x.dtype)), axis).astype(x.dtype)
    number = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
    return jax.lax.psum(jnp.where(first, number, jnp.zeros_like(number)), axis).astype(x.dtype)


def over_gathered_params(loss_fn: Callable, shardings: PyTree, axis: Axis) -> Callable:
    """`loss_fn`, whose params are made whole along the batch's axis on the way in, and whose gradients are cut up again.

    Left to itself GSPMD may gather the activations instead: where a kernel is cut over the axis of the batch, it took a
    product for one of tensor parallelism, and every device computed its columns for all rows.
    """
    names = {axis} if isinstance(axis, str) else set(axis)

    def without(entry: Any) -> Any:
        if isinstance(entry, tuple):
            rest = tuple(name for name in entry if name not in names)
            return rest or None
        return None if entry in names else entry

    def gathered(x: Any, cut: Any) -> Any:
        if not isinstance(cut, NamedSharding):
            return x
        whole = NamedSharding(cut.mesh, PartitionSpec(*map(without, cut.spec)))
        return x if whole.spec == cut.spec else _as_used(x, whole, cut)

    def over(params: PyTree, *rest: Any) -> Any:
        return loss_fn(jax.tree.map(gathered, params, shardings), *rest)

    return over


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _as_used(x: jax.Array, whole: NamedSharding, cut: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, whole)


_as_used.defvjp(
    lambda x, whole, cut: (jax.lax.with_sharding_constraint(x, whole), None),
    lambda whole, cut, _, g: (jax.lax.with_sharding_constraint(g, cut),),
)
