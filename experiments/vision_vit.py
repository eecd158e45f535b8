"""A vision transformer on pictures of clothes, in five precisions, with a map by path that multiplies in float8 and float16.

Question   does a ViT with dropout and augmentation reach float32's accuracy, also where its MLPs multiply in float8?
Model      ViT (Dosovitskiy et al., 2020): square patches, learned positions, pre-norm blocks; the mean of all tokens
           (Zhai et al., 2022) instead of a class token. Flax Linen.
Data       Fashion-MNIST, 60,000 + 10,000; `python -m experiments._data fashion_mnist` fetches it. Training pictures are
           shifted and mirrored at random, on the device, by the step's own rng.
Policies   float32; mixed_bfloat16; mixed_float16 with a dynamic loss scale; mixed_fp8; and a policy map: the MLPs in float8,
           attention in float16, the head in float32, the rest in bfloat16.
Reads      test accuracy, the loss curve's distance from float32, memory of the step, the share of each dtype in its products.
Time       made for about 5 minutes on 2 free CPU cores. A CPU multiplies no float8 and no float16: their times say nothing.
Run        mpjax train vision_vit, or python -m experiments.vision_vit --steps=100 --policy mixed_bfloat16
Full size  PRESETS["h100"]: 85 epochs of 4.8 million params; 93.3 % in float32 and 93.5 % in bfloat16
           (experiments/records/2026-11-29-full-size-h200 and 2026-11-29-presets-h200).
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import mpjax
from experiments import _data, _run

# The MLPs are two thirds of the products of a block, and normed tokens go into them: what float8 is for. In attention
# float16 spends on the mantissa what bfloat16 spends on a range that normed queries and keys do not need. The head has
# ten columns and makes the logits: float32 costs nothing there.
BY_PATH = {
    "**/up": "dot=fp8",
    "**/down": "dot=fp8",
    "**/attention": "compute=float16",
    "head": "compute=float32,output=float32",
}
"""The rules of the fifth policy; what they do not name is mixed_bfloat16."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, with its unit. The defaults are for two CPU cores."""

    policies: _run.Policies = ("float32", "mixed_bfloat16", "mixed_float16", "mixed_fp8", "by_path")
    """Policy strings, or by_path for the map above; the first is the reference."""
    rules: _run.Rules = ()
    """A policy map of your own, trained as one more policy; what no pattern names is mixed_bfloat16. Repeat it."""
    steps: int = 1200
    """Optimizer steps for each policy."""
    batch_size: int = 64
    """Images a step."""
    learning_rate: float = 2e-3
    """Peak of the cosine schedule, after warm-up over a tenth of the steps."""
    weight_decay: float = 0.05
    """AdamW's, a factor of the learning rate."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    label_smoothing: float = 0.1
    """What of each label is spread evenly over all classes."""
    dropout: float = 0.0
    """Share of what each half of a block adds that is dropped."""
    shift: int = 0
    """Move each training picture by up to so many pixels in each direction."""
    flip: bool = False
    """Mirror each training picture with probability one half."""
    patch: int = 7
    """Side of a patch in pixels; a divisor of 28. 7 makes 16 tokens, 4 makes 49."""
    width: int = 64
    """Features a token; a multiple of 16, where float8 is to multiply."""
    depth: int = 2
    """Transformer blocks."""
    heads: int = 4
    """Attention heads."""
    eval_every: int = 400
    """Steps between evaluations."""
    seed: int = 0
    """Init, data order and rng are derived from it (mpjax.seeds)."""
    devices: int = 1
    """Devices among which the rows of a batch are shared; 0 for all."""
    probe_every: int = 0
    """Steps between probes, which count exponents by module (`mpjax plot` draws them); 0 for none."""
    workdir: str | None = None
    """The run's own folder; if it holds this run, it goes on. Default: a new one, runs/vision_vit-date-time."""
    resume: bool = True
    """Whether to go on with the run in workdir; --no-resume refuses a folder that holds one."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; 0: only at the end and at a signal. Default: a tenth of the steps."""
    progress: bool = True
    """Show a progress bar."""


PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "h100": {
        "patch": 4, "width": 256, "depth": 6, "heads": 8, "batch_size": 512, "steps": 10_000, "eval_every": 1000,
        "learning_rate": 1e-3, "dropout": 0.1, "shift": 2, "flip": True,
    },
}  # fmt: skip
"""What the named sizes change of the defaults."""


class Block(nn.Module):
    """Pre-norm transformer block. No dtype anywhere: the policy decides."""

    width: int
    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x_BxTxD, train: bool):
        h = nn.LayerNorm(name="norm1")(x_BxTxD)
        h = nn.MultiHeadDotProductAttention(self.heads, name="attention")(h)
        x_BxTxD = x_BxTxD + nn.Dropout(self.dropout, deterministic=not train)(h)
        h = nn.LayerNorm(name="norm2")(x_BxTxD)
        h_BxTxF = nn.gelu(nn.Dense(4 * self.width, name="up")(h))
        h = nn.Dense(self.width, name="down")(h_BxTxF)
        return x_BxTxD + nn.Dropout(self.dropout, deterministic=not train)(h)


class ViT(nn.Module):
    """A vision transformer with learned positions and mean pooling."""

    patch: int
    width: int
    depth: int
    heads: int
    dropout: float
    classes: int = 10

    @nn.compact
    def __call__(self, image_BxHxWx1, train: bool = False):
        side = (self.patch, self.patch)
        x = nn.Conv(self.width, side, side, padding="VALID", name="patches")(image_BxHxWx1)
        x_BxTxD = x.reshape(x.shape[0], -1, self.width)
        x_BxTxD += self.param("positions", nn.initializers.normal(0.02), (1, *x_BxTxD.shape[1:]))
        for i in range(self.depth):
            x_BxTxD = Block(self.width, self.heads, self.dropout, name=f"layers_{i}")(x_BxTxD, train)
        x_BxD = nn.LayerNorm(name="norm")(x_BxTxD).mean(1)
        return nn.Dense(self.classes, name="head")(x_BxD)


def augmented(image_BxHxWx1, rng, shift: int, flip: bool):
    """Each picture moved by at most `shift` pixels along each axis, what comes in being background, and mirrored or not."""
    moving, mirroring = jax.random.split(rng)
    rows, height, width, _ = image_BxHxWx1.shape
    if shift:
        border = ((0, 0), (shift, shift), (shift, shift), (0, 0))
        wide = jnp.pad(image_BxHxWx1, border, constant_values=-1.0)
        y_B, x_B = jax.random.randint(moving, (2, rows), 0, 2 * shift + 1)
        cut = jax.vmap(lambda image, y, x: jax.lax.dynamic_slice(image, (y, x, 0), (height, width, 1)))
        image_BxHxWx1 = cut(wide, y_B, x_B)
    if flip:
        turned = jax.random.bernoulli(mirroring, shape=(rows, 1, 1, 1))
        image_BxHxWx1 = jnp.where(turned, image_BxHxWx1[:, :, ::-1], image_BxHxWx1)
    return image_BxHxWx1


def make_job(config: Config, policy: mpjax.PolicyMap) -> mpjax.Job:
    """The model, its loss, its optimizer and its data under one policy."""
    seeds = mpjax.seeds(config.seed)
    data = _data.fashion_mnist()
    module = ViT(config.patch, config.width, config.depth, config.heads, config.dropout)
    model = mpjax.wrap(module, policy)

    def loss_fn(params, mstate, batch, rng):
        rng, augmenting = jax.random.split(rng)
        image = augmented(batch["image"], augmenting, config.shift, config.flip)
        logits, mstate = model.apply(params, mstate, image, rng=rng, train=True)
        losses_B = mpjax.losses.softmax_cross_entropy(logits, batch["label"], label_smoothing=config.label_smoothing)
        return losses_B.mean(), mpjax.Aux(mstate, {"accuracy": (logits.argmax(-1) == batch["label"]).mean()})

    def eval_fn(params, mstate, batch):
        logits, _ = model.apply(params, mstate, batch["image"], train=False)
        loss = mpjax.losses.softmax_cross_entropy(logits, batch["label"]).mean()
        return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["label"]).mean()}

    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.steps // 10, config.steps)
    optimizer = optax.inject_hyperparams(optax.adamw)(schedule, weight_decay=config.weight_decay)
    parts = max(1, len(data.test["label"]) // 1000)
    return mpjax.Job(
        model=model,
        loss_fn=loss_fn,
        optimizer=optimizer,
        batches=mpjax.epoch_batches(data.train, config.batch_size, seeds),
        sample=(jnp.asarray(data.train["image"][:2]),),
        eval_fn=eval_fn,
        eval_batches=[{k: v[i::parts] for k, v in data.test.items()} for i in range(parts)],
    )


def step_options(config: Config) -> dict:
    """How the train step is made: what `main` trains with, and `mpjax parity`."""
    return {"clip_norm": config.clip_norm}


def main(config: Config) -> list[dict]:
    """Train under each policy and compare; returns the rows of the table."""
    policies = _run.policy_maps(config.policies, config.rules, by_path=BY_PATH)
    _data.fashion_mnist(limit=1)  # where it is missing, nothing is begun
    folder = _run.open_folder(config, "vision_vit")
    plan = _run.Plan(
        attempts=config.steps, eval_every=config.eval_every, seeds=mpjax.seeds(config.seed),
        step_options=step_options(config), progress=config.progress, devices=config.devices, probe_every=config.probe_every,
        checkpoint_every=config.checkpoint_every,
    )  # fmt: skip
    return _run.compare(policies, lambda policy: make_job(config, policy), folder, plan)


if __name__ == "__main__":
    sys.exit(_run.start(Config, main, __doc__))
