"""What the backward pass keeps of a rematerialised block, by name: from nothing, which costs time, to everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

ATTENTION = "attention"
"""The name under which `attention` marks its result, as `jax.ad_checkpoint.checkpoint_name` does."""

_policies = jax.checkpoint_policies

POLICIES: dict[str, Callable[..., Any]] = {
    "nothing": _policies.nothing_saveable,
    "attention": _policies.save_only_these_names(ATTENTION),
    "dots_no_batch": _policies.dots_with_no_batch_dims_saveable,
    "dots": _policies.dots_saveable,
    "everything": _policies.everything_saveable,
    "offload": _policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}
"""From name to policy, in the order of the memory that they take on the device, but for the last."""


def remat_policy(name: str) -> Callable[..., Any]:
    """The `policy=` of `nn.remat`, `nnx.remat` and `jax.checkpoint`: what is kept of a block for its backward pass.

    The rest is computed again when the backward pass gets there. For a transformer block over B sequences of T tokens, D
    wide, H heads, in numbers a block (its input, B·T·D, is kept in any case):

        "nothing"        0                     the whole forward pass runs twice: 4/3 of the products
        "attention"      1·B·T·D               only what `mpjax` attention returned; what lies behind it in the block does not
                                               wait for attention to run again
        "dots_no_batch"  8·B·T·D               every product with a weight (query, key, value, out, up); norms, activations
                                               and attention run twice. The usual choice for a transformer
        "dots"           9·B·T·D + B·H·T²      every product and convolution, attention's scores too; only what is cheap, one
                                               number at a time, runs twice
        "everything"     all                   nothing runs twice. To compare with; no remat at all can take less, since here
                                               a result and its reshaped or marked self may both be kept
        "offload"        as "dots_no_batch",   but in the memory of the host, sent there and back while the device computes:
                         of the device 0       it pays where the link is faster than the product

    Where attention is one fused kernel, "dots" keeps what "dots_no_batch" does, since no scores are to be seen; and the
    kernel runs twice under all but "everything", for the statistics that its own backward pass reads. What XLA makes of it
    all is measured by `experiments/remat_options.py`.

    Args:
      name: one of these.

    Raises:
      ValueError: another name.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost (2016); the policies are those of
    `jax.checkpoint_policies`.

    >>> import jax.numpy as jnp
    >>> from mpjax.measure.residuals import saved_residual_bytes
    >>> layer = jax.checkpoint(lambda x, w: jnp.sin(jnp.tanh(x @ w)).sum(), policy=remat_policy("dots"))
    >>> saved_residual_bytes(layer, jnp.ones((4, 8)), jnp.ones((8, 2)))  # 4 · 2 numbers of 4 bytes
    32
    """
    if name not in POLICIES:
        raise ValueError(f"got {name!r} for a remat policy; legal are {', '.join(POLICIES)}")
    return POLICIES[name]
