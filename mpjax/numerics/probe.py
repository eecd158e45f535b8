"""The probe: a tap that counts how large the values of a tensor and of its gradient are, and changes neither."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from mpjax.core.dtypes import facts, is_float
from mpjax.core.model import SINKS
from mpjax.core.struct import pytree_dataclass, static_field
from mpjax.core.tree import canonical_path
from mpjax.core.types import MState, PyTree

FORMATS = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
"""The formats for which `Counts` tells exactly what a cast would overflow or flush to zero."""

EXPONENTS = 256
"""float32's exponent fields: 0 holds zero and its subnormals, 255 the infinities and NaNs, 127 + e all of [2^e, 2^(e+1))."""

AT_MOST = 2**18
"""Elements of one tensor that are counted; of a larger one that many, in blocks spread evenly over it."""

PROBE = "probe"
"""The entry of the reserved collection (`core/model.SINKS`) in which the probe's sinks lie."""

_BLOCK = 128


def overflow_bits(name: str) -> int:
    """The bits of the smallest float32 whose magnitude a cast to this format, rounding to nearest even, overflows.

    >>> np.uint32(overflow_bits("float16")).view(np.float32), np.uint32(overflow_bits("float8_e5m2")).view(np.float32)
    (np.float32(65520.0), np.float32(61440.0))
    """
    largest, spacing = facts(name).max, facts(name).eps * 2.0 ** np.floor(np.log2(facts(name).max))
    tie = np.float32(largest + spacing / 2).view(np.uint32)
    # Halfway goes to the even neighbour: past the largest number, unless that is the even one (e4m3fn).
    return int(tie) + (0 if round(largest / spacing) % 2 else 1)


def underflow_bits(name: str) -> int:
    """The bits of the smallest positive float32 that a cast to this format does not flush to zero: over half its smallest.

    >>> np.uint32(underflow_bits("float16")).view(np.float32) > 2.0**-25
    np.True_
    """
    return int(np.float32(facts(name).smallest_subnormal / 2).view(np.uint32)) + 1


_MANTISSA = 2**23 - 1
EDGES = tuple(sorted({bits(name) & _MANTISSA for name in FORMATS for bits in (overflow_bits, underflow_bits)}))
"""Mantissas at which an exponent is cut further, so that each format's limits, moved by any power of two, are edges of cells."""

CELLS = EXPONENTS * (len(EDGES) + 1)


def count(x: Array, at_most: int = AT_MOST) -> Float32[Array, " cells"]:
    """How many elements of a float array lie in each cell: one for each exponent and part of it that `EDGES` cut.

    Counted as integers, from the bits of the float32 that equals each element, so subnormals are seen wherever they are
    not flushed before. (float64 is rounded to float32 first.) Of a tensor of more than `at_most` elements every k-th
    block of 128 is read, the place of the block moving on with each, and counts for k; infinities and NaNs are always
    counted whole.

    >>> counts = count(jnp.array([0.0, 1.0, 1.5, jnp.inf], jnp.bfloat16)).reshape(EXPONENTS, -1)
    >>> counts[0, 0], counts[127].sum(), counts[255, 0]
    (Array(1., dtype=float32), Array(2., dtype=float32), Array(1., dtype=float32))
    """
    if x.size <= at_most:
        return _histogram(x).astype(jnp.float32)
    each = -(-x.size // at_most)
    rows = x.size // (each * _BLOCK)
    blocks = x.reshape(-1)[: rows * each * _BLOCK].reshape(rows, each, _BLOCK)
    chosen = jnp.arange(rows) % each
    read = jnp.take_along_axis(blocks, chosen[:, None, None], axis=1)
    counts = _histogram(read).astype(jnp.float32).reshape(EXPONENTS, -1) * np.float32(x.size / (rows * _BLOCK))
    infinite, nan = (f(x).sum(dtype=jnp.int32).astype(jnp.float32) for f in (jnp.isinf, jnp.isnan))
    last = jnp.zeros(counts.shape[1], jnp.float32).at[0].set(infinite).at[1].set(nan)
    return counts.at[-1].set(last).reshape(-1)


def _histogram(x: Array) -> Int32[Array, " cells"]:
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & 0x7FFFFFFF
    mantissa = bits & _MANTISSA
    part = sum((mantissa >= edge).astype(jnp.int32) for edge in EDGES)
    cell = (bits >> 23) * (len(EDGES) + 1) + part
    # A GPU adds atomically, and most elements want the same few cells: there each counts into one of many copies.
    # (One H100, 2^27 elements of bfloat16: 50 ms with one copy, 2.1 ms with 16,384.) A CPU is quickest with one.
    copies = 1 if jax.default_backend() == "cpu" else min(max(x.size // 8192, 1), 16384)
    if copies == 1:
        return jnp.zeros(CELLS, jnp.int32).at[cell].add(1)
    copy = jnp.arange(x.size, dtype=jnp.int32).reshape(x.shape) % copies
    return jnp.zeros((copies, CELLS), jnp.int32).at[copy, cell].add(1).sum(0)


@pytree_dataclass
class Sink:
    """Where a tap's counts come out: `counts[0]` of the values, `counts[1]` of their gradients.

    Args:
      counts: float32 `[2, cells]`, exact up to 2^24; zeros on the way in, counts as its cotangent.
      dtype: static; the dtype of the tensor (of several: the narrowest), as a name.
      order: static; its place in the order of the calls.
    """

    counts: Any
    dtype: str = static_field(default="float32")
    order: int = static_field(default=0)


@jax.custom_vjp
def tapped(x: Array, sink: Float32[Array, "2 cells"]) -> Array:
    """`x` itself; the cotangent of `sink` is the counts of `x` and those of its gradient.

    Cotangents of one sink add up, so a tap in a loop, a scan or a vmap counts all of its passes, and one that is
    rematerialised counts once. What does not reach the loss has no backward pass and is not counted. There is no forward
    mode through a tap.

    >>> sink = jax.grad(lambda s: (3.0 * tapped(jnp.float32(2.0), s)))(jnp.zeros((2, CELLS), jnp.float32))
    >>> (sink.argmax(-1) // (len(EDGES) + 1) - 127).tolist()  # 2 = 2^1 went in, the gradient is 3 = 1.5 · 2^1
    [1, 1]
    """
    return x


tapped.defvjp(
    lambda x, sink: (x, count(x)),
    lambda counts, g: (g, jnp.stack([counts, count(g)])),
)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Recorder:
    """Stands in the place of the sinks while a trace finds out what there is to tap. It has no leaves, so it goes anywhere."""

    found: dict[str, str] = dataclasses.field(default_factory=dict)

    def note(self, name: str, dtype: np.dtype) -> None:
        """One tensor at this tap."""
        before = self.found.get(name)
        if before is None or jnp.dtype(before).itemsize > dtype.itemsize:
            self.found[name] = dtype.name

    def sinks(self) -> dict[str, Sink]:
        """An empty sink for each tap that was met."""
        return {
            name: Sink(jnp.zeros((2, CELLS), jnp.float32), dtype, order)
            for order, (name, dtype) in enumerate(self.found.items())
        }


Sinks = Mapping[str, Sink] | Recorder | None
"""What `apply` finds in `mstate`: sinks by name, a recorder, or None where nothing is probed."""

probing = jax.make_user_context(None)
"""Part of the key of every jit cache: a body that is traced with one set of sinks must not serve another."""


def sinks_in(mstate: MState) -> Sinks:
    """The probe's part of the reserved collection."""
    return mstate.get(SINKS, {}).get(PROBE)


def tap_tree(sinks: Sinks, name: str, tree: PyTree) -> PyTree:
    """`tree` with each of its float arrays tapped into the sink of this name; as it is where there is none."""
    if sinks is None or (not isinstance(sinks, Recorder) and name not in sinks):
        return tree

    def leaf(x: Any) -> Any:
        if not is_float(x) or not x.size:
            return x
        if isinstance(sinks, Recorder):
            sinks.note(name, x.dtype)
            return x
        return tapped(x, sinks[name].counts)

    return jax.tree.map(leaf, tree)


def tap(mstate: MState, name: str, value: PyTree) -> PyTree:
    """Let a probe look at a value that no Flax module returns; `value` itself, and nothing at all where no probe runs.

    For models of bare functions, and for what a loss function does outside of the model.

    Args:
      mstate: as the function got it; a probed step puts its sinks in.
      name: the path by which reports call it, in its canonical spelling (`layer_0` is `layer/0`).
      value: a pytree; its float arrays are counted, and their gradients.

    >>> tap({}, "scores", 1.5)
    1.5
    """
    return tap_tree(sinks_in(mstate), canonical_path(name), value)
