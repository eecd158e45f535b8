"""How many floating point operations a product does: a multiply-add counts as two."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

PRODUCTS = {"dot_general": "dot", "ragged_dot_general": "dot", "conv_general_dilated": "conv"}
"""The primitives that are matrix products, by the kind under which the auditor reports them."""

FUSED_ATTENTION = {f"dot_product_attention_{way}": way[-3:] for way in ("fwd", "bwd", "fp8_fwd", "fp8_bwd")}
FUSED_ATTENTION |= {f"{name}_wrapper": way for name, way in FUSED_ATTENTION.items()}
"""The primitives by which jax calls cuDNN's attention, and the pass that each is: the auditor cannot look into them."""


def product_flops(eqn: Any) -> int:
    """FLOPs of one execution of a matrix product, a convolution or a fused attention; 0 for any other equation.

        dot:        2 · batch · M · N · K
        ragged dot: the same, each row with the one group that it belongs to
        conv:       2 · batch · output channels · input channels per group · Π over axes (output position, tap) pairs
        attention:  2 · batch · heads · queries · keys · (depth + value depth), its two products; backward
                    2 · batch · heads · queries · keys · (3 · depth + 2 · value depth), its four and the scores once more

    Only the pairs whose tap meets an element of the input are counted: neither padding nor the zeros that a dilated
    input is spread with. So a convolution costs as much as each of its two gradients, strided or not, a gradient step
    three times its forward pass, and one without padding the textbook's 2 · outputs · taps · input channels per group.
    XLA's own cost analysis counts the same way. Of attention all pairs of query and key count, as they do where it is
    not fused; under a causal mask the kernel leaves out about half.

    >>> import jax, jax.numpy as jnp
    >>> product_flops(jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 3)), jnp.ones((3, 4))).eqns[0])
    48
    """
    name = eqn.primitive.name
    if name in FUSED_ATTENTION:
        return _attention_flops(eqn)
    if name not in PRODUCTS:
        return 0
    lhs, rhs = (v.aval.shape for v in eqn.invars[:2])
    out = eqn.outvars[0].aval.shape
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)
    if name == "ragged_dot_general":
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (contracted, _), _ = numbers.dot_dimension_numbers
        # Cut along a contracted axis, each group has an output of its own, made of its share of that axis.
        groups = eqn.invars[2].aval.shape[-1] if set(numbers.lhs_ragged_dimensions) & set(contracted) else 1
        return 2 * math.prod(out) * math.prod(lhs[axis] for axis in contracted) // groups
    numbers = eqn.params["dimension_numbers"]
    batch, features = (out[axis] for axis in numbers.out_spec[:2])
    flops = 2 * batch * features * rhs[numbers.rhs_spec[1]]
    spatial = zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    for axis, (at_lhs, at_rhs, at_out) in enumerate(spatial):
        flops *= _meetings(
            outputs=(out[at_out], eqn.params["window_strides"][axis]),
            taps=(rhs[at_rhs], eqn.params["rhs_dilation"][axis]),
            inputs=(lhs[at_lhs], eqn.params["lhs_dilation"][axis]),
            before=eqn.params["padding"][axis][0],
        )
    return flops


def _attention_flops(eqn: Any) -> int:
    query, key, value = (v.aval.shape for v in eqn.invars[:3])
    heads, length = (1, 2) if eqn.params["layout"] == 1 else (2, 1)  # BNTH or BTNH
    pairs = query[0] * query[heads] * query[length] * key[length]
    depths = query[-1] + value[-1] if FUSED_ATTENTION[eqn.primitive.name] == "fwd" else 3 * query[-1] + 2 * value[-1]
    return 2 * pairs * depths


def terms(eqn: Any) -> int:
    """How many numbers a reduction makes one number of its result from; 1 for what is no reduction.

    >>> import jax, jax.numpy as jnp
    >>> terms(jax.make_jaxpr(jnp.sum)(jnp.ones((2, 3))).eqns[0])
    6
    """
    name, shape = eqn.primitive.name, eqn.invars[0].aval.shape if eqn.invars else ()
    if name.startswith("cum"):
        return int(shape[eqn.params["axis"]])
    if name.startswith("reduce_window"):
        return math.prod(eqn.params["window_dimensions"])
    if name.startswith(("reduce_", "arg")) or name == "reduce":
        return math.prod(shape) // max(1, math.prod(eqn.outvars[0].aval.shape))
    return 1


def _meetings(outputs: tuple[int, int], taps: tuple[int, int], inputs: tuple[int, int], before: int) -> int:
    """Along one axis, the pairs of output and tap that meet an input element; each is (how many, how far apart)."""
    # Positions are symmetric in outputs and taps; a gradient towards the kernel has few outputs and many "taps".
    (few, few_apart), (many, many_apart) = sorted((outputs, taps))
    elements, apart = inputs
    starts = np.arange(many) * many_apart - before
    hits = 0
    for i in range(few):
        where = starts + i * few_apart
        hits += int(np.count_nonzero((where >= 0) & (where <= (elements - 1) * apart) & (where % apart == 0)))
    return hits
