"""What a compiled step takes of the device's memory, as XLA planned it, and whose it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mpjax.core.dtypes import wide
from mpjax.core.types import Batch, PyTree
from mpjax.measure.kept import kept_by
from mpjax.train.state import TrainState, merge_trainable, split_trainable
from mpjax.train.step import TrainStep


def step_memory(compiled: Any) -> dict[str, int]:
    """Bytes of a function's arguments, outputs, shared (donated) memory and temporaries, as XLA planned them.

    They are those of one device, and what a run holds at its peak is at most arguments + outputs − shared + temp.

    Args:
      compiled: what `jax.jit(f).lower(...)` gives, compiled or not; for a train step `step.lower(state, batch)`.

    Returns:
      `temp`, `arguments`, `outputs` and `shared` (outputs that take the memory of a donated argument), each in bytes.

    Raises:
      ValueError: the backend plans no memory.

    >>> import jax, jax.numpy as jnp
    >>> step_memory(jax.jit(lambda x: x + 1).lower(jnp.ones(8, jnp.float32)))["arguments"]
    32
    """
    found = (compiled.compile() if hasattr(compiled, "compile") else compiled).memory_analysis()
    if found is None:
        raise ValueError(
            "got a backend that reports no memory plan; legal are CPU, GPU and TPU; compile for one of those"
        )
    return {
        "temp": int(found.temp_size_in_bytes),
        "arguments": int(found.argument_size_in_bytes),
        "outputs": int(found.output_size_in_bytes),
        "shared": int(found.alias_size_in_bytes),
    }


@dataclasses.dataclass(frozen=True)
class MemoryAccount:
    """The bytes of one train step on one device, by role. `str(account)` is a table.

    Args:
      arguments: exact, from role to bytes: master weights, optimizer state, moving average, mstate, batch, rest
        (counters, loss scale, key).
      planned: exact, as XLA planned it: `step_memory` of the compiled step. Its `arguments` are less than the sum above
        by what the step never reads (jit drops it), such as the key of a loss without randomness.
      temporaries: estimates from the program, from role to bytes, of what the temporaries are for: gradients,
        activations, cast weights and logits. None: not told apart from activations, since no module is marked.
    """

    arguments: Mapping[str, int]
    planned: Mapping[str, int]
    temporaries: Mapping[str, int | None]

    @property
    def unexplained(self) -> int:
        """Temporaries beyond the estimates: workspace and intermediate results; below zero where XLA needs less.

        It does where the memory of activations is used again for gradients, or where it computes something twice.
        """
        return self.planned["temp"] - sum(x or 0 for x in self.temporaries.values())

    @property
    def peak(self) -> int:
        """What a run holds at most: arguments + outputs − shared + temp."""
        return sum(self.planned[name] for name in ("arguments", "outputs", "temp")) - self.planned["shared"]

    def rows(self) -> list[tuple[str, int | None, str]]:
        """(role, bytes, how it is known) in the order of the table; parts are indented below their whole."""
        plan = self.planned
        unread = sum(self.arguments.values()) - plan["arguments"]
        left = "workspace and what lives between two products" if self.unexplained > 0 else "XLA uses memory twice"
        return [
            ("arguments", plan["arguments"], "exact, as XLA planned it"),
            *((f"  {role}", n, "exact") for role, n in self.arguments.items() if n),
            *([("  never read", -unread, "not passed to the program")] if unread else []),
            ("new outputs", plan["outputs"] - plan["shared"], "exact; the new state takes the place of a donated one"),
            ("temporaries", plan["temp"], "exact, as XLA planned it"),
            *(
                (f"  {role}", n, "among the activations" if n is None else f"estimate: {_WHAT[role]}")
                for role, n in self.temporaries.items()
            ),
            ("  not explained", self.unexplained, f"the difference: {left}"),
            ("peak", self.peak, "arguments, new outputs and temporaries: at most this"),
        ]

    def __str__(self) -> str:
        cells = [(role, "–" if n is None else size_text(n), how) for role, n, how in self.rows()]
        return "\n".join(f"{role:<22}{n:>12}  {how}" for role, n, how in cells)


_WHAT = {
    "gradients": "the trained params, in float32 or wider",
    "activations": "what the backward pass keeps of the modules",
    "cast weights": "params that it keeps in another dtype or layout",
    "logits": "what the loss function keeps of what modules hand it, and of its own",
}


def memory_by_role(step: TrainStep, state: TrainState, batch: Batch) -> MemoryAccount:
    """Compile a step and say what its memory is for: master weights, optimizer, gradients, activations, logits.

        arguments    exact: the bytes of each part of the state and of the batch
        temp         exact: XLA's plan
        gradients    estimate: the trained params, in float32 or wider
        activations  estimate: what the backward pass keeps from inside modules (`measure.kept`)
        cast weights estimate: of that, params in another dtype
        logits       estimate: what modules hand to the loss function and it keeps, and what it makes itself

    All are those of one device: of a sharded array its shard, and what is kept follows the rows that a device has (a
    model that is itself cut over devices keeps less than is said here). Under accumulation, activations and logits are
    those of one micro-batch. The estimates need not be there at one time: XLA frees an activation once its gradient is
    there, fuses what is made twice, and plans the whole; `unexplained` is what is left.

    Args:
      step: from `make_train_step`; it is compiled, not run.
      state: arrays or `ShapeDtypeStruct`s.
      batch: likewise, as the step takes it.

    Raises:
      ValueError: the backend plans no memory; or what the step itself raises for this batch.

    >>> import jax.numpy as jnp, optax
    >>> from mpjax.core.model import Model
    >>> from mpjax.train.step import make_train_step
    >>> model = Model(lambda rng, x: ({"w": jnp.zeros(8, jnp.float32)}, {}), lambda p, m, x, rng=None: (x @ p["w"], m))
    >>> step = make_train_step(lambda p, m, x, rng: jnp.square(model.apply(p, m, x)[0]).mean(), optax.sgd(0.1, 0.9))
    >>> x = jnp.ones((4, 8), jnp.float32)
    >>> account = memory_by_role(step, TrainState.create(model, step.optimizer, jax.random.key(0), x), x)
    >>> [account.arguments[role] for role in ("master weights", "optimizer state", "batch")]
    [32, 32, 128]
    """
    planned = step_memory(step.lower(state, batch))
    if step.mesh is not None and step.reduce_dtype is not None:  # it cuts up a batch that comes whole, as from the host
        by_rows = NamedSharding(step.mesh, PartitionSpec(step.axis))
        batch = jax.tree.map(lambda x: _cut(x, by_rows) if np.ndim(x) else x, batch)
    counted = (state.params, state.opt_state, state.ema, state.mstate, batch)
    roles = ("master weights", "optimizer state", "moving average", "mstate", "batch")
    arguments = dict(zip(roles, map(_on_one_device, counted), strict=True))
    arguments["rest"] = _on_one_device(state) - sum(map(_on_one_device, counted[:-1]))

    trained, frozen = split_trainable(state.params, state.trainable)
    rows = jax.tree.map(lambda x: _of_a_micro_batch(x, step.accumulate), batch)

    def loss(trained: PyTree, frozen: PyTree, mstate: PyTree, batch: Batch, rng: jax.Array) -> jax.Array:
        # The first leaf of each of the four forms that a loss function may return: the loss, or the sum.
        return jax.tree.leaves(step.loss_fn(merge_trainable(trained, frozen), mstate, batch, rng))[0]

    kept = kept_by(loss, trained, frozen, state.mstate, rows, state.rng)
    return MemoryAccount(
        arguments,
        planned,
        {
            "gradients": sum(
                _bytes(x, whole=step.reduce_dtype is not None, dtype=wide(x.dtype)) for x in jax.tree.leaves(trained)
            ),
            "activations": kept.activations,
            "cast weights": kept.cast_weights,
            "logits": kept.logits,
        },
    )


def size_text(n: int) -> str:
    """A number of bytes for people, in the largest unit of which it has one.

    >>> size_text(512), size_text(3 * 2**20), size_text(-2000)
    ('512 B', '3.00 MiB', '-1.95 KiB')
    """
    power = min(int(math.log2(abs(n)) // 10), 4) if n else 0
    return f"{n} B" if power == 0 else f"{n / 1024**power:.2f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"


def _on_one_device(tree: PyTree) -> int:
    return sum(_bytes(x) for x in jax.tree.leaves(tree))


def _bytes(x: Any, whole: bool = False, dtype: Any = None) -> int:
    """Bytes of an array, or of its shard where it has a sharding; a Python number is made an array."""
    if hasattr(x, "dtype") and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.eval_shape(jax.random.key_data, x)
    if not hasattr(x, "dtype"):
        x = jax.eval_shape(jax.numpy.asarray, x)
    shape = np.shape(x) if whole else _shard_shape(x)
    return math.prod(shape) * np.dtype(dtype or _dtype(x)).itemsize


def _shard_shape(x: Any) -> tuple[int, ...]:
    sharding = getattr(x, "sharding", None)
    return np.shape(x) if sharding is None else tuple(sharding.shard_shape(np.shape(x)))


def _of_a_micro_batch(x: Any, accumulate: int) -> Any:
    """A leaf of the batch as the loss function sees it on one device."""
    if np.ndim(x) == 0:
        return x
    rows, *rest = _shard_shape(x)
    return jax.ShapeDtypeStruct((rows // accumulate, *rest), _dtype(x))


def _cut(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), _dtype(x), sharding=sharding)


def _dtype(x: Any) -> Any:
    """The dtype in which jax takes an array in; a key's is its own."""
    return jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True)
