"""XLA flags: added to what is set, never over it, in time or not at all, and without jax."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpjax.policy import xla_flags as room
from mpjax.policy.xla_flags import FLAGS, Flag, xla_flags

RECORDS = Path(__file__).parent.parent.parent / "experiments" / "records"


@pytest.fixture
def two(monkeypatch):
    """A chip with two flags, before jax has started."""
    flags = (Flag("xla_gpu_one", "true", "Does one.", "2026"), Flag("xla_gpu_two", "2", "Does two.", "2026"))
    monkeypatch.setitem(FLAGS, "chip", flags)
    monkeypatch.setattr(room, "_started", lambda: False)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "--xla_gpu_one=true --xla_gpu_two=2"),
        ("--xla_dump_to=x  --other=1", "--xla_dump_to=x  --other=1 --xla_gpu_one=true --xla_gpu_two=2"),
        ("--xla_gpu_two=3", "--xla_gpu_two=3 --xla_gpu_one=true"),
        ("--xla_gpu_one --xla_gpu_two=2", "--xla_gpu_one --xla_gpu_two=2"),
        ("--xla_gpu_one_more=1", "--xla_gpu_one_more=1 --xla_gpu_one=true --xla_gpu_two=2"),
    ],
)
def test_flags_are_added_and_the_users_own_win(given, expected, monkeypatch):
    assert xla_flags("chip", given) == expected
    monkeypatch.setenv("XLA_FLAGS", given)
    assert xla_flags("chip") == expected == xla_flags("chip", expected)  # twice is once
    assert os.environ["XLA_FLAGS"] == given  # it sets nothing


def test_without_any_it_is_empty(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setitem(FLAGS, "chip", ())
    assert xla_flags("chip") == ""


def test_an_unknown_chip_is_told_the_known_ones():
    with pytest.raises(ValueError, match=r"got the chip 'H100', .* legal are h100, h200"):
        xla_flags("H100")


def test_a_file_of_flags_is_not_written_over():
    with pytest.raises(ValueError, match="which XLA reads as the name of a file; legal are flags"):
        xla_flags("h100", "flags.txt")


PROGRAM = """
import os, sys
import mpjax
from mpjax.policy import xla_flags as room
flags = " ".join(mpjax.xla_flags(chip) for chip in room.FLAGS).strip()
assert flags.startswith("--")
assert not {"jax", "numpy", "flax"} & set(sys.modules), "it loaded jax"
os.environ["XLA_FLAGS"] = flags
import jax
room.FLAGS["new"] = (room.Flag("xla_gpu_one", "true", "Does one.", "2026"),)
assert mpjax.xla_flags("new").endswith("--xla_gpu_one=true")  # imported is not started
jax.devices()  # a flag that this jaxlib does not know ends the process here
assert mpjax.xla_flags("h200") == flags  # it is all set: nothing came too late
try:
    mpjax.xla_flags("new")
except RuntimeError as error:
    print(error)
"""


def test_it_loads_no_jax_and_says_when_it_came_too_late():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("--xla_gpu_one=true came when jax's backend had started already")


def test_each_flag_says_what_it_does_and_where_that_was_measured():
    for chip, flags in FLAGS.items():
        assert len({flag.name for flag in flags}) == len(flags), chip
        for flag in flags:
            assert flag.does.endswith(".") and (RECORDS / flag.record / "README.md").is_file(), flag
