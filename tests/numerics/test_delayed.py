"""Delayed scaling: histories and scales by hand, counts against the true exponents, current scaling where nothing is known."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.core.model import SINKS
from mpjax.numerics.delayed import COLLECTION, DelayedDot, advanced, histories, scaled_by, with_sinks
from mpjax.numerics.dot import QuantizedDot

E4M3, E5M2 = jnp.dtype("float8_e4m3fn"), jnp.dtype("float8_e5m2")
PLAIN = (((1,), (0,)), ((), ()))
STEPS = 16


def history(mstate, path="up"):
    node = mstate[COLLECTION]
    for segment in path.split("/"):
        node = node[segment]
    return np.asarray(node["exponents"])


def fresh(*paths):
    return {COLLECTION: histories(paths or ("up",))}


def seeing(*exponents, more=()):
    """Simulated sinks of one step: the exponents of x, w and g (0: a tensor of zeros), and further ones that lie lower."""
    counts = np.zeros((3, 256), np.float32)
    counts[np.arange(3), exponents] = 1
    for e in more:
        counts[:, e] += 1
    return {COLLECTION: {"up": {"exponents": jnp.asarray(counts)}}}


def moved(mstate, *steps):
    for sinks in steps:
        mstate, _ = advanced(mstate, sinks)
    return mstate


def field(x):
    """The stored exponent of the largest magnitude, by frexp."""
    return int(np.frexp(np.abs(np.asarray(x, np.float64)).max())[1]) - 1 + 127


def operands(seed=0, scale=(1.0, 0.02, 1e-3)):
    rng = np.random.default_rng(seed)
    shapes = ((8, 32), (32, 16), (8, 16))
    return tuple(jnp.asarray(s * rng.normal(size=shape), jnp.bfloat16) for s, shape in zip(scale, shapes, strict=True))


def run(mstate, x, w, g, dot=None):
    """y, dx, dw and what came back for the sinks."""
    return compiled(DelayedDot("up") if dot is None else dot, mstate, x, w, g)


@functools.partial(jax.jit, static_argnums=0)
def compiled(dot, mstate, x, w, g):

    def fn(x, w, sinks):
        with scaled_by({**mstate, SINKS: sinks}):
            return dot(x, w, PLAIN)

    y, pull = jax.vjp(fn, x, w, with_sinks(mstate).get(SINKS, {}))
    return y, *pull(g)


def seen(sinks):
    """For x, w and g, the exponents that were counted and how often."""
    counts = np.asarray(sinks[COLLECTION]["up"]["exponents"])
    return [{int(e): int(row[e]) for e in np.flatnonzero(row)} for row in counts]


# Histories.


def test_a_history_begins_with_what_is_assumed_and_moves_by_one_a_step():
    mstate = fresh()
    assert history(mstate)[:, 0].tolist() == [-130, -127, -127] and not history(mstate)[:, 1:].any()
    mstate = moved(mstate, seeing(126, 120, 100), seeing(128, 119, 101, more=(3, 90)))
    assert history(mstate)[:, :4].tolist() == [[128, 126, -130, 0], [119, 120, -127, 0], [101, 100, -127, 0]]
    assert history(mstate).shape == (3, STEPS)


def test_what_was_seen_is_forgotten_after_sixteen_steps():
    mstate = moved(fresh(), seeing(140, 120, 100), *[seeing(126, 119, 99)] * 15)
    assert history(mstate).max(1).tolist() == [140, 120, 100]
    assert history(moved(mstate, seeing(126, 119, 99))).max(1).tolist() == [126, 119, 99]


def test_zeros_leave_what_is_known_and_then_look_lower_by_steps():
    """A tensor of zeros may be one that is too small for its scale; it must be found again, and not from 2^-126."""
    mstate = moved(fresh(), *[seeing(0, 0, 0)] * 15)
    assert history(mstate)[:, -1].tolist() == [-130, -127, -127] and not history(mstate)[:, :-1].any()
    mstate = moved(mstate, seeing(0, 0, 0))
    assert history(mstate)[:, 0].tolist() == [-114, -111, -111] and not history(mstate)[:, 1:].any()
    mstate = moved(mstate, *[seeing(0, 0, 0)] * 200)
    assert set(history(mstate).min(1).tolist()) == {-64}  # and no lower
    mstate = moved(fresh(), seeing(126, 126, 90), *[seeing(0, 0, 95)] * 16)
    assert history(mstate)[:, 0].tolist() == [-110, -110, 95]


def test_histories_are_nested_by_path():
    tree = histories(["layers/0/up", "head", ""])
    assert set(tree) == {"layers", "head", "exponents"} and tree["layers"]["0"]["up"]["exponents"].shape == (3, STEPS)
    assert tree["head"]["exponents"].dtype == jnp.float32


def test_other_collections_and_other_sinks_are_left_alone():
    probe, stats = {"x": jnp.ones(2)}, {"mean": jnp.ones(3)}
    mstate = {"batch_stats": stats, SINKS: {"probe": probe}, **fresh()}
    given = with_sinks(mstate)
    assert (
        given["batch_stats"] is stats and given[SINKS]["probe"] is probe and set(given[SINKS]) == {"probe", COLLECTION}
    )
    assert not np.asarray(given[SINKS][COLLECTION]["up"]["exponents"]).any() and set(mstate[SINKS]) == {"probe"}
    after, left = advanced(mstate, {"probe": probe, **seeing(1, 2, 3)})
    assert left == {"probe": probe} and after["batch_stats"] is stats and history(after)[:, 0].tolist() == [1, 2, 3]
    plain = {"batch_stats": stats}
    assert with_sinks(plain) is plain and advanced(plain, {"probe": probe}) == (plain, {"probe": probe})


# Scales.


@pytest.mark.parametrize(
    ("steps", "scales"),
    [
        # e4m3 holds up to 448, 256 being its largest power of two: 2^(e-126) / 256. e5m2: 2^(e-126) / 32768.
        ([], (2.0**-4, 2.0**-7, 2.0**-14)),
        ([seeing(127, 122, 117)], (2.0**-7, 2.0**-12, 2.0**-24)),
        ([seeing(129, 122, 117), seeing(127, 124, 110)], (2.0**-5, 2.0**-10, 2.0**-24)),
        ([seeing(0, 122, 0)], (2.0**-4, 2.0**-12, 2.0**-14)),
    ],
)
def test_the_product_is_that_of_operands_rounded_at_the_scales_of_the_history(steps, scales):
    x, w, g = operands()

    def rounded(v, scale, dtype, top):
        v = np.clip(np.asarray(v, np.float64) / scale, -top, top)
        return v.astype(np.float32).astype(dtype).astype(np.float64) * scale

    xq, wq, gq = rounded(x, scales[0], E4M3, 448), rounded(w, scales[1], E4M3, 448), rounded(g, scales[2], E5M2, 57344)
    found = run(moved(fresh(), *steps), x, w, g)
    for got, hand, total in (
        (found[0], xq @ wq, abs(xq) @ abs(wq)),
        (found[1], gq @ wq.T, abs(gq) @ abs(wq.T)),
        (found[2], xq.T @ gq, abs(xq.T) @ abs(gq)),
    ):
        assert got.dtype == jnp.bfloat16
        assert (np.abs(np.asarray(got, np.float64) - hand) <= 2**-8 * np.abs(hand) * 1.001 + 2**-19 * total).all()


def test_a_step_writes_down_the_exponents_of_its_tensors():
    x, w, g = operands()
    assert seen(run(fresh(), x, w, g)[3]) == [{field(x): 1}, {field(w): 1}, {field(g): 1}]


def test_what_saturates_is_taken_for_four_times_as_large_until_it_fits():
    """448 · 2^-4 is 28, in the cell of 16 (131): two more make 133, and the next scale is eight times as large."""
    x, w, g = operands(scale=(4000.0, 0.02, 1e-3))
    mstate, written = fresh(), []
    for _ in range(4):
        sinks = run(mstate, x, w, g)[3]
        written.append(max(seen(sinks)[0]))
        mstate, _ = advanced(mstate, sinks)
    assert field(x) == 140
    assert written == [133, 136, 139, 140]


def test_what_is_too_small_for_the_beginning_is_found():
    x, w, g = operands(scale=(1.0, 0.02, 2.0**-38))
    step = jax.jit(lambda mstate: advanced(mstate, run(mstate, x, w, g)[3])[0])
    mstate = fresh()
    for _ in range(17):
        mstate = step(mstate)
    assert abs(history(mstate)[2, 0] - field(g)) <= 1 and history(mstate)[2, 1] < 0


def test_the_largest_numbers_have_a_cell():
    x, w, g = operands(scale=(1.0, 0.02, 1e-3))
    mstate = moved(fresh(), seeing(253, 122, 117))
    assert max(seen(run(mstate, x * 0 + 3e38, w, g)[3])[0]) == 255


# Counts add up.


def test_counts_add_up_over_a_scan():
    stack = jnp.stack([jnp.eye(32, dtype=jnp.bfloat16) * s for s in (1.0, 0.25, 2.0)])
    x = jnp.ones((4, 32), jnp.bfloat16)

    def fn(sinks):
        with scaled_by({**fresh(), SINKS: sinks}):
            return jax.lax.scan(lambda c, w: (DelayedDot("up")(c, w, PLAIN), None), x, stack)[0]

    _, pull = jax.vjp(fn, with_sinks(fresh())[SINKS])
    (sinks,) = pull(jnp.full((4, 32), 2.0**-10, jnp.bfloat16))
    # x: 1, 1, 1/4; w: 1, 1/4, 2, of which 2 is within the scale for 2; g from behind: 2^-10, 2^-9, 2^-11.
    assert seen(sinks) == [{127: 2, 125: 1}, {127: 1, 125: 1, 128: 1}, {117: 1, 118: 1, 116: 1}]
    assert history(moved(fresh(), sinks))[:, 0].tolist() == [127, 128, 118]


@pytest.mark.parametrize("way", ["vmap", "micro-batches"])
def test_counts_add_up_over_rows(way):
    x, w, g = operands()
    rows = jnp.stack([x, x * 2, x / 8])

    def loss(sinks, x):
        with scaled_by({**fresh(), SINKS: sinks}):
            return (DelayedDot("up")(x, w, PLAIN) * g).astype(jnp.float32).sum()

    sinks = with_sinks(fresh())[SINKS]
    if way == "vmap":
        found = jax.jit(jax.grad(lambda s: jax.vmap(loss, (None, 0))(s, rows).sum()))(sinks)
    else:
        gradient = jax.jit(jax.grad(loss))
        parts = [gradient(sinks, x) for x in rows]
        found = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *parts)
    e = field(x)
    assert seen(found) == [{e: 1, e + 1: 1, e - 3: 1}, {field(w): 3}, {field(g): 3}]
    assert history(moved(fresh(), found))[:, 0].tolist() == [e + 1, field(w), field(g)]


# Without a history.


@pytest.mark.parametrize("mstate", [{}, fresh("down")], ids=["none", "another's"])
def test_without_a_history_it_is_current_scaling_to_the_bit(mstate):
    given = operands()
    for one, other in zip(run(mstate, *given)[:3], run({}, *given, dot=QuantizedDot("fp8"))[:3], strict=True):
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes()


def test_with_a_history_it_is_not():
    given = operands()
    assert run(fresh(), *given)[0].tobytes() != run({}, *given)[0].tobytes()


def test_weights_of_other_sizes_are_multiplied_as_they_came():
    x, w, g = operands()
    y, *_, sinks = run(fresh(), x, w[:, :10], g[:, :10])
    assert y.tobytes() == jax.lax.dot_general(x, w[:, :10], PLAIN).tobytes() and seen(sinks) == [{}, {}, {}]


def test_histories_hold_for_the_length_of_a_call():
    x, w, _ = operands()
    current = QuantizedDot("fp8")(x, w, PLAIN).tobytes()
    with pytest.raises(KeyError), scaled_by(fresh()):
        assert DelayedDot("up")(x, w, PLAIN).tobytes() != current
        raise KeyError
    assert DelayedDot("up")(x, w, PLAIN).tobytes() == current
