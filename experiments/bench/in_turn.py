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
    """How much longer each side takes than the first.

    Rounds of a block each, forwards and backwards by turns, so that a drift of the clock cancels; of each round
    log(side / first). Given is exp of their mean, and of its 95 % interval by Student's t. A side that cannot be built or
    compiled is told, and the others go on; the first must run.
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
    for name in ready:
        rounds = zip(found[name]["block_ms"], found[first]["block_ms"], strict=True)
        low, high = interval([math.log(a / b) for a, b in rounds])
        found[name] |= {"ratio": math.exp((low + high) / 2), "interval": [math.exp(low), math.exp(high)]}
    return {"sides": found, "environment": environment()}


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row of plain numbers a side, for `mpjax.measure.table`."""
    made = []
    for name, side in found["sides"].items():
        if "failed" in side:
            made.append({"side in turn": name, "step (ms)": "failed"})
            continue
        low, high = side["interval"]
        made.append({
            "side in turn": name,
            "step (ms)": f"{statistics.median(side['block_ms']):.2f} ({min(side['block_ms']):.2f}–{max(side['block_ms']):.2f})",
            "× time": f"{side['ratio']:.4f}", "95 % interval": f"{low:.4f}–{high:.4f}", "rounds": len(side["block_ms"]),
            "planned memory": side["planned_bytes"]["peak"],
            "trace (s)": f"{side['seconds']['trace']:.2f}", "compile (s)": f"{side['seconds']['compile']:.2f}",
            f"loss {len(side['losses'])}": f"{side['losses'][-1]:.4f}",
        })  # fmt: skip
    return made


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
