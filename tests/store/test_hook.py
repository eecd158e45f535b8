"""Checkpoints beside training: when they are saved, what goes with them, and what a run finds when it goes on."""

from __future__ import annotations

import json
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax
from mpjax.store import hook as hook_room
from mpjax.store.checkpoint import Checkpointer
from mpjax.store.hook import CheckpointHook
from mpjax.train.state import own_copy
from mpjax.train.writers import JsonlWriter
from tests.train.toys import fingerprint, linear_model

MODEL = linear_model()
OPTIMIZER = optax.sgd(0.1)


def loss_fn(params, mstate, batch, rng):
    return jnp.square(MODEL.apply(params, mstate, batch["x"])[0] - 1).mean()


STEP = mpjax.make_train_step(loss_fn, OPTIMIZER)
START = mpjax.TrainState.create(MODEL, OPTIMIZER, jax.random.key(0))


def batch_of(attempt: int, value: float = 1.0) -> dict:
    return {"x": np.full((2, 3), value / (attempt + 1), np.float32)}


def until(attempt: int, error: BaseException):
    """Batches that end with an error in place of this one."""

    def batches(n):
        if n == attempt:
            raise error
        return batch_of(n)

    return batches


class Noted(Checkpointer):
    """Notes what it is given to save in place of saving it, and fails where it is told to."""

    def __init__(self, every: int = 1000, failing: str = ""):
        super().__init__("nowhere", every=every)
        self.given: list[tuple] = []
        self.failing = failing

    def save(self, state, step=None, **options):
        if self.failing == "save":
            raise OSError("disk full")
        self.given.append((step, int(state.attempt), options))
        return self.directory / str(step)

    def wait(self):
        if self.failing == "wait":
            raise OSError("disk full")


def fit(checkpointer: Checkpointer, batches=batch_of, attempts: int = 5, step=STEP, hooks=(), **options):
    saving = CheckpointHook(checkpointer)
    return mpjax.fit(step, own_copy(START), batches, attempts=attempts, hooks=[*hooks, saving], **options)


@pytest.mark.parametrize(
    ("every", "attempts", "steps"),
    [(1000, 5, [5]), (2, 5, [2, 4, 5]), (2, 4, [2, 4]), (1, 3, [1, 2, 3]), (1000, 0, [0])],
)
def test_it_saves_every_so_often_and_the_end_once(every, attempts, steps):
    checkpointer = Noted(every)
    fit(checkpointer, attempts=attempts)
    assert [(step, counted) for step, counted, _ in checkpointer.given] == [(n, n) for n in steps]


def test_a_signal_saves_the_step_that_was_finished():
    def batches(attempt):
        if attempt == 2:
            signal.raise_signal(signal.SIGTERM)
        return batch_of(attempt)

    for every in (1000, 3):  # it may be its turn already
        checkpointer = Noted(every)
        assert fit(checkpointer, batches).stopped == "interrupted"
        assert [given[0] for given in checkpointer.given] == [3]


def test_a_second_ctrl_c_saves_nothing(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    checkpointer = Noted()

    def batches(attempt):
        for _ in range(2 * (attempt == 2)):
            signal.raise_signal(signal.SIGINT)
        return batch_of(attempt)

    with pytest.raises(KeyboardInterrupt):
        fit(checkpointer, batches)
    signal.signal(signal.SIGINT, before)
    assert checkpointer.given == []


def test_after_an_error_the_last_good_step_is_saved():
    checkpointer = Noted()
    with pytest.raises(OSError, match="no such picture"):
        fit(checkpointer, until(3, OSError("no such picture")))
    assert [given[:2] for given in checkpointer.given] == [(3, 3)]
    checkpointer = Noted()
    with pytest.raises(mpjax.NonFiniteError):
        fit(checkpointer, lambda n: batch_of(n, np.nan if n > 1 else 1.0), attempts=9, max_consecutive_skips=2)
    ((step, _, _),) = checkpointer.given
    assert step == 5  # two good, two skipped, and one that was dispatched by then


@pytest.mark.parametrize("where", ["data", "hook", "hook before"])
def test_after_an_error_the_metrics_of_all_that_is_saved_are_written(where, tmp_path):
    class Failing(mpjax.Hook):
        def on_step(self, attempt, metrics):
            if where != "data" and attempt == 2:
                raise OSError("no such picture")

    checkpointer, file = Noted(), tmp_path / "metrics.jsonl"
    with pytest.raises(OSError, match="no such picture"):
        hooks = [JsonlWriter(file), Failing()][:: -1 if where == "hook before" else 1]
        fit(checkpointer, until(4, OSError("no such picture")), hooks=hooks)
    ((saved, _, _),) = checkpointer.given
    assert [json.loads(line)["attempt"] for line in file.read_text().splitlines()] == list(range(saved))


@pytest.mark.parametrize("failing", ["save", "wait"])
def test_a_save_that_fails_is_an_error_but_never_in_place_of_another(failing, caplog):
    with pytest.raises(OSError, match="disk full"):
        fit(Noted(failing=failing))
    assert not caplog.records
    with pytest.raises(ValueError, match="no such picture"):
        fit(Noted(failing=failing), until(1, ValueError("no such picture")))
    assert "the state at the end was not saved: disk full" in caplog.text


def test_a_state_that_a_failed_step_took_with_it_is_not_saved(caplog):
    def step(state, batch):
        after = STEP(state, batch)
        if int(after[0].step) == 2:
            raise RuntimeError("out of memory")
        return after

    checkpointer = Noted()
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(checkpointer, step=step)
    assert checkpointer.given == [] and "the state at the end was not saved" in caplog.text


def test_policy_and_evaluations_go_with_each_state_as_json_can_say_them():
    left = iter([0.5, np.nan, -np.inf])
    checkpointer = Noted(every=2)
    saving = CheckpointHook(checkpointer, policy="mixed_bfloat16", allow_nonfinite=["ema"])
    mpjax.fit(
        STEP, own_copy(START), batch_of, attempts=3, hooks=[saving], eval_every=1, eval_batches=[batch_of(0)],
        eval_step=lambda state, batch: {"score": (jnp.float32(next(left)), jnp.float32(1))},
    )  # fmt: skip
    (_, _, second), (_, _, third) = checkpointer.given
    assert second["policy"] == "mixed_bfloat16" and second["allow_nonfinite"] == ["ema"]
    first = {"attempt": 1, "score": 0.5}
    assert second["extra"] == {"evaluations": [first]}  # the one at its own step comes later, and is made again
    assert third["extra"] == {"evaluations": [first, {"attempt": 2, "score": "nan"}, {"attempt": 3, "score": "-inf"}]}
    assert json.dumps(third["extra"], allow_nan=False)


def test_the_metrics_that_lead_to_a_state_are_written_before_it(tmp_path):
    """A run that is killed right after a save goes on with no line missing."""

    class Killed(Noted):
        def save(self, state, step=None, **options):
            written = (tmp_path / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line)["attempt"] for line in written] == list(range(step))
            return super().save(state, step, **options)

    checkpointer = Killed(every=2)
    fit(checkpointer, hooks=[JsonlWriter(tmp_path / "metrics.jsonl")])
    assert len(checkpointer.given) == 3


def test_a_run_goes_on_with_state_evaluations_best_and_patience(tmp_path):
    """Where the newest checkpoint is damaged, with the one before it; the damaged one is then made again."""
    scores = {1: 0.5, 2: np.nan, 3: 0.25, 4: 0.125, 5: 0.75}

    def part(attempts):
        saving = CheckpointHook(Checkpointer(tmp_path, every=2), policy=mpjax.get_policy("mixed_bfloat16"))
        state = own_copy(START)
        earlier = saving.resume(state)
        assert (earlier.state is state) == (attempts == 4)
        result = mpjax.fit(
            STEP, earlier.state, batch_of, attempts=attempts, hooks=[saving], earlier=earlier, eval_every=1,
            eval_step=lambda state, batch: {"score": (jnp.float32(scores[int(state.step)]), jnp.float32(1))},
            eval_batches=[batch_of(0)], best="score", patience=4,
        )  # fmt: skip
        return earlier, result

    fresh, first = part(4)
    assert fresh.evaluations == []
    told = [(found["attempt"], found["score"]) for found in first.evaluations]
    np.testing.assert_equal(told, list(scores.items())[:4])
    data = max((tmp_path / "4" / "arrays" / "d").iterdir(), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.warns(mpjax.CheckpointWarning, match="using step 2") as warned:
        earlier, second = part(5)
    assert len(warned) == 1
    np.testing.assert_equal([(e["attempt"], e["score"]) for e in second.evaluations], list(scores.items()))
    assert [found["attempt"] for found in earlier.evaluations] == [1]  # that of step 2 came after its save
    assert second.best == (0.75, 5) and [row["attempt"] for row in second.history] == [2, 3, 4]
    straight = mpjax.fit(STEP, own_copy(START), batch_of, attempts=5)
    assert fingerprint(second.state) == fingerprint(straight.state)
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.steps() == [2, 4, 5] and checkpointer.info().policy is not None
    assert fingerprint(checkpointer.restore(START)) == fingerprint(straight.state)


def test_of_several_processes_an_error_of_one_alone_saves_nothing(monkeypatch, caplog):
    """The others do not come to the save: it is given up after a short time, and the error stays what it was."""
    met = []

    def nobody(topic, about, word="", seconds=0.0):
        met.append((about, seconds))
        raise TimeoutError("process 1 of 2 did not come")

    monkeypatch.setattr(hook_room, "several", lambda: True)
    monkeypatch.setattr(hook_room, "gather", nobody)
    checkpointer = Noted()
    CheckpointHook(checkpointer).on_end(mpjax.FitResult(START, stopped="failed"))
    assert met == [("the end of a run after an error", 30.0)] and not checkpointer.given
    assert "the state at the end was not saved: process 1 of 2 did not come" in caplog.text
