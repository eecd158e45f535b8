"""The writers: what stands in the files is what was measured, and it stands there before the run is over."""

from __future__ import annotations

import io
import json
import re
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import rich.progress

from mpjax.train.hooks import FitResult
from mpjax.train.writers import JsonlWriter, ProgressBar, TensorBoardWriter

METRICS = {"loss": 0.1, "loss_scale": 32768.0, "skipped": 2.0}


def lines(path) -> list:
    """The file's lines, as strict JSON: no NaN, no Infinity."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- JSON lines ------------------------------------------------------------------------------------------------------


def test_a_line_for_each_step_and_evaluation(tmp_path):
    writer = JsonlWriter(tmp_path / "made" / "for it" / "metrics.jsonl")
    writer.on_step(0, METRICS)
    writer.on_step(1, METRICS)
    writer.on_eval(2, {"accuracy": 0.5})
    writer.on_end(FitResult(None))
    assert lines(writer.path) == [
        {"attempt": 0, "step": METRICS},
        {"attempt": 1, "step": METRICS},
        {"attempt": 2, "eval": {"accuracy": 0.5}},
    ]


def test_numbers_come_back_to_the_last_bit(tmp_path):
    values = {str(x): float(x) for x in np.float32([0.1, 1 / 3, 3.4028235e38, 1e-45, -0.0])}
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.on_step(0, values)
    (line,) = lines(writer.path)
    assert np.array(list(line["step"].values())).tobytes() == np.array(list(values.values())).tobytes()
    writer.on_end(FitResult(None))


def test_what_json_has_no_word_for_is_a_string(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.on_step(0, {"loss": float("nan"), "grad_norm": float("inf"), "least": -float("inf"), "big": 1e300})
    writer.on_end(FitResult(None))
    assert lines(writer.path)[0]["step"] == {"loss": "nan", "grad_norm": "inf", "least": "-inf", "big": 1e300}
    assert [float(word) for word in ("inf", "-inf")] == [np.inf, -np.inf] and np.isnan(float("nan"))


def test_a_run_that_dies_keeps_each_line_that_it_wrote(tmp_path):
    """Nothing is closed or flushed here: what was told stands in the file at once, in whole lines."""
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for attempt in range(200):
        writer.on_step(attempt, METRICS)
        assert lines(writer.path)[-1]["attempt"] == attempt
    writer.on_end(FitResult(None))


def test_one_writer_serves_a_run_in_two_parts(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for attempt in (0, 1):
        writer.on_step(attempt, METRICS)
        writer.on_end(FitResult(None))
    assert [line["attempt"] for line in lines(writer.path)] == [0, 1]


@pytest.mark.parametrize("left", ["", '{"attempt": 1, "st', '{"attempt": 1, "step": {}}'])
def test_after_a_kill_a_new_line_is_begun(left, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"attempt": 0, "step": {}}\n' + left)
    writer = JsonlWriter(path)
    writer.on_step(1, METRICS)
    writer.on_end(FitResult(None))
    assert path.read_text().splitlines()[1:-1] == ([left] if left else [])
    assert json.loads(path.read_text().splitlines()[-1]) == {"attempt": 1, "step": METRICS}


def test_a_resumed_run_appends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for attempt in range(2):
        writer = JsonlWriter(str(path))
        writer.on_step(attempt, METRICS)
        writer.on_end(FitResult(None))
    assert [line["attempt"] for line in lines(path)] == [0, 1]


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def events(folder) -> list[tuple[int, str, float]]:
    """(step, tag, value) from the events file: records of length, checksum, a protocol buffer, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.glob("events.out.tfevents.*")
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return found


def test_tensorboard_events_are_what_was_measured(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.on_step(0, METRICS)
    writer.on_step(1, {"loss": 0.25})
    writer.on_eval(2, {"accuracy": 0.5})
    writer.on_end(FitResult(None))
    assert events(tmp_path) == [
        (0, "train/loss", np.float32(0.1)),
        (0, "train/loss_scale", 32768.0),
        (0, "train/skipped", 2.0),
        (1, "train/loss", 0.25),
        (2, "eval/accuracy", 0.5),
    ]


def test_a_nan_is_an_event_too_and_no_warning(tmp_path, caplog):
    writer = TensorBoardWriter(tmp_path)
    writer.on_step(3, {"loss": float("nan"), "grad_norm": float("inf")})
    writer.on_end(FitResult(None))
    assert caplog.records == []  # a skipped step is no news
    (step, _, loss), (_, _, norm) = events(tmp_path)
    assert step == 3 and np.isnan(loss) and np.isinf(norm)


def test_without_tensorboardx_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    words = "TensorBoardWriter needs tensorboardX; install mpjax[experiments], or leave it out"
    with pytest.raises(ImportError, match=re.escape(words)):
        TensorBoardWriter(tmp_path)


# ---- the bar ---------------------------------------------------------------------------------------------------------


def test_the_bar_shows_where_the_run_is(monkeypatch):
    clock = iter(np.arange(0, 1e4, 0.125))  # each look at it, an eighth of a second
    console = rich.console.Console(file=io.StringIO(), width=120, force_terminal=True, get_time=lambda: next(clock))
    monkeypatch.setattr(rich.progress, "get_console", lambda: console)
    bar = ProgressBar(4, "mixed_float16")
    for attempt in range(3):
        bar.on_step(attempt, {**METRICS, "grad_norm": float("nan")})
    bar.on_end(FitResult(None))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).rsplit("mixed_float16", 1)[1]
    for words in ("3/4", "loss 0.1000", "scale 32768", "skipped 2"):
        assert words in shown
    assert re.search(r"skipped 2 [\d.]+/s 0:00:0\d", shown)
    console.file.truncate(0)
    bar.on_end(FitResult(None))  # it is over: nothing moves any more
    assert "3/4" not in console.file.getvalue()


def test_a_bar_stands_a_step_of_ones_own_that_measures_less():
    bar = ProgressBar(1)
    bar.on_step(0, {"loss": 1.0})
    bar.on_end(FitResult(None))


def test_a_bar_stands_a_loss_that_is_none():
    bar = ProgressBar(1)
    bar.on_step(0, {name: float("nan") for name in METRICS})
    bar.on_end(FitResult(None))


def test_writers_take_plain_floats_only(tmp_path):
    """The loop gives them floats: an array here would be a host sync that somebody forgot."""
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(Exception, match="metrics"):
        writer.on_step(0, {"loss": jnp.float32(1)})
    writer.on_end(FitResult(None))
