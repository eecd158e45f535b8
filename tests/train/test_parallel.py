"""What runs between devices, read in the HLO; and `reduce_dtype`, whose step is the same step."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import mpjax
from mpjax.core.model import Model
from mpjax.train.parallel import _agreed
from mpjax.train.specs import automatic
from mpjax.train.state import Aux, TrainState
from mpjax.train.step import make_train_step
from tests.train.meshes import (
    KEY,
    KINDS,
    PLACEMENTS,
    ROWS,
    TENSOR,
    WIDTHS,
    agree,
    apart,
    batch_of,
    collectives,
    compiled_quickly,
    masked_loss,
    mean_loss,
    needs_eight,
    partitioned,
    perceptron,
    placements_of,
)
from tests.train.toys import held, recording

pytestmark = needs_eight
MESH = PLACEMENTS["data"].mesh if len(jax.devices()) >= 8 else None
SGD, RECORDED = optax.sgd(0.1), recording(optax.sgd(0.1))
MANY = 480
GRADIENTS = {WIDTHS[1:], WIDTHS[:2], WIDTHS[1:2], WIDTHS[2:]}


@functools.cache
def created(optimizer=SGD, dtype=jnp.float32):
    return TrainState.create(perceptron(dtype), optimizer, KEY, None)


@pytest.fixture
def quick():
    with compiled_quickly():
        yield


def lowered(name, dtype=jnp.float32, rows=MANY, **options):
    placed = PLACEMENTS[name]
    state = mpjax.shard_state(created(dtype=dtype), placed.mesh, placed.rules)
    step = make_train_step(mean_loss(dtype), SGD, mesh=placed.mesh, **options)
    return step.lower(state, mpjax.shard_batch(batch_of(rows), placed.mesh))


@functools.cache
def one_device_flops():
    return make_train_step(mean_loss(), SGD).lower(created(), batch_of(MANY)).compile().cost_analysis()["flops"]


# ---- what moves between devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("data", {}),
        ("data", {"accumulate": 2}),
        ("data", {"accumulate": 2, "reduce_dtype": "float32"}),
        ("fsdp", {"accumulate": 2}),
        ("fsdp", {"reduce_dtype": "float32"}),
        ("tensor", {"accumulate": 2, "reduce_dtype": "float32"}),
        ("fsdp+tensor", {"accumulate": 2}),
    ],
)
def test_no_row_of_a_batch_moves_and_none_is_computed_twice(name, options):
    """Every row is known by the shape that it is in: no dimension of a param is a number of rows. Sums over the model
    axis (all-reduce) are what tensor parallelism consists of; gathers and exchanges of rows are not. The FLOPs of one
    device are an eighth of one device's alone, to 10 %: elementwise work on params that are whole is done by all.
    """
    compiled = lowered(name, **options).compile()
    rows = {MANY // cut for cut in (1, 2, 4, 8, 16)}
    moved = [c for c in collectives(compiled.as_text()) if rows & set(c.shape)]
    assert [c for c in moved if name in ("data", "fsdp") or c.kind != "all-reduce"] == []
    assert compiled.cost_analysis()["flops"] <= one_device_flops() / 8 * 1.1


@pytest.mark.parametrize("name", ["fsdp", "fsdp+tensor"])
def test_params_cut_over_the_batchs_axis_are_made_whole_and_not_the_batch(name):
    """With fewer rows than a kernel has columns GSPMD, left to itself, gathers the rows and computes its columns for all."""
    found = collectives(lowered(name, rows=48).compile().as_text())
    assert [c for c in found if {48, 24, 12, 6} & set(c.shape) and c.kind != "all-reduce"] == []
    assert any(c.kind == "all-gather" and 15 in c.shape for c in found)


def test_the_reader_of_hlo_sees_rows_that_move():
    """Micro-batches cut the other way, in runs of rows, are spread anew over the devices."""

    def loss_fn(params, batch):
        parts = batch["x"].reshape(2, MANY // 2, -1)
        return sum((jnp.tanh(part @ params["up"]["kernel"]) ** 2).mean() for part in parts)

    state = mpjax.shard_state(created(), MESH)
    moved = jax.jit(jax.grad(loss_fn)).lower(state.params, mpjax.shard_batch(batch_of(MANY), MESH))
    found = collectives(moved.compile().as_text())
    assert any(MANY // 2 in c.shape or MANY // 16 in c.shape or MANY // 8 in c.shape for c in found)


# ---- in which dtype gradients are summed -----------------------------------------------------------------------------


def sums_of_gradients(hlo):
    """Every sum over the devices of something of a param's shape (or its transpose), or of which each then has an eighth."""
    shapes = GRADIENTS | {shape[::-1] for shape in GRADIENTS}
    eighths = {(*shape[:i], shape[i] // 8, *shape[i + 1 :]) for shape in shapes for i in range(len(shape))}
    legal = {"all-reduce": shapes, "reduce-scatter": eighths}
    return [c for c in collectives(hlo) if c.shape in legal.get(c.kind, ())]


@pytest.mark.parametrize(("dtype", "short"), [(jnp.bfloat16, "bf16"), (jnp.float16, "f16")])
def test_gspmd_sums_gradients_in_the_dtype_of_their_product(dtype, short, tmp_path):
    """Read right behind the pass that cuts the program up (`spmd-partitioning`): the CPU then widens products and sums of
    bfloat16 to float32 for want of instructions (`float-normalization-bf16`); it leaves those of float16. With
    accumulation the sums run in the loop, once in every micro-batch.
    """
    found, finished = map(sums_of_gradients, partitioned(lowered("data", dtype, accumulate=2), tmp_path))
    assert len(found) == 4 and {c.dtype for c in found} == {short}
    assert len(finished) == 4 and all(c.looped for c in finished)
    assert {c.dtype for c in finished} == {"f32" if short == "bf16" else short}


@pytest.mark.parametrize(
    ("name", "dtype", "accumulate", "reduce_dtype", "short"),
    [
        ("data", jnp.bfloat16, 2, "float32", "f32"),
        ("data", jnp.float16, 1, "float32", "f32"),
        ("fsdp", jnp.float16, 2, "float32", "f32"),
        ("data", jnp.float32, 2, "bfloat16", "bf16"),
        ("fsdp", jnp.bfloat16, 2, "bfloat16", "bf16"),
        ("fsdp", jnp.float16, 1, "bfloat16", "bf16"),
    ],
)
def test_with_reduce_dtype_each_gradient_is_summed_once_in_it_behind_the_loop(
    name, dtype, accumulate, reduce_dtype, short, tmp_path
):
    """Of a kernel that is cut up each device is given its part of the sum, and no device the whole. The CPU widens sums of
    bfloat16 behind the pass that cuts the program up, as above.
    """
    kernels = "reduce-scatter" if name == "fsdp" else "all-reduce"
    program = lowered(name, dtype, accumulate=accumulate, reduce_dtype=reduce_dtype)
    finished = "f32" if short == "bf16" else short
    for hlo, summed in zip(partitioned(program, tmp_path), (short, finished), strict=True):
        found = sums_of_gradients(hlo)
        assert sorted(c.kind for c in found) == sorted(["all-reduce"] * 2 + [kernels] * 2)
        assert {c.dtype for c in found} == {summed}
        assert not any(c.looped for c in collectives(hlo))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_without_weight_and_state_has_one_sum_over_the_devices(accumulate):
    """Of gradients and loss, behind the backward pass. How many devices there are, and that a state which does not exist is
    finite, is known without asking them: each of these was a wait of its own.
    """
    model = Model(lambda rng, *sample: ({"w": jnp.ones(WIDTHS[:2])}, {}), lambda params, *rest, **more: rest)
    state = mpjax.shard_state(TrainState.create(model, SGD, KEY, None), MESH)
    step = make_train_step(
        lambda params, mstate, batch, rng: jnp.tanh(batch["x"] @ params["w"]).mean(), SGD,
        accumulate=accumulate, mesh=MESH, reduce_dtype="float32",
    )  # fmt: skip
    hlo = step.lower(state, mpjax.shard_batch(batch_of(MANY), MESH)).compile().as_text()
    assert sorted(c.shape for c in collectives(hlo)) == [(), WIDTHS[:2]]
    assert len(re.findall(rf" (?:{KINDS})(?:-start)?\(", hlo)) == 1


# ---- in which dtype cut params are made whole ------------------------------------------------------------------------


@pytest.mark.parametrize("reduce_dtype", [None, "float32"])
@pytest.mark.parametrize(("dtype", "short"), [(jnp.bfloat16, "bf16"), (jnp.float16, "f16"), (jnp.float32, "f32")])
def test_cut_params_move_in_the_dtype_in_which_they_are_used(dtype, short, reduce_dtype, tmp_path):
    """As above the CPU widens bfloat16 only behind the pass that cuts the program up."""
    hlo, _ = partitioned(lowered("fsdp", dtype, reduce_dtype=reduce_dtype), tmp_path)
    kernels = {WIDTHS[:2], WIDTHS[1:], WIDTHS[:2][::-1], WIDTHS[1:][::-1]}
    moved = [c for c in collectives(hlo) if c.kind == "all-gather" and c.shape in kernels]
    assert len(moved) == 2 and {c.dtype for c in moved} == {short}


@pytest.mark.parametrize("reduce_dtype", [None, "float32"])
def test_a_param_with_a_use_beside_the_cast_keeps_its_dtype(reduce_dtype, tmp_path):
    """A penalty on one kernel is computed in float32."""
    inner = mean_loss(jnp.bfloat16)

    def loss_fn(params, mstate, batch, rng):
        loss, aux = inner(params, mstate, batch, rng)
        return loss + 0.1 * jnp.square(params["up"]["kernel"]).sum(), aux

    state = mpjax.shard_state(created(dtype=jnp.bfloat16), MESH, PLACEMENTS["fsdp"].rules)
    step = make_train_step(loss_fn, SGD, mesh=MESH, reduce_dtype=reduce_dtype)
    hlo, _ = partitioned(step.lower(state, mpjax.shard_batch(batch_of(MANY), MESH)), tmp_path)
    moved = {c.dtype: c.shape for c in collectives(hlo) if c.kind == "all-gather" and len(c.shape) == 2}
    assert set(moved) == {"f32", "bf16"} and set(moved["f32"]) == set(WIDTHS[:2])


# ---- the same step ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("name", "dtype", "accumulate", "loss", "apart_in", "tolerance"),
    [
        ("data", jnp.float32, 1, masked_loss, "float32", 2e-6),
        ("data", jnp.float32, 2, masked_loss, "float32", 2e-6),
        ("fsdp", jnp.float32, 2, mean_loss, "float32", 2e-6),
        ("tensor", jnp.bfloat16, 2, masked_loss, "float32", 2e-2),
        ("fsdp", jnp.bfloat16, 1, masked_loss, "float32", 2e-2),
        ("fsdp+tensor", jnp.float32, 2, masked_loss, "float32", 2e-6),
        ("fsdp+tensor", jnp.bfloat16, 1, mean_loss, "float32", 2e-2),
        ("data", jnp.bfloat16, 2, masked_loss, "bfloat16", 2e-2),
        ("fsdp+tensor", jnp.bfloat16, 1, masked_loss, "bfloat16", 2e-2),
        ("fsdp", jnp.float32, 2, masked_loss, "bfloat16", 2e-2),
    ],
)
def test_reduced_apart_the_step_is_the_same(name, dtype, accumulate, loss, apart_in, tolerance):
    """Against GSPMD's own, with weights that differ from device to device; tolerances as in `test_sharding`."""
    placed = PLACEMENTS[name]
    found = []
    for reduce_dtype in (None, apart_in):
        state = mpjax.shard_state(created(RECORDED, dtype), placed.mesh, placed.rules)
        before = placements_of(state)
        step = make_train_step(
            loss(dtype), RECORDED, accumulate=accumulate, mesh=placed.mesh, reduce_dtype=reduce_dtype, clip_norm=0.3
        )
        for seed in range(3):
            state, metrics = step(state, mpjax.shard_batch(batch_of(seed=seed), placed.mesh))
        assert placements_of(state) == before
        found.append(jax.device_get((metrics, state.params, state.mstate, state.opt_state)))
    assert apart(found[1], found[0]) <= tolerance


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("trainable", [None, "down/**"])
def test_params_cut_over_one_of_the_batchs_two_axes(trainable):
    """Each gradient is cut over one and summed over the other; frozen params are made whole, too, and have none."""
    grid, axes = PLACEMENTS["tensor"].mesh, ("data", "model")
    found = []
    for rules in (None, mpjax.fsdp("data", min_size=100), mpjax.fsdp(("model", "data"), min_size=100)):
        state = TrainState.create(perceptron(), RECORDED, KEY, None, trainable=trainable)
        state = mpjax.shard_state(state, grid, rules)
        before = placements_of(state)
        step = make_train_step(masked_loss(), RECORDED, mesh=grid, axis=axes, reduce_dtype="float32")
        state, metrics = step(state, mpjax.shard_batch(batch_of(), grid, axes))
        assert placements_of(state) == before
        found.append(jax.device_get((metrics, state.params, state.opt_state)))
    assert apart(found[1], found[0]) <= 2e-6 and apart(found[2], found[0]) <= 2e-6
    start = created(RECORDED).params
    moved = {name: not np.array_equal(start[name]["kernel"], found[0][1][name]["kernel"]) for name in start}
    assert moved == {"up": trainable is None, "down": True}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["data", "fsdp"])
def test_a_derivative_written_by_hand_may_use_the_batch_that_stands_around_it(name):
    """Its rules are called after the trace of the loss, where a tracer of that trace would be dead."""

    def loss_fn(params, mstate, batch, rng):
        @jax.custom_vjp
        def masked(y):
            return y * batch["mask"][:, None]

        masked.defvjp(lambda y: (masked(y), None), lambda _, g: (g * batch["mask"][:, None],))
        return jnp.square(masked(batch["x"] @ params["up"]["kernel"])).mean()

    placed = PLACEMENTS[name]
    state = mpjax.shard_state(created(RECORDED), placed.mesh, placed.rules)
    many, _ = make_train_step(loss_fn, RECORDED)(state, mpjax.shard_batch(batch_of(), placed.mesh))
    one, _ = make_train_step(loss_fn, RECORDED, donate=False)(created(RECORDED), batch_of())
    assert apart(*(jax.device_get((x.params["up"], x.opt_state[0].grads["up"]["kernel"])) for x in (many, one))) <= 2e-6


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("trainable", [None, "w"])
@pytest.mark.parametrize("rules", [None, mpjax.fsdp(min_size=1)])
def test_a_none_among_the_params_is_neither_trained_nor_frozen(rules, trainable):
    model = mpjax.Model(lambda key: ({"bias": None, "other": jnp.ones(8), "w": jnp.ones(8)}, {}), print)
    state = mpjax.shard_state(TrainState.create(model, SGD, KEY, trainable=trainable), MESH, rules)
    step = make_train_step(
        lambda params, mstate, batch, rng: (params["w"] * params["other"] * batch.mean(0)).sum(),
        SGD, mesh=MESH, reduce_dtype="float32",
    )  # fmt: skip
    after, _ = step(state, mpjax.shard_batch(np.arange(64, dtype=np.float32).reshape(8, 8), MESH))
    moved = 1 - np.float32(0.1) * np.arange(28, 36, dtype=np.float32)  # the mean of eight rows, exact in float32
    assert after.params["bias"] is None
    np.testing.assert_allclose(after.params["w"], moved, rtol=1e-6)
    np.testing.assert_allclose(after.params["other"], moved if trainable is None else np.ones(8), rtol=1e-6)


class Boxed(nn.Module):
    """Its kernel lies where its box says."""

    names: tuple
    width: int = 16

    @nn.compact
    def __call__(self, x_BxD):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), self.names)
        return nn.Dense(self.width, kernel_init=init, name="up")(x_BxD)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("names", [(None, "data"), ("data", "model"), (None, ("model", "data")), (None, "model")])
def test_reduced_apart_boxes_that_name_the_batchs_axis_are_opened(names):
    """Flax asks for the placement of a box where it opens it, which is inside of what each device does alone."""
    model, mesh = mpjax.wrap(Boxed(names), "float32"), PLACEMENTS["tensor"].mesh

    def loss_fn(params, mstate, batch, rng):
        return jnp.square(model.apply(params, mstate, batch)[0]).mean()

    batch = batch_of()["y"]
    found = []
    for reduce_dtype in (None, "float32"):
        state = mpjax.shard_state(TrainState.create(model, SGD, KEY, batch), mesh)
        before = placements_of(state)
        step = make_train_step(loss_fn, SGD, mesh=mesh, reduce_dtype=reduce_dtype)
        state, metrics = step(state, mpjax.shard_batch(batch, mesh))
        assert placements_of(state) == before and isinstance(state.params["up"]["kernel"], nn.Partitioned)
        found.append(jax.device_get((metrics, state.params)))
    assert apart(found[1], found[0]) <= 2e-6


@pytest.mark.usefixtures("quick")
def test_a_box_that_asks_for_its_place_does_not_undo_the_gather():
    """Under `jax.set_mesh` Flax cut the kernel up again, and every device computed its columns for all rows."""
    model, batch = mpjax.wrap(Boxed((None, "data"), 512), "float32"), batch_of()["y"]
    with jax.set_mesh(automatic(MESH)):
        state = mpjax.shard_state(TrainState.create(model, SGD, KEY, batch), MESH)
        step = make_train_step(lambda p, m, x, rng: jnp.square(model.apply(p, m, x)[0]).mean(), SGD, mesh=MESH)
        found = collectives(step.lower(state, mpjax.shard_batch(batch, MESH)).compile().as_text())
    assert {c.shape for c in found if c.kind == "all-gather"} == {(16, 512)}
    assert not [c for c in found if ROWS in c.shape]


@pytest.mark.usefixtures("quick")
def test_one_device_along_the_batchs_axis_has_nothing_to_sum():
    """XLA refused the sum over one device where the other axis has eight: a RET_CHECK of its partitioner."""
    mesh = jax.make_mesh((1, 8), ("data", "model"))
    found = []
    for reduce_dtype in (None, "float32"):
        state = mpjax.shard_state(created(RECORDED), mesh, TENSOR)
        step = make_train_step(masked_loss(), RECORDED, mesh=mesh, reduce_dtype=reduce_dtype)
        state, metrics = step(state, mpjax.shard_batch(batch_of(), mesh))
        found.append(jax.device_get((metrics, state.params, state.opt_state)))
    assert apart(found[1], found[0]) <= 2e-6


def tiny(loss_fn, mstate=None, mesh=MESH, reduce_dtype="float32", **options):
    """A state with one weight, its step under `reduce_dtype`, on eight devices."""
    model = mpjax.Model(lambda key: ({"w": jnp.ones(())}, mstate or {}), print)
    state = mpjax.shard_state(TrainState.create(model, SGD, KEY), mesh)
    return state, make_train_step(loss_fn, SGD, mesh=mesh, reduce_dtype=reduce_dtype, **options)


def weighted(params, mstate, batch, rng):
    total = (batch["x"] * batch["weight"]).sum()
    weight = batch["weight"].sum()
    return (params["w"] * total, weight), Aux(mstate, {"mean": total / weight})


def eight(**changes):
    batch = {"x": np.arange(1, 9, dtype=np.float32), "weight": np.float32([0, 1, 2, 0, 3, 0, 0, 2])}
    for name, (i, value) in changes.items():
        batch[name][i] = value
    return mpjax.shard_batch(batch, MESH)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("reduce_dtype", "summed"), [("float32", 1 + 2**-10), ("bfloat16", 1.0)])
@pytest.mark.parametrize("mesh", [MESH, PLACEMENTS["tensor"].mesh], ids=["one axis", "two"])
def test_each_devices_share_is_rounded_to_the_dtype_of_the_sum(mesh, reduce_dtype, summed):
    """Gradients of 1 + 2⁻¹⁰, which bfloat16 has not: their mean is exact in each dtype, and so is every sum on the way."""

    def loss_fn(params, mstate, batch, rng):
        return params["w"] * batch.mean()

    state, step = tiny(loss_fn, mesh=mesh, reduce_dtype=reduce_dtype)
    _, metrics = step(state, mpjax.shard_batch(np.full(8, 1 + 2**-10, np.float32), mesh))
    assert float(metrics["grad_norm"]) == summed and metrics["grad_norm"].dtype == jnp.float32
    assert float(metrics["loss"]) == 1 + 2**-10  # all but gradients is summed as it is


@pytest.mark.usefixtures("quick")
def test_a_device_without_weight_has_no_say():
    state, step = tiny(weighted)
    batch = eight()
    mean = float(np.average(np.asarray(batch["x"]), weights=np.asarray(batch["weight"])))
    after, metrics = step(state, batch)
    assert float(metrics["loss"]) == pytest.approx(mean, rel=1e-6)
    assert float(metrics["mean"]) == pytest.approx(mean, rel=1e-6)  # and not the NaN of 0 / 0 on four devices
    assert float(after.params["w"]) == pytest.approx(1 - 0.1 * mean, rel=1e-6)


@pytest.mark.usefixtures("quick")
def test_no_weight_on_any_device_is_a_skip():
    state, step = tiny(weighted)
    batch = mpjax.shard_batch({"x": np.ones(8, np.float32), "weight": np.zeros(8, np.float32)}, MESH)
    before = held(state)
    after, _ = step(state, batch)
    assert held(after) == before and int(after.skipped) == 1


@pytest.mark.usefixtures("quick")
def test_a_nan_on_a_device_without_weight_is_a_skip_as_it_is_with_gspmd():
    state, step = tiny(weighted)
    before = held(state)
    after, _ = step(state, eight(x=(0, np.nan)))  # 0 · NaN
    assert held(after) == before and int(after.skipped) == 1

    def only_the_loss(params, mstate, batch, rng):
        return (params["w"] * batch["weight"].sum() + jax.lax.stop_gradient(batch["x"].sum()), batch["weight"].sum())

    for options in ({"reduce_dtype": "float32"}, {}):
        state, _ = tiny(only_the_loss)
        after, _ = make_train_step(only_the_loss, SGD, mesh=MESH, **options)(state, eight(x=(0, np.nan)))
        assert int(after.skipped) == 1


@pytest.mark.usefixtures("quick")
def test_each_device_draws_its_own_numbers_from_the_steps_rng():
    def loss_fn(params, mstate, batch, rng):
        return params["w"] * batch.mean(), Aux(mstate, {"draw": jax.random.uniform(rng)})

    state, step = tiny(loss_fn)
    rng = jax.random.fold_in(state.rng, 0)
    draws = [float(jax.random.uniform(jax.random.fold_in(rng, device))) for device in range(8)]
    assert len(set(draws)) == 8
    _, metrics = step(state, mpjax.shard_batch(np.ones(8, np.float32), MESH))
    assert float(metrics["draw"]) == pytest.approx(np.mean(draws), rel=1e-6)


@pytest.mark.usefixtures("quick")
def test_rows_over_two_axes():
    """Each of the eight devices holds one row, and its index is that of its row."""
    axes = ("data", "model")

    def loss_fn(params, mstate, batch, rng):
        return params["w"] * batch.mean(), Aux(mstate, {"draw": jax.random.uniform(rng) * batch[0]})

    grid = PLACEMENTS["tensor"].mesh
    state = mpjax.shard_state(tiny(loss_fn)[0], grid)
    draws = [float(jax.random.uniform(jax.random.fold_in(jax.random.fold_in(state.rng, 0), i))) for i in range(8)]
    step = make_train_step(loss_fn, SGD, mesh=grid, axis=axes, reduce_dtype="float32")
    after, metrics = step(state, mpjax.shard_batch(np.arange(8, dtype=np.float32), grid, axes))
    assert float(metrics["draw"]) == pytest.approx(np.mean(np.arange(8) * draws), rel=1e-6)
    assert float(after.params["w"]) == pytest.approx(1 - 0.1 * 3.5, rel=1e-6)


@pytest.mark.usefixtures("quick")
def test_batch_statistics_are_the_mean_of_the_devices_and_counters_are_the_firsts():
    def loss_fn(params, mstate, batch, rng):
        first = batch[0]
        new = {
            "mean": batch.mean(),
            "half": (1000 * batch.mean()).astype(jnp.float16),
            "count": mstate["count"] + first.astype(jnp.int32),
            "seen": first > 0,
            "key": jax.random.fold_in(mstate["key"], first.astype(jnp.int32)),
        }
        return params["w"] * batch.mean(), Aux(new)

    start = {
        "mean": jnp.float32(0),
        "half": jnp.float16(0),
        "count": jnp.int32(5),
        "seen": jnp.array(False),
        "key": KEY,
    }
    state, step = tiny(loss_fn, start)
    batch = np.arange(1, 17, dtype=np.float32)
    after, _ = step(state, mpjax.shard_batch(batch, MESH))
    new = after.mstate
    assert agree(new)
    assert (float(new["mean"]), int(new["count"]), bool(new["seen"])) == (8.5, 6, True)
    assert float(new["half"]) == pytest.approx(8500, rel=1e-3) and new["half"].dtype == jnp.float16  # 68000 is infinite
    assert bool((new["key"] == jax.random.fold_in(KEY, 1)).all())


@pytest.mark.usefixtures("quick")
def test_statistics_that_one_device_spoils_and_overwrites_are_a_skip_on_all():
    """Its second micro-batch hides what its first one spoiled; the loss never sees it."""

    def loss_fn(params, mstate, batch, rng):
        return params["w"] * batch["x"].mean(), Aux({"last": batch["only for statistics"].mean()})

    for device in (0, 5):
        state, step = tiny(loss_fn, {"last": jnp.float32(0)}, accumulate=2)
        batch = {"x": np.ones(16, np.float32), "only for statistics": np.ones(16, np.float32)}
        batch["only for statistics"][2 * device] = np.nan
        before = held(state)
        after, metrics = step(state, mpjax.shard_batch(batch, MESH))
        assert held(after) == before and int(after.skipped) == 1 and agree((after, metrics))


def test_a_key_of_another_kind_stays_one():
    key = jax.random.key(0, impl="rbg")
    same = jax.shard_map(
        lambda x: _agreed(x, ("data",), jnp.array(True)),
        mesh=PLACEMENTS["data"].mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False,
    )  # fmt: skip
    assert jax.jit(same)(key).dtype == key.dtype


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="reduce_dtype='float32' came without a mesh; give mesh="):
        make_train_step(mean_loss(), SGD, reduce_dtype="float32")
    with pytest.raises(ValueError, match="got reduce_dtype='float16'; legal are 'float32', 'bfloat16', or None"):
        make_train_step(mean_loss(), SGD, reduce_dtype="float16", mesh=MESH)
    with pytest.raises(ValueError, match="the mesh axis 'rows', which this mesh lacks; it has 'data'"):
        make_train_step(mean_loss(), SGD, mesh=MESH, axis="rows")
    state, step = tiny(weighted)
    with pytest.raises(ValueError, match="has 12 rows, which the 8 devices of mesh axis 'data' cannot share evenly"):
        step(state, {"x": np.ones(12), "weight": np.ones(12)})
    with pytest.raises(ValueError, match=r"axes differ, \{'weight of a class': 8, 'x': 48\}; give every leaf"):
        step(state, {"x": np.ones(48), "weight of a class": np.ones(8)})


@pytest.mark.parametrize("reduce_dtype", [None, "float32"])
def test_what_a_loss_returns_is_refused_in_the_words_of_one_device(reduce_dtype):
    state = mpjax.shard_state(created(), MESH, PLACEMENTS["fsdp"].rules)
    batch = mpjax.shard_batch(batch_of(), MESH)
    for metrics in ({"name": "a text"}, {"name": {"more": 1.0}}):
        step = make_train_step(
            lambda params, mstate, batch, rng, metrics=metrics: (params["up"]["kernel"].sum(), Aux(mstate, metrics)),
            SGD, mesh=MESH, reduce_dtype=reduce_dtype,
        )  # fmt: skip
        with pytest.raises(ValueError, match=f"returned the metrics {metrics}; legal is a dict from name to number"):
            step.lower(state, batch)
