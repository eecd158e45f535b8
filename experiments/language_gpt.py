"""A GPT on the bytes of Shakespeare's plays, in five precisions.

Question   does mixed precision reach the bits per byte of float32, with scanned layers, remat and accumulation?
Model      GPT (Radford et al., 2018), pre-norm, over bytes: no tokenizer. The blocks are one `nn.scan`; Flax Linen.
Data       38 plays, 5.3 MB; the last tenth is held out. `python -m experiments._data shakespeare` fetches it.
Batches    windows at random places, a pure function of (seed, attempt): a run that is resumed sees the same data.
Policies   float32; mixed_bfloat16; mixed_float16 with a dynamic loss scale; mixed_fp8, in which all dense layers of the blocks
           multiply in float8; and a policy map, in which only those of the MLPs do, and the tied table is float32.
Reads      bits per byte of held-out text, loss / ln 2: a uniform guess has 8. Of this text only a few evenly spaced
           windows are read, so compare policies with each other, not with the literature.
Time       2 minutes on 2 CPU cores for the first three policies, to about 2.8 bits per byte. At a learning rate of 5e-3
           training is less steady: another seed, or rounding alone, moved the result by a tenth of a bit.
Run        mpjax train language_gpt, or python -m experiments.language_gpt --steps=100 --policy mixed_bfloat16
Full size  PRESETS["h100"], of 26 million params; run for 500 and 1,000 of its 2,000 steps in
           experiments/records/2026-11-24-three-experiments-h200 (what that record calls --remat=True is --remat=nothing);
           time and memory in five policies in experiments/records/2026-11-29-full-size-h200.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import mpjax
from experiments import _data, _run

# The MLPs are two thirds of the products of a block, and normed bytes go into them: what float8 is for. The table is the head,
# too, and makes the logits; its product is small beside the blocks'.
BY_PATH = {
    "**/up": "dot=fp8",
    "**/down": "dot=fp8",
    "embed": "compute=float32,output=float32",
}
"""The rules of the fifth policy; what they do not name is mixed_bfloat16."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, with its unit. The defaults are for two CPU cores."""

    policies: _run.Policies = ("float32", "mixed_bfloat16", "mixed_float16", "mixed_fp8", "by_path")
    """Policy strings, or by_path for the map above; the first is the reference."""
    rules: _run.Rules = ()
    """A policy map of your own, trained as one more policy; what no pattern names is mixed_bfloat16. Repeat it."""
    steps: int = 1000
    """Optimizer steps for each policy."""
    batch_size: int = 16
    """Windows a step, over all its micro-batches."""
    accumulate: int = 1
    """Micro-batches a step: their gradients are added up in float32."""
    context: int = 64
    """Bytes a window."""
    learning_rate: float = 3e-3
    """Peak of the cosine schedule, after warm-up over a tenth of the steps."""
    weight_decay: float = 1e-2
    """AdamW's, a factor of the learning rate."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    width: int = 64
    """Features a byte."""
    depth: int = 2
    """Transformer blocks."""
    heads: int = 2
    """Attention heads."""
    tied: bool = True
    """The head is the embedding, transposed; else it has weights of its own."""
    remat: Literal["none", "nothing", "attention", "dots_no_batch", "dots", "everything", "offload"] = "none"
    """What the backward pass keeps of a block beside its input (`mpjax.remat_policy`); none: no remat, all is kept."""
    eval_every: int = 200
    """Steps between evaluations."""
    eval_windows: int = 256
    """Held-out windows, evenly spaced."""
    seed: int = 0
    """Init, batches and rng are derived from it (mpjax.seeds)."""
    devices: int = 1
    """Devices among which the rows of a batch are shared; 0 for all."""
    probe_every: int = 0
    """Steps between probes, which count exponents by module (`mpjax plot` draws them); 0 for none."""
    workdir: str | None = None
    """The run's own folder; if it holds this run, it goes on. Default: a new one, runs/language_gpt-date-time."""
    resume: bool = True
    """Whether to go on with the run in workdir; --no-resume refuses a folder that holds one."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; 0: only at the end and at a signal. Default: a tenth of the steps."""
    progress: bool = True
    """Show a progress bar."""


PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "h100": {
        "width": 512, "depth": 8, "heads": 8, "context": 1024, "batch_size": 64, "accumulate": 2, "remat": "nothing",
        "steps": 2000, "learning_rate": 6e-4,
    },
}  # fmt: skip
"""What the named sizes change of the defaults."""


class Block(nn.Module):
    """Pre-norm transformer block, as the body of a scan. No dtype anywhere: the policy decides."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x_BxTxD, mask_1x1xTxT):
        h = nn.LayerNorm(name="norm1")(x_BxTxD)
        x_BxTxD = x_BxTxD + nn.MultiHeadDotProductAttention(self.heads, name="attention")(h, mask=mask_1x1xTxT)
        h = nn.LayerNorm(name="norm2")(x_BxTxD)
        h_BxTxF = nn.gelu(nn.Dense(4 * self.width, name="up")(h))
        return x_BxTxD + nn.Dense(self.width, name="down")(h_BxTxF), None


class GPT(nn.Module):
    """A causal transformer over bytes with learned positions."""

    width: int
    depth: int
    heads: int
    tied: bool
    remat: str

    @nn.compact
    def __call__(self, byte_BxT):
        length = byte_BxT.shape[1]
        embed = nn.Embed(256, self.width, embedding_init=nn.initializers.normal(0.02), name="embed")
        x_BxTxD = embed(byte_BxT)
        x_BxTxD += self.param("positions", nn.initializers.normal(0.02), (1, length, self.width))
        mask_1x1xTxT = jnp.tril(jnp.ones((1, 1, length, length), bool))
        body = Block
        if self.remat != "none":  # a scan's body is not merged with others
            body = nn.remat(Block, prevent_cse=False, policy=mpjax.remat_policy(self.remat))
        stack = nn.scan(
            body, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=self.depth
        )
        x_BxTxD, _ = stack(self.width, self.heads, name="layers")(x_BxTxD, mask_1x1xTxT)
        x_BxTxD = nn.LayerNorm(name="norm")(x_BxTxD)
        return embed.attend(x_BxTxD) if self.tied else nn.Dense(256, name="head")(x_BxTxD)


def windows(text: np.ndarray, starts_B: np.ndarray, context: int) -> dict[str, np.ndarray]:
    """The windows of a text that begin at these places, and for each byte the one that follows it."""
    window_BxT1 = text[starts_B[:, None] + np.arange(context + 1)].astype(np.int32)
    return {"byte": window_BxT1[:, :-1], "next": window_BxT1[:, 1:]}


def make_job(config: Config, policy: mpjax.PolicyMap) -> mpjax.Job:
    """The model, its loss, its optimizer and its data under one policy."""
    data = _data.shakespeare()
    train, test = data.train["text"], data.test["text"]
    model = mpjax.wrap(GPT(config.width, config.depth, config.heads, config.tied, config.remat), policy)

    def batches(attempt: int):
        random = np.random.default_rng((config.seed, attempt))
        starts_B = random.integers(len(train) - config.context, size=config.batch_size)
        return windows(train, starts_B, config.context)

    def loss_fn(params, mstate, batch, rng):
        logits_BxTxV, mstate = model.apply(params, mstate, batch["byte"], rng=rng)
        return mpjax.losses.softmax_cross_entropy(logits_BxTxV, batch["next"]).mean(), mpjax.Aux(mstate, {})

    def eval_fn(params, mstate, batch):
        loss, _ = loss_fn(params, mstate, batch, None)  # nothing here is random, or differs in training
        return {"loss": loss, "bits_per_byte": loss / math.log(2)}

    starts = np.linspace(0, len(test) - config.context - 1, config.eval_windows).astype(int)
    parts = np.array_split(starts, -(-len(starts) // config.batch_size))
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.steps // 10, config.steps)
    optimizer = optax.inject_hyperparams(optax.adamw)(schedule, weight_decay=config.weight_decay)
    sample = (jnp.zeros((1, config.context), jnp.int32),)
    held_out = [windows(test, part, config.context) for part in parts]
    return mpjax.Job(model, loss_fn, optimizer, batches, sample, eval_fn, held_out)


def step_options(config: Config) -> dict:
    """How the train step is made: what `main` trains with, and `mpjax parity`."""
    return {"clip_norm": config.clip_norm, "accumulate": config.accumulate}


def main(config: Config) -> list[dict]:
    """Train under each policy and compare; returns the rows of the table."""
    policies = _run.policy_maps(config.policies, config.rules, by_path=BY_PATH)
    _data.shakespeare()  # where it is missing, nothing is begun
    folder = _run.open_folder(config, "language_gpt")
    plan = _run.Plan(
        attempts=config.steps, eval_every=config.eval_every, seeds=mpjax.seeds(config.seed), best="-bits_per_byte",
        step_options=step_options(config), progress=config.progress, devices=config.devices, probe_every=config.probe_every,
        checkpoint_every=config.checkpoint_every,
    )  # fmt: skip
    return _run.compare(policies, lambda policy: make_job(config, policy), folder, plan)


if __name__ == "__main__":
    sys.exit(_run.start(Config, main, __doc__))
