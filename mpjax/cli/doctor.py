"""`mpjax doctor`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mpjax
from mpjax.cli.output import Json, as_text, print_json, show
from mpjax.cli.target import Refused

if TYPE_CHECKING:
    from mpjax.measure.doctor import Diagnosis
    from mpjax.measure.rates import ProductRate


def doctor(size: int | None = None, write: Path | None = None, as_json: Json = False) -> int:
    """Examine this machine: its device and versions, how fast it multiplies each format, which policy to begin with,
    and what will be slow or wrong here.

    The exit code is 1 where a product that should be native comes out wrong.

    Args:
      size: multiply N×N matrices (a multiple of 16); by default 8192 on an accelerator, at most 1024 on a CPU.
      write: also write the JSON to this file.
      as_json: print JSON instead.
    """
    from mpjax.measure.doctor import doctor as examine

    try:
        found = examine(size)
    except ValueError as error:
        raise Refused(str(error)) from error
    except (RuntimeError, AssertionError) as error:  # jax, of a platform that it was told to use and has not
        asked, said = os.environ.get("JAX_PLATFORMS"), str(error) or "no backend"
        raise Refused(
            f"jax finds no device, with JAX_PLATFORMS={asked!r}: {said}; unset it, or install jax for that platform", 1
        ) from error
    told = _json(found)
    if write is not None:
        try:
            write.write_text(as_text(told) + "\n", encoding="utf-8")
        except OSError as error:
            raise Refused(f"got --write {write}: {error}; legal is a file in a folder that is there", 1) from error
    if as_json:
        print_json(told)
    else:
        _show(found)
    return 1 if found.wrong else 0


def _json(found: Diagnosis) -> dict[str, Any]:
    rates = [
        dataclasses.asdict(rate)
        | {"table": found.says(rate.format), "peak_tflops": found.peak(rate.format)}
        | {"tflops": rate.tflops, "quartiles_tflops": rate.quartiles, "right": rate.right}
        for rate in found.rates
    ]
    return {"mpjax": mpjax.__version__} | dataclasses.asdict(found) | {"rates": rates, "wrong": found.wrong}


def _show(found: Diagnosis) -> None:
    from mpjax.measure.memory import size_text

    kind = found.device_kind + f" ({found.platform})" * (found.platform != found.device_kind)
    versions = {"mpjax": mpjax.__version__, **found.versions}
    here = {
        "device": kind + f", {found.devices} of them" * (found.devices > 1),
        "in the table": found.chip or "no",
        "memory for jax": "not known" if found.memory is None else size_text(found.memory),
        "NVIDIA driver": found.driver or "none",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    for name, value in here.items():
        print(f"{name:<16}{value}")
    print()
    n = found.rates[0].size if found.rates else 0
    rows = [_row(found, rate) for rate in found.rates]
    columns = ("format", "table", "TFLOP/s", "quartiles", "peak", "of peak", "error", "allowed", "right")
    show(f"Products of {n}×{n} matrices, measured here", columns, rows)
    print(f"Begin with {found.recommendation}\n")
    print("Look out for" if found.warnings else "Nothing to look out for.")
    for warning in found.warnings:
        print(f"- {warning}")


def _row(found: Diagnosis, rate: ProductRate) -> tuple[str, ...]:
    table, peak = found.says(rate.format), found.peak(rate.format)
    if rate.tflops is None or rate.quartiles is None:
        return rate.format, table, "refused", *"–" * 6
    low, high = rate.quartiles
    return (
        rate.format,
        table,
        f"{rate.tflops:.3g}",
        f"{low:.3g} to {high:.3g}",
        "–" if peak is None else f"{peak:g}",
        "–" if peak is None else f"{rate.tflops / peak:.0%}",
        f"{rate.error:.1e}" if rate.error else "0",
        f"{rate.tolerance:.1e}" if rate.tolerance else "exact",
        "yes" if rate.right else "NO",
    )
