"""What Flax's own layers need: the attributes that decide their dtypes."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from mpjax.numerics.attention import attention, warn_of_float16_on_cpu
from mpjax.numerics.delayed import DelayedDot
from mpjax.numerics.dot import QuantizedDot, misfit
from mpjax.wrap.nnx.sites import Site

UPCASTING_NORMS = (nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm, nnx.LayerNorm, nnx.RMSNorm)
"""Norms that widen their input inside: widening it before the call would keep a float32 copy for the backward pass."""

DENSE = (nnx.Linear, nnx.LinearGeneral)
"""Layers that a `dot=` recipe reaches."""


def attributes_for(module: nnx.Module, site: Site) -> dict[str, Any]:
    """The attributes of Flax's own layers by which a call computes in the site's dtype, and multiplies by its recipe."""
    compute, dot = site.compute, site.dot
    attributes: dict[str, Any] = {}
    if _is_float_attribute(module, "dtype"):
        attributes["dtype"] = compute
    if isinstance(module, nnx.Embed):
        attributes["dtype"] = None  # as it is read: see `looks_up`
    if isinstance(module, UPCASTING_NORMS):
        # Statistics are float32 whatever comes in; a bfloat16 input need not be stored a second time for them.
        attributes["promote_dtype"] = _as_they_are if compute.itemsize >= 4 else module.promote_dtype
    if isinstance(module, nnx.MultiHeadAttention) and module.attention_fn is nnx.dot_product_attention:
        attributes["attention_fn"] = _attention
    if dot is not None and isinstance(module, DENSE) and not _has_own_dot(module):
        attributes["dot_general"] = DelayedDot(site.path) if dot == "fp8_delayed" else QuantizedDot(dot)
    warn_of_float16_on_cpu(getattr(module, "attention_fn", None), compute)
    return attributes


def unfit(module: nnx.Module) -> str | None:
    """Why this layer multiplies in its compute dtype under every recipe; None: it does not, or is not dense.

    Its sizes are those that it was built with: the kernel of a stack, made by `nnx.vmap`, has an axis more.
    """
    if not isinstance(module, DENSE):
        return None
    if _has_own_dot(module):
        return "it has a product of its own"
    batch = tuple(module.batch_axis.values()) if isinstance(module, nnx.LinearGeneral) else ()
    inner, outer = (np.atleast_1d(sizes).tolist() for sizes in (module.in_features, module.out_features))
    contracted = tuple(range(len(batch), len(batch) + len(inner)))
    return misfit((*batch, *inner, *outer), contracted, tuple(range(len(batch))))


def takes_delayed(module: nnx.Module, site: Site) -> bool:
    """Whether a float8 history is kept for this module."""
    return isinstance(module, DENSE) and site.dot == "fp8_delayed"


def _has_own_dot(module: nnx.Linear | nnx.LinearGeneral) -> bool:
    own = module.dot_general not in (None, jax.lax.dot_general)
    return own or getattr(module, "dot_general_cls", None) is not None


def sequence_takes(name: str, classes: Mapping[str, Any]) -> bool:
    """Whether the root has a use for this keyword. A Sequential takes any, and hands it to its first layer as it is."""
    path = ""
    while getattr(classes[path], "__call__", None) is nnx.Sequential.__call__:  # noqa: B004
        path = f"{path}/layers/0".removeprefix("/")
        if path not in classes:  # a function
            return False
    parameters = inspect.signature(classes[path].__call__).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def looks_up(method: Any) -> bool:
    """Whether a method takes rows out of a table: Embed's own call, not `attend`.

    Such a table is not cast, only its rows are: in the backward pass the gradients of one row are added one by one in
    the dtype of the table. Cast before, that of a token which occurs 1,000 times in a batch came out as 256 in bfloat16.
    """
    return method is vars(nnx.Embed)["__call__"]


def adds_bias(method: Any) -> bool:
    """Whether a method ends by adding a bias: the call of one of Flax's own layers."""
    return any(method is vars(cls)["__call__"] for cls in (*DENSE, nnx.Conv, nnx.ConvTranspose))


def bias_of(module: Any, compute: np.dtype) -> jax.Array | None:
    """The bias that such a call adds in half over the last axes of its result, as it is read here; else None."""
    if compute.itemsize >= 4 or module.bias is None or getattr(module, "batch_axis", None):
        return None
    return module.bias[...] if module.promote_dtype is promote_dtype else None


def bias_as_constant(arrays: tuple, /, **options: Any) -> tuple:
    """A layer's `promote_dtype` while `has_added` stands for the derivative by its bias."""
    *others, bias = promote_dtype(arrays, **options)
    return (*others, jax.lax.stop_gradient(bias))


def _as_they_are(arrays: tuple, **_: Any) -> tuple:
    return arrays


def _attention(*qkv: Any, module: Any = None, **kwargs: Any) -> Any:
    """Our attention with NNX's way of sowing: under a type, where Linen sows under a name."""
    sower = module and types.SimpleNamespace(sow=lambda _, name, value: module.sow(nnx.Intermediate, name, value))
    return attention(*qkv, **kwargs | {"module": sower})


def _is_float_attribute(module: nnx.Module, name: str) -> bool:
    """Whether the module has this dtype attribute, unset or a float: one that is set to an int dtype means something else."""
    if name not in vars(module):
        return False
    value = vars(module)[name]
    return value is None or jnp.issubdtype(value, jnp.floating)
