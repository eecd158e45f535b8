"""A row's results as a table: of one run on the terminal, of many in Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments._run import Refused
from experiments.bench import in_turn
from experiments.bench.products import kinds
from mpjax.measure.table import to_markdown

Record = Mapping[str, Any]
"""What a run of a row wrote; see `command.main`."""


def load(folders: tuple[str, ...]) -> list[Record]:
    """The records in some folders, in their order and within one by name.

    Raises:
      Refused: a folder holds none, or one that cannot be read.
    """
    found = []
    for folder in folders:
        paths = sorted(Path(folder).glob("*.json"))
        try:
            records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        except (OSError, ValueError) as error:
            raise Refused(f"{folder}: {error}; legal is a folder that a row wrote") from error
        records = [record for record in records if isinstance(record, dict) and "sides" in record]
        if not records:
            raise Refused(f"{folder} holds no results; legal is a folder that a row wrote: see --out")
        found += records
    return found


def rows(record: Record) -> list[dict[str, Any]]:
    """One row of plain numbers a side, for `mpjax.measure.table`. A side that failed has its name alone."""
    sides = record["sides"]
    first = next((side for side in sides.values() if "failed" not in side), None)
    rates = record["products"].get("rates", {})
    peak = next((rate["tflops"] for rate in rates.values()), None)
    made = []
    for name, side in sides.items():
        if "failed" in side:
            made.append({"side": name, "step (ms)": "failed"})
            continue
        step_ms, seconds = statistics.median(side["block_ms"]), side["seconds"]
        tflops = record["flops"] / step_ms / 1e9
        imports = record["imports"].get(name, [seconds["import"]])
        made.append({
            "side": name,
            "step (ms)": f"{step_ms:.2f} ({min(side['block_ms']):.2f}–{max(side['block_ms']):.2f})",
            f"rate ({record['unit']}/s)": f"{record['items'] / step_ms * 1e3:,.0f}",
            "× time": round(step_ms / statistics.median(first["block_ms"]), 4) if first else None,
            "TFLOP/s": f"{tflops:.4g}",
            "share of product rate": tflops / peak if peak else None,
            "peak memory": side["peak_bytes"],
            "planned memory": side.get("planned_bytes", {}).get("peak"),
            "import (s)": round(statistics.median(imports), 2), "trace (s)": _rounded(seconds.get("trace")),
            "compile (s)": round(seconds["compile"], 2), "host (ms)": round(side["host_ms"], 3),
            f"loss {len(side['losses'])}": f"{side['losses'][-1]:.4f}",
        })  # fmt: skip
    return made


def notes(record: Record) -> Iterator[str]:
    """What stands below the table: the device's own rate, same products or not, and what failed."""
    sides = record["sides"]
    known = [
        x["environment"] for x in (record["products"], *sides.values(), record.get("in_turn", {})) if "environment" in x
    ]
    merged = {key: value for each in reversed(known) for key, value in each.items()}
    yield f"{record['date']}: {record['command']}"
    yield ", ".join(f"{key} {value}" for key, value in merged.items())
    for name, rate in record["products"].get("rates", {}).items():
        refused = f"refused: {rate['refused']}" if rate["refused"] else f"{rate['tflops']:.4g} TFLOP/s"
        yield f"product of two {name} matrices: {refused}"
    turns = record.get("in_turn", {})
    compiled = turns.get("sides", {}) | sides
    counted = {name: side["products"] for name, side in compiled.items() if side.get("products")}
    for name, found in counted.items():
        total = sum(product["flops"] * product["count"] for product in found) / 1e12
        first, reference = next(iter(counted.items()))
        alike = (
            ""
            if name == first
            else f", {'the same as' if kinds(found) == kinds(reference) else 'other than'} {first}'s"
        )
        yield f"{name}: {sum(product['count'] for product in found)} products in the program, {total:.4g} TFLOP{alike}"
    for found in (sides, turns.get("sides", {}), {"in turn": turns}):
        for name, side in found.items():
            if "failed" in side:
                yield f"{name} failed: {side['failed']}"
    if "failed" in record["products"]:
        yield f"the rate of products failed: {record['products']['failed']}"


def profiles(record: Record) -> dict[str, Record]:
    """From a side that was profiled to what was found."""
    found = {name: side["kernels"] for name, side in record["sides"].items() if "kernels" in side}
    return {name: kernels for name, kernels in found.items() if kernels["kinds"]}


def kernel_rows(found: Record) -> list[dict[str, Any]]:
    """Of a profiled side, a row for each kind of kernel that takes at least half a percent."""
    return [
        {"kernels": _short(kind["kind"]), "ms a step": kind["ms"], "share": kind["share"], "launches": kind["launches"]}
        for kind in found["kinds"]
        if kind["share"] >= 0.005
    ]


def _short(name: str) -> str:
    """A kernel's name without its template arguments, which may take a page."""
    return name if len(name) <= 60 else name[:57] + "…"


def markdown(record: Record) -> str:
    """Heading, table and notes."""
    tables = [to_markdown(rows(record))] if record["sides"] else []
    if "sides" in record.get("in_turn", {}):
        tables.append(to_markdown(in_turn.rows(record["in_turn"])))
    for name, found in profiles(record).items():
        tables += [f"{name}: {found['ms']:.2f} ms a step in kernels", to_markdown(kernel_rows(found))]
    listed = "\n".join(f"- {note}" for note in notes(record))
    title = f"### {record['row']}{' (tiny)' if record['settings']['tiny'] else ''}"
    return "\n\n".join([title, *tables, listed]) + "\n"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)
