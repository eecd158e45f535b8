"""What the backward pass keeps, by hand and beside jax's own list of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Private, and for this comparison only: its public face, print_saved_residuals, prints.
from jax._src.ad_checkpoint import saved_residuals

from mpjax.measure.residuals import saved_residual_bytes

X, W, STACK = jnp.ones((4, 8)), jnp.ones((8, 8)), jnp.ones((3, 8, 8))
CONSTANT = jnp.full((4, 8), 2.0, jnp.float32)


def by_jax(fn, *args):
    """The bytes of what jax lists, but for arguments and constants."""
    kept = [aval for aval, source in saved_residuals(fn, *args) if not source.startswith("from ")]
    return sum(int(np.prod(aval.shape)) * aval.dtype.itemsize for aval in kept)


def dense(x, w):
    return (x @ w).sum()


def scanned(x, stack):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stack)[0].sum()


BY_HAND = {
    "a dense layer keeps its arguments": (dense, (X, W), 0),
    "also through jit": (jax.jit(dense), (X, W), 0),
    "exp keeps its result": (lambda x: jnp.exp(x).sum(), (X,), 4 * 8 * 4),
    "in half precision half as much": (lambda x: jnp.exp(x.astype(jnp.bfloat16)).sum(), (X,), 4 * 8 * 2),
    "the same array twice counts once": (lambda x: ((y := jnp.exp(x)) * y).sum(), (X,), 4 * 8 * 4),
    "what is closed over was there": (lambda w: (CONSTANT @ w * CONSTANT).sum(), (W,), 0),
    "remat keeps arguments only": (jax.checkpoint(lambda x, w: jnp.exp(jnp.sin(x @ w)).sum()), (X, W), 0),
    "an int argument has no gradient": (lambda x, i: jnp.exp(x * i).sum(), (X, jnp.int32(2)), 4 * 8 * 4 + 4),
}


@pytest.mark.parametrize(("fn", "args", "wanted"), BY_HAND.values(), ids=BY_HAND)
def test_by_hand(fn, args, wanted):
    assert saved_residual_bytes(fn, *args) == wanted


MORE = {
    "scan": (scanned, (X, STACK)),
    "scan of remat": (
        lambda x, s: jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, s)[0].sum(), (X, STACK)
    ),
    "cond": (lambda x, w: jax.lax.cond(x.sum() > 0, lambda: jnp.exp(x @ w), lambda: x).sum(), (X, W)),
    "relu": (lambda x, w: jax.nn.relu(x @ w).sum(), (X, W)),
    "dropout": (lambda x, key: (x * jax.random.bernoulli(key, 0.5, x.shape)).sum(), (X, jax.random.key(0))),
    "not a scalar": (lambda x: jnp.exp(jnp.sin(x)), (X,)),
}  # fmt: skip


@pytest.mark.parametrize(("fn", "args"), [*((fn, args) for fn, args, _ in BY_HAND.values()), *MORE.values()])
def test_it_is_what_jax_lists(fn, args):
    assert saved_residual_bytes(fn, *args) == by_jax(fn, *args)


def test_it_sees_the_half_copy_of_weights_that_a_cast_outside_of_remat_leaves():
    """Decision 1 of the design: cast where the weights are read."""
    layer = jax.checkpoint(lambda x, w: jnp.sin(x @ w.astype(x.dtype)))
    x = X.astype(jnp.bfloat16)
    outside = saved_residual_bytes(lambda x, w: layer(x, w.astype(jnp.bfloat16)).sum(), x, W)
    inside = saved_residual_bytes(lambda x, w: layer(x, w).sum(), x, W)
    assert (outside, inside) == (W.size * 2, 0)


def test_shapes_are_enough():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (X, STACK))
    assert saved_residual_bytes(scanned, *shapes) == saved_residual_bytes(scanned, X, STACK) > 0


def test_a_pytree_of_params():
    params = {"a": W, "b": {"w": W}}
    loss = lambda p, x: jnp.exp(jnp.exp(x @ p["a"]) @ p["b"]["w"]).sum()  # noqa: E731
    assert saved_residual_bytes(loss, params, X) == 2 * X.nbytes
