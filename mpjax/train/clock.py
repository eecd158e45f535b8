"""How fast a run steps, without what it does beside."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax


@dataclasses.dataclass
class Clock:
    """Seconds of stepping: started after the step that compiles, stopped while something else goes on.

    >>> Clock(seconds=2.0, steps=8).rate
    4.0
    """

    seconds: float = 0.0
    steps: int = 0
    since: float | None = None

    def start(self) -> None:
        self.since = time.perf_counter()

    def stop(self, state: Any) -> None:
        """Wait for the state's step; nothing, if it stands still."""
        if self.since is not None:
            jax.block_until_ready(state.step)
            self.seconds += time.perf_counter() - self.since
            self.since = None

    @property
    def rate(self) -> float:
        """Steps a second; 0 before there is one to count."""
        return self.steps / self.seconds if self.seconds else 0.0
