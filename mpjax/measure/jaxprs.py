"""The jaxpr reader: from a function to its `Program`, through jit, scan, while, cond, remat, shard_map and the rest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from mpjax.measure.flops import product_flops
from mpjax.measure.program import Node, Program, Value


def trace(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Program:
    """The program of `fn` for these arguments; its inputs are their array leaves in order. It is traced, not run.

    Args:
      fn: any function that jax can trace.
      *args, **kwargs: pytrees of arrays or `ShapeDtypeStruct`s; leaves that are no arrays are passed on as they are.
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    traced = {i: x for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")}

    def call(traced: dict[int, Any]) -> Any:
        args, kwargs = jax.tree.unflatten(structure, [traced.get(i, x) for i, x in enumerate(leaves)])
        return fn(*args, **kwargs)

    jaxpr = jax.make_jaxpr(call)(traced).jaxpr
    inputs = [Value(v.aval) for v in jaxpr.invars]
    nodes: list[Node] = []
    outputs = _read(jaxpr, inputs, _Place("", 1, False), nodes)
    return Program(inputs, outputs, nodes)


@dataclasses.dataclass(frozen=True)
class _Place:
    scope: str
    times: int
    in_while: bool


def _read(jaxpr: Any, inputs: Sequence[Value], around: _Place, nodes: list[Node]) -> list[Value]:
    """Append the nodes of a jaxpr whose arguments are `inputs`; returns its results."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    known.update((v, Value(v.aval)) for v in jaxpr.constvars)
    for eqn in jaxpr.eqns:
        place = dataclasses.replace(around, scope=f"{around.scope}/{eqn.source_info.name_stack}")
        operands = tuple(_value(atom, known) for atom in eqn.invars)
        results = _read_equation(eqn, operands, place, nodes)
        known.update(zip(eqn.outvars, results, strict=True))
    return [_value(atom, known) for atom in jaxpr.outvars]


def _value(atom: Any, known: Mapping[Any, Value]) -> Value:
    return Value(atom.aval) if isinstance(atom, jex.Literal) else known[atom]


# No function below is written inside another: under the suite's checks each would be compiled anew at every equation.


def _move(source: Value, target: Value, place: _Place, nodes: list[Node], carried: int | None = None) -> None:
    nodes.append(Node(None, (source,), (target,), place.scope, place.times, place.in_while, carried))


def _entered(values: Sequence[Value], variables: Sequence[Any], place: _Place, nodes: list[Node]) -> list[Value]:
    """What these values are called inside of a body."""
    fresh = [Value(v.aval) for v in variables]
    for source, target in zip(values, fresh, strict=True):
        _move(source, target, place, nodes)
    return fresh


def _read_equation(eqn: Any, operands: tuple[Value, ...], place: _Place, nodes: list[Node]) -> Sequence[Value]:
    name, inner = eqn.primitive.name, list(sub_jaxprs(eqn))
    if name == "custom_linear_solve":
        inner = [_jaxpr(eqn.params["jaxprs"].solve)]  # the others are there for its derivatives, and are not run
    if len(inner) == 1 and _is_call(eqn, inner[0]):
        return _read(inner[0], operands, place, nodes)
    results = tuple(Value(v.aval) for v in eqn.outvars)

    if name == "cond":
        _read_branches(inner, operands[1:], results, place, nodes)
    elif name == "while":
        condition, body = _jaxpr(eqn.params["cond_jaxpr"]), _jaxpr(eqn.params["body_jaxpr"])
        carried = len(operands) - len(body.outvars)  # before it stand the constants of the condition, then of the body
        constants = len(condition.invars) - len(body.outvars)
        loop = dataclasses.replace(place, in_while=True)
        starts = _entered(operands[carried:], body.invars[carried - constants :], place, nodes)
        _read(condition, [*operands[:constants], *starts], loop, nodes)
        ends = _read(body, [*operands[constants:carried], *starts], loop, nodes)
        for end, start, result in zip(ends, starts, results, strict=True):
            _move(end, start, place, nodes, carried=0)
            _move(end, result, place, nodes)
    elif name == "scan":
        (body,) = inner
        trips = int(eqn.params["length"])
        carries, sliced = scan_parts(eqn)
        starts = _entered(operands, body.invars, place, nodes)
        ends = _read(body, starts, dataclasses.replace(place, times=place.times * trips), nodes)
        first = len(operands) - sliced - carries
        for n, (end, result) in enumerate(zip(ends, results, strict=True)):
            _move(end, result, place, nodes)
            if n < carries:
                _move(end, starts[first + n], place, nodes, carried=trips)
    elif name == "shard_map":
        (body,) = inner
        times = place.times * _devices(eqn)
        starts = _entered(operands, body.invars, place, nodes)
        ends = _read(body, starts, dataclasses.replace(place, times=times), nodes)
        for end, result in zip(ends, results, strict=True):
            _move(end, result, place, nodes)
    else:  # a primitive, be it one with a jaxpr inside (a kernel, the sum of a scatter) whose values are its own
        nodes.append(Node(eqn, operands, results, place.scope, place.times, place.in_while))
        inside = dataclasses.replace(place, times=place.times * _grid(eqn))
        for jaxpr in inner:
            _read(jaxpr, [Value(v.aval) for v in jaxpr.invars], inside, nodes)
    return results


def _read_branches(
    branches: Sequence[Any],
    operands: Sequence[Value],
    results: Sequence[Value],
    place: _Place,
    nodes: list[Node],
) -> None:
    """All branches of a cond; the dearest counts, the others run 0 times."""
    bodies: list[list[Node]] = [[] for _ in branches]
    ends = [_read(branch, operands, place, body) for branch, body in zip(branches, bodies, strict=True)]
    dearest = max(bodies, key=_cost, default=[])
    for body, out in zip(bodies, ends, strict=True):
        nodes += body if body is dearest else [dataclasses.replace(node, times=0) for node in body]
        for end, result in zip(out, results, strict=True):
            _move(end, result, place, nodes)


def sub_jaxprs(eqn: Any) -> Iterator[Any]:
    """The jaxprs inside an equation, whatever its parameters are called: those names differ between jax releases."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (jex.ClosedJaxpr, jex.Jaxpr)):
                yield _jaxpr(item)


def scan_parts(eqn: Any) -> tuple[int, int]:
    """(how many carries a scan has, how many sequences it slices): the last of its operands, and of its results the first.

    They are told by parameters whose names differ between jax releases; shapes tell it too.
    """
    body = next(sub_jaxprs(eqn))
    carries = sum(r.aval.shape == v.aval.shape for r, v in zip(eqn.outvars, body.outvars, strict=True))
    sliced = sum(o.aval.ndim > v.aval.ndim for o, v in zip(eqn.invars, body.invars, strict=True))
    return carries, sliced


def _jaxpr(item: Any) -> Any:
    return item.jaxpr if isinstance(item, jex.ClosedJaxpr) else item


def _is_call(eqn: Any, inner: Any) -> bool:
    """Whether the equation does nothing but run its jaxpr once: jit, remat, a custom derivative."""
    pairs = [(eqn.invars, inner.invars), (eqn.outvars, inner.outvars)]
    if eqn.primitive.name in ("scan", "while", "cond", "shard_map", "pallas_call"):
        return False
    return all(
        len(outer) == len(body) and all(_shape(a) == _shape(b) for a, b in zip(outer, body, strict=True))
        for outer, body in pairs
    )


def _shape(v: Any) -> Any:
    return getattr(v.aval, "shape", None)


def _devices(eqn: Any) -> int:
    """How many devices run the body of a shard_map, each with its own part: shapes in it are those of one."""
    mesh = eqn.params["mesh"]
    axes = eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes", mesh.axis_names))
    return math.prod(mesh.shape[axis] for axis in axes)


def _grid(eqn: Any) -> int:
    """How often a Pallas kernel runs; 1 for anything else."""
    grid = getattr(eqn.params.get("grid_mapping"), "grid", ()) if eqn.primitive.name == "pallas_call" else ()
    return math.prod(n for n in grid if isinstance(n, int))


def _cost(nodes: Sequence[Node]) -> int:
    return sum(product_flops(node.eqn) * node.times for node in nodes if node.eqn is not None)
