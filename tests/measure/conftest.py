"""What the tests of pictures share."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpjax.measure.plots import exponents, parity, policy, scale, training, underflow


@pytest.fixture
def figures(monkeypatch):
    """The figures that would have been saved."""
    seen = []

    def keep(figure, path):
        seen.append(figure)
        return Path(path)

    for room in (exponents, parity, policy, scale, training, underflow):
        monkeypatch.setattr(room, "save", keep)
    return seen
