"""Products by format: right against float64, timed on a clock that the test winds, refused without a crash."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from mpjax.measure import rates
from mpjax.measure.rates import FORMATS, ProductRate, product_rates, tolerance
from mpjax.measure.timing import Timing

ON_A_CPU = tuple(name for name in FORMATS if name != "tf32")


def ticking(seconds):
    ticks = itertools.count()
    return lambda: next(ticks) * seconds


def test_every_format_is_right_here_and_timed():
    found = product_rates(64, clock=ticking(1.0))
    assert tuple(rate.format for rate in found) == ON_A_CPU
    for rate in found:
        # One call a block, since one takes a second already.
        assert (rate.refused, rate.right, rate.timing) == (None, True, Timing((1.0,) * 5)), rate.format
        assert rate.tflops == 2 * 64**3 / 1e12
        assert (rate.error > 0) or rate.format not in ("float32", "float16")  # random operands: the sum rounds


def test_a_fast_product_fills_its_blocks():
    (rate,) = product_rates(64, ("float32",), clock=ticking(2.0**-6))
    # A block is to last 0.06 s: three products of a 64th of a second each.
    assert rate.timing == Timing((2.0**-6 / 3,) * 5)


@pytest.mark.parametrize("name", ON_A_CPU)
def test_the_error_is_that_of_numpy_in_float64(name):
    x, w = rates._operands(name, 64)
    first, _, second = name.partition("×")
    assert (x.dtype.name, w.dtype.name) == (first, second or first)
    a, b = (np.asarray(m).astype(np.float64) for m in (x, w))
    exact = np.array([[sum(a[i, k] * b[j, k] for k in range(64)) for j in range(64)] for i in (0, 63)])
    y = np.array(rates._product(name)(x, w))
    assert y.dtype == (np.int32 if name == "int8" else np.float32)
    np.testing.assert_allclose(y[[0, 63]], exact, rtol=0, atol=64 * 2.0**-24 * np.abs(exact).max())
    y[63, 0] += 2 * np.abs(exact).max()
    assert rates._error(x, w, y) > 0.5  # one wrong element is found


def test_the_tolerances_by_hand():
    wanted = {
        "float32": 4 * 90.50966799187809 * 2**-24,  # 4 √8192 roundings
        "tf32": 2**-9, "bfloat16": 2**-7, "float16": 2**-10, "float8_e4m3fn": 2**-3,
        "float8_e4m3fn×float8_e5m2": 2**-2, "int8": 0.0,
    }  # fmt: skip
    assert {name: tolerance(name, 8192) for name in FORMATS} == wanted


def float32(x):
    return np.asarray(x).astype(np.float32)


def rounded_to_tf32(x):
    """float32 with 10 bits of fraction, to nearest."""
    return ((float32(x).view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.mark.parametrize(
    ("name", "product", "right"),
    [
        ("float32", lambda x, w: rounded_to_tf32(x) @ rounded_to_tf32(w).T, False),  # not the precision asked for
        ("tf32", lambda x, w: rounded_to_tf32(x) @ rounded_to_tf32(w).T, True),
        ("bfloat16", lambda x, w: np.zeros(x.shape), False),
        ("float8_e4m3fn", lambda x, w: float32(x) @ float32(w), False),  # the other layout
        ("float16", lambda x, w: np.full(x.shape, np.nan), False),
        ("int8", lambda x, w: float32(x) @ float32(w).T + 1, False),
    ],
)
def test_a_wrong_product_is_told(name, product, right, monkeypatch):
    monkeypatch.setattr(rates, "_product", lambda name: product)
    assert rates._measured(name, 64, ticking(1.0)).right is right


def test_a_format_that_is_refused_is_a_line_and_no_crash(monkeypatch):
    def refuse(x, w):
        raise NotImplementedError("no such product\nand a long story")

    monkeypatch.setattr(rates, "_product", lambda name: refuse)
    (found,) = product_rates(64, ("float16",))
    assert found == ProductRate("float16", 64, refused="no such product")
    assert (found.tflops, found.quartiles, found.right) == (None, None, None)


def test_rates_go_from_slow_to_fast():
    rate = ProductRate("float32", 10_000, Timing((1.0, 2.0, 4.0)))
    assert (rate.tflops, rate.quartiles) == (1.0, (2 / 3, 2 / 1.5))


@pytest.mark.parametrize(("size", "formats", "said"), [(100, FORMATS, "size=100"), (64, ("bf16",), "got the formats")])
def test_what_is_illegal_is_told(size, formats, said):
    with pytest.raises(ValueError, match=f"{said}.*legal"):
        product_rates(size, formats)


def test_a_users_precision_does_not_change_what_is_measured():
    operands = rates._operands("float32", 64)
    with jax.default_matmul_precision("bfloat16"):
        assert "HIGHEST" in str(jax.make_jaxpr(rates._product.__wrapped__("float32"))(*operands))
