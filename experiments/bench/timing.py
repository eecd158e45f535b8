"""The clock of every side, JAX or PyTorch: blocks of steps, and the host's own time. It imports neither."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

Call = Callable[[], Any]
"""Sends off one step."""
Wait = Callable[[], Any]
"""Returns when the device has done all that was sent."""


def clocked(call: Callable[[], T]) -> tuple[T, float]:
    """What it returns, and the seconds that it took."""
    since = time.perf_counter()
    result = call()
    return result, time.perf_counter() - since


def block_ms(call: Call, wait: Wait, steps: int) -> float:
    """Milliseconds a step of one block: the steps are sent one behind the other, and only the last is waited for."""

    def block() -> None:
        for _ in range(steps):
            call()
        wait()

    return clocked(block)[1] / steps * 1e3


def host_ms(call: Call, wait: Wait, steps: int) -> list[float]:
    """Milliseconds in which the call itself returns, step by step, each sent to a device that has nothing to do."""
    found = []
    for _ in range(steps):
        wait()
        found.append(clocked(call)[1] * 1e3)
    wait()
    return found
