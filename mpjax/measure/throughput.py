"""How long a train step takes, how much of the device's arithmetic that is, and how much there could be."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.core.types import Batch
from mpjax.measure.audit import Audit
from mpjax.measure.rates import FORMATS
from mpjax.measure.timing import Clock, Timing, time_blocks
from mpjax.train.state import TrainState, refuse_donated
from mpjax.train.step import TrainStep


def time_step(
    step: TrainStep,
    state: TrainState,
    batch: Batch,
    *,
    warmup: int = 3,
    blocks: int = 5,
    steps_per_block: int = 10,
    clock: Clock = time.perf_counter,
) -> Timing:
    """Seconds that a compiled train step takes, on a batch that lies on the device.

    It runs on a copy of the state, whose result each step hands to the next, as in training: the caller's state stays
    alive, though the step donates. For as long as it runs, the state is there twice. Loading of data and reading of
    metrics are not in it.

    Args:
      step: from `make_train_step`; compiled by the first warm-up step.
      state: where to begin; neither changed nor donated.
      batch: the one batch that every step gets.
      warmup: steps before the first block; at least 1.
      blocks: how many blocks of steps are timed.
      steps_per_block: steps in each; only the last is waited for.
      clock: the clock, in seconds.

    Returns:
      A `Timing`: seconds a step of each block, their median and quartiles.

    >>> import optax
    >>> from mpjax.core.model import Model
    >>> from mpjax.train.step import make_train_step
    >>> model = Model(lambda rng, x: ({"w": jnp.zeros(2)}, {}), lambda p, m, x, rng=None: (x @ p["w"], m))
    >>> step = make_train_step(lambda p, m, x, rng: model.apply(p, m, x)[0].mean(), optax.sgd(0.1))
    >>> state = TrainState.create(model, step.optimizer, jax.random.key(0), jnp.ones((1, 2)))
    >>> len(time_step(step, state, jnp.ones((4, 2)), warmup=1, blocks=2, steps_per_block=1).seconds), int(state.step)
    (2, 0)
    """
    refuse_donated(state)
    latest = jax.tree.map(_copy, state)
    batch = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, batch)

    def call() -> Any:
        nonlocal latest
        latest, metrics = step(latest, batch)
        return latest.step, metrics

    return time_blocks(call, warmup=warmup, blocks=blocks, calls=steps_per_block, clock=clock)


def achieved(timing: Timing, found: Audit) -> float:
    """TFLOP/s of a step: the FLOPs of its matrix products and convolutions, by the median time.

    Args:
      timing: from `time_step`.
      found: `mpjax.audit(step.pure, state, batch)` of the same step. What remat computes again counts: it is computed.

    >>> import jax, jax.numpy as jnp
    >>> from mpjax.measure.audit import audit
    >>> achieved(Timing((1e-6,)), audit(jnp.matmul, jnp.ones((100, 100)), jnp.ones((100, 100))))
    2.0
    """
    return sum(found.flops_by_dtype().values()) / timing.median / 1e12


def share_of_rates(timing: Timing, found: Audit, rates: Mapping[str, float]) -> float | None:
    """The share of a step's time that its products would take at the device's measured rates, in [0, 1] or near it.

        share = Σ over dtypes of FLOPs / rate  ÷  median seconds

    It is what others call MFU, with the rate that a product reaches on this device in place of the vendor's peak, and
    where several dtypes are mixed, each at its own rate. A float32 product runs at the rate of tf32 where that was
    measured (jax's default precision on a GPU), one of two dtypes at the slower of both.

    Args:
      timing: from `time_step`.
      found: the audit of the same step.
      rates: measured TFLOP/s by format, such as those of `measure.rates`.

    Returns:
      The share; None where a dtype of the step has no rate.

    >>> import jax, jax.numpy as jnp
    >>> from mpjax.measure.audit import audit
    >>> found = audit(jnp.matmul, jnp.ones((100, 100), jnp.bfloat16), jnp.ones((100, 100), jnp.bfloat16))
    >>> share_of_rates(Timing((1e-6,)), found, {"bfloat16": 4.0})
    0.5
    """
    floor = 0.0
    for label, flops in found.flops_by_dtype().items():
        rate = _rate(label, rates)
        if rate is None:
            return None
        floor += flops / (rate * 1e12)
    return floor / timing.median


def formats_of(found: Audit) -> tuple[str, ...]:
    """The formats of `measure.rates` whose rates the share of this audit needs.

    >>> import jax, jax.numpy as jnp
    >>> from mpjax.measure.audit import audit
    >>> formats_of(audit(jnp.matmul, jnp.ones((2, 2), jnp.float32), jnp.ones((2, 2), jnp.float32)))
    ('float32', 'tf32')
    """
    wanted = set(found.flops_by_dtype())
    wanted |= {part for label in wanted if label not in FORMATS for part in label.split("×")}
    return tuple(name for name in FORMATS if name in wanted or (name == "tf32" and "float32" in wanted))


def _rate(label: str, rates: Mapping[str, float]) -> float | None:
    """The rate of the products that an audit reports under this label; None where it is not known."""
    if label in rates and label != "float32":
        return rates[label]
    found = [rates.get("tf32", rates.get(name)) if name == "float32" else rates.get(name) for name in label.split("×")]
    known = [rate for rate in found if rate is not None]
    return min(known) if len(known) == len(found) else None


def _copy(x: Any) -> Any:
    """A copy that lies where the array lies."""
    return jax.device_put(jnp.copy(x), x.sharding) if isinstance(x, jax.Array) else x
