"""Cutting a batch, and adding gradients up in float32 over its parts; numbers against float64 by hand."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.core.model import SINKS
from mpjax.numerics.loss_scale import DynamicLossScale, NoOpLossScale, StaticLossScale
from mpjax.train.accumulate import Gathered, as_stored, check_batch, cut, gather
from mpjax.train.state import Aux, split_trainable
from tests.train.toys import equations, fingerprint

KEY = jax.random.key(3)
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(autouse=True)
def strict_promotion():
    """All arithmetic here is our own."""
    with jax.numpy_dtype_promotion("strict"):
        yield


# ---- cut -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6, 12])
def test_micro_batch_i_holds_every_kth_row_from_row_i(parts):
    """Cut the other way, `reshape(k, n / k)`, each device of a data-parallel batch would compute every row."""
    rows = np.arange(12 * 2).reshape(12, 2)
    found = cut({"x": rows}, parts)["x"]
    assert found.shape == (parts, 12 // parts, 2)
    for i in range(parts):
        np.testing.assert_array_equal(found[i], rows[i::parts])


def test_cut_keeps_every_leaf_and_dtype():
    batch = {
        "x": np.ones((4, 3), np.float16),
        "label": np.arange(4, dtype=np.int8),
        "mask": [np.array([True, False, True, True]), None],
        "key": jax.random.split(KEY, 4),
        "weight": 0.5,
        "epoch": np.int32(3),
        "empty": (),
    }
    found = cut(batch, 2)
    assert jax.tree.structure(found) == jax.tree.structure(batch)
    assert found["x"].dtype == jnp.float16 and found["label"].dtype == jnp.int8 and found["mask"][0].dtype == bool
    assert found["label"].tolist() == [[0, 2], [1, 3]]
    assert found["weight"].tolist() == [0.5, 0.5] and found["epoch"].tolist() == [3, 3]  # one number for all parts
    np.testing.assert_array_equal(
        jax.random.key_data(found["key"][1]), np.asarray(jax.random.key_data(batch["key"]))[1::2]
    )


@pytest.mark.parametrize(
    ("batch", "parts", "message"),
    [
        (np.ones((0, 2)), 1, r"the batch has 0 rows; a step needs at least one: drop the empty batch"),
        ({"x": {"y_1": np.ones((0, 2))}}, 2, r"batch\[x/y/1\] has 0 rows"),
        ({"x": np.ones(5)}, 2, r"batch\[x\] has 5 rows, which accumulate=2 does not divide; use a batch of 4 rows"),
        (np.ones(3), 4, r"the batch has 3 rows, which accumulate=4 does not divide; use a batch of 4 rows, or another"),
        ({"x": np.ones(4), "y": np.ones(8)}, 2, r"leading axes differ, \{'x': 4, 'y': 8\}; give every leaf the same"),
    ],
    ids=lambda x: "" if isinstance(x, (dict, np.ndarray)) else str(x),
)
def test_check_batch_names_the_path_and_the_numbers(batch, parts, message):
    with pytest.raises(ValueError, match=message):
        check_batch(batch, parts)
    with pytest.raises(ValueError, match=message):
        cut(batch, parts)


@pytest.mark.parametrize("batch", [None, {}, 1.0, {"step": 3}, {"x": np.ones(4), "y": np.ones(8)}], ids=repr)
def test_an_uncut_batch_may_have_any_shapes(batch):
    check_batch(batch, 1)


# ---- gather ----------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(12, 3)).astype(np.float32), RNG.normal(size=12).astype(np.float32)
MASK = np.array(
    [[1, 0, 1, 1], [1, 0, 1, 0], [1, 0, 0, 1]], np.float32
).ravel()  # of 4 parts (rows i::4) one weighs nothing
PARAMS = {"w": np.array([0.5, -1.0, 2.0], np.float32), "b": np.float32(0.25)}


def squared_errors(params, batch):
    return jnp.square(batch["x"] @ params["w"] + params["b"] - batch["y"])


def masked_loss(params, mstate, batch, rng):
    errors = squared_errors(params, batch) * batch["mask"]
    metrics = {"mae": jnp.sqrt(errors).sum() / jnp.maximum(batch["mask"].sum(), 1)}
    return (errors.sum(), batch["mask"].sum()), Aux(mstate, metrics)


def mean_loss(params, mstate, batch, rng):
    return squared_errors(params, batch).mean()


def by_hand(mask):
    """Loss and gradients of the weighted mean over all rows, in float64."""
    x, y, m = (a.astype(np.float64) for a in (X, Y, mask))
    r = x @ PARAMS["w"].astype(np.float64) + 0.25 - y
    return (m * r**2).sum() / m.sum(), {"w": 2 * (m * r) @ x / m.sum(), "b": 2 * (m * r).sum() / m.sum()}


def gathered(loss_fn, batch, accumulate, scale=None, mstate=None, params=PARAMS, mask=None, run=jax.jit) -> Gathered:
    scale, mstate = scale or NoOpLossScale(), mstate or {}
    trained, frozen = split_trainable(jax.tree.map(jnp.asarray, params), mask)
    return run(functools.partial(gather, loss_fn, accumulate=accumulate))(trained, frozen, mstate, batch, KEY, scale)


def traced(loss_fn, batch, accumulate, **options) -> Gathered:
    """Only the shapes and dtypes, or the refusal: nothing is compiled."""
    return gathered(loss_fn, batch, accumulate, run=lambda f: functools.partial(jax.eval_shape, f), **options)


BATCH = {"x": X, "y": Y, "mask": MASK}

# Each of at most 12 products and sums over a row or over rows rounds once to float32, and the numbers stay under 32.
TOLERANCE = {"rtol": 32 * EPS, "atol": 32 * 12 * EPS}


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_ragged_sums_over_weights_give_the_mean_of_the_whole_batch(accumulate):
    """Micro-batches of weight 3, 0, 2 and 2: a mean of their means would be another number."""
    assert [float(part.sum()) for part in cut(MASK, 4)] == [3.0, 0.0, 2.0, 2.0]
    loss, grads = by_hand(MASK)
    found = gathered(masked_loss, BATCH, accumulate)
    np.testing.assert_allclose(found.loss, loss, **TOLERANCE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), found.grads, grads)
    assert float(found.weight) == 7.0
    r = np.abs(X.astype(float) @ PARAMS["w"] + 0.25 - Y)
    np.testing.assert_allclose(found.metrics["mae"], (MASK * r).sum() / 7, **TOLERANCE)
    naive = np.mean([(MASK[i::4] * r[i::4] ** 2).sum() / max(MASK[i::4].sum(), 1) for i in range(4)])
    assert abs(naive - loss) > 100 * TOLERANCE["atol"]


@pytest.mark.parametrize("accumulate", [1, 2, 3, 12])
def test_a_loss_without_weight_counts_every_micro_batch_alike(accumulate):
    loss, grads = by_hand(np.ones(12))
    found = gathered(mean_loss, BATCH, accumulate)
    np.testing.assert_allclose(found.loss, loss, **TOLERANCE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), found.grads, grads)
    assert found.weight is None


@pytest.mark.parametrize("loss_fn", [mean_loss, masked_loss])
@pytest.mark.parametrize(
    "scale", [StaticLossScale(2.0**15), DynamicLossScale(jnp.float32(2.0**15), jnp.int32(0))], ids=repr
)
def test_gradients_come_back_scaled_and_all_else_unscaled(loss_fn, scale):
    """A power of two goes through every product, sum and quotient unrounded: equal bits, not nearly equal numbers."""
    plain, scaled = gathered(loss_fn, BATCH, 4), gathered(loss_fn, BATCH, 4, scale)
    assert fingerprint(jax.tree.map(lambda g: g / jnp.float32(2.0**15), scaled.grads)) == fingerprint(plain.grads)
    assert fingerprint(scaled._replace(grads=())) == fingerprint(plain._replace(grads=()))


@pytest.mark.parametrize("weight", [3, 3.0, True, np.float64(3), jnp.bfloat16(3), jnp.int32(3)], ids=repr)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_weight_is_any_number_and_has_no_gradient(weight, accumulate):
    """The weight of `(w·w.sum(), w)` is data even where it depends on params."""

    def loss_fn(params, mstate, batch, rng):
        total = jnp.square(params["w"]).sum() * jnp.float32(3)
        return total, jnp.asarray(weight).astype(jnp.float32) * (params["b"] + 1 - params["b"])

    found = gathered(loss_fn, X, accumulate)
    assert float(found.grads["b"]) == 0.0 and found.weight.dtype == jnp.float32
    found = gathered(lambda params, mstate, batch, rng: (jnp.square(params["w"]).sum() * 3, weight), X, accumulate)
    np.testing.assert_allclose(found.grads["w"], 2 * 3 * PARAMS["w"].astype(float) / float(weight), rtol=4 * EPS)
    assert found.weight.dtype == found.loss.dtype == jnp.float32


@pytest.mark.parametrize("accumulate", [1, 4])
def test_no_weight_at_all_gives_no_gradient(accumulate):
    """Nothing is divided by zero, so that even a step that skips nothing is not poisoned by a batch of padding."""
    found = gathered(masked_loss, BATCH | {"mask": np.zeros(12, np.float32)}, accumulate)
    assert float(found.weight) == 0.0
    assert {float(x) for g in jax.tree.leaves(found.grads) for x in g.ravel()} == {0.0}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_sum_counts_where_its_weight_is_zero(accumulate):
    """A penalty on params is part of every sum: gradients are those of the loss that is reported."""

    def loss_fn(params, mstate, batch, rng):
        (total, weight), _ = masked_loss(params, mstate, batch, rng)
        return total + jnp.square(params["w"]).sum(), weight

    found, (loss, grads) = gathered(loss_fn, BATCH, accumulate), by_hand(MASK)
    w = PARAMS["w"].astype(float)
    np.testing.assert_allclose(found.loss, loss + accumulate * (w**2).sum() / 7, **TOLERANCE)
    np.testing.assert_allclose(found.grads["w"], grads["w"] + accumulate * 2 * w / 7, **TOLERANCE)


def test_a_metric_that_is_nan_has_no_say_where_its_micro_batch_weighs_nothing():
    def loss_fn(params, mstate, batch, rng):
        (total, weight), _ = masked_loss(params, mstate, batch, rng)
        return (total, weight), Aux(mstate, {"a": total / weight, "rows": batch["x"][0]})  # 0 / 0 in the second part

    found = gathered(loss_fn, BATCH, 4)
    np.testing.assert_allclose(found.metrics["a"], found.loss, rtol=16 * EPS)
    firsts = X[:4].astype(float) * np.array([3, 0, 2, 2])[:, None] / 7
    np.testing.assert_allclose(found.metrics["rows"], firsts.sum(0), **TOLERANCE)  # a metric may be an array


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sums_are_float32_whatever_the_params_and_the_loss_are(accumulate):
    """The scan that adds up carries float32 alone; half precision ends at the gradient of one micro-batch."""
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.float16), PARAMS)

    def loss_fn(params, mstate, batch, rng):
        return jnp.square(batch.astype(jnp.float16) @ params["w"] + params["b"]).sum(), Aux(
            mstate, {"acc": jnp.float16(1)}
        )

    trained, frozen = split_trainable(half, None)
    run = functools.partial(gather, loss_fn, accumulate=accumulate)
    traced, found = jax.make_jaxpr(run, return_shape=True)(trained, frozen, {}, X, KEY, NoOpLossScale())
    floats = [found.loss, *jax.tree.leaves(found.grads), *found.metrics.values()]
    assert {str(x.dtype) for x in floats} == {"float32"}
    scans = [e for e in equations(traced.jaxpr) if e.primitive.name == "scan"]
    assert len(scans) == accumulate - 1
    for scan in scans:
        carried = scan.outvars[:2]  # the carry comes first, whatever the parameters of a scan are called
        assert [str(v.aval) for v in carried] == ["float32[]", "float32[3]"]


def test_what_a_half_precision_sum_loses_is_kept():
    """256 micro-batches of gradient 1 and one of 2⁸: in bfloat16 the ones would vanish beside the large one."""
    batch = np.concatenate([np.full(1, 256.0), np.ones(255)]).astype(np.float32)
    params = {"w": jnp.ones((), jnp.bfloat16)}

    def loss_fn(params, mstate, x, rng):
        return (params["w"].astype(jnp.float32) * x).sum(), jnp.float32(1)

    found = gathered(loss_fn, batch, 256, params=params)
    assert float(found.grads["w"]) == (256 + 255) / 256
    in_half = functools.reduce(lambda a, b: (a + b).astype(jnp.bfloat16), batch.astype(jnp.bfloat16))
    assert float(in_half) == 256.0  # what it guards against


def test_mstate_runs_through_the_micro_batches_in_order():
    def loss_fn(params, mstate, batch, rng):
        log, n = mstate["log"]["rows"], mstate["log"]["n"]
        new = {"log": {"rows": log.at[n].set(batch[0]), "n": n + 1}}
        return (params["w"] * 0).sum() + params["b"] * 0, Aux(new)

    start = {"log": {"rows": jnp.zeros(4), "n": jnp.int32(0)}}
    found = gathered(loss_fn, np.arange(12, dtype=np.float32), 4, mstate=start)
    assert found.mstate["log"]["rows"].tolist() == [0.0, 1.0, 2.0, 3.0] and int(found.mstate["log"]["n"]) == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", range(4))
def test_statistics_that_were_spoiled_and_overwritten_are_remembered(bad, part):
    batch = np.zeros(4, np.float32)
    assert bool(last_rows(batch).mstate_finite)
    batch[part] = bad
    found = last_rows(batch)
    assert not bool(found.mstate_finite) and np.isfinite(found.mstate["last"]) == (part != 3)


@jax.jit
def last_rows(batch):
    def loss_fn(params, mstate, batch, rng):
        return total(params) * 0, Aux({"last": batch[0]})

    trained, frozen = split_trainable(jax.tree.map(jnp.asarray, PARAMS), None)
    return gather(loss_fn, trained, frozen, {"last": jnp.float32(0)}, batch, KEY, NoOpLossScale(), 4)


def test_each_micro_batch_has_a_key_of_its_own():
    def loss_fn(params, mstate, batch, rng):
        n = mstate["n"]
        new = {"keys": mstate["keys"].at[n].set(jax.random.key_data(rng)), "n": n + 1}
        return (params["w"] * 0).sum() + params["b"] * 0, Aux(new)

    start = {"keys": jnp.zeros((4, 2), jnp.uint32), "n": jnp.int32(0)}
    found = gathered(loss_fn, X, 4, mstate=start).mstate["keys"]
    assert len({tuple(row) for row in found.tolist()}) == 4
    assert found.tolist() == [jax.random.key_data(jax.random.fold_in(KEY, i)).tolist() for i in range(4)]


def test_frozen_params_reach_the_loss_and_have_no_gradient():
    found = gathered(mean_loss, BATCH, 2, mask=(False, True))
    assert list(found.grads) == ["b", "w"] and found.grads["b"] is None
    np.testing.assert_allclose(found.grads["w"], by_hand(np.ones(12))[1]["w"], **TOLERANCE)


# ---- sinks -----------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def tap(x, sink):
    return x


def _largest(saved, g):
    x, sink = saved
    return g, jnp.abs(x).max().astype(sink.dtype) + jnp.zeros_like(sink)


tap.defvjp(lambda x, sink: (x, (x, sink)), _largest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_sinks_add_up_unscaled_and_keep_their_dtype(accumulate, dtype):
    def loss_fn(params, mstate, batch, rng):
        return (tap(batch * params["b"], mstate[SINKS]["amax"])).sum(), Aux(mstate)

    start = {SINKS: {"amax": jnp.zeros(2, dtype)}, "other": {"n": jnp.int32(3)}}
    batch = np.array([1, 2, 4, 8], np.float32)
    found = gathered(loss_fn, batch, accumulate, StaticLossScale(2.0**10), start, params={"b": jnp.float32(1)})
    parts = [max(batch[i::accumulate]) for i in range(accumulate)]
    assert found.sinks["amax"].tolist() == [sum(parts)] * 2 and found.sinks["amax"].dtype == dtype
    assert list(found.mstate) == ["other"]


# ---- what a loss function may return ---------------------------------------------------------------------------------


def total(params):
    return params["w"].sum() + params["b"]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "form",
    [
        lambda loss, mstate: loss,
        lambda loss, mstate: (loss, 1.0),
        lambda loss, mstate: (loss, jnp.float32(1)),
        lambda loss, mstate: (loss, Aux(mstate, {"m": 2})),
        lambda loss, mstate: ((loss, 1), Aux(mstate, {"m": jnp.bool_(True)})),
        lambda loss, mstate: loss.astype(jnp.bfloat16),
    ],
    ids=["scalar", "pair", "pair of arrays", "aux", "pair and aux", "bfloat16"],
)
def test_every_form_of_loss_is_read(form, accumulate):
    found = gathered(lambda params, mstate, batch, rng: form(total(params), mstate), X, accumulate)
    assert float(found.loss) == 1.75 and found.loss.dtype == jnp.float32  # exact in bfloat16 too
    assert found.grads["w"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("form", "shown"),
    [
        (lambda loss, mstate: jnp.ones(3) * loss, r"\(3,\)"),
        (lambda loss, mstate: (loss, jnp.ones(2)), r"\(\(\), \(2,\)\)"),
        (lambda loss, mstate: {"loss": loss}, r"\{'loss': \(\)\}"),
        (lambda loss, mstate: [loss, loss], r"\[\(\), \(\)\]"),
        (lambda loss, mstate: (loss, mstate), r"\(\(\), \{\}\)"),
        (lambda loss, mstate: (loss, {"accuracy": loss}), r"\(\(\), \{'accuracy': \(\)\}\)"),
        (lambda loss, mstate: (loss, 1.0, Aux(mstate)), r"Aux\("),
        (lambda loss, mstate: ((loss, 1.0, 2.0), Aux(mstate)), r"Aux\("),
        (lambda loss, mstate: None, "None"),
        (lambda loss, mstate: "nan", "nan"),
    ],
    ids=["vector", "vector weight", "dict", "list", "mstate", "dict beside", "three", "three and aux", "None", "str"],
)
def test_any_other_form_is_refused_with_its_shapes(form, shown, accumulate):
    message = rf"loss_fn returned .*{shown}.*legal is a scalar loss or \(sum, weight\).*reduce the loss to a scalar"
    with pytest.raises(ValueError, match=message):
        traced(lambda params, mstate, batch, rng: form(total(params), mstate), X, accumulate)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("metrics", [{"a": {"b": 1.0}}, {"a": "x"}, {"a": None}, [1.0]], ids=repr)
def test_metrics_that_are_no_numbers_are_refused(metrics, accumulate):
    with pytest.raises(ValueError, match=r"metric.*legal is.*number"):
        traced(lambda params, mstate, batch, rng: (total(params), Aux(mstate, metrics)), X, accumulate)


# ---- as_stored -------------------------------------------------------------------------------------------------------


def test_as_stored_keeps_dtypes_and_strength():
    old = {"x": jnp.zeros(2, jnp.bfloat16), "n": jnp.int32(0), "key": KEY, "f": jnp.float32(0)}
    new = {"x": jnp.ones(2, jnp.float32), "n": jnp.int8(1), "key": jax.random.key(9), "f": 2.0}
    found = as_stored(new, old, "mstate")
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, old)
    assert not found["f"].weak_type and float(found["f"]) == 2.0 and int(found["n"]) == 1
    assert operator.eq(*(jax.random.key_data(k).tolist() for k in (found["key"], new["key"])))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "new", [{}, {"stats": jnp.zeros(2), "more": jnp.zeros(1)}, {"other": jnp.zeros(2)}, None], ids=str
)
def test_an_mstate_of_another_structure_is_refused(new, accumulate):
    def loss_fn(params, mstate, batch, rng):
        return total(params), Aux(new)

    with pytest.raises(ValueError, match=r"mstate changed its structure.*return the tree that was passed in"):
        traced(loss_fn, X, accumulate, mstate={"stats": jnp.zeros(2)})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_mstate_of_another_shape_is_refused(accumulate):
    """Statistics of shape [3] where [2] is stored would not fit the next step: say so, with the path."""
    with pytest.raises(ValueError, match=r"mstate.*stats/mean.*\(3,\).*\(2,\)"):
        traced(
            lambda params, mstate, batch, rng: (total(params), Aux({"stats": {"mean": jnp.zeros(3)}})),
            X,
            accumulate,
            mstate={"stats": {"mean": jnp.zeros(2)}},
        )
