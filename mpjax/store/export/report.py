"""What an export cost: bytes and error of each tensor, size and quality of the whole."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """One tensor: how it is stored, and how far what is read back lies from what was given.

    Args:
      path: where it lies in the tree.
      shape: its shape.
      given: its dtype before.
      stored: its format in the file.
      bytes_before: of the array that was given.
      bytes_after: in the file, its scale included.
      sqnr_db: 10·log₁₀(Σx² / Σ(x − x̂)²), in float64; infinite where nothing was lost.
      max_error: max |x − x̂|.
      note: why it is stored otherwise than was asked.

    >>> TensorReport("params/w", (2,), "float32", "bfloat16", 8, 4, 50.0, 0.001).stored
    'bfloat16'
    """

    path: str
    shape: tuple[int, ...]
    given: str
    stored: str
    bytes_before: int
    bytes_after: int
    sqnr_db: float = math.inf
    max_error: float = 0.0
    note: str = ""


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What `export_weights` wrote. `str(report)` is a table, `report.as_dict()` is for JSON.

    Args:
      file: the path of the file.
      tensors: a row for each leaf.
      metric_before: what `metric` gave for the params as they came; None without one.
      metric_after: what it gave for the params as they are read back.

    >>> row = TensorReport("params/w", (2,), "float32", "bfloat16", 8, 4, 50.0, 0.001)
    >>> ExportReport("net.safetensors", (row,)).size_ratio
    2.0
    """

    file: str
    tensors: tuple[TensorReport, ...]
    metric_before: dict[str, float] | None = None
    metric_after: dict[str, float] | None = None

    @property
    def bytes_before(self) -> int:
        """Of all arrays as they were given."""
        return sum(row.bytes_before for row in self.tensors)

    @property
    def bytes_after(self) -> int:
        """Of all arrays in the file, scales included, header not."""
        return sum(row.bytes_after for row in self.tensors)

    @property
    def size_ratio(self) -> float:
        """How many times smaller the arrays became; 1 where there are no bytes."""
        return self.bytes_before / self.bytes_after if self.bytes_after else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        total = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "size_ratio": self.size_ratio}
        return dataclasses.asdict(self) | total

    def __str__(self) -> str:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for header in ("tensor", "shape", "given", "stored", "bytes", "SQNR (dB)", "max error", "note"):
            table.add_column(header, justify="right" if header in ("bytes", "SQNR (dB)", "max error") else "left")
        noted = any(row.note for row in self.tensors)
        for row in self.tensors:
            cells = (row.path, "×".join(map(str, row.shape)) or "scalar", row.given, row.stored, f"{row.bytes_after:,}")
            table.add_row(*cells, *_error(row), row.note)
        if not noted:
            table.columns.pop()
        out = io.StringIO()
        # As wide as its longest row: a path that is cut names nothing. In a notebook rich would show it instead, or colour it.
        console = Console(file=out, width=10**4, force_jupyter=False, force_terminal=False, markup=False, emoji=False)
        console.print(table)
        lines = [line.rstrip() for line in out.getvalue().splitlines()]
        lines.append(f"{self.bytes_before:,} → {self.bytes_after:,} bytes, {self.size_ratio:.2f} times smaller")
        for name, before in (self.metric_before or {}).items():
            after = (self.metric_after or {}).get(name, math.nan)
            lines.append(f"{name}: {before:.6g} before, {after:.6g} after ({after - before:+.3g})")
        return "\n".join(line for line in lines if line)


def _error(row: TensorReport) -> tuple[str, str]:
    exact = math.isinf(row.sqnr_db) and row.sqnr_db > 0
    return ("exact", "0") if exact else (f"{row.sqnr_db:.1f}", f"{row.max_error:.2e}")


def errors(given: np.ndarray, back: np.ndarray) -> tuple[float, float]:
    """(SQNR in dB, largest absolute error) of what is read back, computed in float64.

    >>> errors(np.array([3.0, 4.0]), np.array([3.0, 4.5]))
    (20.0, 0.5)
    """
    x = given.astype(np.float64)
    noise = np.abs(x - back.astype(np.float64))
    power, lost = float(np.sum(x * x)), float(np.sum(noise * noise))
    if not lost:
        return math.inf, float(noise.max(initial=0.0))
    return (10 * math.log10(power / lost) if power else -math.inf), float(noise.max())
