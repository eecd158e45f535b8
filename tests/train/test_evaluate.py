"""Evaluation: the mean over all rows, however they are cut into batches, of the averaged params, read once."""

from __future__ import annotations

import dataclasses
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.core.model import Model
from mpjax.train.evaluate import evaluate, make_eval_step
from mpjax.train.state import TrainState
from tests.train.toys import fingerprint, linear_model

MODEL = linear_model()
X = np.arange(21, dtype=np.float32).reshape(7, 3)
PARAMS = {"w": np.float32([1, -2, 4]), "b": np.float32(0.5)}
MEAN = (X.astype(np.float64) @ PARAMS["w"] + 0.5).mean()  # exact in float32, as every sum below: small halves


def new_state(**options) -> TrainState:
    return TrainState.create(MODEL, optax.sgd(0.1), jax.random.key(0), params=PARAMS, **options)


def of_rows(reduce):
    """An eval step that reports `reduce` of the model's answers and the rows' weights, where there are any."""
    return make_eval_step(lambda p, m, batch: {"value": reduce(MODEL.apply(p, m, batch["x"])[0], batch.get("weight"))})


def cut(*rows: int, **arrays: np.ndarray) -> list[dict[str, np.ndarray]]:
    edges = np.cumsum([0, *rows])
    return [{k: v[a:b] for k, v in arrays.items()} for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("rows", [(7,), (4, 3), (3, 3, 1), (1, 6)])
def test_a_mean_counts_every_row_once_however_the_batches_are_cut(rows):
    eval_step = of_rows(lambda y, weight: y.mean())
    assert evaluate(eval_step, new_state(), cut(*rows, x=X)) == {"value": MEAN}


@pytest.mark.parametrize("rows", [(7,), (4, 3), (3, 3, 1)])
def test_a_pair_is_weighted_by_its_weight(rows):
    """Padded rows, of weight zero, have no say, in a batch of nothing else neither."""
    weight = np.float32([1, 1, 0, 2, 0, 4, 0])
    eval_step = of_rows(lambda y, weight: ((y * weight).sum(), weight.sum()))
    expected = (X.astype(np.float64) @ PARAMS["w"] + 0.5) @ weight / weight.sum()
    assert evaluate(eval_step, new_state(), cut(*rows, x=X, weight=weight)) == {"value": expected}


def test_a_total_weight_of_zero_has_no_mean():
    eval_step = of_rows(lambda y, weight: ((y * weight).sum(), weight.sum()))
    (value,) = evaluate(eval_step, new_state(), cut(4, 3, x=X, weight=np.zeros(7, np.float32))).values()
    assert type(value) is float and np.isnan(value)


def test_a_bad_value_shows():
    assert np.isinf(evaluate(of_rows(lambda y, weight: y.mean() / 0), new_state(), cut(4, 3, x=X))["value"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "bool"])
def test_sums_are_float32_whatever_the_metric_is(dtype):
    """1,024 batches of one row: a bfloat16 or int8 sum would stop at 256 or wrap at 128."""
    one = jnp.ones((), dtype)
    eval_step = make_eval_step(lambda p, m, x: {"mean": one, "pair": (one, jnp.int8(1))})
    found = eval_step(new_state(), jnp.zeros(1))
    assert {str(x.dtype) for x in jax.tree.leaves(found)} == {"float32"}
    assert evaluate(eval_step, new_state(), [np.zeros(1, np.float32)] * 1024) == {"mean": 1.0, "pair": 1.0}


def test_the_step_gives_sum_and_weight():
    found = of_rows(lambda y, weight: y.mean())(new_state(), {"x": X})
    assert jax.tree.map(float, found) == {"value": (MEAN * 7, 7.0)}


def test_the_moving_average_is_evaluated_where_there_is_one():
    average = jax.tree.map(lambda x: jnp.asarray(2 * x), PARAMS)
    state = dataclasses.replace(new_state(ema_decay=0.5), ema=average)
    eval_step = of_rows(lambda y, weight: y.mean())
    assert evaluate(eval_step, state, cut(4, 3, x=X)) == {"value": 2 * MEAN}
    seen = []
    cast = lambda params: seen.append(params) or jax.tree.map(lambda x: x / 2, params)  # noqa: E731
    assert evaluate(eval_step, state, cut(4, 3, x=X), cast) == {"value": MEAN} and len(seen) == 1


def test_mstate_is_passed_on():
    model = Model(lambda rng: ({"w": jnp.ones(())}, {"stats": {"mean": jnp.float32(3)}}), lambda p, m, x: (x, m))
    state = TrainState.create(model, optax.sgd(0.1), jax.random.key(0))
    eval_step = make_eval_step(lambda p, m, x: {"mean": m["stats"]["mean"]})
    assert evaluate(eval_step, state, [X]) == {"mean": 3.0}


def test_params_are_cast_once_and_compiled():
    """One trace for all batches; the eval step gets the cast params, and the state keeps its own."""
    dtypes = []

    def eval_fn(params, mstate, batch):
        dtypes.append(str(params["w"].dtype))
        return {"mean": batch["x"].mean()}

    @chex.assert_max_traces(1)
    def cast(params):
        assert all(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params))
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    state = new_state()
    before, eval_step = fingerprint(state), make_eval_step(eval_fn)
    evaluate(eval_step, state, cut(2, 2, 2, x=X), cast)
    evaluate(eval_step, state, cut(2, 2, 2, x=X), cast)  # nor is it traced again at the next evaluation
    assert dtypes == ["bfloat16"] and fingerprint(state) == before


def test_batches_of_one_shape_are_compiled_once():
    traces = []
    eval_step = of_rows(lambda y, weight: traces.append(y.shape) or y.mean())
    for _ in range(2):
        evaluate(eval_step, new_state(), cut(3, 3, 1, x=X))
    assert traces == [(3,), (1,)]


def test_it_is_read_once_after_the_last_batch(monkeypatch):
    """Row 34: nothing crosses to the host while batches are dispatched."""
    array, dispatched = type(jnp.zeros(())), []
    value, get, gets = array._value, jax.device_get, []

    def read(x):
        if len(dispatched) < 3:
            raise AssertionError(f"read after {len(dispatched)} batches")
        return value.fget(x)

    def batches():
        for batch in cut(3, 3, 1, x=X):
            dispatched.append(batch)
            yield batch

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "d")  # on two devices, numpy too must ask for `_value`
    state = jax.device_put(new_state(), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    eval_step = of_rows(lambda y, weight: y.mean())
    monkeypatch.setattr(array, "_value", property(read))
    monkeypatch.setattr(jax, "device_get", lambda x: gets.append(x) or get(x))
    assert evaluate(eval_step, state, batches()) == {"value": MEAN} and len(gets) == 1


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match=r"got no evaluation batches; give at least one"):
        evaluate(of_rows(lambda y, weight: y.mean()), new_state(), [])


@pytest.mark.parametrize("batch", [{"x": X[:0]}, {"x": np.float32(1)}, {}])
def test_a_batch_without_rows_is_refused(batch):
    with pytest.raises(ValueError, match=r"an evaluation batch has 0 rows; give each at least one"):
        make_eval_step(lambda p, m, batch: {"mean": jnp.float32(1)})(new_state(), batch)


@pytest.mark.parametrize(
    ("metric", "shapes"),
    [
        (lambda y: y, "(7,)"),
        (lambda y: (y, y.sum()), "((7,), ())"),
        (lambda y: (y.sum(), y), "((), (7,))"),
        (lambda y: (y.sum(), y.sum(), y.sum()), "((), (), ())"),
        (lambda y: {"inner": y.sum()}, "{'inner': ()}"),
    ],
)
def test_a_metric_that_is_neither_a_scalar_nor_a_pair_is_refused(metric, shapes):
    words = f"metric 'value' has the shapes {shapes}; legal is a scalar mean or a pair of scalars (sum, weight); reduce"
    with pytest.raises(ValueError, match=re.escape(words)):
        of_rows(lambda y, weight: metric(y))(new_state(), {"x": X})


def test_a_metric_without_a_name_is_refused():
    with pytest.raises(ValueError, match=r"eval_fn returned .*; legal is a dict from name to metric: give it a name"):
        make_eval_step(lambda params, mstate, batch: batch["x"].mean())(new_state(), {"x": X})


def test_a_mean_over_rows_that_are_not_all_as_many_is_refused_and_a_pair_is_not():
    """Weighted by the ten of `classes`, six rows and two would count alike."""
    batches = [{"classes": np.ones(10), "x": np.full(n, value)} for n, value in ((6, 1.0), (2, 0.0))]
    mean = make_eval_step(lambda params, mstate, batch: {"mean": batch["x"].mean()})
    with pytest.raises(ValueError, match=r"metric 'mean' is a mean over .* 6, 10 rows: .* return \(sum, weight\)"):
        evaluate(mean, new_state(), batches)
    pair = make_eval_step(lambda params, mstate, batch: {"mean": (batch["x"].sum(), batch["x"].size)})
    assert evaluate(pair, new_state(), batches) == {"mean": 0.75}
