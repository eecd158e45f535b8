"""What a loss keeps for its backward pass, by who made it: the modules, the loss behind them, or a cast of the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex

from mpjax.core.scopes import is_marked
from mpjax.core.tree import nbytes
from mpjax.core.types import Params
from mpjax.measure.jaxprs import sub_jaxprs

_STILL_A_WEIGHT = ("convert_element_type", "transpose", "reshape", "squeeze", "broadcast_in_dim", "copy")
"""What a weight may go through and still be that weight, in another dtype or layout."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes that a backward pass keeps of the forward pass, beyond the arguments themselves.

    Args:
      activations: made inside modules, for modules.
      logits: what modules handed to the loss function, and what that made outside of any module. None where no module is
        marked (bare functions): then it is among the activations.
      cast_weights: weights in their compute dtype.
    """

    activations: int
    logits: int | None
    cast_weights: int


def kept_by(loss: Callable[..., Any], params: Params, *rest: Any) -> Kept:
    """Sort what the backward pass of `loss(params, *rest)`, differentiated in params, keeps of its forward pass.

    A wrapped module runs under a name with a "~" (`core.scopes`), the root included: what has none is the loss
    function's own. The function is traced abstractly, not run. The sum is that of `saved_residual_bytes`; XLA may keep
    less (it computes again), and frees each array when the backward pass has gone by.

    Args:
      loss: differentiable in its first argument; returns a scalar.
      params: what is differentiated; arrays or `ShapeDtypeStruct`s, as all that follows.
      *rest: what the loss takes besides.

    >>> import jax.numpy as jnp
    >>> kept_by(lambda w, x: jnp.exp(x @ w).sum(), jnp.ones((8, 2), jnp.float32), jnp.ones((4, 8), jnp.float32))
    Kept(activations=32, logits=None, cast_weights=0)
    """

    def residuals(params: Params, *rest: Any) -> list[jax.Array]:
        return jax.tree.leaves(jax.vjp(lambda params: loss(params, *rest), params)[1])

    jaxpr = jax.make_jaxpr(residuals)(params, *rest).jaxpr
    given = {*jaxpr.invars, *jaxpr.constvars}
    kept = dict.fromkeys(v for v in jaxpr.outvars if not isinstance(v, jex.Literal) and v not in given)
    roles = _roles(jaxpr, set(jaxpr.invars[: len(jax.tree.leaves(params))]), "")
    found = {role: nbytes([v.aval for v in kept if roles[v] == role]) for role in ("activation", "logit", "weight")}
    if not _has_mark(jaxpr):
        return Kept(found["activation"] + found["logit"], None, found["weight"])
    return Kept(found["activation"], found["logit"], found["weight"])


def _roles(jaxpr: Any, weights: set[Any], scope: str) -> dict[Any, str]:
    """From each value that a jaxpr makes to its role; inner jaxprs (jit, scan, remat) are entered by place of the result."""
    roles = dict.fromkeys(weights, "weight")
    for eqn in jaxpr.eqns:
        here = f"{scope}/{eqn.source_info.name_stack}"
        used = [None if isinstance(v, jex.Literal) else v for v in eqn.invars]
        bodies = list(sub_jaxprs(eqn))
        outside = "~" not in here and not any(map(_has_mark, bodies))
        if eqn.primitive.name in _STILL_A_WEIGHT and roles.get(used[0]) == "weight":
            made = ["weight"]
        else:
            made = ["logit" if outside else "activation"] * len(eqn.outvars)
            body = next((body for body in bodies if len(body.outvars) == len(eqn.outvars)), None)
            if body is not None:
                same = len(body.invars) == len(used)  # of a while and a cond the first are not the body's own
                pairs = zip(body.invars, used, strict=True) if same else ()
                inner = _roles(body, {v for v, given in pairs if roles.get(given) == "weight"}, here)
                made = [made[0] if isinstance(v, jex.Literal) else inner.get(v, made[0]) for v in body.outvars]
        roles.update(zip(eqn.outvars, made, strict=True))
        if outside:  # what the model hands to the loss is read there
            roles.update((v, "logit") for v in used if v is not None and roles.get(v) == "activation")
    return roles


def _has_mark(jaxpr: Any) -> bool:
    return any(is_marked(str(eqn.source_info.name_stack)) or any(map(_has_mark, sub_jaxprs(eqn))) for eqn in jaxpr.eqns)
