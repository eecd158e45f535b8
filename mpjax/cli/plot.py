"""`mpjax plot RUN`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mpjax.cli.output import Json, print_json
from mpjax.cli.target import Refused

if TYPE_CHECKING:
    from mpjax.measure.runs import Recorded


def plot(
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")],
    out: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None,
    attempt: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    as_json: Json = False,
) -> int:
    """Draw the pictures of a run: training curves, the history of the loss scale, the exponents of each layer.

    Each is drawn where the run wrote what it shows: `metrics.jsonl` for curves and loss scale, `probe.jsonl` for the
    exponents. The paths of the pictures are printed.

    Args:
      run: the folder of an experiment, one policy's folder in it, or another that holds one of these files.
      out: where the pictures go; by default into `pictures` in the run's folder.
      attempt: draw the exponents of this attempt; by default of the last one that was probed.
      as_json: print JSON instead.
    """
    from mpjax.measure.runs import read_runs

    try:
        runs = read_runs(run)
    except NotADirectoryError as error:
        raise Refused(str(error)) from error
    for word in (word for recorded in runs.values() for word in recorded.left_out):
        print(f"mpjax plot: {word}", file=sys.stderr)
    try:
        written = _draw(runs, Path(run, "pictures") if out is None else Path(out), attempt)
    except (ImportError, OSError) as error:  # there is no matplotlib, or no place to write to
        raise Refused(str(error), 1) from error
    if not written:
        raise Refused(
            f"got {run!r}, which holds nothing to draw; legal is a folder with metrics.jsonl or probe.jsonl in it or one "
            "below; give one that a run wrote",
            1,
        )
    if as_json:
        print_json({"run": run, "written": written})
    else:
        print(*written, sep="\n")
    return 0


def _draw(runs: Mapping[str, Recorded], out: Path, attempt: int | None) -> list[Path]:
    from mpjax.measure.plots import exponent_ranges, loss_scale_history, training_curves
    from mpjax.measure.plots.curves import scaled_runs
    from mpjax.measure.plots.figure import literal
    from mpjax.measure.runs import exponent_counts

    probes = {name: _chosen(recorded.probes, attempt) for name, recorded in runs.items()}
    if attempt is not None and not any(probes.values()):
        there = sorted({n for recorded in runs.values() for n in recorded.probes})
        raise Refused(
            f"got --attempt {attempt}, which no run probed; legal are {there or 'none here'}; name one of them"
        )
    written = []
    metric = _metric(name for recorded in runs.values() for name in recorded.evaluations)
    shown = "loss (held out)" if metric == "loss" else metric.replace("_", " ")
    curves = {name: _curves(recorded, metric, shown) for name, recorded in runs.items()}
    if any(curve.get("loss") or curve.get(shown) for curve in curves.values()):
        of = next(iter(runs)) if len(runs) == 1 else "several precision policies"
        written.append(training_curves(curves, out / "curves.png", metric=shown, title=f"Training under {literal(of)}"))
    if scaled_runs(curves):
        written.append(loss_scale_history(curves, out / "loss_scale.png"))
    for name, probed in probes.items():
        counts = exponent_counts(probed) if probed else {}
        if any(n for layers in counts.values() for found in layers.values() for n in found.values()):
            title = f"{literal(name)}, attempt {probed['attempt']}"
            path = out / f"exponents-{name}.png"
            written.append(exponent_ranges(counts, path, loss_scale=float(probed.get("loss_scale", 1)), title=title))
    return written


def _chosen(probes: Mapping[int, Mapping[str, Any]], attempt: int | None) -> Mapping[str, Any]:
    return probes.get(max(probes, default=0) if attempt is None else attempt, {})


def _metric(names: Iterable[str]) -> str:
    """The held-out metric worth a panel: accuracy, else what the experiment measures beside the loss."""
    there = list(dict.fromkeys(names))
    return "accuracy" if "accuracy" in there else next((name for name in there if name != "loss"), "loss")


def _curves(recorded: Recorded, metric: str, shown: str) -> dict[str, Any]:
    at, values = recorded.evaluations.get(metric, ((), ()))
    return {**recorded.curves, "eval_attempt": at, shown: values}
