"""Scaled gradients: the true ones where unscaled ones vanish, with the signature of `jax.value_and_grad`."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.core.tree import all_finite
from mpjax.numerics.loss_scale import NoOpLossScale, dynamic_loss_scale, static_loss_scale
from mpjax.numerics.scaled_grad import scaled_value_and_grad, value_and_scaled_grad


def half_precision_loss(params, x, c):
    """Σ c·(x @ w) with the product in float16: its cotangent is c, rounded to float16."""
    return jnp.sum((x @ params["w"].astype(jnp.float16)).astype(jnp.float32) * c)


@pytest.mark.parametrize("master", ["float16", "float32"])
def test_fault_1_a_scaled_gradient_equals_float64_where_the_unscaled_one_is_zero(master):
    rng = np.random.default_rng(0)
    rows = 32
    x = rng.normal(size=(rows, 8)).astype(np.float16)
    c = rng.uniform(1e-9, 1e-8, size=rows).astype(np.float32)  # under 2⁻²⁵ = 3e-8, which float16 rounds to zero
    params = {"w": jnp.ones(8, master)}
    exact = x.astype(np.float64).T @ c.astype(np.float64)
    plain = jax.grad(half_precision_loss)(params, x, c)["w"]
    assert (np.asarray(plain) == 0).all() and (np.abs(exact) > 0).all()
    value, grads = scaled_value_and_grad(half_precision_loss, dynamic_loss_scale(2.0**24))(params, x, c)
    # A rounding (half an ulp, 2⁻¹¹) of each c, of each partial sum in the worst case, and of the result.
    bound = (rows + 2) * 2.0**-11 * (np.abs(x).astype(np.float64).T @ c)
    assert grads["w"].dtype == jnp.float32
    assert (np.abs(np.asarray(grads["w"], np.float64) - exact) <= bound).all()
    assert float(value) == float(half_precision_loss(params, x, c))


def test_gradients_under_half_precision_survive_unscaling():
    """The scaled gradient is 2⁻¹⁵; were it divided in its own dtype, 2⁻³⁰ would be zero in float16."""
    loss = lambda w: w * jnp.float16(2.0**-14) * jnp.float16(2.0**-16)  # noqa: E731
    _, grad = scaled_value_and_grad(loss, static_loss_scale(2.0**15))(jnp.float16(1))
    assert grad.dtype == jnp.float32 and float(grad) == 2.0**-30


def test_a_scale_of_another_dtype_does_not_change_the_value():
    loss = lambda w: jnp.sum(w.astype(jnp.float16) ** 2)  # noqa: E731
    w = jnp.array([64.0, 128.0])  # 20480 in float16, exactly; its product with the scale is over 65504
    value, grads = scaled_value_and_grad(loss, dynamic_loss_scale(2.0**7))(w)
    assert (value.dtype, float(value)) == (jnp.float32, 20480.0)
    assert grads.tolist() == [128, 256]


@pytest.mark.parametrize(
    "scale", [NoOpLossScale(), static_loss_scale(4), dynamic_loss_scale(4)], ids=["no", "static", "dynamic"]
)
class TestSignature:
    """As `jax.value_and_grad`: what is returned, in which order, for which arguments."""

    def test_has_aux(self, scale):
        aux = {"logits": jnp.arange(3, dtype=jnp.bfloat16), "n": 3, "name": "x"}
        (value, out), grad = scaled_value_and_grad(lambda w: (w**2, aux), scale, has_aux=True)(jnp.float32(3))
        assert (float(value), float(grad)) == (9, 6)
        assert out["logits"].dtype == jnp.bfloat16 and out["n"] == 3 and out["name"] == "x"

    def test_argnums(self, scale):
        fn = lambda a, b, *, c: a * b["w"] * c  # noqa: E731
        args = (jnp.float32(2), {"w": jnp.float32(5)})
        value, grads = scaled_value_and_grad(fn, scale, argnums=(0, 1))(*args, c=3.0)
        assert float(value) == 30 and jax.tree.map(float, grads) == (15.0, {"w": 6.0})
        _, grads = scaled_value_and_grad(fn, scale, argnums=1)(*args, c=3.0)
        assert jax.tree.map(float, grads) == {"w": 6.0}

    def test_float64(self, scale):
        with jax.enable_x64(True):
            value, grad = scaled_value_and_grad(lambda w: jnp.sin(w), scale)(jnp.float64(0.3))
            assert value.dtype == grad.dtype == jnp.float64
            assert (
                abs(float(value) - np.sin(0.3)) <= 2**-52 and abs(float(grad) - np.cos(0.3)) <= 2**-52
            )  # one ulp of 1

    def test_a_loss_that_is_no_scalar(self, scale):
        with pytest.raises(TypeError, match="scalar-output"):
            scaled_value_and_grad(lambda w: w, scale)(jnp.ones(2))

    def test_an_overflow_is_seen(self, scale):
        _, grad = scaled_value_and_grad(lambda w: jnp.exp(w), scale)(jnp.float32(100))
        assert not bool(all_finite(grad))


def test_no_scale_adds_no_operation():
    fn = lambda params, x: jnp.mean(jnp.tanh(x @ params["w"]) ** 2)  # noqa: E731
    args = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    ours = jax.make_jaxpr(scaled_value_and_grad(fn, NoOpLossScale()))(*args)
    assert str(ours) == str(jax.make_jaxpr(jax.value_and_grad(fn))(*args))
    scaled = jax.make_jaxpr(scaled_value_and_grad(fn, static_loss_scale(8)))(*args)
    assert len(scaled.eqns) > len(ours.eqns)


def test_the_scale_may_be_traced_and_its_value_does_not_recompile():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(scale, w):
        return scaled_value_and_grad(lambda w: w**2, scale)(w)

    found = [step(dynamic_loss_scale(s), jnp.float32(3)) for s in (2.0, 2.0**10, 2.0**15)]
    assert [(float(v), float(g)) for v, g in found] == [(9, 6)] * 3
    chex.clear_trace_counter()


@pytest.mark.parametrize("master", ["float16", "float32"])
def test_gradients_that_will_be_summed_come_back_scaled_in_float32(master):
    w, scale = jnp.asarray(3.0, master), dynamic_loss_scale(2.0**10)
    (value, aux), grad = value_and_scaled_grad(lambda w: (w * w, "aux"), scale, has_aux=True)(w)
    assert (float(value), aux, value.dtype) == (9, "aux", jnp.float32)
    assert (grad.dtype, float(grad)) == (jnp.float32, 6 * 2.0**10)
    assert float(scale.unscale(grad)) == 6
