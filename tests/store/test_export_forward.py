"""The exported forward function: bit for bit the jitted one, in a process that cannot import the model's code."""

from __future__ import annotations

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx
from flax.core import meta

import mpjax
from mpjax.core.struct import pytree_dataclass
from mpjax.numerics.attention import fits_cudnn, unfused
from mpjax.policy.written import policy_to_words
from mpjax.store import tensors

X = np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8)(x)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(3)(x)


class Twin(nnx.Module):
    def __init__(self, rngs):
        self.up, self.norm = nnx.Linear(8, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.drop, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(self.norm(self.attention(self.up(x)))))


DOORS = {"linen": Net(), "nnx": Twin}

RUN = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flax", "optax") or name.startswith(("mpjax.wrap", "tests")):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Blocked())
import numpy as np
import mpjax
for folder in sys.argv[1:]:
    forward = mpjax.load_forward(f"{folder}/net.forward")
    weights = mpjax.load_export(f"{folder}/net.safetensors", like=forward.like)
    np.save(f"{folder}/y.npy", forward(weights.params, weights.mstate, np.load(f"{folder}/x.npy")))
assert not [name for name in sys.modules if name.split(".")[0] == "flax"]
"""


def filled(model, *sample):
    """Variables of the right shapes without the price of compiling an initialiser."""
    rng = np.random.default_rng(1)

    def leaf(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return np.abs(rng.normal(size=x.shape)).astype(x.dtype)

    return jax.tree.map(leaf, jax.eval_shape(model.init, jax.random.key(0), *sample))


def jitted(model, **kwargs):
    return jax.jit(lambda params, mstate, *x: model.apply(params, mstate, *x, **kwargs)[0])


def test_it_runs_without_the_models_code_bit_for_bit(tmp_path):
    expected = {}
    for door, module in DOORS.items():
        folder = tmp_path / door
        folder.mkdir()
        model = mpjax.wrap(module, "mixed_bfloat16")
        params, mstate = filled(model, X)
        mpjax.export_weights(params, folder / "net.safetensors", "bfloat16", mstate=mstate)
        served = mpjax.load_export(folder / "net.safetensors")
        mpjax.export_forward(model, served.params, served.mstate, X, path=folder / "net.forward")
        x = np.resize(X, (5, 4, 8))  # another batch than the sample's
        np.save(folder / "x.npy", x)
        expected[door] = np.asarray(jitted(model, train=False)(served.params, served.mstate, x))
    program = [sys.executable, "-c", RUN, *(str(tmp_path / door) for door in DOORS)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for door, y in expected.items():
        found = np.load(tmp_path / door / "y.npy")
        assert found.dtype == y.dtype and found.shape == (5, 4, 3) and found.tobytes() == y.tobytes()


@pytest.mark.parametrize("door", DOORS)
def test_its_products_are_the_policys(door, tmp_path):
    model = mpjax.wrap(DOORS[door], {"head" if door == "nnx" else "Dense_1": "compute=float32"})
    params, mstate = jax.eval_shape(model.init, jax.random.key(0), X)
    forward = mpjax.export_forward(model, params, mstate, X, path=tmp_path / "f", platforms=("cuda",))
    lines = re.findall(r"stablehlo\.dot_general .*: \((.*)\) -> (\S+)", forward.program.mlir_module())
    dtypes = [tuple(re.findall(r"x([a-z]+\d+)>", f"{operands} {result}")) for operands, result in lines]
    # One for the way up, four projections and two products of the attention; the head is in float32.
    assert dtypes == [("bf16",) * 3] * 7 + [("f32",) * 3]
    # A loss scale, a gradient or a float32 copy of a master weight has no place here, but norms and softmax do.
    assert re.search(r"stablehlo\.exponential .*f32>", forward.program.mlir_module())
    assert forward.policy == mpjax.load_forward(tmp_path / "f").policy == policy_to_words(model.policy)
    assert [str(n) for n in forward.inputs[0].shape] == ["b", "4", "8"]
    assert forward.platforms == ("cuda",)


@pytest.mark.parametrize("recipe", ["fp8", "fp8_delayed"])
def test_float8_products_go_out_as_they_are_served(recipe, tmp_path):
    """Delayed scaling serves with the scales that training left in mstate; what is served twice is the same twice."""

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.Dense(16)(x))

    x = np.resize(X, (16, 32))
    model = mpjax.wrap(Two(), f"p=f32,c=bf16,o=f32,dot={recipe}")
    params, mstate = filled(model, x)
    forward = mpjax.export_forward(model, params, mstate, x, path=tmp_path / "f")
    lines = re.findall(r"stablehlo\.dot_general .*: \((.*)\) -> ", forward.program.mlir_module())
    formats = [set(re.findall(r"x(f8\w+|bf16)>", line)) for line in lines]
    for_each = len(forward.platforms)
    assert formats == [{"f8E4M3FN"}] * for_each + [{"bf16"}] * for_each  # three columns are no multiple of 16
    y = np.asarray(jitted(model)(params, mstate, x))
    served = mpjax.load_forward(tmp_path / "f")
    assert served.policy == policy_to_words(model.policy)
    for _ in range(2):
        assert np.asarray(served(params, mstate, x)).tobytes() == y.tobytes()


def test_a_gpu_here_puts_no_fused_kernel_into_the_program(tmp_path, monkeypatch):
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadDotProductAttention(1)(x)

    model = mpjax.wrap(Attention(), "mixed_bfloat16")
    x = np.resize(X, (1, 64, 8))
    params, mstate = filled(model, x)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    half = jnp.ones((1, 64, 1, 8), jnp.bfloat16)
    assert fits_cudnn(half, half, half, None)  # so it would be taken here
    with unfused():
        assert not fits_cudnn(half, half, half, None)
    forward = mpjax.export_forward(model, params, mstate, x, path=tmp_path / "f")
    assert forward.platforms == ("cpu", "cuda", "tpu") and "cudnn" not in forward.program.mlir_module()
    monkeypatch.undo()
    y = jitted(model)(params, mstate, x)
    assert np.asarray(forward(params, mstate, x)).tobytes() == np.asarray(y).tobytes()


def bare(apply):
    return mpjax.Model(lambda rng, *x: ({"w": jnp.ones(8)}, {}), apply)


def test_bare_functions_lists_boxes_and_scalars(tmp_path):
    def apply(params, mstate, x, scale, rng=None):
        y = (x["a"] @ params["layers"][0].unbox() + params["layers"][1]) * scale
        return {"y": (y, [y + 1])}, {"n": mstate["n"] + 1}

    params = {"layers": [meta.Partitioned(jnp.ones(8), ("x",)), 2.0]}  # a number of Python's, too
    model = mpjax.Model(lambda rng: (params, {}), apply)
    mstate, sample = {"n": jnp.int32(4)}, ({"a": X[:, 0]}, jnp.float32(0.5))
    mpjax.export_forward(model, params, mstate, *sample, path=tmp_path / "f", returns_mstate=True)
    out, after = mpjax.load_forward(tmp_path / "f")(params, mstate, *sample)
    by_hand = (X[:, 0].astype(np.float64).sum(-1) + 2) / 2
    np.testing.assert_allclose(out["y"][0], by_hand, rtol=1e-6, atol=1e-6)
    assert after["n"] == 5 and isinstance(out["y"], tuple) and out["y"][1][0].shape == (3,)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_mesh_around_it_is_no_part_of_the_program(kind, tmp_path):
    """It was lowered for the mesh's devices, and a server with one could not run it."""
    model = bare(lambda params, mstate, x, rng=None: (x @ params["w"].unbox(), mstate))
    params = {"w": meta.Partitioned(jnp.ones(8), ("model",))}
    mesh = jax.make_mesh((2,), ("model",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    with jax.set_mesh(mesh):
        mpjax.export_forward(model, params, {}, X, path=tmp_path / "f")
    forward = mpjax.load_forward(tmp_path / "f")
    assert forward.program.nr_devices == 1 and forward(params, {}, X).shape == (3, 4)


def test_the_64_bits_of_numpy_are_those_that_jax_will_have(tmp_path):
    """jax 0.12 warns of them, and warnings are errors here."""
    model = bare(lambda params, mstate, tokens, rng=None: (params["w"][tokens], mstate))
    tokens = np.array([[1, 2]])
    forward = mpjax.export_forward(model, *model.init(None), tokens, path=tmp_path / "f")
    assert forward.inputs[0].dtype == np.int32 and forward(*model.init(None), tokens).tolist() == [[1, 1]]


def test_another_method_is_a_constant_of_the_call(tmp_path):
    class Coder(nn.Module):
        def setup(self):
            self.code = nn.Dense(2)

        def __call__(self, x):
            return self.code(x).sum()

        def encode(self, x):
            return self.code(x)

    model = mpjax.wrap(Coder(), "mixed_bfloat16")
    params, mstate = filled(model, X)
    forward = mpjax.export_forward(model, params, mstate, X, path=tmp_path / "f", method="encode")
    assert forward(params, mstate, X).shape == (3, 4, 2)


def test_a_program_that_depends_on_the_batch_says_so(tmp_path):
    model = bare(lambda params, mstate, x, rng=None: (x.reshape(6, -1), mstate))
    with pytest.raises(
        ValueError, match=r"depends on the size of the batch \(.*\); legal with batch='b' .*give batch=None"
    ):
        mpjax.export_forward(model, *model.init(None), X, path=tmp_path / "f")
    forward = mpjax.export_forward(model, *model.init(None), X, path=tmp_path / "f", batch=None)
    assert forward(*model.init(None), X).shape == (6, 16) and forward.inputs[0].shape == (3, 4, 8)


def test_an_error_of_the_model_itself_stays_what_it_is(tmp_path):
    model = bare(lambda params, mstate, x, rng=None: (x @ params["w"].reshape(2, 4), mstate))
    with pytest.raises(TypeError, match=r"dot_general|contracting"):
        mpjax.export_forward(model, *model.init(None), X, path=tmp_path / "f")


def test_what_cannot_be_exported_is_told(tmp_path):
    model = bare(lambda params, mstate, x, rng=None, **kwargs: (x @ params["w"], mstate))
    variables = model.init(None)
    with pytest.raises(ValueError, match=r"got an array for the keyword mask; .* constant .*; pass it by position"):
        mpjax.export_forward(model, *variables, X, path=tmp_path / "f", mask=X)
    with pytest.raises(
        ValueError, match=r"got sample arrays of \[2, 3\] rows; legal .* share their leading axis.*batch=None"
    ):
        mpjax.export_forward(model, *variables, (X, X[:2]), path=tmp_path / "f")
    for platforms in (("gpu",), "cpu"):  # "depends on the size of the batch"; a program for the platforms c, p and u
        with pytest.raises(
            ValueError, match=r"got platforms=.*; legal is a tuple of some of cpu, cuda, rocm, tpu; name"
        ):
            mpjax.export_forward(model, *variables, X, path=tmp_path / "f", platforms=platforms)
    with pytest.raises(ValueError, match=r"got sample arrays of no rows"):
        mpjax.export_forward(model, *variables, path=tmp_path / "f")

    @pytree_dataclass
    class Out:
        y: jax.Array

    fancy = bare(lambda params, mstate, x, rng=None: (Out(x @ params["w"]), mstate))
    with pytest.raises(
        ValueError, match=r"a program that jax cannot write .*legal are .* dicts, lists and tuples.*return"
    ):
        mpjax.export_forward(fancy, *variables, X, path=tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_wrong_arguments_are_told_by_name(tmp_path):
    model = bare(lambda params, mstate, x, rng=None: (x @ params["w"], mstate))
    params, mstate = model.init(None)
    forward = mpjax.export_forward(model, params, mstate, X, path=tmp_path / "f")
    mend = r"; read weights by load_export\(path, like=forward\.like\)"
    with pytest.raises(ValueError, match=r"got bfloat16\[8\] at params/w; legal is float32\[8\]" + mend):
        forward({"w": params["w"].astype(jnp.bfloat16)}, mstate, X)
    with pytest.raises(ValueError, match=r"got float32\[3, 4\] at input 0; legal is float32\[b, 4, 8\]" + mend):
        forward(params, mstate, X[..., 0])
    with pytest.raises(ValueError, match=r"in which params/w is missing" + mend):
        forward({}, mstate, X)
    with pytest.raises(ValueError, match=r"in which mstate/n was not there when it was exported" + mend):
        forward(params, {"n": X}, X)
    with pytest.raises(ValueError, match=r"got 2 inputs; legal are 1; `forward.inputs` tells"):
        forward(params, mstate, X, X)


def test_a_damaged_or_foreign_program_is_refused(tmp_path):
    model = bare(lambda params, mstate, x, rng=None: (x @ params["w"], mstate))
    file = tmp_path / "f"
    mpjax.export_forward(model, *model.init(None), X, path=file)
    with pytest.raises(ValueError, match=r"which exists; legal is a new file"):
        mpjax.export_forward(model, *model.init(None), X, path=file)
    whole = file.read_bytes()
    for place in range(20, len(whole), len(whole) // 20):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"legal"):
            mpjax.load_forward(file)
    told = {"kind": "mpjax forward", "version": "1", "policy": "null", "jax": "99.1"}
    tensors.write(file, {"program": np.zeros(64, np.uint8)}, told, overwrite=True)
    with pytest.raises(
        ValueError, match=r"jax .* cannot read; legal is .*, and it is of jax 99\.1; install that one or a later"
    ):
        mpjax.load_forward(file)
    tensors.write(file, {}, {"kind": "mpjax weights", "version": "1"}, overwrite=True)
    with pytest.raises(ValueError, match=r"holds mpjax weights; legal here is mpjax forward"):
        mpjax.load_forward(file)
