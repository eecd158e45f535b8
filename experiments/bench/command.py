"""One command: all sides of a row in turn, one table, and a JSON file beside it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from experiments._run import Refused, made
from experiments.bench import flops, in_turn, table
from experiments.bench.process import Task, import_seconds, launch, perform
from experiments.bench.rows import ROWS, Settings
from experiments.bench.side_jax import room_of
from mpjax.measure.table import policy_table

PROG = "python -m experiments.bench"

VARIABLES = ("XLA_FLAGS", "CUDA_VISIBLE_DEVICES")
"""Of the environment: kept in the record, with all that begin with JAX_, XLA_, NCCL_ or TORCH."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, with its unit."""

    row: tyro.conf.Positional[str]
    """One of gpt2-bf16, gpt2-fp8, gpt2-f16, gpt2-xla, resnet50-bf16, resnet50-xla, gpt-1.3b."""
    sides: tuple[str, ...] | None = None
    """Some of the row's sides; all by default, where none are in turn. The first is the one that the others are divided by."""
    in_turn: tuple[str, ...] = ()
    """At least two JAX sides that are run in one process, their blocks in turn; the first divides the others."""
    out: str | None = None
    """A folder, for ROW.json and ROW.md; by default runs/bench-date-time."""
    isolated: bool = True
    """Each side in a process of its own. --no-isolated is for tests: memory and compile times are then not a side's own."""
    imports: int = 0
    """Fresh processes that import what a side needs, by turns; the table then shows their median. 0: once, as it is run."""
    timeout: float = 300.0
    """Seconds that a side may take."""
    settings: tyro.conf.OmitArgPrefixes[Settings] = dataclasses.field(default_factory=Settings)


@dataclasses.dataclass(frozen=True)
class Tables:
    """The tables of rows that were run, in Markdown."""

    folders: tyro.conf.Positional[tuple[str, ...]]
    """Folders that rows wrote."""


def tasks(config: Config) -> list[Task]:
    """What is done, in this order: the rate of products (it warms the chip up), the sides, those in turn.

    Raises:
      Refused: a name that is none of the row's, or sides in turn that are not JAX's, or one alone.
    """
    row = ROWS.get(config.row)
    if row is None:
        raise Refused(f"got the row {config.row!r}; legal are {', '.join(ROWS)}")
    chosen = config.sides
    turns = config.in_turn
    if chosen is None:
        chosen = () if turns else tuple(row.sides)
    if unknown := [name for name in (*chosen, *turns) if name not in row.sides]:
        raise Refused(f"got the sides {', '.join(unknown)}; {config.row} has {', '.join(row.sides)}")
    if len(set(turns)) == 1 or any(row.sides[name].by == "torch" for name in turns):
        raise Refused(f"got --in-turn {' '.join(turns)}; legal are two JAX sides or more: they share a process")
    names: list[tuple[str, ...]] = [(), *((name,) for name in chosen), *([turns] if turns else [])]
    return [Task(config.row, name, config.settings) for name in names]


def main(config: Config) -> int:
    """Run the row, print its table, write both; what is done is written after each side. Returns 1 if a side failed."""
    planned = tasks(config)
    possible(config.settings)
    folder = place(config.out or f"runs/bench-{datetime.datetime.now():%Y%m%d-%H%M%S}", f"{config.row}.json")
    work = config.settings.work(ROWS[config.row])
    record: dict[str, Any] = {
        "row": config.row, "work": dataclasses.asdict(work), "flops": flops.step_flops(work),
        "items": work.items, "unit": work.unit, "settings": dataclasses.asdict(config.settings),
        "date": datetime.datetime.now().isoformat(timespec="seconds"), "command": typed(PROG, sys.argv[1:]),
        "variables": told(os.environ),
        "described": {name: dataclasses.asdict(side) for name, side in ROWS[config.row].sides.items()},
        "products": {}, "sides": {}, "in_turn": {}, "imports": {},
    }  # fmt: skip
    for _ in range(config.imports):
        for task in planned:
            if len(task.sides) == 1:
                room = room_of(work, ROWS[config.row].sides[task.name].by)
                record["imports"].setdefault(task.name, []).append(import_seconds(room))
    for task in planned:
        result = launch(task, config.timeout * max(1, len(task.sides))) if config.isolated else perform(task)
        if len(task.sides) > 1:
            record["in_turn"] = result
        elif task.sides:
            record["sides"][task.name] = result
        else:
            record["products"] = result
        (folder / f"{config.row}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        said = f"failed: {result['failed']}\n{result.get('log', '')}" if "failed" in result else "done"
        print(f"{config.row}, {task.name}: {said}", file=sys.stderr, flush=True)
    show(record, folder)
    turns = record["in_turn"]
    results = [record["products"], *record["sides"].values(), turns, *turns.get("sides", {}).values()]
    return int(any("failed" in result for result in results))


def possible(settings: Settings) -> None:
    """Refuse settings that time nothing.

    Raises:
      Refused: no first steps, steps or blocks.
    """
    for name in ("losses", "steps", "blocks"):
        if (value := getattr(settings, name)) < 1:
            raise Refused(f"got --{name}={value}; legal is 1 or more")


def place(out: str, name: str) -> Path:
    """The folder of a result, which has none of that name yet: what was measured is not written over.

    Raises:
      Refused: it has, or cannot be made.
    """
    if (Path(out) / name).exists():
        raise Refused(f"{out} holds {name} already, which is not written over; give another --out")
    return made(Path(out), "--out")


def show(record: dict[str, Any], folder: Path) -> None:
    """On the terminal, and in ROW.md."""
    (folder / f"{record['row']}.md").write_text(table.markdown(record), encoding="utf-8")
    console = Console(soft_wrap=True, highlight=False)
    if record["sides"]:
        console.print(policy_table(table.rows(record), title=record["row"]))
    if "sides" in record["in_turn"]:
        console.print(policy_table(in_turn.rows(record["in_turn"]), title=f"{record['row']}, in turn"))
    for name, found in table.profiles(record).items():
        console.print(policy_table(table.kernel_rows(found), title=f"{name}: {found['ms']:.2f} ms a step in kernels"))
    for note in table.notes(record):
        console.print(note, markup=False)


def typed(prog: str, args: list[str]) -> str:
    """What was typed, without the folder, which is nobody else's affair."""
    shown = ["FOLDER" if before == "--out" else arg for before, arg in zip(["", *args], args, strict=False)]
    shown = ["--out=FOLDER" if arg.startswith("--out=") else arg for arg in shown]
    return f"{prog} {shlex.join(shown)}"


def run(args: list[str]) -> int:
    """The command line: `ROW …`, or `table FOLDER…`. 2: it was not understood."""
    from experiments import bench

    try:
        if args[:1] == ["table"]:
            given = tyro.cli(Tables, args=args[1:], prog=f"{PROG} table")
            print("\n".join(table.markdown(record) for record in table.load(given.folders)))
            return 0
        return main(tyro.cli(Config, description=bench.__doc__, args=args, prog=PROG))
    except KeyboardInterrupt:
        return 130
    except Refused as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2


def told(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of the environment that a record keeps, without the folders of a machine.

    >>> told({"XLA_FLAGS": "--xla_dump_to=/a/b --xla_x=1", "JAX_COMPILATION_CACHE_DIR": "/c", "HOME": "/d"})
    {'XLA_FLAGS': '--xla_dump_to=FOLDER --xla_x=1', 'JAX_COMPILATION_CACHE_DIR': 'FOLDER'}
    """
    kept = (name for name in environ if name in VARIABLES or name.startswith(("JAX_", "XLA_", "NCCL_", "TORCH")))
    return {name: re.sub(r"(^|[\s=])[~/]\S*", r"\1FOLDER", environ[name]) for name in kept}
