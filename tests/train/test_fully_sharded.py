"""In which dtype a loss uses each param: read in its jaxpr, in every form in which a model may hold it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec as P

import mpjax
from mpjax.core.tree import path_of
from mpjax.train.fully_sharded import dtypes_used, over_gathered_params

KEY = jax.random.key(0)


class Block(nn.Module):
    """One kernel, one norm."""

    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(8, name="dense")(nn.LayerNorm(name="norm")(x))


def scanned(block):
    class Scanned(nn.Module):
        """Two layers whose params are one stacked array each."""

        @nn.compact
        def __call__(self, x):
            over = nn.scan(lambda module, x, _: (module(x), None), variable_axes={"params": 0},
                           split_rngs={"params": True}, length=2)  # fmt: skip
            return over(block(name="block"), x, None)[0]

    return Scanned


class Net(nn.Module):
    """An embedding, a block in some form, a head."""

    form: type[nn.Module]

    @nn.compact
    def __call__(self, token_BxT):
        x_BxTxD = nn.Embed(10, 8, name="embed")(token_BxT)
        return nn.Dense(10, name="head")(self.form(name="body")(x_BxTxD))


def used(policy, form=Block, penalty=None):
    """From a param's last two names to the dtype in which a loss uses it."""
    model = mpjax.wrap(Net(form), policy)
    token_BxT = jnp.zeros((2, 4), jnp.int32)
    params, mstate = model.init(KEY, token_BxT)

    def loss_fn(params, mstate, batch, rng):
        loss = model.apply(params, mstate, batch, rng=rng)[0].astype(jnp.float32).mean()
        return loss + (0 if penalty is None else penalty(params))

    found = dtypes_used(loss_fn, params, mstate, token_BxT, KEY)
    keyed = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(path_of(keys).split("/")[-2:]): d.name for (keys, _), d in zip(keyed, found, strict=True)}


FORMS = {
    "plain": Block,
    "remat": nn.remat(Block),
    "scan": scanned(Block),
    "scan of remat": scanned(nn.remat(Block)),
    "jit": nn.jit(Block),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_a_kernel_is_used_in_the_compute_dtype_and_a_norm_and_a_table_are_not(form, half):
    """Nor is a bias, whose gradient is summed in float32 over the rows, and so over the devices."""
    found = used(f"mixed_{half}", FORMS[form])
    assert {found["dense/kernel"], found["head/kernel"]} == {half}
    wide = ("norm/scale", "norm/bias", "embed/embedding", "dense/bias", "head/bias")
    assert {found[path] for path in wide} == {"float32"}


def test_float8_kernels_are_cast_to_the_compute_dtype_first():
    assert used("mixed_fp8")["dense/kernel"] == "bfloat16"


def test_a_rule_speaks_for_its_subtree():
    found = used(mpjax.PolicyMap({"head": "compute=float32"}, default="mixed_bfloat16"))
    assert (found["head/kernel"], found["dense/kernel"]) == ("float32", "bfloat16")
    found = used(mpjax.PolicyMap({"head": "compute=float16"}, default="mixed_bfloat16"))
    assert (found["head/kernel"], found["dense/kernel"]) == ("float16", "bfloat16")


def test_params_that_are_half_already_keep_their_dtype():
    assert set(used("bfloat16").values()) <= {"bfloat16", "float32"} and used("bfloat16")["dense/kernel"] == "bfloat16"


def test_another_use_keeps_the_params_own_dtype():
    found = used("mixed_bfloat16", penalty=lambda params: jnp.square(params["head"]["kernel"]).sum())
    assert (found["head/kernel"], found["dense/kernel"]) == ("float32", "bfloat16")
    found = used(
        "mixed_bfloat16", penalty=lambda params: params["head"]["kernel"].astype("float16").sum().astype("float32")
    )
    assert found["head/kernel"] == "float32"  # two dtypes: neither holds the other's numbers


@jax.custom_vjp
def rounded(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


rounded.defvjp(lambda x: (rounded(x), x), lambda x, g: (g * x,))
"""Its jaxpr does nothing with x but cast it, and its gradient has all of x."""


def narrowed(w, _=None):
    return w.astype("bfloat16").astype("float32"), None


@pytest.mark.parametrize(
    ("loss_fn", "dtype"),
    [
        (lambda p: narrowed(p["w"])[0].sum(), "bfloat16"),
        (lambda p: rounded(p["w"]).sum(), "float32"),
        (lambda p: jax.lax.cond(p["w"].sum() > 0, lambda w: narrowed(w)[0], jnp.zeros_like, p["w"]).sum(), "float32"),
        (lambda p: jax.lax.scan(narrowed, p["w"], length=2)[0].sum(), "bfloat16"),
        (lambda p: jax.lax.scan(narrowed, p["w"], length=0)[0].sum(), "float32"),  # it comes out as it went in
        (lambda p: p["w"].astype("int8").sum(), "float32"),
        (lambda p: p["w"].astype("float8_e4m3fn").astype("float32").sum(), "float32"),  # not each backend can send it
        (lambda p: jnp.float32(0), "float32"),
        (lambda p: (narrowed(p["w"])[0].sum(), "a text", 1), "bfloat16"),
        (lambda p: (narrowed(p["w"])[0].sum(), p["w"]), "float32"),
    ],
)
def test_uses_beyond_a_models(loss_fn, dtype):
    assert dtypes_used(loss_fn, {"w": jnp.ones(4)}) == [np.dtype(dtype)]


def test_a_loss_whose_params_are_whole_along_the_batchs_axis_is_left_alone():
    mesh = jax.sharding.AbstractMesh((1, 1), ("data", "model"))

    def loss_fn(params):
        return params["w"].sum()

    for spec, same in ((P(), True), (P("model"), True), (P("data"), False), (P(None, ("model", "data")), False)):
        assert (over_gathered_params(loss_fn, [NamedSharding(mesh, spec)], "data") is loss_fn) is same
