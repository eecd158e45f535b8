"""The train state: made whole, sharing nothing, and a plain pytree under every verb that jax and a checkpoint use."""

from __future__ import annotations

import dataclasses
import io
import re
import warnings

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import mpjax
from mpjax.core.model import Model
from mpjax.numerics.loss_scale import DynamicLossScale, NoOpLossScale, StaticLossScale
from mpjax.train.advice import check_loss_scale
from mpjax.train.state import Aux, TrainState, merge_trainable, split_trainable
from tests.train.toys import fingerprint, linear_model

KEY = jax.random.key(7)


def two_layers(rng, *sample, value=0.5):
    """Params two levels deep, with an integer among them; a key, an int, a bool and a complex number in the mstate."""
    layers = {name: {"kernel": jnp.full((2, 2), value), "bias": jnp.zeros(2)} for name in ("body_0", "head")}
    return {**layers, "table": jnp.arange(3)}, {"cache": {"key": rng, "n": 1, "on": True, "phase": 1j, "rate": 0.25}}


MODEL = Model(two_layers, lambda params, mstate, x, rng=None: (x, mstate))
OPTIMIZER = optax.adam(1e-3)


def pointers(tree):
    """The addresses of all buffers of a tree."""
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]
    return [x.unsafe_buffer_pointer() for x in leaves if isinstance(x, jax.Array)]


# ---- create ----------------------------------------------------------------------------------------------------------


def test_a_fresh_state_counts_nothing_and_is_strongly_typed():
    state = TrainState.create(MODEL, OPTIMIZER, KEY)
    for counter in (state.step, state.skipped, state.skipped_in_a_row, state.attempt):
        assert counter.dtype == jnp.int32 and counter.shape == () and int(counter) == 0
    assert state.ema is None and isinstance(state.loss_scale, NoOpLossScale)
    assert not [x for x in jax.tree.leaves(state) if getattr(x, "weak_type", False)]
    assert state.averaged_params is state.params


def test_the_key_is_split_between_the_model_and_the_state():
    """The model's initialisation and the steps draw from different keys, and the same key gives the same state."""
    state = TrainState.create(MODEL, OPTIMIZER, KEY)
    init_key = state.mstate["cache"]["key"]
    assert len({str(jax.random.key_data(key)) for key in (KEY, init_key, state.rng)}) == 3
    assert fingerprint(state) == fingerprint(TrainState.create(MODEL, OPTIMIZER, KEY))


def test_an_old_style_key_is_a_key_too():
    state = TrainState.create(linear_model(), OPTIMIZER, jax.random.PRNGKey(0))
    assert state.rng.dtype == jnp.uint32 and state.rng.shape == (2,)


def test_init_gets_the_sample_and_the_keyword_arguments():
    model = Model(lambda rng, x, *, scale: ({"w": scale * x}, {}), lambda p, m, x, rng=None: (x, m))
    state = TrainState.create(model, OPTIMIZER, KEY, jnp.arange(2.0), scale=3)
    assert state.params["w"].tolist() == [0.0, 3.0]


def test_given_params_come_in_the_param_dtype():
    model = linear_model(dtype=jnp.bfloat16)
    with pytest.warns(mpjax.VanishingUpdateWarning):
        state = TrainState.create(model, OPTIMIZER, KEY, params={"w": np.array([1.0, 1.001, -2.0]), "b": np.float32(4)})
    assert jax.tree.map(lambda x: str(x.dtype), state.params) == {"w": "bfloat16", "b": "bfloat16"}
    assert state.params["w"].tolist() == [1.0, 1.0, -2.0] and float(state.params["b"]) == 4.0


@pytest.mark.parametrize("number", [3, 3.0, np.int64(3), np.float64(3), jnp.int32(3)], ids=lambda x: type(x).__name__)
def test_given_params_that_are_numbers_become_floats_that_train(number):
    """An integer where the model has a float would be frozen in silence: an int has no gradient."""
    state = TrainState.create(linear_model(), OPTIMIZER, KEY, params={"w": np.zeros(3, int), "b": number})
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"float32"} and state.trainable is None
    assert float(state.params["b"]) == 3.0


def test_given_params_may_be_another_kind_of_mapping():
    """The paths are what must fit: params that an older Flax froze are the same params."""
    frozen = flax.core.freeze({"w": np.ones(3, np.float32), "b": np.float32(2)})
    state = TrainState.create(linear_model(), OPTIMIZER, KEY, params=frozen)
    assert jax.tree.structure(state.params) == jax.tree.structure({"w": 0, "b": 0})
    assert state.params["w"].tolist() == [1.0, 1.0, 1.0] and float(state.params["b"]) == 2.0


def test_a_given_mstate_replaces_the_initial_one():
    given = {"stats": {"mean": jnp.full(2, 3.0), "n": 4}}
    state = TrainState.create(MODEL, OPTIMIZER, KEY, mstate=given)
    assert state.mstate["stats"]["mean"].tolist() == [3.0, 3.0] and state.mstate["stats"]["n"].dtype == jnp.int32


def test_nothing_in_a_state_shares_memory():
    """Neither with what the caller passed, nor one part of the state with another: donation would free it."""
    params = {"w": jnp.ones(3), "b": jnp.ones(())}
    mstate, scale = {"stats": {"mean": jnp.ones(3)}}, DynamicLossScale(jnp.float32(8.0), jnp.int32(0))
    remembering = optax.GradientTransformation(lambda p: {"first": p, "again": p}, lambda g, s, p=None: (g, s))
    given = {"params": params, "mstate": mstate, "loss_scale": scale}
    state = TrainState.create(linear_model(), remembering, KEY, ema_decay=0.5, **given)
    ours, theirs = pointers(state), pointers((params, mstate, scale, KEY))
    assert len(set(ours)) == len(ours) and not set(ours) & set(theirs)


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        ("float32", NoOpLossScale),
        ("mixed_bfloat16", NoOpLossScale),
        ("mixed_float16", DynamicLossScale),
        (mpjax.PolicyMap({"head": "compute=float16"}), DynamicLossScale),
        (mpjax.PolicyMap({"head": "compute=bfloat16"}, default="float32"), NoOpLossScale),
    ],
    ids=lambda x: re.sub(r" at 0x[0-9a-f]+", "", str(x)),
)
def test_the_loss_scale_follows_from_the_policy(policy, kind):
    policy = policy if isinstance(policy, mpjax.PolicyMap) else mpjax.get_policy(policy)
    state = TrainState.create(dataclasses.replace(linear_model(), policy=policy), OPTIMIZER, KEY)
    assert type(state.loss_scale) is kind


def test_a_given_loss_scale_wins_and_is_checked_against_the_policy():
    half = dataclasses.replace(linear_model(), policy=mpjax.get_policy("mixed_float16"))
    assert TrainState.create(half, OPTIMIZER, KEY, loss_scale=StaticLossScale(8.0)).loss_scale == StaticLossScale(8.0)
    with pytest.warns(mpjax.MissingLossScaleWarning, match="float16 without a loss scale"):
        TrainState.create(half, OPTIMIZER, KEY, loss_scale=NoOpLossScale())
    brain = dataclasses.replace(linear_model(), policy=mpjax.get_policy("mixed_bfloat16"))
    with pytest.warns(mpjax.UnneededLossScaleWarning, match="DynamicLossScale"):
        TrainState.create(brain, OPTIMIZER, KEY, loss_scale=mpjax.dynamic_loss_scale())


def test_a_bare_module_and_a_scale_that_is_a_number_are_refused():
    """The suite's type checks would refuse them first, in their own words; users run without."""
    create = getattr(TrainState.create.__func__, "__wrapped__", TrainState.create.__func__)
    with pytest.raises(
        TypeError, match=r"got a Dense for the model; legal is a mpjax.Model: mpjax.wrap\(module, policy\)"
    ):
        create(TrainState, nn.Dense(2), OPTIMIZER, KEY, jnp.ones((1, 2)))
    for scale in (1024.0, "dynamic", NoOpLossScale):
        check = getattr(check_loss_scale, "__wrapped__", check_loss_scale)
        with pytest.raises(ValueError, match=r"got loss_scale=.*; legal is what mpjax.dynamic_loss_scale\(...\)"):
            check(None, scale)


def test_the_optimizer_state_comes_from_a_float32_view_unless_asked_otherwise():
    model = linear_model(dtype=jnp.bfloat16)
    with pytest.warns(mpjax.VanishingUpdateWarning):
        state = TrainState.create(model, OPTIMIZER, KEY)
    assert {str(x.dtype) for x in jax.tree.leaves(state.opt_state)} == {"float32", "int32"}
    with pytest.warns(mpjax.VanishingUpdateWarning):
        state = TrainState.create(model, OPTIMIZER, KEY, optimizer_dtype=None)
    assert state.opt_state[0].nu["w"].dtype == jnp.bfloat16


def test_the_average_is_float32_and_comes_back_in_the_param_dtypes():
    with pytest.warns(mpjax.VanishingUpdateWarning):
        state = TrainState.create(linear_model(dtype=jnp.bfloat16), optax.sgd(1.0), KEY, ema_decay=0.9)
    assert {str(x.dtype) for x in jax.tree.leaves(state.ema)} == {"float32"}
    state = dataclasses.replace(state, ema={"w": jnp.full(3, 1.001), "b": jnp.float32(2.0)})
    averaged = state.averaged_params
    assert averaged["w"].dtype == jnp.bfloat16 and averaged["w"].tolist() == [1.0] * 3 and float(averaged["b"]) == 2.0


# ---- trainable -------------------------------------------------------------------------------------------------------

PATHS = ("body/0/bias", "body/0/kernel", "head/bias", "head/kernel", "table")


@pytest.mark.parametrize(
    ("trainable", "trained"),
    [
        (None, PATHS[:4]),  # an integer leaf is never trained
        ("head", PATHS[2:4]),
        ("head/*", PATHS[2:4]),
        ("body_0", PATHS[:2]),  # the spelling of the params is as good as the canonical one
        ("head_0", None),
        ("**/kernel", (PATHS[1], PATHS[3])),
        (["body/0/bias", "**/head"], (PATHS[0], *PATHS[2:4])),  # `**/` is zero segments too, as in a policy map
        (lambda path, leaf: leaf.ndim == 2, (PATHS[1], PATHS[3])),
        (lambda path, leaf: True, PATHS[:4]),
    ],
    ids=lambda x: re.sub(r" at 0x[0-9a-f]+", "", repr(x)),
)
def test_trainable_chooses_by_path_or_predicate(trainable, trained):
    if trained is None:
        with pytest.raises(
            ValueError, match=r"trainable=.*'head_0'.* matches no param; the paths are body/0/bias, body/0/kernel"
        ):
            TrainState.create(MODEL, OPTIMIZER, KEY, trainable=trainable)
        return
    state = TrainState.create(MODEL, OPTIMIZER, KEY, trainable=trainable, ema_decay=0.5)
    chosen = tuple(path for path, keep in zip(PATHS, state.trainable, strict=True) if keep)
    assert chosen == trained
    for tree in (state.opt_state[0].mu, state.ema):  # nothing is kept for what is not trained
        assert tuple(fingerprint(tree)) == trained
    assert jax.tree.structure(state.averaged_params) == jax.tree.structure(state.params)


def test_every_pattern_of_trainable_must_match():
    """A misspelt one among good ones would freeze what the user meant to train, in silence."""
    with pytest.raises(ValueError, match=r"haed/\*.*body/0/bias"):
        TrainState.create(MODEL, OPTIMIZER, KEY, trainable=["body/*", "haed/*"])


def test_a_complex_param_is_refused_unless_it_is_frozen():
    """It has a gradient: left out like an int, it would be frozen where the user meant to train it."""
    params = {"filter": jnp.ones(3, jnp.complex64), "w": jnp.ones(3)}
    model = Model(lambda rng: (params, {}), lambda params, mstate: (params, mstate))
    for trainable in (None, ["filter", "w"]):
        with pytest.raises(ValueError, match="the params filter are complex, and a step trains real ones; keep real"):
            TrainState.create(model, OPTIMIZER, KEY, trainable=trainable)
    assert TrainState.create(model, OPTIMIZER, KEY, trainable="w").trainable == (False, True)


@pytest.mark.parametrize("mask", [None, (True, False, False, True, False), (False,) * 5])
def test_split_and_merge_are_inverse(mask):
    params = two_layers(KEY)[0]
    trained, frozen = split_trainable(params, mask)
    assert len(jax.tree.leaves(trained)) + len(jax.tree.leaves(frozen)) == 5
    merged = merge_trainable(trained, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params) and fingerprint(merged) == fingerprint(params)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": {"w": np.zeros(3)}}, r"missing \['b'\], extra nothing; rename or drop them, or change the model"),
        ({"params": {"w": np.zeros(3), "b": 0.0, "c_1": 0.0}}, r"missing nothing, extra \['c/1'\]"),
        ({"params": {"v": np.zeros(3), "b": 0.0}}, r"missing \['w'\], extra \['v'\]"),
        ({"params": {"w": np.zeros((3, 1)), "b": 0.0}}, r"w has shape \(3, 1\), the model wants \(3,\)"),
        ({"params": {}}, r"missing \['b', 'w'\], extra nothing"),
        ({"ema_decay": 1.0}, r"got ema_decay=1.0; legal is a number between 0 and 1, or None for no average"),
        ({"ema_decay": 0.0}, "got ema_decay=0.0"),
        ({"ema_decay": float("nan")}, "got ema_decay=nan"),
        ({"trainable": lambda path, leaf: False}, "matches no param; the paths are b, w"),
        ({"trainable": []}, "matches no param; the paths are b, w"),
    ],
    ids=lambda x: re.sub(r" at 0x[0-9a-f]+", "", repr(x)),
)
def test_create_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        TrainState.create(linear_model(), OPTIMIZER, KEY, **options)


def test_params_that_lie_under_one_canonical_path_are_still_two():
    """`a_1` and `a/1` read alike: neither may stand in for the other unseen."""
    model = Model(
        lambda rng: ({"a": [jnp.zeros(1), jnp.zeros(1)], "a_1": jnp.zeros(2)}, {}), lambda *a, **k: (None, {})
    )
    with pytest.raises(ValueError, match=r"a/1"):
        TrainState.create(model, OPTIMIZER, KEY, params={"a": [np.zeros(1), np.zeros(5)], "a_1": np.zeros(2)})


# ---- a plain pytree --------------------------------------------------------------------------------------------------


def states():
    """A state of every kind, no field of which has its default value."""
    for scale in (
        NoOpLossScale(),
        StaticLossScale(8.0),
        DynamicLossScale(jnp.float32(64.0), jnp.int32(5), 7, 3.0, 0.25, 2.0**20, 0.125),
    ):
        for trainable, decay in ((None, None), ("head", 0.75)):
            state = TrainState.create(MODEL, OPTIMIZER, KEY, loss_scale=scale, trainable=trainable, ema_decay=decay)
            counters = {"step": jnp.int32(11), "skipped": jnp.int32(3), "skipped_in_a_row": jnp.int32(2)}
            yield dataclasses.replace(state, **counters)


STATES = tuple(states())
every_state = pytest.mark.parametrize("state", STATES, ids=lambda s: f"{type(s.loss_scale).__name__}-{s.ema_decay}")


def same(one, other):
    """Equal to the last byte, static fields and structure included."""
    return jax.tree.structure(one) == jax.tree.structure(other) and fingerprint(one) == fingerprint(other)


@every_state
def test_identity_over_a_state_keeps_every_field(state):
    mapped = jax.tree.map(lambda x: x, state)
    assert same(mapped, state)
    for field in dataclasses.fields(state):
        if field.metadata.get("static"):
            assert getattr(mapped, field.name) == getattr(state, field.name)
    for field in dataclasses.fields(state.loss_scale):
        before, after = getattr(state.loss_scale, field.name), getattr(mapped.loss_scale, field.name)
        assert type(before) is type(after) and before == after, field.name
    assert int(state.attempt) == 14


@every_state
def test_leaves_have_names(state):
    """Checkpoints and errors speak of leaves by path, so the key path names fields, not numbers."""
    paths = set(fingerprint(state))
    assert {"step", "skipped", "skipped_in_a_row", "rng", "params/head/kernel", "mstate/cache/rate"} <= paths
    assert ("loss_scale/loss_scale" in paths) == isinstance(state.loss_scale, DynamicLossScale)
    assert ("ema/head/kernel" in paths) == (state.ema is not None)


@every_state
@pytest.mark.parametrize("placeholder", [object(), None, "sharding", 1.5], ids=lambda x: type(x).__name__)
def test_unflatten_takes_placeholders(state, placeholder):
    leaves, structure = jax.tree.flatten(state)
    held = structure.unflatten([placeholder] * len(leaves))
    assert held.step is placeholder and held.params["head"]["bias"] is placeholder
    assert (held.trainable, held.ema_decay) == (state.trainable, state.ema_decay)
    assert type(held.loss_scale) is type(state.loss_scale)
    if placeholder is not None:
        assert same(jax.tree.structure(held).unflatten(leaves), state)


@every_state
def test_a_state_maps_to_shapes_and_shardings(state):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    assert shapes.params["head"]["kernel"] == jax.ShapeDtypeStruct((2, 2), jnp.float32)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    assert same(jax.device_put(state, shardings), state)


@every_state
def test_a_state_survives_plain_numpy_serialisation(state):
    """What a checkpoint does, without one: leaves by path to bytes, and back into the structure of another state."""
    file = io.BytesIO()
    keyed = jax.tree_util.tree_flatten_with_path(state)[0]
    arrays = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for _, x in keyed]
    np.savez(file, *arrays)
    file.seek(0)
    with np.load(file, allow_pickle=False) as found:
        loaded = [jnp.asarray(found[f"arr_{i}"]) for i in range(len(arrays))]
    leaves = [
        jax.random.wrap_key_data(new) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else new
        for new, (_, x) in zip(loaded, keyed, strict=True)
    ]
    assert same(jax.tree.structure(state).unflatten(leaves), state)


def test_a_state_is_traced_once_through_every_verb():
    """Mapped, saved, put back, passed through jit and unflattened: one trace, since nothing turns weak or Python."""
    state = STATES[-1]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def bump(state):
        return dataclasses.replace(state, step=state.step + 1, loss_scale=state.loss_scale.adjust(jnp.array(True)))

    first = bump(state)
    bump(first)
    bump(jax.tree.map(lambda x: x, first))
    bump(jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(first)))
    bump(jax.device_put(jax.device_get(first), jax.devices()[0]))
    assert int(bump(first).step) == 13


def test_weak_types_and_python_numbers_are_made_strong():
    model = Model(
        lambda rng: ({"w": 0.5, "v": jnp.asarray(1.0)}, {"s": {"n": 1, "x": jnp.asarray(2.0)}}), lambda *a, **k: a
    )
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    scale = DynamicLossScale(32768.0, counter=0)
    state = TrainState.create(model, optimizer, KEY, loss_scale=scale, ema_decay=0.5)
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    assert not [path for path, x in leaves if not isinstance(x, jax.Array) or getattr(x, "weak_type", False)]
    assert state.loss_scale.loss_scale.dtype == jnp.float32 and state.loss_scale.counter.dtype == jnp.int32


@pytest.mark.parametrize(
    "options", [{}, {"optimizer_dtype": None}], ids=lambda x: re.sub(r" at 0x[0-9a-f]+", "", repr(x))
)
def test_an_abstract_state_costs_no_memory(options):
    """`eval_shape` of create gives the shapes that a checkpoint is restored into."""

    def create(key):
        return TrainState.create(linear_model(dtype=jnp.bfloat16), OPTIMIZER, key, ema_decay=0.5, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mpjax.PrecisionWarning)
        shapes, state = jax.eval_shape(create, KEY), create(KEY)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def test_aux_needs_no_metrics():
    assert Aux({}).metrics == {} and Aux({"a": 1}) == ({"a": 1}, {})


def test_the_warning_of_vanishing_updates_names_a_leaf():
    with pytest.warns(mpjax.VanishingUpdateWarning, match=re.escape("bfloat16 (b is one)")):
        TrainState.create(linear_model(dtype=jnp.bfloat16), optax.sgd(0.1), KEY)
