"""The ViT, shrunk, on made-up pictures: it learns, sees moved and mirrored pictures, and multiplies as the policy says."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import mpjax
from experiments import _data, _run, vision_vit
from mpjax.measure.audit import audit

SMALL = {"width": 16, "depth": 1, "heads": 2, "batch_size": 32}


def pictures(n: int, seed: int) -> dict[str, np.ndarray]:
    """Ten classes: a bright stripe of two rows at a height of the class's own, on noise."""
    random = np.random.default_rng(seed)
    label = np.arange(n, dtype=np.int32) % 10
    image = random.normal(-0.5, 0.2, (n, 28, 28, 1)).astype(np.float32)
    rows = 4 + 2 * label[:, None] + np.arange(2)
    image[np.arange(n)[:, None], rows] = 1
    return {"image": image, "label": label}


@pytest.fixture(autouse=True)
def clothes(monkeypatch):
    """Made-up pictures in place of Fashion-MNIST's."""
    monkeypatch.setattr(_data, "fashion_mnist", lambda limit=None: _data.Split(pictures(640, 0), pictures(100, 1)))


def make(policy="float32", **settings):
    named = _run.policy_maps((policy,), by_path=vision_vit.BY_PATH)[policy]
    return vision_vit.make_job(vision_vit.Config(**{**SMALL, **settings}), named)


def test_it_learns_by_its_own_map(tmp_path):
    """Float8, float16, bfloat16 and float32 in one model, dropout and mirroring on; chance is 0.1, and a linear layer over
    the rows of a picture could tell each class."""
    config = vision_vit.Config(
        policies=("by_path",), steps=60, eval_every=60, learning_rate=1e-2, dropout=0.1, flip=True, checkpoint_every=0,
        workdir=str(tmp_path), progress=False, **SMALL,
    )  # fmt: skip
    (row,) = vision_vit.main(config)
    assert row["policy"] == "by_path" and row["test accuracy"] > 0.5
    assert row["skipped"] == 0 and row["final scale"] == 2.0**15  # for attention in float16


PRODUCTS = {
    "mixed_float16": dict.fromkeys(("up", "down", "query", "attention", "head", "patches"), "float16"),
    "mixed_fp8": {
        "up": "float8", "down": "float8", "query": "float8", "attention": "bfloat16", "head": "bfloat16", "patches": "bfloat16",
    },
    "by_path": {
        "up": "float8", "down": "float8", "query": "float16", "attention": "float16", "head": "float32", "patches": "bfloat16",
    },
}  # fmt: skip


@pytest.mark.parametrize("policy", PRODUCTS)
def test_products_run_as_the_policy_says(policy):
    job = make(policy, dropout=0.1)
    state = jax.eval_shape(job.state, jax.random.key(0))
    found = audit(job.step().pure, state, job.batches(0))
    seen: dict[str, set[str]] = {}
    for op in found.ops:
        if op.flops:
            seen.setdefault(op.path.rpartition("/")[2], set()).update(x.partition("_")[0] for x in op.operands)
    expected = PRODUCTS[policy]
    assert {name: seen[name] for name in expected} == {name: {dtype} for name, dtype in expected.items()}
    assert {dtype for op in found.select("rsqrt", "*norm*").ops for dtype in op.operands} == {"float32"}


def test_a_moved_picture_is_its_own_window_on_a_dark_border():
    image = np.random.default_rng(0).uniform(0, 1, (64, 5, 6, 1)).astype(np.float32)
    found = np.asarray(vision_vit.augmented(image, jax.random.key(0), shift=1, flip=False))
    wide = np.full((64, 7, 8, 1), -1, np.float32)
    wide[:, 1:-1, 1:-1] = image
    places = [(y, x) for y in range(3) for x in range(3)]
    which = [
        [(one == big[y : y + 5, x : x + 6]).all() for y, x in places] for one, big in zip(found, wide, strict=True)
    ]
    assert (np.sum(which, 1) == 1).all() and np.any(which, 0).all()  # each picture at one place, each place at times


def test_a_mirrored_picture_is_the_same_or_mirrored():
    image = np.random.default_rng(0).normal(size=(64, 3, 4, 1)).astype(np.float32)
    found = np.asarray(vision_vit.augmented(image, jax.random.key(0), shift=0, flip=True))
    kept, turned = ((found == x).all((1, 2, 3)) for x in (image, image[:, :, ::-1]))
    assert (kept ^ turned).all() and 16 < kept.sum() < 48
    same = np.asarray(vision_vit.augmented(image, jax.random.key(0), shift=0, flip=False))
    assert (same == image).all()


def test_the_metric_by_hand_and_nothing_random_in_it():
    job = make(dropout=0.5, shift=2, flip=True)
    state = job.state(jax.random.key(0))
    eval_step = mpjax.make_eval_step(job.eval_fn)
    one, two = (mpjax.evaluate(eval_step, state, job.eval_batches) for _ in range(2))
    assert one == two and [len(batch["label"]) for batch in job.eval_batches] == [100]
    params = jax.tree.map(lambda x: x * 0, state.params)
    params["head"]["bias"] = params["head"]["bias"].at[3].set(1.0)  # it says class 3 of everything
    found = mpjax.evaluate(eval_step, dataclasses.replace(state, params=params), job.eval_batches)
    assert found["accuracy"] == pytest.approx(0.1)
    assert found["loss"] == pytest.approx(
        np.log(9 + np.e) - 0.1, rel=1e-6
    )  # log Σ exp, less 1 for a tenth of the pictures


def test_the_full_size_fits_the_pictures_and_float8():
    config = vision_vit.Config(**vision_vit.PRESETS["h100"])
    assert 28 % config.patch == 0 and config.width % 16 == 0 and config.width % config.heads == 0
    assert vision_vit.PRESETS["cpu"] == {}
