"""The U-Net, shrunk, on scenes of made-up items: it learns, its metric is right, and products run as the policy says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from experiments import _data, _run, vision_segment
from mpjax.measure.audit import audit

SMALL = {"size": 16, "shrink": 4, "width": 16, "levels": 2, "batch_size": 4, "eval_scenes": 8}


def items(n: int) -> dict[str, np.ndarray]:
    """Squares of 20 pixels in pictures of 28, as bright as their class: three classes, of ten that there may be."""
    label = np.arange(n, dtype=np.int32) % 3
    image = np.full((n, 28, 28, 1), -1, np.float32)
    image[:, 4:24, 4:24] = (label / 2).astype(np.float32)[:, None, None, None]
    return {"image": image, "label": label}


@pytest.fixture(autouse=True)
def clothes(monkeypatch):
    """Made-up items in place of Fashion-MNIST's."""
    monkeypatch.setattr(_data, "fashion_mnist", lambda limit=None: _data.Split(items(30), items(6)))


def make(policy="float32", **settings):
    named = _run.policy_maps((policy,), by_path=vision_segment.BY_PATH)[policy]
    return vision_segment.make_job(vision_segment.Config(**{**SMALL, **settings}), named)


def test_it_learns_to_segment(tmp_path):
    """A map of nothing but background has a mean IoU of at most a quarter: 1 for one class of the four that there are."""
    config = vision_segment.Config(
        policies=("mixed_bfloat16",), steps=120, eval_every=120, learning_rate=1e-2, workdir=str(tmp_path), progress=False,
        checkpoint_every=0, **SMALL | {"width": 8},
    )  # fmt: skip
    (row,) = vision_segment.main(config)
    assert row["test mean iou"] > 0.4 and row["skipped"] == 0
    assert row["matrix FLOPs"] == {"bfloat16": 1.0}


def test_the_metric_by_hand():
    """Two scenes of two pixels, three classes; the third is neither there nor named, and left out."""
    label = jnp.array([[[0, 0]], [[1, 1]]])
    said = jnp.array([[[0, 1]], [[1, 1]]])
    pixels = vision_segment.confusion(jax.nn.one_hot(said, 3), label)
    assert pixels.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]] and pixels.dtype == jnp.int32
    # Background: 1 of 2 pixels. Class 1: 2 of 3. A mean over the two scenes would be ((1/2 + 0)/2 + 1)/2 = 5/8.
    assert float(vision_segment.mean_iou(pixels)) == pytest.approx((1 / 2 + 2 / 3) / 2, rel=1e-6)


def test_the_metric_is_over_all_held_out_scenes():
    """As evaluated, against a loop over classes in numpy; 36 scenes go in two parts."""
    job = make(eval_scenes=36, width=8)
    (batch,) = job.eval_batches
    assert batch["image"].shape == (2, 18, 16, 16, 1) and batch["label"].shape == (2, 18, 16, 16)
    state = job.state(jax.random.key(3))
    found = mpjax.evaluate(mpjax.make_eval_step(job.eval_fn), state, job.eval_batches, job.model.cast_params)
    logits = np.asarray(jax.jit(job.model.apply)(state.params, state.mstate, batch["image"].reshape(-1, 16, 16, 1))[0])
    label, said = batch["label"].reshape(-1, 16, 16), logits.argmax(-1)
    ious = []
    for c in range(vision_segment.CLASSES):
        either = ((label == c) | (said == c)).sum()
        if either:
            ious.append(((label == c) & (said == c)).sum() / either)
    assert found["mean_iou"] == pytest.approx(np.mean(ious), rel=1e-6) and len(ious) > 3
    assert found["accuracy"] == pytest.approx((label == said).mean(), rel=1e-6)
    wide = logits.astype(np.float64)
    loss = np.log(np.exp(wide).sum(-1)) - np.take_along_axis(wide, label[..., None], -1)[..., 0]
    assert found["loss"] == pytest.approx(loss.mean(), rel=1e-5)


PRODUCTS = {
    "mixed_float16": {("conv", "float16"), ("dot", "float16")},
    "mixed_fp8": {("conv", "bfloat16"), ("dot", "bfloat16"), ("dot", "float8")},
    "by_path": {("conv", "float32"), ("conv", "bfloat16"), ("dot", "float32"), ("dot", "float8")},
}


@pytest.mark.parametrize("policy", PRODUCTS)
def test_products_run_as_the_policy_says(policy):
    job = make(policy)
    state = jax.eval_shape(job.state, jax.random.key(0))
    found = audit(job.step().pure, state, job.batches(0))
    products = {(op.kind, dtype.partition("_")[0]) for op in found.ops if op.flops for dtype in op.operands}
    assert products == PRODUCTS[policy]
    assert {dtype for op in found.select("rsqrt", "*norm*").ops for dtype in op.operands} == {"float32"}
    eight = {op.path for op in found.ops if op.flops and op.operands[0].startswith("float8")}
    assert eight == (set() if policy == "mixed_float16" else {"ups/0/narrow"})
    wide = {op.path for op in found.ops if op.flops and op.operands[0] == "float32"}
    assert wide == ({"downs/0/conv1", "head"} if policy == "by_path" else set())


def test_a_smaller_item_is_the_means_of_squares():
    image = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    small = vision_segment.shrunk({"image": image, "label": np.array([1])}, 2)
    assert small["image"][0, ..., 0].tolist() == [[2.5, 4.5], [10.5, 12.5]] and small["label"].tolist() == [1]


def test_a_batch_is_a_function_of_seed_and_attempt_and_held_out_scenes_of_neither():
    job, again, other = make(), make(), make(seed=1)
    assert (job.batches(5)["image"] == again.batches(5)["image"]).all()
    assert (job.batches(5)["image"] != job.batches(6)["image"]).any()
    assert (job.batches(5)["image"] != other.batches(5)["image"]).any()
    assert (job.eval_batches[0]["image"] == other.eval_batches[0]["image"]).all()


def test_the_full_size_is_made_of_fields():
    config = vision_segment.Config(**vision_segment.PRESETS["h100"])
    assert config.size % 2 ** (config.levels - 1) == 0 and config.width % 16 == 0 and 28 % config.shrink == 0
    assert vision_segment.PRESETS["cpu"] == {}
