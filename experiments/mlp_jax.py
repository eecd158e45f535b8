"""mpjax without Flax and without `wrap`: a bare `Model(init, apply)`, and a policy that is used by hand.

Question   what does `wrap` do that one can do oneself, and do the parts train alike without it?
Model      an MLP with two hidden layers, plain functions over a dict of arrays.
By hand    `init` casts params to the param dtype; `apply` casts params and pictures to the compute dtype, inside the
           gradient, so that gradients come back in the param dtype; and logits to the output dtype. The model tells
           its policy: float16 gets a dynamic loss scale from it. What `wrap` adds is what an MLP does not need: float32
           islands for norms, and rules by path.
Data       scikit-learn's 1,797 digits, 80 % to train on; nothing is downloaded.
Policies   float32; mixed_bfloat16; mixed_float16.
Reads      test accuracy, the loss curve's distance from float32, the share of matrix FLOPs in half precision.
Time       half a minute on 2 CPU cores.
Run        mpjax train mlp_jax, or python -m experiments.mlp_jax --steps=100 --policy mixed_float16
"""

from __future__ import annotations

import dataclasses
import itertools
import sys

import jax
import jax.numpy as jnp
import optax

import mpjax
from experiments import _data, _run


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, with its unit."""

    policies: _run.Policies = ("float32", "mixed_bfloat16", "mixed_float16")
    """Policy strings; the first is the reference. There are no module paths here, so no rules either."""
    steps: int = 300
    """Optimizer steps for each policy."""
    batch_size: int = 128
    """Images a step."""
    learning_rate: float = 3e-3
    """Peak of the cosine schedule, after warm-up over a tenth of the steps."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    width: int = 128
    """Features of each of the two hidden layers."""
    eval_every: int = 60
    """Steps between evaluations."""
    seed: int = 0
    """Init, data order and rng are derived from it (mpjax.seeds)."""
    devices: int = 1
    """Devices among which the rows of a batch are shared; 0 for all."""
    workdir: str | None = None
    """The run's own folder; if it holds this run, it goes on. Default: a new one, runs/mlp_jax-date-time."""
    resume: bool = True
    """Whether to go on with the run in workdir; --no-resume refuses a folder that holds one."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; 0: only at the end and at a signal. Default: a tenth of the steps."""
    progress: bool = True
    """Show a progress bar."""


def make_model(width: int, policy: mpjax.Policy) -> mpjax.Model:
    """A three-layer MLP from 8×8 pictures to 10 logits that computes by the policy."""
    sizes = (64, width, width, 10)

    def init(rng, image_BxHxWx1):
        layers = list(itertools.pairwise(sizes))
        params = {
            f"layer_{i}": {"kernel": jax.random.normal(key, (n, m)) * (2 / n) ** 0.5, "bias": jnp.zeros(m)}
            for i, (key, (n, m)) in enumerate(zip(jax.random.split(rng, len(layers)), layers, strict=True))
        }
        return policy.cast_to_param(params), {}

    def apply(params, mstate, image_BxHxWx1, rng=None, train=False):
        params, image_BxHxWx1 = policy.cast_to_compute((params, image_BxHxWx1))
        h_BxF = image_BxHxWx1.reshape(image_BxHxWx1.shape[0], -1)
        for i in range(len(sizes) - 1):
            h_BxF = jax.nn.relu(h_BxF) if i else h_BxF
            h_BxF = h_BxF @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"][None]
            h_BxF = mpjax.tap(mstate, f"layer_{i}", h_BxF)  # nothing, unless the step is probed
        return policy.cast_to_output(h_BxF), mstate

    return mpjax.Model(init, apply, policy=policy, cast_params=policy.cast_to_compute)


def make_job(config: Config, policy: mpjax.Policy | mpjax.PolicyMap) -> mpjax.Job:
    """The model, its loss, its optimizer and its data under one policy."""
    data = _data.digits(config.seed)
    model = make_model(config.width, mpjax.PolicyMap.of(policy).default)  # no paths, so no rules

    def loss_fn(params, mstate, batch, rng):
        logits, mstate = model.apply(params, mstate, batch["image"], rng=rng, train=True)
        loss = mpjax.losses.softmax_cross_entropy(logits, batch["label"]).mean()
        return loss, mpjax.Aux(mstate, {"accuracy": (logits.argmax(-1) == batch["label"]).mean()})

    def eval_fn(params, mstate, batch):
        logits, _ = model.apply(params, mstate, batch["image"])
        loss = mpjax.losses.softmax_cross_entropy(logits, batch["label"]).mean()
        return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["label"]).mean()}

    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.steps // 10, config.steps)
    return mpjax.Job(
        model=model,
        loss_fn=loss_fn,
        optimizer=optax.inject_hyperparams(optax.adam)(schedule),
        batches=mpjax.epoch_batches(data.train, config.batch_size, mpjax.seeds(config.seed)),
        sample=(jnp.asarray(data.train["image"][:2]),),
        eval_fn=eval_fn,
        eval_batches=[data.test],
    )


def step_options(config: Config) -> dict:
    """How the train step is made: what `main` trains with, and `mpjax parity`."""
    return {"clip_norm": config.clip_norm}


def main(config: Config) -> list[dict]:
    """Train under each policy and compare; returns the rows of the table."""
    policies = _run.policy_maps(config.policies)
    folder = _run.open_folder(config, "mlp_jax")
    plan = _run.Plan(
        attempts=config.steps, eval_every=config.eval_every, seeds=mpjax.seeds(config.seed),
        step_options=step_options(config), progress=config.progress, devices=config.devices,
        checkpoint_every=config.checkpoint_every,
    )  # fmt: skip
    return _run.compare(policies, lambda policy: make_job(config, policy), folder, plan)


if __name__ == "__main__":
    sys.exit(_run.start(Config, main, __doc__))
