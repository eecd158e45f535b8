"""How fast this device multiplies each format, and whether it multiplies right: the product first, then the clock."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.measure.timing import Clock, Timing, time_blocks

FORMATS = (
    "float32", "tf32", "bfloat16", "float16", "float8_e4m3fn", "float8_e4m3fn×float8_e5m2", "int8"
)  # fmt: skip
"""What is measured: float32 at highest precision; tf32: float32 at jax's default precision, on a GPU; the others by name.

float8_e4m3fn×float8_e5m2 is the product of a float8 backward pass.
"""

_SECONDS = {"cpu": 0.06}
"""How long a block lasts, about; 0.3 s elsewhere: a chip under load settles to the clock that its power allows."""
_BLOCKS = 5
_SAMPLE = 64
"""So many rows times so many columns of a product are compared with numpy's: all of 8192³ would take it a minute."""


@dataclasses.dataclass(frozen=True)
class ProductRate:
    """What came of multiplying two n×n matrices in one format.

    Args:
      format: one of `FORMATS`.
      size: n.
      timing: seconds a product; None where there was none.
      error: largest difference to the float64 product of the same operands, by the largest element of that; None
        likewise.
      tolerance: the error that the format may have.
      refused: the first line of what the backend said when it refused; None where it did not.
    """

    format: str
    size: int
    timing: Timing | None = None
    error: float | None = None
    tolerance: float = 0.0
    refused: str | None = None

    @property
    def tflops(self) -> float | None:
        """10¹² operations a second, 2·n³ a product, by the median time."""
        return None if self.timing is None else 2 * self.size**3 / self.timing.median / 1e12

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """The rate's, from the slower to the faster."""
        if self.timing is None:
            return None
        low, high = (2 * self.size**3 / seconds / 1e12 for seconds in reversed(self.timing.quartiles))
        return low, high

    @property
    def right(self) -> bool | None:
        """Whether the error is within the tolerance; None where there was no product."""
        return None if self.error is None else self.error <= self.tolerance  # NaN is not


def product_rates(
    size: int | None = None, formats: Sequence[str] = FORMATS, clock: Clock = time.perf_counter
) -> tuple[ProductRate, ...]:
    """Multiply two square matrices of normal random numbers on the default device, in each format: is it right, how fast?

        y[i, j] = Σ_k x[i, k] · w[j, k]        summed in float32 (int8: int32)

    Both operands are contracted along their last axis, the layout that float8 tensor cores take. They hold numbers of the
    format, so that only the sum can be wrong: it must be exact in int8, lie within 4·√n roundings of float32 in
    float32, and else within the format's own eps, relative to the largest element. In tf32 both operands, which are
    float32, lose up to 2⁻¹⁰ on the way in: 2⁻⁹ is legal. A product that the backend does not have is reported, not
    raised.

    Args:
      size: n; by default 8192 on an accelerator and on a CPU 256, 512 or 1024, whatever takes it 50 ms at most.
      formats: some of `FORMATS`. tf32 is left out where the platform is no GPU.
      clock: the clock, in seconds.

    Raises:
      ValueError: a format that is none of them, or a size that is no multiple of 16 (float8 units take no other).

    >>> [rate.right for rate in product_rates(64, ("float32", "int8"))]
    [True, True]
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"got the formats {unknown}; legal are {', '.join(FORMATS)}; name some of these")
    if size is not None and (size < 16 or size % 16):
        raise ValueError(f"got size={size}; legal is a multiple of 16: float8 units take no other, try 1024")
    platform = jax.default_backend()
    chosen = size or (_size_for_a_cpu() if platform == "cpu" else 8192)
    return tuple(_measured(name, chosen, clock) for name in formats if name != "tf32" or platform == "gpu")


def tolerance(name: str, size: int) -> float:
    """The largest error of a format's product, relative to its largest element; see `product_rates`.

    >>> tolerance("bfloat16", 512), tolerance("int8", 512)
    (0.0078125, 0.0)
    """
    if name == "int8":
        return 0.0
    if name == "float32":
        return 4 * size**0.5 * 2.0**-24
    return 2.0**-9 if name == "tf32" else max(float(jnp.finfo(part).eps) for part in name.split("×"))


def _measured(name: str, size: int, clock: Clock) -> ProductRate:
    try:
        x, w = _operands(name, size)
        multiply = _product(name)
        error = _error(x, w, multiply(x, w))
        since = clock()
        jax.block_until_ready(multiply(x, w))
        seconds = max(clock() - since, 1e-6)
        calls = min(max(int(_SECONDS.get(jax.default_backend(), 0.3) / seconds), 1), 200)
        # The warm-up also brings an idle chip's clock up.
        timing = time_blocks(lambda: multiply(x, w), warmup=-(-calls // 2), blocks=_BLOCKS, calls=calls, clock=clock)
    except Exception as refusal:  # whatever a compiler or a driver raises
        said = str(refusal).strip() or type(refusal).__name__
        return ProductRate(name, size, refused=said.splitlines()[0])
    return ProductRate(name, size, timing, error, tolerance(name, size))


@functools.cache
def _product(name: str) -> Any:
    """The jitted product of a format."""
    # Said here, so that a user's jax_default_matmul_precision does not change what is measured.
    precision = jax.lax.Precision.HIGHEST if name == "float32" else jax.lax.Precision.DEFAULT
    into = jnp.int32 if name == "int8" else jnp.float32
    last_with_last = (((1,), (1,)), ((), ()))
    return jax.jit(
        lambda x, w: jax.lax.dot_general(x, w, last_with_last, precision=precision, preferred_element_type=into)
    )


def _operands(name: str, size: int) -> tuple[jax.Array, jax.Array]:
    """Two matrices in the dtypes of the format. Random: zeros would take a chip less power, and flatter it."""
    first, _, second = name.partition("×")
    dtypes = [{"tf32": "float32"}.get(part, part) for part in (first, second or first)]
    keys = jax.random.split(jax.random.key(0))
    x, w = (_random(key, size, dtype) for key, dtype in zip(keys, dtypes, strict=True))
    return x, w


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(key: jax.Array, size: int, dtype: str) -> jax.Array:
    if dtype == "int8":
        return jax.random.randint(key, (size, size), -127, 128, jnp.int8)
    return jax.random.normal(key, (size, size), jnp.float32).astype(dtype)


def _error(x: jax.Array, w: jax.Array, y: jax.Array | np.ndarray) -> float:
    """The largest error of the product on evenly spaced rows and columns, by the largest element there."""
    every = max(x.shape[0] // _SAMPLE, 1)
    some = slice(every // 2, None, every)
    exact = np.asarray(x[some]).astype(np.float64) @ np.asarray(w[some]).astype(np.float64).T
    return float(np.abs(np.asarray(y[some, some]).astype(np.float64) - exact).max() / np.abs(exact).max())


def _size_for_a_cpu() -> int:
    x, w = _operands("float32", 256)
    multiply = _product("float32")
    jax.block_until_ready(multiply(x, w))
    since = time.perf_counter()
    jax.block_until_ready(multiply(x, w))
    seconds = time.perf_counter() - since
    return max((n for n in (256, 512, 1024) if seconds * (n / 256) ** 3 <= 0.05), default=256)
