"""Delayed scaling: a float8 product whose scales come from what its tensors were in the steps before.

Current scaling reads a tensor twice: for its largest magnitude, and, that known, for rounding. Here the scales are known
before the tensor is there, so it is rounded where it is made; its magnitude is written down beside that, for later.
(What XLA makes of it is another matter: one step of GPT-2 124M took 39.5 ms on an H100, and 39.0 with current scaling;
experiments/records/2026-11-24-bench-h100.)

    state    for each dense layer, of x, w and g: the exponents of the largest magnitude in the last 16 steps
    scale    from the largest of them; what grows by less than a factor of 1.75 fits, what grows by 3.5 saturates
    leaves   the backward pass as the cotangent of a sink: a one at this step's exponent, for each of the three

Exponents are counted rather than magnitudes compared, because cotangents of one sink add up: over the layers of a scan,
micro-batches and devices. The highest exponent of a sum of counts is that of the largest magnitude, and a scale that
is a power of two needs to know no more. (Flax lets its scales add up by a dtype of its own, whose sum is the maximum.)
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.core.dtypes import facts
from mpjax.core.model import SINKS
from mpjax.core.types import DTypeLike, MState, PyTree
from mpjax.numerics.dot import (
    BACKWARD,
    FORWARD,
    Numbers,
    QuantizedDot,
    fits_tiles,
    float8_product,
    gradients,
    like,
    plain,
)
from mpjax.numerics.quantize import exponent, largest, scale_for_exponent, to_float8_or_nan
from mpjax.numerics.varying import varying_alike

COLLECTION = "fp8_history"
"""Of `mstate`: the histories, by module path. Its namesake in the reserved collection holds this step's counts."""

LEAF = "exponents"

STEPS = 16
"""How long a history remembers. (By default 1,024 steps in Transformer Engine 2 and in Flax 0.12.)"""

EXPONENTS = 256

START = (130, 127, 127)
"""For the first step, which knows nothing yet, of x, w and g: stored exponents of magnitudes under 16, 2 and 2.

e4m3 then holds x from 2^-13 to 28 and w from 2^-16 to 3.5, and e5m2 holds g from 2^-30 to 3.5: gradients of a mean loss are
small, and one that saturates is one step's.
"""

LOWEST = 64
"""Under 2^-62 no tensor is looked for."""


@dataclasses.dataclass(frozen=True)
class DelayedDot:
    """`QuantizedDot("fp8")` with delayed scales for the layer at `path`, where the model that runs keeps a history of it.

    >>> DelayedDot("layers/0/up").path
    'layers/0/up'
    """

    path: str

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: DTypeLike | None = None,
        *,
        out_sharding: Any = None,
    ) -> jax.Array:
        """As `QuantizedDot`: with current scales where there is no history, as for bare params in evaluation."""
        numbers, known = plain(dimension_numbers), _running.get().get(self.path)
        if known is None or out_sharding is not None or not fits_tiles(rhs.shape, numbers):
            return QuantizedDot("fp8")(
                lhs, rhs, numbers, precision, preferred_element_type, out_sharding=out_sharding
            )  # fmt: skip
        out = jnp.dtype(preferred_element_type or jnp.promote_types(lhs.dtype, rhs.dtype))
        return _delayed_dot(*varying_alike(lhs, rhs, *known), numbers, out)


def histories(paths: Iterable[str]) -> PyTree:
    """What `mstate` keeps for the layers at these paths: nested by path, float32 `[3, 16]` for x, w and g.

    A positive number is a stored exponent that was seen, a negative one that to begin with, 0 nothing.

    >>> histories(["up"])["up"]["exponents"][:, :2].tolist()
    [[-130.0, 0.0], [-127.0, 0.0], [-127.0, 0.0]]
    """
    tree: dict[str, Any] = {}
    for path in paths:
        node = tree
        for segment in path.split("/") if path else []:
            node = node.setdefault(segment, {})
        start = np.zeros((3, STEPS), np.float32)
        start[:, 0] = -np.array(START)
        node[LEAF] = jnp.asarray(start)
    return tree


@contextlib.contextmanager
def scaled_by(mstate: MState) -> Iterator[None]:
    """For the length of a call of the model, its `DelayedDot`s find their histories and sinks in this `mstate`."""
    known = _by_path(mstate.get(COLLECTION, {}))
    sinks = _by_path(mstate.get(SINKS, {}).get(COLLECTION, {}))
    token = _running.set({path: (history, sinks.get(path, _no_counts())) for path, history in known.items()})
    try:
        yield
    finally:
        _running.reset(token)


def with_sinks(mstate: MState) -> MState:
    """`mstate` with a sink for each history that it holds, for a step to differentiate; itself where there is none."""
    if COLLECTION not in mstate:
        return mstate
    sinks = jax.tree.map(lambda _: _no_counts(), mstate[COLLECTION])
    return {**mstate, SINKS: {**mstate.get(SINKS, {}), COLLECTION: sinks}}


def advanced(mstate: MState, sinks: Mapping[str, PyTree]) -> tuple[MState, Mapping[str, PyTree]]:
    """What a step leaves behind: the histories moved on by one step, and the sinks without those of the histories.

    Args:
      mstate: with the histories that the step began with.
      sinks: what came back for the reserved collection.
    """
    if COLLECTION not in mstate:
        return mstate, sinks
    moved = jax.tree.map(_moved, mstate[COLLECTION], sinks[COLLECTION])
    return {**mstate, COLLECTION: moved}, {name: tree for name, tree in sinks.items() if name != COLLECTION}


def _moved(history: jax.Array, counts: jax.Array) -> jax.Array:
    """The history of the next step.

    What looked like zeros for as long as a history remembers may be zeros or too small for its scale: the next steps
    begin 2^16 lower. (All of it forgotten, they would begin at 2^-126 and saturate for 40 steps.)
    """
    seen = jnp.where(counts > 0, jnp.arange(EXPONENTS, dtype=jnp.float32)[None], jnp.zeros_like(counts)).max(-1)
    kept = history[:, :-1]
    unknown = (seen == 0) & (kept == 0).all(1)
    lower = jnp.maximum(_expected(history) - STEPS, jnp.full_like(seen, LOWEST))
    return jnp.concatenate([jnp.where(unknown, -lower, seen)[:, None], kept], axis=1)


def _no_counts() -> jax.Array:
    return jnp.zeros((3, EXPONENTS), jnp.float32)


def _by_path(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The leaves of what `histories` makes, by module path."""
    found: dict[str, Any] = {}
    for name, node in tree.items():
        if name == LEAF:
            found[above] = node
        else:
            found |= _by_path(node, f"{above}/{name}" if above else name)
    return found


_running: contextvars.ContextVar[Mapping[str, tuple]] = contextvars.ContextVar("histories and sinks", default={})  # noqa: B039


def _scales(history: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of x, w and g: from the largest exponent that was seen, or that to begin with."""
    expected = _expected(history).astype(jnp.int32)
    x, w, g = (scale_for_exponent(expected[i], dtype) for i, dtype in enumerate((FORWARD, FORWARD, BACKWARD)))
    return x, w, g


def _expected(history: jax.Array) -> jax.Array:
    seen = history.max(1)
    return jnp.where(seen > 0, seen, -history.min(1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _delayed_dot(
    lhs: jax.Array, rhs: jax.Array, history: jax.Array, sink: jax.Array, numbers: Numbers, out: np.dtype
) -> jax.Array:
    return _forward(lhs, rhs, history, sink, numbers, out)[0]


def _forward(
    lhs: jax.Array, rhs: jax.Array, history: jax.Array, sink: jax.Array, numbers: Numbers, out: np.dtype
) -> tuple[jax.Array, tuple]:
    x_scale, w_scale, g_scale = _scales(history)
    x, w = to_float8_or_nan(lhs, x_scale, FORWARD), to_float8_or_nan(rhs, w_scale, FORWARD)
    scales, seen = (x_scale, w_scale, g_scale), (_seen(x, x_scale, FORWARD), _seen(w, w_scale, FORWARD))
    kept = (x, w, scales, *seen, (like(lhs), like(rhs)))
    return float8_product(x, w, x_scale * w_scale, numbers, out), kept


def _backward(numbers: Numbers, out: np.dtype, kept: tuple, cotangent: jax.Array) -> tuple:
    x, w, (x_scale, w_scale, g_scale), x_seen, w_seen, (lhs, rhs) = kept
    g = to_float8_or_nan(cotangent, g_scale, BACKWARD)
    dtypes = (lhs.dtype, rhs.dtype)
    by_lhs, by_rhs = gradients(g, x, w, g_scale * w_scale, g_scale * x_scale, numbers, dtypes)
    seen = jnp.stack([x_seen, w_seen, _seen(g, g_scale, BACKWARD)])
    counts = (jnp.arange(EXPONENTS)[None] == seen[:, None]).astype(jnp.float32)
    return by_lhs, by_rhs, jnp.zeros_like(counts[:, :STEPS]), counts


def _seen(q: jax.Array, scale: jax.Array, dtype: np.dtype) -> jax.Array:
    """The stored exponent of a tensor's largest magnitude, read off its eight bits: half the bytes, and no second pass.

    One that is saturated is taken for four times as large as it looks: so a scale follows what grows.
    """
    most = largest(jax.lax.optimization_barrier(q))  # or XLA writes x out to read it for this and for rounding
    saturated = most >= np.float32(facts(dtype).max)
    return jnp.minimum(exponent(most * scale) + jnp.where(saturated, 2, 0), EXPONENTS - 1)


_delayed_dot.defvjp(_forward, _backward)
