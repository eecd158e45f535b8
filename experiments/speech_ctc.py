"""A recogniser of spoken digit strings by CTC, in five precisions.

Question   does mixed precision hear as well as float32, where the loss sums log probabilities over a hundred frames?
Model      log-mel features, two strided convolutions, a pre-norm transformer (Vaswani et al., 2017) with a convolution in
           each block, as Conformer has it (Gulati et al., 2020), connectionist temporal classification (Graves et al.,
           2006); Flax Linen.
Data       the Free Spoken Digit Dataset: strings of 1 to 6 digits by one speaker, joined from real recordings with a
           little silence between them; one of six speakers is held out, each of whose 500 recordings is heard once.
           `python -m experiments._data spoken_digits` fetches it.
Batches    strings at random, a pure function of (seed, attempt): a run that is resumed sees the same data.
Policies   float32; mixed_bfloat16; mixed_float16 with a dynamic loss scale; mixed_fp8; and a map by path. In each of
           them the features, the softmax, the norms and the loss are float32.
Reads      digit error rate on the held-out speaker: edit distance of greedy decoding to what was said, over the number
           of digits said; to say nothing has 1. (The sizes were chosen by looking at this speaker: compare policies.)
Time       made for a few minutes a policy on 2 free CPU cores, which multiply no float16 and no float8.
Run        mpjax train speech_ctc, or python -m experiments.speech_ctc --steps=200 --policy mixed_bfloat16
Full size  PRESETS["h100"]; digit error rate 0.13 in float32 and in bfloat16 (experiments/records/2026-11-29-full-size-h200),
           and 0.19 without its dropout: it learns its five speakers by heart.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import mpjax
from experiments import _data, _run

BLANK = 10
"""The class that says nothing; the others are the digits."""

# The first convolution reads the features, whose small differences in quiet bands are what a later layer cannot bring
# back; it is a small part of the work. The head's logits go into sums over all frames.
BY_PATH = {"subsample": "compute=float32", "head": "compute=float32,output=float32"}
"""The rules of the fifth policy; what they do not name is mixed_bfloat16."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, with its unit. The defaults are for two CPU cores."""

    policies: _run.Policies = ("float32", "mixed_bfloat16", "mixed_float16", "mixed_fp8", "by_path")
    """Policy strings, or by_path for the map above; the first is the reference."""
    rules: _run.Rules = ()
    """A policy map of your own, trained as one more policy; what no pattern names is mixed_bfloat16. Repeat it."""
    steps: int = 500
    """Optimizer steps for each policy."""
    batch_size: int = 16
    """Strings a step."""
    learning_rate: float = 2e-3
    """Peak of the cosine schedule, after warm-up over a tenth of the steps."""
    weight_decay: float = 1e-2
    """AdamW's, a factor of the learning rate."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    held_out: Literal["george", "jackson", "lucas", "nicolas", "theo", "yweweler"] = "jackson"
    """The speaker to test on."""
    seconds: float = 4.5
    """Of every string, padding included; a digit that would not fit is left out."""
    stretch: float = 0.2
    """Training strings are played faster or slower by up to this share."""
    masked: int = 8
    """Twice, up to so many neighbouring mel bands of a training string are masked."""
    dropout: float = 0.0
    """Share of what each part of a block adds that is dropped."""
    width: int = 96
    """Features a frame."""
    depth: int = 2
    """Transformer blocks."""
    heads: int = 4
    """Attention heads."""
    eval_every: int = 100
    """Steps between evaluations."""
    seed: int = 0
    """Init, batches and rng are derived from it (mpjax.seeds); the held-out strings are not."""
    devices: int = 1
    """Devices among which the rows of a batch are shared; 0 for all."""
    probe_every: int = 0
    """Steps between probes, which count exponents by module (`mpjax plot` draws them); 0 for none."""
    workdir: str | None = None
    """The run's own folder; if it holds this run, it goes on. Default: a new one, runs/speech_ctc-date-time."""
    resume: bool = True
    """Whether to go on with the run in workdir; --no-resume refuses a folder that holds one."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; 0: only at the end and at a signal. Default: a tenth of the steps."""
    progress: bool = True
    """Show a progress bar."""


PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "h100": {
        "steps": 2000, "batch_size": 64, "learning_rate": 1e-3, "width": 256, "depth": 6, "dropout": 0.2, "eval_every": 250,
    },
}  # fmt: skip
"""The fields that each machine's run changes."""


class Block(nn.Module):
    """Attention over all frames, a convolution over the near ones, a feed-forward part; each behind its norm.

    The convolution tells what is before what, so that no position is learned. No dtype anywhere: the policy decides.
    """

    width: int
    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x_BxTxD, mask_Bx1x1xT, train: bool):
        def dropped(x):
            return nn.Dropout(self.dropout, deterministic=not train)(x)

        h = nn.LayerNorm(name="norm1")(x_BxTxD)
        h = nn.MultiHeadDotProductAttention(self.heads, name="attention")(h, mask=mask_Bx1x1xT)
        x_BxTxD = x_BxTxD + dropped(h)
        h = nn.LayerNorm(name="norm_near")(x_BxTxD)
        x_BxTxD = x_BxTxD + dropped(nn.gelu(nn.Conv(self.width, (7,), name="near")(h)))
        h = nn.LayerNorm(name="norm2")(x_BxTxD)
        h_BxTxF = nn.gelu(nn.Dense(4 * self.width, name="up")(h))
        return x_BxTxD + dropped(nn.Dense(self.width, name="down")(h_BxTxF))


class Subsample(nn.Module):
    """Two convolutions along time, a quarter of the frames."""

    width: int

    @nn.compact
    def __call__(self, mel_BxTxM):
        x_BxTxD = nn.gelu(nn.Conv(self.width, (5,), 2, name="conv1")(mel_BxTxM))
        return nn.gelu(nn.Conv(self.width, (5,), 2, name="conv2")(x_BxTxD))


class Recogniser(nn.Module):
    """From features to the logits of ten digits and the blank, one a quarter of the frames."""

    width: int
    depth: int
    heads: int
    dropout: float

    @nn.compact
    def __call__(self, mel_BxTxM, frames_B, train: bool = False):
        x_BxTxD = Subsample(self.width, name="subsample")(mel_BxTxM)
        mask_Bx1x1xT = ~padding(frames_B, x_BxTxD.shape[1])[:, None, None]
        for i in range(self.depth):
            x_BxTxD = Block(self.width, self.heads, self.dropout, name=f"layers_{i}")(x_BxTxD, mask_Bx1x1xT, train)
        return nn.Dense(BLANK + 1, name="head")(nn.LayerNorm(name="norm")(x_BxTxD))


def padding(frames_B, length: int):
    """Whether each of the `length` frames that are left of four times as many is padding."""
    return jnp.arange(length)[None] * 4 >= frames_B[:, None]


def after(length_B, count: int):
    """Whether each of `count` places is behind the end."""
    return jnp.arange(count)[None] >= length_B[:, None]


def digit_errors(logits_BxTxV, padding_BxT, digits_BxL, length_B):
    """The edit distance of each string, greedily decoded, to its digits: int32 [B].

    Decoded: the likeliest class of each frame, one of a run of the same, without blanks. Row j of the distances is that of
    what was decoded so far to the first j digits, so that digits behind the end never count.
    """
    best_BxT = jnp.where(padding_BxT, BLANK, logits_BxTxV.argmax(-1))
    before_BxT = jnp.pad(best_BxT[:, :-1], ((0, 0), (1, 0)), constant_values=BLANK)

    def heard(row, frame):
        symbol_B, counts_B = frame
        new = [row[0] + 1]
        for j in range(1, len(row)):
            wrong_B = symbol_B != digits_BxL[:, j - 1]
            new.append(jnp.minimum(jnp.minimum(row[j], new[-1]) + 1, row[j - 1] + wrong_B))
        return jnp.where(counts_B, jnp.stack(new), row), None

    start_LxB = jnp.broadcast_to(jnp.arange(digits_BxL.shape[1] + 1)[:, None], (digits_BxL.shape[1] + 1, len(length_B)))
    counts_BxT = (best_BxT != BLANK) & (best_BxT != before_BxT)
    distance_LxB, _ = jax.lax.scan(heard, start_LxB, (best_BxT.T, counts_BxT.T))
    return jnp.take_along_axis(distance_LxB, length_B[None], 0)[0]


def held_out_strings(recordings: _data.Recordings, config: Config) -> dict[str, np.ndarray]:
    """Every recording once, in strings of 1 to 6 (but for one that does not fit): the same ones whatever the seed."""
    random = np.random.default_rng(0)
    left, chosen = list(random.permutation(len(recordings.digit))), []
    while left:
        count = random.integers(1, 7)
        chosen.append(left[:count])
        del left[:count]
    return _data.strings(recordings, chosen, random, config.seconds)


def make_job(config: Config, policy: mpjax.PolicyMap) -> mpjax.Job:
    """The model, its loss, its optimizer and its data under one policy."""
    data = _data.spoken_digits(config.held_out)
    model = mpjax.wrap(Recogniser(config.width, config.depth, config.heads, config.dropout), policy)
    by_speaker = [np.flatnonzero(data.train.speaker == s) for s in np.unique(data.train.speaker)]

    def batches(attempt: int):
        random = np.random.default_rng((config.seed, attempt))
        speakers = random.integers(len(by_speaker), size=config.batch_size)
        chosen = [random.choice(by_speaker[s], random.integers(1, 7)) for s in speakers]
        return _data.strings(data.train, chosen, random, config.seconds, config.stretch, config.masked)

    def forward(params, mstate, batch, rng=None):
        train = rng is not None
        logits_BxTxV, mstate = model.apply(params, mstate, batch["mel"], batch["frames"], rng=rng, train=train)
        return logits_BxTxV, padding(batch["frames"], logits_BxTxV.shape[1]), mstate

    def ctc(logits_BxTxV, padding_BxT, batch):
        # Its recursion is float32 whatever the logits are. It adds up log probabilities over all frames, at the start
        # about −240, where bfloat16 tells whole numbers apart and no more; its stand-in for log 0, −1e5, float16 lacks.
        behind_BxL = after(batch["length"], batch["digits"].shape[1])
        return mpjax.losses.ctc(logits_BxTxV, padding_BxT, batch["digits"], behind_BxL, blank_id=BLANK)

    def loss_fn(params, mstate, batch, rng):
        logits_BxTxV, padding_BxT, mstate = forward(params, mstate, batch, rng)
        return ctc(logits_BxTxV, padding_BxT, batch).mean(), mpjax.Aux(mstate, {})

    def eval_fn(params, mstate, batch):
        logits_BxTxV, padding_BxT, _ = forward(params, mstate, batch)
        errors_B = digit_errors(logits_BxTxV, padding_BxT, batch["digits"], batch["length"])
        # A rate over all digits is no mean over strings: sum and weight travel apart until the end.
        return {
            "loss": ctc(logits_BxTxV, padding_BxT, batch).mean(),
            "digit_error_rate": (errors_B.sum(), batch["length"].sum()),
        }

    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.steps // 10, config.steps)
    optimizer = optax.inject_hyperparams(optax.adamw)(schedule, weight_decay=config.weight_decay)
    test = held_out_strings(data.test, config)
    parts = max(1, len(test["length"]) // 64)
    return mpjax.Job(
        model=model,
        loss_fn=loss_fn,
        optimizer=optimizer,
        batches=batches,
        sample=(jnp.asarray(test["mel"][:1]), jnp.asarray(test["frames"][:1])),
        eval_fn=eval_fn,
        eval_batches=[{k: v[i::parts] for k, v in test.items()} for i in range(parts)],
    )


def step_options(config: Config) -> dict:
    """How the train step is made: what `main` trains with, and `mpjax parity`."""
    return {"clip_norm": config.clip_norm}


def main(config: Config) -> list[dict]:
    """Train under each policy and compare; returns the rows of the table."""
    policies = _run.policy_maps(config.policies, config.rules, by_path=BY_PATH)
    _data.spoken_digits(config.held_out)  # where it is missing, nothing is begun
    folder = _run.open_folder(config, "speech_ctc")
    plan = _run.Plan(
        attempts=config.steps, eval_every=config.eval_every, seeds=mpjax.seeds(config.seed), best="-digit_error_rate",
        step_options=step_options(config), progress=config.progress, devices=config.devices, probe_every=config.probe_every,
        checkpoint_every=config.checkpoint_every,
    )  # fmt: skip
    return _run.compare(policies, lambda policy: make_job(config, policy), folder, plan)


if __name__ == "__main__":
    sys.exit(_run.start(Config, main, __doc__))
