"""What experiments share: the command line, the run folder, the comparison of policies, the table, the picture."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import jax
import numpy as np
import tyro
from rich.console import Console

import mpjax
from experiments import _data
from mpjax.measure.audit import audit
from mpjax.measure.memory import step_memory
from mpjax.measure.plots import training_curves
from mpjax.measure.table import policy_table, to_markdown
from mpjax.train.hooks import FitResult
from mpjax.train.job import Job
from mpjax.train.writers import JsonlWriter, ProgressBar, TensorBoardWriter

C = TypeVar("C")

Policies: TypeAlias = Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--policy",))]
"""The type of a config's `policies`: `--policies float32 mixed_bfloat16`, or `--policy float32` for one."""

Rules: TypeAlias = Annotated[
    tuple[tuple[str, str], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATTERN POLICY")
]
"""The type of a config's `rules`, a policy map: `--rules head compute=float32 --rules '**/attention' compute=float16`."""


class Refused(ValueError):
    """Settings that make no sense; told on stderr without a traceback."""


def parse(config: type[C], note: str | None, args: list[str] | None = None, prog: str | None = None) -> C:
    """The frozen config of an experiment from the command line: `--name=value`, and `--help` shows every field."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return tyro.cli(config, description=note, args=args, prog=prog, config=(tyro.conf.FlagConversionOff,))


def start(
    config: type[C],
    main: Callable[[C], Any],
    note: str | None,
    args: list[str] | None = None,
    prog: str | None = None,
) -> int:
    """Run an experiment from the command line, however it was started.

    Returns:
      The exit code: 0 done, 1 its data is missing or corrupt, 2 not understood, 130 ended by Ctrl-C.
    """
    try:
        main(parse(config, note, args, prog))
    except KeyboardInterrupt:
        return 130
    except (Refused, _data.MissingDataError, _data.CorruptDataError) as error:
        print(f"{prog or sys.argv[0]}: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1
    return 0


def policy_maps(
    policies: tuple[str, ...], rules: tuple[tuple[str, str], ...] = (), **named: Mapping[Any, Any]
) -> dict[str, mpjax.PolicyMap]:
    """The policies that the command line names, in its order, and the map of its `--rules` as one more, "rules".

    Args:
      policies: policy strings, or names of `named`.
      rules: pairs of pattern and policy; the first that matches wins, and what none names is mixed_bfloat16.
      named: the experiment's own maps.

    Raises:
      Refused: one does not parse, or there is none at all.
    """
    try:
        maps = {name: mpjax.PolicyMap.of(named.get(name, name)) for name in policies}
        if rules:
            maps["rules"] = mpjax.PolicyMap(dict(rules))
    except ValueError as error:
        raise Refused(str(error)) from error
    if len(maps) != len(policies) + bool(rules) or not maps or len(dict(rules)) != len(rules):
        raise Refused(f"got the policies {policies} and the rules {rules}; legal is at least one, and each once")
    return maps


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
    best: str = "accuracy",
    progress: bool = True,
    devices: int = 1,
    probe_every: int = 0,
) -> list[dict[str, Any]]:
    """Train the same job under each policy, on the same seeds and data order, and show what differs.

    Writes `POLICY/metrics.jsonl` and TensorBoard events for each, `table.json`, `table.md` and `curves.png`. The first
    policy is the reference: deviations are from its loss curve.

    Args:
      best: the metric of the evaluation that the table and the picture show: `"accuracy"` is to grow,
        `"-bits_per_byte"` to shrink.
      probe_every: attempts between probes, each a line in `POLICY/probe.jsonl`; 0 for none.
      devices: how many share the rows of each batch; 0 for all there are.

    Returns:
      The rows of the table, one a policy.

    Raises:
      Refused: a rule of the command line that can never act on this model; before anything is trained.
      KeyboardInterrupt: Ctrl-C, once what was measured until then is written.
    """
    if "rules" in policies:
        try:
            jax.eval_shape(make_job(policies["rules"]).state, seeds.init)
        except ValueError as error:
            raise Refused(str(error)) from error
    mesh = data_parallel(devices)
    runs: dict[str, Trained] = {}
    interrupted = None
    for name, policy in policies.items():
        try:
            run = train(
                name,
                make_job(policy),
                folder / name,
                attempts,
                eval_every,
                seeds,
                step_options or {},
                best,
                progress,
                mesh,
                probe_every,
            )
        except KeyboardInterrupt:  # while it was compiled, or its row was made
            interrupted = f"{name}, outside its steps"
            break
        if run.result.stopped == "interrupted":
            done = len(run.result.history)
            interrupted = f"{name}, after {done} of {attempts} steps"
            runs[f"{name} ({done} steps)"] = run
            break
        runs[name] = run
    rows = report(runs, folder, attempts, best) if runs else []
    files = "config.json, table.md, curves.png, and metrics.jsonl with events per policy" if runs else "config.json"
    Console(soft_wrap=True).print(f"written to {folder}: {files}", highlight=False)
    if interrupted is not None:
        print(f"interrupted during {interrupted}; what was measured until then is in {folder}")
        raise KeyboardInterrupt
    return rows


def report(runs: Mapping[str, Trained], folder: Path, attempts: int, best: str) -> list[dict[str, Any]]:
    """Print the table and write it, and the picture, into the run folder; returns the table's rows."""
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
    curves = {name: _curves(run.result, best) for name, run in runs.items()}
    training_curves(curves, folder / "curves.png", metric=_words(best))
    return rows


def train(
    name: str,
    job: Job,
    folder: Path,
    attempts: int,
    eval_every: int,
    seeds: mpjax.Seeds,
    step_options: Mapping[str, Any],
    best: str,
    progress: bool,
    mesh: jax.sharding.Mesh | None = None,
    probe_every: int = 0,
) -> Trained:
    """One policy: compile, audit, train, evaluate.

    Raises:
      KeyboardInterrupt: Ctrl-C before the first step; later ones end the run, and it is returned.
    """
    state = job.state(seeds.init)
    if mesh is not None:
        state, job = mpjax.shard_state(state, mesh), on_mesh(job, mesh)
    assert job.eval_fn is not None, "an experiment measures its model on held-out data"
    step = job.step(**step_options)
    batch = job.batches(0)
    memory = step_memory(step.lower(state, batch).compile())
    shares = audit(step.pure, state, batch).flops_by_dtype()
    hooks = [JsonlWriter(folder / "metrics.jsonl"), TensorBoardWriter(folder), mpjax.CulpritHook()]
    if probe_every:
        hooks.append(mpjax.ProbeLog(folder / "probe.jsonl"))
    if progress:
        hooks.append(ProgressBar(attempts, name))
    stepping = mpjax.probe(step, probe_every) if probe_every else step
    result = mpjax.fit(
        stepping, state, job.batches, attempts=attempts, eval_step=mpjax.make_eval_step(job.eval_fn),
        eval_batches=job.eval_batches, eval_every=eval_every, cast=job.model.cast_params, best=best, hooks=hooks,
    )  # fmt: skip
    if not result.history:
        raise KeyboardInterrupt
    total = sum(shares.values())
    row = {
        f"test {_words(best)}": result.evaluations[-1][best.removeprefix("-")] if result.evaluations else None,
        "final loss": result.history[-1]["loss"],
        "skipped": int(result.state.skipped),
        "final scale": float(np.asarray(result.state.loss_scale.loss_scale)),
        "steps/s": result.steps_per_second,
        "temp memory": memory["temp"],
        "matrix FLOPs": {dtype: flops / total for dtype, flops in shares.items()},
    }
    return Trained(row, result)


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


def on_mesh(job: Job, mesh: jax.sharding.Mesh) -> Job:
    """The same job, the rows of its batches shared among the devices; held-out batches, which may not divide, on each."""
    return dataclasses.replace(job, batches=lambda attempt: mpjax.shard_batch(job.batches(attempt), mesh))


def _words(best: str) -> str:
    """A metric as the table and the picture name it."""
    return best.removeprefix("-").replace("_", " ")


def _curves(result: FitResult, best: str) -> dict[str, list[float]]:
    steps, evaluations = result.history, result.evaluations
    curves = {key: [m[key] for m in steps] for key in ("attempt", "loss", "loss_scale", "skipped")}
    return curves | {
        "eval_attempt": [e["attempt"] for e in evaluations],
        _words(best): [e[best.removeprefix("-")] for e in evaluations],
    }


def _losses(result: FitResult) -> np.ndarray:
    return np.array([metrics["loss"] for metrics in result.history])
