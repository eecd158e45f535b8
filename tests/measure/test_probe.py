"""The probed step: the same numbers as the step without, the same state, and readings of every module."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import mpjax
from mpjax.core.model import SINKS
from mpjax.measure.probe import ProbeLog, probe
from mpjax.measure.readings import ProbeReport, Reading
from mpjax.numerics.probe import EDGES, EXPONENTS, FORMATS, count
from mpjax.wrap.linen import calls as linen_calls
from mpjax.wrap.nnx import calls as nnx_calls
from tests.train.toys import fingerprint

# ---- toy models: a stack of three blocks, through both doors, every way of stacking ------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm(name="norm")(x)
        return x + nn.relu(nn.Dense(4, name="up")(h)), None


class Stack(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if "remat" in self.kind else Block
        if "scan" in self.kind:
            make = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = make(name="layers")(x, None)
        elif self.kind == "vmap":
            x, _ = nn.vmap(block, variable_axes={"params": 0}, split_rngs={"params": True})(name="layers")(x)
        else:
            layer = nn.jit(block) if self.kind == "jit" else block
            for i in range(2):
                x, _ = layer(name=f"layers_{i}")(x)
        return nn.Dense(2, name="head")(x)


class BlockNNX(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.up = nnx.LayerNorm(4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.up(self.norm(x)))


class StackNNX(nnx.Module):
    def __init__(self, kind, rngs):
        self.kind, self.head = kind, nnx.Linear(4, 2, rngs=rngs)
        if "scan" in kind or kind == "vmap":
            self.layers = nnx.split_rngs(splits=3)(nnx.vmap(BlockNNX))(rngs)
        else:
            self.layers = nnx.List([BlockNNX(rngs) for _ in range(2)])

    def __call__(self, x):
        def run(layer, x):
            return layer(x)

        run = nnx.remat(run) if "remat" in self.kind else nnx.jit(run) if self.kind == "jit" else run
        if "scan" in self.kind:
            x = nnx.scan(lambda x, layer: run(layer, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        elif self.kind == "vmap":
            x = nnx.vmap(run)(self.layers, x)
        else:
            for layer in self.layers:
                x = run(layer, x)
        return self.head(x)


KINDS = ("jit", "scan", "remat", "scan+remat", "vmap")
DOORS = {"linen": Stack, "nnx": lambda kind: lambda rngs: StackNNX(kind, rngs)}
X = jax.random.normal(jax.random.key(1), (3, 8, 4))


def parts(door, kind, policy="mixed_bfloat16", optimizer=None):
    """(loss function, optimizer, a state of one's own): made once, since most of a test's time is compiling."""
    loss_fn, optimizer, state = _parts(door, kind, policy, optimizer or SGD)
    return loss_fn, optimizer, jax.tree.map(jnp.copy, state)


SGD = optax.sgd(0.5)


@functools.cache
def _parts(door, kind, policy, optimizer):
    model = mpjax.wrap(DOORS[door](kind), policy)

    def loss_fn(params, mstate, batch, rng):
        y, mstate = model.apply(params, mstate, batch)
        return jnp.square(y - 1).mean(), mpjax.Aux(mstate)

    return loss_fn, optimizer, mpjax.TrainState.create(model, optimizer, jax.random.key(0), X)


def both(loss_fn, optimizer, state, batch, **options):
    """(state and metrics of the plain step, those of the probed one, its report)."""
    step = mpjax.make_train_step(loss_fn, optimizer, donate=False, **options)
    after, metrics = step(state, batch)
    seen, told = probe(step)(state, batch)
    found = told.pop(SINKS)
    return (after, metrics), (seen, told), ProbeReport.of(jax.device_get(found), 0, float(metrics["loss_scale"]))


@pytest.mark.optimized
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", DOORS)
def test_a_probed_step_is_the_same_to_the_last_bit(door, kind):
    """State and metrics; gradients are in the params."""
    plain, probed, report = both(*parts(door, kind), X)
    assert fingerprint(plain) == fingerprint(probed)
    modules = {f"{layer}{name}" for layer in (["layers"] if kind in ("scan", "scan+remat", "vmap") else ["layers/0", "layers/1"])
               for name in ("", "/norm", "/up")}  # fmt: skip
    assert set(report.select("activation")) == set(report.select("gradient")) == modules | {"", "head"}


@pytest.mark.optimized
@pytest.mark.parametrize("door", DOORS)
def test_accumulation_counts_every_micro_batch(door):
    plain, probed, report = both(*parts(door, "scan", "mixed_float16"), jnp.concatenate([X, X]), accumulate=2)
    assert fingerprint(plain) == fingerprint(probed)
    assert report.select("gradient")["head"].count == 6 * 8 * 2
    assert report.select("activation")["layers/up"].count == 3 * 6 * 8 * 4


@pytest.mark.optimized
@pytest.mark.parametrize(("door", "reduce_dtype"), [("linen", None), ("nnx", "float32")])
def test_eight_devices_count_as_one(door, reduce_dtype):
    loss_fn, optimizer, state = parts(door, "loop")
    mesh = jax.make_mesh((8,), ("data",))
    batch = jnp.tile(X[:1], (8, 1, 1))
    options = {"mesh": mesh, "reduce_dtype": reduce_dtype}
    plain, probed, report = both(
        loss_fn, optimizer, mpjax.shard_state(state, mesh), mpjax.shard_batch(batch, mesh), **options
    )
    assert fingerprint(plain) == fingerprint(probed)
    alone = both(loss_fn, optimizer, state, batch)[2]
    for path, reading in alone.select("activation").items():
        assert np.array_equal(reading.counts, report.select("activation")[path].counts), path


@pytest.mark.parametrize("door", DOORS)
def test_off_it_costs_nothing(door, monkeypatch):
    """The jaxpr of a step that is not probed is the one of a wrap that knows no probe at all."""

    def program():
        loss_fn, optimizer, state = parts(door, "scan+remat")
        return str(jax.make_jaxpr(mpjax.make_train_step(loss_fn, optimizer).pure)(state, X))

    with_probe = program()
    for calls in (linen_calls, nnx_calls):
        monkeypatch.setattr(calls, "tap_tree", lambda sinks, name, tree: tree)
    assert program() == with_probe and "scatter" not in with_probe


def test_every_nth_call_is_probed_and_each_variant_is_compiled_once():
    loss_fn, optimizer, state = parts("linen", "loop")
    traces = []

    def traced(*args):
        traces.append(1)
        return loss_fn(*args)

    step = probe(mpjax.make_train_step(traced, optimizer), every=3)
    probed = []
    for n in range(7):
        state, metrics = step(state, X)
        if SINKS in metrics:
            probed.append(n)
        traces_so_far = len(traces)
        assert n < 1 or traces_so_far == 3  # the probed one is traced for its names, too
    assert probed == [0, 3, 6] and SINKS not in state.mstate


def test_fit_hands_readings_to_the_hooks_and_the_log_writes_them(tmp_path):
    loss_fn, optimizer, state = parts("linen", "loop", "mixed_float16")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "probe.jsonl").write_text('{"attempt": 0, "read')  # what a kill left
    log = ProbeLog(tmp_path / "run" / "probe.jsonl")
    step = probe(mpjax.make_train_step(loss_fn, optimizer), every=2)
    result = mpjax.fit(step, state, lambda n: X, attempts=5, hooks=[log])
    assert [report.attempt for report in log.reports] == [0, 2, 4]
    assert all(set(m) == set(result.history[1]) for m in result.history)  # scalars only, as ever
    lines = [json.loads(line) for line in (tmp_path / "run" / "probe.jsonl").read_text().splitlines()[1:]]
    assert [line["attempt"] for line in lines] == [0, 2, 4] and lines[0]["loss_scale"] == 2.0**15
    head = next(r for r in lines[0]["readings"] if (r["path"], r["kind"]) == ("head", "activation"))
    assert sum(head["exponents"].values()) + head["zero"] == head["count"] == 3 * 8 * 2
    assert set(head["overflow"]) == set(FORMATS)


def test_updates_are_what_params_moved_by():
    loss_fn, optimizer, state = parts("linen", "loop", optimizer=optax.sgd(2.0**-3))
    _, (after, _), report = both(loss_fn, optimizer, state, X)
    kernel = np.asarray(after.params["head"]["kernel"], np.float64) - np.asarray(
        state.params["head"]["kernel"], np.float64
    )
    found = report.select("update")["head/kernel"]
    exponents = np.frexp(kernel[kernel != 0])[1] - 1
    assert found.exponents == {int(e): float((exponents == e).sum()) for e in np.unique(exponents)}


def test_histograms_for_the_picture_are_by_module():
    *_, report = both(*parts("linen", "scan"), X)
    drawn = report.histograms()
    assert set(drawn["update"]) == {"layers/norm", "layers/up", "head"} and "" in drawn["activation"]
    updates = report.select("update")
    for module, names in {"head": ("kernel", "bias"), "layers/norm": ("scale", "bias")}.items():
        total = sum(updates[f"{module}/{name}"].count for name in names)
        assert sum(drawn["update"][module].values()) == total


def test_updates_too_small_for_a_bfloat16_param_show_as_zeros():
    with pytest.warns(mpjax.PrecisionWarning):
        loss_fn, optimizer, state = parts(
            "linen", "loop", "params=bfloat16,compute=bfloat16,output=float32", optax.sgd(1e-6)
        )
    _, _, report = both(loss_fn, optimizer, state, X)
    kernel = report.select("update")["layers/0/up/kernel"]
    assert kernel.zero == kernel.count == 16 and kernel.dtype == "bfloat16"


def test_only_some_modules_can_be_asked():
    loss_fn, optimizer, state = parts("linen", "loop")
    step = mpjax.make_train_step(loss_fn, optimizer, donate=False)
    _, metrics = probe(step, only="layers/0")(state, X)
    assert set(metrics[SINKS]["probe"]) == {f"layers/0{name}" for name in ("", "/norm", "/up")}
    with pytest.raises(ValueError, match=r"names none of the taps; they are layers/0/norm"):
        probe(step, only="layer/0")(state, X)


def test_bad_settings_and_a_loss_that_loses_its_mstate():
    loss_fn, optimizer, state = parts("linen", "loop")
    with pytest.raises(ValueError, match="legal is an int ≥ 1"):
        probe(mpjax.make_train_step(loss_fn, optimizer), every=0)
    forgetful = mpjax.make_train_step(lambda p, m, b, r: loss_fn(p, {}, b, r)[0], optimizer)
    with pytest.raises(ValueError, match="pass mstate on"):
        probe(forgetful)(state, X)


def test_other_methods_have_names_of_their_own_and_bare_functions_tap_by_hand():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            embed = nn.Embed(5, 4, name="embed")
            return embed.attend(embed(x))

    model = mpjax.wrap(Tied(), "mixed_bfloat16")

    def loss_fn(params, mstate, batch, rng):
        y, mstate = model.apply(params, mstate, batch)
        return mpjax.tap(mstate, "squares", jnp.square(y)).mean(), mpjax.Aux(mstate)

    state = mpjax.TrainState.create(model, optax.sgd(0.1), jax.random.key(0), jnp.arange(5))
    *_, report = both(loss_fn, optax.sgd(0.1), state, jnp.arange(5))
    assert list(report.select("gradient")) == ["embed", "embed.attend", "", "squares"]


# ---- readings --------------------------------------------------------------------------------------------------------


def reading(x, kind="activation", dtype="float32", loss_scale=1.0):
    counts = np.asarray(count(jnp.asarray(x, jnp.float32)), float).reshape(EXPONENTS, len(EDGES) + 1)
    return Reading("p", kind, dtype, counts, loss_scale)


@pytest.mark.parametrize("power", [-40, -7, 0, 3, 15, 40])
@pytest.mark.parametrize("name", FORMATS)
def test_shares_are_those_of_a_cast_under_every_power_of_two(name, power):
    """numpy casts the same numbers, spread over all exponents and on both sides of each format's limits."""
    random = np.random.default_rng(0)
    spread = np.exp2(random.uniform(-80, 80, 4000)) * random.choice([-1, 1], 4000)
    limits = np.float64([448, 464, 465, 480, 57344, 61439, 61440, 65504, 65519, 65520, 2.0**-10, 2.0**-25, 2.0**-17])
    x = np.concatenate([spread, limits, limits * 1.001, limits / 2.0**power]).astype(np.float32)
    with np.errstate(over="ignore"):
        y = (x.astype(np.float64) * 2.0**power).astype(np.float32)
        cast = y.astype(jnp.dtype(name)).astype(np.float64)
    found = reading(x)
    assert found.overflow(name, 2.0**power) == np.mean(~np.isfinite(cast))
    assert found.underflow(name, 2.0**power) == np.mean(cast == 0)


def test_zeros_subnormals_infinities_and_nans():
    found = reading([0.0, 0.0, 2.0**-15, 2.0**-14, np.inf, np.nan, -np.nan], dtype="float16")
    assert (found.zero, found.subnormal, found.inf, found.nan, found.count) == (2, 1, 1, 2, 7)
    assert found.exponents == {-15: 1.0, -14: 1.0}


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_are_no_share_and_any_power_of_two_may_scale(name):
    """A ReLU's zeros made bfloat16's share, once scaled, −50 %; past 2^142 float16's limit lay before the first cell."""
    found = reading([0.0, 1.0, 1.9, np.inf])
    assert found.underflow(name, found.fitted(name)) == found.overflow(name, found.fitted(name)) == 0
    assert (found.overflow(name, 2.0**200), found.underflow(name, 2.0**200)) == (1, 0)
    assert (found.overflow(name, 2.0**-200), found.underflow(name, 2.0**-200)) == (0, 1)


@pytest.mark.parametrize("largest", [1.0, 1.9999, 447.0, 449.0, 2.0**20, 2.0**-20 * 1.8])
@pytest.mark.parametrize("name", FORMATS[1:])
def test_the_fitted_scale_is_the_largest_that_overflows_nothing(name, largest):
    found = reading([largest, largest / 3])
    with np.errstate(over="ignore"):
        fits, over = np.float32([largest * found.fitted(name), 2 * largest * found.fitted(name)]).astype(
            jnp.dtype(name)
        )
    assert np.isfinite(np.float64(fits)) and not np.isfinite(np.float64(over))


def test_a_gradient_is_judged_with_and_without_its_loss_scale():
    """2^-20 · 2^15 fits float16; without the scale, 2^-30 would be lost."""
    told = reading(np.float32([2.0**-5, 2.0**-15]), "gradient", loss_scale=2.0**15).as_dict()
    assert told["underflow"]["float16"] == [0.5, 0.0] and told["overflow"]["float16"] == [0.0, 0.0]


def test_the_table_and_what_is_refused():
    report = ProbeReport((reading([1.0, 1e6]), reading([0.0])))
    first, second = report.rows()
    assert first["range"] == "2^0…2^20" and first["float16"] == "▲50% → ·" and second["range"] == "–"
    assert str(report).splitlines()[0].split()[:3] == ["path", "kind", "dtype"] and len(str(report).splitlines()) == 4
    with pytest.raises(ValueError, match="counts for bfloat16, float16"):
        report.readings[0].overflow("float8")
    with pytest.raises(ValueError, match="those of a probed step"):
        ProbeReport.of({"amax": 1})
