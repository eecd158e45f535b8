"""What the device's own matrix products reach, in the run in which the steps are timed."""

from __future__ import annotations

from typing import Any

from experiments.bench.rows import Settings


def measure(formats: tuple[str, ...], settings: Settings) -> dict[str, Any]:
    """TFLOP/s of a large product in each format, by `mpjax.product_rates`."""
    from experiments.bench.side_jax import environment
    from mpjax import product_rates

    rates = product_rates(64 if settings.tiny else None, formats)
    found = {
        rate.format: {"tflops": rate.tflops, "quartiles": rate.quartiles, "right": rate.right, "refused": rate.refused}
        for rate in rates
    }
    return {"rates": found, "environment": environment()}
