"""The rule about memory: what is kept for the backward pass is kept in the compute dtype."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator

from mpjax.measure.lint.finding import OUTSIDE, ComputeOf, Finding, dtype_of, hands_on, place
from mpjax.measure.program import Node, Program, nbytes_of

TINY = 1 / 256
"""Share of all saved bytes under which a float32 residual is left alone.

Mending it would free half of that. A statistic of each row (a maximum, a mean) is under it: beside every number of it
stand the width of the network times a few saved activations.
"""


def wide_residuals(program: Program, compute_of: ComputeOf) -> Iterator[Finding]:
    """A float32 activation that is kept for the backward pass, made where the policy computes in half.

    An activation is judged by the operation that made it: what a float32 island made is meant. Layers that differ only
    by an index are weighed together. What a model that ends in half hands out in float32, and what the loss keeps beside
    it, is the loss's: that may be one float32 copy of the model's output. What is smaller than that output (a maximum
    and a sum for each row) is not counted.

    Args:
      program: its results are what the backward pass keeps.
      compute_of: see `ComputeOf`.
    """
    handed_out, in_half = _handed_out(program, compute_of)
    found: dict[str, list[Node]] = collections.defaultdict(list)
    weights: collections.Counter[str] = collections.Counter()
    meant_at = {}
    saved = outside = 0
    varying = program.made_of(program.inputs)
    for value in dict.fromkeys(program.outputs):
        makers = [node for node, _ in program.upstream(value, hands_on) if not hands_on(node)]
        if not makers or value not in varying:  # an argument, or a constant, is there anyhow
            continue
        saved += nbytes_of(value)
        dtype = dtype_of(value)
        if dtype is None or dtype.itemsize < 4:
            continue
        inner = [node for node in makers if compute_of(node) is not None]
        narrow = [node for node in inner if _computes_in_half(node, compute_of)]
        if not inner or any(_leaves_model(program, node) for node in narrow if node.in_wrapped):
            outside += nbytes_of(value) if value.aval.size >= max(handed_out, default=0) else 0
        elif narrow:
            node = narrow[0]
            found[place(node)].append(node)
            weights[place(node)] += nbytes_of(value)
            meant_at[place(node)] = str(compute_of(node))
    together: collections.Counter[str] = collections.Counter()
    for path, weight in weights.items():
        together[_layer(path)] += weight
    for path, nodes in found.items():
        if together[_layer(path)] >= TINY * saved:
            dtypes = sorted({node.outputs[0].aval.dtype.name for node in nodes})
            yield Finding(
                path, "wide residual",
                f"{weights[path]:,} bytes of {', '.join(dtypes)} (from {', '.join(sorted({n.name for n in nodes}))}) are "
                f"kept for the backward pass where the policy computes in {meant_at[path]}",
                "cast to the compute dtype before what keeps it, or compute it again there (jax.checkpoint, nn.remat)",
                count=len(nodes),
            )  # fmt: skip
    copy = 4 * sum(handed_out)
    if in_half and outside > copy:
        yield Finding(
            OUTSIDE, "wide residual",
            f"the loss keeps {outside:,} bytes of float32 for the backward pass, more than one float32 copy of the "
            f"model's output ({copy:,} bytes)",
            "use mpjax.losses, which keep the output as it comes, or put the loss under jax.checkpoint",
        )  # fmt: skip


def _leaves_model(program: Program, node: Node) -> bool:
    """Whether its result is used outside of the modules, too."""
    return any(not user.in_wrapped for value in node.outputs for user, _ in program.downstream(value, hands_on))


def _handed_out(program: Program, compute_of: ComputeOf) -> tuple[list[int], bool]:
    """The sizes of the floats that wrapped modules made and something else uses, and whether any was computed in half."""
    sizes, in_half = [], False
    for node in program.nodes:
        if node.eqn is None or not node.in_wrapped:
            continue
        for value in node.outputs:
            used = dtype_of(value) is not None and any(
                not user.in_wrapped for user, _ in program.downstream(value, lambda _: False)
            )
            if used:
                sizes.append(value.aval.size)
                in_half |= _computes_in_half(node, compute_of)
    return sizes, in_half


def _computes_in_half(node: Node, compute_of: ComputeOf) -> bool:
    meant = compute_of(node)
    return meant is not None and meant.itemsize < 4


def _layer(path: str) -> str:
    return re.sub(r"(^|/)\d+(?=/|$)", r"\1*", path)
