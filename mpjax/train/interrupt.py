"""SIGTERM and Ctrl-C at a moment that does no harm."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from mpjax.core.processes import gather, post, posted, several

B = TypeVar("B")

logger = logging.getLogger("mpjax")

_runs = itertools.count()
"""Runs of this process: what makes the topic of one that was never used before."""


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

    Of several processes (`jax.distributed`) all stop before the same attempt, whichever of them was asked.
    """

    def __enter__(self) -> Interrupts:
        self.asked = False
        self._topic = f"stop/{next(_runs)}"
        self._last: int | None = None
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

    def stops(self, attempt: int) -> bool:
        """Whether to stop before this attempt.

        Several processes agree without waiting for one another. Who is asked before attempt n posts n + 2. Another looks
        before its n + 2 when it has read the metrics of n, which needed the first one's part in n, and that came later.
        """
        if not several():
            return self.asked
        if self._last is None and self.asked:
            post(self._topic, str(attempt + 2))
        if self._last is None and (word := posted(self._topic)) is not None:
            self._last = int(word)
        return self._last is not None and attempt >= self._last

    def agreed(self) -> bool:
        """Whether anybody asked to stop, once all steps are made.

        Raises:
          TimeoutError: another process did not come: its batches came to an end later, or it has failed.
        """
        return any(gather("stopped", "the end of a run's steps", "asked" if self.asked else ""))

    def between(self, batches: Iterable[B]) -> Iterator[B]:
        """The batches, as long as nobody asks to stop. Several processes see them all: they need one another for each.

        Raises:
          Stopped: somebody asked; in place of the next batch.
        """
        for batch in batches:
            if self.asked and not several():
                raise Stopped
            yield batch
