"""FAULTS 18, 20 and 34 through the NNX door: eight devices, a BatchNorm, a scanned stack, annotations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mpjax
from mpjax.measure.audit import audit
from tests.train.meshes import PLACEMENTS, needs_eight

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
MESH = PLACEMENTS["data"].mesh if len(jax.devices()) >= 8 else None
pytestmark = needs_eight


class Net(nnx.Module):
    """A norm with statistics and a stack of scanned layers."""

    def __init__(self, rngs):
        self.inputs = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.5, rngs=rngs)
        self.layers = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: nnx.Linear(16, 16, rngs=rngs)))(rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.inputs(x))
        x = nnx.scan(lambda x, layer: x + nnx.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.layers
        )
        return self.head(x)


def lab(policy, mesh=None, rules=None, **options):
    model, optimizer = mpjax.wrap(lambda rngs: Net(rngs), policy), optax.sgd(0.05)

    def loss_fn(params, mstate, batch, rng):
        y, mstate = model.apply(params, mstate, batch, rng=rng, train=True)
        return jnp.square(y - 1).mean(), mpjax.Aux(mstate)

    state = mpjax.TrainState.create(model, optimizer, jax.random.key(0))
    state = state if mesh is None else mpjax.shard_state(state, mesh, rules)
    return state, mpjax.make_train_step(loss_fn, optimizer, donate=False, mesh=mesh, **options)


@pytest.mark.parametrize(("policy", "tolerance"), [("float32", 2e-6), ("mixed_bfloat16", 2e-2)])
def test_fault_20_eight_devices_give_the_numbers_of_one(policy, tolerance):
    """Loss, params and statistics after 20 steps of SGD, params cut over the devices, relative to the largest of each leaf."""
    one, step = lab(policy)
    eight, apart = lab(policy, MESH, mpjax.fsdp("data", min_size=8))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(eight.params))
    for _ in range(20):
        one, metrics = step(one, X)
        eight, theirs = apart(eight, mpjax.shard_batch(X, MESH))
    np.testing.assert_allclose(theirs["loss"], metrics["loss"], rtol=tolerance)
    for a, b in zip(
        jax.tree.leaves((one.params, one.mstate)), jax.tree.leaves((eight.params, eight.mstate)), strict=True
    ):
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * max(float(jnp.abs(a).max()), 1.0))


@pytest.mark.parametrize("reduce_dtype", [None, "float32"])
def test_fault_18_nan_on_one_device_skips_on_all(reduce_dtype):
    state, step = lab("mixed_float16", MESH, reduce_dtype=reduce_dtype)
    bad = X.copy()
    bad[11, 3] = np.nan  # on the sixth device of eight
    after, _ = step(state, mpjax.shard_batch(bad, MESH))
    kept = ("params", "mstate", "opt_state", "step")
    for a, b in zip(*(jax.tree.leaves([getattr(s, name) for name in kept]) for s in (state, after)), strict=True):
        for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
            assert np.asarray(x.data).tobytes() == np.asarray(y.data).tobytes()
    scales = {float(np.asarray(x.data)) for x in after.loss_scale.loss_scale.addressable_shards}
    assert scales == {float(state.loss_scale.loss_scale) / 2} and int(after.skipped) == 1


def test_fault_34_the_jaxpr_of_a_step_holds_no_callback():
    state, step = lab("mixed_float16")
    text = str(jax.make_jaxpr(step.pure)(state, X))
    assert "callback" not in text and "dot_general" in text
    assert audit(step.pure, state, X).share("float16") == 1.0


def test_annotations_place_params_where_no_rule_speaks():
    """`nnx.with_partitioning` names mesh axes; the params lie by them, and so does their momentum."""

    def make(rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "data"))
        with nnx.use_eager_sharding(False):
            return nnx.Linear(8, 16, kernel_init=init, rngs=rngs)

    model = mpjax.wrap(make, "mixed_bfloat16")
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = mpjax.shard_state(mpjax.TrainState.create(model, optimizer, jax.random.key(0)), MESH)
    specs = {
        tuple(x.sharding.spec) for x in jax.tree.leaves((state.params["kernel"], state.opt_state[0].trace["kernel"]))
    }
    assert specs == {(None, "data")}
    step = mpjax.make_train_step(lambda p, m, x, rng: jnp.square(model.apply(p, m, x)[0]).mean(), optimizer)
    after, _ = step(state, mpjax.shard_batch(X, MESH))
    assert tuple(after.params["kernel"].value.sharding.spec) == (None, "data") and int(after.step) == 1
