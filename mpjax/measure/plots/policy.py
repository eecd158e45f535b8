"""Which module computes in which format, and which rule says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpjax.core.dtypes import short_name
from mpjax.measure.plots.figure import (
    FORMAT_COLOURS,
    GREY,
    OTHER_FORMAT,
    handle,
    head,
    literal,
    new_figure,
    plain,
    save,
    shortened,
)
from mpjax.policy.resolution import Row, Table

HEIGHT = 0.22  # inches of a row
NAME_LENGTH, CLASS_LENGTH, RULE_LENGTH, NOTE_LENGTH = 30, 24, 34, 60
CHARACTER = 4.8  # points, on an average
COLUMNS = {"params": 14, "hands back": 58, "rule": 126}  # points right of the bars
SMALL: dict[str, Any] = {
    "va": "center_baseline",
    "fontsize": 8,
    "annotation_clip": False,
    "textcoords": "offset points",
}


def policy_by_layer(
    table: Table | Iterable[Row],
    path: str | Path,
    *,
    flops: Mapping[str, float] | None = None,
    title: str = "Precision by layer",
) -> Path:
    """Draw the table that `model.explain(sample)` prints: a row for each module, in the colour of its compute format.

    A module stands indented below the one that holds it, with its class in brackets. Beside its bar stand the dtypes of
    its params and of what it hands back, the rule that says so, and the table's note.

    Args:
      table: what `model.table(sample)` returns, or some of its rows.
      path: of the PNG; its folder is made.
      flops: from a module's path to the FLOPs of its own products, without those of the modules in it. Bars are then as
        long as its share of the sum. What a path has that the table lacks counts for the module around it. The auditor
        knows them: for each op of `mpjax.audit(loss_fn, …).ops` add `op.flops * op.times` to `op.path`.
      title: what stands above.

    Returns:
      The path.

    Raises:
      ValueError: there is no row, the FLOPs sum to nothing or are negative, or some lie in no module of the table.
      ImportError: matplotlib is not installed; it comes with `mpjax[experiments]`.

    >>> import tempfile, numpy as np
    >>> row = Row("", "Dense", "default", np.dtype("float32"), np.dtype("float16"), "full")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     policy_by_layer([row], f"{folder}/a.png").name
    'a.png'
    """
    rows = list(table.rows if isinstance(table, Table) else table)
    if not rows:
        raise ValueError("got a table without rows; legal is one row or more; give what model.table(sample) returns")
    lengths = [1.0] * len(rows) if flops is None else _percent_of_flops([row.path for row in rows], flops)
    names = _tree([row.path for row in rows], [row.cls for row in rows])
    whys = [
        shortened(row.rule, RULE_LENGTH) + (f"  ({shortened(row.note, NOTE_LENGTH)})" if row.note else "")
        for row in rows
    ]
    left, right = (CHARACTER * max(map(len, words)) for words in (names, whys))
    width = (left + COLUMNS["rule"] + right) / 72 + (3.0 if flops is None else 5.5)
    figure = new_figure(max(width, 7), HEIGHT * (len(rows) + 1) + 1.6)
    axes = figure.add_subplot()
    plain(axes)
    axes.grid(visible=False, axis="both" if flops is None else "y")
    axes.spines["left"].set_visible(False)
    axes.set_yticks(range(len(rows)), map(literal, names), ha="left")
    axes.tick_params(axis="y", length=0, pad=left)
    colours = {row.compute.name: FORMAT_COLOURS.get(row.compute.name, OTHER_FORMAT) for row in rows}
    axes.barh(range(len(rows)), lengths, 0.74, color=[colours[row.compute.name] for row in rows])
    if flops is None:
        axes.set(xlim=(0, 1), xticks=[])
        axes.spines["bottom"].set_visible(False)
        for i, row in enumerate(rows):
            axes.text(0.5, i, row.compute.name, ha="center", va="center_baseline", fontsize=7.5, color="white")
    else:
        tab = -0.02 * max(lengths)  # left of the bars: a module without products shows its colour, too
        axes.barh(range(len(rows)), tab, 0.74, color=[colours[row.compute.name] for row in rows])
        axes.axvline(0, color="white", linewidth=2)
        axes.set(xlim=(tab, 1.15 * max(lengths)), xlabel="share of the FLOPs of all products (%)")
        for i, length in enumerate(lengths):
            axes.annotate(f"{length:.1f}%" if length else "", (length, i), xytext=(4, 0), **SMALL)
    axes.set_ylim(len(rows) - 0.4, -1.3)
    cells = {
        "params": [short_name(row.param) for row in rows],
        "hands back": [row.hands_back for row in rows],
        "rule": whys,
    }
    for name, at in COLUMNS.items():
        place = {"xycoords": axes.get_yaxis_transform(), "xytext": (at, 0), **SMALL}
        axes.annotate(name, (1, -0.95), color=GREY, **place)
        for i, cell in enumerate(cells[name]):
            axes.annotate(literal(cell), (1, i), **place)
    head(figure, title, [handle(f"computes in {name}", color=colour, linewidth=6) for name, colour in colours.items()])
    return save(figure, path)


def _tree(paths: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Names as a tree shows them: what a path adds to that of the nearest module around it, indented by depth."""
    names = []
    for path, cls in zip(paths, classes, strict=True):
        around = [outer for outer in paths if outer != path and _inside(path, outer)]
        nearest = max(around, key=len, default="")
        own = path[len(nearest) :].lstrip("/") if nearest else path
        indent = "    " * len(around)
        names.append(f"{indent}{shortened(own or '·', NAME_LENGTH)} ({shortened(cls, CLASS_LENGTH)})")
    return names


def _percent_of_flops(paths: Sequence[str], flops: Mapping[str, float]) -> list[float]:
    homes = {path: max((p for p in paths if _inside(path, p)), key=len, default=None) for path in flops}
    lost = [path for path, home in homes.items() if home is None]
    total = sum(flops.values())
    if lost or not total > 0 or min(flops.values()) < 0:
        raise ValueError(
            f"got FLOPs that sum to {total}, and some at {lost or 'no paths'} outside the table; legal are numbers ≥ 0, one "
            "above it, at paths in the table's modules; give the FLOPs and the table of one model"
        )
    return [100 * sum(n for path, n in flops.items() if homes[path] == home) / total for home in paths]


def _inside(path: str, outer: str) -> bool:
    return outer == "" or path == outer or path.startswith(f"{outer}/")
