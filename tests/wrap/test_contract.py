"""Every model of the zoo under every policy: the dtype of each product, exp and reduction is read off the jaxpr."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import mpjax
from mpjax.measure.audit import audit
from mpjax.measure.residuals import saved_residual_bytes
from tests.wrap.doors import CASES, loss, loss_by_hand, model_of, plain
from tests.wrap.zoo import Case

KINDS = ("lm scan+remat", "convolutions", "LSTMCell", "attention")
RUN = [case for case in CASES if case.name.removeprefix("nnx ") in KINDS]
"""Compiled and run: one of each kind. All others are read without being run."""

HALVES = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}


@functools.cache
def prepared(case: Case, policy: str):
    """(loss of params, params, mstate, apply) of a case under a policy; params are abstract, nothing is computed.

    Under jit, so that all tests of a case share one trace of the model.
    """
    model = model_of(case, policy)
    params, mstate = jax.eval_shape(model.init, jax.random.key(0), case.sample)
    rng = jax.random.key(3) if case.train else None

    @jax.jit
    def apply(params, mstate):
        return model.apply(params, mstate, case.sample, rng=rng, train=case.train or None)

    return functools.partial(loss, apply), params, mstate, apply


@pytest.mark.parametrize("policy", HALVES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_products_run_in_half_forward_and_backward(case, policy):
    """Every dot and convolution has two half-precision operands, in the backward pass too."""
    loss_fn, params, mstate, _ = prepared(case, policy)
    found = audit(jax.grad(loss_fn), params, mstate)
    products = [op for op in found.ops if op.kind in ("dot", "conv")]
    other = [op for op in products if set(op.operands) != {HALVES[policy]}]
    assert len(products) > len(other) == case.float32_matrix_products, [str(op) for op in other]
    assert all(set(op.operands) == {"float32"} for op in other)


@pytest.mark.parametrize("policy", HALVES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_islands_run_in_float32(case, policy):
    """Every exp and every sum of the forward pass is float32: softmax, and the statistics of norms."""
    loss_fn, params, mstate, _ = prepared(case, policy)
    found = audit(loss_fn, params, mstate)
    narrow = [
        op for op in found.ops if op.kind in ("exp", "reduce") and not set(op.operands) <= {"float32", "bool", "int32"}
    ]
    assert not [str(op) for op in narrow]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_outputs_and_statistics_are_float32(case):
    """Gradients arrive in the master dtype, the output in the policy's, and other collections as they were."""
    loss_fn, params, mstate, apply = prepared(case, "mixed_bfloat16")
    gradients = jax.eval_shape(jax.grad(loss_fn), params, mstate)
    output, new = jax.eval_shape(apply, params, mstate)
    assert {str(x.dtype) for x in jax.tree.leaves((params, gradients))} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves(output)} == {"float32"}
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, mstate)


@pytest.mark.parametrize("case", [case for case in CASES if case.by_hand], ids=lambda case: case.name)
def test_residuals_are_those_of_the_model_by_hand(case):
    """The backward pass keeps at most 1.05 of the bytes that the same model written in bfloat16 by hand keeps."""
    _, params, mstate, apply = prepared(case, "mixed_bfloat16")
    ours = saved_residual_bytes(lambda p: loss(apply.__wrapped__, p, mstate_of(mstate)), params)
    theirs = saved_residual_bytes(lambda p: loss_by_hand(case)(p, mstate_of(mstate)), params)
    assert 0 < ours <= 1.05 * theirs


def mstate_of(shapes):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


@functools.cache
def started(case: Case):
    """(model, params, mstate) of a case under float32."""
    model = model_of(case, "float32")
    return model, *jax.jit(model.init)(jax.random.key(0), case.sample)


def output_of(model, case: Case, params, mstate, seeded: bool):
    """What a model computes; `seeded`: with a key of its own, if it trains."""
    rng = jax.random.key(3) if seeded else None
    return jax.jit(lambda p, m: model.apply(p, m, case.sample, rng=rng, train=case.train or None)[0])(params, mstate)


@functools.cache
def float32_output(case: Case, seeded: bool):
    return output_of(started(case)[0], case, *started(case)[1:], seeded)


@pytest.mark.parametrize("case", RUN, ids=lambda case: case.name)
def test_a_float32_policy_changes_nothing(case):
    """Under float32 the wrapped model is the bare Flax model, bit for bit where the sums are the same."""
    model, params, mstate = started(case)
    rng = jax.random.key(3) if case.train and case.door == "linen" else None
    found = float32_output(case, rng is not None)
    if case.door == "linen":
        streams = None if rng is None else jax.random.fold_in(rng, 1)
        wanted = jax.jit(lambda p, m: plain(case, streams)(p, m)[0])(params, mstate)
    else:  # with the rng streams of mstate itself
        module = model.merge(params, mstate)
        (module.train if case.train else module.eval)()
        wanted = nnx.jit(lambda module: module(case.sample))(module)
    # Attention and the jitted layers sum in another order: each of a few dozen roundings costs half an ulp.
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=32 * np.finfo(np.float32).eps * scale)


@pytest.mark.parametrize(
    ("case", "policy"), [*zip(RUN, itertools.cycle(HALVES), strict=False)], ids=lambda x: getattr(x, "name", x)
)
def test_half_precision_runs_and_stays_near_float32(case, policy):
    """The real thing, compiled: finite, and within the format's rounding of the float32 model."""
    _, params, mstate = started(case)
    outputs = output_of(model_of(case, policy), case, params, mstate, case.train), float32_output(case, case.train)
    found, wanted = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(out)]) for out in outputs)
    # A few dozen roundings of eps / 2 each, some of which add up: 16 eps of the largest output covers every model here.
    assert np.abs(found - wanted).max() <= 16 * float(jnp.finfo(HALVES[policy]).eps) * np.abs(wanted).max()
    assert np.abs(found - wanted).max() > 0


def test_the_audit_fails_with_the_wrap_taken_out():
    """What these tests read is not true of a bare model."""
    case = CASES[0]
    params = jax.eval_shape(case.module.init, jax.random.key(0), case.sample)
    found = audit(lambda p: case.module.apply(p, case.sample), params)
    assert {dtype for op in found.ops if op.kind == "dot" for dtype in op.operands} == {"float32"}


def test_modules_under_nn_jit_obey_their_own_rules():
    """`nn.jit` shares one trace among layers of a class; two layers under two rules must not share one."""
    from tests.wrap.zoo import SEQUENCE, Dense2, Inner, InnerJit

    for layer in (nn.jit(Inner), InnerJit):
        for rules, wanted in (
            ({"a": "compute=float16"}, {"a": "float16", "b": "bfloat16"}),
            ({"b/dense": "compute=float32"}, {"a": "bfloat16", "b": "float32"}),
            ({}, {"a": "bfloat16", "b": "bfloat16"}),
        ):
            model = mpjax.wrap(Dense2(layer), rules)
            params, mstate = jax.eval_shape(model.init, jax.random.key(0), SEQUENCE)
            found = audit(model.apply, params, mstate, SEQUENCE).select("dot")
            assert [op.operands[0] for op in found.ops] == [wanted["a"], wanted["b"]]


def test_modules_under_nn_jit_are_found_however_often_one_looks():
    """jax keeps the trace of a lifted body under a key; one made of an `id`, which is given away again, found an old one."""
    from mpjax.wrap.linen.sites import record
    from tests.wrap.zoo import SEQUENCE, Dense2, InnerJit

    module = Dense2(InnerJit)
    for _ in range(20):
        sites = record(lambda: module.init(jax.random.key(0), SEQUENCE))
        assert set(sites.classes) == {"", "a", "a/dense", "b", "b/dense"}
        del sites
