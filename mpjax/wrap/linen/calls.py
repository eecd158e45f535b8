"""What happens at each module call: arguments in the callee's compute dtype, results in the caller's."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from mpjax.core.dtypes import is_float
from mpjax.core.scopes import scope_name
from mpjax.core.tree import cast_floating, cast_like
from mpjax.numerics.bias import has_added
from mpjax.numerics.dot import apart
from mpjax.numerics.probe import Sinks, tap_tree
from mpjax.policy.rules import PolicyMap, Resolution
from mpjax.wrap.linen.layers import (
    UPCASTING_NORMS,
    bias_as_constant,
    bias_of,
    dressed,
    fields_for,
    fields_for_lookup,
    looks_up,
)
from mpjax.wrap.linen.sites import Sites, lifted_path, module_path, trace_key


@dataclasses.dataclass
class Frame:
    """A module call in progress: where, under which resolution, and what its lifted children are traced under."""

    module: nn.Module
    path: str
    method: str
    found: Resolution
    caller: Frame | None
    keys: contextlib.ExitStack
    table: dict[str, Any] | None = None
    """Of an Embed: the fields by which it looks up in the master table."""
    bias: jax.Array | None = None
    """The master bias that this call adds in half."""

    @property
    def name(self) -> str:
        """Under which a probe reports what this call returns."""
        return self.path if self.method == "__call__" else f"{self.path}.{self.method}"

    @property
    def stream(self) -> np.dtype:
        """The dtype in which values flow between the modules that this one calls."""
        return self.found.policy.compute_dtype

    @property
    def enters_rule(self) -> bool:
        """Whether this call is the border of its rule's subtree: it comes from under another rule, or from outside."""
        return self.caller is None or self.caller.found.source != self.found.source


class Interceptor(contextlib.AbstractContextManager):
    """One per `apply`: the stack of calls in progress, and the tensors that an `output=` rule made.

    Those pass up unrounded for as long as they are returned as they are, known by identity. (They are held here, so
    that an id stays its own.)
    """

    def __init__(self, rules: PolicyMap, sites: Sites, sinks: Sinks = None, by_path: bool = False):
        self.rules = rules
        self.sinks = sinks
        self.by_path = by_path  # each module has something of its own, a sink or a history: none shares a trace
        self.classes = dict(sites.classes)
        self.sites = sites
        self.may_carry = {path for path, transforms in sites.lifted.items() if transforms & {"Scan", "method"}}
        self.frames: list[Frame] = []
        self.deliberate: dict[int, jax.Array] = {}
        self.keys = contextlib.ExitStack()

    def __exit__(self, *error: Any) -> None:
        self.keys.close()

    def __call__(
        self, next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:  # fmt: skip
        module, method = context.module, context.method_name
        caller = self.frames[-1] if self.frames else None
        lifted = lifted_path(context, caller.path if caller else None)
        if lifted is not None:
            keys = caller.keys if caller else self.keys
            around = self._subtree(caller.path, caller.caller) if caller else None
            keys.enter_context(trace_key((around, self._subtree(lifted, caller))))
        # Flax also reports lifted plain functions (RNN's scan_fn, remat of a lambda): not calls of the module.
        if module.scope is None or not hasattr(type(module), method) or method == "initialize_carry":
            return next_fun(*args, **kwargs)
        path = module_path(module)
        self.classes.setdefault(path, type(module))
        found = self.rules.resolve(path, self.classes)
        compute = found.policy.compute_dtype
        if method == "setup":  # runs before the call that needs it, outside its frame, and may read params
            with jax.named_scope(scope_name(path)), dressed(module, compute):
                return next_fun(*args, **kwargs)
        rows = looks_up(context.orig_method)
        if caller is not None and caller.path == path:  # a helper method of the module that is running: its own affair
            if not rows or caller.table is None:
                return next_fun(*args, **kwargs)
            with dressed(module, None, **caller.table):
                return cast_floating(next_fun(*args, **kwargs), caller.stream)
        with jax.named_scope(scope_name(path)):
            frame = Frame(module, path, method, found, caller, contextlib.ExitStack())
            frame.bias = bias_of(module, context.orig_method, compute)
            return self._run(next_fun, args, kwargs, frame, rows)

    def _run(self, next_fun: Callable, args: tuple, kwargs: dict, frame: Frame, rows: bool) -> Any:
        """The call; `rows`: it looks up rows of a table, which is read as it is, and the rows are cast."""
        module = frame.module
        args, kwargs, carry = self._enter(frame, args, kwargs)
        with frame.keys:
            frame.keys.enter_context(trace_key(self._subtree(frame.path, frame.caller)))
            self.frames.append(frame)
            try:
                dot = self.rules.dot_at(frame.path, self.classes)
                frame.table = fields_for_lookup(module)
                fields = (frame.table if rows else None) or fields_for(module, frame.stream, dot)
                if frame.bias is not None:
                    fields["promote_dtype"] = bias_as_constant
                with dressed(module, frame.stream, **fields):
                    out = next_fun(*args, **kwargs)
                if frame.bias is not None:
                    out = has_added(out, frame.bias)
                if "dot_general" in fields:
                    out = apart(out)
                if rows:
                    out = cast_floating(out, frame.stream)
            finally:
                self.frames.pop()
        out = tap_tree(self.sinks, frame.name, out)
        if carry is not None and _returns_carry(out, carry):  # or the loop around this body does not type-check
            return (cast_like(out[0], carry), *self._hand_back(out[1:], frame))
        if isinstance(module, (nn.RNN, nn.Bidirectional)) and isinstance(out, tuple):  # (final carry, outputs)
            self.deliberate.update((id(x), x) for x in jax.tree.leaves(out[0]))
        return self._hand_back(out, frame)

    def _enter(self, frame: Frame, args: tuple, kwargs: dict) -> tuple:
        """Arguments in the compute dtype, and the carry whose dtypes the results must restore (None outside loops)."""
        module, compute = frame.module, frame.stream
        if frame.found.rule.keeps_input and frame.enters_rule:
            return args, kwargs, None
        if isinstance(module, UPCASTING_NORMS) and compute.itemsize >= 4:
            return args, kwargs, None
        if isinstance(module, nn.RNNCellBase):
            return (args[0], *cast_floating(args[1:], compute)), cast_floating(kwargs, compute), args[0]
        untouched = {name: kwargs[name] for name in kwargs if name == "initial_carry"}
        carry = args[0] if frame.path in self.may_carry and args else None
        return cast_floating(args, compute), cast_floating(kwargs, compute) | untouched, carry

    def _hand_back(self, out: Any, frame: Frame) -> Any:
        """Results in the caller's stream; `output=` acts where its rule's subtree is left, the default's at the root."""
        leaves_rule = frame.found.rule.hands_back and frame.enters_rule
        target = frame.caller.stream if frame.caller else self.rules.default.output_dtype
        if leaves_rule:
            target = frame.found.policy.output_dtype
        return jax.tree.map(functools.partial(self._convert, target=target, leaves_rule=leaves_rule), out)

    def _convert(self, x: Any, target: Any, leaves_rule: bool) -> Any:
        if not is_float(x) or id(x) in self.deliberate:
            return x
        y = cast_floating(x, target)
        if leaves_rule:
            self.deliberate[id(y)] = y
        return y

    def _subtree(self, path: str, caller: Frame | None) -> Any:
        """All that a trace of this module depends on: two modules with the same one may share a trace (but no sinks)."""
        below = [p for p in self.sites.classes if p == path or p.startswith(path + "/") or not path]
        rules, classes = self.rules, self.classes
        table = tuple(
            (p[len(path) :], rules.resolve(p, classes), rules.dot_at(p, classes), p in self.may_carry) for p in below
        )
        border = None if caller is None else (caller.stream, caller.found.source)
        own = path if self.by_path else None
        return (own, border, self.rules.default.output_dtype, table)


def _returns_carry(out: Any, carry: Any) -> bool:
    """Whether a result is (carry, rest): a pair whose first half has the structure and shapes of the carry that came in."""
    structure: Any = jax.tree.structure(carry)
    if not isinstance(out, tuple) or len(out) != 2 or jax.tree.structure(out[0]) != structure:
        return False
    pairs = zip(jax.tree.leaves(out[0]), jax.tree.leaves(carry), strict=True)
    return all(np.shape(x) == np.shape(y) for x, y in pairs)
