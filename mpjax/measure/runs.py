"""A run folder, read back: what each policy's run wrote into `metrics.jsonl` and `probe.jsonl`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS, PROBE = "metrics.jsonl", "probe.jsonl"
KINDS = ("activation", "gradient", "update")


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What one policy's run wrote.

    Args:
      curves: `attempt`, and a number for each under `loss`, `loss_scale`, … as `training_curves` takes them; NaN where
        there is none. Of attempts that a resumed run made anew the later ones, and nothing that the earlier run did
        beyond: the state went on without it.
      evaluations: from a held-out metric to (attempts before it, values).
      probes: the lines of `probe.jsonl`, by attempt.
      left_out: what could not be read, in words: the last line of a run that was killed.
    """

    curves: Mapping[str, Sequence[float]]
    evaluations: Mapping[str, tuple[Sequence[int], Sequence[float]]]
    probes: Mapping[int, Mapping[str, Any]]
    left_out: Sequence[str] = ()


def read_runs(folder: str | Path) -> dict[str, Recorded]:
    """From a policy's name to what its run wrote; empty where there is nothing of a run.

    Args:
      folder: that of an experiment, with a folder for each policy; or one of these.

    Returns:
      The runs, in the order in which `config.json` names the policies, others after them by name.

    Raises:
      NotADirectoryError: the folder is none.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     line = '{"attempt": 0, "step": {"loss": 2.5, "loss_scale": 1.0, "skipped": 0}}'
    ...     _ = (Path(folder) / "metrics.jsonl").write_text(line)
    ...     [run] = read_runs(folder).values()
    >>> run.curves
    {'attempt': [0], 'loss': [2.5], 'loss_scale': [1.0], 'skipped': [0.0]}
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(
            f"got {str(folder)!r}, which is no folder; legal is one that an experiment wrote: give its path"
        )
    if _is_run(folder):
        return {folder.resolve().name: _read(folder)}
    policies = _policies(folder / "config.json")
    found = {inner.name: inner for inner in folder.iterdir() if inner.is_dir() and _is_run(inner)}
    order = sorted(found, key=lambda name: (policies.index(name) if name in policies else len(policies), name))
    return {name: _read(found[name]) for name in order}


def exponent_counts(probed: Mapping[str, Any]) -> dict[str, dict[str, dict[int | str, int]]]:
    """One line of `probe.jsonl` as `exponent_ranges` takes it: kind → path → exponent → how many values.

    Readings of one kind at one path (a layer that is called twice) are added; so are the updates of a module's own params.

    >>> exponent_counts({"readings": [{"path": "a", "kind": "gradient", "exponents": {"-3": 2}, "zero": 1, "count": 3}]})
    {'gradient': {'a': {-3: 2, 'zero': 1}}}
    """
    counts: dict[str, dict[str, Counter[int | str]]] = {}
    for reading in sorted(probed["readings"], key=lambda one: (*KINDS, one["kind"]).index(one["kind"])):
        path = reading["path"].rpartition("/")[0] if reading["kind"] == "update" else reading["path"]
        here = counts.setdefault(reading["kind"], {}).setdefault(path, Counter())
        here.update({int(exponent): n for exponent, n in reading["exponents"].items()})
        here.update({name: reading[name] for name in ("zero", "inf", "nan") if reading.get(name)})
    return {kind: {path: dict(found) for path, found in layers.items()} for kind, layers in counts.items()}


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (METRICS, PROBE))


def _policies(config: Path) -> list[str]:
    """In what order the run trained them; that there is no such file only costs the order."""
    try:
        return [str(name) for name in json.loads(config.read_text(encoding="utf-8"))["config"]["policies"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _read(folder: Path) -> Recorded:
    metrics, odd = _lines(folder / METRICS, dict, "step", "eval")
    probes, odd_probes = _lines(folder / PROBE, list, "readings")
    steps: dict[int, Mapping[str, Any]] = {}
    evals: dict[int, Mapping[str, Any]] = {}
    for line in metrics:
        attempt = line["attempt"]
        if "step" in line:
            _go_back(steps, attempt)
            _go_back(evals, attempt + 1)  # one at this attempt was made before it
            steps[attempt] = line["step"]
        if "eval" in line:
            _go_back(evals, attempt)
            evals[attempt] = line["eval"]
    probed: dict[int, Mapping[str, Any]] = {}
    for line in probes:
        _go_back(probed, line["attempt"])
        probed[line["attempt"]] = line
    curves: dict[str, list[Any]] = {"attempt": []}
    for name in dict.fromkeys(name for step in steps.values() for name in step):
        curves[name] = [_number(step.get(name)) for step in steps.values()]
    curves["attempt"] = list(steps)  # last: a metric may have that name
    evaluations = {}
    for name in dict.fromkeys(name for found in evals.values() for name in found):
        at = [attempt for attempt, found in evals.items() if name in found]
        evaluations[name] = (at, [_number(evals[attempt][name]) for attempt in at])
    return Recorded(curves, evaluations, probed, (*odd, *odd_probes))


def _go_back(found: dict[int, Any], attempt: int) -> None:
    """Forget this attempt and all behind it: a run that repeats one went on from a state in which they had not been."""
    while found and next(reversed(found)) >= attempt:
        found.popitem()


def _number(value: Any) -> float:
    """NaN for what is none: a user's own text, list or null."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _lines(path: Path, shape: type, *kinds: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of an attempt in a file, a line each, and a word for each line that is none."""
    good, odd = [], []
    if path.is_file():
        for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            whole = isinstance(line, dict) and any(isinstance(line.get(kind), shape) for kind in kinds)
            if whole and isinstance(line.get("attempt"), int):
                good.append(line)
            else:
                odd.append(f"line {number} of {path} is cut off or no record of an attempt; left out")
    return good, odd
