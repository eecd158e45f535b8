"""Every block of docs/coming_from.md runs, and the two sides agree and differ as it says.

PyTorch, Lightning and Keras are not installed with this project. What is said of their scales is held to a model of their
rules here, and the models and their blocks to the libraries themselves where these are installed.
"""

from __future__ import annotations

import functools
import itertools
import re
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest
from flax.training.dynamic_scale import DynamicScale

import mpjax

TEXT = (Path(__file__).parent.parent / "docs" / "coming_from.md").read_text(encoding="utf-8")
HEAD, *SECTIONS = re.split(r"^## ", TEXT, flags=re.M)


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


(SHARED,) = blocks(HEAD)
PAIRS = {section.splitlines()[0].strip("`"): blocks(section) for section in SECTIONS}


@pytest.fixture(autouse=True)
def as_users_have_it() -> Iterator[None]:
    """The networks of the page broadcast as their authors like it."""
    with jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def run(section: str, side: str, *changes: tuple[str, str]) -> dict:
    """The names that one side of a section leaves behind, after changes to its text, each of which must be possible."""
    code = PAIRS[section][["theirs", "ours"].index(side)]
    for old, new in changes:
        assert old in code, old
        code = code.replace(old, new)
    names: dict = {}
    for part in (SHARED, code):
        exec(compile(part, f"docs/coming_from.md, {section}, {side}", "exec"), names)
    return names


def params_of(names: dict):
    return names["state"].params if "state" in names else names["params"]


def gradient(names: dict):
    """The audit of the gradient of a block's loss function."""
    if "state" in names:
        state = names["state"]
        grad = jax.grad(lambda params: names["loss_fn"](params, state.mstate, names["batch"], state.rng)[0])
        return mpjax.audit(grad, state.params)
    scale = [names["loss_scale"]] if "loss_scale" in names else []
    return mpjax.audit(jax.grad(lambda params: names["loss_fn"](params, *scale, names["batch"])), names["params"])


def assert_agree(one, other) -> None:
    """Equal but for rounding: the two are different programs, in which XLA fuses differently.

    Adam divides a gradient by its own size, so a relative error of the gradients becomes one of the updates, which are
    the learning rate of 1e-3 each, three times.
    """

    eps = float(jnp.finfo(jnp.float32).eps)

    def leaf(a, b):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=8 * eps, atol=8 * eps * 3e-3)

    jax.tree.map(leaf, one, other)


def moved(names: dict) -> bool:
    start = names["module"].init(jax.random.key(0), names["batch"]["image"])["params"]
    return not np.array_equal(start["mix"]["kernel"], params_of(names)["mix"]["kernel"])


# Their side needs a library that is not installed here.
ELSEWHERE = ["torch.amp", "keras.mixed_precision", "lightning.Trainer"]


def test_each_section_has_two_sides():
    assert list(PAIRS) == ["jmp", "flax.training.dynamic_scale", "dtype=` on each layer", *ELSEWHERE]
    assert all(len(pair) == 2 and "mpjax" in pair[1] and "mpjax" not in pair[0] for pair in PAIRS.values())


@pytest.mark.parametrize("section", [name for name in PAIRS if name not in ELSEWHERE])
def test_both_sides_run_as_they_stand(section):
    for side in ("theirs", "ours"):
        assert moved(run(section, side))


# Which steps of a made-up run are finite, long enough for two growths in a row.
FLAGS = [True] * 7 + [False, True, True, False, False] + [True] * 9
INTERVAL, START = 3, 2.0**10


def pytorchs_rule(scale: float, good: int, finite: bool) -> tuple[float, int]:
    """`torch._amp_update_scale_`, as PyTorch documents it."""
    if not finite:
        return scale * 0.5, 0
    if good + 1 < INTERVAL:
        return scale, good + 1
    return (scale * 2.0 if scale * 2.0 <= float(jnp.finfo(jnp.float32).max) else scale), 0


def trajectory_of_the_rule(flags=FLAGS, scale=START) -> list[float]:
    good, scales = 0, []
    for finite in flags:
        scale, good = pytorchs_rule(scale, good, finite)
        scales.append(scale)
    return scales


def our_trajectory(flags=FLAGS, scale=START) -> list[float]:
    state, scales = mpjax.dynamic_loss_scale(scale, growth_interval=INTERVAL), []
    for finite in flags:
        state = state.adjust(jnp.array(finite))
        scales.append(float(state.loss_scale))
    return scales


def trajectory_of_flax(flags=FLAGS, scale=START) -> list[float]:
    state, scales = DynamicScale(scale=scale, growth_interval=INTERVAL), []
    differentiate = jax.jit(lambda state, slope: state.value_and_grad(lambda p: p * slope)(jnp.float32(1.0))[:2])
    for finite in flags:
        state, seen = differentiate(state, 1.0 if finite else jnp.inf)
        assert bool(seen) == finite
        scales.append(float(state.scale))
    return scales


# jmp

FLOAT32 = ("compute=float16", "compute=float32")


def test_jmp_and_we_give_the_same_params_in_float32():
    theirs, ours = run("jmp", "theirs", FLOAT32), run("jmp", "ours", FLOAT32)
    assert_agree(params_of(theirs), params_of(ours))
    assert int(ours["state"].step) == 3


def test_jmps_block_runs_with_our_name_in_its_place():
    migrated = run("jmp", "theirs", ("import jmp", "import mpjax as jmp"))
    assert_agree(params_of(migrated), params_of(run("jmp", "theirs")))


def test_jmps_norm_runs_in_float16_and_ours_does_not():
    theirs, ours = (gradient(run("jmp", side)) for side in ("theirs", "ours"))
    assert set(theirs.dtypes("rsqrt")) == {"float16"} and set(ours.dtypes("rsqrt")) == {"float32"}
    assert theirs.share("float16") == ours.share("float16") == 1


def test_the_scale_of_a_float16_policy_is_jmps_default():
    ours = run("jmp", "ours", ("range(3)", "range(0)"))["state"].loss_scale
    theirs = run("jmp", "theirs", ("range(3)", "range(0)"))["loss_scale"]
    assert float(ours.loss_scale) == float(theirs.loss_scale) and ours.period == theirs.period


def test_jmps_scale_has_no_ceiling_and_loses_its_floor_and_ours_keeps_both():
    high = jmp.DynamicLossScale(jnp.float32(2.0**24), period=1).adjust(jnp.array(True))
    assert float(high.loss_scale) == 2.0**25
    assert float(mpjax.dynamic_loss_scale(2.0**24, growth_interval=1).adjust(jnp.array(True)).loss_scale) == 2.0**24
    for library, kept in ((jmp, False), (mpjax, True)):
        low = library.DynamicLossScale(jnp.float32(8.0), min_loss_scale=jnp.float32(8.0))
        low = jax.jit(lambda scale: scale)(low)
        assert (float(low.adjust(jnp.array(False)).loss_scale) == 8.0) is kept


# flax.training.dynamic_scale


def test_the_two_loops_take_the_same_three_steps():
    theirs, ours = (run("flax.training.dynamic_scale", side) for side in ("theirs", "ours"))
    assert_agree(params_of(theirs), params_of(ours))
    found = [mpjax.audit(jax.grad(side["loss_fn"]), side["params"], side["batch"]) for side in (theirs, ours)]
    assert found[0].flops_by_dtype() == found[1].flops_by_dtype() and found[0].share("float16") > 0


def growths(scales: list[float]) -> list[int]:
    """The steps, counted from one, on which a scale grew."""
    return [n for n, (old, new) in enumerate(itertools.pairwise([START, *scales]), 1) if new > old]


def test_flax_grows_one_step_late():
    good = [True] * 12
    assert growths(trajectory_of_flax(good)) == [4, 8, 12]
    assert growths(our_trajectory(good)) == [3, 6, 9, 12]
    interval = ("growth_interval=2000", f"growth_interval={INTERVAL}")
    assert float(run("flax.training.dynamic_scale", "theirs", interval)["dynamic_scale"].scale) == 2.0**15
    assert float(run("flax.training.dynamic_scale", "ours", interval)["loss_scale"].loss_scale) == 2.0**16


def test_flax_climbs_until_good_steps_overflow():
    state, largest = DynamicScale(scale=2.0**24, growth_interval=1), float(jnp.finfo(jnp.float32).max)
    differentiate = jax.jit(lambda state, slope: state.value_and_grad(lambda p: p * slope)(jnp.float32(1.0))[:2])
    for _ in range(250):
        state, finite = differentiate(state, 0.5)
        assert finite
    assert float(state.scale) == largest
    assert not differentiate(state, 2.0)[1]
    assert max(our_trajectory([True] * 250)) == 2.0**24
    assert float(DynamicScale().minimum_scale) == float(jnp.finfo(jnp.float32).tiny)
    assert mpjax.dynamic_loss_scale().min_loss_scale == 2.0**-14


# dtype= on each layer

DTYPE = "dtype=` on each layer"


def test_dtype_misses_the_module_without_the_field_and_a_policy_does_not():
    theirs, ours = (gradient(run(DTYPE, side)) for side in ("theirs", "ours"))
    assert 0 < theirs.share("bfloat16") < 0.5 and theirs.share("bfloat16", "float32") == 1
    assert ours.share("bfloat16") == 1
    assert set(ours.dtypes("rsqrt")) == {"float32"}


def test_a_rule_makes_the_exception():
    rule = 'mpjax.PolicyMap({"mix": "compute=float32"}, default="mixed_bfloat16")'
    assert rule.removeprefix("mpjax.") in TEXT
    found = gradient(run(DTYPE, "ours", ('"mixed_bfloat16"', rule)))
    assert found.share("bfloat16") == gradient(run(DTYPE, "theirs")).share("bfloat16")


def test_a_layers_own_dtype_is_overridden():
    found = gradient(run(DTYPE, "ours", ("Net()", "Net(dtype=jnp.float16)")))
    assert found.share("bfloat16") == 1


def test_both_reach_nearly_the_same_params():
    theirs, ours = (run(DTYPE, side) for side in ("theirs", "ours"))
    start = theirs["module"].init(jax.random.key(0), theirs["batch"]["image"])["params"]
    for a, b, old in zip(*map(jax.tree.leaves, (params_of(theirs), params_of(ours), start)), strict=True):
        # Adam's first steps are ± the learning rate: the two agree on most signs, or they learn different things.
        assert np.mean(np.sign(a - old) == np.sign(b - old)) > 0.9


# torch.amp


def test_our_scale_follows_pytorchs_rule():
    assert our_trajectory() == trajectory_of_the_rule()
    assert our_trajectory() != trajectory_of_flax()


def test_our_side_of_torch_skips_whole():
    names = run.__wrapped__("torch.amp", "ours")  # its state is donated to one more step
    assert moved(names) and int(names["state"].step) == 3
    before = jax.tree.map(np.asarray, names["state"].params), float(names["state"].loss_scale.loss_scale)
    bad = names["batch"] | {"image": names["batch"]["image"].at[0, 0, 0].set(jnp.inf)}
    state, metrics = names["step"](names["state"], bad)
    assert not metrics["grads_finite"] and int(state.skipped) == 1
    assert jax.tree.all(jax.tree.map(lambda a, b: a.tobytes() == np.asarray(b).tobytes(), before[0], state.params))
    assert float(state.loss_scale.loss_scale) == before[1] / 2


@pytest.fixture
def torch() -> types.ModuleType:
    return pytest.importorskip("torch", reason="PyTorch is not installed; it is no dependency of mpjax")


def test_pytorchs_block_runs_and_skips(torch):
    code = PAIRS["torch.amp"][0].replace('"cuda"', '"cpu"')
    names: dict = {}
    exec(compile(code, "docs/coming_from.md, torch.amp, theirs", "exec"), names)
    net, scaler, optimizer = names["net"], names["scaler"], names["optimizer"]
    before = [p.detach().clone() for p in net.parameters()], scaler.get_scale()
    bad = names["image"].clone()
    bad[0, 0] = torch.inf
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = torch.nn.functional.cross_entropy(net(bad), names["label"])
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before[0], net.parameters(), strict=True))
    assert scaler.get_scale() == before[1] / 2


def test_pytorchs_scale_follows_the_rule_that_ours_is_held_to(torch):
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=START, growth_interval=INTERVAL)
    scales = []
    for finite in FLAGS:
        optimizer.zero_grad()
        scaler.scale(weight * (1.0 if finite else torch.inf)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == trajectory_of_the_rule()
    assert float(weight.detach()) == 1.0 - sum(FLAGS)


def test_a_skipped_step_of_pytorch_has_changed_the_running_averages(torch):
    norm = torch.nn.BatchNorm1d(2)
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(norm.parameters(), lr=1.0)
    before = norm.weight.detach().clone()
    scaler.scale(norm(torch.tensor([[1.0, torch.inf], [2.0, 3.0]])).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(before, norm.weight) and not torch.isfinite(norm.running_mean).all()


# keras.mixed_precision


def kerass_rule(scale: np.float32, good: int, finite: bool) -> tuple[np.float32, int]:
    """`LossScaleOptimizer`, as Keras 3 has it: no bound but those of float32."""
    with np.errstate(over="ignore", under="ignore"):
        if not finite:
            return scale * np.float32(0.5), 0
        return (scale * np.float32(2.0), 0) if good == INTERVAL - 1 else (scale, good + 1)


def trajectory_of_keras(flags=FLAGS, scale=START) -> list[float]:
    scale, good, scales = np.float32(scale), 0, []
    for finite in flags:
        scale, good = kerass_rule(scale, good, finite)
        scales.append(float(scale))
    return scales


def test_our_scale_follows_kerass_rule_within_its_bounds():
    assert our_trajectory() == trajectory_of_keras()
    up, down = [True] * 2 * INTERVAL, [False] * 2
    assert trajectory_of_keras(up, 2.0**127)[-1] == np.inf and our_trajectory(up, 2.0**23)[-1] == 2.0**24
    assert trajectory_of_keras(down, 2.0**-149)[-1] == 0 and our_trajectory(down, 2.0**-13)[-1] == 2.0**-14


def test_a_rule_stands_for_dtype_float32_on_kerass_last_layer():
    names = run("keras.mixed_precision", "ours")
    assert moved(names) and int(names["state"].step) == 3
    scale = names["state"].loss_scale
    assert float(scale.loss_scale) == 2.0**15 and scale.period == 2000
    found = gradient(names)
    assert found.share("float16", "float32") == 1 and 0 < found.share("float32") < 0.5
    logits, _ = jax.eval_shape(names["model"].apply, names["state"].params, {}, names["batch"]["image"])
    assert logits.dtype == np.float32


@pytest.fixture
def keras(monkeypatch) -> Iterator[types.ModuleType]:
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip(
        "keras", minversion="3.0", reason="Keras is not installed; it is no dependency of mpjax"
    )
    yield keras
    keras.mixed_precision.set_global_policy("float32")


def test_kerass_block_runs_and_its_scale_follows_the_rule(keras):
    names: dict = {}
    exec(compile(PAIRS["keras.mixed_precision"][0], "docs/coming_from.md, keras, theirs", "exec"), names)
    net = names["net"]
    assert isinstance(net.optimizer, keras.optimizers.LossScaleOptimizer) and int(net.optimizer.iterations.value) == 3
    assert [layer.compute_dtype for layer in net.layers] == ["float16", "float32"]
    inner = keras.optimizers.SGD(1.0)
    scaler = keras.optimizers.LossScaleOptimizer(inner, initial_scale=START, dynamic_growth_steps=INTERVAL)
    scaler.build([keras.Variable(np.float32(1.0))])
    at = [variable is scaler.dynamic_scale for variable in scaler.variables].index(True)
    weights, values, scales = [jnp.float32(1.0)], [variable.value for variable in scaler.variables], []
    for finite in FLAGS:
        gradient = values[at] * (1.0 if finite else jnp.inf)
        weights, values = scaler.stateless_apply(values, [gradient], weights)
        scales.append(float(values[at]))
    assert scales == trajectory_of_keras()
    assert float(weights[0]) == 1.0 - sum(FLAGS)


def test_a_skipped_step_of_keras_has_changed_the_moving_averages(keras):
    keras.mixed_precision.set_global_policy("mixed_float16")
    norm, head = keras.layers.BatchNormalization(), keras.layers.Dense(2, dtype="float32")
    net = keras.Sequential([keras.Input((2,)), norm, head])
    net.compile(optimizer=keras.optimizers.SGD(1.0), loss="mse")
    before = [np.array(weight.value) for weight in head.weights]
    net.fit(np.array([[1.0, np.inf], [2.0, 3.0]], np.float32), np.ones((2, 2), np.float32), verbose=0)
    assert all(np.array_equal(old, weight.value) for old, weight in zip(before, head.weights, strict=True))
    assert int(net.optimizer.iterations.value) == 0 and not np.isfinite(norm.moving_mean.value).all()


def test_bfloat16_has_no_scale_in_keras(keras):
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    net = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    net.compile(optimizer="adam", loss="mse")
    assert isinstance(net.optimizer, keras.optimizers.Adam)


# lightning.Trainer


def test_our_side_of_lightning_takes_three_steps():
    names = run("lightning.Trainer", "ours")
    assert moved(names) and int(names["state"].step) == 3
    assert set(gradient(names).flops_by_dtype()) == {"float16"}


@pytest.mark.filterwarnings("ignore")  # of few workers, of short epochs: Lightning's advice on a run of three steps
def test_lightnings_block_runs_without_a_scaler_on_a_cpu(torch, tmp_path):
    pytest.importorskip("lightning", reason="Lightning is not installed; it is no dependency of mpjax")
    code = PAIRS["lightning.Trainer"][0].replace('"cuda"', '"cpu"')
    code = code.replace("max_steps=3", f"max_steps=3, logger=False, default_root_dir={str(tmp_path)!r}")
    names: dict = {}
    exec(compile(code, "docs/coming_from.md, lightning, theirs", "exec"), names)
    plugin = names["trainer"].precision_plugin
    assert names["trainer"].global_step == 3 and plugin.precision == "bf16-mixed" and plugin.scaler is None
    assert names["lightning"].pytorch.plugins.MixedPrecision("16-mixed", "cpu").scaler.get_scale() == 2.0**16
