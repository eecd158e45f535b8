"""Blocks of calls on a clock: how long a call takes, and how far the blocks lie apart."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

Clock: TypeAlias = Callable[[], float]
"""Seconds that only go up: `time.perf_counter`; a test gives its own."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call, one number for each block of calls."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Over the blocks: one that something else disturbed does not move it."""
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """The spread: half of the blocks lie between these two (interpolated between blocks)."""
        low, high = np.percentile(self.seconds, (25, 75))
        return float(low), float(high)


def time_blocks(
    call: Callable[[], Any], *, warmup: int, blocks: int, calls: int, clock: Clock = time.perf_counter
) -> Timing:
    """Time `call` in blocks: calls are dispatched one behind the other, and only the last of a block is waited for.

        warmup calls, wait;  for each block: t = clock(); calls × call(); wait; seconds = (clock() − t) / calls

    So a device is kept busy as it is in training, and what the host does meanwhile costs nothing. A device runs calls in
    the order in which they came, so that the last one's result stands for all.

    Args:
      call: dispatches one unit of work and returns what it makes (a pytree of arrays).
      warmup: calls before the first block, which also compile; at least 1.
      blocks: how many blocks; at least 1.
      calls: how many calls a block; at least 1.
      clock: the clock.

    Raises:
      ValueError: one of them is less than 1.

    >>> ticks = iter(range(100))
    >>> time_blocks(lambda: None, warmup=1, blocks=3, calls=4, clock=lambda: next(ticks)).seconds
    (0.25, 0.25, 0.25)
    """
    for name, n in (("warmup", warmup), ("blocks", blocks), ("calls", calls)):
        if n < 1:
            raise ValueError(f"got {n} for {name}; legal is an int ≥ 1: without one there is nothing to time")

    def run(n: int) -> None:
        for _ in range(n - 1):
            call()
        jax.block_until_ready(call())

    run(warmup)
    seconds = []
    for _ in range(blocks):
        since = clock()
        run(calls)
        seconds.append((clock() - since) / calls)
    return Timing(tuple(seconds))
