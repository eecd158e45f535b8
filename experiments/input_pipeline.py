"""What a training step waits for its batches, with and without mpjax.prefetch and a cast on the host.

Question   how much of a step's time is the making and sending of its batch, and how much of it can be hidden?
Model      a residual network of basic blocks (He et al., 2016) with LayerNorm, in mixed_bfloat16; Flax Linen.
Data       random bytes in place of photographs; each batch is cut from them at random places, mirrored at random and
           normalised to float32, by numpy: what a loader does behind the decoder.
Ways       plain: drawn when it is needed, sent with the step as float32. cast: as bfloat16, cast by numpy, half the bytes.
           prefetch: a thread makes the next two batches and sends them. prefetch + cast: both. workers: several threads do.
           floor: the same batch again and again, which lies on the device.
Method     the ways in turn, the order rotates, the first round warms up and is not counted. In each round `steps` steps
           behind as many as are drawn ahead: what waits at the clock's start is no more than that, so `steps` must be
           several times it. The loop reads the loss of the step before, as `mpjax.fit` does. Medians, least and largest.
Reads      ms a step; of that, ms in which the host waits for the batch itself (drawn, cast, or taken from the thread);
           MiB sent a step, counted where they are placed.
Time       half a minute on 2 CPU cores, where host and device are one and little can be hidden.
Run        python -m experiments.input_pipeline
Full size  for a GPU: --size=224 --batch-size=256 --width=64 --stages=4 --steps=24 --repeats=2 --workers=8
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.console import Console

import mpjax
from experiments import _run
from mpjax.core.tree import nbytes
from mpjax.measure.table import policy_table, to_markdown
from mpjax.train.prefetch import drawn


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, with its unit. The defaults are for two CPU cores."""

    size: int = 32
    """Pixels a side."""
    batch_size: int = 32
    """Images a step."""
    width: int = 8
    """Features of the first stage."""
    stages: int = 2
    """Stages of two blocks; 0 for none."""
    classes: int = 10
    """Labels."""
    depth: int = 2
    """Batches that are ready beside the one in use; where there are more workers, one for each."""
    workers: int = 2
    """Threads that draw, where several do."""
    steps: int = 10
    """A round."""
    repeats: int = 5
    """Rounds that count."""
    seed: int = 0
    """Of the data and the init."""
    workdir: str | None = None
    """The run's own folder, new or empty. Default: runs/input_pipeline-date-time."""


class Net(nn.Module):
    """A stem, stages of two residual blocks, mean pooling, a head. No dtype anywhere: the policy decides."""

    width: int
    stages: int
    classes: int

    @nn.compact
    def __call__(self, image_BxHxWx3):
        x_BxHxWxC = nn.Conv(self.width, (7, 7), 2, use_bias=False, name="stem")(image_BxHxWx3)
        for stage in range(self.stages):
            for block in range(2):
                width, stride = self.width * 2**stage, 2 if stage and not block else 1
                y_BxHxWxC = nn.relu(nn.LayerNorm()(nn.Conv(width, (3, 3), stride, use_bias=False)(x_BxHxWxC)))
                y_BxHxWxC = nn.LayerNorm()(nn.Conv(width, (3, 3), use_bias=False)(y_BxHxWxC))
                same = x_BxHxWxC.shape == y_BxHxWxC.shape
                x_BxHxWxC = x_BxHxWxC if same else nn.Conv(width, (1, 1), stride, use_bias=False)(x_BxHxWxC)
                x_BxHxWxC = nn.relu(x_BxHxWxC + y_BxHxWxC)
        return nn.Dense(self.classes, name="head")(x_BxHxWxC.mean((1, 2)))


def source(config: Config) -> Callable[[int], dict[str, np.ndarray]]:
    """From attempt to batch: crops of a strip of random bytes, mirrored, and normalised to float32 by numpy."""
    random = np.random.default_rng(config.seed)
    strip = random.integers(256, size=(config.size + 64, config.size + 1024, 3), dtype=np.uint8)

    def batches(attempt: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((config.seed, attempt))
        corners = random.integers((64, 1024), size=(config.batch_size, 2))
        crops = [strip[y : y + config.size, x : x + config.size][:, :: 1 - 2 * (x % 2)] for y, x in corners]
        image_BxHxWx3 = (np.stack(crops).astype(np.float32) - np.float32(127.5)) / np.float32(73.9)
        return {
            "image": image_BxHxWx3,
            "label": random.integers(config.classes, size=config.batch_size, dtype=np.int32),
        }

    return batches


def run(step: Any, state: Any, batches: Any, steps: int, filling: int = 1) -> tuple[Any, dict[str, float]]:
    """The loop of `mpjax.fit`, on a clock behind its first `filling` steps: the state after all of them, and ms a step."""
    waited, before, start = 0.0, None, 0.0
    with drawn(batches, range(filling + steps)) as feed:
        for n in range(filling + steps):
            if n == filling:
                jax.block_until_ready((state, before))
                waited, start = 0.0, time.perf_counter()
            asked = time.perf_counter()
            batch = next(feed)
            waited += time.perf_counter() - asked
            state, metrics = step(state, batch)
            if before is not None:
                float(before)
            before = metrics["loss"]
        jax.block_until_ready((state, before))
        took = time.perf_counter() - start
    return state, {"step": 1e3 * took / steps, "wait": 1e3 * waited / steps}


def spread(numbers: list[float]) -> str:
    """Median, and from the least to the largest."""
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f}–{max(numbers):.2f})"


def main(config: Config) -> dict[str, Any]:
    """Measure, show and write; returns what `table.json` holds."""
    opened = _run.open_folder(config, "input_pipeline", goes_on=False)
    model = mpjax.wrap(Net(config.width, config.stages, config.classes), "mixed_bfloat16")
    batches, sent = source(config), []

    def loss_fn(params, mstate, batch, rng):
        logits_BxK, mstate = model.apply(params, mstate, batch["image"], rng=rng)
        return mpjax.losses.softmax_cross_entropy(logits_BxK, batch["label"]).mean(), mpjax.Aux(mstate, {})

    def counted(batch):
        sent.append(nbytes(batch))  # by several threads: to append is one operation, to add up is not
        return batch

    def placed(batch):
        return jax.device_put(counted(batch))

    def cast(attempt):
        batch = batches(attempt)
        return batch | {"image": batch["image"].astype(jnp.bfloat16)}

    ahead = functools.partial(mpjax.prefetch, batches, depth=config.depth, place=placed)
    together = functools.partial(ahead, depth=max(config.depth, config.workers), workers=config.workers)
    there = jax.device_put(batches(0))
    ways: dict[str, Any] = {
        "floor": lambda attempt: there,
        "plain": lambda attempt: counted(batches(attempt)),
        "cast": lambda attempt: counted(cast(attempt)),
        "prefetch": ahead(),
        "prefetch + cast": ahead(cast={"image": "bfloat16"}),
        f"{config.workers} workers": together(),
        f"{config.workers} workers + cast": together(cast={"image": "bfloat16"}),
    }
    optimizer = optax.sgd(1e-3, momentum=0.9)
    step = mpjax.make_train_step(loss_fn, optimizer)
    create = jax.jit(functools.partial(mpjax.TrainState.create, model, optimizer))
    state = create(mpjax.seeds(config.seed).init, batches(0)["image"][:2])
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    with opened.begin() as folder:
        for n in range(config.repeats + 1):
            for name in [*list(ways)[n % len(ways) :], *list(ways)[: n % len(ways)]]:
                sent.clear()
                filling = getattr(ways[name], "depth", 1)
                state, found = run(step, state, ways[name], config.steps, filling)
                rounds[name] += [found | {"MiB": sum(sent) / (filling + config.steps) / 2**20}] if n else []
    floor = statistics.median(found["step"] for found in rounds["floor"])
    rows = [
        {
            "way": name,
            "ms a step": spread([found["step"] for found in of]),
            "over the floor": statistics.median(found["step"] for found in of) / floor,
            "ms of waiting": spread([found["wait"] for found in of]),
            "MiB sent a step": of[-1]["MiB"],
        }
        for name, of in rounds.items()
    ]
    device = jax.devices()[0].device_kind
    Console().print(policy_table(rows, title=f"{config.batch_size} images of {config.size}², {device}"))
    told = {"device": device, "jax": jax.__version__, "rounds": rounds}
    (folder / "table.json").write_text(json.dumps(told, indent=1) + "\n")
    (folder / "table.md").write_text(to_markdown(rows) + "\n")
    Console(soft_wrap=True).print(f"written to {folder}: config.json, table.json, table.md", highlight=False)
    return told


if __name__ == "__main__":
    sys.exit(_run.start(Config, main, __doc__))
