"""Attention: against float64 by hand, forward and backward; float32 where it must be, half where it should be.

Tolerances follow from the format. u is half its eps, the error of one rounding; a product of half-precision operands is
summed in float32 and rounded once, so its error is u times the sum of absolute values (`once`, with float32's own
roundings of the sum added). What these errors become downstream is written out in `bounds`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mpjax.core.dtypes import facts
from mpjax.measure.audit import audit
from mpjax.numerics import attention as room
from mpjax.numerics.attention import attention, fits_cudnn, softmax_float32

BATCH, QUERIES, KEYS, HEADS, DEPTH = 2, 5, 7, 3, 16
FORMATS = pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])


def inputs(dtype, seed=0, queries=QUERIES, keys=KEYS, heads=HEADS, depth=DEPTH):
    """q, k, v and the cotangent of the output: exact in `dtype`, so that float64 starts from the same numbers."""
    rng = np.random.default_rng(seed)
    sizes = (queries, keys, keys, queries)
    return tuple(jnp.asarray(rng.normal(size=(BATCH, n, heads, depth)), dtype) for n in sizes)


def boolean_mask(seed=1):
    """[batch, heads, queries, keys] at random, with one row that sees nothing."""
    mask = np.random.default_rng(seed).uniform(size=(BATCH, HEADS, QUERIES, KEYS)) < 0.6
    mask[..., 0] |= ~mask.any(-1)
    mask[1, 2, 3] = False
    return mask


def exact(x):
    return np.asarray(x, np.float64)


def pulled(fn, g, *args):
    """The output of `fn` and its gradients under the cotangent g; not jitted, since XLA folds constant masks for long."""
    out, pull = jax.vjp(fn, *args)
    return out, pull(g)


def by_hand(q, k, v, g, bias=None, mask=None):
    """Output and gradients in float64; g is the cotangent of the output. A row without keys is uniform and has no ds."""
    q, k, v, g = (exact(x) for x in (q, k, v, g))
    root = np.sqrt(q.shape[-1])
    s = np.einsum("bqhd,bkhd->bhqk", q, k) / root
    s = s if bias is None else s + exact(bias)
    alive = np.ones((*s.shape[:-1], 1), bool)
    if mask is not None:
        mask = np.broadcast_to(mask, s.shape)
        alive = mask.any(-1, keepdims=True)
        s = np.where(mask, s, -np.inf)
        s = np.where(alive, s, 0.0)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    t = np.einsum("bqhd,bkhd->bhqk", g, v)
    ds = np.where(alive, p * (t - (p * t).sum(-1, keepdims=True)), 0.0)
    grads = {
        "q": np.einsum("bhqk,bkhd->bqhd", ds, k) / root,
        "k": np.einsum("bhqk,bqhd->bkhd", ds, q) / root,
        "v": np.einsum("bhqk,bqhd->bkhd", p, g),
        "bias": ds,
    }
    return np.einsum("bhqk,bkhd->bqhd", p, v), grads


def bounds(q, k, v, g, dtype):
    """How far each result may be from float64, from the roundings on its way."""
    u = facts(dtype).eps / 2
    once = u + max(KEYS, QUERIES, DEPTH) * facts("float32").eps
    q, k, v, g = (np.abs(exact(x)) for x in (q, k, v, g))
    root = np.sqrt(q.shape[-1])
    scores = np.einsum("bqhd,bkhd->bhqk", q, k).max() / root
    weight = (
        2 * (u + once) * scores + u + 8 * facts("float32").eps
    )  # relative: q·scale, q·k, through exp twice; rounding
    t = np.einsum("bqhd,bkhd->bhqk", g, v).max()
    ds = t * (2 * once + 3 * weight + u)  # t and Σ w t are off by (once + weight) t at most, |t − Σ w t| ≤ 2t
    return {
        "out": (weight + once) * v.max(),
        "q": (ds + 2 * t * (once + u)) * k.max() / root,
        "k": QUERIES * (ds + 2 * t * (once + u)) * q.max() / root,
        "v": QUERIES * (weight + once) * g.max(),
        "bias": ds,
    }


MASK = boolean_mask()
BIAS = np.random.default_rng(2).normal(size=(1, HEADS, QUERIES, KEYS)).astype(np.float32)
CASES = {
    "plain": {},
    "mask": {"mask": MASK},
    "mask of heads": {"mask": MASK[:1, :1]},
    "mask of keys": {"mask": MASK[:, :1, :1]},
    "causal": {"mask": np.tril(np.ones((1, 1, QUERIES, KEYS), bool))},
    "bias": {"bias": BIAS},
    "bias and mask": {"bias": BIAS, "mask": MASK},
}


@FORMATS
@pytest.mark.parametrize("case", CASES)
def test_fault_9_output_and_gradients_equal_float64_by_hand(dtype, case):
    q, k, v, g = inputs(dtype)
    more = {name: jnp.asarray(x) for name, x in CASES[case].items()}
    out, found = pulled(lambda q, k, v: attention(q, k, v, **more), g, q, k, v)
    found = {"out": out, **dict(zip("qkv", found, strict=True))}
    reference, grads = by_hand(q, k, v, g, **CASES[case])
    allowed = bounds(q, k, v, g, dtype)
    for name, truth in {"out": reference, **{x: grads[x] for x in "qkv"}}.items():
        assert found[name].dtype == jnp.dtype(dtype)
        assert np.abs(exact(found[name]) - truth).max() <= allowed[name], name
    assert allowed["out"] < (0.3 if dtype == "bfloat16" else 0.04)  # the bound is one: the values are of order 1


@FORMATS
def test_a_bias_has_its_gradient_in_its_own_dtype(dtype):
    q, k, v, g = inputs(dtype)
    _, (grad,) = pulled(lambda b: attention(q, k, v, bias=b, mask=jnp.asarray(MASK)), g, jnp.asarray(BIAS))
    _, grads = by_hand(q, k, v, g, bias=BIAS, mask=MASK)
    assert grad.dtype == jnp.float32
    assert np.abs(exact(grad) - grads["bias"].sum(0, keepdims=True)).max() <= BATCH * bounds(q, k, v, g, dtype)["bias"]


@FORMATS
def test_fault_9_a_fully_masked_row_is_the_mean_of_v_and_has_no_gradient(dtype):
    q, k, v, g = inputs(dtype)
    mask = np.ones((BATCH, HEADS, QUERIES, KEYS), bool)
    mask[0, 1, 2] = False
    only_that_row = jnp.zeros_like(g).at[0, 2, 1].set(g[0, 2, 1])
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask=jnp.asarray(mask)), q, k, v)
    dq, dk, dv = pull(only_that_row)
    assert (exact(dq) == 0).all() and (exact(dk) == 0).all()
    u = facts(dtype).eps / 2 + KEYS * facts("float32").eps  # of the weight 1/7, and of the sum
    mean = exact(v)[0, :, 1].mean(0)
    assert (np.abs(exact(out)[0, 2, 1] - mean) <= 2 * u * np.abs(exact(v)).max()).all()
    assert (np.abs(exact(dv)[0, :, 1] - exact(g)[0, 2, 1] / KEYS) <= 2 * u * np.abs(exact(g)).max()).all()
    dq, dk, dv = pull(g)
    assert (exact(dq)[0, 2, 1] == 0).all() and all(np.isfinite(exact(x)).all() for x in (dq, dk, dv))


@FORMATS
@pytest.mark.parametrize("low", ["-1e9", "smallest", "-inf"])
def test_fault_9_a_bias_that_masks_gives_zero_weight_and_no_nan(dtype, low):
    q, k, v, g = inputs(dtype)
    value = {"-1e9": max(-1e9, -facts(dtype).max), "smallest": -facts(dtype).max, "-inf": -np.inf}[low]
    mask = MASK.copy()
    mask[1, 2, 3, 0] = True  # no row without a key: for a bias alone such a row is undefined
    bias = jnp.where(jnp.asarray(mask), jnp.asarray(0.0, dtype), jnp.asarray(value, dtype))
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, bias=bias), q, k, v)
    masked, pull_masked = jax.vjp(lambda q, k, v: attention(q, k, v, mask=jnp.asarray(mask)), q, k, v)
    for a, b in zip((out, *pull(g)), (masked, *pull_masked(g)), strict=True):
        assert (exact(a) == exact(b)).all() and np.isfinite(exact(a)).all()


def test_a_dtype_has_the_names_that_it_has_everywhere():
    x = jnp.ones((1, 2, 1, 4))
    assert attention(x, x, x, dtype="bf16").dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"Unknown dtype 'bf15'; use one of .*bf16"):
        attention(x, x, x, dtype="bf15")


def test_scores_that_overflow_exp_do_not_overflow():
    q, k, v, _ = inputs("float16")
    out = attention(q * 30, k * 30, v)
    assert np.isfinite(exact(out)).all()


@pytest.mark.parametrize("kind", [bool, np.int32, np.float32, jnp.bfloat16])
def test_a_mask_may_be_numbers(kind):
    q, k, v, _ = inputs("bfloat16")
    out = attention(q, k, v, mask=jnp.asarray(MASK).astype(kind))
    assert (exact(out) == exact(attention(q, k, v, mask=jnp.asarray(MASK)))).all()
    assert (exact(out) == exact(attention(q, k, v, mask=MASK.astype(kind)))).all()  # or numpy's


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_any_number_of_batch_axes(batch):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(*batch, n, 2, 4)), "float32") for n in (5, 6, 6))
    out = jax.jit(attention)(q, k, v)
    flat = jax.jit(attention)(*(x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)))
    assert out.shape == (*batch, 5, 2, 4) and (np.asarray(out) == np.asarray(flat).reshape(out.shape)).all()


def test_the_value_may_have_a_depth_of_its_own():
    q, k, v, _ = inputs("float32")
    wide = jnp.concatenate([v, v], -1)
    out = attention(q, k, wide)
    assert out.shape == (BATCH, QUERIES, HEADS, 2 * DEPTH)
    assert (np.asarray(out[..., :DEPTH]) == np.asarray(attention(q, k, v))).all()


def test_the_compute_dtype_is_the_querys_or_the_one_named():
    q, k, v, _ = inputs("float32")
    half = attention(q, k, v, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16 and attention(q, k, v).dtype == jnp.float32
    cast = attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert (exact(half) == exact(cast)).all()
    assert attention(q.astype(jnp.float16), k, v).dtype == jnp.float16


@pytest.mark.parametrize("heads", [(6, 4, 4), (2, 4, 4), (2, 0, 0), (4, 4, 2), (4, 2, 1)])
def test_heads_that_do_not_fit_are_named(heads):
    q, k, v = (jnp.ones((1, 2, n, 4)) for n in heads)
    with pytest.raises(
        ValueError, match=f"got {heads[0]} query heads, {heads[1]} key heads and {heads[2]} value heads; legal"
    ):
        attention(q, k, v)


def test_dropout_without_a_key_says_what_to_give():
    q, k, v, _ = inputs("float32")
    with pytest.raises(ValueError, match=r"got dropout_rate=0.1 without a key; legal is dropout_rng"):
        attention(q, k, v, dropout_rate=0.1)


# Dropout: the masks of Flax, to the bit.

DROPOUTS = pytest.mark.parametrize(("rate", "broadcast"), [(0.1, True), (0.5, True), (0.1, False), (0.5, False)])


@DROPOUTS
def test_dropout_is_that_of_flax(rate, broadcast):
    q, k, v, g = inputs("float32")
    more = {
        "dropout_rng": jax.random.key(3),
        "dropout_rate": rate,
        "broadcast_dropout": broadcast,
        "mask": jnp.asarray(MASK),
    }
    ours, grads = pulled(lambda q, k, v: attention(q, k, v, **more), g, q, k, v)
    theirs, flax_grads = pulled(lambda q, k, v: nn.dot_product_attention(q, k, v, **more), g, q, k, v)
    allowed = bounds(q, k, v, g, "float32")
    for name, a, b in zip(("out", "v"), (ours, grads[2]), (theirs, flax_grads[2]), strict=True):
        # Both are off by the bound at most, and 1 / (1 − rate) makes each weight that is kept larger.
        assert np.abs(exact(a) - exact(b)).max() <= 2 * allowed[name] / (1 - rate)
    live = np.ones((BATCH, QUERIES, HEADS), bool)
    live[1, 3, 2] = False  # Flax gives the row without a key a gradient; ours has none
    assert np.abs(exact(grads[0] - flax_grads[0]))[live].max() <= 2 * allowed["q"] / (1 - rate)


@DROPOUTS
def test_the_weights_that_are_dropped_are_those_of_flax(rate, broadcast):
    """With v the identity, the output is the weights themselves."""
    q, k, _, _ = inputs("float32")
    v = jnp.broadcast_to(jnp.eye(KEYS)[None, :, None, :], (BATCH, KEYS, HEADS, KEYS))
    more = {"dropout_rng": jax.random.key(3), "dropout_rate": rate, "broadcast_dropout": broadcast}
    ours, theirs = (np.asarray(f(q, k, v, **more)) for f in (attention, nn.dot_product_attention))
    assert ((ours == 0) == (theirs == 0)).all() and 0 < (ours == 0).mean() < 1
    full = np.asarray(attention(q, k, v))
    kept = ours != 0
    assert np.abs(ours[kept] - full[kept] / (1 - rate)).max() <= 4 * facts("float32").eps / (1 - rate)
    assert (kept == kept[:1, :, :1]).all() == broadcast  # one mask for all examples and heads, or each its own


@FORMATS
def test_no_dropout_when_deterministic_or_at_rate_zero(dtype):
    q, k, v, _ = inputs(dtype)
    plain = exact(attention(q, k, v))
    assert (exact(attention(q, k, v, dropout_rate=0.5, deterministic=True)) == plain).all()
    assert (exact(attention(q, k, v, dropout_rate=0.0, dropout_rng=jax.random.key(0))) == plain).all()
    assert (exact(attention(q, k, v, dropout_rate=0.5, dropout_rng=jax.random.key(0))) != plain).any()


def test_it_sows_its_weights_before_dropout():
    sown = {}

    class Module:
        def sow(self, collection, name, value):
            sown[collection, name] = value

    q, k, v, _ = inputs("bfloat16")
    attention(q, k, v, module=Module(), dropout_rate=0.5, dropout_rng=jax.random.key(0))
    weights = sown["intermediates", "attention_weights"]
    assert weights.shape == (BATCH, HEADS, QUERIES, KEYS) and weights.dtype == jnp.bfloat16
    # Each of the 7 weights, at most 1, is rounded once.
    assert np.abs(exact(weights).sum(-1) - 1).max() <= KEYS * facts("bf16").eps / 2


# What runs in which dtype, and what is kept.

VARIANTS = {
    "plain": {},
    "mask": {"mask": jnp.asarray(MASK)},
    "bias": {"bias": jnp.asarray(BIAS)},
    "half bias": {"bias": jnp.asarray(BIAS).astype(jnp.bfloat16)},
    "dropout": {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0), "mask": jnp.asarray(MASK)},
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_softmax_is_float32_and_every_product_half_by_half(dtype, variant):
    q, k, v, g = inputs(dtype)

    def forward(q, k, v):
        return attention(q, k, v, **VARIANTS[variant])

    def both(q, k, v):
        return jax.vjp(forward, q, k, v)[1](g)

    found = audit(forward, q, k, v)
    assert found.dtypes("dot") == {dtype: 2}
    assert {op.output for op in found.select("dot").ops} == {dtype}
    assert found.dtypes("exp") == {"float32": 1} and set(found.dtypes("reduce")) == {"float32"}
    found = audit(both, q, k, v)
    assert found.dtypes("dot") == {dtype: 6}
    assert {op.output for op in found.select("dot").ops} == {dtype}
    assert set(found.dtypes("exp")) == set(found.dtypes("reduce")) == {"float32"}


def kept_shapes(fn, *args):
    """Shape and dtype of everything that the backward pass keeps, as jax's own pullback holds it."""
    pullback = jax.eval_shape(lambda *args: jax.vjp(fn, *args)[1], *args)
    return [(x.shape, x.dtype.name) for x in jax.tree.leaves(pullback)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("around", ["plain", "jit", "checkpoint"])
def test_the_backward_pass_keeps_half_precision_weights_and_nothing_of_their_size_in_float32(dtype, variant, around):
    q, k, v, _ = inputs(dtype)
    fn = {"plain": lambda f: f, "jit": jax.jit, "checkpoint": jax.checkpoint}[around]
    kept = kept_shapes(fn(lambda q, k, v: attention(q, k, v, **VARIANTS[variant])), q, k, v)
    large = [name for shape, name in kept if int(np.prod(shape)) >= QUERIES * KEYS and shape[-2:] == (QUERIES, KEYS)]
    given = [dtype for x in VARIANTS[variant].values() if getattr(x, "ndim", 0) == 4 for dtype in [x.dtype.name]]
    if around == "checkpoint":
        assert set(large) <= set(given)  # only what it was given, to run again
    else:
        assert large and set(large) == {dtype}
        # The weights once; with dropout also their product with the mask, and the mask itself.
        assert len(large) <= (3 if variant == "dropout" else 1)


def test_flaxs_own_attention_would_fail_this():
    """The yardstick: with a float32 softmax, Flax's product of weights and values is no half-precision product."""
    q, k, v, _ = inputs("bfloat16")

    def flax_attention(q, k, v):
        with jax.numpy_dtype_promotion("standard"):
            return nn.dot_product_attention(q, k, v, force_fp32_for_softmax=True)

    assert "bfloat16×float32" in {
        "×".join(sorted(op.operands)) for op in audit(flax_attention, q, k, v).select("dot").ops
    }
    assert "float32" in {name for shape, name in kept_shapes(flax_attention, q, k, v) if shape[-2:] == (QUERIES, KEYS)}


# The softmax by itself.


@FORMATS
def test_softmax_equals_float64_forward_and_backward_and_in_forward_mode(dtype):
    rng = np.random.default_rng(0)
    scores, t = (jnp.asarray(rng.normal(size=(4, 9)) * 4, dtype) for _ in range(2))
    mask = rng.uniform(size=(4, 9)) < 0.7
    mask[2] = False
    s = np.where(mask.any(-1, keepdims=True), np.where(mask, exact(scores), -np.inf), 0)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    alive = mask.any(-1, keepdims=True)
    ds = np.where(alive, p * (exact(t) - (p * exact(t)).sum(-1, keepdims=True)), 0)

    def softmax(scores):
        return softmax_float32(scores, jnp.asarray(mask), jnp.dtype(dtype))

    weights, (back,) = pulled(softmax, t, scores)
    u, f = facts(dtype).eps / 2, facts("float32").eps
    few = 16 * f  # a handful of float32 roundings: the difference, exp, a sum of nine, the quotient
    assert weights.dtype == jnp.dtype(dtype) and (np.abs(exact(weights) - p) <= (u + few) * p).all()
    assert (exact(weights)[~mask & alive] == 0).all()
    largest = np.abs(exact(t)).max()
    allowed = p * largest * (3 * (u + few) + 2 * u) + facts(dtype).smallest_subnormal
    forward = jax.jit(lambda s, t: jax.jvp(softmax, (s,), (t,))[1])(scores, t)
    assert back.dtype == forward.dtype == jnp.dtype(dtype)
    for found in (back, forward):  # the Jacobian is symmetric
        assert (np.abs(exact(found) - ds) <= allowed).all() and (exact(found)[2] == 0).all()
        assert (exact(found)[~mask] == 0).all()


def test_fault_17_float64_stays():
    with jax.enable_x64(True):
        s = np.random.default_rng(0).normal(size=(3, 5))
        true = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
        w, t = jax.jvp(lambda s: softmax_float32(s, None, s.dtype), (jnp.asarray(s),), (jnp.asarray(s),))
        tangent = true * (s - (true * s).sum(-1, keepdims=True))
        q, bias = jnp.asarray(s[None, :, None, :]), jnp.zeros((1, 1, 3, 3), jnp.float64)
        weights = np.exp(s @ s.T / np.sqrt(5))
        out = attention(q, q, q, bias=bias)[0, :, 0]
        for got, hand in ((w, true), (t, tangent), (out, weights / weights.sum(-1, keepdims=True) @ s)):
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, hand, rtol=0, atol=2**-48)


def test_softmax_under_vmap_and_scan():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 5)), "bfloat16")

    def total(x):
        return softmax_float32(x, None, jnp.dtype("bfloat16")).astype(jnp.float32)[..., 0].sum()

    def scanned(x):
        return jax.lax.scan(lambda c, y: (c + total(y), None), jnp.float32(0), x)[0]

    grads, mapped, through = (
        exact(jax.jit(f)(x)) for f in (jax.grad(total), jax.vmap(jax.grad(total)), jax.grad(scanned))
    )
    assert (mapped == grads).all() and (through == grads).all() and (grads != 0).any()


# The fused kernel: where it is taken.


def shapes(dtype="bfloat16", length=64, depth=64, batch=(2,), kv_length=None):
    def one(n):
        return jnp.zeros((*batch, n, 1, depth), dtype)

    return one(length), one(kv_length or length), one(kv_length or length)


def test_the_fused_kernel_is_taken_where_its_documented_limits_hold(monkeypatch):
    assert not fits_cudnn(*shapes(), None) or jax.default_backend() == "gpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for fitting in (shapes(), shapes("float16"), shapes(depth=8), shapes(depth=128), shapes(length=128, kv_length=64)):
        assert fits_cudnn(*fitting, None)
    assert fits_cudnn(*shapes(), jnp.ones((2, 1, 64, 64), bool))
    for unfit in (
        shapes("float32"),
        shapes(depth=12),
        shapes(depth=256),
        shapes(length=63),
        shapes(kv_length=65),
        shapes(batch=()),
        shapes(batch=(2, 2)),
    ):
        assert not fits_cudnn(*unfit, None)
    q, k, v = shapes()
    assert not fits_cudnn(q, shapes("float16")[1], v, None)
    assert not fits_cudnn(q, k, shapes(depth=32)[2], None)


@pytest.mark.parametrize(
    ("more", "fused"),
    [
        ({}, True),
        ({"mask": np.ones((1, 1, 64, 64), bool)}, True),
        ({"dropout_rate": 0.5, "deterministic": True}, True),
        ({"dropout_rate": 0.5, "dropout_rng": 0}, False),  # the kernel would lose the dropout in silence
        ({"bias": np.zeros((1, 1, 64, 64), np.float32)}, False),
        ({"precision": "highest"}, False),
    ],
)
def test_the_fused_kernel_is_taken_only_where_it_computes_the_same(monkeypatch, more, fused):
    taken = []
    monkeypatch.setattr(room, "fits_cudnn", lambda *args: True)
    monkeypatch.setattr(room, "_cudnn", lambda q, k, v, mask, is_causal: taken.append(True) or v)
    make = {"dropout_rng": jax.random.key, "mask": jnp.asarray, "bias": jnp.asarray}
    more = {name: make[name](x) if name in make else x for name, x in more.items()}
    jax.eval_shape(lambda q, k, v: attention(q, k, v, **more), *shapes())
    assert bool(taken) is fused


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["none", "causal", "padding", "random"])
def test_the_fused_kernel_equals_float64_forward_and_backward(dtype, kind):
    q, k, v, g = inputs(dtype, queries=64, keys=128, heads=2, depth=64)
    rng = np.random.default_rng(0)
    mask = {
        "none": None,
        "causal": np.tril(np.ones((1, 1, 64, 128), bool)),
        "padding": np.arange(128)[None, None, None]
        < np.array([100, 0]).reshape(2, 1, 1, 1),  # one example sees nothing
        "random": rng.uniform(size=(2, 2, 64, 128)) < 0.5,
    }[kind]
    if kind == "random":
        mask[1, 0, 7] = False
    given = None if mask is None else jnp.asarray(mask)
    assert fits_cudnn(q, k, v, given)
    assert "dot_product_attention_fwd" in str(jax.make_jaxpr(lambda q: attention(q, k, v, mask=given))(q))
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask=given), q, k, v)
    reference, grads = by_hand(q, k, v, g, mask=mask)
    allowed = bounds(q, k, v, g, dtype)
    for name, found, truth in zip(
        ("out", *"qkv"), (out, *pull(g)), (reference, *(grads[x] for x in "qkv")), strict=True
    ):
        assert np.abs(exact(found) - truth).max() <= allowed[name], name
    if mask is not None:
        dead = ~np.broadcast_to(mask, (2, 2, 64, 128)).any(-1).swapaxes(1, 2)
        assert (exact(pull(g)[0])[dead] == 0).all()
