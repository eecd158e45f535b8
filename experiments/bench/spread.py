"""A GPT's step over the devices of one host: the mesh, where state and batch lie on it, and the program of one case."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec as P

from experiments._run import Refused
from experiments.bench import data, gpt
from experiments.bench.program import Program
from experiments.bench.rows import BF16, GPT, ROWS, Settings, Side
from mpjax import fsdp, make_train_step, shard_batch, shard_state, state_shardings
from mpjax.train.specs import Rules

Way = Literal["data", "fsdp", "fsdp+tensor"]
Scaling = Literal["weak", "strong"]
Reduced = Literal["gspmd", "bfloat16", "float32"]
Xla = Literal["defaults", "overlap"]

OVERLAP: dict[str, str | bool] = {
    "xla_gpu_experimental_parallel_collective_overlap_limit": "100",
    "xla_gpu_experimental_collective_start_as_early_as_possible": True,
}
"""Many collectives may be under way at a time, each from when its operand is there. By default XLA begins one when the one
before has ended, and puts most of the backward pass before the first. They hide what they should, and products take longer
beside it: no gain in bfloat16 (experiments/records/2026-11-29-scaling-fsdp-h200)."""

SIDE: Side = ROWS["gpt-1.3b"].sides["bf16"]
"""The tuned side of the bench: chunked loss, the GELU computed again, `skip="gradients"`."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table. One device is a plain step, without a mesh, whatever the rest says.

    Args:
      way: data: all params on every device. fsdp: params and moments cut over all devices. fsdp+tensor: the kernels of a
        block, and the table of tokens, cut over two axes.
      devices: so many of the host's first.
      scaling: weak: the rows of a device are constant. strong: the rows of the whole batch are.
      reduce: in which dtype gradients are summed over devices. gspmd: as GSPMD does, in that of the product that makes
        them (records before 2026-11-30 call it bfloat16); bfloat16, float32: `reduce_dtype`.
      accumulate: micro-batches a step, each of as many rows as a step has without.
      xla: its defaults, or with `OVERLAP`.
    """

    way: Way
    devices: int
    scaling: Scaling
    reduce: Reduced
    accumulate: int
    xla: Xla = "defaults"

    @property
    def name(self) -> str:
        """As the table says it."""
        micro = f", accumulate {self.accumulate}" if self.accumulate > 1 else ""
        if self.devices == 1:
            return f"one device{micro}"
        options = "" if self.xla == "defaults" else f", {self.xla}"
        return f"{self.way}, {self.devices} devices, {self.scaling}, {self.reduce}{micro}{options}"

    @property
    def alone(self) -> Case:
        """The case on one device that this one is held against."""
        return Case("data", 1, "weak", "gspmd", self.accumulate)

    def rows(self, work: GPT) -> int:
        """Of the whole batch of a step."""
        return work.batch * self.accumulate * (self.devices if self.scaling == "weak" else 1)


def cases(
    ways: Iterable[Way],
    devices: Iterable[int],
    scaling: Iterable[Scaling],
    reduce: Iterable[Reduced],
    accumulate: Iterable[int],
    xla: Iterable[Xla] = ("defaults",),
) -> Iterator[Case]:
    """Every combination, the first value of each setting first; one device and the most devices before those between."""
    counts = sorted(set(devices))
    ends = [counts[-1:], counts[-2::-1]]
    for accumulated in accumulate:
        if counts[0] == 1:
            yield Case("data", 1, "weak", "gspmd", accumulated)
        for scaled in scaling:
            for reduced in reduce:
                for options, some, way in itertools.product(xla, ends, ways):
                    for count in some:
                        if count > 1:
                            yield Case(way, count, scaled, reduced, accumulated, options)


def check(case: Case, work: GPT, tensor: int) -> None:
    """Refuse a case that cannot be placed, before anything is compiled.

    Raises:
      Refused: more devices than there are, or devices or rows that do not divide.
    """
    there = len(jax.devices())
    if not 1 <= case.devices <= there:
        raise Refused(f"got --devices {case.devices}; legal are 1 to {there}, as many as this host has")
    if case.devices == 1:
        return
    along = case.devices
    if case.way == "fsdp+tensor":
        if case.devices % tensor:
            raise Refused(f"{case.name}: got --tensor {tensor}; legal is a divisor of {case.devices}")
        along //= tensor
    if case.rows(work) % (along * case.accumulate):
        raise Refused(
            f"{case.name}: a micro-batch has {case.rows(work) // case.accumulate} rows, which {along} devices cannot share; "
            f"give --batch a multiple of {along}"
        )


def mesh_of(case: Case, tensor: int) -> Mesh:
    """The first devices of the host, in one axis, or for tensor parallelism in two."""
    chosen = jax.devices()[: case.devices]
    if case.way == "fsdp+tensor":
        return jax.make_mesh((case.devices // tensor, tensor), ("data", "model"), devices=chosen)
    return jax.make_mesh((case.devices,), ("data",), devices=chosen)


def rules_of(way: Way, least: int) -> Rules:
    """Where params lie; those of fewer than `least` elements stay whole.

    Tensor parallelism as in Shoeybi et al., Megatron-LM (2019): a block's first kernels are cut by columns, its second by
    rows, the table of tokens by tokens. The other axis of each is cut over the axis of the batch.
    """
    whole = fsdp("data", min_size=least)
    if way != "fsdp+tensor":
        return None if way == "data" else whole
    columns, rows = P("data", "model"), P("model", "data")
    return {
        "re:.*/(query|key|value|up)/kernel": columns,
        "re:.*/(query|key|value|up)/bias": P("model"),
        "re:.*/(out|down)/kernel": rows,
        "embed/embedding": rows,
        "**": whole,
    }


class Maker:
    """Makes the programs of cases. A state is made once, on one device, and kept on the host: cases differ in where it
    lies, and what makes it where it is to lie compiled for three quarters of a minute each time."""

    def __init__(self, work: GPT, settings: Settings, tensor: int = 2, policy: str = BF16,
                 optimizer: optax.GradientTransformation | None = None):  # fmt: skip
        self.work, self.settings, self.tensor, self.optimizer = work, settings, tensor, optimizer
        self.side = dataclasses.replace(SIDE, policy=policy)
        self.least = 64 if settings.tiny else 2**16
        self._made = functools.lru_cache(self._state_on_host)

    def program(self, case: Case) -> Program:
        """Step, state and batch of one case, placed."""
        loss_fn, optimizer, _ = self.parts(case)
        clip, skip = self.settings.clip_norm, self.side.skip
        batch = data.tokens(dataclasses.replace(self.work, batch=case.rows(self.work)), self.settings.seed)
        if case.devices == 1:
            step = make_train_step(loss_fn, optimizer, clip_norm=clip, skip=skip, accumulate=case.accumulate)
            return Program(step, self.state(case), jax.device_put(batch))
        mesh = mesh_of(case, self.tensor)
        reduce = None if case.reduce == "gspmd" else case.reduce
        step = make_train_step(
            loss_fn, optimizer, clip_norm=clip, skip=skip, accumulate=case.accumulate, mesh=mesh, reduce_dtype=reduce
        )
        return Program(step, self.state(case), shard_batch(batch, mesh))

    def state(self, case: Case) -> Any:
        """The state at step 0, where it is to lie: the same numbers whatever the devices."""
        made = self._made(case.devices > 1 and case.way == "fsdp+tensor")
        if case.devices == 1:
            return jax.tree.map(jnp.array, made)
        return shard_state(made, mesh_of(case, self.tensor), rules_of(case.way, self.least))

    def shardings(self, case: Case) -> Any:
        """Where each leaf of the state lies."""
        create = self.parts(case).create
        shapes = jax.eval_shape(create, jax.random.key(0))
        return state_shardings(shapes, mesh_of(case, self.tensor), rules_of(case.way, self.least))

    def parts(self, case: Case) -> gpt.Parts:
        """What the program of one case is made of."""
        work, chunk = self.work, gpt.CHUNK
        if case.devices > 1 and case.way == "fsdp+tensor":
            # Cut by columns, a kernel of all three would have the query's on one device and the value's on another.
            work = dataclasses.replace(work, fused_qkv=False)
        if case.devices > 1 and case.reduce == "gspmd":
            # GSPMD sees the tokens of all devices, cuts those into chunks, and sums the head's gradient once in each. As
            # many chunks as one device has are as large on each device; with `reduce_dtype` a device sees its own.
            chunk *= case.devices // (self.tensor if case.way == "fsdp+tensor" else 1)
        return gpt.parts(work, self.side, self.optimizer, chunk)

    def _state_on_host(self, separate: bool) -> Any:
        """As numpy arrays; `separate`: query, key and value have kernels of their own, as tensor parallelism wants them."""
        create = self.parts(Case("fsdp+tensor" if separate else "data", 2, "weak", "float32", 1)).create
        return jax.device_get(jax.jit(create)(jax.random.key(self.settings.seed)))
