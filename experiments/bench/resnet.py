"""The ResNet through mpjax: a model without a dtype anywhere, wrapped; the policy decides."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from experiments.bench import data
from experiments.bench.program import Program
from experiments.bench.rows import ResNet as Work, Settings, Side
from mpjax import Aux, TrainState, losses, make_train_step, wrap


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions round a shortcut; the stride is in the 3×3 (v1.5)."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x_BxHxWxC, train):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
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
    """A stem, stages of bottlenecks, mean pooling, a head."""

    work: Work

    @nn.compact
    def __call__(self, x_BxHxWxC, train=True):
        x_BxHxWxC = nn.Conv(self.work.width, (7, 7), (2, 2), padding=3, use_bias=False, name="stem")(x_BxHxWxC)
        x_BxHxWxC = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x_BxHxWxC))
        x_BxHxWxC = nn.max_pool(x_BxHxWxC, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.work.stages):
            for n in range(blocks):
                block = Bottleneck(self.work.width * 2**stage, 2 if stage and not n else 1, name=f"stage{stage}_{n}")
                x_BxHxWxC = block(x_BxHxWxC, train)
        return nn.Dense(self.work.classes, name="head")(x_BxHxWxC.mean((1, 2)))


def build(work: Work, side: Side, settings: Settings) -> Program:
    """SGD with momentum 0.9 and weight decay 1e-4 on every param, under a policy."""
    model = wrap(ResNet(work), side.policy)

    def loss_fn(params, mstate, batch, rng):
        logits, mstate = model.apply(params, mstate, batch["image"], rng=rng, train=True)
        return losses.softmax_cross_entropy(logits, batch["label"]).mean(), Aux(mstate)

    optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
    batch = jax.tree.map(jnp.asarray, data.pictures(work, settings.seed))
    state = TrainState.create(model, optimizer, jax.random.key(settings.seed), batch["image"][:1])
    return Program(make_train_step(loss_fn, optimizer, clip_norm=settings.clip_norm, skip=side.skip), state, batch)
