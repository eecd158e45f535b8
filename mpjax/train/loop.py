"""The plain host loop: dispatch a step, then read the metrics of the one before; hooks see plain floats."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from mpjax.core.model import SINKS
from mpjax.core.types import Batch
from mpjax.train.clock import Clock
from mpjax.train.evaluate import EvalStep, evaluate
from mpjax.train.hooks import FitResult, Hook, NonFiniteError
from mpjax.train.interrupt import Interrupts, Stopped
from mpjax.train.prefetch import drawn
from mpjax.train.state import TrainState, as_of, attempts_made

logger = logging.getLogger("mpjax")


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
    earlier: FitResult | None = None,
) -> FitResult:
    """Train until `attempts` steps were tried in all (those that the state already counts among them).

        for n in range(state.attempt, attempts):
            state, metrics[n] = step(state, batches(n))      # dispatched, not waited for
            read metrics[n - 1]; tell the hooks; raise after K skips in a row

    SIGTERM, which comes before a machine is taken away, and Ctrl-C (SIGINT) let it finish the step in flight; then it
    stops, tells the hooks of the end (`CheckpointHook` saves there) and returns. An evaluation in progress is left between
    two batches, and made when the run goes on. A second signal, once the first was heard (Python hears none inside
    compiled code), leaves at once: it does what it did before `fit` took hold of it, but that Ctrl-C ends a script also
    inside compiled code. All this in the main thread only, and not for a signal that is ignored; when `fit` returns, the
    handlers are what they were. Of several processes (`jax.distributed`), which all call this alike, one that is asked to
    stop stops all before the same attempt, two later; evaluations are then finished.

    Args:
      step: a `TrainStep`, or any function like it.
      state: a `TrainState`. It is donated.
      batches: from attempt to batch, or an iterable of batches; none is drawn once somebody asked to stop. From
        `mpjax.prefetch`: the next batches are made and sent to the device while a step runs.
      attempts: how many steps to try in all. A skipped step is an attempt: its batch is not fed again.
      eval_step, eval_batches: from `make_eval_step`, and the held-out batches.
      eval_every: attempts between evaluations; one is made at the end in any case. 0: only there.
      cast: as in `evaluate`.
      best: the metric of the evaluation to watch: `"accuracy"` is to grow, `"-loss"` to shrink.
      patience: stop after this many evaluations without a better one.
      hooks: see `Hook`. `mpjax.train.writers` has some.
      max_consecutive_skips: stop with an error after this many skipped steps in a row.
      earlier: what an earlier part of the same run gave, where `state` is from a checkpoint of it. What it measured up to
        there stands before what is measured now, and `best` and `patience` count on; an evaluation that was due at `state` and
        was not made, is.

    Returns:
      A `FitResult`, also after a signal: what was measured so far.

    Raises:
      NonFiniteError: too many skips in a row. Params are still those of the last good step.
      ValueError: settings that do not fit together, or a state that was donated before: a cell that is run twice.

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
    for name, count in (("patience", patience), ("max_consecutive_skips", max_consecutive_skips)):
        if count is not None and count < 1:
            raise ValueError(f"got {name}={count}; legal is an int ≥ 1")
    if eval_every < 0:
        raise ValueError(f"got eval_every={eval_every}; legal is an int ≥ 0; 0 evaluates at the end alone")
    if not hasattr(eval_batches, "__len__"):
        raise ValueError(
            f"got a {type(eval_batches).__name__} for eval_batches, which are read at each evaluation; legal is a sequence: "
            "give list(...) of them"
        )
    if eval_step is not None and not len(eval_batches):
        raise ValueError("eval_step came without eval_batches; give the held-out batches, or drop it")
    first = attempts_made(state)
    planned = range(first, attempts)
    result, clock = FitResult(state, stopped="failed"), Clock()
    if earlier is not None:
        result.history = [row for row in earlier.history if row["attempt"] < first]
        for found in earlier.evaluations:
            if found["attempt"] <= first:
                _note_evaluation(result, found, best)
    waiting: list[tuple[int, dict[str, Any], Batch]] = []

    def read(leave: int = 0) -> None:
        """Wait for the metrics of all steps but the last `leave`."""
        while len(waiting) > leave:
            attempt, metrics, batch = waiting[0]
            scalars = {name: float(x) for name, x in jax.device_get(_scalars(metrics)).items()}
            del waiting[0]
            result.history.append({"attempt": attempt, **scalars})
            probed = jax.device_get(metrics.get(SINKS))
            with contextlib.ExitStack() as telling:
                for hook in reversed(hooks):  # each of them, whatever another raises: no row is lost
                    if SINKS in metrics:
                        telling.callback(hook.on_probe, attempt, scalars, probed)
                    telling.callback(hook.on_step, attempt, scalars)
            if scalars.get("skipped_in_a_row", 0) >= max_consecutive_skips:
                error = NonFiniteError(_why(step, result.state, batch, scalars, hooks, attempt))
                error.result = result
                raise error

    def due(done: int) -> bool:
        """Whether there is to be an evaluation after so many attempts, before the last, that was not made yet."""
        return bool(eval_every) and done % eval_every == 0 and 0 < done < attempts and not _evaluated(result, done)

    def measure(done: int) -> None:
        """Evaluate after `done` attempts."""
        assert eval_step is not None
        found = evaluate(eval_step, result.state, interrupts.between(eval_batches), cast)
        logger.info("%d attempts: %s", done, ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        _note_evaluation(result, {"attempt": done, **found}, best)
        with contextlib.ExitStack() as telling:
            for hook in reversed(hooks):
                telling.callback(hook.on_eval, done, found)

    with Interrupts() as interrupts, contextlib.ExitStack() as ending:
        for hook in reversed(hooks):
            ending.callback(hook.on_end, result)  # each of them, whatever another raises
        feed = ending.enter_context(drawn(batches, planned))
        try:
            if earlier is not None and due(first):
                measure(first)
            early = _out_of_patience(result, patience)
            numbers = itertools.takewhile(lambda n: not interrupts.stops(n), () if early else planned)
            for attempt, batch in zip(numbers, feed, strict=False):
                result.state, metrics = step(result.state, batch)
                waiting.append((attempt, metrics, batch))
                clock.steps += attempt > first
                if attempt == first:
                    jax.block_until_ready(result.state.step)  # it compiled; the clock starts behind it
                    clock.start()
                waits = any(hook.waits(attempt) for hook in hooks)
                if waits:
                    clock.stop(result.state)
                read(leave=0 if waits else 1)
                for hook in hooks:
                    if type(hook).on_state is not Hook.on_state:
                        hook.on_state(attempt, result.state)
                if due(attempt + 1):
                    clock.stop(result.state)
                    read()
                    measure(attempt + 1)
                    if early := _out_of_patience(result, patience):
                        break
                if clock.since is None:
                    clock.start()
            clock.stop(result.state)
            read()
            done = attempts_made(result.state)
            if interrupts.agreed():
                raise Stopped
            if eval_step is not None and not _evaluated(result, done):
                measure(done)
            result.stopped = "early" if early else "exhausted" if done < attempts else "done"
        except (KeyboardInterrupt, Stopped) as reason:
            if isinstance(reason, KeyboardInterrupt) and interrupts.asked:
                result.stopped = "left"
                raise
            clock.stop(result.state)
            read()
            result.stopped = "interrupted"
            logger.warning("interrupted: %d attempts were made; their metrics are kept", attempts_made(result.state))
        except NonFiniteError:
            raise
        except Exception:  # of the data, say: what the state counts, the hooks are told of before they save it
            with contextlib.suppress(Exception):
                read()
            raise
        finally:
            result.steps_per_second = clock.rate
    if interrupts.asked:  # also while the hooks were told of the end
        result.stopped = "interrupted"
    return result


def _scalars(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics that are one number; what comes back for a probe is not."""
    return {name: x for name, x in metrics.items() if isinstance(x, (int, float)) or getattr(x, "ndim", None) == 0}


def _evaluated(result: FitResult, done: int) -> bool:
    return bool(result.evaluations) and result.evaluations[-1]["attempt"] == done


def _note_evaluation(result: FitResult, found: dict[str, Any], best: str | None) -> None:
    """One more evaluation, and whether it is the best."""
    result.evaluations.append(found)
    if best is None:
        return
    name, sign = (best[1:], -1) if best.startswith("-") else (best, 1)
    if name not in found or name == "attempt":
        legal = ", ".join(word for word in found if word != "attempt")
        raise ValueError(f"best={best!r} names no metric of the evaluation; legal are {legal}, or -NAME to shrink one")
    if math.isnan(found[name]):  # of no weight, or diverged: neither best, nor in the way of a best
        return
    if result.best is None or sign * found[name] > sign * result.best[0]:
        result.best = (found[name], found["attempt"])


def _out_of_patience(result: FitResult, patience: int | None) -> bool:
    since = [e["attempt"] for e in result.evaluations if result.best is None or e["attempt"] > result.best[1]]
    return patience is not None and bool(result.evaluations) and len(since) >= patience


def _why(step: Any, state: Any, batch: Batch, scalars: dict[str, float], hooks: Sequence[Hook], attempt: int) -> str:
    with jax.transfer_guard_device_to_host("allow"):  # the run is over
        said = [words for hook in hooks if (words := hook.on_nonfinite(attempt, scalars, step, state, batch))]
        leaf = "not known to this step"
        if hasattr(step, "nonfinite_leaf"):
            failed = as_of(state, attempt, scalars) if isinstance(state, TrainState) else state
            leaf = step.nonfinite_leaf(failed, batch)
        applied = int(state.step)
    where = (
        f"first non-finite gradient leaf: {leaf}" if leaf else "all gradients are finite: look at loss, mstate, updates"
    )
    return (
        f"{scalars['skipped_in_a_row']:.0f} steps in a row were not finite, at step {applied}, loss scale "
        f"{scalars['loss_scale']:g}; {'; '.join((where, *said))}; params are those of step {applied}: look for bad data, a lower "
        "learning rate, or float32 for that module"
    )
