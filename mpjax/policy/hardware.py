"""Which chip multiplies which format natively, each row with its source; and what to recommend on the chip at hand.

Neither this file nor a look-up by name imports jax, so that the table can be printed at once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

Support = Literal["native", "emulated", "none", "unknown"]
"""native: the matrix unit takes the format as it is; emulated: XLA multiplies in another format (right, but no faster);
none: there is no such product; unknown: no source was found."""

FORMATS = ("float32", "tf32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "float4_e2m1fn")
"""The columns of the table: the operands of a matrix product. (tf32 is float32 rounded on the way in.)"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One row: what a chip multiplies natively, at which dense peak, and who says so.

    Attributes:
      name: short name.
      pattern: regular expression that finds this chip in jax's `device.device_kind`.
      support: from each of `FORMATS` to `"native"`, `"emulated"`, `"none"` or `"unknown"`.
      tflops: peak of dense products, 10¹² operations a second, of the formats for which a source gives it.
      source: titles, years and addresses.
    """

    name: str
    pattern: str
    support: Mapping[str, Support] = dataclasses.field(hash=False)
    tflops: Mapping[str, float] = dataclasses.field(hash=False)
    source: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """A policy for a device, whether it wants a loss scale, and why."""

    policy: str
    needs_loss_scale: bool
    why: str

    def __str__(self) -> str:
        scale = "with a dynamic loss scale" if self.needs_loss_scale else "without a loss scale"
        return f"{self.policy}, {scale}: {self.why}"


# Read in stored copies in November 2026; "quoted" means that the vendor's own paper was not to be had there. The first
# two say what XLA does on a chip that lacks a format.
_XLA_GPU = "XLA, gpu_compiler.cc, float_normalization: bfloat16 to float32, float8 and float4 to float16 (2025)"
_XLA_T4 = "XLA issue 12429, bfloat16 on a T4 runs as float32 (2024), github.com/openxla/xla/issues/12429"
_TE = "NVIDIA, Transformer Engine support matrix by compute capability, nvidia.github.io/TransformerEngine"
_TRT = "NVIDIA, TensorRT 8.4 support matrix, hardware and precision (2022; read as quoted by others)"
_TPU = "jax 0.12, jax/_src/tpu_info.py, is_matmul_supported (2025)"
_BF16 = "Google Cloud, Improve your model's performance with bfloat16, cloud.google.com/tpu/docs/bfloat16"
_TPU_F16 = "pytorch/xla issue 3041, TPU does not support fp16 well (2021), github.com/pytorch/xla/issues/3041"
_GOOGLE = (_TPU, _BF16, _TPU_F16)


def _row(name: str, pattern: str, cells: str, *source: str) -> Chip:
    """A number is a native format's peak; n: native, no peak found; e: emulated; -: none; ?: unknown."""
    words: dict[str, Support] = {"n": "native", "e": "emulated", "-": "none", "?": "unknown"}
    columns = dict(zip(FORMATS, cells.split(), strict=True))
    support = {column: words.get(cell, "native") for column, cell in columns.items()}
    tflops = {column: float(cell) for column, cell in columns.items() if cell not in words}
    return Chip(
        name=name,
        pattern=pattern,
        support=MappingProxyType(support),
        tflops=MappingProxyType(tflops),
        source=source,
    )


# fmt: off
CHIPS: tuple[Chip, ...] = (
    #                                   float32 tf32   bf16   float16 e4m3   e5m2   int8   float4
    _row("V100", r"\bV100S?\b",        "15.7    -      e      125     e      e      n      e",  # int8 by DP4A
         "NVIDIA, Programming Tensor Cores in CUDA 9 (2017), developer.nvidia.com/programming-tensor-cores-cuda-9-0",
         "Cornell Virtual Workshop, Tesla V100 (float32), cvw.cac.cornell.edu/gpu-architecture", _TRT, _XLA_GPU),
    _row("T4", r"\bT4G?\b",            "8.1     -      e      65      e      e      130    e",
         "NVIDIA T4 datasheet (2018; figures read in the press of 2018-09-13, geektopia.es)", _TRT, _XLA_T4, _XLA_GPU),
    _row("A100", r"\bA100X?\b",        "19.5    156    312    312     e      e      624    e",
         "NVIDIA A100 datasheet (2021; quoted on glennklockwood.com/garden/processors/A100)", _TE, _XLA_GPU),
    _row("L4", r"\bL4\b",              "30.3    60     121    121     242.5  242.5  242.5  e",
         "NVIDIA L4 datasheet (2023; its figures are with sparsity, halved here; read as quoted by resellers)",
         _TE, _XLA_GPU),
    _row("H100", r"\bG?H[12]00\b",     "66.9    494.7  989.4  989.4   1978.9 1978.9 1978.9 e",  # SXM5; PCIe is slower
         "NVIDIA H100 white paper (2022; SXM5, H200 the same; quoted on glennklockwood.com/garden/processors/h100)",
         _TE, _XLA_GPU),
    _row("B200", r"\bG?B200\b",        "80      1100   2250   2250    4500   4500   4500   9000",  # HGX, 1000 W
         "NVIDIA Blackwell architecture brief (2024; quoted on glennklockwood.com/garden/processors/B200)", _TE),
    _row("TPU v2", r"^TPU v2$",        "e       -      46     e       e      e      e      ?", *_GOOGLE),
    _row("TPU v3", r"^TPU v3$",        "e       -      123    e       e      e      e      ?",
         "Google Cloud, TPU v3, docs.cloud.google.com/tpu/docs/v3", *_GOOGLE),
    _row("TPU v4", r"^TPU v4$",        "e       -      275    e       e      e      275    ?",
         "Google Cloud, TPU v4, docs.cloud.google.com/tpu/docs/v4", *_GOOGLE),
    _row("TPU v5e", r"^TPU v5 ?(e|lite)$", "e   -      197    e       e      n      393    ?",
         "Google Cloud, TPU v6e, docs.cloud.google.com/tpu/docs/v6e", *_GOOGLE),
    _row("TPU v5p", r"^TPU v5p?$",     "e       -      459    e       e      459    918    ?",
         "Google Cloud, TPU7x (bfloat16, float8), docs.cloud.google.com/tpu/docs/tpu7x", *_GOOGLE),
    _row("TPU v6e", r"^TPU v6 ?(e|lite)$", "e   -      918    e       e      918    1836   ?",
         "Google Cloud, TPU v6e, docs.cloud.google.com/tpu/docs/v6e",
         "Google Cloud, TPU7x (float8), docs.cloud.google.com/tpu/docs/tpu7x", *_GOOGLE),
    _row("TPU v7", r"^TPU ?v?7x?$",    "e       -      2307   e       4614   4614   e      ?",  # Ironwood
         "Google Cloud, TPU7x (Ironwood), docs.cloud.google.com/tpu/docs/tpu7x", *_GOOGLE),
    _row("CPU", r"^cpu$",              "n       -      e      e       e      e      n      -",
         "the HLO that jax 0.10 and 0.12 compile on x86-64 (2026): bfloat16 and int8 reach the kernel as they are",
         "XLA issue 10556, bfloat16 is native with AMX (2024), github.com/openxla/xla/issues/10556",
         "jax pull request 22055, float16 is upcast on most (2024), github.com/jax-ml/jax/pull/22055"),
)
# fmt: on


def find_chip(device_kind: str) -> Chip | None:
    """The row for jax's `device.device_kind`, or None.

    Raises:
      ValueError: it is no text.

    >>> find_chip("NVIDIA H100 80GB HBM3").tflops["bfloat16"]
    989.4
    >>> find_chip("Tesla T4").support["bfloat16"]
    'emulated'
    """
    if not isinstance(device_kind, str):
        raise ValueError(
            f"device_kind is {device_kind!r}; legal is the text that jax gives a device; pass device.device_kind"
        )
    return next((chip for chip in CHIPS if re.search(chip.pattern, device_kind, re.IGNORECASE)), None)


def recommend(device: Any = None) -> Recommendation:
    """The policy to begin with on a device: half precision where the chip multiplies it natively.

        bfloat16 native (Ampere and newer, every TPU)   mixed_bfloat16, no loss scale
        float16 native, bfloat16 not (Volta, Turing)    mixed_float16 with a dynamic loss scale
        neither, or an unknown device                   float32

    An NVIDIA chip that is not in the table is judged by its compute capability. Where float8 is native too, it is named as an
    option beside bfloat16.

    Args:
      device: a jax device, or anything with its `platform` and `device_kind` (and `compute_capability`); or a
        `device_kind` alone; the first local device by default.

    Raises:
      ValueError: it is neither.

    >>> print(recommend("Tesla V100-SXM2-16GB").policy, recommend("TPU v5 lite").policy)
    mixed_float16 mixed_bfloat16
    """
    platform, kind, capability = _identify(device)
    best, why = _best_format(platform, kind, capability)
    if best == "bfloat16" and _multiplies_float8(kind, capability):
        why = f"{why}; {_FLOAT8}"
    return Recommendation("float32" if best == "float32" else f"mixed_{best}", best == "float16", why)


def hardware_half(device: Any = None) -> np.dtype:
    """The better 16-bit format of a device: float16 on Volta and Turing, bfloat16 everywhere else.

    Where neither is native (a CPU without AMX, an unknown device) it is bfloat16 too: it needs no loss scale, and XLA's
    CPU kernels take it without a cast. (`half_dtype()` keeps jmp's meaning: float16 on everything but a TPU.)

    Args:
      device: as in `recommend`.

    Raises:
      ValueError: it is not a device.

    >>> hardware_half("NVIDIA L4"), hardware_half("Tesla T4")
    (dtype(bfloat16), dtype('float16'))
    """
    import jax.numpy as jnp  # numpy learns the name bfloat16 from it

    return jnp.dtype("float16" if _best_format(*_identify(device))[0] == "float16" else "bfloat16")


def _identify(device: Any) -> tuple[str, str, tuple[int, int] | None]:
    """(platform, device_kind, compute capability) of a device; of a name alone, the last two."""
    if device is None:
        import jax

        device = jax.local_devices()[0]
    if isinstance(device, str) and device.strip():
        return "", device.strip(), None
    platform, kind = getattr(device, "platform", None), getattr(device, "device_kind", None)
    if not (isinstance(platform, str) and isinstance(kind, str)):
        raise ValueError(
            f"device is {device!r}; legal is a jax device (with platform and device_kind) or a device_kind such as "
            "'NVIDIA L4'; pass one of jax.devices(), or nothing for the first"
        )
    # "8.9" on CUDA, "gfx942" on ROCm, absent elsewhere.
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return platform, kind, (int(found[1]), int(found[2])) if found else None


def _best_format(platform: str, kind: str, capability: tuple[int, int] | None) -> tuple[str, str]:
    """The format to compute in, and why."""
    chip = find_chip(kind)
    if chip is not None:
        if chip.support["bfloat16"] == "native":
            return "bfloat16", f"{kind} multiplies bfloat16 natively{_peaks(chip, 'bfloat16')}; it has float32's range"
        if chip.support["float16"] == "native":
            return "float16", (
                f"{kind} multiplies float16 natively{_peaks(chip, 'float16')} and bfloat16 only as float32; gradients "
                "under 2⁻²⁴ need the scale"
            )
        return "float32", f"{kind} multiplies half precision as float32 as a rule, so it saves memory and no time"
    if platform == "tpu" or kind.startswith("TPU"):
        return "bfloat16", f"{kind} is not in the table, but every TPU since v2 multiplies bfloat16"
    if capability is not None and capability >= (7, 0):
        words = f"{kind} is not in the table; compute capability {capability[0]}.{capability[1]} multiplies"
        if capability >= (8, 0):
            return "bfloat16", f"{words} bfloat16 natively (8.0 and newer do)"
        return "float16", f"{words} float16 natively and bfloat16 only as float32 (7.x); small gradients need the scale"
    if capability is not None:
        return "float32", f"{kind} has compute capability {capability[0]}.{capability[1]}: no Tensor Cores before 7.0"
    return "float32", f"{kind} is not in the table; measure a half policy against float32 before you rely on it"


# The figures: experiments/records/2026-11-29-bench-h200; ms a step in bfloat16 and in mixed_fp8: 133.22, 109.09; 34.56, 34.82.
_FLOAT8 = (
    "mixed_fp8 is an option for wide dense layers, to be measured on your own model: on one H200 a GPT of 1.3B params ran at "
    "1.22 × the speed of bfloat16 with it, GPT-2 124M at 0.99 ×"
)


def _multiplies_float8(kind: str, capability: tuple[int, int] | None) -> bool:
    """Whether both formats that `dot=fp8` needs are native; NVIDIA chips have them since Ada (8.9)."""
    chip = find_chip(kind)
    if chip is not None:
        return chip.support["float8_e4m3fn"] == chip.support["float8_e5m2"] == "native"
    return capability is not None and capability >= (8, 9)


def _peaks(chip: Chip, half: str) -> str:
    if half in chip.tflops and "float32" in chip.tflops:
        return f" ({chip.tflops[half]:g} against {chip.tflops['float32']:g} TFLOP/s in float32 at best)"
    return f" ({chip.tflops[half]:g} TFLOP/s at best)" if half in chip.tflops else ""
