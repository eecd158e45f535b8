"""One of two processes that train, save and restore together: `python -m tests.together SCENARIO FOLDER PORT PROCESS`.

Each has two of four CPU devices, and gives the rows of its own. What it says are JSON objects, a line each, and "now" where it is
to be killed; gloo has its say between them.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

import mpjax
from mpjax.core.tree import path_of
from mpjax.store import saving
from mpjax.train.writers import JsonlWriter, ProgressBar

DEVICES, ROWS, STEPS, SPOILED = 4, 8, 6, 2
HEARTBEAT = 6
"""Seconds after which jax takes a process for dead that was not heard of."""

RULES = mpjax.fsdp(min_size=1)
OPTIMIZER = optax.adam(0.01)
POLICY = mpjax.get_policy("mixed_float16")


def init(rng: Any, x: Any) -> tuple[dict, dict]:
    return {"up": jax.random.normal(rng, (3, 4)), "down": jnp.ones(4)}, {"mean": jnp.zeros(3)}


def apply(params: Any, mstate: Any, x: Any, rng: Any = None) -> tuple[Any, Any]:
    half, x16 = POLICY.cast_to_compute((params, x - mstate["mean"][None]))
    hidden = jnp.tanh(x16 @ half["up"])
    return POLICY.cast_to_output(hidden @ half["down"]), {"mean": 0.75 * mstate["mean"] + 0.25 * x.mean(0)}


MODEL = mpjax.Model(init, apply, policy=POLICY)


def loss_fn(params: Any, mstate: Any, batch: Any, rng: Any) -> tuple[Any, mpjax.Aux]:
    y, mstate = MODEL.apply(params, mstate, batch["x"], rng=rng)
    return jnp.square(y - batch["y"]).mean(), mpjax.Aux(mstate)


def make(key: jax.Array) -> mpjax.TrainState:
    scale = mpjax.dynamic_loss_scale(2.0**10, growth_interval=2)
    return mpjax.TrainState.create(MODEL, OPTIMIZER, key, jnp.ones((1, 3)), loss_scale=scale, ema_decay=0.9)


def batch(attempt: int) -> dict[str, np.ndarray]:
    """The whole batch of an attempt. In that of attempt 2 one row has a NaN, on a device of process 1."""
    random = np.random.default_rng(attempt)
    x, y = random.normal(size=(ROWS, 3)).astype(np.float32), random.normal(size=ROWS).astype(np.float32)
    if attempt == SPOILED:
        y[-1] = np.nan
    return {"x": x, "y": y}


def step_on(mesh: jax.sharding.Mesh) -> Any:
    return mpjax.make_train_step(loss_fn, OPTIMIZER, mesh=mesh)


def digests(state: Any) -> dict[str, str]:
    """From path to a digest of the whole leaf, whichever processes hold it."""

    def digest(x: Any) -> str:
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        whole = x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
        return hashlib.sha256(np.asarray(whole).tobytes()).hexdigest()

    return {path_of(keys): digest(x) for keys, x in jax.tree_util.tree_flatten_with_path(state)[0]}


def eval_fn(params: Any, mstate: Any, batch: Any) -> dict[str, Any]:
    return {"loss": loss_fn(params, mstate, batch, None)[0]}


class Pair:
    """What both scenarios stand on: the mesh over both processes, and the run on it."""

    def __init__(self, folder: Path):
        self.folder, self.me = folder, jax.process_index()
        self.mesh = jax.make_mesh((DEVICES,), ("data",))
        self.step = step_on(self.mesh)

    def like(self, seed: int = 3) -> mpjax.TrainState:
        return mpjax.shard_state(make(jax.random.key(seed)), self.mesh, RULES)

    def rows(self, attempt: int) -> Any:
        half = ROWS // 2
        own = jax.tree.map(lambda x: x[self.me * half :][:half], batch(attempt))
        return mpjax.shard_batch(own, self.mesh, process_local=True)

    def train(
        self, name: str, attempts: int, batches: Any = None, *hooks: mpjax.Hook, beside: bool = False
    ) -> mpjax.FitResult:
        checkpointer = mpjax.Checkpointer(self.folder / name, every=2, timeout=60, asynchronous=beside)
        saver = mpjax.CheckpointHook(checkpointer, policy=POLICY)
        earlier = saver.resume(self.like())
        hooks = (JsonlWriter(self.folder / f"{name}.jsonl"), saver, *hooks)
        feed = mpjax.prefetch(batches or self.rows, place=lambda batch: batch)
        return mpjax.fit(
            self.step, earlier.state, feed, attempts=attempts, hooks=hooks, earlier=earlier, best="-loss",
            eval_step=mpjax.make_eval_step(eval_fn), eval_batches=[self.rows(100)], eval_every=3,
        )  # fmt: skip

    def poisoned(self) -> None:
        """Train on nothing but the batch of which process 1 has the NaN."""
        mpjax.fit(
            self.step, self.like(), lambda _: self.rows(SPOILED), attempts=9, max_consecutive_skips=2,
            hooks=[mpjax.CulpritHook()],
        )  # fmt: skip


def over_two_axes(me: int) -> list[Any]:
    """A batch where each process holds half of the rows, and where it holds all, since the other axis lies across them."""
    devices, half = np.array(jax.devices()).reshape(2, 2), ROWS // 2
    whole = batch(0)
    own = jax.tree.map(lambda x: x[me * half :][:half], whole)
    return [
        mpjax.shard_batch(given, jax.sharding.Mesh(mesh, ("data", "model")), process_local=True)
        for given, mesh in ((own, devices), (whole, devices.T))
    ]


def refused(action: Callable[[], Any]) -> str:
    """The error that came, in words."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def save_with_a_full_disk(checkpointer: mpjax.Checkpointer, tree: Any, me: int) -> None:
    """Process 1 cannot write its part of step 2."""
    write = saving.arrays.write

    def full(*given: Any) -> Callable[[], None]:
        finish = write(*given)

        def fails() -> None:
            if me:
                raise OSError(errno.ENOSPC, "no space left on device")
            finish()

        return fails

    saving.arrays.write = full
    try:
        checkpointer.save(tree, 2)
        checkpointer.wait()
    finally:
        saving.arrays.write = write


def everything(pair: Pair) -> None:
    """Train, save, restore, refuse, stop; say what came of it; and train again, until process 1 is killed between two steps."""
    me, folder, found = pair.me, pair.folder, {}
    bar = ProgressBar(STEPS)
    result = pair.train("run", STEPS, None, bar)
    found["history"], found["evaluations"], found["best"] = result.history, result.evaluations, result.best
    found["state"] = digests(result.state)
    found["spread"] = str(result.state.params["up"].sharding.spec)
    found["restored"] = digests(mpjax.Checkpointer(folder / "run").restore(pair.like()))
    found["of_one"] = digests(mpjax.Checkpointer(folder / "of_one").restore(pair.like(), step=1))
    found["loaded"] = {path: x.tolist() for path, x in mpjax.Checkpointer(folder / "of_one").load(1).items()}
    found["placed"] = [digests(placed) for placed in over_two_axes(me)]
    made = jax.jit(make, out_shardings=mpjax.state_shardings(jax.eval_shape(make, jax.random.key(3)), pair.mesh, RULES))
    found["made_apart"] = [digests(made(jax.random.key(3))), digests(pair.like())]

    beside = mpjax.Checkpointer(folder / "beside", asynchronous=True, timeout=60)
    tree = {"spread": result.state.params["up"], "own": np.arange(3), "number": 2, "key": jax.random.key(1)}
    beside.save(tree, 1, extra={"who": "both"})
    beside.wait()
    found["beside"] = [beside.restore(tree)["own"].tolist(), beside.info().extra]

    def planted(value: Any) -> Any:
        return lambda: beside.save(tree | {"own": value}, 2)

    spoiled = dataclasses.replace(
        result.state, params=jax.tree.map(lambda x: x * np.float32(np.nan), result.state.params)
    )
    found["refused"] = {
        "twice": refused(lambda: beside.save(tree, 1)),
        "own": refused(planted(np.arange(3) + me)),
        "extra": refused(lambda: beside.save(tree, 2, extra={"who": me})),
        "string": refused(planted("text" if me else 3)),
        "nonfinite": refused(lambda: beside.save(spoiled, 2)),
        "seed": refused(lambda: pair.like(seed=me)),
        "rows": refused(lambda: mpjax.shard_batch({"x": np.ones((3, 2))}, pair.mesh, process_local=True)),
        "misfit": refused(lambda: beside.restore(tree | ({"more": np.ones(1)} if me else {}))),
        "none": refused(lambda: mpjax.Checkpointer(folder / "nowhere").restore(tree)),
        "poisoned": refused(pair.poisoned),
    }
    found["refused"]["disk"] = refused(lambda: save_with_a_full_disk(beside, tree, me))
    beside.save(tree, 3)
    found["steps"] = beside.steps()

    def asking(attempt: int) -> Any:
        if me and attempt == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return pair.rows(attempt)

    stopped = pair.train("stopped", 50, asking)
    found["stopped"] = [stopped.stopped, len(stopped.history), mpjax.Checkpointer(folder / "stopped").latest()]
    print(json.dumps(found), flush=True)
    pair.train("killed", 10**6, None, Telling(stops=me == 1))


def says_now() -> None:
    """For the test, which then kills this process, wherever it is."""
    print("now", flush=True)
    sys.stdin.readline()


class Telling(mpjax.Hook):
    """Says what the state of step 2 is, which is saved; and at attempt 2, on process 1, that it can be killed."""

    def __init__(self, stops: bool):
        self.stops = stops

    def on_state(self, attempt: int, state: Any) -> None:
        if attempt == 1:
            print(json.dumps(digests(state)), flush=True)
        if attempt == 2 and self.stops:
            says_now()


def writing(pair: Pair) -> None:
    """Process 1 is killed before it has written its parts of step 4."""
    to_arrays = saving.to_arrays

    def slow(leaves: Any) -> Any:
        if pair.me and int(leaves["step"][1]) + int(leaves["skipped"][1]) == 4:
            says_now()
        return to_arrays(leaves)

    saving.to_arrays = slow
    pair.train("killed", 10**6, None, Telling(stops=False))


def sealing_beside(pair: Pair) -> None:
    """The same in a thread, while both go on training."""
    sealing(pair, beside=True)


def sealing(pair: Pair, beside: bool = False) -> None:
    """Of step 4 everything is written but the manifest, when process 0 is killed."""
    seal = saving.seal

    def slow(folder: Path) -> None:
        if folder.name.startswith(".saving-4-"):
            says_now()
        seal(folder)

    saving.seal = slow
    pair.train("killed", 10**6, None, Telling(stops=False), beside=beside)


if __name__ == "__main__":
    scenario, folder, port, process = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}", 2, int(process), heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT
    )
    globals()[scenario](Pair(Path(folder)))
