"""A user's own attention_fn, through both doors: one that takes half precision only, and float16 on a CPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import mpjax
from mpjax.core.dtypes import facts
from mpjax.measure.audit import audit

BATCH, TOKENS, HEADS, DEPTH = 2, 5, 2, 4
WIDTH = HEADS * DEPTH
X = np.random.default_rng(0).normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32)
HALVES = ("bfloat16", "float16")
both_doors = pytest.mark.parametrize("door", ["linen", "nnx"])


def only_half(query, key, value, mask=None, **_):
    """What cuDNN is on a GPU: it computes the same, and takes float32 from nobody."""
    if any(x.dtype.name not in HALVES for x in (query, key, value)):
        raise NotImplementedError(f"Unsupported dtype {query.dtype}: only half precision")
    return mpjax.attention(query, key, value, mask=mask)


class Block(nn.Module):
    """A norm, an attention layer with a causal mask, and an attention that is called as a function."""

    attention_fn: object

    @nn.compact
    def __call__(self, x, _=None):
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]), dtype=bool)
        h = nn.LayerNorm(name="norm")(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, attention_fn=self.attention_fn, name="attention")(h, mask=mask)
        q = nn.DenseGeneral((HEADS, DEPTH), name="own")(x)
        return x + self.attention_fn(q, q, q).reshape(x.shape), None


class Net(nn.Module):
    attention_fn: object
    scanned: bool = False

    @nn.compact
    def __call__(self, x):
        if not self.scanned:
            return Block(self.attention_fn, name="block")(x)[0]
        block = nn.remat(Block, prevent_cse=False)
        stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return stack(self.attention_fn, name="block")(x, None)[0]


class NetNNX(nnx.Module):
    def __init__(self, attention_fn, rngs):
        self.fn = attention_fn
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, attention_fn=attention_fn, decode=False, rngs=rngs)
        self.own = nnx.LinearGeneral(WIDTH, (HEADS, DEPTH), rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x), mask=nnx.make_causal_mask(jnp.ones(x.shape[:2]), dtype=bool))
        q = self.own(x)
        return x + self.fn(q, q, q).reshape(x.shape)


MODULES = {
    "linen": Net,
    "linen scan+remat": functools.partial(Net, scanned=True),
    "nnx": lambda fn: lambda rngs: NetNNX(fn, rngs),
}


@pytest.mark.parametrize("door", MODULES)
def test_an_attention_that_takes_half_only_works(door):
    """init, explain, and a train step; params are those that a module without it gets in float32.

    To the last bits: in a scan XLA compiles an initialiser together with its surroundings. bfloat16 would be off by 2⁻⁹.
    """
    model = mpjax.wrap(MODULES[door](only_half), "mixed_bfloat16")
    twin = mpjax.wrap(MODULES[door](mpjax.attention), "mixed_bfloat16")
    assert "attention" in model.explain(X)
    params, _ = model.init(jax.random.key(0), X)
    expected, _ = twin.init(jax.random.key(0), X)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=4 * facts("float32").eps)

    def loss_fn(params, mstate, batch, rng):
        return jnp.square(model.apply(params, mstate, batch)[0]).mean()

    state = mpjax.TrainState.create(model, optax.sgd(0.1), jax.random.key(0), X)
    pure = mpjax.make_train_step(loss_fn, optax.sgd(0.1)).pure
    after, metrics = jax.eval_shape(pure, state, X)
    assert metrics["loss"].dtype == jnp.float32 and jax.tree.structure(after) == jax.tree.structure(state)
    assert audit(pure, state, X).share("bfloat16") == 1.0
    # Bare functions of a model that nobody has seen before: apply looks at the module too.
    fresh = mpjax.wrap(MODULES[door](only_half), "mixed_bfloat16")
    assert jax.eval_shape(fresh.apply, params, {}, X)[0].shape == X.shape


def test_in_float32_its_own_error_is_told():
    model = mpjax.wrap(Net(only_half), "float32")
    with pytest.raises(NotImplementedError, match="Unsupported dtype float32: only half precision") as told:
        model.init(jax.random.key(0), X)
    assert told.value.__cause__ is None


def test_what_runs_in_float32_is_initialised_in_float32():
    """From its data too: nothing is computed otherwise because something else would need it."""
    seen = []

    class FromData(nn.Module):
        @nn.compact
        def __call__(self, x):
            seen.append(x.dtype.name)
            return x - self.param("mean", lambda key: x.mean((0, 1)))

    params, _ = mpjax.wrap(FromData(), "mixed_bfloat16").init(jax.random.key(0), X)
    assert set(seen) == {"float32"}
    np.testing.assert_allclose(params["mean"], X.astype(np.float64).mean((0, 1)), atol=4 * facts("float32").eps)


# ---- float16 on a CPU ------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Self-attention over heads that come in as they are: nothing to learn, so that float64 by hand is short."""

    @nn.compact
    def __call__(self, q, k, v):
        return mpjax.attention(q, k, v, is_causal=True)


class HeadsNNX(nnx.Module):
    def __call__(self, q, k, v):
        return mpjax.attention(q, k, v, is_causal=True)


@both_doors
def test_causal_float16_attention_in_ones_own_module_equals_float64_by_hand(door):
    module = Heads() if door == "linen" else lambda rngs: HeadsNNX()
    model = mpjax.wrap(module, "mixed_float16")
    rng = np.random.default_rng(1)
    q, k, v, g = (rng.normal(size=(BATCH, TOKENS, HEADS, DEPTH)).astype(np.float16) for _ in range(4))
    given = [jnp.asarray(x) for x in (q, k, v)]

    @jax.jit
    def both(q, k, v):
        out, pull = jax.vjp(lambda *qkv: model.apply({}, {}, *qkv)[0].astype(jnp.float16), q, k, v)
        return out, *pull(jnp.asarray(g))

    found = [np.asarray(x, np.float64) for x in both(*given)]
    q, k, v, g = (x.astype(np.float64) for x in (q, k, v, g))
    s = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(DEPTH)
    p = np.exp(np.where(np.tril(np.ones((TOKENS, TOKENS), bool)), s, -np.inf))
    p /= p.sum(-1, keepdims=True)
    t = np.einsum("bqhd,bkhd->bhqk", g, v)
    ds = p * (t - (p * t).sum(-1, keepdims=True)) / np.sqrt(DEPTH)
    truths = (
        np.einsum("bhqk,bkhd->bqhd", p, v), np.einsum("bhqk,bkhd->bqhd", ds, k),
        np.einsum("bhqk,bqhd->bkhd", ds, q), np.einsum("bhqk,bqhd->bkhd", p, g),
    )  # fmt: skip
    for result, truth in zip(found, truths, strict=True):
        # A dozen roundings of numbers of this size lie between; tests/numerics/test_attention.py counts them one by one.
        assert np.abs(result - truth).max() <= 12 * facts("float16").eps * max(1, np.abs(truth).max())


@both_doors
def test_jaxs_attention_in_float16_on_a_cpu_says_what_to_do(door):
    jaxs = functools.partial(jax.nn.dot_product_attention, scale=0.5)
    linen = nn.MultiHeadDotProductAttention(HEADS, attention_fn=jaxs)
    module = linen if door == "linen" else lambda rngs: nnx.MultiHeadAttention(
        HEADS, WIDTH, attention_fn=jaxs, decode=False, rngs=rngs
    )  # fmt: skip
    said = r"jax.nn.dot_product_attention in float16 on a CPU, .*; leave attention_fn out, or pass mpjax.attention"

    def use(policy):
        model = mpjax.wrap(module, policy)
        if door == "linen":  # it is the call that dresses the layer; NNX's is dressed when it is wrapped
            params, mstate = model.init(jax.random.key(0), X)
            jax.eval_shape(lambda: model.apply(params, mstate, X)[0])

    with pytest.warns(mpjax.PrecisionWarning, match=said):
        use("mixed_float16")
    use("mixed_bfloat16")  # a warning would be an error
