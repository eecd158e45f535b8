"""The auditor: which products, exps, reductions and casts a function runs, in which dtype, at which module path."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpjax.core.dtypes import canonical
from mpjax.core.scopes import unfused_attention_in
from mpjax.measure.flops import FUSED_ATTENTION, PRODUCTS, product_flops, terms
from mpjax.measure.jaxprs import trace
from mpjax.measure.program import Node, nbytes_of

FUSED, UNFUSED = "fused (cuDNN)", "unfused"

KINDS = {
    **PRODUCTS,
    **dict.fromkeys(FUSED_ATTENTION, "attention"),
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
      kind: one of dot, conv, attention, exp, log, rsqrt, activation, reduce, cast.
      primitive: jax's name; `attention` for mpjax's own, which is no primitive: its products and its exp are listed too.
      operands: dtypes of its array operands, in order (of a product: both factors; of an attention: query, key and value;
        else the first).
      output: dtype of its result.
      path: canonical path of the module that runs it, "" for the root and outside of any module. Layers that share one
        trace (`nn.jit`) stand at the path of the first.
      flops: multiply-adds counted as two, for one execution; 0 for what is not a product or a fused attention.
      times: how often it runs: the lengths of the scans around it, times the devices of a shard_map or the grid of a
        Pallas kernel. 0 in those branches of a cond that are not the dearest.
      in_while: whether a while loop is around it, whose trips no jaxpr tells: it counts as one.
      bytes: what one execution reads and writes if nothing is fused: all operands and the result.
      terms: how many numbers one number of its result is made of, by a reduction; 1 for what is none.
      kernel: of an attention, `fused (cuDNN)` or `unfused`; "" for any other.
    """

    kind: str
    primitive: str
    operands: tuple[str, ...]
    output: str
    path: str
    flops: int
    times: int
    in_while: bool = False
    bytes: int = 0
    terms: int = 1
    kernel: str = ""

    @property
    def label(self) -> str:
        """Its dtypes as one word: `bfloat16`; a mixed product is `bfloat16×float32`, a cast `float32→bfloat16`."""
        if self.kind == "cast":
            return f"{self.operands[0]}→{self.output}"
        return "×".join(sorted(set(self.operands)))

    def __str__(self) -> str:
        kernel = f", {self.kernel}" if self.kernel else ""
        return f"{self.primitive}({', '.join(self.operands)}) -> {self.output} at {self.path or '·'}{kernel}"


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

    def bytes_by_dtype(self, kind: str) -> dict[str, int]:
        """Bytes that all ops of a kind read and write if nothing is fused, by dtypes as in `Op.label`."""
        total: collections.Counter[str] = collections.Counter()
        for op in self.ops:
            if op.kind == kind:
                total[op.label] += op.bytes * op.times
        return dict(total)

    def __str__(self) -> str:
        total = sum(self.flops_by_dtype().values())
        lines = [f"{'kind':<12}{'dtype':<26}{'ops':>6}{'bytes':>11}{'FLOPs':>11}{'share':>9}"]
        for kind in dict.fromkeys(KINDS.values()):
            for kernel in ("", FUSED, UNFUSED):
                found = Audit(tuple(op for op in self.ops if (op.kind, op.kernel) == (kind, kernel)))
                flops, moved = found.flops_by_dtype(), found.bytes_by_dtype(kind)
                for label, n in sorted(found.dtypes(kind).items()):
                    done = flops.get(label)
                    line = f"{kind:<12}{' '.join(filter(None, [label, kernel])):<26}{n:>6}{moved[label]:>11.3g}"
                    lines.append(line + (f"{done:>11.3g}{done / total:>9.1%}" if done else ""))
        if any(op.in_while for op in self.ops):
            lines.append("the bodies of while loops are counted once: how often they run is not known before")
        return "\n".join(lines)


def audit(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Audit:
    """Read off the jaxpr of `fn` which products, exps, reductions and casts it runs, and in which dtype.

    The function is traced, not run and not changed. Jaxprs inside jit, scan, while, cond, remat, custom derivatives and
    shard_map are read too: a scan's body counts its length, the dearest branch of a cond counts (all are listed), a
    while loop's body counts once. What XLA makes of the program later is not seen (its fusions, what it drops because
    nothing uses it, a float32 product on tensor cores in TF32), nor the inside of a foreign kernel. cuDNN's attention is
    one: it stands there as an op of kind `attention`, which says that it is fused, and its products are counted. So does
    mpjax's own attention where it is not fused.

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
    return Audit(tuple(op for node in trace(fn, *args, **kwargs).nodes for op in (_attention(node), _op(node)) if op))


def _attention(node: Node) -> Op | None:
    """mpjax's own attention, once for each softmax that it takes: the one exp that stands in its scope."""
    compute = unfused_attention_in(node.scope) if node.name == "exp" else None
    if compute is None:
        return None
    return Op(
        "attention", "attention", (compute,) * 3, compute, node.path, 0, node.times, node.in_while, kernel=UNFUSED
    )


def _op(node: Node) -> Op | None:
    kind = KINDS.get(node.name)
    if kind is None or (kind == "cast" and _is_no_rounding(node)):
        return None
    factors = node.inputs[: {"dot": 2, "conv": 2, "attention": 3}.get(kind, 1)]
    return Op(
        kind=kind,
        primitive=node.name,
        operands=tuple(_name(value.aval.dtype) for value in factors),
        output=_name(node.outputs[0].aval.dtype),
        path=node.path,
        flops=product_flops(node.eqn),
        times=node.times,
        in_while=node.in_while,
        bytes=sum(nbytes_of(value) for value in (*node.inputs, *node.outputs)),
        terms=terms(node.eqn),
        kernel=FUSED if kind == "attention" else "",
    )


def _is_no_rounding(node: Node) -> bool:
    """Whether a conversion has nothing to do with precision: between integers, or only of the weak type."""
    here, there = node.inputs[0].aval.dtype, node.outputs[0].aval.dtype
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
