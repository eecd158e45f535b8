"""The auditor on toy functions, with every number known by hand, and on Linen modules, wrapped and bare."""

from __future__ import annotations

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

import mpjax
from mpjax.measure.audit import KINDS, Audit, audit

X, W = jnp.ones((4, 8)), jnp.ones((8, 8))
DENSE = 2 * 4 * 8 * 8
STACK = jnp.ones((3, 8, 8))


def flops(fn, *args, **kwargs):
    return sum(audit(fn, *args, **kwargs).flops_by_dtype().values())


def test_every_kind_is_reported_with_its_dtypes():
    def everything(x):
        y = jax.lax.conv(x[None], jnp.ones((1, 4, 1), x.dtype), (1,), "SAME")[0] @ W.astype(x.dtype)
        y = jnp.exp(y) + jnp.log(y) + jax.lax.rsqrt(y) + jnp.tanh(y) + jax.nn.sigmoid(y) + jax.lax.erf(y)
        return y.astype(jnp.float32).sum()

    found = audit(everything, X.astype(jnp.bfloat16))
    half = {"bfloat16": 1}
    assert {kind: found.dtypes(kind) for kind in dict.fromkeys(KINDS.values())} == {
        "dot": half, "conv": half, "exp": half, "log": half, "rsqrt": half, "activation": {"bfloat16": 3},
        "attention": {}, "reduce": {"float32": 1}, "cast": {"float32→bfloat16": 1, "bfloat16→float32": 1},
    }  # fmt: skip
    assert {op.primitive for op in found.select("activation").ops} == {"tanh", "logistic", "erf"}


def test_the_dtype_of_the_result_is_told():
    (op,) = audit(lambda x: jnp.matmul(x, x.T, preferred_element_type=jnp.float32), X.astype(jnp.bfloat16)).ops
    assert (op.operands, op.output, op.times) == (("bfloat16", "bfloat16"), "float32", 1)
    assert str(op) == "dot_general(bfloat16, bfloat16) -> float32 at ·"


def test_only_a_conversion_that_concerns_floats_is_a_cast():
    def convert(x, n):
        weak = jnp.full(x.shape, 2.0)  # weakly typed: adding it converts float32 to float32
        return x + weak, n.astype(jnp.int8), n.astype(jnp.float16), x.astype(bool)

    assert audit(convert, X, jnp.arange(3)).dtypes("cast") == {"int32→float16": 1, "float32→bool": 1}


def test_a_mixed_product_counts_for_neither_dtype():
    def mixed(x, w):
        half = x.astype(jnp.bfloat16)
        dot = functools.partial(jax.lax.dot_general, dimension_numbers=(((1,), (0,)), ((), ())))
        return dot(x, w), dot(half, w), dot(x, w.astype(jnp.bfloat16)), dot(half, w.astype(jnp.bfloat16))

    found = audit(mixed, X, W)
    assert found.flops_by_dtype() == {"bfloat16×float32": 2 * DENSE, "float32": DENSE, "bfloat16": DENSE}
    assert (found.share("bfloat16"), found.share(jnp.float32, "bf16"), found.share("float16")) == (0.25, 0.5, 0.0)


def test_a_share_of_nothing_and_of_no_dtype_say_so():
    with pytest.raises(ValueError, match=r"got a function without a matrix product; legal is .*; audit the loss"):
        audit(jnp.sin, X).share("bfloat16")
    with pytest.raises(ValueError, match=r"got 'wide'; legal is a dtype or its name, .*; write bfloat16"):
        audit(jnp.matmul, X, W).share("wide")


def test_a_scan_counts_its_length_and_nested_ones_multiply():
    def layers(x, stack):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stack)[0]

    found = audit(layers, X, STACK)
    assert [(op.kind, op.times) for op in found.ops] == [("dot", 3), ("activation", 3)]
    assert found.flops_by_dtype() == {"float32": 3 * DENSE}
    twice = jax.lax.scan
    assert flops(lambda x: twice(lambda h, _: (layers(h, STACK), None), x, length=5)[0], X) == 15 * DENSE
    assert flops(lambda x: jax.lax.fori_loop(0, 4, lambda i, h: h @ W, x), X) == 4 * DENSE


def test_a_gradient_costs_three_forward_passes():
    step = jax.value_and_grad(lambda w, x: jnp.tanh(x @ w).sum(), argnums=(0, 1))
    assert flops(step, W, X) == 3 * DENSE
    deep = jax.grad(lambda s, x: jax.lax.scan(lambda h, w: (h @ w, None), x, s)[0].sum(), argnums=(0, 1))
    assert flops(deep, STACK, X) == 3 * 3 * DENSE
    assert flops(jax.jit(step), W, X) == 3 * DENSE


def test_remat_recomputes():
    loss = lambda w, x: jnp.sin(jnp.sin(x @ w) @ w).sum()  # noqa: E731
    assert flops(jax.grad(loss, argnums=(0, 1)), W, X) == 6 * DENSE
    assert flops(jax.grad(jax.checkpoint(loss), argnums=(0, 1)), W, X) == 8 * DENSE


def test_of_a_linear_solve_only_the_solution_counts():
    """jax keeps the product with the matrix beside it, for its derivatives: no product of this program is run."""
    assert flops(jnp.linalg.solve, jnp.eye(4), jnp.ones((4, 2))) == 0


def test_a_while_loop_counts_once_and_is_flagged():
    def loop(x):
        h = jax.lax.while_loop(lambda h: jnp.exp(h).sum() < 3, lambda h: jnp.tanh(h @ W), x)
        return h @ W

    found = audit(loop, X)
    assert [(op.kind, op.in_while) for op in found.ops] == [
        ("exp", True), ("reduce", True), ("dot", True), ("activation", True), ("dot", False),
    ]  # fmt: skip
    assert found.flops_by_dtype() == {"float32": 2 * DENSE}
    assert str(found).endswith("the bodies of while loops are counted once: how often they run is not known before")
    assert "while" not in str(audit(jnp.matmul, X, W))


def test_of_a_cond_all_branches_are_listed_and_the_dearest_counts():
    half = jnp.bfloat16

    def choose(i, x):
        two = lambda x: jnp.exp(x @ W @ W)  # noqa: E731
        one = lambda x: (x.astype(half) @ W.astype(half)).astype(x.dtype)  # noqa: E731
        return jax.lax.switch(i, [one, two, jnp.sin], x)

    found = audit(choose, 1, X)
    assert [op.times for op in found.select("dot").ops] == [0, 1, 1]
    assert found.dtypes("dot") == {"bfloat16": 1, "float32": 2}
    assert found.flops_by_dtype() == {"float32": 2 * DENSE, "bfloat16": 0}
    assert flops(lambda x: jax.lax.scan(lambda h, i: (choose(i, h), None), x, jnp.arange(3))[0], X) == 6 * DENSE


def test_a_cond_in_which_no_branch_has_a_product():
    found = audit(lambda x: jax.lax.cond(x.sum() > 0, jnp.exp, jnp.tanh, x), X)
    assert {op.kind for op in found.ops} == {"reduce", "exp", "activation"}


def test_custom_derivatives_are_read_as_they_run():
    @jax.custom_vjp
    def straight(x, w):
        return jnp.exp(x @ w)

    straight.defvjp(lambda x, w: (straight(x, w), w), lambda w, g: (jnp.log(g @ w.T), g.T @ g))

    @jax.custom_jvp
    def smooth(x):
        return jnp.tanh(x @ W)

    smooth.defjvp(lambda x, t: (smooth(*x), t[0] @ W))
    assert [op.kind for op in audit(straight, X, W).ops] == ["dot", "exp"]
    backward = audit(jax.grad(lambda x, w: straight(x, w).sum(), argnums=(0, 1)), X, W)
    assert sorted(op.kind for op in backward.ops) == ["dot", "dot", "dot", "exp", "log", "reduce"]
    assert [op.kind for op in audit(smooth, X).ops] == ["dot", "activation"]
    assert flops(jax.grad(lambda x: smooth(x).sum()), X) == 2 * DENSE


def test_a_shard_map_counts_all_its_devices():
    """Its body has the shapes of one device; all eight together do what one would."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    data, model = PartitionSpec("data"), PartitionSpec(None, "model")
    both = PartitionSpec("data", "model")
    sharded = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(data, model), out_specs=both)
    found = audit(sharded, X, W)
    assert [(op.flops, op.times) for op in found.ops] == [(DENSE // 8, 8)]
    by_data = jax.shard_map(lambda x: x @ W, mesh=mesh, in_specs=data, out_specs=data, axis_names={"data"})
    assert [(op.flops, op.times) for op in audit(jax.jit(by_data), X).ops] == [(DENSE // 4, 4)]


def test_a_pallas_kernel_counts_its_grid():
    from jax.experimental import pallas

    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = x_ref[...] @ w_ref[...]

    def product(x, w):
        return pallas.pallas_call(
            kernel, out_shape=jax.ShapeDtypeStruct((4, 8), jnp.float32), grid=(2, 4),
            in_specs=[pallas.BlockSpec((2, 8), lambda i, j: (i, 0)), pallas.BlockSpec((8, 2), lambda i, j: (0, j))],
            out_specs=pallas.BlockSpec((2, 2), lambda i, j: (i, j)),
        )(x, w)  # fmt: skip

    assert flops(product, X, W) == DENSE


def test_a_function_shared_by_jit_counts_at_each_call():
    layer = jax.jit(lambda x: x @ W)
    assert flops(lambda x: layer(layer(x)), X) == 2 * DENSE


def test_arguments_may_be_abstract_pytrees_keywords_and_static():
    def model(params, x, *, train, name=None, scale=1.0):
        if train and name == "exp":
            x = jnp.exp(x)
        return x @ params["w"] * scale

    shapes = jax.eval_shape(lambda: ({"w": W}, X))
    assert audit(model, *shapes, train=True, name="exp").dtypes("exp") == {"float32": 1}
    found = audit(model, *shapes, train=False, scale=2.0)
    assert found.dtypes("exp") == {} and found.flops_by_dtype() == {"float32": DENSE}


def test_nothing_is_run():
    ran = []

    def spying(x):
        jax.debug.callback(lambda: ran.append(1))
        return x @ W

    assert flops(spying, X) == DENSE and not ran


def test_an_audit_is_a_value():
    assert audit(jnp.matmul, X, W) == audit(jnp.matmul, X, W) != audit(jnp.matmul, W, W)
    assert str(Audit(())) == "kind        dtype                        ops      bytes      FLOPs    share"


def test_the_table():
    def fn(x, w):
        return jnp.exp(x @ w).sum() + (x.astype(jnp.float16) @ w.astype(jnp.float16)).sum(dtype=jnp.float32)

    # By hand: x is 4×8, w 8×8, their product 4×8; a float16 copy of both is made.
    assert str(audit(fn, X, W)).splitlines() == [
        "kind        dtype                        ops      bytes      FLOPs    share",
        "dot         float16                        1        256        512    50.0%",
        "dot         float32                        1        512        512    50.0%",
        "exp         float32                        1        256",
        "reduce      float32                        2        264",
        "cast        float16→float32                1        192",
        "cast        float32→float16                2        576",
    ]


def test_bytes_are_those_of_operands_and_result_times_the_trips():
    def layers(x, stack):
        return jax.lax.scan(lambda h, w: (jnp.exp(h @ w), h.sum()), x, stack)

    found = audit(layers, X.astype(jnp.bfloat16), STACK.astype(jnp.bfloat16))
    assert [(op.kind, op.bytes, op.times) for op in found.select("dot").ops] == [("dot", 2 * (32 + 64 + 32), 3)]
    assert found.bytes_by_dtype("dot") == {"bfloat16": 3 * 256}
    assert found.bytes_by_dtype("exp") == {"bfloat16": 3 * 2 * (32 + 32)}
    assert found.bytes_by_dtype("conv") == {}


def test_a_reduction_tells_how_many_numbers_become_one():
    def sums(x):
        pooled = jax.lax.reduce_window(x, 0.0, jax.lax.add, (2, 4), (2, 4), "VALID")
        return x.sum(), x.max(0), x.argmax(1), jnp.cumsum(x, 1), pooled, jnp.exp(x)

    found = audit(sums, X)
    assert [op.terms for op in found.select("reduce").ops] == [8, 32, 4, 8, 8]  # the pooling stands first
    assert [op.terms for op in found.select("exp").ops] == [1]


class Block(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm(name="norm", dtype=self.dtype)(x)
        h = nn.MultiHeadDotProductAttention(2, name="attention", dtype=self.dtype)(h)
        return x + nn.Dense(8, name="down", dtype=self.dtype)(nn.Dense(16, name="up", dtype=self.dtype)(h)), None


class Net(nn.Module):
    """Three blocks in a loop or a scan, with or without remat."""

    kind: str = "loop"
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if "remat" in self.kind else Block
        if "scan" in self.kind:
            stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = stack(self.dtype, name="layers")(x, None)
        else:
            for i in range(3):
                x, _ = block(self.dtype, name=f"layers_{i}")(x)
        return nn.Dense(4, name="head", dtype=self.dtype)(x)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """jax traces cuDNN's attention here, by its own primitives; nothing could run it."""
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(kernels, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(kernels, "is_cuda_compute_capability_equal", lambda capability: False)


INPUT = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)
TOKENS = 2 * 5
PRODUCTS_OF_A_BLOCK = {
    **{f"attention/{name}": 2 * TOKENS * 8 * 8 for name in ("query", "key", "value", "out")},
    "attention": 2 * (2 * 2 * 5 * 5 * 8),  # scores and mixing: 2 examples, 5×5, 2 heads of 4
    "up": 2 * TOKENS * 8 * 16,
    "down": 2 * TOKENS * 16 * 8,
}
HEAD = 2 * TOKENS * 8 * 4


def by_path(found):
    total = {}
    for op in found.ops:
        if op.flops:
            total[op.path] = total.get(op.path, 0) + op.flops * op.times
    return total


def expected(kind, passes):
    """FLOPs by module path; a scanned stack is one path, and remat runs all but the last product of a block once more."""
    blocks = {"layers": 3} if "scan" in kind else {f"layers/{i}": 1 for i in range(3)}
    again = {path: 1 if "remat" in kind and passes == 3 and path != "down" else 0 for path in PRODUCTS_OF_A_BLOCK}
    return {"head": passes * HEAD} | {
        f"{block}/{path}": n * (passes + again[path]) * count
        for block, n in blocks.items()
        for path, count in PRODUCTS_OF_A_BLOCK.items()
    }


@pytest.mark.parametrize("kind", ["loop", "scan", "remat", "scan+remat"])
def test_flops_of_a_wrapped_module_stand_at_canonical_paths(kind):
    """Forward and backward, to the last FLOP; all of them in half."""
    model = mpjax.wrap(Net(kind), "mixed_bfloat16")
    params, mstate = jax.eval_shape(model.init, jax.random.key(0), INPUT)
    loss = lambda params, x: model.apply(params, mstate, x)[0].sum()  # noqa: E731
    assert by_path(audit(loss, params, INPUT)) == expected(kind, 1)
    backward = audit(jax.grad(loss, argnums=(0, 1)), params, INPUT)
    assert by_path(backward) == expected(kind, 3)
    assert backward.share("bfloat16") == 1.0
    assert {op.path.rpartition("/")[2] for op in backward.select("rsqrt").ops} == {"norm"}


@pytest.mark.parametrize("kind", ["loop", "scan"])
def test_flops_of_a_bare_module_stand_there_too(kind):
    module = Net(kind, jnp.bfloat16)
    params = jax.eval_shape(module.init, jax.random.key(0), INPUT)
    loss = lambda params, x: module.apply(params, x).astype(jnp.float32).sum()  # noqa: E731
    assert by_path(audit(loss, params, INPUT)) == expected(kind, 1)
    found = audit(jax.grad(loss, argnums=(0, 1)), params, INPUT)
    assert by_path(found) == expected(kind, 3)
    assert found.share("bfloat16") == 1.0


@pytest.mark.parametrize("kind", ["loop", "scan+remat"])
def test_attention_that_is_not_fused_says_so(kind):
    """Once for each softmax, which remat takes twice; its FLOPs are those of its products."""
    model = mpjax.wrap(Net(kind), {"**/attention": "compute=float16"})
    params, mstate = jax.eval_shape(model.init, jax.random.key(0), INPUT)
    loss = lambda params, x: model.apply(params, mstate, x)[0].sum()  # noqa: E731
    times = {"loop": [("layers/0", 1), ("layers/1", 1), ("layers/2", 1)], "scan+remat": [("layers", 3)]}[kind]
    for fn, again in ((loss, 1), (jax.grad(loss), 2 if "remat" in kind else 1)):
        ops = audit(fn, params, INPUT).select("attention").ops
        assert [(op.path, op.times) for op in ops] == [(f"{path}/attention", n) for path, n in times] * again
        assert {(op.kernel, op.label, op.output, op.flops) for op in ops} == {("unfused", "float16", "float16", 0)}
    assert str(ops[0]).endswith(f"attention(float16, float16, float16) -> float16 at {times[0][0]}/attention, unfused")


def test_attention_that_is_fused_says_so_and_its_flops_count(pretended_gpu):
    """A causal layer and one of a boolean mask, on 64 tokens, 4 heads of 16, for 2 examples: by hand.

    One product of queries and keys, or of weights and values, is 2 · 2 · 4 · 64 · 64 · 16; two forward, five backward.
    """
    product = 2 * 2 * 4 * 64 * 64 * 16
    x = jax.ShapeDtypeStruct((2, 64, 4, 16), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((1, 1, 64, 64), bool)

    def loss(q, k, v, mask):
        return mpjax.attention(mpjax.attention(q, k, v, is_causal=True), k, v, mask=mask).astype(jnp.float32).sum()

    found = audit(loss, x, x, x, mask)
    assert [op.flops for op in found.select("attention").ops] == [2 * product] * 2 and found.share("bfloat16") == 1
    found = audit(jax.grad(loss, argnums=(0, 1, 2)), x, x, x, mask)
    ops = found.select("attention").ops
    assert [(op.primitive.split("_")[3], op.flops) for op in ops] == [
        ("fwd", 2 * product), ("fwd", 2 * product), ("bwd", 5 * product), ("bwd", 5 * product),
    ]  # fmt: skip
    assert {(op.kernel, op.label, op.output) for op in ops} == {("fused (cuDNN)", "bfloat16", "bfloat16")}
    assert found.dtypes("dot") == found.dtypes("exp") == {} and found.flops_by_dtype() == {"bfloat16": 14 * product}
    line = "attention   bfloat16 fused (cuDNN)         4"
    assert line in str(found) and f"{14 * product:>11.3g}   100.0%" in str(found)


def test_a_table_tells_fused_from_unfused(pretended_gpu):
    """Of one model: a short sequence, and one with a bias, take no fused kernel."""
    long, short = (jax.ShapeDtypeStruct((1, n, 2, 64), jnp.float16) for n in (64, 10))

    def both(long, short):
        biased = mpjax.attention(long, long, long, bias=jnp.ones((1, 1, 64, 64)))
        return mpjax.attention(long, long, long), mpjax.attention(short, short, short), biased

    rows = [line.split() for line in str(audit(both, long, short)).splitlines() if line.startswith("attention")]
    assert [row[1:4] for row in rows] == [["float16", "fused", "(cuDNN)"], ["float16", "unfused", "2"]]


def test_ops_are_selected_by_kind_and_path():
    model = mpjax.wrap(Net(), {"layers/1": "compute=float16"})
    params, mstate = jax.eval_shape(model.init, jax.random.key(0), INPUT)
    found = audit(lambda p: model.apply(p, mstate, jnp.zeros(INPUT.shape))[0], params)
    assert found.select("dot", "layers/1/*").dtypes("dot") == {"float16": 8}
    assert found.select("dot", "*/attention/query").dtypes("dot") == {"bfloat16": 2, "float16": 1}
    assert {op.kind for op in found.select(path="layers/1/norm").ops} >= {"rsqrt", "reduce", "cast"}
    assert found.select("dot", "nowhere") == Audit(())


def test_importing_the_auditor_loads_neither_flax_nor_matplotlib_nor_rich():
    report = "import sys, mpjax.measure.audit; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    assert "jax" in done.stdout.split()
    assert not {"flax", "matplotlib", "rich", "optax"} & set(done.stdout.split())
