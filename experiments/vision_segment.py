"""A small U-Net with GroupNorm, written in NNX, that tells the class of every pixel of a scene, in five precisions.

Question   does a model that puts half-precision features of every resolution together again segment as well as in float32?
Model      U-Net (Ronneberger et al., 2015): two 3×3 convolutions a level, max pooling down; on the way up a dense layer
           over the channels, nearest upsampling and the features from the way down beside it. No transposed
           convolution, whose uneven overlaps draw checkerboards (Odena et al., 2016). GroupNorm (Wu and He, 2018).
Data       scenes of two to five items of Fashion-MNIST at random places over one another, on a noisy background; the
           label of a pixel is the class of the item that is seen there, or background: 11 classes. Here items are 14 × 14
           in scenes of 32 × 32, in full size 28 × 28 in 64 × 64.
           `python -m experiments._data fashion_mnist` fetches the items. Held-out scenes show held-out items.
Batches    scenes are composed when they are asked for, a pure function of (seed, attempt).
Policies   float32; mixed_bfloat16; mixed_float16 with a dynamic loss scale; mixed_fp8, in which only the dense layers of the
           way up multiply in float8 (convolutions stay in bfloat16); and a policy map.
Reads      mean IoU of the held-out scenes: over all their pixels, for each class the pixels that are it and are said to
           be, over those that are it or are said to be; then the mean over the classes.
Time       made for about 5 minutes on 2 free CPU cores: enough to compare policies, and not to segment well.
Run        mpjax train vision_segment, or python -m experiments.vision_segment --steps=50 --policy mixed_bfloat16
Full size  PRESETS["h100"]; mean IoU 0.700 in float32 and in bfloat16 (experiments/records/2026-11-29-full-size-h200).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import mpjax
from experiments import _data, _run

CLASSES = 11
"""The ten of Fashion-MNIST, after the background."""

HELD_OUT = (0, 0, 1)
"""The key of the held-out scenes: three numbers, which no batch has. Every seed is measured on the same scenes."""

# The first convolution reads raw pixels beside noise, and the head makes the logits of each pixel: of few channels both,
# and so of few products. The dense layers of the way up are what float8 can multiply.
BY_PATH = {
    "downs/0/conv1": "compute=float32",
    "head": "compute=float32,output=float32",
    "ups/*/narrow": "dot=fp8",
}
"""The rules of the fifth policy; what they do not name is mixed_bfloat16."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, with its unit. The defaults are for two CPU cores."""

    policies: _run.Policies = ("float32", "mixed_bfloat16", "mixed_float16", "mixed_fp8", "by_path")
    """Policy strings, or by_path for the map above; the first is the reference."""
    rules: _run.Rules = ()
    """A policy map of your own, trained as one more policy; what no pattern names is mixed_bfloat16. Repeat it."""
    steps: int = 1500
    """Optimizer steps for each policy."""
    batch_size: int = 8
    """Scenes a step."""
    size: int = 32
    """Side of a scene in pixels; a multiple of 2 to the levels less one."""
    shrink: int = 2
    """Each item is this many times smaller than its 28 pixels, by means over squares; 1, 2, 4 or 7."""
    learning_rate: float = 5e-3
    """Peak of the cosine schedule, after warm-up over a tenth of the steps."""
    weight_decay: float = 1e-2
    """AdamW's, a factor of the learning rate."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    width: int = 16
    """Channels of the first level, a multiple of 16 where float8 is to multiply; each level has twice those above it."""
    levels: int = 3
    """Resolutions, each half of the one above it."""
    eval_every: int = 500
    """Steps between evaluations."""
    eval_scenes: int = 256
    """Held-out scenes, read in parts of 32 or fewer."""
    seed: int = 0
    """Init, batches and rng are derived from it (mpjax.seeds)."""
    devices: int = 1
    """Devices among which the rows of a batch are shared; 0 for all."""
    probe_every: int = 0
    """Steps between probes, which count exponents by module (`mpjax plot` draws them); 0 for none."""
    workdir: str | None = None
    """The run's own folder; if it holds this run, it goes on. Default: a new one, runs/vision_segment-date-time."""
    resume: bool = True
    """Whether to go on with the run in workdir; --no-resume refuses a folder that holds one."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; 0: only at the end and at a signal. Default: a tenth of the steps."""
    progress: bool = True
    """Show a progress bar."""


PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "h100": {
        "size": 64, "shrink": 1, "width": 32, "levels": 4, "batch_size": 64, "steps": 6000, "eval_every": 1000,
        "eval_scenes": 2048, "learning_rate": 1e-3,
    },
}  # fmt: skip
"""What the named sizes change of the defaults."""


class Level(nnx.Module):
    """Two 3×3 convolutions at one resolution. No dtype anywhere: the policy decides."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, rngs=rngs)
        norm = functools.partial(nnx.GroupNorm, outputs, num_groups=None, group_size=min(8, outputs), rngs=rngs)
        self.conv1, self.norm1 = conv(inputs, outputs), norm()
        self.conv2, self.norm2 = conv(outputs, outputs), norm()

    def __call__(self, x_BxHxWxC):
        x_BxHxWxC = nnx.relu(self.norm1(self.conv1(x_BxHxWxC)))
        return nnx.relu(self.norm2(self.conv2(x_BxHxWxC)))


class Up(nnx.Module):
    """From one resolution to the one above it, and what was there on the way down beside it."""

    def __init__(self, outputs: int, *, rngs: nnx.Rngs):
        self.narrow = nnx.Linear(2 * outputs, outputs, rngs=rngs)
        self.level = Level(2 * outputs, outputs, rngs=rngs)

    def __call__(self, x_BxhxwxC, down_BxHxWxC):
        # A dense layer over the channels is the same before or behind nearest upsampling, and there a quarter of the work.
        x_BxHxWxC = self.narrow(x_BxhxwxC).repeat(2, 1).repeat(2, 2)
        return self.level(jnp.concatenate([down_BxHxWxC, x_BxHxWxC], -1))


class UNet(nnx.Module):
    """Levels down, levels up, and the logits of each pixel."""

    def __init__(self, width: int, levels: int, classes: int = CLASSES, *, rngs: nnx.Rngs):
        widths = [width * 2**n for n in range(levels)]
        self.downs = nnx.List([Level(i, o, rngs=rngs) for i, o in zip([1, *widths], widths, strict=False)])
        self.ups = nnx.List([Up(o, rngs=rngs) for o in reversed(widths[:-1])])
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, image_BxHxWx1):
        x = image_BxHxWx1
        passed = []
        for n, level in enumerate(self.downs):
            x = level(nnx.max_pool(x, (2, 2), (2, 2)) if n else x)
            passed.append(x)
        for up, down in zip(self.ups, reversed(passed[:-1]), strict=True):
            x = up(x, down)
        return self.head(x)


def shrunk(items, times: int):
    """Items whose pictures are this many times smaller: each pixel the mean of a square."""
    image_NxHxWx1 = items["image"]
    rows, height, width, _ = image_NxHxWx1.shape
    squares = image_NxHxWx1.reshape(rows, height // times, times, width // times, times, 1)
    return {**items, "image": squares.mean((2, 4))}


def confusion(logits_BxHxWxC, label_BxHxW):
    """How many pixels of each class (row) are said to be of each class (column): int32, so that no count is rounded."""
    classes = logits_BxHxWxC.shape[-1]
    pair_P = (label_BxHxW * classes + logits_BxHxWxC.argmax(-1)).ravel()
    return jnp.bincount(pair_P, length=classes * classes).reshape(classes, classes)


def mean_iou(pixels_CxC):
    """The mean over classes of intersection over union, from a confusion matrix; a class that is nowhere is left out."""
    both_C = jnp.diagonal(pixels_CxC)
    either_C = pixels_CxC.sum(0) + pixels_CxC.sum(1) - both_C
    return (both_C / jnp.maximum(either_C, 1)).sum() / (either_C > 0).sum()


def make_job(config: Config, policy: mpjax.PolicyMap) -> mpjax.Job:
    """The model, its loss, its optimizer and its data under one policy."""
    train, test = (shrunk(part, config.shrink) for part in _data.fashion_mnist())
    model = mpjax.wrap(lambda rngs: UNet(config.width, config.levels, rngs=rngs), policy)

    def batches(attempt: int):
        return _data.compose_scenes(train, config.batch_size, (config.seed, attempt), size=config.size)

    def loss_fn(params, mstate, batch, rng):
        logits, mstate = model.apply(params, mstate, batch["image"], rng=rng)
        loss = mpjax.losses.softmax_cross_entropy(logits, batch["label"]).mean()
        return loss, mpjax.Aux(mstate, {"accuracy": (logits.argmax(-1) == batch["label"]).mean()})

    def eval_fn(params, mstate, parts):
        """Of all held-out scenes at once: a ratio of sums over them is no mean of the ratios of its parts."""

        def part(batch):
            logits, _ = model.apply(params, mstate, batch["image"])
            loss = mpjax.losses.softmax_cross_entropy(logits, batch["label"]).mean()
            return loss, confusion(logits, batch["label"])

        loss_P, pixels_PxCxC = jax.lax.map(part, parts)  # the parts in turn: their activations need not fit at once
        pixels_CxC = pixels_PxCxC.sum(0)
        accuracy = jnp.trace(pixels_CxC) / pixels_CxC.sum()
        return {"loss": loss_P.mean(), "accuracy": accuracy, "mean_iou": mean_iou(pixels_CxC)}

    held_out = _data.compose_scenes(test, config.eval_scenes, HELD_OUT, size=config.size)
    parts = next(n for n in range(-(-config.eval_scenes // 32), config.eval_scenes + 1) if config.eval_scenes % n == 0)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.steps // 10, config.steps)
    return mpjax.Job(
        model=model,
        loss_fn=loss_fn,
        optimizer=optax.inject_hyperparams(optax.adamw)(schedule, weight_decay=config.weight_decay),
        batches=batches,
        sample=(jnp.zeros((1, config.size, config.size, 1)),),
        eval_fn=eval_fn,
        eval_batches=[{name: x.reshape(parts, -1, *x.shape[1:]) for name, x in held_out.items()}],
    )


def step_options(config: Config) -> dict:
    """How the train step is made: what `main` trains with, and `mpjax parity`."""
    return {"clip_norm": config.clip_norm}


def main(config: Config) -> list[dict]:
    """Train under each policy and compare; returns the rows of the table."""
    policies = _run.policy_maps(config.policies, config.rules, by_path=BY_PATH)
    _data.fashion_mnist(limit=1)  # where it is missing, nothing is begun
    folder = _run.open_folder(config, "vision_segment")
    plan = _run.Plan(
        attempts=config.steps, eval_every=config.eval_every, seeds=mpjax.seeds(config.seed), best="mean_iou",
        step_options=step_options(config), progress=config.progress, devices=config.devices, probe_every=config.probe_every,
        checkpoint_every=config.checkpoint_every,
    )  # fmt: skip
    return _run.compare(policies, lambda policy: make_job(config, policy), folder, plan)


if __name__ == "__main__":
    sys.exit(_run.start(Config, main, __doc__))
