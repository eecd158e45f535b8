"""Whether a policy trains to the same place: curves with bands over seeds, and the paired differences at the end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mpjax.measure.parity import Parity
from mpjax.measure.plots.figure import COLOURS, GREY, LINES, handle, head, literal, new_figure, plain, save

BAND = "#009E73"


def parity_curves(result: Parity, path: str | Path, *, title: str | None = None) -> Path:
    """Draw the training loss of both policies over seeds, and their paired differences in the final metric.

    Left: the median of the loss, and a band from the least to the largest, over the seeds; only what is finite counts.
    Right: a point a seed; the mean with its confidence interval; the margin as a green band; and beside it, in grey, the
    standard deviation between the reference's own seeds, to both sides of zero (beyond the axis if it is much the largest,
    and then told in numbers). An x at the worse edge stands for a
    candidate that diverged.

    Args:
      result: from `mpjax.parity`.
      path: of the PNG; its folder is made.
      title: what stands above; by default the verdict.

    Returns:
      The path.

    Raises:
      ImportError: matplotlib is not installed; it comes with `mpjax[experiments]`.

    >>> import tempfile
    >>> from mpjax.measure.equivalence import equivalence
    >>> from mpjax.measure.paired import Pair, Run
    >>> pairs = tuple(Pair(s, Run(0.9, (2.0, 1.0)), Run(0.9, (2.0, 1.1))) for s in range(2))
    >>> result = Parity("float32", "bfloat16", "accuracy", 2, pairs, equivalence([0.0, 0.0], margin=0.01))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     parity_curves(result, f"{folder}/a.png").name
    'a.png'
    """
    figure = new_figure(10.6, 4.2 + 0.06 * len(result.pairs))
    for axes, draw in zip(figure.subplots(1, 2), (_draw_curves, _draw_differences), strict=True):
        plain(axes)
        draw(axes, result)
    unit, word = _unit(result)
    margin = f"margin ±{unit * result.test.margin:g}{word}"
    handles = [
        handle(f"{result.reference} (reference)", color=COLOURS[0], linewidth=3.0),
        handle(result.candidate, color=COLOURS[1], linewidth=1.5, linestyle=LINES[1]),
        handle(margin, color=BAND, linewidth=8, alpha=0.25),
    ]
    head(figure, title or literal(result.explain().partition(";")[0]), handles)
    return save(figure, path)


def _draw_curves(axes: Any, result: Parity) -> None:
    runs = ([pair.reference for pair in result.pairs], [pair.candidate for pair in result.pairs])
    tables = [_table([run.losses for run in side]) for side in runs]
    shown = np.concatenate([table[np.isfinite(table)] for table in tables])
    if shown.size and (shown > 0).all():
        axes.set_yscale("log")
        if shown.max() <= 1e3 and shown.min() >= 1e-3:
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}" if shown.max() < 5 * shown.min() else "")
            axes.tick_params(which="both", labelsize=8.5)
    for table, colour, width, line in zip(tables, COLOURS, (3.0, 1.5), LINES, strict=False):
        x = np.flatnonzero(np.isfinite(table).any(0))
        columns = [table[np.isfinite(table[:, i]), i] for i in x]
        low, middle, high = (np.array([f(c) for c in columns]) for f in (np.min, np.median, np.max))
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(x, middle, color=colour, linewidth=width, linestyle=line)
    axes.set_title(f"training loss: median and range of {len(result.pairs)} seeds")
    axes.set_xlabel("attempt (applied and skipped steps)")
    axes.set_ylabel("loss (log scale)" if axes.get_yscale() == "log" else "loss")


def _draw_differences(axes: Any, result: Parity) -> None:
    """A row a seed, below them the mean with its interval, and the spread between the reference's seeds."""
    name, test, seeds = literal(result.metric.removeprefix("-")), result.test, len(result.pairs)
    unit, word = _unit(result)
    found = unit * np.array([pair.difference for pair in result.pairs])
    rows = np.arange(seeds)
    whole = np.isfinite(found)
    axes.axvspan(-unit * test.margin, unit * test.margin, color=BAND, alpha=0.2, linewidth=0)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.plot(found[whole], rows[whole], "o", color=COLOURS[1], markersize=5)
    worst = np.full((~whole).sum(), 0.97 if result.metric.startswith("-") else 0.03)  # at the edge that is worse
    style = {"color": COLOURS[2], "markersize": 8, "markeredgewidth": 2, "transform": axes.get_yaxis_transform()}
    axes.plot(worst, rows[~whole], "x", **style)
    if math.isfinite(test.mean):
        axes.plot(unit * test.mean, seeds, "D", color=COLOURS[1], markersize=6)
    if all(map(math.isfinite, test.interval)):
        axes.hlines(seeds, *(unit * x for x in test.interval), color=COLOURS[1], linewidth=2.5)
    if math.isfinite(result.spread):
        _draw_spread(
            axes, seeds + 1, unit * result.spread, [unit * test.margin, *found, *(unit * x for x in test.interval)]
        )
    share = f"{100 * (1 - 2 * test.alpha):g} %"
    labels = [f"seed {pair.seed}" + (" diverged" if pair.candidate.diverged else "") for pair in result.pairs]
    axes.set_yticks(range(seeds + 2), [*labels, f"mean, {share} interval", f"± sd of {literal(result.reference)}"])
    axes.set_ylim(seeds + 1.7, -0.7)
    axes.grid(axis="y", visible=False)
    axes.set_title(f"paired differences in {name}")
    axes.set_xlabel(f"candidate − reference, {name}" + (f" ({word.strip()})" if word else ""))


def _draw_spread(axes: Any, row: int, spread: float, others: list[float]) -> None:
    """A bar to both sides of zero. One that would leave no room for what it is compared with is cut, and told in numbers."""
    edge = 1.3 * max(abs(x) for x in others if math.isfinite(x))
    axes.hlines(row, -min(spread, 2 * edge), min(spread, 2 * edge), color=GREY, linewidth=2.5)
    if spread > 2 * edge:
        axes.set_xlim(-edge, edge)
        word = {"fontsize": 8, "color": GREY, "xytext": (0, 4), "textcoords": "offset points"}
        axes.annotate(f"◂ ±{spread:.3g} ▸", (0, row), ha="center", va="bottom", **word)


def _unit(result: Parity) -> tuple[int, str]:
    """An accuracy is a fraction: its differences are shown in points of a hundred."""
    return (100, " %") if result.metric == "accuracy" else (1, "")


def _table(curves: list[tuple[float, ...]]) -> np.ndarray:
    """A row a run, of equal length: a run that was given up early ends in NaN."""
    table = np.full((len(curves), max(map(len, curves))), np.nan)
    for row, curve in zip(table, curves, strict=True):
        row[: len(curve)] = curve
    return table
