"""Bytes of a compiled function, as XLA planned them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from mpjax.measure.memory import step_memory
from mpjax.measure.residuals import saved_residual_bytes

X, W = jnp.ones((16, 32), jnp.bfloat16), jnp.ones((32, 32), jnp.float32)


def test_arguments_and_outputs_are_their_bytes():
    found = step_memory(jax.jit(lambda x, w: (x @ w.astype(x.dtype), w + 1)).lower(X, W).compile())
    assert (found["arguments"], found["shared"]) == (X.nbytes + W.nbytes, 0)
    assert 0 <= found["outputs"] - X.nbytes - W.nbytes <= 64  # a tuple has a table of pointers


def test_a_donated_argument_is_shared_with_the_output():
    found = step_memory(jax.jit(lambda w: w + 1, donate_argnums=0).lower(W).compile())
    assert found["shared"] == found["arguments"] == W.nbytes


def test_temporaries_grow_by_what_the_backward_pass_keeps():
    """XLA's plan and jax's own list agree on what eight layers more cost."""
    h = jnp.ones((64, 32))

    def loss(layers, w):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), h, length=layers)[0].sum()

    def temp(layers):
        return step_memory(jax.jit(jax.grad(functools.partial(loss, layers))).lower(W).compile())["temp"]

    def kept(layers):
        return saved_residual_bytes(functools.partial(loss, layers), W)

    assert temp(16) - temp(8) == kept(16) - kept(8) >= 8 * h.nbytes


def test_a_lowered_function_is_compiled():
    lowered = jax.jit(lambda x, w: jnp.exp(x @ w.astype(x.dtype))).lower(X, W)
    assert step_memory(lowered) == step_memory(lowered.compile())


def test_a_backend_without_a_plan_says_so():
    class Compiled:
        def memory_analysis(self):
            return None

    with pytest.raises(ValueError, match="got a backend that reports no memory plan; legal are CPU, GPU and TPU"):
        step_memory(Compiled())
