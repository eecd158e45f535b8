"""`import mpjax as jmp` is a supported migration: jmp's own tests pass with mpjax in its place, and so does its README.

jmp 0.0.4 ships its tests in its wheel. They are loaded here from their source with `jmp._src` replaced by two modules
whose every name is mpjax's, and pytest runs each of their methods as a test of its own. What mpjax does otherwise on
purpose stands below, each difference beside what jmp does. Promotion is the standard one here: jmp's users have it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import math
import sys
import types
import unittest
import warnings
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import jaxtyping
import jmp
import numpy as np
import pytest

import mpjax
from mpjax.core.dtypes import NAMES

THEIRS = {name for name in dir(jmp) if not name.startswith("_")}


def substitute(name: str, **extra: object) -> types.ModuleType:
    """A module like `jmp._src.<name>` whose public names are mpjax's."""
    module = types.ModuleType(name)
    home = sys.modules[f"jmp._src.{name}"]
    vars(module).update({public: getattr(mpjax, public) for public in THEIRS if public in vars(home)}, **extra)
    return module


SOURCE = types.ModuleType("_src")
SOURCE.loss_scale = substitute("loss_scale")
# jmp keeps the names of dtypes beside its policy, keyed by scalar types: here they are those that our `str` writes.
SOURCE.policy = substitute("policy", dtype_to_names={getattr(jnp, dtype.name): names for dtype, names in NAMES.items()})


def load(name: str, source: types.ModuleType = SOURCE) -> types.ModuleType:
    """jmp's test module from its file, with `source` standing where it imports `jmp._src` from."""
    (folder,) = sys.modules["jmp._src"].__path__
    spec = importlib.util.spec_from_file_location(f"jmp_tests.{name}", f"{folder}/{name}.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"jmp._src": source}):
        spec.loader.exec_module(module)
    return module


loss_scale_test, policy_test = load("loss_scale_test"), load("policy_test")
LossScaleTest = loss_scale_test.LossScaleTest
PolicyTest = policy_test.PolicyTest


@pytest.fixture(autouse=True)
def as_their_users_call_it(request: pytest.FixtureRequest) -> Iterator[None]:
    """jmp's own tests run without the suite's annotation checks, and one numpy warning of theirs is let through.

    They give a period of 5.0 and wait for the library's own assertion on a bad predicate; and what they compare with
    divides a float32 by the Python integer 3¹⁰⁰, which numpy 2 reports as an overflow.
    """
    if request.cls in (LossScaleTest, PolicyTest):
        jaxtyping.config.update("jaxtyping_disable", True)
    with warnings.catch_warnings():
        if request.node.name.startswith("test_dynamic_loss_scale_") and request.cls is LossScaleTest:
            warnings.filterwarnings("ignore", "overflow encountered in cast", RuntimeWarning)
        yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_the_tests_are_those_of_the_pinned_jmp_and_none_is_left_out():
    assert importlib.metadata.version("jmp") == jmp.__version__ == "0.0.4"
    for ours, name in ((LossScaleTest, "loss_scale_test"), (PolicyTest, "policy_test")):
        theirs = getattr(load(name, sys.modules["jmp._src"]), ours.__name__)
        found = unittest.defaultTestLoader.getTestCaseNames
        assert len(found(ours)) >= 25 and found(ours) == found(theirs)
    cases = [
        value
        for module in (loss_scale_test, policy_test)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, unittest.TestCase)
    ]
    assert cases == [LossScaleTest, PolicyTest]


def test_nothing_under_test_comes_from_jmp_but_the_base_class_of_policy():
    assert (loss_scale_test.jmp, policy_test.jmp) == (SOURCE.loss_scale, SOURCE.policy)
    inherited = set()
    for module in (SOURCE.loss_scale, SOURCE.policy):
        for name, value in vars(module).items():
            if name.startswith("__") or name in ("dtype_to_names", "LossScale"):
                continue
            assert value.__module__.startswith("mpjax."), name
            if inspect.isclass(value):
                for cls in value.__mro__:
                    assert not cls.__module__.startswith("jmp") or cls is jmp.Policy
                for attribute in dir(value):
                    if (getattr(getattr(value, attribute), "__module__", None) or "").startswith("jmp"):
                        inherited.add(f"{name}.{attribute}")
    assert inherited == {"Policy.with_output_dtype"}
    assert all(cls.__module__.startswith("mpjax.") for cls in mpjax.LossScale.__args__)
    for test in (loss_scale_test, policy_test):
        assert not [
            name for name, value in vars(test).items() if str(getattr(value, "__module__", "")).startswith("jmp.")
        ]


@pytest.mark.parametrize("name", sorted(THEIRS))
def test_each_public_name_of_jmp_is_one_of_mpjax_and_takes_the_same_arguments(name):
    assert set(jmp.__all__) == THEIRS
    ours, theirs = getattr(mpjax, name), getattr(jmp, name)
    if name == "LossScale":
        assert [cls.__name__ for cls in ours.__args__] == [cls.__name__ for cls in theirs.__args__]
        return
    old, new = (list(inspect.signature(f).parameters.values()) for f in (theirs, ours))
    keyword = {"all_finite", "select_tree", "cast_to_full", "cast_to_half", "half_dtype"}  # positional by nature
    if name not in keyword:
        assert [p.name for p in new[: len(old)]] == [p.name for p in old]
    assert all(p.default is not p.empty for p in new[len(old) :])
    if inspect.isclass(theirs):
        assert {m for m in dir(theirs) if not m.startswith("_")} - {"tree_flatten", "tree_unflatten"} <= set(dir(ours))


# The README of jmp, with `import mpjax as jmp`: what stands there as `...` is a linear layer and SGD here.


def readme_policies(jmp):
    full, half = jnp.float32, jnp.float16
    my_policy = jmp.Policy(compute_dtype=half, param_dtype=full, output_dtype=half)

    def layer(params, x):
        params, x = my_policy.cast_to_compute((params, x))
        y = x @ params["w"] + params["b"]
        return my_policy.cast_to_output(y)

    params = {"w": jnp.ones([3, 3], my_policy.param_dtype), "b": jnp.ones([3], dtype=my_policy.param_dtype)}
    y = layer(params, jnp.ones([3]))
    assert y.dtype == half
    my_policy = my_policy.with_output_dtype(full)
    assert layer(params, jnp.ones([3])).dtype == full

    my_policy = jmp.get_policy("params=float32,compute=float16,output=float32")
    assert my_policy.compute_dtype == half and my_policy.output_dtype == full
    assert jmp.get_policy("float16") == jmp.Policy(half, half, half)
    assert jmp.get_policy("half").compute_dtype == jmp.half_dtype()


def readme_training(jmp, loss_scale, steps=4):
    policy = jmp.get_policy("params=float32,compute=half,output=float32")

    def apply_optimizer(params, grads):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    def my_loss_fn(params, loss_scale, x):
        params, x = policy.cast_to_compute((params, x))
        loss = policy.cast_to_output(((x @ params["w"]) ** 2).mean())
        return loss_scale.scale(loss)

    @jax.jit
    def train_step(params, loss_scale, x):
        grads = jax.grad(my_loss_fn)(params, loss_scale, x)
        grads = loss_scale.unscale(grads)
        if isinstance(loss_scale, jmp.DynamicLossScale):
            grads_finite = jmp.all_finite(grads)
            loss_scale = loss_scale.adjust(grads_finite)
            params = jmp.select_tree(grads_finite, apply_optimizer(params, grads), params)
        else:
            params = apply_optimizer(params, grads)
        return params, loss_scale

    params = {"w": jnp.ones([3], jnp.float32)}
    for _ in range(steps):
        params, loss_scale = train_step(params, loss_scale, jnp.ones([2, 3]))
    return params, loss_scale


def test_the_readme_of_jmp_on_policies():
    readme_policies(jmp)
    readme_policies(mpjax)


def test_the_readme_of_jmp_on_dynamic_scaling_raises_in_jmp_and_learns_in_mpjax():
    with pytest.raises(TypeError, match="select"):  # its float16 scale meets a float32 floor
        readme_training(jmp, jmp.DynamicLossScale(jmp.half_dtype()(2**15)))
    params, scale = readme_training(mpjax, mpjax.DynamicLossScale(mpjax.half_dtype()(2**15)), steps=12)
    # |w| = 1, x = 1: the loss is 9, its product with 2¹⁵ passes 65504 in float16 until the scale has backed off.
    assert scale.loss_scale < 2**15 and scale.loss_scale.dtype == jnp.float32
    assert float(params["w"].max()) < 1


@pytest.mark.parametrize("make", [lambda: mpjax.StaticLossScale(2**7), lambda: mpjax.NoOpLossScale()])
def test_the_readme_of_jmp_on_static_and_no_scaling(make):
    params, scale = readme_training(mpjax, make())
    assert scale == make() and float(params["w"].max()) < 1


def test_the_readme_of_jmp_on_the_no_op_scale():
    loss_scale, loss, grads = mpjax.NoOpLossScale(), jnp.ones([]), {"w": jnp.ones(3)}
    assert loss is loss_scale.scale(loss)
    assert grads is loss_scale.unscale(grads)
    assert loss_scale is loss_scale.adjust(jnp.array(True))
    assert loss_scale.loss_scale == 1


# What mpjax does otherwise, on purpose: the same function over both libraries, and what each gives.


def identity(x):
    return jax.tree.map(lambda leaf: leaf, x)


def both(f):
    return f(jmp), f(mpjax)


def test_difference_the_floor_survives_flattening():
    theirs, ours = both(lambda lib: identity(lib.DynamicLossScale(jnp.float32(8), min_loss_scale=0.25)).min_loss_scale)
    assert (float(theirs), ours) == (1.0, 0.25)


def test_difference_growth_stops_at_a_finite_ceiling():
    def grown(lib):
        scale = lib.DynamicLossScale(jnp.float32(2**20), period=1)
        for _ in range(120):
            scale = scale.adjust(jnp.array(True))
        return float(scale.loss_scale)

    theirs, ours = both(grown)
    assert theirs > 1e38 and ours == 2.0**24


@pytest.mark.parametrize("kind", ["StaticLossScale", "DynamicLossScale"])
def test_difference_the_product_with_a_half_precision_tree_is_float32(kind):
    loss = jnp.float16(3.0)
    theirs, ours = both(lambda lib: getattr(lib, kind)(2.0**15).scale(loss))
    assert (theirs.dtype, float(theirs)) == (jnp.float16, math.inf)
    assert (ours.dtype, float(ours)) == (jnp.float32, 3 * 2.0**15)
    theirs, ours = both(lambda lib: getattr(lib, kind)(2.0**15).unscale(jnp.float16(2.0**-12)))
    assert (float(theirs), float(ours)) == (0.0, 2.0**-27)


def test_difference_a_numpy_scalar_and_a_shape_are_cast():
    tree = {"scalar": np.float32(1), "shape": jax.ShapeDtypeStruct((2,), jnp.float32)}
    theirs, ours = both(lambda lib: {k: v.dtype for k, v in lib.get_policy("f16").cast_to_compute(tree).items()})
    assert theirs == {"scalar": jnp.float32, "shape": jnp.float32}
    assert ours == {"scalar": jnp.float16, "shape": jnp.float16}


def test_difference_dtypes_are_canonical_and_equal_policies_have_equal_hashes():
    def pair(lib):
        return lib.Policy(np.float32, np.float32, np.float32), lib.Policy(*[jnp.dtype("float32")] * 3)

    theirs, ours = both(pair)
    assert theirs[0] == theirs[1] and hash(theirs[0]) != hash(theirs[1])
    assert ours[0] == ours[1] and hash(ours[0]) == hash(ours[1]) and str(ours[0]) == str(ours[1])
    with pytest.raises(KeyError):
        str(theirs[1])
    assert isinstance(ours[0].compute_dtype, np.dtype)


def test_difference_a_key_given_twice_is_an_error():
    assert jmp.get_policy("c=f16,c=bf16").compute_dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="key 'compute' stands twice in 'c=f16,compute=bf16'"):
        mpjax.get_policy("c=f16,compute=bf16")


def test_difference_spaces_are_allowed():
    with pytest.raises(ValueError, match="Unknown"):
        jmp.get_policy("c = f16, o = f32")
    assert mpjax.get_policy(" c = f16, o = f32 ") == mpjax.get_policy("c=f16,o=f32")


@pytest.mark.parametrize("name", ["mixed_bfloat16", "mixed_float16", "f8_e4m3fn", "p=f32,c=float8_e5m2,o=f32"])
def test_difference_presets_and_float8_have_names(name):
    with pytest.raises(ValueError, match="Unknown dtype"):
        jmp.get_policy(name)
    assert mpjax.get_policy(str(mpjax.get_policy(name))) == mpjax.get_policy(name)


def test_difference_a_dtype_that_is_no_float_is_refused():
    assert jmp.Policy(jnp.int32, jnp.int32, jnp.int32).compute_dtype == jnp.int32
    with pytest.raises(ValueError, match="not a float dtype"):
        mpjax.Policy(jnp.int32, jnp.int32, jnp.int32)


def test_difference_the_scale_becomes_strong_float32_whatever_it_was():
    for given in (8.0, jnp.float16(8), np.float32(8)):
        scale = mpjax.DynamicLossScale(given).adjust(jnp.array(True))
        assert (scale.loss_scale.dtype, scale.loss_scale.weak_type) == (jnp.float32, False)
        assert (scale.counter.dtype, scale.counter.weak_type) == (jnp.int32, False)
    with pytest.raises(TypeError, match="select"):
        jmp.DynamicLossScale(jnp.float16(8)).adjust(jnp.array(True))


def test_difference_unflattening_checks_nothing():
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    with pytest.raises(TypeError):
        jax.tree.map(lambda _: "a string", jmp.DynamicLossScale(jnp.float32(8)))
    assert jax.tree.map(lambda _: "a string", mpjax.DynamicLossScale(jnp.float32(8))).loss_scale == "a string"
    assert jax.tree.map(lambda _: shape, mpjax.DynamicLossScale(jnp.float32(8))).loss_scale is shape


def test_difference_a_static_scale_is_a_float_however_it_was_given():
    theirs, ours = both(lambda lib: (lib.StaticLossScale(1024), lib.StaticLossScale(np.float32(1024))))
    assert [type(scale.loss_scale) for scale in theirs] == [int, np.float32]
    assert [type(scale.loss_scale) for scale in ours] == [float, float]
    assert jax.tree.structure(ours[0]) == jax.tree.structure(ours[1])  # and so one compile


def test_difference_leaves_that_are_no_floats_pass():
    tree = {"key": jax.random.key(0), "name": "x", "w": jnp.ones(2)}
    with pytest.raises(TypeError):
        jmp.all_finite(tree)
    assert bool(mpjax.all_finite(tree))
    with pytest.raises(TypeError):
        jmp.select_tree(jnp.array(True), {"name": "x"}, {"name": "x"})
    assert mpjax.select_tree(jnp.array(True), {"name": "x"}, {"name": "x"}) == {"name": "x"}


def test_difference_backoff_may_differ_from_growth_and_the_ceiling_and_floor_are_settings():
    settings = {"backoff_factor", "max_loss_scale"}
    theirs, ours = both(lambda lib: set(inspect.signature(lib.DynamicLossScale).parameters))
    assert ours - theirs == settings
    scale = mpjax.DynamicLossScale(jnp.float32(8), factor=2.0, backoff_factor=0.25)
    assert float(scale.adjust(jnp.array(False)).loss_scale) == 2.0


def test_no_difference_the_constructor_warns_and_never_raises():
    for lib in (jmp, mpjax):
        assert type(lib.DynamicLossScale(object()).loss_scale) is object
        with pytest.warns(UserWarning, match="Expected floating type for loss_scale, got int32"):
            lib.DynamicLossScale(jnp.int32(8))
