"""Parity: does a policy train to the same place as float32? Paired seeds, a margin, a verdict by an equivalence test."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mpjax.measure.equivalence import MOST_SEEDS, Equivalence, equivalence
from mpjax.measure.paired import Compiled, NoComparisonError, Pair, train_pair
from mpjax.policy.rules import PolicyMap
from mpjax.train.job import Job
from mpjax.train.seeds import seeds as seeds_of

logger = logging.getLogger("mpjax")


@dataclasses.dataclass(frozen=True)
class Parity:
    """What paired runs say; made by `parity`. `str(...)` is a table, `as_dict()` plain values for JSON.

    Args:
      reference, candidate: the policies, as text.
      metric: the held-out metric that was compared, `-NAME` where it is to shrink.
      attempts: steps tried in each run.
      pairs: the two runs of each seed, with their loss curves.
      test: the equivalence test of the paired differences, candidate − reference.

    >>> from mpjax.measure.paired import Run
    >>> pairs = tuple(Pair(s, Run(0.9, (1.0,)), Run(0.9, (1.0,))) for s in range(2))
    >>> found = Parity("float32", "bfloat16", "accuracy", 1, pairs, equivalence([0.0, 0.0], margin=0.01))
    >>> found.verdict, found.spread
    ('equivalent', 0.0)
    """

    reference: str
    candidate: str
    metric: str
    attempts: int
    pairs: tuple[Pair, ...]
    test: Equivalence

    @property
    def verdict(self) -> str:
        """`"equivalent"`, `"worse"` or `"better"` (different, by the metric's direction), or `"undecided"`."""
        return self._side() if self.test.verdict == "different" else self.test.verdict

    @property
    def diverged(self) -> tuple[int, ...]:
        """The seeds at which the candidate diverged. They are never dropped: one is enough for `"worse"`."""
        return tuple(pair.seed for pair in self.pairs if pair.candidate.diverged)

    @property
    def spread(self) -> float:
        """Standard deviation (n − 1) of the metric between the seeds of the reference; NaN for one seed."""
        finals = [pair.reference.final for pair in self.pairs]
        return float(np.std(finals, ddof=1)) if len(finals) > 1 else math.nan

    def _side(self) -> str:
        better = self.test.mean < 0 if self.metric.startswith("-") else self.test.mean > 0
        return "better" if better else "worse"  # also where a candidate diverged: NaN is not better

    def explain(self) -> str:
        """The verdict in a sentence, with the number of seeds that would do where there were too few."""
        test, name = self.test, self.metric.removeprefix("-")
        if self.diverged:
            return f"different: worse, {self.candidate} diverged at {_seeds(self.diverged)}"
        if test.verdict == "different":
            return f"different: {self.verdict}, {name} differs by more than {test.margin:g}"
        if test.verdict == "equivalent":
            same = self.reference != self.candidate and all(
                p.reference.losses == p.candidate.losses for p in self.pairs
            )
            doubt = "; but every loss is the same to the last bit: does the model use the policy?" if same else ""
            return f"equivalent: {name} differs by less than {test.margin:g}{doubt}"
        if test.seeds == 1:
            return "undecided: one seed tells no spread; at least 2 seeds are needed"
        if test.seeds_needed is None:
            return (
                f"undecided: no number of seeds up to {MOST_SEEDS} would do, since the mean lies too close to the margin "
                f"for its spread; state another margin than {test.margin:g}, or lessen the spread"
            )
        right = "equivalent" if abs(test.mean) < test.margin else self._side()
        return (
            f"undecided with {test.seeds} seeds: about {test.seeds_needed} would do to show it {right}, if mean and spread "
            "stay as they are; run them all anew with other seeds, for to add seeds and look again raises the error rates"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, curves included."""
        plain = {
            key: getattr(self, key) for key in ("reference", "candidate", "metric", "attempts", "verdict", "spread")
        }
        test = dataclasses.asdict(self.test)
        del test["verdict"]
        pairs = [dataclasses.asdict(pair) | {"difference": pair.difference} for pair in self.pairs]
        return plain | {"explanation": self.explain(), "diverged": list(self.diverged), **test, "pairs": pairs}

    def __str__(self) -> str:
        name, test = self.metric.removeprefix("-"), self.test
        lines = [
            f"{self.candidate} (candidate) against {self.reference} (reference): {name} after {self.attempts} attempts"
        ]
        lines.append(f"{'seed':<12}" + "".join(f"{word:>12}" for word in ("reference", "candidate", "difference")))
        for pair in self.pairs:
            finals = (pair.reference.final, pair.candidate.final, pair.difference)
            lines.append(f"{pair.seed:<12}" + "".join(f"{x:>12.4g}" for x in finals))
        share = f"{100 * (1 - 2 * test.alpha):g} % interval"
        low, high = test.interval
        lines.append(f"{'mean':<12}{test.mean:.3g}, {share} [{low:.3g}, {high:.3g}], margin ±{test.margin:g}")
        lines.append(
            f"{'spread':<12}{self.spread:.3g} between seeds of the reference, {test.sd:.3g} between differences"
        )
        lines.append(f"{'verdict':<12}{self.explain()}")
        return "\n".join(lines)


def parity(
    make_job: Callable[[Any, int], Job],
    candidate: Any,
    *,
    margin: float,
    attempts: int,
    reference: Any = "float32",
    seeds: int | Sequence[int] = 5,
    metric: str | None = None,
    alpha: float = 0.05,
    step_options: Mapping[str, Any] | None = None,
) -> Parity:
    """Train the same job under a reference and under a candidate on paired seeds, and test whether they end alike.

        for each seed:  init, rng, batches and held-out data are those of the seed, under both policies
            difference = metric(candidate) − metric(reference)
        verdict = equivalence(differences, margin, alpha)

    Each run compiles its own step, unless make_job gives all seeds of a policy the same loss_fn, eval_fn and optimizer
    (not only equal ones: make them once for each policy, under `functools.cache`). On a CPU float32 against itself
    differs by exactly zero; a GPU may add in another order from run to run, and then it does not. Choose margin and
    number of seeds before you look.

    Args:
      make_job: `make_job(policy, seed)` returns a `Job` with an `eval_fn`; it gets the policy as it was given here.
      candidate: the policy in question: text, a `Policy`, a `PolicyMap` or a dict of rules.
      margin: the largest difference in the metric, in its units, that would not matter: a judgement that is yours.
      attempts: steps to try in each run; the job's schedule should be as long.
      reference: the policy to be like.
      seeds: how many (0, 1, …), or which.
      metric: of `eval_fn`: `"accuracy"` is to grow, `"-loss"` to shrink. None: accuracy if there is one, else −loss.
      alpha: of each of the two one-sided tests; the interval is that of 1 − 2·alpha.
      step_options: for `make_train_step`, the same for both: `{"clip_norm": 1.0}`.

    Returns:
      A `Parity`: finals and loss curves of each seed, interval, verdict, and the spread between the reference's seeds.

    Raises:
      NoComparisonError: a ValueError; before anything trains: a policy that is none, a setting that is not legal, a job
        without such a metric; and runs that are no pair, since init or data differ.
      NonFiniteError: the reference itself diverged.

    >>> import jax.numpy as jnp, optax
    >>> from mpjax.core.model import Model
    >>> def make_job(policy, seed):
    ...     model = Model(lambda rng, x: ({"w": jnp.zeros(2)}, {}), lambda p, m, x, rng=None: (x @ p["w"], m))
    ...     loss = lambda p, m, x, rng=None: jnp.square(model.apply(p, m, x)[0] - 1).mean()
    ...     return Job(model, loss, optax.sgd(0.1), lambda n: jnp.full((4, 2), float(seed)), sample=(jnp.ones((1, 2)),),
    ...                eval_fn=lambda p, m, x: {"loss": loss(p, m, x)}, eval_batches=[jnp.ones((4, 2))])
    >>> found = parity(make_job, "float32", margin=0.01, attempts=3, seeds=2)
    >>> found.verdict, found.metric, [pair.difference for pair in found.pairs]
    ('equivalent', '-loss', [0.0, 0.0])
    """
    try:  # what is not legal is refused now, not after hours of training
        names = _name(reference), _name(candidate)
        chosen = _chosen_seeds(seeds)
        equivalence([0.0], margin, alpha)
    except ValueError as error:
        raise NoComparisonError(str(error)) from error
    if attempts < 1:
        raise NoComparisonError(f"got attempts={attempts!r}; legal is an int ≥ 1; give the steps of the job's schedule")
    pairs: list[Pair] = []
    compiled = Compiled()
    for seed in chosen:
        jobs = make_job(reference, seed), make_job(candidate, seed)
        if not pairs:
            _check_policies(jobs, reference, candidate)
            metric = _chosen_metric(jobs, metric)
        assert metric is not None
        pair = train_pair(
            *jobs, seed, attempts=attempts, metric=metric.removeprefix("-"), step_options=step_options or {},
            compiled=compiled,
        )  # fmt: skip
        pairs.append(pair)
        ends = pair.reference.final, pair.candidate.final
        logger.info("seed %d: %s %.4g (reference) and %.4g (candidate)", seed, metric.removeprefix("-"), *ends)
    test = equivalence([pair.difference for pair in pairs], margin, alpha)
    assert metric is not None
    return Parity(*names, metric, attempts, tuple(pairs), test)


def _name(policy: Any) -> str:
    """What a policy is called; one that is none is refused here."""
    found = PolicyMap.of(policy)
    if isinstance(policy, str):
        return policy
    return f"{found.default} and {len(found.rules)} rules" if found.rules else str(found.default)


def _check_policies(jobs: Sequence[Job], reference: Any, candidate: Any) -> None:
    """A make_job that does not use its policy would find anything equivalent. A bare Model may not tell its own."""
    told = [job.model.policy for job in jobs]
    if None not in told and told[0] == told[1] and PolicyMap.of(reference) != PolicyMap.of(candidate):
        raise NoComparisonError(
            f"got the same policy in the models of both jobs, for {reference!r} and for {candidate!r}; legal is a make_job "
            "whose model follows the policy that it is given: pass it on to mpjax.wrap"
        )


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _chosen_seeds(seeds: int | Sequence[int]) -> list[int]:
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"got seeds={seeds!r}; legal is at least one, each once; 5 is a beginning")
    for seed in chosen:
        seeds_of(seed)  # refuses what is none
    return chosen


def _chosen_metric(jobs: Sequence[Job], metric: str | None) -> str:
    """The metric to compare, of those that both jobs' `eval_fn` gives; asked without computing anything."""
    found = []
    for job in jobs:
        if job.eval_fn is None or not len(job.eval_batches):
            raise NoComparisonError(
                "got a job without eval_fn or eval_batches; parity compares a held-out metric: give the job both"
            )
        state = jax.eval_shape(job.state, jax.random.key(0))
        found.append(jax.eval_shape(job.eval_fn, state.params, state.mstate, job.eval_batches[0]).keys())
    legal = found[0] & found[1]
    if metric is None:
        metric = next((m for m in ("accuracy", "-loss") if m.removeprefix("-") in legal), None)
    if metric is None or metric.removeprefix("-") not in legal:
        raise NoComparisonError(
            f"got metric={metric!r}; legal are {', '.join(sorted(legal))}, or -NAME for one that is to shrink; name one"
        )
    return metric
