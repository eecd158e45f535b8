"""States and batches on eight devices: where each leaf lies, that it stays there, and that the numbers are those of one."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import mpjax
from mpjax.train.state import TrainState
from mpjax.train.step import make_train_step
from tests.train.meshes import (
    KEY,
    PLACEMENTS,
    ROWS,
    TENSOR,
    agree,
    apart,
    batch_of,
    compiled_quickly,
    compiles,
    masked_loss,
    mean_loss,
    needs_eight,
    perceptron,
    placements_of,
    shards,
)
from tests.train.toys import fingerprint, recording
from tests.wrap.zoo import Block

pytestmark = needs_eight
MESH = PLACEMENTS["data"].mesh if len(jax.devices()) >= 8 else None
GRID = PLACEMENTS["tensor"].mesh if len(jax.devices()) >= 8 else None


ADAM, SGD, RECORDED = optax.adam(1e-2), optax.sgd(0.1), recording(optax.sgd(0.1))


@functools.cache
def created(optimizer=ADAM, dtype=jnp.float32, **options):
    """Made once for all tests that ask for the same: none may donate it."""
    return TrainState.create(perceptron(dtype), optimizer, KEY, None, **options)


@pytest.fixture(autouse=True)
def quick():
    with compiled_quickly():
        yield


# ---- where a leaf lies -----------------------------------------------------------------------------------------------


def specs_of(tree):
    return {path: sharding.spec for path, sharding in placements_of(tree).items()}


def test_fsdp_cuts_one_dimension_that_the_axis_divides():
    assert specs_of(mpjax.shard_state(created(), MESH, mpjax.fsdp(min_size=0)).params) == {
        "up/kernel": P(None, "data"),
        "up/bias": P("data"),
        "down/kernel": P("data"),
        "down/bias": P("data"),
    }
    tall = mpjax.fsdp(min_size=64)  # elements: a bias of 64 is just large enough, one of 16 is not
    assert specs_of(mpjax.shard_state(created(), MESH, tall).params)["up/bias"] == P("data")
    assert specs_of(mpjax.shard_state(created(), MESH, tall).params)["down/bias"] == P()
    assert set(specs_of(mpjax.shard_state(created(), MESH, "fsdp").params).values()) == {P()}  # 2¹⁶ by default
    over_both = mpjax.shard_state(created(), GRID, mpjax.fsdp(("data", "model"), min_size=0))
    assert specs_of(over_both.params)["up/kernel"] == P(None, ("data", "model"))
    whole = mpjax.fsdp(min_size=0).spec((15, 9), 8)
    assert whole == P()


@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ((2048, 8192), 0),  # a kernel along its rows, whichever are more: parts that follow each other in memory
        ((8192, 2048), 0),
        ((50304, 2048), 0),
        ((2052, 8192), 1),  # rows that eight devices cannot share
        ((24, 2048, 8192), 1),  # a stack of layers within the layers
        ((16, 128, 2048), 2),  # heads, of so many features
        ((3, 3, 256, 512), 2),  # a convolution's window
        ((64, 16), 0),  # and of short dimensions the longest
        ((16, 64), 1),
        ((64, 64), 0),
        ((255, 248, 256), 2),
        ((264, 256, 1024), 0),
    ],
)
def test_fsdp_cuts_the_first_long_dimension_and_of_short_ones_the_longest(shape, cut):
    assert mpjax.fsdp(min_size=0).spec(shape, 8) == P(*[None] * cut, "data")


def test_the_first_rule_that_matches_wins_and_a_glob_means_the_subtree():
    rules = {"up/bias": P(), "up": P(None, "model"), "**/kernel": mpjax.fsdp("data", min_size=0)}
    with pytest.raises(ValueError, match=r"rule 'up' gives .* to up/bias, which has 1 dimensions \(64,\)"):
        mpjax.shard_state(created(), GRID, {"up": P(None, "model")})
    specs = specs_of(mpjax.shard_state(created(), GRID, rules).params)
    assert specs == {"up/bias": P(), "up/kernel": P(None, "model"), "down/kernel": P("data"), "down/bias": P()}


OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "chained": optax.chain(optax.clip_by_global_norm(1.0), optax.add_noise(0.1, 0.5, 0), optax.adamw(1e-2)),
    "masked": optax.masked(optax.adam(1e-2), {"up": True, "down": {"kernel": True, "bias": False}}),
    "parted": optax.multi_transform(
        {"a": optax.adam(1e-2), "b": optax.sgd(1e-2, momentum=0.9)}, {"up": "a", "down": "b"}
    ),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(1e-2, 0, 9)),
    "repeated": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer_state_and_average_lie_beside_their_params(optimizer):
    state = created(optimizer, ema_decay=0.9)
    placed = mpjax.shard_state(state, GRID, TENSOR)
    of_param = {"up/kernel": P(None, "model"), "up/bias": P("model"), "down/kernel": P("model")}
    assert specs_of(placed.ema) == specs_of(placed.params) == of_param | {"down/bias": P()}
    leaves = jax.tree_util.tree_flatten_with_path(placed.opt_state)[0]
    seen = set()
    for path, spec in specs_of(placed.opt_state).items():
        name = next((name for name in of_param if path.endswith(name)), None)
        assert spec == of_param.get(name, P()), path
        seen.add(name)
    assert seen >= set(of_param) and len(leaves) > 4
    assert fingerprint(placed) == fingerprint(state)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    rest = (placed.step, placed.skipped, placed.loss_scale, placed.rng, placed.mstate)
    assert all(x.sharding.is_fully_replicated and len(x.sharding.device_set) == 8 for x in jax.tree.leaves(rest))


def test_factored_moments_are_no_params_shape_and_stay_whole():
    optimizer = optax.adafactor(1e-2, min_dim_size_to_factor=8)
    placed = mpjax.shard_state(created(optimizer), GRID, TENSOR)
    specs = specs_of(placed.opt_state)
    rows = {path: spec for path, spec in specs.items() if "v_row" in path or "v_col" in path}
    assert rows and set(rows.values()) == {P()}
    assert [spec for path, spec in specs.items() if path.endswith("/v/up/bias")] == [P("model")]  # not factored
    step = make_train_step(mean_loss(), optimizer)
    after, _ = step(placed, mpjax.shard_batch(batch_of(), GRID))
    assert specs_of(after.opt_state) == specs


def test_a_frozen_param_is_placed_and_has_no_twin():
    state = created(trainable="down", ema_decay=0.9)
    placed = mpjax.shard_state(state, GRID, TENSOR)
    assert specs_of(placed.params)["up/kernel"] == P(None, "model")
    assert set(specs_of(placed.ema)) == {"down/kernel", "down/bias"}


def test_the_longest_path_is_the_twin():
    """`kernel` at the top and `up/kernel` have one shape here; a moment of the one is not a moment of the other."""
    params = {"kernel": jnp.zeros((8, 8)), "up": {"kernel": jnp.zeros((8, 8))}}
    state = TrainState.create(mpjax.Model(lambda key: (params, {}), print), optax.adam(1.0), KEY)
    placed = mpjax.shard_state(state, MESH, {"up/kernel": P("data"), "kernel": P(None, "data")})
    assert specs_of(placed.opt_state[0].mu) == {"kernel": P(None, "data"), "up/kernel": P("data")}


def test_a_bare_array_of_params():
    state = TrainState.create(mpjax.Model(lambda key: (jnp.zeros((16, 3)), {}), print), optax.adam(1.0), KEY)
    placed = mpjax.shard_state(state, MESH, mpjax.fsdp(min_size=0))
    assert placed.params.sharding.spec == placed.opt_state[0].nu.sharding.spec == P("data")


def test_a_step_leaves_the_callers_arrays_alive():
    """`device_put` to all devices reuses the buffer on the first, and donating its result would delete the original."""
    state = created(ema_decay=0.9)
    before = fingerprint(state)
    step = make_train_step(mean_loss(), ADAM)
    for rules in (None, mpjax.fsdp(min_size=0)):
        step(mpjax.shard_state(state, MESH, rules), mpjax.shard_batch(batch_of(), MESH))
        assert fingerprint(state) == before
    placed = mpjax.shard_state(state, MESH)
    step(mpjax.shard_state(placed, MESH), mpjax.shard_batch(batch_of(), MESH))
    assert fingerprint(placed) == before


def test_a_state_is_made_where_it_lies():
    create = functools.partial(TrainState.create, perceptron(), ADAM)
    shapes = jax.eval_shape(create, KEY)
    shardings = mpjax.state_shardings(shapes, GRID, TENSOR)
    assert jax.tree.structure(shardings) == jax.tree.structure(shapes)
    state = jax.jit(create, out_shardings=shardings)(KEY)
    assert placements_of(state) == placements_of(mpjax.shard_state(create(KEY), GRID, TENSOR))
    assert apart(state.params, create(KEY).params) == 0


def test_every_axis_is_automatic():
    """`jax.make_mesh` makes explicit axes, on which a product with a cut kernel does not trace."""
    assert set(GRID.axis_types) == {AxisType.Explicit}
    assert set(mpjax.shard_state(created(), GRID, TENSOR).step.sharding.mesh.axis_types) == {AxisType.Auto}
    assert set(mpjax.shard_batch(batch_of(), GRID)["x"].sharding.mesh.axis_types) == {AxisType.Auto}


def test_a_step_under_a_mesh_of_explicit_axes_is_refused():
    """jax would: "For primitive add, context mesh … should match the aval mesh"."""
    state, step = mpjax.shard_state(created(), MESH), make_train_step(mean_loss(), ADAM, mesh=MESH)
    batch = mpjax.shard_batch(batch_of(), MESH)
    with (
        jax.set_mesh(MESH),
        pytest.raises(ValueError, match=r"mesh of Explicit axes, 'data', .* leave jax.set_mesh out"),
    ):
        step(state, batch)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))):
        assert step.lower(state, batch)


# ---- Flax's own metadata ---------------------------------------------------------------------------------------------


def test_a_linen_box_speaks_where_no_rule_does():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = mpjax.wrap(nn.Sequential([nn.Dense(8, kernel_init=init), nn.Dense(4)]), "mixed_bfloat16")
    optimizer = optax.adam(1e-2)
    state = TrainState.create(model, optimizer, KEY, jnp.ones((1, 4)))
    placed = mpjax.shard_state(state, GRID)
    layers = placed.params
    assert isinstance(layers["layers_0"]["kernel"], nn.Partitioned)
    assert layers["layers_0"]["kernel"].value.sharding.spec == P(None, "model")
    assert layers["layers_1"]["kernel"].sharding.spec == P()
    assert placed.opt_state[0].mu["layers_0"]["kernel"].value.sharding.spec == P(None, "model")
    ruled = mpjax.shard_state(state, GRID, {"layers_0/kernel": P("data")})
    assert ruled.params["layers_0"]["kernel"].value.sharding.spec == P("data")
    with pytest.raises(
        ValueError,
        match=r"its own metadata \(a rule overrides it\): dimension 1 of layers/0/kernel.* 'model', which this mesh",
    ):
        mpjax.shard_state(state, MESH)

    def loss_fn(params, mstate, batch, rng):
        return jnp.square(model.apply(params, mstate, batch["x"][:, :4])[0]).mean()

    before = placements_of(placed)
    after, metrics = make_train_step(loss_fn, optimizer)(placed, mpjax.shard_batch(batch_of(), GRID))
    assert placements_of(after) == before and np.isfinite(float(metrics["loss"]))


def test_an_array_that_lies_on_the_mesh_stays_where_no_rule_speaks():
    """As an NNX model comes that was made sharded: its arrays carry their place."""
    params = created().params
    for mesh in (GRID, Mesh(GRID.devices, GRID.axis_names)):
        cut = jax.device_put(params["up"]["kernel"], NamedSharding(mesh, P(None, "model")))
        mixed = params | {"up": {"kernel": cut, "bias": params["up"]["bias"]}}
        state = TrainState.create(perceptron(), ADAM, KEY, None, params=mixed)
        placed = mpjax.shard_state(state, GRID)
        assert specs_of(placed.params)["up/kernel"] == P(None, "model")
        assert specs_of(placed.opt_state[0].mu)["up/kernel"] == P(None, "model")
        assert specs_of(placed.params)["up/bias"] == P()
    assert specs_of(mpjax.shard_state(state, GRID, {"up/kernel": P()}).params)["up/kernel"] == P()
    assert specs_of(mpjax.shard_state(state, MESH).params)["up/kernel"] == P()  # another mesh


# ---- errors ----------------------------------------------------------------------------------------------------------

BAD_RULES = {
    "misspelt": (
        {"upp/kernel": P("data")},
        "rule 'upp/kernel' matches no param; the paths are down/bias, down/kernel, up",
    ),
    "shadowed": (
        {"**": P(), "up": P("data")},
        r"rule 'up' never acts: an earlier rule takes all that it matches \(up/bias, up/kernel\)",
    ),
    "long": ({"up/bias": P(None, "data")}, r"to up/bias, which has 1 dimensions \(64,\); legal is one entry for each"),
    "axis": (
        {"up/bias": P("tensor")},
        r"dimension 0 of up/bias is to lie along the mesh axis 'tensor', which this mesh lacks; it has 'data' \(4\), 'model' \(2\)",
    ),
    "fsdp axis": (mpjax.fsdp("rows"), "is to lie along the mesh axis 'rows', which this mesh lacks"),
    "indivisible": (
        {"up/kernel": P("data")},
        r"cuts dimension 0 of up/kernel, 15 of \(15, 64\), over the 4 devices of mesh axis 'data', which do not divide it",
    ),
    "product": ({"down/bias": P(None)} | {"up/kernel": P(("data", "model"))}, "over the 8 devices of mesh axis"),
    "twice": ({"down/kernel": P("data", "data")}, "names the mesh axis 'data' twice"),
    "text": ({"up": "fdsp"}, "rule 'up' gives 'fdsp' to up/bias; legal is a jax.sharding.PartitionSpec, 'fsdp'"),
}


@pytest.mark.parametrize(("rules", "message"), BAD_RULES.values(), ids=BAD_RULES)
def test_a_rule_that_cannot_act_is_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        mpjax.shard_state(created(), GRID, rules)


def test_a_minimum_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="got min_size=-1; legal is a number of elements"):
        mpjax.fsdp(min_size=-1)


def test_a_batch_that_the_devices_do_not_divide_is_refused():
    batch = {"image": np.ones((32, 3)), "label": {"a": np.ones(30), "b": 1.0}}
    message = r"batch\[label/a\] has 30 rows, which the 8 devices of mesh axis 'data' .*; use a multiple of 8 rows, such as 24"
    with pytest.raises(ValueError, match=message):
        mpjax.shard_batch(batch, MESH)
    with pytest.raises(ValueError, match=r"the batch has 3 rows.*such as 8"):
        mpjax.shard_batch(np.ones(3), GRID, ("data", "model"))
    with pytest.raises(ValueError, match="the batch is to lie along the mesh axis 'rows', which this mesh lacks"):
        mpjax.shard_batch(batch, MESH, "rows")
    placed = mpjax.shard_batch({"x": np.ones((16, 3)), "t": 1.0}, GRID, ("data", "model"))
    assert placed["x"].sharding.spec == P(("data", "model")) and placed["t"].sharding.spec == P()
    assert {shard.data.shape for shard in placed["x"].addressable_shards} == {(2, 3)}


def test_micro_batches_that_the_devices_do_not_divide_are_refused():
    step = make_train_step(mean_loss(), ADAM, accumulate=4, mesh=MESH)
    state = mpjax.shard_state(created(), MESH)
    with pytest.raises(
        ValueError, match=r"batch\[mask\] has 48 rows, which the accumulate=4 micro-batches on 8 devices"
    ):
        step(state, mpjax.shard_batch(batch_of(48), MESH))


# ---- eight devices against one (FAULTS 20) ---------------------------------------------------------------------------

TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2}
STEPS = 20


@functools.cache
def on_one_device(dtype):
    step = make_train_step(masked_loss(dtype), RECORDED, donate=False)
    return steps_from(created(RECORDED, dtype, ema_decay=0.9), step, lambda batch: batch)[1:]


def steps_from(state, step, place):
    """The state after 20 steps; loss, metric and gradients of the first; params, average and statistics of the last."""
    first = None
    for seed in range(STEPS):
        state, metrics = step(state, place(batch_of(seed=seed)))
        first = first or jax.device_get(
            (metrics["loss"], metrics["error"], metrics["grad_norm"], state.opt_state[0].grads)
        )
    return state, first, jax.device_get((state.params, state.ema, state.mstate))


RUNS = [(name, jnp.float32) for name in PLACEMENTS] + [(name, jnp.bfloat16) for name in ("data", "fsdp+tensor")]


@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=lambda value: getattr(value, "__name__", value))
def test_eight_devices_give_the_numbers_of_one_and_every_leaf_stays_where_it_was(name, dtype, caplog):
    """Relative to the largest element of each leaf: sums over 48 rows of float32 (eps 1.2e-7) in another order differ by a
    few eps, of bfloat16 (eps 7.8e-3) by a few of those, and 20 steps of SGD do not amplify them. Adam would: it divides
    a gradient that is zero but for round-off by its own size.
    """
    placed = PLACEMENTS[name]
    state = mpjax.shard_state(created(RECORDED, dtype, ema_decay=0.9), placed.mesh, placed.rules)
    before = placements_of(state)
    step = make_train_step(masked_loss(dtype), RECORDED, mesh=placed.mesh)
    with jax.log_compiles():
        state, *found = steps_from(state, step, lambda batch: mpjax.shard_batch(batch, placed.mesh))
    assert compiles(caplog) == 1
    assert placements_of(state) == before and int(state.step) == STEPS
    for many, one in zip(found, on_one_device(dtype), strict=True):
        assert apart(many, one) <= TOLERANCE[dtype]


def test_what_came_whole_is_not_cut_by_the_step():
    """Left to itself GSPMD returns a bias as its gradient lies, cut like the kernel beside it; the next step is another."""
    rules = {"up/kernel": P(None, "model"), "down/kernel": P("model", "data")}
    state = mpjax.shard_state(created(), GRID, rules)
    before = placements_of(state)
    state, _ = make_train_step(mean_loss(), ADAM)(state, mpjax.shard_batch(batch_of(), GRID))
    assert placements_of(state) == before


def test_a_number_that_was_put_into_the_state_goes_to_every_device_and_an_array_is_refused():
    """Who begins to count anew, or gives another scale, key or optimizer, makes it on one device."""
    rules, step = PLACEMENTS["fsdp"].rules, make_train_step(mean_loss(), ADAM)
    batch = mpjax.shard_batch(batch_of(), MESH)
    state = mpjax.shard_state(created(), MESH, rules)
    before = placements_of(state)
    scale = mpjax.dynamic_loss_scale(8.0)
    put = {"step": jnp.int32(0), "rng": jax.random.key(5), "opt_state": ADAM.init(state.params), "loss_scale": scale}
    after, _ = step(dataclasses.replace(state, **put), batch)
    assert float(after.loss_scale.loss_scale) == 8.0
    there = placements_of(after)
    assert {path: there[path] for path in before} == before
    assert {there[path].spec for path in there.keys() - before.keys()} == {P()}

    for whole in (created().params, jax.tree.map(np.asarray, created().params)):
        state = dataclasses.replace(after, params=whole)
        with pytest.raises(ValueError, match=r"its params/down/bias of shape \(16,\) does not; place all of it anew"):
            step(state, batch)
    assert placements_of(mpjax.shard_state(state, MESH, rules).params) == placements_of(after.params)


class LM(nn.Module):
    """One block and tied embeddings: enough for every kind of collective, and compiled in seconds."""

    @nn.compact
    def __call__(self, tokens, train=False):
        embed = nn.Embed(48, 32, name="embed")
        return embed.attend(Block(32, name="block")(embed(tokens), train))


@pytest.mark.slow
def test_a_linen_transformer_under_fsdp_and_tensor_parallelism():
    model = mpjax.wrap(LM(), "mixed_bfloat16")
    tokens = np.random.default_rng(0).integers(0, 48, (ROWS // 3, 6))
    optimizer = optax.sgd(0.1)

    def loss_fn(params, mstate, batch, rng):
        logits, mstate = model.apply(params, mstate, batch, rng=rng, train=True)
        labels = jnp.roll(batch, -1, axis=1)
        return mpjax.losses.softmax_cross_entropy(logits, labels).mean(), mpjax.Aux(mstate)

    state = TrainState.create(model, optimizer, KEY, tokens[:1], ema_decay=0.9)
    rules = {
        "embed": P("model", "data"),
        "**/up/kernel": P("data", "model"),
        "**/kernel": mpjax.fsdp(min_size=64),
    }
    placed = mpjax.shard_state(state, GRID, rules)
    cut = {path for path, spec in specs_of(placed.params).items() if "data" in spec}
    assert {"embed/embedding", "block/attention/query/kernel", "block/up/kernel"} <= cut
    before = placements_of(placed)
    step = make_train_step(loss_fn, optimizer)
    placed, many = step(placed, mpjax.shard_batch(tokens, GRID))
    state, one = step(state, tokens)
    assert placements_of(placed) == before
    assert apart(many["loss"], one["loss"]) <= TOLERANCE[jnp.bfloat16]
    assert apart(many["grad_norm"], one["grad_norm"]) <= TOLERANCE[jnp.bfloat16]


# ---- a NaN on one of eight devices (FAULTS 18) -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reduce_dtype", "accumulate"),
    [
        *itertools.product(["data"], [None, "float32"], [1, 2]),
        ("data", "bfloat16", 1),
        ("fsdp", None, 2),
        ("fsdp", "bfloat16", 1),
        ("tensor", "float32", 2),
    ],
)
def test_a_nan_on_one_device_skips_the_step_on_all(name, reduce_dtype, accumulate):
    placed = PLACEMENTS[name]
    state = mpjax.shard_state(created(ADAM, jnp.float16, ema_decay=0.9), placed.mesh, placed.rules)
    loss_fn = masked_loss(jnp.float16)
    step = make_train_step(loss_fn, ADAM, accumulate=accumulate, mesh=placed.mesh, reduce_dtype=reduce_dtype)

    def held(state):
        return shards((state.params, state.mstate, state.opt_state, state.ema, state.rng, state.step))

    for row in (29, 0):  # on the sixth and the first of eight devices
        before = held(state)
        batch = batch_of()
        batch["x"][row, 7], batch["mask"][row] = np.nan, 1
        skipped = int(state.skipped)
        state, metrics = step(state, mpjax.shard_batch(batch, placed.mesh))
        assert held(state) == before
        assert agree((state.loss_scale, state.skipped, state.skipped_in_a_row, state.step, metrics))
        assert int(state.skipped) == skipped + 1 and not bool(metrics["grads_finite"])
        assert float(state.loss_scale.loss_scale) == float(metrics["loss_scale"]) / 2
    state, metrics = step(state, mpjax.shard_batch(batch_of(), placed.mesh))
    assert int(state.step) == 1 and agree((state.loss_scale, state.mstate)) and bool(metrics["grads_finite"])
    assert held(state) != before
