"""One seed: what follows from it is exactly what is documented, so that a run can be made again without mpjax."""

from __future__ import annotations

import re

import jax
import numpy as np
import optax
import pytest

from mpjax.core.model import Model
from mpjax.train.seeds import epoch_batches, seeds
from mpjax.train.state import Aux, TrainState
from mpjax.train.step import make_train_step
from tests.train.toys import fingerprint

DATA = {"x": np.arange(20).reshape(10, 2), "y": [np.arange(10)]}


def test_the_init_key_is_the_seed_s():
    key = seeds(7).init
    assert jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    assert fingerprint(key) == fingerprint(jax.random.key(7))


def test_init_and_steps_draw_from_the_two_halves_of_the_key():
    """As documented: params from the first half; step n, with n attempts behind it, from fold_in(the second, n)."""
    model = Model(lambda rng: ({"w": jax.random.normal(rng, (3,))}, {}), lambda p, m, rng=None: (p["w"], m))
    optimizer = optax.sgd(0.1)

    def loss_fn(params, mstate, batch, rng):
        return (params["w"] * batch).sum(), Aux(mstate, {"drawn": jax.random.uniform(rng)})

    first, second = jax.random.split(jax.random.key(7))
    state = TrainState.create(model, optimizer, seeds(7).init)
    assert fingerprint(state.params["w"]) == fingerprint(jax.random.normal(first, (3,)))
    step, drawn = make_train_step(loss_fn, optimizer), []
    for batch in (1.0, np.nan, 1.0):  # the second is skipped, and counts
        state, metrics = step(state, np.full(3, batch, np.float32))
        drawn.append(float(metrics["drawn"]))
    assert int(state.skipped) == 1
    assert drawn == [float(jax.random.uniform(jax.random.fold_in(second, n))) for n in range(3)]


def test_the_order_is_pcg64_s_of_seed_and_epoch():
    for seed, epoch in ((0, 0), (0, 1), (7, 3), (2**32 - 1, 0)):
        expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch)))).permutation(10)
        assert seeds(seed).order(epoch, 10).tolist() == expected.tolist()


def test_the_order_is_this_one():
    """Written down, so that a change is seen: numpy keeps PCG64's stream for ever, `permutation`'s not."""
    assert seeds(0).order(0, 8).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]
    assert seeds(1).order(2, 8).tolist() == [6, 0, 7, 5, 1, 4, 3, 2]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(seeds(seed).order(epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25 and all(sorted(order) == list(range(50)) for order in orders)


def test_numpy_integers_are_seeds():
    found = seeds(np.uint8(7))
    assert type(found.seed) is int and fingerprint(found.init) == fingerprint(seeds(7).init)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, True])
def test_what_is_no_seed_is_refused(seed):
    """2³² among them: jax keeps the low 32 bits, so that it would share its init with seed 0."""
    words = f"got seed={seed!r}; legal is an int from 0 to 2**32 - 1; 0 is as good as any"
    with pytest.raises(ValueError, match=re.escape(words)):
        seeds(seed)


def test_seeds_can_be_compared_and_hashed():
    assert seeds(3) == seeds(3) != seeds(4) and hash(seeds(3)) == hash(seeds(3))


# ---- epochs ----------------------------------------------------------------------------------------------------------


def test_an_epoch_feeds_each_row_once_and_leaves_the_rest_out():
    batches, order = epoch_batches(DATA, 3, seeds(5)), [seeds(5).order(epoch, 10) for epoch in range(2)]
    for attempt in range(6):
        epoch, index = divmod(attempt, 3)
        chosen = order[epoch][3 * index : 3 * index + 3]
        batch = batches(attempt)
        assert np.array_equal(batch["x"], DATA["x"][chosen]) and np.array_equal(batch["y"][0], chosen)


def test_a_batch_follows_from_seed_and_attempt_alone():
    """Whatever was asked for before, and from whichever function: so a resumed run sees what it would have seen."""
    straight, hopping = (epoch_batches(DATA, 3, seeds(5)) for _ in range(2))
    expected = {attempt: straight(attempt)["x"].tolist() for attempt in range(9)}
    for attempt in (8, 0, 4, 3, 8, 7, 1, 6, 2, 5, 0):
        assert hopping(attempt)["x"].tolist() == expected[attempt]
    assert epoch_batches(DATA, 3, seeds(6))(0)["x"].tolist() != expected[0]


def test_a_batch_is_a_copy():
    batches = epoch_batches(DATA, 10, seeds(0))
    batches(0)["x"][:] = -1
    assert DATA["x"].min() == 0 and batches(0)["x"].min() == 0


@pytest.mark.parametrize(
    ("data", "batch_size", "rows"),
    [
        (DATA, 11, "[10]"), (DATA, 0, "[10]"), (DATA, -1, "[10]"),
        ({"x": np.zeros(3), "y": np.zeros(4)}, 2, "[3, 4]"),
        ({"x": np.zeros(0)}, 1, "[0]"), ({}, 1, "[]"), ({"x": np.zeros(3), "scalar": np.float32(1)}, 1, "[0, 3]"),
    ],
)  # fmt: skip
def test_data_that_gives_no_batch_is_refused(data, batch_size, rows):
    words = f"got arrays of {rows} rows and batch_size={batch_size}; legal is one number of rows and a batch of 1 to"
    with pytest.raises(ValueError, match=re.escape(words)):
        epoch_batches(data, batch_size, seeds(0))
