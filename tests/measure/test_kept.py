"""What a loss keeps, by who made it, counted by hand on a small MLP."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import mpjax
from mpjax.measure.kept import Kept, kept_by
from mpjax.measure.residuals import saved_residual_bytes

X = jnp.ones((4, 8), jnp.float32)
ZEROS = nn.initializers.zeros  # a random one takes longer to compile than the rest


class MLP(nn.Module):
    """Two products around a square."""

    @nn.compact
    def __call__(self, x_BxK):
        h_BxF = nn.Dense(16, use_bias=False, kernel_init=ZEROS, name="up")(x_BxK)
        return nn.Dense(6, use_bias=False, kernel_init=ZEROS, name="down")(h_BxF * h_BxF)


@functools.cache
def job(policy):
    model = mpjax.wrap(MLP(), policy)
    params, _ = model.init(jax.random.key(0), X)
    return model, params


# The gradient of `up` needs the input, that of `down` the square, the square its argument, and what goes back through
# `down` its weights. What is float32 from the start is an argument, and costs nothing.
HALF = Kept(activations=4 * 8 * 2 + 2 * (4 * 16 * 2), logits=0, cast_weights=16 * 6 * 2)
FULL = Kept(activations=2 * (4 * 16 * 4), logits=0, cast_weights=0)


@pytest.mark.parametrize(("policy", "wanted"), [("mixed_bfloat16", HALF), ("float32", FULL)])
@pytest.mark.parametrize(
    ("end", "logits"),
    [
        (jnp.sum, 0),
        (lambda logits: jnp.exp(logits).sum(), 4 * 6 * 4),  # made by the loss
        (lambda logits: (logits * logits).sum(), 4 * 6 * 4),  # made by the model, kept for the loss
    ],
    ids=["sum", "exp", "square"],
)
def test_by_hand(policy, wanted, end, logits):
    model, params = job(policy)
    found = kept_by(lambda params, x: end(model.apply(params, {}, x)[0]), params, X)
    assert found == Kept(wanted.activations, logits, wanted.cast_weights)


@pytest.mark.parametrize("around", ["model", "loss"])
def test_by_hand_inside_jit(around):
    model, params = job("mixed_bfloat16")
    apply = jax.jit(model.apply) if around == "model" else model.apply

    def loss(params, x):
        logits, _ = apply(params, {}, x)
        return (logits * logits).sum()

    found = kept_by(jax.jit(loss) if around == "loss" else loss, params, X)
    assert found == Kept(HALF.activations, 4 * 6 * 4, HALF.cast_weights)


def test_bare_functions_have_no_modules_to_tell_apart():
    params = {"w": jnp.ones((8, 6))}
    found = kept_by(lambda p, x: jnp.exp(x.astype("bfloat16") @ p["w"].astype("bfloat16")).sum(), params, X)
    assert found == Kept(activations=4 * 8 * 2 + 4 * 6 * 2, logits=None, cast_weights=0)


class Stack(nn.Module):
    """Three scanned layers, each a product and an exp."""

    @nn.compact
    def __call__(self, x_BxK):
        def body(layer, h, _):
            return jnp.exp(layer(h)), None

        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(nn.Dense(8, use_bias=False, kernel_init=ZEROS, name="layers"), x_BxK, None)[0]


def test_a_scan_keeps_a_stack_of_each():
    model = mpjax.wrap(Stack(), "mixed_bfloat16")
    params, _ = model.init(jax.random.key(0), X)

    def loss(params, x):
        return model.apply(params, {}, x)[0].sum()

    found = kept_by(loss, params, X)
    # Each layer: its input, the result of exp, its weights; the input of the first is cast once more before the scan.
    assert found.cast_weights == 3 * 8 * 8 * 2
    assert found.logits == 0 and found.activations >= 3 * 2 * (4 * 8 * 2)
    assert found.activations + found.cast_weights == saved_residual_bytes(loss, params, X)


def test_remat_keeps_the_arguments_only():
    model, params = job("mixed_bfloat16")
    apply = jax.checkpoint(lambda params, x: model.apply(params, {}, x)[0])
    assert kept_by(lambda params, x: jnp.sum(apply(params, x)), params, X).cast_weights == 0
