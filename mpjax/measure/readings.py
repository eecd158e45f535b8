"""What a probe counted, read on the host: histograms of exponents, and what each format would lose of them."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mpjax.core.dtypes import facts
from mpjax.numerics.probe import EDGES, EXPONENTS, FORMATS, overflow_bits, underflow_bits

_BIAS, _MANTISSA_BITS = 127, 23


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """The counts of one tensor: a module's results, their gradients, or the change of a param.

    Args:
      path: of the module (with `.method` for another method than `__call__`), or of the param.
      kind: `"activation"`, `"gradient"` (of the activation, times the loss scale) or `"update"`.
      dtype: in which it was computed.
      counts: `[256 exponent fields, parts]`, see `mpjax.numerics.probe.count`.
      loss_scale: by which a gradient was multiplied; 1 for the other kinds.
    """

    path: str
    kind: str
    dtype: str
    counts: np.ndarray
    loss_scale: float = 1.0

    @property
    def count(self) -> float:
        """All elements: zeros, infinities and NaNs too."""
        return float(self.counts.sum())

    @property
    def zero(self) -> float:
        return float(self.counts[0, 0])

    @property
    def inf(self) -> float:
        return float(self.counts[-1, 0])

    @property
    def nan(self) -> float:
        return float(self.counts[-1, 1:].sum())

    @property
    def subnormal(self) -> float:
        """Elements under the smallest normal number of the dtype in which they were computed, zeros left out."""
        smallest = _BIAS + round(math.log2(max(facts(self.dtype).tiny, 2.0**-126)))
        return float(self.counts[:smallest].sum() - self.zero)

    @functools.cached_property
    def exponents(self) -> dict[int, float]:
        """From exponent e to how many finite elements are in [2^e, 2^(e+1)); −127 holds float32's subnormals."""
        finite = self.counts[:-1].sum(-1)
        finite[0] -= self.zero
        return {field - _BIAS: float(n) for field, n in enumerate(finite) if n}

    @functools.cached_property
    def _finite(self) -> np.ndarray:
        """The cells of the finite elements in one row, from the smallest on; zeros left out."""
        cells = self.counts[:-1].flatten()
        cells[0] = 0.0
        return cells

    def overflow(self, dtype: str, scale: float = 1.0) -> float:
        """The share of the finite, non-zero elements that a cast to this format would make infinite (e4m3fn: NaN).

        Args:
          dtype: one of `numerics.probe.FORMATS`.
          scale: by which they are multiplied before. Exact for a power of two; another is rounded to one.
        """
        return self._share(self._finite[_cell(overflow_bits(_known(dtype)), scale) :].sum())

    def underflow(self, dtype: str, scale: float = 1.0) -> float:
        """The share of the finite, non-zero elements that a cast to this format would flush to zero; see `overflow`."""
        return self._share(self._finite[: _cell(underflow_bits(_known(dtype)), scale)].sum())

    def fitted(self, dtype: str) -> float:
        """The largest power of two by which all elements may be multiplied and none overflows in this format.

        That is per-tensor scaling. 1 where there is no element that is finite and not zero.
        """
        if not self.exponents:
            return 1.0
        guess = math.floor(math.log2(facts(_known(dtype)).max)) - max(self.exponents)
        return float(next(2.0**k for k in (guess, guess - 1) if self.overflow(dtype, 2.0**k) == 0))

    def scaled(self, dtype: str) -> float:
        """The scale under which this format is judged: a gradient's own loss scale, where it has one; else `fitted`.

        It multiplies what is counted: a gradient has been multiplied already.
        """
        return 1.0 if self.loss_scale != 1 else self.fitted(dtype)

    def _share(self, n: float) -> float:
        total = sum(self.exponents.values())
        return float(n / total) if total else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON: counts, and for each format the shares `[unscaled, scaled]`."""
        unscaled = 1 / self.loss_scale
        return {
            "path": self.path, "kind": self.kind, "dtype": self.dtype,
            "exponents": {str(e): n for e, n in self.exponents.items()},
            "zero": self.zero, "subnormal": self.subnormal, "inf": self.inf, "nan": self.nan, "count": self.count,
            "overflow": {f: [self.overflow(f, s) for s in (unscaled, self.scaled(f))] for f in FORMATS},
            "underflow": {f: [self.underflow(f, s) for s in (unscaled, self.scaled(f))] for f in FORMATS},
        }  # fmt: skip


def _known(dtype: str) -> str:
    if dtype not in FORMATS:
        raise ValueError(f"got the format {dtype!r}; the probe has counts for {', '.join(FORMATS)}; name one of those")
    return dtype


def _cell(bits: int, scale: float) -> int:
    """The first of the cells whose elements reach these bits, once multiplied by `scale`; 0 where all do that are not zero."""
    mantissa = bits & (2**_MANTISSA_BITS - 1)
    field, part = bits >> _MANTISSA_BITS, sum(mantissa >= edge for edge in EDGES)
    shift = round(math.log2(scale))
    if field == 0 and shift:  # a limit among float32's subnormals is 2^k and a bit; normal once it is moved up
        whole = mantissa - 1
        field, part = whole.bit_length() - _MANTISSA_BITS, sum(1 >= edge for edge in EDGES)
    return max((field - shift) * (len(EDGES) + 1) + part, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class ProbeReport:
    """All readings of one probed step, in the order in which the modules were called. `str(report)` is a table.

    >>> ProbeReport.of({"probe": {}}).rows()
    []
    """

    readings: tuple[Reading, ...]
    attempt: int = 0
    loss_scale: float = 1.0

    @classmethod
    def of(cls, found: Mapping[str, Any], attempt: int = 0, loss_scale: float = 1.0) -> ProbeReport:
        """From what a probed step's metrics hold under `"sinks"`.

        Raises:
          ValueError: there is nothing from a probe in it.
        """
        if "probe" not in found:
            raise ValueError(
                "got metrics without a probe's counts; legal are those of a probed step, under 'sinks'; see mpjax.probe"
            )
        taps = sorted(found["probe"].items(), key=lambda item: item[1].order)
        parts = len(EDGES) + 1

        def reading(path: str, kind: str, sink: Any, row: int, scale: float = 1.0) -> Reading:
            return Reading(path, kind, sink.dtype, np.asarray(sink.counts, float)[row].reshape(EXPONENTS, parts), scale)

        return cls((
            *(reading(path, "activation", sink, 0) for path, sink in taps),
            *(reading(path, "gradient", sink, 1, loss_scale) for path, sink in taps),
            *(reading(path, "update", sink, 0) for path, sink in found.get("updates", {}).items()),
        ), attempt, loss_scale)  # fmt: skip

    def __iter__(self) -> Iterator[Reading]:
        return iter(self.readings)

    def select(self, kind: str) -> dict[str, Reading]:
        """From path to the reading of this kind; what was never reached (no path to the loss) is left out."""
        return {r.path: r for r in self.readings if r.kind == kind and r.count}

    def histograms(self) -> dict[str, dict[str, dict[Any, float]]]:
        """From kind to module to counts by exponent, with `"zero"`, `"inf"` and `"nan"`: what `plots.exponent_ranges` draws.

        The updates of a module's own params are added up.
        """
        found: dict[str, dict[str, dict[Any, float]]] = {"activation": {}, "gradient": {}, "update": {}}
        for r in self.readings:
            path = r.path.rpartition("/")[0] if r.kind == "update" else r.path
            if r.count:
                counts = found[r.kind].setdefault(path, {})
                for key, n in (*r.exponents.items(), ("zero", r.zero), ("inf", r.inf), ("nan", r.nan)):
                    counts[key] = counts.get(key, 0.0) + n
        return found

    def rows(self) -> list[dict[str, Any]]:
        """A row a reading: where its values lie, and what each format would lose of them, in text.

        ▲ is the share that overflows, ▼ the share that is flushed to zero; behind an arrow, of the scaled values, where
        that differs. `Reading.scaled` says by what.
        """
        return [_row(r) for r in self.readings if r.count]

    def to_json(self) -> str:
        """One line of JSON."""
        readings = [r.as_dict() for r in self.readings if r.count]
        return json.dumps({"attempt": self.attempt, "loss_scale": self.loss_scale, "readings": readings})

    def __str__(self) -> str:
        rows = self.rows()
        cells = [list(rows[0]) if rows else ["nothing was reached"], *([str(x) for x in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([*lines, "▲ overflows, ▼ flushed to zero in this format, · neither; → once scaled"])


def _row(r: Reading) -> dict[str, str]:
    low, high = (min(r.exponents), max(r.exponents)) if r.exponents else (0, 0)
    losses = {}
    for name in FORMATS:
        plain, scaled = 1 / r.loss_scale, r.scaled(name)
        told = [_lost(r.overflow(name, s), r.underflow(name, s)) for s in (plain, scaled)]
        losses[name.removeprefix("float8_")] = " → ".join(dict.fromkeys(told))
    return {
        "path": r.path or "·", "kind": r.kind, "dtype": r.dtype,
        "range": f"2^{low}…2^{high + 1}" if r.exponents else "–",
        "zero": _percent(r.zero / r.count), "subnormal": _percent(r.subnormal / r.count),
        "inf": f"{r.inf:.0f}", "nan": f"{r.nan:.0f}", **losses,
    }  # fmt: skip


def _lost(over: float, under: float) -> str:
    return " ".join([f"▲{_percent(over)}"] * (over > 0) + [f"▼{_percent(under)}"] * (under > 0)) or "·"


def _percent(share: float) -> str:
    return "0" if share == 0 else "<0.01%" if share < 1e-4 else f"{100 * share:.2g}%" if share < 0.1 else f"{share:.0%}"
