"""The train state: everything a step reads and writes, as one pytree; and what a loss function hands out beside a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpjax.core.dtypes import is_float
from mpjax.core.model import Model
from mpjax.core.struct import pytree_dataclass, static_field
from mpjax.core.tree import cast_floating, cast_like, path_of
from mpjax.core.types import DTypeLike, MState, Params, PyTree
from mpjax.numerics.loss_scale import LossScale, NoOpLossScale, dynamic_loss_scale
from mpjax.policy.patterns import governs
from mpjax.policy.policy import computes_in
from mpjax.train.advice import check_loss_scale, check_optimizer

Trainable = str | Sequence[str] | Callable[[str, Any], bool] | None


class Aux(NamedTuple):
    """What a loss function returns beside its loss: the new `mstate`, and metrics by name (scalars).

    >>> Aux({}, {"accuracy": 0.5}).metrics["accuracy"]
    0.5
    """

    mstate: MState
    metrics: dict[str, Any] = {}  # noqa: RUF012 - the default of a NamedTuple, which nothing writes to


@pytree_dataclass
class TrainState:
    """All that training changes. A plain pytree: save it, shard it, map over it.

    Args:
      step: int32 scalar, updates applied; optax schedules count the same.
      skipped: int32 scalar, updates skipped in all.
      skipped_in_a_row: int32 scalar, skipped since the last applied one.
      params: the master weights, in the param dtype.
      mstate: collections that change but are not trained.
      opt_state: the optimizer's state, of the trainable params.
      loss_scale: a `NoOpLossScale`, `StaticLossScale` or `DynamicLossScale`.
      rng: a key; never changes. The step folds `attempt` into it.
      ema: float32 moving average of the trainable params, or None.
      trainable: static; one bool for each leaf of params, or None where all are trained.
      ema_decay: static; the decay of `ema`, or None.

    >>> model = Model(lambda rng, x: ({"w": jnp.zeros(3)}, {}), lambda p, m, x, rng=None: (x @ p["w"], m))
    >>> state = TrainState.create(model, optax.sgd(0.1), jax.random.key(0), jnp.ones(3))
    >>> jax.tree.map(jnp.shape, state.params), int(state.attempt)
    ({'w': (3,)}, 0)
    """

    step: Any
    skipped: Any
    skipped_in_a_row: Any
    params: Params
    mstate: MState
    opt_state: Any
    loss_scale: Any
    rng: Any
    ema: Any = None
    trainable: tuple[bool, ...] | None = static_field(default=None)
    ema_decay: float | None = static_field(default=None)

    @classmethod
    def create(
        cls,
        model: Model,
        optimizer: optax.GradientTransformation,
        rng: jax.Array,
        *sample: Any,
        params: Params | None = None,
        mstate: MState | None = None,
        loss_scale: LossScale | None = None,
        trainable: Trainable = None,
        ema_decay: float | None = None,
        optimizer_dtype: DTypeLike | None = "float32",
        **init_kwargs: Any,
    ) -> TrainState:
        """A state at step 0. Nothing in it shares memory with what the caller passed, so a donated step frees only its own.

        Args:
          model: the pair of pure functions that is trained.
          optimizer: any optax transformation.
          rng: a key; one half seeds `model.init`, the other becomes `state.rng`.
          *sample: inputs for `model.init`, as the model takes them.
          params: start from these instead of the initial ones (same paths and shapes; cast to the param dtype).
          mstate: start from this instead of the initial one.
          loss_scale: None: a dynamic one if the model's policy computes anything in float16, else none.
          trainable: which params are trained: globs over their paths, in the language of a `PolicyMap` (`"head"`,
            `"**/bias"`; each means what is below it too), or a predicate of path and leaf. The others have no gradient
            and no optimizer state. None: all.
          ema_decay: keep an exponential moving average of the trainable params with this decay, in (0, 1).
          optimizer_dtype: the optimizer's state is made from params cast to this; None: from params as they are.
          **init_kwargs: passed to `model.init`.

        Raises:
          ValueError: `params` with a missing, extra or misshapen leaf (its path and numbers are named), a `trainable`
            that matches nothing, a complex param among those that are trained, a decay outside (0, 1), or a number for
            the loss scale.
          TypeError: a Flax module in place of a `Model`.

        >>> model = Model(lambda rng, x: ({"w": jnp.zeros(3)}, {}), lambda p, m, x, rng=None: (x @ p["w"], m))
        >>> state = TrainState.create(model, optax.adam(1e-3), jax.random.key(0), jnp.ones(3))
        >>> int(state.step), state.loss_scale
        (0, NoOpLossScale())
        """
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"got ema_decay={ema_decay}; legal is a number between 0 and 1, or None for no average")
        if not isinstance(model, Model):  # a Linen module has an `init` and an `apply` too
            raise TypeError(
                f"got a {type(model).__name__} for the model; legal is a mpjax.Model: mpjax.wrap(module, policy) makes one, "
                "and bare functions do by mpjax.Model(init, apply)"
            )
        init_rng, step_rng = jax.random.split(rng)
        found, found_mstate = jax.jit(lambda key: model.init(key, *sample, **init_kwargs))(init_rng)
        if params is not None:
            found = fitted(params, found)
        found = own_copy(found)
        mask = _trainable_mask(found, trainable)
        trained = split_trainable(found, mask)[0]
        view = trained if optimizer_dtype is None else cast_floating(trained, optimizer_dtype)
        if loss_scale is None:
            loss_scale = dynamic_loss_scale() if computes_in(model.policy, "float16") else NoOpLossScale()
        check_loss_scale(model.policy, loss_scale)
        opt_state = own_copy(optimizer.init(view))
        check_optimizer(optimizer, trained, view)
        return cls(
            step=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            skipped_in_a_row=jnp.zeros((), jnp.int32),
            params=found,
            mstate=own_copy(found_mstate if mstate is None else mstate),
            opt_state=opt_state,
            loss_scale=own_copy(loss_scale),
            rng=step_rng,
            ema=None if ema_decay is None else own_copy(cast_floating(trained, "float32")),
            trainable=mask,
            ema_decay=ema_decay,
        )

    @property
    def attempt(self) -> jax.Array:
        """`step + skipped`: indexes the data and is folded into the rng, so that a bad batch is not fed for ever."""
        return self.step + self.skipped

    @property
    def averaged_params(self) -> Params:
        """What to evaluate: the moving average in the param dtypes where there is one, else the params."""
        if self.ema is None:
            return self.params
        trained, frozen = split_trainable(self.params, self.trainable)
        return merge_trainable(cast_like(self.ema, trained), frozen)


def refuse_donated(state: Any) -> None:
    """An error, in our words and not in jax's of one deleted array, if an earlier step took the state's memory."""
    step = getattr(state, "step", None)
    if isinstance(step, jax.Array) and not isinstance(step, jax.core.Tracer) and step.is_deleted():
        raise ValueError(
            "this TrainState was donated to an earlier step and is gone; go on with the state which that step "
            "returned, or make the step with donate=False"
        )


def attempts_made(state: Any) -> int:
    """`state.attempt` on the host; read explicitly, as a transfer guard wants it."""
    refuse_donated(state)
    return sum(int(x) for x in jax.device_get((state.step, state.skipped)))


def as_of(state: TrainState, attempt: int, metrics: dict[str, float]) -> TrainState:
    """The state under which a skipped attempt ran: the loop is a step ahead, and the scale has moved since."""
    scale, at = state.loss_scale, metrics.get("loss_scale")
    if at is not None and hasattr(scale, "counter"):
        scale = dataclasses.replace(scale, loss_scale=jnp.float32(at))
    skipped = jnp.int32(attempt) - state.step
    return dataclasses.replace(state, loss_scale=scale, skipped=skipped)


def own_copy(tree: PyTree) -> PyTree:
    """Every leaf as a fresh, strongly typed array: it shares no buffer, and no Python number hides in it."""

    def leaf(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        return jnp.copy(x) if x.dtype == jax.dtypes.float0 or not _is_weak(x) else jnp.array(x, x.dtype, copy=True)

    return jax.tree.map(leaf, tree)


def _is_weak(x: jax.Array) -> bool:
    return bool(getattr(x, "weak_type", False))


def split_trainable(params: Params, mask: tuple[bool, ...] | None) -> tuple[Params, Params]:
    """(trained, frozen): both with the structure of `params`, each with None where the other has the leaf."""
    if mask is None:
        return params, jax.tree.map(lambda x: None, params)
    leaves = jax.tree.leaves(params)
    structure: Any = jax.tree.structure(params)
    chosen = [x if keep else None for x, keep in zip(leaves, mask, strict=True)]
    rest = [None if keep else x for x, keep in zip(leaves, mask, strict=True)]
    return structure.unflatten(chosen), structure.unflatten(rest)


def merge_trainable(trained: Params, frozen: Params) -> Params:
    """The inverse of `split_trainable`."""
    return jax.tree.map(lambda x, y: y if x is None else x, trained, frozen, is_leaf=lambda x: x is None)


def _trainable_mask(params: Params, trainable: Trainable) -> tuple[bool, ...] | None:
    if trainable is None and all(is_float(x) for x in jax.tree.leaves(params)):
        return None
    keyed = [(path_of(keys), x) for keys, x in jax.tree_util.tree_flatten_with_path(params)[0]]
    if trainable is None:
        mask = (True,) * len(keyed)
    elif callable(trainable):
        mask = tuple(bool(trainable(path, x)) for path, x in keyed)
    else:
        globs = [trainable] if isinstance(trainable, str) else list(trainable)
        unused = [glob for glob in globs if not any(governs(glob, path, {}) for path, _ in keyed)]
        if unused:  # a misspelt one would freeze in silence what it meant
            raise ValueError(f"trainable={unused} matches no param; the paths are {', '.join(p for p, _ in keyed)}")
        mask = tuple(any(governs(glob, path, {}) for glob in globs) for path, _ in keyed)
    chosen = [(path, x) for keep, (path, x) in zip(mask, keyed, strict=True) if keep]
    twofold = [path for path, x in chosen if jnp.issubdtype(x.dtype, jnp.complexfloating)]
    if twofold:  # it has a gradient, and to leave it out would freeze it in silence
        raise ValueError(
            f"the params {', '.join(twofold)} are complex, and a step trains real ones; keep real and imaginary part as two "
            "params, or leave them out of trainable="
        )
    mask = tuple(keep and is_float(x) for keep, (_, x) in zip(mask, keyed, strict=True))  # an int has no gradient
    if not any(mask):
        raise ValueError(f"trainable={trainable!r} matches no param; the paths are {', '.join(p for p, _ in keyed)}")
    return mask


def fitted(params: Params, reference: Params) -> Params:
    """`params` in the structure and the float dtypes of `reference`; refused if a path is missing or extra, or misshapen."""
    # By the spelling of the tree itself: `a_1` and `a/1` have one canonical path and may both be there.
    given, wanted = (
        {jax.tree_util.keystr(k): (path_of(k), x) for k, x in jax.tree_util.tree_flatten_with_path(t)[0]}
        for t in (params, reference)
    )
    missing, extra = (sorted(a[key][0] for key in a.keys() - b.keys()) for a, b in ((wanted, given), (given, wanted)))
    if missing or extra:
        raise ValueError(
            f"params do not fit the model: missing {missing or 'nothing'}, extra {extra or 'nothing'}; "
            "rename or drop them, or change the model"
        )
    leaves = []
    for key, (path, ref) in wanted.items():
        x = given[key][1]
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_deleted():
            raise ValueError(
                f"params: {path} was donated to an earlier step and is gone; take params from the state which that step "
                "returned, or copy them before"
            )
        if jnp.shape(x) != ref.shape:
            raise ValueError(
                f"params do not fit the model: {path} has shape {jnp.shape(x)}, the model wants {ref.shape}; "
                "reshape it, or change the model"
            )
        # A number or an int becomes a float, so that it trains.
        leaves.append(jnp.asarray(x, ref.dtype) if is_float(ref) else x)
    return jax.tree.unflatten(jax.tree.structure(reference), leaves)
