"""FAULTS 23, shrunk: no kill loses what was saved, and a Checkpointer that would lose it is found out."""

from __future__ import annotations

import collections
import json

import pytest

from experiments import store_kill


@pytest.fixture(autouse=True)
def logging_as_before():
    """The experiment silences Orbax for its process."""
    yield
    store_kill.logging.disable(store_kill.logging.NOTSET)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_fault_23_no_kill_loses_a_save(asynchronous, tmp_path):
    kills = 4 if asynchronous else 12
    config = store_kill.Config(kills=kills, leaves=3, asynchronous=asynchronous, workdir=str(tmp_path))
    rows = store_kill.main(config)
    hits = collections.Counter(row["hit"] for row in rows)
    assert all(hits[phase] >= kills // 4 for phase in ("data", "manifest", "rename", "prune"))
    assert [row["failures"] for row in rows] == [[]] * len(rows)
    folder = tmp_path
    assert json.loads((folder / "table.json").read_text()) == rows and (folder / "table.md").exists()
    assert not list(folder.glob("checkpoints-*"))


@pytest.mark.parametrize(
    ("broken", "phase", "seen"),
    [
        # In which file of a copy the kill comes is chance: a manifest cut off or not there, or one that is whole before
        # what it vouches for.
        ("copies", "rename", r"has the name of a step and is none|DamagedError|damaged: 1: |is missing"),
        ("hasty", "manifest", "was saved and is gone"),
    ],
)
def test_a_checkpointer_that_loses_saves_is_found_out(broken, phase, seen, tmp_path):
    config = store_kill.Config(kills=4, phases=(phase,), leaves=3, broken=broken, workdir=str(tmp_path))
    with pytest.raises(SystemExit, match=f"kills lost something, the first: .*({seen})"):
        store_kill.main(config)
