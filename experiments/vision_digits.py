"""A small vision transformer on real handwritten digits, in four precisions.

Question   does mixed precision train to the same place as float32, from the same seeds and data order?
Model      ViT (Dosovitskiy et al., 2021): 2×2 patches of 8×8 images, pre-norm blocks, mean pooling; Flax Linen.
Data       scikit-learn's 1,797 digits, 80 % to train on; nothing is downloaded.
Policies   float32; mixed_bfloat16; mixed_float16 with a dynamic loss scale; and a policy map that runs attention in
           float16 and the head in float32 inside a bfloat16 model.
Reads      test accuracy, the loss curve's distance from float32, memory of the compiled step, and how many of the
           matrix FLOPs are in half precision (read off the jaxpr).
Time       under 3 minutes on 2 CPU cores. A CPU has no fast half-precision products: steps/s says nothing about a GPU.
Run        make run, or python -m experiments.vision_digits --steps=200 --policies float32 mixed_bfloat16
"""

from __future__ import annotations

import dataclasses
import sys

import jax.numpy as jnp
import optax
from flax import linen as nn

import mpjax
from experiments import _data, _run

BY_PATH = {"head": "compute=float32,output=float32", "**/attention": "compute=float16"}
"""The rules of the fourth policy; what they do not name is mixed_bfloat16."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, with its unit."""

    policies: _run.Policies = ("float32", "mixed_bfloat16", "mixed_float16", "by_path")
    """Policy strings, or by_path for the map above; the first is the reference."""
    rules: _run.Rules = ()
    """A policy map of your own, trained as one more policy; what no pattern names is mixed_bfloat16. Repeat it."""
    steps: int = 240
    """Optimizer steps for each policy."""
    batch_size: int = 128
    """Images a step."""
    learning_rate: float = 2e-3
    """Peak of the cosine schedule, after warm-up over a tenth of the steps."""
    weight_decay: float = 1e-2
    """AdamW's, a factor of the learning rate."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    width: int = 64
    """Features a token."""
    depth: int = 2
    """Transformer blocks."""
    heads: int = 4
    """Attention heads."""
    eval_every: int = 60
    """Steps between evaluations."""
    seed: int = 0
    """Init, data order and rng are derived from it (mpjax.seeds)."""
    devices: int = 1
    """Devices among which the rows of a batch are shared; 0 for all."""
    probe_every: int = 0
    """Steps between probes, which count exponents by module (`mpjax plot` draws them); 0 for none."""
    workdir: str | None = None
    """The run's own folder; if it holds this run, it goes on. Default: a new one, runs/vision_digits-date-time."""
    resume: bool = True
    """Whether to go on with the run in workdir; --no-resume refuses a folder that holds one."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; 0: only at the end and at a signal. Default: a tenth of the steps."""
    progress: bool = True
    """Show a progress bar."""


class Block(nn.Module):
    """Pre-norm transformer block. No dtype anywhere: the policy decides."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x_BxTxD):
        h = nn.LayerNorm(name="norm1")(x_BxTxD)
        x_BxTxD = x_BxTxD + nn.MultiHeadDotProductAttention(self.heads, name="attention")(h)
        h = nn.LayerNorm(name="norm2")(x_BxTxD)
        h_BxTxF = nn.gelu(nn.Dense(4 * self.width, name="up")(h))
        return x_BxTxD + nn.Dense(self.width, name="down")(h_BxTxF)


class ViT(nn.Module):
    """A vision transformer with learned positions and mean pooling."""

    width: int
    depth: int
    heads: int
    classes: int = 10

    @nn.compact
    def __call__(self, image_BxHxWx1):
        x = nn.Conv(self.width, (2, 2), (2, 2), name="patches")(image_BxHxWx1)
        x_BxTxD = x.reshape(x.shape[0], -1, self.width)
        x_BxTxD += self.param("positions", nn.initializers.normal(0.02), (1, *x_BxTxD.shape[1:]))
        for i in range(self.depth):
            x_BxTxD = Block(self.width, self.heads, name=f"layers_{i}")(x_BxTxD)
        x_BxD = nn.LayerNorm(name="norm")(x_BxTxD).mean(1)
        return nn.Dense(self.classes, name="head")(x_BxD)


def make_job(config: Config, policy: mpjax.PolicyMap) -> mpjax.Job:
    """The model, its loss, its optimizer and its data under one policy."""
    seeds = mpjax.seeds(config.seed)
    data = _data.digits(config.seed)
    model = mpjax.wrap(ViT(config.width, config.depth, config.heads), policy)

    def loss_fn(params, mstate, batch, rng):
        logits, mstate = model.apply(params, mstate, batch["image"], rng=rng, train=True)
        loss = mpjax.losses.softmax_cross_entropy(logits, batch["label"]).mean()
        return loss, mpjax.Aux(mstate, {"accuracy": (logits.argmax(-1) == batch["label"]).mean()})

    def eval_fn(params, mstate, batch):
        logits, _ = model.apply(params, mstate, batch["image"])
        loss = mpjax.losses.softmax_cross_entropy(logits, batch["label"]).mean()
        return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["label"]).mean()}

    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.steps // 10, config.steps)
    optimizer = optax.inject_hyperparams(optax.adamw)(schedule, weight_decay=config.weight_decay)
    return mpjax.Job(
        model=model,
        loss_fn=loss_fn,
        optimizer=optimizer,
        batches=mpjax.epoch_batches(data.train, config.batch_size, seeds),
        sample=(jnp.asarray(data.train["image"][:2]),),
        eval_fn=eval_fn,
        eval_batches=[data.test],
    )


def step_options(config: Config) -> dict:
    """How the train step is made: what `main` trains with, and `mpjax parity`."""
    return {"clip_norm": config.clip_norm}


def main(config: Config) -> list[dict]:
    """Train under each policy and compare; returns the rows of the table."""
    policies = _run.policy_maps(config.policies, config.rules, by_path=BY_PATH)
    folder = _run.open_folder(config, "vision_digits")
    plan = _run.Plan(
        attempts=config.steps, eval_every=config.eval_every, seeds=mpjax.seeds(config.seed),
        step_options=step_options(config), progress=config.progress, devices=config.devices, probe_every=config.probe_every,
        checkpoint_every=config.checkpoint_every,
    )  # fmt: skip
    return _run.compare(policies, lambda policy: make_job(config, policy), folder, plan)


if __name__ == "__main__":
    sys.exit(_run.start(Config, main, __doc__))
