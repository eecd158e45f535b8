"""`mpjax lint TARGET`."""

from __future__ import annotations

import dataclasses

from mpjax.cli.output import Json, print_json
from mpjax.cli.target import Settings, Target, load_job, training


def lint(target: Target, policy: str | None = None, settings: Settings = (), as_json: Json = False) -> int:
    """Read a job's train step and say where its precision is not what the policy means; exits with 1 if anything is found.

    Each finding is a line, `path: finding: how to mend`. Nothing is trained, and no accelerator is needed.

    Args:
      target: an experiment's name (vision_digits), or package.module:function for a function that returns a mpjax.Job.
      policy: the policy to train under; without it the target's own.
      settings: a setting of the target: --set width=32. Repeat it.
      as_json: print JSON instead.
    """
    import jax

    from mpjax.measure.audit import audit
    from mpjax.measure.lint import lint as findings_of

    job = load_job(target, policy, settings=settings)
    options = training(target, settings, ()).step_options
    found = findings_of(job, **options)
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in found])
    elif found:
        print(*found, sep="\n")
    else:
        state = jax.eval_shape(job.state, jax.random.key(0))
        print(f"{target}: nothing was found; the step's products, and what else has a dtype:")
        print(audit(job.step(**options).pure, state, job.batches(0)))
    return 1 if found else 0
