"""The NNX ResNet, shrunk: it learns in each policy, its statistics stay float32, and devices share its batches."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mpjax
from experiments import _run, vision_resnet_nnx
from experiments.vision_resnet_nnx import Config
from mpjax.measure.audit import audit


def test_it_learns_the_digits_in_each_policy(tmp_path):
    """By the running statistics, which a test accuracy under train=False reads."""
    config = Config(
        policies=("float32", "mixed_bfloat16"),
        steps=40,
        eval_every=40,
        width=8,
        stages=1,
        workdir=str(tmp_path),
        progress=False,
    )
    rows = vision_resnet_nnx.main(config)
    assert [row["policy"] for row in rows] == ["float32", "mixed_bfloat16"]
    assert all(row["test accuracy"] > 0.5 and row["skipped"] == 0 for row in rows)  # chance is 0.1
    assert [row["matrix FLOPs"] for row in rows] == [{"float32": 1.0}, {"bfloat16": 1.0}]
    assert rows[1]["largest deviation of loss"] > 0


def test_the_dtypes_at_each_seam():
    job = vision_resnet_nnx.make_job(Config(width=8, stages=1), mpjax.PolicyMap(default="mixed_float16"))
    state = job.state(jax.random.key(0))
    assert isinstance(state.loss_scale, mpjax.DynamicLossScale)
    after, _ = jax.eval_shape(job.step().pure, state, job.batches(0))
    for tree in (state, after):
        assert {str(x.dtype) for x in jax.tree.leaves((tree.params, tree.mstate["batch_stats"]))} == {"float32"}
    found = audit(job.step().pure, state, job.batches(0))
    assert found.select("conv").share("float16") == 1.0 and found.select("rsqrt").ops
    assert {dtype for op in found.select("rsqrt").ops for dtype in op.operands} == {"float32"}


def test_mirrored_pictures_are_the_same_or_mirrored():
    image = np.random.default_rng(0).normal(size=(32, 3, 4, 1)).astype(np.float32)
    found = np.asarray(vision_resnet_nnx.mirrored(image, jax.random.key(0)))
    kept, turned = ((found == x).all((1, 2, 3)) for x in (image, image[:, :, ::-1]))
    assert (kept ^ turned).all() and 4 < kept.sum() < 28


def test_devices_share_the_batch_and_reach_the_same_loss(tmp_path):
    """Four devices against one: float32 sums in another order, a few ulp of a loss near ln 10 after each step."""
    losses = {}
    for devices in (1, 4):
        config = Config(
            policies=("float32",), steps=4, eval_every=4, width=8, stages=1, devices=devices,
            workdir=str(tmp_path / str(devices)), progress=False,
        )  # fmt: skip
        (row,) = vision_resnet_nnx.main(config)
        losses[devices] = row["final loss"]
    np.testing.assert_allclose(losses[4], losses[1], rtol=1e-5)
    job = _run.on_mesh(vision_resnet_nnx.make_job(Config(), mpjax.PolicyMap(default="float32")), _run.data_parallel(4))
    rows = job.batches(0)["image"].addressable_shards
    assert len(rows) == 4 and all(x.data.shape[0] == 32 for x in rows)
    with pytest.raises(_run.Refused, match=r"got --devices=9; here are 8; 0 takes all"):
        _run.data_parallel(9)


def test_fashion_mnist_goes_through(tmp_path, monkeypatch):
    """Pictures of another size, and held-out data in parts, on files of the real layout."""
    from experiments._data import Split

    rng = np.random.default_rng(0)

    def some(n):
        return {
            "image": rng.normal(size=(n, 28, 28, 1)).astype(np.float32),
            "label": np.arange(n, dtype=np.int32) % 10,
        }

    monkeypatch.setattr("experiments._data.fashion_mnist", lambda: Split(some(64), some(2000)))
    job = vision_resnet_nnx.make_job(
        Config(data="fashion_mnist", width=4, stages=1, batch_size=8), mpjax.PolicyMap(default="float32")
    )
    assert [len(batch["label"]) for batch in job.eval_batches] == [1000, 1000]
    shapes = jax.eval_shape(job.step().pure, jax.eval_shape(job.state, jax.random.key(0)), job.batches(0))
    assert shapes[1]["accuracy"].shape == ()


def test_float8_leaves_convolutions_and_the_map_widens_the_ends():
    """Stem and head are about a hundredth of the products at the default size."""
    found = {}
    for name in ("mixed_fp8", "by_path"):
        policy = _run.policy_maps((name,), by_path=vision_resnet_nnx.BY_PATH)[name]
        job = vision_resnet_nnx.make_job(Config(), policy)
        found[name] = audit(job.step().pure, jax.eval_shape(job.state, jax.random.key(0)), job.batches(0))
    assert set(found["mixed_fp8"].flops_by_dtype()) == {"bfloat16"}
    wide = {op.path for op in found["by_path"].ops if op.flops and op.operands[0] == "float32"}
    assert wide == {"stem", "head"} and 0 < found["by_path"].share("float32") < 0.02
    assert found["by_path"].share("float32", "bfloat16") == 1
