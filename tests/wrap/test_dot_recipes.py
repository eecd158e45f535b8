"""Which products run in eight bits under a `dot=` recipe, read off the jaxpr: both doors, under every lift."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn, nnx

import mpjax
from mpjax.core.scopes import path_in
from mpjax.numerics.delayed import COLLECTION
from tests.wrap import zoo, zoo_nnx

F8, BF16, INT8, HALF = ("float8_e4m3fn",) * 2, ("bfloat16",) * 2, ("int8",) * 2, ("float16",) * 2
BACK = ("float8_e5m2", "float8_e4m3fn")  # the gradient of what came in
WEIGHTS = BACK[::-1]
X = jax.random.normal(jax.random.key(5), (4, 32))


def products(jaxpr, scope=""):
    """From path to how many products there are of each pair of operand dtypes; a scanned body counts once."""
    found = collections.defaultdict(collections.Counter)
    for eqn in jaxpr.eqns:
        here = f"{scope}/{eqn.source_info.name_stack}"
        if eqn.primitive.name == "dot_general":
            found[path_in(here)][tuple(v.aval.dtype.name for v in eqn.invars[:2])] += 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    for path, counts in products(inner, here).items():
                        found[path] += counts
    return found


def found_in(module, policy, sample=X):
    """The products of loss and gradient."""
    model = mpjax.wrap(module, policy)
    params, mstate = jax.eval_shape(model.init, jax.random.key(0), sample)

    def loss(params, mstate, x):
        return (model.apply(params, mstate, x)[0].astype(jnp.float32) ** 2).sum()

    return products(jax.make_jaxpr(jax.grad(loss))(params, mstate, sample).jaxpr)


def runs_in(counts, recipe="fp8", times=1, remat=False):
    """Whether a layer has one product forward (two where it is computed again) and two backward, all in eight bits."""
    again = 2 if remat else 1
    if recipe == "int8":
        return counts == {INT8: times * (2 + again)}
    return counts == {F8: times * again, BACK: times, WEIGHTS: times}


def lm(door, kind="loop", **more):
    if door == "linen":
        return zoo.LM(kind=kind, **more)
    return lambda rngs: zoo_nnx.LM(kind=kind, rngs=rngs, **more)


both_doors = pytest.mark.parametrize("door", ["linen", "nnx"])


@both_doors
@pytest.mark.parametrize(
    ("kind", "recipe"),
    [("loop", "fp8"), ("scan", "int8"), ("remat", "fp8"), ("scan+remat", "fp8_delayed")],
)
def test_dense_layers_multiply_in_eight_bits_and_nothing_else_does(door, kind, recipe):
    found = found_in(lm(door, kind), f"p=f32,c=bf16,o=f32,dot={recipe}", zoo.TOKENS)
    inner = "/block" if "scan" in kind and door == "linen" else ""
    blocks = [f"layers{inner}"] if "scan" in kind else [f"layers/{i}" for i in range(3)]
    dense = {
        f"{b}/{name}" for b in blocks for name in (*(f"attention/{n}" for n in ("query", "key", "value", "out")), "up")
    }
    assert dense <= set(found)
    for path in dense:
        assert runs_in(found[path], recipe, remat="remat" in kind), (path, found[path])
    # QK and PV, a layer that is no Flax layer, and the tied head: in bfloat16 as ever.
    assert set(found) - dense == {*(f"{b}/{n}" for b in blocks for n in ("attention", "down")), "embed"}
    assert all(set(found[path]) == {BF16} for path in set(found) - dense)


class Twins(nn.Module):
    """Two layers of one class that share a trace where nothing tells them apart."""

    layer: type
    second: str = "b"

    @nn.compact
    def __call__(self, x):
        return self.layer(name=self.second)(self.layer(name="a")(x))


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], name="dense")(x)


class TwinsNNX(nnx.Module):
    def __init__(self, second="b", *, rngs):
        self.a, self.second = WideJit(rngs), second
        setattr(self, second, WideJit(rngs))

    def __call__(self, x):
        return getattr(self, self.second)(self.a(x))


class WideJit(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(32, 32, rngs=rngs)

    @nnx.jit
    def __call__(self, x):
        return self.dense(x)


def twins(door, second):
    return Twins(nn.jit(Wide), second) if door == "linen" else lambda rngs: TwinsNNX(second, rngs=rngs)


@both_doors
@pytest.mark.parametrize("recipe", ["fp8", "fp8_delayed"])
def test_jitted_layers_of_one_class_share_no_trace_across_recipes(door, recipe):
    policy = f"p=f32,c=bf16,o=f32,dot={recipe}"
    head = found_in(twins(door, "head"), policy)
    assert runs_in(head["a/dense"], recipe) and set(head["head/dense"]) == {BF16}
    ruled = found_in(twins(door, "b"), mpjax.PolicyMap({"b": "dot=none"}, default=policy))
    assert runs_in(ruled["a/dense"], recipe) and set(ruled["b/dense"]) == {BF16}


@both_doors
def test_a_rule_by_path_turns_it_on_or_off_for_one_layer(door):
    off = found_in(twins(door, "b"), mpjax.PolicyMap({"a": "compute=bf16"}, default="mixed_fp8"))
    on = found_in(twins(door, "b"), mpjax.PolicyMap({"b": "dot=fp8"}, default="mixed_bfloat16"))
    for found in (off, on):
        assert set(found["a/dense"]) == {BF16} and runs_in(found["b/dense"])
    meant = found_in(twins(door, "head"), mpjax.PolicyMap({"head": "dot=fp8"}, default="mixed_bfloat16"))
    assert set(meant["a/dense"]) == {BF16} and runs_in(meant["head/dense"])


@both_doors
def test_a_head_and_a_layer_of_odd_sizes_stay_as_they_are(door):
    named = found_in(lm(door, tied=False), "mixed_fp8", zoo.TOKENS)
    assert set(named["head"]) == {BF16} and runs_in(named["layers/0/up"])
    odd = nn.Dense(10, name="odd") if door == "linen" else lambda rngs: nnx.Linear(32, 10, rngs=rngs)
    assert [set(counts) for counts in found_in(odd, "mixed_fp8").values()] == [{BF16}]


def own(lhs, rhs, numbers, precision=None, preferred_element_type=None, **_):
    return jax.lax.dot_general(lhs, rhs, numbers, precision, preferred_element_type)


@pytest.mark.parametrize(
    "module",
    [
        nn.Dense(32, dot_general=own),
        nn.Dense(32, dot_general_cls=lambda: own),
        nn.DenseGeneral(32, dot_general=own),
        lambda rngs: nnx.Linear(32, 32, dot_general=own, rngs=rngs),
        lambda rngs: nnx.LinearGeneral(32, 32, dot_general=own, rngs=rngs),
    ],
)
def test_a_users_own_product_is_left_alone(module):
    for recipe in ("fp8", "fp8_delayed"):
        found = found_in(module, f"p=f32,c=bf16,o=f32,dot={recipe}")
        assert [set(counts) for counts in found.values()] == [{BF16}]


@both_doors
def test_a_vmapped_stack_multiplies_in_eight_bits(door):
    module = zoo.Mapped() if door == "linen" else lambda rngs: zoo_nnx.Mapped(rngs=rngs)
    found = found_in(module, "p=f32,c=bf16,o=f32,dot=fp8_delayed", zoo.SEQUENCE)
    assert runs_in(found["mapped/up"]) and set(found["mapped/down"]) == {BF16}


@both_doors
@pytest.mark.parametrize(("cell", "recipe"), [("LSTMCell", "fp8_delayed"), ("GRUCell", "fp8")])
def test_the_gates_of_a_cell_multiply_in_float8(door, cell, recipe):
    """LSTMCell's and GRUCell's gates are dense layers of their own; an OptimizedLSTMCell's are not, in Linen."""
    policy = f"p=f32,c=bf16,o=f32,dot={recipe}"
    if door == "linen":
        module = zoo.Recurrent(getattr(nn, cell))
    else:
        module = lambda rngs: zoo_nnx.Recurrent(getattr(nnx, cell), rngs=rngs)  # noqa: E731
    assert set().union(*found_in(module, policy, zoo.SEQUENCE).values()) == {F8, BACK, WEIGHTS}


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="down")(nn.relu(nn.Dense(32, name="up")(x)))


class PerceptronNNX(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


SMALL = jax.random.normal(jax.random.key(2), (8, 16))


def loss_and_gradients(module, params=None):
    model = mpjax.wrap(module, "p=f32,c=f32,o=f32,dot=fp8")
    drawn, mstate = model.init(jax.random.key(0), SMALL)
    params = drawn if params is None else params
    loss = jax.value_and_grad(lambda p: (model.apply(p, mstate, SMALL)[0] ** 2).sum())
    return params, *jax.jit(loss)(params)


def test_loss_and_gradients_are_those_of_the_quantised_computation_in_float64():
    """Computed in float32, so that float8 is the only rounding: what is left is float32's own, in sums of 32 and 8 terms."""
    params, loss, grads = loss_and_gradients(Perceptron())
    w1, b1, w2, b2 = (np.float64(params[layer][name]) for layer in ("up", "down") for name in ("kernel", "bias"))

    def rounded(x, dtype, most):
        scale = 2.0 ** np.ceil(np.log2(np.abs(x).max() / most))
        return np.float64((x / scale).astype(np.float32).astype(dtype)) * scale

    def e4m3(x):
        return rounded(np.float64(x), ml_dtypes.float8_e4m3fn, 448)

    def e5m2(x):
        return rounded(np.float64(x), ml_dtypes.float8_e5m2, 57344)

    x, q1, q2 = e4m3(np.float64(SMALL)), e4m3(w1), e4m3(w2)
    h = np.maximum(x @ q1 + b1, 0)
    y = e4m3(h) @ q2 + b2
    g = 2 * y
    gh = (e5m2(g) @ q2.T) * (h > 0)
    expected = {
        "down": {"kernel": e4m3(h).T @ e5m2(g), "bias": g.sum(0)},
        "up": {"kernel": x.T @ e5m2(gh), "bias": gh.sum(0)},
    }
    np.testing.assert_allclose(loss, (y**2).sum(), rtol=1e-5)
    for layer, leaves in expected.items():
        for name, wanted in leaves.items():
            np.testing.assert_allclose(grads[layer][name], wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


@pytest.mark.optimized
def test_both_doors_give_the_same_bytes():
    params, *linen = loss_and_gradients(Perceptron())
    _, *there = loss_and_gradients(PerceptronNNX, params)
    for a, b in zip(jax.tree.leaves(linen), jax.tree.leaves(there), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_history_stands_at_the_path_of_each_dense_layer_in_both_doors():
    linen = mpjax.wrap(Perceptron(), "p=f32,c=bf16,o=f32,dot=fp8_delayed").init(jax.random.key(0), SMALL)[1]
    there = mpjax.wrap(PerceptronNNX, "p=f32,c=bf16,o=f32,dot=fp8_delayed").init(jax.random.key(0), SMALL)[1]
    assert jax.tree.structure(linen) == jax.tree.structure(there) and set(linen[COLLECTION]) == {"up", "down"}


def test_explain_tells_of_a_users_own_layer_that_no_recipe_reaches_it():
    """A class named Linear that is not Flax's multiplies by itself."""
    table = mpjax.wrap(zoo.LM(), "mixed_fp8").explain(zoo.TOKENS)
    lines = {line.split()[0]: line for line in table.splitlines() if line.strip()}
    assert "dot=fp8" in lines["layers/0/up"] and "dot=" not in lines["layers/0/down"]


@both_doors
def test_explain_says_it_of_the_layers_that_multiply_so_and_why_of_the_others(door):
    """Against the products in the jaxpr: a layer of odd sizes, one inside a vmapped stack, one with its own product."""
    if door == "linen":
        odd, general = nn.Dense(10), nn.DenseGeneral((2, 8), axis=(-2, -1))
        stacked, general_odd = zoo.Mapped(), nn.DenseGeneral((2, 5), axis=(-2, -1))
        batched, owned = nn.DenseGeneral(16, batch_dims=(0,)), nn.Dense(32, dot_general=own)
    else:

        def of(cls, *args, **more):
            return lambda rngs: cls(*args, rngs=rngs, **more)

        odd, general = of(nnx.Linear, 32, 10), of(nnx.LinearGeneral, (4, 32), (2, 8), axis=(-2, -1))
        stacked, general_odd = of(zoo_nnx.Mapped), of(nnx.LinearGeneral, (4, 32), (2, 5), axis=(-2, -1))
        batched, owned = of(nnx.LinearGeneral, 32, 16, batch_axis={0: 4}), of(nnx.Linear, 32, 32, dot_general=own)
    notes = []
    for module, sample in (
        (odd, X), (general, X[None]), (general_odd, X[None]), (batched, jnp.stack([X] * 4)), (owned, X), (stacked, zoo.SEQUENCE),
    ):  # fmt: skip
        products_at = found_in(module, "mixed_fp8", sample)
        table = mpjax.wrap(module, "mixed_fp8").table(sample)
        told = {row.path: row.note for row in table.rows if "dot=" in row.note}
        assert told and {p for p, note in told.items() if note == "dot=fp8"} == {
            path for path, counts in products_at.items() if F8 in counts
        }
        notes += told.values()
    assert notes[:5] == [
        "dot=none: 32×10 is no multiple of 16", "dot=fp8", "dot=none: 128×10 is no multiple of 16",
        "dot=none: it has batch axes", "dot=none: it has a product of its own",
    ]  # fmt: skip
    assert set(notes[5:]) == {"dot=fp8"}  # the axis along which layers are stacked is none of their sizes
