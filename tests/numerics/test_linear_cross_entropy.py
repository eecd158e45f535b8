"""The linear layer and its loss in one, against float64 by hand; what is in the jaxpr, and what memory it takes.

Tolerances. A float32 product sums D terms: a logit is within e = D·eps32·(|h|·|k|) of the exact one, a loss within
(V + 8)·eps32·(1 + max|x − m|) + 2e of it, and a gradient by a logit likewise, times its weight. In a half format that
gradient is rounded once, by eps/2 of its size, before the two products; ∂hidden twice more (where it is kept, and where
it leaves), ∂kernel once if its dtype is half.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from mpjax import dynamic_loss_scale, losses, scaled_value_and_grad
from tests.numerics.test_losses import EPS32, HALVES, draw, equations, exact

fused = losses.linear_softmax_cross_entropy


class Case(NamedTuple):
    """Tokens, features, classes, and the options."""

    sizes: tuple[int, int, int] = (13, 4, 11)
    chunk: int = 5
    bias: bool = False
    weighted: bool = False
    transposed: bool = False
    smoothing: float = 0.0
    z: float = 0.0


CASES = {
    "one token at a time": Case(sizes=(3, 4, 11), chunk=1, bias=True, weighted=True, smoothing=0.1, z=1e-2),
    "tied, a ragged last chunk": Case(bias=True, weighted=True, transposed=True, smoothing=0.1, z=1e-2),
}


def inputs(case: Case, dtype: Any, kernel_dtype: Any = jnp.float32) -> tuple[dict, jax.Array]:
    """What is differentiated, and the labels."""
    tokens, features, classes = case.sizes
    values = {
        "hidden": draw(dtype, tokens, features, scale=1.0),
        "kernel": draw(kernel_dtype, *((classes, features) if case.transposed else (features, classes)), seed=1),
    }
    if case.bias:
        values["bias"] = draw(jnp.float32, classes, seed=2)
    if case.weighted:
        values["weights"] = draw(jnp.float32, tokens, seed=3, scale=30.0).at[1].set(0.0)
    return values, jnp.asarray(np.random.default_rng(5).integers(classes, size=tokens))


def by_hand(case: Case, values: dict, labels: jax.Array, compute: Any) -> tuple[float, dict, float, dict]:
    """(total, its gradients, their error bounds) in float64, from operands rounded to the compute dtype."""
    h, k = (exact(values[name].astype(compute)) for name in ("hidden", "kernel"))
    k = k.T if case.transposed else k
    b = exact(values["bias"]) if case.bias else np.zeros(k.shape[1])
    w = exact(values["weights"]) if case.weighted else np.ones(len(h))
    x = h @ k + b
    y = (1 - case.smoothing) * np.eye(k.shape[1])[np.asarray(labels)] + case.smoothing / k.shape[1]
    lse = np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1)
    losses = lse - (y * x).sum(-1) + case.z * lse**2
    g = w[:, None] * ((1 + 2 * case.z * lse)[:, None] * np.exp(x - lse[:, None]) - y)
    want = {"hidden": g @ k.T, "kernel": h.T @ g, "bias": g.sum(0), "weights": np.where(w == 0, 0, losses)}

    logit = (k.shape[0] + 1) * EPS32 * (np.abs(h) @ np.abs(k) + np.abs(b)).max()
    loss = (k.shape[1] + 8) * EPS32 * (1 + np.ptp(x)) + 2 * logit
    loss *= 1 + 4 * case.z * np.abs(lse).max()
    e = np.abs(w)[:, None] * loss + (compute != jnp.float32) * float(jnp.finfo(compute).eps) / 2 * np.abs(g)
    sums = (len(h) + k.shape[1]) * EPS32
    error = {
        "hidden": e @ np.abs(k.T) + sums * (np.abs(g) @ np.abs(k.T)),
        "kernel": np.abs(h.T) @ e + sums * (np.abs(h.T) @ np.abs(g)),
        "bias": (np.abs(w) * loss).sum() + sums * np.abs(g).sum(0),
        "weights": np.full(len(h), loss),
    }
    error["hidden"] += float(jnp.finfo(compute).eps) * np.abs(want["hidden"])
    if case.transposed:
        want["kernel"], error["kernel"] = want["kernel"].T, error["kernel"].T
    total = float((w * losses).sum())
    return total, want, float((np.abs(w) * loss).sum() + sums * np.abs(w * losses).sum()), error


def assert_within(got: jax.Array, want: np.ndarray, error: np.ndarray, factor: float = 1.0) -> None:
    info = jnp.finfo(got.dtype)
    bound = error + float(info.eps) / 2 * np.abs(want) + factor * float(info.smallest_subnormal)
    np.testing.assert_array_less(np.abs(exact(got) - want), bound)


def options(case: Case) -> dict:
    return {"transposed": case.transposed, "label_smoothing": case.smoothing, "z_loss": case.z, "chunk": case.chunk}


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("one token at a time", jnp.bfloat16),
        ("tied, a ragged last chunk", jnp.float16),
        ("tied, a ragged last chunk", jnp.float32),
    ],
)
def test_values_and_gradients_equal_float64(name, dtype):
    case = CASES[name]
    values, labels = inputs(case, dtype, jnp.bfloat16 if name == "one token at a time" else jnp.float32)
    run = jax.jit(jax.value_and_grad(lambda v: fused(**v, labels=labels, **options(case)), has_aux=True))
    (total, weight), slopes = run(values)
    want, gradients, error, errors = by_hand(case, values, labels, dtype)
    assert total.dtype == weight.dtype == jnp.float32 and total.shape == weight.shape == ()
    assert abs(float(total) - want) <= error
    weights = exact(values["weights"]) if case.weighted else np.ones(case.sizes[0])
    np.testing.assert_allclose(weight, weights.sum(), rtol=0, atol=16 * EPS32 * np.abs(weights).sum())
    assert slopes.keys() == values.keys()
    for key, slope in slopes.items():
        assert slope.dtype == values[key].dtype and slope.shape == values[key].shape
        assert_within(slope, gradients[key], errors[key])
    if (name, dtype) == ("tied, a ragged last chunk", jnp.float32):  # without a gradient the same number
        alone, _ = jax.jit(lambda v: fused(**v, labels=labels, **options(case)))(values)
        assert abs(float(alone) - want) <= error


def test_a_loss_scale_saves_the_small_gradients_of_float16():
    """Gradients by hidden near 2⁻²⁶, where float16 has nothing, whatever size the weights and the kernel are."""
    case = Case(sizes=(64, 8, 512), chunk=16)
    drawn, labels = inputs(case, jnp.float16)

    def share_of_loss(hidden, kernel, weights, share):
        total, weight = fused(hidden.astype(jnp.float16), kernel, labels, chunk=16, weights=weights)
        return total / weight * share

    @jax.jit
    def run(scale, *args):
        return scaled_value_and_grad(share_of_loss, scale, argnums=(0, 1))(*args)

    scale, none = dynamic_loss_scale(2.0**15), dynamic_loss_scale(1.0)
    # A kernel of 2¹⁰ makes gradients that do not fit into float16 before they are multiplied by their share.
    for power, share in ((-10, 2.0**-12), (8, 2.0**-30)):
        values = {
            "hidden": drawn["hidden"] * jnp.float16(2.0 ** min(-power, 0)),
            "kernel": drawn["kernel"] * 2.0**power,
        }
        want, gradients, error, errors = by_hand(case, values, labels, jnp.float16)
        args = (values["hidden"].astype(jnp.float32), values["kernel"])
        for weight in (1.0, 1e-6, 1e6):
            value, slopes = run(scale, *args, np.full(64, weight, np.float32), share)
            assert abs(float(value) - want * share / 64) <= (error + 64 * EPS32 * want) * share / 64
            for got, key in zip(slopes, ("hidden", "kernel"), strict=True):
                exactly, off = gradients[key] * share / 64, errors[key] * share / 64
                # ∂hidden leaves as float16: beyond its relative error, half a subnormal at the loss scale.
                off = off + 8 * EPS32 * np.abs(exactly) + 2.0**-25 / 2**15
                np.testing.assert_array_less(np.abs(exact(got) - exactly), off)
        lost = exact(run(none, *args, np.ones(64, np.float32), share)[1][0])
        assert (lost == 0).mean() > 0.2  # what the scale is for
        too_much = run(scale, *args, np.ones(64, np.float32), share * 2.0**50)[1][0]
        assert not jnp.isfinite(too_much).all()  # and never a wrong number


def test_float32_hidden_is_multiplied_in_the_named_dtype():
    """As `mixed_bfloat16` hands it out: float32, holding bfloat16 values. Two equal chunks of two tiles of 64 rows."""
    case = Case(sizes=(200, 4, 11), chunk=192, transposed=True)
    values, labels = inputs(case, jnp.bfloat16)
    values["hidden"] = values["hidden"].astype(jnp.float32)
    slope = jax.value_and_grad(lambda v: fused(**v, labels=labels, **options(case), compute_dtype="bfloat16")[0])
    total, slopes = jax.jit(slope)(values)
    want, gradients, error, errors = by_hand(case, values, labels, jnp.bfloat16)
    assert abs(float(total) - want) <= error
    for key, got in slopes.items():
        assert got.dtype == jnp.float32
        assert_within(got, gradients[key], errors[key])
    dots = [eqn for eqn in equations(jax.make_jaxpr(slope)(values).jaxpr) if eqn.primitive.name == "dot_general"]
    assert {v.aval.dtype for dot in dots for v in dot.invars} == {jnp.dtype("bfloat16")}
    assert [dot.outvars[0].aval.shape for dot in dots] == [(128, 11), (128, 4), (11, 4)]


@pytest.mark.parametrize("size", [2.0**-40, 2.0**20])
def test_what_comes_in_float32_has_a_gradient_of_float32s_range(size):
    """Products in float16, whose numbers end at 2⁻²⁴ and 65504; hidden holds float16 values."""
    case = Case()
    values, labels = inputs(case, jnp.float16)
    values["hidden"] = values["hidden"].astype(jnp.float32)
    got = jax.grad(lambda v: size * fused(**v, labels=labels, **options(case), compute_dtype="float16")[0])(values)
    _, want, _, errors = by_hand(case, values, labels, jnp.float16)
    for key, slope in got.items():
        assert slope.dtype == jnp.float32
        assert_within(slope / size, want[key], errors[key])


def avals(jaxpr: Any) -> list:
    return [v.aval for eqn in equations(jaxpr) for v in (*eqn.invars, *eqn.outvars) if hasattr(v.aval, "dtype")]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transposed", [False, True])
def test_three_half_products_and_never_more_logits_than_a_chunk(dtype, transposed):
    case = Case(sizes=(48, 4, 40), chunk=8, bias=True, weighted=True, transposed=transposed, smoothing=0.1, z=1e-4)
    values, labels = inputs(case, dtype)

    def f(v):
        return fused(**v, labels=labels, **options(case))[0]

    forward, both = jax.make_jaxpr(f)(values).jaxpr, jax.make_jaxpr(jax.value_and_grad(f))(values).jaxpr
    for jaxpr, products in ((forward, 1), (both, 3)):
        dots = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]
        assert len(dots) == products  # none of them a gradient where none was asked for, and no logits computed twice
        for dot in dots:
            assert [v.aval.dtype for v in dot.invars] == [dtype, dtype] and dot.outvars[0].aval.dtype == jnp.float32
        assert max(a.size for a in avals(jaxpr)) == 8 * 40  # every array in it, of whatever dtype
    plain = jax.make_jaxpr(lambda v: losses.softmax_cross_entropy(v["hidden"] @ v["hidden"].T, labels))(values)
    assert max(a.size for a in avals(plain.jaxpr)) == 48 * 48  # the reader sees what it looks for
    kept = jax.tree.leaves(jax.eval_shape(lambda v: jax.vjp(f, v)[1], values))
    assert max(a.size for a in kept if hasattr(a, "dtype")) == 48 * 4
    assert [a.dtype for a in kept if getattr(a, "shape", ()) == (48, 4)] == [dtype]  # ∂hidden, and not float32


def compiled_mib(f: Any) -> float:
    tokens, features, classes = 4096, 64, 8192
    shapes = [((tokens, features), jnp.bfloat16), ((features, classes), jnp.float32), ((tokens,), jnp.int32)]
    lowered = jax.jit(jax.value_and_grad(f, (0, 1))).lower(*(jax.ShapeDtypeStruct(*s) for s in shapes))
    return lowered.compile().memory_analysis().temp_size_in_bytes / 2**20


def test_the_compiled_program_needs_a_fraction_of_the_memory():
    """All logits are 128 MiB in float32. A chunk of 256 is 8; the half kernel and its float32 gradient are 1 and 2."""
    plain = compiled_mib(lambda h, k, y: losses.softmax_cross_entropy(h @ k.astype(h.dtype), y).sum())
    chunked = compiled_mib(lambda h, k, y: fused(h, k, y, chunk=256)[0])
    assert plain > 128 and chunked < 4 * 8 + 8


def test_what_has_weight_zero_reaches_nothing():
    case = Case(weighted=True, bias=True, z=1e-2)
    drawn, labels = inputs(case, jnp.float16)
    values, labels = jax.tree.map(np.array, drawn), np.array(labels)
    run = jax.jit(jax.value_and_grad(lambda v, labels: fused(**v, labels=labels, **options(case)), has_aux=True))

    def put(x, where, what):
        x = x.copy()
        x[where] = what
        return x

    out = np.array([1, 4, 12])
    values["weights"] = put(values["weights"], out, 0)
    spoiled = {**values, "hidden": put(values["hidden"], out, [[np.nan], [np.inf], [-np.inf]])}
    clean, dirty = run(values, labels), run(spoiled, put(labels, out, -1))
    assert [a.tolist() for a in jax.tree.leaves(clean)] == [a.tolist() for a in jax.tree.leaves(dirty)]
    slopes = jax.tree.map(np.asarray, dirty[1])
    assert (slopes["hidden"][out] == 0).all() and (slopes["weights"][out] == 0).all()
    assert (slopes["hidden"][0] != 0).any() and slopes["weights"][0] != 0
    nothing = {**values, "hidden": np.full_like(values["hidden"], np.nan), "weights": np.zeros(13, np.float32)}
    found = run(nothing, np.full_like(labels, 99))
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(found))  # value, weight, every gradient
    for label in (-1, 11):  # there are classes 0 to 10
        assert np.isnan(run(values, put(labels, 0, label))[0][0])
    bad = run({**values, "hidden": put(values["hidden"], 0, np.inf)}, labels)
    assert not np.isfinite(bad[1]["kernel"]).all()  # what counts, and is wrong, is seen


def test_boolean_weights_a_masked_class_and_a_chunk_larger_than_all():
    case = Case(sizes=(13, 4, 12))
    values, _ = inputs(case, jnp.bfloat16)
    labels, mask = np.arange(13) % 11, np.arange(13) < 9
    masked = {**values, "bias": np.float32([0] * 11 + [-np.inf])}
    run = jax.jit(jax.value_and_grad(lambda v: fused(**v, labels=labels, weights=mask, chunk=99), has_aux=True))
    (total, weight), slopes = run(masked)
    few = {"hidden": values["hidden"][:9], "kernel": values["kernel"][:, :11]}
    want, gradients, error, errors = by_hand(Case(sizes=(9, 4, 11)), few, labels[:9], jnp.bfloat16)
    assert weight == 9 and abs(float(total) - want) <= error
    assert (slopes["kernel"][:, 11] == 0).all() and slopes["bias"][11] == 0
    slopes = jax.tree.map(np.asarray, slopes)
    assert_within(slopes["kernel"][:, :11], gradients["kernel"], errors["kernel"])
    assert_within(slopes["hidden"][:9], gradients["hidden"], errors["hidden"])


def test_vmap_scan_remat_and_eight_devices_give_the_same_numbers():
    case = Case(sizes=(64, 4, 11), chunk=16)
    values, labels = inputs(case, jnp.bfloat16)
    want, gradients, error, errors = by_hand(case, values, labels, jnp.bfloat16)

    def loss(v):
        return fused(**v, labels=labels, **options(case))[0]

    slope, remat = jax.value_and_grad(loss), jax.value_and_grad(jax.checkpoint(loss))
    nested = jax.jit(jax.vmap(lambda v: jax.lax.scan(lambda _, __: (None, remat(v)), None, length=1)[1]))
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    spread = {key: jax.device_put(x, whole if key == "kernel" else rows) for key, x in values.items()}
    on_eight = jax.jit(slope).lower(spread).compile()
    twice = jax.tree.map(lambda x: np.stack([np.zeros_like(x), x]), values)
    for total, slopes in (jax.tree.map(lambda x: x[1, 0], nested(twice)), on_eight(spread)):
        assert abs(float(total) - want) <= error
        for key, got in slopes.items():
            assert_within(got, gradients[key], errors[key])
    # Each device has its two rows of every chunk of sixteen.
    assert "[2,11]" in on_eight.as_text() and "[16,11]" not in on_eight.as_text()


def test_second_derivatives():
    hidden, kernel, labels = (
        draw(jnp.float32, 1, 2, scale=1.0),
        draw(jnp.float32, 2, 3, seed=1, scale=1.0),
        jnp.array([1]),
    )
    hessian = jax.jit(jax.jacrev(jax.grad(lambda h: fused(h, kernel, labels)[0])))(hidden)
    k, x = exact(kernel), exact(hidden) @ exact(kernel)
    p = (np.exp(x) / np.exp(x).sum())[0]
    want = k @ (np.diag(p) - np.outer(p, p)) @ k.T
    np.testing.assert_allclose(hessian.reshape(2, 2), want, rtol=0, atol=32 * EPS32 * (np.abs(k) @ np.abs(k.T)).max())


def test_other_dtypes_and_shapes():
    kernel, labels = np.ones((4, 11), np.float32), np.arange(6).reshape(2, 3).astype(np.int8)
    hidden = np.zeros((2, 3, 4), np.float32)
    total, weight = jax.jit(fused)(hidden, kernel, labels)  # numpy arrays, axes before the tokens
    np.testing.assert_allclose(total, 6 * np.log(11), rtol=16 * EPS32)
    assert weight == 6
    assert [x.tolist() for x in jax.jit(fused)(hidden[:0], kernel, labels[:0])] == [0, 0]
    assert jax.eval_shape(fused, hidden[0, 0], kernel, labels[0, 0])[0].shape == ()
    with jax.enable_x64(True):
        wide = np.zeros((3, 4), np.float64)
        narrow = jax.eval_shape(lambda h: fused(h, kernel, labels[0], compute_dtype=jnp.bfloat16), wide)
        assert [x.dtype for x in narrow] == [jnp.float32] * 2
        found = jax.jit(fused)(wide, kernel, labels[0])[0]
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, 3 * np.log(11), rtol=1e-15)


H, K, L = jnp.zeros((2, 4), jnp.bfloat16), jnp.zeros((4, 5)), jnp.array([0, 1])


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: fused(H, K.T, L), r"hidden is bfloat16\[2, 4\] and kernel float32\[5, 4\]; legal .*transposed=True"),
        (lambda: fused(H, K, L, transposed=True), r"legal .*\[classes, features\] with transposed=True; .*False"),
        (lambda: fused(H.astype(int), K, L), r"hidden is int32\[2, 4\] .*legal are float .*; cast"),
        (lambda: fused(H, K[:, :0], L), r"kernel float32\[4, 0\]; legal"),
        (lambda: fused(H, K, L[:1]), r"labels are int32\[1\] for hidden .*legal are integer .*\[2\]; cast or reshape"),
        (lambda: fused(H, K, jax.nn.one_hot(L, 5)), r"labels are float32\[2, 5\] .*for soft labels there is softmax"),
        (lambda: fused(H, K, L, bias=jnp.zeros(4)), r"bias is float32\[4\] for 5 classes; legal .*\[5\]; .*leave it"),
        (lambda: fused(H, K, L, weights=jnp.ones(1)), r"weights are float32\[1\]; legal .*\[2\]; broadcast"),
        (lambda: fused(H, K, L, chunk=0), r"chunk is 0; legal is a number of tokens >= 1; try 2048"),
        (lambda: fused(H, K, L, compute_dtype="int8"), r"Unknown dtype 'int8'; use one of .*bf16"),
        (lambda: fused(H, K, L, logits_dtype="bfloat15"), r"Unknown dtype 'bfloat15'; use one of .*bf16"),
        (lambda: fused(H, K, L, logits_dtype="f8_e5m2"), r"logits_dtype is float8_e5m2; legal .*16 bits or more"),
        (lambda: fused(H.astype(jnp.float8_e4m3fn), K, L), r"compute_dtype is float8_e4m3fn; legal .*16 bits or more"),
        (lambda: fused(H, K, L, label_smoothing=1.0), r"label_smoothing is 1.0; legal .*try"),
        (lambda: fused(H, K, L, z_loss=-1.0), r"z_loss is -1.0; legal .*try"),
    ],
)
def test_bad_input_says_what_came_what_is_legal_and_what_to_do(call, match):
    with pytest.raises(ValueError, match=match):
        call()
