"""SIGTERM and Ctrl-C at a moment that does no harm."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

B = TypeVar("B")

logger = logging.getLogger("mpjax")


class Stopped(Exception):
    """An evaluation is left between two of its batches."""


class Interrupts:
    """While it is open, a first SIGTERM or SIGINT is a wish, to be read as `asked`; a second one leaves at once.

    Thrown in between a dispatch and its assignment, Ctrl-C would lose the state that takes the donated one's place; and a
    SIGTERM would end the process with it. After the first signal both do again what they did before. Only, in a script
    Python's own Ctrl-C becomes the system's, which ends the process also while compiled code runs.

    Python hears a signal between two of its own instructions: what comes while compiled code runs is heard when that
    returns, and twice the same counts once.

    Nothing is changed outside the main thread, which alone may set handlers, nor for a signal that is ignored or whose
    handler is not Python's.
    """

    def __enter__(self) -> Interrupts:
        self.asked = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            # Ctrl-C first: thrown in before its handler is set, it finds nothing to put back.
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, _: Any) -> None:
        self.__exit__()
        if os.getpid() != self._process:  # a data loader's worker, forked from here: it is not ours to keep alive
            signal.raise_signal(number)
            return
        self.asked = True
        interactive = hasattr(sys, "ps1") or sys.flags.interactive
        if self._before.get(signal.SIGINT) is signal.default_int_handler and not interactive:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        with contextlib.suppress(RuntimeError):  # it came in the middle of another write to the same stream
            name = signal.Signals(number).name
            logger.warning("%s: finishing this step, then stopping; once more leaves at once", name)

    def between(self, batches: Iterable[B]) -> Iterator[B]:
        """The batches, as long as nobody asks to stop.

        Raises:
          Stopped: somebody asked; in place of the next batch.
        """
        for batch in batches:
            if self.asked:
                raise Stopped
            yield batch
