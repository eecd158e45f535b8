"""Experiments as a user starts them: what the command line means, what it refuses, and what Ctrl-C leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import mpjax
from experiments import _data, _run, language_gpt, mlp_jax, numerics_underflow, vision_digits
from mpjax.measure.audit import audit

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("experiment", [vision_digits, numerics_underflow, language_gpt, mlp_jax])
def test_help_shows_the_lab_note_and_every_field(experiment, capsys):
    with pytest.raises(SystemExit) as end:
        _run.parse(experiment.Config, experiment.__doc__, ["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "Question" in text
    for field in dataclasses.fields(experiment.Config):
        assert f"--{field.name.replace('_', '-')}" in text


def test_fields_are_overridden_by_name():
    config = _run.parse(vision_digits.Config, None, ["--steps=7", "--policies", "float32", "p=f32,c=bf16"])
    assert (config.steps, config.policies, config.width) == (7, ("float32", "p=f32,c=bf16"), 64)


def test_a_preset_changes_the_defaults_and_what_else_is_given_changes_the_preset(monkeypatch, capsys):
    presets = {"cpu": {}, "h100": {"width": 512, "steps": 2000}}
    monkeypatch.setattr(language_gpt, "PRESETS", presets)

    def parsed(*args):
        return _run.parse(language_gpt.Config, None, list(args))

    default = language_gpt.Config()
    full = dataclasses.replace(default, width=512, steps=2000)
    assert parsed() == parsed("--preset=cpu") == default
    assert parsed("--preset=h100") == parsed("--preset", "h100") == full
    assert parsed("--steps=7", "--preset=h100") == dataclasses.replace(full, steps=7)
    with pytest.raises(SystemExit):
        parsed("--help")
    assert "h100: --width=512 --steps=2000" in capsys.readouterr().out
    args = language_gpt.Config, language_gpt.main, None, ["--preset=tpu"]
    assert _run.start(*args) == 2 and "got --preset=tpu; legal are cpu, h100" in capsys.readouterr().err
    assert _run.start(mlp_jax.Config, mlp_jax.main, None, ["--preset"]) == 2
    assert "this experiment has no presets" in capsys.readouterr().err


def test_an_unknown_name_ends_with_2(capsys):
    with pytest.raises(SystemExit) as end:
        _run.parse(vision_digits.Config, None, ["--stepz=7"])
    assert end.value.code == 2 and "stepz" in capsys.readouterr().err


def test_one_policy_has_a_short_name_and_rules_are_pairs():
    args = ["--policy", "bf16", "--rules", "head", "compute=float32,output=float32", "--rules", "**/attention", "c=f16"]
    config = _run.parse(vision_digits.Config, None, args)
    assert config.policies == ("bf16",)
    assert config.rules == (("head", "compute=float32,output=float32"), ("**/attention", "c=f16"))
    maps = _run.policy_maps(config.policies, config.rules)
    assert maps == {"bf16": mpjax.PolicyMap(default="bf16"), "rules": mpjax.PolicyMap(dict(config.rules))}
    assert maps["rules"].default == mpjax.get_policy("mixed_bfloat16")


@pytest.mark.parametrize("experiment", [vision_digits, language_gpt])
def test_a_map_of_rules_trains_as_one_more_policy(experiment, tmp_path, monkeypatch):
    """It reaches the job that is trained, and decides there what computes in which dtype."""
    text = np.zeros(1000, np.uint8)
    monkeypatch.setattr(_data, "shakespeare", lambda: _data.Split({"text": text}, {"text": text}))
    seen = {}

    def compare(policies, make_job, folder, plan):
        for name, policy in policies.items():
            job = make_job(policy)
            step = job.step(**plan.step_options).pure
            found = audit(step, jax.eval_shape(job.state, jax.random.key(0)), job.batches(0))
            seen[name] = set(found.flops_by_dtype())

    monkeypatch.setattr(_run, "compare", compare)
    args = ["--policy", "f32", "--rules", "**/attention", "c=f16", "--width=16", "--depth=1", f"--workdir={tmp_path}"]
    assert _run.start(experiment.Config, experiment.main, None, args) == 0
    assert seen == {"f32": {"float32"}, "rules": {"bfloat16", "float16"}}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--policy", "bf17"], "Unknown dtype 'bf17'"),
        (["--rules", "haed", "float32"], "rule 'haed' matches no path; did you mean 'head'"),
        (["--rules", "head", "c=f17"], "Unknown dtype 'f17'"),
        (["--policies"], "legal is at least one, and each once"),
        (["--policies", "f32", "f32"], "legal is at least one, and each once"),
        (["--rules", "head", "f32", "--rules", "head", "f16"], "legal is at least one, and each once"),
        (["--steps=0"], "got --steps=0; legal is 1 or more"),
        (["--batch-size=0"], "got --batch-size=0; legal is 1 or more"),
        (["--seed=-1"], "got --seed=-1; legal is 0 or more"),
        (["--depth=0"], "got --depth=0; legal is 1 or more"),
        (["--eval-every=-1"], "got --eval-every=-1; legal is 0 or more"),
        (["--batch-size=1439"], "got arrays of [1438] rows and batch_size=1439"),
        (["--clip-norm=-1"], "got clip_norm=-1.0; legal is a number > 0"),
        (["--devices=3"], "128 rows"),
    ],
)
def test_a_setting_that_makes_no_sense_ends_with_2_and_no_traceback(args, said, tmp_path, capsys):
    args = [*args, f"--workdir={tmp_path}"]
    assert _run.start(vision_digits.Config, vision_digits.main, None, args, prog="vision_digits") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("vision_digits: ") and said in shown and shown.count("\n") == 1
    assert not list(tmp_path.iterdir())  # told before anything was trained or written


def test_rows_that_micro_batches_do_not_divide_and_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for experiment, arg, said in [
        (
            language_gpt,
            "--accumulate=3",
            "got --batch-size=16 and --accumulate=3; legal is a number that divides the rows",
        ),
        (mlp_jax, f"--workdir={tmp_path / 'file' / 'run'}", "cannot be made: Not a directory; give another --workdir"),
    ]:
        assert _run.start(experiment.Config, experiment.main, None, [arg], prog="it") == 2
        assert said in capsys.readouterr().err


def test_data_that_is_missing_ends_with_1_and_makes_no_run_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPJAX_DATA", str(tmp_path / "data"))
    args = [f"--workdir={tmp_path / 'runs'}"]
    assert _run.start(language_gpt.Config, language_gpt.main, None, args) == 1
    assert "python -m experiments._data shakespeare" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_mistake_of_ours_keeps_its_traceback():
    def broken(config):
        raise ValueError("not the user's")

    with pytest.raises(ValueError, match="not the user's"):
        _run.start(mlp_jax.Config, broken, None, [])
    assert not issubclass(ValueError, (_run.Refused, _data.CorruptDataError))


def test_ctrl_c_in_training_writes_what_was_measured_saves_and_ends_with_0(tmp_path):
    command = ["train", "mlp_jax", "--width=16", "--steps=1000000", f"--workdir={tmp_path}", "--progress=False"]
    # A shell may start what runs in its background with SIGINT ignored, and children inherit that.
    program = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from mpjax.cli import main
sys.exit(main({command}))
"""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip
    metrics = tmp_path / "float32" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while run.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_text().count("\n") >= 100:
                break
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 0 and "Traceback" not in err, err
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line["attempt"] for line in lines if "step" in line]
    assert steps == list(range(len(steps))) and 99 <= len(steps) < 1000000
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert row["policy"] == f"float32 ({len(steps)} steps)"
    assert row["final loss"] == next(line["step"]["loss"] for line in reversed(lines) if "step" in line)
    assert (tmp_path / "curves.png").exists() and not (tmp_path / "float32" / "row.json").exists()
    assert mpjax.Checkpointer(tmp_path / "float32" / "checkpoints").steps() == [len(steps)]
    said = f"interrupted during float32, after {len(steps)} of 1000000 steps; go on with the same command and --workdir {tmp_path}"
    assert said in out
    assert "rbax" not in err  # of the libraries only warnings are shown


@pytest.mark.parametrize(("when", "code"), [("before its steps", 130), ("in its steps", 0)])
def test_ctrl_c_keeps_the_policies_that_were_done(when, code, tmp_path, monkeypatch, capsys):
    def train(name, job, folder, plan, mesh):
        if name == "mixed_bfloat16" and when == "before its steps":
            raise KeyboardInterrupt
        metrics = {"loss": 1.0, "loss_scale": 1.0, "skipped": 0.0}
        made = 7 if name == "mixed_bfloat16" else plan.attempts
        result = mpjax.FitResult(None, [{"attempt": n, **metrics} for n in range(made)])
        result.stopped = "done" if made == plan.attempts else "interrupted"
        if result.stopped == "done":
            result.evaluations = [{"attempt": made, "accuracy": 0.5}]
        return _run.Trained({"test accuracy": None, "final loss": 1.0}, result)

    monkeypatch.setattr(_run.comparison, "train", train)
    args = ["--steps=20", f"--workdir={tmp_path}"]
    assert _run.start(mlp_jax.Config, mlp_jax.main, None, args) == code
    done = {"before its steps": ["float32"], "in its steps": ["float32", "mixed_bfloat16 (7 steps)"]}[when]
    assert [row["policy"] for row in json.loads((tmp_path / "table.json").read_text())] == done
    said = {"before its steps": "outside its steps", "in its steps": "after 7 of 20 steps"}[when]
    said = f"interrupted during mixed_bfloat16, {said}; go on with the same command and --workdir {tmp_path}"
    assert said in capsys.readouterr().out
