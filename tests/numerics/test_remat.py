"""Named remat policies: what each keeps, counted by hand, what runs again, and gradients that are the same."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

from mpjax.measure.audit import audit
from mpjax.measure.residuals import saved_residual_bytes
from mpjax.numerics.attention import attention
from mpjax.numerics.remat import POLICIES, remat_policy

B, T, D, H = 2, 8, 16, 4
SHAPES = {"query": (D, D), "key": (D, D), "value": (D, D), "out": (D, D), "up": (D, 4 * D), "down": (4 * D, D)}


def weights():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape) / 4, jnp.float32) for name, shape in SHAPES.items()}


X = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, D)), jnp.float32)


def block(w, x):
    """Attention and an MLP round two shortcuts, as in a transformer, with a tanh in place of the norms."""
    h = jnp.tanh(x)
    q, k, v = ((h @ w[name]).reshape(B, T, H, D // H) for name in ("query", "key", "value"))
    x = x + attention(q, k, v).reshape(B, T, D) @ w["out"]
    return x + jnp.tanh(jnp.tanh(x) @ w["up"]) @ w["down"]


def loss(w, x, policy=None):
    body = block if policy is None else jax.checkpoint(block, policy=remat_policy(policy))
    return jnp.sum(body(w, x))


# Numbers that one block keeps beside its arguments. Products with a weight: query, key, value, out (D each) and up (4·D);
# what `down` gives is added and handed on, and no backward pass reads it.
NUMBERS = {
    "nothing": 0,
    "attention": B * T * D,
    "dots_no_batch": 8 * B * T * D,
    "dots": 9 * B * T * D + B * H * T * T,
    "offload": 8 * B * T * D,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_what_a_block_keeps_is_what_was_counted_by_hand(name):
    body = jax.checkpoint(block, policy=remat_policy(name))
    assert saved_residual_bytes(lambda w, x: jnp.sum(body(w, x)), weights(), X) == 4 * NUMBERS[name]


def test_everything_is_as_much_as_without_or_more():
    """More, since a result and its marked or reshaped self are two to jax; XLA holds them once."""
    body = jax.checkpoint(block, policy=remat_policy("everything"))
    kept = [saved_residual_bytes(lambda w, x: jnp.sum(f(w, x)), weights(), X) for f in (body, block)]  # noqa: B023
    assert kept[0] >= kept[1] > 4 * NUMBERS["dots"]


PER_TOKEN = 2 * B * T * D  # FLOPs of a product of D columns, divided by its other dimension


def test_what_runs_again_is_counted_by_hand():
    """FLOPs of the products of a gradient: three times the forward pass, and what a policy has run again.

    A block's last product, `down`, never runs again: nothing needs its result. Products: 3 projections and `out`, 4·B·T·D²
    numbers multiplied; `up` and `down` 4 each; QKᵀ and PV of B·T²·D.
    """
    linear, pair = PER_TOKEN * D, PER_TOKEN * T
    forward = 12 * linear + 2 * pair
    again = {
        "nothing": 8 * linear + 2 * pair,
        "attention": 8 * linear + pair,  # QKᵀ for the softmax; PV was kept
        "dots_no_batch": 2 * pair,
        "dots": 0,
        "everything": 0,
        "offload": 2 * pair,
    }
    assert again.keys() == POLICIES.keys()
    for name, more in again.items():
        slope = jax.grad(lambda w, x: jnp.sum(jax.checkpoint(block, policy=remat_policy(name))(w, x)), (0, 1))  # noqa: B023
        assert sum(audit(slope, weights(), X).flops_by_dtype().values()) == 3 * forward + more, name


def test_the_gradient_is_the_one_without_remat_to_the_bit():
    """One operation after the other, so that nothing is fused: what runs again gives the same numbers again."""

    def slope(policy):
        return jax.tree.map(np.asarray, jax.grad(loss, (0, 1))(weights(), X, policy))

    with jax.disable_jit():
        expected = slope(None)
        for name in POLICIES:
            jax.tree.map(np.testing.assert_array_equal, slope(name), expected)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(expected))


@pytest.mark.parametrize("remat", [nn.remat, nnx.remat], ids=["linen", "nnx"])
def test_both_flaxes_take_it(remat):
    """Of a `Dense` pair with tanh behind each: 4 × 8 numbers behind the first product, 4 × 8 behind the second."""
    x = jnp.ones((4, 8))
    if remat is nn.remat:

        class Pair(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.tanh(nn.Dense(8, use_bias=False)(nn.tanh(nn.Dense(8, use_bias=False)(x))))

        module = nn.remat(Pair, policy=remat_policy("dots"))()
        params = module.init(jax.random.key(0), x)
        kept = saved_residual_bytes(lambda p: jnp.sum(module.apply(p, x)), params)
    else:
        first, second = (nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(0)) for _ in range(2))
        graph, params = nnx.split(nnx.List([first, second]))

        @functools.partial(nnx.remat, policy=remat_policy("dots"))
        def pair(layers, x):
            return nnx.tanh(layers[1](nnx.tanh(layers[0](x))))

        kept = saved_residual_bytes(lambda p: jnp.sum(pair(nnx.merge(graph, p), x)), params)
    assert kept == 2 * 4 * 8 * 4


def test_another_name_is_refused():
    with pytest.raises(
        ValueError, match="got 'full' for a remat policy; legal are nothing, attention, dots_no_batch, dots, "
    ):
        remat_policy("full")
