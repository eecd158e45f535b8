"""DLRM, shrunk, on ratings made here: it learns, its products run where the policy says, its metrics are those by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from experiments import _data, _run, recommender_dlrm
from experiments.recommender_dlrm import Config, Interaction
from mpjax.measure.audit import audit

ndcg = jax.jit(_run.ndcg, static_argnames=("users", "first"))
SMALL = {"width": 16, "embedding": 16, "batch_size": 128}


def made_up(n=1200, users=20, films=24):
    """Ratings that a film's number tells: whose it is says nothing. The last 200 are held out, half of them by new users."""
    random = np.random.default_rng(0)
    user, film = random.integers(1, users, n), random.integers(1, films, n)
    data = {
        "rating": (1 + film % 5).astype(np.float32), "user": user.astype(np.int32), "film": film.astype(np.int32),
        "user_id": user.astype(np.int32), "timestamp": 10**9 + 7000 * np.arange(n), "year": (1960 + film).astype(np.float32),
        "genres": (random.random((n, 19)) < 0.1).astype(np.float32),
    }  # fmt: skip
    data["year"][5] = np.nan
    train, test = ({k: v[part] for k, v in data.items()} for part in (slice(None, -200), slice(-200, None)))
    test["user"] = np.where(test["user_id"] % 2, test["user"], _data.UNKNOWN).astype(np.int32)
    return _data.Split(train, test)


@pytest.fixture(scope="module", autouse=True)
def ratings():
    """They stand in MovieLens' place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_data, "movielens", made_up)
        yield


def make(policy="float32", **settings):
    policy = _run.policy_maps((policy,), by_path=recommender_dlrm.BY_PATH)[policy]
    return recommender_dlrm.make_job(Config(**{**SMALL, **settings}), policy)


def test_it_learns(tmp_path):
    config = Config(
        policies=("by_path",), steps=60, eval_every=60, learning_rate=3e-2, weight_decay=0.0, hidden_share=0.1,
        workdir=str(tmp_path), checkpoint_every=0, progress=False, **SMALL,
    )  # fmt: skip
    (row,) = recommender_dlrm.main(config)
    assert (row["policy"], row["skipped"], row["final scale"]) == ("by_path", 0, 1)
    # Whoever says the average is off by √2, the deviation of 1 to 5: a third of it takes what a film's own row tells.
    assert 0 < row["test rmse"] < 2**0.5 / 3 and row["matrix FLOPs"]["bfloat16"] > 0.5


@pytest.fixture(scope="module")
def small(ratings):
    """A job and its first state."""
    job = make()
    return job, jax.jit(job.state)(jax.random.key(0))


def products(policy, **settings):
    """From path to the operand dtypes of its products in a train step, with their FLOPs, at the real widths."""
    job = make(policy, width=64, embedding=32, **settings)
    state = jax.eval_shape(job.state, jax.random.key(0))
    found = audit(job.step(clip_norm=1.0).pure, state, job.batches(0)).select("dot")
    at = {}
    for op in found.ops:
        at.setdefault(op.path, set()).add(op.operands)
    return at, found, state


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_all_products_run_in_half_those_of_the_interaction_too(policy):
    """Forward and backward: with a float32 result asked of the forward product, the backward ones would be mixed."""
    half = policy.removeprefix("mixed_")
    at, found, state = products(policy)
    assert at["interaction"] == {(half, half)} and at["tables"] == {(half, half)} and found.share(half) == 1.0
    assert len([op for op in found.ops if op.path == "interaction"]) == 3
    assert {x.dtype.name for x in jax.tree.leaves(state.params["tables"])} == {"float32"}


def test_the_map_by_path_and_float8():
    at, found, _ = products("by_path")
    full, half = {("float32", "float32")}, {("bfloat16", "bfloat16")}
    assert at["tables"] == at["head"] == full
    assert all(at[path] == half for path in ("interaction", "bottom/layers/0", "top/layers/0", "top/layers/1"))
    assert found.share("bfloat16") > 0.9
    at, _, _ = products("mixed_fp8")
    backward = ("float8_e5m2", "float8_e4m3fn")
    eight = {("float8_e4m3fn",) * 2, backward, backward[::-1]}
    assert all(at[path] == eight for path in ("bottom/layers/1", "top/layers/0", "top/layers/1"))
    assert at["bottom/layers/0"] == at["interaction"] == at["head"] == half  # four dense features; a function; a head
    job = make("mixed_fp8", width=64, embedding=32)
    lines = {line.split()[0]: line for line in job.model.explain(*job.sample).splitlines()}
    assert "dot=none: 4×64 is no multiple of 16" in lines["bottom/layers/0"] and lines["top/layers/0"].endswith(
        "dot=fp8"
    )


def test_the_interaction_adds_up_in_float32():
    """16² + 255 ones is 511, in bfloat16 512; a sum kept in bfloat16 would stay at 256, where a one is half a step."""
    v = jnp.ones((1, 256), jnp.bfloat16).at[0, 0].set(16)
    out = jax.jit(Interaction().apply)({}, v, v, 2 * v, v)
    assert out.dtype == jnp.bfloat16 and out.shape == (1, 272)  # 256 + 6 pairs, and zeros to a multiple of 16
    assert (out[0, :256] == v[0]).all() and out[0, 256:].tolist() == [512, 1024, 1024, 512, 512, 1024, *[0] * 10]


def test_the_mean_over_genres_and_the_dense_features(small):
    params = small[1].params
    tables = recommender_dlrm.Tables(20, 24, 16)
    genres = np.zeros((2, 19), np.float32)
    genres[0, [2, 5]] = 1
    user, film, genre = tables.apply({"params": params["tables"]}, np.array([3, 0]), np.array([1, 2]), genres)
    rows = {name: np.asarray(params["tables"][name]["embedding"], np.float64) for name in ("user", "film", "genre")}
    np.testing.assert_array_equal(user, rows["user"][[3, 0]].astype(np.float32))
    np.testing.assert_array_equal(film, rows["film"][[1, 2]].astype(np.float32))
    np.testing.assert_allclose(genre, [(rows["genre"][2] + rows["genre"][5]) / 2, np.zeros(16)], rtol=1e-6)
    # 1970-07-02 06:00 UTC is day 182.25 of 365.2425, a quarter past midnight: (sin, cos) = (1, 0).
    part = {"timestamp": np.array([182 * 86_400 + 21_600]), "year": np.array([1960], np.float32)}
    found = recommender_dlrm.dense_features(part)
    np.testing.assert_allclose(found, [[1960, 10 + 182.25 / 365.2425, 1, 0]], atol=1e-6)
    dense = make(batch_size=1000).batches(0)["dense"]  # all of the training part
    assert dense.dtype == np.float32 and np.isfinite(dense).all()
    np.testing.assert_allclose(dense.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(dense.std(0), 1, atol=1e-2)


def test_a_batch_is_a_function_of_seed_and_attempt_and_hides_some():
    batches, again, other = make().batches, make().batches, make(seed=1).batches
    for name in ("user", "film", "rating"):
        np.testing.assert_array_equal(batches(5)[name], again(5)[name])
        assert (batches(5)[name] != other(5)[name]).any() and (batches(5)[name] != batches(6)[name]).any()
    one, none = make(batch_size=1000, hidden_share=0.5).batches(0), make(batch_size=1000, hidden_share=0.0).batches(0)
    for name in ("user", "film"):
        hidden = one[name] == _data.UNKNOWN
        assert 400 < hidden.sum() < 600 and (one[name][~hidden] == none[name][~hidden]).all()
        assert (none[name] > 0).all()
    assert ((one["user"] == 0) != (one["film"] == 0)).any()


def test_ndcg_by_hand():
    """Gains 2^rating − 1 of 1 to 5 are 1, 3, 7, 15, 31; a place counts 1, 1/log₂3 = 0.63093, 1/2."""
    rating = jnp.array([5, 3, 4, 2, 1, 2], jnp.float32)
    user = jnp.array([0, 0, 0, 1, 2, 2])
    predicted = jnp.array([1, 3, 2, 9, 0.5, 0.5], jnp.bfloat16)
    total, weight = ndcg(predicted, rating, user, 3)
    first = (7 + 15 * 0.6309298 + 31 / 2) / (31 + 15 * 0.6309298 + 7 / 2)  # put in the order 3, 4, 5
    third = (2 + 2 * 0.6309298) / (3 + 1 * 0.6309298)  # a tie: both places have (1 + 3) / 2; user 1 rated one film
    assert float(weight) == 2 and float(total) == pytest.approx(first + third, rel=1e-5)
    order = jnp.array([3, 1, 5, 0, 4, 2])  # rows may come in any order
    assert float(ndcg(predicted[order], rating[order], user[order], 3)[0]) == pytest.approx(first + third, rel=1e-5)


def test_only_ten_places_count():
    rating, user = jnp.zeros(12).at[11].set(5), jnp.zeros(12, int)
    assert float(ndcg(-jnp.arange(12.0), rating, user, 1)[0]) == 0  # the one with a gain is the twelfth
    assert float(ndcg(jnp.arange(12.0), rating, user, 1)[0]) == 1
    assert float(ndcg(jnp.arange(12.0).at[11].set(2.5), rating, user, 1)[0]) == pytest.approx(1 / np.log2(1 + 9))


def test_rmse_by_hand():
    found = _run.rmse(jnp.array([1, 2, 3, 4], jnp.bfloat16), jnp.array([1, 2, 3, 0.0]))
    assert found.dtype == jnp.float32 and float(found) == 2  # √(16 / 4)


def test_an_evaluation_gives_the_metrics_of_all_that_is_held_out(small):
    """Against numpy in float64, user by user, from the same predictions."""
    job, state = small
    (batch,) = job.eval_batches
    inputs = (batch[k] for k in ("user", "film", "genres", "dense"))
    out = np.asarray(jax.jit(job.model.apply)(state.params, state.mstate, *inputs)[0], np.float64)
    rating, average = batch["rating"].astype(np.float64), made_up().train["rating"].mean(dtype=np.float64)
    assert (made_up().test["user"] == 0).any()
    each = []
    for user in np.unique(made_up().test["user_id"]):  # also those who share a row
        mine = made_up().test["user_id"] == user
        gains, discounts = 2 ** rating[mine] - 1, 1 / np.log2(np.arange(2, 12))
        ranked, best = gains[np.argsort(-out[mine])][:10], np.sort(gains)[::-1][:10]
        each.append((ranked * discounts[: len(ranked)]).sum() / (best * discounts[: len(best)]).sum())
    found = mpjax.train.evaluate.evaluate(mpjax.make_eval_step(job.eval_fn), state, job.eval_batches)
    assert found["rmse"] == pytest.approx(np.sqrt(((average + out - rating) ** 2).mean()), rel=1e-5)
    assert found["ndcg"] == pytest.approx(np.mean(each), rel=1e-5) and 0 < found["ndcg"] < 1


def test_the_presets_are_configs():
    assert recommender_dlrm.PRESETS["cpu"] == {}
    full = Config(**recommender_dlrm.PRESETS["h100"])
    assert full.width % 16 == full.embedding % 16 == 0 and full.batch_size < 90_004
