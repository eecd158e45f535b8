"""What only a GPU can show: the transfer guard, the fused attention kernel, products on tensor cores. Run with `-m gpu`."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax
from mpjax.numerics.attention import attention, fits_cudnn
from tests.wrap.zoo import LM

pytestmark = pytest.mark.gpu


def job(policy, width=256):
    model = mpjax.wrap(LM(width=width, vocab=512), policy)

    def loss_fn(params, mstate, batch, rng):
        logits, mstate = model.apply(params, mstate, batch[:, :-1], rng=rng)
        return mpjax.losses.softmax_cross_entropy(logits, batch[:, 1:]).mean(), mpjax.Aux(mstate)

    tokens = jax.random.randint(jax.random.key(1), (8, 65), 0, 512)
    return mpjax.Job(model, loss_fn, optax.adamw(1e-3), lambda attempt: tokens, sample=(tokens[:1, :-1],))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_fault_34_a_step_moves_nothing_between_host_and_device(policy):
    """jax's own guard, which sees no transfer on a CPU, forbids every one during thirty steps."""
    task = job(policy)
    state, step, batch = task.state(jax.random.key(0)), task.step(accumulate=2, clip_norm=1.0), task.batches(0)
    state, first = step(state, batch)
    with jax.transfer_guard("disallow"):
        for _ in range(30):
            state, metrics = step(state, batch)
    assert float(metrics["loss"]) < float(first["loss"]) and int(state.skipped) == 0
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match=r"[Dd]isallowed"):
        float(metrics["loss"] + 1)  # the guard is awake


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_kernel_agrees_with_float64(dtype, masked):
    """Outputs and gradients of cuDNN's attention, a fully masked row among them, against float64 by hand."""
    random = np.random.default_rng(0)
    q, k, v, ct = (random.normal(size=(2, 128, 4, 64)).astype(np.float32).astype(dtype) for _ in range(4))
    mask = random.random((2, 1, 128, 128)) < 0.7 if masked else None
    if mask is not None:
        mask[0, 0, 5] = False
    given = None if mask is None else jnp.asarray(mask)
    q, k, v = map(jnp.asarray, (q, k, v))
    assert fits_cudnn(q, k, v, given)

    def run(q, k, v):
        return (attention(q, k, v, mask=given).astype(jnp.float32) * ct.astype(np.float32)).sum()

    text = jax.jit(jax.grad(run, (0, 1, 2))).lower(q, k, v).compile().as_text()
    assert "fmha" in text
    out = np.asarray(attention(q, k, v, mask=given), np.float64)
    grads = [np.asarray(g, np.float64) for g in jax.jit(jax.grad(run, (0, 1, 2)))(q, k, v)]
    wanted, wanted_grads = by_hand(*(np.asarray(x, np.float64) for x in (q, k, v, ct)), mask)
    # Products of half-precision operands, sums of 128 terms in float32, weights rounded once: a few eps of the largest.
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    for found, reference in zip([out, *grads], [wanted, *wanted_grads], strict=True):
        assert np.abs(found - reference).max() <= tolerance * np.abs(reference).max()
    if masked:
        assert (grads[0][0, 5] == 0).all()


def by_hand(q, k, v, ct, mask):
    """Attention and its gradients in numpy float64; a fully masked row is uniform and has no gradient to q and k."""
    scale = 1 / np.sqrt(q.shape[-1])
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    alive = np.ones_like(scores[..., :1], bool)
    if mask is not None:
        scores = np.where(mask, scores, -1e30)
        alive = np.broadcast_to(mask.any(-1, keepdims=True), alive.shape)
    w = np.exp(scores - scores.max(-1, keepdims=True))
    w /= w.sum(-1, keepdims=True)
    out = np.einsum("bhqk,bkhd->bqhd", w, v)
    dw = np.einsum("bqhd,bkhd->bhqk", ct, v)
    ds = np.where(alive, w * (dw - (w * dw).sum(-1, keepdims=True)), 0) * scale
    return out, (
        np.einsum("bhqk,bkhd->bqhd", ds, k), np.einsum("bhqk,bqhd->bkhd", ds, q), np.einsum("bhqk,bqhd->bkhd", w, ct)
    )  # fmt: skip


@pytest.mark.parametrize(("policy", "name"), [("mixed_bfloat16", "bf16"), ("mixed_float16", "f16"), ("float32", "f32")])
def test_products_reach_cublas_in_the_compute_dtype(policy, name):
    """Read off the compiled HLO: every GEMM of the step has operands in the policy's dtype."""
    task = job(policy)
    text = task.step().lower(task.state(jax.random.key(0)), task.batches(0)).compile().as_text()
    dtypes = dict(re.findall(r"%?([\w.\-]+) = \(?(\w+)\[", text))
    products = re.findall(r' dot\(([^)]*)\)|custom-call\(([^)]*)\), custom_call_target="__cublas', text)
    operands = {
        dtypes[operand] for pair in products for operand in re.findall(r"%?([\w.\-]+)(?:,|$)", "".join(pair))[:2]
    }
    assert products and operands == {name}


def test_float16_and_bfloat16_train_to_where_float32_does():
    """Ten steps of the same job: the loss falls alike, to the roundings of eight bits."""
    losses = {}
    for policy in ("float32", "mixed_bfloat16", "mixed_float16"):
        task = job(policy)
        result = mpjax.fit(task.step(), task.state(jax.random.key(0)), task.batches, attempts=10)
        losses[policy] = result.history[-1]["loss"]
        assert losses[policy] < 0.9 * result.history[0]["loss"]
    for policy in ("mixed_bfloat16", "mixed_float16"):
        assert abs(losses[policy] - losses["float32"]) < 0.05 * losses["float32"]
