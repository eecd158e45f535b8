"""Ctrl-C at a moment that does no harm."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Held:
    """Ctrl-C waits until the block is left.

    Thrown in between a dispatch and its assignment, it would lose the state that takes the donated one's place.
    """

    def __enter__(self) -> None:
        self.came = False
        # Only the main thread may set handlers; None is a handler that is not Python's.
        self.before = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
        if self.before is not None:
            signal.signal(signal.SIGINT, self._note)

    def _note(self, *_: Any) -> None:
        self.came = True

    def __exit__(self, *_: Any) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
        if self.came:
            signal.raise_signal(signal.SIGINT)
