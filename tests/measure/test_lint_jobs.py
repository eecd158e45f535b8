"""The build lint on jobs: both doors, the policy by path, what a step differentiates, and what a loss keeps."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import mpjax

X = jnp.ones((8, 16))


def careless(h):
    """A mixed product, a float32 one with what it saves, and a softmax in the compute dtype."""
    weights = jax.nn.softmax(h)
    wide = jnp.exp(h.astype(jnp.float32) @ jnp.ones((16, 16), jnp.float32)).astype(h.dtype)
    return weights + wide + jnp.asarray(h @ jnp.ones((16, 16), jnp.float32), h.dtype)


class LinenInner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return careless(nn.Dense(16, name="up")(x))


class LinenNet(nn.Module):
    inner: bool = True

    @nn.compact
    def __call__(self, x):
        x = LinenInner(name="inner")(x) if self.inner else nn.relu(nn.Dense(16, name="up")(x))
        return nn.Dense(16, name="head")(nn.LayerNorm(name="norm")(x))


class NNXInner(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        return careless(self.up(x))


class NNXNet(nnx.Module):
    def __init__(self, rngs, inner=True):
        self.inner = NNXInner(rngs) if inner else nnx.Linear(16, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.inner(x)))


NETS = {
    "linen": (LinenNet(), LinenNet(inner=False)),
    "nnx": (NNXNet, lambda rngs: NNXNet(rngs, inner=False)),
}


def mean_square(model):
    def loss_fn(params, mstate, batch, rng):
        out, mstate = model.apply(params, mstate, batch, rng=rng)
        return mpjax.losses.mean_squared_error(out, batch).mean(), mpjax.Aux(mstate, {})

    return loss_fn


def job(module, policy, loss=mean_square, batch=X, optimizer=None):
    model = module if isinstance(module, mpjax.Model) else mpjax.wrap(module, policy)
    return mpjax.Job(model, loss(model), optimizer or optax.sgd(0.1), lambda attempt: batch, sample=(batch[:1],))


@pytest.mark.parametrize("door", NETS)
def test_findings_stand_at_the_path_of_the_module_under_its_policy(door):
    bad, good = NETS[door]
    found = mpjax.lint(job(bad, "mixed_bfloat16"))
    wanted = {"mixed product", "wide product", "half softmax", "wide residual"}
    assert {f.rule for f in found if f.path == "inner"} == wanted and {f.path for f in found} == {"inner"}
    assert mpjax.lint(job(good, "mixed_bfloat16")) == mpjax.lint(job(good, "float32")) == ()
    # Under a rule that says float32 there, its products and activations are meant.
    assert mpjax.lint(job(bad, {"inner": "compute=float32"})) == ()


@pytest.mark.parametrize("door", NETS)
def test_a_mixed_policy_by_path_is_clean(door):
    rules = {"head": "compute=float32,output=float32", "inner" if door == "nnx" else "up": "compute=float16"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mpjax.lint(job(NETS[door][1], rules)) == ()


def test_accumulation_and_its_parts_find_the_same():
    bad = job(NETS["linen"][0], "mixed_bfloat16")
    alone, four = (mpjax.lint(bad, accumulate=n) for n in (1, 4))
    assert [(f.path, f.rule) for f in alone] == [(f.path, f.rule) for f in four]
    (whole,), (part,) = ([f for f in found if f.rule == "wide residual"] for found in (alone, four))
    # By hand: of 8 rows, exp keeps 16 float32 numbers each; of a micro-batch 2 rows.
    assert whole.what.startswith(f"{8 * 16 * 4} bytes of float32 (from exp)")
    assert part.what.startswith(f"{2 * 16 * 4} bytes of float32 (from exp)")


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.SpectralNorm(nn.Dense(16, name="up"), name="spectral")(x, update_stats=train)


def test_the_power_iteration_of_a_norm_of_weights_is_an_island():
    def loss(model):
        return lambda p, m, x, rng: (
            (out := model.apply(p, m, x, train=True))[0].astype(jnp.float32).sum(), mpjax.Aux(out[1], {})
        )  # fmt: skip

    normalised = job(Normalised(), "mixed_bfloat16", loss)
    assert mpjax.lint(normalised) == ()
    found = mpjax.audit(normalised.step().pure, jax.eval_shape(normalised.state, jax.random.key(0)), X)
    assert found.dtypes("dot")["float32"] > 0  # it is there, and meant


def test_the_loss_may_keep_one_float32_copy_of_the_output():
    def greedy(model):
        def loss_fn(params, mstate, batch, rng):
            out, _ = model.apply(params, mstate, batch)
            return (jnp.exp(out) * jnp.tanh(out)).sum()  # keeps both factors

        return loss_fn

    (found,) = mpjax.lint(job(NETS["linen"][1], "mixed_bfloat16", greedy))
    assert (found.path, found.rule) == ("outside of any module", "wide residual")
    one = 8 * 16 * 4  # exp(out), tanh(out) and what the derivative of tanh keeps
    assert f"{one:,} bytes)" in found.what and int(found.what.split()[3].replace(",", "")) >= 2 * one
    assert mpjax.lint(job(NETS["linen"][1], "float32", greedy)) == ()  # there is no half to be had
    frugal = lambda model: lambda p, m, x, rng: jnp.exp(model.apply(p, m, x)[0]).sum()  # noqa: E731
    assert mpjax.lint(job(NETS["linen"][1], "mixed_bfloat16", frugal)) == ()


def bare(policy):
    def init(rng, x):
        return {"w": jnp.ones((16, 16)), "b": jnp.ones(16)}, {}

    def apply(params, mstate, x, rng=None):
        params, x = mpjax.Policy.of("mixed_bfloat16").cast_to_compute((params, x))
        return x @ params["w"] + params["b"].astype(jnp.float32)[None], mstate

    return mpjax.Model(init, apply, policy=policy)


def test_a_model_of_bare_functions():
    """Its params are followed, and where it names no policy no dtype is meant."""
    for policy, wanted in ((None, ["param cast twice"]), (mpjax.PolicyMap.of("mixed_bfloat16"), ["param cast twice"])):
        found = mpjax.lint(job(bare(policy), None))
        assert [f.rule for f in found] == wanted and "param b is cast float32→bfloat16→float32" in found[0].what


def test_frozen_params_and_the_optimizer_are_read_too():
    """The optimizer's float64 is a leak unless a policy names float64."""

    def doubled():
        update = lambda grads, state, params=None: (  # noqa: E731
            jax.tree.map(lambda g: (g.astype(jnp.float64) * np.float64(-0.1)).astype(g.dtype), grads),
            state,
        )
        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    good = NETS["linen"][1]
    with jax.enable_x64(True):
        batch = X.astype(jnp.float32)
        (found,) = mpjax.lint(job(good, "mixed_bfloat16", batch=batch, optimizer=doubled()))
        assert (found.path, found.rule) == ("outside of any module", "float64")
        assert mpjax.lint(job(good, "mixed_bfloat16", batch=batch)) == ()
        assert "float64" not in {f.rule for f in mpjax.lint(job(good, "p=f32,c=f64,o=f32", batch=batch))}
