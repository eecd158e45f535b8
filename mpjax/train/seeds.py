"""One seed, from which init, data order and rng follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mpjax.core.types import Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Seeds:
    """What follows from one seed; made by `seeds`.

    Args:
      seed: the seed itself.
      init: a key for `TrainState.create` (initial params, and the rng that steps fold their attempt into).

    >>> sorted(seeds(0).order(epoch=3, examples=4).tolist())
    [0, 1, 2, 3]
    """

    seed: int
    init: jax.Array = dataclasses.field(compare=False)  # it follows from the seed, and has no hash

    def order(self, epoch: int, examples: int) -> np.ndarray:
        """The permutation of `examples` indices in an epoch: numpy's PCG64 seeded with the pair (seed, epoch)."""
        return np.random.default_rng((self.seed, epoch)).permutation(examples)


def seeds(seed: int | np.integer) -> Seeds:
    """What is random in a run, from one number.

        init, rng:   jax.random.split(jax.random.key(seed))     as TrainState.create does with `seeds(seed).init`
        step n:      fold_in(rng, n), n = applied + skipped steps; micro-batch i: fold_in(fold_in(rng, n), i)
        data order:  epoch e: numpy.random.default_rng((seed, e)).permutation(examples)

    Raises:
      ValueError: not an int in [0, 2³²): beyond, jax keeps the low 32 bits, and two seeds would have one init.

    >>> seeds(7).order(0, 5).tolist() == seeds(7).order(0, 5).tolist() != seeds(7).order(1, 5).tolist()
    True
    """
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"got seed={seed!r}; legal is an int from 0 to 2**32 - 1; 0 is as good as any")
    return Seeds(int(seed), jax.random.key(int(seed)))


def epoch_batches(data: PyTree, batch_size: int, seeds: Seeds) -> Callable[[int], Batch]:
    """From attempt to batch: each epoch a new permutation of the data, its incomplete last batch left out.

    Pure in (seed, attempt): a run that is resumed at attempt n sees the data that it would have seen.

    Args:
      data: a pytree of numpy arrays with a common leading axis.
      batch_size: rows a batch.
      seeds: the run's.

    Raises:
      ValueError: leading axes differ, or there are fewer rows than a batch has.

    >>> batches = epoch_batches({"x": np.arange(5)}, 2, seeds(0))
    >>> sorted([*batches(0)["x"], *batches(1)["x"]]) == sorted(seeds(0).order(0, 5)[:4])
    True
    """
    rows = {np.shape(x)[0] if np.ndim(x) else 0 for x in jax.tree.leaves(data)}
    if len(rows) != 1 or not 1 <= batch_size <= min(rows):
        raise ValueError(
            f"got arrays of {sorted(rows)} rows and batch_size={batch_size}; legal is one number of rows and a batch of "
            "1 to that many"
        )
    examples = rows.pop()
    per_epoch = examples // batch_size
    memory: dict[int, np.ndarray] = {}  # the permutation in use, so that each epoch is permuted once

    def batch(attempt: int) -> Any:
        epoch, index = divmod(attempt, per_epoch)
        if epoch not in memory:
            memory.clear()
            memory[epoch] = seeds.order(epoch, examples)
        chosen = memory[epoch][index * batch_size : (index + 1) * batch_size]
        return jax.tree.map(lambda x: x[chosen], data)

    return batch
