"""A save or a restore of several processes: who does what alone, and how an error of one becomes an error of all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import numpy as np

from mpjax.core.processes import digest, gather, is_first, is_local, several
from mpjax.store.leaves import Leaf
from mpjax.store.manifest import CheckpointError

T = TypeVar("T")

_ERRORS: dict[str, Callable[[str], Exception]] = {
    "CheckpointError": CheckpointError,
    "FileExistsError": FileExistsError,
    "FileNotFoundError": FileNotFoundError,
    "OSError": OSError,
    "TimeoutError": TimeoutError,
    "TypeError": TypeError,
    "ValueError": ValueError,
}
"""What an error of another process is here; any other is a CheckpointError."""


class Together(NamedTuple):
    """The processes of a program at one directory. One process alone does what it is told, and nobody is asked.

    Args:
      topic: the directory: two of them may be saved to at once.
      seconds: how long a process waits for the others at each point where they meet.
    """

    topic: str
    seconds: float

    def all(self, about: str, action: Callable[[], T], same: Callable[[T], Mapping[str, str]] | None = None) -> T:
        """What the action gives here, once it was done everywhere.

        Args:
          about: what they meet for.
          action: what each process does.
          same: what must be alike on all, by name: digests of what the action gave.

        Raises:
          Exception: what went wrong here, or else what went wrong elsewhere.
          CheckpointError: what should be alike is not; it names it.
          TimeoutError: a process did not come.
        """
        if not several():
            return action()
        found, error = None, None
        try:
            found = action()
            word: dict[str, Any] = {"same": dict(same(found)) if same else {}}
        except Exception as caught:
            error, word = caught, _told(caught)
        words = self._meet(about, word)
        if error is not None:
            raise error
        _raise_elsewhere(about, words)
        if odd := sorted({name for word in words for name, _ in word["same"].items() ^ words[0]["same"].items()}):
            raise CheckpointError(
                f"the processes came to {about} with different {', '.join(odd[:8])}; legal is one state, alike on all: give "
                "each the same seed and place the state by mpjax.shard_state"
            )
        return found  # type: ignore[return-value]

    def first(self, about: str, action: Callable[[], str]) -> str:
        """What the action gives on process 0, which alone does it.

        Raises:
          Exception: what went wrong there, everywhere.
          TimeoutError: a process did not come.
        """
        if not several():
            return action()
        said, error = "", None
        if is_first():
            try:
                said = action()
            except Exception as caught:
                error = caught
        words = self._meet(about, {"said": said} if error is None else _told(error))
        if error is not None:
            raise error
        _raise_elsewhere(about, words)
        return words[0]["said"]

    def _meet(self, about: str, word: dict[str, Any]) -> list[dict[str, Any]]:
        topic = f"checkpoints/{quote(self.topic, safe='')}"
        return [json.loads(said) for said in gather(topic, about, json.dumps(word), self.seconds)]


def _told(error: Exception) -> dict[str, str]:
    kind = next(cls.__name__ for cls in type(error).__mro__ if cls.__name__ in _ERRORS or cls is Exception)
    return {"error": kind, "text": str(error)[:4000]}


def _raise_elsewhere(about: str, words: list[dict[str, Any]]) -> None:
    for process, word in enumerate(words):
        if "error" in word:
            kind = CheckpointError if word["error"] == "Exception" else _ERRORS[word["error"]]
            raise kind(f"process {process} failed at {about}: {word['text']}")


def alike(words: str, leaves: Mapping[str, tuple[Leaf, Any]]) -> dict[str, str]:
    """Digests of what every process must bring to a save alike: its `meta.json`, and each leaf that is not spread.

    A leaf that one process holds whole is written by process 0 alone: another value elsewhere would be lost.
    """
    told = {name: json.dumps(value) for name, value in json.loads(words).items() if name != "saved"}
    found = {name: digest(np.frombuffer(text.encode(), np.uint8)) for name, text in told.items()}
    for path, (leaf, x) in leaves.items():
        if leaf.is_stored and is_local(x):
            found[path] = digest(x)
    return found
