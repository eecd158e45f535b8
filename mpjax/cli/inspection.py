"""`mpjax inspect TARGET`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mpjax.cli.output import Json, print_json, show
from mpjax.cli.target import Refused, Settings, Target, load_job, training

if TYPE_CHECKING:
    from mpjax.policy.resolution import Row


def inspect(
    target: Target,
    policy: str | None = None,
    settings: Settings = (),
    timed: Annotated[bool, tyro.conf.arg(name="time")] = False,
    as_json: Json = False,
) -> int:
    """Show what a job is made of: what each module computes in, params, and what one train step takes: its memory by
    role, its FLOPs by dtype, and with --time how long it takes on this device and how well that uses it.

    An experiment's step accumulates and clips as its settings say, a function's job does neither. It is compiled for the
    first batch; only --time runs it.

    Args:
      target: an experiment's name, or MODULE:FUNCTION that returns a mpjax.Job.
      policy: the policy to look at it under; the target's own by default.
      settings: a setting of the experiment's config, or a keyword of the function.
      timed: also run the step, and measure the device's products beside it.
      as_json: print JSON instead.
    """
    import jax

    from mpjax.measure.audit import audit
    from mpjax.measure.memory import memory_by_role
    from mpjax.measure.params import count_params

    job = load_job(target, policy, settings=settings)
    step, batch = job.step(**training(target, settings, ()).step_options), job.batches(0)
    state = job.state(jax.random.key(0))
    try:
        account = memory_by_role(step, state, batch)
    except ValueError as error:
        raise Refused(str(error), code=1) from error
    found = audit(step.pure, state, batch)
    told: dict[str, Any] = {
        "target": target,
        "policy": _policy_text(job.model.policy),
        "device": jax.local_devices()[0].device_kind,
        "modules": None if job.model.table is None else [_plain(row) for row in job.model.table(*job.sample).rows],
        "params": [dataclasses.asdict(part) for part in count_params(state.params)],
        "memory": dataclasses.asdict(account) | {"unexplained": account.unexplained, "peak": account.peak},
        "flops": found.flops_by_dtype(),
        "time": _time(step, state, batch, found) if timed else None,
    }
    if as_json:
        print_json(told)
        return 0
    print(f"{target} under {told['policy'] or 'no policy that is known'}, on {told['device']}\n")
    if job.model.table is None:
        print("No table of modules: the model was made from bare functions, which have no paths.\n")
    else:
        print(f"{job.model.explain(*job.sample)}\n")
    _show(told, account)
    return 0


def _policy_text(policy: Any) -> str | None:
    """The policy of a model in the words of a policy map; None where it has none."""
    if not hasattr(policy, "rules"):
        return None if policy is None else str(policy)
    return ", ".join([str(policy.default), *(f"{rule}: {rule.policy}" for rule in policy.rules)])


def _plain(row: Row) -> dict[str, Any]:
    return dataclasses.asdict(row) | {"param": row.param.name, "compute": row.compute.name}


def _time(step: Any, state: Any, batch: Any, found: Any) -> dict[str, Any]:
    from mpjax.measure.rates import product_rates
    from mpjax.measure.throughput import achieved, formats_of, share_of_rates, time_step

    timing = time_step(step, state, batch)
    measured = product_rates(formats=formats_of(found))
    rates = {rate.format: rate.tflops for rate in measured if rate.tflops}
    return {
        "milliseconds": 1e3 * timing.median,
        "quartiles_milliseconds": [1e3 * x for x in timing.quartiles],
        "tflops": achieved(timing, found),
        "rates": rates,
        "size": measured[0].size if measured else None,
        "share": share_of_rates(timing, found, rates),
    }


def _show(told: dict[str, Any], account: Any) -> None:
    from mpjax.measure.memory import size_text

    parts = told["params"]
    sizes = [(p["module"], p["count"], p["bytes_by_dtype"]) for p in parts]
    total = {dtype: sum(by.get(dtype, 0) for _, _, by in sizes) for dtype in {d: 0 for _, _, by in sizes for d in by}}
    rows = [
        (module, f"{n:,}", ", ".join(f"{dtype} {size_text(b)}" for dtype, b in by.items()))
        for module, n, by in [*sizes, ("all", sum(n for _, n, _ in sizes), total)]
    ]
    show("Params by top-level module", ("module", "params", "memory"), rows)
    print(f"Memory of one train step, on one device\n{account}\n")
    flops = told["flops"]
    every = sum(flops.values())
    rows = [(dtype, f"{n:.4g}", f"{n / every:.1%}") for dtype, n in flops.items()]
    show("FLOPs of a step's products", ("operands", "FLOPs", "share"), rows)
    if told["time"] is not None:
        _show_time(told["time"])


def _show_time(time: dict[str, Any]) -> None:
    low, high = time["quartiles_milliseconds"]
    print(
        f"A step takes {time['milliseconds']:.4g} ms (median; half of the blocks lie between {low:.4g} and {high:.4g})"
    )
    print(f"which is {time['tflops']:.3g} TFLOP/s in matrix products.")
    if time["size"] is None:  # no products
        return
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in time["rates"].items())
    n = time["size"]
    print(f"A product of {n}×{n} matrices alone reaches here, in TFLOP/s: {rates or 'nothing that was measured'}.")
    if time["share"] is None:
        print("Not every format of the step could be measured so: its share is not known.")
    else:
        print(f"At these rates the step's own products would take {time['share']:.1%} of its time.")
