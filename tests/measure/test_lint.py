"""The build lint on toy functions: each rule with one program that breaks it and its twin that does not."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mpjax.measure.lint import lint_function
from mpjax.measure.lint.finding import Finding, merged

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
X, W = jnp.ones((4, 8), F32), jnp.ones((8, 8), F32)
HALF, HALF_W = X.astype(BF16), W.astype(BF16)


def in_half(path):
    return "bfloat16"


def rules(fn, *args, compute_of=lambda path: None, params=None):
    return [found.rule for found in lint_function(fn, *args, compute_of=compute_of, params=params)]


def dot(x, w):
    return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())))


def softmax(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms(x):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


# The rule, a function that breaks it once, its twin that does not, and arguments for both.
PAIRS = {
    "mixed product": (lambda x: dot(x, W), lambda x: dot(x, HALF_W), HALF),
    "half softmax": (softmax, lambda x: softmax(x.astype(F32)).astype(BF16), HALF),
    "half softmax of jax": (jax.nn.softmax, lambda x: jax.nn.softmax(x.astype(F32)), HALF),
    "half softmax of a loss": (jax.nn.log_softmax, lambda x: jax.nn.log_softmax(x.astype(F32)), HALF),
    "half softmax and no sigmoid": (jax.nn.logsumexp, lambda x: x / (1 + jnp.exp(-x)) + jax.nn.gelu(x), HALF),
    "half softmax and no mean of exps": (jax.nn.softmax, lambda x: jnp.exp(x).mean(), HALF),
    "half variance": (rms, lambda x: rms(x.astype(F32)).astype(BF16), HALF),
    "half variance of jax": (lambda x: jnp.std(x, -1), lambda x: jnp.var(x, -1), HALF.astype(F16)),
    "half variance by its root": (
        lambda x: jnp.sqrt(jnp.square(x.astype(F32)).sum(-1).astype(BF16)),
        lambda x: jnp.sqrt(x) / x.astype(F32).sum(-1, keepdims=True).astype(BF16),
        HALF,
    ),
    "float64": (lambda x: (x * np.float64(2)).sum(), lambda x: (x * 2.0).sum(), X),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_a_rule_fires_and_is_silent(name):
    fires, silent, x = PAIRS[name]
    with jax.enable_x64(name == "float64"):
        wanted = name.split(" of ")[0].split(" and ")[0].split(" by ")[0]
        assert rules(fires, x) == [wanted]
        assert rules(silent, x) == []


def test_a_wide_product_is_one_only_where_the_policy_says_half():
    product = lambda x, w: dot(x, w)  # noqa: E731
    assert rules(product, X, W, compute_of=in_half) == ["wide product"]
    assert rules(product, X, W, compute_of=lambda path: "float32") == rules(product, X, W) == []
    assert rules(product, HALF, HALF_W, compute_of=in_half) == []
    conv = lambda x, w: jax.lax.conv_general_dilated(x[None], w[:, :4, None], (1,), "SAME")  # noqa: E731
    assert rules(conv, X, W, compute_of=in_half) == ["wide product"]
    assert rules(conv, HALF, HALF_W, compute_of=in_half) == []
    accumulated = functools.partial(jnp.matmul, preferred_element_type=F32)
    assert rules(accumulated, HALF, HALF_W, compute_of=in_half) == []


def test_two_float8_formats_are_what_a_float8_product_is_made_of():
    assert rules(dot, X.astype(jnp.float8_e5m2), W.astype(jnp.float8_e4m3fn)) == []
    assert rules(dot, X.astype(BF16), W.astype(jnp.float8_e4m3fn)) == ["mixed product"]


def add_up(x, dtype):
    """A sum without jnp's own float32."""
    return jax.lax.reduce(x, np.zeros((), dtype), jax.lax.add, (0,))


@pytest.mark.parametrize(("dtype", "countable"), [(BF16, 256), (F16, 2048), (F32, 2**24)])
def test_a_sum_is_long_where_one_more_no_longer_counts(dtype, countable):
    """By hand: 256 + 1 = 256 in bfloat16, 2048 + 1 = 2048 in float16."""
    assert dtype(countable) + dtype(1) == dtype(countable) != dtype(countable - 1)
    short, long = (jax.ShapeDtypeStruct((n, 3), dtype) for n in (countable, countable + 1))
    half = dtype is not F32
    assert rules(functools.partial(add_up, dtype=dtype), long) == ["long sum"] * half
    assert rules(functools.partial(add_up, dtype=dtype), short) == []
    assert rules(lambda x: jnp.cumsum(x, 0), long) == ["long sum"] * half
    assert rules(lambda x: jax.lax.reduce_max(x, (0,)), long) == []
    assert rules(lambda x: x.sum(0), long) == []  # jnp sums in float32


def loop(body, init, dtype, trips=300):
    return jax.lax.scan(lambda c, x: (body(c, x), None), init.astype(dtype), jnp.ones((trips, *init.shape), BF16))[0]


def test_a_carry_that_is_added_to_is_a_long_sum():
    start = jnp.zeros(3)
    assert rules(lambda s: loop(lambda c, x: c + x.astype(c.dtype), s, BF16), start) == ["long sum"]
    assert rules(lambda s: loop(lambda c, x: c + x.astype(c.dtype), s, F32), start) == []
    assert rules(lambda s: loop(lambda c, x: c + x.astype(c.dtype), s, BF16, trips=256), start) == []
    assert rules(lambda s: loop(lambda c, x: c * x, s, BF16), start) == []
    # The gradient of weights that every trip reads is such a carry: cast in the body it is float32.
    inputs = jnp.ones((300, 8), BF16)

    def recurrent(w, cast):
        outside = w.astype(BF16)
        body = lambda h, x: (jnp.tanh((outside if cast == "outside" else w.astype(BF16)) @ h + x), None)  # noqa: E731
        return jax.lax.scan(body, jnp.ones(8, BF16), inputs)[0].astype(F32).sum()

    assert rules(lambda w: jax.grad(recurrent)(w, "outside"), W) == ["long sum"]
    assert rules(lambda w: jax.grad(recurrent)(w, "inside"), W) == []


def test_the_gradient_of_a_lookup_is_a_long_sum():
    def looked_up(table, ids, first):
        rows = (
            jnp.take(table.astype(BF16), ids, axis=0) if first == "cast" else jnp.take(table, ids, axis=0).astype(BF16)
        )
        return rows.astype(F32).sum()

    def gradient(first, n):
        ids = jax.ShapeDtypeStruct((n,), jnp.int32)
        return rules(lambda table, ids: jax.grad(looked_up)(table, ids, first), W, ids)

    assert (gradient("cast", 257), gradient("cast", 256), gradient("look up", 257)) == (["long sum"], [], [])
    # What is picked one by one lies apart.
    labels = jax.ShapeDtypeStruct((300,), jnp.int32)
    picked = lambda x, labels: x[jnp.arange(300), labels].astype(F32).sum()  # noqa: E731
    assert rules(lambda x, labels: jax.grad(picked)(x, labels), jnp.ones((300, 8), BF16), labels) == []


def test_the_gradient_of_a_bias_is_no_finding_since_its_error_does_not_grow():
    """A sum over rows in half, as XLA adds it up, errs by a few roundings of the result, at 512 rows as at 32,768."""
    biased = lambda b, x: (x + b).astype(F32).sum()  # noqa: E731
    rows = jax.ShapeDtypeStruct((4096, 8), BF16)
    assert rules(lambda b, x: jax.grad(biased)(b, x), jnp.ones((1, 8), BF16), rows) == []
    random = np.random.default_rng(0)
    for dtype in (BF16, F16):
        for n in (512, 32768):
            x = jnp.asarray(random.normal(0.3, 1, (n, 64)) * 0.01, dtype)
            exact = np.asarray(x, np.float64).sum(0)
            found = np.asarray(jax.jit(functools.partial(add_up, dtype=dtype))(x), np.float64)
            # log₃₂ 32,768 = 3 levels of windows of 32, within which the steps of a walk of roundings add up.
            assert np.abs(found / exact - 1).mean() < 4 * float(jnp.finfo(dtype).eps)


def test_a_param_is_cast_once():
    def twice(p, x):
        return (x @ p["w"].astype(BF16).reshape(8, 8).astype(F32)).sum()

    def once_each(p, x):
        """Two modules read the same master, as a tied head does; remat reads it a third time."""
        read = jax.checkpoint(lambda w, x: x.astype(BF16) @ w.astype(BF16))
        return (read(p["w"], x) @ p["w"].astype(BF16).T).astype(F32).sum()

    (found,) = lint_function(twice, {"w": W}, X)
    assert found.rule == "param cast twice" and "param w is cast float32→bfloat16→float32" in found.what
    assert rules(once_each, {"w": W}, X, params=0) == []
    # An embedding's rows are no param any more when a norm widens them, and the param's own sum is another number.
    rows = lambda p, i: p["w"].astype(BF16)[i].astype(F32).sum()  # noqa: E731
    assert rules(rows, {"w": W}, jnp.arange(3), params=0) == []
    assert rules(lambda p, x: (x * (p["w"].astype(BF16) + 1).astype(F32)[:4]).sum(), {"w": W}, X, params=0) == []


def test_a_param_is_followed_into_loops_and_calls():
    first = lambda w: w.astype(BF16)  # noqa: E731
    again = lambda w: w.astype(F32)  # noqa: E731
    stack = jnp.ones((3, 8, 8))

    @jax.custom_vjp
    def straight(w):
        return again(w)

    straight.defvjp(lambda w: (again(w), None), lambda _, g: (g.astype(BF16),))
    ways = {
        "jit": lambda p, x: x @ jax.jit(again)(first(p[0])),
        "scan over slices": lambda p, x: jax.lax.scan(lambda h, w: (h @ again(w), None), x, first(p))[0],
        "scan closed over": lambda p, x: jax.lax.scan(lambda h, _: (h @ again(first(p[0])), None), x, length=2)[0],
        "scan carry": lambda p, x: jax.lax.scan(lambda c, _: ((c[0], c[1] @ again(c[0])), None), (first(p[0]), x), length=2)[0][1],
        "remat": lambda p, x: jax.checkpoint(lambda w: x @ again(w))(first(p[0])),
        "cond": lambda p, x: jax.lax.cond(x.sum() > 0, lambda w: x @ again(w), lambda w: x, first(p[0])),
        "custom_vjp": lambda p, x: x @ straight(first(p[0])),
    }  # fmt: skip
    for name, fn in ways.items():
        assert "param cast twice" in rules(lambda p, x, fn=fn: fn(p, x).sum(), stack, X, params=0), name


def test_a_float32_activation_is_not_saved_where_half_is_meant():
    def soft(w, x, keeps):
        scores = x @ w.astype(BF16)
        weights = jax.nn.softmax(scores.astype(F32)).astype(BF16)
        return jnp.tanh(weights @ w.astype(BF16)).astype(F32).sum() if keeps else scores.astype(F32).sum()

    (found,) = lint_function(functools.partial(soft, keeps=True), W, HALF, compute_of=in_half)
    assert found.rule == "wide residual"
    # By hand: exp and its broadcast sum, 4×8 float32 each at most; the row's own sums are 4 numbers.
    assert rules(functools.partial(soft, keeps=False), W, HALF, compute_of=in_half, params=0) == []
    assert rules(functools.partial(soft, keeps=True), W, HALF, compute_of=lambda path: "float32", params=0) == []
    mended = jax.checkpoint(lambda s: jax.nn.softmax(s.astype(F32)).astype(BF16))
    assert (
        rules(
            lambda w, x: jnp.tanh(mended(x @ w.astype(BF16))).astype(F32).sum(), W, HALF, compute_of=in_half, params=0
        )
        == []
    )


def test_what_is_tiny_is_left_alone():
    """One float32 number a row, beside rows of 512 numbers in half of which two are kept."""

    def scaled(w, x, per):
        h = jnp.tanh(jnp.tanh(x @ w.astype(BF16)))
        peak = jnp.exp(h[:, :per].astype(F32) * 0.5)  # what an exp keeps is its result
        return (h * peak.astype(BF16).mean(1, keepdims=True)).astype(F32).sum()

    w, x = jnp.ones((8, 512)), jnp.ones((4, 8), BF16)
    assert rules(functools.partial(scaled, per=1), w, x, compute_of=in_half, params=0) == []
    assert rules(functools.partial(scaled, per=256), w, x, compute_of=in_half, params=0) == ["wide residual"]


def test_a_residual_is_followed_out_of_a_scan():
    def layers(stack, x):
        body = lambda h, w: (jnp.exp((h @ w.astype(BF16)).astype(F32)).astype(BF16), None)  # noqa: E731
        return jax.lax.scan(body, x, stack)[0].astype(F32).sum()

    (found,) = lint_function(layers, jnp.ones((3, 8, 8)), HALF, compute_of=in_half)
    assert found.what.startswith(f"{3 * 4 * 8 * 4} bytes of float32 (from exp) are kept")


BREAKS = {
    "mixed product": lambda x: dot(x, W.astype(F32)).astype(BF16),
    "half softmax": lambda x: softmax(x),
}


def inside_shard_map(fn, x):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("data")
    return jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)


def inside_custom_vjp(fn, x):
    @jax.custom_vjp
    def same(x):
        return fn(x)

    same.defvjp(lambda x: (fn(x), None), lambda _, g: (g,))
    return same(x)


INSIDE = {
    "jit": lambda fn, x: jax.jit(fn)(x),
    "scan": lambda fn, x: jax.lax.scan(lambda h, _: (fn(h), None), x, length=2)[0],
    "while": lambda fn, x: jax.lax.while_loop(lambda h: h.astype(F32).sum() < 0, fn, x),
    "while's condition": lambda fn, x: jax.lax.while_loop(lambda h: fn(h).astype(F32).sum() < 0, lambda h: h, x),
    "cond": lambda fn, x: jax.lax.cond(x.astype(F32).sum() > 0, fn, lambda x: x, x),
    "custom_vjp": inside_custom_vjp,
    "the backward pass of custom_vjp": lambda fn, x: jax.grad(lambda x: inside_custom_vjp(fn, x).astype(F32).sum())(x),
    "remat": lambda fn, x: jax.checkpoint(fn)(x),
    "the backward pass of remat": lambda fn, x: jax.grad(lambda x: jax.checkpoint(fn)(x).astype(F32).sum())(x),
    "shard_map": inside_shard_map,
}


@pytest.mark.parametrize("where", INSIDE)
@pytest.mark.parametrize("rule", BREAKS)
def test_rules_reach_inside(rule, where):
    assert rules(lambda x: INSIDE[where](BREAKS[rule], x), HALF) == [rule]


def test_a_softmax_that_is_cut_in_two_by_a_loop_is_one():
    """Exponentials summed block by block in a scan's carry, and divided behind it."""

    def online(x):
        total, _ = jax.lax.scan(
            lambda t, block: (t + jnp.exp(block).sum(-1), None), jnp.zeros(4, BF16), x.T[:, :, None]
        )
        return x / total[:, None]

    assert rules(online, HALF) == ["half softmax"]


def test_findings_of_one_rule_at_one_path_are_one():
    here = Finding("a", "mixed product", "first", "mend")
    found = merged(
        [here, Finding("b", "mixed product", "x", "y"), Finding("a", "mixed product", "second", "mend"), here]
    )
    assert [str(f) for f in found] == ["a: first (3 places): mend", "b: x: y"]
    (found,) = lint_function(lambda x: (dot(x, W), dot(x, W.T)), HALF, params=None)
    assert found.count == 2 and found.path == "outside of any module"


def test_what_compute_of_says_must_be_a_dtype():
    with pytest.raises(ValueError, match="use one of"):
        lint_function(dot, X, W, compute_of=lambda path: "bf17")
