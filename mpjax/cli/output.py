"""What commands print: a table for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias

import tyro

Json: TypeAlias = Annotated[bool, tyro.conf.arg(name="json", help="Print JSON instead of tables.")]
"""The type of a command's `as_json` parameter: the flag `--json`."""


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """One table on stdout, of which nothing is cut: a narrow terminal breaks its cells into lines, a pipe is wide."""
    import rich.console
    import rich.table

    width = None if sys.stdout.isatty() else 160
    console = rich.console.Console(width=width, markup=False, emoji=False)  # a param may be called "w[in]" or ":x:"
    table = rich.table.Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold", min_width=4)  # rich would drop the letters, or the whole column
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table, crop=False)


def print_json(value: Any) -> None:
    """One JSON value on stdout. What JSON has no word for (NaN, an infinity, a dtype, a path) is written as text."""
    print(as_text(value))


def as_text(value: Any) -> str:
    """The JSON that `print_json` prints."""
    return json.dumps(_plain(value), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    if hasattr(value, "tolist"):  # an array or a scalar of numpy's or jax's
        return _plain(value.tolist())
    if isinstance(value, float) and not abs(value) < float("inf"):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
