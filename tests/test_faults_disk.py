"""FAULTS 26 and 33: a disk that is full, read-only or broken, and two processes that save to one directory.

The kernel refuses, where it can be made to (a limit on the size of a file, a file where a folder should be); elsewhere the
call that would have failed is made to fail with the number that the kernel would have given.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mpjax.store import folders
from mpjax.store.checkpoint import Checkpointer
from mpjax.store.manifest import CheckpointError

ROOT = Path(__file__).parents[1]
SIZE = 100_000


def state(step: int) -> dict[str, np.ndarray]:
    """Random numbers: Orbax compresses others to nothing."""
    return {"w": np.random.default_rng(step).standard_normal(SIZE, np.float32), "n": np.array(2**24 + 1 + step)}


def assert_only(checkpointer: Checkpointer, steps: list[int], debris: int | None = 0) -> None:
    """No step is there but these, and each bit of them; None: how much else is left for the next save does not matter."""
    assert checkpointer.steps() == steps and checkpointer.latest() == max(steps)
    names = {path.name for path in checkpointer.directory.iterdir()}
    assert {".lock", *map(str, steps)} <= names
    assert debris is None or len(names) == 1 + len(steps) + debris
    for step in steps:
        for name, x in checkpointer.restore(state(0), step).items():
            assert x.dtype == state(step)[name].dtype and x.tobytes() == state(step)[name].tobytes()


@pytest.fixture(params=[False, True], ids=["synchronous", "asynchronous"])
def checkpointer(request, tmp_path):
    checkpointer = Checkpointer(tmp_path / "run", keep=2, asynchronous=request.param)
    checkpointer.save(state(1), 1)
    checkpointer.wait()
    return checkpointer


def save_and_wait(checkpointer: Checkpointer, step: int) -> None:
    checkpointer.save(state(step), step)
    checkpointer.wait()


def failing(monkeypatch, owner, name, number, when=lambda *args: True):
    """Let a function of the system fail with this number, for as long as the monkeypatch's context lasts."""
    function = getattr(owner, name)

    def fail(*args, **kwargs):
        if when(*args):
            raise OSError(number, os.strerror(number), *args[:1])
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail)


# When Orbax gives up, some of its writes may still be on their way: one that ends later finds no event loop, or the folder
# half removed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("room", [10_000, 300_000])
def test_fault_26_a_full_disk_while_orbax_writes(room, checkpointer):
    """No file may grow beyond `room`; the state takes 400,000 bytes. Python ignores SIGXFSZ, so that writing fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError) as raised:
            save_and_wait(checkpointer, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG
    assert_only(checkpointer, [1], debris=None)
    save_and_wait(checkpointer, 2)
    assert_only(checkpointer, [1, 2])


FAILURES = {
    "no lock": (Path, "open", errno.EROFS, lambda path, *mode: path.name == ".lock"),
    "no folder": (os, "mkdir", errno.ENOSPC, lambda path, *mode: ".saving-" in str(path)),
    "no metadata": (os, "fsync", errno.ENOSPC, lambda handle: True),
    "no rename": (os, "rename", errno.EROFS, lambda old, new: ".saving-" in str(old) and Path(new).name == "2"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_fault_26_a_full_or_read_only_disk_in_each_phase(failure, checkpointer, monkeypatch):
    with monkeypatch.context() as patch:
        failing(patch, *FAILURES[failure])
        with pytest.raises(OSError) as raised:
            save_and_wait(checkpointer, 2)
    assert raised.value.errno == FAILURES[failure][2]
    assert_only(checkpointer, [1])
    save_and_wait(checkpointer, 2)
    assert_only(checkpointer, [1, 2])


def test_fault_26_any_fsync_that_fails(tmp_path, monkeypatch):
    """Each in turn: of the metadata, of every file of Orbax, of the manifest, of each folder, of the directory."""
    checkpointer = Checkpointer(tmp_path)
    fsync, calls = os.fsync, []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: calls.append(os.readlink(f"/proc/self/fd/{handle}")) or fsync(handle))
        checkpointer.save(state(1), 1)
    assert calls[-1] == str(tmp_path) and {"meta.json", "manifest.json", "d"} <= {Path(name).name for name in calls}
    for n in range(len(calls)):
        with monkeypatch.context() as patch:
            turn = itertools.count()
            failing(patch, os, "fsync", errno.EIO, lambda handle, n=n, turn=turn: next(turn) == n)
            with pytest.raises(OSError) as raised:
                checkpointer.save(state(2), 2)
        assert raised.value.errno == errno.EIO
        assert sorted(os.listdir(tmp_path)) == [".lock", "1"]
    checkpointer.save(state(2), 2)
    assert_only(checkpointer, [1, 2])


def test_fault_26_an_old_step_that_cannot_be_removed(checkpointer, monkeypatch):
    """The new step is saved, and that the old one stays is told; what is left of it is no step."""
    save_and_wait(checkpointer, 2)
    with monkeypatch.context() as patch:
        failing(patch, shutil, "rmtree", errno.EIO, lambda path: ".removing-" in str(path))
        with pytest.raises(OSError, match="removing-1"):
            save_and_wait(checkpointer, 3)
    assert_only(checkpointer, [2, 3], debris=1)
    save_and_wait(checkpointer, 4)
    assert_only(checkpointer, [3, 4])


def test_fault_26_what_fails_beside_training_is_raised_by_the_next_call_whatever_it_is(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path, asynchronous=True)
    save_and_wait(checkpointer, 1)
    calls = {
        "wait": checkpointer.wait,
        "save": lambda: checkpointer.save(state(2), 2),
        "steps": checkpointer.steps,
        "latest": checkpointer.latest,
        "restore": lambda: checkpointer.restore(state(0)),
        "load": lambda: checkpointer.load(under="w"),
        "info": checkpointer.info,
    }
    assert calls.keys() == {name for name in vars(Checkpointer) if not name.startswith("_")}
    for call in calls.values():
        with monkeypatch.context() as patch:
            failing(patch, os, "rename", errno.EIO, lambda old, new: Path(new).name == "2")
            checkpointer.save(state(2), 2)  # returns
            checkpointer._thread.join()
        with pytest.raises(OSError) as raised:
            call()
        assert raised.value.errno == errno.EIO
        assert_only(checkpointer, [1])  # it is raised once
    save_and_wait(checkpointer, 2)
    assert_only(checkpointer, [1, 2])


@pytest.mark.parametrize("in_the_way", ["runs", "runs/7"], ids=["of its parent", "of the directory"])
def test_fault_26_a_file_in_the_place_of_a_folder(in_the_way, tmp_path):
    place = tmp_path / in_the_way
    place.parent.mkdir(exist_ok=True)
    place.write_text("mine")
    with pytest.raises(OSError):
        Checkpointer(tmp_path / "runs/7").save(state(1), 1)
    assert place.read_text() == "mine"


def test_fault_33_a_second_save_is_refused_and_the_first_completes(tmp_path):
    first, second = (Checkpointer(tmp_path, asynchronous=True) for _ in range(2))
    save_and_wait(first, 1)
    lock = folders.Lock(tmp_path)
    try:
        for step in (1, 2):
            with pytest.raises(CheckpointError, match=r"another save to .* is in progress, by another process"):
                second.save(state(step), step)
    finally:
        lock.close()
    save_and_wait(second, 2)
    assert_only(first, [1, 2])


TWO_PROCESSES = """
import json, os, sys
import numpy as np
from mpjax.store import folders
from mpjax.store.checkpoint import Checkpointer
from mpjax.store.manifest import CheckpointError

def no_locks(*args):
    raise OSError(37, "No locks available")

def save_all(who, directory, ready):  # first the steps that the other saves too, then some of its own
    checkpointer = Checkpointer(directory, keep=None)
    outcome = {"saved": [], "there": [], "busy": 0}
    os.read(ready, 1)
    for step in [*range(3), *range(10 + who, 14, 2)]:
        while step not in outcome["saved"] + outcome["there"]:
            try:
                checkpointer.save({"who": np.full(1000, who)}, step)
                outcome["saved"].append(step)
            except FileExistsError:
                outcome["there"].append(step)
            except CheckpointError as error:
                assert "another save" in str(error), error
                outcome["busy"] += 1
    return outcome

for locks in ("locks", "no locks"):
    if locks == "no locks":
        folders.fcntl.flock = no_locks
    (ready, go), *pipes = (os.pipe() for _ in range(3))
    for who, (_, writing) in enumerate(pipes):
        if os.fork() == 0:  # here no backend is started, so that forking is safe
            os.close(go)
            os.write(writing, json.dumps(save_all(who, os.path.join(sys.argv[1], locks), ready)).encode())
            os._exit(0)
    os.close(go)  # both begin
    assert [os.wait()[1] for _ in pipes] == [0, 0]
    print(json.dumps([json.loads(os.read(reading, 10**5)) for reading, _ in pipes]))
"""


def test_fault_33_two_processes_save_to_one_directory(tmp_path):
    """Each step is saved by exactly one, whole. Also where the file system knows no locks: there the rename decides."""
    run = subprocess.run([sys.executable, "-c", TWO_PROCESSES, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for locks, line in zip(("locks", "no locks"), run.stdout.splitlines(), strict=True):
        outcomes = json.loads(line)
        both, all_steps = [*range(3)], [*range(3), *range(10, 14)]
        assert sorted(outcomes[0]["saved"] + outcomes[1]["saved"]) == all_steps
        assert sorted(outcomes[0]["there"] + outcomes[1]["there"]) == both
        # They met: where there are locks, at least one save was refused while another was in progress.
        assert (outcomes[0]["busy"] + outcomes[1]["busy"] > 0) == (locks == "locks")
        checkpointer = Checkpointer(tmp_path / locks)
        assert checkpointer.steps() == all_steps
        for who, outcome in enumerate(outcomes):
            for step in outcome["saved"]:
                np.testing.assert_array_equal(checkpointer.restore({"who": np.zeros(1000, int)}, step)["who"], who)
        assert {path.name for path in checkpointer.directory.iterdir()} == {".lock", *map(str, all_steps)}


def test_fault_33_an_old_step_that_another_process_removed_first(tmp_path, monkeypatch):
    """Where the file system knows no locks, two may prune at once."""
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(state(1), 1)
    rename = os.rename

    def too_late(old, new):
        if ".removing-" in str(new):
            shutil.rmtree(old)
        rename(old, new)

    monkeypatch.setattr(os, "rename", too_late)
    checkpointer.save(state(2), 2)
    assert_only(checkpointer, [2])
