"""`mpjax probe TARGET`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mpjax.cli.output import Json, print_json
from mpjax.cli.target import Refused, Settings, Target, load_job, training

if TYPE_CHECKING:
    from mpjax.measure.timing import Timing


def probe(
    target: Target,
    policy: str | None = None,
    steps: int = 20,
    every: int = 10,
    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    settings: Settings = (),
    out: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None,
    timed: Annotated[bool, tyro.conf.arg(name="time")] = False,
    as_json: Json = False,
) -> int:
    """Train a job for some steps and show how large the values of each module are, and what each format would lose of them.

    Exit code 0: done; 1: the run stopped because too many steps in a row were not finite, and the culprit is named. Under
    each format: the share of values that overflows, and that is flushed to zero; behind an arrow, where it differs, of the
    scaled values (a gradient's by the loss scale, others by the largest power of two that overflows nothing).

    Args:
      target: an experiment's name, or MODULE:FUNCTION that returns a mpjax.Job.
      policy: the policy to run it under; without it the target's own.
      steps: how many steps to train.
      every: steps between two probes; the last one is shown.
      only: a glob over module paths; repeat it. Default: all.
      settings: a setting of the experiment's config, or a keyword of the function.
      out: write every probe (probe.jsonl) and a picture of the last (exponents.png) into this folder.
      timed: also measure what a probed step takes beside a plain one, on this device.
      as_json: print the last probe as JSON instead.
    """
    import jax

    import mpjax
    from mpjax.measure.probe import NothingToProbeError

    if steps < 1 or every < 1:
        raise Refused(f"got --steps {steps} --every {every}; legal is at least 1 of both")
    job = load_job(target, policy, settings=settings)
    options = training(target, settings, ()).step_options
    folder = None if out is None else Path(out)
    if folder is not None:  # before it is trained for
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(f"got --out {out}: {error}; legal is a folder, or where one can be made", 1) from error
    log, culprit = mpjax.ProbeLog(folder and folder / "probe.jsonl"), mpjax.CulpritHook()
    step = mpjax.probe(job.step(**options), every, only=only)
    cost = None
    try:
        result = mpjax.fit(step, job.state(jax.random.key(0)), job.batches, attempts=steps, hooks=[log, culprit])
    except mpjax.NonFiniteError as error:
        raise Refused(str(error), 1) from error
    except NothingToProbeError as error:
        raise Refused(str(error)) from error
    report = log.reports[-1]
    if timed:
        batch = jax.device_put(job.batches(0))
        cost = {name: _milliseconds(mpjax.time_step(variant, result.state, batch))
                for name, variant in (("plain", step.step), ("probed", step.probing))}  # fmt: skip
    if as_json:
        print_json(json.loads(report.to_json()) | ({} if cost is None else {"milliseconds": cost}))
    else:
        print(
            f"{target} under {policy or 'its own policy'}, attempt {report.attempt}, loss scale {report.loss_scale:g}\n\n{report}"
        )
        if cost is not None:
            plain, probed = cost["plain"][1], cost["probed"][1]
            for name, (low, middle, high) in cost.items():
                print(f"a {name} step takes {middle:.4g} ms (half of the blocks lie between {low:.4g} and {high:.4g})")
            share = (probed - plain) / plain
            print(f"one probe in N steps adds {share:.3g} / N to the time of a run: {share / 100:.2%} for N = 100")
    if folder is not None:
        from mpjax.measure.plots import exponent_ranges

        try:
            exponent_ranges(report.histograms(), folder / "exponents.png", loss_scale=report.loss_scale)
        except (ImportError, OSError) as error:  # there is no matplotlib, or no place to write to
            raise Refused(
                f"got --out {out}, and the picture was not drawn: {error}; `mpjax plot {out}` draws it later", 1
            ) from error
    return 0


def _milliseconds(timing: Timing) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, high = timing.quartiles
    return 1e3 * low, 1e3 * timing.median, 1e3 * high
