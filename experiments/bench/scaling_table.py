"""A scaling run's results: a line for each case as it ends, one table, the goals, in Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments._run import Refused
from experiments.bench import collectives
from experiments.bench.spread import Case
from mpjax.measure.table import to_markdown

Record = Mapping[str, Any]
"""What a run wrote; see `scaling.main`."""

GOALS = {"data": 0.95, "fsdp": 0.92}
"""Of weak scaling on 8 H100s of one host at 1.3B: the least efficiency of each way."""

SHOWN = ("all-reduce", "all-gather", "reduce-scatter")
"""Kinds of collectives with a column of their own; the rest share one."""


def load(folders: tuple[str, ...]) -> list[Record]:
    """The records in some folders, in their order and within one by name.

    Raises:
      Refused: a folder holds none, or one that cannot be read.
    """
    found: list[Record] = []
    for folder in folders:
        try:
            records = [
                json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*-scaling.json"))
            ]
        except (OSError, ValueError) as error:
            raise Refused(f"{folder}: {error}; legal is a folder that a scaling run wrote") from error
        if not records:
            raise Refused(f"{folder} holds no *-scaling.json; legal is a folder that a scaling run wrote: see --out")
        found += records
    return found


def rate(found: Mapping[str, Any], ms: float) -> float:
    """Items a second and device of a case, for one of its step times."""
    return found["items"] / found["devices"] / ms * 1e3


def efficiency(record: Record, name: str) -> tuple[float, float, float] | None:
    """The rate a device over that of one device: of medians; at the worst and at the best, by any block of each.

    None without the case on one device, and where that or this one failed.
    """
    found = record["cases"][name]
    alone = record["cases"].get(Case(**found["case"]).alone.name, {"failed": "left out"})
    if "failed" in found or "failed" in alone:
        return None
    here, there = found["block_ms"], alone["block_ms"]
    pairs = (
        (statistics.median(here), statistics.median(there)),
        (max(here), min(there)),
        (min(here), max(there)),
    )
    middle, low, high = (rate(found, a) / rate(alone, b) for a, b in pairs)
    return middle, low, high


def compared(record: Record, name: str) -> str | None:
    """`efficiency` in words; nothing of one device."""
    found = None if record["cases"][name]["devices"] == 1 else efficiency(record, name)
    return None if found is None else f"{found[0]:.1%} ({found[1]:.1%}–{found[2]:.1%})"


def peak(found: Mapping[str, Any]) -> int | None:
    """The most that a device had in use in this case, where one rose above all that came before."""
    if found["peak_bytes"] is None or found["peak_bytes_before"] is None:
        return None
    pairs = zip(found["peak_bytes"], found["peak_bytes_before"], strict=True)
    return max((after for after, before in pairs if after > before), default=None)


def line(record: Record, name: str) -> str:
    """What is said when a case ends."""
    found = record["cases"][name]
    if "failed" in found:
        return f"{name}: failed: {brief(found)}"
    ms, ratio = statistics.median(found["block_ms"]), compared(record, name)
    told = "" if ratio is None else f", {ratio} of one device's"
    return f"{name}: {ms:.2f} ms, {rate(found, ms):,.0f} {record['unit']}/s a device{told}"


def brief(found: Mapping[str, Any]) -> str:
    """Why a case failed, without the page that XLA adds; the record has it all."""
    return found["failed"].partition("\n")[0]


def rows(record: Record) -> list[dict[str, Any]]:
    """One row of plain numbers a case, for `mpjax.measure.table`. A case that failed has its name alone."""
    made = []
    for name, found in record["cases"].items():
        if "failed" in found:
            made.append({"case": name, "step (ms)": "failed"})
            continue
        ms, time = statistics.median(found["block_ms"]), found["time"]
        moved = collectives.totals(found["collectives"])
        rest = sum(moved[kind]["bytes"] for kind in moved if kind not in (*SHOWN, "all"))
        made.append({
            "case": name, "rows": found["rows"],
            "step (ms)": f"{ms:.2f} ({min(found['block_ms']):.2f}–{max(found['block_ms']):.2f})",
            f"rate a device ({record['unit']}/s)": f"{rate(found, ms):,.0f}",
            "efficiency": compared(record, name),
            "peak memory": peak(found), "planned memory": found["planned_bytes"]["peak"],
            **{f"{kind} bytes": moved[kind]["bytes"] if kind in moved else None for kind in SHOWN},
            "other bytes": rest or None, "bytes sent": moved["all"]["sent"] or None,
            "collectives a step": round(moved["all"]["runs"]),
            "time in them": f"{time['collectives']:.1%}" if time else "not measured",
            "of that exposed": f"{time['exposed']:.1%}" if time else "not measured",
            "compile (s)": round(found["seconds"]["compile"], 1), "last loss": f"{float(found['losses'][-1]):.4f}",
        })  # fmt: skip
    return made


def notes(record: Record) -> Iterator[str]:
    """What stands below the table."""
    yield f"{record['date']}: {record['command']}"
    yield ", ".join(f"{key} {value}" for key, value in record["environment"].items())
    yield (
        "bytes are a step's on one device, of whole arrays: as gathered, as before they are scattered; sent is what a ring "
        "sends of them. Shares are of the step's time. A peak is shown where a case exceeded all before it in the process"
    )
    yield from reached(record)
    for name, found in record["cases"].items():
        if "failed" in found:
            yield f"{name} failed: {brief(found)}"
        elif unknown := int(collectives.totals(found["collectives"])["all"]["unknown"]):
            yield f"{name}: {unknown} collectives are in loops of unknown length and counted once"
    if record["left_out"]:
        yield f"left out, for want of time: {'; '.join(record['left_out'])}"


def reached(record: Record) -> Iterator[str]:
    """The goals of weak scaling at 1.3B, each as found on the most devices of the run."""
    if record["scaling"] != "gpt-1.3b" or record["settings"]["tiny"]:
        return
    for name, found in record["cases"].items():
        case = Case(**found["case"])
        most = max(x["case"]["devices"] for x in record["cases"].values())
        compared = efficiency(record, name)
        if (
            compared
            and case.devices == most > 1
            and case.scaling == "weak"
            and case.way in GOALS
            and case.accumulate == 1
        ):
            goal = GOALS[case.way]
            verdict = f"none for {most}" if most != 8 else "met" if compared[0] >= goal else "not met"
            yield f"{name}: found {compared[0]:.1%}, goal on 8 devices {goal:.0%}, {verdict}"


def markdown(record: Record) -> str:
    """Heading, table and notes."""
    tables = [to_markdown(rows(record))] if record["cases"] else []
    listed = "\n".join(f"- {note}" for note in notes(record))
    title = f"### {record['scaling']}{' (tiny)' if record['settings']['tiny'] else ''} over devices"
    return "\n\n".join([title, *tables, listed]) + "\n"
