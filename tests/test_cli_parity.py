"""`mpjax parity`: its exit codes, what it prints, and that it trains what an experiment's own `main` trains."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import mpjax
from experiments import _data, _run, language_gpt, mlp_jax, vision_digits, vision_resnet_nnx
from mpjax.cli import main
from mpjax.cli.target import Refused, training
from mpjax.measure.paired import Pair, Run

PROGRAM = """
import jax.numpy as jnp, numpy as np, optax, mpjax

def job(policy, seed, fault="none"):
    bad = policy != "float32" and fault != "none"

    def apply(params, mstate, x, rng=None):
        return x @ params["w"], mstate

    def loss(params, mstate, x, rng=None):
        if fault == "mistake":
            raise ValueError("a mistake in the loss")
        return jnp.square(apply(params, mstate, x)[0] - 1).mean() * (jnp.nan if bad and fault == "nan" else 1.0)

    model = mpjax.Model(lambda rng, x: ({"w": jnp.full(2, 0.25)}, {}), apply, policy=mpjax.PolicyMap.of(policy))
    error = lambda params, mstate, x: {"loss": loss(params, mstate, x), "error": jnp.float32(3.0 if bad else 1.0)}
    return mpjax.Job(model, loss, optax.sgd(0.1), lambda n: np.full((4, 2), 0.5 + seed, np.float32),
                     (np.ones((1, 2), np.float32),), error, [np.ones((2, 2), np.float32)])
"""


@pytest.fixture
def target(tmp_path, monkeypatch):
    (tmp_path / "paired_program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return "paired_program:job"


def test_equivalent_exits_with_0_and_draws(target, tmp_path, capsys):
    argv = ["parity", target, "--policy", "bf16", "--margin", "0.1", "--seeds", "2", "--steps", "2"]
    assert main([*argv, "--plot", str(tmp_path / "folder" / "a.png"), "--metric=-error"]) == 0
    shown = capsys.readouterr().out
    assert (
        shown.startswith("bf16 (candidate) against float32 (reference): error after 2 attempts\n")
        and "equivalent: error differs by less" in shown
    )
    assert [line.split()[0] for line in shown.splitlines()[1:4]] == ["seed", "0", "1"]
    assert (tmp_path / "folder" / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_different_exits_with_1_and_json_holds_it_all(target, capsys):
    argv = ["parity", target, "--policy", "bf16", "--margin", "0.1", "--seeds", "2", "--steps", "2", "--json"]
    assert main([*argv, "--set", "fault=error", "--metric=-error"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["verdict"], told["mean"], told["sd"], told["margin"], told["alpha"]) == ("worse", 2, 0, 0.1, 0.05)
    assert [pair["difference"] for pair in told["pairs"]] == [2, 2] and len(
        told["pairs"][1]["candidate"]["losses"]
    ) == 2
    assert (told["reference"], told["candidate"], told["metric"]) == ("float32", "bf16", "-error")


def test_undecided_exits_with_1_and_says_how_many_would_do(target, capsys):
    assert main(["parity", target, "--policy", "bf16", "--margin", "0.1", "--seeds", "1", "--steps", "1"]) == 1
    assert "undecided: one seed tells no spread; at least 2 seeds are needed" in capsys.readouterr().out


def test_a_picture_that_cannot_be_written_exits_with_1_and_the_verdict_is_told(target, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    argv = ["parity", target, "--policy", "bf16", "--margin", "0.1", "--seeds", "1", "--steps", "1"]
    assert main([*argv, "--plot", str(tmp_path / "file" / "a.png")]) == 1
    told = capsys.readouterr()
    assert "undecided: one seed" in told.out and "mpjax parity: got --plot" in told.err


def test_a_candidate_that_diverges_exits_with_1(target, capsys):
    argv = ["parity", target, "--policy", "bf16", "--margin", "0.1", "--seeds", "1", "--steps", "51"]
    assert main([*argv, "--set", "fault=nan"]) == 1
    assert "different: worse, bf16 diverged at seed 0" in capsys.readouterr().out


def test_a_reference_that_diverges_exits_with_1_and_says_so(target, capsys):
    argv = ["parity", target, "--policy", "float32", "--reference", "bf16", "--margin", "0.1", "--steps", "51"]
    assert main([*argv, "--set", "fault=nan"]) == 1
    assert "mpjax parity: the reference diverged at seed 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--policy", "bf16", "--margin", "0.1"], "give --steps"),
        (["--policy", "bf17", "--margin", "0.1", "--steps", "1"], "Unknown dtype 'bf17'"),
        (["--policy", "bf16", "--margin", "0", "--steps", "1"], "margin=0.0; legal"),
        (["--policy", "bf16", "--margin", "1", "--steps", "0"], "attempts=0; legal"),
        (["--policy", "bf16", "--margin", "1", "--steps", "1", "--seeds", "0"], "--seeds 0; legal is at least 1"),
        (["--policy", "bf16", "--margin", "1", "--steps", "1", "--metric", "recall"], "legal are error, loss"),
        (["--policy", "bf16", "--margin", "1", "--steps", "1", "--set", "depth=1"], "does not take depth"),
    ],
)
def test_what_is_not_understood_exits_with_2(target, argv, said, capsys):
    assert main(["parity", target, *argv]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and said in shown.err and shown.err.startswith("mpjax parity: ")


def test_a_mistake_in_the_job_keeps_its_traceback(target):
    argv = ["parity", target, "--policy", "bf16", "--margin", "0.1", "--steps", "1", "--set", "fault=mistake"]
    with pytest.raises(ValueError, match="a mistake in the loss"):
        main(argv)


@pytest.mark.parametrize("missing", [["--policy", "bf16"], ["--margin", "1"]])
def test_policy_and_margin_are_asked_for(target, missing):
    with pytest.raises(SystemExit) as stopped:
        main(["parity", target, "--steps", "1", *missing])
    assert stopped.value.code == 2


def test_an_experiment_is_trained_for_the_steps_of_its_schedule(monkeypatch, capsys):
    seen, inner = [], mlp_jax.make_job

    def make_job(config, policy):
        seen.append((config.seed, config.steps, config.width, str(policy.default)))
        return inner(config, policy)

    def train_pair(reference, candidate, seed, **settings):
        seen.append({name: value for name, value in settings.items() if name != "compiled"})
        return Pair(seed, Run(0.5, (1.0,)), Run(0.75, (1.0,)))

    monkeypatch.setattr(mlp_jax, "make_job", make_job)
    monkeypatch.setattr("mpjax.measure.parity.train_pair", train_pair)
    argv = ["parity", "mlp_jax", "--policy", "mixed_bfloat16", "--margin", "0.1", "--seeds", "2", "--steps", "3"]
    assert main([*argv, "--first-seed", "6", "--set", "width=8", "--json"]) == 1
    trained = {"attempts": 3, "metric": "accuracy", "step_options": {"clip_norm": 1.0}}
    assert seen == [
        (6, 3, 8, "p=full,c=full,o=full"), (6, 3, 8, "p=full,c=bf16,o=full"), trained,
        (7, 3, 8, "p=full,c=full,o=full"), (7, 3, 8, "p=full,c=bf16,o=full"), trained,
    ]  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert (told["attempts"], told["metric"], told["verdict"], told["mean"]) == (3, "accuracy", "better", 0.25)


def test_an_experiment_tells_its_steps_and_its_own_map():
    found = training("vision_digits", [], ["float32", "by_path"])
    assert (found.steps, found.step_options) == (vision_digits.Config().steps, {"clip_norm": 1.0})
    assert found.policies == [mpjax.PolicyMap(default="float32"), mpjax.PolicyMap(vision_digits.BY_PATH)]
    assert training("language_gpt", ["accumulate=2", "steps=7"], [])[:2] == (7, {"clip_norm": 1.0, "accumulate": 2})
    with pytest.raises(Refused, match="Unknown dtype 'bf17'"):
        training("mlp_jax", [], ["bf17"])
    with pytest.raises(Refused, match="no job of its own"):
        training("numerics_underflow", [], ["bf16"])


@pytest.mark.parametrize("experiment", [vision_digits, vision_resnet_nnx, language_gpt, mlp_jax])
def test_what_parity_trains_is_what_main_trains(experiment, tmp_path, monkeypatch):
    text = np.zeros(1000, np.uint8)
    monkeypatch.setattr(_data, "shakespeare", lambda: _data.Split({"text": text}, {"text": text}))
    seen = {}
    monkeypatch.setattr(_run, "compare", lambda policies, make_job, folder, plan: seen.update(vars(plan)))
    settings = {"clip_norm": 0.5, "accumulate": 2, "steps": 9}
    names = [field.name for field in dataclasses.fields(experiment.Config) if field.name in settings]
    experiment.main(experiment.Config(workdir=str(tmp_path), **{name: settings[name] for name in names}))
    found = training(experiment.__name__.partition(".")[2], [f"{name}={settings[name]}" for name in names], ["float32"])
    assert (seen["attempts"], seen["step_options"]) == (found.steps, found.step_options)
    assert found.step_options == {name: settings[name] for name in names if name != "steps"}
