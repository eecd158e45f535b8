"""What stands beside the arrays of a checkpoint: which leaves, which policy, which versions, and what the caller adds."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mpjax.policy.written import policy_to_words
from mpjax.store.leaves import Leaf, leaf_from_words, leaf_to_words
from mpjax.store.manifest import DamagedError

META = "meta.json"


class CheckpointInfo(NamedTuple):
    """What a step says of itself.

    >>> CheckpointInfo(5, "2026-01-01T00:00:00+00:00", None, {"python": "3.12.1"}, {}, {}).step
    5
    """

    step: int
    """Its number. The next batch of a run is the one of this index."""
    saved: str
    """When, in UTC, as ISO 8601."""
    policy: dict[str, Any] | None
    """The policy map in words, see `mpjax.policy.written`."""
    versions: dict[str, str]
    """Of Python and the libraries that wrote it."""
    extra: dict[str, Any]
    """What the caller gave beside the state."""
    leaves: dict[str, Leaf]
    """From canonical path to dtype, shape and spelling."""


def meta_text(step: int, leaves: Iterable[Leaf], policy: Any, extra: Mapping[str, Any] | None) -> str:
    """The text of `meta.json`.

    Raises:
      TypeError: `extra` is not JSON.
    """
    words = {
        "step": step,
        "data_position": step,
        "saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "policy": None if policy is None else policy_to_words(policy),
        "versions": _versions(),
        "extra": dict(extra or {}),
        "leaves": [leaf_to_words(leaf) for leaf in leaves],
    }
    try:
        return json.dumps(words, indent=1) + "\n"
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"extra cannot be written: {error}; legal is what JSON can say: make it numbers and strings"
        ) from error


def read_meta(folder: Path) -> CheckpointInfo:
    """What `meta_text` wrote into a step's folder.

    Raises:
      DamagedError: it cannot be read, or is another step's.
    """
    try:
        words = json.loads((folder / META).read_text(encoding="utf-8"))
        leaves = [leaf_from_words(leaf) for leaf in words["leaves"]]
        if str(words["step"]) != folder.name:
            raise ValueError(f"it is step {words['step']}, in the folder of another")
        return CheckpointInfo(
            words["step"], words["saved"], words["policy"], words["versions"], words["extra"],
            {leaf.path: leaf for leaf in leaves},
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{folder.name}: {META} cannot be read: {error}") from error


@functools.cache
def _versions() -> dict[str, str]:
    names = ("mpjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that was never installed
            found[name] = "not installed"
    return found
