"""A policy in words that JSON can hold, and back."""

from __future__ import annotations

import json

import jmp
import pytest
from flax import linen as nn

from mpjax.policy.policy import Policy
from mpjax.policy.rules import PolicyMap
from mpjax.policy.written import policy_from_words, policy_to_words

RULES = {
    "head": "compute=float32,output=float32",
    "**/time": "input=keep",
    "re:layers/[01]": "mixed_float16",
    "norm": Policy("float32", "float8_e4m3fn", "bfloat16"),
}


def test_what_acts_comes_back():
    rules = PolicyMap(RULES, default="params=bf16,compute=f16,output=f32")
    words = json.loads(json.dumps(policy_to_words(rules)))
    back = policy_from_words(words)
    assert back.default == rules.default
    for one, other in zip(rules.rules, back.rules, strict=True):
        assert (one.pattern, one.hands_back, one.keeps_input) == (other.pattern, other.hands_back, other.keeps_input)
        assert one.policy.param_dtype == other.policy.param_dtype
        assert one.policy.compute_dtype == other.policy.compute_dtype
        assert not one.hands_back or one.policy.output_dtype == other.policy.output_dtype
    assert policy_to_words(back) == words


@pytest.mark.parametrize(
    "policy", ["mixed_bfloat16", jmp.get_policy("c=f16"), Policy("f32", "bf16", "f32"), PolicyMap()]
)
def test_anything_that_names_a_policy_has_words(policy):
    assert policy_from_words(policy_to_words(policy)) == PolicyMap.of(policy)


def test_a_class_stands_by_name_only_and_is_the_callers_to_give():
    words = policy_to_words(PolicyMap({nn.Dense: "float32"}, islands=(nn.Conv,)))
    assert words["rules"] == {"class Dense": "params=full,compute=full"} and words["islands"] == ["Conv"]
    with pytest.raises(ValueError, match="rules for class Dense, class Conv, which stand here by name only"):
        policy_from_words(words)


@pytest.mark.parametrize("words", [{}, {"default": "float32", "rules": 3, "islands": []}, {"default": "f32"}])
def test_other_words_are_refused(words):
    with pytest.raises(ValueError, match="legal is what policy_to_words gives"):
        policy_from_words(words)


@pytest.mark.parametrize("default", ["mixed_fp8", "mixed_bfloat16", "c=f16,dot=fp8_delayed"])
def test_recipes_come_back(default):
    rules = PolicyMap(
        {"a": "dot=int8", "b": "dot=none", "c": "compute=f32", "d": "output=f32", "e": "bf16"}, default=default
    )
    words = json.loads(json.dumps(policy_to_words(rules)))
    back = policy_from_words(words)
    assert [rule.policy.dot for rule in back.rules] == ["int8", None, None, rules.default.dot, None]
    assert back.default == rules.default and policy_to_words(back) == words
    assert words["rules"]["a"].endswith(",dot=int8") and "dot" not in words["rules"]["b"]
