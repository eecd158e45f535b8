"""A task of a row in a process of its own: `python -m experiments.bench.process TASK RESULT`."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from experiments.bench.rows import ROWS, Settings

LOG = 4000
"""So many last characters of what a process printed are kept where it failed."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What one process does.

    Args:
      row: the row's name.
      sides: one side; or several that take turns; or none: the rate of the device's products.
      settings: of the run.
    """

    row: str
    sides: tuple[str, ...]
    settings: Settings

    @property
    def name(self) -> str:
        """As the table says it."""
        return " / ".join(self.sides) or "products"


def perform(task: Task) -> dict[str, Any]:
    """Do it here. What goes wrong is an answer, too: `{"failed": message}`, so that the row goes on."""
    row = ROWS[task.row]
    work = task.settings.work(row)
    sides = [row.sides[name] for name in task.sides]
    try:
        if not sides:
            from experiments.bench import ceiling

            return ceiling.measure(row.formats, task.settings)
        if len(sides) > 1:
            from experiments.bench import in_turn

            return in_turn.measure(work, {name: row.sides[name] for name in task.sides}, task.settings)
        from experiments.bench import side_jax, side_torch

        measure = side_torch.measure if sides[0].by == "torch" else side_jax.measure
        return measure(work, sides[0], task.settings)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}", "log": traceback.format_exc()[-LOG:]}


def launch(task: Task, timeout: float) -> dict[str, Any]:
    """Do it in a process of its own, which has the device to itself and compiles from cold."""
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(task)), str(result)]
        try:
            done = subprocess.run(
                command, env=environment, timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        except subprocess.TimeoutExpired as error:
            printed = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
            return {"failed": f"it took more than {timeout:g} s", "log": printed[-LOG:]}
        if not result.exists():
            return {"failed": f"its process ended with {done.returncode}", "log": done.stdout[-LOG:]}
        return json.loads(result.read_text())


def import_seconds(module: str) -> float:
    """How long a fresh process takes to import a module and all that it needs."""
    program = f"import time; since = time.perf_counter(); import {module}; print(time.perf_counter() - since)"
    return float(subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True).stdout)


def main(text: str, result: str) -> None:
    """What the process runs."""
    given = json.loads(text)
    task = Task(given["row"], tuple(given["sides"]), Settings(**given["settings"]))
    Path(result).write_text(json.dumps(perform(task)))


if __name__ == "__main__":
    main(*sys.argv[1:])
