"""A train step that looks now and then: every N-th call runs a variant whose taps count values, gradients and updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mpjax.core.dtypes import is_float
from mpjax.core.model import SINKS
from mpjax.core.tree import path_of
from mpjax.core.types import Batch, Metrics, MState, Params
from mpjax.measure.readings import ProbeReport
from mpjax.numerics.probe import PROBE, Recorder, Sink, count
from mpjax.policy.patterns import governs
from mpjax.train.hooks import Hook
from mpjax.train.state import TrainState
from mpjax.train.step import TrainStep
from mpjax.train.writers import append_to


class NothingToProbeError(ValueError):
    """The loss function has no taps, or `only` names none of them; the message says which there are."""


@dataclasses.dataclass(frozen=True)
class ProbingStep(TrainStep):
    """The variant: the same step on the same state, with counts under `"sinks"` in its metrics."""

    only: tuple[str, ...] = ()

    def pure(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """The step itself, as `TrainStep.pure`; the sinks come and go inside it, so the state keeps its structure."""
        sinks = self._sinks(state, batch)
        held = state.mstate.get(SINKS)
        probed = dataclasses.replace(state, mstate=state.mstate | {SINKS: {**(held or {}), PROBE: sinks}})
        after, metrics = super().pure(probed, batch)
        left = {name: tree for name, tree in after.mstate.items() if name != SINKS}
        if held is not None:
            left[SINKS] = {name: after.mstate[SINKS][name] for name in held}
        updates = _updates(state.params, after.params)
        return dataclasses.replace(after, mstate=left), metrics | {SINKS: metrics[SINKS] | {"updates": updates}}

    def _sinks(self, state: TrainState, batch: Batch) -> dict[str, Sink]:
        """One for each module call that the loss function makes and `only` names, found by a trace that computes nothing."""
        recorder = Recorder()

        def traced(params: Params, mstate: MState, batch: Batch) -> Any:
            return self.loss_fn(params, mstate | {SINKS: {**mstate.get(SINKS, {}), PROBE: recorder}}, batch, state.rng)

        jax.eval_shape(traced, state.params, state.mstate, batch)
        found = recorder.sinks()
        if not found:
            raise NothingToProbeError(
                "the probe found nothing to tap: the loss function must pass the mstate that it gets to model.apply "
                "(bare functions tap by mpjax.tap); pass mstate on, not {}"
            )
        chosen = {path: sink for path, sink in found.items() if not self.only or _named(self.only, path)}
        if not chosen:
            raise NothingToProbeError(
                f"only={self.only} names none of the taps; they are {', '.join(p or '·' for p in found)}"
            )
        return chosen


def _named(globs: Sequence[str], path: str) -> bool:
    return any(governs(glob, path.partition(".")[0], {}) for glob in globs)


def _updates(before: Params, after: Params) -> dict[str, Sink]:
    """The counts of how far each param moved, as stored: an update that rounded away is a zero."""
    keyed = jax.tree_util.tree_flatten_with_path(before)[0]
    pairs = [(path_of(keys), x, y) for (keys, x), y in zip(keyed, jax.tree.leaves(after), strict=True) if is_float(x)]
    return {
        path: Sink(count(y.astype(jnp.float32) - x.astype(jnp.float32))[None], x.dtype.name, order)
        for order, (path, x, y) in enumerate(pairs)
    }


class ProbedStep:
    """A step that probes every N-th time it is called; made by `probe`."""

    def __init__(self, step: TrainStep, every: int, only: tuple[str, ...]):
        own = {field.name: getattr(step, field.name) for field in dataclasses.fields(TrainStep)}
        self.step, self.probing, self.every = step, ProbingStep(**own, only=only), every
        self.calls = 0

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """As `TrainStep`; which of the two compiled variants runs is chosen on the host by counting calls."""
        chosen = self.step if self.calls % self.every else self.probing
        self.calls += 1
        return chosen(state, batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)  # all that can be asked of a step is asked of the plain one


def probe(step: TrainStep, every: int = 100, *, only: str | Sequence[str] = ()) -> ProbedStep:
    """`step`, which every N-th call counts how large all values are: of activations, their gradients, and updates.

    A separate compiled variant does that, on the same state: the other calls run the step as it is. The counts come as
    metrics, under `"sinks"`; `fit` hands them to the hooks (`Hook.on_probe`, `ProbeLog`), and `ProbeReport.of` reads them.
    On a CPU the suite holds gradients to the bits of the unprobed step; elsewhere XLA may fuse other operations
    together, and they agree to the compute format's eps.

    Every module of a wrapped model reports what it returns, before it is handed back to the caller's dtype, and the
    gradient of that, times the loss scale. A scanned stack reports all of its layers together; bare functions
    report by `mpjax.tap`.

    Args:
      step: from `make_train_step`; its loss function must pass its `mstate` on to `model.apply`.
      every: calls between two probes; the first call is one.
      only: globs over module paths, in the language of a `PolicyMap`; all by default.

    Raises:
      ValueError: `every` under 1; at the first call (`NothingToProbeError`): there is nothing to tap, or `only` names nothing.

    >>> import jax, optax, mpjax
    >>> from flax import linen as nn
    >>> model = mpjax.wrap(nn.Dense(2), "mixed_bfloat16")
    >>> def loss_fn(params, mstate, x, rng):
    ...     y, mstate = model.apply(params, mstate, x)
    ...     return (y ** 2).mean(), mpjax.Aux(mstate)
    >>> optimizer = optax.sgd(0.5)
    >>> state = mpjax.TrainState.create(model, optimizer, jax.random.key(0), jnp.ones((1, 3)))
    >>> step = probe(mpjax.make_train_step(loss_fn, optimizer), every=100)
    >>> state, metrics = step(state, jnp.ones((4, 3)))
    >>> [(r.path, r.kind, r.dtype, r.count) for r in ProbeReport.of(metrics["sinks"]) if r.kind == "gradient"]
    [('', 'gradient', 'bfloat16', 8.0)]
    """
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"got every={every!r}; legal is an int ≥ 1; 100 probes one call in a hundred")
    return ProbedStep(step, every, (only,) if isinstance(only, str) else tuple(only))


class ProbeLog(Hook):
    """Keeps the reports of a run, and writes each as one line of JSON: `mpjax plot` draws them.

    >>> ProbeLog().reports
    []
    """

    def __init__(self, path: str | Path | None = None):
        self.reports: list[ProbeReport] = []
        self.path = None if path is None else Path(path)

    def on_probe(self, attempt: int, metrics: dict[str, float], found: dict[str, Any]) -> None:
        self.reports.append(ProbeReport.of(found, attempt, metrics.get("loss_scale", 1.0)))
        if self.path is not None:
            with append_to(self.path) as file:
                file.write(self.reports[-1].to_json() + "\n")
