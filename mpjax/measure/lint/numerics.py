"""Rules about what half precision cannot hold: the sums of a softmax, of a variance, and of many terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from mpjax.core.dtypes import facts
from mpjax.measure.flops import terms
from mpjax.measure.lint.finding import HANDS_ON, ComputeOf, Finding, half, place
from mpjax.measure.program import Node, Program, Value

SUMS = frozenset({"reduce_sum", "cumsum", "cumlogsumexp", "reduce_window_sum"})
ADDS = frozenset({"add", "add_any", "sub"})
_SAME = HANDS_ON | {"convert_element_type", "reduce_precision", "select_n"}
_COMBINES = _SAME | ADDS | {"abs", "mul", "div", "max", "min"}


def softmaxes(program: Program, compute_of: ComputeOf) -> Iterator[Finding]:
    """An exp in half whose sum then divides, or is taken the logarithm of.

    jax.nn.softmax is one: its sum is float32, but each exp was rounded before. An exp that is not summed (a sigmoid, a
    gelu), or whose sum divides nothing, is none.
    """
    for node in program.nodes:
        if node.name not in ("exp", "exp2") or (dtype := half(node.outputs[0])) is None:
            continue
        sums = [n for n, _ in program.downstream(node.outputs[0], _among(_SAME)) if n.name in SUMS]
        if any(_normalises(program, total.outputs[0]) for total in sums):
            yield Finding(
                place(node), "half softmax", f"a softmax whose exponentials are {dtype.name}",
                "cast its input to float32 and its result back (mpjax.attention and mpjax.losses do)",
            )  # fmt: skip


def variances(program: Program, compute_of: ComputeOf) -> Iterator[Finding]:
    """Squares in half that are summed, or the root in half of what was a sum."""
    for node in program.nodes:
        dtype = half(node.inputs[0]) if node.inputs else None
        if dtype is None:
            continue
        if _is_square(node):
            reached = program.downstream(node.outputs[0], _among(_SAME))
            found = any(n.name in SUMS for n, _ in reached)
        elif node.name in ("sqrt", "rsqrt"):
            size = node.inputs[0].aval.size
            behind = program.upstream(node.inputs[0], _among(_COMBINES))
            found = any(n.name in SUMS and n.outputs[0].aval.size == size for n, _ in behind)
        else:
            continue
        if found:
            what = "the root of a sum" if node.name in ("sqrt", "rsqrt") else "squares that are summed"
            yield Finding(
                place(node), "half variance", f"a variance or norm in {dtype.name}: {what}",
                "cast to float32 before the squares and back after the root, or declare the class an island "
                "(PolicyMap(islands=(RMSNorm,)))",
            )  # fmt: skip


def long_sums(program: Program, compute_of: ComputeOf) -> Iterator[Finding]:
    """A sum in half of more terms than the format can count, 2/eps: 256 in bfloat16, 2048 in float16.

    There one more term of average size no longer changes the sum, if it is taken term by term. Maxima are exact and
    are none. Neither are the sums in a backward pass that undo a broadcast, such as the gradient of a bias that is added
    by hand (that of Flax's layers is summed in float32): nobody writes them, and as XLA adds them up on a CPU, in a tree,
    their error stays a few roundings of their result, however many rows there are: a test measures that. For an H100 it
    adds up to 128 one after another: 1.4 % of the result where signs vary, 9 % where all are 0.3. Two sums of a backward
    pass are taken one by one on any device, and do stand still, and are findings: the gradient of rows looked up in a
    half-precision table, and what a loop adds to a carry.
    """
    for node in program.nodes:
        dtype = half(node.outputs[0]) if node.outputs else None
        if dtype is None:
            continue
        if node.name in SUMS and not node.is_transposed and terms(node.eqn) > _countable(dtype):
            yield _long(
                node, dtype, f"a sum of {terms(node.eqn)} terms in {dtype.name}", "sum in float32: dtype=float32"
            )
        elif node.name.startswith("scatter-add") and (rows := _rows_added(node)) > _countable(dtype):
            yield _long(
                node, dtype, f"up to {rows} rows are added to one of a {dtype.name} table (the gradient of a lookup)",
                "look up in the float32 table and cast the rows, not the table",
            )  # fmt: skip
        elif node.carried is not None and node.carried > _countable(dtype) and _accumulates(program, node):
            yield _long(
                node, dtype, f"a loop of {node.carried} trips adds to a {dtype.name} carry",
                "carry the sum in float32; for the gradient of weights that the loop reads, cast them inside of its body",
            )  # fmt: skip


def _long(node: Node, dtype: np.dtype, what: str, mend: str) -> Finding:
    return Finding(place(node), "long sum", f"{what}, which counts to {_countable(dtype)}", mend)


def _countable(dtype: np.dtype) -> int:
    """From this number on, adding one no longer changes a sum."""
    return int(2 / facts(dtype).eps)


def _normalises(program: Program, total: Value) -> bool:
    for node, operand in program.downstream(total, _among(_COMBINES)):
        if node.name in ("log", "log1p"):
            return True
        if node.name == "div" and node.inputs[1] is operand:
            return True
        if node.name == "integer_pow" and node.eqn.params["y"] < 0:
            return True
    return False


def _is_square(node: Node) -> bool:
    if node.name == "integer_pow":
        return bool(node.eqn.params["y"] == 2)
    return node.name == "square" or (node.name == "mul" and node.inputs[0] is node.inputs[1])


def _rows_added(node: Node) -> int:
    """How many rows a scatter may add to one place: all for which there are indices, less those apart by batch.

    Numbers that are picked one by one (`x[arange, label]`) are no rows, and mostly lie apart.
    """
    numbers, (_, indices, updates) = node.eqn.params["dimension_numbers"], node.inputs[:3]
    if node.eqn.params["unique_indices"] or all(updates.aval.shape[d] == 1 for d in numbers.update_window_dims):
        return 1
    shape = indices.aval.shape
    apart = getattr(numbers, "scatter_indices_batching_dims", ())
    return math.prod(n for axis, n in enumerate(shape[:-1]) if axis not in apart)


def _accumulates(program: Program, move: Node) -> bool:
    """Whether the end of a loop's body is its beginning plus something."""
    (end,), (start,) = move.inputs, move.outputs
    through = _among(HANDS_ON | ADDS)
    for node, _ in program.upstream(end, through):
        if node.name in ADDS:
            for operand in node.inputs:
                if operand is start or any(start in n.inputs for n, _ in program.upstream(operand, through)):
                    return True
    return False


def _among(names: frozenset[str]) -> Callable[[Node], bool]:
    return lambda node: node.name in names
