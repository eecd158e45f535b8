"""Functions with gradients of their own in a `jax.shard_map` as it comes, which checks over which axes each array varies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from mpjax.numerics.delayed import COLLECTION, DelayedDot, histories, scaled_by
from mpjax.numerics.dot import QuantizedDot
from mpjax.numerics.linear_cross_entropy import linear_softmax_cross_entropy
from mpjax.numerics.varying import varying_alike

ROWS, WEIGHTS = (jnp.asarray(np.random.default_rng(n).choice([-1.0, 1.0], (32, 16)), jnp.float32) for n in (0, 1))


def by_product(dot):
    return lambda w, x: dot(x, w, (((1,), (1,)), ((), ()))).sum()


def by_loss(w, x):
    labels = jnp.argmax(x, axis=1)  # varies, too
    return linear_softmax_cross_entropy(x, w, labels, bias=w[:, 0], transposed=True, chunk=3)[0]


CASES = {
    "fp8": by_product(QuantizedDot("fp8")),
    "int8": by_product(QuantizedDot("int8")),
    "fp8_delayed": by_product(DelayedDot("")),
    "loss": by_loss,
}


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_a_replicated_weight_is_summed_over_devices(name):
    """All magnitudes are one, so that no scale differs and nothing is rounded to eight bits."""
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])

    def each(w, x):
        return jax.lax.psum(CASES[name](w, x), "data")

    over = jax.shard_map(each, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    with scaled_by({COLLECTION: histories([""])} if name == "fp8_delayed" else {}):
        found, alone = (jax.jit(jax.grad(f))(WEIGHTS, ROWS) for f in (over, CASES[name]))
    np.testing.assert_allclose(found, alone, rtol=2**-16, atol=2**-16 if name == "loss" else 0)


def test_outside_of_a_shard_map_the_very_same_arrays_come_back():
    x = jnp.ones(2)
    assert varying_alike(x, None)[0] is x
