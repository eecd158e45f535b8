"""The history of the loss scale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mpjax.core.dtypes import facts
from mpjax.measure.plots.curves import Curves, draw_scale, scaled_runs, skipped_attempts, styles_of
from mpjax.measure.plots.figure import GREY, handle, head, new_figure, plain, save


def loss_scale_history(
    runs: Mapping[str, Curves],
    path: str | Path,
    *,
    limit: str | None = None,
    title: str = "Loss scale and skipped steps",
) -> Path:
    """Draw the loss scale of each attempt on an axis of powers of two, an x where a step was skipped.

    A run whose scale is always 1 is left out, unless it skipped a step. The legend counts the skips.

    Args:
      runs: from a run's name to its curves, as `training_curves` takes them: `loss_scale` and `skipped` (how many so
        far) for each attempt, and under `attempt` their indices (0, 1, … by default).
      path: of the PNG; its folder is made.
      limit: a line at the largest number of this format: above it, a gradient of 1 with respect to a half-precision
        tensor overflows. None: no line.
      title: what stands above.

    Returns:
      The path.

    Raises:
      ValueError: no run has a loss scale to draw, a curve and its attempts differ in length, or the limit is no float
        format.
      ImportError: matplotlib is not installed; it comes with `mpjax[experiments]`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = {"loss_scale": [2.0**16, 2.0**15, 2.0**15], "skipped": [1, 1, 1]}
    ...     loss_scale_history({"float16": run}, f"{folder}/a.png", limit="float16").name
    'a.png'
    """
    curves = scaled_runs(runs)
    if not curves:
        raise ValueError(
            f"got {len(runs)} runs without a loss scale other than 1; legal is at least one with loss_scale; give one "
            "that trains in float16, or draw training_curves"
        )
    figure = new_figure(8.4, 4.2)
    axes = figure.add_subplot()
    plain(axes)
    skips = {name: skipped_attempts(runs[name]) for name in curves}
    styles = {name: style | {"linewidth": 1.5} for name, style in styles_of(runs).items()}  # none is the reference here
    draw_scale(axes, curves, styles, skips)
    handles = [
        handle(f"{name}: {len(skips[name])} of {len(x)} skipped", **styles[name]) for name, (x, _) in curves.items()
    ]
    if limit is not None:
        look = {"color": GREY, "linestyle": ":", "linewidth": 1.2}
        axes.axhline(facts(limit).max, **look)
        handles.append(handle(f"largest number of {facts(limit).name}, {facts(limit).max:.6g}", **look))
    axes.set(title="", xlabel="attempt (applied and skipped steps)")
    head(figure, title, handles)
    return save(figure, path)
