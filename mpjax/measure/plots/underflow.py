"""What float16 loses of the gradients, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mpjax.measure.plots.figure import COLOURS, GREY, MARKERS, handle, head, literal, new_figure, plain, save


def gradient_underflow(
    layers: Sequence[str],
    series: Mapping[str, Sequence[float]],
    errors: Mapping[str, Sequence[float]],
    path: str | Path,
    *,
    rounding: float | None = 2.0**-11,
    title: str = "Gradients in float16",
) -> Path:
    """Draw, layer by layer, how many gradients vanish in float16 and how far they are from float64.

    Args:
      layers: their names, the input's first; it stands on top.
      series: from a way of computing (`unscaled`, `scaled`) to the fraction of its gradient elements that are zero
        where float64's are not, in [0, 1], for each layer.
      errors: from a way of computing to the relative error ‖g − g64‖ / ‖g64‖ for each layer. 0 is drawn at the left
        edge, what is not finite at the right one.
      path: of the PNG; its folder is made.
      rounding: a line at this relative error, by default float16's unit roundoff 2⁻¹¹ (IEEE 754-2019); None: no line.
      title: what stands above.

    Returns:
      The path.

    Raises:
      ValueError: nothing to draw, or a series that has not one number for each layer.
      ImportError: matplotlib is not installed; it comes with `mpjax[experiments]`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lost, error = {"unscaled": [1.0, 0.2]}, {"unscaled": [1.0, 0.3]}
    ...     gradient_underflow(["in", "out"], lost, error, f"{folder}/a.png").name
    'a.png'
    """
    names = list(dict.fromkeys([*series, *errors]))
    wrong = {name: len(y) for part in (series, errors) for name, y in part.items() if len(y) != len(layers)}
    if not layers or not names or wrong:
        raise ValueError(
            f"got {len(layers)} layers, {len(names)} series, and of other lengths {wrong or 'none'}; legal is at least "
            "one series with one number a layer; give all of them for the same layers"
        )
    looks = {
        name: {"marker": MARKERS[i % len(MARKERS)], "linestyle": "", "color": COLOURS[1:][i % 6], "markersize": 6}
        for i, name in enumerate(names)
    }
    rows = {name: np.arange(len(layers)) + 0.22 * (i - (len(names) - 1) / 2) for i, name in enumerate(names)}
    figure = new_figure(10.4, (0.16 + 0.1 * len(names)) * len(layers) + 2.1)
    vanish = figure.add_subplot(1, 2, 1)
    for name, values in series.items():
        percent = 100 * np.asarray(values, float)
        vanish.hlines(rows[name], 0, percent, color=looks[name]["color"], linewidth=3, alpha=0.6)
        vanish.plot(percent, rows[name], clip_on=False, zorder=3, **looks[name])
    vanish.set(xlim=(0, 100), xlabel="gradient elements lost to zero (%)", title="vanished gradients")
    error = figure.add_subplot(1, 2, 2, sharey=vanish)
    low, high = _around([x for values in errors.values() for x in values] + ([rounding] if rounding else []))
    for name, values in errors.items():
        shown = np.nan_to_num(np.asarray(values, float), nan=high, posinf=high).clip(low, high)
        error.plot(shown, rows[name], clip_on=False, zorder=3, **looks[name])
    if rounding:
        error.axvline(rounding, color=GREY, linestyle=":", linewidth=1.2)
        error.annotate("rounding to float16, 2⁻¹¹" if rounding == 2.0**-11 else f"rounding, {rounding:.1e}",
                       (rounding, 0.02), xycoords=("data", "axes fraction"), xytext=(4, 0), textcoords="offset points",
                       color=GREY, fontsize=8)  # fmt: skip
    error.set(xscale="log", xlim=(low, high), xlabel="relative error (log scale)", title="error against float64")
    error.tick_params(labelleft=False)
    for axes in (vanish, error):
        plain(axes)
    vanish.set_yticks(range(len(layers)), map(literal, layers))
    vanish.set_ylim(len(layers) - 0.3, -0.7)
    vanish.set_ylabel("layer, input on top")
    head(figure, title, [handle(name, **looks[name]) for name in names])
    return save(figure, path)


def _around(values: Sequence[float]) -> tuple[float, float]:
    """A range with room on both sides of the positive, finite ones of these values."""
    good = [x for x in values if np.isfinite(x) and x > 0] or [1.0]
    return min(good) / 3, max(good) * 3
