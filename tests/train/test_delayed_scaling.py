"""Delayed float8 scales in a train step: what its histories are after it, and what they never touch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import mpjax
from mpjax.core.tree import path_of
from mpjax.numerics.delayed import COLLECTION
from tests.train.meshes import compiled_quickly, needs_eight

POLICY = "p=f32,c=f32,o=f32,dot=fp8_delayed"
"""Computed in float32: the largest magnitudes are then those of a float32 forward pass, exactly, in the first layer."""


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="down")(nn.relu(nn.Dense(32, name="up")(x)))


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


@pytest.fixture(autouse=True)
def quickly():
    with compiled_quickly():
        yield


DOORS = {"linen": Linen(), "nnx": NNX}
both_doors = pytest.mark.parametrize("door", DOORS)
X = jax.random.normal(jax.random.key(1), (16, 16))
Y = jnp.sin(X @ jax.random.normal(jax.random.key(2), (16, 16)))
BATCH = {"x": X, "y": Y}


@functools.cache
def job(door="linen", policy=POLICY):
    model = mpjax.wrap(DOORS[door], policy)

    def loss_fn(params, mstate, batch, rng):
        y, mstate = model.apply(params, mstate, batch["x"], rng=rng)
        return jnp.square(y - batch["y"]).mean(), mpjax.Aux(mstate)

    return model, loss_fn


OPTIMIZER = optax.adam(1e-2)


@functools.cache
def step_of(door="linen", policy=POLICY, **options):
    return mpjax.make_train_step(job(door, policy)[1], OPTIMIZER, donate=False, **options)


def state_of(door="linen", policy=POLICY):
    return mpjax.TrainState.create(job(door, policy)[0], OPTIMIZER, jax.random.key(0), X)


def exponents(state, layer):
    return np.asarray(state.mstate[COLLECTION][layer]["exponents"])


def exponent_of(x):
    """127 + floor(log2 of the largest magnitude)."""
    return 126 + np.frexp(np.abs(np.asarray(x, np.float64)).max())[1]


@both_doors
def test_a_step_writes_down_the_exponents_of_what_went_through_each_layer(door):
    state, step = state_of(door), step_of(door, clip_norm=1.0)
    after, metrics = step(state, BATCH)
    params = jax.tree.map(lambda x: np.float64(x), state.params)
    # By hand: magnitudes move by at most 1/16 in e4m3, so a test input near a power of two would prove nothing.
    for x in (X, params["up"]["kernel"], params["down"]["kernel"]):
        mantissa = 2 * np.frexp(np.abs(np.asarray(x, np.float64)).max())[0]
        assert 1 < mantissa < 1.9
    x, w = exponents(after, "up")[:2, 0]
    assert (x, w) == (exponent_of(X), exponent_of(params["up"]["kernel"]))
    assert exponents(after, "down")[1, 0] == exponent_of(params["down"]["kernel"])
    h = np.maximum(np.float64(X) @ params["up"]["kernel"], 0)
    g = 2 * (h @ params["down"]["kernel"] - np.float64(Y)) / Y.size
    assert abs(exponents(after, "down")[0, 0] - exponent_of(h)) <= 1  # h and g come from rounded operands
    assert abs(exponents(after, "down")[2, 0] - exponent_of(g)) <= 1
    for layer in ("up", "down"):  # the rest has moved on by one
        assert np.array_equal(exponents(after, layer)[:, 1:], exponents(state, layer)[:, :-1])
    # No part of it meets clip or optimizer: the norm is that of the gradients of params alone.
    _, loss_fn = job(door)
    grads = jax.jit(jax.grad(lambda p: loss_fn(p, state.mstate, BATCH, jax.random.key(0))[0]))(state.params)
    norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    leaves = jax.tree_util.tree_flatten_with_path((after.params, after.opt_state))[0]
    assert not any("exponents" in path_of(keys) for keys, _ in leaves)
    assert jax.tree.structure(after) == jax.tree.structure(state) and "sinks" not in metrics


def same_bytes(a, b):
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@both_doors
def test_a_skipped_step_leaves_the_histories(door):
    state, _ = step_of(door, clip_norm=1.0)(state_of(door), BATCH)
    after, _ = step_of(door, clip_norm=1.0)(state, {**BATCH, "x": X.at[3, 3].set(jnp.nan)})
    assert int(after.skipped) == 1 and same_bytes(after.mstate, state.mstate)


def test_micro_batches_see_the_maxima_of_the_whole_batch():
    """Of x and w; g is divided by the rows of its own micro-batch: 4 times as few, two exponents more."""
    state = state_of()
    whole, _ = step_of(clip_norm=1.0)(state, BATCH)
    cut, _ = step_of(accumulate=4)(state, BATCH)
    for layer in ("up", "down"):
        assert np.array_equal(exponents(cut, layer)[:2], exponents(whole, layer)[:2])
        assert exponents(cut, layer)[2, 0] == exponents(whole, layer)[2, 0] + 2


@needs_eight
@pytest.mark.parametrize("reduce_dtype", [None, "float32", "bfloat16"])
def test_eight_devices_keep_the_histories_of_one(reduce_dtype):
    mesh = jax.make_mesh((8,), ("data",))
    state = state_of()
    alone, _ = step_of(clip_norm=1.0)(state, BATCH)
    step = mpjax.make_train_step(job()[1], OPTIMIZER, donate=False, mesh=mesh, reduce_dtype=reduce_dtype)
    spread, _ = step(mpjax.shard_state(state, mesh), mpjax.shard_batch(BATCH, mesh))
    for layer in ("up", "down"):
        assert np.array_equal(exponents(spread, layer), exponents(alone, layer))


@both_doors
def test_gradients_that_are_zeros_say_nothing_of_their_scale(door):
    """The step writes a 0, nothing seen, and what was known before still holds (test_delayed has what 16 such steps do)."""
    model, _ = job(door)

    def loss_fn(params, mstate, batch, rng):
        y, mstate = model.apply(params, mstate, batch["x"], rng=rng)
        used = jnp.where(batch["use"], 1.0, 0.0)
        return (used * y).mean(), mpjax.Aux(mstate)

    step = mpjax.make_train_step(loss_fn, OPTIMIZER, donate=False)
    state = state_of(door)
    first, _ = step(state, {"x": X, "use": jnp.array(False)})
    for layer in ("up", "down"):
        assert exponents(first, layer)[2, :3].tolist() == [0, exponents(state, layer)[2, 0], 0]
    assert exponents(first, "up")[0, 0] == exponent_of(X)


@pytest.mark.parametrize(("door", "recipe"), [("linen", "fp8"), ("nnx", "fp8_delayed"), ("linen", "int8")])
def test_it_learns_as_bfloat16_does(door, recipe):
    """Within a quarter of bfloat16's loss after 40 steps, which is under a quarter of the first one."""

    def losses(policy):
        state, step = state_of(door, policy), step_of(door, policy)
        found = []
        for _ in range(40):
            state, metrics = step(state, BATCH)
            found.append(float(metrics["loss"]))
        return found

    plain, eight = losses("mixed_bfloat16"), losses(f"p=f32,c=bf16,o=f32,dot={recipe}")
    assert plain[-1] < 0.25 * plain[0]
    assert eight[-1] < 1.25 * plain[-1]


def test_float16_with_a_dynamic_scale_learns():
    policy = "p=f32,c=f16,o=f32,dot=fp8"
    state, first = step_of(policy=policy)(state_of(policy=policy), BATCH)
    assert float(state.loss_scale.loss_scale) > 1 and not int(state.skipped)
    for _ in range(10):
        state, last = step_of(policy=policy)(state, BATCH)
    assert not int(state.skipped) and float(last["loss"]) < float(first["loss"])


@both_doors
def test_bare_params_run_with_current_scales(door):
    """`apply` with mstate {} is what mixed_fp8 gives, to the byte."""
    model, _ = job(door)
    current = mpjax.wrap(DOORS[door], "p=f32,c=f32,o=f32,dot=fp8")
    params, _ = model.init(jax.random.key(0), X)
    assert same_bytes(*(jax.jit(lambda p, m=m: m.apply(p, {}, X)[0])(params) for m in (model, current)))


def test_a_probe_looks_at_a_delayed_model_and_leaves_its_state():
    state = state_of()
    probed, metrics = mpjax.probe(step_of(clip_norm=1.0), every=1)(state, BATCH)
    plain, _ = step_of(clip_norm=1.0)(state, BATCH)
    assert jax.tree.structure(probed) == jax.tree.structure(plain)
    assert same_bytes(probed.mstate, plain.mstate)
    assert set(metrics["sinks"]) == {"probe", "updates"}


def test_a_checkpoint_holds_the_histories_and_one_without_them_says_which_leaf_is_missing(tmp_path):
    state, _ = step_of(clip_norm=1.0)(state_of(), BATCH)
    kept = mpjax.Checkpointer(tmp_path / "delayed")
    kept.save(state)
    kept.wait()
    assert same_bytes(kept.restore(state_of()).mstate, state.mstate)
    plain = mpjax.Checkpointer(tmp_path / "plain")
    plain.save(state_of(policy="mixed_bfloat16"))
    plain.wait()
    with pytest.raises(ValueError, match=r"mstate/fp8_history/down/exponents: not in the checkpoint"):
        plain.restore(state)
