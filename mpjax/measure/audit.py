"""The auditor: which products, exps, reductions and casts a function runs, in which dtype, at which module path."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from mpjax.core.dtypes import canonical
from mpjax.core.scopes import path_in
from mpjax.measure.flops import PRODUCTS, product_flops

KINDS = {
    **PRODUCTS,
    **dict.fromkeys(("exp", "exp2", "expm1", "pow"), "exp"),
    **dict.fromkeys(("log", "log1p"), "log"),
    **dict.fromkeys(("rsqrt", "sqrt", "cbrt"), "rsqrt"),
    **dict.fromkeys(("tanh", "logistic", "erf", "erfc", "erf_inv"), "activation"),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce", "argmax", "argmin"), "reduce"),
    **dict.fromkeys(("cumsum", "cumprod", "cumlogsumexp", "reduce_window_sum", "reduce_window"), "reduce"),
    "convert_element_type": "cast",
}
"""The primitives that the auditor reads, by the kind under which it reports them, in the order of its table."""


@dataclasses.dataclass(frozen=True)
class Op:
    """One primitive of the program, as it stands in the jaxpr.

    Args:
      kind: one of dot, conv, exp, log, rsqrt, activation, reduce, cast.
      primitive: jax's name.
      operands: dtypes of its array operands, in order (of a product: both factors; else the first).
      output: dtype of its result.
      path: canonical path of the module that runs it, "" for the root and outside of any module. Layers that share one
        trace (`nn.jit`) stand at the path of the first.
      flops: multiply-adds counted as two, for one execution; 0 for what is not a product.
      times: how often it runs: the lengths of the scans around it, times the devices of a shard_map or the grid of a
        Pallas kernel. 0 in those branches of a cond that are not the dearest.
      in_while: whether a while loop is around it, whose trips no jaxpr tells: it counts as one.
    """

    kind: str
    primitive: str
    operands: tuple[str, ...]
    output: str
    path: str
    flops: int
    times: int
    in_while: bool = False

    @property
    def label(self) -> str:
        """Its dtypes as one word: `bfloat16`; a mixed product is `bfloat16×float32`, a cast `float32→bfloat16`."""
        if self.kind == "cast":
            return f"{self.operands[0]}→{self.output}"
        return "×".join(sorted(set(self.operands)))

    def __str__(self) -> str:
        return f"{self.primitive}({', '.join(self.operands)}) -> {self.output} at {self.path or '·'}"


@dataclasses.dataclass(frozen=True)
class Audit:
    """Every audited primitive of a function, and sums over them. `str(audit)` is a table by kind and dtype."""

    ops: tuple[Op, ...]

    def select(self, kind: str | None = None, path: str = "*") -> Audit:
        """The ops of one kind, at paths that a shell pattern matches (its `*` goes through slashes)."""
        kept = (op for op in self.ops if kind in (None, op.kind) and fnmatch.fnmatchcase(op.path, path))
        return Audit(tuple(kept))

    def dtypes(self, kind: str) -> dict[str, int]:
        """From dtypes, as in `Op.label`, to how many ops of this kind stand in the program with them."""
        return dict(collections.Counter(op.label for op in self.ops if op.kind == kind))

    def flops_by_dtype(self) -> dict[str, int]:
        """FLOPs of all matrix products and convolutions, by the dtypes of their operands, the most first.

        A product of two dtypes has a key of its own, such as `bfloat16×float32`: it runs in neither.
        """
        total: collections.Counter[str] = collections.Counter()
        for op in self.ops:
            if op.flops:
                total[op.label] += op.flops * op.times
        return dict(total.most_common())

    def share(self, *dtypes: Any) -> float:
        """The share of matrix FLOPs whose operands are both of one of these dtypes, in [0, 1].

        Raises:
          ValueError: the function has no matrix product, or a name is no dtype.
        """
        found = self.flops_by_dtype()
        if not sum(found.values()):
            raise ValueError(
                "got a function without a matrix product; legal is one with a dot or a convolution; "
                "audit the loss or the step, not what is around it"
            )
        return sum(found.get(name, 0) for name in {_legal(dtype) for dtype in dtypes}) / sum(found.values())

    def __str__(self) -> str:
        total = sum(self.flops_by_dtype().values())
        lines = [f"{'kind':<12}{'dtype':<26}{'ops':>6}{'FLOPs':>11}{'share':>9}"]
        for kind in dict.fromkeys(KINDS.values()):
            for label, n in sorted(self.dtypes(kind).items()):
                flops = self.select(kind).flops_by_dtype().get(label)
                lines.append(f"{kind:<12}{label:<26}{n:>6}" + (f"{flops:>11.3g}{flops / total:>9.1%}" if flops else ""))
        if any(op.in_while for op in self.ops):
            lines.append("the bodies of while loops are counted once: how often they run is not known before")
        return "\n".join(lines)


def audit(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Audit:
    """Read off the jaxpr of `fn` which products, exps, reductions and casts it runs, and in which dtype.

    The function is traced, not run and not changed. Jaxprs inside jit, scan, while, cond, remat, custom derivatives and
    shard_map are read too: a scan's body counts its length, the dearest branch of a cond counts (all are listed), a
    while loop's body counts once. What XLA makes of the program later is not seen (its fusions, what it drops because
    nothing uses it, a float32 product on tensor cores in TF32), nor the inside of a foreign kernel such as cuDNN's
    attention.

    Args:
      fn: any function that jax can trace; for the backward pass give `jax.grad(loss)`.
      *args, **kwargs: its arguments: pytrees of arrays or `ShapeDtypeStruct`s. Leaves that are no arrays (`train=True`)
        are passed on as they are.

    Returns:
      An `Audit`.

    >>> import jax.numpy as jnp
    >>> found = audit(lambda x, w: jnp.exp(x @ w), jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16))
    >>> found.flops_by_dtype(), found.dtypes("exp"), found.share("bfloat16")
    ({'bfloat16': 48}, {'bfloat16': 1}, 1.0)
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    traced = {i: x for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")}

    def call(traced: dict[int, Any]) -> Any:
        args, kwargs = jax.tree.unflatten(structure, [traced.get(i, x) for i, x in enumerate(leaves)])
        return fn(*args, **kwargs)

    return Audit(tuple(_read(jax.make_jaxpr(call)(traced).jaxpr, "", 1, False)))


def _read(jaxpr: Any, around: str, times: int, in_while: bool) -> Iterator[Op]:
    for eqn in jaxpr.eqns:
        scope = f"{around}/{eqn.source_info.name_stack}"
        kind = KINDS.get(eqn.primitive.name)
        if kind is not None and not (kind == "cast" and _is_no_rounding(eqn)):
            factors = eqn.invars[:2] if kind in ("dot", "conv") else eqn.invars[:1]
            operands = tuple(_name(v.aval.dtype) for v in factors)
            output = _name(eqn.outvars[0].aval.dtype)
            yield Op(
                kind, eqn.primitive.name, operands, output, path_in(scope), product_flops(eqn), times, in_while
            )  # fmt: skip
        runs, in_loop = times * _trips(eqn), in_while or eqn.primitive.name == "while"
        bodies = [list(_read(inner, scope, runs, in_loop)) for inner in sub_jaxprs(eqn)]
        dearest = max(bodies, key=_cost, default=[])
        for body in bodies:
            if eqn.primitive.name == "cond" and body is not dearest:
                body = [dataclasses.replace(op, times=0) for op in body]
            yield from body


def sub_jaxprs(eqn: Any) -> Iterator[Any]:
    """The jaxprs inside an equation, whatever its parameters are called: those names differ between jax releases."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, jex.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex.Jaxpr):
                yield item


def _trips(eqn: Any) -> int:
    """How often an equation runs the jaxprs inside it, for each time that it runs itself."""
    if eqn.primitive.name == "scan":
        return int(eqn.params["length"])
    if eqn.primitive.name == "shard_map":  # shapes in its body are those of one device
        mesh = eqn.params["mesh"]
        axes = eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes", mesh.axis_names))
        return math.prod(mesh.shape[axis] for axis in axes)
    if eqn.primitive.name == "pallas_call":
        grid = getattr(eqn.params.get("grid_mapping"), "grid", ())
        return math.prod(n for n in grid if isinstance(n, int))
    return 1


def _cost(ops: list[Op]) -> int:
    return sum(op.flops * op.times for op in ops)


def _is_no_rounding(eqn: Any) -> bool:
    """Whether a conversion has nothing to do with precision: between integers, or only of the weak type."""
    here, there = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    return here == there or not any(jnp.issubdtype(dtype, jnp.inexact) for dtype in (here, there))


def _legal(dtype: Any) -> str:
    for read in (canonical, jnp.dtype):  # the second knows int8 and the like
        try:
            return read(dtype).name
        except (TypeError, ValueError):
            continue
    raise ValueError(f"got {dtype!r}; legal is a dtype or its name, of floats or ints; write bfloat16, float16 or int8")


def _name(dtype: Any) -> str:
    return dtype.name if isinstance(dtype, np.dtype) else str(dtype)
