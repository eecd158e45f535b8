"""TARGET on the command line: an experiment's name, or a `module:function` that returns a `mpjax.Job`."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeAlias

import tyro

import mpjax

if TYPE_CHECKING:
    from mpjax.policy.rules import PolicyMap
    from mpjax.train.job import Job

Target: TypeAlias = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TARGET")]
"""The type of a command's `target`."""

Settings: TypeAlias = Annotated[
    tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="set", metavar="NAME=VALUE")
]
"""The type of a command's `settings`: `--set width=32 --set depth=2`."""

JobFactory: TypeAlias = "Callable[[str | PolicyMap | None, int | None], Job]"
"""From a policy and a seed (None: the target's own) to a job."""


class Refused(ValueError):
    """A command that cannot be carried out: told on stderr in one line, without a traceback.

    Args:
      message: what came, what is legal, what to do.
      code: the exit code: 2 not understood, 1 failed.
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def job_factory(target: str, settings: Sequence[str] = ()) -> JobFactory:
    """What makes the jobs that TARGET means.

    Args:
      target: the name of an experiment of a checkout (`vision_digits`), or `package.module:function` for a function that
        returns a `Job`. It is called with `policy=` and `seed=` as far as it takes them and they are given, and with the
        settings.
      settings: `name=value`, fields of the experiment's config or keywords of the function.

    Raises:
      Refused: it means nothing, or a setting is none of its own.
    """
    for setting in settings:
        if "=" not in setting:
            raise Refused(f"got the setting {setting!r}; legal is NAME=VALUE: --set width=32")
    return _of_function(target, settings) if ":" in target else _of_experiment(target, settings)


def load_job(target: str, policy: str | None = None, seed: int | None = None, settings: Sequence[str] = ()) -> Job:
    """The one job that TARGET means, see `job_factory`."""
    return job_factory(target, settings)(policy, seed)


def _of_function(target: str, settings: Sequence[str]) -> JobFactory:
    from mpjax.train.job import Job

    module, _, name = target.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module of the folder one stands in, as with `python -m`
    try:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        parameters = inspect.signature(function).parameters
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise Refused(f"got {target!r}: {error}; legal is MODULE:FUNCTION that python can import and call") from error
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())

    def make(policy: str | PolicyMap | None, seed: int | None) -> Job:
        given: dict[str, Any] = {k: v for k, v in (("policy", policy), ("seed", seed)) if v is not None}
        given |= dict(setting.split("=", 1) for setting in settings)
        unknown = [] if takes_any else sorted(given.keys() - parameters.keys())
        if unknown:
            raise Refused(
                f"{target} does not take {', '.join(unknown)}; it takes {', '.join(parameters) or 'nothing'}: give it "
                "such a parameter, or leave the option out"
            )
        job = function(**given)
        if not isinstance(job, Job):
            raise Refused(f"{target} returned {type(job).__name__}; legal is a mpjax.Job: return one")
        return job

    return make


def _of_experiment(name: str, settings: Sequence[str]) -> JobFactory:
    runner, experiment = load_experiment(name)
    base = _config(name, runner, experiment, settings)

    def make(policy: str | PolicyMap | None, seed: int | None) -> Job:
        import dataclasses

        config = base if seed is None else dataclasses.replace(base, seed=seed)
        try:
            rules = _policy_map(runner, experiment, "mixed_bfloat16" if policy is None else policy)
            job: Job = experiment.make_job(config, rules)
        except (runner.Refused, runner._data.MissingDataError, runner._data.CorruptDataError) as error:
            raise Refused(str(error), 2 if isinstance(error, runner.Refused) else 1) from error
        return job

    return make


class Training(NamedTuple):
    """How a target is trained, beside its job: see `training`."""

    steps: int | None
    """How many steps its schedule has; None: it does not say."""
    step_options: dict[str, Any]
    """For `make_train_step`."""
    policies: list[Any]
    """Those that were asked for, as a job factory and `mpjax.parity` take them."""


def training(target: str, settings: Sequence[str], policies: Sequence[str]) -> Training:
    """What an experiment's own `main` would train with; for a function nothing is known but what was asked for.

    Raises:
      Refused: a setting is none of the experiment's own, or a policy does not parse.
    """
    if ":" in target:
        return Training(None, {}, list(policies))
    runner, experiment = load_experiment(target)
    config = _config(target, runner, experiment, settings)
    try:
        maps = [_policy_map(runner, experiment, policy) for policy in policies]
    except runner.Refused as error:
        raise Refused(str(error)) from error
    return Training(config.steps, experiment.step_options(config), maps)


def _config(name: str, runner: Any, experiment: Any, settings: Sequence[str]) -> Any:
    if not hasattr(experiment, "make_job"):
        raise Refused(f"the experiment {name} has no job of its own to look at; others have: {experiment_names()}")
    try:
        default, given = runner.preset(experiment.Config, [f"--{s}" for s in settings])
        return tyro.cli(
            experiment.Config, args=given, default=default, prog=f"mpjax ... {name} --set",
            config=(tyro.conf.FlagConversionOff,),
        )  # fmt: skip
    except runner.Refused as error:
        raise Refused(str(error)) from error
    except SystemExit as stopped:
        raise Refused("a --set names no setting of the experiment, see above") from stopped


def _policy_map(runner: Any, experiment: Any, policy: str | PolicyMap) -> PolicyMap:
    """Text, a name of the experiment's own map included, as a map."""
    named = {"by_path": experiment.BY_PATH} if hasattr(experiment, "BY_PATH") else {}
    (found,) = runner.policy_maps((policy,), **named).values() if isinstance(policy, str) else (policy,)
    return found


def load_experiment(name: str) -> tuple[Any, Any]:
    """(`experiments._run`, the experiment's module).

    Raises:
      Refused: there is no checkout, or no such experiment.
    """
    root = checkout()
    if root is None:
        raise Refused(
            "the experiments are not in the package, and neither here nor beside it is a checkout that has them; get "
            "mpjax's repository (git clone), and run this in its folder"
        )
    if name not in experiment_names():
        raise Refused(f"no experiment is called {name!r}; there are {', '.join(experiment_names())}")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("experiments._run"), importlib.import_module(f"experiments.{name}")


def experiment_names() -> list[str]:
    """The experiments of the checkout."""
    root = checkout()
    return [] if root is None else sorted(path.stem for path in (root / "experiments").glob("[!_]*.py"))


def checkout() -> Path | None:
    """The folder that holds the experiments: that of the source mpjax runs from, else the one that one stands in."""
    for root in (Path(mpjax.__file__).parents[1], Path.cwd()):
        if (root / "experiments" / "_run").is_dir():
            return root
    return None
