"""What only a GPU can show: the transfer guard, and the dtype of products in the compiled program. Run with `-m gpu`.

The fused attention kernel and the losses have their GPU tests beside the others.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import mpjax
from mpjax.numerics.probe import EXPONENTS, count
from tests.store.states import bare_model, bits
from tests.wrap import zoo_nnx
from tests.wrap.zoo import LM

pytestmark = pytest.mark.gpu


DOORS = {
    "linen": lambda **sizes: LM(**sizes),
    "nnx": lambda **sizes: lambda rngs: zoo_nnx.LM(**sizes, rngs=rngs),
}
both_doors = pytest.mark.parametrize("door", DOORS)


def job(policy, door="linen", width=256):
    model = mpjax.wrap(DOORS[door](width=width, vocab=512), policy)

    def loss_fn(params, mstate, batch, rng):
        logits, mstate = model.apply(params, mstate, batch[:, :-1], rng=rng)
        return mpjax.losses.softmax_cross_entropy(logits, batch[:, 1:]).mean(), mpjax.Aux(mstate)

    tokens = jax.random.randint(jax.random.key(1), (8, 65), 0, 512)
    return mpjax.Job(model, loss_fn, optax.adamw(1e-3), lambda attempt: tokens, sample=(tokens[:1, :-1],))


@both_doors
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_fault_34_a_step_moves_nothing_between_host_and_device(policy, door):
    """jax's own guard, which sees no transfer on a CPU, forbids every one during thirty steps."""
    task = job(policy, door)
    state, step, batch = task.state(jax.random.key(0)), task.step(accumulate=2, clip_norm=1.0), task.batches(0)
    state, first = step(state, batch)
    with jax.transfer_guard("disallow"):
        for _ in range(30):
            state, metrics = step(state, batch)
    assert float(metrics["loss"]) < float(first["loss"]) and int(state.skipped) == 0
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match=r"[Dd]isallowed"):
        float(metrics["loss"] + 1)  # the guard is awake


@both_doors
@pytest.mark.parametrize(("policy", "name"), [("mixed_bfloat16", "bf16"), ("mixed_float16", "f16"), ("float32", "f32")])
def test_products_reach_cublas_in_the_compute_dtype(policy, name, door):
    """Read off the compiled HLO: every GEMM of the step has operands in the policy's dtype."""
    task = job(policy, door)
    text = task.step().lower(task.state(jax.random.key(0)), task.batches(0)).compile().as_text()
    dtypes = dict(re.findall(r"%?([\w.\-]+) = \(?(\w+)\[", text))
    products = re.findall(r' dot\(([^)]*)\)|custom-call\(([^)]*)\), custom_call_target="__cublas', text)
    operands = {
        dtypes[operand] for pair in products for operand in re.findall(r"%?([\w.\-]+)(?:,|$)", "".join(pair))[:2]
    }
    assert products and operands == {name}


def cudnn_only(query, key, value, mask=None, **_):
    """A user's own attention_fn, which takes no float32."""
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")


@both_doors
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_the_audit_tells_that_attention_is_fused(policy, door):
    """By hand: rows of 4 (8, in two parts), 64 tokens, two products forward and five backward for each layer."""
    task = job(policy, door)
    found = mpjax.audit(task.step(accumulate=2).pure, task.state(jax.random.key(0)), task.batches(0)).select(
        "attention"
    )
    assert {(op.kernel, op.label) for op in found.ops} == {("fused (cuDNN)", policy.removeprefix("mixed_"))}
    forward, backward = ([op for op in found.ops if way in op.primitive] for way in ("fwd", "bwd"))
    assert len(forward) == len(backward) > 0 and {op.path.rpartition("/")[2] for op in found.ops} == {"attention"}
    product = 2 * 4 * 64 * 64 * 256  # heads times depth is the width
    assert {op.flops for op in forward} == {2 * product} and {op.flops for op in backward} == {5 * product}
    full = job("float32", door)
    ops = mpjax.audit(full.step().pure, full.state(jax.random.key(0)), full.batches(0)).select("attention").ops
    assert {(op.kernel, op.label) for op in ops} == {("unfused", "float32")}


@both_doors
def test_a_users_attention_fn_that_insists_on_cudnn_trains(door):
    linen = nn.MultiHeadDotProductAttention(4, attention_fn=cudnn_only)
    module = linen if door == "linen" else lambda rngs: nnx.MultiHeadAttention(
        4, 256, attention_fn=cudnn_only, decode=False, rngs=rngs
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (2, 64, 256))
    model = mpjax.wrap(module, "mixed_bfloat16")

    def loss_fn(params, mstate, batch, rng):
        out, mstate = model.apply(params, mstate, batch, rng=rng)
        return jnp.square(out - 1).mean(), mpjax.Aux(mstate)

    optimizer = optax.adam(1e-2)
    state = mpjax.TrainState.create(model, optimizer, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
    result = mpjax.fit(mpjax.make_train_step(loss_fn, optimizer), state, lambda attempt: x, attempts=10)
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]


def test_the_doctor_finds_every_native_product_right():
    """Which formats are native, and how far off each may be, say the table and `product_rates`."""
    found = mpjax.doctor(1024)
    native = [rate for rate in found.rates if found.says(rate.format) == "native"]
    assert native and [rate.format for rate in native if not rate.right] == [], found.warnings


@both_doors
def test_float16_and_bfloat16_train_to_where_float32_does(door):
    """Ten steps of the same job: the loss falls alike, to the roundings of eight bits."""
    losses = {}
    for policy in ("float32", "mixed_bfloat16", "mixed_float16"):
        task = job(policy, door)
        result = mpjax.fit(task.step(), task.state(jax.random.key(0)), task.batches, attempts=10)
        losses[policy] = result.history[-1]["loss"]
        assert losses[policy] < 0.9 * result.history[0]["loss"]
    for policy in ("mixed_bfloat16", "mixed_float16"):
        assert abs(losses[policy] - losses["float32"]) < 0.05 * losses["float32"]


@both_doors
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float32"])
def test_a_probed_step_agrees_to_the_formats_eps(policy, door):
    """XLA may fuse otherwise around a tap. By norm, to the compute format's eps (TF32's for float32) of the whole gradient:

    that of a key's bias is zero but for rounding, since a softmax does not see it.
    """
    task = job(policy, door)
    sgd = optax.sgd(1.0)
    state = mpjax.TrainState.create(
        mpjax.wrap(DOORS[door](width=256, vocab=512), policy), sgd, jax.random.key(0), *task.sample
    )
    step = mpjax.make_train_step(task.loss_fn, sgd, donate=False)
    plain, _ = step(state, task.batches(0))
    probed, metrics = mpjax.probe(step)(state, task.batches(0))
    report = mpjax.ProbeReport.of(jax.device_get(metrics["sinks"]))
    assert len(report.select("gradient")) == len(report.select("activation")) == 34
    eps = {"mixed_bfloat16": 2.0**-7, "mixed_float16": 2.0**-10, "float32": 2.0**-10}[policy]
    leaves = zip(*map(jax.tree.leaves, (state.params, plain.params, probed.params)), strict=True)
    before, here, there = (
        np.concatenate([np.ravel(x) for x in tree]).astype(float) for tree in zip(*leaves, strict=True)
    )
    assert np.linalg.norm(there - here) <= eps * np.linalg.norm(here - before)


def test_counts_on_a_gpu_are_exact():
    """Many copies of the cells are added up there, with atomics; numpy counts the same numbers."""
    x = jax.random.normal(jax.random.key(0), (1 << 18,)) * jnp.exp2(
        jax.random.uniform(jax.random.key(1), (1 << 18,)) * 60 - 30
    )
    counts = np.asarray(count(x)).reshape(EXPONENTS, -1).sum(-1)
    exponents, times = np.unique(np.frexp(np.asarray(x, np.float64))[1] - 1 + 127, return_counts=True)
    expected = np.zeros(EXPONENTS)
    expected[exponents] = times
    assert counts.tolist() == expected.tolist()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_fault_24_a_run_saved_and_restored_on_the_gpu_is_bit_identical(asynchronous, tmp_path):
    """Saving reads the state under the guard that forbids every other transfer; training goes on at once and donates it."""
    model, optimizer = bare_model(), optax.adamw(1e-2)

    def loss_fn(params, mstate, batch, rng):
        out, mstate = model.apply(params, mstate, batch)
        return (out**2).mean(), mpjax.Aux(mstate)

    step = mpjax.make_train_step(loss_fn, optimizer)

    def fresh():
        scale = mpjax.dynamic_loss_scale()
        return mpjax.TrainState.create(model, optimizer, jax.random.key(0), jnp.ones((1, 4)), loss_scale=scale)

    batches = [jax.random.normal(jax.random.key(n), (8, 4)) for n in range(6)]
    checkpointer = mpjax.Checkpointer(tmp_path, asynchronous=asynchronous)
    step(fresh(), batches[0])  # compiled outside of the guard
    state = fresh()
    with jax.transfer_guard("disallow"):
        for n, batch in enumerate(batches):
            state, _ = step(state, batch)
            if n == 2:
                checkpointer.save(state)
    resumed = checkpointer.restore(fresh())
    for batch in batches[3:]:
        resumed, _ = step(resumed, batch)
    assert bits(resumed) == bits(state) and int(resumed.step) == 6


def test_an_exported_program_holds_no_fused_kernel_and_runs_here_and_on_the_cpu(tmp_path):
    """Here attention of 64 tokens in bfloat16 is cuDNN's fused kernel; a program for three platforms cannot hold it."""
    task = job("mixed_bfloat16")
    tokens = task.sample[0]
    params, mstate = task.model.init(jax.random.key(0), tokens)

    def forward(params, mstate, tokens):
        return task.model.apply(params, mstate, tokens)[0]

    assert "cudnn" in jax.jit(forward).lower(params, mstate, tokens).as_text()
    exported = mpjax.export_forward(task.model, params, mstate, tokens, path=tmp_path / "f")
    assert "cudnn" not in exported.program.mlir_module() and exported.platforms == ("cpu", "cuda", "tpu")
    loaded = mpjax.load_forward(tmp_path / "f")
    fused = np.asarray(jax.jit(forward)(params, mstate, tokens), np.float64)
    here = np.asarray(loaded(params, mstate, tokens), np.float64)
    cpu = jax.devices("cpu")[0]
    there = np.asarray(loaded(*jax.device_put((params, mstate, tokens), cpu)), np.float64)
    eps = 2.0**-7  # of bfloat16
    for other in (here, there):
        assert np.linalg.norm(other - fused) <= 4 * eps * np.linalg.norm(fused)


CUBLAS_ONLY = {"xla_gpu_enable_triton_gemm": False}
"""Or XLA's own kernels may win a small product, and the name of the library's call is not there to be counted."""


class DenseBlock(nn.Module):
    """What made XLA fail: a GELU behind a float8 product, computed again in the backward pass."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], name="down")(nn.gelu(nn.Dense(4 * x.shape[-1], name="up")(x)))


def rematted_job(policy, width=256):
    model = mpjax.wrap(nn.remat(DenseBlock)(), policy)

    def loss_fn(params, mstate, x, rng):
        y, mstate = model.apply(params, mstate, x, rng=rng)
        return ((y - x) ** 2).mean(), mpjax.Aux(mstate)

    x = jax.random.normal(jax.random.key(1), (128, width))
    return mpjax.Job(model, loss_fn, optax.adamw(1e-3), lambda attempt: x, sample=(x,))


@pytest.mark.parametrize("policy", ["mixed_fp8", "params=f32,compute=bf16,output=f32,dot=fp8_delayed"])
def test_a_rematted_block_steps_in_float8(policy):
    """Without `numerics/dot.apart` compiling failed: RET_CHECK !has_aux_output."""
    task = rematted_job(policy)
    state, step = task.state(jax.random.key(0)), task.step()
    text = step.lower(state, task.batches(0)).compile(CUBLAS_ONLY).as_text()
    # Twice forward for up, once for down; both gradients of down; up's of its weights (nobody asks for the input's).
    assert text.count('custom_call_target="__cublas$lt$matmul$f8"') == 6
    state, metrics = step(state, task.batches(0))
    assert np.isfinite(float(metrics["loss"])) and int(state.skipped) == 0


def test_every_dense_layer_of_a_step_is_three_float8_gemms():
    """5 dense layers in each of 3 blocks; zoo's `down` is no Flax layer, and the tied head and attention stay as they are.

    XLA makes one GEMM of query, key and value, forward and for their weights: 4 fewer in each block.
    """
    task = job("mixed_fp8", width=256)
    text = task.step().lower(task.state(jax.random.key(0)), task.batches(0)).compile(CUBLAS_ONLY).as_text()
    assert text.count('custom_call_target="__cublas$lt$matmul$f8"') == 3 * (5 * 3 - 4)
    halves = [line for line in text.splitlines() if "__cublas$" in line and "matmul$f8" not in line]
    assert halves and not any(re.search(r"~layers\.\d\.(up|attention\.(query|key|value|out))", line) for line in halves)


def test_float8_learns_on_the_chip_as_bfloat16_does():
    """After 20 steps over one batch: within a tenth of bfloat16's loss, which has fallen by a fifth at least."""

    def losses(policy):
        task = job(policy)
        state, step, batch = task.state(jax.random.key(0)), task.step(), task.batches(0)
        found = []
        for _ in range(20):
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"]))
        return found

    plain, eight = losses("mixed_bfloat16"), losses("mixed_fp8")
    assert plain[-1] < 0.8 * plain[0] and abs(eight[-1] - plain[-1]) < 0.1 * plain[-1]
