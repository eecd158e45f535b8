"""Where the numbers of each layer lie, and which formats can hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpjax.core.dtypes import facts
from mpjax.measure.plots.figure import FORMAT_COLOURS, GREY, handle, head, literal, new_figure, plain, save, shortened

Histogram = Mapping[Any, Any]
"""How many values have each exponent ⌊log2|x|⌋, and under `"zero"`, `"inf"` and `"nan"` how many have none."""

FORMATS = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
WITHOUT = ("zero", "inf", "nan")
NAME_LENGTH = 34
SHADES = ("#D3E3F3", "#9CC0E4", "#4B8BC8", "#12508F", "#04162F")  # light to dark: told apart in grey, too
FAINTEST = 1e-6  # the smallest share that has a shade of its own
SLOT = 31  # points for a column of numbers beside a panel


def exponent_ranges(
    counts: Mapping[str, Mapping[str, Histogram]],
    path: str | Path,
    *,
    loss_scale: float = 1.0,
    span: tuple[int, int] = (-64, 40),
    title: str = "Exponents of each layer, and what the formats hold",
) -> Path:
    """Draw which exponents the values of each layer have, against the windows of float16, bfloat16 and float8.

    A panel for each kind, side by side where they have a layer in common; in it a strip for each layer, darker where
    more of its values lie, and above them a bar for each format from its smallest subnormal number to its largest: what
    lies left of a bar becomes zero in that format, what lies right of it overflows, and in the bar's pale part values
    lose digits. Thin lines carry the ends of the bars down. Beside each strip stand the shares of zeros, infinities and
    NaNs, and of values beyond the ends of the axis.

    Gradients are drawn as the backward pass holds them, multiplied by the loss scale; a hollow box shows where the same
    ones would lie without it.

    Args:
      counts: from a kind (`activation`, `gradient`, `update`) to a layer's name, in the order of the forward pass, to
        how many of its values have each exponent ⌊log2|x|⌋, and under `"zero"`, `"inf"` and `"nan"` how many have none.
      path: of the PNG; its folder is made.
      loss_scale: by which the gradients are multiplied.
      span: the exponents that the axis holds at most; it is no longer than float16's window and the values need.
      title: what stands above.

    Returns:
      The path.

    Raises:
      ValueError: there is no value at all, a key is no exponent, a count is negative, the loss scale is not a positive
        number, or the span is empty.
      ImportError: matplotlib is not installed; it comes with `mpjax[experiments]`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     counts = {"gradient": {"in": {-20: 3, -19: 5, "zero": 2}, "out": {-9: 10}}}
    ...     exponent_ranges(counts, f"{folder}/a.png", loss_scale=2.0**10).name
    'a.png'
    """
    _check(counts, loss_scale, span)
    counts = {kind: layers for kind, layers in counts.items() if layers}
    groups = _groups(counts)
    scales = {kind: loss_scale if kind == "gradient" else 1.0 for kind in counts}
    low, high = _axis(counts, scales, span)
    height = min(max(0.18, 2.4 / max(len(layers) for _, layers in groups)), 0.34)  # inches of a row
    heights = [height * (len(layers) + len(FORMATS) + 1.5) for _, layers in groups]
    columns = max(len(kinds) for kinds, _ in groups)
    figure = new_figure(max(2.4 + 4.3 * columns, 8.4), sum(heights) + 1.2 + 0.8 * len(groups))
    grid = figure.add_gridspec(len(groups), columns, height_ratios=heights)
    mesh: Any = None
    for i, (kinds, layers) in enumerate(groups):
        common, names = _names(layers)
        first = None
        for j, kind in enumerate(kinds):
            axes = figure.add_subplot(grid[i, j], sharey=first)
            mesh = _draw_panel(axes, kind, [counts[kind].get(layer, {}) for layer in layers], low, high, scales[kind])
            axes.tick_params(labelleft=first is None)
            first = first or axes
        assert first is not None
        first.set_yticks([*_format_rows(), *range(len(layers))], [*FORMATS, *names])
        word, order = ("param", "") if kinds == ["update"] else ("layer", ", input on top")
        first.set_ylabel(f"{word}{common and f' of {common}'}{order}")
    figure.align_ylabels()
    bar = figure.colorbar(mesh, ax=figure.axes, location="bottom", aspect=70, shrink=0.6, extend="min", pad=0.02)
    bar.set_label("share of a layer's values with this exponent (log scale)", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    look = {"marker": "s", "markersize": 9, "linestyle": "", "color": "black", "markerfacecolor": "none"}
    head(figure, title, [
        handle("normal numbers", color=GREY, linewidth=6),
        handle("subnormal numbers", color=GREY, linewidth=6, alpha=0.35),
        *([handle("gradients without the loss scale", **look)] if scales.get("gradient", 1) != 1 else []),
    ])  # fmt: skip
    return save(figure, path)


def _check(counts: Mapping[str, Mapping[str, Histogram]], loss_scale: float, span: tuple[int, int]) -> None:
    every = [item for of_kind in counts.values() for histogram in of_kind.values() for item in histogram.items()]
    wrong = sorted({key for key, _ in every if key not in WITHOUT and not isinstance(key, int | np.integer)}, key=str)
    if wrong:
        raise ValueError(
            f"got the keys {wrong} in a histogram; legal are whole exponents, zero, inf and nan; turn text into int"
        )
    if not all(n >= 0 for _, n in every) or not sum(n for _, n in every) > 0:
        raise ValueError(
            f"got {len(counts)} kinds with no values to draw, or a negative count; legal are counts ≥ 0, one of them "
            "above it; give a histogram for at least one layer"
        )
    if not 0 < loss_scale < math.inf or not span[0] < span[1]:
        raise ValueError(
            f"got the loss scale {loss_scale} and the span {span}; legal are a positive number and a lower exponent "
            "before a higher one; give 1.0 where gradients are not scaled"
        )


def _groups(counts: Mapping[str, Mapping[str, Histogram]]) -> list[tuple[list[str], list[str]]]:
    """The kinds that stand side by side, and their layers. Kinds without a common layer, as modules and params, stand
    below each other: in one row of panels half of each would be empty."""
    groups: list[tuple[list[str], list[str]]] = []
    for kind, histograms in counts.items():
        home = next((group for group in groups if not histograms.keys().isdisjoint(group[1])), None)
        if home is None:
            groups.append(([kind], list(histograms)))
        else:
            home[0].append(kind)
            home[1].extend(layer for layer in histograms if layer not in home[1])
    return groups


def _axis(counts: Mapping[str, Any], scales: Mapping[str, float], span: tuple[int, int]) -> tuple[int, int]:
    """The first and the last exponent drawn: of float16's window and all values, unscaled ones too, within the span."""
    window = facts("float16")
    seen = {math.floor(math.log2(window.smallest_subnormal)) - 1, math.floor(math.log2(window.max)) + 1}
    for kind, histograms in counts.items():
        for histogram in histograms.values():
            here = _exponents(histogram)
            seen.update(here, (math.floor(exponent - math.log2(scales[kind])) for exponent in here))
    low, high = max(min(seen), span[0]), min(max(seen), span[1])
    return (low, high) if low < high else span


def _draw_panel(axes: Any, kind: str, histograms: Sequence[Histogram], low: int, high: int, scale: float) -> Any:
    """One kind's strips under the bars of the formats."""
    plain(axes)
    axes.grid(visible=False, axis="y")
    mesh = _draw_strips(axes, histograms, low, high)
    _draw_windows(axes, len(histograms), low, high)
    _draw_numbers(axes, histograms, low, high)
    if scale != 1:
        _draw_unscaled(axes, histograms, math.log2(scale))
    axes.set(xlim=(low, high + 1), ylim=(len(histograms) - 0.4, -len(FORMATS) - 1.2), xlabel="|value| (log scale)")
    said = f", times the loss scale {_power(math.log2(scale))}" if scale != 1 else ""
    axes.set_title(kind + "s" * (not kind.endswith("s")) + said)
    apart = 16 if high - low > 64 else 8
    ticks = range(-(-low // apart) * apart, high + 2, apart)
    axes.set_xticks(ticks, [_power(exponent) for exponent in ticks])
    return mesh


def _draw_strips(axes: Any, histograms: Sequence[Histogram], low: int, high: int) -> Any:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    shares = np.zeros((len(histograms), high - low + 1))
    for row, histogram in enumerate(histograms):
        total = sum(histogram.values())
        for exponent, n in _exponents(histogram).items():
            if low <= exponent <= high:
                shares[row, exponent - low] = n / total
    shades = LinearSegmentedColormap.from_list("shares", SHADES).with_extremes(under=SHADES[0])
    rows = (np.arange(len(histograms))[:, None] + [-0.42, 0.42]).ravel()  # strips with gaps between them
    cells = np.insert(shares, range(1, len(shares)), 0, axis=0)
    edges = np.arange(low, high + 2)
    return axes.pcolormesh(edges, rows, np.ma.masked_equal(cells, 0), cmap=shades, norm=LogNorm(FAINTEST, 1))


def _draw_windows(axes: Any, layers: int, low: int, high: int) -> None:
    for row, name in zip(_format_rows(), FORMATS, strict=True):
        colour, fact = FORMAT_COLOURS[name], facts(name)
        ends = [math.log2(x) for x in (fact.smallest_subnormal, fact.tiny, fact.max)]
        shown = np.clip(ends, low, high + 1)
        axes.barh(row, shown[1] - shown[0], 0.7, shown[0], color=colour, alpha=0.35)
        axes.barh(row, shown[2] - shown[1], 0.7, shown[1], color=colour)
        word = {"va": "center_baseline", "fontsize": 7.5, "color": "white" if ends[1] <= low else "black"}
        if ends[0] < low:
            axes.text(low, row, f" ◂ {_power(round(ends[0]))}", ha="left", **word)
        if ends[2] > high + 1:
            axes.text(high + 1, row, f"{_power(round(ends[2]))} ▸ ", ha="right", **(word | {"color": "white"}))
        inside = [end for end in (ends[0], ends[2]) if low <= end <= high + 1]
        axes.vlines(inside, row, -0.5, color=colour, linewidth=0.9, zorder=0.8)  # behind the other bars
        axes.vlines(inside, -0.5, layers - 0.5, color=colour, linewidth=0.9)


def _draw_unscaled(axes: Any, histograms: Sequence[Histogram], shift: float) -> None:
    """Where the same values would lie without the loss scale: from the smallest to the largest of a layer."""
    for row, histogram in enumerate(histograms):
        if here := _exponents(histogram):
            width = max(here) + 1 - min(here)
            axes.barh(row, width, 0.5, min(here) - shift, fill=False, edgecolor="black", linewidth=0.9)


def _draw_numbers(axes: Any, histograms: Sequence[Histogram], low: int, high: int) -> None:
    """What no strip can show, in percent of a layer's values."""
    beyond = [
        {
            f"< {_power(low)}": sum(n for exponent, n in _exponents(histogram).items() if exponent < low),
            f"≥ {_power(high + 1)}": sum(n for exponent, n in _exponents(histogram).items() if exponent > high),
        }
        for histogram in histograms
    ]
    columns = [(name, [histogram.get(name, 0) for histogram in histograms]) for name in WITHOUT]
    columns += [(name, [found[name] for found in beyond]) for name in beyond[0]]
    columns = [(name, column) for name, column in columns if name in WITHOUT or any(column)]
    for slot, (name, column) in enumerate(columns, 1):
        place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "xytext": (slot * SLOT, 0),
                 "ha": "right", "va": "center_baseline", "fontsize": 7.5, "annotation_clip": False}  # fmt: skip
        axes.annotate(name.replace("nan", "NaN"), (1, -0.9), color=GREY, **place)
        for row, (histogram, n) in enumerate(zip(histograms, column, strict=True)):
            if total := sum(histogram.values()):
                colour = "#D55E00" if n and name in ("inf", "nan") else "black" if n else "#999999"
                axes.annotate(_percent(n / total), (1, row), color=colour, **place)


def _exponents(histogram: Histogram) -> dict[int, Any]:
    """The exponents that occur, without what has none."""
    return {int(key): n for key, n in histogram.items() if key not in WITHOUT and n}


def _names(layers: Sequence[str]) -> tuple[str, list[str]]:
    """The path that all layers share, where that makes long names shorter, and what they are called within it."""
    split = [layer.split("/") for layer in layers]
    shared = 0
    if max(map(len, layers)) > NAME_LENGTH:
        levels = enumerate(zip(*(parts[:-1] for parts in split), strict=False))  # as deep as the shallowest goes
        shared = next((i for i, level in levels if len(set(level)) > 1), min(map(len, split)) - 1)
    names = [shortened("/".join(parts[shared:]) or "·", NAME_LENGTH) for parts in split]
    return literal("/".join(split[0][:shared])), [literal(name) for name in names]


def _format_rows() -> list[float]:
    """Where the bars of the formats lie: above the first layer, which is row 0."""
    return [i - len(FORMATS) - 0.6 for i in range(len(FORMATS))]


def _power(exponent: float) -> str:
    return f"$2^{{{exponent:.0f}}}$" if exponent == round(exponent) else f"{2.0**exponent:.6g}"


def _percent(share: float) -> str:
    """Two digits; what is not zero is never shown as 0, and what is not all never as 100."""
    if share == 0:
        return "0"
    if share < 1e-4:
        return "<0.01%"
    if 0.995 <= share < 1:
        return ">99%"
    return f"{100 * share:.2g}%" if share < 1 else "100%"
