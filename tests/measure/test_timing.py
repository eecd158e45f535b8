"""Blocks of calls on a clock that the test winds."""

from __future__ import annotations

import itertools

import pytest

from mpjax.measure.timing import Timing, time_blocks


def clock_of(*block_seconds):
    """A clock that is read before and after each block."""
    ticks = itertools.accumulate(x for seconds in block_seconds for x in (100.0, seconds))
    return lambda: next(ticks)


def test_a_block_is_divided_among_its_calls():
    calls = []
    found = time_blocks(lambda: calls.append(0), warmup=2, blocks=3, calls=4, clock=clock_of(8, 2, 4))
    assert found.seconds == (2.0, 0.5, 1.0)
    assert len(calls) == 2 + 3 * 4


def test_only_the_end_of_a_block_is_waited_for(monkeypatch):
    waited, calls = [], itertools.count()
    monkeypatch.setattr("jax.block_until_ready", waited.append)
    time_blocks(lambda: next(calls), warmup=2, blocks=2, calls=3, clock=clock_of(1, 1))
    assert waited == [1, 4, 7]


def test_median_and_quartiles_by_hand():
    found = Timing((5.0, 1.0, 2.0, 4.0, 100.0))
    assert (found.median, found.quartiles) == (4.0, (2.0, 5.0))
    assert Timing((1.0, 2.0)).quartiles == (1.25, 1.75)


@pytest.mark.parametrize("name", ["warmup", "blocks", "calls"])
def test_nothing_to_time_is_refused(name):
    counts = {"warmup": 1, "blocks": 1, "calls": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"got 0 for {name}; legal is an int ≥ 1"):
        time_blocks(lambda: None, **counts)
