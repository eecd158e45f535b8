"""One seed, two runs: a job trained under the reference and under the candidate from the same start on the same data."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.core.tree import all_finite, path_of
from mpjax.core.types import Batch, Params, PyTree
from mpjax.train.evaluate import EvalFn, EvalStep, make_eval_step
from mpjax.train.hooks import NonFiniteError
from mpjax.train.job import Job
from mpjax.train.loop import fit
from mpjax.train.seeds import seeds as seeds_of
from mpjax.train.state import TrainState
from mpjax.train.step import TrainStep


class NoComparisonError(ValueError):
    """What was asked for cannot be compared; the message says why. Errors of the job's own functions are none of these."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Args:
      final: the metric at the end; NaN for a run that was given up.
      losses: the training loss of each attempt.
      diverged: how, or None for a run that ended with finite params and a finite metric.
    """

    final: float
    losses: tuple[float, ...]
    diverged: str | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """The two runs of one seed."""

    seed: int
    reference: Run
    candidate: Run

    @property
    def difference(self) -> float:
        """Candidate − reference in the metric; NaN where the candidate diverged."""
        return math.nan if self.candidate.diverged else self.candidate.final - self.reference.final


class Compiled:
    """Steps and evaluations of the pair before, so that seeds whose jobs share their functions share a compilation."""

    def __init__(self) -> None:
        # Two entries, one for each side: what another pair left behind would only hold its memory.
        self.step: Callable[[TrainStep], TrainStep] = functools.lru_cache(maxsize=2)(lambda step: step)
        self.evaluation: Callable[[EvalFn], EvalStep] = functools.lru_cache(maxsize=2)(make_eval_step)


def train_pair(
    reference: Job,
    candidate: Job,
    seed: int,
    *,
    attempts: int,
    metric: str,
    step_options: Mapping[str, Any],
    compiled: Compiled | None = None,
) -> Pair:
    """Train both jobs from one seed, the reference first; the candidate's state waits beside it in memory.

    Args:
      reference, candidate: the same job under two policies.
      seed: of init and rng (`mpjax.seeds`); the jobs' data should follow from it too.
      attempts: steps to try in each.
      metric: the name of a metric of `eval_fn`.
      step_options: for `make_train_step`, the same for both.
      compiled: what the pairs of a comparison share, if they share anything.

    Raises:
      NoComparisonError: they are no pair: another init, other batches or other held-out data.
      NonFiniteError: the reference diverged; there is nothing to be like.
      KeyboardInterrupt: Ctrl-C.
    """
    states = [job.state(seeds_of(seed).init) for job in (reference, candidate)]
    check_same_start(states[0].params, states[1].params, seed)
    for name, which in (
        ("first batch", lambda job: job.batches(0)),
        ("held-out data", lambda job: list(job.eval_batches)),
    ):
        if digest(which(reference)) != digest(which(candidate)):
            raise NoComparisonError(_unpaired(seed, f"the {name} of the two jobs differ"))
    fed: dict[int, bytes] = {}

    def note(attempt: int) -> Batch:
        batch = reference.batches(attempt)
        fed[attempt] = digest(batch)
        return batch

    def check(attempt: int) -> Batch:
        batch = candidate.batches(attempt)
        if digest(batch) != fed[attempt]:
            raise NoComparisonError(_unpaired(seed, f"the batches of attempt {attempt} differ"))
        return batch

    compiled = compiled or Compiled()
    first = _train(reference, states[0], note, attempts, metric, step_options, compiled)
    if first.diverged:
        raise NonFiniteError(
            f"the reference diverged at seed {seed}: {first.diverged}; parity needs a reference that trains: lower the "
            "learning rate, or clip; to leave the seed out would hide what happens"
        )
    return Pair(seed, first, _train(candidate, states[1], check, attempts, metric, step_options, compiled))


def _train(
    job: Job,
    state: TrainState,
    batches: Callable[[int], Batch],
    attempts: int,
    metric: str,
    step_options: Mapping[str, Any],
    compiled: Compiled,
) -> Run:
    assert job.eval_fn is not None
    try:
        result = fit(
            compiled.step(job.step(**step_options)), state, batches, attempts=attempts,
            eval_step=compiled.evaluation(job.eval_fn), eval_batches=job.eval_batches, cast=job.model.cast_params,
        )  # fmt: skip
    except NonFiniteError as error:
        history = error.result.history if error.result else []
        return Run(math.nan, tuple(m["loss"] for m in history), f"given up: {error}")
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    final = result.evaluations[-1][metric]
    diverged = None
    if not math.isfinite(final):
        diverged = f"its {metric} ended as {final}"
    elif not all_finite(result.state.params):  # argmax finds a class in logits of NaN, and so an accuracy
        diverged = "its params are not finite"
    return Run(final, tuple(m["loss"] for m in result.history), diverged)


def check_same_start(reference: Params, candidate: Params, seed: int) -> None:
    """Both begin with the same bytes; where their param dtypes differ, one leaf is the other rounded.

    Raises:
      NoComparisonError: they do not; the first leaf that differs is named.
    """
    ours, theirs = (
        {path_of(k): x for k, x in jax.tree_util.tree_flatten_with_path(t)[0]} for t in (reference, candidate)
    )
    if ours.keys() != theirs.keys():
        only = sorted(ours.keys() ^ theirs.keys())[0]
        raise NoComparisonError(_unpaired(seed, f"the param {only} is there under one policy only"))
    for path, x in ours.items():
        y = theirs[path]
        rounded = x.shape == y.shape and (
            digest(x.astype(y.dtype)) == digest(y) or digest(y.astype(x.dtype)) == digest(x)
        )
        if not rounded:
            raise NoComparisonError(_unpaired(seed, f"the initial params differ, first at {path}"))


def digest(tree: PyTree) -> bytes:
    """A hash of structure, dtypes, shapes and bytes of a pytree; equal for numpy's arrays and jax's."""
    found = hashlib.blake2b(digest_size=16)
    for keys, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        is_key = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(x) if is_key else x)
        found.update(f"{jax.tree_util.keystr(keys)} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.digest()


def _unpaired(seed: int, what: str) -> str:
    return (
        f"the runs of seed {seed} are no pair: {what}; legal is a make_job whose init, batches and held-out data follow "
        "from the seed alone: let the policy decide nothing but dtypes, and make batches pure in the attempt"
    )
