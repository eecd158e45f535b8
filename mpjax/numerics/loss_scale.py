"""Loss scales as pytrees: scale, unscale, adjust. Names and shape are jmp's; the arithmetic is float32."""

from __future__ import annotations

import dataclasses
import math
import operator
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.core.dtypes import facts, is_float, wide
from mpjax.core.struct import pytree_dataclass, static_field
from mpjax.core.tree import all_finite, select_tree

__all__ = [
    "DynamicLossScale",
    "LossScale",
    "NoOpLossScale",
    "StaticLossScale",
    "all_finite",
    "dynamic_loss_scale",
    "select_tree",
    "static_loss_scale",
]

T = TypeVar("T")
_NEVER = 2**31
_FLOAT32 = facts("float32")

CEILING = 2.0**24
"""The largest scale that growth reaches by default (NVIDIA Apex's `max_loss_scale`): float16 gains nothing above it."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NoOpLossScale:
    """No scale: what bfloat16, float32 and float8 want. It has no leaves and adds no operation to the step.

    >>> NoOpLossScale().scale(3.0)
    3.0
    """

    @property
    def loss_scale(self) -> int:
        return 1

    def scale(self, tree: T) -> T:
        return tree

    def unscale(self, tree: T) -> T:
        return tree

    def adjust(self, grads_finite: jax.Array) -> NoOpLossScale:
        del grads_finite
        return self


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StaticLossScale:
    """A constant scale. It has no leaves: another scale is another compiled step (jmp's meaning).

    >>> StaticLossScale(4.0).unscale(jnp.float16(2.0))
    Array(0.5, dtype=float32)
    """

    loss_scale: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_scale", _static_float(self.loss_scale))  # 1024 and np.float32(1024) hash alike

    def scale(self, tree: T) -> T:
        return _times(tree, self.loss_scale)

    def unscale(self, tree: T) -> T:
        return _over(tree, self.loss_scale)

    def adjust(self, grads_finite: jax.Array) -> StaticLossScale:
        del grads_finite
        return self


@pytree_dataclass
class DynamicLossScale:
    """A scale that finds the largest value under which gradients stay finite.

        adjust(finite):
          if not finite:              counter = 0; loss_scale = max(floor, loss_scale * backoff)
          elif counter + 1 >= period: counter = 0; loss_scale = min(loss_scale * factor, ceiling)
          else:                       counter += 1

    so it grows *on* the `period`-th good step in a row (PyTorch's meaning). Two leaves, `[loss_scale, counter]`; all else
    is static and survives flattening. The constructor has jmp's shape: it warns and never raises; `dynamic_loss_scale`
    checks its settings and is what mpjax's own documentation uses. On purpose unlike jmp: `min_loss_scale` is a static
    float (jmp forgets it in `tree_flatten`), growth stops at `max_loss_scale` (jmp climbs to the float32 limit), the
    product with a half-precision tree is float32, and `backoff_factor` may differ from `1 / factor`.

    Args:
      loss_scale: float32 scalar, the scale now.
      counter: int32 scalar, good steps since the last change.
      period: good steps in a row before growth.
      factor: by which it grows, and shrinks unless `backoff_factor` is given.
      min_loss_scale: the floor; may be under 1.
      max_loss_scale: growth stops here; a scale that starts above it only shrinks.
      backoff_factor: by which it shrinks; None means `1 / factor`.

    Source: Micikevicius et al., Mixed Precision Training (2018).

    >>> scale = DynamicLossScale(jnp.float32(8.0), period=1)
    >>> scale.adjust(jnp.array(True)).loss_scale, scale.adjust(jnp.array(False)).loss_scale
    (Array(16., dtype=float32), Array(4., dtype=float32))
    """

    loss_scale: Any
    counter: Any = dataclasses.field(default_factory=lambda: np.zeros([], np.int32))
    period: int = static_field(default=2000)
    factor: float = static_field(default=2)
    min_loss_scale: Any = static_field(default=1.0)
    max_loss_scale: Any = static_field(default=CEILING)
    backoff_factor: float | None = static_field(default=None)

    def __post_init__(self) -> None:
        _warn_if_not_floating(self.loss_scale, "loss_scale")
        _warn_if_not_floating(self.min_loss_scale, "min_loss_scale")
        for bound in ("min_loss_scale", "max_loss_scale"):
            object.__setattr__(self, bound, _static_float(getattr(self, bound)))

    def scale(self, tree: T) -> T:
        return _times(tree, self.loss_scale)

    def unscale(self, tree: T) -> T:
        return _over(tree, self.loss_scale)

    def adjust(self, grads_finite: jax.Array) -> DynamicLossScale:
        """The next state, given whether the gradients of this step were finite (a bool scalar)."""
        assert jnp.ndim(grads_finite) == 0, "Expected boolean scalar"
        scale, counter = jnp.asarray(self.loss_scale, jnp.float32), jnp.asarray(self.counter, jnp.int32)
        backoff: Any = 1 / self.factor if self.backoff_factor is None else self.backoff_factor
        # In float32: numpy's float64 would stay one under x64.
        factor, backoff = (jnp.asarray(x, jnp.float32) for x in (self.factor, backoff))
        ceiling = jnp.maximum(scale, min(self.max_loss_scale, float(jnp.finfo(jnp.float32).max)))
        # A restored counter may be past a period that is shorter now; one that no int32 reaches is never past.
        due = counter >= min(self.period, _NEVER) - 1
        grown = jnp.where(due, jnp.minimum(scale * factor, ceiling), scale)
        shrunk = jnp.maximum(scale * backoff, self.min_loss_scale)
        return dataclasses.replace(
            self,
            loss_scale=jnp.where(grads_finite, grown, shrunk),
            counter=jnp.where(grads_finite & ~due, counter + 1, 0),
        )


LossScale = NoOpLossScale | StaticLossScale | DynamicLossScale
"""The type of any loss scale: what `TrainState.loss_scale` holds and `scaled_value_and_grad` takes."""


def dynamic_loss_scale(
    initial: float = 2.0**15,
    *,
    growth_interval: int = 2000,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    floor: float = 2.0**-14,
    ceiling: float = CEILING,
) -> DynamicLossScale:
    """A checked `DynamicLossScale` with strong leaves, ready for a train state.

    Args:
      initial: the first scale, > 0 and finite.
      growth_interval: good steps in a row before it grows, ≥ 1.
      growth_factor: > 1.
      backoff_factor: between 0 and 1.
      floor: it never shrinks below; > 0. The default is float16's smallest normal number.
      ceiling: it never grows above; finite, ≥ floor.

    Raises:
      ValueError: a setting outside these bounds.

    >>> dynamic_loss_scale(2.0**10).loss_scale
    Array(1024., dtype=float32)
    """
    _require("initial", initial, "a positive float32 number", _FLOAT32.tiny <= initial <= _FLOAT32.max)
    _require(
        "growth_interval", growth_interval, "an int ≥ 1", 1 <= growth_interval < math.inf and growth_interval % 1 == 0
    )
    _require("growth_factor", growth_factor, "a finite number > 1", 1 < growth_factor < math.inf)
    _require("backoff_factor", backoff_factor, "a number between 0 and 1", 0 < backoff_factor < 1)
    _require("floor", floor, "a positive float32 number", _FLOAT32.tiny <= floor <= _FLOAT32.max)
    _require("ceiling", ceiling, f"a finite number ≥ floor ({floor})", floor <= ceiling < math.inf)
    _require("initial", initial, f"at least floor ({floor})", initial >= floor)
    return DynamicLossScale(
        jnp.float32(initial), jnp.int32(0), int(growth_interval), float(growth_factor), floor, ceiling, backoff_factor
    )


def static_loss_scale(scale: float) -> StaticLossScale:
    """A checked `StaticLossScale`; its scale is a Python float.

    Raises:
      ValueError: not a finite number > 0.

    >>> static_loss_scale(1024).loss_scale
    1024.0
    """
    _require("scale", scale, "a positive float32 number", _FLOAT32.tiny <= scale <= _FLOAT32.max)
    return StaticLossScale(float(scale))


def _require(name: str, value: Any, legal: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"loss scale: got {name}={value!r}; legal is {legal}; leave it out for the default")


def at_least_float32(x: Any) -> Any:
    """A float array in float32 or wider; anything else as it is."""
    return x.astype(wide(x.dtype)) if is_float(x) else x


def _times(tree: T, scale: Any) -> T:
    return jax.tree.map(lambda x: _act(operator.mul, x, scale), tree)


def _over(tree: T, scale: Any) -> T:
    # A product with 1 / scale would be zero for the largest scales: XLA flushes subnormal numbers.
    return jax.tree.map(lambda x: _act(operator.truediv, x, scale), tree)


def _act(operation: Callable[[Any, Any], Any], x: Any, scale: Any) -> Any:
    """The scale acts in float32 or wider on a float or complex array or a Python number; any other leaf passes."""
    if not (jnp.issubdtype(x.dtype, jnp.inexact) if hasattr(x, "dtype") else type(x) in (int, float)):
        return x
    dtype = wide(getattr(x, "dtype", jnp.float32))
    return operation(jnp.asarray(x, dtype), jnp.asarray(scale, dtype))


def _static_float(x: Any) -> Any:
    """A Python float, so that it can be static; a tracer or placeholder stays what it is (constructors never raise)."""
    try:
        return float(x)
    except (TypeError, ValueError):  # jax's error for a tracer is a TypeError
        return x


def _warn_if_not_floating(x: Any, name: str) -> None:
    if not hasattr(x, "dtype") and not isinstance(x, (int, float, complex)):
        return  # a placeholder: jax, Orbax and shardings stand in for arrays
    dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        warnings.warn(f"Expected floating type for {name}, got {dtype}", stacklevel=4)
