"""The plain host loop: dispatch a step, then read the metrics of the one before; hooks see plain floats."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from mpjax.core.model import SINKS
from mpjax.core.types import Batch
from mpjax.train.evaluate import EvalStep, evaluate
from mpjax.train.interrupt import Held

logger = logging.getLogger("mpjax")


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

    def on_eval(self, attempt: int, metrics: dict[str, float]) -> None:
        """The means of an evaluation after this many attempts."""

    def on_probe(self, attempt: int, metrics: dict[str, float], found: dict[str, Any]) -> None:
        """After `on_step` of a probed attempt: what came back for the reserved collection, as numpy arrays."""

    def on_nonfinite(self, attempt: int, metrics: dict[str, float], step: Any, state: Any, batch: Batch) -> str | None:
        """Too many skips in a row are about to stop the run: what this returns goes into the error's message."""

    def on_end(self, result: FitResult) -> None:
        """Once, however the run ended; also after an error."""


@dataclasses.dataclass
class FitResult:
    """What a run gave.

    Args:
      state: the train state after the last step.
      history: the scalar metrics of each attempt, with its index under `"attempt"`.
      evaluations: the means of each evaluation, with the attempts made under `"attempt"`.
      best: the best value of the chosen metric and the attempts made then, or None.
      stopped: `"done"`, `"early"` (patience), `"exhausted"` (no more batches) or `"interrupted"` (Ctrl-C).
      steps_per_second: attempts a second, without the first, which compiles, and without evaluations; 0 for fewer than two.

    >>> FitResult(state=None, history=[{"attempt": 0, "loss": 2.3}]).stopped
    'done'
    """

    state: Any
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    evaluations: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best: tuple[float, int] | None = None
    stopped: str = "done"
    steps_per_second: float = 0.0


@dataclasses.dataclass
class _Clock:
    """Seconds of stepping: started after the step that compiles, stopped while something else goes on."""

    seconds: float = 0.0
    steps: int = 0
    since: float | None = None

    def start(self) -> None:
        self.since = time.perf_counter()

    def stop(self, state: Any) -> None:
        if self.since is not None:
            jax.block_until_ready(state.step)
            self.seconds += time.perf_counter() - self.since
            self.since = None


def fit(
    step: Callable[[Any, Batch], tuple[Any, dict[str, Any]]],
    state: Any,
    batches: Callable[[int], Batch] | Iterable[Batch],
    *,
    attempts: int,
    eval_step: EvalStep | None = None,
    eval_batches: Sequence[Batch] = (),
    eval_every: int = 0,
    cast: Callable[[Any], Any] | None = None,
    best: str | None = None,
    patience: int | None = None,
    hooks: Sequence[Hook] = (),
    max_consecutive_skips: int = 50,
) -> FitResult:
    """Train until `attempts` steps were tried in all (those that the state already counts among them).

        for n in range(state.attempt, attempts):
            state, metrics[n] = step(state, batches(n))      # dispatched, not waited for
            read metrics[n - 1]; tell the hooks; raise after K skips in a row

    Args:
      step: a `TrainStep`, or any function like it.
      state: a `TrainState`. It is donated.
      batches: from attempt to batch, or an iterable of batches.
      attempts: how many steps to try in all. A skipped step is an attempt: its batch is not fed again.
      eval_step, eval_batches: from `make_eval_step`, and the held-out batches.
      eval_every: attempts between evaluations; one is made at the end in any case. 0: only there.
      cast: as in `evaluate`.
      best: the metric of the evaluation to watch: `"accuracy"` is to grow, `"-loss"` to shrink.
      patience: stop after this many evaluations without a better one.
      hooks: see `Hook`. `mpjax.train.writers` has some.
      max_consecutive_skips: stop with an error after this many skipped steps in a row.

    Returns:
      A `FitResult`. Ctrl-C ends the run cleanly with what was measured so far.

    Raises:
      NonFiniteError: too many skips in a row. Params are still those of the last good step.
      ValueError: settings that do not fit together.

    >>> from mpjax.core.model import Model
    >>> from mpjax.train.job import Job
    >>> import jax.numpy as jnp, optax
    >>> model = Model(lambda rng, x: ({"w": jnp.zeros(2)}, {}), lambda p, m, x, rng=None: (x @ p["w"], m))
    >>> job = Job(model, lambda p, m, x, rng: ((model.apply(p, m, x)[0] - 1) ** 2).mean(), optax.sgd(0.5),
    ...           lambda n: jnp.ones((4, 2)), sample=(jnp.ones((1, 2)),))
    >>> result = fit(job.step(), job.state(jax.random.key(0)), job.batches, attempts=3)
    >>> [round(metrics["loss"], 3) for metrics in result.history]
    [1.0, 1.0, 1.0]
    """
    if (eval_every or best or patience) and eval_step is None:
        raise ValueError(
            "eval_every, best and patience came without eval_step; give one from make_eval_step, or drop them"
        )
    if patience is not None and best is None:
        raise ValueError(
            "patience came without best; name the metric to watch: best='accuracy', or '-loss' to shrink it"
        )
    if eval_step is not None and not len(eval_batches):
        raise ValueError("eval_step came without eval_batches; give the held-out batches, or drop it")
    first = _attempts(state)
    result, clock = FitResult(state), _Clock()
    waiting: list[tuple[int, dict[str, Any], Batch]] = []

    def read(leave: int = 0) -> None:
        """Wait for the metrics of all steps but the last `leave`."""
        while len(waiting) > leave:
            attempt, metrics, batch = waiting[0]
            scalars = {name: float(x) for name, x in jax.device_get(_scalars(metrics)).items()}
            del waiting[0]
            result.history.append({"attempt": attempt, **scalars})
            for hook in hooks:
                hook.on_step(attempt, scalars)
                if SINKS in metrics:
                    hook.on_probe(attempt, scalars, jax.device_get(metrics[SINKS]))
            if scalars.get("skipped_in_a_row", 0) >= max_consecutive_skips:
                error = NonFiniteError(_why(step, result.state, batch, scalars, hooks, attempt))
                error.result = result
                raise error

    def measure(done: int) -> bool:
        """Evaluate after `done` attempts; whether patience is at its end."""
        assert eval_step is not None
        found = evaluate(eval_step, result.state, eval_batches, cast)
        result.evaluations.append({"attempt": done, **found})
        logger.info("%d attempts: %s", done, ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        for hook in hooks:
            hook.on_eval(done, found)
        if best is None:
            return False
        _note_best(result, best, found, done)
        since = [e["attempt"] for e in result.evaluations if result.best is None or e["attempt"] > result.best[1]]
        return patience is not None and len(since) >= patience

    try:
        for attempt, batch in _numbered(batches, first, attempts):
            with Held():
                result.state, metrics = step(result.state, batch)
                waiting.append((attempt, metrics, batch))
                clock.steps += attempt > first
            if attempt == first:
                jax.block_until_ready(result.state.step)  # it compiled; the clock starts behind it
                clock.start()
            read(leave=1)
            for hook in hooks:
                if type(hook).on_state is not Hook.on_state:
                    hook.on_state(attempt, result.state)
            done = attempt + 1
            if eval_step is not None and eval_every and done % eval_every == 0 and done < attempts:
                clock.stop(result.state)
                read()
                if measure(done):
                    result.stopped = "early"
                    break
                clock.start()
        clock.stop(result.state)
        read()
        done = _attempts(result.state)
        if done < attempts and result.stopped == "done":
            result.stopped = "exhausted"
        if eval_step is not None and (not result.evaluations or result.evaluations[-1]["attempt"] != done):
            measure(done)
    except KeyboardInterrupt:
        result.stopped = "interrupted"
        clock.stop(result.state)
        read()
        logger.warning("interrupted: %d attempts were made; their metrics are kept", len(result.history))
    finally:
        result.steps_per_second = clock.steps / clock.seconds if clock.seconds else 0.0
        for hook in hooks:
            hook.on_end(result)
    return result


def _attempts(state: Any) -> int:
    """Applied and skipped steps; read explicitly, as a transfer guard wants it."""
    return sum(int(x) for x in jax.device_get((state.step, state.skipped)))


def _numbered(
    batches: Callable[[int], Batch] | Iterable[Batch], first: int, attempts: int
) -> Iterator[tuple[int, Batch]]:
    if callable(batches):
        return ((attempt, batches(attempt)) for attempt in range(first, attempts))
    return zip(range(first, attempts), batches, strict=False)


def _scalars(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics that are one number; what comes back for a probe is not."""
    return {name: x for name, x in metrics.items() if getattr(x, "ndim", None) == 0}


def _note_best(result: FitResult, best: str, found: dict[str, float], done: int) -> None:
    name, sign = (best[1:], -1) if best.startswith("-") else (best, 1)
    if name not in found:
        raise ValueError(
            f"best={best!r} names no metric of the evaluation; legal are {', '.join(found)}, or -NAME to shrink one"
        )
    if math.isnan(found[name]):  # of no weight, or diverged: neither best, nor in the way of a best
        return
    if result.best is None or sign * found[name] > sign * result.best[0]:
        result.best = (found[name], done)


def _why(step: Any, state: Any, batch: Batch, scalars: dict[str, float], hooks: Sequence[Hook], attempt: int) -> str:
    with jax.transfer_guard_device_to_host("allow"):  # the run is over
        said = [words for hook in hooks if (words := hook.on_nonfinite(attempt, scalars, step, state, batch))]
        leaf = step.nonfinite_leaf(state, batch) if hasattr(step, "nonfinite_leaf") else "not known to this step"
        applied = int(state.step)
    where = (
        f"first non-finite gradient leaf: {leaf}" if leaf else "all gradients are finite: look at loss, mstate, updates"
    )
    return (
        f"{scalars['skipped_in_a_row']:.0f} steps in a row were not finite, at step {applied}, loss scale "
        f"{scalars['loss_scale']:g}; {'; '.join((where, *said))}; params are those of step {applied}: look for bad data, a lower "
        "learning rate, or float32 for that module"
    )
