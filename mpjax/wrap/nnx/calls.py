"""What happens at each module call: arguments in the callee's compute dtype, results in the caller's."""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn.recurrent import RNNCellBase

from mpjax.core.scopes import scope_name
from mpjax.core.tree import cast_floating, cast_like
from mpjax.numerics.bias import has_added
from mpjax.numerics.dot import apart
from mpjax.numerics.probe import Sinks, tap_tree
from mpjax.wrap.nnx.layers import DENSE, UPCASTING_NORMS, adds_bias, bias_as_constant, bias_of, looks_up
from mpjax.wrap.nnx.sites import Site

running: contextvars.ContextVar[Site | None] = contextvars.ContextVar("site of the module that runs", default=None)

probed_by: contextvars.ContextVar[Sinks] = contextvars.ContextVar("sinks of the model that runs", default=None)

SITE = "_mpjax_site"
"""The attribute in which a module of the instrumented copy keeps its `Site`."""

NOT_CALLS = {"initialize_carry", "init_cache", "set_view", "set_mode"}
"""Public methods of Flax's layers that compute nothing a policy is about."""


@functools.cache
def bordered(cls: Any) -> type:
    """The subclass of a module class whose public methods convert at the border.

    One per class, for ever: NNX puts the class into the key of every jit cache. (NNX has no interceptor, a patched
    `__call__` on an instance is not called, and one on a class would be everybody's.)
    """
    base = set(dir(nnx.Module)) - {"__call__"} | NOT_CALLS
    methods = {}
    for name in dir(cls):
        attribute = inspect.getattr_static(cls, name)
        method = callable(attribute) and hasattr(attribute, "__get__")  # a function, or nnx.jit's descriptor
        if isinstance(attribute, (type, staticmethod, classmethod)) or not method:
            continue
        if name == "__call__" or not (name.startswith("_") or name in base):
            methods[name] = _crossing(name, attribute)
    return _subclass(cls, methods, pytree=getattr(cls, "_pytree__is_pytree", False)) if methods else cls


@functools.wraps(nnx.Embed.__call__)
def _look_up(self: Any, *args: Any, **kwargs: Any) -> Any:
    site: Site | None = vars(self).get(SITE)
    token = running.set(None)  # under no site a Param is read as it is
    try:
        rows = nnx.Embed.__call__(self, *args, **kwargs)
    finally:
        running.reset(token)
    return rows if site is None else _cast(rows, site.compute)


class _Lookup(nnx.Embed):
    """Stands between a user's subclass of Embed and Embed itself, where `super().__call__` finds it."""

    __call__: Any = _look_up


def _adding(method: Any) -> Callable:
    """The call of a layer that adds a bias in half: its gradient is summed in float32."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        site: Site | None = vars(self).get(SITE)
        token = running.set(None)  # under no site a Param is read as it is
        try:
            bias = None if site is None else bias_of(self, site.compute)
        finally:
            running.reset(token)
        if bias is None:
            return method(self, *args, **kwargs)
        own = vars(self)["promote_dtype"]
        vars(self)["promote_dtype"] = bias_as_constant
        try:
            return has_added(method(self, *args, **kwargs), bias)
        finally:
            vars(self)["promote_dtype"] = own

    return call


def _crossing(name: str, method: Any) -> Callable:
    """`method`, converting if it is entered from another module."""
    method = _look_up if looks_up(method) else _adding(method) if adds_bias(method) else method

    @functools.wraps(method)
    def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        site: Site | None = vars(self).get(SITE)
        run = method.__get__(self, type(self))
        caller = running.get()
        if site is None or (caller is not None and caller.path == site.path):  # its own helper method
            return run(*args, **kwargs)
        token = running.set(site)
        try:
            with jax.named_scope(scope_name(site.path)):
                tapped = site.path if name == "__call__" else f"{site.path}.{name}"
                return _run(self, run, args, kwargs, site, tapped)
        finally:
            running.reset(token)

    return call


def method_of(module: nnx.Module, method: Any) -> Callable:
    """What is called on an instrumented module: by name, or a function of it, which need not be one of the class."""
    if isinstance(method, str):
        return getattr(module, method)
    own: Any = type(module).__mro__[1]  # the user's class, of which the module's is the casting subclass
    name: str = method.__name__
    if getattr(own, name, None) is method:
        return getattr(module, name)
    return functools.partial(_crossing(name, method), module)


def _run(module: nnx.Module, method: Callable, args: tuple, kwargs: dict, site: Site, name: str) -> Any:
    args, kwargs, carry = _enter(module, args, kwargs, site)
    out = method(*args, **kwargs)
    if site.dot is not None and isinstance(module, DENSE):
        out = apart(out)
    out = tap_tree(probed_by.get(), name, out)
    if carry is not None:  # or the loop around this cell does not type-check
        return (cast_like(out[0], carry), *_hand_back(out[1:], site))
    if isinstance(module, (nnx.RNN, nnx.Bidirectional)) and isinstance(out, tuple):  # (final carry, outputs)
        return (out[0], *_hand_back(out[1:], site))
    return _hand_back(out, site)


def _enter(module: nnx.Module, args: tuple, kwargs: dict, site: Site) -> tuple:
    """Arguments in the compute dtype, and the carry whose dtypes the results must restore (None outside cells)."""
    if site.keeps_input or (isinstance(module, UPCASTING_NORMS) and site.compute.itemsize >= 4):
        return args, kwargs, None
    if isinstance(module, RNNCellBase):
        return (args[0], *_cast(args[1:], site.compute)), _cast(kwargs, site.compute), args[0]
    untouched = {name: kwargs[name] for name in kwargs if name == "initial_carry"}
    return _cast(args, site.compute), _cast(kwargs, site.compute) | untouched, None


def _hand_back(out: Any, site: Site) -> Any:
    return _cast(out, site.hands_back, site.passes)


def _cast(tree: Any, dtype: Any, passes: frozenset = frozenset()) -> Any:
    """Float arrays in `dtype`. Modules, Rngs and Variables are pytrees too, but no values that flow: they stay as they are."""

    return jax.tree.map(functools.partial(_cast_leaf, dtype=dtype, passes=passes), tree, is_leaf=_is_opaque)


def _is_opaque(x: Any) -> bool:
    return isinstance(x, (nnx.Pytree, nnx.Variable))


def _cast_leaf(x: Any, dtype: Any, passes: frozenset) -> Any:
    return x if _is_opaque(x) or getattr(x, "dtype", None) in passes else cast_floating(x, dtype)


@functools.cache
def read_in_stream(cls: Any) -> type:
    """The subclass of a Variable class whose value is read in the compute dtype of the module that reads it.

    Cast where it is read, so that `nnx.remat` keeps the float32 original for the backward pass and no half-precision
    copy, and so that a norm of another module's weights sees them in float32. (Variable hooks would do the same; Flax has
    deprecated them in favour of a subclass.)
    """

    def get_value(self: Any, **kwargs: Any) -> Any:
        site = running.get()
        value = cls.get_value(self, **kwargs)
        return value if site is None else cast_floating(value, site.compute)

    def __getattr__(self: Any, name: str) -> Any:
        if name in vars(nnx.Variable) or name.startswith("__"):
            return cls.__getattr__(self, name)
        return getattr(get_value(self), name)

    return _subclass(cls, {"get_value": get_value, "__getattr__": __getattr__})


def _subclass(cls: type, body: dict[str, Any], **options: Any) -> type:
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    bases = (cls, _Lookup) if issubclass(cls, nnx.Embed) and cls is not nnx.Embed else (cls,)
    return type(cls)(cls.__name__, bases, named | body, **options)
