"""`mpjax export`: a checkpoint becomes a file that serves."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mpjax
from mpjax.cli import main
from mpjax.store.export.saved import saved_weights

PROGRAM = """
import jax.numpy as jnp, optax, mpjax

def job(policy="mixed_bfloat16", width="4"):
    n = int(width)

    def init(rng, x):
        return {"layer_0": {"kernel": jnp.zeros((n, 2))}, "head": [jnp.zeros((2, 1)), jnp.zeros(1)]}, {"seen": {"n": jnp.int32(0)}}

    def apply(params, mstate, x, rng=None):
        kernel, bias = params["head"]
        return x @ params["layer_0"]["kernel"] @ kernel + bias[None], mstate

    model = mpjax.Model(init, apply, policy=mpjax.PolicyMap.of(policy))
    return mpjax.Job(model, lambda p, m, x, rng: model.apply(p, m, x)[0].mean(), optax.sgd(0.1), lambda i: jnp.ones((4, n)),
                     sample=(jnp.ones((1, n)),), eval_fn=lambda p, m, x: {"mean": model.apply(p, m, x)[0].mean()},
                     eval_batches=[jnp.ones((2, n))])
"""

KERNEL = np.float32([[127, 2], [0.25, -254], [0, 0], [1, 1]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's directory with steps 5 and 9."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    params = {"layer_0": {"kernel": KERNEL}, "head": [np.float32([[1], [1]]), np.zeros(1, np.float32)]}
    tree = {"params": params, "mstate": {"seen": {"n": np.int32(3)}}, "opt_state": np.ones(100)}
    checkpointer = mpjax.Checkpointer(folder)
    checkpointer.save(tree | {"params": jax.tree.map(np.zeros_like, params)}, step=5, policy="float32")
    checkpointer.save(tree, step=9, policy={"head": "compute=float32"})
    return folder


@pytest.fixture
def run(saved, tmp_path, monkeypatch):
    """A copy of it in the folder one stands in, beside the job that made it."""
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "my_exports.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "run"


def test_the_newest_step_becomes_bfloat16_beside_the_run(run, capsys):
    assert main(["export", "run", "--to", "bfloat16"]) == 0
    shown = capsys.readouterr().out
    assert "params/layer_0/kernel" in shown and "step 9 of run is in run-9.safetensors" in shown
    found = mpjax.load_export(run.parent / "run-9.safetensors")
    assert found.params["layer_0"]["kernel"].dtype == jnp.bfloat16  # under the key that it had, not its canonical path
    np.testing.assert_array_equal(found.params["layer_0"]["kernel"], KERNEL.astype(jnp.bfloat16))
    assert found.mstate["seen"]["n"] == 3 and found.policy["rules"].keys() == {"head"}
    assert not any("opt_state" in name for name in found.formats)


def test_formats_by_rule_metrics_before_and_after_and_a_program(run, capsys):
    code = main(
        ["export", "run/9", "--to", "head=float32", "--to", "**=int8", "--out", "x.st", "--target", "my_exports:job",
         "--forward", "x.forward", "--json"]
    )  # fmt: skip
    assert code == 0
    told = json.loads(capsys.readouterr().out)
    rows = {row["path"]: row for row in told["tensors"]}
    assert rows["params/layer_0/kernel"]["stored"] == "int8" and rows["params/head/0"]["stored"] == "float32"
    assert (told["step"], told["bytes_before"], told["bytes_after"]) == (9, 32 + 8 + 4 + 4, 8 + 8 + 8 + 4 + 4)
    # A quarter is lost (scales 1 and 2); 1 of scale 2 is 0.5, which rounds to 0: one more.
    assert (told["metric_before"], told["metric_after"]) == ({"mean": -122.75}, {"mean": -124.0})
    forward = mpjax.load_forward("x.forward")
    served = mpjax.load_export("x.st", like=forward.like)
    assert forward(served.params, served.mstate, jnp.ones((3, 4))).tolist() == [[-124.0]] * 3


def test_a_step_is_named_and_a_file_is_kept(run, capsys):
    assert main(["export", "run", "--step", "5", "--out", "x.st"]) == 0
    assert np.all(mpjax.load_export("x.st").params["layer_0"]["kernel"] == 0)
    assert main(["export", "run", "--step", "9", "--out", "x.st"]) == 1
    assert "x.st, which exists; legal is a new file" in capsys.readouterr().err
    assert main(["export", "run", "--step", "9", "--out", "x.st", "--overwrite"]) == 0
    assert np.any(mpjax.load_export("x.st").params["layer_0"]["kernel"] != 0)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["none"], 2, "got none, where no folder is; legal is the directory that a Checkpointer wrote"),
        (["run", "--step", "6"], 1, "no step 6"),
        (["run", "--to", "int4"], 1, "got the format 'int4'; legal are float32"),
        (["run", "--to", "int8", "--to", "head=float32"], 2, 'got --to int8 among others; legal is one FORMAT, or GLOB=FORMAT'),
        (["run", "--to", "hed=int8"], 1, "acts on no weight"),
        (["run", "--forward", "f"], 2, "got --forward without --target"),
        (["run", "--target", "my_exports:job", "--set", "width=5"], 1, "params/layer/0/kernel has the shape (4, 2)"),
        (["run", "--out", "no/where.st"], 1, "no/where.st"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_told_in_one_line(run, arguments, code, said, capsys):
    assert main(["export", *arguments]) == code
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told
    assert sorted(path.name for path in run.parent.iterdir() if path.name != "__pycache__") == ["my_exports.py", "run"]


def test_a_damaged_step_is_passed_over_or_refused(run, capsys):
    victim = max((run / "9" / "arrays").rglob("d/*"), key=lambda path: path.stat().st_size)
    victim.write_bytes(bytes(victim.stat().st_size))
    assert main(["export", "run", "--step", "9", "--out", "x.st"]) == 1
    assert "damaged" in capsys.readouterr().err
    with pytest.warns(mpjax.CheckpointWarning, match="using step 5"):
        assert main(["export", "run", "--out", "x.st"]) == 0
    assert np.all(mpjax.load_export("x.st").params["layer_0"]["kernel"] == 0)


def test_the_average_of_a_train_state_is_served_and_rng_keys_too(tmp_path):
    def net(rngs):
        return nnx.Sequential(nnx.Linear(2, 2, use_bias=False, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))

    model = mpjax.wrap(net, {"**": "param=bfloat16"})
    with pytest.warns(mpjax.VanishingUpdateWarning):
        state = mpjax.TrainState.create(model, optax.sgd(0.1), jax.random.key(0), ema_decay=0.5)
    state = dataclasses.replace(state, ema=jax.tree.map(lambda x: jnp.full_like(x, 1 + 2**-12), state.ema))
    checkpointer = mpjax.Checkpointer(tmp_path / "run")
    checkpointer.save(state, step=1, policy=model.policy)
    params, mstate, _ = saved_weights(checkpointer)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    assert all((x == 1).all() for x in jax.tree.leaves(params))
    mpjax.export_weights(params, tmp_path / "x.st", mstate=mstate)
    found = mpjax.load_export(tmp_path / "x.st", like=(state.params, state.mstate))
    model.merge(found.params, found.mstate)
    plain = saved_weights(checkpointer, averaged=False)[0]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), plain, state.params))
    checkpointer.save({"w": np.ones(1)}, step=2)
    with pytest.raises(mpjax.CheckpointError, match=r"step 2 has no params; legal is .* a TrainState; it has w"):
        saved_weights(checkpointer)
