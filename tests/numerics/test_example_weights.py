"""Weights of examples: the pair that a loss function returns, and its sums in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.numerics.example_weights import present, sum_and_weight, weighted


@pytest.mark.parametrize("kind", [bool, jnp.int32, jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_sums_are_float32_and_exact(kind):
    total, weight = sum_and_weight(jnp.ones(3000, jnp.bfloat16), jnp.ones(3000, kind))
    assert total.dtype == weight.dtype == jnp.float32
    assert (float(total), float(weight)) == (3000, 3000)  # a bfloat16 counter stops at 256, a float16 one at 2048


def test_float64_stays():
    with jax.enable_x64(True):
        total, weight = sum_and_weight(jnp.ones(3, jnp.float64), jnp.ones(3, bool))
        assert total.dtype == weight.dtype == jnp.float64


def test_weighted_micro_batches_add_up_to_the_whole():
    losses, weights = jnp.arange(8.0), jnp.array([1, 0, 0, 0, 1, 1, 1, 0])
    halves = zip(jnp.split(losses, 2), jnp.split(weights, 2), strict=True)
    parts = [sum_and_weight(weighted(a, w), w) for a, w in halves]
    assert sum(float(s) for s, _ in parts) / sum(float(w) for _, w in parts) == np.mean([0, 4, 5, 6])


def test_a_negative_zero_is_zero_and_a_nan_weight_is_seen():
    x = jnp.full((2,), jnp.nan)
    assert jnp.isnan(present(x, jnp.array([-0.0, jnp.nan]))).tolist() == [False, True]


def test_a_weight_for_each_loss():
    with pytest.raises(ValueError, match=r"losses are float32\[3\] and weights int32\[\]; legal is one weight.*give"):
        sum_and_weight(jnp.ones(3), jnp.int32(3))
