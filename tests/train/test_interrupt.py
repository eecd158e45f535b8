"""SIGTERM and SIGINT: the first is a wish, the second does what it did before, and nothing stays changed."""

from __future__ import annotations

import logging
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from mpjax.train.interrupt import Interrupts, Stopped

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)


@pytest.fixture
def handlers():
    """Sets handlers for the test alone; SIGINT is Python's own to begin with, whatever a shell lets children ignore."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda **handlers: [signal.signal(getattr(signal, name), handler) for name, handler in handlers.items()]
    for number, handler in before.items():
        signal.signal(number, handler)


def now() -> list:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@BOTH
def test_the_first_signal_is_a_wish_and_the_second_leaves_at_once(number, handlers, caplog):
    """In a script: there Ctrl-C is the system's from then on, which Python need not be asked for."""
    assert not hasattr(sys, "ps1")
    handlers(SIGTERM=signal.SIG_DFL)
    with Interrupts() as interrupts:
        assert not interrupts.asked
        signal.raise_signal(number)
        assert interrupts.asked and now() == [signal.SIG_DFL, signal.SIG_DFL]
    assert now() == [signal.default_int_handler, signal.SIG_DFL]
    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert said.getMessage() == f"{number.name}: finishing this step, then stopping; once more leaves at once"


@BOTH
def test_in_a_notebook_the_second_ctrl_c_is_an_ordinary_one(number, handlers, monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with Interrupts() as interrupts:
        signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert interrupts.asked
    assert now()[0] is signal.default_int_handler


@BOTH
def test_a_handler_of_the_users_hears_the_second_signal(number, handlers):
    heard = []
    mine = lambda number, _: heard.append(number)  # noqa: E731
    handlers(SIGTERM=mine, SIGINT=mine)
    with Interrupts() as interrupts:
        signal.raise_signal(number)
        assert interrupts.asked and heard == []
        signal.raise_signal(number)
    assert heard == [number] and now() == [mine, mine]


@BOTH
def test_without_a_signal_nothing_stays_changed_not_even_by_an_error(number, handlers):
    before = now()
    with pytest.raises(OSError, match="disk"), Interrupts() as interrupts:
        assert now() == [interrupts._note, interrupts._note] != before
        raise OSError("disk")
    assert now() == before and not interrupts.asked


@BOTH
def test_an_ignored_signal_stays_ignored(number, handlers):
    handlers(**{number.name: signal.SIG_IGN})
    with Interrupts() as interrupts:
        signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_IGN and not interrupts.asked
    assert signal.getsignal(number) is signal.SIG_IGN


def test_a_handler_that_is_not_pythons_is_left_alone(handlers, monkeypatch):
    really = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda n: None if n == signal.SIGTERM else really(n))
    before = really(signal.SIGTERM)
    with Interrupts():
        assert really(signal.SIGTERM) is before and really(signal.SIGINT) is not signal.default_int_handler


def test_another_thread_changes_nothing(handlers):
    def enter():
        with Interrupts() as interrupts:
            return now(), interrupts.asked

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() == (now(), False)


def test_a_worker_that_was_forked_is_left_to_what_was_there_before(handlers):
    heard = []
    handlers(SIGTERM=lambda number, _: heard.append(number))
    with Interrupts() as interrupts:
        interrupts._process += 1  # as a child sees it
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM] and not interrupts.asked


def test_batches_end_where_somebody_asks(handlers):
    seen = []
    with pytest.raises(Stopped), Interrupts() as interrupts:
        for batch in interrupts.between([0, 1, 2, 3]):
            seen.append(batch)
            if batch == 1:
                signal.raise_signal(signal.SIGINT)
    assert seen == [0, 1]
