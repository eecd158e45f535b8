"""A GPT's train step over 1, 2, 4, 8 GPUs of one host: data parallel, fully sharded, and with tensor parallelism.

Question   what does a device more bring, what does it cost in memory, and what moves between devices for it?
Step       that of the bench's tuned side (`rows.py`): chunked loss, the GELU computed again, `skip="gradients"`.
Ways       data: params on every device. fsdp: params and moments cut over all. fsdp+tensor: a block's kernels cut over
           two axes, `--tensor` devices in the second; its query, key and value have kernels of their own.
Scaling    weak: a device's rows are constant; strong: those of the whole batch. With `--accumulate k` a step has k
           micro-batches of so many rows each.
Reduced    gspmd: gradients are summed over devices as GSPMD does, in the dtype of the product that makes them, once in
           every micro-batch; bfloat16, float32: `reduce_dtype`, once a step.
XLA        its defaults; overlap: with two options that begin a collective as soon as it can and let many be under way.
Against    one device: the same step without a mesh, of the same rows a device, timed first in the same process.
           Efficiency is the rate a device over that one's; the bounds are what the slowest and the fastest blocks give.
           GPUs of one host differ, by 4 % where that was looked at: CUDA_VISIBLE_DEVICES=1 and --devices 1 time another.
Reads      rate a device; efficiency; memory a device, as planned and as the device counted; bytes of collectives by
           kind, from the optimised program, loops counted; on GPUs the share of a step in which collectives run, and
           in which nothing else does, from a trace (`overlap.py`). A CPU's share is not measured.
Method     one process, one case at a time, its state freed before the next; what is done is printed and written after
           each. `--stop-after` begins no case that would end too late if it took as long as the longest so far. One
           device and the most devices come first, and within them the first value of each setting.
Memory     a device tells the most since the process began: it is shown for a case that rose above all before it. So
           give `--ways fsdp data`, or a run of its own, where fsdp's own peak is wanted.
Time       each case compiles a step: a quarter of a minute with --tiny on 2 CPU cores; on two H200s 42 s a case at 1.3B, and a
           minute more for the first, which makes the state.
Run        python -m experiments.bench.scaling gpt-1.3b --devices 1 8 --ways data fsdp --out FOLDER --stop-after 500
           python -m experiments.bench.scaling table FOLDER...      the tables of runs, in Markdown
           python -m experiments.bench.scaling checks --devices 8   what must hold on several devices (`goals.py`)
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import math
import os
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

import jax
import tyro
from rich.console import Console

from experiments._run import Refused, write_json
from experiments.bench import collectives, goals, overlap, scaling_table
from experiments.bench.command import Tables, place, possible, told, typed
from experiments.bench.rows import GPT, TINY, WORKS, Settings
from experiments.bench.side_jax import Ready, environment, planned
from experiments.bench.spread import OVERLAP, Case, Maker, Reduced, Scaling, Way, Xla, cases, check
from experiments.bench.timing import block_ms, clocked
from mpjax.measure.table import policy_table

PROG = "python -m experiments.bench.scaling"


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, with its unit."""

    work: tyro.conf.Positional[str]
    """gpt2-124m or gpt-1.3b."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """How many of the host's; without 1 there is nothing to hold the others against."""
    ways: tuple[Way, ...] = ("data", "fsdp")
    """How state and batch lie on them."""
    scaling: tuple[Scaling, ...] = ("weak",)
    """What is constant: a device's rows, or the batch's."""
    reduce_dtype: tuple[Reduced, ...] = ("gspmd", "bfloat16", "float32")
    """In which gradients are summed over devices."""
    accumulate: tuple[int, ...] = (1,)
    """Micro-batches a step."""
    tensor: int = 2
    """Devices over which fsdp+tensor cuts a kernel's columns."""
    batch: int | None = None
    """Rows of a micro-batch on one device; by default the work's own."""
    xla: tuple[Xla, ...] = ("defaults",)
    """Its defaults, or with the options that let collectives overlap (`spread.OVERLAP`)."""
    compiler: tuple[str, ...] = ()
    """Options of XLA for the step alone, as NAME=VALUE, named as in `XLA_FLAGS`."""
    out: str | None = None
    """A folder, for WORK-scaling.json and WORK-scaling.md; by default runs/scaling-date-time."""
    stop_after: float = math.inf
    """Seconds; see above."""
    settings: tyro.conf.OmitArgPrefixes[Settings] = dataclasses.field(
        default_factory=lambda: Settings(losses=5, steps=5, blocks=8, profile=3)
    )


def work_of(name: str, tiny: bool, batch: int | None) -> GPT:
    """A GPT of the bench, with so many rows.

    Raises:
      Refused: none of that name, or no rows.
    """
    found = (TINY if tiny else WORKS).get(name)
    if not isinstance(found, GPT):
        raise Refused(
            f"got the work {name!r}; legal are {', '.join(k for k, v in WORKS.items() if isinstance(v, GPT))}"
        )
    if batch is not None and batch < 1:
        raise Refused(f"got --batch {batch}; legal is a number of rows from 1")
    return found if batch is None else dataclasses.replace(found, batch=batch)


def options(given: tuple[str, ...]) -> dict[str, str | bool]:
    """XLA's options from NAME=VALUE.

    Raises:
      Refused: no such form.
    """
    if wrong := [text for text in given if "=" not in text]:
        raise Refused(f"got --compiler {wrong[0]}; legal is NAME=VALUE, such as xla_gpu_enable_nccl_user_buffers=true")
    truths = {"true": True, "false": False}
    return {name: truths.get(value.lower(), value) for name, _, value in (text.partition("=") for text in given)}


class OnMany(Ready):
    """A program whose steps run one at a time where virtual devices share a CPU: they share its threads, too, and devices
    that had gone on to the next step were seen to wait for ever for those that had no thread left for this one."""

    def call(self) -> None:
        super().call()
        if jax.default_backend() == "cpu":
            self.wait()


def measure(maker: Maker, case: Case, settings: Settings, compiler: Mapping[str, str | bool]) -> dict[str, Any]:
    """All that is known of one case; its state is gone when this returns."""
    before = peaks(case)
    program, built = clocked(lambda: jax.block_until_ready(maker.program(case)))
    ready = OnMany(program, {**compiler, **(OVERLAP if case.xla == "overlap" else {})})
    compiled = peaks(case)  # the compiler tries kernels out, which takes memory, too
    losses = ready.losses(settings.losses)
    steps = max(1, settings.steps // case.accumulate)
    blocks = [block_ms(ready.call, ready.wait, steps) for _ in range(settings.blocks)]
    found: dict[str, Any] = {
        "devices": case.devices, "rows": case.rows(maker.work), "items": case.rows(maker.work) * maker.work.context,
        "seconds": {"build": built, **ready.seconds}, "losses": losses, "block_ms": blocks,
        "planned_bytes": planned(ready.executable), "peak_bytes": peaks(case), "peak_bytes_before": before,
        "peak_bytes_when_compiled": compiled,
        "collectives": collectives.table(ready.executable.as_text()), "time": None,
    }  # fmt: skip
    if settings.profile:
        found["time"] = overlap.measure(ready.call, ready.wait, max(1, settings.profile // case.accumulate))
    return found


def peaks(case: Case) -> list[int] | None:
    """The most that each device had in use since the process began; None where devices do not tell (a CPU)."""
    told = [device.memory_stats() or {} for device in jax.devices()[: case.devices]]
    found = [stats["peak_bytes_in_use"] for stats in told if "peak_bytes_in_use" in stats]
    return found if len(found) == case.devices else None


def main(config: Config, command: str) -> int:
    """Run the cases, print each and the table, write both. Returns 1 if a case failed."""
    began = time.monotonic()
    settings, work = config.settings, work_of(config.work, config.settings.tiny, config.batch)
    work = dataclasses.replace(work, fused_qkv=settings.fused_qkv)
    todo = list(cases(config.ways, config.devices, config.scaling, config.reduce_dtype, config.accumulate, config.xla))
    for case in todo:
        check(case, work, config.tensor)
    if not todo:
        raise Refused("got settings that give no case; legal are values for devices, ways, scaling and reduce-dtype")
    compiler = options(config.compiler)
    possible(settings)
    out = config.out or f"runs/scaling-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder = place(out, f"{config.work}-scaling.json")
    record: dict[str, Any] = {
        "scaling": config.work, "work": dataclasses.asdict(work), "unit": work.unit, "tensor": config.tensor,
        "settings": dataclasses.asdict(settings), "compiler": compiler, "overlap": OVERLAP,
        "date": datetime.datetime.now().isoformat(timespec="seconds"), "command": command,
        "variables": told(os.environ),
        "environment": environment(), "cases": {}, "left_out": [],
    }  # fmt: skip
    maker, longest = Maker(work, settings, config.tensor), 0.0
    for case in todo:
        since = time.monotonic()
        if since - began + longest > config.stop_after:
            record["left_out"].append(case.name)
        else:
            record["cases"][case.name] = {"case": dataclasses.asdict(case)} | tried(maker, case, settings, compiler)
            longest = max(longest, time.monotonic() - since)
            said = scaling_table.line(record, case.name)
            print(f"{said}; {time.monotonic() - since:.0f} s", file=sys.stderr, flush=True)
        # The file of numbers is whole whenever the run is cut; the table can be made of it again.
        write_json(folder / f"{config.work}-scaling.json", record)
        (folder / f"{config.work}-scaling.md").write_text(scaling_table.markdown(record), encoding="utf-8")
    console = Console(soft_wrap=True, highlight=False)
    if record["cases"]:
        console.print(
            policy_table(scaling_table.rows(record), title=f"{config.work}, {record['environment']['device']}")
        )
    for note in scaling_table.notes(record):
        console.print(note, markup=False)
    return int(any("failed" in found for found in record["cases"].values()))


def tried(maker: Maker, case: Case, settings: Settings, compiler: Mapping[str, str | bool]) -> dict[str, Any]:
    """`measure`; what goes wrong is an answer, too, so that the run goes on."""
    try:
        return measure(maker, case, settings, compiler)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}", "log": traceback.format_exc()[-4000:]}
    finally:
        gc.collect()  # a step and its state know each other


def run(args: list[str]) -> int:
    """The command line: `WORK …`, `table FOLDER…` or `checks …`. 2: it was not understood."""
    try:
        if args[:1] == ["table"]:
            given = tyro.cli(Tables, args=args[1:], prog=f"{PROG} table")
            print("\n".join(scaling_table.markdown(record) for record in scaling_table.load(given.folders)))
            return 0
        if args[:1] == ["checks"]:
            asked = tyro.cli(goals.Checks, args=args[1:], description=goals.__doc__, prog=f"{PROG} checks")
            return goals.main(asked, work_of(asked.work, asked.tiny, asked.batch))
        return main(tyro.cli(Config, description=__doc__, args=args, prog=PROG), typed(PROG, args))
    except KeyboardInterrupt:
        return 130
    except Refused as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
