"""One architecture, written in Linen and in NNX, given the same params: the same numbers, and the same dtypes everywhere."""

from __future__ import annotations

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import mpjax
from mpjax.core.tree import path_of
from mpjax.measure.audit import audit
from mpjax.wrap.reserved import apart
from tests.wrap import zoo, zoo_nnx
from tests.wrap.zoo import SEQUENCE, TOKENS

IMAGES = jax.random.normal(jax.random.key(4), (4, 8, 8, 3))
POLICIES = (
    "float32", "mixed_bfloat16", "mixed_float16", "bfloat16", {"**/up": "float16", "head": "compute=float32,output=float32"},
)  # fmt: skip


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.gelu(nn.Dense(32, name="up")(nn.LayerNorm(name="norm")(x)))
        return nn.Dense(5, name="head")(nn.RMSNorm(name="last")(x))


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.up = nnx.LayerNorm(16, rngs=rngs), nnx.Linear(16, 32, rngs=rngs)
        self.last, self.head = nnx.RMSNorm(32, rngs=rngs), nnx.Linear(32, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.last(nnx.gelu(self.up(self.norm(x)))))


class LinenTransformer(nn.Module):
    @nn.compact
    def __call__(self, tokens, train=False):
        x = nn.Embed(48, 32, name="embed")(tokens)
        x = zoo.Block(32, name="layers_0")(x)
        return nn.Dense(48, name="head")(x)


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(48, 32, rngs=rngs)
        self.layers = nnx.List([zoo_nnx.Block(32, rngs=rngs)])
        self.head = nnx.Linear(32, 48, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.layers[0](self.embed(tokens)))


class LinenResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm(name="norm")(nn.Conv(8, (3, 3), use_bias=False, name="up")(x)))
        y = nn.relu(norm(name="norm_1")(nn.Conv(8, (3, 3), use_bias=False, name="conv_1")(x)))
        y = norm(name="norm_2")(nn.Conv(8, (3, 3), use_bias=False, name="conv_2")(y))
        return nn.Dense(5, name="head")(nn.relu(x + y).mean((1, 2)))


class NnxResNet(nnx.Module):
    def __init__(self, rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, rngs=rngs)
        self.up, self.conv_1, self.conv_2 = conv(3, 8), conv(8, 8), conv(8, 8)
        self.norm, self.norm_1, self.norm_2 = (nnx.BatchNorm(8, rngs=rngs) for _ in range(3))
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.up(x)))
        y = self.norm_2(self.conv_2(nnx.relu(self.norm_1(self.conv_1(x)))))
        return self.head(nnx.relu(x + y).mean((1, 2)))


PAIRS = {
    "mlp": (LinenMLP(), NnxMLP, SEQUENCE),
    "transformer": (LinenTransformer(), NnxTransformer, TOKENS),
    "resnet": (LinenResNet(), NnxResNet, IMAGES),
}


def by_path(tree):
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def like(tree, values):
    """The values of another tree, by canonical path, in the structure of this one."""
    found = by_path(values)
    return jax.tree_util.tree_map_with_path(lambda keys, x: found[path_of(keys)], tree)


@functools.cache
def pair(name, policy_index):
    """Per door (loss of params, params): the NNX one has the values of the Linen one."""
    linen, constructor, x = PAIRS[name]
    policy = POLICIES[policy_index]
    models = [mpjax.wrap(module, policy) for module in (linen, constructor)]
    rng = jax.random.key(0)
    params, mstate = models[0].init(rng, x)
    shapes = [jax.eval_shape(model.init, rng, x) for model in models]
    assert by_path(shapes[0][0]).keys() == by_path(shapes[1][0]).keys()
    assert by_path(shapes[0][1]).keys() == by_path(shapes[1][1]).keys()

    def loss_fn(model, mstate, params):
        out, new = model.apply(params, mstate, x, train=True)
        return jnp.sin(out.astype(jnp.float32)).sum(), new

    found = []
    for model, (empty, empty_state) in zip(models, shapes, strict=True):
        found.append((functools.partial(loss_fn, model, like(empty_state, mstate)), like(empty, params)))
    return found


@pytest.mark.parametrize("name", PAIRS)
def test_the_same_float32_loss_gradients_and_statistics(name):
    """Within 4 ulp of the largest number of each tree."""
    results = [jax.jit(jax.value_and_grad(fn, has_aux=True))(params) for fn, params in pair(name, 0)]
    (first, grads_a), (second, grads_b) = results
    for ours, theirs in ((first[0], second[0]), (grads_a, grads_b), (first[1], second[1])):
        ours, theirs = by_path(ours), by_path(theirs)
        assert ours.keys() == theirs.keys()
        scale = max((float(jnp.abs(x).max()) for x in ours.values()), default=0.0)
        for path in ours:
            np.testing.assert_allclose(ours[path], theirs[path], rtol=0, atol=4 * 2.0**-23 * scale, err_msg=path)


@pytest.mark.parametrize("policy", range(len(POLICIES)), ids=lambda n: str(POLICIES[n])[:20])
@pytest.mark.parametrize("name", PAIRS)
def test_every_product_exp_and_sum_has_the_same_dtypes_at_the_same_path(name, policy):
    """Forward and backward. Products and exponentials are counted too; a sum Flax writes once more in one of the doors."""
    counts, dtypes = [], []
    for fn, params in pair(name, policy):
        ops = audit(jax.grad(lambda p, fn=fn: fn(p)[0]), params).ops
        counts.append(Counter((op.kind, op.path, op.operands) for op in ops if op.kind in ("dot", "conv", "exp")))
        dtypes.append({(op.kind, op.path, op.operands) for op in ops if op.kind in ("reduce", "rsqrt", "log")})
    assert counts[0] == counts[1] and counts[0]
    assert dtypes[0] == dtypes[1] and dtypes[0]


def test_an_input_where_mstate_belongs_is_refused():
    """`model.apply(params, x)`. The suite's type checks would refuse it first, in their own words; users run without."""
    with pytest.raises(
        TypeError, match=r"got ndarray for mstate; legal is a dict .*\{\}.*apply\(params, mstate, \*inputs"
    ):
        getattr(apart, "__wrapped__", apart)(np.ones((1, 3)))
