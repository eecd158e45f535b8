"""Embeddings through both doors: rows are looked up in the master table, so that their gradients are added up in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import mpjax
from mpjax.measure.audit import audit


class LinenTied(nn.Module):
    """An embedding that is the head, too."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(8, 4, name="embed")
        return embed.attend(embed(tokens))


class NNXTied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(8, 4, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.embed(tokens))


class LinenScaled(nn.Embed):
    def __call__(self, tokens):
        return super().__call__(tokens) * 1


class LinenNamed(nn.Embed):
    def encode(self, tokens):
        return self(tokens)


class NNXScaled(nnx.Embed):
    def __call__(self, tokens):
        return super().__call__(tokens) * 1


class NNXNamed(nnx.Embed):
    def encode(self, tokens):
        return self(tokens)


ALONE = {
    "linen": nn.Embed(8, 4),
    "nnx": lambda rngs: nnx.Embed(8, 4, rngs=rngs),
    "linen subclass": LinenScaled(8, 4),
    "nnx subclass": lambda rngs: NNXScaled(8, 4, rngs=rngs),
}
NAMED = {"linen": LinenNamed(8, 4), "nnx": lambda rngs: NNXNamed(8, 4, rngs=rngs)}
TIED = {"linen": LinenTied(), "nnx": NNXTied}
TOKENS = jnp.concatenate([jnp.zeros(3000, jnp.int32), jnp.arange(8)])


@pytest.mark.parametrize("door", ALONE)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_the_gradient_of_a_frequent_token_does_not_stand_still(door, policy):
    """3,001 gradients of 1 for token 0: a sum in bfloat16 stops at 256, one in float16 at 2,048."""
    model = mpjax.wrap(ALONE[door], policy)
    params, mstate = model.init(jax.random.key(0), TOKENS)
    (out, _), grads = jax.value_and_grad(
        lambda params: ((rows := model.apply(params, mstate, TOKENS)[0]).sum(), rows), has_aux=True
    )(params)
    (grad,) = jax.tree.leaves(grads)
    assert grad.dtype == jnp.float32
    assert np.array_equal(grad[:, 0], [3001.0, *[1.0] * 7])
    half = jnp.dtype(policy.removeprefix("mixed_"))
    (table,) = jax.tree.leaves(params)
    rows = model.apply(params, mstate, TOKENS)[0]
    assert rows.dtype == jnp.float32 and jnp.array_equal(rows, table.astype(half)[TOKENS].astype(jnp.float32))
    assert out == rows.sum()


@pytest.mark.parametrize("door", NAMED)
def test_nor_where_a_method_of_ones_own_looks_up(door):
    model = mpjax.wrap(NAMED[door], "mixed_bfloat16")
    params, mstate = model.init(jax.random.key(0), TOKENS)
    grads = jax.grad(lambda params: model.apply(params, mstate, TOKENS, method="encode")[0].sum())(params)
    assert np.array_equal(jax.tree.leaves(grads)[0][:, 0], [3001.0, *[1.0] * 7])


def test_one_that_is_made_inside_of_a_method_stands_under_no_policy():
    class Fresh(nnx.Embed):
        def encode(self, tokens):
            return type(self)(8, 4, rngs=nnx.Rngs(1))(tokens)

    model = mpjax.wrap(lambda rngs: Fresh(8, 4, rngs=rngs), "c=bf16,o=f32")
    params, mstate = model.init(jax.random.key(0), TOKENS)
    rows = model.apply(params, mstate, TOKENS, method="encode")[0]
    assert jnp.array_equal(rows, nnx.Embed(8, 4, rngs=nnx.Rngs(1))(TOKENS))


@pytest.mark.parametrize("door", TIED)
def test_a_tied_head_still_multiplies_in_half(door):
    model = mpjax.wrap(TIED[door], "mixed_bfloat16")
    params, mstate = model.init(jax.random.key(0), TOKENS)
    found = audit(jax.grad(lambda params: model.apply(params, mstate, TOKENS)[0].sum()), params)
    assert found.share("bfloat16") == 1.0
    (table,) = jax.tree.leaves(params)
    rows = table.astype(jnp.bfloat16)[TOKENS]
    assert jnp.array_equal(
        model.apply(params, mstate, TOKENS)[0], (rows @ table.astype(jnp.bfloat16).T).astype("float32")
    )


@pytest.mark.parametrize("door", ALONE)
def test_params_that_are_half_stay_so(door):
    """`cast_params` for evaluation, and masters in half: the table is not widened."""
    model = mpjax.wrap(ALONE[door], "p=bf16,c=bf16,o=bf16")
    params, mstate = model.init(jax.random.key(0), TOKENS)
    assert model.apply(params, mstate, TOKENS)[0].dtype == jnp.bfloat16
    assert audit(lambda params: model.apply(params, mstate, TOKENS)[0], params).dtypes("cast") == {}
