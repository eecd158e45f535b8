"""Eight bits, by hand: scales from numpy's frexp, values from ml_dtypes' casts of what numpy scaled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mpjax.numerics.quantize import (
    current_scale,
    exponent,
    largest,
    power_of_two,
    scale_for_exponent,
    to_float8,
    to_float8_or_nan,
    to_int8,
)

E4M3, E5M2 = jnp.dtype("float8_e4m3fn"), jnp.dtype("float8_e5m2")
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
both_formats = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
TINY, HUGE = np.finfo(np.float32).tiny, np.finfo(np.float32).max


def scale_by_hand(most, dtype):
    """The smallest power of two with `most / scale <= max`, in float64; no less than 2^-126."""
    power = np.ceil(np.log2(np.float64(most) / LARGEST[dtype]))
    while np.float64(most) / 2.0**power > LARGEST[dtype]:  # log2 rounds
        power += 1
    while np.float64(most) / 2.0 ** (power - 1) <= LARGEST[dtype]:
        power -= 1
    return max(2.0**power, 2.0**-126)


def wide_values(dtype, n=4096, seed=0):
    """Both signs, any exponent of the format, zeros among them."""
    rng = np.random.default_rng(seed)
    info = ml_dtypes.finfo(dtype)
    low, high = np.log2(float(info.tiny)), np.log2(float(info.max))
    x = rng.choice([-1, 1], n) * 2.0 ** rng.uniform(low, high - 0.01, n)
    x[::97] = 0
    return x.astype(dtype)


@both_formats
def test_current_scale_is_the_smallest_power_of_two_that_fits(dtype):
    rng = np.random.default_rng(1)
    most = np.concatenate([2.0 ** rng.uniform(-126, 127.9, 2000), 2.0 ** np.arange(-126.0, 128)]).astype(np.float32)
    edges = (LARGEST[dtype] * 2.0 ** np.arange(-100, 100, 7)).astype(np.float32)
    most = np.concatenate(
        [most, edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(0)), [HUGE]]
    )
    scale = np.asarray(current_scale(jnp.asarray(most), dtype), np.float64)
    assert (np.frexp(scale)[0] == 0.5).all()
    assert scale.tolist() == [scale_by_hand(x, dtype) for x in most]
    share = most.astype(np.float64) / scale
    assert (share <= LARGEST[dtype]).all()
    assert (share > LARGEST[dtype] / 2)[scale > 2.0**-126].all()


@both_formats
def test_current_scale_at_its_edges(dtype):
    top = np.float32(LARGEST[dtype])
    most = jnp.array(
        [top, np.nextafter(top, np.float32(np.inf)), 0.0, 1e-36, TINY, np.inf, -np.nan, np.nan], jnp.float32
    )
    scale = np.asarray(current_scale(most, dtype)).tolist()
    assert scale[:5] == [1, 2, 1, max(2.0**-126, scale_by_hand(np.float32(1e-36), dtype)), 2.0**-126]
    assert np.isnan(scale[5:]).all()
    assert current_scale(jnp.float32(1e-45), dtype) in (1, 2.0**-126)  # a CPU takes a subnormal for zero


@both_formats
@pytest.mark.parametrize("most", [1e-36, 1e-37, TINY, 1e-45])
def test_a_tiny_tensor_stays_finite(most, dtype):
    """The scale was 0 here once, and a zero beside the tiny number became 0 · inf."""
    x = jnp.array([most, 0.0, -most], jnp.float32)
    q = to_float8(x, current_scale(largest(x), dtype), dtype)
    assert np.isfinite(np.asarray(q, np.float32)).all() and float(q[1]) == 0


@both_formats
@pytest.mark.parametrize("came", ["bfloat16", "float16", "float32"])
def test_to_float8_is_the_cast_of_the_exactly_scaled_value(came, dtype):
    x = wide_values(jnp.dtype(came))
    for scale in (1.0, 2.0**-7, 2.0**20, float(scale_by_hand(np.abs(x.astype(np.float64)).max(), dtype))):
        scaled = np.clip(x.astype(np.float64) / scale, -LARGEST[dtype], LARGEST[dtype])
        # float32 holds a scaled bfloat16, float16 or float32 exactly, but for what is far under float8's smallest number.
        by_hand = scaled.astype(np.float32).astype(dtype)
        q = np.asarray(to_float8(jnp.asarray(x), jnp.float32(scale), dtype))
        assert q.dtype == dtype and q.tobytes() == by_hand.tobytes()


@both_formats
@pytest.mark.parametrize("came", ["bfloat16", "float32"])
def test_to_float8_saturates_and_keeps_nan_and_infinities_are_told_by_the_mask_or_by_the_scale(dtype, came):
    top = LARGEST[dtype]
    x = jnp.array([top * 1.01, top * 1e6, -1e38, np.nan, -0.0, np.inf, -np.inf], came)
    q = np.asarray(to_float8(x, jnp.float32(1), dtype), np.float32)
    assert q[:3].tolist() == [top, top, -top] and np.isnan(q[3]) and q[4] == 0 and np.signbit(q[4])
    assert q[5:].tolist() == [top, -top]
    q = np.asarray(to_float8_or_nan(x, jnp.float32(1), dtype), np.float32)
    assert q[:3].tolist() == [top, top, -top] and np.isnan(q[[3, 5, 6]]).all() and np.signbit(q[4])
    for bad in (np.nan, np.inf, -np.inf):
        x = jnp.array([1.0, bad], came)
        assert np.isnan(np.asarray(to_float8(x, current_scale(largest(x), dtype), dtype), np.float32)).all()


@both_formats
def test_to_float8_rounds_a_tie_to_even(dtype):
    step = float(ml_dtypes.finfo(dtype).eps)
    x = jnp.array([1 + step / 2, 1 + 1.5 * step, 1 + 2.5 * step], jnp.float32)
    assert np.asarray(to_float8(x, jnp.float32(1), dtype), float).tolist() == [1, 1 + 2 * step, 1 + 2 * step]


@both_formats
def test_with_the_scale_of_an_exponent_every_smaller_number_fits(dtype):
    e = np.arange(0, 255)
    scale = np.asarray(scale_for_exponent(jnp.asarray(e), dtype), np.float64)
    below = np.minimum(
        np.nextafter(np.float32(2), np.float32(0)) * 2.0 ** (e - 127.0), HUGE
    )  # the largest below 2^(e-126)
    assert (np.frexp(scale)[0] == 0.5).all() and (below / scale <= LARGEST[dtype]).all()
    assert (below / scale > LARGEST[dtype] / 2)[scale > 2.0**-126].all()  # and no smaller power of two would do by half


def test_the_exponent_is_that_of_frexp():
    x = np.concatenate([2.0 ** np.arange(-126.0, 128), 1.99 * 2.0 ** np.arange(-126.0, 127)]).astype(np.float32)
    assert exponent(jnp.asarray(x)).tolist() == (np.frexp(x.astype(np.float64))[1] - 1 + 127).tolist()
    assert exponent(jnp.array([0.0, np.inf, np.nan, -np.nan], jnp.float32)).tolist() == [0, 255, 255, 255]
    assert power_of_two(jnp.array([1, 127, 254])).tolist() == [2.0**-126, 1, 2.0**127]


def test_the_largest_magnitude():
    x = jnp.array([[1.0, -3.0], [0.0, 0.5]], jnp.bfloat16)
    assert largest(x) == 3 and largest(x).dtype == jnp.float32
    assert largest(x, (1,)).tolist() == [[3], [0.5]] and largest(jnp.zeros((0, 4))) == 0
    assert np.isnan(largest(x.at[0, 0].set(jnp.nan))) and np.isinf(largest(x.at[0, 0].set(-jnp.inf)))


@pytest.mark.parametrize("came", ["bfloat16", "float32"])
def test_to_int8_by_hand(came):
    x = np.random.default_rng(2).normal(size=(5, 6, 7)).astype(came)
    x[1] = 0
    q, scale = to_int8(jnp.asarray(x), (0, 2))
    most = np.abs(x.astype(np.float64)).max((0, 2), keepdims=True)
    by_hand = x.astype(np.float32) / (most.astype(np.float32) / np.float32(127))
    assert q.dtype == jnp.int8 and scale.dtype == jnp.float32
    np.testing.assert_allclose(scale, most / 127, rtol=2**-23)
    # Where x / scale lies beside a half, one rounding more or less of the division decides.
    clear = np.abs(by_hand - np.floor(by_hand) - 0.5) > 1e-4
    assert (np.asarray(q) == np.rint(by_hand))[clear].all() and clear.mean() > 0.98
    assert (np.abs(np.asarray(q)).max((0, 2)) == 127).all()
    assert (np.abs(np.asarray(q) * np.asarray(scale, np.float64) - x.astype(np.float64)) <= 0.5001 * most / 127).all()


def test_to_int8_of_rows_of_zeros_and_of_what_is_not_finite():
    rows = [[0, 0], [1, -2], [np.nan, 1], [np.inf, 1], [-np.inf, 0], [1e-44, 0], [HUGE, -HUGE]]
    q, scale = to_int8(jnp.array(rows, jnp.float32), (1,))
    assert q[:2].tolist() == [[0, 0], [64, -127]]
    assert scale[0, 0] == 1 and np.isnan(scale[2:5]).all()
    assert np.isfinite(scale[5:]).all() and q[6].tolist() == [127, -127]


def test_to_int8_takes_fewer_steps_where_it_is_told():
    q, scale = to_int8(jnp.array([[1.0, -2.0, 0.0]]), (1,), bound=90)
    assert q.tolist() == [[45, -90, 0]] and scale[0, 0] * 90 == 2


def test_a_scale_rounds_nothing_under_jit():
    x = jnp.asarray(wide_values(jnp.dtype("bfloat16"), 64))
    whole = jax.jit(lambda x: to_float8(x, current_scale(largest(x), E4M3), E4M3))(x)
    assert whole.tobytes() == to_float8(x, current_scale(largest(x), E4M3), E4M3).tobytes()
