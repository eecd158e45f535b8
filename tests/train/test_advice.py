"""Warnings that cost a user days if they are missing: each speaks in its case, is silent otherwise, and can be silenced."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax
from mpjax.core import cautions
from mpjax.numerics.loss_scale import DynamicLossScale, NoOpLossScale, StaticLossScale, dynamic_loss_scale
from mpjax.policy.policy import get_policy
from mpjax.policy.rules import PolicyMap
from mpjax.train.advice import check_loss_scale, check_optimizer

MISSING, UNNEEDED = cautions.MissingLossScaleWarning, cautions.UnneededLossScaleWarning
UPDATE, EPSILON = cautions.VanishingUpdateWarning, cautions.VanishingEpsilonWarning


def warned(check, *args, **kwargs) -> dict[type, str]:
    """From category to text of every warning given."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(*args, **kwargs)
    assert len(caught) == len({w.category for w in caught})
    return {w.category: str(w.message) for w in caught}


def params(dtype, **more):
    return {"dense": {"kernel": jnp.ones((2, 3), dtype), "bias": jnp.ones(3, dtype)}, **more}


# The loss scale.

SCALES = [dynamic_loss_scale(), StaticLossScale(8.0), DynamicLossScale(jnp.float32(8))]


@pytest.mark.parametrize(
    "policy",
    [get_policy("mixed_float16"), get_policy("float16"), PolicyMap({"head": "c=f16"}), PolicyMap(default="c=f16")],
)
def test_float16_without_a_scale(policy):
    found = warned(check_loss_scale, policy, NoOpLossScale())
    assert list(found) == [MISSING]
    assert (
        "computes in float16 without a loss scale: gradients under 2⁻²⁴ become zero; leave loss_scale out"
        in found[MISSING]
    )
    assert not any(warned(check_loss_scale, policy, scale) for scale in SCALES)


@pytest.mark.parametrize(
    "policy",
    [
        get_policy("mixed_bfloat16"),
        get_policy("float32"),
        get_policy("p=f16,c=f32,o=f16"),  # float16 weights, but nothing computes in float16
        get_policy("c=f8_e4m3fn"),
        PolicyMap({"head": "c=f32"}),
    ],
)
def test_a_scale_where_nothing_computes_in_float16(policy):
    for scale in SCALES:
        found = warned(check_loss_scale, policy, scale)
        assert list(found) == [UNNEEDED]
        assert f"a {type(scale).__name__} where nothing computes in float16" in found[UNNEEDED]
        assert "leave loss_scale out" in found[UNNEEDED]
    assert not warned(check_loss_scale, policy, NoOpLossScale())


def test_without_a_policy_there_is_nothing_to_say():
    assert not any(warned(check_loss_scale, None, scale) for scale in (*SCALES, NoOpLossScale()))


# The optimizer.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e5m2"])
def test_a_plain_optimizer_on_narrow_master_weights(dtype):
    found = warned(check_optimizer, optax.sgd(0.1), {**params("float32"), "head": {"w_1": jnp.ones(2, dtype)}})
    assert list(found) == [UPDATE]
    half_ulp = {"bfloat16": "0.004", "float16": "0.0005", "float8_e5m2": "0.1"}[dtype]
    assert found[UPDATE].startswith(f"master weights in {dtype} (head/w/1 is one)")
    assert f"an update under {half_ulp} of a weight vanishes; keep params in float32" in found[UPDATE]


def test_what_it_warns_of_is_true():
    """An update under 2⁻⁸ of a bfloat16 weight, half the distance to its neighbour, leaves it as it was."""
    for dtype, moves in (("bfloat16", False), ("float32", True)):
        w = jnp.ones((), dtype)
        for _ in range(100):
            w = optax.apply_updates(w, jnp.asarray(-(2.0**-10), w.dtype))
        assert (float(w) != 1.0) is moves


@pytest.mark.parametrize("make", [optax.sgd, optax.adam, optax.adamw, optax.lion, optax.adafactor, optax.rmsprop])
def test_float32_weights_are_nothing_to_warn_of(make):
    assert not warned(check_optimizer, make(1e-3), params("float32", n=jnp.arange(3)))


def test_integers_and_float64_are_no_narrow_weights():
    assert not warned(check_optimizer, optax.sgd(0.1), {"n": jnp.arange(3, dtype=jnp.int8), "w": np.ones(2)})
    assert not warned(check_optimizer, optax.sgd(0.1), {})


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(1e-3),
        optax.adamw(1e-3),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
        optax.inject_hyperparams(optax.adam)(1e-3),
        optax.adafactor(1e-3),
    ],
    ids=["adam", "adamw", "chain", "inject_hyperparams", "adafactor"],
)
def test_fault_8_an_epsilon_that_is_zero_in_the_state(optimizer):
    found = warned(check_optimizer, optimizer, params("float16"))
    assert set(found) == {UPDATE, EPSILON}
    assert "epsilon is zero in float16, the dtype of its state: a zero gradient divides by zero" in found[EPSILON]
    assert "keep the state in float32 (optimizer_dtype='float32') or raise eps" in found[EPSILON]
    # With the state made from a float32 view, as TrainState does by default, there is nothing to divide by zero.
    assert set(warned(check_optimizer, optimizer, params("float16"), params("float32"))) == {UPDATE}
    assert set(warned(check_optimizer, optimizer, params("float32"), params("float16"))) == {EPSILON}


def test_fault_8_what_it_warns_of_is_true():
    for dtype, finite in (("float16", False), ("float32", True)):
        w, optimizer = jnp.ones(2, dtype), optax.adam(1e-3)
        updates, _ = optimizer.update(jnp.zeros(2, dtype), optimizer.init(w), w)
        assert bool(mpjax.all_finite(updates)) is finite


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        (optax.adam(1e-3, eps=1e-4), "float16"),
        (optax.adam(1e-3), "bfloat16"),  # 1e-8 is a bfloat16 number
        (optax.sgd(0.1, momentum=0.9), "float16"),
        (optax.lion(1e-3), "float16"),
    ],
    ids=["adam with eps=1e-4", "adam in bfloat16", "momentum", "lion"],
)
def test_an_epsilon_that_is_none_or_large_enough(optimizer, dtype):
    assert set(warned(check_optimizer, optimizer, params(dtype))) == {UPDATE}


def test_shapes_stand_for_params():
    shapes = jax.eval_shape(lambda: params("float16"))
    assert set(warned(check_optimizer, optax.adam(1e-3), shapes)) == {UPDATE, EPSILON}


def test_it_speaks_under_eval_shape_and_jit_too():
    for trace in (jax.eval_shape, lambda f, x: jax.jit(f)(x)):

        def create(x):
            check_optimizer(optax.adam(1e-3), x)
            return x

        assert set(warned(trace, create, params("float16"))) == {UPDATE, EPSILON}


def test_an_optimizer_that_wants_more_than_gradients_is_no_reason_to_fail():
    assert set(warned(check_optimizer, optax.polyak_sgd(), params("bfloat16"))) == {UPDATE}  # its update needs value=


def test_labels_and_frozen_params():
    labels = {"dense": {"kernel": "train", "bias": "freeze"}}
    optimizer = optax.multi_transform({"train": optax.adam(1e-3), "freeze": optax.set_to_zero()}, labels)
    assert set(warned(check_optimizer, optimizer, params("float16"))) == {UPDATE, EPSILON}


# Silencing.


@pytest.mark.parametrize(
    ("category", "trigger"),
    [
        (MISSING, lambda: check_loss_scale(get_policy("mixed_float16"), NoOpLossScale())),
        (UNNEEDED, lambda: check_loss_scale(get_policy("mixed_bfloat16"), dynamic_loss_scale())),
        (UPDATE, lambda: check_optimizer(optax.sgd(0.1), params("bfloat16"))),
        (EPSILON, lambda: check_optimizer(optax.adam(0.1), params("float32"), params("float16"))),
    ],
)
def test_each_can_be_silenced_by_its_own_category(category, trigger):
    others = {MISSING, UNNEEDED, UPDATE, EPSILON} - {category}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in others:
            warnings.simplefilter("ignore", other)
        with pytest.raises(category):
            trigger()
        warnings.simplefilter("ignore", category)
        trigger()
    for base in (cautions.PrecisionWarning, UserWarning):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", base)
            trigger()
