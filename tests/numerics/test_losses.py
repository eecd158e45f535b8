"""Losses against float64 by hand: values, gradients, the dtypes in the jaxpr, what is kept, and what masking hides.

Tolerances. A float32 sum over K classes is off by at most K half-ulps of its terms, and exp and log add a few more: a
loss is within (K + 8)·eps32·(1 + max|x − m|) of the exact one. A gradient that leaves in a half format is rounded once
more, by eps/2 of its size, or by half the smallest subnormal.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import TypeCheckError

from mpjax import losses

CLASSES = 23
EPS32 = float(np.finfo(np.float32).eps)
DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32]
HALVES = [jnp.bfloat16, jnp.float16]


def draw(dtype: Any, *shape: int, seed: int = 0, scale: float = 4.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, dtype)


def value_and_slope(f: Callable, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`f(x)` and the gradient of its sum, compiled once."""
    (_, value), slope = jax.jit(jax.value_and_grad(lambda x: ((y := f(x)).sum(), y), has_aux=True))(x)
    return value, slope


def exact(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


def by_hand(x, y, smoothing=0.0, z=0.0) -> tuple[np.ndarray, np.ndarray]:
    """Loss and its gradient by the logits in float64, from probabilities `y`."""
    y = (1 - smoothing) * y + smoothing / x.shape[-1]
    lse = np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1)
    p = np.exp(x - lse[..., None])
    loss = y.sum(-1) * lse - (y * x).sum(-1) + z * lse**2
    return loss, (y.sum(-1) + 2 * z * lse)[..., None] * p - y


def float32_error(x: np.ndarray) -> float:
    return (x.shape[-1] + 8) * EPS32 * (1 + np.ptp(x))


def assert_rounded(got: jax.Array, want: np.ndarray, slack: float) -> None:
    """`got` is `want` computed to within `slack` and then rounded once to got's dtype."""
    info = jnp.finfo(got.dtype)
    bound = slack + float(info.eps) / 2 * np.abs(want) + float(info.smallest_subnormal) / 2
    np.testing.assert_array_less(np.abs(exact(got) - want), bound)


def leaves_of(dtype: Any, name: str) -> tuple[Callable, tuple]:
    """Each loss as a function of what it differentiates, with inputs of four examples."""
    x, other = draw(dtype, 4, CLASSES), draw(dtype, 4, CLASSES, seed=1)
    labels, soft = jnp.arange(4), jax.nn.softmax(other.astype(jnp.float32))
    frames, pads, tail = draw(dtype, 4, 5, 3), jnp.zeros((4, 5)), jnp.zeros((4, 2))
    words = jnp.array([[1, 2], [2, 2], [1, 1], [2, 1]])
    return {
        "integer": (lambda x, w=None: losses.softmax_cross_entropy(x, labels, weights=w, z_loss=1e-2), x),
        "smooth": (lambda x, w=None: losses.softmax_cross_entropy(x, labels, weights=w, label_smoothing=0.1), x),
        "soft": (lambda x, w=None: losses.softmax_cross_entropy(x, soft, weights=w, z_loss=1e-2), x),
        "sigmoid": (lambda x, w=None: losses.sigmoid_cross_entropy(x, soft, across(w)), x),
        "squared": (lambda x, w=None: losses.squared_error(x, other, across(w)), x),
        "mean_squared": (lambda x, w=None: losses.mean_squared_error(x, other, w), x),
        "ctc": (lambda x, w=None: losses.ctc(x, pads, words, tail, weights=w), frames),
    }[name]


def across(weights: jax.Array | None) -> jax.Array | None:
    return None if weights is None else jnp.broadcast_to(weights[:, None], (4, CLASSES))


jitted = jax.jit(losses.softmax_cross_entropy, static_argnames=("label_smoothing", "z_loss"))
NAMES = ["integer", "smooth", "soft", "sigmoid", "squared", "mean_squared", "ctc"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft", [False, True])
def test_softmax_cross_entropy_equals_float64(dtype, soft):
    logits, weights = draw(dtype, 2, 3, CLASSES), draw(jnp.float32, 2, 3, seed=2)
    classes = jnp.asarray(np.random.default_rng(3).integers(CLASSES, size=(2, 3)))
    y = jax.nn.softmax(draw(jnp.float32, 2, 3, CLASSES, seed=4)) if soft else jax.nn.one_hot(classes, CLASSES)
    settings = [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.3, 1e-4)]

    def all_settings(x, w):
        labels = y if soft else classes
        pick = lambda s, z: losses.softmax_cross_entropy(x, labels, label_smoothing=s, z_loss=z, weights=w)  # noqa: E731
        return [pick(s, z) for s, z in settings]

    @jax.jit
    def run(x, w):
        values = all_settings(x, w)
        return values, [jax.grad(lambda x, i=i: all_settings(x, w)[i].sum())(x) for i in range(4)]

    w = exact(weights)
    error = 2 * float32_error(exact(logits)) * np.abs(w).max()  # twice: soft labels and the z-loss add up once more
    for (smoothing, z), value, gradient in zip(settings, *run(logits, weights), strict=True):
        want, slope = by_hand(exact(logits), exact(y), smoothing, z)
        assert value.dtype == jnp.float32 and value.shape == (2, 3) and gradient.dtype == dtype
        np.testing.assert_allclose(value, w * want, rtol=0, atol=error)
        assert_rounded(gradient, w[..., None] * slope, error)


@jax.jit
def with_optax(logits, labels):
    usual = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    smooth = optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(labels, CLASSES), 0.1))
    ours = losses.softmax_cross_entropy(logits, labels)
    return usual - ours, smooth - losses.softmax_cross_entropy(logits, labels, label_smoothing=0.1)


def test_the_same_as_optax_in_float32():
    logits = draw(jnp.float32, 4, CLASSES)
    for difference in with_optax(logits, jnp.arange(4)):
        assert np.abs(difference).max() < 2 * float32_error(exact(logits))  # both sides are off


def test_soft_labels_get_their_gradient_too_even_at_zero():
    logits, y = draw(jnp.bfloat16, 3, CLASSES), jnp.zeros((3, CLASSES)).at[:, 2].set(1.0)
    gradient = jax.jit(jax.grad(lambda y: losses.softmax_cross_entropy(logits, y).sum()))(y)
    x = exact(logits)
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    np.testing.assert_allclose(gradient, -log_p, rtol=0, atol=float32_error(x))


def test_forward_mode_and_second_derivatives():
    logits, labels = draw(jnp.float32, 5), jnp.array(1)
    p = np.exp(exact(logits)) / np.exp(exact(logits)).sum()
    hessian = jax.jit(jax.hessian(lambda x: losses.softmax_cross_entropy(x, labels)))(logits)
    np.testing.assert_allclose(hessian, np.diag(p) - np.outer(p, p), rtol=0, atol=2 * float32_error(exact(logits)))
    _, slope = jax.jvp(lambda x: losses.softmax_cross_entropy(x, labels), (logits,), (jnp.ones_like(logits),))
    np.testing.assert_allclose(slope, 0, atol=2 * float32_error(exact(logits)))  # a shift of all logits changes nothing


def equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                yield from equations(sub if hasattr(sub, "eqns") else sub.jaxpr)


def half_arithmetic(f: Callable, x: jax.Array) -> set[str]:
    """Operations other than casts and copies that hand out a half-precision number when `f` is differentiated."""
    jaxpr = jax.make_jaxpr(jax.value_and_grad(lambda x: f(x).astype(jnp.float32).sum()))(x)
    found = {
        eqn.primitive.name
        for eqn in equations(jaxpr.jaxpr)
        for out in eqn.outvars
        if getattr(out.aval, "dtype", None) in HALVES
    }
    return found - {"convert_element_type", "broadcast_in_dim", "jit", "pjit", "remat2", "checkpoint"}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_row_9_no_arithmetic_is_half_precision_forward_or_backward(dtype, name):
    f, x = leaves_of(dtype, name)
    weights = jnp.ones(4, dtype)
    assert half_arithmetic(f, x) == half_arithmetic(lambda x: f(x, weights), x) == set()
    assert half_arithmetic(lambda x: jnp.exp(x).sum(-1), x) >= {"exp"}  # the reader sees what it looks for
    ops = {eqn.primitive.name for eqn in equations(jax.make_jaxpr(f)(x).jaxpr)}
    assert "reduce_sum" in ops or name in ("sigmoid", "squared")
    assert jax.eval_shape(f, x).dtype == jnp.float32


def kept(f: Callable, x: jax.Array) -> list[jax.Array]:
    return [a for a in jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(f, x)[1], x)) if hasattr(a, "dtype")]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["integer", "smooth"])
def test_the_backward_pass_keeps_the_half_logits_and_two_numbers_a_row(dtype, name):
    f, x = leaves_of(dtype, name)
    f, x = (lambda x, f=f: f(x).sum()), x
    full = [a for a in kept(f, x) if a.size == x.size]
    assert [a.dtype for a in full] == [dtype]
    small = [a for a in kept(f, x) if a.size != x.size and a.dtype == jnp.float32]
    assert sum(a.size for a in small) <= 2 * 4
    usual = optax.softmax_cross_entropy_with_integer_labels
    plain = kept(lambda x: usual(x.astype(jnp.float32), jnp.arange(4)).sum(), x)
    assert any(a.size == x.size and a.dtype == jnp.float32 for a in plain)  # what it costs without


def test_the_backward_pass_does_not_reduce_over_classes_again():
    x = draw(jnp.bfloat16, 4, CLASSES)
    both = jax.make_jaxpr(lambda x, g: jax.vjp(lambda x: jitted(x, jnp.arange(4)), x)[1](g))(x, jnp.ones(4))
    names = [eqn.primitive.name for eqn in equations(both.jaxpr)]
    assert names.count("exp") == 2 and names.count("reduce_max") == 1 and names.count("reduce_sum") == 2


@pytest.mark.parametrize("name", ["sigmoid", "squared", "mean_squared", "soft"])
def test_the_other_losses_keep_no_float32_copy_of_their_predictions(name):
    f, x = leaves_of(jnp.bfloat16, name)
    wide = [a for a in kept(f, x) if a.size == x.size and a.dtype == jnp.float32]
    assert len(wide) <= (name in ("sigmoid", "soft"))  # their targets came as float32


@pytest.mark.parametrize("dtype", HALVES)
def test_row_9_logits_at_the_end_of_the_range_lose_nothing(dtype):
    top = float(jnp.finfo(jnp.float16).max) if dtype == jnp.float16 else 2.0**16
    logits = jnp.array([[top, top, -top], [-top, -top, -top], [top, -top, 0.0]], dtype)
    labels = jnp.array([0, 2, 0])
    np.testing.assert_allclose(jitted(logits, labels), [np.log(2), np.log(3), 0], rtol=0, atol=4 * EPS32)
    want = np.array([[-0.5, 0.5, 0], [1 / 3, 1 / 3, -2 / 3], [0, 0, 0]])
    assert_rounded(total_and_slope(logits, labels)[1], want, 4 * EPS32)
    usual = jax.jit(optax.softmax_cross_entropy_with_integer_labels)(logits.astype(jnp.float32), labels)
    assert abs(float(usual[0]) - np.log(2)) > 1e-3  # what optax's order of subtraction costs there


@jax.jit
def total_and_slope(logits, labels, weights=None):
    return jax.value_and_grad(lambda x: losses.softmax_cross_entropy(x, labels, weights=weights).sum())(logits)


@pytest.mark.parametrize("dtype, mask", [(jnp.bfloat16, -1e9), (jnp.float16, -jnp.inf)])  # −1e9 is −inf in float16
def test_row_9_masked_classes_take_no_part(dtype, mask):
    logits = draw(dtype, 3, CLASSES)
    masked = logits.at[:, 5:].set(mask)
    soft = jnp.zeros((3, CLASSES)).at[:, :2].set(0.5)
    for labels, few in ((jnp.array([0, 1, 4]), jnp.array([0, 1, 4])), (soft, soft[:, :5])):
        loss, slope = total_and_slope(masked, labels)
        want, few_slope = total_and_slope(logits[:, :5], few)
        np.testing.assert_allclose(loss, want, rtol=0, atol=3 * float32_error(exact(logits)))
        assert (slope[:, 5:] == 0).all()
        # Equal but for the order of a float32 sum, which may tip the last rounding.
        apart = np.abs(exact(slope[:, :5]) - exact(few_slope))
        assert (apart <= float(jnp.finfo(dtype).eps) * np.abs(exact(few_slope)) + float32_error(exact(logits))).all()


def test_a_masked_label_costs_what_the_mask_says():
    logits = jnp.array([[-jnp.inf, 0.0], [-1e9, 0.0]], jnp.float32)
    assert jitted(logits, jnp.array([0, 0])).tolist() == [np.inf, 1e9]
    assert total_and_slope(logits, jnp.array([0, 0]))[1].tolist() == [[-1, 1], [-1, 1]]
    assert jitted(logits, jnp.array([1, 1]), label_smoothing=0.1)[0] == np.inf


def test_row_9_a_row_without_any_class_is_nan_until_its_weight_is_zero():
    logits, labels = jnp.full((2, 3), -jnp.inf, jnp.float16).at[1].set(0), jnp.array([0, 0])
    assert jnp.isnan(jitted(logits, labels)).tolist() == [True, False]
    loss, slope = total_and_slope(logits, labels, jnp.array([0, 1]))
    assert abs(loss - np.log(3)) <= 4 * EPS32 and slope[0].tolist() == [0, 0, 0]
    assert jnp.isfinite(slope).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_has_weight_zero_reaches_neither_value_nor_gradient(name):
    f, x = leaves_of(jnp.float16, name)
    mask = jnp.array([True, False, True, False])
    bad = x.at[1].set(jnp.nan).at[3].set(jnp.inf).at[3, 0].set(-jnp.inf)
    run = jax.jit(jax.value_and_grad(lambda x, w: ((loss := f(x, w)).sum(), loss), argnums=(0, 1), has_aux=True))
    clean, spoiled = (run(a, mask.astype(jnp.float16)) for a in (x, bad))
    assert [a.tolist() for a in jax.tree.leaves(clean[0])] == [a.tolist() for a in jax.tree.leaves(spoiled[0])]
    (gradient, slope), without = spoiled[1], jax.jit(f)(x)
    assert np.asarray(gradient).tobytes() == np.asarray(clean[1][0]).tobytes()
    assert (gradient[1] == 0).all() and (gradient[3] == 0).all() and (gradient[0] != 0).any()
    assert slope[0] != 0 and slope[1] == slope[3] == 0  # weights that are learned do not meet it either
    hidden = np.asarray(jax.jit(f)(bad, mask))  # a boolean mask is a weight
    assert (hidden[[1, 3]] == 0).all()
    error = (CLASSES + 8) * EPS32  # compiled apart, a float32 sum may run in another order
    np.testing.assert_allclose(hidden[[0, 2]], without[jnp.array([0, 2])], rtol=error, atol=error)


@pytest.mark.parametrize("name", ["integer", "soft", "sigmoid", "squared"])
def test_nor_do_its_labels_and_targets(name):
    x, mask = draw(jnp.float16, 3, 5), jnp.array([1.0, 0.0, 1.0])
    every = jnp.broadcast_to(mask[:, None], x.shape)
    labels = jnp.array([0, -1, 4]) if name == "integer" else jnp.full((3, 5), 0.2).at[1].set(jnp.nan)
    loss, weights = {
        "integer": (lambda x, w: losses.softmax_cross_entropy(x, labels, weights=w), mask),
        "soft": (lambda x, w: losses.softmax_cross_entropy(x, labels, weights=w), mask),
        "sigmoid": (lambda x, w: losses.sigmoid_cross_entropy(x, labels, w), every),
        "squared": (lambda x, w: losses.squared_error(x, labels, w), every),
    }[name]
    value, slopes = jax.jit(jax.value_and_grad(lambda x, w: loss(x, w).sum(), argnums=(0, 1)))(x, weights)
    assert jnp.isfinite(value) and all(jnp.isfinite(slope).all() for slope in slopes)
    assert all((slope[1] == 0).all() and (slope[0] != 0).any() for slope in slopes)


@pytest.mark.parametrize("kind", [jnp.int8, jnp.uint32])
def test_integer_labels_of_any_width(kind):
    logits = draw(jnp.float32, 2, 300)
    got = jitted(logits, jnp.array([0, 120], kind))
    want = jitted(logits, jnp.array([0, 120]))
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_nan_and_never_another_class(label):
    logits, labels = draw(jnp.bfloat16, 2, 3), jnp.array([0, label])
    assert jnp.isnan(jitted(logits, labels)).tolist() == [False, True]
    padded = jitted(logits, labels, weights=jnp.array([1.0, 0.0]))
    assert padded[1] == 0 and padded[0] == jitted(logits, labels)[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid_cross_entropy_equals_float64(dtype):
    logits, targets = draw(dtype, 3, 7), jax.nn.sigmoid(draw(jnp.float32, 3, 7, seed=1))
    x, t = exact(logits), exact(targets)
    want = np.maximum(x, 0) - x * t + np.log1p(np.exp(-np.abs(x)))
    got, slope = value_and_slope(lambda x: losses.sigmoid_cross_entropy(x, targets), logits)
    assert got.dtype == jnp.float32 and slope.dtype == dtype
    error = 16 * EPS32 * (1 + np.abs(x).max())  # two softplus of a few ulps each, times t and 1 − t
    np.testing.assert_allclose(got, want, rtol=0, atol=error)
    assert_rounded(slope, 1 / (1 + np.exp(-x)) - t, error)
    far = jnp.array([65504.0, -65504.0], jnp.float16)
    assert losses.sigmoid_cross_entropy(far, jnp.array([False, True])).tolist() == [65504, 65504]
    assert losses.sigmoid_cross_entropy(far, jnp.array([1, 0])).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_errors_equal_float64(dtype):
    a, b, weights = draw(dtype, 3, 7), draw(dtype, 3, 7, seed=1), jnp.array([1.0, 0.5, 3.0])
    difference = exact(a) - exact(b)
    got = jax.jit(losses.squared_error)(a, b)
    np.testing.assert_allclose(got, difference**2, rtol=2 * EPS32)  # rounded twice
    mean, slope = value_and_slope(lambda a: losses.mean_squared_error(a, b, weights), a)
    np.testing.assert_allclose(mean, exact(weights) * (difference**2).mean(-1), rtol=(7 + 4) * EPS32)
    assert slope.dtype == dtype
    want = 2 / 7 * exact(weights)[:, None] * difference
    assert_rounded(slope, want, 8 * EPS32 * np.abs(want).max())


def test_a_float16_difference_does_not_overflow():
    a = jnp.array([60000.0], jnp.float16)
    assert losses.squared_error(a, -a).tolist() == [1.44e10]
    assert losses.squared_error(a, jnp.array([1e5])).tolist() == [1.6e9]


def ctc_by_hand(logits: np.ndarray, labels: list[int]) -> float:
    """−log Σ over every path of classes that collapses to `labels` (blank 0), by enumeration in float64."""
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = 0.0
    for path in itertools.product(range(logits.shape[1]), repeat=logits.shape[0]):
        if [c for c, _ in itertools.groupby(path) if c != 0] == labels:
            total += np.exp(sum(log_p[t, c] for t, c in enumerate(path)))
    return float(-np.log(total))


@pytest.mark.parametrize("dtype", HALVES)
def test_ctc_equals_the_sum_over_every_alignment(dtype):
    logits = draw(dtype, 3, 4, 3, scale=2.0)
    frames = jnp.array([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    labels, tail = jnp.array([[1, 2], [2, 2], [1, 0]]), jnp.array([[0, 0], [0, 0], [0, 1]])

    def reference(x):
        return [ctc_by_hand(x[0], [1, 2]), ctc_by_hand(x[1, :3], [2, 2]), ctc_by_hand(x[2], [1])]

    x = exact(logits)
    got, slope = value_and_slope(lambda x: losses.ctc(x, frames, labels, tail), logits)
    assert got.dtype == jnp.float32 and slope.dtype == dtype
    error = 4 * 16 * EPS32 * (1 + np.ptp(x))  # 4 frames, each a few logaddexp
    np.testing.assert_allclose(got, reference(x), rtol=0, atol=error)
    want, h = np.zeros_like(x), 1e-5  # central differences: off by h² and by 1e-16 / h
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = h
        want[index] = (np.sum(reference(x + step)) - np.sum(reference(x - step))) / (2 * h)
    assert_rounded(slope, want, error + 1e-9)


def test_ctc_with_a_masked_class_an_impossible_sequence_and_another_blank():
    pads, words, tail = jnp.zeros((1, 3)), jnp.array([[1, 2]]), jnp.zeros((1, 2))
    logits = jnp.zeros((1, 3, 4)).at[..., 3].set(-jnp.inf)
    loss, slope = value_and_slope(lambda x: losses.ctc(x, pads, words, tail), logits)
    want = ctc_by_hand(np.zeros((3, 3)), [1, 2])
    np.testing.assert_allclose(loss, [want], rtol=0, atol=3 * 16 * EPS32)
    assert jnp.isfinite(slope).all() and (slope[..., 3] == 0).all()
    run = jax.jit(losses.ctc, static_argnums=4)
    twice = jnp.array([[1, 1]])
    assert run(logits, pads, twice, tail, 0)[0] < 1e2
    assert run(logits, pads.at[:, 2].set(1), twice, tail, 0)[0] > 9e4  # 1 _ 1 needs three frames
    swapped = run(logits[..., :3], pads, jnp.array([[0, 1]]), tail, 2)
    np.testing.assert_allclose(swapped, [want], rtol=0, atol=3 * 16 * EPS32)


def test_row_17_float64_stays_and_nothing_else_becomes_it():
    with jax.enable_x64(True):
        for name, dtype in itertools.product(NAMES, (jnp.bfloat16, jnp.float64)):
            f, x = leaves_of(dtype, name)
            wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
            weights = jnp.ones(4, jnp.bfloat16)
            assert jax.eval_shape(f, x).dtype == jax.eval_shape(f, x, weights).dtype == wide
            assert jax.eval_shape(jax.grad(lambda x, f=f: f(x).sum()), x).dtype == dtype
        x = draw(jnp.float64, 3, CLASSES)
        want, slope = by_hand(np.asarray(x), np.eye(CLASSES)[:3])
        got, grad = jax.jit(jax.value_and_grad(lambda x: losses.softmax_cross_entropy(x, jnp.arange(3)).sum()))(x)
        eps = np.finfo(np.float64).eps * (CLASSES + 8) * (1 + np.ptp(x)) * 3
        np.testing.assert_allclose(got, want.sum(), rtol=0, atol=eps)
        np.testing.assert_allclose(grad, slope, rtol=0, atol=eps)
        found = jax.jit(losses.ctc)(jnp.zeros((1, 2, 2)), jnp.zeros((1, 2)), jnp.array([[1]]), jnp.zeros((1, 1)))
        np.testing.assert_allclose(found, np.log(4 / 3), rtol=0, atol=1e-13)  # optax's own constants are float64 too


def test_shapes_from_none_to_many_and_numpy_arrays():
    x = np.zeros((2, 3, 5), np.float32)
    got = losses.softmax_cross_entropy(x, np.zeros((2, 3), np.int64))  # without jit too
    np.testing.assert_allclose(got, np.full((2, 3), np.log(5)), rtol=0, atol=8 * EPS32)
    assert jitted(x[0, 0], np.array(1)).shape == ()
    assert jitted(x[:0], np.zeros((0, 3), np.int32)).shape == (0, 3)
    assert jitted(x[..., :1], np.zeros((2, 3), np.int32)).tolist() == [[0.0] * 3] * 2
    assert losses.squared_error(x, x).shape == x.shape
    assert losses.sigmoid_cross_entropy(np.float32(0), np.float32(1)).shape == ()


def test_inside_jit_vmap_scan_and_checkpoint_the_gradient_is_the_same_bytes():
    f, x = leaves_of(jnp.bfloat16, "integer")
    want = jax.jit(jax.grad(lambda x: f(x).sum()))(x)
    again = jax.jit(jax.grad(lambda x: jax.checkpoint(f)(x).sum()))(x)
    rows = jax.jit(jax.vmap(jax.grad(lambda x, y: losses.softmax_cross_entropy(x, y, z_loss=1e-2))))(x, jnp.arange(4))

    def body(total, xy):
        return total + losses.softmax_cross_entropy(*xy, z_loss=1e-2), None

    scanned = jax.jit(jax.grad(lambda x: jax.lax.scan(body, jnp.float32(0), (x, jnp.arange(4)))[0]))(x)
    for got in (again, rows, scanned):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


X, LABELS = jnp.zeros((2, 5), jnp.bfloat16), jnp.zeros(2, jnp.int32)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: losses.softmax_cross_entropy(LABELS, LABELS), r"logits are int32\[2\]; legal is a float array .*cast"),
        (lambda: losses.softmax_cross_entropy(jnp.float32(0), LABELS), r"logits are float32\[\]; legal .*class axis"),
        (lambda: losses.softmax_cross_entropy(X[:, :0], LABELS), r"bfloat16\[2, 0\]; .*at least one class"),
        (
            lambda: losses.softmax_cross_entropy(X, jnp.zeros(3, jnp.int32)),
            r"labels are int32\[3\] for logits bfloat16\[2, 5\]; legal .* \[2\] or .* \[2, 5\]; cast or reshape",
        ),
        (lambda: losses.softmax_cross_entropy(X, jnp.zeros(2)), r"labels are float32\[2\] .*legal are integer.*cast"),
        (lambda: losses.softmax_cross_entropy(X, jnp.zeros((2, 5), jnp.int32)), r"int32\[2, 5\].*legal.*cast"),
        (lambda: losses.softmax_cross_entropy(X, jnp.zeros(2, bool)), r"labels are bool\[2\] .*legal.*cast"),
        (lambda: losses.softmax_cross_entropy(X, LABELS, label_smoothing=1.0), r"is 1.0; legal is 0 <= .* < 1; try"),
        (lambda: losses.softmax_cross_entropy(X, LABELS, label_smoothing=-0.1), r"is -0.1; legal is 0 <= .*; try"),
        (lambda: losses.softmax_cross_entropy(X, LABELS, label_smoothing=np.nan), r"is nan; legal is 0 <= .*; try"),
        (lambda: losses.softmax_cross_entropy(X, LABELS, z_loss=-1.0), r"z_loss is -1.0; legal is .* >= 0; try"),
        (lambda: losses.softmax_cross_entropy(X, LABELS, z_loss=np.inf), r"z_loss is inf; legal is a finite .*; try"),
        (
            lambda: losses.softmax_cross_entropy(X, LABELS, weights=jnp.ones((2, 1))),
            r"weights are float32\[2, 1\]; legal is one real weight for each loss, \[2\]; broadcast",
        ),
        (lambda: losses.squared_error(X, X[:1]), r"predictions are bfloat16\[2, 5\] and targets .*legal.*reshape"),
        (lambda: losses.squared_error(X, X, jnp.ones(2)), r"weights are float32\[2\]; legal .* \[2, 5\]; broadcast"),
        (lambda: losses.squared_error(LABELS, LABELS), r"predictions are int32\[2\] .*legal are float.*cast"),
        (lambda: losses.squared_error(X, X.astype(jnp.complex64)), r"targets complex64\[2, 5\]; legal .*real targets"),
        (lambda: losses.sigmoid_cross_entropy(X, X[0]), r"logits are bfloat16\[2, 5\] and targets .*legal.*reshape"),
        (lambda: losses.mean_squared_error(jnp.float32(1), jnp.float32(1)), r"float32\[\]; legal .*use squared_error"),
        (
            lambda: losses.ctc(X, X, LABELS, LABELS),
            r"are bfloat16\[2, 5\], .*int32\[2\]; legal is float \[batch, frames, classes\].*pad",
        ),
        (
            lambda: losses.ctc(X[None], X[None, :, 0], LABELS[None], LABELS[None], blank_id=5),
            r"blank_id is 5; legal .* \[0, 5\); .*name the blank",
        ),
        (
            lambda: losses.ctc(X[None], X[None, :, 0], X[:1], X[:1]),
            r"labels are bfloat16 and .*legal are integer labels.*cast",
        ),
    ],
)
def test_row_13_bad_input_says_what_came_what_is_legal_and_what_to_do(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_list_is_refused_by_its_type():
    with pytest.raises((TypeError, TypeCheckError)):
        losses.softmax_cross_entropy([[0.0, 1.0]], [1])  # as jax.numpy refuses it
