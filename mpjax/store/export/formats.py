"""The formats of exported weights: how numbers are stored in each, and which format a path gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from mpjax.core.tree import canonical_path
from mpjax.policy.patterns import governs
from mpjax.store.trees import listed

KIND, VERSION = "mpjax weights", 1
"""What the metadata say the file is. The version grows when an older reader would misread it."""

FORMATS = ("float32", "bfloat16", "float16", "float8_e4m3", "int8")

LARGEST = {"float8_e4m3": 448.0, "int8": 127.0}
"""The formats that need a scale, and the largest number of each. (e4m3 is e4m3fn: it has no infinity, and what is over 464
becomes NaN.)"""

PER = ("channel", "tensor")

_SAME = {
    "f32": "float32", "full": "float32", "bf16": "bfloat16", "f16": "float16", "float8_e4m3fn": "float8_e4m3",
    "f8_e4m3fn": "float8_e4m3",
}  # fmt: skip
_STORED = {"float8_e4m3": jnp.dtype("float8_e4m3fn"), "int8": jnp.dtype("int8")}


def parse_format(name: str) -> str:
    """The format behind a name.

    Raises:
      ValueError: there is none.

    >>> parse_format("bf16"), parse_format("float8_e4m3fn")
    ('bfloat16', 'float8_e4m3')
    """
    found = _SAME.get(name.strip(), name.strip()) if isinstance(name, str) else None
    if found not in FORMATS:
        raise ValueError(f"got the format {name!r}; legal are {', '.join(FORMATS)}; name one of them")
    return found


def formats_by_path(to: str | Mapping[str, str], paths: Sequence[str]) -> dict[str, str]:
    """The format of each leaf: the first rule that names it or a module around it, float32 where none does.

    Args:
      to: one format for all, or a mapping from glob to format in the language of a policy map, `"**"` for all the rest.
      paths: canonical paths of the leaves, without `params/`.

    Raises:
      ValueError: an unknown format, or a rule that acts nowhere.

    >>> formats_by_path({"head": "float32", "**": "bf16"}, ["head/kernel", "layers/0/kernel"])
    {'head/kernel': 'float32', 'layers/0/kernel': 'bfloat16'}
    """
    by_glob = to if isinstance(to, Mapping) else {"**": to}
    rules = {glob: parse_format(name) for glob, name in by_glob.items()}
    found: dict[str, str] = {}
    idle = dict.fromkeys(rules) if paths and by_glob is to else {}
    for path in paths:
        rule = next((glob for glob in rules if governs(glob, path, {})), None)
        found[path] = "float32" if rule is None else rules[rule]
        idle.pop(rule or "", None)
    if idle:
        raise ValueError(
            f"got the rule {next(iter(idle))!r} in `to`, which acts on no weight: none has such a path, or earlier rules "
            f"have them all; legal are globs over {listed(list(paths))}; mend it or leave it out"
        )
    return found


def keeps_float32(path: str, ndim: int) -> str:
    """Why a param is not stored with a scale, in words; "" where it is.

    Biases and norms are few and cheap, and their errors reach every output. Those of attention and of a scanned stack have
    two dimensions and more, but are called alike.

    >>> keeps_float32("head/bias", 1), keeps_float32("attention/query/bias", 2), keeps_float32("head/kernel", 2)
    ('fewer than two dimensions', 'a bias', '')
    """
    last = _called(path)
    return "fewer than two dimensions" if ndim < 2 else f"a {last}" if last in ("bias", "scale") else ""


def channel_axis(path: str) -> int:
    """The axis of a kernel along which each index has a scale of its own: its outputs.

    Linen and NNX store kernels of Dense, Conv and attention with the output axis last. (An attention's query, key and value
    put out heads × width: the heads share the scales.) The table of an embedding has a row for each token; both call it
    `embedding`. Of a scanned stack, whose first axis is the layer, all layers share the scales.

    >>> channel_axis("Dense_0/kernel"), channel_axis("wte/embedding")
    (-1, -2)
    """
    return -2 if _called(path) == "embedding" else -1


def _called(path: str) -> str:
    """What a param is called. In a State of NNX, and in a checkpoint of Linen's boxes, its array lies below it as `value`."""
    return canonical_path(path).removesuffix("/value").rpartition("/")[2]


def quantise(x: np.ndarray, form: str, axis: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Numbers as a format stores them, and their scale, if the format has one.

        scale = max|x| / largest      over all axes but `axis`; 1 where all of x is 0
        stored = round(clip(x / scale, ±largest))

    Args:
      x: finite floats.
      form: one of `FORMATS`.
      axis: the channel axis; None for one scale for the whole tensor.

    Returns:
      The stored array, and a float32 scale of as many dimensions, so that `stored · scale` broadcasts; None for a format
      without scale.

    >>> stored, scale = quantise(np.array([[-1.27, 0.0], [0.5, 0.0]], np.float32), "int8", axis=-1)
    >>> stored.tolist(), scale.round(4).tolist()
    ([[-127, 0], [50, 0]], [[0.009999999776482582, 1.0]])
    """
    if form not in LARGEST:
        with np.errstate(over="ignore"):  # the caller looks for infinities, and knows the path
            return x.astype(jnp.dtype(form)), None
    wide, largest = x.astype(np.float64), LARGEST[form]
    over = None if axis is None else tuple(n for n in range(x.ndim) if n != axis % x.ndim)
    amax = np.max(np.abs(wide), axis=over, keepdims=True, initial=0.0)
    # Not below the smallest normal number: a device that flushes subnormals would divide by zero.
    least = float(np.finfo(np.float32).tiny)
    with np.errstate(over="ignore"):  # as above, of a float64
        scale = np.where(amax == 0, 1.0, np.maximum(amax / largest, least)).astype(np.float32)
    ratio = np.clip(wide / scale.astype(np.float64), -largest, largest)
    return (np.rint(ratio) if form == "int8" else ratio).astype(_STORED[form]), scale


def dequantise(stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """What stored numbers and their scale stand for, in float32.

    >>> dequantise(np.array([[2]], np.int8), np.array([[0.5]], np.float32)).tolist()
    [[1.0]]
    """
    return stored.astype(np.float32) * scale
