"""A run that other processes stop and go on with: `python -m tests.preempted FOLDER ATTEMPTS STOP`.

Everything that a state can hold moves in it: float16 with a loss scale that grows and shrinks, skipped steps, dropout, batch
statistics, a moving average, a schedule, data in epochs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpjax
from mpjax.train.writers import JsonlWriter
from tests.train.toys import fingerprint

STEPS, EVAL_EVERY = 12, 3
SEEDS = mpjax.seeds(3)
POLICY = mpjax.get_policy("mixed_float16")


def init(rng: Any, x: Any) -> tuple[dict, dict]:
    return {"up": jax.random.normal(rng, (3, 4)), "down": jnp.ones(4)}, {"mean": jnp.zeros(3)}


def apply(params: Any, mstate: Any, x: Any, rng: Any = None) -> tuple[Any, Any]:
    half, x16 = POLICY.cast_to_compute((params, x - mstate["mean"][None]))
    hidden = jnp.tanh(x16 @ half["up"])
    if rng is not None:
        hidden *= jax.random.bernoulli(rng, 0.5, hidden.shape)
    return POLICY.cast_to_output(hidden @ half["down"]), {"mean": 0.75 * mstate["mean"] + 0.25 * x.mean(0)}


MODEL = mpjax.Model(init, apply, policy=POLICY)


def loss_fn(params: Any, mstate: Any, batch: Any, rng: Any) -> tuple[Any, mpjax.Aux]:
    y, mstate = MODEL.apply(params, mstate, batch["x"], rng=rng)
    return jnp.square(y - batch["y"]).mean(), mpjax.Aux(mstate, {})


def job() -> mpjax.Job:
    random = np.random.default_rng(5)
    rows = {"x": random.normal(size=(11, 3)).astype(np.float32), "y": random.normal(size=11).astype(np.float32)}
    batches = mpjax.epoch_batches(rows, 4, SEEDS)  # two batches an epoch, three rows left out in each
    schedule = optax.cosine_decay_schedule(0.1, STEPS)

    def spoiled(attempt: int) -> Any:
        """Attempts 2 and 6 are skipped."""
        batch = batches(attempt)
        return batch | {"y": batch["y"] * np.float32(np.nan)} if attempt in (2, 6) else batch

    return mpjax.Job(
        MODEL, loss_fn, optax.inject_hyperparams(optax.adamw)(schedule), spoiled, (rows["x"][:1],),
        lambda params, mstate, batch: {"loss": loss_fn(params, mstate, batch, None)[0]}, [rows],
    )  # fmt: skip


def start(job: mpjax.Job) -> Any:
    scale = mpjax.dynamic_loss_scale(2.0**10, growth_interval=2)
    return jax.jit(lambda key: job.state(key, loss_scale=scale, ema_decay=0.9))(SEEDS.init)  # one compilation


def train(folder: Path, batches: Any, step: Any = None, *hooks: mpjax.Hook) -> mpjax.FitResult:
    """The run, from its newest checkpoint in the folder to its end or a signal."""
    made = job()
    saving = mpjax.CheckpointHook(mpjax.Checkpointer(folder / "checkpoints", every=5), policy=POLICY)
    earlier = saving.resume(start(made))
    return mpjax.fit(
        step or made.step(), earlier.state, batches or made.batches, attempts=STEPS, earlier=earlier,
        eval_step=mpjax.make_eval_step(made.eval_fn), eval_batches=made.eval_batches, eval_every=EVAL_EVERY, best="-loss",
        hooks=[JsonlWriter(folder / "metrics.jsonl"), saving, *hooks],
    )  # fmt: skip


def told(state: Any) -> dict[str, list]:
    """Every leaf's dtype, shape and digest, as JSON gives it back."""
    return json.loads(json.dumps(fingerprint(state)))


def main(folder: Path, stop: int, endless: bool) -> None:
    """Before the last step to `stop` it says "waiting" and waits for a line; `endless`: that step never comes to its end."""
    feed = job().batches

    def batches(attempt: int) -> Any:
        if attempt == stop - 1:
            print("waiting", flush=True)
            sys.stdin.readline()
        return feed(attempt)

    def never(state: Any, batch: Any) -> Any:
        forever = jax.jit(lambda x: jax.lax.while_loop(lambda n: n >= 0, lambda n: (n + 1) % 7, x))
        print("endless", flush=True)
        jax.block_until_ready(forever(jnp.int32(0)))

    result = train(folder, batches, never if endless else None)
    print(json.dumps({
        "stopped": result.stopped, "state": told(result.state), "evaluations": result.evaluations, "best": result.best
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "endless" in sys.argv)
