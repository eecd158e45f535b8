"""The simulation, shrunk: it counts what is promised for normal differences, and sees what skew does to it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from experiments import parity_error_rates


@pytest.mark.parametrize("law", parity_error_rates.LAWS)
def test_each_law_has_mean_0_and_sd_1(law):
    """t with 3 degrees of freedom has no fourth moment: its sample variance comes slowly, and is held more loosely."""
    z = parity_error_rates.draw(law, np.random.default_rng(0), (400, 1000))
    assert z.mean() == pytest.approx(0, abs=5 / math.sqrt(z.size))
    assert z.std() == pytest.approx(1, abs=0.1 if law == "heavy tails" else 0.01)
    skew = (z**3).mean()
    assert law == "heavy tails" or skew == pytest.approx({"skewed up": 2, "skewed down": -2}.get(law, 0), abs=0.2)


def test_normal_differences_keep_alpha_and_skewed_ones_do_not(tmp_path):
    draws = 4000
    config = parity_error_rates.Config(draws=draws, pilots=20, seeds=(3, 10), spreads=(0.5, 1.0), workdir=str(tmp_path))
    tables = parity_error_rates.main(config)
    at_most = 5 + 4 * 100 * math.sqrt(0.05 * 0.95 / draws)
    normal = [row for row in tables["equivalent"] if row["law"] == "normal"]
    assert len(normal) == 4 and all(row["at 1 (%)"] <= at_most and row["at 2 (%)"] < 1 for row in normal)
    assert max(row["at 1 (%)"] for row in tables["equivalent"] if row["law"] == "skewed up") > 10
    assert all(row["at 1 (%)"] <= at_most for row in tables["different"] if row["law"] == "normal")
    for row in tables["needed"]:
        assert row["simulated (%)"] == pytest.approx(row["computed (%)"], abs=4 * 50 / math.sqrt(draws))
        assert row["simulated (%)"] > 80 - 4 * 50 / math.sqrt(draws)
    for row in tables["looks"]:
        assert row["one look (%)"] <= row["three looks (%)"]
    folder = tmp_path
    assert json.loads((folder / "table.json").read_text()) == tables
    assert "## looks" in (folder / "table.md").read_text()
