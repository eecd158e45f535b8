"""What all pictures share: an off-screen figure, colours, a plain look, a file at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Okabe and Ito, Color Universal Design (2008), told apart by colour-blind readers; the reference is black. Line styles
# tell curves apart that lie on each other, as those of policies that work do.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LINES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.2)), (0, (6, 2, 1.5, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"
FORMAT_COLOURS = {
    "float64": "#56B4E9",
    "float32": "#444444",
    "bfloat16": "#0072B2",
    "float16": "#D55E00",
    "float8_e4m3fn": "#009E73",
    "float8_e5m2": "#CC79A7",
}
"""A format has the same colour in every picture. Another one has `OTHER_FORMAT`."""
OTHER_FORMAT = "#E69F00"


def new_figure(width: float, height: float) -> Any:
    """An empty figure with a canvas of its own, so that no backend is chosen and no window opened; size in inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib, which is not installed; install mpjax[experiments]") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Any) -> None:
    """A light grid and no frame."""
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.title.set_fontsize(10.5)
    axes.tick_params(labelsize=8.5)


def handle(label: str, **style: Any) -> Any:
    """What stands for a curve in a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=literal(label), **style)


def literal(name: str) -> str:
    """A name as it is written: matplotlib sets what stands between two dollars as a formula, or fails to.

    >>> literal("$x_1$")
    '\\\\$x_1\\\\$'
    """
    return name.replace("$", r"\$")


def shortened(name: str, length: int) -> str:
    """A name of at most so many characters: what is too long loses its middle. Most of its end stays: that tells layers apart.

    >>> shortened("encoder/layers/11/attention/query", 25), shortened("head", 25)
    ('encode…11/attention/query', 'head')
    """
    if len(name) <= length:
        return name
    front = length // 4
    return f"{name[:front]}…{name[front + 1 - length :]}"


def head(figure: Any, title: str, handles: list[Any]) -> None:
    """A title above and a legend below all panels, in as many columns as the figure is wide enough for."""
    figure.suptitle(title, fontsize=12)
    longest = max((len(entry.get_label()) for entry in handles), default=0)
    columns = int(figure.get_figwidth() / (0.075 * longest + 0.8))  # inches of a character, and of line and gap
    figure.legend(handles=handles, loc="outside lower center", ncols=min(max(columns, 1), 4), frameon=False,
                  fontsize=9, handlelength=3.2)  # fmt: skip


def save(figure: Any, path: str | Path) -> Path:
    """Write the PNG; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
