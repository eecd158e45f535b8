"""Evaluation: weighted means over held-out batches, summed on the device and read once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mpjax.core.types import Batch, MState, Params, PyTree
from mpjax.train.state import refuse_donated

EvalFn = Callable[[Params, MState, Batch], dict[str, Any]]
EvalStep = Callable[[Any, Batch], dict[str, tuple[jax.Array, jax.Array]]]


def make_eval_step(eval_fn: EvalFn) -> EvalStep:
    """A jitted `eval_step(state, batch) -> {name: (sum, weight)}`, both float32 scalars.

    It evaluates `state.averaged_params`: the moving average where the state keeps one, else the params.

    Args:
      eval_fn: `eval_fn(params, mstate, batch)` returns metrics by name, each a scalar mean over the batch or a pair
        `(sum, weight)`. A mean is given the number of rows as its weight, so that a ragged last batch counts as it should.

    Raises:
      ValueError: at the first call: what is no dict, a metric that is not a scalar, a batch without rows, or a mean over one
        whose arrays have different numbers of them.

    >>> import optax
    >>> from mpjax.core.model import Model
    >>> from mpjax.train.state import TrainState
    >>> model = Model(lambda rng, x: ({"w": jnp.ones(2)}, {}), lambda p, m, x, rng=None: (x @ p["w"], m))
    >>> state = TrainState.create(model, optax.sgd(0.1), jax.random.key(0), jnp.ones((1, 2)))
    >>> eval_step = make_eval_step(lambda p, m, x: {"mean": model.apply(p, m, x)[0].mean()})
    >>> evaluate(eval_step, state, [jnp.ones((3, 2)), jnp.zeros((1, 2))])
    {'mean': 1.5}
    """

    def eval_step(state: Any, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
        rows = [x.shape[0] for x in jax.tree.leaves(batch) if jnp.ndim(x) > 0]
        if not rows or rows[0] == 0:
            raise ValueError("an evaluation batch has 0 rows; give each at least one, or leave it out")
        found = eval_fn(state.averaged_params, state.mstate, batch)
        if not isinstance(found, Mapping):
            raise ValueError(f"eval_fn returned {found!r}; legal is a dict from name to metric: give it a name")
        return {name: _pair(name, value, rows) for name, value in found.items()}

    return jax.jit(eval_step)


def _pair(name: str, value: Any, rows: list[int]) -> tuple[jax.Array, jax.Array]:
    if not isinstance(value, tuple) and len(set(rows)) > 1:
        counts = ", ".join(map(str, sorted(set(rows))))
        raise ValueError(
            f"metric {name!r} is a mean over a batch whose arrays have {counts} rows: which it is over is not known; "
            "return (sum, weight)"
        )
    parts = value if isinstance(value, tuple) else (value, rows[0])
    if len(parts) != 2 or any(isinstance(x, (dict, list, tuple)) or jnp.ndim(x) for x in parts):
        raise ValueError(
            f"metric {name!r} has the shapes {jax.tree.map(jnp.shape, value)}; legal is a scalar mean or a pair of scalars "
            "(sum, weight); reduce it, or give each part a name of its own"
        )
    total, weight = (jnp.asarray(x).astype(jnp.float32) for x in parts)
    return (total, weight) if isinstance(value, tuple) else (total * weight, weight)


def evaluate(
    eval_step: EvalStep, state: Any, batches: Iterable[Batch], cast: Callable[[Params], Params] | None = None
) -> dict[str, float]:
    """The weighted mean of each metric over all batches.

    Args:
      eval_step: from `make_eval_step`.
      state: a `TrainState`; it is read, not donated.
      batches: held-out batches; those of one shape share a compilation.
      cast: casts params to their compute dtypes once, before the loop (`model.cast_params`), instead of in each batch.

    Returns:
      From name to mean; NaN where the total weight is zero.

    Raises:
      ValueError: no batches, or a state that was donated to a step.

    >>> eval_step = lambda state, x: {"loss": (x.sum(), jnp.float32(x.size))}  # or from make_eval_step
    >>> evaluate(eval_step, None, [jnp.ones(3), jnp.zeros(1)])
    {'loss': 0.75}
    """
    refuse_donated(state)
    if cast is not None:
        state = dataclasses.replace(state, params=jax.jit(cast)(state.averaged_params), ema=None)
    total: PyTree = None
    for batch in batches:
        found = eval_step(state, batch)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError("got no evaluation batches; give at least one")
    return {name: _ratio(float(s), float(w)) for name, (s, w) in jax.device_get(total).items()}


def _ratio(total: float, weight: float) -> float:
    return total / weight if weight else float("nan")
