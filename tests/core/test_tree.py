"""Verbs over pytrees: what is cast and what passes by identity, what is finite, and selection without a leak."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.core.dtypes import NAMES
from mpjax.core.tree import (
    all_finite,
    canonical_path,
    cast_by_path,
    cast_floating,
    cast_like,
    nbytes,
    path_of,
    select_tree,
)

FLOAT0 = np.zeros(2, jax.dtypes.float0)


def others() -> dict:
    """One leaf of each kind that no cast touches."""
    return {
        "int": jnp.arange(3),
        "uint8": np.arange(3, dtype=np.uint8),
        "bool": np.array([True]),
        "key": jax.random.key(0),
        "raw key": jax.random.PRNGKey(0),
        "complex": jnp.ones(2, jnp.complex64),
        "str": "x",
        "float": 1.5,
        "python int": 3,
        "float0": FLOAT0,
        "object": object(),
        "int shape": jax.ShapeDtypeStruct((2,), jnp.int32),
    }


# Casting.


@pytest.mark.parametrize("dtype", [d for d in NAMES if d.name != "float64"], ids=str)
def test_every_kind_of_float_array_is_cast(dtype):
    tree = {
        "jax": jnp.ones(2),
        "numpy": [np.ones(2, np.float16)],
        "scalar": np.float32(1),
        "half": (jnp.ones((), "bfloat16"),),
    }
    out = cast_floating(tree, dtype)
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    assert {x.dtype for x in jax.tree.leaves(out)} == {dtype}
    assert {float(np.asarray(x, np.float32).flat[0]) for x in jax.tree.leaves(out)} == {1.0}


def test_fault_16_every_other_leaf_passes_by_identity():
    tree = {**others(), "none": None}
    for out in (
        cast_floating(tree, "bf16"),
        cast_by_path(tree, lambda path: "bf16"),
        cast_like(tree, {name: x if name == "none" else np.zeros(2, "bfloat16") for name, x in tree.items()}),
    ):
        assert all(out[name] is leaf for name, leaf in tree.items())


def test_a_leaf_that_has_the_dtype_is_the_very_same_object():
    tree = {
        "w": jnp.ones(2, jnp.bfloat16),
        "s": jax.ShapeDtypeStruct((2,), jnp.bfloat16),
        "n": np.ones(2, jnp.bfloat16),
    }
    assert all(cast_floating(tree, "bf16")[name] is leaf for name, leaf in tree.items())
    assert str(jax.make_jaxpr(lambda x: cast_floating(x, "bf16"))(jnp.ones(2, jnp.bfloat16))).count("convert") == 0


def test_fault_16_a_shape_is_cast_like_its_array():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for given in (
        jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=sharding),
        jax.ShapeDtypeStruct((), "float32", weak_type=True),
    ):
        out = cast_floating(given, "bf16")
        assert (out.shape, out.dtype, out.sharding) == (given.shape, jnp.bfloat16, given.sharding)
    assert cast_floating(jax.eval_shape(lambda: 1.0), "bf16") == jax.eval_shape(
        lambda: cast_floating(jnp.asarray(1.0), "bf16")
    )


def test_a_tracer_is_cast_inside_and_its_gradient_comes_back_as_it_was():
    grad = jax.jit(jax.grad(lambda w: cast_floating({"w": w}, "bf16")["w"].sum().astype(jnp.float32)))(jnp.ones(2))
    assert grad.dtype == jnp.float32


def test_casting_by_path_names_leaves_canonically():
    seen = []

    def dtype_of(path):
        seen.append(path)
        return {"layers/0/kernel": "bf16", "layers/1/kernel": "f16"}.get(path)

    tree = {"layers_0": {"kernel": jnp.ones(2)}, "layers": [0, {"kernel": np.ones(2, np.float32)}], "head": jnp.ones(2)}
    out = cast_by_path(tree, dtype_of)
    assert seen == ["head", "layers/0", "layers/1/kernel", "layers/0/kernel"]
    assert (out["layers_0"]["kernel"].dtype, out["layers"][1]["kernel"].dtype) == (jnp.bfloat16, jnp.float16)
    assert out["head"] is tree["head"] and out["layers"][0] == 0


def test_casting_like_a_twin():
    tree = {"w": jnp.ones(2), "b": jnp.ones(2, "bfloat16"), "n": jnp.arange(2), "free": jnp.ones(2)}
    like = {"w": np.ones(9, np.float16), "b": jax.ShapeDtypeStruct((2,), "float32"), "n": jnp.ones(2), "free": 1.0}
    out = cast_like(tree, like)
    assert [out[name].dtype for name in ("w", "b")] == [jnp.float16, jnp.float32]
    assert out["n"] is tree["n"] and out["free"] is tree["free"]


def test_a_dtype_that_is_no_float_is_refused():
    for bad in ("int8", jnp.int32, "f17"):
        with pytest.raises(ValueError, match="use one of half, full"):
            cast_floating(jnp.ones(2), bad)
        with pytest.raises(ValueError, match="use one of half, full"):
            cast_by_path({"w": jnp.ones(2)}, lambda path, bad=bad: bad)


# Finiteness.

HAVE_NAN = [d for d in NAMES if d.name not in ("float64",)]


@pytest.mark.parametrize("dtype", HAVE_NAN, ids=str)
def test_one_nan_is_seen_in_every_format(dtype):
    x = np.ones((3, 4), dtype)
    assert bool(all_finite({"a": jnp.ones(2), "b": jnp.asarray(x)}))
    x[1, 2] = np.nan
    assert not bool(all_finite({"a": jnp.ones(2), "b": jnp.asarray(x)}))
    assert not bool(jax.jit(all_finite)(x))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "complex64", "complex64 imaginary", "python"])
def test_each_kind_of_bad_number_is_seen(bad, kind):
    if kind == "python":
        leaf = bad
    elif kind.startswith("complex64"):
        leaf = jnp.array([1, complex(0, bad) if "imaginary" in kind else complex(bad, 0)], jnp.complex64)
    else:
        leaf = jnp.array([1, bad], kind)
    assert not bool(all_finite([jnp.ones(2), leaf])) and bool(all_finite([jnp.ones(2)]))


def test_fault_16_other_leaves_are_finite():
    tree = {**others(), "none": None}
    del tree["int shape"]
    assert bool(all_finite(tree)) and bool(all_finite({})) and bool(all_finite(None)) and bool(all_finite("x"))
    found = all_finite({})
    assert found.dtype == jnp.bool_ and found.shape == ()


def test_the_largest_number_of_a_format_is_finite():
    assert bool(
        all_finite([jnp.float16(65504), jnp.finfo(jnp.float32).max, jnp.bfloat16(3e38), np.finfo(np.float32).max])
    )


# Selection.


def test_selection_is_exact_and_nothing_leaks():
    old = {
        "w": jnp.array([1.0, jnp.nan, -0.0]),
        "n": jnp.arange(3),
        "key": jax.random.key(0),
        "h": jnp.ones(2, "bfloat16"),
    }
    new = {
        "w": jnp.array([jnp.inf, 2.0, 0.0]),
        "n": jnp.arange(3) + 1,
        "key": jax.random.key(1),
        "h": jnp.zeros(2, "bfloat16"),
    }
    for select in (select_tree, jax.jit(select_tree)):
        for pred, expected in ((True, new), (False, old)):
            out = select(jnp.array(pred), new, old)
            for name in ("w", "n", "h"):
                assert np.asarray(out[name]).tobytes() == np.asarray(expected[name]).tobytes()
                assert out[name].dtype == expected[name].dtype
            assert (jax.random.key_data(out["key"]) == jax.random.key_data(expected["key"])).all()


def test_leaves_that_are_no_arrays_are_kept():
    tree = {"name": "x", "n": 3, "none": None, "float0": FLOAT0, "float": 1.5}
    out = select_tree(jnp.array(False), tree, tree)
    assert out == tree and out["float0"] is FLOAT0
    assert float(select_tree(jnp.array(False), 1.5, 2.5)) == 2.5  # two Python numbers that differ are selected, too


def test_strings_that_differ_cannot_be_selected():
    with pytest.raises(ValueError, match=r"'new'.*'old'"):
        select_tree(jnp.array(False), {"name": "new"}, {"name": "old"})


def test_trees_and_dtypes_must_agree():
    with pytest.raises(TypeError):
        select_tree(jnp.array(True), jnp.ones(2), jnp.ones(2, "bfloat16"))
    with pytest.raises(ValueError, match=r"[Dd]ict"):
        select_tree(jnp.array(True), {"a": jnp.ones(2)}, {"b": jnp.ones(2)})


# Bytes and paths.


def test_bytes():
    tree = {
        "w": jnp.ones((2, 3), "bfloat16"),
        "s": jax.ShapeDtypeStruct((5,), "float8_e4m3fn"),
        "n": np.int64(3),
        "x": np.ones((0, 4)),
    }
    assert nbytes(tree) == 12 + 5 + 8 + 0
    assert nbytes({"key": jax.random.key(0), "float": 1.5, "none": None, "name": "x"}) == 0
    assert nbytes(None) == 0 and isinstance(nbytes(tree), int)


@pytest.mark.parametrize(
    ("path", "canonical"),
    [
        ("layers_0/Dense_1/kernel", "layers/0/Dense/1/kernel"),
        ("layers/0/kernel", "layers/0/kernel"),
        ("layer_12", "layer/12"),
        ("layer_norm/scale", "layer_norm/scale"),
        ("a_1_2/b", "a/1/2/b"),
        ("conv1/x_2y", "conv1/x_2y"),
        ("", ""),
    ],
)
def test_one_spelling(path, canonical):
    assert canonical_path(path) == canonical and canonical_path(canonical) == canonical


def test_the_path_of_a_leaf():
    from mpjax.numerics.loss_scale import dynamic_loss_scale

    tree = {"layers_0": [jnp.ones(1), (jnp.ones(1),)], "scale": dynamic_loss_scale()}
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    assert paths == ["layers/0/0", "layers/0/1/0", "scale/loss_scale", "scale/counter"]
