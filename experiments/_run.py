"""What experiments share: the command line, the run folder, the comparison of policies, the table, the picture."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import tyro
from rich.console import Console

import mpjax
from mpjax.measure.audit import audit
from mpjax.measure.memory import step_memory
from mpjax.measure.plots import training_curves
from mpjax.measure.table import policy_table, to_markdown
from mpjax.train.job import Job
from mpjax.train.loop import FitResult
from mpjax.train.writers import JsonlWriter, ProgressBar, TensorBoardWriter

C = TypeVar("C")


def parse(config: type[C], note: str | None, args: list[str] | None = None) -> C:
    """The frozen config of an experiment from the command line: `--name=value`, and `--help` shows every field."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return tyro.cli(config, description=note, args=args, config=(tyro.conf.FlagConversionOff,))


def open_folder(workdir: str, name: str, config: Any) -> Path:
    """A new run folder, `workdir/name-date-time`, with the resolved config and the environment in it."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    folder = Path(workdir) / f"{name}-{stamp}"
    folder.mkdir(parents=True)
    device = jax.devices()[0]
    environment = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "mpjax": mpjax.__version__,
        "device": f"{device.device_kind} ({device.platform}) x {jax.device_count()}",
    }
    text = json.dumps({"config": dataclasses.asdict(config), "environment": environment}, indent=2, default=str)
    (folder / "config.json").write_text(text + "\n")
    return folder


@dataclasses.dataclass(frozen=True)
class Trained:
    """One policy's run: its row of the table, and what the loop gave."""

    row: dict[str, Any]
    result: FitResult


def compare(
    policies: Mapping[str, mpjax.PolicyMap],
    make_job: Callable[[mpjax.PolicyMap], Job],
    folder: Path,
    *,
    attempts: int,
    eval_every: int,
    seeds: mpjax.Seeds,
    step_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train the same job under each policy, on the same seeds and data order, and show what differs.

    Writes `POLICY/metrics.jsonl` and TensorBoard events for each, `table.json`, `table.md` and `curves.png`. The first
    policy is the reference: deviations are from its loss curve.

    Returns:
      The rows of the table, one a policy.
    """
    runs: dict[str, Trained] = {}
    for name, policy in policies.items():
        runs[name] = train(
            name, make_job(policy), folder / name, attempts, eval_every, seeds, step_options or {}, progress
        )
    reference = _losses(next(iter(runs.values())).result)
    rows = []
    for name, run in runs.items():
        losses = _losses(run.result)
        shared = min(len(losses), len(reference))
        deviation = float(np.abs(losses[:shared] - reference[:shared]).max())
        rows.append({"policy": name, **run.row, "largest deviation of loss": deviation})
    Console().print(policy_table(rows, title=f"{folder.name}: {attempts} steps each"))
    (folder / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    (folder / "table.md").write_text(to_markdown(rows) + "\n")
    training_curves({name: _curves(run.result) for name, run in runs.items()}, folder / "curves.png")
    Console().print(f"written to {folder}: config.json, table.md, curves.png, and metrics.jsonl with events per policy")
    return rows


def train(
    name: str,
    job: Job,
    folder: Path,
    attempts: int,
    eval_every: int,
    seeds: mpjax.Seeds,
    step_options: Mapping[str, Any],
    progress: bool,
) -> Trained:
    """One policy: compile, audit, train, evaluate."""
    assert job.eval_fn is not None, "an experiment measures its model on held-out data"
    state = job.state(seeds.init)
    step = job.step(**step_options)
    batch = job.batches(0)
    memory = step_memory(step.lower(state, batch).compile())
    shares = audit(step.pure, state, batch).flops_by_dtype()
    hooks = [JsonlWriter(folder / "metrics.jsonl"), TensorBoardWriter(folder)]
    if progress:
        hooks.append(ProgressBar(attempts, name))
    result = mpjax.fit(
        step, state, job.batches, attempts=attempts, eval_step=mpjax.make_eval_step(job.eval_fn),
        eval_batches=job.eval_batches, eval_every=eval_every, cast=job.model.cast_params, best="accuracy", hooks=hooks,
    )  # fmt: skip
    total = sum(shares.values())
    row = {
        "test accuracy": result.evaluations[-1]["accuracy"],
        "final loss": result.history[-1]["loss"],
        "skipped": int(result.state.skipped),
        "final scale": float(np.asarray(result.state.loss_scale.loss_scale)),
        "steps/s": result.steps_per_second,
        "temp memory": memory["temp"],
        "matrix FLOPs": {dtype: flops / total for dtype, flops in shares.items()},
    }
    return Trained(row, result)


def _curves(result: FitResult) -> dict[str, list[float]]:
    steps, evaluations = result.history, result.evaluations
    curves = {key: [m[key] for m in steps] for key in ("attempt", "loss", "loss_scale", "skipped")}
    return curves | {
        "eval_attempt": [e["attempt"] for e in evaluations],
        "accuracy": [e["accuracy"] for e in evaluations],
    }


def _losses(result: FitResult) -> np.ndarray:
    return np.array([metrics["loss"] for metrics in result.history])
