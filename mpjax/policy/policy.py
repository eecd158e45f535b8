"""A policy: three dtypes, one value, one string."""

from __future__ import annotations

import dataclasses
from typing import Any

import jmp
import numpy as np

from mpjax.core.dtypes import canonical, half_dtype, short_name
from mpjax.core.tree import cast_floating
from mpjax.core.types import DTypeLike, PyTree

PRESETS: dict[str, tuple[str, ...]] = {
    "float32": ("float32", "float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16", "bfloat16"),
    "float16": ("float16", "float16", "float16"),
    "mixed_bfloat16": ("float32", "bfloat16", "float32"),
    "mixed_float16": ("float32", "float16", "float32"),
    "mixed_fp8": ("float32", "bfloat16", "float32", "fp8"),
}
"""Name to (param, compute, output) and dot. The mixed ones keep float32 master weights and a float32 model output."""

DOTS = {
    "fp8": "float8 with a scale from each tensor itself (current scaling)",
    "fp8_delayed": "float8 with a scale from what a tensor was in the steps before (delayed scaling)",
    "int8": "int8 with a scale for each row",
}
"""Recipes by which dense layers multiply, apart from the compute dtype."""

_KEYS = {"p": "param", "param": "param", "params": "param", "c": "compute", "compute": "compute", "o": "output",
         "output": "output", "dot": "dot"}  # fmt: skip

_DTYPES = ("param_dtype", "compute_dtype", "output_dtype")


@dataclasses.dataclass(frozen=True)
class Policy(jmp.Policy):
    """Which dtype params are kept in, which the model computes in, which it returns, and how its dense layers multiply.

    A `jmp.Policy` with canonical dtypes: equal policies are equal, hash alike and print alike however they were
    written, so a policy may be a static argument of `jit`.

    Args:
      param_dtype: of the master weights, and so of their gradients.
      compute_dtype: of every product and activation, but for the float32 islands of a wrapped model.
      output_dtype: of what the model returns.
      dot: None: dense layers multiply in the compute dtype. Else a recipe in eight bits, `"fp8"`, `"fp8_delayed"` or
        `"int8"`, for their products and those of their gradients; what flows between them stays in the compute dtype.

    Raises:
      ValueError: one of them is not a float dtype, or there is no such recipe.

    >>> import jax.numpy as jnp
    >>> policy = Policy("float32", jnp.bfloat16, "float32")
    >>> str(policy), policy == get_policy("mixed_bfloat16")
    ('p=full,c=bf16,o=full', True)
    """

    param_dtype: np.dtype
    compute_dtype: np.dtype
    output_dtype: np.dtype
    dot: str | None = None

    def __init__(
        self, param_dtype: DTypeLike, compute_dtype: DTypeLike, output_dtype: DTypeLike, dot: str | None = None
    ):
        for name, dtype in zip(_DTYPES, (param_dtype, compute_dtype, output_dtype), strict=True):
            object.__setattr__(self, name, canonical(dtype))
        if dot is not None and dot not in DOTS:
            raise ValueError(f"got dot={dot!r}; legal are {', '.join(DOTS)}, or none for the compute dtype")
        object.__setattr__(self, "dot", dot)

    @staticmethod
    def of(policy: str | jmp.Policy) -> Policy:
        """The policy behind a string, one of jmp's policies, or a policy.

        >>> Policy.of(jmp.get_policy("c=bf16")) == Policy.of("c=bf16")
        True
        """
        if isinstance(policy, Policy):
            return policy
        if isinstance(policy, jmp.Policy):
            return Policy(policy.param_dtype, policy.compute_dtype, policy.output_dtype)
        if isinstance(policy, str):
            return get_policy(policy)
        raise TypeError(f"got {type(policy).__name__} for a policy; give a string, a jmp.Policy or an mpjax.Policy")

    @property
    def compute_dtypes(self) -> frozenset[np.dtype]:
        """The dtypes in which something computes: here, one. A `PolicyMap` may have several."""
        return frozenset({self.compute_dtype})

    def cast_to_param(self, x: PyTree) -> PyTree:
        """Every float array of `x` in the param dtype; other leaves as they are."""
        return cast_floating(x, self.param_dtype)

    def cast_to_compute(self, x: PyTree) -> PyTree:
        """Every float array of `x` in the compute dtype; other leaves as they are.

        >>> get_policy("mixed_bfloat16").cast_to_compute({"w": np.ones(2, np.float32), "n": 1})["w"].dtype
        dtype(bfloat16)
        """
        return cast_floating(x, self.compute_dtype)

    def cast_to_output(self, x: PyTree) -> PyTree:
        """Every float array of `x` in the output dtype; other leaves as they are."""
        return cast_floating(x, self.output_dtype)

    def __str__(self) -> str:
        param, compute, output = (short_name(getattr(self, name)) for name in _DTYPES)
        return f"p={param},c={compute},o={output}" + (f",dot={self.dot}" if self.dot else "")


def get_policy(policy_name: str) -> Policy:
    """The policy that a string names.

    Three spellings, spaces allowed anywhere:

    - a preset: `float32`, `bfloat16`, `float16` (all three dtypes), `mixed_bfloat16`, `mixed_float16` (float32 params
      and output around half-precision compute), `mixed_fp8` (`mixed_bfloat16` whose dense layers multiply in float8);
    - a dtype name, for all three: `bf16`, `full`, `f64`, `half`, `f8_e4m3fn`, …;
    - jmp's grammar: `p=f32,c=bf16,o=f32` with the keys `p`/`params`, `c`/`compute`, `o`/`output`. Params default to
      float32, compute follows params, output follows compute. One key more, `dot=fp8`, `dot=fp8_delayed` or `dot=int8`,
      names a recipe for products; `dot=none` is the default.

    Raises:
      ValueError: unknown name, unknown key, or a key given twice; the message lists the choices.

    >>> get_policy(" compute = bfloat16 , o=full ") == get_policy("mixed_bfloat16")
    True
    """
    if not isinstance(policy_name, str):
        raise TypeError(f"got {type(policy_name).__name__} for a policy string; Policy.of takes other kinds of policy")
    text = policy_name.strip()
    if text in PRESETS:
        return Policy(*PRESETS[text])
    if "=" not in text:
        try:
            return Policy(text, text, text)
        except ValueError as error:
            raise ValueError(f"{error}, or a preset: {', '.join(PRESETS)}") from None
    named = parse_keys(text)
    param = named.get("param", "float32")
    compute = named.get("compute", param)
    return Policy(param, compute, named.get("output", compute), parse_dot(named.get("dot", "none")))


def parse_keys(text: str, extra: tuple[str, ...] = ()) -> dict[str, str]:
    """`key=value` pairs parted by commas, each key spelled out (`p` → `param`), each value stripped.

    Raises:
      ValueError: a part without `=`, an unknown key, or a key given twice.

    >>> parse_keys("c=bf16, input=keep", extra=("input",))
    {'compute': 'bf16', 'input': 'keep'}
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        name = _KEYS.get(key, key if key in extra else None)
        if not equals or name is None:
            legal = ", ".join(("params", "compute", "output", "dot", *extra))
            raise ValueError(
                f"Unknown key {key!r} in {text!r}; write key=dtype with the keys {legal} (p, c, o for short)"
            )
        if name in found:
            raise ValueError(f"key {name!r} stands twice in {text!r}; give each of params, compute, output, dot once")
        found[name] = value
    return found


def parse_dot(name: str) -> str | None:
    """The recipe behind a name; None for `none`.

    >>> parse_dot("fp8"), parse_dot("none")
    ('fp8', None)
    """
    if name != "none" and name not in DOTS:
        raise ValueError(f"got dot={name}; legal are {', '.join(DOTS)}, none")
    return None if name == "none" else name


def cast_to_full(tree: PyTree) -> PyTree:
    """Every float array of `tree` in float32 (jmp's name for it).

    >>> cast_to_full(np.ones(1, np.float16)).dtype
    dtype('float32')
    """
    return cast_floating(tree, "float32")


def cast_to_half(tree: PyTree) -> PyTree:
    """Every float array of `tree` in `half_dtype()`: bfloat16 on a TPU, float16 elsewhere (jmp's meaning).

    >>> cast_to_half(np.ones(1, np.float32)).dtype == half_dtype()
    True
    """
    return cast_floating(tree, half_dtype())


def computes_in(policy: Any, dtype: DTypeLike) -> bool:
    """Whether anything under `policy` (a `Policy`, a `PolicyMap`, or None) computes in `dtype`."""
    return policy is not None and canonical(dtype) in policy.compute_dtypes
