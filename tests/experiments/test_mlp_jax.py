"""mpjax without Flax, shrunk: it learns in each policy, and the policy that is used by hand does what `wrap` would."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np

import mpjax
from experiments import _run, mlp_jax


def test_it_learns_the_digits_in_each_policy(tmp_path):
    config = mlp_jax.Config(
        policies=("float32", "mixed_float16"), steps=60, eval_every=30, width=16, learning_rate=2e-2,
        workdir=str(tmp_path), progress=False,
    )  # fmt: skip
    rows = mlp_jax.main(config)
    assert [row["policy"] for row in rows] == ["float32", "mixed_float16"]
    assert all(row["test accuracy"] > 0.7 and row["skipped"] == 0 for row in rows)  # chance is 0.1
    assert [row["final scale"] for row in rows] == [1, 2.0**15]  # Model(policy=...) alone brings the loss scale
    assert [row["matrix FLOPs"] for row in rows] == [{"float32": 1.0}, {"float16": 1.0}]
    # Losses begin near ln 10 and round by an eps or two each step: 40 of them are far above, and far below learning.
    assert rows[0]["largest deviation of loss"] == 0
    assert 0 < rows[1]["largest deviation of loss"] <= 40 * float(jnp.finfo("float16").eps)
    folder = tmp_path
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_dtypes_at_each_seam():
    job = mlp_jax.make_job(mlp_jax.Config(width=16), mpjax.get_policy("p=f32,c=f16,o=bf16"))
    state = jax.jit(job.state)(jax.random.key(0))
    image = jnp.asarray(job.batches(0)["image"])
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype("float32")}
    assert job.model.apply(state.params, {}, image)[0].dtype == jnp.bfloat16
    cast = job.model.cast_params(state.params)
    assert {x.dtype for x in jax.tree.leaves(cast)} == {np.dtype("float16")}
    assert (job.model.apply(cast, {}, image)[0] == job.model.apply(state.params, {}, image)[0]).all()
    grads = jax.eval_shape(jax.grad(lambda p: job.model.apply(p, {}, image)[0].sum()), state.params)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {np.dtype("float32")}


def test_a_run_may_be_probed(tmp_path):
    config = mlp_jax.Config(steps=5, width=8)
    job = mlp_jax.make_job(config, mpjax.PolicyMap.of("mixed_float16"))
    _run.train("half", job, tmp_path, _run.Plan(5, 5, mpjax.seeds(0), progress=False, probe_every=4))
    probes = [json.loads(line) for line in (tmp_path / "probe.jsonl").read_text().splitlines()]
    assert [probe["attempt"] for probe in probes] == [0, 4]
    assert {"layer/0", "layer/2", "layer/0/kernel"} <= {reading["path"] for reading in probes[1]["readings"]}
