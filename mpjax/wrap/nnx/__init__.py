"""The NNX door: a constructor or an instance + rules → `Model`, by a copy of the graph whose modules know their site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mpjax.core.model import Model
from mpjax.core.tree import cast_by_path
from mpjax.core.types import MState, Params
from mpjax.numerics.delayed import COLLECTION, histories
from mpjax.policy.resolution import Table, resolution_table
from mpjax.policy.rules import PolicyMap
from mpjax.wrap.arguments import call_arguments
from mpjax.wrap.nnx.calls import SITE, bordered, method_of, probed_by, read_in_stream, running
from mpjax.wrap.nnx.layers import attributes_for, sequence_takes, takes_delayed, unfit
from mpjax.wrap.nnx.leaves import Leaves, without_sown
from mpjax.wrap.nnx.sites import Graph, Site, plan_sites, read_graph
from mpjax.wrap.reserved import apart, reserved


def takes(module: Any) -> bool:
    """Whether this door opens for `module`: an instance, a class, or a function, which is taken for a constructor."""
    if isinstance(module, type):
        return issubclass(module, nnx.Module)
    return isinstance(module, nnx.Module) or callable(module)


def wrap_nnx(source: nnx.Module | Callable[..., nnx.Module], rules: PolicyMap) -> Model:
    """`mpjax.wrap` for NNX: see there."""
    # Built for real: under eval_shape NNX takes a plain array attribute for a static one.
    sample = _build(source, jax.random.key(0))
    graph = read_graph(sample)
    sites = plan_sites(graph, rules)
    leaves = Leaves(sample)
    delayed = [sites[id(m.node)].path for m in graph.modules if takes_delayed(m.node, sites[id(m.node)])]
    classes, plain = graph.classes, nnx.graphdef(sample)
    misfits = {path: why for m in graph.modules if (why := unfit(m.node)) is not None for path in m.owners}
    instrument(graph, sites)
    instrumented = nnx.graphdef(sample)
    del sample, graph  # only the structure is needed from here on

    def policy_at(path: str) -> Any:
        return rules.resolve(path.rpartition("/")[0], classes).policy

    def init(rng: jax.Array, *args: Any, **kwargs: Any) -> tuple[Params, MState]:
        params, mstate = leaves.read(_build(source, rng))
        params = cast_by_path(params, lambda path: policy_at(path).param_dtype)
        mstate = mstate | ({COLLECTION: histories(delayed)} if delayed else {})
        return jax.tree.map(jnp.copy, (params, mstate))  # of an instance every leaf is still the user's

    def apply(params: Params, mstate: MState, *args: Any, rng: jax.Array | None = None, **kwargs: Any) -> Any:
        method, kwargs, train = call_arguments(classes[""], args, kwargs)
        if method == "__call__" and "train" in kwargs and not sequence_takes("train", classes):
            train = kwargs.pop("train")
        mstate, kept = apart(mstate)
        streams = mstate if rng is None else leaves.reseeded(mstate, rng)
        module = leaves.merge(instrumented, params, streams)
        if train is not None:
            module.train() if train else module.eval()
        call = method_of(module, method)
        with reserved(kept) as sinks:
            token = running.set(None), probed_by.set(sinks)  # one wrapped model may run inside another
            try:
                out = call(*args, **kwargs)
            finally:
                running.reset(token[0])
                probed_by.reset(token[1])
        return out, leaves.updated(module, mstate, keep_rngs=rng is not None) | kept

    def table(*args: Any, **kwargs: Any) -> Table:
        return resolution_table(rules, classes, unfit=misfits)

    def cast_params(params: Params) -> Params:
        return cast_by_path(params, lambda path: policy_at(path).compute_dtype)

    def merge(params: Params, mstate: MState) -> nnx.Module:
        return leaves.merge(plain, *jax.tree.map(jnp.copy, (params, apart(mstate)[0])))

    return Model(init, apply, policy=rules, table=table, cast_params=cast_params, merge=merge)


def _build(source: Any, rng: jax.Array) -> nnx.Module:
    """A module of our own: the constructor's, or a copy of the user's instance, which is only read."""
    if isinstance(source, nnx.Module):
        return without_sown(nnx.clone(source))
    module = source(rngs=nnx.Rngs(rng)) if isinstance(source, type) else source(nnx.Rngs(rng))
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"got a constructor that returned {type(module).__name__}; wrap takes an nnx.Module or a function "
            "from nnx.Rngs to one: lambda rngs: Net(rngs=rngs)"
        )
    return module


def instrument(graph: Graph, sites: Mapping[int, Site]) -> None:
    """Give every module of a graph of our own its site and its border, and every Param the dtype of its reader."""
    for found in graph.modules:
        module, site = found.node, sites[id(found.node)]
        for name, value in (attributes_for(module, site) | {SITE: site}).items():
            setattr(module, name, value)
        _become(module, bordered)
    for found in graph.variables:
        if isinstance(found.node, (nnx.Param, nnx.Cache)):
            _become(found.node, read_in_stream)


def _become(node: Any, subclass_of: Callable[[Any], type]) -> None:
    object.__setattr__(node, "__class__", subclass_of(type(node)))
