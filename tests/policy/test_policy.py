"""Policies: one value and one string, however they were written; what they cast and what they leave alone."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import jmp
import numpy as np
import pytest

from mpjax.core.dtypes import NAMES, canonical
from mpjax.numerics.delayed import DelayedDot
from mpjax.numerics.dot import QuantizedDot
from mpjax.policy.policy import DOTS, PRESETS, Policy, cast_to_full, cast_to_half, computes_in, get_policy, parse_keys

FORMATS = list(NAMES)


# One value, one string.


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_fault_12_every_format_has_one_policy_however_it_is_spelled(dtype):
    scalar_type = getattr(jnp, dtype.name)
    spelled = [dtype, scalar_type, dtype.type, *NAMES[dtype]]
    policies = [Policy(x, x, x) for x in spelled] + [get_policy(name) for name in NAMES[dtype]]
    policies += [get_policy(f"p={name},c={name}") for name in NAMES[dtype]]
    assert len(set(policies)) == 1 and len({str(p) for p in policies}) == 1 and len({repr(p) for p in policies}) == 1
    assert policies[0].param_dtype is policies[-1].param_dtype == dtype


@pytest.mark.parametrize("param", FORMATS, ids=str)
def test_fault_12_str_round_trips_over_all_formats(param):
    for compute, output in itertools.product(FORMATS, repeat=2):
        policy = Policy(param, compute, output)
        assert get_policy(str(policy)) == policy and hash(get_policy(str(policy))) == hash(policy)
    assert len({str(Policy(param, compute, "f32")) for compute in FORMATS}) == len(FORMATS)


def test_fault_12_spaces_are_allowed_anywhere():
    for text in (
        " p=f32,c=bf16,o=f32 ",
        "p = f32 , c = bf16 , o = f32",
        "params=float32,\n compute=bfloat16,\toutput=full",
    ):
        assert get_policy(text) == get_policy("mixed_bfloat16")
    assert get_policy(" bf16 ") == get_policy("bfloat16") and get_policy(" mixed_float16") == get_policy(
        "mixed_float16"
    )


@pytest.mark.parametrize("text", ["c=f16,c=f16", "p=f32,params=f32", "o=f32, output=bf16", "compute=f16,p=f32,c=f16"])
def test_fault_12_a_key_given_twice_is_an_error(text):
    with pytest.raises(ValueError, match=r"key '(param|compute|output)' stands twice in .*; give each of"):
        get_policy(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("float32", "p=full,c=full,o=full"),
        ("bfloat16", "p=bf16,c=bf16,o=bf16"),
        ("float16", "p=f16,c=f16,o=f16"),
        ("mixed_bfloat16", "p=full,c=bf16,o=full"),
        ("mixed_float16", "p=full,c=f16,o=full"),
        ("c=f16", "p=full,c=f16,o=f16"),  # output follows compute
        ("p=f16", "p=f16,c=f16,o=f16"),  # compute follows params
        ("p=f16,c=bf16", "p=f16,c=bf16,o=bf16"),
        ("o=bf16", "p=full,c=full,o=bf16"),
        ("f64", "p=f64,c=f64,o=f64"),
        ("compute=float8_e4m3fn,output=bf16", "p=full,c=f8_e4m3fn,o=bf16"),
        ("f8e5m2", "p=f8_e5m2,c=f8_e5m2,o=f8_e5m2"),
    ],
)
def test_the_grammar(text, says):
    assert str(get_policy(text)) == says


def test_the_grammar_is_jmps_where_jmp_has_one():
    names = [
        None,
        *(name for dtype in ("bfloat16", "float16", "float32", "float64") for name in NAMES[jnp.dtype(dtype)]),
    ]
    for given in itertools.product(names, repeat=3):
        text = ",".join(f"{key}={name}" for key, name in zip("pco", given, strict=True) if name)
        if text:
            assert get_policy(text) == Policy.of(jmp.get_policy(text)), text


def test_half_is_that_of_the_machine():
    expected = "bf16" if jax.local_devices()[0].platform == "tpu" else "f16"
    assert get_policy("half") == get_policy(expected) and get_policy("c=half").compute_dtype == canonical(expected)


def test_each_preset_is_named_in_full():
    assert set(PRESETS) == {"float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16", "mixed_fp8"}
    for name, dtypes in PRESETS.items():
        assert get_policy(name) == Policy(*dtypes)


def test_policies_that_differ_are_unequal():
    assert len({Policy(*dtypes) for dtypes in itertools.product(("f16", "bf16", "f32"), repeat=3)}) == 27
    assert get_policy("f16") != "p=f16,c=f16,o=f16"


def test_a_policy_is_a_static_argument_that_compiles_once():
    @chex.assert_max_traces(n=1)
    def fn(policy, x):
        return policy.cast_to_compute(x)

    step = jax.jit(fn, static_argnums=0)
    x = np.ones(2, np.float32)
    for policy in (
        get_policy("mixed_bfloat16"),
        Policy(np.float32, jnp.bfloat16, "full"),
        Policy.of(jmp.get_policy("c=bf16,o=f32")),
    ):
        assert step(policy, x).dtype == jnp.bfloat16
    chex.clear_trace_counter()


def test_it_survives_copies_and_keeps_canonical_dtypes():
    policy = get_policy("mixed_bfloat16")
    for same in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy)), dataclasses.replace(policy)):
        assert same == policy and hash(same) == hash(policy) and type(same) is Policy
    changed = policy.with_output_dtype(jnp.float16)
    assert type(changed) is Policy and changed == get_policy("p=f32,c=bf16,o=f16")
    with pytest.raises(AttributeError, match="cannot assign"):
        policy.compute_dtype = jnp.float32


def test_it_is_a_jmp_policy_and_of_takes_any():
    policy = get_policy("mixed_bfloat16")
    assert isinstance(policy, jmp.Policy)
    assert Policy.of(policy) is policy
    assert Policy.of(jmp.Policy(jnp.float32, np.dtype("bfloat16"), np.float32)) == policy == Policy.of("mixed_bfloat16")


# What is refused.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"Unknown dtype ''; use one of half, full, f16.*f8_e5m2.*, or a preset: float32, .*mixed_float16"),
        ("mixed_bf16", r"Unknown dtype 'mixed_bf16'; use one of .*preset: .*mixed_bfloat16"),
        ("int8", r"Unknown dtype 'int8'; use one of"),
        ("float16,float32", r"Unknown dtype 'float16,float32'; use one of"),
        ("float4_e2m1fn", r"Unknown dtype"),
        ("c=", r"Unknown dtype ''; use one of"),
        ("c=int32", r"Unknown dtype 'int32'; use one of"),
        ("c==f16", r"Unknown dtype '=f16'; use one of"),
        ("c=F16", r"Unknown dtype 'F16'; use one of"),
        ("=f16", r"Unknown key '' in '=f16'; write key=dtype with the keys params, compute, output"),
        ("x=f16", r"Unknown key 'x' in 'x=f16'; write key=dtype with the keys params, compute, output"),
        ("c=f16,", r"Unknown key '' in 'c=f16,'; write key=dtype"),
        ("c=f16,bf16", r"Unknown key 'bf16' in 'c=f16,bf16'; write key=dtype"),
        ("c=f16;o=f32", r"Unknown dtype 'f16;o=f32'; use one of"),
        ("input=keep", r"Unknown key 'input'"),  # a rule may say so, a policy not
    ],
)
def test_fault_13_junk_text_lists_the_choices(text, message):
    with pytest.raises(ValueError, match=message) as error:
        get_policy(text)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bad", [jnp.int32, np.int8, bool, jnp.complex64, "int8", object, 3, None, np.dtype(">f4"), [], "key<fry>"]
)
def test_fault_13_what_is_no_float_dtype(bad):
    for dtypes in ((bad, "f32", "f32"), ("f32", bad, "f32"), ("f32", "f32", bad)):
        with pytest.raises(
            ValueError, match=r"(not a float dtype for a policy|Unknown dtype .*); use one of half, full, f16"
        ):
            Policy(*dtypes)


@pytest.mark.parametrize("bad", [None, 16, jnp.float16, ["f16"]])
def test_fault_13_what_is_no_policy_at_all(bad, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of this suite
    with pytest.raises(TypeError, match=r"got \w+ for a policy; give a string, a jmp.Policy or an mpjax.Policy"):
        Policy.of(bad)
    with pytest.raises(TypeError, match=r"got \w+ for a policy string; Policy.of takes other kinds"):
        get_policy(bad)


def test_keys_are_spelled_out():
    assert parse_keys("p=a, compute = b,o=c") == {"param": "a", "compute": "b", "output": "c"}
    assert parse_keys("input=keep", extra=("input",)) == {"input": "keep"}


# Casts.


@pytest.mark.parametrize("under", ["plain", "jit"])
def test_each_verb_casts_to_its_own_dtype(under):
    policy = get_policy("p=f32,c=bf16,o=f16")
    tree = {"w": jnp.ones(2, jnp.float16), "v": jnp.ones(2, jnp.float32), "n": jnp.arange(3)}
    for verb, dtype in (("param", jnp.float32), ("compute", jnp.bfloat16), ("output", jnp.float16)):
        cast = getattr(policy, f"cast_to_{verb}")
        out = (jax.jit(cast) if under == "jit" else cast)(tree)
        assert {name: x.dtype for name, x in out.items()} == {"w": dtype, "v": dtype, "n": jnp.int32}


def test_fault_16_what_is_no_float_array_is_the_very_same_object():
    leaves = {
        "int": jnp.arange(3),
        "bool": np.array([True]),
        "key": jax.random.key(0),
        "raw key": jax.random.PRNGKey(0),
        "complex": jnp.ones(2, jnp.complex64),
        "str": "float32",
        "python": 1.5,
        "float0": np.zeros(2, jax.dtypes.float0),
        "object": object(),
        "already": jnp.ones(2, jnp.bfloat16),
        "dtype": jnp.float32,
    }
    policy = get_policy("bfloat16")
    for cast in (policy.cast_to_param, policy.cast_to_compute, policy.cast_to_output):
        out = cast({**leaves, "none": None})
        assert all(out[name] is leaf for name, leaf in leaves.items()) and out["none"] is None


def test_fault_16_a_shape_is_cast_like_its_array():
    policy = get_policy("bfloat16")
    tree = {"w": jnp.ones((2, 3)), "n": jnp.arange(3), "key": jax.random.key(0)}
    assert policy.cast_to_compute(jax.eval_shape(lambda: tree)) == jax.eval_shape(lambda: policy.cast_to_compute(tree))


def test_a_gradient_passes_a_cast_in_the_master_dtype():
    policy = get_policy("mixed_bfloat16")
    grad = jax.grad(lambda w: policy.cast_to_output(policy.cast_to_compute(w)[0] * 3.0))(jnp.ones(2))
    assert grad.dtype == jnp.float32 and grad.tolist() == [3, 0]


def test_full_and_half():
    tree = {"w": jnp.ones(2, jnp.float16), "n": 3}
    assert cast_to_full(tree)["w"].dtype == jnp.float32 and cast_to_full(tree)["n"] == 3
    assert cast_to_half(cast_to_full(tree))["w"].dtype == get_policy("half").compute_dtype


def test_fault_17_float64_only_where_the_policy_says_so():
    with jax.enable_x64(True):
        x = {"w": jnp.ones(2, jnp.float32), "v": np.ones(2)}
        assert {v.dtype for v in get_policy("mixed_bfloat16").cast_to_compute(x).values()} == {jnp.dtype("bfloat16")}
        assert {v.dtype for v in get_policy("mixed_bfloat16").cast_to_param(x).values()} == {jnp.dtype("float32")}
        assert {v.dtype for v in get_policy("c=f64").cast_to_compute(x).values()} == {jnp.dtype("float64")}


def test_what_computes_in_float16():
    assert computes_in(get_policy("mixed_float16"), "float16") and not computes_in(get_policy("p=f16,c=f32"), "float16")
    assert not computes_in(None, "float16")
    assert get_policy("c=f8_e4m3fn").compute_dtypes == {canonical("f8_e4m3fn")}


# How dense layers multiply.


@pytest.mark.parametrize(
    ("text", "says", "dot"),
    [
        ("mixed_fp8", "p=full,c=bf16,o=full,dot=fp8", "fp8"),
        ("c=bf16,dot=fp8_delayed", "p=full,c=bf16,o=bf16,dot=fp8_delayed", "fp8_delayed"),
        (" dot = int8 , c = f16 ", "p=full,c=f16,o=f16,dot=int8", "int8"),
        ("dot=fp8", "p=full,c=full,o=full,dot=fp8", "fp8"),
        ("c=bf16,dot=none", "p=full,c=bf16,o=bf16", None),
        ("mixed_bfloat16", "p=full,c=bf16,o=full", None),
    ],
)
def test_a_policy_may_name_a_recipe_for_products(text, says, dot):
    policy = get_policy(text)
    assert (str(policy), policy.dot) == (says, dot)
    assert get_policy(str(policy)) == policy and hash(get_policy(str(policy))) == hash(policy)
    assert pickle.loads(pickle.dumps(policy)) == copy.deepcopy(policy) == policy
    assert policy.with_output_dtype(jnp.float16).dot == dataclasses.replace(policy).dot == dot


def test_str_round_trips_with_every_recipe():
    for dot, compute in itertools.product([None, *DOTS], FORMATS):
        policy = Policy("f32", compute, "f32", dot)
        assert get_policy(str(policy)) == policy
    policies = [Policy("f32", "bf16", "f32", dot) for dot in (None, *DOTS)]
    assert len(set(policies)) == len({str(p) for p in policies}) == 4 and policies[0] == get_policy("mixed_bfloat16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("c=bf16,dot=fp4", r"got dot=fp4; legal are fp8, fp8_delayed, int8, none"),
        ("dot=", r"got dot=; legal are fp8"),
        ("dot=FP8", r"got dot=FP8; legal are"),
        (
            "dot=fp8,dot=int8",
            r"key 'dot' stands twice in 'dot=fp8,dot=int8'; give each of params, compute, output, dot once",
        ),
        ("dot=none, c=bf16, dot=none", r"key 'dot' stands twice"),
        ("dots=fp8", r"Unknown key 'dots' in 'dots=fp8'; write key=dtype with the keys params, compute, output, dot"),
        ("fp8", r"Unknown dtype 'fp8'; use one of .*mixed_fp8"),
    ],
)
def test_fault_13_another_recipe_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        get_policy(text)
    with pytest.raises(ValueError, match=r"got dot='none'; legal are fp8, fp8_delayed, int8, or none for the compute"):
        Policy("f32", "bf16", "f32", "none")


def test_a_policy_of_jmps_has_no_recipe():
    assert Policy.of(jmp.get_policy("c=bf16")).dot is None
    policy, same = get_policy("mixed_fp8"), get_policy("mixed_bfloat16")
    tree = {"w": np.ones(2, np.float32)}
    assert isinstance(policy, jmp.Policy) and policy.compute_dtypes == same.compute_dtypes
    assert policy.cast_to_compute(tree)["w"].dtype == same.cast_to_compute(tree)["w"].dtype == jnp.bfloat16


def test_the_recipes_of_policies_are_those_that_numerics_knows():
    assert set(DOTS) == {"fp8_delayed"} | {name for name in DOTS if name != "fp8_delayed" and QuantizedDot(name)}
    with pytest.raises(ValueError) as error:
        QuantizedDot("none")
    assert str(error.value).endswith("legal are " + ", ".join(name for name in DOTS if name != "fp8_delayed"))
    assert DelayedDot("up").path == "up"
