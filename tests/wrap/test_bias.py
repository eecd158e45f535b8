"""Biases through both doors: their gradients are summed over the rows in float32, and nothing else changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import mpjax
from mpjax.measure.audit import audit
from mpjax.numerics.bias import has_added

ROWS = 4097
"""So many times 77/256 is no number of either half format, and is one of float32."""

STEP = 77 / 256


class LinenOwnCall(nn.Dense):
    def __call__(self, x):
        return super().__call__(x) * 2


class NNXOwnCall(nnx.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


class LinenNamed(nn.Dense):
    def encode(self, x):
        return self(x)


class NNXNamed(nnx.Linear):
    def encode(self, x):
        return self(x)


LAYERS = {
    "dense": (nn.Dense(2), lambda rngs: nnx.Linear(3, 2, rngs=rngs), (ROWS, 3)),
    "dense, general": (nn.DenseGeneral((2, 2)), lambda rngs: nnx.LinearGeneral(3, (2, 2), rngs=rngs), (1, ROWS, 3)),
    "convolution": (nn.Conv(2, (3,)), lambda rngs: nnx.Conv(3, 2, (3,), rngs=rngs), (17, 241, 3)),
    "transposed": (nn.ConvTranspose(2, (3,)), lambda rngs: nnx.ConvTranspose(3, 2, (3,), rngs=rngs), (17, 241, 3)),
}
DOORS = {"linen": 0, "nnx": 1}


def gradients(model, x, **call):
    """Of params, where every row hands down 77/256."""
    params, mstate = model.init(jax.random.key(0), x)

    def loss(params):
        out = model.apply(params, mstate, x, **call)[0]
        return jnp.vdot(out.astype(jnp.float32), jnp.full(out.shape, STEP))

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_it_is_the_exact_sum(layer, door, policy):
    *doors, shape = LAYERS[layer]
    found = gradients(mpjax.wrap(doors[DOORS[door]], policy), jnp.ones(shape))["bias"]
    assert found.dtype == jnp.float32
    assert np.array_equal(found, np.full(found.shape, ROWS * STEP))


@pytest.mark.parametrize("door", DOORS)
def test_no_sum_of_the_backward_pass_is_half(door):
    *doors, shape = LAYERS["convolution"]
    model = mpjax.wrap(doors[DOORS[door]], "c=bf16,o=bf16")
    x = jnp.ones(shape)
    params, mstate = model.init(jax.random.key(0), x)
    program = audit(jax.grad(lambda params: model.apply(params, mstate, x)[0].astype("float32").sum()), params)
    assert set(program.dtypes("reduce")) == {"float32"}


@pytest.mark.parametrize("door", DOORS)
def test_the_rest_is_as_it_is_by_hand(door):
    """The output and the other gradients, to the last bit."""
    model = mpjax.wrap(LAYERS["dense"][DOORS[door]], "c=bf16,o=bf16")
    x = jax.random.normal(jax.random.key(1), (5, 3))
    params, mstate = model.init(jax.random.key(0), x)
    params["bias"] = jnp.arange(2.0)

    def by_hand(params, x):
        x, kernel, bias = (a.astype(jnp.bfloat16) for a in (x, params["kernel"], params["bias"]))
        return x @ kernel + bias.reshape(1, 2)

    def found(function, by_out):
        out, back = jax.vjp(function, params, x)
        by_params, by_x = back(by_out)
        return out, by_params["kernel"], by_x

    by_out = jax.random.normal(jax.random.key(2), (5, 2), jnp.bfloat16)
    ours = found(jax.jit(lambda params, x: model.apply(params, mstate, x)[0]), by_out)
    theirs = found(jax.jit(by_hand), by_out)
    assert all(map(np.array_equal, ours, theirs))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("kind", "layer", "call", "factor"),
    [
        ("a call of its own", (LinenOwnCall(2), lambda rngs: NNXOwnCall(3, 2, rngs=rngs)), {}, 2),
        ("a method that calls it", (LinenNamed(2), lambda rngs: NNXNamed(3, 2, rngs=rngs)), {"method": "encode"}, 1),
        ("no bias", (nn.Dense(2, use_bias=False), lambda rngs: nnx.Linear(3, 2, use_bias=False, rngs=rngs)), {}, 0),
        ("a promotion of its own", "promote_dtype", {}, 1),
    ],
)
def test_other_layers_have_a_gradient_too(kind, layer, call, factor, door):
    """Four rows, of which every sum is exact in half."""
    if layer == "promote_dtype":
        linen, nnxs = nn.Dense(2).promote_dtype, nnx.Linear(1, 1, rngs=nnx.Rngs(0)).promote_dtype
        layer = (
            nn.Dense(2, promote_dtype=lambda *arrays, **named: linen(*arrays, **named)),
            lambda rngs: nnx.Linear(3, 2, promote_dtype=lambda arrays, **named: nnxs(arrays, **named), rngs=rngs),
        )
    found = gradients(mpjax.wrap(layer[DOORS[door]], "mixed_bfloat16"), jnp.ones((4, 3)), **call)
    assert np.array_equal(found.get("bias", np.zeros(2)), np.full(2, 4 * STEP * factor)), kind


@pytest.mark.parametrize("door", DOORS)
def test_params_in_half_and_float32_models_keep_their_dtypes(door):
    layer = LAYERS["dense"][DOORS[door]]
    assert gradients(mpjax.wrap(layer, "p=bf16,c=bf16,o=bf16"), jnp.ones((4, 3)))["bias"].dtype == jnp.bfloat16
    x = jnp.ones((4, 3))
    model = mpjax.wrap(layer, "float32")
    params, mstate = model.init(jax.random.key(0), x)
    assert "custom_jvp" not in str(jax.make_jaxpr(lambda p: model.apply(p, mstate, x))(params))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(3, name="dense")(x), None


def test_in_a_scanned_rematerialised_stack():
    """Each layer is the identity, so that each bias has the gradient of the output."""
    scanned = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return scanned(name="layers")(x)[0]

    model = mpjax.wrap(Stack(), "mixed_bfloat16")
    x = jnp.ones((ROWS, 3))
    params, mstate = model.init(jax.random.key(0), x)
    params["layers"]["dense"]["kernel"] = jnp.broadcast_to(jnp.eye(3), (2, 3, 3))

    def loss(params):
        return STEP * model.apply(params, mstate, x)[0].sum()

    found = jax.jit(jax.grad(loss))(params)["layers"]["dense"]["bias"]
    assert np.array_equal(found, np.full((2, 3), ROWS * STEP))


def test_forward_mode_has_it_too():
    out, bias = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), jnp.arange(3.0)
    value, tangent = jax.jvp(has_added, (out, bias), (out, bias))
    assert np.array_equal(value, out) and np.array_equal(tangent, out + jnp.broadcast_to(bias, out.shape))
    curvature = jax.hessian(lambda b: (has_added(out, b).astype(jnp.float32) ** 2).sum())(bias)
    assert np.array_equal(curvature, 2 * len(out) * np.eye(3))
