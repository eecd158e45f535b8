"""Run folders, read back as their writers left them: whole, killed, resumed."""

from __future__ import annotations

import json
import math

import pytest

from mpjax.measure.runs import exponent_counts, read_runs
from mpjax.train.hooks import FitResult
from mpjax.train.writers import JsonlWriter


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


def step(attempt, loss, **others):
    return {"attempt": attempt, "step": {"loss": loss, **others}}


def test_curves_are_what_the_writer_was_given(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.on_step(0, {"loss": math.inf, "loss_scale": 4.0, "skipped": 1})
    writer.on_step(1, {"loss": 0.5, "loss_scale": 2.0, "skipped": 1})
    writer.on_eval(2, {"loss": 0.25, "accuracy": 0.75})
    writer.on_end(FitResult(None))
    ((name, run),) = read_runs(tmp_path).items()
    assert name == tmp_path.name
    assert run.curves == {"attempt": [0, 1], "loss": [math.inf, 0.5], "loss_scale": [4, 2], "skipped": [1, 1]}
    assert run.evaluations == {"loss": ([2], [0.25]), "accuracy": ([2], [0.75])}
    assert run.probes == {} and run.left_out == ()


def test_policies_stand_in_the_order_of_the_config_then_by_name(tmp_path):
    for name in ("a", "b", "rules", "z"):
        write(tmp_path / name / "metrics.jsonl", step(0, 1.0))
    (tmp_path / "empty").mkdir()
    write(tmp_path / "config.json", {"config": {"policies": ["z", "b", "never_run"]}})
    assert list(read_runs(tmp_path)) == ["z", "b", "a", "rules"]
    write(tmp_path / "config.json", '{"config": {"poli')
    assert list(read_runs(tmp_path)) == ["a", "b", "rules", "z"]


def test_the_line_that_a_killed_run_was_writing_is_left_out_with_a_word(tmp_path):
    write(tmp_path / "metrics.jsonl", step(0, 1.0), '{"attempt": 1, "st')
    write(tmp_path / "probe.jsonl", {"attempt": 0, "readings": []}, '{"attempt": 10, "loss_scale": 1')
    (run,) = read_runs(tmp_path).values()
    assert run.curves["attempt"] == [0] and list(run.probes) == [0]
    metrics, probe = run.left_out
    assert metrics.startswith(f"line 2 of {tmp_path / 'metrics.jsonl'} is cut off") and "probe.jsonl" in probe


def test_a_resumed_run_repeats_attempts_and_the_later_ones_hold(tmp_path):
    lines = [step(0, 3.0), step(1, 2.0), step(2, 9.0), step(1, 1.5), step(2, 1.0, grad_norm=7.0)]
    write(tmp_path / "metrics.jsonl", *lines)
    (run,) = read_runs(tmp_path).values()
    assert (run.curves["attempt"], run.curves["loss"]) == ([0, 1, 2], [3, 1.5, 1])
    assert math.isnan(run.curves["grad_norm"][0]) and run.curves["grad_norm"][2] == 7


def test_what_an_earlier_run_did_beyond_is_forgotten(tmp_path):
    """Back at 2 of 4 with a lower learning rate, say, and not there again: no curve jumps from the one to the other."""
    lines = [step(0, 3.0), step(1, 2.0), {"attempt": 2, "eval": {"a": 0.5}}, step(2, 8.0), step(3, 9.0)]
    write(tmp_path / "metrics.jsonl", *lines, {"attempt": 4, "eval": {"a": 0.1}}, step(2, 1.0))
    write(tmp_path / "probe.jsonl", *({"attempt": n, "readings": []} for n in (0, 2, 1)))
    (run,) = read_runs(tmp_path).values()
    assert (run.curves["loss"], run.evaluations, list(run.probes)) == ([3, 2, 1], {"a": ([2], [0.5])}, [0, 1])


def test_a_metric_that_is_no_number_has_none_and_attempts_stay_what_they_are(tmp_path):
    odd = {"note": "warm", "per_class": [1, 2], "huge": 10**400, "attempt": 9}
    write(
        tmp_path / "metrics.jsonl",
        {"attempt": 0, "step": {"loss": None, **odd}},
        step(1, 2.0),
        {"attempt": 2, "eval": {"a": None}},
    )
    (run,) = read_runs(tmp_path).values()
    assert run.curves.pop("attempt") == [0, 1] and run.curves.pop("loss")[1] == 2
    assert all(map(math.isnan, [values[0] for values in run.curves.values()] + run.evaluations["a"][1]))


def test_foreign_lines_are_no_records(tmp_path):
    foreign = [1], {"attempt": "a", "step": {}}, {"step": {}}, {"attempt": 1, "step": 3}, {"attempt": 1, "step": [3]}
    write(tmp_path / "metrics.jsonl", *foreign, "7\n")
    (run,) = read_runs(tmp_path).values()
    assert run.curves == {"attempt": []} and len(run.left_out) == 6


def test_a_folder_without_runs_is_empty_and_a_file_is_refused(tmp_path):
    assert read_runs(tmp_path) == {}
    write(tmp_path / "a.txt", "x")
    for path in ("a.txt", "missing"):
        with pytest.raises(
            NotADirectoryError, match=r"which is no folder; legal is one that an experiment wrote: give"
        ):
            read_runs(tmp_path / path)


def test_readings_become_counts_by_kind_and_path():
    def reading(path, kind, exponents, **others):
        return {"path": path, "kind": kind, "dtype": "float16", "exponents": exponents, "amax": 1.0, **others}

    probed = {"attempt": 3, "readings": [
        reading("b", "gradient", {"-24": 2}, zero=1, subnormal=2, inf=0, nan=4, count=7),
        reading("b", "activation", {"0": 1}),
        reading("a", "activation", {"0": 1, "3": 1}),
        reading("b", "activation", {"0": 5}, inf=2),
        reading("a", "sketch", {"1": 1}),
    ]}  # fmt: skip
    counts = exponent_counts(probed)
    assert counts == {
        "activation": {"b": {0: 6, "inf": 2}, "a": {0: 1, 3: 1}},  # the two calls of b are added
        "gradient": {"b": {-24: 2, "zero": 1, "nan": 4}},
        "sketch": {"a": {1: 1}},
    }
    assert list(counts) == ["activation", "gradient", "sketch"] and list(counts["activation"]) == ["b", "a"]
