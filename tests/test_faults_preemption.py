"""FAULTS.md, rows 24 and 25: a run that is stopped from outside loses nothing, and goes on as if nothing had been."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpjax
from tests import preempted

ROOT = Path(__file__).parents[1]
SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)


@contextlib.contextmanager
def running(folder: Path, stop: int, *options: str) -> Iterator[subprocess.Popen]:
    """The run in a process of its own. A shell may let its children ignore SIGINT; this one does not."""
    program = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "runpy.run_module('tests.preempted', run_name='__main__', alter_sys=True)"
    run = subprocess.Popen(
        [sys.executable, "-c", program, str(folder), str(stop), *options], cwd=ROOT, env=os.environ, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield run
    finally:
        run.kill()
        run.communicate()


def hears(run: subprocess.Popen, word: str) -> None:
    line = run.stdout.readline()
    assert line == f"{word}\n", (line, run.stderr.read() if run.poll() is not None else "it runs")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_fault_24_a_run_that_is_stopped_three_times_is_the_straight_run_to_the_last_bit(tmp_path):
    """It goes on after 1, 4 and 9 of 12 steps, each time in a new process. And row 25: what stops the second and the third
    part is a real signal from outside, before the step that is then finished."""
    states: dict[int, Any] = {}

    class Look(mpjax.Hook):
        def on_state(self, attempt, state):
            states[attempt + 1] = preempted.told(state)

    made = preempted.job()
    step = made.step()
    straight = preempted.train(tmp_path / "straight", made.batches, step, Look())
    logged = lines(tmp_path / "straight")
    scales = [line["step"]["loss_scale"] for line in logged if "step" in line]
    assert int(straight.state.skipped) == 2 and {2.0**10, 2.0**11} < set(scales)  # it shrank twice, and grew
    rates = [line["step"]["learning_rate"] for line in logged if "step" in line]
    assert len(set(rates)) == 10 and int(straight.state.step) == 10  # a skipped step does not move the schedule
    assert not np.array_equal(straight.state.ema["up"], straight.state.params["up"])
    held = {"step", "skipped", "skipped_in_a_row", "rng", "loss_scale/counter", "params/up", "ema/up", "mstate/mean"}
    assert held < set(states[12]) and any("mu/up" in path for path in states[12])

    def stopping(attempt):
        os.kill(os.getpid(), signal.SIGTERM)
        return made.batches(attempt)

    folder = tmp_path / "stopped"
    first = preempted.train(folder, stopping, step)
    assert (first.stopped, preempted.told(first.state)) == ("interrupted", states[1])
    for stop, number in ((4, signal.SIGINT), (9, signal.SIGTERM), (12, None)):
        with running(folder, stop) as run:
            hears(run, "waiting")
            if number is not None:
                run.send_signal(number)
            out, err = run.communicate("\n", timeout=120)
        assert run.returncode == 0 and "Traceback" not in err, err
        found = json.loads(out)
        assert found["stopped"] == ("done" if number is None else "interrupted")
        assert found["state"] == states[stop], [k for k, v in states[stop].items() if found["state"].get(k) != v]
        assert mpjax.Checkpointer(folder / "checkpoints").latest() == stop
        told = "" if number is None else f"{number.name}: finishing this step, then stopping; once more leaves at once"
        assert told in err
    assert states[12] == preempted.told(straight.state)
    assert lines(folder) == logged  # each step and evaluation once, in order, to the last bit
    assert (found["evaluations"], tuple(found["best"])) == (straight.evaluations, straight.best)


@SIGNALS
def test_fault_25_a_second_signal_leaves_at_once(number, tmp_path):
    """From a step that would never end: in compiled code, where Python hears nothing."""
    with running(tmp_path, 1, "endless") as run:
        hears(run, "waiting")
        run.send_signal(number)
        assert "once more leaves at once" in run.stderr.readline()
        run.stdin.write("\n")
        run.stdin.flush()
        hears(run, "endless")
        time.sleep(0.2)
        assert run.poll() is None
        run.send_signal(number)
        assert run.wait(timeout=5) == -number
    assert not (tmp_path / "checkpoints").exists()
