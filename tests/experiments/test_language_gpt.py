"""The GPT, shrunk, on a text made here, so that it runs without the real one: it learns, is causal, and runs in half."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from experiments import _data, _run, language_gpt
from mpjax.measure.audit import audit

SMALL = {"width": 16, "depth": 1, "heads": 2, "context": 16, "batch_size": 8, "eval_windows": 16}
TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 60, np.uint8)


@pytest.fixture(scope="module", autouse=True)
def plays():
    """A text of 45 bytes again and again in place of Shakespeare's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_data, "shakespeare", lambda: _data.Split({"text": TEXT[:-300]}, {"text": TEXT[-300:]}))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The row of a short run that uses all that a run can, and its folder."""
    workdir = tmp_path_factory.mktemp("runs")
    config = language_gpt.Config(
        policies=("mixed_float16",), steps=200, eval_every=100, learning_rate=2e-2, accumulate=2, remat="nothing",
        workdir=str(workdir), progress=False, **SMALL,
    )  # fmt: skip
    (row,) = language_gpt.main(config)
    return row, workdir


def test_it_learns(run):
    row, folder = run
    # The text has 28 different bytes, about 4.3 bits each; what it read before tells most of them.
    assert 0 < row["test bits per byte"] < 2.5
    assert (row["policy"], row["skipped"], row["final scale"]) == ("mixed_float16", 0, 2.0**15)
    lines = [json.loads(line) for line in (folder / "mixed_float16" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["step"]["loss"] for line in lines if "step" in line]
    assert losses[0] == pytest.approx(np.log(256), rel=0.05) and losses[-1] < losses[0] / 2  # it began uniform
    evaluations = [line["eval"] for line in lines if "eval" in line]
    assert len(evaluations) == 2 and evaluations[-1]["bits_per_byte"] == row["test bits per byte"]
    assert evaluations[-1]["bits_per_byte"] == pytest.approx(evaluations[-1]["loss"] / np.log(2), rel=1e-6)
    assert row["matrix FLOPs"] == {"float16": 1.0}
    assert (folder / "table.md").read_text().startswith("| policy | test bits per byte | final loss |")  # no %, no MiB
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"


def make(policy="float32", **settings):
    return language_gpt.make_job(language_gpt.Config(**{**SMALL, **settings}), mpjax.PolicyMap.of(policy))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_all_products_of_the_real_size_are_in_half(policy):
    job = language_gpt.make_job(language_gpt.Config(remat="nothing"), mpjax.PolicyMap.of(policy))
    state = jax.eval_shape(job.state, jax.random.key(0))
    found = audit(job.step(clip_norm=1.0, accumulate=2).pure, state, job.batches(0))
    assert found.share(policy.removeprefix("mixed_")) >= 0.95


@pytest.mark.parametrize(
    "policy, mlp, attention, head",
    [("mixed_fp8", "float8", "float8", "bfloat16"), ("by_path", "float8", "bfloat16", "float32")],
)
def test_float8_multiplies_in_the_scanned_blocks(policy, mlp, attention, head):
    named = _run.policy_maps((policy,), by_path=language_gpt.BY_PATH)[policy]
    job = language_gpt.make_job(language_gpt.Config(remat="nothing"), named)
    state = jax.eval_shape(job.state, jax.random.key(0))
    found: dict[str, set[str]] = {}
    for op in audit(job.step().pure, state, job.batches(0)).ops:
        if op.flops:
            found.setdefault(op.path, set()).update(x.partition("_")[0] for x in op.operands)
    expected = {"layers/up": mlp, "layers/down": mlp, "layers/attention/query": attention, "embed": head}
    assert {path: found[path] for path in expected} == {path: {dtype} for path, dtype in expected.items()}


def test_no_byte_sees_a_later_one():
    job = make()
    params, mstate = jax.jit(job.model.init)(jax.random.key(0), *job.sample)
    before = jnp.asarray(job.batches(0)["byte"])
    after = before.at[:, 9].set(0)
    logits = jax.jit(lambda byte_BxT: job.model.apply(params, mstate, byte_BxT)[0])
    changed = (logits(before) != logits(after)).any((0, 2))
    assert not changed[:9].any() and changed[9:].all()


def test_a_batch_is_a_function_of_seed_and_attempt():
    batches = make().batches
    again, other = make().batches, make(seed=1).batches
    assert (batches(5)["byte"] == again(5)["byte"]).all()
    assert (batches(5)["byte"] != batches(6)["byte"]).any() and (batches(5)["byte"] != other(5)["byte"]).any()
    assert (batches(5)["byte"][:, 1:] == batches(5)["next"][:, :-1]).all() and batches(5)["byte"].shape == (8, 16)
    train = bytes(TEXT[:-300])
    assert all(bytes(row.astype(np.uint8)) in train for row in batches(5)["next"])


def test_held_out_windows_are_spread_over_all_of_the_held_out_text():
    parts = make(eval_windows=20).eval_batches
    rows = np.concatenate([part["byte"] for part in parts])
    ends = np.concatenate([part["next"] for part in parts])[:, -1]
    assert len(rows) == 20 and len({len(part["byte"]) for part in parts}) <= 2
    assert (rows[0] == TEXT[-300:-284]).all() and ends[-1] == TEXT[-1]


def test_the_layers_are_one_stack_and_the_head_is_tied_or_not():
    tied, untied = (jax.eval_shape(make(depth=3, tied=t).state, jax.random.key(0)).params for t in (True, False))
    assert tied["layers"]["up"]["kernel"].shape == (3, 16, 64)
    assert "head" not in tied and untied["head"]["kernel"].shape == (16, 256)
