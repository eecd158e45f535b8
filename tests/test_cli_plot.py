"""`mpjax plot`: what it draws of which folder, what it prints, and its exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import mpjax.measure.plots as plots
from mpjax.cli import main

READING = {"path": "a", "kind": "gradient", "dtype": "float16", "exponents": {"-3": 5}, "zero": 1, "count": 6}


@pytest.fixture
def drawn(monkeypatch):
    """What each picture was given, none of them drawn: name of the file to (data, settings)."""
    given = {}

    def draw(data, path, **settings):
        given[Path(path).name] = (data, settings)
        return Path(path)

    for name in ("training_curves", "loss_scale_history", "exponent_ranges"):
        monkeypatch.setattr(plots, name, draw)
    return given


def lines(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run(tmp_path):
    """An experiment's folder: two policies, one of them with a loss scale and probes."""
    folder = tmp_path / "mlp"
    for name, scale in (("float32", 1.0), ("mixed_float16", 8.0)):
        lines(
            folder / name / "metrics.jsonl",
            {"attempt": 0, "step": {"loss": 2.0, "loss_scale": scale, "skipped": 0}},
            {"attempt": 1, "step": {"loss": "nan", "loss_scale": scale, "skipped": 1}},
            {"attempt": 2, "eval": {"loss": 1.0, "bits_per_byte": 3.0}},
        )
    lines(
        folder / "mixed_float16" / "probe.jsonl",
        {"attempt": 0, "loss_scale": 8.0, "readings": [READING]},
        {"attempt": 100, "loss_scale": 4.0, "readings": [READING | {"exponents": {"7": 1}}]},
    )
    lines(folder / "config.json", {"config": {"policies": ["mixed_float16", "float32"]}})
    return folder


def test_a_run_is_drawn_with_all_it_has_and_the_files_are_listed(run, capsys):
    assert main(["plot", str(run), "--out", str(run / "new")]) == 0
    shown = capsys.readouterr()
    names = ["curves.png", "loss_scale.png", "exponents-mixed_float16.png"]
    assert shown.out.splitlines() == [str(run / "new" / name) for name in names] and shown.err == ""
    assert {path.name for path in (run / "new").iterdir()} == set(names)
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in (run / "new").iterdir())


def test_each_picture_gets_what_was_written(run, drawn, capsys):
    lines(run / "float32" / "metrics.jsonl", {"attempt": 0, "step": {"loss": 2.0, "loss_scale": 1.0, "skipped": 0}})
    assert main(["plot", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["written"][0] == str(run / "pictures" / "curves.png") and told["run"] == str(run)
    curves, settings = drawn["curves.png"]
    assert list(curves) == ["mixed_float16", "float32"]  # the config's order: the first is the reference
    assert (curves["mixed_float16"]["bits per byte"], curves["mixed_float16"]["eval_attempt"]) == ([3.0], [2])
    assert curves["mixed_float16"]["skipped"] == [0, 1] and settings["metric"] == "bits per byte"
    assert drawn["loss_scale.png"][0] == curves
    counts, settings = drawn["exponents-mixed_float16.png"]
    assert counts == {"gradient": {"a": {7: 1, "zero": 1}}}
    assert settings == {"loss_scale": 4.0, "title": "mixed_float16, attempt 100"}


def test_another_attempt_can_be_asked_for(run, drawn, capsys):
    assert main(["plot", str(run), "--attempt", "0"]) == 0
    counts, settings = drawn["exponents-mixed_float16.png"]
    assert (counts["gradient"]["a"], settings["loss_scale"]) == ({-3: 5, "zero": 1}, 8.0)
    assert main(["plot", str(run), "--attempt", "7"]) == 2
    assert "got --attempt 7, which no run probed; legal are [0, 100]; name one" in capsys.readouterr().err


def test_one_policys_folder_and_one_with_probes_alone(run, drawn, tmp_path, capsys):
    assert main(["plot", str(run / "float32")]) == 0
    assert list(drawn) == ["curves.png", "loss_scale.png"]  # a scale of 1, but with a skip
    assert drawn["curves.png"][1]["title"] == "Training under float32"
    drawn.clear()
    lines(tmp_path / "mine" / "probe.jsonl", {"attempt": 5, "readings": [READING]})
    assert main(["plot", str(tmp_path / "mine")]) == 0
    assert list(drawn) == ["exponents-mine.png"] and drawn["exponents-mine.png"][1]["loss_scale"] == 1


@pytest.mark.parametrize(
    ("evals", "shown"), [({"loss": 1.0, "top_5": 0.9, "accuracy": 0.5}, "accuracy"), ({"loss": 1.0}, "loss (held out)")]
)
def test_the_held_out_metric_is_accuracy_where_there_is_one(evals, shown, drawn, tmp_path):
    step = {"attempt": 0, "step": {"loss": 2.0}}
    lines(tmp_path / "metrics.jsonl", step, {"attempt": 1, "eval": evals})
    assert main(["plot", str(tmp_path)]) == 0
    ((curves,), settings) = drawn["curves.png"][0].values(), drawn["curves.png"][1]
    assert settings["metric"] == shown and curves[shown] == [evals.get("accuracy", 1.0)] and curves["loss"] == [2.0]


def test_a_killed_run_is_drawn_and_the_cut_line_told(run, drawn, capsys):
    with (run / "mixed_float16" / "probe.jsonl").open("a") as file:
        file.write('{"attempt": 200, "loss_sc')
    assert main(["plot", str(run)]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("mpjax plot: line 3 of ") and "probe.jsonl is cut off" in shown.err
    assert drawn["exponents-mixed_float16.png"][1]["title"] == "mixed_float16, attempt 100"


def test_exit_codes_tell_nothing_to_draw_from_no_folder(tmp_path, drawn, capsys):
    assert main(["plot", str(tmp_path / "missing")]) == 2
    assert "missing', which is no folder; legal is" in capsys.readouterr().err
    lines(tmp_path / "empty" / "metrics.jsonl")
    lines(tmp_path / "empty" / "probe.jsonl", {"attempt": 1, "readings": [READING | {"exponents": {}, "zero": 0}]})
    for folder in (tmp_path, tmp_path / "empty"):
        assert main(["plot", str(folder)]) == 1
        assert "which holds nothing to draw; legal is" in capsys.readouterr().err
    assert drawn == {}


def test_no_place_to_write_and_no_matplotlib_exit_with_1(run, monkeypatch, capsys):
    assert main(["plot", str(run), "--out", str(run / "config.json")]) == 1
    assert "config.json" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", str(run)]) == 1
    assert "install mpjax[experiments]" in capsys.readouterr().err
