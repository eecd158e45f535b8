"""Floor 2, the doors to Flax: a module and a policy in, a pure `Model` out. `mpjax.wrap(...)` is this package, called."""

from __future__ import annotations

import sys
import types
from typing import Any

from mpjax.core.model import Model
from mpjax.policy.rules import PolicyMap


def wrap(module: Any, policy: Any = "mixed_bfloat16", *, streams: tuple[str, ...] = ("dropout",)) -> Model:
    """A Flax module under a policy, as a pair of pure functions over ordinary pytrees.

    The module is only read. `model.init(rng, *args)` initialises in float32 and hands params out in their param dtype. An
    NNX module is best given as its constructor, `lambda rngs: Net(rngs=rngs)`, from which `init` draws (an instance keeps
    its values, and what its own `param_dtype` has rounded stays so); `model.merge(params, mstate)` gives an ordinary module
    of the user's classes back.
    `model.apply(params, mstate, *args, rng=None, train=None, method=None)` runs each submodule in the compute dtype that
    the policy gives its path: its float arguments and its own params are converted where it is entered and where it reads
    them, its results go back in its caller's compute dtype, and the model's own result in the policy's output dtype.
    Of an embedding's table only the rows that are looked up are converted, so that their gradients add up in float32.
    Norms and softmax stay in float32. What is a function and not a module (`jax.nn.softmax` written out in a `__call__`)
    cannot be reached; `mpjax.audit` shows in which dtype it ran.

    Under a `dot=` recipe (`"mixed_fp8"`, or `dot=fp8`, `fp8_delayed`, `int8` in a rule) Flax's dense layers, those of
    attention among them, multiply in eight bits, forward and backward; `model.explain` shows at which paths. Heads and
    embeddings (by name), layers with a `dot_general` of their own and sizes that are no multiples of 16 stay as they are.
    `fp8_delayed` keeps its scales in `mstate["fp8_history"]`: pass on the mstate that comes in, as a train step needs it;
    without it (`mstate={}`) the scales are current ones.

    A layer's own `dtype=` is overridden by the policy, which is the one place where precision is decided. `train=` goes to
    the method if it takes it; if it must have it and none is given, it gets False. For NNX a method that does not take it
    is run after `.train()` or `.eval()`, and as the module stands where no `train=` is given; `rng` reseeds every rng stream
    of an NNX module, which otherwise go on from where `mstate` holds them.

    Args:
      module: a `flax.linen.Module`, not bound; an `nnx.Module`, or a function from `nnx.Rngs` to one.
      policy: a `PolicyMap`, a dict of rules, a `Policy` or a policy string.
      streams: names of the rng streams that a Linen module draws from; each is derived from `rng` by its place here.

    Returns:
      A `Model`; `model.explain(*sample)` prints what holds where.

    Raises:
      TypeError: not a Flax module.
      ValueError: a rule that can never act on this module (for Linen raised by `init`, `apply` or `explain`, which see its
        paths), rules that conflict on a shared NNX module,
        or a float8 compute dtype, in which only products can run.

    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> model = wrap(nn.Dense(2), "mixed_bfloat16")
    >>> params, mstate = model.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> y, mstate = model.apply(params, mstate, jnp.ones((1, 3)))
    >>> str(params["kernel"].dtype), str(y.dtype)
    ('float32', 'float32')
    >>> from flax import nnx
    >>> model = wrap(lambda rngs: nnx.Linear(3, 2, rngs=rngs), "mixed_bfloat16")
    >>> model.apply(*model.init(jax.random.key(0)), jnp.ones((1, 3)))[0].dtype
    dtype('float32')
    """
    rules = PolicyMap.of(policy)
    narrow = sorted(str(dtype) for dtype in rules.compute_dtypes if dtype.itemsize < 2)
    if narrow:
        raise ValueError(
            f"got compute dtype {', '.join(narrow)}; a wrapped module computes in bfloat16, float16, float32 or float64, "
            "since float8 has products but no additions; use bfloat16 here, and dot=fp8 for the products (mixed_fp8)"
        )
    from mpjax.wrap import linen

    if linen.takes(module):
        return linen.wrap_linen(module, rules, streams)
    from mpjax.wrap import nnx

    if nnx.takes(module):
        return nnx.wrap_nnx(module, rules)
    raise TypeError(
        f"got {module!r:.80}; wrap takes a flax.linen Module instance (nn.Dense(8), not nn.Dense), an nnx.Module, or a "
        "function from nnx.Rngs to one; bare functions make a model by mpjax.Model(init, apply)"
    )


class _CallablePackage(types.ModuleType):
    """`import mpjax.wrap` binds this package over the function of the same name, so the package can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Model:
        return wrap(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
