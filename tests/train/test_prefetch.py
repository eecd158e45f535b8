"""Batches ahead of the step: made while it runs, the same ones to the bit, and the thread ends however the run does."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import logging
import queue
import signal
import sys
import threading
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from mpjax.core.model import Model
from mpjax.core.tree import nbytes
from mpjax.train.hooks import Hook
from mpjax.train.loop import fit
from mpjax.train.prefetch import prefetch
from mpjax.train.sharding import shard_batch, shard_state
from mpjax.train.state import TrainState, own_copy
from mpjax.train.step import make_train_step
from mpjax.wrap import wrap
from tests.train.toys import equations, fingerprint, linear_model

KEY = jax.random.key(3)
MODEL = linear_model()
LONG = 30.0  # seconds until a test gives up waiting for another thread; nothing here takes as long


def loss_fn(params, mstate, batch, rng):
    return jnp.square(MODEL.apply(params, mstate, batch["x"])[0] - batch["y"]).mean()


STEP = make_train_step(loss_fn, optax.sgd(0.1))


def new_state():
    return TrainState.create(MODEL, optax.sgd(0.1), KEY)


def batch_of(attempt):
    rng = np.random.default_rng((5, attempt))
    return {"x": rng.normal(size=(8, 3)).astype(np.float32), "y": rng.normal(size=8).astype(np.float32)}


def counting(state, batch):
    """A step that trains nothing."""
    return dataclasses.replace(state, step=state.step + 1), {"loss": jnp.float32(0)}


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mpjax prefetch")]


@pytest.fixture(autouse=True)
def no_thread_stays():
    assert threads() == []
    yield
    assert threads() == []


# ---- the step does not wait ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_while_a_step_runs_the_next_batches_are_made_and_sent(depth):
    """No clock: the step of attempt n ends only when batch n + depth lies on the device."""
    attempts, made = 6, [threading.Event() for _ in range(6)]
    drawn: list[int] = []

    def batches(attempt):
        drawn.append(attempt)
        return batch_of(attempt)

    def place(batch):
        batch = jax.device_put(batch)
        made[len(drawn) - 1].set()
        return batch

    def step(state, batch):
        n = int(state.step)
        last = min(n + depth, attempts - 1)
        assert made[last].wait(LONG), f"step {n} waited in vain for batch {last}"
        assert drawn == list(range(last + 1))  # and for no more there is room
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(batch))
        return counting(state, batch)

    result = fit(step, new_state(), prefetch(batches, depth=depth, place=place), attempts=attempts)
    assert result.stopped == "done" and drawn == list(range(attempts))


def test_workers_draw_at_once_and_their_batches_come_in_order():
    """No clock: a draw ends only when two more are under way; behind the last ones come those that had to wait for none."""
    attempts, together = 9, threading.Barrier(3)

    def batches(attempt):
        together.wait(LONG)
        return np.float32(attempt)

    with prefetch(batches, depth=4, workers=3).ahead(range(3, 3 + attempts)) as feed:
        assert [float(batch) for batch in feed] == [3.0 + n for n in range(attempts)]


def test_workers_together_have_the_room_of_the_depth():
    """With room for 5 beside the one in use, 3 workers draw 5 before the first is taken, then one more for each."""
    drawn, more = queue.SimpleQueue(), []

    def batches(attempt):
        drawn.put(attempt)
        return batch_of(attempt)

    def step(state, batch):
        np.testing.assert_array_equal(batch["x"], batch_of(int(state.step))["x"])
        while len(more) < min(6 + int(state.step), 9):
            more.append(drawn.get(timeout=LONG))
        assert drawn.empty() and sorted(more) == list(range(len(more)))
        return counting(state, batch)

    fit(step, new_state(), prefetch(batches, depth=5, workers=3), attempts=9)


def test_an_error_of_one_worker_comes_at_its_attempt():
    def batches(attempt):
        if attempt == 4:
            raise OSError("no such picture")
        return batch_of(attempt)

    seen = []
    with pytest.raises(OSError, match="no such picture"):
        with prefetch(batches, depth=3, workers=3).ahead(range(20)) as feed:
            for batch in feed:
                seen.append(batch)
    assert len(seen) == 4


@pytest.mark.parametrize("workers, of", [(0, batch_of), (3, batch_of), (True, batch_of), (2, [1, 2])])
def test_workers_without_work_are_refused(workers, of):
    with pytest.raises(ValueError, match=f"got workers={workers} .*; legal is 1"):
        prefetch(of, depth=2, workers=workers)


def test_without_it_a_batch_is_made_when_it_is_needed():
    """What the test above waits for does not happen by itself."""
    drawn: list[int] = []

    def step(state, batch):
        assert len(drawn) == int(state.step) + 1
        return counting(state, batch)

    fit(step, new_state(), lambda attempt: drawn.append(attempt) or batch_of(attempt), attempts=3)
    assert drawn == [0, 1, 2]


# ---- it is the same training -----------------------------------------------------------------------------------------


def test_a_run_gives_the_same_bytes_also_in_parts():
    plain = fit(STEP, new_state(), batch_of, attempts=6)
    ahead = fit(STEP, new_state(), prefetch(batch_of), attempts=6)
    half = fit(STEP, new_state(), prefetch(batch_of), attempts=2)
    whole = fit(STEP, half.state, prefetch(batch_of), attempts=6)
    assert fingerprint(ahead.state) == fingerprint(plain.state) == fingerprint(whole.state)
    assert ahead.history == plain.history == half.history + whole.history


class Net(nn.Module):
    @nn.compact
    def __call__(self, image_BxHxWxC):
        return nn.Conv(4, (3, 3))(image_BxHxWxC).mean((1, 2))


def test_an_image_cast_on_the_host_is_half_the_bytes_and_trains_to_the_same_ones():
    """By hand: 4 images of 6 × 6 × 3 numbers are 432, so 1728 bytes in float32 and 864 in bfloat16; 4 labels 16 each time."""

    def batches(attempt):
        rng = np.random.default_rng(attempt)
        return {"image": rng.normal(size=(4, 6, 6, 3)).astype(np.float32), "label": np.arange(4, dtype=np.int32) % 3}

    model = wrap(Net(), "mixed_bfloat16")

    def loss_fn(params, mstate, batch, rng):
        logits, mstate = model.apply(params, mstate, batch["image"], rng=rng)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    optimizer, sent = optax.sgd(1e-1), []
    step = make_train_step(loss_fn, optimizer)
    state = jax.jit(lambda: TrainState.create(model, optimizer, KEY, jnp.zeros((1, 6, 6, 3))))()

    def place(batch):
        sent.append(nbytes(batch))
        return jax.device_put(batch)

    plain = fit(step, own_copy(state), prefetch(batches, place=place), attempts=3)
    cast = fit(step, own_copy(state), prefetch(batches, cast={"image": "bfloat16"}, place=place), attempts=3)
    assert fingerprint(cast.state) == fingerprint(plain.state) and cast.history == plain.history
    assert fingerprint(plain.state) != fingerprint(state)
    assert sent == [1728 + 16] * 3 + [864 + 16] * 3
    # What the device gets is what it would have made of it first of all.
    seen = {}
    for name, batch in (("plain", batches(0)), ("cast", prefetch(batches, cast={"image": "bf16"})(0))):
        jaxpr = jax.make_jaxpr(step.pure)(state, batch).jaxpr
        ins = [e.invars[0].aval for e in equations(jaxpr) if e.primitive.name == "convert_element_type"]
        seen[name] = sum(x.shape == (4, 6, 6, 3) and x.dtype == jnp.float32 for x in ins)
    assert seen == {"plain": 1, "cast": 0}


def test_numpy_rounds_as_the_device_does():
    """Ties, the last finite numbers, what is beyond them, subnormal results of float16, and 4,096 numbers at random."""
    rng = np.random.default_rng(0)
    halves = np.float32(
        [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65519, 65520, 3.3961e38, 1e-6, 3e-8]
    )
    x = np.concatenate([halves, -halves, np.float32([0.0, -0.0, np.inf, np.nan]), rng.normal(size=4096) * 100])
    x = x.astype(np.float32)
    for dtype in ("bfloat16", "float16"):
        ours = prefetch(lambda _: {"x": x}, cast={"x": dtype}, place=lambda batch: batch)(0)["x"]
        assert ours.dtype == dtype and np.array_equal(
            ours.view(np.uint16),
            np.asarray(jax.jit(lambda x: x.astype(dtype))(x)).view(np.uint16),  # noqa: B023
        )


# ---- what is cast, and where it goes ---------------------------------------------------------------------------------


def test_only_what_is_named_is_cast_and_the_first_rule_holds():
    batch = {"views": [np.ones(2, np.float32), np.ones(2, np.float64)], "target": np.ones(2, np.float32), "n": 3}
    source = prefetch(lambda _: batch, cast={"views/1": "float32", "views": "bfloat16"}, place=lambda batch: batch)
    got = source(0)
    assert [x.dtype.name for x in got["views"]] == ["bfloat16", "float32"]
    assert got["target"] is batch["target"] and got["n"] == 3


@pytest.mark.parametrize(
    ("cast", "words"),
    [
        ({"imag": "bfloat16"}, r"cast='imag' matches no path of the batch; did you mean 'image'\?"),
        ({"zzz/**": "bfloat16"}, r"matches no path of the batch; its paths are 'image', 'label', 'sharded', 'small'"),
        ({"label": "bfloat16"}, r"names batch\[label\], which is int32 of ndarray; legal is a float array of numpy"),
        ({"sharded": "bfloat16"}, r"batch\[sharded\], which is float32 of ArrayImpl; .* and shard by place="),
        ({"*": "bfloat16"}, r"names batch\[label\], which is int32"),
        ({"small": "float32"}, r"batch\[small\], which is float16: as many bytes, or fewer; legal is a narrower dtype"),
        ({"small": "bfloat16"}, r"batch\[small\], which is float16: as many bytes, or fewer"),
        ({"image": "int8"}, r"Unknown dtype 'int8'; use one of half"),
    ],
)
def test_a_cast_that_cannot_be_meant_is_refused(cast, words):
    batch = {
        "image": np.ones(2, np.float32), "label": np.arange(2, dtype=np.int32),
        "sharded": jnp.ones(2), "small": np.ones(2, np.float16),
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        prefetch(lambda _: batch, cast=cast)(0)


@pytest.mark.parametrize("depth", [0, -1, True])
def test_a_depth_that_is_none_is_refused(depth):
    with pytest.raises(ValueError, match=f"got depth={depth}; legal is an int ≥ 1"):
        prefetch(batch_of, depth=depth)


def test_numpy_goes_to_the_device_and_all_else_passes_as_it_is():
    there, key = jnp.ones(2), jax.random.key(0)
    batch = {"there": there, "key": key, "word": "x", "none": None, "number": 2.0, "x": np.ones(2, np.float32)}
    got = prefetch(lambda _: batch | {"scalar": np.float32(1)})(0)
    assert all(got[name] is x for name, x in batch.items() if name != "x")
    for name in ("x", "scalar"):
        assert isinstance(got[name], jax.Array) and not got[name].committed and not got[name].weak_type


def test_batches_are_sharded_ahead():
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    source = prefetch(batch_of, place=functools.partial(shard_batch, mesh=mesh))
    assert [shard.data.shape for shard in source(0)["x"].addressable_shards] == [(2, 3)] * 4
    ahead = fit(STEP, shard_state(new_state(), mesh), source, attempts=3)
    plain = fit(STEP, shard_state(new_state(), mesh), lambda n: shard_batch(batch_of(n), mesh), attempts=3)
    assert fingerprint(ahead.state) == fingerprint(plain.state)


def test_an_iterable_is_never_drawn_from_ahead():
    drawn: list[int] = []

    def feed():
        for attempt in range(5):
            drawn.append(attempt)
            yield batch_of(attempt)

    def step(state, batch):
        assert len(drawn) == int(state.step) + 1 and batch["x"].dtype == jnp.bfloat16
        return counting(state, batch)

    left = feed()
    assert fit(step, new_state(), prefetch(left, cast={"x": "bf16"}), attempts=3).stopped == "done"
    assert next(left)["x"].dtype == np.float32 and drawn == [0, 1, 2, 3]  # attempt 3 was left to whoever draws on
    assert (
        fit(step, new_state(), prefetch(map(batch_of, range(0)), cast={"x": "bf16"}), attempts=3).stopped == "exhausted"
    )


def test_it_stands_where_the_batches_stood():
    assert np.array_equal(prefetch(batch_of)(4)["x"], batch_of(4)["x"])
    assert [float(x) for x in prefetch([np.float32(1), np.float32(2)])] == [1, 2]
    with pytest.raises(TypeError, match="asked for the batch of attempt 1 of an iterable"):
        prefetch([1, 2])(1)
    with pytest.raises(TypeError, match=r"which has no end; legal is ahead\(range\(n\)\)"):
        iter(prefetch(batch_of))


def test_the_function_runs_as_its_caller_does():
    word = contextvars.ContextVar("word", default="none")
    word.set("mine")
    seen = []

    def batches(attempt):
        seen.append((word.get(), threading.current_thread().name, np.asarray(1.0).dtype))
        return np.float64([attempt])

    device = jax.devices()[5]
    with jax.default_device(device), jax.enable_x64(True), prefetch(batches).ahead(range(1)) as feed:
        (batch,) = feed
        assert batch.devices() == {device} and batch.dtype == jnp.float64
    assert seen[0][:2] == ("mine", "mpjax prefetch 0")


# ---- how it ends -----------------------------------------------------------------------------------------------------


def test_an_error_comes_at_its_attempt_with_its_traceback():
    def where_it_breaks(attempt):
        if attempt == 3:
            raise OSError("disk")
        return batch_of(attempt)

    class Ending(Hook):
        def on_end(self, result):
            self.result, self.threads = result, threads()

    ending = Ending()
    with pytest.raises(OSError, match="disk") as caught:
        fit(STEP, new_state(), prefetch(where_it_breaks), attempts=9, hooks=[ending])
    assert "where_it_breaks" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert (int(ending.result.state.step), ending.result.stopped) == (3, "failed") and ending.threads == []


def test_a_function_that_stops_iteration_is_an_error_not_an_end():
    with pytest.raises(RuntimeError, match="StopIteration"):
        fit(counting, new_state(), prefetch(lambda n: next(iter([]))), attempts=3)


def test_ctrl_c_in_the_function_ends_the_run_with_what_was_measured():
    def batches(attempt):
        if attempt == 3:
            raise KeyboardInterrupt
        return batch_of(attempt)

    result = fit(STEP, new_state(), prefetch(batches), attempts=9)
    assert (result.stopped, len(result.history)) == ("interrupted", 3)


def test_early_stopping_ends_the_thread_before_the_hooks_hear_of_it():
    class Ending(Hook):
        def on_end(self, result):
            self.threads = threads()
            raise OSError("full")

    ending, fed = Ending(), []
    with pytest.raises(OSError, match="full"):
        fit(
            counting, new_state(), prefetch(lambda n: fed.append(n) or batch_of(n)), attempts=99, hooks=[ending],
            eval_step=lambda state, batch: {"loss": (jnp.float32(1), jnp.float32(1))}, eval_batches=[batch_of(0)],
            eval_every=1, best="-loss", patience=1,
        )  # fmt: skip
    assert ending.threads == [] and len(fed) <= 2 + 2  # two steps, and two that were ready


def test_a_step_that_fails_ends_it_too():
    def step(state, batch):
        raise FloatingPointError("mine")

    with pytest.raises(FloatingPointError, match="mine"):
        fit(step, new_state(), prefetch(batch_of), attempts=9)


@pytest.fixture
def ctrl_c():
    """Python's own handler: a shell lets what it starts in the background ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_in_a_step_ends_with_it_and_the_run_goes_on_to_the_same_bytes(number):
    def step(state, batch):
        after = STEP(state, batch)
        if int(after[0].step) == 3:
            signal.raise_signal(number)
        return after

    part = fit(step, new_state(), prefetch(batch_of), attempts=6)
    assert (part.stopped, int(part.state.step)) == ("interrupted", 3)
    whole = fit(STEP, part.state, prefetch(batch_of), attempts=6)
    assert fingerprint(whole.state) == fingerprint(fit(STEP, new_state(), batch_of, attempts=6).state)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_leaves_a_function_that_hangs(monkeypatch, caplog):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)  # in a script the second one is the system's
    heard, hung, asked = threading.Event(), threading.Event(), threading.Semaphore(0)

    class Queue(queue.SimpleQueue):
        def get(self):
            asked.release()
            return super().get()

    class Hear(logging.Handler):
        def emit(self, record):
            heard.set()

    def interrupt():
        time.sleep(0.2)  # a signal on the last instruction before a wait is heard behind it
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def batches(attempt):
        if attempt == 1:
            assert asked.acquire(timeout=LONG) and asked.acquire(timeout=LONG)  # the loop waits for this very batch
            interrupt()
            assert heard.wait(LONG)
            interrupt()
            hung.wait(LONG)
        return batch_of(attempt)

    monkeypatch.setattr(queue, "SimpleQueue", Queue)
    hear = Hear()
    logging.getLogger("mpjax").addHandler(hear)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(counting, new_state(), prefetch(batches), attempts=9)
        (thread,) = threads()
    finally:
        logging.getLogger("mpjax").removeHandler(hear)
        hung.set()
    thread.join(LONG)


def test_a_toy_model_needs_no_arrays():
    """A batch of numbers, and a model without one: nothing is asked of leaves that are not numpy's."""
    model = Model(lambda rng, *sample: ({}, {}), lambda p, m, x, rng=None: (x, m))
    state = TrainState.create(model, optax.sgd(0.1), KEY)
    assert fit(counting, state, prefetch(lambda n: {"n": n}), attempts=2).stopped == "done"
