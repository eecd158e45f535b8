"""What must hold of a GPT's step on several devices, each found and held against its limit.

NaN        one token of the last device's last row is none of the table's, so that its activations are NaN there and nowhere
           else: the step is skipped on all devices, and every byte of every shard of params, statistics, optimizer
           state, key and step is as it was.
SGD        the loss after 100 steps against that on one device, relative: 2e-6 in float32, 2e-2 in bfloat16. The whole
           batch is the same, and four batches take turns. On GPUs float32 products are then float32, not TF32.
Checkpoint a fully sharded AdamW state, saved, restores on one device and on two to the byte.
Time       with --tiny a minute and a half on 2 CPU cores.
Run        python -m experiments.bench.scaling checks --devices 8 --out FOLDER
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import mpjax
from experiments._run import Refused
from experiments.bench import data
from experiments.bench.command import place
from experiments.bench.rows import BF16, GPT, Settings
from experiments.bench.side_jax import environment
from experiments.bench.spread import Case, Maker, Reduced, Way, check, mesh_of
from mpjax.core.tree import path_of
from mpjax.measure.table import policy_table

LIMITS = {"float32": 2e-6, BF16: 2e-2}
"""By policy, of the loss after 100 steps of SGD, relative to one device's."""

SUMS = {"gspmd": "sums as GSPMD does", "bfloat16": "sums in bfloat16", "float32": "sums in float32"}

BATCHES = 4
"""Of random tokens; they take turns."""


@dataclasses.dataclass(frozen=True)
class Checks:
    """Every setting, with its unit."""

    devices: int = 8
    """From 2, of the host's."""
    work: str = "gpt2-124m"
    """gpt2-124m or gpt-1.3b."""
    ways: tuple[Way, ...] = ("data", "fsdp")
    """How state and batch lie on the devices."""
    reduce_dtype: tuple[Reduced, ...] = ("gspmd", "bfloat16", "float32")
    """In which gradients are summed over devices; gspmd: as GSPMD does, in the dtype of their product."""
    policies: tuple[str, ...] = tuple(LIMITS)
    """float32, mixed_bfloat16."""
    steps: int = 100
    """Of SGD."""
    rate: float = 0.1
    """SGD's learning rate."""
    batch: int | None = None
    """Rows of the whole batch; by default those of eight devices, or one a device where there are more. (Four batches of two
    rows are learned by heart within 100 steps, at a rate that makes 1e-5 of a rounding error of 1e-7.)"""
    tensor: int = 2
    """Devices over which fsdp+tensor cuts a kernel's columns."""
    tiny: bool = False
    """The work shrunk to run on a CPU."""
    out: str | None = None
    """A folder, for checks.json; none by default."""


Row = dict[str, Any]


def checks(config: Checks, work: GPT) -> Iterator[Row]:
    """Each check's row as it is found: what was checked, where, found, limit, met."""
    settings, devices = Settings(tiny=config.tiny), config.devices
    if not 2 <= devices <= len(jax.devices()):
        raise Refused(f"got --devices {devices}; legal are 2 to {len(jax.devices())}, as many as this host has")
    work = dataclasses.replace(work, batch=config.batch or max(8, devices))
    many = [Case(way, devices, "strong", reduce, 1) for way in config.ways for reduce in config.reduce_dtype]
    for case in many:
        check(case, work, config.tensor)
    batches = [data.tokens(work, seed) for seed in range(BATCHES)]
    for policy in config.policies:
        maker = Maker(work, settings, config.tensor, policy, optax.sgd(config.rate))
        with jax.default_matmul_precision("highest" if policy == "float32" else "default"):
            alone, _ = trained(maker, many[0].alone, batches, config.steps)
            for case in many:
                losses, skipped = trained(maker, case, batches, config.steps)
                where = f"{policy}, {case.way}, {devices} devices, {SUMS[case.reduce]}"
                yield skipped | {"where": where}
                apart = abs(losses[-1] - alone[-1]) / abs(alone[-1])
                yield row(f"loss after {config.steps} steps", apart, LIMITS[policy]) | {
                    "where": where, "first": alone[0], "last": alone[-1],
                }  # fmt: skip
    yield from restored(Maker(work, settings), Case("fsdp", devices, "strong", "gspmd", 1))


def row(what: str, found: float, limit: float) -> Row:
    """One that is met if what was found is a number within its limit.

    >>> row("loss", 1e-7, 2e-6)["met"], row("loss", float("nan"), 2e-6)["met"]
    (True, False)
    """
    return {
        "check": what,
        "where": "",
        "found": found,
        "limit": limit,
        "met": bool(math.isfinite(found) and found <= limit),
    }


def trained(maker: Maker, case: Case, batches: list[np.ndarray], steps: int) -> tuple[list[float], Row]:
    """Losses of some steps, after one that was to be skipped (on several devices), and what became of that one."""
    program = maker.program(case)
    step, state = program.step, program.state

    def place(tokens: np.ndarray) -> Any:
        return jax.device_put(tokens) if case.devices == 1 else mpjax.shard_batch(tokens, mesh_of(case, maker.tensor))

    found: Row = {}
    if case.devices > 1:
        tokens = batches[0].copy()
        tokens[-1, 0] = maker.work.vocabulary  # past the table's end, where an embedding is NaN
        state, found = planted(step, state, place(tokens))
    placed, losses = [place(tokens) for tokens in batches], list[float]()
    for n in range(steps):
        state, metrics = jax.block_until_ready(step(state, placed[n % len(placed)]))  # see `scaling.OnMany`
        losses.append(float(metrics["loss"]))
    return losses, found


def planted(step: Any, state: Any, bad: Any) -> tuple[Any, Row]:
    """The state after a batch with a NaN in it: how many shards of how many changed, and whether all devices skipped."""
    before = shards(state)
    skipped = [int(x.data) for x in state.skipped.addressable_shards]
    state, metrics = jax.block_until_ready(step(state, bad))
    after = shards(state)
    changed = sum(before[path] != after[path] for path in before)
    all_skip = [int(x.data) - 1 for x in state.skipped.addressable_shards] == skipped
    is_nan = bool(jnp.isnan(metrics["loss"]))  # or nothing was planted, and nothing is shown
    return state, row("shards that a NaN on one device changed", changed if all_skip and is_nan else math.inf, 0)


def shards(state: Any) -> dict[tuple[str, int], bytes]:
    """From path and device to a digest of what the device holds, of all that a skipped step must leave alone."""
    kept = dataclasses.replace(state, skipped=None, skipped_in_a_row=None, loss_scale=None)
    return {
        (path_of(keys), shard.device.id): hashlib.blake2b(np.asarray(shard.data).tobytes()).digest()
        for keys, x in jax.tree_util.tree_flatten_with_path(kept)[0]
        for shard in as_numbers(x).addressable_shards
    }


def as_numbers(x: Any) -> Any:
    """A key as the integers that it is."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def restored(maker: Maker, case: Case) -> Iterator[Row]:
    """How many leaves of a state with moments come back otherwise, or elsewhere, on one device and on two."""
    shapes = jax.eval_shape(maker.parts(case).create, jax.random.key(0))
    state = with_moments(maker, case)
    alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placements = {
        1: jax.tree.map(lambda _: alone, shapes),
        2: maker.shardings(dataclasses.replace(case, devices=2)),
    }

    def differs(old: Any, new: Any, place: Any) -> bool:
        a, b = (np.asarray(as_numbers(x)) for x in (old, new))
        return (old.dtype, a.tobytes()) != (new.dtype, b.tobytes()) or new.sharding != place

    with tempfile.TemporaryDirectory() as folder:
        checkpointer = mpjax.Checkpointer(folder)
        checkpointer.save(state, 1)
        for devices, here in placements.items():
            like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, here)
            wrong = sum(jax.tree.leaves(jax.tree.map(differs, state, checkpointer.restore(like), here)))
            where = f"{case.way}, from {case.devices} devices to {devices}"
            yield row("leaves that a checkpoint changed", wrong, 0) | {"where": where}


def with_moments(maker: Maker, case: Case) -> Any:
    """A state whose optimizer has moved once, the params being its gradients: zeros would restore from anything."""
    state, optimizer = maker.state(case), maker.parts(case).optimizer

    def moved(state: Any) -> Any:
        return dataclasses.replace(state, opt_state=optimizer.update(state.params, state.opt_state, state.params)[1])

    return jax.block_until_ready(jax.jit(moved, out_shardings=maker.shardings(case))(state))


def main(config: Checks, work: GPT) -> int:
    """Print each check as it is found, and a table. Returns 1 if one is not met."""
    found: list[Row] = []
    folder = place(config.out, "checks.json") if config.out else None
    for row in checks(config, work):
        found.append(row)
        print(f"{row['check']} ({row['where']}): found {row['found']:.3g}, limit {row['limit']:g}, "
              f"{'met' if row['met'] else 'NOT met'}", file=sys.stderr, flush=True)  # fmt: skip
        if folder:
            told = {
                "checks": found,
                "settings": dataclasses.asdict(config) | {"out": None},
                "environment": environment(),
            }
            (folder / "checks.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    shown = [
        {**row, "found": f"{row['found']:.3g}", "limit": f"{row['limit']:g}", "met": str(row["met"])} for row in found
    ]
    Console(soft_wrap=True, highlight=False).print(policy_table(shown))
    return int(not all(row["met"] for row in found))
