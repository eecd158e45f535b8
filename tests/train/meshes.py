"""What the tests on several devices share: a model whose batch is known by its shape, placements, and a reader of HLO."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import mpjax
from mpjax.core.model import Model
from mpjax.core.tree import path_of
from mpjax.train.specs import Rules
from mpjax.train.state import Aux

needs_eight = pytest.mark.skipif(len(jax.devices()) < 8, reason="eight devices, virtual ones count")

# No dimension of a param is a number of rows, whole or cut, so that a shape in the HLO tells what it is of.
WIDTHS = 15, 64, 16
ROWS = 48
KEY = jax.random.key(3)


class Placed(NamedTuple):
    """A mesh and rules for the params on it."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    rules: Rules

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return jax.make_mesh(self.shape, self.axes)


TENSOR = {"up/kernel": P(None, "model"), "up/bias": P("model"), "down/kernel": P("model")}
BOTH = {"up/kernel": P(None, ("model", "data")), "up/bias": P("model"), "down/kernel": P("model", "data")}
PLACEMENTS = {
    "data": Placed((8,), ("data",), None),
    "fsdp": Placed((8,), ("data",), mpjax.fsdp(min_size=100)),
    "tensor": Placed((4, 2), ("data", "model"), TENSOR),
    "fsdp+tensor": Placed((4, 2), ("data", "model"), BOTH),
}


def perceptron(dtype: Any = jnp.float32) -> Model:
    """Two layers, computed in `dtype`, and statistics of the inputs: a running mean and a counter."""

    def init(rng: jax.Array, *sample: Any) -> tuple[dict, dict]:
        keys = jax.random.split(rng)
        layers = {
            name: {"kernel": jax.random.normal(key, (m, n)) / math.sqrt(m), "bias": jnp.zeros(n)}
            for name, key, m, n in zip(("up", "down"), keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
        }
        return layers, {"stats": {"mean": jnp.zeros(WIDTHS[0]), "count": jnp.zeros((), jnp.int32)}}

    def apply(params: Any, mstate: Any, x: jax.Array, rng: Any = None) -> tuple[jax.Array, dict]:
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        h = jnp.tanh(x.astype(dtype) @ cast["up"]["kernel"] + cast["up"]["bias"][None])
        y = h @ cast["down"]["kernel"] + cast["down"]["bias"][None]
        old = mstate["stats"]
        stats = {"mean": 0.75 * old["mean"] + 0.25 * x.mean(0), "count": old["count"] + 1}
        return y.astype(jnp.float32), {"stats": stats}

    return Model(init, apply, policy=mpjax.get_policy(f"params=float32,compute={jnp.dtype(dtype).name},output=float32"))


@functools.cache
def mean_loss(dtype: Any = jnp.float32) -> Any:
    model = perceptron(dtype)

    def loss_fn(params: Any, mstate: Any, batch: Any, rng: Any) -> Any:
        y, new = model.apply(params, mstate, batch["x"])
        errors = jnp.square(y - batch["y"]).mean(-1)
        return errors.mean(), Aux(new, {"error": jnp.abs(y - batch["y"]).mean()})

    return loss_fn


@functools.cache
def masked_loss(dtype: Any = jnp.float32) -> Any:
    """`(sum, weight)`, whose weight differs from device to device, and a metric weighted alike."""
    model = perceptron(dtype)

    def loss_fn(params: Any, mstate: Any, batch: Any, rng: Any) -> Any:
        y, new = model.apply(params, mstate, batch["x"])
        errors, mask = jnp.square(y - batch["y"]).mean(-1), batch["mask"]
        metric = (jnp.sqrt(errors) * mask).sum() / jnp.maximum(mask.sum(), 1)
        return ((errors * mask).sum(), mask.sum()), Aux(new, {"error": metric})

    return loss_fn


def batch_of(rows: int = ROWS, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(rows, WIDTHS[0])).astype(np.float32),
        "y": rng.normal(size=(rows, WIDTHS[-1])).astype(np.float32),
        "mask": (rng.uniform(size=rows) < np.linspace(0.2, 1.0, rows)).astype(np.float32),
    }


@contextlib.contextmanager
def compiled_quickly() -> Iterator[None]:
    """Half the compile time, where it is numbers and places that are tested and not the HLO."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def placements_of(tree: Any) -> dict[str, Any]:
    return {path_of(keys): x.sharding for keys, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def shards(tree: Any) -> dict[str, list[bytes]]:
    """From path to the bytes that each device holds of a leaf."""

    def held(x: Any) -> list[bytes]:
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return [np.asarray(shard.data).tobytes() for shard in x.addressable_shards]

    return {path_of(keys): held(x) for keys, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def agree(tree: Any) -> bool:
    """Whether every device holds the same of each leaf, which is replicated."""
    return all(x.sharding.is_fully_replicated for x in jax.tree.leaves(tree)) and all(
        len(set(held)) == 1 for held in shards(tree).values()
    )


def apart(a: Any, b: Any) -> float:
    """The largest difference of any leaf, relative to that leaf's largest element."""

    def leaf(x: Any, y: Any) -> float:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(leaf, a, b)))


def compiles(caplog: Any, name: str = "pure") -> int:
    """How often `jax.log_compiles` saw the function `name` compiled."""
    return sum(
        f"Compiling jit({name})" in record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING
    )


# ---- reading HLO -----------------------------------------------------------------------------------------------------

KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"


class Collective(NamedTuple):
    """One array that one collective moves: kind, dtype, shape, and whether a loop's body holds it."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    looped: bool


def collectives(hlo: str) -> list[Collective]:
    """Every array that is moved between devices, those of a combined collective one by one."""
    bodies = set(re.findall(r"\bbody=%?([\w.\-]+)", hlo))
    found, inside = [], ""
    for line in hlo.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            inside = opened[1]
        if op := re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line):
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", op[1]):
                shape = tuple(int(n) for n in dims.split(",") if n)
                found.append(Collective(op[2], dtype, shape, inside in bodies))
    return found


def partitioned(lowered: Any, folder: Path) -> tuple[str, str]:
    """The HLO right behind the pass that cuts it up for the devices, and at the end, where the CPU has widened bfloat16."""
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partitioning"}
    finished = lowered.compile(compiler_options=options).as_text()
    (path,) = folder.glob("*after_spmd-partitioning*.txt")
    return path.read_text(), finished
