"""Products in eight bits: exact against the product of what ml_dtypes rounds, near float64 within the formats' own error.

The bound. An operand v = s·q has the error |v - s·q| <= u|v| + s·t, with u half of the format's eps and t half of its
smallest subnormal: for e4m3 2^-4 and 2^-10, for e5m2 2^-3 and 2^-17; for int8 u = 0 and s·t half a step of its row. For a
sum of products that gives `sum (|a| + ea)(|b| + eb) - |a||b|`, and the output's own rounding stands on top.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mpjax.numerics.dot import QuantizedDot, fits_tiles, transposed

E4M3, E5M2 = jnp.dtype("float8_e4m3fn"), jnp.dtype("float8_e5m2")
PLAIN = (((1,), (0,)), ((), ()))
CASES = {  # shapes of both sides, and what is contracted; in the last two in another order
    "2-D": ((24, 32), (32, 16), (((1,), (0,)), ((), ()))),
    "tokens": ((2, 5, 32), (32, 16), (((2,), (0,)), ((), ()))),
    "heads out": ((2, 5, 32), (32, 4, 8), (((2,), (0,)), ((), ()))),
    "heads in": ((2, 5, 4, 8), (4, 8, 48), (((2, 3), (0, 1)), ((), ()))),
    "swapped": ((2, 8, 5, 4), (4, 16, 8), (((3, 1), (0, 2)), ((), ()))),
    "weights first": ((3, 4, 8), (8, 16, 4), (((2, 1), (0, 2)), ((), ()))),
}

recipes = pytest.mark.parametrize("recipe", ["fp8", "int8"])


def exact(x):
    return np.asarray(x, np.float64)


def operands(case, dtype, seed=0):
    """x, w and the cotangent: of the sizes that they have in training, exact in `dtype`."""
    x_shape, w_shape, (contracted, _) = CASES[case]
    rng = np.random.default_rng(seed)
    x, w = 3 * rng.normal(size=x_shape), 0.02 * rng.normal(size=w_shape)
    g = 1e-2 * rng.normal(size=np.tensordot(x, w, contracted).shape)
    return tuple(jnp.asarray(v, dtype) for v in (x, w, g))


def pulled(dot, numbers, x, w, g, **kwargs):
    return compiled(dot, numbers, *kwargs.items())(x, w, g)


@functools.cache
def compiled(dot, numbers, *kwargs):
    def both(x, w, g):
        y, pull = jax.vjp(lambda x, w: dot(x, w, numbers, **dict(kwargs)), x, w)
        return y, *pull(g)

    return jax.jit(both)


def products(numbers, x, w, g, way=lambda v, kind, axes: v, combine=np.tensordot):
    """y, dx and dw by numpy; `way` makes of each operand what is multiplied, over these axes of it.

    One einsum for all three, so that no transpose is done here that the code under test would do too.
    """
    (x_over, w_over), _ = numbers
    names = iter("abcdefghijk")
    x_names = [next(names) for _ in range(x.ndim)]
    w_names = [next(names) for _ in range(w.ndim)]
    for i, j in zip(x_over, w_over, strict=True):
        w_names[j] = x_names[i]
    g_names = [n for n in x_names if n not in w_names] + [n for n in w_names if n not in x_names]

    def one(a, a_names, a_kind, b, b_names, b_kind, out):
        over = set(a_names) & set(b_names)
        a = way(a, a_kind, tuple(i for i, n in enumerate(a_names) if n in over))
        b = way(b, b_kind, tuple(i for i, n in enumerate(b_names) if n in over))
        return np.einsum(f"{''.join(a_names)},{''.join(b_names)}->{''.join(out)}", a, b)

    return (
        one(x, x_names, "x", w, w_names, "w", g_names),
        one(g, g_names, "g", w, w_names, "w", x_names),
        one(g, g_names, "g", x, x_names, "x", w_names),
    )


def rounded(recipe):
    """What the recipe multiplies: v, rounded to eight bits by ml_dtypes or numpy and scaled back, in float64."""

    def float8(v, kind, axes):
        dtype, top = (E5M2, 57344) if kind == "g" else (E4M3, 448)
        scale = 2.0 ** np.ceil(np.log2(np.abs(exact(v)).max() / top))
        return (exact(v) / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale

    def int8(v, kind, axes):
        v = np.asarray(v, np.float32)
        scale = np.abs(v).max(axes, keepdims=True) / np.float32(127)
        return np.rint(v / scale).astype(np.float64) * scale.astype(np.float64)

    return float8 if recipe == "fp8" else int8


def ties(recipe):
    """A step where a value lies beside a half of it: there int8 may go either way, by one rounding of the scale."""

    def of(v, kind, axes):
        v = np.abs(exact(v))
        step = v.max(axes, keepdims=True) / 127
        return step * (np.abs(v / step - np.floor(v / step) - 0.5) < 1e-4) * (recipe == "int8")

    return of


def errors(recipe):
    """`|v|` and the largest error of its rounding, each a tensor like v."""

    def of(v, kind, axes):
        v = np.abs(exact(v))
        if recipe == "int8":
            return v, v.max(axes, keepdims=True) / 127 * 0.5001 * np.ones_like(v)
        dtype, top = (E5M2, 57344) if kind == "g" else (E4M3, 448)
        info = ml_dtypes.finfo(dtype)
        scale = 2.0 ** np.ceil(np.log2(v.max() / top))
        return v, float(info.eps) / 2 * v + scale * float(info.smallest_subnormal) / 2

    return of


def bound(recipe, numbers, x, w, g, out):
    of = errors(recipe)
    sizes = products(numbers, x, w, g, lambda *a: of(*a)[0])
    grown = products(numbers, x, w, g, lambda *a: sum(of(*a)))
    eps = float(ml_dtypes.finfo(out).eps)
    return [high - low + (eps / 2 + 2**-18) * high for low, high in zip(sizes, grown, strict=True)]


@recipes
@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, "bfloat16") for case in CASES), ("heads in", "float16"), ("heads in", "float32")]
)
def test_value_and_gradients_are_those_of_the_rounded_operands(case, recipe, dtype):
    """Scales, transposes and dtypes, to the rounding of the output; and near float64 by the formats' own error."""
    numbers, given = CASES[case][2], operands(case, dtype)
    found = pulled(QuantizedDot(recipe), numbers, *given)
    assert [v.dtype for v in found] == [jnp.dtype(dtype)] * 3
    by_hand = products(numbers, *given, rounded(recipe))
    unrounded = products(numbers, *(exact(v) for v in given))
    sums = products(numbers, *given, lambda *a: np.abs(rounded(recipe)(*a)))
    eps = float(ml_dtypes.finfo(dtype).eps)
    # float16: gradients of 1e-3 and less are subnormal there, and round to a multiple of 2^-24.
    least = float(ml_dtypes.finfo(dtype).smallest_subnormal) / 2
    loose = products(numbers, *given, lambda *a: np.abs(rounded(recipe)(*a)) + ties(recipe)(*a))
    for got, hand, true, total, either, near in zip(
        found, by_hand, unrounded, sums, loose, bound(recipe, numbers, *given, dtype), strict=True
    ):
        assert got.shape == hand.shape
        once = eps / 2 * np.abs(hand) * (1 + 2**-10) + least + 64 * 2**-24 * total + 1.01 * (either - total)
        assert (np.abs(exact(got) - hand) <= once).all()
        assert (np.abs(exact(got) - true) <= near + least).all()
    assert not np.array_equal(by_hand[0], unrounded[0])  # something was rounded


def test_each_scale_uses_the_whole_range_of_its_format():
    """A scale of twice what it should be moves only what is subnormal in float8: each row here is a number by itself."""
    rows = np.zeros((40, 16))
    rows[np.arange(40), np.arange(40) % 16] = 1.3 * 2.0 ** -np.arange(40)
    x = g = jnp.asarray(rows, jnp.float32)
    w = jnp.asarray(1.7 * np.eye(16) * 2.0 ** -np.arange(16), jnp.float32)
    found = pulled(QuantizedDot("fp8"), PLAIN, x, w, g)
    by_hand = products(PLAIN, x, w, g, rounded("fp8"))
    for got, hand, (low, high) in zip(found[:2], by_hand[:2], [(15, 20), (28, 34)], strict=True):
        assert exact(got).tolist() == hand.tolist()  # one summand each, and powers of two: nothing else is rounded
        assert low <= hand.any(1).sum() <= high  # the rest is under float8's smallest


@recipes
def test_the_result_is_in_the_dtype_that_is_asked_for(recipe):
    x, w, g = operands("tokens", "bfloat16")
    y, dx, dw = pulled(
        QuantizedDot(recipe), CASES["tokens"][2], x, w, g.astype("float32"), preferred_element_type=jnp.float32
    )
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    by_hand = products(CASES["tokens"][2], x, w, g, rounded(recipe))
    np.testing.assert_allclose(y, by_hand[0], rtol=1e-5, atol=1e-5 * np.abs(by_hand[0]).max())


def test_transposed_is_what_jax_does_for_any_dimension_numbers():
    rng = np.random.default_rng(3)
    drawn = []
    for _ in range(12):
        batch, over, left, right = rng.integers(0, 3), rng.integers(0, 3), rng.integers(0, 3), rng.integers(0, 3)
        sizes = rng.integers(1, 4, 12).tolist()
        x_axes = rng.permutation(batch + over + left).tolist()
        w_axes = rng.permutation(batch + over + right).tolist()
        shared = sizes[: batch + over]
        x_shape, w_shape = [0] * len(x_axes), [0] * len(w_axes)
        for axis, size in zip(x_axes, shared + sizes[4 : 4 + left], strict=True):
            x_shape[axis] = size
        for axis, size in zip(w_axes, shared + sizes[8 : 8 + right], strict=True):
            w_shape[axis] = size
        batches = tuple(x_axes[:batch]), tuple(w_axes[:batch])
        numbers = (tuple(x_axes[batch : batch + over]), tuple(w_axes[batch : batch + over])), batches
        x, w = (jnp.asarray(rng.integers(-4, 5, shape), jnp.float32) for shape in (x_shape, w_shape))
        shape = jax.eval_shape(lambda x, w, numbers=numbers: jax.lax.dot_general(x, w, numbers), x, w).shape
        drawn.append((numbers, x, w, jnp.asarray(rng.integers(-4, 5, shape), jnp.float32)))

    @jax.jit  # one program for all: compiling is what takes time
    def all_of(arrays):
        pairs = []
        for (numbers, *_), (x, w, g) in zip(drawn, arrays, strict=True):
            _, pull = jax.vjp(lambda x, w, numbers=numbers: jax.lax.dot_general(x, w, numbers), x, w)
            for right_side, operands, true in ((False, (g, w), pull(g)[0]), (True, (x, g), pull(g)[1])):
                turned, axes = transposed(numbers, x.ndim, w.ndim, right_side)
                pairs.append((jax.lax.dot_general(*operands, turned).transpose(axes), true))
        return pairs

    for found, true in all_of([arrays for _, *arrays in drawn]):
        assert found.tolist() == true.tolist()  # small integers: exact
    assert any(numbers[1][0] for numbers, *_ in drawn)  # batch axes were among them


# Which products there are.


def dots(fn, *args):
    """The operand and result dtypes of every product in a jaxpr, however deep."""
    found = collections.Counter()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                found[tuple(v.aval.dtype.name for v in (*eqn.invars, *eqn.outvars))] += 1
            for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
                if hasattr(sub, "eqns"):
                    walk(getattr(sub, "jaxpr", sub))
                elif hasattr(getattr(sub, "jaxpr", None), "eqns"):
                    walk(sub.jaxpr)

    walk(jax.make_jaxpr(fn)(*args).jaxpr)
    return dict(found)


EIGHT = {
    "fp8": {
        ("float8_e4m3fn", "float8_e4m3fn"): 1,
        ("float8_e5m2", "float8_e4m3fn"): 1,
        ("float8_e4m3fn", "float8_e5m2"): 1,
    },
    "int8": {("int8", "int8"): 3},
}
WIDE = {"fp8": ("bfloat16",), "int8": ("int32",)}


def expected(recipe, forward_again=0):
    forward = next(iter(EIGHT[recipe]))
    return {(*pair, *WIDE[recipe]): n + (forward_again if pair == forward else 0) for pair, n in EIGHT[recipe].items()}


@recipes
@pytest.mark.parametrize("under", ["plain", "jit", "checkpoint", "vmap", "scan"])
def test_all_three_products_run_in_eight_bits(recipe, under):
    """It fails if the forward product or either gradient runs in bfloat16."""
    dot = QuantizedDot(recipe)
    x, w = jnp.ones((4, 8, 32), jnp.bfloat16), jnp.ones((32, 16), jnp.bfloat16)
    stack = jnp.ones((3, 32, 32), jnp.bfloat16)

    def layer(x, w):
        return dot(x, w, (((x.ndim - 1,), (0,)), ((), ())))

    calls = {
        "plain": layer,
        "jit": jax.jit(layer),
        "checkpoint": jax.checkpoint(layer),
        "vmap": lambda x, w: jax.vmap(layer, (0, None))(x, w),
        "scan": lambda x, w: jax.lax.scan(lambda c, w: (layer(c, w), None), x, w)[0],
    }

    def loss(x, w):
        return calls[under](x, w).astype(jnp.float32).sum()

    found = dots(jax.value_and_grad(loss, (0, 1)), x, stack if under == "scan" else w)
    # A jaxpr under checkpoint holds the forward product once more; without a use for it, XLA leaves that out.
    assert found in ([expected(recipe, 0), expected(recipe, 1)] if under == "checkpoint" else [expected(recipe)])


def test_the_reading_of_a_jaxpr_finds_a_bfloat16_product():
    x, w = jnp.ones((8, 32), jnp.bfloat16), jnp.ones((32, 16), jnp.bfloat16)
    found = dots(jax.grad(lambda x: jax.jit(jax.lax.dot)(x, w).astype(jnp.float32).sum()), x)
    assert sum(found.values()) >= 1 and all(names == ("bfloat16",) * 3 for names in found)


@recipes
@pytest.mark.parametrize(
    ("x", "w", "numbers"),
    [
        ((8, 32), (32, 10), PLAIN),
        ((8, 24), (24, 16), PLAIN),
        ((8, 32), (32, 3, 8), PLAIN),
        ((2, 8, 32), (2, 32, 16), (((2,), (1,)), ((0,), (0,)))),
        ((8, 0), (0, 16), PLAIN),
    ],
)
def test_what_no_eight_bit_gemm_takes_is_multiplied_as_it_came(x, w, numbers, recipe):
    assert not fits_tiles(w, numbers)
    x, w = jnp.ones(x, jnp.bfloat16), jnp.ones(w, jnp.bfloat16)

    def loss(dot):
        return lambda x, w: dot(x, w, numbers).astype(jnp.float32).sum()

    found = dots(jax.grad(loss(QuantizedDot(recipe)), (0, 1)), x, w)
    assert set(found) <= {("bfloat16",) * 3} and found == dots(jax.grad(loss(jax.lax.dot_general), (0, 1)), x, w)


def test_tiles_are_the_products_of_the_weights_axes():
    assert fits_tiles((4, 4, 32), (((0, 1), (0, 1)), ((), ()))) and fits_tiles((2, 16, 8), (((0,), (1,)), ((), ())))
    assert not fits_tiles((16,), (((0,), (0,)), ((), ()))) and not fits_tiles((2, 8, 8), (((0,), (1,)), ((), ())))


# A gradient of a gradient.


def penalty(dot, x, w):
    return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.square(dot(x, w, PLAIN))))(x) ** 2)


def test_int8_has_second_derivatives():
    """Each row is of one magnitude, so that no rounding to eight bits changes it: what is left is that of float32."""
    x, w = jnp.full((2, 16), 3.0), jnp.eye(16) * 2
    twice = jax.jit(jax.grad(penalty, (1, 2)), static_argnums=0)
    found, true = (twice(dot, x, w) for dot in (QuantizedDot("int8"), jax.lax.dot_general))
    for got, expected in zip(found, true, strict=True):
        assert expected.any()
        np.testing.assert_allclose(got, expected, rtol=2**-18)


def test_float8_has_no_second_derivative_and_says_so():
    dot, x, w = QuantizedDot("fp8"), jnp.full((2, 16), 3.0), jnp.eye(16) * 2
    with pytest.raises(NotImplementedError, match=r"second derivative.*legal is one.*use dot=int8"):
        jax.grad(penalty, 2)(dot, x, w)
    by_bias = jax.grad(lambda w, b: jnp.sum(jnp.square(dot(x, w, PLAIN) + b)), (0, 1))
    with pytest.raises(NotImplementedError, match="second derivative"):
        jax.grad(lambda w: by_bias(w, jnp.ones((1, 16)))[1].sum())(w)


# What is large, zero, or not finite.


@recipes
def test_a_float16_product_whose_unscaled_sum_is_over_its_range(recipe):
    """448 · 448 · 64 is 12.8 million in units of the scales; the true sums are 0.4 and fit."""
    x = jnp.full((4, 64), 0.5, jnp.float16)
    w, g = jnp.full((64, 16), 0.0125, jnp.float16), jnp.full((4, 16), 100, jnp.float16)
    y, dx, dw = pulled(QuantizedDot(recipe), PLAIN, x, w, g)
    for got, true in ((y, 0.4), (dx, 20.0), (dw, 200.0)):
        assert got.dtype == jnp.float16 and (np.abs(exact(got) / true - 1) < 2**-4 + 2**-3 + 0.01).all()
    by_hand = products(PLAIN, x, w, g, rounded(recipe))
    for got, hand in zip((y, dx, dw), by_hand, strict=True):
        np.testing.assert_allclose(exact(got), hand, rtol=2**-10)


@recipes
def test_a_zero_operand_gives_zeros(recipe):
    x, w, g = operands("2-D", "bfloat16")
    y, dx, dw = pulled(QuantizedDot(recipe), PLAIN, 0 * x, w, g)
    assert not exact(y).any() and not exact(dw).any() and exact(dx).any()
    y, dx, dw = pulled(QuantizedDot(recipe), PLAIN, x, w, 0 * g)
    assert exact(y).any() and not exact(dx).any() and not exact(dw).any()


@recipes
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen_in_all_that_it_meets(recipe, bad):
    """fp8: the whole product; int8: the rows that it is in."""
    given = dict(zip("xwg", operands("2-D", "bfloat16"), strict=True))
    meets = {"x": (0, 2), "w": (0, 1), "g": (1, 2)}
    rows = {  # where int8 has to show it, the bad element being [3, 5] of its operand
        ("x", 0): np.s_[3, :], ("x", 2): np.s_[5, :], ("w", 0): np.s_[:, 5], ("w", 1): np.s_[:, 3],
        ("g", 1): np.s_[3, :], ("g", 2): np.s_[:, 5],
    }  # fmt: skip
    for name, touched in meets.items():
        spoiled = given | {name: given[name].at[3, 5].set(bad)}
        found = [exact(v) for v in pulled(QuantizedDot(recipe), PLAIN, *spoiled.values())]
        for i, v in enumerate(found):
            wrong = ~np.isfinite(v)
            if i not in touched:
                assert not wrong.any()
            elif recipe == "fp8":
                assert wrong.all()
            else:
                assert wrong[rows[name, i]].all() and wrong.sum() == wrong[rows[name, i]].size


def test_a_long_int8_sum_does_not_wrap_round():
    """127² 140,000 times is more than an int32 holds: the sum came out negative with 127 steps."""
    n = 140_000
    x, w = jnp.ones((1, n), jnp.float32), jnp.ones((n, 16), jnp.float32)
    y = jax.jit(QuantizedDot("int8"), static_argnums=2)(x, w, PLAIN)
    np.testing.assert_allclose(y, n, rtol=1e-6)


def test_another_recipe_is_refused():
    with pytest.raises(ValueError, match=r"got recipe 'fp4'; legal are fp8, int8"):
        QuantizedDot("fp4")
    assert QuantizedDot("fp8") == QuantizedDot() and hash(QuantizedDot("int8")) != hash(QuantizedDot())


def has_cuda_plugin():
    found = importlib.util.find_spec("jax_plugins") is not None
    return found and any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13))


@pytest.mark.skipif(
    not has_cuda_plugin(),
    reason="jax's CUDA plugin is not installed, with which an H100's program is compiled without one",
)
def test_an_h100s_program_holds_three_float8_products_and_no_other():
    """Without autotuning, which needs the chip, and Triton, which takes what is as small as this."""
    flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    script = Path(__file__).parents[1] / "sm90.py"
    path = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
    ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    three = {"__cublas$lt$matmul$f8": 3}
    found = json.loads(ran.stdout)
    assert found == {"fp8": three, "fp8_delayed": three, "none": {"__cublas$lt$matmul": 3}}
