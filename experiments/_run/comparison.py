"""The comparison of policies: each trained from the same seeds on the same data, then one table and one picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import mpjax
from experiments import _data
from experiments._run.command import Lost, Refused
from experiments._run.folder import RunFolder, write_json
from experiments._run.training import Plan, Trained, data_parallel, stored_steps, train
from mpjax.measure.plots import training_curves
from mpjax.measure.table import policy_table, to_markdown


def compare(
    policies: Mapping[str, mpjax.PolicyMap],
    make_job: Callable[[mpjax.PolicyMap], mpjax.Job],
    folder: RunFolder,
    plan: Plan,
) -> list[dict[str, Any]]:
    """Train the same job under each policy, on the same seeds and data order, and show what differs.

    Writes for each what `train` does, and `table.json`, `table.md` and `curves.png`. The first policy is the reference:
    deviations are from its loss curve. SIGTERM and Ctrl-C end the policy in training after its step, and the comparison
    with it; what was measured until then is written, and the same command with `--workdir` goes on.

    Returns:
      The rows of the table, one a policy; after a signal, of those that were begun.

    Raises:
      Refused: a rule of the command line that can never act on this model, or settings that make no sense; before
        anything is trained or written.
      KeyboardInterrupt: Ctrl-C outside of training, once what was measured until then is written.
      Lost: a policy whose steps were skipped too often. The others were trained all the same, and all is written.
    """
    mesh, _ = data_parallel(plan.devices), plan.saved_every
    asked = [name for name in (next(iter(policies)), "rules") if name in policies]
    made = {name: _sensible(make_job, policies[name], plan, mesh) for name in asked}
    with folder.begin() as path:
        runs: dict[str, Trained] = {}
        stopped, outside, lost = None, False, []
        for name, policy in policies.items():
            try:
                job = made.pop(name) if name in made else make_job(policy)
                run = train(name, job, path / name, plan, mesh)
            except mpjax.NonFiniteError as error:  # that it cannot train is a result: the others are not lost for it
                lost.append(f"{name}: {error}")
                run = stored_steps(path / name)
                runs[f"{name} (not finite, {len(run.result.history)} steps)"] = run
                continue
            except KeyboardInterrupt:  # while it was compiled, or its row was made
                stopped, outside = f"{name}, outside its steps", True
                break
            done = len(run.result.history)
            if run.is_whole(plan.attempts):
                runs[name] = run
            elif done:
                runs[f"{name} ({done} steps)"] = run
            if run.result.stopped == "interrupted":
                stopped = f"{name}, after {done} of {plan.attempts} steps"
                break
        rows = report(runs, path, plan) if runs else []
        files = "config.json, table.md, curves.png, and for each policy metrics.jsonl with events and checkpoints"
        Console(soft_wrap=True).print(f"written to {path}: {files if runs else 'config.json'}", highlight=False)
    if stopped is not None:
        print(f"interrupted during {stopped}; go on with the same command and --workdir {path}")
    if outside:
        raise KeyboardInterrupt
    if lost:
        raise Lost("\n".join(lost))
    return rows


def _sensible(
    make_job: Callable[[mpjax.PolicyMap], mpjax.Job],
    policy: mpjax.PolicyMap,
    plan: Plan,
    mesh: jax.sharding.Mesh | None,
) -> mpjax.Job:
    """The job under a policy, once it is known that state, step and batches can be made of the settings; nothing is trained.

    Raises:
      Refused: they cannot, in the words of what refused them.
    """
    try:
        job = make_job(policy)
        jax.eval_shape(job.state, plan.seeds.init)
        job.step(**plan.step_options)
        if mesh is not None:
            mpjax.shard_batch(job.batches(0), mesh)
    except _data.CorruptDataError:
        raise
    except ValueError as error:
        raise Refused(str(error)) from error
    return job


def report(runs: Mapping[str, Trained], folder: Path, plan: Plan) -> list[dict[str, Any]]:
    """Print the table and write it, and the picture, into the run's folder; returns the table's rows."""
    losses = {name: {row["attempt"]: row["loss"] for row in run.result.history} for name, run in runs.items()}
    reference = next(iter(losses.values()))
    rows = []
    for name, run in runs.items():
        apart = np.array([abs(loss - reference[n]) for n, loss in losses[name].items() if n in reference])
        rows.append({
            "policy": name, **run.row, "largest deviation of loss": float(apart.max()) if apart.size else None
        })  # fmt: skip
    Console().print(policy_table(rows, title=f"{folder.name}: {plan.attempts} steps each"))
    write_json(folder / "table.json", rows)
    (folder / "table.md").write_text(to_markdown(rows) + "\n")
    training_curves(
        {name: _curves(run.result, plan) for name, run in runs.items()}, folder / "curves.png", metric=plan.words
    )
    return rows


def _curves(result: mpjax.FitResult, plan: Plan) -> dict[str, list[float]]:
    steps, evaluations = result.history, result.evaluations
    curves = {key: [m[key] for m in steps] for key in ("attempt", "loss", "loss_scale", "skipped")}
    return curves | {
        "eval_attempt": [e["attempt"] for e in evaluations],
        plan.words: [e[plan.metric] for e in evaluations],
    }
