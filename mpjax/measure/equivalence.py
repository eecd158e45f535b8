"""Whether paired results are alike within a margin: the two one-sided tests (TOST), and how many pairs would decide."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

MOST_SEEDS = 1000
"""Beyond so many, the number that would do is not looked for: nobody trains a thousand pairs to settle a margin."""


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """What paired differences say about a margin; made by `equivalence`.

    Args:
      verdict: `"equivalent"`, `"different"` or `"undecided"`.
      mean: of the differences; NaN where one of them is not finite.
      sd: their standard deviation (n − 1); NaN for one pair, or where one is not finite.
      interval: the (1 − 2·alpha) confidence interval of the mean; infinite where nothing is known.
      p_values: of the one-sided tests that reject "the true difference is ≤ −margin" and "… is ≥ margin". Equivalent
        when both are below alpha.
      seeds: how many pairs there are.
      margin, alpha: as given.
      seeds_needed: for an undecided verdict: how many pairs would decide it with the power asked for, if mean and spread
        stay as they were observed; 2 for a single pair, whose spread is unknown; None if not even `MOST_SEEDS` would,
        since the mean lies too close to the margin. None for the other verdicts.

    >>> equivalence([0.0, 0.1, -0.1], margin=1.0).verdict
    'equivalent'
    """

    verdict: str
    mean: float
    sd: float
    interval: tuple[float, float]
    p_values: tuple[float, float]
    seeds: int
    margin: float
    alpha: float
    seeds_needed: int | None = None


def equivalence(
    differences: Sequence[float] | np.ndarray, margin: float, alpha: float = 0.05, power: float = 0.8
) -> Equivalence:
    """Test paired differences for equivalence within a margin, and for a difference beyond it.

        interval = mean ± t(1 − alpha, n − 1) · sd / √n
        equivalent   the interval lies inside (−margin, margin): both one-sided t-tests reject at alpha
        different    it lies outside [−margin, margin]; or a difference is NaN or infinite: a run that diverged is a result
        undecided    anything else, and a single finite pair

    For normal differences a truth at or beyond the margin is called equivalent, and one at or within it different, at
    most alpha of the time. That holds for a number of pairs fixed beforehand: to look, add pairs and look again raises
    both rates, and so does skew (experiments/records/2026-11-24-parity-error-rates counts them). Where the differences are
    exactly equal there is no spread, and their value alone decides; on the margin itself it does not.

    Args:
      differences: one number a pair, in the units of the margin.
      margin: the largest difference that does not matter, > 0.
      alpha: of each one-sided test, in (0, 0.5).
      power: the probability of a decision that `seeds_needed` is to reach.

    Raises:
      ValueError: no differences, or a margin, alpha or power that is not legal.

    Source: Schuirmann, A comparison of the two one-sided tests procedure and the power approach for assessing the
    equivalence of average bioavailability (1987).

    >>> found = equivalence([0.3, 0.1, 0.2], margin=0.5)
    >>> found.verdict, round(found.mean, 3), [round(x, 3) for x in found.interval]
    ('equivalent', 0.2, [0.031, 0.369])
    >>> found = equivalence([0.3, 0.1, 0.2], margin=0.3)
    >>> found.verdict, found.seeds_needed
    ('undecided', 8)
    """
    values = np.asarray(differences, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(
            f"got differences of shape {values.shape}; legal is one number a pair, at least one; train a pair of seeds"
        )
    if not 0 < power < 1:
        raise ValueError(f"got power={power!r}; legal is a number between 0 and 1; 0.8 is customary")
    (verdict,) = verdicts(values[None], margin, alpha).tolist()
    seeds = values.size
    mean, sd, half = (float(x[0]) for x in _summary(values[None], alpha))
    needed = None
    if verdict == "undecided":
        needed = 2 if seeds == 1 else _seeds_needed(seeds, mean, sd, margin, alpha, power)
    interval = (mean - half, mean + half) if math.isfinite(half) else (-math.inf, math.inf)
    p_values = _p_values(mean, sd, seeds, margin)
    return Equivalence(verdict, mean, sd, interval, p_values, seeds, float(margin), float(alpha), needed)


def verdicts(differences_DxN: np.ndarray, margin: float, alpha: float = 0.05) -> np.ndarray:
    """The verdict on each row of paired differences, as `equivalence` gives it: what its error rates are counted on.

    Args:
      differences_DxN: rows of n differences each.
      margin, alpha: as in `equivalence`, which says what the verdicts mean.

    Returns:
      An array of D strings.

    >>> verdicts(np.array([[0.0, 0.1, -0.1], [2.0, 2.1, 1.9], [0.9, 1.1, 1.0]]), margin=1.0).tolist()
    ['equivalent', 'different', 'undecided']
    """
    if not 0 < margin < math.inf:
        raise ValueError(
            f"got margin={margin!r}; legal is a finite number > 0 in the units of the differences; give the largest "
            "difference that would not matter"
        )
    if not 0 < alpha < 0.5:
        raise ValueError(f"got alpha={alpha!r}; legal is a number between 0 and 0.5; 0.05 is customary")
    mean, _, half = _summary(differences_DxN, alpha)
    low, high = mean - half, mean + half
    diverged = ~np.isfinite(differences_DxN).all(-1)
    within, beyond = (low > -margin) & (high < margin), (low > margin) | (high < -margin)
    return np.select([diverged | beyond, within], ["different", "equivalent"], "undecided")


def decision_power(seeds: int, mean: float, sd: float, margin: float, alpha: float = 0.05) -> float:
    """How probable it is that so many normal differences decide, and rightly: that they are called what `mean` is.

        P(equivalent) = E over s of max(0, Φ((m − h(s) − mean)·√n/sd) − Φ((−m + h(s) − mean)·√n/sd)),  |mean| < m
        h(s) = t(1 − alpha, n − 1)·s/√n,  s² ~ sd²·χ²(n − 1)/(n − 1)

    The expectation is a mean over 500 equally likely values of s.

    Args:
      seeds: n ≥ 2.
      mean, sd: of the true differences, sd > 0.
      margin, alpha: as in `equivalence`.

    >>> round(decision_power(10, mean=0.0, sd=1.0, margin=1.0), 2)
    0.8
    """
    from scipy.special import chdtri, ndtr, stdtrit

    above = (np.arange(500) + 0.5) / 500
    s = sd * np.sqrt(chdtri(seeds - 1, above) / (seeds - 1))
    half = stdtrit(seeds - 1, 1 - alpha) * s / math.sqrt(seeds)

    def below(x: np.ndarray) -> np.ndarray:
        return ndtr((x - mean) * math.sqrt(seeds) / sd)

    if abs(mean) < margin:
        return float(np.maximum(below(margin - half) - below(half - margin), 0).mean())
    return float((1 - below(margin + half) + below(-margin - half)).mean())


def _seeds_needed(seeds: int, mean: float, sd: float, margin: float, alpha: float, power: float) -> int | None:
    """The smallest number above `seeds` that has the power, by bisection (power grows with it), or None."""

    def enough(n: int) -> bool:
        return decision_power(n, mean, sd, margin, alpha) >= power

    if seeds >= MOST_SEEDS or sd == 0 or not enough(MOST_SEEDS):
        return None
    few, many = seeds, MOST_SEEDS
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many


def _summary(differences_DxN: np.ndarray, alpha: float) -> tuple[Any, Any, Any]:
    """(mean, sd, half the width of the interval) of each row. One pair has no spread: sd NaN, half infinite."""
    from scipy.special import stdtrit

    count = differences_DxN.shape[-1]
    with np.errstate(invalid="ignore"):  # ∞ − ∞ of runs that diverged
        finite = np.isfinite(differences_DxN).all(-1)
        # Rounding gives equal numbers a mean beside them, and so a spread: they have none.
        equal = np.ptp(differences_DxN, -1) == 0
        mean = np.where(finite, np.where(equal, differences_DxN[..., 0], differences_DxN.mean(-1)), np.nan)
        if count == 1:
            return mean, np.full_like(mean, np.nan), np.full_like(mean, np.inf)
        sd = np.where(finite, np.where(equal, 0.0, differences_DxN.std(-1, ddof=1)), np.nan)
    half = stdtrit(count - 1, 1 - alpha) * sd / math.sqrt(count)
    return mean, sd, np.where(finite, half, np.inf)


def _p_values(mean: float, sd: float, seeds: int, margin: float) -> tuple[float, float]:
    """Of the tests against −margin and against margin; 1 where nothing is known, or the value lies on the margin."""
    from scipy.special import stdtr

    if not sd >= 0:
        return 1.0, 1.0
    if sd == 0:
        return float(mean <= -margin), float(mean >= margin)
    error = sd / math.sqrt(seeds)
    return float(stdtr(seeds - 1, -(mean + margin) / error)), float(stdtr(seeds - 1, (mean - margin) / error))
