"""The one batch that every side of a work gets, from the seed, as numpy arrays."""

from __future__ import annotations

import numpy as np

from experiments.bench.rows import GPT, ResNet


def tokens(work: GPT, seed: int) -> np.ndarray:
    """int32 `[batch, context + 1]`, uniform: the targets are the tokens that follow."""
    return np.random.default_rng(seed).integers(work.vocabulary, size=(work.batch, work.context + 1), dtype=np.int32)


def pictures(work: ResNet, seed: int) -> dict[str, np.ndarray]:
    """float32 `image [batch, size, size, 3]`, normal, and int32 `label [batch]`."""
    random = np.random.default_rng(seed)
    image = random.standard_normal((work.batch, work.size, work.size, 3), np.float32)
    return {"image": image, "label": random.integers(work.classes, size=work.batch, dtype=np.int32)}
