"""The diagnosis of a machine: what it is, what it multiplies and how fast, what to begin with, what to look out for."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform as python_platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from mpjax.measure import symptoms
from mpjax.measure.rates import FORMATS, ProductRate, product_rates
from mpjax.measure.timing import Clock
from mpjax.policy.hardware import Recommendation, find_chip, recommend

_PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "flax", "optax", "numpy")


class Smi(NamedTuple):
    """What `nvidia-smi` tells of the first GPU."""

    name: str
    driver: str
    memory: int


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found.

    Args:
      platform: jax's name for what it runs on: cpu, gpu, tpu.
      device_kind: the name of the first device.
      devices: how many this process has.
      memory: bytes of the first device that jax may take, or None.
      driver: the NVIDIA driver's version, or None.
      versions: from Python and package to version; a package that is not installed is not there.
      chip: the row of the table of chips, or None.
      support: from format to what the table says of it: native, emulated, none, unknown; empty without a row.
      peaks: from format to the vendor's dense peak in TFLOP/s, where the table has it.
      rates: the products that were measured here.
      recommendation: the policy to begin with, and why.
      warnings: what will be slow or wrong here, each with where it comes from.
    """

    platform: str
    device_kind: str
    devices: int
    memory: int | None
    driver: str | None
    versions: Mapping[str, str]
    chip: str | None
    support: Mapping[str, str]
    peaks: Mapping[str, float]
    rates: tuple[ProductRate, ...]
    recommendation: Recommendation
    warnings: tuple[str, ...]

    def says(self, product: str) -> str:
        """What the table says of a product's format; of one of two formats, the worse."""
        found = [self.support.get(part, "unknown") for part in product.split("×")]
        return max(found, key=("native", "unknown", "emulated", "none").index)

    def peak(self, product: str) -> float | None:
        """The vendor's peak for a product's format, where the table has it; of one of two formats, the lower."""
        found = [self.peaks.get(part) for part in product.split("×")]
        known = [peak for peak in found if peak is not None]
        return min(known) if len(known) == len(found) else None

    @property
    def wrong(self) -> tuple[str, ...]:
        """The formats that are native by the table and whose product was wrong."""
        return tuple(rate.format for rate in self.rates if rate.right is False and self.says(rate.format) == "native")


def doctor(size: int | None = None, formats: tuple[str, ...] = FORMATS, clock: Clock = time.perf_counter) -> Diagnosis:
    """Look at the default device, multiply in every format on it, and say what to begin with and what to look out for.

    Args:
      size: of the square matrices, see `product_rates`.
      formats: which products to measure, some of `measure.rates.FORMATS`.
      clock: the clock of the products, in seconds.

    Raises:
      ValueError: as `product_rates`.
      RuntimeError: jax finds no device of the platform that it was told to use.

    >>> found = doctor(64, ("float32",))
    >>> found.wrong, found.recommendation.policy in ("float32", "mixed_bfloat16", "mixed_float16")
    ((), True)
    """
    device = jax.local_devices()[0]
    kind, platform = device.device_kind, device.platform
    chip, smi = find_chip(kind), nvidia_smi()
    rates = product_rates(size, formats, clock)
    support: Mapping[str, str] = {} if chip is None else dict(chip.support)
    return Diagnosis(
        platform=platform,
        device_kind=kind,
        devices=jax.local_device_count(),
        memory=_memory(device),
        driver=None if smi is None else smi.driver,
        versions=_versions(),
        chip=None if chip is None else chip.name,
        support=support,
        peaks={} if chip is None else dict(chip.tflops),
        rates=rates,
        recommendation=recommend(device),
        warnings=(
            *symptoms.from_rates(rates, support),
            *symptoms.from_trials(),
            *symptoms.from_table(kind, chip),
            *symptoms.from_settings(platform, None if smi is None else smi.name),
        ),
    )


def nvidia_smi() -> Smi | None:
    """The first GPU by NVIDIA's own tool; None where there is none, or it says anything else than it should."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = ("--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits")
    try:
        done = subprocess.run([command, *query], capture_output=True, text=True, timeout=20)
        name, driver, mebibytes = (part.strip() for part in done.stdout.splitlines()[0].split(","))
        return Smi(name, driver, int(mebibytes) * 2**20)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _memory(device: Any) -> int | None:
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # a plugin that does not know
        return None
    return None if limit is None else int(limit)


def _versions() -> dict[str, str]:
    found = {"python": python_platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
