"""The same questions for every kind of model: Linen's, NNX's, and one of bare functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import mpjax
from tests.wrap import zoo, zoo_nnx
from tests.wrap.zoo import Case


def bare(policy) -> mpjax.Model:
    """A block of bare functions, its policy applied by hand: norm and softmax in float32, products in the compute dtype."""
    policy = mpjax.Policy.of(policy)

    def init(rng, x):
        keys = jax.random.split(rng, 2)
        shape = (x.shape[-1], x.shape[-1])
        params = {
            "scale": jnp.ones(x.shape[-1]),
            **{n: jax.random.normal(k, shape) / 4 for n, k in zip("ab", keys, strict=True)},
        }
        return policy.cast_to_param(params), {}

    def apply(params, mstate, x, rng=None, train=None):
        x, params = policy.cast_to_compute((x, params))
        wide = x.astype(jnp.float32)
        norm = (
            wide
            * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
            * params["scale"].astype("float32")[None, None]
        )
        scores = norm.astype(x.dtype) @ params["a"]
        weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(x.dtype)
        return policy.cast_to_output(weights @ params["b"]), mstate

    return mpjax.Model(init, apply, policy=mpjax.PolicyMap(default=policy))


CASES = [*zoo.CASES, *zoo_nnx.CASES, Case("bare functions", bare, zoo.SEQUENCE, door="bare")]


def model_of(case: Case, policy: Any) -> mpjax.Model:
    """The case under a policy, through its door."""
    return case.module(policy) if case.door == "bare" else mpjax.wrap(case.module, policy)


def loss(apply: Callable, params: Any, mstate: Any) -> jax.Array:
    """A scalar that every float output of the model reaches."""
    outputs = [x for x in jax.tree.leaves(apply(params, mstate)[0]) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(jnp.sin(x.astype(jnp.float32)).sum() for x in outputs)


def loss_by_hand(case: Case) -> Callable:
    """The loss of the twin that was written in bfloat16 by hand, over the same float32 params."""
    if case.door == "nnx":
        return functools.partial(loss, plain_nnx(case.by_hand, case))
    return functools.partial(loss, plain_linen(case.by_hand, case))


def plain(case: Case, rng: jax.Array | None = None) -> Callable:
    """The user's own module without mpjax, as a function of the same params and mstate."""
    return plain_nnx(case.module, case) if case.door == "nnx" else plain_linen(case.module, case, rng)


def plain_linen(module: Any, case: Case, rng: jax.Array | None = None) -> Callable:
    rngs = {"dropout": jax.random.key(3) if rng is None else rng} if case.train else {}
    train = {"train": True} if case.train else {}

    def apply(params, mstate):
        return module.apply({"params": params, **mstate}, case.sample, rngs=rngs, mutable=list(mstate), **train)

    return apply


def plain_nnx(constructor: Any, case: Case) -> Callable:
    """With the rng streams that `mstate` holds."""
    module = constructor(nnx.Rngs(0))
    (module.train if case.train else module.eval)()
    graphdef, params, state = nnx.split(module, nnx.Param, ...)
    keys = [keys for keys, _ in nnx.to_flat_state(params)]
    state = jax.tree.map(jnp.copy, state)

    def apply(params, mstate):
        flat = [(path, functools.reduce(lambda tree, key: tree[str(key)], path, params)) for path in keys]
        rebuilt = nnx.merge(graphdef, nnx.from_flat_state(flat), state, copy=True)
        return rebuilt(case.sample), mstate

    return apply
