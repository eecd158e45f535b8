"""Names of formats parse to one dtype each, and the facts of a format are those of its definition."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mpjax.core.dtypes import NAMES, canonical, choices, facts, half_dtype, is_float, parse_dtype, short_name

FORMATS = list(NAMES)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_each_name_means_one_dtype_and_the_first_is_written(dtype):
    for name in NAMES[dtype]:
        assert parse_dtype(name) == parse_dtype(f" {name} ") == canonical(name) == dtype
        assert isinstance(canonical(name), np.dtype)
    assert short_name(dtype) == NAMES[dtype][0] and parse_dtype(short_name(dtype)) == dtype
    assert canonical(dtype.type) == canonical(getattr(jnp, dtype.name)) == canonical(dtype) == dtype


def test_no_name_means_two_dtypes_and_every_format_of_jax_is_there():
    names = [name for names in NAMES.values() for name in names]
    assert len(names) == len(set(names)) and "half" not in names
    theirs = {name for name in dir(jnp) if re.fullmatch(r"b?float(8|16|32|64)(_\w+)?", name)}
    assert {dtype.name for dtype in FORMATS} == theirs


def test_names_that_mean_nothing_list_the_choices():
    for name in ("", "f", "fp16", "float", "int8", "f8", "Float32", "f16x"):
        with pytest.raises(
            ValueError, match=r"Unknown dtype .*; use one of half, full, f16, bf16, f32, f64 .*f8_e4m3fn"
        ):
            parse_dtype(name)
    for bad in (jnp.int32, np.bool_, None, 3, object()):
        with pytest.raises(ValueError, match="is not a float dtype for a policy; use one of half, full"):
            canonical(bad)
    assert (
        all(parse_dtype(name) for name in ("half", "full", "f16", "bf16", "f32", "f64", "f8_e5m2"))
        and "half" in choices()
    )


def test_half_is_float16_where_there_is_no_tpu():
    expected = jnp.bfloat16 if jax.local_devices()[0].platform == "tpu" else jnp.float16
    assert half_dtype() == parse_dtype("half") == expected


# name: bits, exponent bias, mantissa bits, largest value, by the definition of each format (IEEE 754; Micikevicius et al.,
# FP8 Formats for Deep Learning, 2022; OCP Microscaling Formats, 2023), not by the library under test.
DEFINED = {
    "bfloat16": (16, 127, 7, (2 - 2**-7) * 2.0**127),
    "float16": (16, 15, 10, 65504.0),
    "float32": (32, 127, 23, (2 - 2**-23) * 2.0**127),
    "float64": (64, 1023, 52, (2 - 2**-52) * 2.0**1023),
    "float8_e3m4": (8, 3, 4, 15.5),
    "float8_e4m3": (8, 7, 3, 240.0),
    "float8_e4m3b11fnuz": (8, 11, 3, 30.0),
    "float8_e4m3fn": (8, 7, 3, 448.0),
    "float8_e4m3fnuz": (8, 8, 3, 240.0),
    "float8_e5m2": (8, 15, 2, 57344.0),
    "float8_e5m2fnuz": (8, 16, 2, 57344.0),
}


@pytest.mark.parametrize("name", DEFINED)
def test_the_facts_are_those_of_the_format(name):
    bits, bias, mantissa, largest = DEFINED[name]
    found = facts(name)
    assert (found.name, found.bits, found.max, found.eps) == (name, bits, largest, 2.0**-mantissa)
    assert found.tiny == 2.0 ** (1 - bias) and found.smallest_subnormal == 2.0 ** (1 - bias - mantissa)


def test_the_scale_format_has_no_mantissa_and_no_subnormals():
    found = facts("f8_e8m0fnu")
    assert (found.bits, found.max, found.tiny, found.eps) == (8, 2.0**127, 2.0**-127, 1.0)


def test_facts_are_equal_however_the_dtype_is_spelled():
    assert facts("bf16") == facts(jnp.bfloat16) == facts(np.dtype("bfloat16")) == facts(ml_dtypes.bfloat16)
    assert set(DEFINED) | {"float8_e8m0fnu"} == {dtype.name for dtype in FORMATS}


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_an_array_of_any_format_is_float(dtype):
    assert is_float(np.zeros(2, dtype)) and is_float(np.zeros((), dtype)[()])
    assert is_float(jax.ShapeDtypeStruct((), dtype))


def test_what_is_float_and_what_is_not():
    class HasDtype:  # as a Flax module has
        dtype = jnp.float32

    seen = []
    jax.eval_shape(lambda x, n: seen.append((is_float(x), is_float(n))), jnp.ones(2), jnp.arange(2))
    assert seen == [(True, False)]
    no = [
        1.0,
        1,
        True,
        None,
        "f32",
        HasDtype(),
        jnp.arange(2),
        jax.random.key(0),
        np.complex64(1),
        np.float32,
        jnp.bfloat16,
    ]
    no += [np.zeros(2, jax.dtypes.float0), np.dtype("float32"), np.array(["x"]), [1.0]]
    assert not any(is_float(x) for x in no)
    assert is_float(jnp.ones(2)) and is_float(np.float64(1)) and is_float(np.ones(2))
