"""Warnings that cost a user days if they are missing: each looks at what was asked for and says what will be lost."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mpjax.core.cautions import (
    MissingLossScaleWarning,
    UnneededLossScaleWarning,
    VanishingEpsilonWarning,
    VanishingUpdateWarning,
)
from mpjax.core.dtypes import facts, is_float
from mpjax.core.tree import all_finite, path_of
from mpjax.core.types import Params
from mpjax.numerics.loss_scale import LossScale, NoOpLossScale
from mpjax.policy.policy import computes_in


def check_loss_scale(policy: Any, loss_scale: LossScale) -> None:
    """Warn of float16 compute without a loss scale, and of a loss scale where nothing computes in float16.

    Raises:
      ValueError: it is no loss scale: a number, say.
    """
    if isinstance(loss_scale, type) or not hasattr(loss_scale, "adjust"):  # jmp's own are taken too
        raise ValueError(
            f"got loss_scale={loss_scale!r}; legal is what mpjax.dynamic_loss_scale(...) or static_loss_scale(...) makes, or "
            "None for what the policy needs"
        )
    if policy is None:
        return
    scaled = not isinstance(loss_scale, NoOpLossScale)
    if computes_in(policy, "float16") and not scaled:
        warnings.warn(
            "the policy computes in float16 without a loss scale: gradients under 2⁻²⁴ become zero; "
            "leave loss_scale out for a dynamic one",
            MissingLossScaleWarning,
            stacklevel=3,
        )
    elif scaled and not computes_in(policy, "float16"):
        warnings.warn(
            f"a {type(loss_scale).__name__} where nothing computes in float16 costs time and guards nothing: the other "
            "formats have float32's range; leave loss_scale out",
            UnneededLossScaleWarning,
            stacklevel=3,
        )


def check_optimizer(optimizer: optax.GradientTransformation, params: Params, view: Params | None = None) -> None:
    """Warn where an optimizer loses updates: low-precision master weights, or an epsilon that is zero in its state.

    Args:
      optimizer: any optax transformation.
      params: the master weights as they are stored.
      view: the params from which the optimizer's state is made; `params` by default.

    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     check_optimizer(optax.sgd(0.1), {"w": jnp.ones(2, jnp.bfloat16)})
    >>> caught[0].category.__name__
    'VanishingUpdateWarning'
    """
    for keys, x in jax.tree_util.tree_flatten_with_path(params)[0]:
        if is_float(x) and x.dtype.itemsize < 4:
            eps = facts(x.dtype.name).eps
            warnings.warn(
                f"master weights in {x.dtype} ({path_of(keys)} is one): a plain optimizer rounds to nearest, so an update "
                f"under {eps / 2:.1g} of a weight vanishes; keep params in float32 (params=float32 in the policy)",
                VanishingUpdateWarning,
                stacklevel=3,
            )
            break
    view = params if view is None else view
    # Only a behaviour is public in optax, not its settings: with a zero gradient, Adam divides zero by its epsilon.
    narrow = [x.dtype for x in jax.tree.leaves(view) if is_float(x) and x.dtype.itemsize < 4]
    if narrow and _divides_zero(optimizer, view):
        warnings.warn(
            f"the optimizer's epsilon is zero in {narrow[0]}, the dtype of its state: a zero gradient divides by zero; "
            "keep the state in float32 (optimizer_dtype='float32') or raise eps",
            VanishingEpsilonWarning,
            stacklevel=3,
        )


def _divides_zero(optimizer: optax.GradientTransformation, view: Params) -> bool:
    """Whether a zero gradient gives an update that is not finite; known also while a state is only traced."""
    update = optax.with_extra_args_support(optimizer).update

    @jax.jit  # one small compile instead of one for each operation
    def finite(tiny: Params) -> jax.Array:
        return all_finite(update(tiny, optimizer.init(tiny), tiny, value=jnp.float32(0))[0])

    with jax.ensure_compile_time_eval():
        return not bool(finite(jax.tree.map(lambda x: jnp.zeros((1,) * x.ndim, x.dtype), view)))
