"""One policy's run: compiled, audited, trained, evaluated; gone on with where it was, and never made twice."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import mpjax
from experiments._run.command import Refused
from experiments._run.folder import numbers, write_json
from mpjax.measure.audit import audit
from mpjax.measure.memory import step_memory
from mpjax.measure.runs import read_runs
from mpjax.train.writers import JsonlWriter, ProgressBar, TensorBoardWriter

ROW, CHECKPOINTS, METRICS = "row.json", "checkpoints", "metrics.jsonl"

LOADERS = min(8, max(1, (os.cpu_count() or 1) // 4))
"""Threads that make batches. On a machine with a few cores the step itself has need of them."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is the same for every policy of a comparison.

    Args:
      attempts: steps to try.
      eval_every: attempts between evaluations.
      seeds: of init, rng and data order.
      step_options: for `make_train_step`.
      best: the metric of the evaluation that the table and the picture show: `"accuracy"` is to grow,
        `"-bits_per_byte"` to shrink.
      progress: show a progress bar.
      devices: how many share the rows of each batch; 0 for all there are.
      probe_every: attempts between probes, each a line in `POLICY/probe.jsonl`; 0 for none.
      checkpoint_every: attempts between checkpoints; 0: only at the end and at a signal; None: a tenth of the attempts.
    """

    attempts: int
    eval_every: int
    seeds: mpjax.Seeds
    step_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    best: str = "accuracy"
    progress: bool = True
    devices: int = 1
    probe_every: int = 0
    checkpoint_every: int | None = None

    @property
    def metric(self) -> str:
        """The name of the metric that is shown."""
        return self.best.removeprefix("-")

    @property
    def words(self) -> str:
        """That metric as the table and the picture name it."""
        return self.metric.replace("_", " ")

    @property
    def saved_every(self) -> int:
        """Attempts between checkpoints, as a `Checkpointer` takes it.

        Raises:
          Refused: a negative number.
        """
        if self.checkpoint_every is not None and self.checkpoint_every < 0:
            raise Refused(f"got --checkpoint-every={self.checkpoint_every}; legal is 0 (only at the end) or more")
        return max(1, self.attempts // 10) if self.checkpoint_every is None else self.checkpoint_every or sys.maxsize


@dataclasses.dataclass(frozen=True)
class Trained:
    """One policy's run: its row of the table, and what the loop gave. No row yet: it was stopped before its first step."""

    row: dict[str, Any]
    result: mpjax.FitResult

    def is_whole(self, attempts: int) -> bool:
        """Whether all is done, the evaluation at the end included."""
        evaluations = self.result.evaluations
        return bool(evaluations) and evaluations[-1]["attempt"] == attempts


def train(name: str, job: mpjax.Job, folder: Path, plan: Plan, mesh: jax.sharding.Mesh | None = None) -> Trained:
    """One policy, from its newest checkpoint if there is one; one that is done is read back and not trained again.

    Writes `metrics.jsonl`, TensorBoard events, `checkpoints/`, and at the end `row.json` into its folder.

    Raises:
      KeyboardInterrupt: Ctrl-C before `fit`; later, as SIGTERM does, it ends the run, and that is returned.
    """
    if (done := _stored(folder)) is not None:
        return done
    assert job.eval_fn is not None, "an experiment measures its model on held-out data"
    eval_step = mpjax.make_eval_step(job.eval_fn)
    state = job.state(plan.seeds.init)
    if mesh is not None:
        state, job = mpjax.shard_state(state, mesh), on_mesh(job, mesh)
    checkpointer = mpjax.Checkpointer(folder / CHECKPOINTS, keep=2, every=plan.saved_every)
    saving = mpjax.CheckpointHook(checkpointer, policy=job.model.policy)
    earlier = saving.resume(state)
    state, first = earlier.state, int(earlier.state.attempt)
    earlier.history = [row for row in _history(folder) if row["attempt"] < first]
    step = job.step(**plan.step_options)
    memory = compiled_memory(step, state, job.batches(0))
    shares = audit(step.pure, state, job.batches(0)).flops_by_dtype()
    hooks = [JsonlWriter(folder / METRICS), TensorBoardWriter(folder), mpjax.CulpritHook(), saving]
    stepping: Any = step
    if plan.probe_every:
        hooks.append(mpjax.ProbeLog(folder / "probe.jsonl"))
        stepping = mpjax.probe(step, plan.probe_every)
        stepping.calls = first  # so that the same attempts are probed
    if plan.progress:
        hooks.append(ProgressBar(plan.attempts, name))
    batches = mpjax.prefetch(job.batches, depth=max(2, LOADERS), workers=LOADERS)
    result = mpjax.fit(
        stepping, state, batches, attempts=plan.attempts, eval_step=eval_step, eval_batches=job.eval_batches,
        eval_every=plan.eval_every, cast=job.model.cast_params, best=plan.best, hooks=hooks, earlier=earlier,
    )  # fmt: skip
    if not result.history:
        return Trained({}, result)
    total = sum(shares.values())
    row = {
        f"test {plan.words}": result.evaluations[-1][plan.metric] if result.evaluations else None,
        "final loss": result.history[-1]["loss"],
        "skipped": int(result.state.skipped),
        "final scale": float(np.asarray(result.state.loss_scale.loss_scale)),
        "steps/s": result.steps_per_second,
        "temp memory": memory["temp"],
        "matrix FLOPs": {dtype: flops / total for dtype, flops in shares.items()},
    }
    trained = Trained(row, result)
    if trained.is_whole(plan.attempts):
        write_json(folder / ROW, {"row": row, "evaluations": result.evaluations, "best": result.best})
    return trained


def _stored(folder: Path) -> Trained | None:
    """A run that is done, from what it wrote; its state stays in its checkpoint."""
    try:
        stored = json.loads((folder / ROW).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    best = stored["best"] and (float(stored["best"][0]), stored["best"][1])
    evaluations = [numbers(found) for found in stored["evaluations"]]
    return Trained(numbers(stored["row"]), mpjax.FitResult(None, _history(folder), evaluations, best))


def stored_steps(folder: Path) -> Trained:
    """Of a run that could not go on, the steps that it wrote."""
    history = _history(folder)
    return Trained({"final loss": history[-1]["loss"]} if history else {}, mpjax.FitResult(None, history))


def _history(folder: Path) -> list[dict[str, Any]]:
    """The metrics of each attempt, as a run in one go has them: JSON keeps a float to the last bit."""
    if not (folder / METRICS).is_file():
        return []
    (run,) = read_runs(folder).values()
    return [dict(zip(run.curves, values, strict=True)) for values in zip(*run.curves.values(), strict=True)]


def compiled_memory(step: Any, state: Any, batch: Any) -> dict[str, int]:
    """Bytes of the compiled step by their use, which are known before it is run."""
    return step_memory(step.lower(state, batch).compile())


def data_parallel(devices: int) -> jax.sharding.Mesh | None:
    """A mesh of the first so many devices (0: all), or None for one.

    Raises:
      Refused: there are not so many.
    """
    there = jax.device_count()
    if not 0 <= devices <= there:
        raise Refused(f"got --devices={devices}; here {'is 1' if there == 1 else f'are {there}'}; 0 takes all")
    count = devices or there
    return None if count == 1 else jax.make_mesh((count,), ("data",), devices=jax.devices()[:count])


def on_mesh(job: mpjax.Job, mesh: jax.sharding.Mesh) -> mpjax.Job:
    """The same job, the rows of its batches shared among the devices; held-out batches, which may not divide, on each."""
    return dataclasses.replace(job, batches=lambda attempt: mpjax.shard_batch(job.batches(attempt), mesh))
