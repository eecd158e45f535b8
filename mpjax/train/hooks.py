"""What a run gives, and whom it tells: the words between the loop and those who listen to it."""

from __future__ import annotations

import dataclasses
from typing import Any

from mpjax.core.types import Batch


class NonFiniteError(FloatingPointError):
    """Training stopped because too many steps in a row were skipped; the message names step, scale and gradient leaf.

    `result` is what the run gave until then; its params are those of the last good step.

    >>> issubclass(NonFiniteError, FloatingPointError)
    True
    """

    result: FitResult | None = None


class Hook:
    """What happens beside training. Override what you need; the loop calls it on the host, with floats, one step late.

    >>> class Print(Hook):
    ...     def on_eval(self, attempt, metrics):
    ...         print(attempt, metrics)
    """

    def on_step(self, attempt: int, metrics: dict[str, float]) -> None:
        """The scalar metrics of one attempt, after the next one was dispatched."""

    def on_state(self, attempt: int, state: Any) -> None:
        """The state after an attempt, before the next one takes its memory: read it now or copy it. Reading it waits."""

    def waits(self, attempt: int) -> bool:
        """Whether `on_state` is going to wait for the state of this attempt: then `on_step` tells of it before, and the
        clock stands still meanwhile."""
        return False

    def on_eval(self, attempt: int, metrics: dict[str, float]) -> None:
        """The means of an evaluation after this many attempts."""

    def on_probe(self, attempt: int, metrics: dict[str, float], found: dict[str, Any]) -> None:
        """After `Hook.on_step` of a probed attempt: what came back for the reserved collection, as numpy arrays."""

    def on_nonfinite(self, attempt: int, metrics: dict[str, float], step: Any, state: Any, batch: Batch) -> str | None:
        """Too many skips in a row are about to stop the run: what this returns goes into the error's message."""

    def on_end(self, result: FitResult) -> None:
        """Once, however the run ended; also after an error, when `result.stopped` is `"failed"` (any error) or `"left"` (a
        second signal: be quick)."""


@dataclasses.dataclass
class FitResult:
    """What a run gave.

    Args:
      state: the train state after the last step.
      history: the scalar metrics of each attempt, with its index under `"attempt"`.
      evaluations: the means of each evaluation, with the attempts made under `"attempt"`.
      best: the best value of the chosen metric and the attempts made then, or None.
      stopped: `"done"`, `"early"` (patience), `"exhausted"` (no more batches) or `"interrupted"` (SIGTERM or Ctrl-C).
      steps_per_second: attempts a second, without the first, which compiles, and without evaluations and what `Hook.waits`
        for; 0 for fewer than two.

    >>> FitResult(state=None, history=[{"attempt": 0, "loss": 2.3}]).stopped
    'done'
    """

    state: Any
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    evaluations: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best: tuple[float, int] | None = None
    stopped: str = "done"
    steps_per_second: float = 0.0
