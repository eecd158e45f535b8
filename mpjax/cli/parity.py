"""`mpjax parity TARGET`."""

from __future__ import annotations

from typing import Annotated

import tyro

from mpjax.cli.output import Json, print_json
from mpjax.cli.target import Refused, Settings, Target, job_factory, training


def parity(
    target: Target,
    policy: Annotated[str, tyro.conf.arg(metavar="POLICY")],
    margin: float,
    reference: str = "float32",
    seeds: int = 5,
    first_seed: int = 0,
    steps: int | None = None,
    metric: str | None = None,
    alpha: float = 0.05,
    settings: Settings = (),
    plot: Annotated[str | None, tyro.conf.arg(metavar="FILE.png")] = None,
    as_json: Json = False,
) -> int:
    """Train a job in float32 and under a policy on paired seeds, and test whether both end alike within a margin.

    Exit code 0: equivalent. 1: different, or undecided, and then it says how many seeds would do. 2: not understood.

    Args:
      target: an experiment's name, or MODULE:FUNCTION that takes policy= and seed= and returns a mpjax.Job.
      policy: the candidate: a preset, key=dtype pairs, or by_path for an experiment's own map.
      margin: the largest difference in the metric that would not matter, in its units (0.01 of accuracy is 1 point).
      reference: the policy to be like.
      seeds: how many pairs. Choose their number and the margin before you look.
      first_seed: of the first pair; those of the others follow it.
      steps: steps of each run; for an experiment its schedule becomes as long (default: its own). A function must be
        told here how long its job's schedule is.
      metric: of the job's eval_fn: accuracy is to grow; one to shrink is written with a dash, --metric=-loss. Default:
        accuracy where there is one, else -loss.
      alpha: of each of the two one-sided tests.
      settings: a field of the experiment's config, or a keyword of the function; repeat it.
      plot: write curves with bands and the differences as a picture here.
      as_json: print JSON instead.
    """
    import dataclasses
    import logging

    import mpjax
    from mpjax.measure.paired import NoComparisonError

    if steps is not None and ":" not in target:
        settings = (*settings, f"steps={steps}")
    make_job = job_factory(target, settings)
    trained = training(target, settings, (reference, policy))
    attempts = trained.steps if steps is None else steps
    if attempts is None:
        raise Refused(f"{target} does not say for how many steps its job trains; give --steps")
    if seeds < 1:
        raise Refused(f"got --seeds {seeds}; legal is at least 1; 5 is a beginning")
    numbers = range(first_seed, first_seed + seeds)
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # on stderr, a line a run
    try:
        found = mpjax.parity(
            make_job, trained.policies[1], reference=trained.policies[0], margin=margin, attempts=attempts, seeds=numbers,
            metric=metric, alpha=alpha, step_options=trained.step_options,
        )  # fmt: skip
    except mpjax.NonFiniteError as error:
        raise Refused(str(error), 1) from error
    except NoComparisonError as error:
        raise Refused(str(error)) from error
    found = dataclasses.replace(found, reference=reference, candidate=policy)
    if as_json:
        print_json(found.as_dict())
    else:
        print(found)
    if plot is not None:  # last: whatever is wrong with the file, hours of training have been told
        from mpjax.measure.plots import parity_curves

        try:
            parity_curves(found, plot)
        except (ImportError, OSError) as error:  # there is no matplotlib, or no place to write to
            raise Refused(
                f"got --plot {plot}, and it was not drawn: {error}; name a file where one can be made", 1
            ) from error
    return 0 if found.verdict == "equivalent" else 1
