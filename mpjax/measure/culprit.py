"""Which module made a step not finite: the first operation, forward or backward, whose infinity or NaN reached a result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from mpjax.core.dtypes import facts
from mpjax.core.model import SINKS, Model
from mpjax.core.processes import fetched
from mpjax.core.tree import path_of
from mpjax.core.types import Batch
from mpjax.measure.origins import Origin, Run, first_origin
from mpjax.train.hooks import Hook
from mpjax.train.state import TrainState, as_of
from mpjax.train.step import TrainStep


@dataclasses.dataclass(frozen=True)
class Culprit(Origin):
    """What made a step not finite. `str(culprit)` says it in a sentence.

    Args:
      path: of the module whose own operation made the first value that is not finite: in the forward pass the first
        whose result was not, in the backward pass the one through which the gradient became so. `""` is the root. Of
        an input (phase `"input"`) its name: `params/…`, `mstate/…` or `batch/…`.
      phase: `"forward"`, `"backward"`, `"update"` (the optimizer) or `"input"`.
      in_module: False for the loss function's own operations, outside of the model, and the optimizer's.
      operation: `primitive(dtypes) -> dtype`.
      kind: `"nan"`, `"+inf"` or `"-inf"`.
      amax: the largest finite magnitude that went into it; None for an input.
      loss_scale: under which the step ran.
      trips: (index, length) of each scan around it, the outermost first; length None for a while loop.
      dtype: of what it made.
      reached: the next module, in the order of the pass, that was handed the value: in the backward pass the first other
        one whose incoming gradient was not finite. None where there is no other.

    >>> print(Culprit(0, "batch/x", "input", False, "input", "nan", None))
    batch/x holds nan before the step begins: look at where it comes from
    """

    loss_scale: float = 1.0
    reached: str | None = None

    @property
    def layer(self) -> int | None:
        """The index in the innermost scan around it, whose trips are the layers of a scanned stack."""
        return self.trips[-1][0] if self.trips else None

    @property
    def where(self) -> str:
        """The module in words."""
        if self.phase == "input":
            return self.path
        if self.phase == "update":
            return "the optimizer's update"
        if not self.in_module:
            return f"{self.path} (not in a wrapped module)" if self.path else "the loss function, outside of the model"
        return self.path or "the root module"

    def __str__(self) -> str:
        if self.phase == "input":
            return f"{self.path} holds {self.kind} before the step begins: look at where it comes from"
        loops = "".join(f", iteration {i}" + (f" of {n}" if n else "") for i, n in self.trips)
        passes = "" if self.phase == "update" else f" in the {self.phase} pass"
        largest = f"largest finite operand {self.amax:.4g}" if self.amax is not None else ""
        return (
            f"first not finite{passes}: {self.where}{loops}: {self.operation} made {self.kind}, {largest}, loss scale "
            f"{_power(self.loss_scale)}{self._reached()}{self._mend()}"
        )

    def _reached(self) -> str:
        return "" if self.reached is None else f"; {self.reached or 'the root module'} was the next to get it"

    def _mend(self) -> str:
        if self.dtype != "float16" or not self.in_module:
            return ""
        rule = f"{{{self.path!r}: 'compute=float32'}}" if self.path else "another default policy"
        return f"; float16 ends at {facts('float16').max:g}: bfloat16 or float32 there has room, {rule}"


def _power(scale: float) -> str:
    exponent = math.log2(scale) if scale > 0 else 0.5
    return f"2^{exponent:.0f}" if exponent.is_integer() and scale >= 1024 else f"{scale:g}"


def diagnose(
    model: Model | None,
    state: TrainState,
    batch: Batch,
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation | None = None,
    *,
    accumulate: int = 1,
) -> Culprit | None:
    """The culprit of a step that is not finite, or None where everything is finite.

    Loss and gradient are traced as a step has them, scaled by the state's loss scale, and their jaxpr is run one operation
    at a time; of every infinity and NaN is known which operation made it from finite numbers. The earliest of those that
    reach the loss, a gradient or the new mstate is the culprit. It takes about the time of a step without jit and the
    memory of one without fusions, updates nothing and leaves the state alive.

    Each operation rounds to its own dtype, as written; compiled, XLA may have kept more digits between two of them. On a
    mesh the whole batch is looked at, as one device would; of several processes all call this, and each looks at all of it.

    Args:
      model: whose step it is. Paths are read off the program, so it is only named; None will do for a bare loss.
      state: as the step got it: its `loss_scale`, `rng` and counters decide what is run.
      batch: that of the step.
      loss_fn: as `make_train_step` takes it.
      optimizer: to look at the update too, where loss and gradients are finite.
      accumulate: as `make_train_step` takes it.

    Returns:
      A `Culprit`, or None.

    >>> import jax.numpy as jnp, mpjax
    >>> from flax import linen as nn
    >>> model = mpjax.wrap(nn.Dense(2, name="head"), "mixed_float16")
    >>> def loss_fn(params, mstate, x, rng):
    ...     return model.apply(params, mstate, x)[0].sum()
    >>> state = mpjax.TrainState.create(model, optax.sgd(0.1), jax.random.key(0), jnp.ones((1, 3)))
    >>> found = diagnose(model, state, jnp.full((4, 3), 1e5), loss_fn)
    >>> found.phase, found.path, found.operation, round(found.amax)
    ('forward', '', 'convert_element_type(float32) -> float16', 100000)
    """
    plain = TrainStep(loss_fn, optimizer or optax.identity(), accumulate, None, "nonfinite", False)
    return _diagnosed(plain, state, batch, with_update=optimizer is not None)


def _diagnosed(step: TrainStep, state: TrainState, batch: Batch, with_update: bool) -> Culprit | None:
    state, batch = fetched((state, batch))
    scale = float(np.asarray(state.loss_scale.loss_scale))
    state = dataclasses.replace(state, mstate={k: v for k, v in state.mstate.items() if k != SINKS})
    run = Run()

    def first(function: Callable, *named: tuple[str, Any]) -> tuple[Origin | None, Any]:
        """Of a function that returns (what must be finite, more): the first origin in the former, and the latter."""
        leaves = [jax.tree_util.tree_flatten_with_path(tree) for _, tree in named]
        names = [
            f"{name}/{path_of(keys)}".rstrip("/")
            for (name, _), (flat, _) in zip(named, leaves, strict=True)
            for keys, _ in flat
        ]
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*(tree for _, tree in named))
        outputs = run.evaluate(closed, [x for flat, _ in leaves for _, x in flat], names)
        watched = outputs[: len(jax.tree.leaves(shape[0]))]
        more = [output.value for output in outputs[len(watched) :]]
        structure: Any = jax.tree.structure(shape[1])
        return first_origin(watched), structure.unflatten(more)

    def gradients(params: Any, mstate: Any, batch: Any, rest: Any) -> Any:
        found = step.gathered(dataclasses.replace(rest, params=params, mstate=mstate), batch)
        return (found.loss, found.grads, found.mstate), found

    def update(state: Any, found: Any) -> Any:
        return step.candidate(state, found)[0].params, None

    inputs = (("params", state.params), ("mstate", state.mstate), ("batch", batch))
    bare = dataclasses.replace(state, params=None, mstate={}, opt_state=None, ema=None)
    origin, found = first(gradients, *inputs, ("state", bare))
    if origin is None and with_update:
        origin, _ = first(update, ("state", state), ("gradients", found))
        if origin is not None and origin.phase != "input":
            origin = dataclasses.replace(origin, phase="update")
    if origin is None:
        return None
    return Culprit(**vars(origin), loss_scale=scale, reached=run.reached.get(origin.order))


class CulpritHook(Hook):
    """Lets `fit` name the culprit when too many skips in a row stop a run; it costs nothing before.

    After the run `culprit` holds what was found.

    >>> CulpritHook().culprit is None
    True
    """

    def __init__(self) -> None:
        self.culprit: Culprit | None = None

    def on_nonfinite(self, attempt: int, metrics: dict[str, float], step: Any, state: Any, batch: Batch) -> str | None:
        step = getattr(step, "step", step)  # of a probed one, the plain
        if not isinstance(step, TrainStep):
            return None
        failed = as_of(state, attempt, metrics)
        apart = dataclasses.replace(step, mesh=None, reduce_dtype=None)
        self.culprit = _diagnosed(apart, failed, batch, with_update=True)
        return str(self.culprit) if self.culprit else "one operation at a time everything is finite"
