"""The rule about params: what was rounded once is not converted again."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping

from mpjax.measure.lint.finding import Finding, dtype_of, hands_on, place
from mpjax.measure.program import Node, Program, Value


def twice_cast(program: Program, params: Mapping[Value, str]) -> Iterator[Finding]:
    """A param that is cast, and whose cast is cast again: bits are lost, or work is done twice.

    Each cast of the master itself is another reading of it and none of these: tied weights that two modules read, a
    recomputation by remat. It is followed as long as it is the param itself that moves (slices, reshapes, loops, calls),
    not what it is added to, looked up in or multiplied with.

    Args:
      program: any.
      params: those of its inputs that are params, each with its path.
    """
    found: dict[str, dict[str, tuple[str, ...]]] = collections.defaultdict(dict)
    for value, name in params.items():
        for first, _ in program.downstream(value, hands_on):
            if not _is_cast(first):
                continue
            for second, _ in program.downstream(first.outputs[0], hands_on):
                if _is_cast(second):
                    chain = (first.inputs[0], first.outputs[0], second.outputs[0])
                    found[place(second)][name] = tuple(v.aval.dtype.name for v in chain)
    for path, chains in found.items():
        yield Finding(
            path, "param cast twice",
            "; ".join(f"param {name} is cast {'→'.join(chain)}" for name, chain in chains.items()),
            "cast the master where it is used, once: what is rounded does not come back",
            count=len(chains),
        )  # fmt: skip


def _is_cast(node: Node) -> bool:
    """From one float dtype to another."""
    if node.name != "convert_element_type":
        return False
    here, there = map(dtype_of, (node.inputs[0], node.outputs[0]))
    return here is not None and there is not None and here != there
