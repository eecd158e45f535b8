"""Exported weights: what is in the file, what comes back, what it cost, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import stat

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from flax.core import meta
from safetensors import safe_open

import mpjax
from mpjax.store import tensors
from mpjax.store.export.formats import FORMATS

X = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(4)(nn.relu(x))


class Twin(nnx.Module):
    """`Net` in NNX, its modules where Linen's names lie when they are spelled canonically."""

    def __init__(self, rngs):
        self.Dense = nnx.List([nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)])
        self.BatchNorm = nnx.List([nnx.BatchNorm(8, rngs=rngs)])

    def __call__(self, x):
        return self.Dense[1](nnx.relu(self.BatchNorm[0](self.Dense[0](x))))


MODEL = mpjax.wrap(Net(), "mixed_bfloat16")


@pytest.fixture(scope="module")
def variables():
    rng = np.random.default_rng(0)  # to compile an initialiser would cost seconds
    shapes, _ = jax.eval_shape(MODEL.init, jax.random.key(0), X)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, x.dtype), shapes)
    stats = {"mean": jnp.linspace(-1, 1, 8), "var": jnp.linspace(0.5, 2, 8)}
    return params, {"batch_stats": {"BatchNorm_0": stats}}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "net.safetensors"


def kernels(tree) -> list[np.ndarray]:
    return [np.asarray(tree[name]["kernel"]) for name in ("Dense_0", "Dense_1")]


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("to", FORMATS)
def test_it_comes_back_as_it_is_stored_under_the_keys_it_had(to, variables, file):
    params, mstate = variables
    report = mpjax.export_weights(params, file, to, mstate=mstate, policy=MODEL.policy)
    found = mpjax.load_export(file)
    assert found.policy == {"default": "p=full,c=bf16,o=full", "rules": {}, "islands": []}
    assert_same(found.mstate, mstate)
    narrow = to in ("float8_e4m3", "int8")
    dtype = jnp.dtype("float32" if narrow else to)
    rounded = jax.tree.map(lambda x: x if narrow and x.ndim < 2 else np.asarray(x).astype(dtype), params)
    for back, x in zip(kernels(found.params), kernels(params), strict=True):
        if narrow:  # by hand: a scale for each output
            largest, stored = {"int8": (127, np.int8), "float8_e4m3": (448, jnp.float8_e4m3fn)}[to]
            scale = (np.abs(x.astype(np.float64)).max(0) / largest).astype(np.float32)
            ratio = x.astype(np.float64) / scale
            by_hand = (np.rint(ratio) if to == "int8" else ratio).clip(-largest, largest).astype(stored)
            np.testing.assert_array_equal(back, by_hand.astype(np.float32) * scale)
        else:
            np.testing.assert_array_equal(back, x.astype(dtype))
    if not narrow:
        assert_same(found.params, rounded)
    assert (report.bytes_before, report.bytes_after) == {
        # 6·8 + 8·4 in kernels; 8 + 4 in biases, 16 in the norm, 16 statistics; 8 + 4 scales.
        "float32": (496, 496), "bfloat16": (496, 64 + 2 * 108), "float16": (496, 64 + 2 * 108),
        "float8_e4m3": (496, 80 + 4 * (28 + 16 + 12)), "int8": (496, 80 + 4 * (28 + 16 + 12)),
    }[to]  # fmt: skip
    out, _ = MODEL.apply(found.params, found.mstate, X, train=False)
    exact, _ = MODEL.apply(params, mstate, X, train=False)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, exact, atol={"float8_e4m3": 0.2}.get(to, 0.05))


def test_the_biases_of_attention_and_the_norms_of_a_stack_keep_float32(file):
    stack = {
        "attention": {"query": {"bias": jnp.ones((2, 3)), "kernel": jnp.ones((4, 2, 3))}},
        "norm": {"scale": jnp.ones((5, 4))},
    }
    report = mpjax.export_weights(stack, file, "int8")
    assert {row.path.split("/", 2)[2]: (row.stored, row.note) for row in report.tensors} == {
        "query/bias": ("float32", "a bias: not int8"), "query/kernel": ("int8", ""), "scale": ("float32", "a scale: not int8"),
    }  # fmt: skip


def test_an_array_below_its_name_is_called_as_it_is(file):
    """So does a State of NNX hold it, and a checkpoint of boxes: its biases were quantised, its tables by columns."""
    embedding = {"value": jnp.ones((5, 3))}
    report = mpjax.export_weights(
        {"q": {"bias": {"value": jnp.ones((2, 3))}}, "e": {"embedding": embedding}}, file, "int8"
    )
    assert [(row.path, row.stored, row.bytes_after) for row in report.tensors] == [
        ("params/e/embedding/value", "int8", 15 + 5 * 4), ("params/q/bias/value", "float32", 24),
    ]  # fmt: skip


def test_one_scale_for_a_tensor(variables, file):
    mpjax.export_weights(variables[0], file, "int8", per="tensor")
    with safe_open(file, framework="numpy") as plain:
        scale = plain.get_tensor("params/Dense_0/kernel.scale")
    amax = np.abs(np.asarray(variables[0]["Dense_0"]["kernel"], np.float64)).max()
    assert scale.shape == (1, 1) and scale[0, 0] == np.float32(amax / 127)


def test_plain_safetensors_reads_it(variables, file):
    params, mstate = variables
    mpjax.export_weights(params, file, {"Dense_1": "int8", "**": "bfloat16"}, mstate=mstate)
    with safe_open(file, framework="numpy") as plain:
        got = {name: plain.get_tensor(name) for name in plain.keys()}
        about = plain.metadata()
    assert sorted(got) == [
        "mstate/batch_stats/BatchNorm_0/mean", "mstate/batch_stats/BatchNorm_0/var", "params/BatchNorm_0/bias",
        "params/BatchNorm_0/scale", "params/Dense_0/bias", "params/Dense_0/kernel", "params/Dense_1/bias",
        "params/Dense_1/kernel", "params/Dense_1/kernel.scale",
    ]  # fmt: skip
    first, second = kernels(params)
    np.testing.assert_array_equal(got["params/Dense_0/kernel"], first.astype(jnp.bfloat16))
    by_hand = got["params/Dense_1/kernel"] * got["params/Dense_1/kernel.scale"]
    np.testing.assert_allclose(by_hand, second, atol=np.abs(second).max() / 127 / 2 * 1.001)
    assert got["params/Dense_1/bias"].dtype == np.float32
    assert (about["kind"], about["version"], about["policy"]) == ("mpjax weights", "1", "null")
    assert json.loads(about["tensors"])["params/Dense_1/kernel"] == {
        "keys": ["params", "Dense_1", "kernel"], "format": "int8", "scale": "params/Dense_1/kernel.scale", "per": "channel",
    }  # fmt: skip


def test_every_kind_of_leaf(file):
    tied = jnp.ones((2, 2))
    params = {
        "layers": [{"w": tied}, {"w": tied}], "empty": jnp.zeros((0, 3)), "scalar": jnp.float32(3), "index": jnp.arange(3),
        "flags": np.array([True, False]), "half": jnp.ones(2, jnp.float16), "complex": np.array([1 + 2j], np.complex64),
        "python": 0.5, "none": None, "boxed": meta.Partitioned(jnp.ones((2, 2)), ("x", None)),
    }  # fmt: skip
    mstate = {"rngs": {"dropout": {"key": jax.random.key(3, impl="rbg"), "count": jnp.uint32(7)}}}
    mpjax.export_weights(params, file, "float8_e4m3", mstate=mstate)
    found = mpjax.load_export(file)
    want = params | {
        "layers": {"0": {"w": tied}, "1": {"w": tied}}, "half": jnp.ones(2), "python": jnp.float32(0.5), "boxed": jnp.ones((2, 2)),
    }  # fmt: skip
    assert_same(found.params, {name: x for name, x in want.items() if x is not None})
    key = found.mstate["rngs"]["dropout"].pop("key")
    assert jax.random.key_impl(key) == "rbg"
    assert_same(jax.random.key_data(key), jax.random.key_data(jax.random.key(3, impl="rbg")))
    assert_same(found.mstate, {"rngs": {"dropout": {"count": jnp.uint32(7)}}})
    shapes = jax.eval_shape(lambda: (params | {"python": jnp.float32(0)}, mstate))
    filled = mpjax.load_export(file, like=shapes)
    assert jax.tree.structure((filled.params, filled.mstate)) == jax.tree.structure(shapes)
    assert filled.params["layers"][1]["w"].tolist() == [[1, 1], [1, 1]] and filled.params["boxed"].names == ("x", None)
    assert filled.params["half"].dtype == jnp.float16


def test_a_dtype_comes_back_bit_for_bit_or_is_refused(file):
    """float8_e4m3fnuz and what is in another machine's order of bytes gave a file that nothing could read."""
    whole = {name: np.ones(2, name) for name in sorted(tensors.HOLDS)} | {"big": np.arange(3, dtype=">f4")}
    mpjax.export_weights({"ints": np.arange(3, dtype=">i2")}, file, mstate=whole)
    found, _ = tensors.read(file)
    assert_same({name: found[f"mstate/{name}"] for name in whole}, whole | {"big": np.arange(3, dtype="f4")})
    assert found["params/ints"].tolist() == [0, 1, 2]
    for name in ("int4", "float4_e2m1fn", "float8_e3m4", "complex128", "datetime64[D]"):
        with pytest.raises(ValueError, match=r"at mstate/x; legal are arrays of a dtype that safetensors has; take it"):
            mpjax.export_weights({}, file, mstate={"x": np.zeros(2, name)}, overwrite=True)
    assert mpjax.export_weights({"w": np.ones(2, "float8_e3m4")}, file, "float16", overwrite=True).bytes_after == 4


def test_dtype_is_for_all_float_params(variables, file):
    mpjax.export_weights(variables[0], file, "int8", mstate=variables[1])
    found = mpjax.load_export(file, dtype="bf16")
    assert {x.dtype for x in jax.tree.leaves(found.params)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(found.mstate)} == {jnp.dtype("float32")}
    with pytest.raises(ValueError, match=r"got both like= and dtype="):
        mpjax.load_export(file, like=variables, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"got a dict for `like`; legal is the pair \(params, mstate\).*give both"):
        mpjax.load_export(file, like=variables[0])
    with pytest.raises(ValueError, match=r"'int8'; use one of"):  # every weight under 1 was read as 0
        mpjax.load_export(file, dtype="int8")
    mpjax.export_weights({"h": {"w": np.float32([[1e6, 1]])}, "b": np.ones(2)}, file, overwrite=True)
    for narrow in ("float16", jnp.float8_e4m3fn):  # it was read as infinity, and as NaN
        with pytest.raises(
            ValueError, match=r"which cannot hold params/h/w; legal is one that holds all .*give a wider"
        ):
            mpjax.load_export(file, dtype=narrow)


def test_linen_weights_serve_in_nnx_and_back(variables, file):
    params, mstate = variables
    twin = mpjax.wrap(lambda rngs: Twin(rngs), "mixed_bfloat16")
    mpjax.export_weights(params, file, "float32", mstate=mstate)
    found = mpjax.load_export(file, like=jax.eval_shape(twin.init, jax.random.key(1)))
    module = twin.merge(found.params, found.mstate)
    np.testing.assert_array_equal(module.Dense[1].kernel[...], params["Dense_1"]["kernel"])
    np.testing.assert_array_equal(module.BatchNorm[0].var[...], mstate["batch_stats"]["BatchNorm_0"]["var"])
    out = MODEL.apply(params, mstate, X, train=False)[0]
    assert_same(twin.apply(found.params, found.mstate, X, train=False)[0], out)
    mpjax.export_weights(found.params, file, "float32", mstate=found.mstate, overwrite=True)
    plain = mpjax.load_export(file)  # nested dicts are what the NNX door takes
    assert_same(twin.apply(plain.params, plain.mstate, X, train=False)[0], out)
    twin.merge(plain.params, plain.mstate)
    back = mpjax.load_export(file, like=jax.eval_shape(MODEL.init, jax.random.key(1), X))
    assert_same((back.params, back.mstate), variables)


def test_a_box_that_was_saved_as_a_node_is_filled(file):
    """A checkpoint walks through Flax's boxes: their array stands one level deeper than in the model."""
    mpjax.export_weights({"k": {"value": jnp.ones(2)}}, file, "float32")
    found = mpjax.load_export(file, like=({"k": meta.Partitioned(jnp.zeros(2), ("x",))}, {}))
    assert found.params["k"].names == ("x",) and found.params["k"].value.tolist() == [1, 1]
    assert mpjax.load_export(file, like=({"k": jnp.zeros(2)}, {})).params["k"].tolist() == [1, 1]


def test_like_has_the_last_word_on_float_dtypes(variables, file):
    mpjax.export_weights(variables[0], file, "float32", mstate=variables[1])
    half = mpjax.wrap(Net(), "bfloat16")
    found = mpjax.load_export(file, like=jax.eval_shape(half.init, jax.random.key(0), X))
    assert_same(found.params["Dense_0"]["kernel"], variables[0]["Dense_0"]["kernel"].astype(jnp.bfloat16))


def test_what_does_not_fit_like_is_named_all_at_once(variables, file):
    params, mstate = variables
    mpjax.export_weights(params | {"steps": jnp.arange(2), "big": jnp.float32([1e6])}, file, "float32", mstate=mstate)
    like = {
        "Dense_0": {"kernel": jnp.zeros((8, 6)), "bias": jnp.zeros(8, int)}, "BatchNorm_0": params["BatchNorm_0"],
        "steps": jnp.zeros(2), "big": jnp.zeros(1, jnp.float16), "new": jnp.zeros(1),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"does not fit `like`") as caught:
        mpjax.load_export(file, like=(like, mstate))
    said = str(caught.value)
    assert "missing: params/new;" in said and "left over: params/Dense/1/bias, params/Dense/1/kernel;" in said
    assert "params/Dense/0/kernel has the shape (6, 8), in `like` (8, 6)" in said
    assert (
        "params/Dense/0/bias is float32, in `like` int32" in said and "params/steps is int32, in `like` float32" in said
    )
    assert "params/big is beyond what float16 can hold" in said
    assert "Legal is one array for each leaf" in said and "export params and mstate of the same model" in said


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("to", FORMATS)
def test_non_finite_weights_are_refused_with_their_path(bad, to, file):
    tree = {"Dense_0": {"kernel": np.float32([[1, 2], [bad, 3]])}}
    with pytest.raises(ValueError, match=re.escape("NaN or infinity in params/Dense_0/kernel; legal are finite")):
        mpjax.export_weights(tree, file, to)
    with pytest.raises(ValueError, match=r"NaN or infinity in mstate/batch_stats/Dense_0/kernel"):
        mpjax.export_weights({}, file, to, mstate={"batch_stats": tree})
    assert not file.exists()


def test_a_whole_train_state_is_refused(file):
    """Its moments were written as weights, in `to` as they are, and its rng and scale beside them."""
    w = mpjax.Model(lambda rng: ({"w": jnp.ones((2, 2))}, {}), lambda params, mstate: (params["w"], mstate))
    state = mpjax.TrainState.create(w, optax.adam(1e-3), jax.random.key(0))
    with pytest.raises(ValueError, match=r"got a TrainState for params; legal are params alone: give state\.params"):
        mpjax.export_weights(state, file)
    assert not file.exists()


def test_what_a_half_format_cannot_hold_is_refused_never_infinite(file):
    mpjax.export_weights({"w": np.float32([65519, -65519])}, file, "float16")
    assert np.abs(mpjax.load_export(file).params["w"]).tolist() == [65504, 65504]
    with pytest.raises(
        ValueError, match=r"got a value of 65520 in params/h/w; float16 ends at 65504; store .*'h/w': 'bf"
    ):
        mpjax.export_weights({"h": {"w": np.float32([1, -65520])}}, file, "float16", overwrite=True)
    with pytest.raises(ValueError, match=r"in params/w; bfloat16 ends at"):
        mpjax.export_weights({"w": np.float32([3.4e38])}, file, "bfloat16", overwrite=True)
    for form in ("int8", "float8_e4m3"):  # scales are float32: these were read back as NaN, and as infinity
        for beyond in (1e200, 1e39):
            with pytest.raises(ValueError, match=rf"in params/w; {form} ends at 3.40282e\+38"):
                mpjax.export_weights({"w": np.array([[beyond, 1.0]])}, file, form, overwrite=True)
    assert np.abs(mpjax.load_export(file).params["w"]).tolist() == [65504, 65504]


def test_the_report_tells_bytes_and_errors_by_hand(file):
    w = np.float32([[127, 2], [0.25, -254]])
    report = mpjax.export_weights({"w": w, "b": np.ones(2, np.float32)}, file, "int8")
    bias, weight = report.tensors
    assert (weight.path, weight.shape, weight.given, weight.stored) == ("params/w", (2, 2), "float32", "int8")
    assert (weight.bytes_before, weight.bytes_after) == (16, 4 + 8)
    assert weight.max_error == 0.25  # the scales are 1 and 2: 0.25 is stored as 0, all else is exact
    assert weight.sqnr_db == pytest.approx(10 * np.log10((127**2 + 4 + 0.0625 + 254**2) / 0.0625))
    assert (bias.stored, bias.note) == ("float32", "fewer than two dimensions: not int8")
    assert report.size_ratio == 24 / 20
    shown = str(report)
    assert "params/w" in shown and "2×2" in shown and "61.1" in shown and "2.50e-01" in shown
    assert "24 → 20 bytes, 1.20 times smaller" in shown and "fewer than two dimensions" in shown
    assert json.loads(json.dumps(report.as_dict()))["tensors"][1]["max_error"] == 0.25


def test_the_file_may_be_read_by_whom_the_umask_lets(file):
    before = os.umask(0o027)
    try:
        mpjax.export_weights({"w": np.ones(2, np.float32)}, file)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_the_metric_sees_the_params_before_and_after(file):
    seen = []

    def metric(params):
        seen.append(params)
        return {"sum": float(params["layers"][0].astype(jnp.float32).sum())}

    params = {"layers": [jnp.bfloat16([[0.25, 127.0]])]}
    report = mpjax.export_weights(params, file, "int8", per="tensor", metric=metric)
    assert (report.metric_before, report.metric_after) == ({"sum": 127.25}, {"sum": 127.0})
    assert [x["layers"][0].dtype for x in seen] == [jnp.bfloat16] * 2
    assert "sum: 127.25 before, 127 after (-0.25)" in str(report)


def test_an_existing_file_is_kept_unless_overwrite_is_said(file):
    mpjax.export_weights({"w": np.ones(2, np.float32)}, file)
    with pytest.raises(ValueError, match=r"which exists; legal is a new file: .*overwrite=True"):
        mpjax.export_weights({"w": np.zeros(2, np.float32)}, file)
    assert mpjax.load_export(file).params["w"].tolist() == [1, 1]
    mpjax.export_weights({"w": np.zeros(2, np.float32)}, file, overwrite=True)
    assert mpjax.load_export(file).params["w"].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"which exists"):
        mpjax.export_weights({}, file.parent, overwrite=True)


def test_a_full_disk_leaves_what_was_there_and_no_debris(file):
    mpjax.export_weights({"w": np.ones(2, np.float32)}, file)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"could not be written .*what stood there before is as it was"):
            mpjax.export_weights({"w": np.ones(50_000, np.float32)}, file, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert mpjax.load_export(file).params["w"].tolist() == [1, 1]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_after_writing_leaves_no_half_file(step, file, monkeypatch):
    def fails(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(tensors.os, step, fails)
    with pytest.raises(OSError, match=r"could not be written \(.*Input/output error\)"):
        mpjax.export_weights({"w": np.ones(2, np.float32)}, file)
    assert list(file.parent.iterdir()) == []


def test_a_damaged_file_gives_an_error_and_never_other_numbers(variables, file):
    mpjax.export_weights(variables[0], file, "int8", mstate=variables[1])
    whole = file.read_bytes()
    for size in (0, 3, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"no whole safetensors file.*legal"):
            mpjax.load_export(file)
    for place in range(0, len(whole), 29):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"got .*net\.safetensors.*legal"):
            mpjax.load_export(file)
    file.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=r"no whole safetensors file"):
        mpjax.load_export(file)
    with pytest.raises(FileNotFoundError):
        mpjax.load_export(file.with_name("none"))


class Bomb:
    """Written as a pickle, it makes a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_is_refused_unread(protocol, tmp_path):
    (tmp_path / "w.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded"), protocol))
    np.savez(tmp_path / "w.npz", np.array([Bomb(tmp_path / "exploded")], dtype=object), allow_pickle=True)
    for name in ("w.bin", "w.npz"):
        with pytest.raises(
            ValueError, match=r"a pickle or a zip of pickles; mpjax never unpickles.*legal is a safetensors"
        ):
            mpjax.load_export(tmp_path / name)
    (tmp_path / "old.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded"), 0))
    with pytest.raises(ValueError, match=r"no whole safetensors file"):
        mpjax.load_export(tmp_path / "old.bin")
    assert not (tmp_path / "exploded").exists()


def test_a_header_whose_length_begins_as_a_pickle_does_is_read(tmp_path):
    """Lengths of headers are multiples of eight: of thirty-two files one begins with 0x80."""
    file, w = tmp_path / "w.safetensors", np.arange(3).astype(jnp.float8_e4m3fn)
    for n in range(0, 256, 8):
        tensors.write(file, {"w": w}, {"filler": "x" * n}, overwrite=True)
        if file.read_bytes()[:1] == b"\x80":
            break
    else:
        pytest.fail("none of them begins so")
    with tensors.opened(file) as found:
        assert found.array("w").tolist() == [0, 1, 2]


def test_the_report_is_plain_text_in_a_notebook(file, monkeypatch):
    """Where rich would show a table by itself, and a kernel asks for colours."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    report = mpjax.export_weights({"w[in]": np.ones((4, 4), np.float32)}, file.with_name("plain"), "int8")
    assert re.match(r" tensor +shape +given", str(report)) and "\x1b" not in str(report)
    assert "w[in]" in str(report)  # which is no markup


def test_files_of_other_kinds_and_times_are_told_apart(file):
    from safetensors.numpy import save_file

    save_file({"w": np.ones(2)}, file)
    with pytest.raises(
        ValueError, match=r"without mpjax's checksum; legal is one that mpjax exported; mpjax.load_safe"
    ):
        mpjax.load_export(file)
    tensors.write(file, {}, {"kind": "mpjax weights", "version": "2"}, overwrite=True)
    with pytest.raises(
        ValueError, match=r"of version 2; this mpjax reads mpjax weights up to version 1; install a newer"
    ):
        mpjax.load_export(file)
    entry = {"keys": ["params", "w"], "format": "int8", "scale": "w.scale", "per": "channel"}
    for words in (
        "[]",
        "{",
        "null",
        json.dumps({"w": {}}),
        json.dumps({"w": entry}),
        json.dumps({"w": entry | {"keys": 3}}),
    ):
        told = {"kind": "mpjax weights", "version": "1", "policy": "null", "tensors": words}
        tensors.write(file, {"w": np.ones((1, 1), np.int8)}, told, overwrite=True)
        with pytest.raises(
            ValueError, match=r"whose metadata are not what mpjax writes .*; legal is .*export_weights; export it"
        ):
            mpjax.load_export(file)
    tensors.write(file, {}, {"kind": "mpjax forward", "version": "1"}, overwrite=True)
    with pytest.raises(ValueError, match=r"holds mpjax forward; legal here is mpjax weights; name such a file"):
        mpjax.load_export(file)
    with pytest.raises(ValueError, match=r"got the folder .*; legal is one safetensors file"):
        mpjax.load_export(file.parent)


def test_bad_arguments_are_told(file, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of this suite
    good = {"w": np.ones((2, 2), np.float32)}
    with pytest.raises(ValueError, match=r"got the format 'int4'; legal are float32"):
        mpjax.export_weights(good, file, "int4")
    with pytest.raises(ValueError, match=r"got the format <class .*bfloat16'>; legal are float32"):
        mpjax.export_weights(good, file, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"acts on no weight"):
        mpjax.export_weights(good, file, {"head": "int8"})
    with pytest.raises(ValueError, match=r"got str of .* at params/name; legal are arrays"):
        mpjax.export_weights(good | {"name": "x"}, file)
    donated = jnp.ones(2)
    donated.delete()
    with pytest.raises(
        ValueError, match=r"got params/w, whose memory was donated .*; legal are the params of the state"
    ):
        mpjax.export_weights({"w": donated}, file)
    with pytest.raises(ValueError, match=r"got two leaves with the path params/a/b"):
        mpjax.export_weights({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, file)
    with pytest.raises(ValueError, match=r"got a leaf called params/w\.scale, where the scale of params/w"):
        mpjax.export_weights(good | {"w.scale": np.ones(1)}, file, "int8")
    assert not file.exists()


def test_64_bits_are_not_cut_in_silence(file):
    mpjax.export_weights({"n": np.array([2**40])}, file)
    with pytest.raises(ValueError, match=r"got int64 at params/n; without x64 mode .* set jax_enable_x64"):
        mpjax.load_export(file)
    with jax.enable_x64(True):
        assert mpjax.load_export(file).params["n"].tolist() == [2**40]
