"""One leaf as an exported file holds it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.core.dtypes import is_float
from mpjax.store import tensors
from mpjax.store.export.formats import LARGEST, channel_axis, dequantise, keeps_float32, quantise
from mpjax.store.trees import Keys, is_key


@dataclasses.dataclass(frozen=True)
class Stored:
    """What is written of a leaf: an array, the name of its format, its scale, a note for the report.

    `more` is what else the metadata must say for it to be read.
    """

    array: np.ndarray
    format: str
    scale: np.ndarray | None = None
    note: str = ""
    more: dict[str, str] = dataclasses.field(default_factory=dict)

    def read_back(self) -> np.ndarray:
        """The numbers that a reader gets."""
        return self.array if self.scale is None else dequantise(self.array, self.scale)


def is_weight(keys: Keys, leaf: Any) -> bool:
    """Whether a rule decides the format of a leaf: of every float param."""
    return keys[0] == "params" and (is_float(leaf) or isinstance(leaf, float))


def store(name: str, leaf: Any, form: str | None, per: str) -> Stored:
    """A leaf in a format.

    Args:
      name: its path, for errors and to tell what it is.
      leaf: an array, a key or a Python number.
      form: one of `FORMATS`; None: as it is.
      per: `channel` or `tensor`.

    Raises:
      ValueError: NaN or infinity, or what the format cannot hold; no array, one of a dtype that safetensors lacks, or one
        that was donated.

    >>> store("params/w", np.ones((2, 2), np.float32), "bfloat16", "channel").array.dtype
    dtype(bfloat16)
    """
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        raise ValueError(
            f"got {name}, whose memory was donated to a train step and is gone; legal are the params of the state which that step "
            "returned; export those"
        )
    if is_key(leaf):
        impl = str(jax.random.key_impl(leaf))
        return Stored(np.asarray(jax.random.key_data(leaf)), "key", more={"key_impl": impl})
    x = as_array(leaf)
    if form is None and x.dtype.name not in tensors.HOLDS:
        raise ValueError(
            f"got {type(leaf).__name__} of {x.dtype} at {name}; legal are arrays of a dtype that safetensors has; take it out"
        )
    if jnp.issubdtype(x.dtype, jnp.inexact) and not np.isfinite(x).all():
        raise ValueError(
            f"got NaN or infinity in {name}; legal are finite weights, since serving would only hand it on; export a state "
            "from before it diverged (mpjax.diagnose finds where)"
        )
    if form is None:
        return Stored(x, x.dtype.name)
    note = ""
    if form in LARGEST and (reason := keeps_float32(name, x.ndim)):
        form, note = "float32", f"{reason}: not {form}"
    array, scale = quantise(x, form, channel_axis(name) if per == "channel" else None)
    with np.errstate(over="ignore"):
        largest = array if scale is None else LARGEST[form] * scale  # of what is read back, in float32
    if not np.isfinite(largest).all():
        amax, most = np.abs(x.astype(np.float64)).max(), float(jnp.finfo(form if scale is None else "float32").max)
        path = name.partition("/")[2]
        otherwise = f"to={{{path!r}: 'bfloat16', '**': 'float16'}}" if form == "float16" else "scale it down"
        raise ValueError(
            f"got a value of {amax:.6g} in {name}; {form} ends at {most:.6g}; store this one otherwise: {otherwise}"
        )
    return Stored(array, form, scale, note)


def as_array(leaf: Any) -> np.ndarray:
    """The leaf in numpy; None as an object where it is no array and no number.

    >>> as_array(0.5).dtype, as_array("text").dtype
    (dtype('float32'), dtype('O'))
    """
    try:
        return np.asarray(leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf))
    except TypeError:  # jax takes no strings, no functions
        return np.asarray(None)
