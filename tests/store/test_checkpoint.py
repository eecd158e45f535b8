"""What is saved comes back: bit for bit, verified, or not at all."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import mpjax
from mpjax import Checkpointer, CheckpointError, CheckpointWarning
from mpjax.store import arrays, folders
from mpjax.store.manifest import MANIFEST
from mpjax.train.state import TrainState
from tests.store.states import KEY, OPTIMIZERS, bare_model, bits, blank, every_kind, train_state
from tests.train.meshes import compiles, needs_eight


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A directory with steps 1 and 2 of a small tree; copied by who breaks it."""
    directory = tmp_path_factory.mktemp("saved")
    checkpointer = Checkpointer(directory)
    for step in (1, 2):
        checkpointer.save(numbered(step), step)
    return directory


def numbered(step: int) -> dict:
    return {"w": jnp.arange(6.0).reshape(2, 3) * step, "n": jnp.int32(16777217 + step)}


@pytest.fixture
def broken(saved, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture
def unchecked(monkeypatch):
    """Without the checks of annotations that only tests have: what a user would see."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# ---- what comes back -------------------------------------------------------------------------------------------------


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    state = every_kind()
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state, 0, allow_nonfinite=["odd"])
    with jax.numpy_dtype_promotion("standard"):
        assert bits(checkpointer.restore(blank(state))) == bits(state) != bits(blank(state))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_train_states_come_back_bit_for_bit(optimizer, tmp_path):
    state = train_state(optimizer, scaled=True, ema_decay=0.99)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state)
    assert bits(checkpointer.restore(blank(state))) == bits(state)
    assert bits(checkpointer.restore(jax.eval_shape(lambda: state))) == bits(state)


def test_a_state_of_frozen_params_and_one_without_any_arrays(tmp_path):
    state = train_state(trainable="layer_1")
    Checkpointer(tmp_path / "a").save(state)
    assert bits(Checkpointer(tmp_path / "a").restore(blank(state))) == bits(state)
    Checkpointer(tmp_path / "b").save({"n": 3}, 0)
    assert Checkpointer(tmp_path / "b").restore({"n": 0}) == {"n": 3}


def test_a_step_is_numbered_by_attempts_so_that_a_skip_has_its_own(tmp_path):
    state = dataclasses.replace(train_state(), step=jnp.int32(4), skipped=jnp.int32(3))
    path = Checkpointer(tmp_path).save(state)
    assert (path, Checkpointer(tmp_path).latest()) == (tmp_path / "7", 7)
    assert json.loads((path / "meta.json").read_text())["data_position"] == 7


def test_what_stands_beside_the_state(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    rules = mpjax.PolicyMap({"head": "compute=float32,output=float32"}, default="mixed_bfloat16", islands=(nn.Dense,))
    checkpointer.save(train_state(), policy=rules, extra={"shard": 3, "loss": [0.1, None]})
    info = checkpointer.info()
    assert info.policy == {
        "default": "p=full,c=bf16,o=full",
        "rules": {"head": "params=full,compute=full,output=full"},
        "islands": ["Dense"],
    }
    assert info.extra == {"shard": 3, "loss": [0.1, None]}
    assert info.versions["jax"] == jax.__version__ and set(info.versions) > {"python", "flax", "optax", "mpjax"}
    assert info.leaves["params/layer/0/kernel"].keys == ("params", "layer_0", "kernel")
    with pytest.raises(TypeError, match="extra cannot be written"):
        checkpointer.save(train_state(), 9, extra={"f": object()})
    assert checkpointer.steps() == [0]


def test_load_needs_no_like_and_takes_what_is_under_the_globs(tmp_path):
    state = train_state("adamw with a schedule")
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state)
    found = checkpointer.load(under="params/**/kernel")
    assert set(found) == {"params/layer/0/kernel", "params/layer/1/kernel"}
    np.testing.assert_array_equal(found["params/layer/0/kernel"], state.params["layer_0"]["kernel"])
    with pytest.raises(CheckpointError, match=r"nothing under \['parms'\]; it has step, skipped"):
        checkpointer.load(under="parms")


def test_a_donated_state_is_restored_and_trains_on_with_one_trace(tmp_path, caplog):
    state = train_state("injected", ema_decay=0.5)
    model = bare_model()
    step = mpjax.make_train_step(lambda p, m, x, rng: (model.apply(p, m, x)[0] ** 2).mean(), OPTIMIZERS["injected"])
    like = jax.tree.map(jnp.copy, state)
    Checkpointer(tmp_path).save(state)
    with jax.log_compiles():
        straight, _ = step(like, jnp.ones((2, 4)))  # `like` is gone now; only its structure is asked for
        assert compiles(caplog) == 1
        resumed, _ = step(Checkpointer(tmp_path).restore(like), jnp.ones((2, 4)))
        assert compiles(caplog) == 1
    assert bits(resumed) == bits(straight)


def test_save_async_holds_what_was_there_although_the_state_is_donated_at_once(tmp_path):
    state = {"w": jnp.arange(300_000, dtype=jnp.float32), "host": np.arange(4)}
    expected = bits(state)
    like = blank(state)
    checkpointer = Checkpointer(tmp_path, asynchronous=True)
    checkpointer.save(state, 1)
    state["host"][:] = 0
    jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(state["w"]).block_until_ready()
    checkpointer.wait()
    assert bits(checkpointer.restore(like)) == expected


# ---- other devices, other policies, the other door -------------------------------------------------------------------


@needs_eight
@pytest.mark.parametrize("to", ["one device", "four devices", "another axis"])
def test_fault_30_another_device_count_or_sharding_is_exact(to, tmp_path):
    mesh = jax.make_mesh((8,), ("data",))
    w = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    Checkpointer(tmp_path).save({"w": jax.device_put(w, NamedSharding(mesh, P("data"))), "b": jnp.ones(3)}, 0)
    here = {
        "one device": jax.sharding.SingleDeviceSharding(jax.devices()[3]),
        "four devices": NamedSharding(jax.make_mesh((4,), ("data",), devices=jax.devices()[:4]), P("data")),
        "another axis": NamedSharding(mesh, P(None, "data")),
    }[to]
    like = {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=here), "b": jnp.zeros(3)}
    restored = Checkpointer(tmp_path).restore(like)
    assert restored["w"].sharding == here and not restored["b"].committed
    np.testing.assert_array_equal(restored["w"], w)


def test_fault_30_another_compute_policy_is_exact_and_its_loss_scale_its_own(tmp_path, caplog):
    plain = train_state("adamw with a schedule")
    Checkpointer(tmp_path / "a").save(plain)
    scaled = dataclasses.replace(blank(plain), loss_scale=mpjax.dynamic_loss_scale(2.0**7))
    found = Checkpointer(tmp_path / "a").restore(scaled)
    assert bits(dataclasses.replace(found, loss_scale=plain.loss_scale)) == bits(plain)
    assert float(found.loss_scale.loss_scale) == 2.0**7 and "of another kind" in caplog.text
    Checkpointer(tmp_path / "b").save(scaled)
    assert bits(Checkpointer(tmp_path / "b").restore(plain)) == bits(
        dataclasses.replace(scaled, loss_scale=plain.loss_scale)
    )
    with pytest.raises(CheckpointError, match="loss_scale/loss_scale: not in the checkpoint"):
        Checkpointer(tmp_path / "a").restore(jax.eval_shape(lambda: scaled))  # there is nothing to keep


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(5, name="up")(x))
        return nn.Dense(2, name="layers_0")(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(5, 2, rngs=rngs)])

    def __call__(self, x):
        return self.layers[0](self.norm(self.up(x)))


def test_linens_params_restore_into_nnx_and_back(tmp_path):
    made = [mpjax.wrap(module, "mixed_bfloat16") for module in (Linen(), Nnx)]
    linen, nnx_state = (TrainState.create(model, optax.adam(0.1), KEY, jnp.ones((2, 4))) for model in made)
    assert jax.tree.structure(linen.params) != jax.tree.structure(nnx_state.params)
    Checkpointer(tmp_path / "linen").save(linen, policy=made[0].policy)
    across = Checkpointer(tmp_path / "linen").restore(nnx_state)
    np.testing.assert_array_equal(across.params["layers"]["0"]["kernel"], linen.params["layers_0"]["kernel"])
    assert sorted(bits(across.opt_state).values()) == sorted(bits(linen.opt_state).values())
    Checkpointer(tmp_path / "nnx").save(across)
    assert bits(Checkpointer(tmp_path / "nnx").restore(blank(linen))) == bits(linen)


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"w": jnp.zeros((2, 3), jnp.bfloat16), "n": jnp.int32(0)}, r"w: float32\[2, 3\] in the checkpoint, bfloat16\[2, 3\] here"),
        ({"w": jnp.zeros((3, 2)), "n": jnp.int32(0)}, r"w: float32\[2, 3\] in the checkpoint, float32\[3, 2\] here"),
        ({"w": jnp.zeros((2, 3)), "n": jnp.float32(0)}, r"n: int32\[\] in the checkpoint, float32\[\] here"),
        ({"w": jnp.zeros((2, 3))}, r"n: int32\[\] in the checkpoint, not here"),
        ({"w": jnp.zeros((2, 3)), "n": jnp.int32(0), "b": 1.0}, r"b: not in the checkpoint, float\[\] here"),
        ({"w": jnp.zeros((2, 3)), "n": 0}, r"n: int32\[\] in the checkpoint, int\[\] here"),
        ({"w": {"w": jnp.zeros((2, 3))}, "n": jnp.int32(0)}, "w/w: not in the checkpoint"),
    ],
)  # fmt: skip
def test_fault_29_another_dtype_shape_or_structure_names_the_leaf(saved, like, words):
    with pytest.raises(ValueError, match=words):
        Checkpointer(saved).restore(like)


@pytest.mark.parametrize(
    "like", [{"w": jnp.zeros((2, 3)), "n": jnp.float32(0)}, {"w": jnp.zeros(3), "n": jnp.int32(0)}]
)
def test_fault_29_cast_is_for_floats_alone(saved, like):
    with pytest.raises(ValueError, match="does not fit"):
        Checkpointer(saved).restore(like, cast=True)


def test_fault_29_a_cast_is_asked_for_rounds_to_nearest_and_is_listed(tmp_path, caplog):
    values = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.0], np.float32)  # two ties: to even
    Checkpointer(tmp_path).save({"w": jnp.asarray(values), "b": jnp.ones(2)}, 3)
    found = Checkpointer(tmp_path).restore({"w": jnp.zeros(3, jnp.bfloat16), "b": jnp.zeros(2)}, cast=True)
    assert found["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found["w"], np.float64), [1.0, 1 + 2.0**-6, 3.0])
    assert "1 leaves were cast: w: float32[3] in the checkpoint, bfloat16[3] here" in caplog.text


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_fault_29_a_cast_that_would_overflow_is_refused(kind, tmp_path):
    Checkpointer(tmp_path).save({"w": kind(np.array([1.0, 70000.0], np.float32))}, 0)
    with pytest.raises(CheckpointError, match="w holds numbers up to 70000, which float16 cannot hold"):
        Checkpointer(tmp_path).restore({"w": kind(np.zeros(2, np.float16))}, cast=True)


def test_fault_29_what_jax_would_cut_to_32_bits_is_refused_or_cast_as_asked(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    for step, x in enumerate((np.int64([2**40 + 1]), np.float64([1 / 3]), np.float64([1e300]))):
        checkpointer.save({"w": x}, step)
        with pytest.raises(CheckpointError, match=r"w is (int|float)64\[1\], which jax would cut to 32 bits"):
            checkpointer.restore({"w": jax.ShapeDtypeStruct(x.shape, x.dtype)}, step)
    assert checkpointer.restore({"w": jnp.zeros(1)}, 1, cast=True)["w"] == np.float32(1 / 3)
    with pytest.raises(CheckpointError, match=r"w holds numbers up to 1e\+300, which float32 cannot hold"):
        checkpointer.restore({"w": jnp.zeros(1)}, 2, cast=True)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e5m2"])
def test_fault_31_a_state_that_is_not_finite_is_refused_with_its_path(value, dtype, tmp_path):
    state = {"good": jnp.ones(3), "layer": {"kernel": jnp.ones(5).at[3].set(value).astype(dtype)}}
    with pytest.raises(CheckpointError, match=r"not finite, in layer/kernel;"):
        Checkpointer(tmp_path).save(state, 0)
    assert Checkpointer(tmp_path).steps() == [] and not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"not finite, in layer/kernel;"):
        Checkpointer(tmp_path).save(state, 0, allow_nonfinite=["good"])
    Checkpointer(tmp_path).save(state, 0, allow_nonfinite="**/kernel")
    Checkpointer(tmp_path).save(state, 1, allow_nonfinite=True)
    assert bits(Checkpointer(tmp_path).restore(blank(state))) == bits(state)


@pytest.mark.parametrize("bad", [float("nan"), np.float64("inf"), np.array([1, np.nan])])
def test_fault_31_numbers_and_numpy_are_looked_at_too(bad, tmp_path):
    with pytest.raises(CheckpointError, match="not finite, in x;"):
        Checkpointer(tmp_path).save({"x": bad}, 0)


@pytest.mark.parametrize(
    "leaf", ["text", object(), np.array([object()]), np.array(["a"]), lambda: 0, np.datetime64("2026-01-01")]
)
def test_fault_32_what_would_need_a_pickle_is_refused(leaf, tmp_path):
    with pytest.raises(TypeError, match=r"^layer/x is .*, which a checkpoint does not hold; legal are numbers"):
        Checkpointer(tmp_path).save({"layer": {"x": leaf}}, 0)
    assert not list(tmp_path.iterdir())


def test_fault_32_a_dtype_that_no_checkpoint_holds_is_not_believed(broken):
    from mpjax.store.manifest import seal

    (meta,) = broken.glob("2/meta.json")
    meta.write_text(meta.read_text().replace('"int32"', '"object"'))
    (broken / "2" / MANIFEST).unlink()
    seal(broken / "2")
    with pytest.raises(CheckpointError, match="'object', which no checkpoint holds"):
        Checkpointer(broken).restore(numbered(0), 2)


def test_fault_32_nothing_here_unpickles_or_evaluates():
    """No file that mpjax or an experiment reads can run code: what would do so is nowhere imported or called."""
    root = Path(mpjax.__file__).parents[1]
    runs_code = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}, {"eval", "exec", "compile"}
    found = []
    for path in [*root.glob("mpjax/**/*.py"), *root.glob("experiments/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            bad = any(name.partition(".")[0] in runs_code[0] for name in names)
            bad |= isinstance(node, ast.Call) and getattr(node.func, "id", "") in runs_code[1]
            bad |= (
                isinstance(node, ast.keyword)
                and node.arg == "allow_pickle"
                and getattr(node.value, "value", 1) is not False
            )
            found += [f"{path.relative_to(root)}:{node.lineno}"] if bad else []
    assert found == []


@pytest.mark.parametrize("step", ["../x", "5", -1, 1.5, True, None, np.float32(2)])
def test_fault_28_what_is_no_step_is_refused(step, tmp_path, unchecked):
    checkpointer = Checkpointer(tmp_path / "run")
    if step is not None:
        with pytest.raises(ValueError, match="legal is an int from 0"):
            checkpointer.restore(numbered(0), step)
    with pytest.raises(ValueError, match=r"legal is an int from 0|give step="):
        checkpointer.save(numbered(0), step)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": 0}, "keep=0"), ({"keep": True}, "keep=True"), ({"every": -5}, "every=-5"), ({"every": 0.5}, "every=0.5"),
        ({"directory": "gs://bucket/run"}, "mount what is remote"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(settings, words, tmp_path, unchecked):
    with pytest.raises(ValueError, match=re.escape(words)):
        Checkpointer(**({"directory": tmp_path} | settings))


# ---- what lies about in the directory --------------------------------------------------------------------------------


def test_fault_28_foreign_files_and_empty_folders_are_no_steps(broken):
    for name in ("5", "007", "8.tmp", ".saving-9-x", "notes", "١٢"):
        (broken / name).mkdir()
    (broken / "11").write_text("a file")
    (broken / "12").symlink_to(broken / "1")
    (broken / "13").mkdir()
    (broken / "13" / "arrays").mkdir()
    checkpointer = Checkpointer(broken)
    assert (checkpointer.steps(), checkpointer.latest()) == ([1, 2], 2)
    assert bits(checkpointer.restore(numbered(0))) == bits(numbered(2))
    checkpointer.save(numbered(3), 5)  # the empty folder gives way
    assert checkpointer.steps() == [1, 2, 5]
    assert {"007", "8.tmp", "notes", "11", "12", "13", "١٢"} <= {path.name for path in broken.iterdir()}
    assert not (broken / ".saving-9-x").exists()


def test_a_full_folder_in_the_place_of_a_step_is_left_alone(tmp_path):
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "thesis.tex").write_text("dear")
    with pytest.raises(FileExistsError, match="step 4 is already in"):
        Checkpointer(tmp_path).save(numbered(4), 4)
    assert (tmp_path / "4" / "thesis.tex").read_text() == "dear"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".s")] == []


def test_a_step_is_written_once(broken):
    with pytest.raises(FileExistsError, match=r"step 2 is already in .*; a step is written once"):
        Checkpointer(broken).save(numbered(7), 2)
    assert bits(Checkpointer(broken).restore(numbered(0), 2)) == bits(numbered(2))


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: (step / "meta.json").write_text("{}"),
        lambda step: (step / MANIFEST).unlink(),
        lambda step: (shutil.rmtree(step), shutil.copytree(step.with_name("1"), step)),  # whole, and no step 2
    ],
)
def test_a_damaged_step_gives_way_to_the_run_that_comes_to_it_again(damage, broken, caplog):
    damage(broken / "2")
    Checkpointer(broken).save(numbered(7), 2)
    assert "is replaced" in caplog.text
    assert bits(Checkpointer(broken).restore(numbered(0))) == bits(numbered(7))


def test_keep_leaves_the_newest(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (1, 5, 9, 3):
        checkpointer.save(numbered(step), step)
    assert checkpointer.steps() == [3, 9]  # what was just saved is not taken away
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == set(map(str, checkpointer.steps()))


def test_a_relative_directory_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpointer = Checkpointer("runs/a")
    checkpointer.save(numbered(1), 1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    checkpointer.save(numbered(2), 2)
    assert checkpointer.steps() == [1, 2] and (tmp_path / "runs/a/2").is_dir()


def test_nothing_there(tmp_path):
    checkpointer = Checkpointer(tmp_path / "none")
    assert checkpointer.latest() is None and not (tmp_path / "none").exists()
    with pytest.raises(FileNotFoundError, match=r"no step in .*; there is none"):
        checkpointer.restore(numbered(0))
    checkpointer.save(numbered(1), 1)
    with pytest.raises(FileNotFoundError, match=r"no step 4 in .*; there are \[1\]"):
        checkpointer.restore(numbered(0), 4)


def test_an_older_step_may_be_asked_for_and_what_follows_is_said(saved, caplog):
    assert bits(Checkpointer(saved).restore(numbered(0), 1)) == bits(numbered(1))
    assert "cannot save [2] again" in caplog.text


def test_two_saves_at_once_are_one_and_an_error(tmp_path, monkeypatch):
    inside, go = threading.Event(), threading.Event()
    write = arrays.write

    def slow(*args):
        finish = write(*args)

        def wait():
            inside.set()
            assert go.wait(30)
            finish()

        return wait

    monkeypatch.setattr(arrays, "write", slow)
    first = Checkpointer(tmp_path, asynchronous=True)
    first.save(numbered(1), 1)
    assert inside.wait(30)
    with pytest.raises(CheckpointError, match=r"another save to .* is in progress"):
        Checkpointer(tmp_path).save(numbered(2), 2)
    go.set()
    assert first.steps() == [1]
    Checkpointer(tmp_path).save(numbered(2), 2)
    assert first.steps() == [1, 2]


def test_without_locks_a_save_still_appears_at_one_stroke_and_sweeps_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no locks here")

    (tmp_path / ".saving-1-of-another").mkdir()
    monkeypatch.setattr(folders.fcntl, "flock", refuse)
    Checkpointer(tmp_path).save(numbered(1), 1)
    assert Checkpointer(tmp_path).steps() == [1] and (tmp_path / ".saving-1-of-another").exists()


def test_an_error_beside_training_comes_out_at_the_next_call(tmp_path, monkeypatch, caplog):
    checkpointer = Checkpointer(tmp_path, asynchronous=True)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    calls = {
        "wait": checkpointer.wait,
        "latest": checkpointer.latest,
        "save": lambda: checkpointer.save(numbered(1), 1),
    }
    for call in calls.values():
        with monkeypatch.context() as patch:
            patch.setattr(folders, "publish", no_space)
            checkpointer.save(numbered(5), 5)
            with pytest.raises(OSError, match="No space left"):
                call()
        assert "a save failed" in caplog.text
    assert checkpointer.steps() == []  # told once, and over
    checkpointer.save(numbered(5), 5)
    assert checkpointer.steps() == [5]


# ---- damage ----------------------------------------------------------------------------------------------------------


def files_of(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "emptied": lambda path: path.write_bytes(b""),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "flipped at the start": lambda path: flip(path, 0),
    "flipped in the middle": lambda path: flip(path, path.stat().st_size // 2),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "deleted": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link": lambda path: (path.rename(path.parents[2] / "moved"), path.symlink_to(path.parents[2] / "moved")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_fault_27_a_damaged_file_is_an_older_step_or_an_error_never_other_numbers(damage, saved, tmp_path):
    names = [path.relative_to(saved / "2") for path in files_of(saved / "2") if path.stat().st_size]
    assert len(names) > 8
    for index, name in enumerate(names):
        run = Path(shutil.copytree(saved, tmp_path / str(index)))
        DAMAGE[damage](run / "2" / name)
        checkpointer = Checkpointer(run)
        if (run / "2" / MANIFEST).is_file():
            with pytest.warns(CheckpointWarning, match="damaged: 2: .*; using step 1"):
                found = checkpointer.restore(numbered(0))
            with pytest.raises(CheckpointError, match="damaged: 2: "):
                checkpointer.restore(numbered(0), 2)
        else:  # without a manifest it is no step
            found = checkpointer.restore(numbered(0))
        assert bits(found) == bits(numbered(1)), name
        assert checkpointer.restored is not None and checkpointer.restored.step == 1


def test_fault_27_any_byte_of_the_manifest_may_flip(broken):
    manifest = broken / "2" / MANIFEST
    whole, outcomes = manifest.read_bytes(), []
    for at in range(0, len(whole), 5):
        flip(manifest, at)
        try:
            found = Checkpointer(broken).info(2)
        except CheckpointError:
            outcomes.append("refused")
        else:  # a space, or the case of a digit in an escape: nothing that says anything
            assert json.loads(manifest.read_bytes()) == json.loads(whole) and found.step == 2
            outcomes.append("same")
        manifest.write_bytes(whole)
    assert outcomes.count("refused") > 0.9 * len(outcomes)


def test_fault_27_a_file_too_many_is_damage(broken):
    (broken / "2" / "arrays" / "d" / "0").write_bytes(b"")
    with pytest.raises(CheckpointError, match="arrays/d/0 is not in the manifest"):
        Checkpointer(broken).restore(numbered(0), 2)


def test_fault_27_a_step_under_the_name_of_another(broken):
    (broken / "2").rename(broken / "3")
    with pytest.raises(CheckpointError, match="step 2, in the folder of another"):
        Checkpointer(broken).restore(numbered(0), 3)


def test_fault_27_all_damaged(broken):
    for step in (1, 2):
        (broken / str(step) / "meta.json").write_text("")
    with pytest.raises(CheckpointError, match=r"damaged: 2: meta.json .*; 1: meta.json .*; there is no other step"):
        Checkpointer(broken).restore(numbered(0))
    assert Checkpointer(broken).latest() is None


def test_a_later_format_is_an_error_and_not_a_reason_to_fall_back(broken):
    manifest = broken / "2" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(
        CheckpointError, match="step 2 has format 2; this mpjax reads formats up to 1: use a later mpjax"
    ):
        Checkpointer(broken).restore(numbered(0))


def test_orbax_that_gives_another_dtype_is_not_believed(saved, monkeypatch):
    read = arrays.read
    monkeypatch.setattr(arrays, "read", lambda *a: {k: v.astype(np.float32) for k, v in read(*a).items()})
    with pytest.raises(CheckpointError, match=r"n came back from Orbax as float32\[\], and was written as int32\[\]"):
        Checkpointer(saved).restore(numbered(0))
