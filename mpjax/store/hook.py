"""Checkpoints beside training: what saves them, and what a run needs to go on from one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from mpjax.core.processes import gather, several
from mpjax.store.checkpoint import Checkpointer
from mpjax.train.hooks import FitResult, Hook
from mpjax.train.state import attempts_made
from mpjax.train.writers import word

logger = logging.getLogger("mpjax")

EVALUATIONS = "evaluations"

AFTER_AN_ERROR = 30.0
"""Seconds for which one of several processes waits for the same error on the others, to save together what there is."""


class CheckpointHook(Hook):
    """Saves the state after every `checkpointer.every` attempts and at the end of a run, and lets the next run go on.

        hook = CheckpointHook(Checkpointer("run/checkpoints", every=500), policy=model.policy)
        earlier = hook.resume(state)     # of the newest checkpoint; of `state` itself, where there is none
        result = fit(step, earlier.state, batches, attempts=10_000, hooks=[hook], earlier=earlier)

    The end is also that of a run that SIGTERM, Ctrl-C or an error ends. If the state cannot be saved after an error, that
    is a warning, and the error stays what it was; after a second signal nothing is saved. Of several processes an error of
    one alone saves nothing: the others do not come.

    With each state go the evaluations before it, so that `best` and `patience` count on. The metrics of single attempts
    do not: `JsonlWriter` writes them down, each before the checkpoint that counts it.

    Args:
      checkpointer: says where, how often, and how many stay.
      policy: the policy or map that the model computes by, to stand beside the state: `model.policy`.
      allow_nonfinite: as in `Checkpointer.save`.

    >>> import tempfile, jax, jax.numpy as jnp, optax, mpjax
    >>> model = mpjax.Model(lambda rng, x: ({"w": jnp.zeros(2)}, {}), lambda p, m, x, rng=None: (x @ p["w"], m))
    >>> job = mpjax.Job(model, lambda p, m, x, rng: ((model.apply(p, m, x)[0] - 1) ** 2).mean(), optax.sgd(0.1),
    ...                 lambda n: jnp.ones((4, 2)), sample=(jnp.ones((1, 2)),))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for attempts in (3, 5):
    ...         hook = CheckpointHook(Checkpointer(folder))
    ...         earlier = hook.resume(job.state(jax.random.key(0)))
    ...         result = mpjax.fit(job.step(), earlier.state, job.batches, attempts=attempts, hooks=[hook], earlier=earlier)
    ...         print([row["attempt"] for row in result.history])
    [0, 1, 2]
    [3, 4]
    """

    def __init__(
        self, checkpointer: Checkpointer, *, policy: Any = None, allow_nonfinite: bool | Sequence[str] = False
    ):
        self.checkpointer, self.policy, self.allow_nonfinite = checkpointer, policy, allow_nonfinite
        self._evaluations: list[dict[str, float]] = []
        self._saved: int | None = None

    def resume(self, like: Any) -> FitResult:
        """What an earlier part of the run left, as `fit` takes it: state and evaluations of the newest whole checkpoint.

        Args:
          like: a state made as that of the run was; only read. Where there is no checkpoint it is the state.

        Raises:
          CheckpointError: there are checkpoints, but none is whole, or the newest does not fit `like`.
        """
        there = "checkpoints" if self.checkpointer.steps() else ""
        about = f"the beginning of a run in {self.checkpointer.directory}"
        if not gather("resume", about, there, self.checkpointer.timeout)[0]:
            return FitResult(like)
        state, info = self.checkpointer.restore(like), self.checkpointer.restored
        assert info is not None
        self._saved = info.step
        self._evaluations = [_numbers(found) for found in info.extra.get(EVALUATIONS, [])]
        logger.info("going on from the checkpoint of step %d in %s", info.step, self.checkpointer.directory)
        return FitResult(state, evaluations=list(self._evaluations))

    def waits(self, attempt: int) -> bool:
        """At a state that is saved, so that the metrics which lead to it are written first."""
        return (attempt + 1) % self.checkpointer.every == 0

    def on_state(self, attempt: int, state: Any) -> None:
        """Save it, if it is its turn."""
        if self.waits(attempt):
            self._save(attempt + 1, state)

    def on_eval(self, attempt: int, metrics: dict[str, float]) -> None:
        """Keep it for the next save."""
        self._evaluations.append({"attempt": attempt, **metrics})

    def on_end(self, result: FitResult) -> None:
        """Save the last state, unless it is saved; wait for a save in progress."""
        if result.stopped == "left":
            return
        try:
            if result.stopped == "failed" and several():
                gather("failed", "the end of a run after an error", seconds=AFTER_AN_ERROR)
            step = attempts_made(result.state)
            if step != self._saved:
                self._save(step, result.state)
            self.checkpointer.wait()
        except Exception as error:
            if result.stopped != "failed":
                raise
            logger.warning("the state at the end was not saved: %s", error)

    def _save(self, step: int, state: Any) -> None:
        extra = {EVALUATIONS: [{name: word(x) for name, x in found.items()} for found in self._evaluations]}
        self.checkpointer.save(state, step, policy=self.policy, extra=extra, allow_nonfinite=self.allow_nonfinite)
        self._saved = step


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    return {name: int(x) if name == "attempt" else float(x) for name, x in found.items()}
