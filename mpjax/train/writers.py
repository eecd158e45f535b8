"""Hooks that write metrics down: JSON lines, TensorBoard events, a progress bar. Of several processes the first writes."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any, TextIO

from mpjax.core.processes import is_first
from mpjax.train.hooks import FitResult, Hook


class JsonlWriter(Hook):
    """One JSON object a line: `{"attempt": 3, "step": {...}}` for each step, `{"attempt": 3, "eval": {...}}` for each evaluation.

    A number that JSON has no word for is written as the string "nan", "inf" or "-inf". Lines are appended and flushed as
    they come, so that a run that dies keeps what it measured. A run that goes on may write an attempt again: the later line
    holds, and what came before it of later attempts no longer does. What a kill left of a last line stays a line of its own.

    Args:
      path: the file; its folder is made.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = append_to(self.path)

    def on_step(self, attempt: int, metrics: dict[str, float]) -> None:
        self._write(attempt, "step", metrics)

    def on_eval(self, attempt: int, metrics: dict[str, float]) -> None:
        self._write(attempt, "eval", metrics)

    def on_end(self, result: FitResult) -> None:
        self._file.close()

    def _write(self, attempt: int, kind: str, metrics: dict[str, float]) -> None:
        if self._file.closed:  # the run ended, and its hook is in another
            self._file = append_to(self.path)
        line = {"attempt": attempt, kind: {name: word(value) for name, value in metrics.items()}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")


def append_to(path: Path) -> TextIO:
    """A file of lines, open for more, each written as it ends: its folder is made, and what a kill left of a last line ended.

    Of several processes, which all have the same to say, the first has the file; what the others write goes nowhere.
    """
    if not is_first():
        return open(os.devnull, "a", encoding="utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n":
            file.write(b"\n")
    return path.open("a", buffering=1, encoding="utf-8")


def word(value: float) -> float | str:
    """A number as JSON can say it.

    >>> word(0.5), word(math.nan)
    (0.5, 'nan')
    """
    return value if math.isfinite(value) else str(value)


class TensorBoardWriter(Hook):
    """TensorBoard events through tensorboardX: `train/NAME` for each step, `eval/NAME` for each evaluation.

    Args:
      folder: where the events file goes.

    Raises:
      ImportError: tensorboardX is not installed; it comes with `mpjax[experiments]`.
    """

    def __init__(self, folder: str | Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoardWriter needs tensorboardX; install mpjax[experiments], or leave it out"
            ) from error
        # It warns of each infinity, and does not say of which. A skipped step has one, and is told as skipped.
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
        self._writer: Any = SummaryWriter(str(folder), write_to_disk=is_first())

    def on_step(self, attempt: int, metrics: dict[str, float]) -> None:
        self._write("train", attempt, metrics)

    def on_eval(self, attempt: int, metrics: dict[str, float]) -> None:
        self._write("eval", attempt, metrics)

    def on_end(self, result: FitResult) -> None:
        self._writer.close()

    def _write(self, kind: str, attempt: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"{kind}/{name}", value, attempt)


class ProgressBar(Hook):
    """A rich progress bar: attempts, loss, loss scale, skipped steps, rate (of the last half minute), time left.

    Args:
      attempts: how many the run will make.
      name: what stands before the bar.
    """

    def __init__(self, attempts: int, name: str = "train"):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        fields = TextColumn("loss {task.fields[loss]} scale {task.fields[scale]} skipped {task.fields[skipped]}")
        rate, name_of = TextColumn("{task.fields[rate]}/s"), TextColumn("{task.description}")
        made = MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=len(f"{attempts}/{attempts}")))
        # Where the terminal is narrow, the bar gives way.
        columns = (name_of, BarColumn(None), made, fields, rate, TimeRemainingColumn())
        self._bar = Progress(*columns, disable=not is_first())
        self._task = self._bar.add_task(f"{name:>14}", total=attempts, loss="-", scale="-", skipped="-", rate="-")
        self._bar.start()

    def on_step(self, attempt: int, metrics: dict[str, float]) -> None:
        (task,) = self._bar.tasks
        forms = {"loss": ("loss", ".4f"), "loss_scale": ("scale", "g"), "skipped": ("skipped", ".0f")}
        told: dict[str, Any] = {field: f"{metrics[x]:{form}}" for x, (field, form) in forms.items() if x in metrics}
        told["rate"] = "-" if task.speed is None else f"{task.speed:.3g}"
        self._bar.update(self._task, completed=attempt + 1, **told)

    def on_end(self, result: FitResult) -> None:
        self._bar.stop()
