"""Two JAX sides in one process, their blocks in turn: the ratio of their step times, with its interval."""

from __future__ import annotations

import math
import statistics
from typing import Any

from experiments.bench.rows import Settings, Side, Work
from experiments.bench.side_jax import Compiled, environment
from experiments.bench.timing import block_ms

ROUNDS_PER_BLOCK = 2
"""A pair is to be told apart to a percent, so that it gets more rounds than a side gets blocks."""


def measure(work: Work, first: Side, second: Side, settings: Settings) -> dict[str, Any]:
    """How much longer the first side takes than the second.

    Rounds of a block each, first-second and second-first by turns, so that a drift of the clock cancels; of each round
    log(first / second). Given is exp of their mean, and of its 95 % interval by Student's t.
    """
    sides = [Compiled(work, side, settings) for side in (first, second)]
    losses = [side.losses(settings.losses) for side in sides]
    rounds: list[list[float]] = []
    for n in range(settings.blocks * ROUNDS_PER_BLOCK):
        found = {}
        for which in (0, 1) if n % 2 == 0 else (1, 0):
            found[which] = block_ms(sides[which].call, sides[which].wait, settings.steps)
        rounds.append([found[0], found[1]])
    low, high = interval([math.log(a / b) for a, b in rounds])
    return {
        "ratio": math.exp((low + high) / 2), "interval": [math.exp(low), math.exp(high)], "rounds_ms": rounds,
        "median_ms": [statistics.median(column) for column in zip(*rounds, strict=True)],
        "losses": losses, "seconds": [side.seconds for side in sides], "environment": environment(),
    }  # fmt: skip


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean of independent normal numbers, at least two.

    >>> low, high = interval([1.0, 2.0, 3.0])  # 2 ± 4.303 / √3
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    from scipy import special

    half = float(special.stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half
