"""How several policies train, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpjax.measure.plots.curves import Curves, curve, draw_scale, scaled_runs, skipped_attempts, styles_of
from mpjax.measure.plots.figure import MARKERS, handle, head, literal, new_figure, plain, save


def training_curves(
    runs: Mapping[str, Curves],
    path: str | Path,
    *,
    metric: str = "accuracy",
    title: str = "Training under several precision policies",
) -> Path:
    """Draw how several policies train: loss, its distance from the first run's, a held-out metric, the loss scale.

    A panel without data is left out, and so is a curve that a run does not have. Loss and distance are noisy: the thin
    line is each attempt, the thick one a running mean. An x marks a skipped step. A loss scale that is always 1 is not
    drawn.

    Args:
      runs: from a run's name to its curves, each a sequence of numbers: `loss`, `loss_scale` and `skipped` (how many so
        far; `skipped_in_a_row`, where it is there, tells skips of a run that went on from another) for each attempt, and
        under `attempt` their indices (0, 1, … by default); a held-out metric for each evaluation, and under
        `eval_attempt` the attempts made before it. The first run is the reference.
      path: of the PNG; its folder is made.
      metric: the name of the held-out metric. One called accuracy is taken for a fraction and shown in percent.
      title: what stands above.

    Returns:
      The path.

    Raises:
      ValueError: no run has anything to draw, or a curve and its attempts differ in length.
      ImportError: matplotlib is not installed; it comes with `mpjax[experiments]`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     training_curves({"float32": {"loss": [2.0, 1.0]}, "bfloat16": {"loss": [2.0, 1.1]}}, f"{folder}/a.png").name
    'a.png'
    """
    loss, held_out = (
        {name: curve(run, key, at) for name, run in runs.items() if len(run.get(key, ()))}
        for key, at in (("loss", "attempt"), (metric, "eval_attempt"))
    )
    reference = next(iter(runs), "")
    distance = {
        name: _distance(loss[name], loss[reference]) for name in loss if reference in loss and name != reference
    }
    distance = {name: both for name, both in distance.items() if len(both[0])}
    skips = {name: skipped_attempts(run) for name, run in runs.items()}
    panels = [(draw, curves) for draw, curves in (
        (_draw_loss, loss), (_draw_distance, distance), (_draw_metric, held_out), (draw_scale, scaled_runs(runs))
    ) if curves]  # fmt: skip
    if not panels:
        raise ValueError(
            f"got {len(runs)} runs with no curve to draw; legal are loss, loss_scale, skipped and {metric}; "
            "give at least one run one of them"
        )
    columns = min(len(panels), 2)
    figure = new_figure(5.2 * columns + 0.4, 3.3 * -(-len(panels) // columns) + 0.9)
    styles = styles_of(runs)
    for i, (draw, curves) in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // columns), columns, i + 1)
        plain(axes)
        axes.set_xlabel("attempt (applied and skipped steps)")
        draw(axes, curves, styles, reference=reference, skips=skips, metric=metric)
    head(figure, title, [handle(name, **style) for name, style in styles.items()])
    return save(figure, path)


def _draw_loss(axes: Any, curves: Any, styles: Any, **_: Any) -> None:
    _noisy(axes, curves, styles)
    axes.set_title("training loss")
    axes.set_ylabel("loss (log scale)" if axes.get_yscale() == "log" else "loss")


def _draw_distance(axes: Any, curves: Any, styles: Any, reference: str, **_: Any) -> None:
    _noisy(axes, curves, styles)
    axes.set_title(f"distance from the loss of {literal(reference)}")
    axes.set_ylabel("|difference of losses|" + (" (log scale)" if axes.get_yscale() == "log" else ""))


def _draw_metric(axes: Any, curves: Any, styles: Any, metric: str, **_: Any) -> None:
    percent, metric = metric == "accuracy", literal(metric)
    for i, (name, (x, y)) in enumerate(curves.items()):
        axes.plot(x, 100 * y if percent else y, marker=MARKERS[i % len(MARKERS)], markersize=4.5, **styles[name])
    axes.set_title(f"test {metric}")
    axes.set_ylabel(f"{metric} (%)" if percent else metric)


def _distance(curve: tuple[np.ndarray, np.ndarray], reference: tuple[np.ndarray, np.ndarray]) -> tuple:
    """|difference| at the attempts that both have."""
    shared, here, there = np.intersect1d(curve[0], reference[0], return_indices=True)
    with np.errstate(invalid="ignore", over="ignore"):  # ∞ − ∞, where both overflowed
        return shared, np.abs(curve[1][here] - reference[1][there])


def _noisy(axes: Any, curves: Any, styles: Any) -> None:
    """Each curve thin as it is and thick as a running mean, on a logarithmic axis where no value forbids it."""
    finite = np.concatenate([y[np.isfinite(y)] for _, y in curves.values()])
    if (finite >= 0).all() and finite.any():  # an exact zero becomes a gap
        axes.set_yscale("log")
    for name, (x, y) in curves.items():
        y = np.where(np.isfinite(y) & ((y > 0) | (axes.get_yscale() != "log")), y, np.nan)
        window = min(max(len(y) // 40, 1), 200)
        if window > 1:
            axes.plot(x, y, color=styles[name]["color"], linewidth=0.6, alpha=0.25)
        axes.plot(x, _running_mean(y, window), **styles[name])
    _readable_decades(axes, finite[finite > 0])


def _readable_decades(axes: Any, positive: np.ndarray) -> None:
    """Plain numbers on a logarithmic axis of a few decades, and between its decades if there is hardly one."""
    if axes.get_yscale() != "log" or positive.max() > 1e3 or positive.min() < 1e-3:
        return
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if positive.max() < 5 * positive.min() else "")
    axes.tick_params(which="both", labelsize=8.5)


def _running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """The mean of the finite values among the last `window`; NaN where there is none.

    Window by window: a running total would never forget one huge loss.
    """
    kept = np.isfinite(y)
    padded = (np.concatenate([np.zeros(window - 1), a]) for a in (np.where(kept, y, 0.0), kept.astype(float)))
    total, count = (np.lib.stride_tricks.sliding_window_view(a, window).sum(-1) for a in padded)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
