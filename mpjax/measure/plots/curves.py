"""The curves of runs, as plain data: their attempts, their skips, their looks, and the loss scale drawn over attempts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mpjax.measure.plots.figure import COLOURS, GREY, LINES, handle

Curves = Mapping[str, Any]
"""One run: `loss`, `loss_scale`, `skipped` (how many so far), … a number for each of its `attempt` (0, 1, … if absent)."""


def curve(run: Curves, key: str, at: str = "attempt") -> tuple[np.ndarray, np.ndarray]:
    """Attempts and values of one curve."""
    y = np.asarray(run[key], float)
    x = np.asarray(run.get(at, range(len(y))))
    if len(x) != len(y):
        raise ValueError(f"got {len(y)} values of {key!r} for {len(x)} of {at!r}; legal is one each; drop or add some")
    return x, y


def skipped_attempts(run: Curves) -> np.ndarray:
    """The attempts that were skipped: by `skipped_in_a_row`, or without it where the total grew from 0 on."""
    if "skipped_in_a_row" in run:  # of a resumed run the total does not begin at 0
        x, row = curve(run, "skipped_in_a_row")
        return x[row > 0]
    if "skipped" not in run:
        return np.array([], int)
    x, total = curve(run, "skipped")
    return x[np.diff(total, prepend=0) > 0]


def scaled_runs(runs: Mapping[str, Curves]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The loss scales worth a picture: a scale that is always 1 and never skipped says nothing."""
    scales = {name: curve(run, "loss_scale") for name, run in runs.items() if len(run.get("loss_scale", ()))}
    return {name: (x, y) for name, (x, y) in scales.items() if (y != 1).any() or len(skipped_attempts(runs[name]))}


def styles_of(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and line of each run; the first is the reference."""
    return {
        name: {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": LINES[i % len(LINES)],
            "linewidth": 1.5 if i else 3.0,  # the reference is seen below a curve that lies on it
        }
        for i, name in enumerate(names)
    }


def draw_scale(axes: Any, curves: Any, styles: Any, skips: Any, **_: Any) -> None:
    """Steps on a logarithmic axis, an x where a step was skipped: at the scale that was too large."""
    axes.set_yscale("log", base=2)
    for name, (x, y) in curves.items():
        axes.step(x, y, where="post", **styles[name])
        at = np.isin(x, skips[name])
        axes.plot(x[at], y[at], "x", color=styles[name]["color"], markersize=7, markeredgewidth=1.8)
    if any(map(len, skips.values())):
        mark = handle("skipped step", marker="x", linestyle="", color=GREY)
        axes.legend(handles=[mark], frameon=False, fontsize=8, loc="best")
    axes.margins(y=0.15)
    axes.set_title("loss scale")
    axes.set_ylabel("loss scale (log scale)")
