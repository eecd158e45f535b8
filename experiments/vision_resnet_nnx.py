"""A small residual network with BatchNorm, written in NNX, in five precisions.

Question   do convolutions and batch statistics train alike in half precision, through the NNX door?
Model      ResNet (He et al., 2016) of basic blocks, two a stage, each stage half the picture and twice the width.
Data       scikit-learn's 1,797 digits, or --data fashion_mnist where MPJAX_DATA has it (or
           `python -m experiments._data fashion_mnist` has fetched it).
Policies   float32; mixed_bfloat16; mixed_float16 with a dynamic loss scale; mixed_fp8; and a policy map that keeps the first
           and the last layer in float32. The norms and their statistics are float32 in each. Float8 multiplies in dense
           layers only: convolutions stay in bfloat16, and so does the head, so that mixed_fp8 is mixed_bfloat16 here, to
           the bit. It stands there so that the table of a comparison is whole, and says so.
Reads      test accuracy under the running statistics, the loss curve's distance from float32, memory of the step.
Time       2 minutes on 2 CPU cores for the first three policies; the others were not timed.
Run        mpjax train vision_resnet_nnx, or python -m experiments.vision_resnet_nnx --steps=100 --policy mixed_bfloat16
Full size  for a GPU, PRESETS["h100"]; 94 % in each of the first three, experiments/records/2026-11-24-three-experiments-h200:
           --data fashion_mnist --width=64 --stages=3 --batch-size=512 --steps=2400 --eval-every=400 --flip=True
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import mpjax
from experiments import _data, _run

# The first layer reads raw pixels and the last makes the logits; the two are about a hundredth of the products, so
# that float32 there costs next to nothing. It is the map that papers on low-bit networks start from.
BY_PATH = {"stem": "compute=float32", "head": "compute=float32,output=float32"}
"""The rules of the fifth policy; what they do not name is mixed_bfloat16."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, with its unit. The defaults are for two CPU cores."""

    policies: _run.Policies = ("float32", "mixed_bfloat16", "mixed_float16", "mixed_fp8", "by_path")
    """Policy strings, or by_path for the map above; the first is the reference."""
    rules: _run.Rules = ()
    """A policy map of your own, trained as one more policy; what no pattern names is mixed_bfloat16. Repeat it."""
    data: Literal["digits", "fashion_mnist"] = "digits"
    """8×8 digits that come with scikit-learn, or 28×28 pictures of clothes."""
    steps: int = 120
    """Optimizer steps for each policy."""
    batch_size: int = 128
    """Images a step."""
    learning_rate: float = 0.2
    """Peak of the cosine schedule, after warm-up over a tenth of the steps."""
    weight_decay: float = 5e-4
    """Added to the gradient of every param, times the param."""
    flip: bool = False
    """Mirror each training picture with probability one half."""
    width: int = 16
    """Features of the first stage."""
    stages: int = 2
    """Stages of two blocks."""
    eval_every: int = 40
    """Steps between evaluations."""
    seed: int = 0
    """Init, data order and rng are derived from it (mpjax.seeds)."""
    devices: int = 1
    """Devices among which the rows of a batch are shared; 0 for all."""
    probe_every: int = 0
    """Steps between probes, which count exponents by module (`mpjax plot` draws them); 0 for none."""
    workdir: str | None = None
    """The run's own folder; if it holds this run, it goes on. Default: a new one, runs/vision_resnet_nnx-date-time."""
    resume: bool = True
    """Whether to go on with the run in workdir; --no-resume refuses a folder that holds one."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; 0: only at the end and at a signal. Default: a tenth of the steps."""
    progress: bool = True
    """Show a progress bar."""


PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "h100": {
        "data": "fashion_mnist", "width": 64, "stages": 3, "batch_size": 512, "steps": 2400, "eval_every": 400, "flip": True,
    },
}  # fmt: skip
"""What the named sizes change of the defaults. The accuracy of h100 is to be 94 % at least."""


class Block(nnx.Module):
    """Two 3×3 convolutions round a shortcut. No dtype anywhere: the policy decides."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.conv1 = conv(inputs, outputs, (3, 3), strides=stride)
        self.norm1 = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)
        self.conv2 = conv(outputs, outputs, (3, 3))
        self.norm2 = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)
        self.shortcut = None if inputs == outputs else conv(inputs, outputs, (1, 1), strides=stride)

    def __call__(self, x_BxHxWxC):
        y_BxHxWxC = nnx.relu(self.norm1(self.conv1(x_BxHxWxC)))
        y_BxHxWxC = self.norm2(self.conv2(y_BxHxWxC))
        return nnx.relu(y_BxHxWxC + (x_BxHxWxC if self.shortcut is None else self.shortcut(x_BxHxWxC)))


class ResNet(nnx.Module):
    """A stem, stages of two blocks, mean pooling, a head."""

    def __init__(self, width: int, stages: int, classes: int = 10, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(1, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        blocks = []
        for stage in range(stages):
            inputs, outputs = width * 2 ** max(stage - 1, 0), width * 2**stage
            blocks += [Block(inputs, outputs, 2 if stage else 1, rngs=rngs), Block(outputs, outputs, 1, rngs=rngs)]
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(width * 2 ** (stages - 1), classes, rngs=rngs)

    def __call__(self, image_BxHxWx1):
        x_BxHxWxC = nnx.relu(self.norm(self.stem(image_BxHxWx1)))
        for block in self.blocks:
            x_BxHxWxC = block(x_BxHxWxC)
        return self.head(x_BxHxWxC.mean((1, 2)))


def mirrored(image_BxHxWx1, rng):
    """Each picture or its mirror image."""
    flip = jax.random.bernoulli(rng, shape=(len(image_BxHxWx1), 1, 1, 1))
    return jnp.where(flip, image_BxHxWx1[:, :, ::-1], image_BxHxWx1)


def pictures(config: Config) -> _data.Split:
    """The data set that the config names."""
    return _data.digits(config.seed) if config.data == "digits" else _data.fashion_mnist()


def make_job(config: Config, policy: mpjax.PolicyMap) -> mpjax.Job:
    """The model, its loss, its optimizer and its data under one policy."""
    seeds = mpjax.seeds(config.seed)
    data = pictures(config)
    model = mpjax.wrap(lambda rngs: ResNet(config.width, config.stages, rngs=rngs), policy)

    def loss_fn(params, mstate, batch, rng):
        image = mirrored(batch["image"], rng) if config.flip else batch["image"]
        logits, mstate = model.apply(params, mstate, image, rng=rng, train=True)
        loss = mpjax.losses.softmax_cross_entropy(logits, batch["label"]).mean()
        return loss, mpjax.Aux(mstate, {"accuracy": (logits.argmax(-1) == batch["label"]).mean()})

    def eval_fn(params, mstate, batch):
        logits, _ = model.apply(params, mstate, batch["image"], train=False)
        loss = mpjax.losses.softmax_cross_entropy(logits, batch["label"]).mean()
        return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["label"]).mean()}

    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.steps // 10, config.steps)
    sgd = optax.inject_hyperparams(optax.sgd)(schedule, momentum=0.9, nesterov=True)
    parts = max(1, len(data.test["label"]) // 1000)
    return mpjax.Job(
        model=model,
        loss_fn=loss_fn,
        optimizer=optax.chain(optax.add_decayed_weights(config.weight_decay), sgd),
        batches=mpjax.epoch_batches(data.train, config.batch_size, seeds),
        sample=(jnp.asarray(data.train["image"][:2]),),
        eval_fn=eval_fn,
        eval_batches=[{k: v[i::parts] for k, v in data.test.items()} for i in range(parts)],
    )


def step_options(config: Config) -> dict:
    """How the train step is made: what `main` trains with, and `mpjax parity`."""
    return {}  # SGD here needs no clipping


def main(config: Config) -> list[dict]:
    """Train under each policy and compare; returns the rows of the table."""
    policies = _run.policy_maps(config.policies, config.rules, by_path=BY_PATH)
    pictures(config)  # where they are missing, nothing is begun
    folder = _run.open_folder(config, "vision_resnet_nnx")
    plan = _run.Plan(
        attempts=config.steps, eval_every=config.eval_every, seeds=mpjax.seeds(config.seed),
        step_options=step_options(config), progress=config.progress, devices=config.devices, probe_every=config.probe_every,
        checkpoint_every=config.checkpoint_every,
    )  # fmt: skip
    return _run.compare(policies, lambda policy: make_job(config, policy), folder, plan)


if __name__ == "__main__":
    sys.exit(_run.start(Config, main, __doc__))
