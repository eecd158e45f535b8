"""Which module class sits at which path, seen in one abstract trace without the policy."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from mpjax.core.tree import canonical_path
from mpjax.policy.patterns import lineage

trace_key = jax.make_user_context(None)
"""Part of the key of every jit cache. `nn.jit` shares one trace among all layers of a class, whatever their paths."""

_LIFTED_NAME = re.compile(r"((?:Scan|Checkpoint|Remat|Jit|Vmap)+)[A-Z_]")


@dataclasses.dataclass
class Sites:
    """Classes by canonical path in calling order, and the paths of lifted modules with the names of the transforms.

    A transform that decorates a method, not a class, leaves no name behind: it is called `"method"`. For the layers that no
    `dot=` recipe reaches, `unfit` has the reason.
    """

    classes: dict[str, type] = dataclasses.field(default_factory=dict)
    lifted: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    unfit: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def scanned(self) -> set[str]:
        """Paths whose layers are one traced body."""
        return {path for path, transforms in self.lifted.items() if "Scan" in transforms}

    def rounded_at(self, path: str) -> str | None:
        """The ancestor that rounds what an `output=` rule at `path` hands back, if there is one.

        A tensor is known as deliberate by its identity, which no tensor keeps that leaves `nn.remat`, `nn.scan` or
        `nn.jit`: the first inner module around such a transform converts it as if it were its own.
        """
        for above in lineage(path):
            parent = above.rpartition("/")[0]
            if above in self.lifted and parent:
                return parent
        return None


def record(
    call: Callable[[], Any], unfit: Callable[[nn.Module, str], str | None] = lambda module, method: None
) -> Sites:
    """The sites that `call` visits; nothing is computed.

    Args:
      call: runs the module.
      unfit: asked of a module and its method behind each call; what it answers stands in the sites.
    """
    sites, visits = Sites(), itertools.count()
    this_record = object()  # itself, not its id: jax's cache keeps the key, and an id is given away again
    callers: list[str] = []

    def recorder(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module, cls = context.module, type(context.module)
        lifted = lifted_path(context, callers[-1] if callers else None)
        if lifted is not None:
            sites.lifted.setdefault(lifted, set()).update(_lifts(cls) or {"method"})
            visits_key.append(trace_key((this_record, next(visits))))  # every lifted body must be traced, none reused
            visits_key[-1].__enter__()
        if module.scope is None or not hasattr(cls, context.method_name):
            return next_fun(*args, **kwargs)
        path = module_path(module)
        sites.classes.setdefault(path, cls)
        callers.append(path)
        try:
            out = next_fun(*args, **kwargs)
        finally:
            callers.pop()
        if (why := unfit(module, context.method_name)) is not None:
            sites.unfit[path] = why
        return out

    visits_key: list[Any] = []
    try:
        with nn.intercept_methods(recorder):
            jax.eval_shape(lambda: (call(), None)[1])  # a model may hand out what is no array, a string
    finally:
        for key in reversed(visits_key):
            key.__exit__(None, None, None)
    return sites


def module_path(module: nn.Module) -> str:
    """The canonical path of a bound module; the root's is empty."""
    return canonical_path("/".join(module.path))


def lifted_path(context: nn.module.InterceptorContext, caller: str | None) -> str | None:
    """The path of a module that a transform lifts, as Flax's set-up check announces it before the call.

    The check is reported as a call of a lambda on the module, which has no path yet, only a name. (A lambda that the
    user lifts inside the root has neither, and is no module of its own.)
    """
    module = context.module
    is_check = context.method_name == "<lambda>" and not hasattr(type(module), "<lambda>") and not module.path
    if not is_check or (module.name is None and caller is not None):
        return None
    return canonical_path("/".join(filter(None, [caller, module.name])))


def _lifts(cls: type) -> set[str]:
    """The transforms that made a class, which Flax names after them: `ScanCheckpointBlock`."""
    found = _LIFTED_NAME.match(cls.__name__)
    return set(re.findall("[A-Z][a-z]+", found[1])) if found else set()
