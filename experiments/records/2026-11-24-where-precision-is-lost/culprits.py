"""What is named where the loss scale is too high for float16. Run it from the checkout, as `python PATH`."""

import dataclasses

import jax
import jax.numpy as jnp

import mpjax
from mpjax.cli.target import load_job

for name in ("vision_digits", "vision_resnet_nnx", "language_gpt"):
    job = load_job(name, "mixed_float16")
    state = job.state(jax.random.key(0))
    for power in (15, 20, 22, 24, 26, 28, 30):
        scaled = dataclasses.replace(state, loss_scale=mpjax.dynamic_loss_scale(2.0**power))
        found = mpjax.diagnose(job.model, scaled, jax.tree.map(jnp.asarray, job.batches(0)), job.loss_fn)
        print(f"{name}, loss scale 2^{power}: {found or 'finite'}")
        if found:
            break
