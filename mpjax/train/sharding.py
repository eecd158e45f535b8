"""Where a train state and its batches lie on a mesh of devices: by `jax.sharding` and jit, nothing home-made."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpjax.core.processes import put
from mpjax.core.tree import path_of
from mpjax.core.types import Batch, PyTree
from mpjax.train.specs import Axis, Placement, Rules, as_mapping, automatic, devices_along, is_box
from mpjax.train.spread import own_rows, refuse_different
from mpjax.train.state import TrainState, own_copy, refuse_donated

B = TypeVar("B", bound=Batch)


def state_shardings(state: TrainState, mesh: Mesh, rules: Rules = None) -> TrainState:
    """The `NamedSharding` of every leaf of a train state, as a tree of the state's own structure.

        param            the first rule whose glob governs its path; else its own metadata; else replicated
        opt_state, ema   a leaf whose key path ends in a param's and that has its shape lies as that param does
        all else         replicated

    Params have metadata of their own as a Linen box (`nn.with_partitioning`) or as an array that already lies on this
    mesh (NNX models that were made sharded). Optimizer leaves are matched by path and shape, so `masked`,
    `multi_transform` and `inject_hyperparams` need no special case, and factored moments (adafactor's rows and columns),
    whose shapes are no param's, stay whole.

    Args:
      state: a `TrainState` of arrays or `ShapeDtypeStruct`s.
      mesh: its axes are taken as `Auto`, also where `jax.make_mesh` made them `Explicit`: jit places the activations.
        Batches that you place without `shard_batch`, and what you give to `jax.set_mesh`, must then lie on `Auto` axes, too.
      rules: from glob to `PartitionSpec`, `"fsdp"` or `fsdp(…)`, in the language of a `PolicyMap` (`"head"` means what is
        below it too; `"re:…"` is a regex over the whole path of a param). Alone, `"fsdp"` or `fsdp(…)` holds for all.

    Returns:
      A `TrainState` of `NamedSharding`s: for `jax.device_put`, or as `out_shardings` of a jitted `TrainState.create`, so
      that a model too large for one device is never whole on any.

    Raises:
      ValueError: a rule that acts on no param; a spec with more entries than the param has dimensions, with an axis that
        the mesh lacks, or whose devices do not divide the dimension.

    Source: Xu et al., GSPMD (2021).

    >>> import optax
    >>> from mpjax.core.model import Model
    >>> model = Model(lambda rng, x: ({"w": jnp.zeros((4, 2))}, {}), lambda p, m, x, rng=None: (x @ p["w"], m))
    >>> create = lambda key: TrainState.create(model, optax.adam(1e-3), key, jnp.ones((1, 4)))
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> shardings = state_shardings(jax.eval_shape(create, jax.random.key(0)), mesh, {"w": PartitionSpec("data")})
    >>> state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))
    >>> tuple(state.opt_state[0].mu["w"].sharding.spec)
    ('data',)
    """
    mesh = automatic(mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    placement = Placement(mesh, as_mapping(rules))
    structure: Any
    keyed, structure = jax.tree_util.tree_flatten_with_path(state.params, is_leaf=is_box)
    params = structure.unflatten([placement.place(keys, x) for keys, x in keyed])
    placement.refuse_idle([path_of(keys) for keys, _ in keyed])

    def beside(tree: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda keys, x: placement.of_twin(keys, x) or whole, tree)

    rest = jax.tree.map(lambda x: whole, dataclasses.replace(state, params=None, opt_state=None, ema=None))
    return dataclasses.replace(rest, params=params, opt_state=beside(state.opt_state), ema=beside(state.ema))


def shard_state(state: TrainState, mesh: Mesh, rules: Rules = None) -> TrainState:
    """The same train state, placed on a mesh: params by rules, optimizer state and moving average beside their params.

        state_shardings(state, mesh, rules), then every leaf is copied to where it says

    The step keeps what it finds: its new state lies as the old one did. Without rules every device holds all (data
    parallelism); `"fsdp"` cuts params over the axis of the batch; specs with a second axis are tensor parallelism.

    Args:
      state, mesh, rules: as for `state_shardings`. Where the mesh spans several processes, each gives the same state.

    Returns:
      A `TrainState` of the same structure and values, which shares no memory with the one that came: a donating step
      leaves the caller's arrays alive. (`jax.device_put` alone reuses the buffer that already lies on a device.)

    Raises:
      ValueError: as for `state_shardings`; or the processes came with different values.

    Source: Xu et al., GSPMD (2021).

    >>> import optax
    >>> from mpjax.core.model import Model
    >>> model = Model(lambda rng, x: ({"w": jnp.zeros((4, 2))}, {}), lambda p, m, x, rng=None: (x @ p["w"], m))
    >>> state = TrainState.create(model, optax.adam(1e-3), jax.random.key(0), jnp.ones((1, 4)))
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> tuple(shard_state(state, mesh, {"**/w": PartitionSpec("data", None)}).params["w"].sharding.spec)
    ('data', None)
    """
    refuse_donated(state)
    shardings = state_shardings(state, mesh, rules)
    if not shardings.step.is_fully_addressable:
        refuse_different(state)
    return jax.tree.map(lambda x, sharding: put(own_copy(x), sharding), state, shardings)


def shard_batch(batch: B, mesh: Mesh, axis: Axis = "data", *, process_local: bool = False) -> B:
    """A batch with its rows spread over the devices of one mesh axis; leaves without an axis go to every device.

    Args:
      batch: a pytree of arrays (numpy or jax) that share their leading axis: the whole batch, or with `process_local` this
        process's rows of it.
      mesh: as for `shard_state`.
      axis: the name of the mesh axis over which rows are spread, or a tuple of names.
      process_local: of several processes (`jax.distributed`) each gives the rows that its own devices are to hold, the same
        number everywhere, in the order of the mesh; leaves without an axis must be the same on all. Nothing is sent, and
        `prefetch` may do it from its thread. False: each gives the whole batch, which jax compares over all processes.

    Returns:
      The same pytree of `jax.Array`s; device i of n holds rows i·rows/n to (i+1)·rows/n of each leaf.

    Raises:
      ValueError: rows that the devices do not divide, or an axis that the mesh lacks.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> tuple(shard_batch({"x": jnp.ones((6, 2)), "temperature": 1.0}, mesh)["x"].sharding.spec)
    ('data',)
    """
    mesh = automatic(mesh)
    if process_local:
        devices_along(mesh, axis, "the batch")  # refuses an axis that is none
        return own_rows(batch, mesh, axis)
    check_rows(batch, mesh, axis)
    rows, whole = NamedSharding(mesh, PartitionSpec(axis)), NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.device_put(x, rows if jnp.ndim(x) else whole), batch)


def check_rows(batch: Batch, mesh: Mesh, axis: Axis, parts: int = 1) -> None:
    """Refuse rows that the devices of `axis` cannot share evenly, in each of `parts` micro-batches."""
    n = devices_along(mesh, axis, "the batch")
    for keys, x in jax.tree_util.tree_flatten_with_path(batch)[0]:
        if jnp.ndim(x) and x.shape[0] % (n * parts):
            path, rows, unit = path_of(keys), x.shape[0], n * parts
            cut = f"accumulate={parts} micro-batches on {n} devices" if parts > 1 else f"{n} devices"
            raise ValueError(
                f"{f'batch[{path}]' if path else 'the batch'} has {rows} rows, which the {cut} of mesh axis {axis!r} cannot "
                f"share evenly; use a multiple of {unit} rows, such as {rows // unit * unit or unit}, or another mesh"
            )
