"""FAULTS.md, row by row: what must not hurt a user. One device, Linen and bare functions; other rows stand with their rooms.

"Skip" means that every byte of params, optimizer state, schedule count, moving average and batch statistics is as it was.
Rows 12 and 14 are in tests/policy and tests/wrap, row 34 on a GPU in tests/test_gpu.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import mpjax
from mpjax.core.model import Model
from mpjax.measure.audit import audit
from mpjax.numerics.loss_scale import DynamicLossScale, NoOpLossScale, StaticLossScale
from mpjax.train.state import Aux, TrainState
from mpjax.train.step import TrainStep, make_train_step
from tests.train.toys import (
    ROWS,
    clean_batch,
    equations,
    fingerprint,
    held,
    linear_model,
    places,
    poisonable,
    poisonable_loss,
    poisoned_batch,
    recording,
    spoiling,
)

KEY = jax.random.key(5)
LINEAR = linear_model()
HALF = "float16"
EPS16, EPS32 = 2.0**-10, 2.0**-23  # one ulp of 1; a rounding is at most half of it


def mean_loss(params: Any, mstate: Any, batch: Any, rng: Any) -> jax.Array:
    x, y = batch
    return jnp.square(LINEAR.apply(params, mstate, x)[0] - y).mean()


X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
Y = X @ np.array([1.0, -2.0, 0.5], np.float32) + 0.5
BAD = (np.full_like(X, np.nan), Y)


def dynamic(scale: float = 2.0**15, **options: Any) -> DynamicLossScale:
    return mpjax.dynamic_loss_scale(scale, **options)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of this suite nothing checks annotations before the library's own checks do."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


both_doors = pytest.mark.parametrize("door", ["linen", "nnx"])


# ---- 1–3: the scale finds its place ----------------------------------------------------------------------------------

FINE = 2.0**-26
"""So little does each element weigh in the loss that its cotangent, under 2⁻²⁵, is zero in float16."""


def faint_loss(params: Any, mstate: Any, batch: Any, rng: Any) -> jax.Array:
    """FINE/2 · Σ (w x − y)², with the product and its gradient in float16."""
    x, y = batch
    w = params["w"].astype(HALF)
    h = (w * x.astype(HALF)).astype(jnp.float32)
    return 0.5 * FINE * jnp.square(h - y).sum()


FAINT = Model(lambda rng: ({"w": jnp.full(4, 0.25)}, {}), lambda *a: a)
FAINT_BATCH = (np.array([1.0, 0.75, 1.5, -1.25], np.float32), np.array([0.5, 1.0, -0.25, 0.75], np.float32))


def test_fault_01_float16_cotangents_under_2_to_minus_25():
    """Scaled, twenty steps of SGD stay beside float64; unscaled, not one of them moves a weight."""
    optimizer = optax.sgd(0.25 / FINE)
    step = make_train_step(faint_loss, optimizer, donate=False)
    scaled = TrainState.create(FAINT, optimizer, KEY, loss_scale=dynamic())
    unscaled = TrainState.create(FAINT, optimizer, KEY)
    start = fingerprint(unscaled.params)
    w, (x, y) = np.full(4, 0.25), (a.astype(np.float64) for a in FAINT_BATCH)
    for _ in range(20):
        w = w - 0.25 * (w * x - y) * x
        scaled, _ = step(scaled, FAINT_BATCH)
    unscaled, metrics = step(unscaled, FAINT_BATCH)
    assert fingerprint(unscaled.params) == start and float(metrics["grad_norm"]) == 0.0 and int(unscaled.step) == 1
    # A step rounds w, w·x, the cotangent and the gradient to float16, each by half an ulp of numbers under 2, and takes
    # a quarter of it; the errors of earlier steps shrink by 1 − x²/4 ≥ 0.39, at most 1 / (x²/4) ≤ 7.2 of them are left.
    np.testing.assert_allclose(scaled.params["w"], w, rtol=0, atol=7.2 * 0.25 * 4 * EPS16)
    assert int(scaled.step) == 20


def test_fault_02_initial_scale_2_to_the_60():
    """It backs off once a step until the gradients fit into float16, and then learns."""
    optimizer = optax.sgd(0.25 / FINE)
    step = make_train_step(faint_loss, optimizer, donate=False)
    state = TrainState.create(FAINT, optimizer, KEY, loss_scale=dynamic(2.0**60))
    before, losses, scales = held(state), [], []
    for _ in range(50):
        state, metrics = step(state, FAINT_BATCH)
        losses.append(float(metrics["loss"])), scales.append(float(metrics["loss_scale"]))
        if int(state.step) == 0:
            assert held(state) == before
    # The largest cotangent is 2⁻²⁶ · 1.06; times 2⁴¹ it is 34821, times 2⁴² it is over 65504: the 20th attempt is good.
    assert scales[:20] == [2.0 ** (60 - n) for n in range(20)] and set(scales[19:]) == {2.0**41}
    assert int(state.skipped) == 19 and int(state.step) == 31 and int(state.skipped_in_a_row) == 0
    assert losses[0] == losses[19] and losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize("ceiling", [mpjax.DynamicLossScale(jnp.float32(1)).max_loss_scale, 3.0e38, float("inf")])
def test_fault_03_growth_at_the_float32_limit(ceiling):
    optimizer = optax.sgd(0.0)
    step = make_train_step(lambda p, m, batch, rng: p["b"] * 0, optimizer)
    limit = float(np.finfo(np.float32).max)
    for start in (2.0**126, limit):
        scale = DynamicLossScale(jnp.float32(start), period=1, factor=2.0**10, max_loss_scale=ceiling)
        state = TrainState.create(LINEAR, optimizer, KEY, loss_scale=scale)
        for _ in range(3):
            state, metrics = step(state, None)
            assert np.isfinite(metrics["loss_scale"]) and bool(metrics["grads_finite"])
        assert float(state.loss_scale.loss_scale) == float(np.float32(max(start, min(ceiling, limit))))


@pytest.mark.parametrize("floor", [2.0**-14, 0.25, 8.0])
def test_fault_03_four_hundred_skips_in_a_row(floor):
    """The scale stops at its floor, which may be under 1, and still works there."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = make_train_step(mean_loss, optimizer, donate=False)
    state = start = TrainState.create(LINEAR, optimizer, KEY, loss_scale=dynamic(floor=floor), ema_decay=0.5)
    run = jax.jit(lambda s: jax.lax.scan(lambda s, _: (step.pure(s, BAD)[0], None), s, length=400)[0])
    state = run(state)
    assert held(state) == held(start) and float(state.loss_scale.loss_scale) == floor
    assert (int(state.skipped), int(state.skipped_in_a_row), int(state.step), int(state.attempt)) == (400, 400, 0, 400)
    good, _metrics = step(state, (X, Y))
    assert int(good.step) == 1 and int(good.skipped_in_a_row) == 0 and int(good.skipped) == 400
    plain, _ = step(dataclasses.replace(state, loss_scale=dynamic(1.0, floor=floor if floor <= 1 else 1.0)), (X, Y))
    assert fingerprint(good.params) == fingerprint(plain.params)


# ---- 4, 18: any bad number anywhere is a skip ------------------------------------------------------------------------


@functools.cache
def poison_lab(accumulate: int) -> tuple[TrainStep, TrainState]:
    """A step that meets every kind of poison in one compile, and a state that has moved: moments, counts, averages."""
    optimizer = spoiling(optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.01, 10)))
    state = TrainState.create(poisonable, optimizer, KEY, loss_scale=dynamic(), ema_decay=0.9)
    step = make_train_step(poisonable_loss, optimizer, accumulate=accumulate, donate=False)
    for seed in range(3):
        state, metrics = step(state, clean_batch(seed))
    assert int(state.step) == 3 and bool(metrics["grads_finite"])
    return step, state


def assert_skipped(before: TrainState, after: TrainState, metrics: dict[str, Any]) -> None:
    assert held(after) == held(before)
    assert int(after.step) == int(before.step) and int(after.attempt) == int(before.attempt) + 1
    assert int(after.skipped) == int(metrics["skipped"]) == int(before.skipped) + 1
    assert int(after.skipped_in_a_row) == int(metrics["skipped_in_a_row"]) == int(before.skipped_in_a_row) + 1
    assert float(after.loss_scale.loss_scale) == float(before.loss_scale.loss_scale) / 2
    assert int(after.loss_scale.counter) == 0


BAD_NUMBERS = pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)


@BAD_NUMBERS
@pytest.mark.parametrize("place", places(), ids=str)
def test_fault_04_one_bad_number_anywhere_is_a_skip(place, value):
    """In a gradient, the loss, new batch statistics or a candidate update, and there alone: nothing else is bad."""
    step, state = poison_lab(1)
    after, metrics = step(state, poisoned_batch(place, value))
    assert_skipped(state, after, metrics)
    assert np.isfinite(metrics["grad_norm"]) == bool(metrics["grads_finite"]) == (place.kind != "grads")
    assert np.isfinite(metrics["loss"]) == (place.kind != "loss")
    assert step._jitted._cache_size() == 1


@pytest.mark.parametrize("row", range(ROWS))
def test_fault_18_nan_in_one_micro_batch_skips_the_whole_step(row):
    """Whichever micro-batch has it, wherever it stands: also statistics that the next micro-batch overwrites."""
    step, state = poison_lab(2)
    for place in places():
        after, metrics = step(state, poisoned_batch(place, np.nan, row))
        assert_skipped(state, after, metrics)
    assert step._jitted._cache_size() == 1


def test_fault_04_a_clean_batch_is_no_skip_and_training_goes_on_after_one():
    step, state = poison_lab(1)
    straight, _ = step(state, clean_batch(7))
    after, _ = step(state, poisoned_batch(places()[0], np.nan))
    resumed, _ = step(after, clean_batch(7))
    assert held(resumed) == held(straight) and held(resumed) != held(state)
    assert (int(resumed.step), int(resumed.skipped), int(resumed.skipped_in_a_row)) == (4, 1, 0)


# ---- 5–8: float32 where it counts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fault_05_loss_times_scale_over_65504_in_float16(accumulate):
    """A float16 loss of 40000 times 2¹⁵ is 1.3e9, far beyond float16: it is scaled in float32, and its gradient is exact."""
    model = Model(lambda rng: ({"w": jnp.float32(40000)}, {}), lambda *a: a)
    optimizer = recording(optax.sgd(1.0))
    state = TrainState.create(model, optimizer, KEY, loss_scale=dynamic())
    step = make_train_step(lambda p, m, b, rng: p["w"].astype(HALF), optimizer, accumulate=accumulate)
    after, metrics = step(state, None)
    assert float(metrics["loss"]) == 40000.0 and int(after.skipped) == 0
    assert float(after.opt_state[0].grads["w"]) == 1.0 and float(after.params["w"]) == 39999.0


def half_params(values: Any) -> Model:
    return Model(lambda rng: ({"w": jnp.asarray(values, HALF)}, {}), lambda *a: a)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fault_05_unscaling_happens_in_float32(accumulate):
    """A float16 gradient of 2⁻¹⁵ at scale 2¹⁵ is 2⁻³⁰ unscaled: zero in float16, itself in float32."""
    optimizer = recording(optax.sgd(1.0))
    with pytest.warns(mpjax.VanishingUpdateWarning):
        state = TrainState.create(half_params([1.0, 2.0]), optimizer, KEY, loss_scale=dynamic())
    step = make_train_step(lambda p, m, b, rng: (p["w"] * HALF_TINY).sum(), optimizer, accumulate=accumulate)
    after, _metrics = step(state, None)
    assert after.opt_state[0].grads["w"].tolist() == [2.0**-24] * 2
    assert after.opt_state[0].grads["w"].dtype == jnp.float32


HALF_TINY = np.float16(2.0**-24)


@pytest.mark.parametrize("clip", [None, 100.0])
def test_fault_05_the_norm_of_a_float16_tree(clip):
    """300² does not fit into float16; optax's norm of the float16 tree is inf, and its clip makes the update zero."""
    gradient = np.array([300.0, -400.0], np.float16)
    assert not np.isfinite(optax.tree.norm({"w": jnp.asarray(gradient)}))
    optimizer = recording(optax.sgd(1.0))
    with pytest.warns(mpjax.VanishingUpdateWarning):
        state = TrainState.create(half_params([0.0, 0.0]), optimizer, KEY, loss_scale=StaticLossScale(4.0))
    step = make_train_step(
        lambda p, m, b, rng: (p["w"] * gradient).sum().astype(jnp.float32), optimizer, clip_norm=clip
    )
    after, metrics = step(state, None)
    shrink = 1.0 if clip is None else 0.2
    assert float(metrics["grad_norm"]) == 500.0 and int(after.step) == 1
    np.testing.assert_allclose(after.opt_state[0].grads["w"], gradient * shrink, rtol=2 * EPS32)
    np.testing.assert_allclose(after.params["w"], -gradient * shrink, rtol=EPS16)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_fault_05_an_infinite_norm_is_a_skip_never_a_zero_update(clip, accumulate):
    """Each gradient is finite, 3e20, but its square is not: clipped by an infinite norm, the update would be zero."""
    optimizer = optax.sgd(1.0, momentum=0.9)
    state = TrainState.create(LINEAR, optimizer, KEY, loss_scale=dynamic(1.0))
    step = make_train_step(
        lambda p, m, b, r: (p["w"][None] * b).sum(), optimizer, clip_norm=clip, accumulate=accumulate, donate=False
    )
    after, metrics = step(state, np.full((2 * accumulate, 3), 1.5e20, np.float32))
    assert_skipped(state, after, metrics)
    assert np.isinf(metrics["grad_norm"]) and not bool(metrics["grads_finite"]) and np.isfinite(metrics["loss"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fault_05_an_infinite_weight_is_a_skip_never_a_zero_update(accumulate):
    """Each weight is finite, 3e38, but not their sum, by which every loss and gradient would be zero."""
    optimizer = optax.sgd(1.0, momentum=0.9)
    state = TrainState.create(LINEAR, optimizer, KEY, loss_scale=dynamic(1.0))
    step = make_train_step(
        lambda p, m, b, r: ((p["w"][None] * b["x"]).sum(), b["weight"].sum()),
        optimizer,
        accumulate=accumulate,
        donate=False,
    )
    rows = 2 * accumulate
    batch = {"x": np.ones((rows, 3), np.float32), "weight": np.full(rows, 3e38, np.float32)}
    after, metrics = step(state, batch)
    assert_skipped(state, after, metrics)
    assert float(metrics["loss"]) == 0  # which is finite, as is the norm of one batch's gradient, 0


def penalised(params: Any, mstate: Any, batch: Any, rng: Any) -> tuple[jax.Array, Aux]:
    x, y = batch
    h = jnp.tanh(x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)).astype(jnp.float32)
    return jnp.square(h + params["b"] - y).mean() * 3, Aux({"s": {"mean": x.mean(0)}})


def test_fault_06_clip_decay_and_noise_do_not_depend_on_the_scale():
    """Powers of two pass through every operation unrounded, so five steps give the same bytes under each scale."""
    model = Model(
        lambda rng: ({"w": jnp.full(3, 0.5), "b": jnp.zeros(())}, {"s": {"mean": jnp.zeros(3)}}), lambda *a: a
    )
    calls = recording(optax.identity())
    optimizer = optax.chain(calls, optax.add_noise(0.01, 0.55, 0), optax.adamw(0.05, weight_decay=0.1))
    step = make_train_step(penalised, optimizer, accumulate=2, clip_norm=0.25)
    results = {}
    for scale in (dynamic(1.0), dynamic(2.0**10), dynamic(2.0**15), StaticLossScale(2.0**15), NoOpLossScale()):
        state = TrainState.create(model, optimizer, KEY, loss_scale=scale, ema_decay=0.5)
        for _ in range(5):
            state, metrics = step(state, (X, Y))
        assert float(metrics["grad_norm"]) > 0.25 and int(state.opt_state[0][0].calls) == int(state.step) == 5
        unscaled = {name: x for name, x in metrics.items() if name != "loss_scale"}
        results[repr(scale)] = held(state) | fingerprint(unscaled)
    first = next(iter(results.values()))
    assert len(results) == 5 and all(found == first for found in results.values())


POLICIES = ("float32", "mixed_bfloat16", "mixed_float16", "bfloat16", "float16")


@contextlib.contextmanager
def silenced():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mpjax.PrecisionWarning)
        yield


DENSE = {"linen": nn.Dense(2), "nnx": lambda rngs: nnx.Linear(3, 2, rngs=rngs)}


@both_doors
@pytest.mark.parametrize("policy", POLICIES)
def test_fault_07_what_counts_and_adds_up_is_float32_or_int32(policy, door):
    """Average, optimizer state, scale, counters and the sums of accumulation; params are half only where the policy says so."""
    model = mpjax.wrap(DENSE[door], policy)
    optimizer = optax.adam(0.1)
    with silenced():
        state = TrainState.create(model, optimizer, KEY, X, ema_decay=0.5)
    step = make_train_step(lambda p, m, x, rng: jnp.square(model.apply(p, m, x)[0]).mean(), optimizer, accumulate=2)
    traced, (after, metrics) = jax.make_jaxpr(step.pure, return_shape=True)(state, X)
    half = policy in ("bfloat16", "float16")
    assert {str(x.dtype) for x in jax.tree.leaves((state.params, after.params))} == {policy if half else "float32"}
    for tree in (state, after):
        assert {str(x.dtype) for x in jax.tree.leaves(tree.ema)} == {"float32"}
        assert {str(x.dtype) for x in jax.tree.leaves((tree.opt_state, tree.loss_scale))} <= {"float32", "int32"}
        assert {str(x.dtype) for x in (tree.step, tree.skipped, tree.skipped_in_a_row)} == {"int32"}
    assert {str(x.dtype) for x in metrics.values()} == {"float32", "int32", "bool"}
    (scan,) = [e for e in traced.jaxpr.eqns if e.primitive.name == "scan"]
    assert {str(v.aval.dtype) for v in scan.outvars} == {"float32", "bool"}
    sums = [e for e in equations(traced.jaxpr) if e.primitive.name == "add" and e.outvars[0].aval.shape == (3, 2)]
    assert sums and {str(e.outvars[0].aval.dtype) for e in sums} == {"float32"}


def test_fault_07_counters_pass_256():
    """A bfloat16 counter would stop there: 256 + 1 is 256."""
    optimizer = optax.adam(0.0)
    state = TrainState.create(LINEAR, optimizer, KEY, loss_scale=dynamic(growth_interval=2000))
    step = make_train_step(mean_loss, optimizer)
    feed = np.stack([X] * 600)
    feed[1::2] = np.nan
    state = jax.jit(lambda s: jax.lax.scan(lambda s, x: (step.pure(s, (x, Y))[0], None), s, feed)[0])(state)
    assert (int(state.step), int(state.skipped), int(state.attempt)) == (300, 300, 600)
    assert int(state.opt_state[0].count) == 300


def test_fault_08_adam_in_float16():
    """Its epsilon, 1e-8, is zero in float16: 0 / (√0 + 0). Our state is float32, and a zero gradient moves nothing."""
    optimizer = optax.adam(0.1)
    with pytest.warns(mpjax.VanishingUpdateWarning):
        state = TrainState.create(half_params([1.0, 2.0]), optimizer, KEY, loss_scale=dynamic())
    assert {str(x.dtype) for x in jax.tree.leaves(state.opt_state)} == {"float32", "int32"}
    step = make_train_step(lambda p, m, x, rng: (p["w"][0] * x).astype(jnp.float32).mean(), optimizer, donate=False)
    after, _metrics = step(state, np.ones(2, np.float16))
    assert int(after.step) == 1 and after.params["w"].dtype == jnp.float16
    assert after.params["w"].tolist() == [float(np.float16(0.9)), 2.0]
    with pytest.warns(mpjax.PrecisionWarning) as caught:
        TrainState.create(half_params([1.0, 2.0]), optimizer, KEY, loss_scale=dynamic(), optimizer_dtype=None)
    assert {w.category for w in caught} == {mpjax.VanishingUpdateWarning, mpjax.VanishingEpsilonWarning}
    zero = jnp.zeros(2, jnp.float16)  # what the warning is about: float16 all the way, in a loop of one's own
    assert not bool(mpjax.all_finite(optimizer.update(zero, optimizer.init(zero), zero)[0]))


# ---- 9, 10: real modules ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Every kind of norm around attention, whose mask is added by hand as −1e9 where it is not boolean."""

    @nn.compact
    def __call__(self, x, mask, train=False):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        x = nn.RMSNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
        x = x + Penalised()(nn.GroupNorm(2)(x), mask)
        return nn.Dense(5)(x)


class Penalised(nn.Module):
    """Attention as people write it: −1e9 on masked scores, which float16 cannot hold, and a float32 softmax."""

    @nn.compact
    def __call__(self, x, mask):
        q, k, v = (nn.Dense(8)(x) for _ in range(3))
        scores = jnp.where(mask[:, 0], 0.0, -1e9) + (q @ k.swapaxes(-1, -2)).astype(jnp.float32)
        return jax.nn.softmax(scores).astype(x.dtype) @ v


class NnxNet(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 8, rngs=rngs)
        self.batch_norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.rms_norm = nnx.RMSNorm(8, rngs=rngs)
        self.layer_norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.group_norm = nnx.GroupNorm(8, 2, rngs=rngs)
        self.qkv = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(3)])
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x, mask):
        x = self.rms_norm(self.batch_norm(self.dense(x)))
        x = x + self.attention(self.layer_norm(x), mask=mask)
        q, k, v = (layer(self.group_norm(x)) for layer in self.qkv)
        scores = jnp.where(mask[:, 0], 0.0, -1e9) + (q @ k.swapaxes(-1, -2)).astype(jnp.float32)
        return self.head(x + jax.nn.softmax(scores).astype(x.dtype) @ v)


NETS = {"linen": Net(), "nnx": NnxNet}
BATCH_MEANS = {"linen": "BatchNorm_0", "nnx": "batch_norm"}
TOKENS = np.random.default_rng(3).normal(size=(4, 6, 8)).astype(np.float32)
MASK = np.broadcast_to(np.tril(np.ones((6, 6), bool)), (4, 1, 6, 6)).copy()
MASK[:, :, 2] = False  # a fully masked row
LABELS = np.arange(24).reshape(4, 6) % 5


@functools.cache
def lab(policy: str, door: str) -> tuple[Model, TrainStep, TrainState]:
    model = mpjax.wrap(NETS[door], policy)

    def loss_fn(params, mstate, batch, rng):
        logits, mstate = model.apply(params, mstate, batch["x"], batch["mask"], rng=rng, train=True)
        return mpjax.losses.softmax_cross_entropy(logits, batch["label"]).mean(), Aux(mstate)

    optimizer = optax.adam(0.01)
    state = TrainState.create(model, optimizer, KEY, TOKENS, MASK, ema_decay=0.5)
    return model, make_train_step(loss_fn, optimizer, donate=False), state


def lab_batch(x: np.ndarray = TOKENS) -> dict[str, np.ndarray]:
    return {"x": x, "mask": MASK, "label": LABELS}


@both_doors
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_fault_09_norms_softmax_masks_and_cross_entropy(policy, door):
    """Large activations, a −1e9 mask and a fully masked row: no NaN in loss or gradients, and the loss falls."""
    _, step, state = lab(policy, door)
    batch, losses = lab_batch(TOKENS * 100), []
    for _ in range(6):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        assert np.isfinite(losses[-1]) and np.isfinite(metrics["grad_norm"])
    assert int(state.step) == 6 and int(state.skipped) == 0 and losses[-1] < losses[0]


@both_doors
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_fault_09_norms_and_softmax_run_in_float32(policy, door):
    """Read off the jaxpr of the step: no exponential, square root or sum of a norm in half precision."""
    _, step, state = lab(policy, door)
    found = audit(step.pure, state, lab_batch())
    half = policy.removeprefix("mixed_")
    assert found.share(half) == 1.0
    forward = [op for kind in ("exp", "rsqrt", "log") for op in found.select(kind).ops]
    assert forward and {dtype for op in forward for dtype in op.operands} == {"float32"}


def test_fault_09_cross_entropy_of_bfloat16_logits():
    """A million classes: a bfloat16 sum of exponentials would stop at 256, and the loss would be log 256."""
    logits = jnp.zeros((1, 2**20), jnp.bfloat16)
    loss, gradient = jax.jit(jax.value_and_grad(lambda x: mpjax.losses.softmax_cross_entropy(x, jnp.array([3])).sum()))(
        logits
    )
    np.testing.assert_allclose(loss, np.log(2.0**20), rtol=4 * EPS32)
    assert loss.dtype == jnp.float32 and bool(jnp.isfinite(gradient).all()) and float(gradient[0, 3]) == -1.0


@both_doors
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_fault_10_batch_norm_statistics_are_float32_and_restored_by_a_skip(policy, door):
    _, step, state = lab(policy, door)
    after, _ = step(state, lab_batch())
    for tree in (state.mstate, after.mstate):
        assert {str(x.dtype) for x in jax.tree.leaves(tree["batch_stats"])} == {"float32"}
    assert held(after) != held(state) and fingerprint(after.mstate) != fingerprint(state.mstate)
    # Values that float32 holds and half precision does not: nothing rounded them on their way.
    means = np.asarray(after.mstate["batch_stats"][BATCH_MEANS[door]]["mean"])
    kept = np.asarray(jnp.asarray(means).astype(policy.removeprefix("mixed_")).astype(jnp.float32))
    assert (means != kept).any()
    bad = TOKENS.copy()
    bad[1, 2, 3] = np.nan
    skipped, metrics = step(after, lab_batch(bad))
    assert held(skipped) == held(after) and int(metrics["skipped"]) == 1


# ---- 11: one compile -------------------------------------------------------------------------------------------------

SPELLINGS = {
    "python": lambda x: x,
    "numpy scalar": np.float32,
    "numpy float64": np.float64,
    "weak": jnp.asarray,
    "strong": lambda x: jnp.asarray(x, jnp.float32),
    "0-d numpy": lambda x: np.asarray(x, np.float32),
}


def test_fault_11_one_compile_however_a_number_is_spelled():
    """Growth, skip, backoff and accumulation, from every spelling of scale and rate: one trace of the step, one program."""
    traces: list[int] = []
    once = 0

    def loss_fn(params, mstate, batch, rng):
        traces.append(len(traces))
        return mean_loss(params, mstate, batch, rng)

    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    step = make_train_step(loss_fn, optimizer, accumulate=2)
    for spell in SPELLINGS.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # jmp's constructor warns of a scale that is no float array
            scale = DynamicLossScale(spell(2.0**15), period=2, factor=2.0, min_loss_scale=2.0**-14)
        spelled = optax.inject_hyperparams(optax.adam)(learning_rate=jnp.asarray(spell(0.1)))
        state = TrainState.create(LINEAR, spelled, KEY, loss_scale=scale, ema_decay=0.5)
        scales = []
        for batch in ((X, Y), (X, Y), BAD, (X, Y), (X.tolist() and X, Y)):
            state, metrics = step(state, batch)
            scales.append(float(metrics["loss_scale"]))
        assert scales == [2.0**15, 2.0**15, 2.0**16, 2.0**15, 2.0**15] and int(state.step) == 4
        once = once or len(traces)
        assert step._jitted._cache_size() == 1 and len(traces) == once


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_fault_11_a_static_scale_is_one_value_however_it_is_spelled(spell):
    assert StaticLossScale(spell(1024.0)) == StaticLossScale(1024) == mpjax.static_loss_scale(2**10)
    assert hash(StaticLossScale(spell(1024.0))) == hash(StaticLossScale(1024))
    assert type(StaticLossScale(spell(1024.0)).loss_scale) is float


def test_fault_11_a_policy_is_one_static_argument_however_it_is_spelled():
    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def cast(policy, x):
        return policy.cast_to_compute(x)

    for policy in ("mixed_bfloat16", "p=f32,c=bf16,o=f32", " compute = bfloat16 , output=full"):
        cast(mpjax.get_policy(policy), X)
    cast(mpjax.Policy(np.float32, jnp.bfloat16, np.dtype("float32")), X)


# ---- 13, 15: refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("junk", "junk"),
        ("p=f32,c=bf17", "bf17"),
        ("x=f32", "'x'"),
        ("", "''"),
        ("p=f32;c=bf16", "f32;c"),
        ("int8", "int8"),
    ],
)
def test_fault_13_junk_policy_text(text, named):
    with pytest.raises(ValueError, match=rf"{named}.*(bf16.*f32|params, compute, output)") as caught:
        mpjax.get_policy(text)
    assert len(str(caught.value)) < 400  # a line, not a page


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, bool, object, "U3", None, jnp.uint8])
def test_fault_13_dtypes_that_are_no_floats(dtype):
    with pytest.raises(ValueError, match=r"f16, bf16, f32") as caught:
        mpjax.Policy(dtype, "float32", "float32")
    assert len(str(caught.value)) < 400


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("initial", x) for x in (-1.0, 0.0, NAN, INF, 1e39, 1e-50)),
        *(("growth_interval", x) for x in (0, -1, 1.5, NAN, INF)),
        *(("growth_factor", x) for x in (1.0, 0.5, -2.0, NAN, INF)),
        *(("backoff_factor", x) for x in (1.0, 2.0, 0.0, -0.5, NAN)),
        *(("floor", x) for x in (0.0, -1.0, NAN, INF, 2.0**16, 1e-50)),
        *(("ceiling", x) for x in (-1.0, NAN, INF, 2.0**-20)),
    ],
)
def test_fault_13_bad_scale_settings(name, value, unchecked):
    with pytest.raises(
        ValueError, match=r"loss scale: got (initial|growth|backoff|floor|ceiling).*; legal is "
    ) as caught:
        mpjax.dynamic_loss_scale(**{name: value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [-1.0, 0.0, NAN, INF, 1e39])
def test_fault_13_a_bad_static_scale(value):
    with pytest.raises(ValueError, match=r"loss scale: got scale=.*; legal is "):
        mpjax.static_loss_scale(value)


def test_fault_13_the_smallest_and_largest_legal_scales_work():
    """What the factory lets through stays finite and above zero through any number of skips and growths."""
    scale = mpjax.dynamic_loss_scale(1.0, floor=2.0**-126, ceiling=3e38, growth_interval=1, growth_factor=2.0**100)
    adjust = jax.jit(lambda s, finite: s.adjust(finite))
    grown = adjust(adjust(scale, True), True)
    assert float(grown.loss_scale) == float(np.float32(3e38))
    for _ in range(300):
        grown = adjust(grown, False)
    assert float(grown.loss_scale) == 2.0**-126


def stack(door, *widths):
    """Dense layers one after another, for X."""
    if door == "linen":
        return nn.Sequential([nn.Dense(width) for width in widths])
    sizes = list(zip((X.shape[-1], *widths), widths, strict=False))
    return lambda rngs: nnx.Sequential(*(nnx.Linear(*size, rngs=rngs) for size in sizes))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": np.ones(3)}, r"missing \['b'\]"),
        ({"w": np.ones(3), "b": 0.0, "c": 0.0}, r"extra \['c'\]"),
        ({"w": np.ones(4), "b": 0.0}, r"w has shape \(4,\), the model wants \(3,\)"),
    ],
)
def test_fault_15_params_that_do_not_fit(params, message):
    with pytest.raises(ValueError, match=message):
        TrainState.create(LINEAR, optax.sgd(0.1), KEY, params=params)


@both_doors
def test_fault_15_flax_params_that_do_not_fit_are_named_by_path(door):
    model = mpjax.wrap(stack(door, 2, 3), "mixed_bfloat16")
    params, _ = model.init(KEY, X)
    wrong = jax.tree.map(np.asarray, params)
    first, second = (wrong["layers_0"], wrong["layers_1"]) if door == "linen" else wrong["layers"].values()
    second["kernel"] = np.zeros((2, 4), np.float32)
    del first["bias"]
    with pytest.raises(ValueError, match=r"missing \['layers/0/bias'\]"):
        TrainState.create(model, optax.sgd(0.1), KEY, X, params=wrong)
    first["bias"] = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match=r"layers/1/kernel has shape \(2, 4\), the model wants \(2, 3\)"):
        TrainState.create(model, optax.sgd(0.1), KEY, X, params=wrong)


@pytest.mark.parametrize(
    ("batch", "accumulate", "message"),
    [
        ((X[:0], Y[:0]), 1, r"batch\[0\] has 0 rows"),
        ((X[:0], Y[:0]), 2, r"batch\[0\] has 0 rows"),
        ((X[:7], Y[:7]), 2, r"batch\[0\] has 7 rows, which accumulate=2 does not divide; use a batch of 6 rows"),
        ((X[:2], Y[:2]), 4, r"batch\[0\] has 2 rows, which accumulate=4 does not divide; use a batch of 4 rows"),
        ((X, Y[:4]), 2, r"leading axes differ, \{'0': 8, '1': 4\}"),
    ],
)
def test_fault_15_batches_that_do_not_fit_are_refused_before_compilation(batch, accumulate, message):
    """And before donation: the state is as alive as it was."""
    optimizer = optax.sgd(0.1)
    state = TrainState.create(LINEAR, optimizer, KEY)
    step = make_train_step(mean_loss, optimizer, accumulate=accumulate)
    for call in (step, step.lower, step.nonfinite_leaf):
        with pytest.raises(ValueError, match=message):
            call(state, batch)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


# ---- 16, 17: dtypes that are not ours --------------------------------------------------------------------------------


def test_fault_16_leaves_that_are_no_floats_are_untouched():
    """By every cast of a policy by identity; through a step in dtype and value."""
    tree = {
        "int": np.arange(3),
        "bool": np.array([True, False]),
        "key": jax.random.key(1),
        "complex": np.complex64(1 + 2j),
        "none": None,
        "str": "text",
        "python": (1, 2.5, True, 1j),
        "float0": np.zeros(2, jax.dtypes.float0),
    }
    policy = mpjax.get_policy("float16")
    for cast in (policy.cast_to_compute, policy.cast_to_param, policy.cast_to_output):
        found = cast(tree)
        assert jax.tree.structure(found) == jax.tree.structure(tree)
        assert all(a is b for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True))
        assert cast(jax.ShapeDtypeStruct((2,), jnp.float32)) == jax.ShapeDtypeStruct((2,), jnp.float16)

    held_back = {name: jnp.asarray(tree[name]) for name in ("int", "bool", "complex")} | {"key": tree["key"]}
    model = Model(lambda rng: ({"w": jnp.ones(3), "table": jnp.arange(4)}, {"cache": held_back}), lambda *a: a)
    optimizer = optax.adam(0.1)
    state = TrainState.create(model, optimizer, KEY, ema_decay=0.5)
    before = fingerprint((state.params["table"], state.mstate))

    def loss_fn(params, mstate, batch, rng):
        return (params["w"][None] * batch["x"]).sum() + params["table"].sum() * 0.0, Aux(mstate)

    step = make_train_step(loss_fn, optimizer, accumulate=2, clip_norm=1.0)
    for value in (1.0, np.nan, 1.0):
        state, _ = step(state, {"x": np.full((2, 3), value, np.float32), "label": np.arange(2)})
    assert fingerprint((state.params["table"], state.mstate)) == before
    assert int(state.step) == 2 and int(state.skipped) == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fault_17_x64_mode_makes_nothing_float64_by_itself(accumulate):
    """Not the state, the metrics or any array of the step, though the loss and its weight come as Python numbers."""
    with jax.enable_x64(True):
        optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
        model = Model(
            lambda rng: ({"w": jnp.zeros(3, jnp.float32)}, {"s": {"m": jnp.zeros(3, jnp.float32)}}), lambda *a: a
        )
        state = TrainState.create(model, optimizer, jax.random.key(0), loss_scale=dynamic(), ema_decay=0.5)

        def loss_fn(params, mstate, batch, rng):
            loss = jnp.square(batch @ params["w"] - 1).sum()
            return (loss, 4.0), Aux({"s": {"m": batch.mean(0)}}, {"n": 3.0, "m": np.float64(2)})

        step = make_train_step(loss_fn, optimizer, accumulate=accumulate, clip_norm=1.0)
        wide = [v.aval for e in equations(jax.make_jaxpr(step.pure)(state, X).jaxpr) for v in e.outvars]
        wide = [a for a in wide if getattr(a, "dtype", None) == np.float64 and (a.shape or not a.weak_type)]
        assert not wide
        for _ in range(2):
            state, metrics = step(state, X)
        assert "float64" not in {str(x.dtype) for x in jax.tree.leaves((state, metrics))}
        assert {str(x.dtype) for x in jax.tree.leaves((state.step, state.skipped, state.loss_scale.counter))} == {
            "int32"
        }
        assert step._jitted._cache_size() == 1


@both_doors
def test_fault_17_float64_is_where_the_policy_says_so(door):
    with jax.enable_x64(True):
        model = mpjax.wrap(stack(door, 4, 2), {"layers/1": "compute=float64"})
        state = TrainState.create(model, optax.sgd(0.1), jax.random.key(0), X)
        found = audit(jax.grad(lambda p: model.apply(p, {}, X)[0].sum()), state.params).select("dot").ops
        dtypes = {
            path: {d for op in found if op.path == path for d in op.operands} for path in ("layers/0", "layers/1")
        }
        assert dtypes == {"layers/0": {"bfloat16"}, "layers/1": {"float64"}}
        assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"float32"}
        wide = mpjax.wrap(DENSE[door], "float64")
        state = TrainState.create(wide, optax.sgd(0.1), jax.random.key(0), X.astype(np.float64), ema_decay=0.5)
        step = make_train_step(lambda p, m, x, rng: jnp.square(wide.apply(p, m, x)[0]).mean(), optax.sgd(0.1))
        state, metrics = step(state, X.astype(np.float64))
        assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"float64"} and metrics[
            "loss"
        ].dtype == jnp.float64
        assert {str(x.dtype) for x in jax.tree.leaves(state.ema)} == {"float32"}


# ---- 19: an endless NaN feed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("skips", [1, 7])
def test_fault_19_an_endless_nan_feed_ends_in_an_error(skips):
    """It names the step, the scale and the first bad gradient leaf; the params are those of the last good step."""
    from mpjax.train.hooks import Hook, NonFiniteError
    from mpjax.train.loop import fit

    class Last(Hook):
        result: Any = None

        def on_end(self, result):
            self.result = result

    optimizer = optax.adam(0.1)
    state = TrainState.create(LINEAR, optimizer, KEY, loss_scale=dynamic(), ema_decay=0.5)
    step, last = make_train_step(mean_loss, optimizer), Last()
    with pytest.raises(NonFiniteError, match=r"at step 3, loss scale .*first non-finite gradient leaf: b") as caught:
        fit(step, state, lambda n: (X, Y) if n < 3 else BAD, attempts=1000, max_consecutive_skips=skips, hooks=[last])
    assert f"{skips} " in str(caught.value) and f"{2.0 ** (15 - skips + 1):g}" in str(caught.value)
    assert len(last.result.history) == 3 + skips
    good = TrainState.create(LINEAR, optimizer, KEY, loss_scale=dynamic(), ema_decay=0.5)
    for _ in range(3):
        good, _ = step(good, (X, Y))
    assert held(last.result.state) == held(good)


def test_fault_19_fifty_skips_by_default_and_a_good_step_starts_the_count_anew():
    from mpjax.train.hooks import NonFiniteError
    from mpjax.train.loop import fit

    optimizer = optax.sgd(0.1)
    step = make_train_step(mean_loss, optimizer)
    state = TrainState.create(LINEAR, optimizer, KEY, loss_scale=dynamic())
    result = fit(step, state, lambda n: (X, Y) if n in (0, 50) else BAD, attempts=100)
    assert int(result.state.step) == 2 and int(result.state.skipped) == 98  # 49 in a row, twice
    with pytest.raises(NonFiniteError, match="50 steps in a row"):
        fit(step, result.state, lambda n: BAD, attempts=1000)


# ---- 21: donation ----------------------------------------------------------------------------------------------------


def pointers(tree: Any) -> list[int]:
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]
    return [x.unsafe_buffer_pointer() for x in leaves]


def normed(door):
    """An instance: layers round a BatchNorm."""
    if door == "linen":
        return nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False), nn.Dense(1)])
    rngs = nnx.Rngs(0)
    width = X.shape[-1]
    return nnx.Sequential(nnx.Linear(width, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs))


def identity(module):
    """All that a module is: what it prints, the very objects it is made of, their classes and attributes, and its bytes."""
    if isinstance(module, nn.Module):
        return repr(module)
    nodes = [
        (path, id(node), type(node), sorted(vars(node)))
        for path, node in nnx.iter_graph(module)
        if hasattr(node, "__dict__")
    ]
    arrays = [(id(x.get_raw_value()), fingerprint(x.get_raw_value())) for _, x in nnx.to_flat_state(nnx.state(module))]
    return nodes, arrays


@both_doors
def test_fault_21_donation_changes_no_number_and_frees_nothing_of_the_callers(door):
    """Ten donated steps against ten that keep: same bytes. Params, mstate, key and module that were passed in stay whole."""
    module = normed(door)
    module_before = identity(module)
    model = mpjax.wrap(module, "mixed_bfloat16")
    params, mstate = model.init(KEY, X)
    sample, key, scale = jnp.asarray(X), jax.random.key(9), dynamic(2.0**4)
    before = fingerprint((params, mstate, sample, key, scale))
    optimizer = optax.adam(0.05)

    def loss_fn(params, mstate, batch, rng):
        y, mstate = model.apply(params, mstate, batch[0])
        return jnp.square(y[:, 0] - batch[1]).mean(), Aux(mstate)

    def created():
        with silenced():
            return TrainState.create(
                model, optimizer, key, sample, params=params, mstate=mstate, loss_scale=scale, ema_decay=0.9,
                trainable=["layers/0", "layers/2"],
            )  # fmt: skip

    ends = {}
    for donate in (True, False):
        state, step = created(), make_train_step(loss_fn, optimizer, accumulate=2, donate=donate)
        for n in range(10):
            first, (state, metrics) = state, step(state, (X, Y) if n != 4 else BAD)
            assert first.step.is_deleted() is donate
            owned = pointers((state, metrics))
            # EMA, params, optimizer state and metrics are each memory of their own.
            assert not donate or len(set(owned)) == len(owned)
        ends[donate] = fingerprint((state, metrics))
        assert int(state.step) == 9 and int(state.skipped) == 1
    assert ends[True] == ends[False]
    assert fingerprint((params, mstate, sample, key, scale)) == before
    assert identity(module) == module_before
    model.apply(params, mstate, sample)  # still alive


def test_fault_21_a_use_of_the_donated_state_is_a_clear_error(tmp_path):
    optimizer = optax.sgd(0.1)
    state, step = TrainState.create(LINEAR, optimizer, KEY), make_train_step(mean_loss, optimizer)
    step(state, (X, Y))
    for use in (
        lambda: step(state, (X, Y)),
        lambda: mpjax.fit(step, state, lambda n: (X, Y), attempts=2),  # a notebook's cell, run again
        lambda: mpjax.evaluate(mpjax.make_eval_step(lambda p, m, batch: {"n": p["b"].sum()}), state, [(X, Y)]),
        lambda: mpjax.shard_state(state, jax.make_mesh((1,), ("data",))),
        lambda: mpjax.time_step(step, state, (X, Y)),
        lambda: mpjax.Checkpointer(tmp_path / "run").save(state),
    ):
        with pytest.raises(
            ValueError, match=r"this TrainState was donated to an earlier step and is gone.*donate=False"
        ):
            use()


# ---- 34: no host sync ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", ["nonfinite", "off"])
def test_fault_34_the_jaxpr_of_a_step_holds_no_callback(skip):
    optimizer = optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.01, 10))
    scale = dynamic() if skip == "nonfinite" else NoOpLossScale()
    state = TrainState.create(LINEAR, optimizer, KEY, loss_scale=scale, ema_decay=0.5)
    step = make_train_step(mean_loss, optimizer, accumulate=2, clip_norm=1.0, skip=skip)
    names = {e.primitive.name for e in equations(jax.make_jaxpr(step.pure)(state, (X, Y)).jaxpr)}
    assert "scan" in names and not [
        n for n in names if "callback" in n or "infeed" in n or "outfeed" in n or "debug" in n
    ]
    assert "custom_call" not in step.lower(state, (X, Y)).as_text()


class HostSyncError(AssertionError):
    """Something asked the device for a value."""


@contextlib.contextmanager
def no_host_reads(monkeypatch: pytest.MonkeyPatch, allowed: set[int] | None = None):
    """Every way from a jax array to the host raises, but for arrays whose `id` is allowed.

    `jax.transfer_guard` sees none of these on a CPU. numpy reads a CPU array through the buffer protocol, past every
    method, so numpy's own entrances are guarded too.
    """
    cls, allowed = type(jnp.zeros(())), set() if allowed is None else allowed
    methods = (
        "__array__", "__bool__", "__complex__", "__dlpack__", "__float__", "__format__", "__index__", "__int__", "__iter__",
        "__repr__", "__str__", "__buffer__", "_value", "block_until_ready", "copy_to_host_async", "item", "tobytes",
        "tolist", "__reduce__", "__deepcopy__",
    )  # fmt: skip

    def guarded(name: str, original: Any) -> Any:
        def method(self, *args, **kwargs):
            if id(self) not in allowed:
                raise HostSyncError(f"{name} of {self.aval}")
            return original.__get__(self, cls)(*args, **kwargs) if name != "_value" else original.__get__(self, cls)

        return property(method) if name == "_value" else method

    def entrance(name: str, original: Any) -> Any:
        def function(x, *args, **kwargs):
            if any(isinstance(leaf, cls) and id(leaf) not in allowed for leaf in jax.tree.leaves(x)):
                raise HostSyncError(f"np.{name}")
            return original(x, *args, **kwargs)

        return function

    with monkeypatch.context() as patch:
        for name in methods:
            if hasattr(cls, name):
                patch.setattr(cls, name, guarded(name, getattr(cls, name)))
        for name in ("asarray", "array", "asanyarray", "copy", "isfinite", "isnan"):
            patch.setattr(np, name, entrance(name, getattr(np, name)))
        yield


READS = {
    "float": float,
    "bool": bool,
    "int": int,
    "item": lambda x: x.item(),
    "np.asarray": lambda x: np.asarray(x),
    "device_get": jax.device_get,
    "format": lambda x: f"{x:.3f}",
    "str": str,
    "if": lambda x: 1 if x > 0 else 0,
    "block": jax.block_until_ready,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_fault_34_the_guard_itself_sees_every_kind_of_read(read, monkeypatch):
    x = jax.jit(lambda x: x + 1)(np.float32(1))
    with no_host_reads(monkeypatch), pytest.raises(HostSyncError):
        read(x)
    with no_host_reads(monkeypatch, allowed={id(x)}):
        float(x)
    read(x)


def test_fault_34_no_array_is_read_between_dispatches(monkeypatch):
    """Good steps, a skipped one, growth: the host dispatches them all without asking for a single value."""
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    state = TrainState.create(LINEAR, optimizer, KEY, loss_scale=dynamic(growth_interval=2), ema_decay=0.5)
    step = make_train_step(mean_loss, optimizer, accumulate=2, clip_norm=1.0)
    state, _ = step(state, (X, Y))
    seen = []
    with no_host_reads(monkeypatch):
        for n in range(8):
            state, metrics = step(state, (X, Y) if n != 3 else BAD)
            seen.append(metrics)
    assert [int(m["skipped"]) for m in seen] == [0, 0, 0, 1, 1, 1, 1, 1] and int(state.step) == 8


def test_fault_34_fit_reads_only_what_was_dispatched_before(monkeypatch):
    """While step n is on its way, the loop and its hooks see the metrics of n − 1 at most, and no part of the state."""
    from mpjax.train.hooks import Hook
    from mpjax.train.loop import fit

    optimizer = optax.adam(0.1)
    state = TrainState.create(LINEAR, optimizer, KEY, loss_scale=dynamic(growth_interval=2))
    inner = make_train_step(mean_loss, optimizer)
    allowed: set[int] = set()
    kept, reads, guard = [], [], contextlib.ExitStack()

    def step(state, batch):
        after, metrics = inner(state, batch)
        allowed.update(id(x) for x in (kept[-1].values() if kept else ()))  # of the attempt before
        kept.append(metrics)
        if len(kept) == 2:  # the first attempt compiles, and the clock waits for it
            guard.enter_context(no_host_reads(monkeypatch, allowed))
        if len(kept) == 12:  # behind the last dispatch anything may be read
            guard.close()
        return after, metrics

    class Reader(Hook):
        def on_step(self, attempt, metrics):
            reads.append((attempt, len(kept), metrics["loss"]))

    with guard:
        result = fit(step, state, lambda n: (X, Y) if n != 5 else BAD, attempts=12, hooks=[Reader()])
    assert [(attempt, dispatched) for attempt, dispatched, _ in reads] == [*((n, n + 2) for n in range(11)), (11, 12)]
    assert int(result.state.skipped) == 1 and len(result.history) == 12


@pytest.mark.gpu
def test_fault_34_the_transfer_guard_sees_nothing_either():
    optimizer = optax.adam(0.1)
    state = TrainState.create(LINEAR, optimizer, KEY, loss_scale=dynamic(growth_interval=2))
    step, batch = make_train_step(mean_loss, optimizer, accumulate=2), jax.device_put((X, Y))
    state, _ = step(state, batch)
    with jax.transfer_guard("disallow"):
        for _ in range(5):
            state, metrics = step(state, batch)
    assert int(state.step) == 6 and np.isfinite(metrics["loss"])
