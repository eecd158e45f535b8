"""Names of runs, layers and metrics stand in pictures as they are written, though matplotlib sets formulas between dollars."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.cbook import is_math_text
from matplotlib.text import Text

from mpjax.measure.equivalence import equivalence
from mpjax.measure.paired import Pair, Run
from mpjax.measure.parity import Parity
from mpjax.measure.plots import (
    exponent_ranges,
    gradient_underflow,
    loss_scale_history,
    parity_curves,
    policy_by_layer,
    training_curves,
)
from mpjax.policy.resolution import Row

NAME = "$x_1$"
PAIRS = tuple(Pair(seed, Run(0.9, (2.0, 1.0)), Run(0.9, (2.0, 1.1))) for seed in range(2))
ROW = Row(NAME, "Dense", NAME, np.dtype("float32"), np.dtype("float16"), "full")
CURVES = {NAME: {"loss": [2.0, 1.0], NAME: [0.5]}, "b": {"loss": [2.0, 1.1]}}


@pytest.mark.parametrize("draw", [
    lambda: training_curves(CURVES, "x.png", metric=NAME),
    lambda: loss_scale_history({NAME: {"loss_scale": [2.0]}}, "x.png"),
    lambda: gradient_underflow([NAME], {NAME: [0.5]}, {}, "x.png"),
    lambda: exponent_ranges({"update": {f"{NAME}/{n}" + 40 * "x": {0: 1} for n in "ab"}}, "x.png"),
    lambda: policy_by_layer([ROW], "x.png"),
    lambda: parity_curves(Parity(NAME, NAME, NAME, 2, PAIRS, equivalence([0.0, 0.0], margin=1.0)), "x.png"),
])  # fmt: skip
def test_a_name_is_no_formula(draw, figures):
    draw()
    shown = [text.get_text() for text in figures[0].findobj(Text) if "x_1" in text.get_text()]
    assert shown and not any(map(is_math_text, shown))
