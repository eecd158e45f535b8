"""Two processes of one host, by `jax.distributed`: they train, save, restore, stop together; if one is killed, the other ends too.

The program of both is `tests/together.py`. What they give is compared with one process that has four devices.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import mpjax
from tests import together
from tests.together import DEVICES, HEARTBEAT, RULES, SPOILED, STEPS

ROOT = Path(__file__).parents[1]
END = HEARTBEAT + 14
"""Seconds within which the other process must have ended: jax's own wait, and some more for a machine that is busy."""

LONGEST = 150.0
"""Seconds after which a pair is ended whatever it does."""


@contextlib.contextmanager
def pair(scenario: str, folder: Path, environment: dict[str, str]) -> Iterator[list[subprocess.Popen]]:
    """Both processes, on a port that is theirs: this socket holds it, and shares it with the service that listens there."""
    flags = [environment.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={DEVICES // 2}"]
    environment = os.environ | environment | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(socket.socket(socket.AF_INET6))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("::", 0))
        found = []
        for process in range(2):
            command = [sys.executable, "-m", "tests.together", scenario, str(folder), str(held.getsockname()[1])]
            run = subprocess.Popen(
                [*command, str(process)], cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=stack.enter_context((folder / f"stderr-{process}").open("w")),
            )  # fmt: skip
            found.append(run)
            stack.callback(run.communicate)
            stack.callback(run.kill)
        # Of a hang the test is to fail, not to hang.
        watch = threading.Timer(LONGEST, lambda: [run.kill() for run in found])
        watch.start()
        stack.callback(watch.cancel)
        yield found


def hears(run: subprocess.Popen) -> Any:
    """The next JSON object that a process says, or "now"."""
    for line in run.stdout:
        if line == "now\n" or line.startswith("{"):
            return line.strip() if line == "now\n" else json.loads(line)
    raise AssertionError(f"process {run.args[-1]} has ended: {complaint(run)}")


def complaint(run: subprocess.Popen) -> str:
    """What a process has written to stderr, the end of it."""
    return Path(run.args[-3], f"stderr-{run.args[-1]}").read_text()[-3000:]


class Death(NamedTuple):
    """What came of it that one was killed: how the other ended, after how long, and with which words."""

    code: int
    seconds: float
    words: str


def kill(runs: list[subprocess.Popen], victim: int) -> Death:
    runs[victim].kill()
    since, other = time.monotonic(), runs[1 - victim]
    code = other.wait(timeout=END)
    return Death(code, time.monotonic() - since, complaint(other))


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_environment) -> tuple[Path, list[dict[str, Any]], dict[str, Any], Death]:
    """Where two processes worked together, what each said of it, the state that they saved last, and the end of the second."""
    folder = tmp_path_factory.mktemp("together") / "run"
    with pair("everything", folder, quick_environment) as runs:
        mpjax.Checkpointer(folder / "of_one").save(together.make(jax.random.key(5)), 1)
        found = [hears(one) for one in runs]
        state = hears(runs[1])
        assert hears(runs[1]) == "now"
        return folder, found, state, kill(runs, 1)


@pytest.fixture(scope="module")
def both(run) -> tuple[Path, list[dict[str, Any]]]:
    return run[:2]


@pytest.fixture(scope="module")
def alone() -> mpjax.FitResult:
    """The same run by one process on as many devices."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    state = mpjax.shard_state(together.make(jax.random.key(3)), mesh, RULES)
    return mpjax.fit(
        together.step_on(mesh), state, lambda n: mpjax.shard_batch(together.batch(n), mesh), attempts=STEPS
    )


@pytest.mark.slow
def test_they_train_as_one_process_does_and_agree_on_every_metric(both, alone):
    (_, (first, second)) = both
    assert repr(first["history"]) == repr(second["history"])  # by repr NaN is NaN
    assert (first["evaluations"], first["best"]) == (second["evaluations"], second["best"])
    assert [one["attempt"] for one in first["evaluations"]] == [3, 6]
    assert first["state"] == second["state"] and first["spread"] == "P(None, 'data')"
    assert [row["skipped"] for row in first["history"]] == [0] * SPOILED + [1] * (STEPS - SPOILED)
    for there, here in zip(first["history"], alone.history, strict=True):
        exact = ("attempt", "skipped", "skipped_in_a_row", "loss_scale", "grads_finite")
        assert [there[name] for name in exact] == [here[name] for name in exact]
        # The sums over devices are taken in another order: each of the sums of four terms may round otherwise, and the
        # compute dtype is float16.
        np.testing.assert_allclose(there["loss"], here["loss"], rtol=4 * float(np.finfo(np.float16).eps))


@pytest.mark.slow
def test_a_state_is_made_alike_by_placing_and_where_it_lies(both):
    for found in both[1]:
        assert found["made_apart"][0] == found["made_apart"][1]


@pytest.mark.slow
def test_rows_of_their_own_become_the_whole_batch_on_any_mesh(both):
    whole = together.digests(jax.tree.map(jax.numpy.asarray, together.batch(0)))
    for found in both[1]:
        assert found["placed"] == [whole, whole]


@pytest.mark.slow
def test_what_two_save_comes_back_to_the_byte_on_two_and_on_one(both):
    folder, found = both
    checkpointer = mpjax.Checkpointer(folder / "run")
    assert checkpointer.steps() == [2, 4, 6]
    like = together.make(jax.random.key(0))
    assert [one["restored"] for one in found] == [found[0]["state"]] * 2
    assert together.digests(checkpointer.restore(like)) == found[0]["state"]
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    spread = checkpointer.restore(mpjax.shard_state(like, mesh, RULES))
    assert together.digests(spread) == found[0]["state"]
    assert not list((folder / "run").glob(".saving-*"))


@pytest.mark.slow
def test_what_one_saves_comes_back_to_the_byte_on_two(both):
    folder, found = both
    state = together.make(jax.random.key(5))
    loaded = mpjax.Checkpointer(folder / "of_one").load(1)
    for one in found:
        assert one["of_one"] == together.digests(state)
        assert one["loaded"] == {path: x.tolist() for path, x in loaded.items()}


@pytest.mark.slow
def test_a_save_beside_training_holds_what_is_not_spread(both):
    for found in both[1]:
        assert found["beside"] == [[0, 1, 2], {"who": "both"}]
        assert found["steps"] == [1, 3]  # and nothing of 2, which was refused each time


@pytest.mark.slow
def test_what_is_refused_is_refused_on_both(both):
    begins = {
        "twice": ("FileExistsError", "step 1 is already in"),
        "own": ("CheckpointError", "different own; legal is one state"),
        "extra": ("CheckpointError", "different extra; legal"),
        "string": ("TypeError", "own is a str, which a checkpoint does not hold"),
        "nonfinite": ("CheckpointError", "the state is not finite, in params/down, params/up"),
        "seed": ("ValueError", "different values at ema/up, params/up, rng; legal is one state"),
        "rows": ("ValueError", "3 rows of this process, which its 2 parts of mesh axis 'data' cannot share evenly"),
        "misfit": ("CheckpointError", "more: not in the checkpoint"),
        "none": ("FileNotFoundError", "no step in"),
        "poisoned": ("NonFiniteError", "gradient leaf: down; batch/y holds nan before the step begins"),
        "disk": ("OSError", "no space left on device"),
    }
    for found in both[1]:
        assert found["refused"].keys() == begins.keys()
        for name, (kind, words) in begins.items():
            assert found["refused"][name].startswith(f"{kind}: ") and words in found["refused"][name], name
    assert "process 1 failed at a save into" in both[1][0]["refused"]["string"]


@pytest.mark.slow
def test_a_signal_to_one_stops_both_before_the_same_attempt(both):
    """Process 1 alone is asked; both save the step at which they stopped."""
    first, second = (found["stopped"] for found in both[1])
    assert first == second and first[0] == "interrupted" and 1 <= first[1] < 50 and first[1] == first[2]


@pytest.mark.slow
def test_what_all_would_write_is_written_once(both):
    folder, _ = both
    lines = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    assert [line["attempt"] for line in lines if "step" in line] == list(range(STEPS))
    assert [line["attempt"] for line in lines if "eval" in line] == [3, 6]
    manifests = json.loads((folder / "run/6/manifest.json").read_text())["files"]
    assert any("ocdbt.process_0" in name for name in manifests) and any("ocdbt.process_1" in name for name in manifests)


def is_whole(folder: Path, state: dict[str, str]) -> bool:
    """Whether step 2 is there and nothing else, and holds this; and another run can save."""
    checkpointer, like = mpjax.Checkpointer(folder), together.make(jax.random.key(0))
    whole = checkpointer.steps() == [2] and together.digests(checkpointer.restore(like)) == state
    checkpointer.save(like, 3)  # the lock went with its process
    return whole and not list(folder.glob(".saving-*"))


@pytest.mark.slow
def test_one_is_killed_between_two_steps_and_the_other_ends_with_an_error(run):
    folder, _, state, death = run
    assert death.code != 0 and death.seconds < END and "another task died" in death.words
    assert is_whole(folder / "killed", state)


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "victim"), [("writing", 1), ("sealing", 0), ("sealing_beside", 0)])
def test_one_is_killed_while_they_save_and_the_other_ends_with_an_error(scenario, victim, tmp_path, quick_environment):
    """Before its part of the arrays is written, and before all is sealed, also while both train on: the step is none, the
    one before it is whole."""
    with pair(scenario, tmp_path / "run", quick_environment) as runs:
        state = hears(runs[victim])
        assert hears(runs[victim]) == "now"
        assert list((tmp_path / "run/killed").glob(".saving-4-*"))
        death = kill(runs, victim)
    assert death.code != 0 and death.seconds < END and "another task died" in death.words
    assert is_whole(tmp_path / "run/killed", state)


def test_rows_of_its_own_are_all_rows_where_there_is_one_process():
    mesh = jax.make_mesh((8,), ("data",))
    batch = {
        "x": np.arange(32.0, dtype=np.float32).reshape(16, 2),
        "half": jax.numpy.ones(16, "bfloat16"),
        "label": np.arange(16),  # of 64 bits
        "temperature": np.float32(0.5),
    }
    whole, own = (mpjax.shard_batch(batch, mesh, process_local=local) for local in (False, True))
    for name in batch:
        assert own[name].sharding == whole[name].sharding and own[name].dtype == whole[name].dtype
        np.testing.assert_array_equal(own[name], whole[name])
    with pytest.raises(ValueError, match=r"batch\[x\] has 12 rows of this process, .* use a multiple of 8"):
        mpjax.shard_batch({"x": np.ones((12, 2))}, mesh, process_local=True)
    with pytest.raises(ValueError, match="which this mesh lacks"):
        mpjax.shard_batch(batch, mesh, "rows", process_local=True)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_a_timeout_that_is_none_is_refused(seconds, tmp_path):
    with pytest.raises(ValueError, match="legal are seconds above 0"):
        mpjax.Checkpointer(tmp_path, timeout=seconds)
