"""How much of a step's time is collectives, and how much of that no other kernel hides: from a trace of the GPUs."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.bench.profile import GPU, streams, traced
from experiments.bench.timing import Call, Wait

COLLECTIVE = re.compile(r"nccl|all_?reduce_?kernel|multimem|memcpy ?p2p", re.IGNORECASE)
"""In the name of a kernel (or copy) that moves data between devices: NCCL's, XLA's own all-reduce, copies from GPU to GPU."""


class Span(NamedTuple):
    """What ran on a device, from when to when, in nanoseconds."""

    name: str
    start: float
    end: float


def shares(devices: Mapping[str, Iterable[Span]], steps: int) -> dict[str, float] | None:
    """Of a step's time, the median over devices: the share in which collectives run, and in which nothing else does.

        step = (end of the last kernel − start of the first) / steps
        collectives = |∪ collectives| / (steps · step);  exposed = |∪ all − ∪ others| / (steps · step)

    A collective runs on each device from when that device has come to it, so its time holds the wait for the slowest.

    Args:
      devices: from device to what ran on it in all the steps.
      steps: how many there were.

    Returns:
      `step_ms`, `collectives`, `exposed`, `idle` (nothing runs at all); None if nothing ran.

    >>> found = shares({"0": [Span("gemm", 0, 60), Span("ncclDevKernel_AllReduce", 50, 90), Span("add", 95, 100)]}, 1)
    >>> [round(found[key], 3) for key in ("collectives", "exposed", "idle")]
    [0.4, 0.3, 0.05]
    """
    found = []
    for ran in (list(spans) for spans in devices.values()):
        if not ran:
            continue
        window = max(span.end for span in ran) - min(span.start for span in ran)
        busy = covered(ran)
        moving = covered(span for span in ran if COLLECTIVE.search(span.name))
        others = covered(span for span in ran if not COLLECTIVE.search(span.name))
        found.append((window / steps / 1e6, moving / window, (busy - others) / window, 1 - busy / window))
    if not found:
        return None
    middle = [statistics.median(numbers) for numbers in zip(*found, strict=True)]
    return dict(zip(("step_ms", "collectives", "exposed", "idle"), middle, strict=True))


def covered(spans: Iterable[Span]) -> float:
    """Nanoseconds in which at least one of them runs.

    >>> covered([Span("a", 0, 4), Span("b", 2, 3), Span("c", 3, 6), Span("d", 8, 9)])
    7.0
    """
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total


def measure(call: Call, wait: Wait, steps: int) -> dict[str, float] | None:
    """Run some steps under jax's profiler; None where no GPU ran: a CPU's threads do not tell what they wait for."""
    with traced(call, wait, steps) as paths:
        devices: dict[str, list[Span]] = {}
        for path in paths:
            for name, spans in read(path).items():
                devices.setdefault(name, []).extend(spans)
    return shares(devices, steps)


def read(path: Path) -> dict[str, list[Span]]:
    """From each GPU in a trace to what ran in its streams."""
    import jax

    trace: Any = jax.profiler.ProfileData.from_file(str(path))  # it owns what its planes point to
    return {
        plane.name: [
            Span(event.name, float(event.start_ns), float(event.start_ns) + float(event.duration_ns))
            for line in streams(plane)
            for event in line.events
        ]
        for plane in trace.planes
        if plane.name.startswith(GPU)
    }
