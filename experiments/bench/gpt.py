"""The GPT through mpjax: a model without a dtype anywhere, wrapped; the policy decides."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from experiments.bench import data
from experiments.bench.program import Program
from experiments.bench.rows import GPT as Work, Settings, Side
from mpjax import Aux, TrainState, attention, get_policy, losses, make_train_step, wrap


class Attention(nn.Module):
    """Causal self-attention: on a GPU cuDNN's kernel, with no mask in memory."""

    heads: int
    fused: bool

    @nn.compact
    def __call__(self, x_BxTxD):
        width = x_BxTxD.shape[-1]
        if self.fused:
            parts = jnp.split(nn.Dense(3 * width, name="qkv")(x_BxTxD), 3, -1)
        else:
            parts = [nn.Dense(width, name=name)(x_BxTxD) for name in ("query", "key", "value")]
        q, k, v = (x.reshape(*x.shape[:-1], self.heads, width // self.heads) for x in parts)
        y_BxTxHxK = attention(q, k, v, is_causal=True)
        return nn.Dense(width, name="out")(y_BxTxHxK.reshape(x_BxTxD.shape))


class Block(nn.Module):
    """Pre-norm transformer block."""

    heads: int
    fused: bool
    recompute: bool

    @nn.compact
    def __call__(self, x_BxTxD):
        width = x_BxTxD.shape[-1]
        gelu = jax.checkpoint(nn.gelu) if self.recompute else nn.gelu
        x_BxTxD = x_BxTxD + Attention(self.heads, self.fused, name="attention")(nn.LayerNorm(name="norm1")(x_BxTxD))
        h_BxTxF = gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm(name="norm2")(x_BxTxD)))
        return x_BxTxD + nn.Dense(width, name="down")(h_BxTxF)


class GPT(nn.Module):
    """Logits of the next token. The layers are a Python loop: `nn.scan` over them cost 16 ms of 38 on an H100."""

    work: Work
    recompute: bool = False

    def setup(self):
        init = nn.initializers.normal(0.02)
        self.embed = nn.Embed(self.work.vocabulary, self.work.width, embedding_init=init)
        self.positions = self.param("positions", init, (1, self.work.context, self.work.width))
        block = functools.partial(Block, self.work.heads, self.work.fused_qkv, self.recompute)
        self.layers = [block() for _ in range(self.work.layers)]
        self.norm = nn.LayerNorm()

    def features(self, token_BxT):
        """What the head is given."""
        x_BxTxD = self.embed(token_BxT) + self.positions
        for layer in self.layers:
            x_BxTxD = layer(x_BxTxD)
        return self.norm(x_BxTxD)

    def __call__(self, token_BxT):
        return self.embed.attend(self.features(token_BxT))


class Parts(NamedTuple):
    """What a step and its state are made of, before either is placed anywhere.

    Args:
      loss_fn: of a batch of tokens, int32 `[rows, context + 1]`.
      optimizer: as `make_train_step` takes it.
      create: from a key to a `TrainState`; can be jitted, so that the state is made where it is to lie.
    """

    loss_fn: Any
    optimizer: optax.GradientTransformation
    create: Callable[[jax.Array], TrainState]


CHUNK = 4096
"""Tokens whose logits exist at a time where the loss is chunked."""


def parts(work: Work, side: Side, optimizer: optax.GradientTransformation | None = None, chunk: int = CHUNK) -> Parts:
    """Loss and state under a policy; GPT-2's recipe (AdamW, decay on every param) if no optimizer is given."""
    model = wrap(GPT(work, side.recompute), side.policy)
    half = get_policy(side.policy).compute_dtype

    def plain(params, mstate, token_BxT1, rng):
        logits_BxTxV, mstate = model.apply(params, mstate, token_BxT1[:, :-1], rng=rng)
        return losses.softmax_cross_entropy(logits_BxTxV, token_BxT1[:, 1:]).mean(), Aux(mstate)

    def chunked(params, mstate, token_BxT1, rng):
        hidden_BxTxD, mstate = model.apply(params, mstate, token_BxT1[:, :-1], rng=rng, method="features")
        table_VxD = params["embed"]["embedding"]
        pair = losses.linear_softmax_cross_entropy(
            hidden_BxTxD,
            table_VxD,
            token_BxT1[:, 1:],
            transposed=True,
            chunk=chunk,
            compute_dtype=half,
            logits_dtype=half,  # as the head of the wrapped model rounds them
        )
        return pair, Aux(mstate)

    recipe = optimizer or optax.adamw(3e-4, b1=0.9, b2=0.95, weight_decay=0.1)

    def create(key: jax.Array) -> TrainState:
        return TrainState.create(model, recipe, key, jnp.zeros((1, work.context), jnp.int32))

    return Parts({"plain": plain, "chunked": chunked}[side.loss], recipe, create)


def build(work: Work, side: Side, settings: Settings) -> Program:
    """The step of one device."""
    loss_fn, optimizer, create = parts(work, side)
    batch = jnp.asarray(data.tokens(work, settings.seed))
    step = make_train_step(loss_fn, optimizer, clip_norm=settings.clip_norm, skip=side.skip)
    return Program(step, create(jax.random.key(settings.seed)), batch)
