"""FLOPs against counts by hand, and against the product itself run on ones, which counts its own multiply-adds."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.measure.flops import PRODUCTS, product_flops


def products(fn, *args):
    return [eqn for eqn in jax.make_jaxpr(fn)(*args).jaxpr.eqns if eqn.primitive.name in PRODUCTS]


def flops(fn, *args):
    return [product_flops(eqn) for eqn in products(fn, *args)]


def counted(eqn, *rest):
    """Each output of a product of ones is its number of multiply-adds. Exact: all sums are under 2²⁴."""
    ones = [jnp.ones(v.aval.shape, jnp.float32) for v in eqn.invars[:2]]
    return 2 * int(np.asarray(eqn.primitive.bind(*ones, *rest, **eqn.params), np.float64).sum())


def test_a_dense_layer():
    assert flops(lambda x, w: x @ w, jnp.ones((5, 3)), jnp.ones((3, 4))) == [2 * 5 * 4 * 3]


def test_a_batched_dot():
    """Attention scores: batch 2, 3 heads, 5 queries, 6 keys, depth 4."""
    scores = flops(lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k), jnp.ones((2, 5, 3, 4)), jnp.ones((2, 6, 3, 4)))
    assert scores == [2 * 2 * 3 * 5 * 6 * 4]


def test_dots_of_vectors_and_of_several_contracted_axes():
    assert flops(jnp.dot, jnp.ones(7), jnp.ones(7)) == [2 * 7]
    assert flops(lambda x, w: jnp.einsum("abc,bcd->ad", x, w), jnp.ones((2, 3, 4)), jnp.ones((3, 4, 5))) == [
        2 * 2 * 5 * 12
    ]


def test_a_ragged_dot_counts_each_row_once():
    """A mixture of experts: each of 8 rows meets one of 3 experts' matrices, forward and backward."""
    x, experts, sizes = jnp.ones((8, 4)), jnp.ones((3, 4, 5)), jnp.array([3, 0, 5])
    forward = lambda x, experts: jax.lax.ragged_dot(x, experts, sizes)  # noqa: E731
    assert flops(forward, x, experts) == [2 * 8 * 4 * 5]
    assert counted(products(forward, x, experts)[0], sizes) == 2 * 8 * 4 * 5
    backward = jax.grad(lambda x, experts: forward(x, experts).sum(), argnums=(0, 1))
    assert flops(backward, x, experts) == [2 * 8 * 4 * 5] * 3


def test_a_convolution_by_hand():
    """Stride 2, two groups, no padding: 2 images, 6 of (9 − 3) // 2 + 1 = 4 rows and columns, 3×3 taps of 4 / 2 channels."""

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    assert flops(conv, jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 2, 6))) == [2 * (2 * 6 * 4 * 4) * (3 * 3) * 2]


def test_padding_is_not_counted():
    """5 outputs of a kernel of 3 with one zero on either side: 2 + 3 + 3 + 3 + 2 taps meet something."""
    conv = lambda x, w: jax.lax.conv(x, w, (1,), "SAME")  # noqa: E731
    assert flops(conv, jnp.ones((1, 1, 5)), jnp.ones((1, 1, 3))) == [2 * 13]


CONVOLUTIONS = list(itertools.product((1, 2, 3), ("VALID", "SAME", "uneven"), (1, 2), (1, 2)))


@pytest.mark.parametrize(("stride", "padding", "groups", "dilation"), CONVOLUTIONS)
def test_a_convolution_and_its_gradients_cost_what_they_multiply(stride, padding, groups, dilation):
    """So a gradient step costs three forward passes, with strides, groups, dilation and uneven padding too."""

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), ((3, 1), (0, 2)) if padding == "uneven" else padding, rhs_dilation=(1, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip

    x, w = jnp.ones((2, 7, 8, 4)), jnp.ones((3, 2, 4 // groups, 6))
    step = products(jax.grad(lambda x, w: conv(x, w).sum(), argnums=(0, 1)), x, w)
    assert [product_flops(eqn) for eqn in step] == [counted(eqn) for eqn in step] == flops(conv, x, w) * 3


def test_a_transposed_convolution_does_not_count_the_zeros_between():
    (eqn,) = products(lambda x, w: jax.lax.conv_transpose(x, w, (2,), "SAME"), jnp.ones((1, 6, 3)), jnp.ones((4, 3, 5)))
    assert product_flops(eqn) == counted(eqn) < 2 * 12 * 5 * 4 * 3


def test_a_convolution_by_batch_groups():
    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), batch_group_count=2
        )

    (eqn,) = products(conv, jnp.ones((4, 5, 5, 3)), jnp.ones((2, 2, 3, 6)))
    assert product_flops(eqn) == counted(eqn) == 2 * (2 * 6 * 4 * 4) * (2 * 2) * 3


def test_xla_counts_the_same():
    conv = lambda x, w: jax.lax.conv(x, w, (2, 2), "SAME")  # noqa: E731
    args = jnp.ones((2, 4, 9, 9)), jnp.ones((6, 4, 3, 3))
    assert flops(conv, *args) == [jax.jit(conv).lower(*args).compile().cost_analysis()["flops"]]


def test_what_is_no_product_costs_nothing():
    (eqn,) = jax.make_jaxpr(jnp.sin)(1.0).jaxpr.eqns
    assert product_flops(eqn) == 0
