"""The contract: two pure functions, free of Flax."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mpjax.core.model import SINKS, Model


def init(rng, x):
    return {"w": jax.random.normal(rng, x.shape)}, {"stats": {"n": jnp.int32(0)}}


def apply(params, mstate, x, rng=None):
    return x @ params["w"], {"stats": {"n": mstate["stats"]["n"] + 1}}


def test_bare_functions_make_a_model():
    model = Model(init, apply)
    params, mstate = model.init(jax.random.key(0), jnp.ones(3))
    out, mstate = jax.jit(model.apply)(params, mstate, jnp.ones(3))
    assert out.shape == () and int(mstate["stats"]["n"]) == 1
    assert model.policy is None and model.table is None and model.cast_params(params) is params


def test_they_have_nothing_to_explain_and_say_what_has():
    with pytest.raises(
        ValueError, match=r"made from bare functions, which have no module paths.*mpjax.wrap\(module, rules\)"
    ):
        Model(init, apply).explain(jnp.ones(3))


def test_explain_is_the_table_for_these_inputs():
    model = Model(init, apply, table=lambda *args, **kwargs: (args, kwargs))
    assert model.explain(3, train=True) == "((3,), {'train': True})"


def test_a_model_cannot_be_changed_but_replaced():
    model = Model(init, apply)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.apply = init
    assert dataclasses.replace(model, policy="p").policy == "p" and SINKS == "sinks"
