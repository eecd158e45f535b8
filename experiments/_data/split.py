"""What every loader gives."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """Training and held-out examples, each a dict of arrays with a common leading axis."""

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
