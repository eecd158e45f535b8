"""What the builders of the JAX sides hand out."""

from __future__ import annotations

from typing import Any, NamedTuple


class Program(NamedTuple):
    """A step and what it is called with.

    Args:
      step: `step(state, batch) -> (state, {"loss": …})`, jitted, donating the state; has `lower`.
      state: where it begins.
      batch: on the device.
    """

    step: Any
    state: Any
    batch: Any
