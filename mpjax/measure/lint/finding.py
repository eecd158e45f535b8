"""A finding of the build lint, and what its rules are told about a program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np

from mpjax.measure.program import Node, Value

OUTSIDE = "outside of any module"
"""The path of a finding in the loss, the optimizer, or a function without modules."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One way in which a program's precision is not what was meant. `str(finding)` is `path: what: how to mend`.

    Args:
      path: canonical path of the module, `·` for the root.
      rule: the rule's name.
      what: what was found, in words.
      mend: what to do about it.
      count: how many places under this path break the rule.

    >>> print(Finding("head", "mixed product", "a product of bfloat16 and float32", "cast one of them", count=2))
    head: a product of bfloat16 and float32 (2 places): cast one of them
    """

    path: str
    rule: str
    what: str
    mend: str
    count: int = 1

    def __str__(self) -> str:
        places = f" ({self.count} places)" if self.count > 1 else ""
        return f"{self.path}: {self.what}{places}: {self.mend}"


ComputeOf: TypeAlias = Callable[[Node], np.dtype | None]
"""The dtype in which the policy lets a node compute; None where it says nothing."""


def merged(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """One finding for each rule and path, the first one's words, with their number."""
    first: dict[tuple[str, str], Finding] = {}
    for found in findings:
        key = found.rule, found.path
        known = first.get(key)
        first[key] = found if known is None else dataclasses.replace(known, count=known.count + found.count)
    return tuple(first.values())


def place(node: Node) -> str:
    """The path of a finding at this node."""
    return node.path or ("·" if node.in_wrapped else OUTSIDE)


def dtype_of(value: Value) -> np.dtype | None:
    """Its dtype if that is a float's, else None."""
    dtype = getattr(value.aval, "dtype", None)
    return dtype if isinstance(dtype, np.dtype) and jnp.issubdtype(dtype, jnp.floating) else None


def half(value: Value) -> np.dtype | None:
    """Its dtype if that is a float of 16 bits or fewer, else None."""
    dtype = dtype_of(value)
    return dtype if dtype is not None and dtype.itemsize <= 2 else None


HANDS_ON = frozenset(
    {
        "broadcast_in_dim", "copy", "copy_p", "dynamic_slice", "expand_dims", "optimization_barrier", "pbroadcast", "pvary",
        "reshape", "reshard", "rev", "sharding_constraint", "slice", "stop_gradient", "squeeze", "transpose",
    }
)  # fmt: skip
"""Primitives whose results are numbers of their first operand, unchanged."""


def hands_on(node: Node) -> bool:
    """Whether its results are numbers of its operand, none of them made more often: a broadcast that grows is not."""
    if node.name not in HANDS_ON:
        return False
    return node.name != "broadcast_in_dim" or node.inputs[0].aval.size == node.outputs[0].aval.size
