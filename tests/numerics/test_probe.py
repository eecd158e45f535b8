"""The tap: exact counts, a value and a gradient that it leaves alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.core.model import SINKS
from mpjax.numerics import probe
from mpjax.numerics.probe import CELLS, EXPONENTS, FORMATS, PROBE, Recorder, Sink, count, tap, tapped

FLOATS = ("float32", "bfloat16", "float16")


def by_hand(x):
    """From exponent field to count: numpy's frexp in float64; zeros at 0, infinities and NaNs at 255."""
    found = np.zeros(EXPONENTS)
    for value in np.asarray(x, np.float64).ravel():
        if not np.isfinite(value):
            found[255] += 1
        else:
            found[0 if value == 0 else max(np.frexp(value)[1] - 1 + 127, 0)] += 1
    return found


def fields(counts):
    return np.asarray(counts, float).reshape(EXPONENTS, -1).sum(-1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_exponent_is_counted_where_it_lies(dtype):
    """All powers of two that the format holds, with and without a mantissa, both signs; and the special ones."""
    powers = np.float64(2.0) ** np.arange(-24 if dtype == "float16" else -126, 16 if dtype == "float16" else 127)
    x = np.concatenate([powers, -1.25 * powers, [0.0, -0.0, np.inf, -np.inf, np.nan]])
    x = jnp.asarray(x.astype(jnp.dtype(dtype)))
    assert fields(count(x)).tolist() == by_hand(x).tolist()


def test_infinities_and_nans_have_cells_of_their_own():
    counts = np.asarray(count(jnp.array([np.inf, -np.inf, np.nan, 0.0, 1.0]))).reshape(EXPONENTS, -1)
    assert (counts[255, 0], counts[255, 1:].sum(), counts[0, 0], counts[127].sum()) == (2, 1, 1, 1)


@pytest.mark.parametrize("name", FORMATS)
def test_limits_are_those_of_a_cast(name):
    """numpy's own cast of the last number on either side of each limit, both signs."""
    over, under = (np.uint32(bits(name)) for bits in (probe.overflow_bits, probe.underflow_bits))
    with np.errstate(over="ignore"):
        inside, outside = np.array([over - 1, over], np.uint32).view(np.float32).astype(jnp.dtype(name)).astype("f8")
    assert np.isfinite(inside) and not np.isfinite(outside)
    flushed, kept = np.array([under - 1, under], np.uint32).view(np.float32).astype(jnp.dtype(name)).astype(np.float64)
    assert flushed == 0 and kept > 0


def test_a_tap_is_the_identity_and_counts_value_and_gradient():
    x = jnp.array([0.5, 3.0, 0.0], jnp.bfloat16)

    def loss(x, sink):
        return (tapped(x, sink).astype(jnp.float32) * jnp.array([8.0, 0.25, 1.0])).sum()

    value, (g, counts) = jax.value_and_grad(loss, (0, 1))(x, jnp.zeros((2, CELLS)))
    assert float(value) == 4.75 and g.tolist() == [8.0, 0.25, 1.0] and g.dtype == jnp.bfloat16
    assert fields(counts[0]).tolist() == by_hand([0.5, 3.0, 0.0]).tolist()
    assert fields(counts[1]).tolist() == by_hand([8.0, 0.25, 1.0]).tolist()


def squares(x, sink, n=4):
    """x ← sin x, n times, tapped each time."""
    return jax.lax.scan(lambda x, _: (tapped(jnp.sin(x), sink), None), x, None, length=n)[0].sum()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])
def test_passes_through_a_loop_add_up_and_remat_counts_once(wrap):
    x = jnp.linspace(0.1, 1.0, 6)
    counts = jax.grad(wrap(squares), 1)(x, jnp.zeros((2, CELLS)))
    passes = [np.asarray(x)]
    for _ in range(4):
        passes.append(np.sin(passes[-1]))
    assert fields(counts[0]).tolist() == sum(map(by_hand, passes[1:])).tolist()
    assert counts[1].sum() == 24


def test_a_vmapped_tap_counts_every_element():
    x = jnp.arange(1.0, 13.0).reshape(3, 4)
    counts = jax.grad(lambda s: jax.vmap(lambda row: tapped(row, s))(x).sum())(jnp.zeros((2, CELLS)))
    assert fields(counts[0]).tolist() == by_hand(x).tolist() and counts[1].sum() == 12


@pytest.mark.parametrize("size", [5000, 128 * 40, 128 * 40 + 77])
def test_a_large_tensor_is_sampled_evenly_and_its_bad_values_counted_whole(size):
    """At most 1,000 elements are read, and of the blocks that are passed over each has its turn."""
    x = np.ones(size, np.float32)
    x[3], x[-1] = np.inf, np.nan
    counts = fields(count(jnp.asarray(x), at_most=1000))
    assert counts[255] == 2 and abs(counts[127] - size) < 0.02 * size
    blocks = np.repeat(2.0 ** np.arange(size // 128), 128)  # one exponent a block
    read = np.flatnonzero(fields(count(jnp.asarray(blocks, jnp.float32), at_most=1000))) - 127
    each = -(-size // 1000)
    assert len(read) * 128 <= 1000 and set(read % each) == set(range(each))


def test_what_is_small_is_counted_exactly():
    x = jax.random.normal(jax.random.key(0), (1000,))
    assert fields(count(x, at_most=1000)).tolist() == by_hand(x).tolist()


def test_a_recorder_notes_names_in_order_and_the_narrowest_dtype():
    recorder = Recorder()
    mstate = {SINKS: {PROBE: recorder}}

    @jax.jit
    def program(mstate, x):  # a recorder is a pytree without leaves: it goes through a jit
        y = tap(mstate, "b", (x, x.astype(jnp.bfloat16), 3, None))
        return tap(mstate, "a", y[0]) + tap(mstate, "ints", jnp.arange(1)).sum().astype("float32")

    jax.eval_shape(program, mstate, jnp.ones(2))
    sinks = recorder.sinks()
    assert {name: (sink.dtype, sink.order) for name, sink in sinks.items()} == {
        "b": ("bfloat16", 0),
        "a": ("float32", 1),
    }


def test_where_nothing_is_probed_nothing_is_traced():
    plain = jax.make_jaxpr(lambda x: x * 2)(1.0)
    for mstate in ({}, {SINKS: {}}, {SINKS: {PROBE: {"other": Sink(jnp.zeros((2, CELLS)))}}}):
        assert str(jax.make_jaxpr(lambda x, mstate=mstate: tap(mstate, "here", x) * 2)(1.0)) == str(plain)
