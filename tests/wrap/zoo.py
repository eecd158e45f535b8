"""Small Linen models for the tests: what must hold under a policy, and the same models written in bfloat16 by hand.

A twin by hand is what a careful user writes: `dtype=` on every layer, norms and softmax in float32, casts where a layer
has no `dtype`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

HALF = jnp.bfloat16


class RMSNorm(nn.Module):
    """A third party's: no `dtype`, and an island by its name alone."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        mean = jnp.mean(x * x, -1, keepdims=True)
        return x * jax.lax.rsqrt(mean + 1e-6) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


class RMSNormByHand(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        mean = jnp.mean(y * y, -1, keepdims=True)
        return (y * jax.lax.rsqrt(mean + 1e-6) * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Linear(nn.Module):
    """A third party's: no `dtype`."""

    width: int
    by_hand: bool = False

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.lecun_normal(), (x.shape[-1], self.width))
        return x @ (w.astype(x.dtype) if self.by_hand else w)


class Block(nn.Module):
    """A transformer block with attention, a causal mask, dropout, two kinds of norm and a third-party layer."""

    width: int
    dtype: Any = None
    dropout: float = 0.0
    causal: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        by_hand = self.dtype is not None
        h = (RMSNormByHand if by_hand else RMSNorm)(name="norm1")(x)
        mask = nn.make_causal_mask(jnp.ones(x.shape[:-1])) if self.causal else None
        x = x + nn.MultiHeadDotProductAttention(
            2, name="attention", dtype=self.dtype, dropout_rate=self.dropout, deterministic=not train,
            force_fp32_for_softmax=by_hand,
        )(h, mask=mask)  # fmt: skip
        h = nn.LayerNorm(name="norm2", dtype=self.dtype)(x)
        h = nn.gelu(nn.Dense(4 * self.width, name="up", dtype=self.dtype)(h))
        return x + Linear(self.width, by_hand, name="down")(h)


class Layer(nn.Module):
    """A block as the body of a scan."""

    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x, _=None):
        return Block(self.width, self.dtype, name="block")(x), None


class LM(nn.Module):
    """A language model with tied embeddings: `kind` says how its three layers are stacked."""

    width: int = 32
    vocab: int = 48
    kind: str = "loop"
    dtype: Any = None
    dropout: float = 0.0
    tied: bool = True

    @nn.compact
    def __call__(self, tokens, train=False):
        embed = nn.Embed(self.vocab, self.width, name="embed", dtype=self.dtype)
        x = embed(tokens)
        if "scan" in self.kind:
            body = nn.remat(Layer, prevent_cse=False) if "remat" in self.kind else Layer
            stack = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=3)
            x, _ = stack(self.width, self.dtype, name="layers")(x, None)
        else:
            layer = nn.remat(Block, static_argnums=(2,)) if self.kind == "remat" else Block
            for i in range(3):
                x = layer(self.width, self.dtype, self.dropout, name=f"layers_{i}")(x, train)
        x = nn.LayerNorm(name="norm", dtype=self.dtype)(x)
        return embed.attend(x) if self.tied else nn.Dense(self.vocab, name="head", dtype=self.dtype)(x)


class ConvNet(nn.Module):
    """Convolutions, grouped and transposed, between a BatchNorm and a GroupNorm."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3,), dtype=self.dtype)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(x))
        x = nn.Conv(8, (3,), feature_group_count=2, dtype=self.dtype)(x)
        x = nn.GroupNorm(2, dtype=self.dtype)(x)
        x = nn.ConvTranspose(8, (3,), dtype=self.dtype)(x)
        return nn.Dense(3, dtype=self.dtype)(x.mean(1))


class Recurrent(nn.Module):
    """A cell under `nn.RNN`, one way or both."""

    cell: Any
    both_ways: bool = False

    @nn.compact
    def __call__(self, x):
        if self.both_ways:
            return nn.Bidirectional(nn.RNN(self.cell(16)), nn.RNN(self.cell(16)))(x)
        return nn.RNN(self.cell(16))(x)


class DecoratedScan(nn.Module):
    """The scan over time as Flax's seq2seq example writes it: a decorator on the method."""

    @functools.partial(
        nn.scan, variable_broadcast="params", in_axes=1, out_axes=1, split_rngs={"params": False}
    )  # fmt: skip
    @nn.compact
    def __call__(self, carry, x):
        return nn.OptimizedLSTMCell(16)(carry, x)


class Decorated(nn.Module):
    @nn.compact
    def __call__(self, x):
        cell = nn.OptimizedLSTMCell(16, parent=None)
        carry = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
        return DecoratedScan(name="scan")(carry, x)[1]


class Shared(nn.Module):
    """A module used twice, a list of modules, two methods; all made in `setup`."""

    def setup(self):
        self.dense = nn.Dense(16)
        self.norm = nn.LayerNorm()
        self.blocks = [nn.Dense(16) for _ in range(2)]

    def encode(self, x):
        return self.dense(self.norm(self.dense(x)))

    def __call__(self, x):
        x = self.encode(x)
        for block in self.blocks:
            x = block(x)
        return x


class Mapped(nn.Module):
    """`nn.vmap` over a block."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        over = nn.vmap(Block, in_axes=0, variable_axes={"params": 0}, split_rngs={"params": True})
        return over(16, self.dtype, causal=False, name="mapped")(x)


class Attention(nn.Module):
    """Attention with mask, dropout and normalised queries and keys."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x, train=False):
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        return nn.MultiHeadDotProductAttention(
            2, dropout_rate=0.1, deterministic=not train, normalize_qk=True, dtype=self.dtype, name="attention",
            force_fp32_for_softmax=self.dtype is not None,
        )(x, mask=mask)  # fmt: skip


class Normed(nn.Module):
    """Weight and spectral normalisation, whose norms of weights are float32."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        x = nn.WeightNorm(nn.Dense(16, dtype=self.dtype), dtype=self.dtype)(x)
        return nn.SpectralNorm(nn.Dense(16, dtype=self.dtype), dtype=self.dtype)(x, update_stats=True)


class Dense2(nn.Module):
    """Two layers of one class, lifted or decorated: what `nn.jit` would share a trace between."""

    layer: Any

    @nn.compact
    def __call__(self, x):
        return self.layer(name="b")(self.layer(name="a")(x))


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="dense")(x)


class InnerJit(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="dense")(x)


class Decoder(nn.Module):
    """One step of decoding with a cache."""

    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, decode=True, name="attention")(x)


class Float32Carry(nn.Module):
    """A residual stream that the user keeps in float32 through a scan."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Residual, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack(name="layers")(x.astype(jnp.float32), None)[0]


class Residual(nn.Module):
    @nn.compact
    def __call__(self, carry, _=None):
        h = nn.LayerNorm(name="norm")(carry)
        return carry + nn.Dense(16, name="dense")(h).astype(carry.dtype), None


class Conditional(nn.Module):
    """`nn.cond` around a submodule."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(16, name="dense")
        dense(x)
        return nn.cond(x.sum() > 0, lambda module, x: dense(x), lambda module, x: -dense(x), self, x)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A model, its inputs, and its twin by hand (None: Flax alone cannot run it in bfloat16, or it has no dtype)."""

    name: str
    module: Any
    """A Linen module, an NNX constructor, or a function from policy to `Model`."""
    sample: jax.Array
    by_hand: Any = None
    train: bool = False
    float32_matrix_products: int = 0
    """Products of weights alone that are float32 on purpose (power iterations)."""
    door: str = "linen"


TOKENS = jax.random.randint(jax.random.key(1), (4, 32), 0, 48)
SEQUENCE = jax.random.normal(jax.random.key(5), (4, 8, 16))


def _recurrent(cell: type) -> Case:
    # SimpleCell by hand fails in Flax itself: its float32 carry comes back in bfloat16.
    twin = None if cell is nn.SimpleCell else Recurrent(functools.partial(cell, dtype=HALF))
    return Case(cell.__name__, Recurrent(cell), SEQUENCE, twin)


CASES = [
    *(Case(f"lm {k}", LM(kind=k), TOKENS, LM(kind=k, dtype=HALF)) for k in ("loop", "scan", "remat", "scan+remat")),
    Case("lm dropout", LM(dropout=0.1), TOKENS, LM(dropout=0.1, dtype=HALF), train=True),
    Case("lm untied", LM(tied=False), TOKENS, LM(tied=False, dtype=HALF)),
    Case("convolutions", ConvNet(), SEQUENCE, ConvNet(HALF), train=True),
    *map(_recurrent, (nn.LSTMCell, nn.GRUCell, nn.OptimizedLSTMCell, nn.SimpleCell, nn.MGUCell)),
    Case("bidirectional", Recurrent(nn.LSTMCell, both_ways=True), SEQUENCE),
    Case("root rnn", nn.RNN(nn.GRUCell(8)), SEQUENCE),
    Case("decorated scan", Decorated(), SEQUENCE),
    Case("shared", Shared(), SEQUENCE),
    Case("vmap", Mapped(), SEQUENCE, Mapped(HALF)),
    Case("attention", Attention(), SEQUENCE, Attention(HALF), train=True),
    Case("weight norms", Normed(), SEQUENCE, Normed(HALF), float32_matrix_products=6),
    Case("class jit", Dense2(nn.jit(Inner)), SEQUENCE),
    Case("method jit", Dense2(InnerJit), SEQUENCE),
    Case("float32 carry", Float32Carry(), SEQUENCE),
    Case("cond", Conditional(), SEQUENCE),
]
