"""Rules that one operation can break by itself: mixed products, products wider than the policy, float64."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp

from mpjax.measure.flops import PRODUCTS
from mpjax.measure.lint.finding import ComputeOf, Finding, dtype_of, place
from mpjax.measure.program import Node, Program


def mixed_products(program: Program, compute_of: ComputeOf) -> Iterator[Finding]:
    """A product or convolution of two float dtypes: it is promoted, and runs in neither.

    Two float8 formats are what a float8 product is made of, and meant.
    """
    for node, (a, b) in _products(program):
        if a != b and max(a.itemsize, b.itemsize) > 1:
            yield Finding(
                place(node), "mixed product", f"a {_noun(node)} of {a.name} and {b.name}, which runs in neither",
                f"cast the {max(a, b, key=lambda d: d.itemsize).name} operand, or both, to the compute dtype before it",
            )  # fmt: skip


def wide_products(program: Program, compute_of: ComputeOf) -> Iterator[Finding]:
    """A product in float32 where the policy computes in fewer bits.

    What an island computes is not one: the power iteration of a SpectralNorm is its own, and float32.
    """
    for node, (a, b) in _products(program):
        meant = compute_of(node)
        if meant is not None and a == b and a.itemsize > meant.itemsize:
            yield Finding(
                place(node), "wide product", f"a {a.name} {_noun(node)} where the policy computes in {meant.name}",
                f"cast both operands to {meant.name}, or give this path a rule with compute={a.name} if it is meant",
            )  # fmt: skip


def float64_leaks(program: Program, compute_of: ComputeOf) -> Iterator[Finding]:
    """An operation that gives float64 (or complex128), made of nothing that was float64 before."""
    leaked = {value for node in program.nodes if node.eqn is not None for value in node.outputs if _is_double(value)}
    behind = set(leaked)
    for value in leaked:
        for node in program.users.get(value, ()):
            if node.eqn is None:
                behind.update(node.outputs)
    for node in program.nodes:
        if node.eqn is None or not any(map(_is_double, node.outputs)) or any(v in behind for v in node.inputs):
            continue
        meant = compute_of(node)
        if meant is None or meant.itemsize < 8:
            yield Finding(
                place(node), "float64", f"{node.name} gives {node.outputs[0].aval.dtype.name}, which no policy asks for",
                "give its constants and inputs a dtype (np.float32(2), jnp.zeros(n, x.dtype)), or name float64 in the policy",
            )  # fmt: skip


def _products(program: Program) -> Iterator[tuple[Node, tuple]]:
    """Products of two floats, each with their dtypes."""
    for node in program.nodes:
        if node.name in PRODUCTS:
            factors = tuple(map(dtype_of, node.inputs[:2]))
            if None not in factors:
                yield node, factors


def _noun(node: Node) -> str:
    return "convolution" if PRODUCTS[node.name] == "conv" else "product"


def _is_double(value: object) -> bool:
    dtype = getattr(getattr(value, "aval", None), "dtype", None)
    return dtype in (jnp.dtype("float64"), jnp.dtype("complex128"))
