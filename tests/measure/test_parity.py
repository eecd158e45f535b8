"""Parity on a job of one weight: what is paired, what is refused, and what is said of each outcome."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import mpjax
from mpjax.cli.output import print_json
from mpjax.measure.equivalence import equivalence
from mpjax.measure.paired import Pair, Run, check_same_start, digest
from mpjax.measure.plots import parity_curves

BF16_PARAMS = "params=bfloat16,compute=float32,output=float32"


def make_job(policy, seed, *, planted=None):
    """Learn y = (w + 1)·x from w in [1.1, 1.15): each update is near 1e-3, less than half a bfloat16 step there (2⁻⁸)."""
    found = mpjax.PolicyMap.of(policy).default
    candidate = policy != "float32"

    def init(rng, x):
        shift = 1e-3 if planted == "init" and candidate else 0.0
        return found.cast_to_param({"w": 1.1 + jax.random.key_data(rng)[:1] % 50 / 1000 + shift}), {}

    def apply(params, mstate, x, rng=None):
        params, x = found.cast_to_compute((params, x))
        return found.cast_to_output(x @ params["w"]), mstate

    def loss(params, mstate, batch, rng=None):
        error = jnp.square(apply(params, {}, batch["x"])[0] - 2.5 * batch["x"][:, 0]).mean()
        return error * (jnp.nan if planted in ("nan", "nan reference") and candidate == (planted == "nan") else 1.0)

    def evaluate(params, mstate, batch):
        return {"error": loss(params, mstate, batch), "loss": loss(params, mstate, batch), "accuracy": jnp.float32(0.5)}

    def batch(attempt):
        shift = 1 if planted == "first batch" and candidate else 0
        shift = 1 if planted == "batch 2" and candidate and attempt == 2 else shift
        x = np.random.default_rng((seed, attempt)).uniform(0.5, 1.0, (4, 1)) + shift
        return {"x": x.astype(np.float32)}

    held_out = [{"x": np.full((2, 1), 2.0 if planted == "held-out" and candidate else 1.0, np.float32)}]
    model = mpjax.Model(init, apply, policy=found, cast_params=found.cast_to_compute)
    sample = (np.ones((1, 1), np.float32),)
    return mpjax.Job(model, loss, optax.sgd(1e-3), batch, sample, evaluate, held_out)


def planting(fault):
    return lambda policy, seed: make_job(policy, seed, planted=fault)


def test_float32_against_itself_differs_by_exactly_zero():
    found = mpjax.parity(make_job, "float32", margin=1e-6, attempts=3, seeds=2, metric="-loss")
    assert found.verdict == "equivalent"
    assert [pair.difference for pair in found.pairs] == [0.0, 0.0]
    assert all(
        pair.reference.losses == pair.candidate.losses and len(pair.reference.losses) == 3 for pair in found.pairs
    )
    assert found.pairs[0].reference.final != found.pairs[1].reference.final  # a seed is another init and other data
    assert (
        found.spread == pytest.approx(np.std([pair.reference.final for pair in found.pairs], ddof=1)) and found.spread
    )


@pytest.mark.filterwarnings("ignore::mpjax.core.cautions.VanishingUpdateWarning")  # it is right, and what is planted
def test_a_planted_degradation_is_rejected_and_a_policy_that_works_is_not():
    """bfloat16 params never move here; in float32 the loss sinks with each step."""
    settings = {"margin": 0.05, "attempts": 40, "seeds": [3, 8], "metric": "-loss"}
    worse = mpjax.parity(make_job, BF16_PARAMS, **settings)
    assert worse.verdict == "worse" and worse.test.verdict == "different"
    assert [pair.seed for pair in worse.pairs] == [3, 8] and all(pair.difference > 0.05 for pair in worse.pairs)
    assert worse.explain() == "different: worse, loss differs by more than 0.05"
    assert mpjax.parity(make_job, "mixed_bfloat16", **settings).verdict == "equivalent"


def test_seeds_that_share_their_functions_share_a_compilation():
    """Two seeds, and both sides float32: one step is traced if all four jobs have the same functions, else four."""
    traced = []

    @functools.cache
    def loss_of(shared):
        first = make_job("float32", 0)
        return lambda *args: (traced.append(shared), first.loss_fn(*args))[1]

    optimizer = optax.sgd(1e-3)

    def sharing(policy, seed):
        return dataclasses.replace(make_job(policy, seed), loss_fn=loss_of(True), optimizer=optimizer)

    def apart(policy, seed):
        loss_of.cache_clear()
        return dataclasses.replace(make_job(policy, seed), loss_fn=loss_of(False), optimizer=optimizer)

    settings = {"margin": 1.0, "attempts": 2, "seeds": 2, "metric": "-loss"}
    found = [mpjax.parity(make, "float32", **settings).pairs for make in (sharing, apart)]
    assert (traced.count(True), traced.count(False)) == (1, 4)
    assert found[0] == found[1]


@pytest.mark.parametrize("recipe", ["fp8", "fp8_delayed"])
def test_float8_is_paired_with_the_same_start_though_its_state_is_more(recipe):
    """y = x·w with w from 0 to a random matrix: both end near the noise, and float8 elsewhere than float32."""
    w = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)

    def make_job(policy, seed):
        model = mpjax.wrap(nn.Dense(16, kernel_init=nn.initializers.zeros, use_bias=False), policy)

        def batch(attempt):
            x = np.random.default_rng((seed, attempt)).normal(size=(64, 16)).astype(np.float32)
            return {"x": x, "y": x @ w}

        def loss_fn(params, mstate, batch, rng):
            y, mstate = model.apply(params, mstate, batch["x"])
            return jnp.square(y - batch["y"]).mean(), mpjax.Aux(mstate, {})

        def evaluate(params, mstate, batch):
            return {"loss": jnp.square(model.apply(params, mstate, batch["x"])[0] - batch["y"]).mean()}

        return mpjax.Job(model, loss_fn, optax.sgd(2.0), batch, (np.ones((1, 16), np.float32),), evaluate, [batch(99)])

    found = mpjax.parity(make_job, f"p=f32,c=bf16,o=f32,dot={recipe}", margin=0.5, attempts=12, seeds=2, metric="-loss")
    assert found.verdict == "equivalent"
    for pair in found.pairs:
        assert pair.reference.losses[0] == pair.candidate.losses[0]  # y = 0 in both
        assert pair.candidate.losses[-1] < 0.05 * pair.candidate.losses[0]
        assert pair.candidate.losses[-1] != pair.reference.losses[-1]


def test_step_options_reach_the_step():
    with pytest.raises(ValueError, match=r"clip_norm=-1.0; legal"):
        mpjax.parity(make_job, "mixed_bfloat16", margin=1.0, attempts=1, step_options={"clip_norm": -1.0})


@pytest.mark.parametrize("options", [{}, {"skip": "off"}])
def test_a_candidate_that_diverges_is_worse(options):
    """Given up after 50 skipped steps; or, where nothing is skipped, with params of NaN and an accuracy all the same."""
    found = mpjax.parity(
        planting("nan"), "mixed_bfloat16", margin=1.0, attempts=55, seeds=1, metric="accuracy", step_options=options
    )
    assert (found.verdict, found.diverged, found.test.verdict) == ("worse", (0,), "different")
    assert math.isnan(found.pairs[0].difference)
    why = found.pairs[0].candidate.diverged
    assert "not finite" in why and ("given up" in why) == (not options)
    assert len(found.pairs[0].candidate.losses) == (55 if options else 50)
    assert found.explain() == "different: worse, mixed_bfloat16 diverged at seed 0"
    assert "nan" in str(found) and json.dumps(found.as_dict())


def test_a_reference_that_diverges_is_an_error():
    with pytest.raises(
        mpjax.NonFiniteError, match=r"the reference diverged at seed 0: .*; parity needs a reference that"
    ):
        mpjax.parity(planting("nan reference"), "mixed_bfloat16", margin=1.0, attempts=55, seeds=1)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("init", "the initial params differ, first at w"),
        ("first batch", "the first batch of the two jobs differ"),
        ("held-out", "the held-out data of the two jobs differ"),
        ("batch 2", "the batches of attempt 2 differ"),
    ],
)
def test_runs_that_are_no_pair_are_refused(fault, said):
    with pytest.raises(ValueError, match=f"the runs of seed 4 are no pair: {said}; legal is a make_job whose"):
        mpjax.parity(planting(fault), "mixed_bfloat16", margin=1.0, attempts=3, seeds=[4])


def test_the_same_start_is_one_of_bytes_and_param_dtypes_may_differ():
    params = {"a": jnp.float32([1.0, 1 / 3]), "b": jnp.float32([0.0])}
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for x, y in ((params, params), (params, rounded), (rounded, params)):
        check_same_start(x, y, 0)
    for other in (
        {**params, "b": jnp.float32([-0.0])},
        {**params, "b": jnp.float32([[0.0]])},
    ):  # −0 == 0, but not in bytes
        with pytest.raises(ValueError, match="first at b"):
            check_same_start(params, other, 0)
    with pytest.raises(ValueError, match="the param b is there under one policy only"):
        check_same_start(params, {"a": params["a"]}, 0)


def test_a_digest_tells_bytes_dtypes_shapes_and_places_apart():
    x = np.float32([1, 2])
    others = [{"x": x[::-1]}, {"x": x.astype(np.float16)}, {"x": x[None]}, {"y": x}, [x], {"x": jax.random.key(0)}]
    assert len({digest(tree) for tree in [{"x": x}, *others]}) == 7
    assert digest({"x": x}) == digest({"x": jnp.asarray(x)}) and digest(jax.random.key(1)) != digest(jax.random.key(0))


@pytest.mark.parametrize(
    ("candidate", "settings", "said"),
    [
        ("bf17", {}, "Unknown dtype 'bf17'"),
        ("float32", {"reference": "f33"}, "Unknown dtype 'f33'"),
        ("bf16", {"margin": 0.0}, "margin=0.0; legal"),
        ("bf16", {"alpha": 0.7}, "alpha=0.7; legal"),
        ("bf16", {"attempts": 0}, "attempts=0; legal is an int ≥ 1"),
        ("bf16", {"seeds": 0}, "seeds=0; legal is at least one, each once"),
        ("bf16", {"seeds": [1, 1]}, "each once"),
        ("bf16", {"seeds": [-1]}, "seed=-1; legal"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_job_is_made(candidate, settings, said):
    def untouched(policy, seed):
        raise AssertionError("a job was made")

    with pytest.raises(ValueError, match=said):
        mpjax.parity(untouched, candidate, **{"margin": 1.0, "attempts": 1, **settings})


def test_a_metric_that_is_not_there_is_refused_before_anything_trains(monkeypatch):
    monkeypatch.setattr("mpjax.measure.paired.fit", None)
    with pytest.raises(ValueError, match="metric='acuracy'; legal are accuracy, error, loss, or -NAME"):
        mpjax.parity(make_job, "mixed_bfloat16", margin=1.0, attempts=1, metric="acuracy")
    without = lambda policy, seed: mpjax.Job(*[getattr(make_job(policy, seed), f) for f in  # noqa: E731
                                               ("model", "loss_fn", "optimizer", "batches", "sample")])  # fmt: skip
    with pytest.raises(ValueError, match="without eval_fn or eval_batches"):
        mpjax.parity(without, "bf16", margin=1.0, attempts=1)


def test_a_job_that_does_not_use_its_policy_is_refused_where_it_tells():
    with pytest.raises(ValueError, match=r"the same policy in the models of both jobs, for 'float32' and for 'bf16'"):
        mpjax.parity(lambda policy, seed: make_job("float32", seed), "bf16", margin=1.0, attempts=1)


def test_losses_that_are_the_same_to_the_last_bit_are_doubted():
    pairs = (Pair(0, Run(0.9, (2.0,)), Run(0.9, (2.0,))), Pair(1, Run(0.9, (2.0,)), Run(0.9, (2.0,))))
    found = mpjax.Parity("float32", "bf16", "accuracy", 1, pairs, equivalence([0.0, 0.0], 0.01))
    assert found.explain().endswith("does the model use the policy?")
    assert not dataclasses.replace(found, candidate="float32").explain().endswith("?")


def by_hand(differences, metric="accuracy", margin=0.01, **names):
    pairs = tuple(Pair(i, Run(0.9, (2.0, 1.0 + i)), Run(0.9 + d, (2.0, 1.1 + i))) for i, d in enumerate(differences))
    test = equivalence([pair.difference for pair in pairs], margin)
    return mpjax.Parity("float32", names.get("candidate", "bf16"), metric, 2, pairs, test)


@pytest.mark.parametrize(
    ("differences", "metric", "verdict", "said"),
    [
        ([0.0], "accuracy", "undecided", "at least 2 seeds are needed"),
        ([0.02, 0.0, -0.02], "accuracy", "undecided", r"with 3 seeds: about 36 would do to show it equivalent"),
        ([0.0, 0.01, 0.02], "accuracy", "undecided", "no number of seeds up to 1000 would do"),
        ([-0.02, -0.01, -0.03], "accuracy", "undecided", "would do to show it worse"),
        ([0.05, 0.051, 0.052], "accuracy", "better", "different: better, accuracy differs by more than 0.01"),
        ([0.05, 0.051, 0.052], "-loss", "worse", "different: worse, loss differs"),
        ([-0.05, -0.051, -0.052], "-loss", "better", "different: better, loss differs"),
        ([0.0, 0.001, -0.001], "-loss", "equivalent", "equivalent: loss differs by less than 0.01"),
    ],
)
def test_each_outcome_in_words(differences, metric, verdict, said, capsys):
    found = by_hand(differences, metric)
    assert found.verdict == verdict and found.explain().find(said.replace("\\", "")) >= 0
    assert said.replace("\\", "") in str(found).splitlines()[-1]
    assert len(str(found).splitlines()) == 2 + len(differences) + 3
    plain = found.as_dict()
    assert plain["verdict"] == verdict and len(plain["pairs"]) == len(differences)
    assert plain["pairs"][0]["candidate"]["losses"] == (2.0, 1.1) and plain["margin"] == 0.01
    print_json(plain)
    assert json.loads(capsys.readouterr().out)["seeds_needed"] == found.test.seeds_needed


@pytest.fixture
def figure(figures):
    """The figure that would have been saved."""

    def draw(found):
        parity_curves(found, "x.png")
        return figures[-1]

    return draw


def test_the_picture_shows_median_range_margin_interval_and_spread(figure):
    found = by_hand([0.001, 0.002, 0.006])
    drawn = figure(found)
    curves, differences = drawn.axes
    assert [line.get_ydata().tolist() for line in curves.lines] == [
        [2.0, 2.0],
        [2.0, 2.1],
    ]  # medians of 1, 2, 3 (+ 0.1)
    bands = [path.get_paths()[0].get_extents() for path in curves.collections]
    np.testing.assert_allclose([(b.ymin, b.ymax) for b in bands], [(1.0, 3.0), (1.1, 3.1)])
    points, mean = (line.get_xdata() for line in differences.lines[1:] if len(line.get_xdata()) in (3, 1))
    np.testing.assert_allclose(points, [0.1, 0.2, 0.6], rtol=1e-9)  # in points of a hundred
    np.testing.assert_allclose(mean, 0.3, rtol=1e-9)
    (margin,) = (patch.get_extents().transformed(differences.transData.inverted()) for patch in differences.patches)
    np.testing.assert_allclose([margin.xmin, margin.xmax], [-1, 1])
    interval, spread = (path.get_segments()[0][:, 0] for path in differences.collections)
    np.testing.assert_allclose(interval, 100 * np.array(found.test.interval))
    assert spread.tolist() == [0, 0]  # every run of the reference ended at 0.9
    assert [t.get_text() for t in differences.get_yticklabels()] == [
        "seed 0", "seed 1", "seed 2", "mean, 90 % interval", "± sd of float32"
    ]  # fmt: skip
    assert "margin ±1 %" in [text.get_text() for text in drawn.legends[0].get_texts()]
    assert drawn.get_suptitle() == "equivalent: accuracy differs by less than 0.01"


@pytest.mark.parametrize(("spread", "cut"), [(0.02, False), (0.04, True)])
def test_a_spread_that_is_much_the_largest_leaves_room_for_the_margin(spread, cut, figure):
    """Differences of 0.001, margin 0.01: the axis ends at 1.3 times the largest, and a spread over twice that is cut."""
    test = equivalence([0.001, 0.001], 0.01)
    pairs = tuple(Pair(i, Run(x, (2.0,)), Run(x + 0.001, (2.0,))) for i, x in enumerate((0.0, spread * 2**0.5)))
    axes = figure(mpjax.Parity("float32", "bf16", "error", 1, pairs, test)).axes[1]
    bar = axes.collections[-1].get_segments()[0][:, 0]
    np.testing.assert_allclose(bar, [-0.026, 0.026] if cut else [-0.02, 0.02])
    assert [text.get_text() for text in axes.texts] == ["◂ ±0.04 ▸"] * cut
    assert (axes.get_xlim()[1] < 0.014) == cut


def test_a_run_that_was_given_up_is_marked_and_its_curve_ends(figure):
    pairs = tuple(
        Pair(
            i, Run(1.0, (2.0, 1.5, 1.0)), Run(math.nan, (3.0, math.nan), "given up") if i else Run(1.0, (2.0, 1.5, 1.0))
        )
        for i in range(2)
    )
    test = equivalence([pair.difference for pair in pairs], 0.01)
    drawn = figure(mpjax.Parity("float32", "bf16", "-loss", 3, pairs, test))
    curves, differences = drawn.axes
    assert curves.lines[1].get_ydata().tolist() == [2.5, 1.5, 1.0]
    (mark,) = [line for line in differences.lines if line.get_marker() == "x"]
    assert mark.get_xydata().tolist() == [[0.97, 1]]  # at the right edge: a larger loss is worse
    assert [t.get_text() for t in differences.get_yticklabels()][:2] == ["seed 0", "seed 1 diverged"]
    drawn.canvas.draw()  # and no warning comes
