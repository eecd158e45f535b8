"""Bytes of a compiled function, as XLA planned them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from mpjax.measure.memory import step_memory

X, W = jnp.ones((16, 32), jnp.bfloat16), jnp.ones((32, 32), jnp.float32)


def test_arguments_and_outputs_are_their_bytes():
    found = step_memory(jax.jit(lambda x, w: (x @ w.astype(x.dtype), w + 1)).lower(X, W).compile())
    assert (found["arguments"], found["shared"]) == (X.nbytes + W.nbytes, 0)
    assert 0 <= found["outputs"] - X.nbytes - W.nbytes <= 64  # a tuple has a table of pointers


def test_a_donated_argument_is_shared_with_the_output():
    found = step_memory(jax.jit(lambda w: w + 1, donate_argnums=0).lower(W).compile())
    assert found["shared"] == found["arguments"] == W.nbytes


def test_temporaries_of_half_the_width_take_half_the_room():
    def twice(dtype):
        def sorted_products(x, w):  # a sort is never fused away: the product before it is a real buffer
            return jnp.sort((x @ w).astype(dtype), axis=0).sum()

        return step_memory(jax.jit(sorted_products).lower(jnp.ones((64, 64)), jnp.ones((64, 64))).compile())["temp"]

    assert twice(jnp.float32) > twice(jnp.float16) > 0


def test_a_lowered_function_is_compiled():
    lowered = jax.jit(lambda x, w: jnp.exp(x @ w.astype(x.dtype))).lower(X, W)
    assert step_memory(lowered) == step_memory(lowered.compile())


def test_a_backend_without_a_plan_says_so():
    class Compiled:
        def memory_analysis(self):
            return None

    with pytest.raises(ValueError, match="got a backend that reports no memory plan; legal are CPU, GPU and TPU"):
        step_memory(Compiled())
