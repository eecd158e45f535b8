"""The main job, shrunk: it runs as a user runs it, and what it reports is read again from what it wrote."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from experiments import _run, vision_digits
from mpjax.measure.audit import audit

SMALL = {"width": 32, "depth": 1, "heads": 2}
HALVES = {"mixed_bfloat16": ("bfloat16",), "mixed_float16": ("float16",), "by_path": ("bfloat16", "float16")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The rows of a short run of two policies, and its folder."""
    workdir = tmp_path_factory.mktemp("runs")
    config = vision_digits.Config(
        policies=("float32", "by_path"),
        steps=60,
        eval_every=30,
        learning_rate=8e-3,
        workdir=str(workdir),
        progress=False,
        **SMALL,
    )
    rows = vision_digits.main(config)
    return rows, workdir


def test_it_learns_the_digits_in_each_policy(run):
    rows, _ = run
    assert [row["policy"] for row in rows] == ["float32", "by_path"]
    assert all(row["test accuracy"] > 0.3 and row["skipped"] == 0 for row in rows)  # chance is 0.1
    assert rows[0]["largest deviation of loss"] == 0 < rows[1]["largest deviation of loss"] < 0.5
    assert rows[0]["final scale"] == 1 and rows[1]["final scale"] == 2.0**15


def test_the_run_folder_holds_what_it_should(run):
    rows, folder = run
    assert json.loads((folder / "config.json").read_text())["config"]["steps"] == 60
    assert json.loads((folder / "table.json").read_text()) == rows
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    for row in rows:
        lines = [json.loads(line) for line in (folder / row["policy"] / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if "step" in line]
        assert len(steps) == 60 and steps[-1]["loss"] == row["final loss"]
        assert [line["attempt"] for line in lines if "eval" in line] == [30, 60]
        assert list((folder / row["policy"]).glob("events.out.tfevents.*"))


@pytest.mark.parametrize("name", HALVES)
def test_at_least_95_percent_of_matrix_flops_are_in_half(name):
    """Of the whole train step at its real size, backward pass and optimizer included."""
    assert share(name, policy_map(name)) >= 0.95


def test_the_share_is_zero_with_the_wrap_taken_out(monkeypatch):
    monkeypatch.setattr(mpjax, "wrap", lambda module, policy: bare(module))
    assert share("mixed_bfloat16", policy_map("mixed_bfloat16")) == 0


def share(name, policy):
    job = vision_digits.make_job(vision_digits.Config(), policy)
    state = jax.eval_shape(job.state, jax.random.key(0))
    batch = job.batches(0)
    return audit(job.step(clip_norm=1.0).pure, state, batch).share(*HALVES[name])


def policy_map(name):
    return _run.policy_maps((name,), by_path=vision_digits.BY_PATH)[name]


def bare(module):
    """The module as a Model, without any policy."""

    def init(rng, *args):
        return module.init(rng, *args)["params"], {}

    return mpjax.Model(init, lambda p, m, x, rng=None, train=None: (module.apply({"params": p}, x), m))


def test_data_order_and_init_follow_from_the_seed():
    jobs = [vision_digits.make_job(vision_digits.Config(seed=s, **SMALL), mpjax.PolicyMap()) for s in (0, 0, 1)]
    batches = [np.asarray(job.batches(17)["image"]) for job in jobs]
    assert (batches[0] == batches[1]).all() and (batches[0] != batches[2]).any()
    assert jnp.asarray(jobs[0].eval_batches[0]["image"]).shape == (359, 8, 8, 1)
