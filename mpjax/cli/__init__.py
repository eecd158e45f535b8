"""The command line. Each command imports what it needs when it runs, so that `mpjax --help` never waits for jax."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

import mpjax
from mpjax.cli.doctor import doctor
from mpjax.cli.export import export
from mpjax.cli.inspection import inspect
from mpjax.cli.lint import lint
from mpjax.cli.parity import parity
from mpjax.cli.plot import plot
from mpjax.cli.probe import probe
from mpjax.cli.tables import hardware, policy
from mpjax.cli.target import Refused
from mpjax.cli.train import train

COMMANDS: dict[str, Callable[..., Any]] = {
    "doctor": doctor,
    "hardware": hardware,
    "policy": policy,
    "inspect": inspect,
    "lint": lint,
    "probe": probe,
    "parity": parity,
    "train": train,
    "export": export,
    "plot": plot,
}
"""From the name of a command to the function that runs it and returns its exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 not understood (told on stderr), 130 Ctrl-C.

    >>> main(["--version"]) == main(["policy", "c=bf16"]) == 0  # doctest: +ELLIPSIS
    mpjax 0...
    True
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        print(f"mpjax {mpjax.__version__}")
        return 0
    try:
        if args[:1] == ["train"] and len(args) > 1 and not args[1].startswith("-"):
            return train(args[1], tuple(args[2:]))  # its flags are the experiment's to understand
        code: int = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="mpjax",
            description="Mixed precision for Flax models in JAX. `mpjax --version` tells the version.",
            args=args,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        sys.stdout.flush()
    except Refused as refused:
        print(f"mpjax {args[0]}: {refused}", file=sys.stderr)
        return refused.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 1
    return code


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has left (`mpjax hardware | head -1`); if so, it is silenced from here on."""
    try:
        print(flush=True)  # what failed is not in the buffer any more: only another byte tells
    except BrokenPipeError:
        # Python would flush once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
