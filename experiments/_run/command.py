"""The command line of an experiment."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeAlias, TypeVar

import tyro

import mpjax
from experiments import _data

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
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mpjax").setLevel(logging.INFO)  # of the libraries only warnings: Orbax tells thirty lines a save
    given = ["--resume=False" if arg == "--no-resume" else arg for arg in (sys.argv[1:] if args is None else args)]
    return tyro.cli(config, description=note, args=given, prog=prog, config=(tyro.conf.FlagConversionOff,))


def start(
    config: type[C],
    main: Callable[[C], Any],
    note: str | None,
    args: list[str] | None = None,
    prog: str | None = None,
) -> int:
    """Run an experiment from the command line, however it was started.

    Returns:
      The exit code: 0 done, or stopped in training by SIGTERM or Ctrl-C; 1 its data is missing or corrupt; 2 not
      understood; 130 ended by Ctrl-C outside of training.
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
