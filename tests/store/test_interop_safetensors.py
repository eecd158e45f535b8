"""Safetensors of others: a GPT-2 as Hugging Face stores it against a float64 forward by hand, and what is refused."""

from __future__ import annotations

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import save_file

import mpjax

HEADS, WIDTH, VOCABULARY, LENGTH, LAYERS = 2, 8, 11, 5, 2
TOKENS = np.array([[3, 1, 10, 0, 7], [2, 2, 9, 5, 4]])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]), dtype=bool)
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attn")(nn.LayerNorm(1e-5, name="ln_1")(x), mask=mask)
        y = nn.Dense(4 * WIDTH, name="fc")(nn.LayerNorm(1e-5, name="ln_2")(x))
        return x + nn.Dense(WIDTH, name="proj")(nn.gelu(y, approximate=True))


class GPT2(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        wte = nn.Embed(VOCABULARY, WIDTH, name="wte")
        x = wte(tokens) + nn.Embed(LENGTH, WIDTH, name="wpe")(jnp.arange(tokens.shape[1]))[None]
        for n in range(LAYERS):
            x = Block(name=f"h_{n}")(x)
        return nn.Dense(VOCABULARY, use_bias=False, name="lm_head")(nn.LayerNorm(1e-5, name="ln_f")(x))


QKV = [rf"params/h_\1/attn/{part}" for part in ("query", "key", "value")]
NAMES = [
    (r"wte\.weight", "params/wte/embedding"),
    (r"lm_head\.weight", "params/lm_head/kernel", "transpose"),
    (r"wpe\.weight", "params/wpe/embedding"),
    (r"h\.(\d+)\.attn\.bias", None),  # the causal mask, a buffer
    (r"h\.(\d+)\.attn\.c_attn\.weight", [f"{path}/kernel" for path in QKV], ("split", "reshape")),
    (r"h\.(\d+)\.attn\.c_attn\.bias", [f"{path}/bias" for path in QKV], ("split", "reshape")),
    (r"h\.(\d+)\.attn\.c_proj\.weight", r"params/h_\1/attn/out/kernel", "reshape"),
    (r"h\.(\d+)\.attn\.c_proj\.bias", r"params/h_\1/attn/out/bias"),
    (r"h\.(\d+)\.mlp\.c_(\w+)\.weight", r"params/h_\1/\2/kernel"),
    (r"h\.(\d+)\.mlp\.c_(\w+)\.bias", r"params/h_\1/\2/bias"),
    (r"h\.(\d+)\.ln_(\d)\.weight", r"params/h_\1/ln_\2/scale"),
    (r"h\.(\d+)\.ln_(\d)\.bias", r"params/h_\1/ln_\2/bias"),
    (r"ln_f\.weight", "params/ln_f/scale"),
    (r"ln_f\.bias", "params/ln_f/bias"),
]


def checkpoint(dtype=np.float32) -> dict[str, np.ndarray]:
    """A tiny GPT-2 under Hugging Face's names. (Its Conv1D keeps (in, out); its head is a torch Linear, (out, in).)"""
    rng = np.random.default_rng(0)

    def norm(name):
        return {f"{name}.weight": 1 + rng.normal(size=WIDTH) / 4, f"{name}.bias": rng.normal(size=WIDTH) / 4}

    def layer(name, n, m):
        return {f"{name}.weight": rng.normal(size=(n, m)) / np.sqrt(n), f"{name}.bias": rng.normal(size=m) / 4}

    tensors = {"wte.weight": rng.normal(size=(VOCABULARY, WIDTH)), "wpe.weight": rng.normal(size=(LENGTH, WIDTH)) / 4}
    for n in range(LAYERS):
        tensors |= norm(f"h.{n}.ln_1") | norm(f"h.{n}.ln_2")
        tensors |= layer(f"h.{n}.attn.c_attn", WIDTH, 3 * WIDTH) | layer(f"h.{n}.attn.c_proj", WIDTH, WIDTH)
        tensors |= layer(f"h.{n}.mlp.c_fc", WIDTH, 4 * WIDTH) | layer(f"h.{n}.mlp.c_proj", 4 * WIDTH, WIDTH)
        tensors[f"h.{n}.attn.bias"] = np.tril(np.ones((1, 1, LENGTH, LENGTH)))
    tensors |= norm("ln_f") | {"lm_head.weight": rng.normal(size=(VOCABULARY, WIDTH))}
    return {name: np.ascontiguousarray(x.astype(dtype)) for name, x in tensors.items()}


def logits_by_hand(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """The forward pass in float64, from the names of the file."""
    t = {name: x.astype(np.float64) for name, x in tensors.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * t[f"{name}.weight"] + t[f"{name}.bias"]

    def layer(x, name):
        return x @ t[f"{name}.weight"] + t[f"{name}.bias"]

    def gelu(x):
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x = t["wte.weight"][TOKENS] + t["wpe.weight"]
    for n in range(LAYERS):
        q, k, v = np.split(layer(norm(x, f"h.{n}.ln_1"), f"h.{n}.attn.c_attn"), 3, axis=-1)
        q, k, v = (y.reshape(*y.shape[:2], HEADS, -1).swapaxes(1, 2) for y in (q, k, v))
        scores = np.where(t[f"h.{n}.attn.bias"] > 0, q @ k.swapaxes(-1, -2) / np.sqrt(WIDTH / HEADS), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(x.shape)
        x = x + layer(y, f"h.{n}.attn.c_proj")
        x = x + layer(gelu(layer(norm(x, f"h.{n}.ln_2"), f"h.{n}.mlp.c_fc")), f"h.{n}.mlp.c_proj")
    return norm(x, "ln_f") @ t["lm_head.weight"].T


def like_of(policy):
    model = mpjax.wrap(GPT2(), policy)
    return model, jax.eval_shape(model.init, jax.random.key(0), TOKENS)


@pytest.mark.parametrize(
    ("policy", "tolerance"),
    # float32: a few roundings of 6e-8 in sums of 32. bfloat16: 4e-3 each, over two blocks.
    [("float32", 2e-5), ({"lm_head": "param=bfloat16"}, 0.15)],
)
def test_a_gpt2_of_hugging_face_gives_the_logits_of_a_float64_forward(policy, tolerance, tmp_path):
    tensors = checkpoint()
    save_file(tensors, tmp_path / "model.safetensors")
    model, like = like_of(policy)
    found = mpjax.load_safetensors(tmp_path, like, NAMES)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), (found.params, found.mstate)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), like
    )
    by_rule = {} if policy == "float32" else {"params/lm_head/kernel": ("float32", "bfloat16")}
    assert found.casts == by_rule
    logits, _ = jax.jit(model.apply)(found.params, found.mstate, TOKENS)
    by_hand = logits_by_hand(tensors)
    assert np.abs(np.asarray(logits, np.float64) - by_hand).max() < tolerance < np.abs(by_hand).max() / 10


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, jnp.float8_e4m3fn])
def test_shards_of_half_precision_are_exact_in_float32_masters(dtype, tmp_path):
    tensors = checkpoint(dtype)
    shards = {f"model-0000{n}-of-00002.safetensors": sorted(tensors)[n - 1 :: 2] for n in (1, 2)}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, tmp_path / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")  # lies there too, and is not looked at
    _, like = like_of("mixed_bfloat16")
    found = mpjax.load_safetensors(tmp_path, like, NAMES)
    assert {x.dtype for x in jax.tree.leaves(found.params)} == {jnp.dtype("float32")}
    assert set(found.casts.values()) == {(np.dtype(dtype).name, "float32")} and len(found.casts) == 2 * 16 + 5
    query = tensors["h.1.attn.c_attn.weight"][:, :WIDTH].reshape(WIDTH, HEADS, -1)
    np.testing.assert_array_equal(found.params["h_1"]["attn"]["query"]["kernel"], query.astype(np.float32))
    value = tensors["h.0.attn.c_attn.bias"][2 * WIDTH :].reshape(HEADS, -1)
    np.testing.assert_array_equal(found.params["h_0"]["attn"]["value"]["bias"], value.astype(np.float32))
    np.testing.assert_array_equal(found.params["lm_head"]["kernel"], tensors["lm_head.weight"].T.astype(np.float32))
    by_index = mpjax.load_safetensors(tmp_path / "model.safetensors.index.json", like, NAMES)
    by_name = mpjax.load_safetensors([tmp_path / shard for shard in shards], like, NAMES)
    for other in (by_index, by_name):
        assert jax.tree.all(jax.tree.map(np.array_equal, other.params, found.params))


def one(tmp_path, tensors, shapes, names, dtype="float32"):
    """Load some tensors into params of some shapes, all in one module called m."""
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, tmp_path / "x.safetensors")
    params = {"m": {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}}
    return mpjax.load_safetensors(tmp_path / "x.safetensors", (params, {}), names).params["m"]


def test_each_transform_by_hand(tmp_path):
    x = np.arange(24, dtype=np.float32)
    oihw = x.reshape(2, 3, 4, 1)
    got = one(tmp_path, {"c": oihw}, {"k": (4, 1, 3, 2)}, [("c", "params/m/k", "conv")])["k"]
    assert all(got[h, 0, i, o] == oihw[o, i, h, 0] for o in range(2) for i in range(3) for h in range(4))
    oiw = x.reshape(2, 3, 4)
    got = one(tmp_path, {"c": oiw}, {"k": (4, 3, 2)}, [("c", "params/m/k", ["conv"])])["k"]
    assert all(got[w, i, o] == oiw[o, i, w] for o in range(2) for i in range(3) for w in range(4))
    linear = x[:6].reshape(3, 2)
    got = one(tmp_path, {"l": linear}, {"k": (2, 3)}, [("l", "params/m/k", "transpose")])["k"]
    assert got.tolist() == [[0, 2, 4], [1, 3, 5]]
    # A fused qkv of torch, (3·out, in): its transpose is cut.
    rows = [("f", ["params/m/q", "params/m/k", "params/m/v"], ("transpose", "split"))]
    got = one(tmp_path, {"f": x.reshape(6, 4)}, dict.fromkeys("qkv", (4, 2)), rows)
    assert got["q"][:, 0].tolist() == [0, 1, 2, 3] and got["v"][:, 1].tolist() == [20, 21, 22, 23]
    tied = one(tmp_path, {"t": linear}, dict.fromkeys("ab", (3, 2)), [("t", ["params/m/a", "params/m/b"])])
    assert tied["a"].tolist() == tied["b"].tolist() == linear.tolist()
    doubled = one(tmp_path, {"t": linear}, {"a": (3, 2)}, [("t", "params/m/a", lambda x: x * 2)])
    assert doubled["a"].tolist() == (linear * 2).tolist()


def test_one_error_names_all_that_does_not_fit(tmp_path):
    tensors = {
        "a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float32), "c": np.ones(5, np.float32), "d": np.ones(2, np.float32),
        "e": np.ones(2, np.float32), "f": np.ones(3, np.float32), "stray": np.ones(1, np.float32), "n": np.arange(2),
    }  # fmt: skip
    shapes = {"a": (3, 2), "b": (2, 3), "d": (2,), "q": (1,), "k": (1,), "missing": (7,), "n": (2,)}
    names = [
        ("a", "params/m/a"), ("b", "params/m/b", "reshape"), ("c", "params/m/nowhere"), ("[de]", "params/m/d"),
        ("f", ["params/m/q", "params/m/k"], "split"), ("n", "params/m/n"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"does not fit `like`") as caught:
        one(tmp_path, tensors, shapes, names)
    said = str(caught.value)
    assert "missing: params/m/missing;" in said
    assert "left over: params/m/nowhere (from c), stray (no row of names has it);" in said
    for part in (
        "b under reshape: cannot reshape array of size 4 into shape (2,3)", "params/m/d is given twice, by e too",
        "f under split: array split does not result in an equal division",
        "params/m/a has the shape (2, 3), in `like` (3, 2)", "params/m/n is int64, in `like` float32",
    ):  # fmt: skip
        assert part in said
    assert "(floats are cast, ints never); add or mend rows of names; (regex, None) drops what is not wanted" in said


@pytest.mark.parametrize(
    "row",
    [
        ("a",),
        "ab",
        (1, "params/a"),
        ("(", "params/a"),
        ("a", 3.5),
        ("a", "params/a", "rotate"),
        ("a", ["params/a", 3]),
        ("a", "params/a", 3),
    ],
)
def test_a_row_that_is_none_is_shown(row, tmp_path):
    with pytest.raises(
        (ValueError, TypeError), match=r"got .*as (a|the regex of a) row of names.*legal is \(regex, path\)"
    ):
        one(tmp_path, {"a": np.ones(1)}, {"a": (1,)}, [row])


def test_a_group_that_the_regex_lacks_is_told(tmp_path):
    with pytest.raises(
        ValueError, match=r"got the paths .*params/m/.* for a \(.*group.*\); legal are groups that 'a' has; mend"
    ):
        one(tmp_path, {"a": np.ones(1)}, {"a": (1,)}, [("a", r"params/m/\1")])


def test_narrowing_is_listed_and_overflow_refused(tmp_path):
    with pytest.raises(ValueError, match=r"params/m/a is beyond what float16 can hold"):
        one(tmp_path, {"a": np.float32([1e6])}, {"a": (1,)}, [("a", "params/m/a")], "float16")
    with pytest.raises(ValueError, match=r"params/m/a is beyond"):  # beside an infinity that was there it went unseen
        one(tmp_path, {"a": np.float32([1e6, -np.inf])}, {"a": (2,)}, [("a", "params/m/a")], "float16")
    mask = one(tmp_path, {"a": np.float32([1, -np.inf])}, {"a": (2,)}, [("a", "params/m/a")], "float16")
    assert mask["a"].tolist() == [1, -np.inf]


def test_what_is_no_safetensors_is_refused(tmp_path):
    like = ({"w": jax.ShapeDtypeStruct((1,), "float32")}, {})
    with pytest.raises(FileNotFoundError, match=r"without safetensors; legal is one with model.safetensors, .*convert"):
        mpjax.load_safetensors(tmp_path, like, [])
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(ValueError, match=r"mpjax never unpickles"):
        mpjax.load_safetensors(tmp_path / "pytorch_model.bin", like, [])
    with pytest.raises(ValueError, match=r"got a dict for `like`; legal is the pair"):
        mpjax.load_safetensors([], like[0], [])
    (tmp_path / "a.safetensors").write_bytes(
        b'\x40\0\0\0\0\0\0\0{"w":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'.ljust(72) + bytes(3)
    )
    with pytest.raises(ValueError, match=r"got the tensor w .* in the format F6_E2M3; legal are formats that numpy or"):
        mpjax.load_safetensors(tmp_path, like, [("w", "params/w")])
    save_file({"w": np.ones(1)}, tmp_path / "a.safetensors")
    save_file({"w": np.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"got w in .*a.safetensors and in .*b.safetensors; legal is one of them"):
        mpjax.load_safetensors(tmp_path, like, [("w", "params/w")])


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        (
            '{"weight_map": {"w": "../a.safetensors"}}',
            ValueError,
            r"names '../a.safetensors'; legal are files beside it",
        ),
        ('{"weight_map": {"w": "/etc/passwd"}}', ValueError, r"legal are files beside it"),
        (
            '{"weight_map": {"w": "gone.safetensors"}}',
            FileNotFoundError,
            r"whose shard gone.safetensors is not beside it",
        ),
        ("[]", ValueError, r"no index of shards .*legal is Hugging Face's"),
        ('{"weight_map": {"w": 3}}', ValueError, r"no index of shards"),
        ("{", ValueError, r"no index of shards"),
    ],
)
def test_a_bad_index_reads_nothing(text, error, said, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(error, match=said):
        mpjax.load_safetensors(tmp_path, ({}, {}), [])
