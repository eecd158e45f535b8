"""Names of float formats, and the facts of each: largest value, smallest normal, eps, bits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.core.types import DTypeLike

_FLOAT8 = ("e3m4", "e4m3", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")

# jmp's four formats keep jmp's order: the first name is the one that `str(policy)` prints.
NAMES: dict[np.dtype, tuple[str, ...]] = {
    jnp.dtype("bfloat16"): ("bf16", "bfloat16"),
    jnp.dtype("float16"): ("f16", "float16"),
    jnp.dtype("float32"): ("full", "f32", "float32"),
    jnp.dtype("float64"): ("f64", "float64"),
    **{jnp.dtype(f"float8_{kind}"): (f"f8_{kind}", f"f8{kind}", f"float8_{kind}") for kind in _FLOAT8},
}
_BY_NAME = {name: dtype for dtype, names in NAMES.items() for name in names}


@dataclasses.dataclass(frozen=True)
class FormatFacts:
    """What a float format can hold: `max`, smallest normal `tiny`, smallest subnormal, `eps` (ulp of 1), and `bits`."""

    name: str
    bits: int
    max: float
    tiny: float
    smallest_subnormal: float
    eps: float


def canonical(dtype: DTypeLike) -> np.dtype:
    """The one `np.dtype` for a float dtype however it was spelled, so that `==`, `hash` and `str` agree.

    Args:
      dtype: a name as `parse_dtype` takes it, an `np.dtype`, or a scalar type such as `jnp.bfloat16`.

    Raises:
      ValueError: it is not a real floating point dtype that mpjax knows.

    >>> canonical(jnp.bfloat16) == canonical("bf16") == np.dtype("bfloat16")
    True
    """
    if isinstance(dtype, str):
        return parse_dtype(dtype)
    try:
        found = None if dtype is None else jnp.dtype(dtype)  # numpy takes None for float64
    except TypeError:
        found = None
    if found not in NAMES:
        raise ValueError(f"{dtype!r} is not a float dtype for a policy; use one of {choices()}")
    return found


def parse_dtype(name: str) -> np.dtype:
    """The dtype behind a name: jmp's long and short names, every float8, `half` and `full`.

    `half` is what `half_dtype()` says on this machine (bfloat16 on TPU, else float16: jmp's meaning).

    Raises:
      ValueError: unknown name; the message lists the choices.

    >>> parse_dtype("f8_e4m3fn")
    dtype(float8_e4m3fn)
    """
    name = name.strip()
    if name == "half":
        return jnp.dtype(half_dtype())
    if name not in _BY_NAME:
        raise ValueError(f"Unknown dtype {name!r}; use one of {choices()}")
    return _BY_NAME[name]


def choices() -> str:
    """The legal dtype names, for error messages: the short ones, then the float8 family."""
    return "half, full, f16, bf16, f32, f64 (or float16, …), " + ", ".join(f"f8_{kind}" for kind in _FLOAT8)


def half_dtype() -> Any:
    """jmp's answer to "half of what?": bfloat16 on a TPU, float16 elsewhere. `hardware_half()` is the better one.

    A scalar type, as in jmp, whose README calls it: `half_dtype()(2**15)`.

    >>> half_dtype() in (jnp.float16, jnp.bfloat16)
    True
    """
    return jnp.bfloat16 if jax.local_devices()[0].platform == "tpu" else jnp.float16


def short_name(dtype: DTypeLike) -> str:
    """The name by which `str(policy)` writes a dtype, and which parses back to it.

    >>> short_name(jnp.float32), short_name("float8_e5m2")
    ('full', 'f8_e5m2')
    """
    return NAMES[canonical(dtype)][0]


@functools.cache
def facts(dtype: DTypeLike) -> FormatFacts:
    """The facts of one format, read from `jnp.finfo`.

    >>> facts("float16").max, facts("bf16").eps
    (65504.0, 0.0078125)
    """
    dtype = canonical(dtype)
    info = jnp.finfo(dtype)
    return FormatFacts(
        name=dtype.name,
        bits=info.bits,
        max=float(info.max),
        tiny=float(info.tiny),
        smallest_subnormal=float(info.smallest_subnormal),
        eps=float(info.eps),
    )


def wide(dtype: DTypeLike) -> np.dtype:
    """The dtype for sums and scales of numbers in `dtype`: itself if inexact and of 32 bits or more, else float32.

    (`jnp.promote_types` would do, but raises where dtype promotion is strict.)

    >>> wide("bfloat16"), wide("float64")
    (dtype('float32'), dtype('float64'))
    """
    dtype = jnp.dtype(dtype)
    return dtype if jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4 else jnp.dtype("float32")


def is_float(x: Any) -> bool:
    """Whether `x` is an array, tracer or `ShapeDtypeStruct` of a real float dtype (not a Python scalar, not a key).

    >>> is_float(np.float32(1)), is_float(1.0), is_float(np.arange(3))
    (True, False, False)
    """
    # A Flax module has a `dtype` too, and the class `np.float32` has an `astype`; only an array can be cast.
    # (`isinstance(x, ArrayLike)` is False for tracers.)
    is_array = (hasattr(x, "astype") and not isinstance(x, type)) or isinstance(x, jax.ShapeDtypeStruct)
    return is_array and hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
