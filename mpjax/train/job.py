"""A job: all that is needed to train, audit or compare one model, as one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from mpjax.core.model import Model
from mpjax.core.types import Batch
from mpjax.train.state import Trainable, TrainState
from mpjax.train.step import TrainStep, make_train_step


@dataclasses.dataclass(frozen=True)
class Job:
    """A model with its loss, optimizer and data: what a `module:function` target of the command line returns.

    Args:
      model: the pair of pure functions.
      loss_fn: as `make_train_step` takes it.
      optimizer: an optax transformation.
      batches: from attempt to batch, pure, so that a run that is resumed sees the same data.
      sample: inputs for `model.init`, a tuple as the model takes them.
      eval_fn: as `make_eval_step` takes it, or None.
      eval_batches: the held-out batches.
      trainable: which params are trained, as `TrainState.create` takes it. None: all.

    Raises:
      ValueError: the sample is no tuple.

    >>> import jax.numpy as jnp
    >>> model = Model(lambda rng, x: ({"w": jnp.zeros(2)}, {}), lambda p, m, x, rng=None: (x @ p["w"], m))
    >>> job = Job(model, lambda p, m, x, rng: model.apply(p, m, x)[0].mean(), optax.sgd(0.1), lambda n: jnp.ones((4, 2)),
    ...           sample=(jnp.ones((1, 2)),))
    >>> int(job.state(jax.random.key(0)).step)
    0
    """

    model: Model
    loss_fn: Callable[..., Any]
    optimizer: optax.GradientTransformation
    batches: Callable[[int], Batch]
    sample: tuple = ()
    eval_fn: Callable[..., Any] | None = None
    eval_batches: Sequence[Batch] = ()
    trainable: Trainable = None

    def __post_init__(self) -> None:
        # An array would be spread over its rows, and a dict over its keys.
        if not isinstance(self.sample, tuple | list):
            raise ValueError(
                f"got a {type(self.sample).__name__} for sample=; legal is a tuple, as the model takes its inputs: sample=(x,)"
            )

    def state(self, rng: jax.Array, **options: Any) -> TrainState:
        """A fresh `TrainState`; `options` are those of `TrainState.create`, and one that is given here counts."""
        options = {"trainable": self.trainable} | options
        return TrainState.create(self.model, self.optimizer, rng, *self.sample, **options)

    def step(self, **options: Any) -> TrainStep:
        """A train step; `options` are those of `make_train_step`."""
        return make_train_step(self.loss_fn, self.optimizer, **options)
