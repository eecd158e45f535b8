"""Bytes of a compiled function, as XLA planned them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import mpjax
from mpjax.measure.memory import MemoryAccount, memory_by_role, step_memory
from mpjax.measure.residuals import saved_residual_bytes

X, W = jnp.ones((16, 32), jnp.bfloat16), jnp.ones((32, 32), jnp.float32)


def test_arguments_and_outputs_are_their_bytes():
    found = step_memory(jax.jit(lambda x, w: (x @ w.astype(x.dtype), w + 1)).lower(X, W).compile())
    assert (found["arguments"], found["shared"]) == (X.nbytes + W.nbytes, 0)
    assert 0 <= found["outputs"] - X.nbytes - W.nbytes <= 64  # a tuple has a table of pointers


def test_a_donated_argument_is_shared_with_the_output():
    found = step_memory(jax.jit(lambda w: w + 1, donate_argnums=0).lower(W).compile())
    assert found["shared"] == found["arguments"] == W.nbytes


def test_temporaries_grow_by_what_the_backward_pass_keeps():
    """XLA's plan and jax's own list agree on what eight layers more cost."""
    h = jnp.ones((64, 32))

    def loss(layers, w):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), h, length=layers)[0].sum()

    def temp(layers):
        return step_memory(jax.jit(jax.grad(functools.partial(loss, layers))).lower(W).compile())["temp"]

    def kept(layers):
        return saved_residual_bytes(functools.partial(loss, layers), W)

    assert temp(16) - temp(8) == kept(16) - kept(8) >= 8 * h.nbytes


def test_a_lowered_function_is_compiled():
    lowered = jax.jit(lambda x, w: jnp.exp(x @ w.astype(x.dtype))).lower(X, W)
    assert step_memory(lowered) == step_memory(lowered.compile())


def test_a_backend_without_a_plan_says_so():
    class Compiled:
        def memory_analysis(self):
            return None

    with pytest.raises(ValueError, match="got a backend that reports no memory plan; legal are CPU, GPU and TPU"):
        step_memory(Compiled())


ZEROS = nn.initializers.zeros  # a random one takes longer to compile than the rest


class TwoLayers(nn.Module):
    """8 → 16 → 6, squared in the middle."""

    @nn.compact
    def __call__(self, x_BxK):
        h_BxF = nn.Dense(16, use_bias=False, kernel_init=ZEROS, name="up")(x_BxK)
        return nn.Dense(6, use_bias=False, kernel_init=ZEROS, name="down")(h_BxF * h_BxF)


ROWS = 16
BATCH = {"x": jnp.ones((ROWS, 8)), "y": jnp.ones((ROWS, 6)), "id": jnp.arange(ROWS)}
WEIGHTS = 8 * 16 + 16 * 6


def two_layers(policy="mixed_float16", **options):
    model = mpjax.wrap(TwoLayers(), policy)

    def loss_fn(params, mstate, batch, rng):
        logits, mstate = model.apply(params, mstate, batch["x"])
        return (jnp.exp(logits) * batch["y"]).sum(), mpjax.Aux(mstate)

    job = mpjax.Job(model, loss_fn, optax.sgd(1e-3, momentum=0.9), lambda attempt: BATCH, sample=(BATCH["x"][:1],))
    return job, job.state(jax.random.key(0), **options)


def test_arguments_by_role_are_their_bytes():
    job, state = two_layers(ema_decay=0.9)
    found = memory_by_role(job.step(), state, BATCH)
    assert found.arguments == {
        "master weights": 4 * WEIGHTS,
        "optimizer state": 4 * WEIGHTS,  # the momentum
        "moving average": 4 * WEIGHTS,
        "mstate": 0,
        "batch": ROWS * (8 + 6 + 1) * 4,
        "rest": 3 * 4 + (4 + 4) + 8,  # counters; scale and its counter; the key
    }
    never_read = ROWS * 4  # the ids
    assert found.planned["arguments"] == sum(found.arguments.values()) - never_read
    assert ("  never read", -never_read, "not passed to the program") in found.rows()
    assert found.temporaries == temporaries(ROWS)


def temporaries(rows):
    return {
        "gradients": 4 * WEIGHTS,
        "activations": rows * (8 + 16 + 16) * 2,  # the input, the argument of the square, its result
        "cast weights": 16 * 6 * 2,
        "logits": rows * 6 * 4,  # exp's result; what it is multiplied with was there
    }


def test_a_micro_batch_keeps_its_share_and_shapes_alone_will_do():
    job, state = two_layers()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, BATCH))
    found = memory_by_role(job.step(accumulate=4), *shapes)
    assert found.temporaries == temporaries(ROWS // 4)
    plan = found.planned
    assert plan["shared"] == sum(found.arguments.values()) - found.arguments["batch"]  # the state, donated
    assert found.unexplained == plan["temp"] - sum(found.temporaries.values())
    assert found.peak == plan["arguments"] + plan["outputs"] + plan["temp"] - plan["shared"]


def test_frozen_params_have_no_gradient():
    job, state = two_layers("float32", trainable="down")
    found = memory_by_role(job.step(), state, BATCH)
    assert found.arguments["master weights"] == 4 * WEIGHTS
    assert (found.temporaries["gradients"], found.arguments["optimizer state"]) == (4 * 16 * 6, 4 * 16 * 6)


def test_on_a_mesh_the_bytes_are_those_of_one_device():
    mesh = jax.make_mesh((8,), ("data",))
    job, state = two_layers("float32")
    state = mpjax.shard_state(state, mesh, mpjax.fsdp(min_size=100))
    batch = mpjax.shard_batch(BATCH, mesh)
    found = memory_by_role(job.step(mesh=mesh), state, batch)
    cut, whole = 8 * 16 * 4 // 8, 16 * 6 * 4  # the smaller kernel is left whole
    assert found.arguments["master weights"] == cut + whole
    assert found.arguments["optimizer state"] == cut + whole
    assert found.arguments["batch"] == 2 * (8 + 6 + 1) * 4
    assert found.temporaries["gradients"] == cut + whole
    assert found.temporaries["activations"] == 2 * (16 + 16) * 4
    assert found.planned["arguments"] == sum(found.arguments.values()) - 2 * 4


@pytest.mark.parametrize("reduce_dtype", [None, "float32"])
def test_a_batch_of_the_host_is_what_a_device_gets_of_it(reduce_dtype):
    """numpy's int64 and float64 arrive in 32 bits, and under a `reduce_dtype` the step itself cuts up what comes whole."""
    mesh = jax.make_mesh((8,), ("data",))
    job, state = two_layers("float32")
    host = {"x": np.ones((ROWS, 8)), "y": np.ones((ROWS, 6)), "id": np.arange(ROWS)}
    found = memory_by_role(job.step(mesh=mesh, reduce_dtype=reduce_dtype), mpjax.shard_state(state, mesh), host)
    rows = ROWS if reduce_dtype is None else ROWS // 8
    assert found.arguments["batch"] == rows * (8 + 6 + 1) * 4
    assert found.temporaries["activations"] == rows * (16 + 16) * 4
    assert found.planned["arguments"] == sum(found.arguments.values()) - rows * 4


def test_the_table_shows_every_role_that_has_bytes():
    account = MemoryAccount(
        {"master weights": 2048, "moving average": 0},
        {"arguments": 2048, "outputs": 2060, "shared": 2048, "temp": 3 * 2**20},
        {"gradients": 2048, "activations": 4 * 2**20, "cast weights": 0, "logits": None},
    )
    lines = str(account).splitlines()
    cells = [(line[:22].strip(), line[22:34].strip()) for line in lines]
    assert cells == [
        ("arguments", "2.00 KiB"),
        ("master weights", "2.00 KiB"),
        ("new outputs", "12 B"),
        ("temporaries", "3.00 MiB"),
        ("gradients", "2.00 KiB"),
        ("activations", "4.00 MiB"),
        ("cast weights", "0 B"),
        ("logits", "–"),
        ("not explained", "-1.00 MiB"),
        ("peak", "3.00 MiB"),
    ]
    assert "among the activations" in lines[7] and "twice" in lines[8]


def test_a_batch_may_hold_keys():
    """Two uint32 a key: jax canonicalises no key dtype unless asked to let it pass."""
    model = mpjax.wrap(nn.Dense(2), "float32")

    def loss_fn(params, mstate, keys, rng):
        return model.apply(params, mstate, jax.vmap(jax.random.normal)(keys)[:, None])[0].mean()

    step = mpjax.make_train_step(loss_fn, optax.sgd(0.1))
    state = mpjax.TrainState.create(model, step.optimizer, jax.random.key(0), jnp.ones((1, 1)))
    assert memory_by_role(step, state, jax.random.split(jax.random.key(1), 4)).arguments["batch"] == 32
