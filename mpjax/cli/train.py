"""`mpjax train NAME`."""

from __future__ import annotations

from typing import Annotated

import tyro

from mpjax.cli.target import load_experiment


def train(
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")],
    flags: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[--FLAG=VALUE ...]")] = (),
) -> int:
    """Run an experiment of a checkout, with all its flags: the same as `python -m experiments.NAME`.

    `mpjax train NAME --help` lists its flags. Most have: --policy P, one policy only (--policies P Q for several);
    --rules PATTERN POLICY, repeated, a policy map of your own, trained as one more policy; --workdir FOLDER, the run's own
    folder. SIGTERM and Ctrl-C let a step in training finish, save it, write what was measured so far, and end with 0; a second
    one leaves at once. The same command with --workdir goes on where the run was; --no-resume refuses to.

    Args:
      name: the experiment's, e.g. vision_digits; a name that is none is answered with all that there are.
      flags: the experiment's own.
    """
    runner, experiment = load_experiment(name)
    code: int = runner.start(
        experiment.Config, experiment.main, experiment.__doc__, list(flags), prog=f"mpjax train {name}"
    )
    return code
