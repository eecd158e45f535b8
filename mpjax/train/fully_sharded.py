"""Params that are cut up over the axis of the batch (fully sharded): made whole where a loss uses them, in the dtype in which
it does, and their gradients cut up again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.sharding import NamedSharding, PartitionSpec

from mpjax.core.dtypes import wide
from mpjax.core.types import Params
from mpjax.train.specs import Axis, is_box


def over_gathered_params(loss_fn: Callable, placed: Sequence[Any], axis: Axis) -> Callable:
    """`loss_fn`, whose params are made whole along the batch's axis on the way in, and whose gradients are cut up again.

    Left to itself GSPMD may gather the activations instead: where a kernel is cut over the axis of the batch, it took a
    product for one of tensor parallelism, and every device computed its columns for all rows.

    Args:
      loss_fn: of params and more.
      placed: where each leaf of the params lies.
      axis: of the batch.
    """

    cut_here = [any(along(cut, axis)) for cut in placed]
    if not any(cut_here):
        return loss_fn
    loss_fn = boxes_opened(loss_fn, axis)

    def gathered(x: jax.Array, cut: Any, here: bool, used: np.dtype) -> jax.Array:
        if not here:
            return x
        others = PartitionSpec(*(_entry(entry, axis, False) for entry in cut.spec))
        return _as_used(x, NamedSharding(cut.mesh, others), cut, used)

    def over(params: Params, *rest: Any) -> Any:
        leaves: list[jax.Array] = jax.tree.leaves(params)
        structure: Any = jax.tree.structure(params)
        whole = map(gathered, leaves, placed, cut_here, dtypes_used(loss_fn, params, *rest))
        # Not by its jaxpr, which is at hand: the rules of a custom derivative may hold tracers of the trace that made it.
        return loss_fn(structure.unflatten(whole), *rest)

    return over


def boxes_opened(loss_fn: Callable, axis: Axis) -> Callable:
    """`loss_fn`, whose params' Linen boxes (`nn.with_partitioning`) do not name the batch's axes: under `jax.set_mesh` Flax asks
    for that placement where a box is opened, which would undo the gather, and inside `shard_map` can not be had."""

    def opened(x: Any) -> Any:
        names = getattr(x, "names", None) if is_box(x) else None
        return x.replace(names=tuple(_entry(entry, axis, False) for entry in names)) if names else x

    return lambda params, *rest: loss_fn(jax.tree.map(opened, params, is_leaf=is_box), *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _as_used(x: jax.Array, whole: NamedSharding, cut: NamedSharding, used: np.dtype) -> jax.Array:
    """All of `x`, rounded to the dtype in which it is used, and widened again, which the cast that follows undoes."""
    moved = jax.lax.with_sharding_constraint(x.astype(used), cut)
    return jax.lax.with_sharding_constraint(moved, whole).astype(x.dtype)


_as_used.defvjp(
    lambda x, whole, cut, used: (_as_used(x, whole, cut, used), None),
    lambda whole, cut, used, _, g: (jax.lax.with_sharding_constraint(g, cut),),
)


def dtypes_used(loss_fn: Callable, params: Params, *rest: Any) -> list[np.dtype]:
    """For each leaf of the params the dtype in which a loss uses it: its own, or the half dtype to which it is cast.

    One that the loss does nothing with but cast, always to one half dtype, can move between devices in that dtype: the
    same numbers, half the bytes. One with another use keeps its own: an embedding's table, whose rows are looked up
    before they are cast so that their gradients add up in float32.

    >>> params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    >>> dtypes_used(lambda p: (p["kernel"].astype("bfloat16") @ p["scale"].astype("bfloat16") * p["scale"]).sum(), params)
    [dtype(bfloat16), dtype('float32')]
    """

    def arrays(*given: Any) -> list[jax.Array]:  # of what else it returns, the step says what is legal
        return [x for x in jax.tree.leaves(loss_fn(*given)) if isinstance(x, jax.Array)]

    count = len(jax.tree.leaves(params))
    jaxpr = jax.make_jaxpr(arrays)(params, *rest).jaxpr
    leaves = jaxpr.invars[:count]
    uses: list[set[np.dtype]] = [set() for _ in leaves]  # a use that is no cast is one in the param's own dtype
    _note(jaxpr, dict(zip(leaves, range(count), strict=True)), uses)

    def used(own: np.dtype, found: set[np.dtype]) -> np.dtype:
        half = [dtype for dtype in found if dtype in HALF and wide(dtype) == own]
        return half[0] if len(found) == len(half) == 1 else own

    return [used(v.aval.dtype, found) for v, found in zip(leaves, uses, strict=True)]


HALF = (jnp.dtype("bfloat16"), jnp.dtype("float16"))

INTO = ("jit", "remat2", "scan")
"""Operations that hand each operand, or a slice of it, to a jaxpr of theirs. The rules of a custom derivative are not in its
jaxpr, so that what they do with a param is not known. (A rule that closes over a param which is trained is refused by jax.)"""


def _note(jaxpr: Any, params: dict[Any, int], uses: list[set[np.dtype]]) -> None:
    """Add in which dtypes a jaxpr uses those of its variables that are params; a cast is a use in the dtype that it makes."""
    for eqn in jaxpr.eqns:
        known = {i: params[v] for i, v in enumerate(eqn.invars) if not isinstance(v, jex.Literal) and v in params}
        if known and eqn.primitive.name in INTO and eqn.params.get("length") != 0:
            inner = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])  # some are closed
            _note(inner, {inner.invars[i]: leaf for i, leaf in known.items()}, uses)
            continue
        cast = eqn.params["new_dtype"] if eqn.primitive.name == "convert_element_type" else None
        for i, leaf in known.items():
            uses[leaf].add(eqn.invars[i].aval.dtype if cast is None else cast)
    for v in jaxpr.outvars:
        if not isinstance(v, jex.Literal) and v in params:
            uses[params[v]].add(v.aval.dtype)


def along(cut: Any, axis: Axis) -> list[tuple[str, ...]]:
    """For each dimension of an array, over which axes of the batch it is cut.

    >>> from jax.sharding import AbstractMesh
    >>> along(NamedSharding(AbstractMesh((1, 1), ("data", "model")), PartitionSpec(None, ("model", "data"))), "data")
    [(), ('data',)]
    """
    return [_entry(entry, axis, True) or () for entry in cut.spec] if isinstance(cut, NamedSharding) else []


def _entry(entry: Any, axis: Axis, inside: bool) -> tuple[str, ...] | None:
    """Of one entry of a spec, the axes that are the batch's, or those that are not."""
    names = (axis,) if isinstance(axis, str) else axis
    entry = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return tuple(name for name in entry if (name in names) == inside) or None


def made_whole(x: jax.Array, cut: Sequence[tuple[str, ...]], used: np.dtype) -> jax.Array:
    """Inside `shard_map`: a param, gathered in the dtype in which it is used if each device has a part."""
    if not any(cut):
        return x
    whole = x.astype(used)
    for dimension, names in enumerate(cut):
        if names:
            whole = jax.lax.all_gather(whole, names, axis=dimension, tiled=True)
    return whole.astype(x.dtype)


def summed_and_cut(g: jax.Array, cut: Sequence[tuple[str, ...]], axis: tuple[str, ...]) -> jax.Array:
    """Inside `shard_map`: the sum of a gradient over the devices of `axis`, of which each keeps its part."""
    for dimension, names in enumerate(cut):
        if names:
            g = jax.lax.psum_scatter(g, names, scatter_dimension=dimension, tiled=True)
    rest = tuple(name for name in axis if not any(name in names for names in cut))
    return jax.lax.psum(g, rest) if rest else g
