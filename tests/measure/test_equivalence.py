"""The equivalence test: against scipy's t-tests and numbers by hand, and what it promises against a simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from mpjax.measure.equivalence import MOST_SEEDS, decision_power, equivalence, verdicts

ROWS = np.random.default_rng(0).normal(0.2, 1.0, (60, 4))


def test_by_hand():
    """0.1, 0.2, 0.3: mean 0.2, sd 0.1; t(0.95, 2) = 2.919986 (a table), so half the interval is 0.1685855."""
    found = equivalence([0.1, 0.2, 0.3], margin=0.5)
    assert (found.verdict, found.seeds, found.margin, found.alpha) == ("equivalent", 3, 0.5, 0.05)
    np.testing.assert_allclose([found.mean, found.sd], [0.2, 0.1], rtol=1e-14)
    np.testing.assert_allclose(found.interval, [0.2 - 0.1685855, 0.2 + 0.1685855], atol=1e-7)
    assert found.seeds_needed is None
    # The verdict turns where the margin meets an end of the interval: 0.3685855 on one side, 0.0314145 on the other.
    sides = {0.3686: "equivalent", 0.3685: "undecided", 0.0315: "undecided", 0.0314: "different"}
    assert {margin: equivalence([0.1, 0.2, 0.3], margin).verdict for margin in sides} == sides


@pytest.mark.parametrize(("margin", "alpha"), [(1.0, 0.05), (0.5, 0.05), (2.0, 0.01), (0.05, 0.2)])
def test_it_is_two_one_sided_t_tests_of_scipy(margin, alpha):
    tests = [(bound, way) for bound in (-margin, margin) for way in ("greater", "less")]
    p_values = [scipy.stats.ttest_1samp(ROWS, bound, axis=1, alternative=way).pvalue for bound, way in tests]
    above_low, below_low, above_high, below_high = p_values
    within, beyond = np.maximum(above_low, below_high) < alpha, np.minimum(above_high, below_low) < alpha
    expected = np.select([within, beyond], ["equivalent", "different"], "undecided")
    assert verdicts(ROWS, margin, alpha).tolist() == expected.tolist() and len(set(expected)) >= 2
    for row, *each in zip(ROWS[:8], expected, above_low, below_high, strict=False):
        found = equivalence(row, margin, alpha)
        assert found.verdict == each[0]
        np.testing.assert_allclose(found.p_values, each[1:], rtol=1e-9, atol=1e-14)


def test_signs_and_units_do_not_matter():
    for row in ROWS[:8]:
        found = equivalence(row, 1.0)
        mirrored, scaled = equivalence(-row, 1.0), equivalence(8 * row, 8.0)  # powers of two round alike
        assert found.verdict == mirrored.verdict == scaled.verdict
        assert found.seeds_needed == mirrored.seeds_needed == scaled.seeds_needed
        assert mirrored.p_values == pytest.approx(found.p_values[::-1], rel=1e-9)
        assert mirrored.interval == tuple(-x for x in found.interval[::-1])
        assert scaled.interval == tuple(8 * x for x in found.interval)


@pytest.mark.parametrize(
    ("value", "verdict", "p_values"),
    [
        (0.0, "equivalent", (0, 0)),
        (0.1, "equivalent", (0, 0)),  # 0.1 five times has a mean beside 0.1 in floating point, and no spread
        (1.0, "undecided", (0, 1)),
        (-1.5, "different", (1, 0)),
    ],
)
def test_without_any_spread_the_value_decides(value, verdict, p_values):
    found = equivalence([value] * 5, margin=1.0)
    assert (found.verdict, found.sd, found.interval, found.p_values) == (verdict, 0, (value, value), p_values)
    assert found.seeds_needed is None  # on the margin itself no number would do


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_run_that_diverged_is_a_difference_and_never_dropped(bad):
    for row in ([bad], [0.0, bad, 0.0, 0.0], [bad, -bad]):
        found = equivalence(row, margin=1.0)
        assert found.verdict == "different" and math.isnan(found.mean) and math.isnan(found.sd)
        assert (found.interval, found.p_values) == ((-math.inf, math.inf), (1, 1))


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_one_seed_decides_nothing_and_two_are_the_least(value):
    found = equivalence([value], margin=1.0)
    assert (found.verdict, found.seeds_needed, found.interval) == ("undecided", 2, (-math.inf, math.inf))
    assert found.mean == value and math.isnan(found.sd)


# mean 0.2, sd 0.7; mean −0.75, sd 0.4 (both within 1); mean 1.5, sd 0.7 (beyond it)
@pytest.mark.parametrize("differences", [[0.9, 0.2, -0.5], [-0.35, -0.75, -1.15], [0.8, 1.5, 2.2]])
def test_too_few_seeds_are_told_a_number_and_that_number_decides(differences):
    found = equivalence(differences, margin=1.0)
    assert found.verdict == "undecided" and found.seeds_needed is not None and found.seeds_needed > 3
    right = "equivalent" if abs(found.mean) < 1 else "different"
    random, draws = np.random.default_rng(1), 20_000
    error = 4 * math.sqrt(0.8 * 0.2 / draws)

    def decided(seeds: int) -> float:
        rows = found.mean + found.sd * random.standard_normal((draws, seeds))
        return float((verdicts(rows, 1.0) == right).mean())

    assert decided(found.seeds_needed) > 0.8 - error
    assert decided(found.seeds_needed - 1) < 0.8 + error


def test_where_no_number_would_do_none_is_told():
    close = equivalence([0.9, 0.99, 1.07], margin=1.0)  # mean 0.987, sd 0.085: (z0.95 + z0.8)² (sd/0.013)² ≈ 250
    assert close.verdict == "undecided" and close.seeds_needed == pytest.approx(
        6.18 * (close.sd / 0.0133) ** 2, rel=0.02
    )
    nearer = equivalence([0.9, 1.0, 1.099], margin=1.0)
    assert nearer.verdict == "undecided" and nearer.seeds_needed is None
    many = np.random.default_rng(2).normal(1, 1, MOST_SEEDS)
    assert equivalence(many, margin=1.0).seeds_needed is None


def test_more_power_asks_for_more():
    few, many = (equivalence([0.9, 0.2, -0.5], 1.0, power=power).seeds_needed for power in (0.5, 0.95))
    assert few < many


@pytest.mark.parametrize(("seeds", "mean", "sd"), [(2, 0.0, 0.2), (5, 0.5, 0.5), (10, 2.0, 1.0), (10, -2.0, 1.0)])
def test_the_power_is_that_of_a_simulation(seeds, mean, sd):
    draws = 40_000
    rows = mean + sd * np.random.default_rng(3).standard_normal((draws, seeds))
    right = "equivalent" if abs(mean) < 1 else "different"
    simulated = float((verdicts(rows, 1.0) == right).mean())
    assert decision_power(seeds, mean, sd, 1.0) == pytest.approx(simulated, abs=4 * 0.5 / math.sqrt(draws))


@pytest.mark.parametrize(
    ("differences", "settings", "said"),
    [
        ([], {}, "shape .0,.; legal is one number a pair"),
        ([[0.0, 1.0]], {}, "shape .1, 2."),
        ([0.0], {"margin": 0.0}, "margin=0.0; legal is a finite number > 0"),
        ([0.0], {"margin": -1.0}, "margin=-1.0"),
        ([0.0], {"margin": math.nan}, "margin=nan"),
        ([0.0], {"margin": math.inf}, "margin=inf"),
        ([0.0], {"alpha": 0.5}, "alpha=0.5; legal is a number between 0 and 0.5"),
        ([0.0], {"alpha": 0.0}, "alpha=0.0"),
        ([0.0], {"power": 1.0}, "power=1.0; legal is a number between 0 and 1"),
    ],
)
def test_what_makes_no_sense_is_refused(differences, settings, said):
    with pytest.raises(ValueError, match=said):
        equivalence(np.array(differences), **{"margin": 1.0, **settings})
