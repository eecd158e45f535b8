"""The Linen door: `flax.linen.Module` + rules → `Model`, by interception of every module call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from mpjax.core.model import Model
from mpjax.core.tree import cast_by_path, cast_floating, cast_like, path_of
from mpjax.core.types import MState, Params
from mpjax.numerics.delayed import COLLECTION, histories
from mpjax.policy.patterns import lineage
from mpjax.policy.resolution import Table, resolution_table
from mpjax.policy.rules import PolicyMap
from mpjax.wrap.arguments import call_arguments
from mpjax.wrap.linen.calls import Interceptor
from mpjax.wrap.linen.layers import in_full_if_it_runs, init_in_full, takes_delayed, unfit
from mpjax.wrap.linen.sites import Sites, record
from mpjax.wrap.reserved import apart, reserved

STORED_AS_COMPUTED = ("cache",)
"""Collections that a layer reads and writes in its compute dtype; they are stored in the dtype they came with."""


def takes(module: Any) -> bool:
    """Whether this door opens for `module`."""
    return isinstance(module, nn.Module)


def wrap_linen(module: nn.Module, rules: PolicyMap, streams: tuple[str, ...]) -> Model:
    """`mpjax.wrap` for Linen: see there."""
    known: dict[Any, Sites] = {}  # one entry per way of calling the module: a cache of abstract traces, nothing else

    def sites_of(key: Any, call: Callable[[], Any], params: Params = None) -> Sites:
        if key not in known:
            found = in_full_if_it_runs(lambda: record(call, unfit), rules)
            rules.check(dict.fromkeys(_module_paths(params)) | found.classes, frozenset(found.scanned))
            known[key] = found
        return known[key]

    def init_call(rng: Any, args: tuple, kwargs: dict) -> tuple[Any, Callable[[], Any]]:
        method, kwargs, _ = call_arguments(type(module), args, kwargs)
        keys = {"params": rng} | {name: jax.random.fold_in(rng, n) for n, name in enumerate(streams, 1)}
        return ("init", method, _signature(args, kwargs)), functools.partial(
            module.init, keys, *args, method=method, **kwargs
        )

    def init(rng: jax.Array, *args: Any, **kwargs: Any) -> tuple[Params, MState]:
        key, run = init_call(rng, args, kwargs)
        sites = sites_of(key, run)
        with nn.intercept_methods(init_in_full(rules, sites.classes)):
            variables = dict(in_full_if_it_runs(run, rules))
        params = variables.pop("params", {})
        if delayed := [path for path, cls in sites.classes.items() if takes_delayed(rules, path, sites.classes, cls)]:
            variables[COLLECTION] = histories(delayed)
        return cast_by_path(params, lambda path: _policy_at(rules, sites, path).param_dtype), variables

    def apply(params: Params, mstate: MState, *args: Any, rng: jax.Array | None = None, **kwargs: Any) -> Any:
        method, kwargs, _ = call_arguments(type(module), args, kwargs)
        mstate, kept = apart(mstate)
        keys = {} if rng is None else {n: jax.random.fold_in(rng, i) for i, n in enumerate(("params", *streams))}
        run = functools.partial(module.apply, rngs=keys, mutable=list(mstate), method=method)
        key = ("apply", method, rng is None, _signature((params, mstate, *args), kwargs))

        def in_one_dtype() -> Any:
            # What `cast_params` gave is of several dtypes, and the module without the policy would mix them: a scan
            # refuses a carry that changes its dtype.
            variables, inputs, named = cast_floating(({"params": params, **mstate}, args, kwargs), "float32")
            return run(variables, *inputs, **named)

        sites = sites_of(key, in_one_dtype, params)

        def compute_dtype(path: str) -> Any:
            return _policy_at(rules, sites, path).compute_dtype

        stored = {name: cast_by_path(mstate[name], compute_dtype) for name in STORED_AS_COMPUTED if name in mstate}
        with reserved(kept) as sinks, Interceptor(rules, sites, sinks, by_path=bool(kept)) as interceptor:
            with nn.override_named_call(False), nn.intercept_methods(interceptor):
                out, changed = run({"params": params, **mstate, **stored}, *args, **kwargs)
        return out, (_as_stored(dict(changed), mstate) if mstate else mstate) | kept

    def table(*args: Any, **kwargs: Any) -> Table:
        key, run = init_call(jax.random.key(0), args, kwargs)
        sites = sites_of(key, run)
        return resolution_table(rules, sites.classes, frozenset(sites.scanned), sites.rounded_at, sites.unfit)

    def cast_params(params: Params) -> Params:
        classes = {path: cls for sites in known.values() for path, cls in sites.classes.items()}
        if not classes:
            raise ValueError("cast_params: the module's paths are unknown yet; call init, apply or explain once before")
        return cast_by_path(params, lambda path: rules.resolve(_owner(path), classes).policy.compute_dtype)

    return Model(init, apply, policy=rules, table=table, cast_params=cast_params)


def _as_stored(changed: MState, before: MState) -> MState:
    """The collections after a call, in the dtypes that they had before.

    Raises:
      ValueError: the call changed what is in a collection, as `sow` does, which by default makes a tuple longer.
    """
    changed = {name: changed.get(name, tree) for name, tree in before.items()}  # Flax leaves an empty one out
    for name, tree in before.items():
        structure: Any = jax.tree.structure(tree)
        if jax.tree.structure(changed[name]) != structure:
            raise ValueError(
                f"the call added to mstate[{name!r}], or took from it; legal is what init gave, with other values; make each "
                "variable in init, and give sow a reduce_fn that keeps one value: "
                "self.sow(..., init_fn=lambda: 0.0, reduce_fn=lambda old, new: new)"
            )
    return cast_like(changed, before)


def _signature(args: tuple, kwargs: dict[str, Any]) -> Any:
    """What may change which modules a call visits: structure, shapes and static values."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    return structure, tuple((x.shape, x.dtype) if hasattr(x, "shape") else x for x in leaves)


def _policy_at(rules: PolicyMap, sites: Sites, leaf_path: str) -> Any:
    return rules.resolve(_owner(leaf_path), sites.classes).policy


def _owner(leaf_path: str) -> str:
    """The module whose variable this is: `a/b/kernel` belongs to `a/b`."""
    return leaf_path.rpartition("/")[0]


def _module_paths(params: Params) -> list[str]:
    """Every module path that a params tree knows of."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return [path for keys, _ in leaves for path in lineage(_owner(path_of(keys)))]
