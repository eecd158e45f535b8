"""The ResNet by hand: what a careful user of JAX writes without mpjax. Flax's own dtype arguments, optax, jit, donation."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from experiments.bench import data
from experiments.bench.program import Program
from experiments.bench.rows import ResNet as Work, Settings, Side


class Bottleneck(nn.Module):
    width: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BxHxWxC, train):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        strides = (self.stride, self.stride)
        y_BxHxWxC = nn.relu(norm(name="norm1")(conv(self.width, (1, 1), name="conv1")(x_BxHxWxC)))
        y_BxHxWxC = conv(self.width, (3, 3), strides, padding=1, name="conv2")(y_BxHxWxC)
        y_BxHxWxC = nn.relu(norm(name="norm2")(y_BxHxWxC))
        y_BxHxWxC = conv(4 * self.width, (1, 1), name="conv3")(y_BxHxWxC)
        y_BxHxWxC = norm(name="norm3", scale_init=nn.initializers.zeros)(y_BxHxWxC)
        if x_BxHxWxC.shape != y_BxHxWxC.shape:
            x_BxHxWxC = conv(4 * self.width, (1, 1), strides, name="shortcut")(x_BxHxWxC)
            x_BxHxWxC = norm(name="shortcut_norm")(x_BxHxWxC)
        return nn.relu(x_BxHxWxC + y_BxHxWxC)


class ResNet(nn.Module):
    """The same modules under the same names as mpjax's side: the same key makes the same params."""

    work: Work
    dtype: Any

    @nn.compact
    def __call__(self, x_BxHxWxC, train=True):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        stem = nn.Conv(self.work.width, (7, 7), (2, 2), padding=3, use_bias=False, dtype=self.dtype, name="stem")
        x_BxHxWxC = nn.relu(norm(name="norm")(stem(x_BxHxWxC)))
        x_BxHxWxC = nn.max_pool(x_BxHxWxC, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.work.stages):
            for n in range(blocks):
                width, stride = self.work.width * 2**stage, 2 if stage and not n else 1
                x_BxHxWxC = Bottleneck(width, stride, self.dtype, name=f"stage{stage}_{n}")(x_BxHxWxC, train)
        return nn.Dense(self.work.classes, dtype=self.dtype, name="head")(x_BxHxWxC.mean((1, 2)))


def build(work: Work, side: Side, settings: Settings) -> Program:
    """The recipe of mpjax's side, in plain optax."""
    model = ResNet(work, jnp.dtype(side.policy))
    optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
    if settings.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)

    def loss_fn(params, stats, batch):
        logits, new = model.apply({"params": params, "batch_stats": stats}, batch["image"], mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["label"])
        return losses.mean(), new["batch_stats"]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        params, stats, opt_state = state
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, stats, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), {"loss": loss}

    batch = jax.tree.map(jnp.asarray, data.pictures(work, settings.seed))
    key = jax.random.split(jax.random.key(settings.seed))[0]  # as TrainState.create does
    found = jax.jit(model.init)(key, batch["image"][:1])
    return Program(step, (found["params"], found["batch_stats"], optimizer.init(found["params"])), batch)
