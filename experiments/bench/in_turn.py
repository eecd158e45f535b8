"""JAX sides in one process, their blocks in turn: the ratios of their step times to the first's, with intervals."""

from __future__ import annotations

import math
import statistics
import traceback
from collections.abc import Mapping
from typing import Any

from experiments.bench import products
from experiments.bench.rows import Settings, Side, Work
from experiments.bench.side_jax import Compiled, environment, planned
from experiments.bench.timing import block_ms

ROUNDS_PER_BLOCK = 2
"""Sides that are to be told apart to a percent get more rounds than a side alone gets blocks."""


def measure(work: Work, sides: Mapping[str, Side], settings: Settings) -> dict[str, Any]:
    """The time of each side's blocks, round by round.

    Rounds of a block each, forwards and backwards by turns, so that a drift of the clock cancels. A side that cannot be
    built or compiled is told, and the others go on; the first must run.
    """
    ready: dict[str, Compiled] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, side in sides.items():
        try:
            ready[name] = Compiled(work, side, settings)
            found[name] = {
                "losses": ready[name].losses(settings.losses), "seconds": ready[name].seconds,
                "planned_bytes": planned(ready[name].executable), "block_ms": [],
                "products": products.table(ready[name].executable.as_text()),
            }  # fmt: skip
        except Exception as error:
            ready.pop(name, None)  # it ran out of memory, and holds some
            found[name] = {"failed": f"{type(error).__name__}: {error}", "log": traceback.format_exc()[-4000:]}
    first = next(iter(sides))
    if first not in ready:
        return found[first]
    for n in range(-1, settings.blocks * ROUNDS_PER_BLOCK):
        for name in list(ready) if n % 2 == 0 else reversed(ready):
            block = block_ms(ready[name].call, ready[name].wait, settings.steps)
            if n >= 0:  # the first round behind so much compiling was seen to stall for seconds
                found[name]["block_ms"].append(block)
    return {"sides": found, "environment": environment()}


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row of plain numbers a side, for `mpjax.measure.table`: × time is the median of the rounds' own ratios."""
    made = []
    first = next(iter(found["sides"].values()))
    for name, side in found["sides"].items():
        if "failed" in side:
            made.append({"side in turn": name, "step (ms)": "failed"})
            continue
        ratios = [a / b for a, b in zip(side["block_ms"], first["block_ms"], strict=True)]
        low, high = interval(ratios)
        made.append({
            "side in turn": name,
            "step (ms)": f"{statistics.median(side['block_ms']):.2f} ({min(side['block_ms']):.2f}–{max(side['block_ms']):.2f})",
            "× time": f"{statistics.median(ratios):.4f}", "95 % interval": f"{low:.4f}–{high:.4f}", "rounds": len(side["block_ms"]),
            "planned memory": side["planned_bytes"]["peak"],
            "trace (s)": f"{side['seconds']['trace']:.2f}", "compile (s)": f"{side['seconds']['compile']:.2f}",
            f"loss {len(side['losses'])}": f"{side['losses'][-1]:.4f}",
        })  # fmt: skip
    return made


def interval(values: list[float]) -> tuple[float, float]:
    """Bounds of the median of independent numbers, at 95 % or more where there are six or more: an order statistic each.

    Nothing is asked of their distribution, since a stall of the host now and then makes some far too large. Of fewer than
    six it is the least and the largest. Source: Conover, Practical Nonparametric Statistics (1999), section 3.2.

    >>> interval([1.0, 9.0, 2.0, 3.0, 4.0, 5.0])  # the median lies outside all six once in 2⁵ times
    (1.0, 9.0)
    >>> interval([float(n) for n in range(1, 17)])  # P(at most 3 of 16 coins) = 0.0106, at most 4: 0.0384
    (4.0, 13.0)
    """
    n, below, cut = len(values), 0.0, 0
    while (below := below + math.comb(n, cut) / 2**n) <= 0.025:
        cut += 1
    cut = max(cut, 1)
    ordered = sorted(values)
    return ordered[cut - 1], ordered[n - cut]
