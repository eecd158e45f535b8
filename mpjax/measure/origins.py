"""Where the first infinity or NaN of a program comes from: its jaxpr, run one operation at a time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from mpjax.core.scopes import is_marked, path_in
from mpjax.measure.jaxprs import scan_parts, sub_jaxprs

CALLS = {
    "pjit", "jit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "custom_jvp_call", "custom_vjp_call",
    "custom_vjp_call_jaxpr",
}  # fmt: skip
"""Primitives that run the one jaxpr inside them once, on their own operands."""

KINDS = ("nan", "+inf", "-inf")


@dataclasses.dataclass(frozen=True)
class Origin:
    """The operation, or the input, from which a value that is not finite comes.

    Args:
      order: its place among all that were seen.
      path: of the module whose own operation it is; of an input, its name.
      phase: `"forward"`, `"backward"` or `"input"`.
      in_module: whether a wrapped module runs it; False in the loss function, outside of the model.
      operation: as `primitive(dtypes of operands) -> dtype`.
      kind: `"nan"`, `"+inf"` or `"-inf"`.
      amax: largest finite magnitude among the operands; None for an input.
      trips: for each scan or while around it, the index of the iteration and (of a scan) how many there are.
      dtype: of the result.
    """

    order: int
    path: str
    phase: str
    in_module: bool
    operation: str
    kind: str
    amax: float | None
    trips: tuple[tuple[int, int | None], ...] = ()
    dtype: str = ""


Origins = Mapping[str, Origin]
"""From kind to where it came from, of one value; empty for a finite one."""


@dataclasses.dataclass(frozen=True)
class Traced:
    """A value and the origins of what is not finite in it."""

    value: Any
    origins: Origins = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where in the program: the name stacks around, and the iterations of the loops around."""

    scope: str = ""
    trips: tuple[tuple[int, int | None], ...] = ()


def first_origin(outputs: Sequence[Traced]) -> Origin | None:
    """The earliest origin of anything that is not finite in these values."""
    found = [origin for output in outputs for origin in output.origins.values()]
    return min(found, key=lambda origin: origin.order, default=None)


class Run:
    """One evaluation of a jaxpr, which keeps count of the order of events.

    Operations run as they stand in the jaxpr, each rounded to its own dtype, loops in Python: XLA's fusions may keep
    more digits, so what overflows here may have just not overflowed there. An infinity counts only as far as it reaches a
    result: a mask of −inf that a softmax takes away leaves no trace. Kernels and shard_map are one operation.
    """

    def __init__(self) -> None:
        self._order = itertools.count()

    def evaluate(self, closed: Any, args: Sequence[Any], names: Sequence[str]) -> list[Traced]:
        """The outputs of a closed jaxpr.

        Args:
          closed: from `jax.make_jaxpr`.
          args: one array for each of its inputs.
          names: what each input is called, should it be the origin.
        """
        inputs = [self._input(x, name) for x, name in zip(args, names, strict=True)]
        return self._jaxpr(closed.jaxpr, [Traced(c) for c in closed.consts], inputs, _Place())

    def _input(self, x: Any, name: str) -> Traced:
        kinds = kinds_in(x)
        order = next(self._order)
        return Traced(x, {kind: Origin(order, name, "input", False, "input", kind, None) for kind in kinds})

    def _jaxpr(self, jaxpr: Any, consts: Sequence[Traced], args: Sequence[Traced], place: _Place) -> list[Traced]:
        held: dict[Any, Traced] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        last_use = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not isinstance(v, jex.Literal)}
        kept = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}

        for i, eqn in enumerate(jaxpr.eqns):
            inner = dataclasses.replace(place, scope=f"{place.scope}/{eqn.source_info.name_stack}")
            outs = self._equation(eqn, [_read(v, held) for v in eqn.invars], inner)
            held.update(zip(eqn.outvars, outs, strict=True))
            for v in {v for v in eqn.invars if not isinstance(v, jex.Literal)}:
                if last_use[v] == i and v not in kept:
                    held.pop(v, None)  # as compiled code would: activations live no longer than they must
        return [_read(v, held) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, args: list[Traced], place: _Place) -> list[Traced]:
        name, inner = eqn.primitive.name, list(sub_jaxprs(eqn))
        if name in CALLS and len(inner) == 1 and len(inner[0].invars) == len(args):
            return self._body(eqn, 0, args, place)
        if name == "cond":
            return self._body(eqn, int(args[0].value), args[1:], place)
        if name == "scan":
            return self._scan(eqn, args, place)
        if name == "while":
            return self._while(eqn, args, place)
        values = bind(eqn, [a.value for a in args])
        return [Traced(x, self._origins(eqn, x, args, place)) for x in values]

    def _origins(self, eqn: Any, x: Any, args: list[Traced], place: _Place) -> Origins:
        found: dict[str, Origin] = {}
        for kind in kinds_in(x):
            # A NaN may be an infinity less an infinity: then it is that one's. Masks are full of −inf; they are asked last.
            for asked in (kind, *KINDS):
                before = [a.origins[asked] for a in args if asked in a.origins]
                if before:
                    found[kind] = min(before, key=lambda origin: origin.order)
                    break
            else:
                found[kind] = self._new(eqn, kind, args, place)
        return found

    def _new(self, eqn: Any, kind: str, args: list[Traced], place: _Place) -> Origin:
        operands = ", ".join(dict.fromkeys(str(v.aval.dtype) for v in eqn.invars if hasattr(v.aval, "dtype")))
        dtype = str(eqn.outvars[0].aval.dtype)
        return Origin(
            order=next(self._order),
            path=path_in(place.scope),
            phase="backward" if "transpose(" in place.scope else "forward",
            in_module=is_marked(place.scope),
            operation=f"{eqn.primitive.name}({operands}) -> {dtype}",
            kind=kind,
            amax=max((largest_finite(a.value) for a in args), default=0.0),
            trips=place.trips,
            dtype=dtype,
        )

    def _body(self, eqn: Any, index: int, args: list[Traced], place: _Place) -> list[Traced]:
        closed = _closed(eqn)[index]
        return self._jaxpr(closed.jaxpr, [Traced(c) for c in closed.consts], args, place)

    def _scan(self, eqn: Any, args: list[Traced], place: _Place) -> list[Traced]:
        body, length = _closed(eqn)[0], int(eqn.params["length"])
        carries, sliced = scan_parts(eqn)
        constants, sequences = args[: len(args) - carries - sliced], args[len(args) - sliced :]
        carry = args[len(constants) : len(args) - sliced]
        outputs: list[list[Traced]] = []
        order = range(length - 1, -1, -1) if eqn.params["reverse"] else range(length)
        for i in order:
            slices = [Traced(s.value[i], _present(s.origins, s.value[i])) for s in sequences]
            here = dataclasses.replace(place, trips=(*place.trips, (i, length)))
            consts = [Traced(c) for c in body.consts]
            outs = self._jaxpr(body.jaxpr, consts, [*constants, *carry, *slices], here)
            carry = outs[:carries]
            outputs.append(outs[carries:])
        if eqn.params["reverse"]:
            outputs.reverse()
        if not outputs:  # of length 0
            return [*carry, *(Traced(jnp.zeros(v.aval.shape, v.aval.dtype)) for v in eqn.outvars[carries:])]
        return [*carry, *(_stack(column) for column in zip(*outputs, strict=True))]

    def _while(self, eqn: Any, args: list[Traced], place: _Place) -> list[Traced]:
        (test, body), n, m = _closed(eqn, "cond_jaxpr", "body_jaxpr"), *_counts(eqn)
        for_test, for_body, carry = args[:n], args[n : n + m], args[n + m :]
        for i in itertools.count():
            here = dataclasses.replace(place, trips=(*place.trips, (i, None)))
            if not bool(self._jaxpr(test.jaxpr, [Traced(c) for c in test.consts], [*for_test, *carry], here)[0].value):
                return carry
            carry = self._jaxpr(body.jaxpr, [Traced(c) for c in body.consts], [*for_body, *carry], here)
        raise AssertionError


def _read(v: Any, held: Mapping[Any, Traced]) -> Traced:
    return Traced(v.val) if isinstance(v, jex.Literal) else held[v]


def _counts(eqn: Any) -> tuple[int, int]:
    return int(eqn.params["cond_nconsts"]), int(eqn.params["body_nconsts"])


def _closed(eqn: Any, *names: str) -> list[Any]:
    """The closed jaxprs of an equation, those of these params, or all."""
    values: list[Any] = [eqn.params[name] for name in names] or list(eqn.params.values())
    items = [item for value in values for item in (value if isinstance(value, (tuple, list)) else (value,))]
    return [
        item if isinstance(item, jex.ClosedJaxpr) else jex.ClosedJaxpr(item, ())
        for item in items
        if isinstance(item, (jex.ClosedJaxpr, jex.Jaxpr))
    ]


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The results of one equation on these values."""
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _stack(column: Sequence[Traced]) -> Traced:
    origins: dict[str, Origin] = {}
    for traced in column:
        for kind, origin in traced.origins.items():
            origins[kind] = min(origin, origins.get(kind, origin), key=lambda o: o.order)
    return Traced(jnp.stack([traced.value for traced in column]), origins)


def _present(origins: Origins, x: Any) -> Origins:
    """Of a slice: the origins of what is in it."""
    return {kind: origins[kind] for kind in kinds_in(x) if kind in origins} if origins else {}


def _is_inexact(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) and np.size(x) > 0


def kinds_in(x: Any) -> tuple[str, ...]:
    """Which of `KINDS` are among the elements.

    >>> kinds_in(np.array([1.0, -np.inf, np.nan]))
    ('nan', '-inf')
    """
    if not _is_inexact(x):
        return ()
    with np.errstate(all="ignore"):
        found = _kinds(np.asarray(x)) if _is_near(x) else jax.device_get(_jitted_kinds(x))
    return tuple(kind for kind, is_there in zip(KINDS, found, strict=True) if is_there)


def _kinds(x: Any) -> Iterator[Any] | list[Any]:
    if isinstance(x, np.ndarray):
        return [np.isnan(x).any(), (x == np.inf).any(), (x == -np.inf).any()]
    return [jnp.isnan(x).any(), jnp.isposinf(x).any(), jnp.isneginf(x).any()]


_jitted_kinds = jax.jit(_kinds)


def _is_near(x: Any) -> bool:
    """Whether numpy can look at it without a copy from a device."""
    return not isinstance(x, jax.Array) or all(d.platform == "cpu" for d in x.devices())


def largest_finite(x: Any) -> float:
    """The largest finite magnitude among the elements; 0 where there is none.

    >>> largest_finite(np.array([1.0, -3.0, np.inf]))
    3.0
    """
    if not _is_inexact(x):
        return 0.0
    xp: Any = np if _is_near(x) else jnp
    wide = xp.asarray(x).astype(xp.float32) if np.dtype(x.dtype).itemsize < 4 else xp.asarray(x)
    return float(xp.abs(xp.where(xp.isfinite(wide), wide, xp.zeros_like(wide))).max())
