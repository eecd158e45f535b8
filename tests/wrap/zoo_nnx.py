"""The NNX zoo: the same kinds of models as in `zoo`, and the same models written in bfloat16 by hand (`dtype=`)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.wrap.zoo import HALF, SEQUENCE, TOKENS, Case

WIDTH = 16
FEATURES = SEQUENCE.shape[-1]


class RMSNorm(nnx.Module):
    """A third party's: no `dtype`, and an island by its name alone."""

    def __init__(self, width, by_hand=False):
        self.scale, self.by_hand = nnx.Param(jnp.ones(width)), by_hand

    def __call__(self, x):
        y = x.astype(jnp.float32) if self.by_hand else x
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6) * scale
        return y.astype(x.dtype)


class Linear(nnx.Module):
    """A third party's: no `dtype`."""

    def __init__(self, inputs, outputs, by_hand, rngs):
        self.w = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (inputs, outputs)))
        self.by_hand = by_hand

    def __call__(self, x):
        return x @ (self.w[...].astype(x.dtype) if self.by_hand else self.w)


class Block(nnx.Module):
    """A transformer block with attention, a causal mask, dropout, two kinds of norm and a third-party layer."""

    def __init__(self, width, dtype=None, dropout=0.0, causal=True, *, rngs):
        self.norm1 = RMSNorm(width, dtype is not None)
        self.attention = nnx.MultiHeadAttention(2, width, dtype=dtype, dropout_rate=dropout, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.down = Linear(4 * width, width, dtype is not None, rngs)
        self.causal = causal

    def __call__(self, x):
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:-1])) if self.causal else None
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class LM(nnx.Module):
    """A language model with tied embeddings: `kind` says how its three layers are stacked."""

    def __init__(self, width=32, vocab=48, kind="loop", dtype=None, dropout=0.0, tied=True, *, rngs):
        self.kind = kind
        self.embed = nnx.Embed(vocab, width, dtype=dtype, rngs=rngs)
        if "scan" in kind:
            make = nnx.vmap(lambda rngs: Block(width, dtype, dropout, rngs=rngs), in_axes=0, out_axes=0)
            self.layers = nnx.split_rngs(splits=3)(make)(rngs)
        else:
            self.layers = nnx.List([Block(width, dtype, dropout, rngs=rngs) for _ in range(3)])
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.head = None if tied else nnx.Linear(width, vocab, dtype=dtype, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        run = nnx.remat(lambda layer, x: layer(x)) if "remat" in self.kind else lambda layer, x: layer(x)
        if "scan" in self.kind:
            x = nnx.scan(lambda x, layer: run(layer, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        else:
            for layer in self.layers:
                x = run(layer, x)
        x = self.norm(x)
        return self.embed.attend(x) if self.head is None else self.head(x)


class ConvNet(nnx.Module):
    """Convolutions, grouped and transposed, between a BatchNorm and a GroupNorm."""

    def __init__(self, dtype=None, *, rngs):
        kwargs = {"dtype": dtype, "rngs": rngs}
        self.conv1 = nnx.Conv(FEATURES, 8, (3,), **kwargs)
        self.norm1 = nnx.BatchNorm(8, **kwargs)
        self.conv2 = nnx.Conv(8, 8, (3,), feature_group_count=2, **kwargs)
        self.norm2 = nnx.GroupNorm(8, 2, **kwargs)
        self.conv3 = nnx.ConvTranspose(8, 8, (3,), **kwargs)
        self.dense = nnx.Linear(8, 3, **kwargs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        return self.dense(self.conv3(self.norm2(self.conv2(x))).mean(1))


class Recurrent(nnx.Module):
    """A cell under `nnx.RNN`, one way or both."""

    def __init__(self, cell, both_ways=False, dtype=None, *, rngs):
        dtype = {} if dtype is None else {"dtype": dtype}
        made = [nnx.RNN(cell(FEATURES, WIDTH, rngs=rngs, **dtype), rngs=rngs) for _ in range(2 if both_ways else 1)]
        self.rnn = nnx.Bidirectional(*made, rngs=rngs) if both_ways else made[0]

    def __call__(self, x):
        return self.rnn(x)


class Shared(nnx.Module):
    """A module under two names, and a Param that another layer owns too."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.same = self.dense
        self.other = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.other.kernel = self.dense.kernel
        self.norm = nnx.LayerNorm(FEATURES, rngs=rngs)

    def encode(self, x):
        return self.same(self.norm(self.dense(x)))

    def __call__(self, x):
        return self.other(self.encode(x))


class Mapped(nnx.Module):
    """`nnx.vmap` over a stack of blocks."""

    def __init__(self, dtype=None, *, rngs):
        make = nnx.vmap(lambda rngs: Block(FEATURES, dtype, causal=False, rngs=rngs), in_axes=0, out_axes=0)
        self.mapped = nnx.split_rngs(splits=4)(make)(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda block, x: block(x))(self.mapped, x)


class Attention(nnx.Module):
    """Attention with mask, dropout, normalised queries and keys."""

    def __init__(self, dtype=None, *, rngs):
        self.attention = nnx.MultiHeadAttention(
            2, FEATURES, dropout_rate=0.1, normalize_qk=True, dtype=dtype, decode=False, rngs=rngs
        )

    def __call__(self, x):
        return self.attention(x, mask=nnx.make_causal_mask(jnp.ones(x.shape[:2])))


class Normed(nnx.Module):
    """Weight and spectral normalisation, whose norms of weights are float32."""

    def __init__(self, dtype=None, *, rngs):
        kwargs = {"dtype": dtype, "rngs": rngs}
        self.weight = nnx.WeightNorm(nnx.Linear(FEATURES, FEATURES, **kwargs), **kwargs)
        self.spectral = nnx.SpectralNorm(nnx.Linear(FEATURES, FEATURES, **kwargs), **kwargs)

    def __call__(self, x):
        return self.spectral(self.weight(x), update_stats=True)


class Inner(nnx.Module):
    """A layer whose `__call__` is compiled by itself."""

    def __init__(self, dtype=None, *, rngs):
        self.dense = nnx.Linear(FEATURES, FEATURES, dtype=dtype, rngs=rngs)

    @nnx.jit
    def __call__(self, x):
        return self.dense(x)


class Jitted(nnx.Module):
    """Two layers of one class whose calls are jitted."""

    def __init__(self, dtype=None, *, rngs):
        self.a, self.b = Inner(dtype, rngs=rngs), Inner(dtype, rngs=rngs)

    def __call__(self, x):
        return self.b(self.a(x))


class Decoder(nnx.Module):
    """One step of decoding with a cache."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, FEATURES, decode=True, rngs=rngs)
        self.attention.init_cache(SEQUENCE.shape)

    def __call__(self, x):
        return self.attention(x)


class Plain(nnx.Module):
    """Arrays that are attributes, a Variable of its own type, a Param read in every way, a helper method."""

    def __init__(self, rngs):
        self.offset = jax.random.normal(rngs.params(), (1, 1, FEATURES))
        self.frequency = nnx.Variable(jnp.full((1, 1, FEATURES), 1.0 + 2**-12))
        self.w = nnx.Param(jax.random.normal(rngs.params(), (FEATURES, FEATURES)))
        self.body = nnx.Sequential(
            nnx.Linear(FEATURES, FEATURES, rngs=rngs), nnx.LayerNorm(FEATURES, rngs=rngs), nnx.gelu
        )

    def half(self, x):
        return x * self.frequency[...].astype(x.dtype) + self.offset.astype(x.dtype)

    def __call__(self, x):
        x = self.half(self.body(x))
        return jnp.einsum("btd,de->bte", x @ self.w, self.w) + x @ self.w.T + x @ self.w[...]


class LoRA(nnx.Module):
    """A low-rank adapter round a layer, and one of its own."""

    def __init__(self, dtype=None, *, rngs):
        base = nnx.Linear(FEATURES, FEATURES, dtype=dtype, rngs=rngs)
        self.lora = nnx.LoRA(FEATURES, 4, FEATURES, base_module=base, dtype=dtype, rngs=rngs)
        self.linear = nnx.LoRALinear(FEATURES, FEATURES, lora_rank=4, dtype=dtype, lora_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.linear(self.lora(x))


def _case(name: str, make: Any, sample: jax.Array, by_hand: bool = True, train: bool = False, **more: Any) -> Case:
    def constructor(dtype: Any) -> Any:
        return lambda rngs: make(rngs=rngs) if dtype is None else make(rngs=rngs, dtype=dtype)

    return Case(
        f"nnx {name}", constructor(None), sample, constructor(HALF) if by_hand else None, train, door="nnx", **more
    )


CASES = [
    *(_case(f"lm {k}", functools.partial(LM, kind=k), TOKENS) for k in ("loop", "scan", "remat", "scan+remat")),
    _case("lm dropout", functools.partial(LM, dropout=0.1), TOKENS, train=True),
    _case("lm scan dropout", functools.partial(LM, dropout=0.1, kind="scan"), TOKENS, train=True),
    _case("lm untied", functools.partial(LM, tied=False), TOKENS),
    _case("convolutions", ConvNet, SEQUENCE, train=True),
    *(
        _case(cell.__name__, functools.partial(Recurrent, cell), SEQUENCE, by_hand=cell is not nnx.SimpleCell)
        for cell in (nnx.LSTMCell, nnx.GRUCell, nnx.OptimizedLSTMCell, nnx.SimpleCell)
    ),
    _case("bidirectional", functools.partial(Recurrent, nnx.LSTMCell, True), SEQUENCE),
    _case("shared", Shared, SEQUENCE, by_hand=False),
    _case("vmap", Mapped, SEQUENCE),
    _case("attention", Attention, SEQUENCE, train=True),
    _case("weight norms", Normed, SEQUENCE, float32_matrix_products=6),
    _case("method jit", Jitted, SEQUENCE),
    _case("plain", Plain, SEQUENCE, by_hand=False),
    _case("lora", LoRA, SEQUENCE),
]
