"""A function as one flat program: its primitives in a list, without the calls around them, and every value followed."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mpjax.core.scopes import is_marked, path_in

_path_in = functools.lru_cache(maxsize=4096)(path_in)


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """An array of the program: two are the same only if they are one object."""

    aval: Any


def nbytes_of(value: Value) -> int:
    """The bytes that it takes; 0 for a key."""
    dtype = getattr(value.aval, "dtype", None)
    return math.prod(value.aval.shape) * dtype.itemsize if isinstance(dtype, np.dtype) else 0


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A primitive of the program at its place, or a move: the same numbers entering or leaving a loop, cond or shard_map.

    Args:
      eqn: jax's equation; None for a move.
      inputs: its operands.
      outputs: its results.
      scope: its whole name stack.
      times: how often it runs; see `Op.times`.
      in_while: whether a while loop is around it.
      carried: of the move from the end of a loop's body to its beginning, the trips (0: of a while loop, not known).
        None for any other.
    """

    eqn: Any
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    scope: str
    times: int
    in_while: bool
    carried: int | None = None

    @property
    def name(self) -> str:
        """jax's name of the primitive; "" for a move."""
        return "" if self.eqn is None else self.eqn.primitive.name

    @property
    def path(self) -> str:
        """Canonical path of the module that runs it, "" for the root and outside of any module."""
        return _path_in(self.scope)

    @property
    def in_wrapped(self) -> bool:
        """Whether a wrapped module runs it, be it the root."""
        return is_marked(self.scope)

    @property
    def is_transposed(self) -> bool:
        """Whether it stands in a backward pass."""
        return "transpose(" in self.scope


class Program:
    """All primitives of a function in one list, without the calls around them, and who makes and who uses each value."""

    def __init__(self, inputs: Sequence[Value], outputs: Sequence[Value], nodes: Sequence[Node]):
        self.inputs, self.outputs, self.nodes = tuple(inputs), tuple(outputs), tuple(nodes)
        self.makers: dict[Value, list[Node]] = collections.defaultdict(list)
        self.users: dict[Value, list[Node]] = collections.defaultdict(list)
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                self.users[value].append(node)
            for value in node.outputs:
                self.makers[value].append(node)

    def made_of(self, values: Iterable[Value]) -> set[Value]:
        """These values, and all that is made of them: what is not made of an input is a constant."""
        seen = set(values)
        ahead = list(seen)
        while ahead:
            for node in self.users.get(ahead.pop(), ()):
                new = [out for out in node.outputs if out not in seen]
                seen.update(new)
                ahead += new
        return seen

    def downstream(self, value: Value, through: Callable[[Node], bool]) -> Iterator[tuple[Node, Value]]:
        """Every node that `value` reaches, with the operand by which it does; it goes on from moves and `through` nodes."""
        seen, ahead = {value}, [value]
        while ahead:
            here = ahead.pop()
            for node in self.users.get(here, ()):
                if node.eqn is not None:
                    yield node, here
                if node.eqn is None or through(node):
                    new = [out for out in node.outputs if out not in seen]
                    seen.update(new)
                    ahead += new

    def upstream(self, value: Value, through: Callable[[Node], bool]) -> Iterator[tuple[Node, Value]]:
        """Every node that `value` comes from, with the result by which it does; it goes back from moves and `through` nodes."""
        seen, ahead = {value}, [value]
        while ahead:
            here = ahead.pop()
            for node in self.makers.get(here, ()):
                if node.eqn is not None:
                    yield node, here
                if node.eqn is None or through(node):
                    new = [operand for operand in node.inputs if operand not in seen]
                    seen.update(new)
                    ahead += new
