"""`mpjax export CKPT`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mpjax.cli.output import Json, print_json
from mpjax.cli.target import Refused, Settings, load_job

if TYPE_CHECKING:
    from mpjax.train.job import Job


def export(
    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CKPT")],
    to: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FORMAT")] = (),
    step: int | None = None,
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None,
    per: Literal["channel", "tensor"] = "channel",
    raw: bool = False,
    target: str | None = None,
    policy: str | None = None,
    settings: Settings = (),
    forward: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None,
    overwrite: bool = False,
    as_json: Json = False,
) -> int:
    """Write the weights of a checkpoint for serving, as safetensors, and show what that cost each tensor.

    The step is verified first, and nothing but params and mstate is read of it. `mpjax.load_export(FILE)` gives the variables
    back; plain safetensors reads them too.

    Args:
      checkpoint: the directory of a run, or the folder of one step in it.
      to: float32, bfloat16, float16, float8_e4m3 or int8; or GLOB=FORMAT, repeated: --to head=float32 --to "**=int8" (the
        first that names a weight or a module around it holds; what none names keeps float32). Default: bfloat16.
      step: which step; default: the newest that is whole.
      out: the file to write; default: RUN-STEP.safetensors beside the run's directory.
      per: a scale for each output channel, or for each whole tensor (float8, int8).
      raw: the params themselves, where the state has a moving average of them, which is taken otherwise.
      target: an experiment's name, or MODULE:FUNCTION that returns a mpjax.Job: its metrics on held-out data are shown
        before and after.
      policy: the policy to run the target under.
      settings: a setting of the experiment's config, or a keyword of the function.
      forward: also write the target's forward function as StableHLO into this file; mpjax.load_forward runs it.
      overwrite: replace files that exist.
      as_json: print JSON instead.
    """
    import mpjax
    from mpjax.store.export.saved import saved_weights

    if forward is not None and target is None:
        raise Refused(
            "got --forward without --target; a forward function needs the model: legal is both, name the target"
        )
    formats = _formats(to)
    directory, step = _place(Path(checkpoint), step)
    job = None if target is None else load_job(target, policy, settings=settings)
    try:
        params, mstate, info = saved_weights(mpjax.Checkpointer(directory), step, averaged=not raw)
        metric = None if job is None else _metric(job, params, mstate)
        named = directory if directory.name else directory.resolve()
        file = Path(out) if out else named.with_name(f"{named.name}-{info.step}.safetensors")
        report = mpjax.export_weights(
            params, file, formats, mstate=mstate, policy=info.policy, per=per, metric=metric, overwrite=overwrite
        )
        if job is not None and forward is not None:
            served = mpjax.load_export(file, like=_like(job))
            mpjax.export_forward(
                job.model, served.params, served.mstate, *job.sample, path=forward, overwrite=overwrite
            )
    except (ValueError, OSError) as error:  # a damaged checkpoint and a full disk among them
        raise Refused(str(error), 1) from error
    if as_json:
        print_json({"checkpoint": str(directory), "step": info.step, "policy": info.policy, **report.as_dict()})
        return 0
    print(f"{report}\nstep {info.step} of {directory} is in {report.file}")
    return 0


def _place(checkpoint: Path, step: int | None) -> tuple[Path, int | None]:
    """(the run's directory, the step), where the folder of a step may be given too."""
    if step is None and checkpoint.name.isdecimal() and (checkpoint / "manifest.json").exists():
        return checkpoint.parent, int(checkpoint.name)
    if not checkpoint.is_dir():
        raise Refused(
            f"got {checkpoint}, where no folder is; legal is the directory that a Checkpointer wrote; mend the path"
        )
    return checkpoint, step


def _formats(to: tuple[str, ...]) -> str | dict[str, str]:
    if not to:
        return "bfloat16"
    if len(to) == 1 and "=" not in to[0]:
        return to[0]
    rules = [rule.rpartition("=") for rule in to]
    wrong = [rule for rule, (glob, _, _) in zip(to, rules, strict=True) if not glob]
    if wrong:
        raise Refused(
            f'got --to {wrong[0]} among others; legal is one FORMAT, or GLOB=FORMAT for each: "**={wrong[0]}"'
        )
    return {glob: form for glob, _, form in rules}


def _like(job: Job) -> Any:
    import jax

    return jax.eval_shape(job.model.init, jax.random.key(0), *job.sample)


def _metric(job: Job, params: Any, mstate: Any) -> Callable[[Any], dict[str, float]] | None:
    """What the job measures on its held-out batches, as a function of params like the checkpoint's."""
    import jax

    import mpjax
    from mpjax.store.trees import by_path, named_leaves, put_into
    from mpjax.train.state import TrainState

    if job.eval_fn is None or not job.eval_batches:
        return None
    like = dict(zip(("params", "mstate"), _like(job), strict=True))
    eval_step = mpjax.make_eval_step(job.eval_fn)

    def metric(weights: Any) -> dict[str, float]:
        found = by_path(named_leaves({"params": weights, "mstate": mstate}))
        mend = "give the target, settings and policy with which it was trained"
        whole, _ = put_into(like, found, "the checkpoint", mend)
        state = TrainState(0, 0, 0, **whole, opt_state=(), loss_scale=(), rng=jax.random.key(0))
        return mpjax.evaluate(eval_step, state, job.eval_batches)

    return metric
