"""Which module sits at which path, under every one of its names, and what its border does: decided once, at wrap time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx

from mpjax.core.tree import canonical_path
from mpjax.policy.rules import PolicyMap, Resolution

Keys = tuple[Any, ...]

CONTAINERS = (nnx.List, nnx.Dict)
"""Modules that are not called: what they hold answers to the module around them."""


@dataclasses.dataclass(frozen=True)
class Site:
    """What a module knows of itself. Static and hashable: as part of the graph it is part of the key of every jit cache."""

    path: str
    compute: np.dtype
    """The dtype inside, and of what flows between the modules that this one calls."""
    hands_back: np.dtype
    """The dtype of results: the caller's compute dtype, or what `output=` says where its rule's subtree is left."""
    keeps_input: bool
    """Float arguments enter as they are."""
    passes: frozenset[np.dtype]
    """Dtypes that an `output=` rule named further inside: such tensors pass up unrounded."""
    dot: str | None = None
    """The recipe by which it multiplies, if it is a dense layer."""


@dataclasses.dataclass
class Found:
    """A module or Variable of the user's graph: the object, and the module that each of its paths belongs to."""

    node: Any
    owners: dict[str, nnx.Module | None]

    @property
    def path(self) -> str:
        """The first of its paths, by which it is known."""
        return next(iter(self.owners))


@dataclasses.dataclass
class Graph:
    """The modules and Variables of one NNX module, each once, and the classes at all paths."""

    modules: list[Found]
    variables: list[Found]

    @property
    def classes(self) -> dict[str, type]:
        """The class at every path, aliases too; in the order of attributes."""
        return {path: type(found.node) for found in self.modules for path in found.owners}

    @property
    def stacks(self) -> frozenset[str]:
        """Paths that may be a stack made by `nnx.vmap`, which leaves no trace but the common leading axis of its variables."""
        lengths: dict[str, set[int]] = {}
        for found in self.variables:
            shape = np.shape(found.node.get_raw_value())
            for path in (p for p in self.classes if found.path.startswith(p + "/")):
                lengths.setdefault(path, set()).add(shape[0] if shape else 0)
        return frozenset(path for path, found in lengths.items() if len(found) == 1 and 0 not in found)


def read_graph(root: nnx.Module) -> Graph:
    """Every module and Variable below `root`, under every path that leads to it."""
    seen: dict[int, Found] = {}
    for path, node, owner in _walk(root, (), None, ()):
        seen.setdefault(id(node), Found(node, {})).owners[path] = owner
    modules = [f for f in seen.values() if isinstance(f.node, nnx.Module) and not isinstance(f.node, CONTAINERS)]
    return Graph(modules, [f for f in seen.values() if isinstance(f.node, nnx.Variable)])


def _walk(node: Any, keys: Keys, owner: nnx.Module | None, above: tuple[int, ...]) -> Iterator[tuple]:
    if id(node) in above:  # a module that refers back to its parent
        return
    if isinstance(node, (nnx.Module, nnx.Variable)):
        yield canonical_path("/".join(map(str, keys))), node, owner
    if isinstance(node, nnx.Module) and not isinstance(node, CONTAINERS):
        owner = node
    for name, child in children(node):
        yield from _walk(child, (*keys, name), owner, (*above, id(node)))


def children(node: Any) -> list[tuple[Any, Any]]:
    """What NNX finds below a node, by key: attributes, items."""
    if isinstance(node, nnx.Pytree):
        return [(name, child) for name, child in vars(node).items() if not name.startswith("_pytree__")]
    if isinstance(node, dict):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, (list, tuple)) else []


def plan_sites(graph: Graph, rules: PolicyMap) -> dict[int, Site]:
    """The site of each module, by `id`.

    Raises:
      ValueError: a rule that can never act, or two aliases of one module or Variable under rules that conflict.
    """
    classes = graph.classes
    rules.check(classes, graph.stacks)
    found: dict[int, Resolution] = {}
    dots: dict[int, str | None] = {}
    for module in graph.modules:
        found[id(module.node)] = _one({p: rules.resolve(p, classes) for p in module.owners}, module)
        recipes = {p: (rules.dot_at(p, classes),) for p in module.owners}
        dots[id(module.node)] = _agreed(recipes, module)[0]
    for variable in graph.variables:
        if isinstance(variable.node, nnx.Param):  # only to refuse a conflict: it is read in its reader's dtype
            _one({p: found[id(owner)] for p, owner in variable.owners.items()}, variable)

    def border(module: Found, path: str) -> tuple[np.dtype, bool, bool]:
        """(what results are handed back in, whether by `output=`, whether arguments are kept) under one of its names."""
        here, owner = found[id(module.node)], module.owners[path]
        enters_rule = owner is None or found[id(owner)].source != here.source
        if here.rule.hands_back and enters_rule:
            return here.policy.output_dtype, True, here.rule.keeps_input
        caller = rules.default.output_dtype if owner is None else found[id(owner)].policy.compute_dtype
        return caller, False, here.rule.keeps_input and enters_rule

    borders = {id(m.node): _agreed({p: border(m, p) for p in m.owners}, m) for m in graph.modules}
    sites = {}
    for module in graph.modules:
        above = tuple(f"{path}/" if path else "" for path in module.owners)
        below = [m for m in graph.modules if m is not module and any(p.startswith(above) for p in m.owners)]
        hands_back, _, keeps_input = borders[id(module.node)]
        deliberate = {borders[id(m.node)][0] for m in below if borders[id(m.node)][1]}
        compute = found[id(module.node)].policy.compute_dtype
        passes = frozenset(deliberate - {compute})
        sites[id(module.node)] = Site(module.path, compute, hands_back, keeps_input, passes, dots[id(module.node)])
    return sites


def _one(resolutions: dict[str, Resolution], what: Found) -> Resolution:
    """The single resolution of all aliases: they may come from several rules, if these say the same."""
    _agreed({path: (r.policy.param_dtype, r.policy.compute_dtype) for path, r in resolutions.items()}, what)
    return resolutions[what.path]


def _agreed(values: dict[str, Any], what: Found) -> Any:
    if len(set(values.values())) > 1:
        told = "; ".join(f"{path!r}: {_told(value)}" for path, value in values.items())
        raise ValueError(
            f"one shared {type(what.node).__name__} is at {len(values)} paths whose rules conflict ({told}); "
            "write rules under which all of its paths get the same dtypes, or do not share it"
        )
    return next(iter(values.values()))


def _told(value: tuple) -> str:
    return ", ".join(str(part) for part in value if isinstance(part, (np.dtype, str))) or "no dot= recipe"
