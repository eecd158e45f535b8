"""The command line of an experiment."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
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


FROM_ZERO = ("seed", "devices", "eval_every", "probe_every", "checkpoint_every", "shift", "masked", "stages")
"""The whole numbers among settings that may be 0; all others count what there must be one of."""


class Refused(ValueError):
    """Settings that make no sense; told on stderr without a traceback."""


class Lost(RuntimeError):
    """Policies that could not be trained to the end; told likewise, once the others are done."""


def parse(config: type[C], note: str | None, args: list[str] | None = None, prog: str | None = None) -> C:
    """The frozen config of an experiment from the command line: `--name=value`, and `--help` shows every field.

    Where the experiment has `PRESETS`, fields by name that belong together, `--preset=NAME` begins with those; what else is
    given changes them.

    Raises:
      Refused: a preset that it has not, a count below one, a negative number, or rows that micro-batches do not divide.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mpjax").setLevel(logging.INFO)  # of the libraries only warnings: Orbax tells thirty lines a save
    given = ["--resume=False" if arg == "--no-resume" else arg for arg in (sys.argv[1:] if args is None else args)]
    default, given = preset(config, given)
    if presets := _presets(config):
        note = f"{note or ''}\n{_told(presets)}"
    found = tyro.cli(
        config, description=note, args=given, default=default, prog=prog, config=(tyro.conf.FlagConversionOff,)
    )  # fmt: skip
    for name, value in vars(found).items():
        least = int(name not in FROM_ZERO)
        if type(value) is int and value < least:  # a bool is an int, too
            raise Refused(f"got --{name.replace('_', '-')}={value}; legal is {least} or more")
    rows, parts = getattr(found, "batch_size", 1), getattr(found, "accumulate", 1)
    if rows % parts:
        raise Refused(f"got --batch-size={rows} and --accumulate={parts}; legal is a number that divides the rows")
    return found


def preset(config: type[C], args: Sequence[str]) -> tuple[C, list[str]]:
    """What the last `--preset=NAME` (or `--preset NAME`) means, the config's own defaults without one, and the other arguments.

    Raises:
      Refused: a preset that the experiment has not.
    """
    name, rest, words, presets = None, [], iter(args), _presets(config)
    for word in words:
        key, equals, value = word.partition("=")
        if key == "--preset":
            name = value if equals else next(words, "")
        else:
            rest.append(word)
    if name is not None and name not in presets:
        raise Refused(f"got --preset={name}; legal are {', '.join(presets) or 'none: this experiment has no presets'}")
    return config(**presets.get(name or "", {})), rest


def _presets(config: type) -> Mapping[str, Mapping[str, Any]]:
    return getattr(sys.modules[config.__module__], "PRESETS", {})


def _told(presets: Mapping[str, Mapping[str, Any]]) -> str:
    """The presets as `--help` shows them."""
    lines = ["Presets    --preset=NAME"]
    for name, fields in presets.items():
        shown = " ".join(f"--{key.replace('_', '-')}={value}" for key, value in fields.items())
        lines.append(f"           {name}: {shown or 'the defaults below'}")
    return "\n".join(lines)


def start(
    config: type[C],
    main: Callable[[C], Any],
    note: str | None,
    args: list[str] | None = None,
    prog: str | None = None,
) -> int:
    """Run an experiment from the command line, however it was started.

    Returns:
      The exit code: 0 done, or stopped in training by SIGTERM or Ctrl-C; 1 its data is missing or corrupt, or a policy
      could not be trained; 2 not understood; 130 ended by Ctrl-C outside of training.
    """
    try:
        main(parse(config, note, args, prog))
    except KeyboardInterrupt:
        return 130
    except (Refused, Lost, _data.MissingDataError, _data.CorruptDataError) as error:
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
