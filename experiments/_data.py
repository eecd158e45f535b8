"""Real data for the experiments, as numpy arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """Training and held-out examples, each a dict of arrays with a common leading axis."""

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]


def digits(seed: int, test_share: float = 0.2) -> Split:
    """scikit-learn's 1,797 handwritten digits: `image` float32 [n, 8, 8, 1] in [-1, 1], `label` int32 [n].

    They come with the package, so no network is needed. Source: E. Alpaydin and C. Kaynak, Optical Recognition of
    Handwritten Digits, UCI Machine Learning Repository (1998).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images.astype(np.float32) / 8 - 1)[..., None]
    order = np.random.default_rng(seed).permutation(len(images))
    held_out = int(len(images) * test_share)
    data = {"image": images[order], "label": bunch.target.astype(np.int32)[order]}
    return Split({k: v[held_out:] for k, v in data.items()}, {k: v[:held_out] for k, v in data.items()})
