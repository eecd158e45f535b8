"""The loop: it gives what a loop by hand gives, reads late, tells its hooks, and ends in order however it ends."""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import mpjax.train.clock
from mpjax.numerics.loss_scale import dynamic_loss_scale
from mpjax.train.evaluate import evaluate, make_eval_step
from mpjax.train.hooks import FitResult, Hook, NonFiniteError
from mpjax.train.loop import fit
from mpjax.train.seeds import epoch_batches, seeds
from mpjax.train.state import Aux, TrainState, own_copy
from mpjax.train.step import make_train_step
from mpjax.train.writers import JsonlWriter, ProgressBar, TensorBoardWriter
from tests.train.toys import fingerprint, held, linear_model

KEY = jax.random.key(3)
MODEL = linear_model()
OPTIMIZER = optax.adam(0.1)


def loss_fn(params, mstate, batch, rng):
    """Mean squares; `push` moves the gradient of each leaf, `offset` the loss alone: a batch can spoil either."""
    rows = jnp.square(MODEL.apply(params, mstate, batch["inputs"])[0] - batch["labels"])
    push = sum((batch["push"][name] * x).sum() for name, x in params.items())
    return rows.mean() + push + jax.lax.stop_gradient(batch["offset"]), Aux(mstate, {"worst": rows.max()})


STEP = make_train_step(loss_fn, OPTIMIZER)
EVAL_STEP = make_eval_step(lambda params, mstate, batch: {"loss": (4 * loss_fn(params, mstate, batch, None)[0], 4)})
NAMES = {"attempt", "loss", "grad_norm", "grads_finite", "loss_scale", "skipped", "skipped_in_a_row", "worst"}


def batch_of(attempt: int, w: float = 0, b: float = 0, offset: float = 0) -> dict[str, Any]:
    rng = np.random.default_rng((11, attempt))
    return {
        "inputs": rng.normal(size=(4, 3)).astype(np.float32),
        "labels": rng.normal(size=4).astype(np.float32),
        "offset": np.float32(offset),
        "push": {"w": np.full(3, w, np.float32), "b": np.float32(b)},
    }


EVAL_BATCHES = [batch_of(100), batch_of(101)]


def new_state() -> TrainState:
    return TrainState.create(MODEL, OPTIMIZER, KEY)


def scripted(*values: float) -> Any:
    """An eval step that reports these accuracies one after the other, each at its evaluation."""
    left = iter(values)
    return lambda state, batch: {"accuracy": (jnp.float32(next(left)), jnp.float32(1))}


class Record(Hook):
    """Everything that a hook is told, in order."""

    def __init__(self, events: list | None = None):
        self.events: list[tuple] = [] if events is None else events
        self.result: FitResult | None = None

    def on_step(self, attempt, metrics):
        self.events.append(("step", attempt))

    def on_state(self, attempt, state):
        self.events.append(("state", attempt))

    def on_eval(self, attempt, metrics):
        self.events.append(("eval", attempt))

    def on_end(self, result):
        self.events.append(("end", result.stopped))
        self.result = result


# ---- what it gives ---------------------------------------------------------------------------------------------------


def test_it_gives_what_a_loop_by_hand_gives():
    state, rows = new_state(), []
    for attempt in range(5):
        state, metrics = STEP(state, batch_of(attempt))
        rows.append({"attempt": attempt} | {name: float(x) for name, x in metrics.items()})
    result = fit(STEP, new_state(), batch_of, attempts=5)
    assert fingerprint(result.state) == fingerprint(state)
    assert result.history == rows and set(rows[0]) == NAMES
    assert (result.stopped, result.evaluations, result.best) == ("done", [], None)


def test_the_history_is_plain_floats():
    (row,) = fit(STEP, new_state(), batch_of, attempts=1).history
    assert all(type(value) is float for name, value in row.items() if name != "attempt")


def test_a_metric_that_is_not_one_number_stays_on_the_device():
    def step(state, batch):
        state, metrics = STEP(state, batch)
        return state, metrics | {"histogram": jnp.zeros(3), "probe": {"layer": jnp.zeros(())}}

    assert set(fit(step, new_state(), batch_of, attempts=2).history[1]) == NAMES


def test_a_step_of_ones_own_may_report_plain_numbers():
    def step(state, batch):
        state, metrics = STEP(state, batch)
        return state, metrics | {"lr": 0.5, "rows": 4}

    (row,) = fit(step, new_state(), batch_of, attempts=1).history
    assert row.keys() == NAMES | {"lr", "rows"} and (row["lr"], row["rows"]) == (0.5, 4.0)


def test_a_resumed_run_goes_on_where_it_was():
    """Also over a skip: attempts index the data, so the bad batch is not fed again, and no good one is left out."""
    fed: list[int] = []

    def batches(attempt):
        fed.append(attempt)
        return batch_of(attempt, w=np.nan if attempt == 1 else 0)

    straight = fit(STEP, new_state(), batches, attempts=6)
    half = fit(STEP, new_state(), batches, attempts=3)
    assert (int(half.state.step), int(half.state.skipped)) == (2, 1)
    resumed = fit(STEP, half.state, batches, attempts=6)
    assert fed == [*range(6), *range(3), *range(3, 6)]
    assert fingerprint(resumed.state) == fingerprint(straight.state)
    np.testing.assert_equal(half.history + resumed.history, straight.history)  # nan equals nan


def test_attempts_that_are_made_already_are_not_made_again():
    state = fit(STEP, new_state(), batch_of, attempts=2).state
    before, record = fingerprint(state), Record()
    result = fit(STEP, state, batch_of, attempts=2, hooks=[record])
    assert fingerprint(result.state) == before and result.history == []
    assert record.events == [("end", "done")] and result.steps_per_second == 0.0


def test_an_iterable_is_fed_in_order_and_not_drawn_from_in_vain():
    left = iter([batch_of(attempt) for attempt in range(5)])
    result = fit(STEP, new_state(), left, attempts=3)
    assert result.history == fit(STEP, new_state(), batch_of, attempts=3).history
    assert len(list(left)) == 2


def test_the_end_of_the_data_ends_the_run():
    batches = [batch_of(0), batch_of(1)]
    result = fit(STEP, new_state(), batches, attempts=9, eval_step=EVAL_STEP, eval_batches=EVAL_BATCHES)
    assert result.stopped == "exhausted" and len(result.history) == 2
    assert [found["attempt"] for found in result.evaluations] == [2]


def test_it_learns_from_batches_of_epochs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 3)).astype(np.float32)
    data = epoch_batches({"inputs": x, "labels": x @ np.float32([1, -2, 0.5]) + np.float32(3)}, 4, seeds(0))
    result = fit(STEP, new_state(), lambda n: batch_of(n) | data(n), attempts=200)
    assert result.history[0]["loss"] > 5 and result.history[-1]["loss"] < 1e-2


# ---- row 34: no host sync --------------------------------------------------------------------------------------------


def test_a_step_is_read_after_the_next_is_dispatched():
    events: list[tuple] = []

    def step(state, batch):
        events.append(("dispatch", sum(kind == "dispatch" for kind, _ in events)))
        return STEP(state, batch)

    fit(step, new_state(), batch_of, attempts=3, hooks=[Record(events)])
    assert events == [
        ("dispatch", 0), ("state", 0),
        ("dispatch", 1), ("step", 0), ("state", 1),
        ("dispatch", 2), ("step", 1), ("state", 2),
        ("step", 2), ("end", "done"),
    ]  # fmt: skip


class Guard:
    """A step after which any array-to-host conversion fails, unless it is of what an earlier dispatch gave.

    `transfer_guard` sees no conversion on the CPU. All of jax's go through `ArrayImpl._value`; numpy's go there too for
    an array on two devices, which has no buffer to look into. Waiting is refused as well, but for the first step, which
    compiles, and the last.
    """

    def __init__(self, attempts: int, monkeypatch: pytest.MonkeyPatch):
        self.attempts, self.dispatched = attempts, 0
        self.latest: list[Any] = []
        self.older: list[Any] = []
        array = type(jnp.zeros(()))
        value, wait, wait_all = array._value, array.block_until_ready, jax.block_until_ready

        def read(x):
            if 0 < self.dispatched < self.attempts and not any(x is y for y in self.older):
                raise AssertionError(f"read after dispatch {self.dispatched}")
            return value.fget(x)

        def waiting(really):
            def wait(x):
                if 1 < self.dispatched < self.attempts:
                    raise AssertionError(f"waited after dispatch {self.dispatched}")
                return really(x)

            return wait

        monkeypatch.setattr(array, "_value", property(read))
        monkeypatch.setattr(array, "block_until_ready", waiting(wait))
        monkeypatch.setattr(jax, "block_until_ready", waiting(wait_all))

    def __call__(self, state, batch):
        self.older += self.latest
        state, metrics = STEP(state, batch)
        self.latest = jax.tree.leaves((state, metrics))
        self.dispatched += 1
        return state, metrics


def on_two_devices(state: TrainState) -> TrainState:
    return jax.device_put(state, NamedSharding(Mesh(np.array(jax.devices()[:2]), "d"), PartitionSpec()))


def test_nothing_is_read_between_dispatches(monkeypatch, tmp_path):
    """With every writer at work; the numbers are those of an unguarded run."""
    plain = fit(STEP, new_state(), batch_of, attempts=6).history
    hooks = [JsonlWriter(tmp_path / "metrics.jsonl"), TensorBoardWriter(tmp_path), ProgressBar(6), Record()]
    step = Guard(6, monkeypatch)
    result = fit(step, on_two_devices(new_state()), batch_of, attempts=6, hooks=hooks)
    assert step.dispatched == 6 and result.history == plain


@pytest.mark.gpu
def test_nothing_crosses_to_the_host_unasked_on_the_gpu():
    """Row 34. Under the guard an implicit conversion raises; what is read late is read explicitly."""
    plain = fit(STEP, new_state(), batch_of, attempts=6)
    with jax.transfer_guard_device_to_host("disallow"):
        with pytest.raises(Exception, match="Disallowed device-to-host transfer"):
            float(jnp.float32(1) + jax.random.uniform(KEY))
        options = {"eval_step": EVAL_STEP, "eval_batches": EVAL_BATCHES, "eval_every": 2, "best": "-loss"}
        result = fit(STEP, new_state(), batch_of, attempts=6, **options)
        with pytest.raises(NonFiniteError, match="first non-finite gradient leaf: b;"):
            fit(STEP, new_state(), lambda n: batch_of(n, b=np.nan), attempts=6, max_consecutive_skips=2)
    assert result.history == plain.history and len(result.evaluations) == 3


READERS = {
    "float": float, "int": int, "bool": bool, "item": lambda x: x.item(), "tolist": lambda x: x.tolist(), "str": str,
    "format": "{:.2f}".format, "asarray": np.asarray, "isfinite": np.isfinite, "float32": np.float32,
    "device_get": jax.device_get, "compare": lambda x: 1 if x < 3 else 0, "wait": lambda x: x.block_until_ready(),
    "wait_all": lambda x: jax.block_until_ready((x, x)),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_the_guard_catches_whoever_reads(reader, monkeypatch):
    class Reader(Hook):
        def on_state(self, attempt, state):
            if attempt == 1:
                READERS[reader](state.step)

    with pytest.raises(AssertionError, match="after dispatch 2"):
        fit(Guard(4, monkeypatch), on_two_devices(new_state()), batch_of, attempts=4, hooks=[Reader()])


# ---- row 19: an endless NaN feed -------------------------------------------------------------------------------------


def scaled_state() -> TrainState:
    return TrainState.create(MODEL, OPTIMIZER, KEY, loss_scale=dynamic_loss_scale(2.0**10))


def mute_step(state, batch):
    """A step that cannot be asked for the leaf, as a user's own: it also saves the tests a compilation."""
    return STEP(state, batch)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"w": np.nan}, "first non-finite gradient leaf: w; params are those of step 2: look"),
        ({"b": np.inf, "w": np.nan}, "first non-finite gradient leaf: b; params are those of step 2: look"),
        ({"offset": np.nan}, "all gradients are finite: look at loss, mstate, updates; params are those of step 2"),
    ],
)
def test_an_endless_nan_feed_ends_in_an_error_that_names_the_leaf(bad, words):
    """Row 19. After 2 good steps 4 are skipped, the last at scale 2¹⁰ / 2³; by then a fifth is dispatched."""
    record = Record()
    with pytest.raises(NonFiniteError) as caught:
        fit(
            STEP, scaled_state(), lambda n: batch_of(n, **(bad if n >= 2 else {})), attempts=99,
            hooks=[record], max_consecutive_skips=4,
        )  # fmt: skip
    assert isinstance(caught.value, FloatingPointError) and record.events[-1][0] == "end"
    result, good = record.result, fit(STEP, scaled_state(), batch_of, attempts=2).state
    assert held(result.state) == held(good) and caught.value.result is result
    assert "4 steps in a row were not finite, at step 2, loss scale 128; " + words in str(caught.value)
    assert [row["skipped_in_a_row"] for row in result.history] == [0, 0, 1, 2, 3, 4]


def test_the_leaf_is_sought_under_the_scale_at_which_the_step_failed():
    """Only a scale over 2¹⁰ overflows; the first step failed at 2¹¹, and by then the scale is 2¹⁰."""

    def half_loss(params, mstate, batch, rng):
        return (params["w"].astype(jnp.float16).sum() * jnp.float16(2.0**5)).astype(jnp.float32)

    state = TrainState.create(MODEL, OPTIMIZER, KEY, loss_scale=dynamic_loss_scale(2.0**11))
    with pytest.raises(NonFiniteError, match=r"loss scale 2048; first non-finite gradient leaf: w;"):
        fit(make_train_step(half_loss, OPTIMIZER), state, batch_of, attempts=9, max_consecutive_skips=1)


def test_fifty_skips_in_a_row_are_too_many():
    bad = batch_of(0, offset=np.nan)
    with pytest.raises(NonFiniteError, match=r"50 steps in a row .* gradient leaf: not known to this step;") as caught:
        fit(mute_step, scaled_state(), lambda n: bad, attempts=99)
    assert len(caught.value.result.history) == 50
    result = fit(mute_step, scaled_state(), lambda n: batch_of(n) if n == 49 else bad, attempts=99)
    assert result.stopped == "done" and result.history[-1]["skipped"] == 98


def test_skips_before_a_resume_count():
    state = fit(mute_step, new_state(), lambda n: batch_of(n, w=np.nan), attempts=3).state
    with pytest.raises(NonFiniteError, match="5 steps in a row"):
        fit(mute_step, state, lambda n: batch_of(n, w=np.nan), attempts=9, max_consecutive_skips=5)


# ---- hooks -----------------------------------------------------------------------------------------------------------


def test_a_hook_sees_each_state_alive_once():
    seen = []

    class Copy(Hook):
        def on_state(self, attempt, state):
            assert not any(x.is_deleted() for x in jax.tree.leaves(state))
            seen.append((attempt, int(state.step), np.asarray(state.params["w"])))

    result = fit(STEP, new_state(), batch_of, attempts=3, hooks=[Copy(), Hook()])
    assert [(attempt, step) for attempt, step, _ in seen] == [(0, 1), (1, 2), (2, 3)]
    assert np.array_equal(seen[2][2], result.state.params["w"]) and not np.array_equal(seen[1][2], seen[2][2])


def test_a_hook_gets_the_metrics_of_the_history():
    told = []

    class Listen(Hook):
        def on_step(self, attempt, metrics):
            told.append({"attempt": attempt, **metrics})

        def on_eval(self, attempt, metrics):
            told.append({"attempt": attempt, **metrics})

    result = fit(
        STEP, new_state(), batch_of, attempts=2, eval_step=EVAL_STEP, eval_batches=EVAL_BATCHES, hooks=[Listen()]
    )
    assert told == result.history + result.evaluations


def test_every_hook_hears_of_the_end_whatever_another_raises():
    class Full(Hook):
        def on_end(self, result):
            raise OSError("disk full")

    records = [Record(), Record()]
    with pytest.raises(OSError, match="disk full"):
        fit(STEP, new_state(), batch_of, attempts=1, hooks=[records[0], Full(), records[1]])
    assert [record.events[-1] for record in records] == [("end", "done")] * 2


def test_hooks_hear_of_an_evaluation_after_the_steps_before_it():
    record = Record()
    fit(
        STEP, new_state(), batch_of, attempts=3, hooks=[record],
        eval_step=EVAL_STEP, eval_batches=EVAL_BATCHES, eval_every=2,
    )  # fmt: skip
    assert [event for event in record.events if event[0] != "state"] == [
        ("step", 0), ("step", 1), ("eval", 2), ("step", 2), ("eval", 3), ("end", "done"),
    ]  # fmt: skip


def test_hooks_hear_of_the_end_also_after_an_error():
    def batches(attempt):
        if attempt == 2:
            raise OSError("disk")
        return batch_of(attempt)

    record = Record()
    with pytest.raises(OSError, match="disk"):
        fit(STEP, new_state(), batches, attempts=9, hooks=[record])
    assert [event for event in record.events if event[0] == "end"] == [("end", "failed")]
    assert int(record.result.state.step) == 2


# ---- evaluation, best, patience --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "attempts", "expected"),
    [(0, 4, [4]), (2, 4, [2, 4]), (2, 5, [2, 4, 5]), (9, 4, [4]), (1, 2, [1, 2])],
)
def test_it_evaluates_every_so_often_and_at_the_end(every, attempts, expected):
    result = fit(
        STEP, new_state(), batch_of, attempts=attempts,
        eval_step=EVAL_STEP, eval_batches=EVAL_BATCHES, eval_every=every,
    )  # fmt: skip
    assert [found["attempt"] for found in result.evaluations] == expected
    assert result.evaluations[-1]["loss"] == evaluate(EVAL_STEP, result.state, EVAL_BATCHES)["loss"]


def test_evaluation_changes_nothing():
    options = {"eval_step": EVAL_STEP, "eval_batches": EVAL_BATCHES, "eval_every": 1}
    with_it = fit(STEP, new_state(), batch_of, attempts=3, **options)
    without = fit(STEP, new_state(), batch_of, attempts=3)
    assert fingerprint(with_it.state) == fingerprint(without.state) and with_it.history == without.history


def test_params_are_cast_for_evaluation_only():
    options = {"eval_step": EVAL_STEP, "eval_batches": EVAL_BATCHES}
    result = fit(STEP, new_state(), batch_of, attempts=2, cast=lambda p: jax.tree.map(jnp.zeros_like, p), **options)
    assert result.evaluations[0]["loss"] == evaluate(EVAL_STEP, new_state(), EVAL_BATCHES)["loss"]  # its params are 0
    assert np.any(np.asarray(result.state.params["w"]))


@pytest.mark.parametrize(
    ("best", "values", "expected"),
    [
        ("accuracy", (0.25, 0.75, 0.5), (0.75, 2)),
        ("-accuracy", (0.25, 0.75, 0.5), (0.25, 1)),
        ("accuracy", (0.5, 0.5, 0.5), (0.5, 1)),
        ("-accuracy", (0.5, 0.5, 0.25), (0.25, 3)),
    ],
)
def test_the_best_value_is_the_first_of_the_greatest_or_smallest(best, values, expected):
    result = fit(
        STEP, new_state(), batch_of, attempts=3,
        eval_step=scripted(*values), eval_batches=EVAL_BATCHES[:1], eval_every=1, best=best,
    )  # fmt: skip
    assert result.best == expected and result.stopped == "done"


@pytest.mark.parametrize(("best", "expected"), [("accuracy", (0.5, 3)), ("-accuracy", (0.25, 2))])
def test_a_nan_is_never_the_best_and_never_in_its_way(best, expected):
    result = fit(
        STEP, new_state(), batch_of, attempts=4, best=best,
        eval_step=scripted(np.nan, 0.25, 0.5, np.nan), eval_batches=EVAL_BATCHES[:1], eval_every=1,
    )  # fmt: skip
    assert result.best == expected


@pytest.mark.parametrize(
    ("patience", "values", "attempts"),
    [
        (1, (0.5, 0.25), 2),
        (2, (np.nan, np.nan), 2),
        (2, (0.25, 0.5, 0.5, 0.25), 4),
        (2, (0.25, 0.125, 0.5, 0.25, 0.75, 0.5, 0.625), 7),
    ],
)
def test_patience_counts_evaluations_since_the_best(patience, values, attempts):
    record = Record()
    result = fit(
        STEP, new_state(), batch_of, attempts=50, hooks=[record], best="accuracy", patience=patience,
        eval_step=scripted(*values), eval_batches=EVAL_BATCHES[:1], eval_every=1,
    )  # fmt: skip
    assert result.stopped == "early" and record.events[-1] == ("end", "early")
    assert len(result.history) == len(result.evaluations) == int(result.state.step) == attempts


def test_patience_that_ends_with_the_last_attempt_cuts_nothing_short():
    result = fit(
        STEP, new_state(), batch_of, attempts=2, best="accuracy", patience=1,
        eval_step=scripted(0.5, 0.25), eval_batches=EVAL_BATCHES[:1], eval_every=1,
    )  # fmt: skip
    assert (result.stopped, len(result.evaluations)) == ("done", 2)


def test_settings_that_do_not_fit_are_refused_before_the_first_step(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what a user would see

    def untouched(state, batch):
        raise AssertionError("a step was made")

    for options in ({"eval_every": 2}, {"best": "loss"}, {"best": "loss", "patience": 1}):
        with pytest.raises(ValueError, match=r"came without eval_step; give one from make_eval_step"):
            fit(untouched, new_state(), batch_of, attempts=2, **options)
    with pytest.raises(ValueError, match=r"patience came without best; name the metric to watch"):
        fit(untouched, new_state(), batch_of, attempts=2, eval_step=EVAL_STEP, patience=1)
    with pytest.raises(ValueError, match=r"got max_consecutive_skips=0; legal is an int ≥ 1"):
        fit(STEP, new_state(), batch_of, attempts=1, max_consecutive_skips=0)
    with pytest.raises(ValueError, match=r"eval_step came without eval_batches; give the held-out batches"):
        fit(untouched, new_state(), batch_of, attempts=2, eval_step=EVAL_STEP)
    with pytest.raises(ValueError, match=r"got eval_every=-1; legal is an int ≥ 0"):
        fit(untouched, new_state(), batch_of, attempts=2, eval_step=EVAL_STEP, eval_batches=EVAL_BATCHES, eval_every=-1)
    with pytest.raises(ValueError, match=r"got a list_iterator for eval_batches.*legal is a sequence"):
        fit(untouched, new_state(), batch_of, attempts=2, eval_step=EVAL_STEP, eval_batches=iter(EVAL_BATCHES))


def test_a_best_that_is_no_metric_is_named():
    with pytest.raises(ValueError, match=r"best='-los' names no metric of the evaluation; legal are loss, or -NAME"):
        fit(STEP, new_state(), batch_of, attempts=1, eval_step=EVAL_STEP, eval_batches=EVAL_BATCHES, best="-los")


def test_evaluations_are_logged(caplog):
    with caplog.at_level(logging.INFO, "mpjax"):
        fit(STEP, new_state(), batch_of, attempts=1, eval_step=scripted(0.5), eval_batches=EVAL_BATCHES[:1])
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("mpjax", "INFO", "1 attempts: accuracy 0.5")
    ]


# ---- a run that goes on with what an earlier part of it gave -----------------------------------------------------------


def restored(result: FitResult) -> FitResult:
    """The result with a state of its own, as from a checkpoint: `fit` takes the memory of the one that it is given."""
    return dataclasses.replace(result, state=own_copy(result.state))


def accuracies(*values: float) -> dict[str, Any]:
    """Options of a run that evaluates after each attempt, and finds these."""
    return {"eval_step": scripted(*values), "eval_batches": EVAL_BATCHES[:1], "eval_every": 1, "best": "accuracy"}


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_parts_of_a_run_give_together_what_it_gives_at_once(stop):
    """With an evaluation after every second attempt, and one at the end of the first part, which a straight run makes
    only if it is due there."""
    options = {"eval_step": EVAL_STEP, "eval_batches": EVAL_BATCHES, "eval_every": 2, "best": "-loss"}
    straight = fit(STEP, new_state(), batch_of, attempts=6, **options)
    part = fit(STEP, new_state(), batch_of, attempts=stop, **options)
    part.evaluations = [found for found in part.evaluations if found["attempt"] % 2 == 0]
    kept = restored(part)
    whole = fit(STEP, kept.state, batch_of, attempts=6, earlier=kept, **options)
    assert (whole.history, whole.evaluations, whole.best) == (straight.history, straight.evaluations, straight.best)
    assert fingerprint(whole.state) == fingerprint(straight.state) and whole.stopped == "done"
    assert len(kept.history) == len(part.history) == stop  # what is given is not written to


def test_what_was_measured_after_the_state_is_dropped():
    """The run went on from an older checkpoint than its last."""
    far = fit(STEP, new_state(), batch_of, attempts=5, **accuracies(0.5, 0.25, 0.125, 0.75, 0.25))
    near = fit(STEP, new_state(), batch_of, attempts=3).state
    again = fit(STEP, near, batch_of, attempts=4, earlier=far, **accuracies(0.375))
    assert [row["attempt"] for row in again.history] == [0, 1, 2, 3]
    assert [(found["attempt"], found["accuracy"]) for found in again.evaluations] == [
        (1, 0.5), (2, 0.25), (3, 0.125), (4, 0.375)
    ]  # fmt: skip
    assert again.best == (0.5, 1) and far.best == (0.75, 4)


def test_patience_counts_on_and_at_its_end_no_step_is_made():
    part = restored(fit(STEP, new_state(), batch_of, attempts=3, **accuracies(0.5, 0.25, 0.125)))
    result = fit(STEP, part.state, batch_of, attempts=9, patience=3, earlier=part, **accuracies(0.375))
    assert (result.stopped, len(result.history), result.best) == ("early", 4, (0.5, 1))
    over = restored(result)
    result = fit(STEP, over.state, batch_of, attempts=9, patience=3, earlier=over, **accuracies())
    assert (result.stopped, len(result.history), len(result.evaluations)) == ("early", 4, 4)


@pytest.mark.parametrize("made", [False, True])
def test_an_evaluation_that_was_due_is_made_when_the_run_goes_on(made):
    """A checkpoint may be from before the evaluation at its own step, and the evaluation may have been left."""
    part = restored(fit(STEP, new_state(), batch_of, attempts=2, **accuracies(0.5, 0.25)))
    if not made:
        del part.evaluations[-1]
    events: list[tuple] = []
    result = fit(
        STEP, part.state, batch_of, attempts=3, hooks=[Record(events)], earlier=part, **accuracies(0.75, 0.125)
    )
    assert [found["accuracy"] for found in result.evaluations] == [
        0.5,
        *([0.25] if made else [0.75]),
        *([0.75] if made else [0.125]),
    ]
    assert [event for event in events if event[0] == "eval"] == [*([] if made else [("eval", 2)]), ("eval", 3)]


# ---- SIGTERM, Ctrl-C, and the clock ----------------------------------------------------------------------------------


def test_ctrl_c_ends_the_run_with_what_was_measured(caplog):
    def batches(attempt):
        if attempt == 3:
            raise KeyboardInterrupt
        return batch_of(attempt)

    record = Record()
    result = fit(
        STEP, new_state(), batches, attempts=9, hooks=[record],
        eval_step=EVAL_STEP, eval_batches=EVAL_BATCHES, eval_every=2,
    )  # fmt: skip
    assert result.stopped == "interrupted" and record.events[-1] == ("end", "interrupted")
    assert int(result.state.step) == 3 and [found["attempt"] for found in result.evaluations] == [2]
    assert [row["attempt"] for row in result.history] == [0, 1, 2]
    assert [event for event in record.events if event[0] == "step"][-1] == ("step", 2)
    assert "interrupted: 3 attempts were made" in caplog.text


@pytest.fixture
def ctrl_c():
    """Python's own handler: a shell lets what it starts in the background ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)


@SIGNALS
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("when", ["first", "later"])
def test_a_signal_in_the_middle_of_a_step_loses_nothing(when, number):
    """The signal comes when the old state is donated and the new one is not yet anybody's."""
    hit = {"first": 0, "later": 3}[when]

    def step(state, batch):
        after = STEP(state, batch)
        if int(after[0].step) == hit + 1:
            signal.raise_signal(number)
        return after

    before, record = signal.getsignal(number), Record()
    options = {"eval_step": EVAL_STEP, "eval_batches": EVAL_BATCHES, "eval_every": hit + 1}
    result = fit(step, new_state(), batch_of, attempts=9, hooks=[record], **options)
    assert result.stopped == "interrupted" and signal.getsignal(number) is before
    straight = fit(STEP, new_state(), batch_of, attempts=hit + 1)
    assert fingerprint(result.state) == fingerprint(straight.state) and result.history == straight.history
    assert record.events[-3:] == [
        ("state", hit),
        ("step", hit),
        ("end", "interrupted"),
    ]  # and no evaluation, due or not


@SIGNALS
@pytest.mark.usefixtures("ctrl_c")
def test_a_signal_before_the_first_step_prevents_it(number):
    drawn = []

    class Early(list):
        """Held-out batches: `fit` asks how many there are before it begins."""

        def __iter__(self):
            signal.raise_signal(number)
            return super().__iter__()

    part = restored(fit(STEP, new_state(), batch_of, attempts=1))
    before = fingerprint(part.state)
    result = fit(
        STEP, part.state, drawn.append, attempts=9, earlier=part,
        eval_step=EVAL_STEP, eval_batches=Early(EVAL_BATCHES), eval_every=1,
    )  # fmt: skip
    assert (result.stopped, result.evaluations, drawn) == ("interrupted", [], [])
    assert fingerprint(result.state) == before and len(result.history) == 1


@SIGNALS
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("attempts", [2, 9])
def test_an_evaluation_is_left_between_two_batches_and_made_later(number, attempts):
    """After two attempts, of which there are to be no more, or more."""
    seen = []

    def eval_step(state, batch):
        if not seen:
            signal.raise_signal(number)
        seen.append(batch)
        return EVAL_STEP(state, batch)

    options = {"eval_batches": EVAL_BATCHES, "eval_every": 2}
    result = fit(eval_step=eval_step, step=STEP, state=new_state(), batches=batch_of, attempts=attempts, **options)
    assert (result.stopped, len(seen), result.evaluations, len(result.history)) == ("interrupted", 1, [], 2)
    kept = restored(result)
    result = fit(STEP, kept.state, batch_of, attempts=attempts, eval_step=EVAL_STEP, earlier=kept, **options)
    straight = fit(STEP, new_state(), batch_of, attempts=attempts, eval_step=EVAL_STEP, **options)
    assert (result.evaluations, result.history) == (straight.evaluations, straight.history)


@SIGNALS
@pytest.mark.usefixtures("ctrl_c")
def test_a_signal_while_hooks_are_told_of_the_end_is_not_lost(number):
    class Save(Hook):
        def on_end(self, result):
            signal.raise_signal(number)

    assert fit(STEP, new_state(), batch_of, attempts=2, hooks=[Save()]).stopped == "interrupted"


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_in_a_notebook_leaves_at_once(monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)

    def step(state, batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")

    record = Record()
    with pytest.raises(KeyboardInterrupt):
        fit(step, new_state(), batch_of, attempts=9, hooks=[record])
    assert record.events == [("end", "left")] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_runs_in_a_thread_which_may_not_handle_signals():
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(fit, STEP, new_state(), batch_of, attempts=3).result()
    assert result.history == fit(STEP, new_state(), batch_of, attempts=3).history


class Hours:
    """A clock that moves only when told to, in place of the module `time`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr(mpjax.train.clock, "time", self)

    def perf_counter(self) -> float:
        return self.now

    def slow(self, function: Any, seconds: list[float]) -> Any:
        def slowed(*args):
            self.now += seconds.pop(0) if len(seconds) > 1 else seconds[0]
            return function(*args)

        return slowed


@pytest.mark.parametrize("every", [0, 1, 2])
def test_speed_counts_neither_the_first_step_nor_evaluations(every, monkeypatch):
    """The first step takes 100 seconds, each later one half a second, each evaluation 30."""
    clock = Hours(monkeypatch)
    step, eval_step = clock.slow(STEP, [100.0, 0.5]), clock.slow(EVAL_STEP, [30.0])
    result = fit(
        step, new_state(), batch_of, attempts=5, eval_step=eval_step, eval_batches=EVAL_BATCHES, eval_every=every
    )
    assert result.steps_per_second == 2.0


def test_an_interrupted_run_has_the_speed_that_it_had(monkeypatch):
    """Two steps a second before and after an evaluation; the second stretch counts although nothing ended it."""
    clock = Hours(monkeypatch)

    def batches(attempt):
        if attempt == 7:
            raise KeyboardInterrupt
        return batch_of(attempt)

    result = fit(
        clock.slow(STEP, [100.0, 0.5]), new_state(), batches, attempts=9,
        eval_step=clock.slow(EVAL_STEP, [30.0]), eval_batches=EVAL_BATCHES, eval_every=4,
    )  # fmt: skip
    assert result.stopped == "interrupted" and result.steps_per_second == 2.0


def test_speed_does_not_count_what_a_hook_waits_for(monkeypatch):
    """Each step takes half a second, each save 30. What a save is of has been told before it."""
    clock, events = Hours(monkeypatch), []

    class Save(Record):
        def waits(self, attempt):
            return attempt % 2 == 1

        def on_state(self, attempt, state):
            super().on_state(attempt, state)
            clock.now += 30.0 * self.waits(attempt)

    result = fit(clock.slow(STEP, [100.0, 0.5]), new_state(), batch_of, attempts=6, hooks=[Save(events)])
    assert result.steps_per_second == 2.0
    assert events == [
        ("state", 0), ("step", 0), ("step", 1), ("state", 1),
        ("state", 2), ("step", 2), ("step", 3), ("state", 3),
        ("state", 4), ("step", 4), ("step", 5), ("state", 5), ("end", "done"),
    ]  # fmt: skip


def test_one_step_has_no_speed():
    assert fit(STEP, new_state(), batch_of, attempts=1).steps_per_second == 0.0
