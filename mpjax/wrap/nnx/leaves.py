"""Where each array of an NNX module lies: between the module and the two pytrees of a `Model`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from mpjax.core.dtypes import is_float
from mpjax.core.types import MState, Params, PyTree
from mpjax.wrap.nnx.sites import Keys, children

COLLECTIONS = {nnx.BatchStat: "batch_stats", nnx.Cache: "cache", nnx.RngState: "rngs"}
"""Where `mstate` keeps the Variables of a type: under Linen's name where Linen has one, else under the type's own."""

ARRAYS = "arrays"
"""Where it keeps arrays that are plain attributes of a module."""

Place = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array: its keys in the module, its place in the pytree, and what kind of Variable holds it (None: none)."""

    keys: Keys
    place: Place
    kind: type | None
    axes: tuple | None
    """Its sharding annotation, one mesh axis (or None) a dimension."""

    def holds(self, kind: type) -> bool:
        """Whether a Variable of this kind holds it."""
        return self.kind is not None and issubclass(self.kind, kind)


class Leaves:
    """The arrays of modules of one structure. Sown Intermediates are none of them; Perturbations, which are built in, are."""

    def __init__(self, module: nnx.Module):
        self.params: list[Leaf] = []
        self.state: list[Leaf] = []
        for keys, variable in nnx.to_flat_state(nnx.state(module)):
            kind = type(variable) if isinstance(variable, nnx.Variable) else None
            names = tuple(map(str, keys))
            if kind is None:
                self.state.append(Leaf(keys, (ARRAYS, *names), None, None))
            elif issubclass(kind, nnx.Param):
                self.params.append(Leaf(keys, names, kind, _axes(variable)))
            elif not _is_sown(kind):
                collection = next((name for of, name in COLLECTIONS.items() if issubclass(kind, of)), kind.__name__)
                self.state.append(Leaf(keys, (collection, *names), kind, _axes(variable)))

    def read(self, module: nnx.Module) -> tuple[Params, MState]:
        """The module's arrays as two nested dicts; annotated ones in a box, `flax.core.meta.Partitioned`, as Linen has them."""
        params, mstate = (
            unflatten_dict({leaf.place: _boxed(_at(module, leaf.keys), leaf) for leaf in leaves})
            for leaves in self._both
        )
        return params, mstate

    def merge(self, graphdef: Any, params: Params, mstate: MState) -> nnx.Module:
        """A fresh module of this structure that holds these arrays.

        Raises:
          ValueError: one is missing or one too many.
        """
        state = []
        for what, tree, leaves in zip(("params", "mstate"), (params, mstate), self._both, strict=True):
            given = _flat(tree, leaves)
            missing = ["/".join(leaf.place) for leaf in leaves if leaf.place not in given]
            extra = ["/".join(place) for place in given.keys() - {leaf.place for leaf in leaves}]
            if missing or extra:
                raise ValueError(
                    f"{what} do not fit the module: missing {sorted(missing) or 'nothing'}, extra "
                    f"{sorted(extra) or 'nothing'}; pass what init gave, or a tree of its structure"
                )
            state += [(leaf.keys, _held(meta.unbox(given[leaf.place]), leaf)) for leaf in leaves]
        return nnx.merge(graphdef, nnx.from_flat_state(state), copy=True)

    def reseeded(self, mstate: MState, rng: jax.Array) -> MState:
        """`mstate` with every rng stream at the start of a key of its own, shaped and typed as the stored one."""
        flat = _flat(mstate, self.state)
        streams = [leaf for leaf in self.state if leaf.holds(nnx.RngState)]
        for index, leaf in enumerate(streams):
            old = flat[leaf.place]
            if leaf.holds(nnx.RngKey):
                bits = jax.random.bits(jax.random.fold_in(rng, index), jax.random.key_data(old).shape, "uint32")
                flat[leaf.place] = jax.random.wrap_key_data(bits, impl=jax.random.key_impl(old))
            else:
                flat[leaf.place] = jnp.zeros_like(old)
        return unflatten_dict(flat)

    def updated(self, module: nnx.Module, old: MState, keep_rngs: bool) -> MState:
        """What the module's state is after a call, in the dtypes that it had before.

        Raises:
          ValueError: the call made a Variable.
        """
        known = {leaf.keys for leaf in (*self.params, *self.state)}
        made = [
            "/".join(map(str, keys))
            for keys, variable in nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.Intermediate)))
            if keys not in known and isinstance(variable, nnx.Variable)
        ]
        if made:
            raise ValueError(
                f"the call made state that init did not know: {', '.join(made)}; make it in the constructor"
            )
        before = _flat(old, self.state)
        after = {}
        for leaf in self.state:
            stays = keep_rngs and leaf.holds(nnx.RngState)
            was = before[leaf.place]
            after[leaf.place] = was if stays else _boxed(_as_stored(_at(module, leaf.keys), meta.unbox(was)), leaf)
        return unflatten_dict(after)

    @property
    def _both(self) -> tuple[list[Leaf], list[Leaf]]:
        return self.params, self.state


def without_sown(module: nnx.Module) -> nnx.Module:
    """The module, which is ours, without what calls of the user's have sown in it."""
    nnx.pop(module, lambda _, variable: _is_sown(type(variable)))
    return module


def _is_sown(kind: type) -> bool:
    return issubclass(kind, nnx.Intermediate) and not issubclass(kind, nnx.Perturbation)


def _held(value: Any, leaf: Leaf) -> Any:
    """A value as `nnx.merge` takes it, which counts the arrays of a bare one: a Variable may hold a pytree of them."""
    return value if leaf.kind is None or jax.tree_util.all_leaves([value]) else leaf.kind(value)


def _as_stored(value: Any, before: Any) -> Any:
    structure: Any = jax.tree.structure(before)
    if jax.tree.structure(value) != structure:
        return value
    return jax.tree.map(
        lambda x, old: x.astype(old.dtype) if is_float(old) and hasattr(x, "astype") else x, value, before
    )


def _axes(variable: nnx.Variable) -> tuple | None:
    metadata = variable.get_metadata()
    found = metadata.get("out_sharding", metadata.get("sharding_names"))
    return tuple(found) if found else None


def _boxed(value: Any, leaf: Leaf) -> Any:
    return value if leaf.axes is None else meta.Partitioned(value, leaf.axes)


def _at(module: nnx.Module, keys: Keys) -> Any:
    """The array below a module, found by its keys, since `nnx.state` overlooks plain arrays while jax traces."""
    node: Any = module
    for key in keys:
        node = next(child for name, child in children(node) if name == key or str(name) == str(key))
    return node.get_raw_value() if isinstance(node, nnx.Variable) else node


def _flat(tree: PyTree, leaves: list[Leaf]) -> dict[Place, Any]:
    """A tree by place. What lies at a leaf's place is not opened, whatever it is."""
    places = {leaf.place for leaf in leaves}
    return flatten_dict(tree if isinstance(tree, dict) else {}, is_leaf=lambda place, _: place in places)
