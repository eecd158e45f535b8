"""Loss scales: when they grow and shrink, that they are correct pytrees, and that they act in float32."""

from __future__ import annotations

import dataclasses
import math
import warnings

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from mpjax.numerics.loss_scale import (
    CEILING,
    DynamicLossScale,
    NoOpLossScale,
    StaticLossScale,
    dynamic_loss_scale,
    static_loss_scale,
)

GOOD, BAD = jnp.array(True), jnp.array(False)
FLOAT32_MAX = float(np.finfo(np.float32).max)


def scales(start: DynamicLossScale, signs: str) -> list[float]:
    """The scale after each step of a run: `+` for finite gradients, `-` for a skip."""
    found = []
    for sign in signs:
        start = start.adjust(GOOD if sign == "+" else BAD)
        found.append(float(start.loss_scale))
    return found


# When it grows and shrinks.


def test_it_grows_on_the_nth_good_step_in_a_row():
    start = dynamic_loss_scale(8.0, growth_interval=3)
    assert scales(start, "+++++++") == [8, 8, 16, 16, 16, 32, 32]


def test_a_skip_shrinks_it_and_starts_the_count_again():
    start = dynamic_loss_scale(8.0, growth_interval=3)
    assert scales(start, "++-++++++") == [8, 8, 4, 4, 4, 8, 8, 8, 16]
    assert int(start.adjust(GOOD).adjust(GOOD).counter) == 2
    assert int(start.adjust(GOOD).adjust(BAD).counter) == 0


def test_a_counter_past_a_period_that_is_shorter_now_grows_at_once():
    assert scales(DynamicLossScale(jnp.float32(1), jnp.int32(7), period=3), "++++") == [2, 2, 2, 4]


def test_an_interval_that_no_int32_counts_is_one_that_never_ends():
    assert scales(dynamic_loss_scale(8.0, growth_interval=10**12), "++-+") == [8, 8, 4, 4]


def test_growth_on_every_step():
    assert scales(dynamic_loss_scale(1.0, growth_interval=1), "+++-+") == [2, 4, 8, 4, 8]


def test_growth_and_backoff_have_factors_of_their_own():
    start = dynamic_loss_scale(16.0, growth_interval=1, growth_factor=3.0, backoff_factor=0.25)
    assert scales(start, "+-") == [48, 12]
    assert scales(DynamicLossScale(jnp.float32(12), period=1, factor=3), "+-") == [36, 12]  # jmp's: 1 / factor


def test_the_floor_may_be_under_one_and_is_reached_exactly():
    assert scales(dynamic_loss_scale(1.0, floor=0.3), "---+-") == [0.5, np.float32(0.3)] + 3 * [np.float32(0.3)]


def test_growth_stops_at_the_ceiling_exactly():
    start = dynamic_loss_scale(4.0, growth_interval=1, ceiling=100.0)
    assert scales(start, 6 * "+") == [8, 16, 32, 64, 100, 100]
    assert scales(dynamic_loss_scale(growth_interval=1), 20 * "+")[-1] == CEILING == 2.0**24


def test_fault_2_a_start_above_the_ceiling_only_shrinks():
    start = dynamic_loss_scale(2.0**60, growth_interval=1)
    assert scales(start, "++--++-") == [2.0**60, 2.0**60, 2.0**59, 2.0**58, 2.0**58, 2.0**58, 2.0**57]
    assert scales(start, 37 * "-" + "+")[-1] == 2.0**24  # and once it is under the ceiling, grows up to it


@pytest.mark.parametrize("floor", [1.0, 2.0**-14, 0.3])
def test_fault_3_400_skips_in_a_row(floor):
    step = jax.jit(lambda scale: scale.adjust(BAD))
    scale = dynamic_loss_scale(2.0**15, floor=floor)
    for _ in range(400):
        scale = step(scale)
    assert float(scale.loss_scale) == np.float32(floor)
    assert math.isfinite(1 / float(scale.loss_scale))


@pytest.mark.parametrize("ceiling", [FLOAT32_MAX, 1e300])
def test_fault_3_growth_at_the_float32_limit_stays_finite(ceiling):
    start = dynamic_loss_scale(2.0**126, growth_interval=1, ceiling=ceiling)
    assert scales(start, "++++") == [2.0**127] + 3 * [FLOAT32_MAX]
    assert scales(DynamicLossScale(jnp.float32(2.0**127), period=1, max_loss_scale=math.inf), "+") == [FLOAT32_MAX]


def test_a_static_scale_and_none_do_not_move():
    for scale in (StaticLossScale(4.0), NoOpLossScale()):
        assert scale.adjust(GOOD) is scale and scale.adjust(BAD) is scale


# What a bad setting says.


@pytest.fixture
def unchecked(monkeypatch):
    """Outside of this suite nothing checks annotations before the library's own checks do."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("bad", [-1, 0, math.nan, math.inf, 1e39, 1e-46])  # the last two are inf and 0 in float32
def test_fault_13_an_initial_scale_that_is_no_positive_float32(unchecked, bad):
    with pytest.raises(ValueError, match=r"got initial=.*legal is .*; leave it out for the default"):
        dynamic_loss_scale(bad)
    with pytest.raises(ValueError, match=r"got scale=.*legal is .*; leave it out for the default"):
        static_loss_scale(bad)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("growth_interval", [0, -1, 1.5, math.nan, math.inf]),
        ("growth_factor", [1.0, 0.5, -2, math.nan, math.inf]),
        ("backoff_factor", [1.0, 2, 0, -0.5, math.nan]),
        ("floor", [0, -1.0, math.nan, math.inf, 1e-46, 2.0**16]),
        ("ceiling", [0.0, -1.0, math.nan, math.inf, 2.0**-15]),
    ],
)
def test_fault_13_a_bad_setting_names_itself_and_what_is_legal(unchecked, setting, values):
    for bad in values:
        named = "initial" if (setting, bad) == ("floor", 2.0**16) else setting  # a floor over the initial 2¹⁵
        with pytest.raises(ValueError, match=rf"^loss scale: got {named}=.*legal is .*; leave it out for the default$"):
            dynamic_loss_scale(**{setting: bad})


def test_the_constructor_warns_and_never_raises():
    with pytest.warns(UserWarning, match="Expected floating type for loss_scale, got int32"):
        DynamicLossScale(jnp.int32(8))
    with pytest.warns(UserWarning, match="Expected floating type for min_loss_scale, got int32"):
        DynamicLossScale(jnp.float32(8), min_loss_scale=jnp.int32(1))
    for bad in (-1.0, math.nan, math.inf):
        DynamicLossScale(jnp.float32(bad), period=0, factor=-1)
    for placeholder in (object(), None, jax.ShapeDtypeStruct((), jnp.float32)):
        assert DynamicLossScale(placeholder).loss_scale is placeholder
        assert DynamicLossScale(jnp.float32(8), min_loss_scale=placeholder).min_loss_scale is placeholder
        assert StaticLossScale(placeholder).loss_scale is placeholder


def test_a_flag_that_is_no_scalar_is_our_mistake():
    with pytest.raises(AssertionError, match="Expected boolean scalar"):
        dynamic_loss_scale().adjust(jnp.ones(2, bool))


# A correct pytree.

ODD = DynamicLossScale(jnp.float32(8), jnp.int32(3), 7, 3.0, 0.25, 2.0**10, 0.125)


def statics(scale: DynamicLossScale) -> tuple:
    return scale.period, scale.factor, scale.min_loss_scale, scale.max_loss_scale, scale.backoff_factor


def test_two_leaves_in_order_and_every_setting_survives():
    leaves, structure = jax.tree.flatten(ODD)
    assert leaves == [ODD.loss_scale, ODD.counter] and leaves[0] is ODD.loss_scale
    assert statics(structure.unflatten(leaves)) == (7, 3.0, 0.25, 2.0**10, 0.125)
    assert statics(jax.jit(lambda scale: scale.adjust(GOOD))(ODD)) == statics(ODD)
    named = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(ODD)[0]]
    assert named == [".loss_scale", ".counter"]
    assert jax.tree.map(lambda x: x, ODD) == ODD


def test_another_setting_is_another_structure():
    same = dataclasses.replace(ODD, loss_scale=jnp.float32(1))
    assert jax.tree.structure(same) == jax.tree.structure(ODD)
    for change in ({"period": 8}, {"min_loss_scale": 0.5}, {"max_loss_scale": 1.0}, {"backoff_factor": 0.5}):
        assert jax.tree.structure(dataclasses.replace(ODD, **change)) != jax.tree.structure(ODD)


@pytest.mark.parametrize("placeholder", [object(), None, "a string", 3, jax.ShapeDtypeStruct((), jnp.float32)])
def test_unflatten_takes_whatever_jax_puts_there_and_warns_of_nothing(placeholder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mapped = jax.tree.map(lambda _: placeholder, ODD)
    assert mapped.loss_scale is placeholder and mapped.counter is placeholder
    assert statics(mapped) == statics(ODD)


def test_it_maps_to_shapes_and_shardings():
    shapes = jax.eval_shape(lambda: ODD)
    assert shapes.loss_scale == jax.ShapeDtypeStruct((), jnp.float32)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    placed = jax.device_put(ODD, jax.tree.map(lambda _: sharding, ODD))
    assert placed.loss_scale.sharding == sharding and statics(placed) == statics(ODD)


def test_vmap_over_scales():
    several = jax.tree.map(
        lambda *xs: jnp.stack(xs), *(dataclasses.replace(ODD, loss_scale=jnp.float32(s)) for s in (1, 4))
    )
    grads = jnp.array([[2.0, 8.0], [2.0, 8.0]])
    unscaled = jax.vmap(lambda scale, g: scale.unscale(g))(several, grads)
    assert unscaled.tolist() == [[2, 8], [0.5, 2]]
    after = jax.vmap(lambda scale, finite: scale.adjust(finite))(several, jnp.array([True, False]))
    assert (after.loss_scale.tolist(), after.counter.tolist()) == ([1, 0.5], [4, 0])


@pytest.mark.parametrize(
    "start", [dynamic_loss_scale(2.0**3, growth_interval=7), DynamicLossScale(np.float32(8), period=7)]
)
def test_one_trace_over_growth_and_skips(start):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(scale, finite):
        return scale.adjust(finite), scale.scale(jnp.float32(1))

    for i in range(50):
        start, _ = step(start, jnp.array(i % 11 != 0))
    chex.clear_trace_counter()


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("given", [8.0, np.float32(8), np.float64(8), jnp.float16(8)])
def test_its_leaves_are_strong_float32_and_int32_after_a_step(given, x64):
    with jax.enable_x64(x64):
        for flag in (GOOD, BAD):
            after = DynamicLossScale(given, 0, period=1).adjust(flag)
            for leaf, dtype in ((after.loss_scale, jnp.float32), (after.counter, jnp.int32)):
                assert (leaf.dtype, leaf.weak_type) == (dtype, False)


@pytest.mark.parametrize("flag", [GOOD, BAD])
def test_a_factor_that_is_a_numpy_float64_leaves_the_scale_float32(flag):
    with jax.enable_x64(True):
        for settings in ({"factor": np.float64(2)}, {"backoff_factor": np.float64(0.25)}):
            start = DynamicLossScale(jnp.float32(8), period=1, **settings)
            assert start.adjust(flag).loss_scale.dtype == jnp.float32


def test_the_checked_factory_starts_strong():
    scale = dynamic_loss_scale(1024)
    assert [(x.dtype, x.weak_type) for x in jax.tree.leaves(scale)] == [(jnp.float32, False), (jnp.int32, False)]


def test_scales_without_leaves_are_static_equal_and_hashable():
    for scale in (NoOpLossScale(), StaticLossScale(8)):
        assert jax.tree.leaves(scale) == [] and jax.tree.map(lambda x: x, scale) == scale
    same = [StaticLossScale(x) for x in (8, 8.0, np.float32(8), np.array(8.0), jnp.float32(8))]
    assert len(set(same)) == 1 and hash(NoOpLossScale()) == hash(NoOpLossScale())
    traced = jax.jit(lambda s, x: (StaticLossScale(s).scale(x), StaticLossScale(s).unscale(x)))
    assert [float(x) for x in traced(2.0, jnp.float32(3))] == [6, 1.5]


# Scaling and unscaling.

BOTH = pytest.mark.parametrize(
    "scale", [StaticLossScale(2.0**17), dynamic_loss_scale(2.0**17)], ids=["static", "dynamic"]
)


@BOTH
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_fault_5_scaling_and_unscaling_happen_in_float32(scale, dtype):
    loss, grad = jnp.asarray(1.5, dtype), jnp.asarray(2.0**-8, dtype)
    for out, exact in ((scale.scale(loss), 1.5 * 2.0**17), (scale.unscale(grad), 2.0**-25)):
        assert (out.dtype, out.weak_type, float(out)) == (jnp.float32, False, exact)


@BOTH
def test_unscaling_undoes_scaling_to_the_bit_for_a_power_of_two(scale):
    tree = {"w": jax.random.normal(jax.random.key(0), (50,)), "b": [jnp.float32(0.1)]}
    chex.assert_trees_all_equal(scale.unscale(scale.scale(tree)), tree)


def test_unscaling_by_the_largest_scale_does_not_flush_to_zero():
    """1 / 3.4e38 is subnormal, and XLA flushes it: a product with the reciprocal would make every gradient zero."""
    scale = dynamic_loss_scale(2.0**127, ceiling=FLOAT32_MAX)
    assert float(jax.jit(lambda s, x: s.unscale(x))(scale, jnp.float32(2.0**120))) == 2.0**-7


@BOTH
def test_fault_17_float64_stays_float64_and_nothing_else_becomes_it(scale):
    with jax.enable_x64(True):
        for x, dtype in ((jnp.float64(3), jnp.float64), (jnp.float32(3), jnp.float32), (jnp.float16(3), jnp.float32)):
            assert scale.scale(x).dtype == scale.unscale(x).dtype == dtype


@BOTH
def test_fault_16_leaves_that_are_no_floats_pass_unscaled(scale):
    float0 = np.zeros(2, jax.dtypes.float0)
    tree = {
        "n": jnp.arange(3),
        "flag": jnp.array(True),
        "key": jax.random.key(0),
        "none": None,
        "name": "x",
        "int": float0,
    }
    for out in (scale.scale(tree), scale.unscale(tree)):
        assert all(out[name] is leaf for name, leaf in tree.items())


@BOTH
def test_complex_gradients_are_unscaled(scale):
    out = scale.unscale(jnp.complex64(2.0**17 + 2.0**18 * 1j))
    assert out.dtype == jnp.complex64 and complex(out) == 1 + 2j


def test_a_python_number_is_scaled():
    assert float(dynamic_loss_scale(8.0).scale(3.0)) == 24 and float(static_loss_scale(8).unscale(4)) == 0.5
