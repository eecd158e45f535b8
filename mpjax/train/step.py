"""The train step: one pure function over the train state, compiled once, that applies a good update or skips a bad one whole."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mpjax.core.dtypes import wide
from mpjax.core.model import SINKS
from mpjax.core.tree import all_finite, bundled, path_of, select_tree
from mpjax.core.types import Batch, DTypeLike, Metrics, MState, Params
from mpjax.numerics.delayed import advanced, with_sinks
from mpjax.numerics.loss_scale import DynamicLossScale
from mpjax.train.accumulate import Gathered, as_stored, gather
from mpjax.train.fully_sharded import over_gathered_params
from mpjax.train.parallel import gather_apart, sum_dtype
from mpjax.train.sharding import check_rows
from mpjax.train.specs import Axis, devices_along, mesh_of, place_on, refuse_explicit_around
from mpjax.train.state import TrainState, merge_trainable, refuse_donated, split_trainable

LossFn = Callable[..., Any]


class Changed(NamedTuple):
    """What a step replaces, or, if the step is skipped, leaves as it was to the last byte."""

    params: Params
    mstate: MState
    opt_state: Any
    ema: Any


RESERVED = ("loss", "grad_norm", "grads_finite", "loss_scale", "skipped", "skipped_in_a_row", "learning_rate", SINKS)
"""Metric names that the step itself reports."""


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    clip_norm: float | None = None,
    skip: str = "nonfinite",
    donate: bool = True,
    mesh: Mesh | None = None,
    axis: Axis = "data",
    reduce_dtype: DTypeLike | None = None,
) -> TrainStep:
    """A jitted `step(state, batch) -> (state, metrics)`.

        grads  = Σ over micro-batches of float32(∇ (scale · float32 loss)) / scale
        update = optimizer(clip(grads), float32(params))
        finite = loss, |grads|, weight, new mstate and new params are all finite, and the total weight is not zero
        state  = finite ? everything new : everything old;  then scale = adjust(scale, finite)

    A skipped step leaves every byte of params, optimizer state, moving average and mstate as it was; only the loss scale
    and the skip counters move. There is no host sync and one compile for good, skipped and scale-changing steps alike.

    Histories of `dot=fp8_delayed` in mstate move on by one in a step that is applied; they meet neither clip nor optimizer.

    On several devices (a state from `shard_state`, batches from `shard_batch`) the same function is cut up by GSPMD, and
    the new state lies as the old one did. The sum of a gradient over the devices then runs in the dtype of the product
    that makes it, bfloat16 or float16 where the layer computes in that, and once in every micro-batch. With
    `reduce_dtype` each device differentiates its own rows instead, adds up its own micro-batches in float32, and there is
    one sum over the devices, after accumulation, in that dtype. What a loss function does across rows is then done within a
    device, as under accumulation within a micro-batch: means of devices are weighted by `(sum, weight)` losses; batch
    statistics are each device's own and their mean is stored; dropout differs by device (its index is folded into the rng).

    Args:
      loss_fn: `loss_fn(params, mstate, batch, rng)`, pure; returns a scalar loss or `(sum, weight)`, either alone or as
        `(loss, Aux(mstate, metrics))`. `rng` is `state.rng` with the attempt (and micro-batch) folded in.
      optimizer: the optax transformation with which the state was made. It sees float32 gradients and params.
      accumulate: cut the batch into this many micro-batches and add their gradients up in float32.
      clip_norm: scale gradients down to this global norm, after unscaling and accumulation. None and infinity: never.
      skip: what is looked at. `"nonfinite"`: all of the above. `"gradients"`: all but the new params, as PyTorch's
        GradScaler does; what an optimizer makes of finite gradients is then believed, and the step reads params and
        moments once less. `"off"`: nothing, whatever comes is applied (not with a dynamic loss scale, which lives by
        skipping).
      donate: let the new state take the old one's memory. The old state cannot be used afterwards.
      mesh: the mesh on which state and batches lie; needed for `reduce_dtype`. With it, rows that `accumulate` × devices
        does not divide are refused (GSPMD would move rows between devices instead).
      axis: the mesh axis over which the rows of a batch lie, or a tuple of them. Params that are cut over it (`fsdp`) are
        made whole where `loss_fn` takes them, once in every micro-batch; a scanned stack of layers is one param, and so
        is whole at once. One that `loss_fn` does nothing with but cast to a half dtype moves in that: the same numbers.
      reduce_dtype: in which gradients are summed over the devices, once a step: `"float32"`, or `"bfloat16"`, which moves
        half the bytes and rounds each device's gradients once, and their sum. None: as GSPMD does. With it params are made
        whole once a step, and each device gets the part of a sum that it holds of the param; `fsdp` saves the memory of
        optimizer state and of params between steps, while within one each device holds all params and all gradients.

    Returns:
      A `TrainStep`. Its metrics are scalar arrays: `loss`, `grad_norm` (unscaled, before clipping), `grads_finite`,
      `loss_scale` (the one this step ran under), `skipped` and `skipped_in_a_row` (after it), `learning_rate` where the
      optimizer tells it (`optax.inject_hyperparams`), and the loss function's own.

    Raises:
      ValueError: a setting outside these; at the first call, before compilation: an empty batch, one that `accumulate`
        does not divide, a loss that is not a scalar, or a metric with a reserved name.

    Source: Micikevicius et al., Mixed Precision Training (2018); Xu et al., GSPMD (2021).

    >>> from mpjax.core.model import Model
    >>> model = Model(lambda rng, x: ({"w": jnp.zeros(2)}, {}), lambda p, m, x, rng=None: (x @ p["w"], m))
    >>> optimizer = optax.sgd(0.5)
    >>> state = TrainState.create(model, optimizer, jax.random.key(0), jnp.ones((1, 2)))
    >>> step = make_train_step(lambda p, m, batch, rng: ((model.apply(p, m, batch)[0] - 1) ** 2).mean(), optimizer)
    >>> state, metrics = step(state, jnp.ones((4, 2)))
    >>> float(metrics["loss"]), state.params["w"].tolist()
    (1.0, [1.0, 1.0])
    """
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"got accumulate={accumulate!r}; legal is an int ≥ 1; 1 does not accumulate")
    clip_norm = float(clip_norm) if isinstance(clip_norm, jax.Array) else clip_norm  # it is compared while tracing
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"got clip_norm={clip_norm!r}; legal is a number > 0, or None for no clipping")
    if skip not in ("nonfinite", "gradients", "off"):
        raise ValueError(f"got skip={skip!r}; legal is 'nonfinite', 'gradients' or 'off'")
    reduced = sum_dtype(reduce_dtype, mesh)
    if mesh is not None:
        devices_along(mesh, axis, "the batch")
    return TrainStep(loss_fn, optimizer, accumulate, clip_norm, skip, donate, mesh, axis, reduced)


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A compiled step and what can be asked of it; made by `make_train_step`."""

    loss_fn: LossFn
    optimizer: optax.GradientTransformation
    accumulate: int
    clip_norm: float | None
    skip: str
    donate: bool
    mesh: Mesh | None = None
    axis: Axis = "data"
    reduce_dtype: np.dtype | None = None
    placed: tuple[Any, ...] = ()
    """Where each leaf of the params lies, if the state lies on a mesh."""

    def __post_init__(self) -> None:
        # Not a cached property: bound once, so that every call goes straight to jax's own dispatch.
        object.__setattr__(self, "_jitted", self._jit(self.pure))
        object.__setattr__(self, "_placed", {})

    def _jit(self, function: Callable, **options: Any) -> Any:
        return jax.jit(function, donate_argnums=(0,) if self.donate else (), **options)

    def _jitted_for(self, state: TrainState) -> Any:
        """The jitted step; on a mesh the one whose new state lies as this one does.

        Left to itself GSPMD cut what came whole (biases beside a cut kernel), and the second step was compiled again.
        """
        # Of any: who begins to count anew gives a step that lies on no mesh.
        counted = state.step, state.skipped, state.skipped_in_a_row, state.rng
        mesh = next(filter(None, map(mesh_of, counted)), None)
        if mesh is None or isinstance(state.step, jax.core.Tracer):
            return self._jitted  # type: ignore[attr-defined]
        leaves, structure = jax.tree.flatten(state)
        placement = (structure, *(getattr(x, "sharding", None) for x in leaves))
        known = self._placed  # type: ignore[attr-defined]
        if placement not in known:
            refuse_explicit_around(mesh)
            shardings = jax.tree_util.tree_map_with_path(functools.partial(place_on, mesh), state)
            placed = tuple(jax.tree.leaves(shardings.params))
            apart = self.reduce_dtype is not None
            loss_fn = self.loss_fn if apart else over_gathered_params(self.loss_fn, placed, self.axis)
            here = dataclasses.replace(self, placed=placed, loss_fn=loss_fn)
            known[placement] = self._jit(here.pure, out_shardings=(shardings, None))
        return known[placement]

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """The state after this batch, and its metrics; both are on their way, nothing waits for them."""
        refuse_donated(state)
        return self._jitted_for(state)(state, batch)

    def lower(self, state: TrainState, batch: Batch) -> Any:
        """jax's lowering of the step for these arguments (arrays or `ShapeDtypeStruct`s): `.compile()` it to see its cost."""
        return self._jitted_for(state).lower(state, batch)

    def pure(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """The step itself, neither compiled nor donating: for `jax.make_jaxpr`, for a scan over steps, for reading."""
        if self.skip == "off" and isinstance(state.loss_scale, DynamicLossScale):
            raise ValueError(
                "skip='off' came with a DynamicLossScale, which finds its scale by skipping; "
                "use skip='nonfinite', skip='gradients' or a static_loss_scale"
            )
        trained, frozen = split_trainable(state.params, state.trainable)
        found = self.gathered(state, batch)
        new, norm = self.candidate(state, found)
        finite = jnp.isfinite(norm) & jnp.isfinite(found.loss) & found.mstate_finite
        if self.skip != "gradients":  # XLA reads params and moments for it before it writes any
            finite &= all_finite(new.params if self.placed else bundled(new.params))
        weightless = jnp.array(False)
        if found.weight is not None:
            weightless = found.weight == 0
            finite &= jnp.isfinite(found.weight)  # by an infinite one every loss and gradient is zero
        if self.skip == "off":
            kept, skipped = new, jnp.zeros((), jnp.int32)
        else:
            applied = finite & ~weightless
            kept = select_tree(applied, new, Changed(trained, state.mstate, state.opt_state, state.ema))
            skipped = (~applied).astype(jnp.int32)
        scale = state.loss_scale.adjust(finite)
        after = dataclasses.replace(
            state,
            step=state.step + (1 - skipped),
            skipped=state.skipped + skipped,
            skipped_in_a_row=(state.skipped_in_a_row + skipped) * skipped,  # back to 0 by a step that is applied
            params=merge_trainable(kept.params, frozen),
            mstate=kept.mstate,
            opt_state=kept.opt_state,
            ema=kept.ema,
            # No weight says nothing about the scale: it neither grows nor shrinks.
            loss_scale=scale if found.weight is None else select_tree(weightless, state.loss_scale, scale),
        )
        return after, _metrics(state, after, found, norm)

    def gathered(self, state: TrainState, batch: Batch) -> Gathered:
        """The first half of `pure`: loss, scaled gradients and new mstate of a batch, before anything is decided."""
        trained, frozen = split_trainable(state.params, state.trainable)
        rng = jax.random.fold_in(state.rng, state.attempt)
        mstate = with_sinks(state.mstate)
        given = (self.loss_fn, trained, frozen, mstate, batch, rng, state.loss_scale, self.accumulate)
        if self.mesh is not None:
            check_rows(batch, self.mesh, self.axis, self.accumulate)
        if self.mesh is not None and self.reduce_dtype is not None:
            found = gather_apart(self.mesh, self.axis, self.placed, self.reduce_dtype, *given)
        else:
            found = gather(*given)
        moved, sinks = advanced(found.mstate, found.sinks)
        return found._replace(mstate=moved, sinks=sinks)

    def candidate(self, state: TrainState, found: Gathered) -> tuple[Changed, jax.Array]:
        """The second half: what a good step would store, of the trained params, and the norm of the unscaled gradients."""
        grads = state.loss_scale.unscale(found.grads)
        norm = optax.tree.norm(grads if self.placed else bundled(grads))
        trained, _ = split_trainable(state.params, state.trainable)
        return self._update(state, trained, found, self._clip(grads, norm)), norm

    def _clip(self, grads: Params, norm: jax.Array) -> Params:
        if self.clip_norm is None or self.clip_norm == math.inf:  # ∞ / max(norm, ∞) would be NaN, and every step a skip
            return grads
        shrink = self.clip_norm / jnp.maximum(norm, self.clip_norm)  # exactly 1 where nothing is to be clipped
        return jax.tree.map(lambda g: g * shrink.astype(g.dtype), grads)

    def _update(self, state: TrainState, trained: Params, found: Gathered, grads: Params) -> Changed:
        """What a good step would store. The optimizer works on float32 params, which are then rounded to their dtype."""
        masters = jax.tree.map(lambda x: x.astype(wide(x.dtype)), trained)
        update = optax.with_extra_args_support(self.optimizer).update  # reduce_on_plateau wants the loss
        updates, opt_state = update(grads, state.opt_state, masters, value=found.loss)
        params = jax.tree.map(lambda x, u, old: (x + u.astype(x.dtype)).astype(old.dtype), masters, updates, trained)
        mstate = found.mstate | ({SINKS: found.sinks} if SINKS in state.mstate else {})
        ema = state.ema
        if state.ema_decay is not None:
            rate = 1 - state.ema_decay
            ema = jax.tree.map(lambda mean, x: mean + rate * (x.astype(jnp.float32) - mean), ema, params)
        return Changed(params, mstate, as_stored(opt_state, state.opt_state, "the optimizer's state"), ema)

    def nonfinite_leaf(self, state: TrainState, batch: Batch) -> str | None:
        """The path of the first gradient leaf with a NaN or an infinity for this batch, or None; for an error message.

        It differentiates once more, updates nothing and leaves the state alive. The scale is the state's own.
        """
        # Handed in, not closed over: arrays of several processes cannot be constants.
        grads = jax.jit(lambda state, batch: self.gathered(state, batch).grads)(state, batch)
        keyed = jax.tree_util.tree_flatten_with_path(grads)[0]
        return next((path_of(keys) for keys, x in keyed if not bool(all_finite(x))), None)


def _metrics(before: TrainState, after: TrainState, found: Gathered, norm: jax.Array) -> Metrics:
    taken = sorted(set(found.metrics) & set(RESERVED))
    if taken:
        raise ValueError(f"loss_fn returned the metric names {taken}, which the step reports itself; rename them")
    metrics = {
        "loss": found.loss,
        "grad_norm": norm,
        "grads_finite": jnp.isfinite(norm),
        "loss_scale": jnp.asarray(before.loss_scale.loss_scale, jnp.float32),
        "skipped": after.skipped,
        "skipped_in_a_row": after.skipped_in_a_row,
    }
    told = optax.tree.get_all_with_path(after.opt_state, "learning_rate")  # also the moments of a param of that name
    rates = [x for keys, x in told if len(keys) > 1 and getattr(keys[-2], "name", None) == "hyperparams"]
    if len(rates) == 1:  # more than one: groups of params with rates of their own
        metrics["learning_rate"] = jnp.asarray(rates[0], jnp.float32)
    if SINKS in before.mstate:
        metrics[SINKS] = found.sinks
    return metrics | found.metrics
