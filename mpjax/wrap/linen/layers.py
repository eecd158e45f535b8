"""What Flax's own layers need: the fields that decide their dtypes, and how a frozen module is dressed for one call."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from mpjax.core.tree import cast_floating
from mpjax.numerics.attention import attention, warn_of_float16_on_cpu
from mpjax.numerics.delayed import DelayedDot
from mpjax.numerics.dot import QuantizedDot, misfit
from mpjax.policy.rules import PolicyMap
from mpjax.wrap.linen.sites import module_path

UPCASTING_NORMS = (nn.BatchNorm, nn.GroupNorm, nn.InstanceNorm, nn.LayerNorm, nn.RMSNorm)
"""Norms that widen their input inside: widening it before the call would keep a float32 copy for the backward pass."""

DENSE = (nn.Dense, nn.DenseGeneral)
"""Layers that a `dot=` recipe reaches."""


@contextlib.contextmanager
def dressed(module: nn.Module, reads_params_in: np.dtype | None, **fields: Any) -> Iterator[None]:
    """For the length of one call, set fields of a frozen, bound module and let it read its own params in a dtype.

    This is the one place that writes to a user's module; all of it is put back. Params are cast here, where they are
    read, because `nn.remat` then keeps the float32 originals for the backward pass and no half-precision copy (cast at
    the top of apply, residuals were 1.62 times as large). Flax has no public way to swap what a scope holds
    (`Scope._variables`), and no interceptor for `self.param`. One param may be a tree; in what the scope holds it looks
    like the params of a submodule, which reads its own, so that a tree is cast when it is asked for.
    """
    before = {name: getattr(module, name) for name in fields}
    scope: Any = module.scope
    store, own, outer = scope._variables, scope._collection("params"), vars(scope).get("param")
    vars(module).update(fields)
    if reads_params_in is not None:
        store["params"] = {
            name: value if hasattr(value, "keys") else cast_floating(value, reads_params_in)
            for name, value in own.items()
        }
        scope.param = functools.partial(_read_tree, scope.param, reads_params_in)
    try:
        yield
    finally:
        vars(module).update(before)
        store["params"] = own
        vars(scope).pop("param", None)
        if outer is not None:
            scope.param = outer


def _read_tree(read: Callable[..., Any], dtype: np.dtype, *args: Any, **kwargs: Any) -> Any:
    value = read(*args, **kwargs)
    return cast_floating(value, dtype) if hasattr(value, "keys") else value


def fields_for(module: nn.Module, compute: np.dtype, dot: str | None = None) -> dict[str, Any]:
    """The fields of Flax's own layers by which a call computes in `compute`, and a dense one multiplies by the recipe `dot`."""
    fields: dict[str, Any] = {}
    if _has_float_field(module, "dtype"):
        fields["dtype"] = compute
    if isinstance(module, UPCASTING_NORMS) and hasattr(module, "force_float32_reductions"):
        fields["force_float32_reductions"] = compute.itemsize >= 4  # a rule that names a norm means its statistics too
    if (
        isinstance(module, nn.MultiHeadDotProductAttention)
        and module.attention_fn is nn.dot_product_attention
        and module.qk_attn_weights_einsum_cls is None
    ):
        fields["attention_fn"] = attention
    if dot is not None and isinstance(module, DENSE) and not _has_own_dot(module):
        fields["dot_general"] = DelayedDot(module_path(module)) if dot == "fp8_delayed" else QuantizedDot(dot)
    warn_of_float16_on_cpu(getattr(module, "attention_fn", None), compute)
    return fields


def unfit(module: nn.Module, method: str) -> str | None:
    """Why this layer, whose call has just run, multiplies in its compute dtype under every recipe; None: it does not, or
    is not dense."""
    if not isinstance(module, DENSE) or method != "__call__" or not module.has_variable("params", "kernel"):
        return None
    if _has_own_dot(module):
        return "it has a product of its own"
    axes, batch = (module.axis, module.batch_dims) if isinstance(module, nn.DenseGeneral) else ((-1,), ())
    batch, contracted = tuple(range(np.size(batch))), tuple(range(np.size(batch), np.size(batch) + np.size(axes)))
    return misfit(nn.unbox(module.get_variable("params", "kernel")).shape, contracted, batch)


def takes_delayed(rules: PolicyMap, path: str, classes: dict[str, type], cls: type) -> bool:
    """Whether a float8 history is kept for the module at this path."""
    return issubclass(cls, DENSE) and rules.dot_at(path, classes) == "fp8_delayed"


def _has_own_dot(module: nn.Dense | nn.DenseGeneral) -> bool:
    return module.dot_general is not None or module.dot_general_cls is not None


_LOOKUP = inspect.unwrap(nn.Embed.__call__)


def looks_up(method: Any) -> bool:
    """Whether a method takes rows out of a table: Embed's own call, be it by `super()` of a subclass, and not `attend`.

    Such a table is not cast, only its rows are: in the backward pass the gradients of one row are added one by one in
    the dtype of the table. Cast before, that of a token which occurs 1,000 times in a batch came out as 256 in bfloat16.
    """
    return getattr(method, "func", None) is _LOOKUP


def fields_for_lookup(module: nn.Module) -> dict[str, Any] | None:
    """The fields of Embed by which a call looks up in the master table; its set-up has read the table in half.

    None where there is no such table, or a subclass makes its own of it.
    """
    if not isinstance(module, nn.Embed) or type(module).setup is not nn.Embed.setup:
        return None
    return {"dtype": None, "embedding": nn.unbox(module.get_variable("params", "embedding"))}


_ADD_BIAS = {inspect.unwrap(cls.__call__) for cls in (*DENSE, nn.Conv, nn.ConvTranspose)}
"""Calls that end by adding a bias: `numerics/bias` says what is done about it."""


def bias_of(module: nn.Module, method: Any, compute: np.dtype) -> jax.Array | None:
    """The bias, as the params have it, that this call adds in half over the last axes of its result; else None.

    Only Flax's own call is known to end with that, not a subclass's around it.
    """
    adds = getattr(method, "func", None) in _ADD_BIAS and vars(module)["promote_dtype"] is promote_dtype
    if compute.itemsize >= 4 or not adds or np.size(getattr(module, "batch_dims", ())):
        return None
    return nn.unbox(module.get_variable("params", "bias"))


def bias_as_constant(*arrays: Any, **options: Any) -> list[Any]:
    """A layer's `promote_dtype` while `has_added` stands for the derivative by its bias."""
    *others, bias = promote_dtype(*arrays, **options)
    return [*others, jax.lax.stop_gradient(bias)]


def init_in_full(rules: PolicyMap, classes: dict[str, type]) -> Callable:
    """An interceptor under which initialisers run in float32 (or wider, where the param dtype is), whatever `param_dtype` says."""

    def intercept(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if module.scope is None or not _has_float_field(module, "param_dtype"):
            return next_fun(*args, **kwargs)
        param = rules.resolve(module_path(module), classes).policy.param_dtype
        before = module.param_dtype
        vars(module)["param_dtype"] = jnp.promote_types(param, jnp.float32)
        try:
            return next_fun(*args, **kwargs)
        finally:
            vars(module)["param_dtype"] = before

    return intercept


def in_full_if_it_runs(run: Callable[[], Any], rules: PolicyMap) -> Any:
    """`run` in float32, as initialisers and the first look at a module do; or, where that raises, as the policy computes.

    Some code takes half precision only, cuDNN's attention for one. Then values travel between modules in the compute
    dtypes; params are float32 all the same, and a module that runs in float32 is not touched: what it initialises from its
    data (an attention's cache, a weight norm's scale) stays float32. If neither runs, the first error is the user's.
    """
    try:
        return run()
    except Exception as error:
        try:
            with nn.intercept_methods(_in_streams(rules)):
                return run()
        except Exception:
            raise error from None


def _in_streams(rules: PolicyMap) -> Callable:
    """An interceptor that casts at the border of every module, and no params: its sites are found as they are called."""
    classes: dict[str, type] = {}
    streams: list[np.dtype] = []

    def intercept(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if module.scope is None or not hasattr(type(module), context.method_name):
            return next_fun(*args, **kwargs)
        path = module_path(module)
        classes.setdefault(path, type(module))
        streams.append(rules.resolve(path, classes).policy.compute_dtype)
        try:
            out = next_fun(*cast_floating(args, streams[-1]), **cast_floating(kwargs, streams[-1]))
        finally:
            own = streams.pop()
        return cast_floating(out, streams[-1] if streams else own)

    return intercept


def _has_float_field(module: nn.Module, name: str) -> bool:
    """Whether the module has this dtype field, unset or a float: one that is set to an int dtype means something else."""
    if name not in type(module).__dataclass_fields__:
        return False
    value = getattr(module, name)
    return value is None or jnp.issubdtype(value, jnp.floating)
