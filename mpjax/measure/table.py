"""Tables of results: rows of plain numbers in, a rich table for the terminal or Markdown for a record out."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Row: TypeAlias = Mapping[str, Any]
Column: TypeAlias = tuple[str, bool, list[list[str]]]
"""Its header, whether it holds numbers, and for each row the lines of its cell."""

_UNIT_OF_WORD = {
    **dict.fromkeys(("accuracy", "share", "fraction", "vanished"), "%"),
    **dict.fromkeys(("memory", "bytes"), "bytes"),
    **dict.fromkeys(("deviation", "error", "difference"), "scientific"),
}
_PREFIXES = ("B", "KiB", "MiB", "GiB", "TiB")
_NOTHING = "–"


def policy_table(
    rows: Sequence[Row], title: str | None = None, units: Mapping[str, str] | None = None, width: int | None = None
) -> Table:
    """A table for the terminal: a row for each policy (or whatever the rows are), a column for each key.

    Rows hold plain numbers in base units, and a column says how they are shown: fractions as percent, bytes as KiB to
    TiB (one prefix for a column), `scientific` as 1.23e-05, other floats with four digits. The unit stands in the
    header. It follows from a word in the key (accuracy, share, fraction, vanished: %; memory, bytes: bytes; deviation,
    error, difference: scientific) unless `units` says otherwise or the key ends with a unit of its own, as `rate (img/s)`
    does. A dict is a whole cut into fractions, such as FLOPs by dtype. Missing values and None are shown as a dash.

    Args:
      rows: each a dict from column to value; columns stand in the order in which they are first seen, the first names
        the row.
      title: what stands above.
      units: from column to `%`, `bytes`, `scientific` or `` (none), where the key does not tell.
      width: characters a line; by default those of the terminal. A table that is wider is turned: a column for each row.

    Raises:
      ValueError: no rows; a unit that is none of these, or for a column that no row has.

    >>> table = policy_table([{"policy": "float32", "test accuracy": 0.9722, "temp memory": 3 * 2**20}])
    >>> [column.header.plain for column in table.columns]
    ['policy', 'test accuracy (%)', 'temp memory (MiB)']
    """
    columns = _columns(rows, units or {})
    # Layouts from wide to narrow. Not left to rich, which would sooner break a number than a header.
    layouts = [columns, [_wrapped(column) for column in columns], _turned(columns)]
    tables = [_drawn(layout, title) for layout in layouts]
    endless, room = Console(width=10**4), Console(width=width).width
    fitting = (table for table in tables if Measurement.get(endless, endless.options, table).maximum <= room)
    return next(fitting, tables[-1])


def _drawn(columns: list[Column], title: str | None) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for header, numeric, _ in columns:
        table.add_column(Text(header), justify="right" if numeric else "left", overflow="fold")
    for row in zip(*(cells for _, _, cells in columns), strict=True):
        table.add_row(*(Text("\n".join(lines)) for lines in row))
    return table


def _wrapped(column: Column) -> Column:
    """The column with its header in lines no longer than its longest cell, or its longest word."""
    header, numeric, cells = column
    least = max((len(line) for lines in cells for line in lines), default=1)
    return "\n".join(textwrap.wrap(header, max(least, 1), break_long_words=False)), numeric, cells


def _turned(columns: list[Column]) -> list[Column]:
    (first, _, names), *rest = columns
    turned = [(" ".join(name), True, [cells[i] for _, _, cells in rest]) for i, name in enumerate(names)]
    return [(first, False, [textwrap.wrap(header, 18) for header, _, _ in rest]), *turned]


def to_markdown(rows: Sequence[Row], units: Mapping[str, str] | None = None) -> str:
    """The same table in Markdown, for a README or a record; see `policy_table`.

    >>> print(to_markdown([{"policy": "float16", "skipped": 2, "matrix FLOPs": {"float16": 0.98, "float32": 0.02}}]))
    | policy | skipped | matrix FLOPs (%) |
    |---|---:|---|
    | float16 | 2 | float16 98.0, float32 2.0 |
    """
    columns = _columns(rows, units or {})

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join("---:" if numeric else "---" for _, numeric, _ in columns) + "|"
    body = [line([", ".join(cells[i]) for _, _, cells in columns]) for i in range(len(rows))]
    return "\n".join([line([header for header, _, _ in columns]), rule, *body])


def _columns(rows: Sequence[Row], units: Mapping[str, str]) -> list[Column]:
    keys = dict.fromkeys(key for row in rows for key in row)
    if not keys:
        raise ValueError(
            "got no rows, or rows without a key; legal is at least one row with one value; leave the table out"
        )
    for key, unit in units.items():
        if key not in keys or unit not in ("%", "bytes", "scientific", ""):
            raise ValueError(
                f"got the unit {unit!r} for {key!r}; legal are '%', 'bytes', 'scientific' and '' for one of "
                f"{', '.join(map(repr, keys))}; name such a pair"
            )
    columns = []
    for key in keys:
        values = [row.get(key) for row in rows]
        flat = [x for value in values for x in (value.values() if isinstance(value, Mapping) else (value,))]
        numbers: list[float] = [np.asarray(x).item() for x in flat if _is_number(x)]
        unit = units[key] if key in units else _unit(key, any(isinstance(value, Mapping) for value in values))
        written, show = _style(unit, numbers)
        header = f"{key} ({written})" if written and numbers else key
        numeric = bool(numbers) and all(value is None or _is_number(value) for value in values)
        columns.append((header, numeric, [_lines(value, show) for value in values]))
    return columns


def _unit(key: str, parts: bool) -> str:
    if key.endswith(")"):
        return ""
    found = [_UNIT_OF_WORD[word] for word in re.findall(r"\w+", key) if word in _UNIT_OF_WORD]
    return found[0] if found else "%" if parts else ""


def _style(unit: str, numbers: Sequence[float]) -> tuple[str, Callable[[Any], str]]:
    """What stands in the header, and how a number of this column is written."""
    if unit == "%":
        return "%", _percent
    if unit == "scientific":
        return "", lambda x: "0" if x == 0 else f"{x:.2e}"
    if unit == "bytes":
        largest = max((abs(x) for x in numbers if math.isfinite(x)), default=0)
        power = min(int(math.log2(largest) // 10), len(_PREFIXES) - 1) if largest >= 1 else 0
        return _PREFIXES[power], lambda x: _plain(x / 1024**power)
    return "", _plain


def _percent(x: float) -> str:
    # Neither a small part nor what a large one lacks is rounded away.
    return "<0.1" if 0 < x < 0.0005 else ">99.9" if 0.9995 <= x < 1 else f"{100 * x:.1f}"


def _plain(x: float) -> str:
    return f"{x:.0f}" if isinstance(x, int) or (x.is_integer() and abs(x) < 2**53) else f"{x:.4g}"


def _lines(value: Any, show: Callable[[Any], str]) -> list[str]:
    if isinstance(value, Mapping):
        return [f"{name} {_lines(x, show)[0]}" for name, x in value.items()] or [_NOTHING]
    if value is None:
        return [_NOTHING]
    if isinstance(value, (bool, np.bool_)):
        return ["yes" if value else "no"]
    return [show(np.asarray(value).item()) if _is_number(value) else str(value)]


def _is_number(x: Any) -> bool:
    """Whether it is a real number: of Python, numpy or jax (bfloat16 is none of numpy's own floats)."""
    is_scalar = isinstance(x, (int, float)) or (hasattr(x, "dtype") and np.shape(x) == ())
    value = np.asarray(x).item() if is_scalar else None
    return isinstance(value, (int, float)) and not isinstance(value, bool)
