"""A job makes its state: what it says of the params that are trained holds, unless `state` is told otherwise."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax


def job(**settings) -> mpjax.Job:
    params = {"body": jnp.ones(2), "head": jnp.ones(2)}
    model = mpjax.Model(lambda rng, x: (params, {}), lambda p, m, x, rng=None: (x @ p["body"] + x @ p["head"], m))

    def loss_fn(params, mstate, batch, rng):
        return model.apply(params, mstate, batch)[0].mean()

    return mpjax.Job(model, loss_fn, optax.sgd(0.5), lambda n: jnp.ones((4, 2)), sample=(jnp.ones((1, 2)),), **settings)


def test_what_is_not_trainable_stays_as_it_was():
    frozen = job(trainable="head")
    state, _ = frozen.step()(frozen.state(jax.random.key(0)), frozen.batches(0))
    np.testing.assert_array_equal(state.params["body"], [1, 1])
    np.testing.assert_array_equal(state.params["head"], [0.5, 0.5])  # the gradient of a mean of ones is one


def test_an_option_of_state_counts_before_the_jobs_own():
    assert job().state(jax.random.key(0)).trainable is None
    assert job(trainable="head").state(jax.random.key(0)).trainable == (False, True)
    assert job(trainable="head").state(jax.random.key(0), trainable="body").trainable == (True, False)
    with pytest.raises(ValueError, match="matches no param"):
        job(trainable="tail").state(jax.random.key(0))


@pytest.mark.parametrize("sample", [np.ones((1, 2)), {"x": np.ones((1, 2))}], ids=["array", "dict"])
def test_a_sample_that_is_no_tuple_is_refused(sample):
    """It was spread over its rows, or its keys. The suite's type checks would refuse it first, in their own words."""
    check = getattr(mpjax.Job.__post_init__, "__wrapped__", mpjax.Job.__post_init__)
    with pytest.raises(ValueError, match=r"got a (ndarray|dict) for sample=; legal is a tuple.*sample=\(x,\)"):
        check(types.SimpleNamespace(sample=sample))
