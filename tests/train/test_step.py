"""The step, decision by decision: its order, its arithmetic against float64 by hand, what it skips, what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax
from mpjax.core.model import SINKS, Model
from mpjax.numerics.loss_scale import DynamicLossScale, NoOpLossScale, StaticLossScale
from mpjax.train.state import Aux, TrainState
from mpjax.train.step import RESERVED, make_train_step
from tests.train.toys import equations, fingerprint, held, linear_model, recording

KEY = jax.random.key(11)
EPS = float(np.finfo(np.float32).eps)
LINEAR = linear_model()
RNG = np.random.default_rng(1)
X, Y = RNG.normal(size=(8, 3)).astype(np.float32), RNG.normal(size=8).astype(np.float32)
START = {"w": np.array([0.5, -1.0, 2.0], np.float32), "b": np.float32(0.25)}
standard = functools.partial(jax.numpy_dtype_promotion, "standard")


@pytest.fixture(autouse=True)
def strict_promotion():
    """The step's own code, with optimizers that allow it; `standard()` goes around those that do not (adam)."""
    with jax.numpy_dtype_promotion("strict"):
        yield


def mean_loss(params, mstate, batch, rng):
    x, y = batch
    return jnp.square(LINEAR.apply(params, mstate, x)[0] - y).mean()


def masked_loss(params, mstate, batch, rng):
    x, y, mask = batch
    errors = jnp.square(LINEAR.apply(params, mstate, x)[0] - y)
    hits = (errors < 1).astype(jnp.float32)
    metrics = {"hits": (hits * mask).sum() / jnp.maximum(mask.sum(), 1)}
    return ((errors * mask).sum(), mask.sum()), Aux(mstate, metrics)


def created(optimizer, model=LINEAR, params=START, **options):
    return TrainState.create(model, optimizer, KEY, params=params, **options)


def slopes(params, x=X, y=Y, mask=None):
    """Loss and gradients of `mean_loss` (or `masked_loss`) in float64, by hand."""
    w, b, x, y = (np.asarray(a, np.float64) for a in (params["w"], params["b"], x, y))
    m = np.ones(len(y)) if mask is None else np.asarray(mask, np.float64)
    r = x @ w + b - y
    return (m * r**2).sum() / m.sum(), {"w": 2 * (m * r) @ x / m.sum(), "b": 2 * (m * r).sum() / m.sum()}


def dynamic(scale=2.0**10, **options):
    return mpjax.dynamic_loss_scale(scale, **options)


SGD = optax.sgd(0.1)


@functools.cache
def step_of(loss_fn, optimizer=SGD, **options):
    """Compiled once for all tests that ask for the same; it keeps its arguments."""
    return make_train_step(loss_fn, optimizer, donate=False, **options)


# ---- the order -------------------------------------------------------------------------------------------------------


def test_the_order_of_a_step_stands_in_its_jaxpr():
    """scan(× scale, gradient, float32 sums) → ÷ scale → norm → clip → update → select; the scale is adjusted last."""
    optimizer = optax.sgd(0.1)
    state = created(optimizer, loss_scale=dynamic())
    step = make_train_step(mean_loss, optimizer, accumulate=2, clip_norm=1.0)
    jaxpr = jax.make_jaxpr(step.pure)(state, (X, Y)).jaxpr
    scale = jaxpr.invars[list(fingerprint(state)).index("loss_scale/loss_scale")]
    names = [e.primitive.name for e in jaxpr.eqns]

    def where(name, *, uses=None):
        return [
            i
            for i, e in enumerate(jaxpr.eqns)
            if e.primitive.name == name and (uses is None or any(v is uses for v in e.invars))
        ]

    (scan,), (norm,) = where("scan"), where("sqrt")
    unscale, select = where("div", uses=scale), where("select_n")
    update = [i for params in jaxpr.invars[3:5] for i in where("add", uses=params)]
    clip = next(i for i in where("div") if i > norm)
    assert len(unscale) == len(update) == len(select) == 2  # once for each leaf, not once for each micro-batch
    assert scan < min(unscale) <= max(unscale) < norm < clip < min(update) <= max(update) < min(select)
    assert min(where("mul", uses=scale)) > max(select)  # growth and backoff
    body = jaxpr.eqns[scan].params["jaxpr"].jaxpr.eqns
    assert "div" not in [e.primitive.name for e in body if len(e.outvars[0].aval.shape) == 1]
    assert "scan" not in names[scan + 1 :]


@pytest.mark.parametrize(("param_dtype", "clip"), [("float32", 2.5), ("bfloat16", 2.5), ("float16", None)])
def test_the_optimizer_sees_unscaled_clipped_float32(param_dtype, clip):
    """Exact: whole numbers, a scale and a norm that are powers of two. Under accumulation it is called once."""
    model = linear_model(dtype=param_dtype)
    optimizer = recording(optax.sgd(0.5))
    with pytest.warns(mpjax.VanishingUpdateWarning) if param_dtype != "float32" else contextlib.nullcontext():
        state = created(optimizer, model, {"w": np.zeros(3), "b": 1}, loss_scale=dynamic())
    batch = np.array([[2, 0, 0], [4, 0, 0], [0, 0, 0], [6, 0, 0]], np.float32)

    def loss_fn(params, mstate, batch, rng):  # its gradient: the mean row (3, 0, 0), and 4
        return model.apply(params, mstate, batch)[0].mean() + 3 * params["b"].astype(jnp.float32)

    after, metrics = make_train_step(loss_fn, optimizer, accumulate=2, clip_norm=clip)(state, batch)
    seen, shrink = after.opt_state[0], 0.5 if clip else 1.0
    assert {str(x.dtype) for x in jax.tree.leaves((seen.grads, seen.params))} == {"float32"}
    assert seen.grads["w"].tolist() == [shrink * 3, 0.0, 0.0] and float(seen.grads["b"]) == shrink * 4
    assert seen.params["w"].tolist() == [0.0] * 3 and float(seen.params["b"]) == 1.0
    assert int(seen.calls) == 1 and float(metrics["loss_scale"]) == 2.0**10
    assert float(metrics["grad_norm"]) == 5.0  # of the whole tree, before it is clipped
    assert {str(x.dtype) for x in jax.tree.leaves(after.params)} == {param_dtype}


def test_clipping_leaves_a_small_gradient_alone_to_the_bit():
    plain, metrics = step_of(mean_loss)(created(SGD), (X, Y))
    clipped, _ = make_train_step(mean_loss, SGD, clip_norm=1.5 * float(metrics["grad_norm"]))(created(SGD), (X, Y))
    assert fingerprint(clipped) == fingerprint(plain)


def test_an_infinite_norm_to_clip_to_clips_nothing():
    plain, _ = step_of(mean_loss)(created(SGD), (X, Y))
    clipped, _ = make_train_step(mean_loss, SGD, clip_norm=float("inf"))(created(SGD), (X, Y))
    assert fingerprint(clipped) == fingerprint(plain)


# ---- the arithmetic --------------------------------------------------------------------------------------------------


RECORDING = recording(optax.sgd(0.5))


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_equals_the_whole_batch_exactly_on_whole_numbers(accumulate):
    """Sums of small integers and divisions by powers of two round nowhere, so every bit must agree."""
    params = {"w": np.array([1.0, -2.0, 3.0]), "b": 1.0}
    batch = (RNG.integers(-3, 4, (8, 3)).astype(np.float32), RNG.integers(-3, 4, 8).astype(np.float32))
    state = created(RECORDING, params=params, loss_scale=dynamic(), ema_decay=0.5)
    whole = step_of(mean_loss, RECORDING)(state, batch)
    parts = step_of(mean_loss, RECORDING, accumulate=accumulate)(state, batch)
    assert fingerprint(parts) == fingerprint(whole)


def test_ragged_micro_batches_weigh_what_they_weigh():
    """Weights 3, 0, 1 and 0: loss, gradients and metrics are those of the whole batch in float64."""
    mask = np.array([1, 0, 1, 0, 2, 0, 0, 0], np.float32)
    after, metrics = step_of(masked_loss, RECORDING, accumulate=4)(created(RECORDING), (X, Y, mask))
    loss, grads = slopes(START, mask=mask)
    # Under 12 roundings to float32 in each sum, of numbers under 32.
    tolerance = {"rtol": 32 * EPS, "atol": 12 * 32 * EPS}
    np.testing.assert_allclose(metrics["loss"], loss, **tolerance)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt((grads["w"] ** 2).sum() + grads["b"] ** 2), **tolerance)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), after.opt_state[0].grads, grads)
    r = X.astype(np.float64) @ START["w"].astype(np.float64) + 0.25 - Y
    np.testing.assert_allclose(metrics["hits"], (mask * (r**2 < 1)).sum() / mask.sum(), **tolerance)


def test_five_steps_of_adam_equal_float64_by_hand():
    """Everything at once: four micro-batches, weights, a dynamic scale that grows, clipping, decay, a moving average."""
    rate, decay, limit, mean = 0.05, 0.1, 1.0, 0.75
    optimizer = optax.adamw(rate, weight_decay=decay)
    mask = np.array([1, 1, 0, 1, 1, 0, 1, 1], np.float32)
    with standard():
        scale = dynamic(2.0**12, growth_interval=2)
        state = created(optimizer, loss_scale=scale, ema_decay=mean)
        step = make_train_step(masked_loss, optimizer, accumulate=4, clip_norm=limit)
        p = {name: np.asarray(x, np.float64) for name, x in START.items()}
        ema, m, v = dict(p), {"w": 0.0, "b": 0.0}, {"w": 0.0, "b": 0.0}
        for t in range(1, 6):
            _, g = slopes(p, mask=mask)
            norm = np.sqrt((g["w"] ** 2).sum() + g["b"] ** 2)
            assert norm > limit  # the clip has work to do
            for name in p:
                gradient = g[name] * limit / norm
                m[name] = 0.9 * m[name] + 0.1 * gradient
                v[name] = 0.999 * v[name] + 0.001 * gradient**2
                step_ = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.999**t)) + 1e-8)
                p[name] = p[name] - rate * (step_ + decay * p[name])
                ema[name] = mean * ema[name] + (1 - mean) * p[name]
            state, metrics = step(state, (X, Y, mask))
            np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=64 * EPS)
    # Adam divides by the root of a mean square, so an error of 64 ulp in a gradient stays one in its update.
    for ours, theirs in ((state.params, p), (state.ema, ema), (state.opt_state[0].mu, m)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=128 * EPS, atol=128 * EPS), ours, theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=256 * EPS), state.opt_state[0].nu, v)
    assert int(state.step) == int(state.opt_state[0].count) == 5 and float(metrics["loss_scale"]) == 2.0**14


def test_low_precision_params_are_updated_in_float32_and_then_rounded():
    """bfloat16(float32(p) − rate · g), to the bit: not a sum in bfloat16, and no rounded gradient."""
    model = linear_model(dtype=jnp.bfloat16)
    optimizer = optax.sgd(0.25)
    with pytest.warns(mpjax.VanishingUpdateWarning):
        state = created(optimizer, model, ema_decay=0.5)
    row = np.array([1 + 2**-7, 3.0, -(2.0**-9)], np.float32)  # exact in bfloat16

    def loss_fn(params, mstate, batch, rng):
        return model.apply(params, mstate, batch)[0].mean()

    after, _ = make_train_step(loss_fn, optimizer, donate=False)(state, np.stack([row, row]))
    wide = START["w"] - np.float32(0.25) * row
    expected = np.asarray(jnp.asarray(wide).astype(jnp.bfloat16))
    assert np.asarray(after.params["w"]).tobytes() == expected.tobytes()
    average = np.float32(0.5) * START["w"] + np.float32(0.5) * expected.astype(np.float32)
    assert after.ema["w"].dtype == jnp.float32 and np.asarray(after.ema["w"]).tobytes() == average.tobytes()


def test_the_moving_average_keeps_what_bfloat16_would_lose():
    """300 steps of decay 0.999 towards a weight that is one ulp of bfloat16 away."""
    model = linear_model(1, jnp.bfloat16)
    optimizer = optax.sgd(1.0)
    with pytest.warns(mpjax.VanishingUpdateWarning):
        state = created(optimizer, model, {"w": np.ones(1), "b": 0}, ema_decay=0.999)
    state = dataclasses.replace(state, params=jax.tree.map(lambda x: x + jnp.bfloat16(2.0**-7), state.params))
    step = make_train_step(lambda params, mstate, batch, rng: params["w"].sum() * 0, optimizer)
    state, _ = jax.lax.scan(lambda s, _: (step.pure(s, None)[0], None), state, length=300)
    # Each step rounds once, by at most half an ulp of 1: 300 · 2⁻²⁴.
    np.testing.assert_allclose(state.ema["w"], 1 + 2.0**-7 * (1 - 0.999**300), rtol=0, atol=300 * EPS)
    assert int(state.step) == 300


def test_a_schedule_counts_applied_steps_only():
    """`step` indexes schedules: a skipped step takes nothing from a warm-up."""
    optimizer = optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.0, 1.0, 4))
    state, step = created(optimizer), make_train_step(mean_loss, optimizer)
    bad = (np.full_like(X, np.nan), Y)
    rates = []
    for batch in ((X, Y), bad, (X, Y), bad, bad, (X, Y)):
        state, metrics = step(state, batch)
        rates.append((float(metrics["learning_rate"]), int(metrics["skipped"]), int(metrics["skipped_in_a_row"])))
    assert rates == [(0.0, 0, 0), (0.0, 1, 1), (0.25, 1, 0), (0.25, 2, 1), (0.25, 3, 2), (0.5, 3, 0)]
    assert int(state.step) == int(state.opt_state.count) == 3 and int(state.attempt) == 6


# ---- what a step reports ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accumulate", "scale"), [(1, StaticLossScale(8.0)), (2, dynamic(8.0)), (2, NoOpLossScale())], ids=repr
)
def test_metrics_have_fixed_names_and_dtypes(accumulate, scale):
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    step = make_train_step(masked_loss, optimizer, accumulate=accumulate)
    _after, metrics = step(created(optimizer, loss_scale=scale), (X, Y, np.ones(8, np.float32)))
    assert {name: str(x.dtype) for name, x in metrics.items()} == {
        "loss": "float32",
        "grad_norm": "float32",
        "grads_finite": "bool",
        "loss_scale": "float32",
        "skipped": "int32",
        "skipped_in_a_row": "int32",
        "learning_rate": "float32",
        "hits": "float32",
    }
    assert {x.shape for x in metrics.values()} == {()} and not any(x.weak_type for x in metrics.values())
    assert float(metrics["loss_scale"]) == (1.0 if isinstance(scale, NoOpLossScale) else 8.0)
    assert float(metrics["learning_rate"]) == 0.5 and bool(metrics["grads_finite"])
    assert set(metrics) - {"hits"} <= set(RESERVED)
    np.testing.assert_allclose(metrics["loss"], slopes(START)[0], rtol=32 * EPS)  # unscaled


def test_two_rates_are_not_reported_as_one():
    groups = {"w": optax.inject_hyperparams(optax.sgd)(0.1), "b": optax.inject_hyperparams(optax.sgd)(0.2)}
    optimizer = optax.partition(groups, {"w": "w", "b": "b"})
    after, metrics = make_train_step(mean_loss, optimizer)(created(optimizer), (X, Y))
    assert "learning_rate" not in metrics and int(after.step) == 1


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [(optax.sgd(0.5, momentum=0.9), None), (optax.inject_hyperparams(optax.sgd)(0.5, momentum=0.9), 0.5)],
)
def test_a_param_named_learning_rate_is_none(optimizer, told):
    """Its moment has the name, too."""
    model = mpjax.Model(lambda key: ({"learning_rate": jnp.ones(())}, {}), print)
    state = TrainState.create(model, optimizer, jax.random.key(0))
    step = make_train_step(lambda params, mstate, batch, rng: params["learning_rate"] * batch.mean(), optimizer)
    assert step(state, jnp.ones(4))[1].get("learning_rate") == told


def test_metrics_stay_readable_after_their_state_was_donated():
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    state, step = created(optimizer, loss_scale=dynamic()), make_train_step(mean_loss, optimizer)
    seen = []
    for _ in range(4):
        state, metrics = step(state, (X, Y))
        seen.append(metrics)
    assert [int(m["skipped"]) for m in seen] == [0] * 4 and [float(m["learning_rate"]) for m in seen] == [0.5] * 4
    assert [float(m["loss_scale"]) for m in seen] == [2.0**10] * 4


# ---- rng, attempt, mstate --------------------------------------------------------------------------------------------


def drawing(params, mstate, batch, rng):
    """Reports what it drew; skipped where the batch is not finite."""
    log, n = mstate["drawn"]["log"], mstate["drawn"]["n"]
    draw = jax.random.uniform(rng)
    new = {"drawn": {"log": log.at[n % 4].set(draw), "n": n + 1}}
    return (params["w"] * batch.sum()).sum(), Aux(new, {"draw": draw})


DRAWING = Model(
    lambda rng: ({"w": jnp.ones(3), "b": jnp.zeros(())}, {"drawn": {"log": jnp.zeros(4), "n": jnp.int32(0)}}),
    lambda *a: a,
)


def test_every_attempt_draws_anew_a_skipped_one_too():
    """A step that is skipped is not repeated with the same noise and the same data: `attempt` moves, `step` does not."""
    state, step = created(SGD, DRAWING, None), make_train_step(drawing, SGD)
    expected = [float(jax.random.uniform(jax.random.fold_in(state.rng, attempt))) for attempt in range(4)]
    key, drawn, attempts = jax.random.key_data(state.rng).tolist(), [], []
    for x in (1.0, np.nan, np.inf, 1.0):
        attempts.append(int(state.attempt))
        state, metrics = step(state, np.full(4, x, np.float32))
        drawn.append(float(metrics["draw"]))
    assert drawn == expected and len(set(drawn)) == 4 and attempts == [0, 1, 2, 3]
    assert int(state.step) == 2 and jax.random.key_data(state.rng).tolist() == key


def test_every_micro_batch_draws_anew_and_mstate_runs_through_them_in_order():
    state, step = created(SGD, DRAWING, None), make_train_step(drawing, SGD, accumulate=4)
    attempt = jax.random.fold_in(state.rng, 0)
    expected = [float(jax.random.uniform(jax.random.fold_in(attempt, i))) for i in range(4)]
    state, metrics = step(state, np.ones(4, np.float32))
    assert state.mstate["drawn"]["log"].tolist() == expected and int(state.mstate["drawn"]["n"]) == 4
    np.testing.assert_allclose(metrics["draw"], np.mean(expected), rtol=4 * EPS)
    kept = fingerprint(state.mstate)
    state, _ = step(state, np.array([1, 1, np.nan, 1], np.float32))
    assert fingerprint(state.mstate) == kept and int(state.skipped) == 1


def test_mstate_is_stored_in_the_dtypes_it_came_in():
    """A model that hands back bfloat16 statistics, or a weak number, does not change what is compiled next."""
    model = Model(lambda rng: ({"w": jnp.ones(3)}, {"s": {"mean": jnp.zeros(3), "n": jnp.int32(0)}}), lambda *a: a)

    def loss_fn(params, mstate, batch, rng):
        new = {"s": {"mean": batch.mean(0).astype(jnp.bfloat16), "n": 7}}
        return (params["w"] * batch.mean(0)).sum(), Aux(new)

    optimizer = optax.sgd(0.1)
    state, step = created(optimizer, model, None), make_train_step(loss_fn, optimizer)
    for _ in range(3):
        state, _ = step(state, X)
    stats = state.mstate["s"]
    assert stats["mean"].dtype == jnp.float32 and stats["n"].dtype == jnp.int32 and int(stats["n"]) == 7
    assert step._jitted._cache_size() == 1


# ---- skip ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_without_weight_is_a_skip_that_leaves_the_scale_alone(accumulate):
    """No data says nothing about the scale: it neither shrinks, nor does the wait for growth go on."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    scale = DynamicLossScale(jnp.float32(2.0**10), jnp.int32(3), period=5)
    step = make_train_step(masked_loss, optimizer, accumulate=accumulate, donate=False)
    state, _ = step(created(optimizer, loss_scale=scale, ema_decay=0.5), (X, Y, np.ones(8, np.float32)))
    assert int(state.loss_scale.counter) == 4
    after, metrics = step(state, (X, Y, np.zeros(8, np.float32)))
    assert held(after) == held(state) and fingerprint(after.loss_scale) == fingerprint(state.loss_scale)
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (1, 1, 1)
    assert float(metrics["grad_norm"]) == 0.0 and bool(metrics["grads_finite"])
    again, _ = step(after, (X, Y, np.ones(8, np.float32)))
    assert int(again.step) == 2 and int(again.skipped_in_a_row) == 0 and float(again.loss_scale.loss_scale) == 2.0**11


def test_skip_off_applies_whatever_comes_and_pays_for_no_select():
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = make_train_step(mean_loss, optimizer, skip="off", donate=False)
    state = created(optimizer, ema_decay=0.5)
    for one, selects in ((step, False), (make_train_step(mean_loss, optimizer), True)):
        found = equations(jax.make_jaxpr(one.pure)(state, (X, Y)).jaxpr)
        assert ("select_n" in [e.primitive.name for e in found]) is selects
    after, metrics = step(state, (np.full_like(X, np.nan), Y))
    assert np.isnan(after.params["w"]).all() and (int(after.step), int(after.skipped)) == (1, 0)
    assert not bool(metrics["grads_finite"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_skip_off_is_not_poisoned_by_a_batch_without_weight(accumulate):
    state = created(SGD)
    after, _ = step_of(masked_loss, accumulate=accumulate, skip="off")(state, (X, Y, np.zeros(8, np.float32)))
    assert fingerprint(after.params) == fingerprint(state.params)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_skip_gradients_skips_what_the_default_skips_for_its_gradients(bad):
    """The same bytes after a good batch, a bad one and a good one, the dynamic scale among them."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    states = []
    for skip in ("nonfinite", "gradients"):
        step = make_train_step(mean_loss, optimizer, skip=skip, donate=False)
        state = created(optimizer, loss_scale=dynamic(), ema_decay=0.5)
        state, _ = step(state, (X, Y))
        skipped, metrics = step(state, (np.full_like(X, bad), Y))
        assert held(skipped) == held(state) and int(metrics["skipped"]) == 1 and not bool(metrics["grads_finite"])
        states.append(step(skipped, (X, Y))[0])
    assert fingerprint(states[0]) == fingerprint(states[1])


def test_skip_gradients_believes_the_optimizer_and_reads_no_new_param():
    optimizer = optax.chain(optax.sgd(0.1), optax.scale(jnp.inf))
    state = created(optimizer)
    for skip, looked_at, applied in (("nonfinite", True, 0), ("gradients", False, 1)):
        step = make_train_step(mean_loss, optimizer, skip=skip, donate=False)
        found = equations(jax.make_jaxpr(step.pure)(state, (X, Y)).jaxpr)
        tested = [e.invars[0].aval.shape for e in found if e.primitive.name == "is_finite"]
        assert (START["w"].shape in tested) is looked_at and () in tested  # the scalars: loss and norm
        after, _ = step(state, (X, Y))
        assert int(after.step) == applied and bool(np.isfinite(after.params["w"]).all()) is not bool(applied)


def test_skip_off_and_a_static_scale_go_together():
    plain, _ = step_of(mean_loss)(created(SGD), (X, Y))
    after, metrics = step_of(mean_loss, skip="off")(created(SGD, loss_scale=StaticLossScale(2.0**10)), (X, Y))
    assert fingerprint(after.params) == fingerprint(plain.params) and float(metrics["loss_scale"]) == 2.0**10


# ---- trainable -------------------------------------------------------------------------------------------------------


def test_frozen_params_keep_their_bytes_and_have_no_gradient():
    """A frozen leaf is no part of gradient, norm, optimizer, average or skip: not even where its gradient would be NaN."""
    model = Model(
        lambda rng: ({"body": {"w": jnp.ones(3), "n": jnp.arange(3)}, "head": {"w": jnp.ones(3)}}, {}), lambda *a: a
    )

    def loss_fn(params, mstate, batch, rng):
        x = batch @ (params["head"]["w"] + 0 * params["body"]["n"].astype(jnp.float32))
        return x.mean() + jnp.sqrt(jnp.square(params["body"]["w"] - 1).sum())  # its gradient at 1 is 0 / 0

    optimizer = optax.sgd(0.1, momentum=0.9)
    state = created(optimizer, model, None, trainable="head", ema_decay=0.5)
    assert list(fingerprint(state.opt_state)) == ["0/trace/head/w"] and list(fingerprint(state.ema)) == ["head/w"]
    step = make_train_step(loss_fn, optimizer, donate=False)
    assert step.nonfinite_leaf(state, X) is None
    after, metrics = step(state, X)
    assert int(after.step) == 1 and fingerprint(after.params["body"]) == fingerprint(state.params["body"])
    np.testing.assert_allclose(after.params["head"]["w"], 1 - 0.1 * X.mean(0), rtol=8 * EPS)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(X.mean(0)), rtol=8 * EPS)
    whole = created(optimizer, model, None)
    assert step.nonfinite_leaf(whole, X) == "body/w"
    assert int(step(whole, X)[0].skipped) == 1
    assert whole.trainable == (False, True, True)  # the integers are never trained


# ---- sinks -----------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def tap(x, sink):
    """Identity; the sink's cotangent is [elements, sum of |x|, sum of |gradient|]."""
    return x


def _tapped(x, g):
    return g, jnp.stack([jnp.float32(x.size), jnp.abs(x).sum(), jnp.abs(g).sum()])


tap.defvjp(lambda x, sink: (x, x), _tapped)


def tapped_model(start=0.0):
    def init(rng):
        return {"w": jnp.zeros(3), "b": jnp.zeros(())}, {
            SINKS: {"probe": jnp.full(3, start)},
            "n": {"calls": jnp.int32(0)},
        }

    return Model(init, lambda *a: a)


def tapped_loss(params, mstate, batch, rng):
    x, y = batch
    prediction = LINEAR.apply(params, mstate, x)[0]
    if SINKS in mstate:
        prediction = tap(prediction, mstate[SINKS]["probe"])
    return jnp.square(prediction - y).mean(), Aux({**mstate, "n": {"calls": mstate["n"]["calls"] + 1}})


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_sink_comes_back_in_mstate_and_metrics_and_meets_nothing_else(accumulate):
    """With and without the tap every other byte is the same: no clip, no norm, no optimizer, no scale touches a sink."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    options = {"loss_scale": dynamic(2.0**4), "ema_decay": 0.5}
    step = make_train_step(tapped_loss, optimizer, accumulate=accumulate, clip_norm=0.5, donate=False)
    state = created(optimizer, tapped_model(), **options)
    plain = dataclasses.replace(state, mstate={"n": state.mstate["n"]})
    after, metrics = step(state, (X, Y))
    without, plain_metrics = step(plain, (X, Y))
    probe = metrics.pop(SINKS)
    assert fingerprint(probe) == fingerprint(after.mstate[SINKS])
    assert fingerprint(metrics) == fingerprint(plain_metrics)
    kept = dataclasses.replace(after, mstate={"n": after.mstate["n"]})
    assert fingerprint(kept) == fingerprint(without) and int(after.mstate["n"]["calls"]) == accumulate
    r = X.astype(np.float64) @ START["w"].astype(np.float64) + 0.25
    size, activations, gradients = (float(x) for x in probe["probe"])
    assert size == 8.0
    np.testing.assert_allclose(activations, np.abs(r).sum(), rtol=32 * EPS)
    # As it came: scaled, and of a mean over 8 / accumulate rows at a time.
    np.testing.assert_allclose(gradients, 2.0**4 * accumulate * np.abs(2 * (r - Y) / 8).sum(), rtol=32 * EPS)


def test_what_a_sink_held_does_not_add_up_over_steps_and_its_nan_is_no_skip():
    """A probe reports one step. What it saw may be infinite: the step judges params, loss and statistics, not the probe."""
    optimizer = optax.sgd(0.1)
    step = make_train_step(tapped_loss, optimizer, accumulate=2, donate=False)
    state = created(optimizer, tapped_model(np.nan))
    first, _ = step(state, (X, Y))
    assert int(first.step) == 1 and np.isfinite(first.mstate[SINKS]["probe"]).all()
    second, metrics = step(dataclasses.replace(first, params=state.params), (X, Y))
    assert fingerprint(second.mstate[SINKS]) == fingerprint(first.mstate[SINKS])
    skipped, metrics = step(first, (np.full_like(X, np.inf), Y))
    assert fingerprint(skipped.mstate) == fingerprint(first.mstate)  # a skip leaves the stored one alone
    assert not np.isfinite(metrics[SINKS]["probe"][1])  # but reports what it met


# ---- the step as a program -------------------------------------------------------------------------------------------


def test_lowering_gives_the_cost_of_the_compiled_step():
    """For arrays or for shapes; donation shows as memory that the outputs take from the inputs."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = created(optimizer, ema_decay=0.5)
    size = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state, state.ema)))
    step = make_train_step(mean_loss, optimizer)
    lowered = step.lower(state, (X, Y))
    assert step.lower(*jax.eval_shape(lambda *a: a, state, (X, Y))).as_text() == lowered.as_text()
    donating = lowered.compile().memory_analysis()
    assert donating.alias_size_in_bytes >= size and donating.temp_size_in_bytes > 0
    keeping = make_train_step(mean_loss, optimizer, donate=False).lower(state, (X, Y)).compile().memory_analysis()
    assert keeping.alias_size_in_bytes == 0
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


@pytest.mark.optimized
def test_the_pure_step_scans():
    """Ten steps inside one program are the ten steps, to the bit."""
    optimizer = optax.sgd(0.05, momentum=0.9)
    step = make_train_step(mean_loss, optimizer, accumulate=2, donate=False)
    state = looped = created(optimizer, loss_scale=dynamic(growth_interval=3), ema_decay=0.5)
    batches = (np.stack([X + i for i in range(10)]), np.stack([Y] * 10))
    batches[0][4] = np.nan
    scanned, metrics = jax.jit(lambda s, b: jax.lax.scan(step.pure, s, b))(state, batches)
    for i in range(10):
        looped, last = step(looped, (batches[0][i], batches[1][i]))
    assert fingerprint(scanned) == fingerprint(looped)
    assert fingerprint(jax.tree.map(lambda x: x[-1], metrics)) == fingerprint(last)
    assert int(looped.skipped) == 1 and int(looped.step) == 9


def test_the_first_bad_gradient_leaf_is_named():
    def loss_fn(params, mstate, batch, rng):
        x, y = batch
        return mean_loss(params, mstate, (x[:, :3], y), rng) + (params["w"] * x[:, 3:].mean(0)).sum()

    state = created(SGD, loss_scale=dynamic())
    step = make_train_step(loss_fn, SGD, accumulate=2)
    good = np.concatenate([X, np.zeros_like(X)], 1)
    assert step.nonfinite_leaf(state, (good, Y)) is None
    bad = good.copy()
    bad[5, 4] = np.inf
    assert step.nonfinite_leaf(state, (bad, Y)) == "w"
    bad[:, :3] = np.nan
    assert step.nonfinite_leaf(state, (bad, Y)) == "b"  # the first in the tree's order
    assert not any(x.is_deleted() for x in jax.tree.leaves(state)) and int(state.step) == 0


def test_a_donated_state_is_refused_with_what_to_do():
    optimizer = optax.sgd(0.1)
    state, step = created(optimizer), make_train_step(mean_loss, optimizer)
    after, _ = step(state, (X, Y))
    with pytest.raises(ValueError, match=r"donated to an earlier step and is gone; go on with.*donate=False"):
        step(state, (X, Y))
    with pytest.raises(ValueError, match=r"params: b was donated to an earlier step and is gone; take params from"):
        created(optimizer, params=state.params)
    step(after, (X, Y))


@pytest.mark.parametrize("skip", ["nonfinite", "off"])
def test_an_optimizer_that_wants_the_loss_gets_it(skip):
    """`reduce_on_plateau` reads the value that training is to lower."""
    with standard():
        optimizer = optax.chain(
            optax.sgd(0.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=2, accumulation_size=1)
        )
        state, step = created(optimizer), make_train_step(mean_loss, optimizer, skip=skip)
        for _ in range(4):
            state, _metrics = step(state, (X, Y))
        assert float(state.opt_state[1].scale) == 0.5
        np.testing.assert_allclose(state.opt_state[1].best_value, slopes(START)[0], rtol=32 * EPS)


def test_an_optimizer_state_whose_dtypes_drift_is_held_to_what_was_stored():
    """optax's own state in bfloat16 meets float32 gradients: the state stays as it was made, and one compile serves."""
    optimizer = optax.trace(0.9, accumulator_dtype=None)
    with pytest.warns(mpjax.VanishingUpdateWarning), standard():
        state = created(optimizer, linear_model(dtype=jnp.bfloat16), optimizer_dtype=None)
    step = make_train_step(mean_loss, optimizer)
    with standard():
        for _ in range(2):
            state, _ = step(state, (X, Y))
    assert {str(x.dtype) for x in jax.tree.leaves(state.opt_state)} == {"bfloat16"} and step._jitted._cache_size() == 1


# ---- what may stand in a loss function and in a batch ----------------------------------------------------------------


@jax.checkpoint
def _remat(params, x):
    return jnp.tanh(x @ params["w"] + params["b"])


def checkpointed(params, mstate, batch, rng):
    return jnp.square(_remat(params, batch[0]) - batch[1]).mean()


def vmapped(params, mstate, batch, rng):
    return jnp.square(jax.vmap(lambda x: jnp.tanh(x @ params["w"] + params["b"]))(batch[0]) - batch[1]).mean()


def scanned(params, mstate, batch, rng):
    def body(total, row):
        return total + jnp.square(jnp.tanh(row[0] @ params["w"] + params["b"]) - row[1]), None

    return jax.lax.scan(body, jnp.float32(0), batch)[0] / batch[1].shape[0]


def jitted(params, mstate, batch, rng):
    return jax.jit(lambda p: jnp.square(jnp.tanh(batch[0] @ p["w"] + p["b"]) - batch[1]).mean())(params)


def conditional(params, mstate, batch, rng):
    return jax.lax.cond(batch[1].sum() > 1e9, lambda p: p["b"], lambda p: jitted(p, mstate, batch, rng), params)


def transformed(params, mstate, batch, rng):
    """The same loss five times; each stands in the metrics by itself."""
    each = {f.__name__: f(params, mstate, batch, rng) for f in (checkpointed, vmapped, scanned, jitted, conditional)}
    return sum(each.values()) / 5, Aux(mstate, each)


def test_transforms_inside_a_loss_function_just_work():
    state = created(RECORDING, loss_scale=dynamic())
    after, metrics = make_train_step(transformed, RECORDING, accumulate=2)(state, (X, Y))
    x, y = X.astype(np.float64), Y.astype(np.float64)
    t = np.tanh(x @ START["w"].astype(np.float64) + 0.25)
    slope = 2 * (t - y) * (1 - t**2) / 8
    tolerance = {"rtol": 64 * EPS, "atol": 64 * EPS}
    for name in ("loss", "checkpointed", "vmapped", "scanned", "jitted", "conditional"):
        np.testing.assert_allclose(metrics[name], np.square(t - y).mean(), **tolerance)
    np.testing.assert_allclose(after.opt_state[0].grads["w"], slope @ x, **tolerance)
    np.testing.assert_allclose(after.opt_state[0].grads["b"], slope.sum(), **tolerance)


def test_input_gradients_inside_a_loss_function_just_work():
    """A gradient penalty |∂f/∂x|² = |w|² with f linear: its gradient in params is 2 w."""

    def loss_fn(params, mstate, batch, rng):
        by_input = jax.vmap(jax.grad(lambda x: LINEAR.apply(params, mstate, x)[0]))(batch)
        return jnp.square(by_input).sum(-1).mean()

    after, metrics = make_train_step(loss_fn, RECORDING, accumulate=2)(created(RECORDING), X)
    assert float(metrics["loss"]) == 5.25 and after.opt_state[0].grads["w"].tolist() == [1.0, -2.0, 4.0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_is_any_pytree_and_reaches_the_loss_as_it_is(accumulate):
    seen = {}

    def loss_fn(params, mstate, batch, rng):
        seen.update(dtypes=jax.tree.map(lambda x: str(x.dtype), batch), structure=jax.tree.structure(batch))
        seen.update(label_shape=batch["label"].shape, rate_shape=batch["rate"].shape)
        kept = jnp.where(batch["mask"][0], batch["image"], jnp.zeros_like(batch["image"])).astype(jnp.float32)
        hits = (batch["label"] == batch["step"].astype(jnp.int8)).astype(jnp.float32)
        return (kept * params["b"]).mean() * batch["rate"], Aux(mstate, {"hits": hits.mean()})

    batch = {
        "image": np.arange(4, dtype=np.float16),
        "label": np.array([3, 1, 3, 2], np.int8),
        "mask": [np.array([True, False, True, True]), None],
        "rate": 0.5,
        "step": np.int32(3),
        "raw": np.arange(4, dtype=np.uint8).reshape(4, 1),
        "nothing": (),
    }
    optimizer = optax.sgd(1.0)
    after, metrics = make_train_step(loss_fn, optimizer, accumulate=accumulate)(created(optimizer), batch)
    assert seen["dtypes"] == {
        "image": "float16",
        "label": "int8",
        "mask": ["bool", None],
        "rate": "float32",
        "step": "int32",
        "raw": "uint8",
        "nothing": (),
    }
    assert seen["structure"] == jax.tree.structure(batch)
    assert seen["label_shape"] == (4 // accumulate,) and seen["rate_shape"] == ()
    assert float(after.params["b"]) == 0.25 - 0.5 * (0 + 2 + 3) / 4 and float(metrics["hits"]) == 0.5


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, r"got accumulate=0; legal is an int ≥ 1; 1 does not accumulate"),
        ({"accumulate": 2.0}, r"got accumulate=2.0; legal is an int"),
        ({"accumulate": "2"}, r"got accumulate='2'"),
        ({"clip_norm": 0.0}, r"got clip_norm=0.0; legal is a number > 0, or None"),
        ({"clip_norm": -1.0}, r"got clip_norm=-1.0"),
        ({"clip_norm": float("nan")}, r"got clip_norm=nan"),
        ({"clip_norm": jnp.float32(-1)}, r"got clip_norm=-1.0"),
        ({"skip": "nan"}, r"got skip='nan'; legal is 'nonfinite', 'gradients' or 'off'"),
        ({"skip": False}, r"got skip=False"),
    ],
    ids=repr,
)
def test_settings_outside_the_legal_are_refused(options, message, monkeypatch):
    # The suite's type checks would refuse some of them first, in their own words; users run without.
    make = getattr(make_train_step, "__wrapped__", make_train_step)
    with pytest.raises(ValueError, match=message):
        make(mean_loss, optax.sgd(0.1), **options)


def test_a_norm_to_clip_at_may_be_an_array():
    make = getattr(make_train_step, "__wrapped__", make_train_step)
    _, metrics = make(mean_loss, SGD, clip_norm=jnp.float32(1))(created(SGD), (X, Y))  # it was compared while tracing
    assert metrics["grads_finite"]


def test_a_dynamic_scale_needs_the_skip():
    optimizer = optax.sgd(0.1)
    step = make_train_step(mean_loss, optimizer, skip="off")
    with pytest.raises(
        ValueError, match=r"skip='off' came with a DynamicLossScale.*use skip='nonfinite', skip='gradients' or a static"
    ):
        step(created(optimizer, loss_scale=dynamic()), (X, Y))


@pytest.mark.parametrize("name", RESERVED)
def test_a_metric_may_not_take_a_name_of_the_steps_own(name):
    optimizer = optax.sgd(0.1)
    step = make_train_step(lambda p, m, batch, rng: (p["b"], Aux(m, {name: 1.0, "mine": 2.0})), optimizer)
    with pytest.raises(ValueError, match=rf"metric names \['{name}'\], which the step reports itself; rename them"):
        jax.eval_shape(step.pure, created(optimizer), X)


def test_a_state_of_another_optimizer_is_refused():
    """The state was made with momentum, the step without: optax would fail somewhere inside, or train wrongly."""
    optimizer = optax.sgd(0.1)
    drifting = optax.GradientTransformation(optimizer.init, lambda g, s, p=None: (g, (*s, jnp.zeros(()))))
    step = make_train_step(mean_loss, drifting)
    with pytest.raises(ValueError, match="the optimizer's state changed its structure in the step"):
        jax.eval_shape(step.pure, created(optimizer), (X, Y))
