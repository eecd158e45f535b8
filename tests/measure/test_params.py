"""Params by top-level module, counted by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mpjax.measure.params import ParamCount, count_params


def test_layers_are_one_module_and_dtypes_are_apart():
    params = {
        "layers_0": {"kernel": jnp.ones((2, 3)), "scale": jnp.ones(3, jnp.bfloat16)},
        "layers_1": {"kernel": jax.ShapeDtypeStruct((3, 5), jnp.float32)},
        "out": jnp.ones((), jnp.float16),
    }
    assert count_params(params) == (
        ParamCount("layers", 6 + 3 + 15, {"float32": 4 * 21, "bfloat16": 2 * 3}),
        ParamCount("out", 1, {"float16": 2}),
    )
    assert count_params({}) == ()
