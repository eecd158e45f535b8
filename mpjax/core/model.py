"""The contract between a model and all that trains or measures it: a pair of pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

SINKS = "sinks"
"""The collection of `mstate` that a step differentiates beside params and replaces by its cotangent.

A probe's histogram and a delayed float8 scale leave the backward pass this way. It never meets clip or optimizer.
"""


def _no_merge(params: Any, mstate: Any) -> Any:
    raise ValueError(
        "this Model has no NNX module to give back; one from mpjax.wrap(an nnx.Module or its constructor, rules) has"
    )


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as two pure functions, free of Flax.

    `init(rng, *args, **kwargs) -> (params, mstate)` and
    `apply(params, mstate, *args, rng=None, **kwargs) -> (output, mstate)`: `params` is the pytree that is trained,
    `mstate` a dict of collections that change but are not trained (`{}` where there is none). `mpjax.wrap` makes one
    from a Flax module; bare functions make one too.

    Args:
      init: makes `(params, mstate)` from a key and sample inputs.
      apply: runs the model; differentiable in `params`; casts them where they are used.
      policy: the `Policy` or `PolicyMap` by which `apply` computes. It is only read: a float16 one gets a loss scale.
      table: for a wrapped module, `table(*args, **kwargs)` gives the resolution table that `explain` prints.
      cast_params: casts params to their compute dtypes once, for evaluation.
      merge: for a module wrapped from NNX, `merge(params, mstate)` gives an ordinary module of the user's classes back.

    >>> import jax.numpy as jnp
    >>> model = Model(lambda rng, x: ({"w": jnp.ones(3)}, {}), lambda params, mstate, x, rng=None: (x @ params["w"], mstate))
    >>> float(model.apply(*model.init(None, None), jnp.ones(3))[0])
    3.0
    """

    init: Callable[..., tuple[Any, Any]]
    apply: Callable[..., tuple[Any, Any]]
    policy: Any = None
    table: Callable[..., Any] | None = None
    cast_params: Callable[[Any], Any] = lambda params: params
    merge: Callable[[Any, Any], Any] = _no_merge

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """The resolution table as text: path, class, the rule that matched, and dtypes, for these sample inputs."""
        if self.table is None:
            raise ValueError(
                "this Model was made from bare functions, which have no module paths to explain; "
                "mpjax.wrap(module, rules) makes one that has"
            )
        return str(self.table(*args, **kwargs))
