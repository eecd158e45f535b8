"""The formats of exported weights, against float64 and tables made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mpjax.store.export.formats import channel_axis, dequantise, formats_by_path, keeps_float32, parse_format, quantise
from mpjax.store.export.report import errors

RANDOM = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32) * np.float32(3)


def e4m3_values() -> np.ndarray:
    """Every finite value of e4m3fn by its definition: bias 7, no infinity, the last mantissa of the last exponent is NaN."""
    subnormal = [m / 8 * 2.0**-6 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return np.array(sorted({sign * x for sign in (-1, 1) for x in subnormal + normal}))


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_float8_stores_the_nearest_value_of_the_format(axis):
    stored, scale = quantise(RANDOM, "float8_e4m3", axis)
    over = {None: None, 0: 1, -1: 0}[axis]
    amax = np.abs(RANDOM.astype(np.float64)).max(axis=over, keepdims=True)
    np.testing.assert_array_equal(scale, (amax / 448).astype(np.float32))
    ratio = RANDOM.astype(np.float64) / scale.astype(np.float64)
    table = e4m3_values()
    assert len(table) == 253 and table.max() == 448
    nearest = np.abs(ratio[..., None] - table).min(-1)
    np.testing.assert_array_equal(np.abs(stored.astype(np.float64) - ratio), nearest)
    assert np.abs(stored.astype(np.float64)).max() == 448
    np.testing.assert_array_equal(dequantise(stored, scale), stored.astype(np.float32) * scale)


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_int8_is_symmetric_and_rounds_to_nearest(axis):
    stored, scale = quantise(RANDOM, "int8", axis)
    over = {None: None, 0: 1, -1: 0}[axis]
    amax = np.abs(RANDOM.astype(np.float64)).max(axis=over, keepdims=True)
    np.testing.assert_array_equal(scale, (amax / 127).astype(np.float32))
    np.testing.assert_array_equal(stored, np.rint(RANDOM.astype(np.float64) / scale.astype(np.float64)))
    assert stored.dtype == np.int8 and np.abs(stored.astype(int)).max() == 127
    assert np.abs(dequantise(stored, scale) - RANDOM).max() <= scale.max() / 2 * (1 + 1e-6)


@pytest.mark.parametrize("form", ["float8_e4m3", "int8"])
@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-40, 1.2e-38, 1.0, 3.4e38, -3.4e38, 0.1, 1 / 3])
def test_no_scale_is_zero_subnormal_or_infinite_and_nothing_becomes_nan(form, amax):
    x = np.array([[amax, 1.0], [0.0, -1.0]], np.float32)
    stored, scale = quantise(x, form, axis=-1)
    assert scale.dtype == np.float32 and (scale >= np.finfo(np.float32).tiny).all() and np.isfinite(scale).all()
    back = dequantise(stored, scale)
    assert np.isfinite(back).all() and np.isfinite(stored.astype(np.float64)).all()
    if amax == 0:
        assert scale[0, 0] == 1
    if abs(amax) > 1e-37:
        assert back[0, 0] == pytest.approx(amax, rel=1e-6)


def test_a_zero_size_tensor_has_a_scale_of_one():
    for shape, axis in (((0, 3), -1), ((3, 0), -1), ((0, 3), None)):
        stored, scale = quantise(np.zeros(shape, np.float32), "float8_e4m3", axis)
        assert stored.shape == shape and (scale == 1).all()


def test_half_formats_round_to_nearest_even():
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11], np.float32)
    assert quantise(x[:2], "bfloat16", None)[0].astype(float).tolist() == [1.0, 1 + 2**-6]
    assert quantise(x[2:], "float16", None)[0].astype(float).tolist() == [1.0, 1 + 2**-9]


def test_the_channel_is_the_output():
    stored, scale = quantise(np.ones((3, 3, 4, 7), np.float32), "int8", channel_axis("Conv_0/kernel"))
    assert scale.shape == (1, 1, 1, 7) and stored.shape == (3, 3, 4, 7)
    rows = channel_axis("params/wte/embedding")
    assert quantise(np.ones((50, 4), np.float32), "int8", rows)[1].shape == (50, 1)
    of_a_stack = quantise(np.ones((3, 50, 4), np.float32), "int8", rows)[1]
    assert of_a_stack.shape == (1, 50, 1)  # not one for each table


def test_the_first_rule_holds_for_its_subtree_and_float32_for_the_rest():
    paths = ["Dense/0/kernel", "layers/1/attention/query/kernel", "head/kernel", "head/bias"]
    rules = {"head/bias": "f16", "head": "float32", "**/attention": "float8_e4m3fn", "Dense_0": "int8"}
    assert formats_by_path(rules, paths) == dict(zip(paths, ["int8", "float8_e4m3", "float32", "float16"], strict=True))
    assert formats_by_path({"head": "int8"}, paths)["Dense/0/kernel"] == "float32"
    assert set(formats_by_path({"head": "int8", "**": "bf16"}, paths).values()) == {"int8", "bfloat16"}


@pytest.mark.parametrize("rules", [{"hed": "int8"}, {"**": "bf16", "head": "int8"}])
def test_a_rule_that_acts_nowhere_is_refused(rules):
    with pytest.raises(ValueError, match=r"acts on no weight.*legal are globs over head/kernel.*mend it"):
        formats_by_path(rules, ["head/kernel"])


def test_biases_and_norms_keep_float32_however_many_dimensions_they_have():
    kept = [
        ("params/head/bias", 1),
        ("params/a", 0),
        ("params/attention/query/bias", 2),
        ("params/layers/norm/scale", 2),
    ]
    assert all(keeps_float32(path, ndim) for path, ndim in kept)
    assert not keeps_float32("params/positions", 3) and not keeps_float32("params/bias/kernel", 2)


def test_an_unknown_format_names_the_known_ones():
    with pytest.raises(ValueError, match=r"got the format 'fp4'; legal are float32, bfloat16, .*int8; name one"):
        parse_format("fp4")


def test_errors_are_sums_in_float64():
    x = np.array([1.0, -2.0, 2.0], np.float32)
    assert errors(x, x + np.float32([0, 0, 0.25])) == (pytest.approx(10 * np.log10(9 / 0.0625)), 0.25)
    assert errors(x, x) == (np.inf, 0.0)
    assert errors(np.zeros((0, 2)), np.zeros((0, 2))) == (np.inf, 0.0)
    tiny = np.float32([1e-30])  # its square is zero in float32
    assert errors(tiny, tiny * np.float32(2))[0] == pytest.approx(0, abs=1e-5)
