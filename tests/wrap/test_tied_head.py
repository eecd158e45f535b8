"""Through both doors: a model hands out hidden states, and its own embedding table is the head inside the loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import mpjax
from mpjax.measure.audit import audit

VOCAB, WIDTH = 24, 8


class LinenLM(nn.Module):
    """`hidden` is what the loss is given; `__call__`, the logits, is for whoever samples."""

    def setup(self):
        self.embed = nn.Embed(VOCAB, WIDTH)
        self.up = nn.Dense(WIDTH)

    def hidden(self, tokens):
        return nn.tanh(self.up(self.embed(tokens)))

    def __call__(self, tokens):
        return self.embed.attend(self.hidden(tokens))


class NNXLM(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def hidden(self, tokens):
        return nnx.tanh(self.up(self.embed(tokens)))

    def __call__(self, tokens):
        return self.embed.attend(self.hidden(tokens))


MODELS = {"linen": LinenLM(), "nnx": lambda rngs: NNXLM(rngs)}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(VOCAB, size=(3, 7)))
LABELS = jnp.roll(TOKENS, -1, axis=1)
WEIGHTS = jnp.ones(TOKENS.shape).at[:, -1].set(0.0)
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-3, "weights": WEIGHTS}


def losses_of(door, policy, compute=None):
    """A model's params, its usual loss, and the one that never holds the logits."""
    model = mpjax.wrap(MODELS[door], policy)
    params, mstate = model.init(jax.random.key(0), TOKENS)

    def plain(params):
        logits, _ = model.apply(params, mstate, TOKENS)
        return mpjax.losses.softmax_cross_entropy(logits, LABELS, **OPTIONS).sum()

    def chunked(params):
        hidden, _ = model.apply(params, mstate, TOKENS, method="hidden")
        table = params["embed"]["embedding"]
        total, _ = mpjax.losses.linear_softmax_cross_entropy(
            hidden, table, LABELS, transposed=True, chunk=8, compute_dtype=compute, **OPTIONS
        )
        return total

    return params, plain, chunked


@pytest.mark.parametrize("door", MODELS)
def test_its_gradients_are_those_of_the_logits(door):
    """To float32 accuracy: 21 tokens, each a few sums over 24 classes and 8 features, on both sides."""
    params, *both = losses_of(door, "full")
    (total, found), (value, slopes) = jax.jit(lambda p: [jax.value_and_grad(f)(p) for f in both])(params)
    error = 2 * (VOCAB + WIDTH + 8) * float(jnp.finfo(jnp.float32).eps)
    np.testing.assert_allclose(value, total, rtol=error)
    assert jax.tree.structure(slopes) == jax.tree.structure(found)
    for got, want in zip(jax.tree.leaves(slopes), jax.tree.leaves(found), strict=True):
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(got, want, rtol=0, atol=21 * error * float(np.abs(want).max()))


@pytest.mark.parametrize("door", MODELS)
def test_in_mixed_precision_every_product_is_half_and_the_gradients_are_float32(door):
    params, _, chunked = losses_of(door, "mixed_bfloat16", "bfloat16")
    assert audit(jax.grad(chunked), params).share("bfloat16") == 1.0
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(jax.grad(chunked), params))} == {jnp.dtype("float32")}
