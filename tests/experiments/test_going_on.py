"""A run folder: a comparison that is stopped and gone on with ends as one in one go, and no other run gets into it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import signal

import jax
import pytest

import mpjax
from experiments import _run, mlp_jax, numerics_underflow, parity_error_rates, store_kill, vision_digits
from mpjax.measure.runs import read_runs

ARGS = ["--policies", "float32", "mixed_float16", "--steps=6", "--eval-every=2", "--width=4", "--batch-size=8",
        "--progress=False", "--checkpoint-every=4"]  # fmt: skip

ROW = {"loss": math.nan, "loss_scale": 1.0, "skipped": 1.0}
"""The metrics of a skipped step."""


class Jobs:
    """In place of `mlp_jax.make_job`: notes which batches are drawn under which policy, and stops the run in one of its steps.

    What is compiled is compiled once for all runs.
    """

    def __init__(self):
        self.drawn: list[tuple[str, int]] = []
        self.stop: tuple[str, int] | None = None
        self.made: dict[str, tuple] = {}

    def __call__(self, config, policy, make=mlp_jax.make_job):
        name = "float32" if policy.default.compute_dtype == "float32" else "mixed_float16"
        if name not in self.made:
            job = make(config, policy)
            self.made[name] = job, job.step(), jax.jit(job.state)
        job, step, state = self.made[name]

        def batches(attempt):
            self.drawn.append((name, attempt))
            return job.batches(attempt)

        own = dataclasses.replace(job, batches=batches)
        for word, value in (("step", lambda **options: Stopping(step, self, name)), ("state", state)):
            object.__setattr__(own, word, value)
        return own


class Stopping:
    """A train step in which SIGTERM comes, where the run is to be stopped at this attempt of this policy."""

    def __init__(self, step, jobs, name):
        self._step, self._jobs, self._name = step, jobs, name

    def __getattr__(self, word):
        return getattr(self._step, word)

    def __call__(self, state, batch):
        attempt = int(state.attempt)
        after = self._step(state, batch)
        if (self._name, attempt) == self._jobs.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return after


@pytest.fixture
def jobs(monkeypatch):
    jobs = Jobs()
    monkeypatch.setattr(mlp_jax, "make_job", jobs)
    monkeypatch.setattr(mpjax, "make_eval_step", functools.cache(mpjax.make_eval_step))
    monkeypatch.setattr(_run.training, "compiled_memory", lambda step, state, batch: {"temp": 7})
    return jobs


@pytest.fixture
def curves(monkeypatch):
    """What was drawn, by folder; pictures have tests of their own."""
    drawn = {}
    monkeypatch.setattr(
        _run.comparison, "training_curves", lambda runs, path, metric: drawn.__setitem__(path.parent.name, runs)
    )
    return drawn


def start(folder, *more: str) -> int:
    return _run.start(mlp_jax.Config, mlp_jax.main, None, [*ARGS, f"--workdir={folder}", *more], prog="mlp_jax")


def rows(folder) -> list[dict]:
    """The table but for its timings."""
    return [{k: v for k, v in row.items() if k != "steps/s"} for row in json.loads((folder / "table.json").read_text())]


def test_a_comparison_that_is_stopped_twice_ends_as_one_in_one_go(tmp_path, jobs, curves, capsys):
    straight, folder = tmp_path / "straight", tmp_path / "stopped"
    assert start(straight) == 0
    whole = rows(straight)
    assert [row["policy"] for row in whole] == ["float32", "mixed_float16"]
    capsys.readouterr()

    # The batch 0 is drawn before `fit` too, to compile; attempt 2 is the third step.
    jobs.stop, jobs.drawn = ("float32", 2), []
    assert start(folder) == 0
    assert {name for name, _ in jobs.drawn} == {"float32"} and rows(folder)[0]["policy"] == "float32 (3 steps)"
    assert max(n for _, n in jobs.drawn) <= 2 + 2  # the last step, and two that were ready
    said = f"interrupted during float32, after 3 of 6 steps; go on with the same command and --workdir {folder}"
    assert said in capsys.readouterr().out
    assert sorted(path.name for path in (folder / "float32" / "checkpoints").iterdir() if path.name[0] != ".") == ["3"]

    jobs.stop, jobs.drawn = ("mixed_float16", 3), []  # an evaluation is due after it, and left
    assert start(folder) == 0
    assert [n for name, n in jobs.drawn if name == "float32" and n] == [3, 4, 5]
    assert [row["policy"] for row in rows(folder)] == ["float32", "mixed_float16 (4 steps)"]
    assert rows(folder)[0] == whole[0]

    jobs.stop, jobs.drawn = None, []
    capsys.readouterr()
    assert start(folder, "--devices=1", "--checkpoint-every=0") == 0  # not what is trained
    assert [(name, n) for name, n in jobs.drawn if n] == [("mixed_float16", 4), ("mixed_float16", 5)]
    assert rows(folder) == whole and curves["stopped"] == curves["straight"]
    assert "interrupted" not in capsys.readouterr().out
    for one, other in zip(read_runs(folder).values(), read_runs(straight).values(), strict=True):
        assert one == other and len(one.curves["loss"]) == 6 and one.evaluations["accuracy"][0] == [2, 4, 6]

    jobs.drawn = []
    assert start(folder) == 0 and jobs.drawn == [] and rows(folder) == whole  # done: told again, not trained again
    config = json.loads((folder / "config.json").read_text())
    assert len(config["resumed"]) == 3 and config["experiment"] == "mlp_jax" and config["config"]["width"] == 4


def test_numbers_that_json_has_no_word_for_are_words_in_its_files_and_come_back(tmp_path, curves):
    def no_json(word):
        raise AssertionError(f"{word} is no JSON")

    evaluations = [{"attempt": 3, "loss": math.nan, "accuracy": 0.5}]
    _run.folder.write_json(
        tmp_path / "row.json", {"row": {"final loss": math.inf}, "evaluations": evaluations, "best": (-math.inf, 3)}
    )
    json.loads((tmp_path / "row.json").read_text(), parse_constant=no_json)
    stored = _run.training._stored(tmp_path)
    assert stored.row == {"final loss": math.inf} and stored.result.best == (-math.inf, 3)
    assert repr(stored.result.evaluations) == repr(evaluations)

    run = _run.Trained({"final loss": math.nan}, mpjax.FitResult(None, [ROW | {"attempt": 0}], evaluations))
    _run.report({"float32": run}, tmp_path, _run.Plan(attempts=3, eval_every=0, seeds=mpjax.seeds(0)))
    (row,) = json.loads((tmp_path / "table.json").read_text(), parse_constant=no_json)
    assert row["final loss"] == "nan" and row["largest deviation of loss"] == "nan"


@pytest.fixture
def begun(tmp_path):
    """A folder in which a run of `mlp_jax` with ARGS made a step."""
    folder = tmp_path / "begun"
    config = _run.parse(mlp_jax.Config, None, [*ARGS, f"--workdir={folder}"])
    with _run.open_folder(config, "mlp_jax").begin():
        (folder / "float32").mkdir()
        (folder / "float32" / "metrics.jsonl").write_text('{"attempt": 0, "step": {"loss": 2.3}}\n')
    return folder


def refused(folder, *more: str) -> int:
    """The exit code of a start that trains nothing."""

    def main(config):
        with _run.open_folder(config, "mlp_jax").begin():
            pass

    return _run.start(mlp_jax.Config, main, None, [*ARGS, f"--workdir={folder}", *more], prog="mlp_jax")


def test_another_config_is_refused_with_its_fields_and_both_values(begun, capsys):
    before = (begun / "config.json").read_text()
    assert refused(begun, "--width=5", "--policies", "float32", "--seed=1", "--progress=True", "--devices=0") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f'mlp_jax: {begun} holds a run of another config: policies was ["float32", "mixed_float16"] and is ["float32"]; '
        "width was 4 and is 5; seed was 0 and is 1; give the same, or another --workdir"
    )
    assert (begun / "config.json").read_text() == before


def test_a_run_that_made_no_step_does_not_hold_who_mends_its_settings_to_them(begun):
    metrics = begun / "float32" / "metrics.jsonl"
    metrics.write_text("")  # as it is opened
    assert refused(begun, "--width=5") == 0
    told = json.loads((begun / "config.json").read_text())
    assert told["config"]["width"] == 5 and "resumed" not in told
    metrics.unlink()
    with pytest.raises(_run.Refused, match="it is one of mlp_jax, this is vision_digits"):
        _run.open_folder(vision_digits.Config(workdir=str(begun)), "vision_digits")


def test_a_policy_that_cannot_train_loses_none_of_the_others(tmp_path, jobs, curves, monkeypatch, capsys):
    train = _run.comparison.train

    def diverging(name, job, folder, plan, mesh):
        if name != "float32":
            return train(name, job, folder, plan, mesh)
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(
            '{"attempt": 0, "step": {"loss": "nan", "loss_scale": 1.0, "skipped": 1.0}}\n'
        )
        raise mpjax.NonFiniteError("50 steps in a row were not finite")

    monkeypatch.setattr(_run.comparison, "train", diverging)
    assert start(tmp_path) == 1
    assert capsys.readouterr().err == "mlp_jax: float32: 50 steps in a row were not finite\n"
    assert [row["policy"] for row in rows(tmp_path)] == ["float32 (not finite, 1 steps)", "mixed_float16"]
    assert (tmp_path / "mixed_float16" / "row.json").exists()


@pytest.mark.parametrize("spelt", ["--no-resume", "--resume=False"])
def test_no_resume_refuses_a_folder_that_holds_a_run_and_no_other(spelt, begun, tmp_path, capsys):
    assert refused(begun, spelt) == 2
    assert f"mlp_jax: {begun} holds a run, and --no-resume came" in capsys.readouterr().err
    assert refused(tmp_path / "new", spelt) == 0 == refused(begun)


def test_what_is_no_run_of_this_experiment_is_refused(begun, tmp_path, capsys):
    old = tmp_path / "runs"
    (old / "mlp_jax-20260101").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"config": {')
    for folder, said in [
        (old, "not empty and holds no run; legal is a new or empty folder"),
        (tmp_path / "file", "which is no folder"),
        (broken, "config.json cannot be read"),
    ]:
        assert refused(folder) == 2 and said in capsys.readouterr().err
    (broken / "config.json").write_text("[]")
    assert refused(broken) == 2 and "is not that of a run" in capsys.readouterr().err
    with pytest.raises(_run.Refused, match="it is one of mlp_jax, this is vision_digits"):
        _run.open_folder(vision_digits.Config(workdir=str(begun)), "vision_digits")


def test_a_folder_with_nothing_of_anybodys_begins_a_run(tmp_path):
    (tmp_path / "lost+found").mkdir()  # the root of a disk that was mounted for the run
    (tmp_path / ".hidden").write_text("")
    assert refused(tmp_path) == 0 and (tmp_path / "config.json").exists()


def test_two_processes_do_not_share_a_folder(begun, capsys):
    config = _run.parse(mlp_jax.Config, None, [*ARGS, f"--workdir={begun}"])
    with _run.open_folder(config, "mlp_jax").begin():
        assert refused(begun) == 2
        assert f"another process is at work in {begun}" in capsys.readouterr().err
    assert refused(begun) == 0


def test_another_environment_is_told(begun, caplog, monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.99")
    assert refused(begun) == 0
    assert "its numbers may differ from those of a run in one go: jax" in caplog.text and "0.99 now" in caplog.text
    assert json.loads((begun / "config.json").read_text())["resumed"][0]["jax"] == "0.99"


def test_without_a_workdir_there_is_a_new_folder_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with _run.open_folder(mlp_jax.Config(), "mlp_jax").begin() as path:
            assert path.parent.name == "runs" and path.name.startswith("mlp_jax-")
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.parametrize("experiment", [numerics_underflow, parity_error_rates, store_kill])
def test_what_does_not_train_writes_over_no_run(experiment, tmp_path):
    name = experiment.__name__.partition(".")[2]
    config = experiment.Config(workdir=str(tmp_path))
    with _run.open_folder(config, name, goes_on=False).begin() as path:
        (path / "table.md").write_text("kept")
    with pytest.raises(_run.Refused, match="holds a run already, which is not written over; give another --workdir"):
        experiment.main(config)
    assert (tmp_path / "table.md").read_text() == "kept"


@pytest.mark.parametrize(("given", "every"), [(None, 24), (7, 7)])
def test_how_often_a_checkpoint_is_saved(given, every):
    assert _run.Plan(240, 60, mpjax.seeds(0), checkpoint_every=given).saved_every == every


def test_checkpoints_at_the_end_only_and_never_less():
    plan = _run.Plan(5, 1, mpjax.seeds(0), checkpoint_every=0)
    assert plan.saved_every > 10**9 and dataclasses.replace(plan, checkpoint_every=None).saved_every == 1
    with pytest.raises(_run.Refused, match=r"got --checkpoint-every=-1; legal is 0"):
        dataclasses.replace(plan, checkpoint_every=-1).saved_every  # noqa: B018
