"""Step time, FLOP/s and the share of the device's rates, by hand on a clock that the test winds."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.core.model import Model
from mpjax.measure.audit import Audit, Op
from mpjax.measure.throughput import achieved, formats_of, share_of_rates, time_step
from mpjax.measure.timing import Timing
from mpjax.train.state import TrainState
from mpjax.train.step import make_train_step
from tests.train.toys import fingerprint


def test_a_step_is_timed_in_blocks_and_the_state_stays_alive():
    batches = []

    def loss_fn(params, mstate, batch, rng):
        jax.debug.callback(lambda x: batches.append(float(x)), params["w"].sum())
        return (batch @ params["w"]).mean()

    model = Model(lambda rng, x: ({"w": jnp.zeros(2)}, {}), lambda p, m, x, rng=None: (x @ p["w"], m))
    step = make_train_step(loss_fn, optax.sgd(1.0))
    state = TrainState.create(model, step.optimizer, jax.random.key(0), jnp.ones((1, 2)))
    before = fingerprint(state)
    ticks = itertools.count(step=3.0)
    found = time_step(
        step, state, np.ones((4, 2), np.float32), warmup=1, blocks=2, steps_per_block=4, clock=lambda: next(ticks)
    )
    assert found == Timing((0.75, 0.75))
    jax.effects_barrier()
    # Each step went on from what the one before it returned: w falls by 1 in both places.
    assert sorted(batches, reverse=True) == [-2.0 * i for i in range(1 + 2 * 4)]
    assert fingerprint(state) == before


def products(**flops):
    """An audit with so many FLOPs of each dtype; `a_x_b` is a product of two."""
    names = {name.replace("_x_", "×"): n for name, n in flops.items()}
    return Audit(
        tuple(Op("dot", "dot_general", tuple(name.split("×")), "float32", "", n, 1) for name, n in names.items())
    )


def test_achieved_by_hand():
    found = products(bfloat16=3 * 10**12, float32=10**12)
    assert achieved(Timing((0.5, 2.0, 8.0)), found) == 2.0  # 4 TFLOP in the median of 2 s


@pytest.mark.parametrize(
    ("found", "rates", "share"),
    [
        (products(bfloat16=10**12), {"bfloat16": 2.0}, 0.25),  # 0.5 s of 2
        (products(bfloat16=10**12, float32=10**12), {"bfloat16": 2.0, "float32": 1.0}, 0.75),
        # jax's default precision on a GPU multiplies float32 as tf32
        (products(float32=10**12), {"float32": 1.0, "tf32": 4.0}, 0.125),
        # a mixed product runs in the slower of both
        (products(bfloat16_x_float32=10**12), {"bfloat16": 2.0, "float32": 1.0}, 0.5),
        # unless it has a rate of its own
        (products(float8_e4m3fn_x_float8_e5m2=10**12), {"float8_e4m3fn×float8_e5m2": 4.0}, 0.125),
        (products(float16=10**12, bfloat16=1), {"bfloat16": 2.0}, None),
        (products(float8_e5m2_x_float16=1), {"float16": 2.0}, None),
    ],
)
def test_share_by_hand(found, rates, share):
    assert share_of_rates(Timing((2.0,)), found, rates) == share


def test_the_formats_that_a_share_needs():
    assert formats_of(products(bfloat16_x_float32=1)) == ("float32", "tf32", "bfloat16")
    assert formats_of(products(float8_e4m3fn_x_float8_e5m2=1)) == ("float8_e4m3fn×float8_e5m2",)
    assert formats_of(products(int8=1)) == ("int8",)
