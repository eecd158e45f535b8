"""The GPT by hand: what a careful user of JAX writes without mpjax. Flax's own dtype arguments, optax, jit, donation."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from experiments.bench import data
from experiments.bench.program import Program
from experiments.bench.rows import GPT as Work, Settings, Side


class Attention(nn.Module):
    heads: int
    fused: bool
    dtype: Any

    @nn.compact
    def __call__(self, x_BxTxD):
        width = x_BxTxD.shape[-1]
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        if self.fused:
            parts = jnp.split(dense(3 * width, name="qkv")(x_BxTxD), 3, -1)
        else:
            parts = [dense(width, name=name)(x_BxTxD) for name in ("query", "key", "value")]
        q, k, v = (x.reshape(*x.shape[:-1], self.heads, width // self.heads) for x in parts)
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True)
        if jax.default_backend() == "gpu" and q.dtype != jnp.float32:
            attend = functools.partial(attend, implementation="cudnn")
        y_BxTxHxK = attend(q, k, v)
        return dense(width, name="out")(y_BxTxHxK.reshape(x_BxTxD.shape))


class Block(nn.Module):
    heads: int
    fused: bool
    dtype: Any

    @nn.compact
    def __call__(self, x_BxTxD):
        width = x_BxTxD.shape[-1]
        dense, norm = functools.partial(nn.Dense, dtype=self.dtype), functools.partial(nn.LayerNorm, dtype=self.dtype)
        h_BxTxD = Attention(self.heads, self.fused, self.dtype, name="attention")(norm(name="norm1")(x_BxTxD))
        x_BxTxD = x_BxTxD + h_BxTxD
        h_BxTxF = nn.gelu(dense(4 * width, name="up")(norm(name="norm2")(x_BxTxD)))
        return x_BxTxD + dense(width, name="down")(h_BxTxF)


class GPT(nn.Module):
    """The same modules under the same names as mpjax's side: the same key makes the same params."""

    work: Work
    dtype: Any

    def setup(self):
        init = nn.initializers.normal(0.02)
        self.embed = nn.Embed(self.work.vocabulary, self.work.width, embedding_init=init, dtype=self.dtype)
        self.positions = self.param("positions", init, (1, self.work.context, self.work.width))
        self.layers = [Block(self.work.heads, self.work.fused_qkv, self.dtype) for _ in range(self.work.layers)]
        self.norm = nn.LayerNorm(dtype=self.dtype)

    def __call__(self, token_BxT):
        x_BxTxD = self.embed(token_BxT) + self.positions.astype(self.dtype)
        for layer in self.layers:
            x_BxTxD = layer(x_BxTxD)
        return self.embed.attend(self.norm(x_BxTxD))


def build(work: Work, side: Side, settings: Settings) -> Program:
    """The recipe of mpjax's side, in plain optax."""
    model = GPT(work, jnp.dtype(side.policy))
    optimizer = optax.adamw(3e-4, b1=0.9, b2=0.95, weight_decay=0.1)
    if settings.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)

    def loss_fn(params, token_BxT1):
        logits_BxTxV = jnp.asarray(model.apply({"params": params}, token_BxT1[:, :-1]), jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV, token_BxT1[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, token_BxT1):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, token_BxT1)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": loss}

    batch = jnp.asarray(data.tokens(work, settings.seed))
    key = jax.random.split(jax.random.key(settings.seed))[0]  # as TrainState.create does
    params = jax.jit(model.init)(key, batch[:1, :-1])["params"]
    return Program(step, (params, optimizer.init(params)), batch)
