"""What will be slow or wrong on this machine: from the table of chips, from settings that are in force, or tried here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mpjax.measure.rates import ProductRate
from mpjax.numerics.attention import attention
from mpjax.policy.hardware import Chip

HALVES = ("bfloat16", "float16")

_FLAGS = {
    "excess_precision": "lets XLA skip roundings to half precision",
    "fast_math": "lets XLA assume that there are no NaNs and infinities, and reorder sums",
    "fast_min_max": "lets a NaN get lost in min and max",
    "tf32": "changes which float32 products are rounded to tf32",
    "f8": "changes how float8 products are summed",
    "bf16": "changes which products run in bfloat16",
    "deterministic": "forbids the faster kernels whose sums differ from run to run",
}
"""Parts of the names of XLA's flags that touch precision, and what such a flag does."""


def from_table(kind: str, chip: Chip | None) -> list[str]:
    """What the table of chips says of a device.

    >>> from mpjax.policy.hardware import find_chip
    >>> from_table("Tesla T4", find_chip("Tesla T4"))[0]
    'bfloat16 is emulated on Tesla T4 (table): a bfloat16 policy is right there, and saves memory, but no time'
    """
    if chip is None:
        return [
            f"{kind} is not in the table of chips: of what it multiplies natively nothing is known but the rates here"
        ]
    found = [
        f"{half} is emulated on {kind} (table): a {half} policy is right there, and saves memory, but no time"
        for half in HALVES
        if chip.support[half] == "emulated"
    ]
    narrow = [name for name in ("float8_e4m3fn", "float8_e5m2", "int8") if chip.support[name] == "emulated"]
    if narrow:
        found.append(f"{', '.join(narrow)}: emulated on {kind} (table), so no faster than the format that stands in")
    return found


def from_settings(platform: str, gpu: str | None, environment: Mapping[str, str] = os.environ) -> list[str]:
    """What the settings of jax, XLA and the driver change.

    Args:
      platform: jax's name for what it runs on.
      gpu: what `nvidia-smi` calls the GPU of this machine, or None.
      environment: the environment variables.

    >>> from_settings("gpu", "NVIDIA L4", {"NVIDIA_TF32_OVERRIDE": "0"})
    ['NVIDIA_TF32_OVERRIDE=0 is set: 0 forbids tf32 in every library, 1 forces it']
    """
    config: Any = jax.config  # whose names are made at run time
    found = []
    if gpu is not None and platform == "cpu":
        asked = config.jax_platforms
        why = f"JAX_PLATFORMS={asked} asks for that" if asked else "jaxlib has no CUDA: pip install 'jax[cuda12]'"
        found.append(f"nvidia-smi finds {gpu}, but jax runs on the CPU; {why}")
    if config.jax_enable_x64:
        found.append("jax_enable_x64 is on: Python numbers and numpy arrays come in as float64, which nothing has fast")
    precision = config.jax_default_matmul_precision
    if precision is not None:
        found.append(f"jax_default_matmul_precision is {precision!r}: it rules every product that names no precision")
    for flag in environment.get("XLA_FLAGS", "").split():
        name, _, value = flag.partition("=")
        effect = next((effect for part, effect in _FLAGS.items() if part in name), None)
        if effect is not None:
            said = f"off; on, it {effect}" if value.lower() in ("false", "0") else f"it {effect}"
            found.append(f"XLA_FLAGS has {flag}: {said}")
    if override := environment.get("NVIDIA_TF32_OVERRIDE"):
        found.append(f"NVIDIA_TF32_OVERRIDE={override} is set: 0 forbids tf32 in every library, 1 forces it")
    return found


def from_rates(rates: Iterable[ProductRate], support: Mapping[str, str]) -> list[str]:
    """What the measured products say against the table: wrong, refused, or no faster than float32.

    Args:
      rates: the measured products.
      support: from format to what the table says of it here; empty for an unknown chip.
    """
    rates = list(rates)
    full = next((rate.tflops for rate in rates if rate.format == "float32"), None)
    found = []
    for rate in rates:
        native = all(support.get(part) == "native" for part in rate.format.split("×"))
        if rate.right is False:
            found.append(
                f"{rate.format} products are WRONG here: off by {rate.error:.1e} of the largest element, where "
                f"{rate.tolerance:.1e} is legal"
            )
        if rate.refused is not None:
            found.append(f"{rate.format} products are refused here (tried): {rate.refused}")
        slow = rate.tflops is not None and full is not None and rate.tflops <= full
        if native and slow and rate.format.startswith(("bfloat16", "float16", "float8")):
            found.append(
                f"{rate.format} ran at {rate.tflops:.3g} TFLOP/s and float32 at {full:.3g} (measured), although the table "
                "says native: is the device shared, throttled, or the size too small?"
            )
    return found


def from_trials(
    ours: Callable[..., jax.Array] = attention,
    theirs: Callable[..., jax.Array] = jax.nn.dot_product_attention,
    halves: Sequence[str] = HALVES,
) -> list[str]:
    """Attention in half precision, compiled and run on the default device: jax's and our own.

    (On a CPU jax's own raises in float16, in jax 0.10 to 0.12 and only when jitted: it asks for a product that XLA does
    not have there.)
    """
    found = []
    for half in halves:
        jaxs, mine = (_failure(function, half) for function in (theirs, ours))
        if jaxs is not None:
            way_out = (
                "mpjax's own attention, which a wrapped module gets, runs" if mine is None else "mpjax's own fails too"
            )
            found.append(f"jax.nn.dot_product_attention in {half} fails here when jitted (tried): {jaxs}; {way_out}")
        elif mine is not None:
            found.append(f"mpjax's attention in {half} fails here (tried): {mine}")
    return found


def _failure(function: Callable[..., jax.Array], half: str) -> str | None:
    """What a small attention raises, in one line; None where it gives finite numbers."""
    x = jax.random.normal(jax.random.key(0), (1, 64, 2, 64), jnp.float32).astype(half)
    try:
        finite = bool(jnp.isfinite(jax.jit(lambda x: function(x, x, x, is_causal=True))(x)).all())
    except Exception as error:  # whatever a compiler or a driver raises
        return f"{type(error).__name__}, {_first_line(error)}"
    return None if finite else "NaN or infinity in its result"


def _first_line(error: Any) -> str:
    return (str(error).strip() or "without a word").splitlines()[0]
