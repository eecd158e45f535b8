"""Which policy holds at which path: DESIGN decisions 3 and 4, sentence by sentence, on bare paths and classes."""

from __future__ import annotations

import jax
import jaxtyping
import jmp
import numpy as np
import pytest
from flax import linen as nn, nnx

from mpjax.core.dtypes import canonical
from mpjax.policy.policy import Policy, get_policy
from mpjax.policy.rules import ISLANDS, PolicyMap, is_dense


class Module: ...


class Dense(Module): ...


class Attention(Module): ...


class LayerNorm(Module): ...


class RMSNorm(Module):
    """A user's own."""


class GatedNorm(RMSNorm): ...


class WeightNorm(Module): ...


class Timestep(Module): ...


SITES = {
    "": Module,
    "embed": Dense,
    "layers/0": Module,
    "layers/0/attention": Attention,
    "layers/0/attention/query": Dense,
    "layers/0/norm": LayerNorm,
    "layers/1": Module,
    "layers/1/attention": Attention,
    "layers/1/attention/query": Dense,
    "layers/1/norm": GatedNorm,
    "layers/1/norm/gate": Dense,
    "weight": WeightNorm,
    "weight/dense": Dense,
    "head": Dense,
}
NORMS = {"layers/0/norm", "layers/1/norm", "layers/1/norm/gate", "weight"}


def computing(rules: PolicyMap, dtype: str, sites: dict = SITES) -> set[str]:
    """The paths that compute in a dtype."""
    return {path for path in sites if rules.resolve(path, sites).policy.compute_dtype == canonical(dtype)}


# Who is meant, and who wins.


def test_without_a_rule_the_default_holds_and_norms_are_float32():
    assert computing(PolicyMap(), "bf16") == set(SITES) - NORMS
    assert computing(PolicyMap(), "f32") == NORMS
    assert computing(PolicyMap(default="mixed_float16"), "f16") == set(SITES) - NORMS


def test_a_rule_means_its_subtree():
    assert computing(PolicyMap({"layers/0": "f16"}), "f16") == {
        "layers/0",
        "layers/0/attention",
        "layers/0/attention/query",
    }


@pytest.mark.parametrize("pattern", ["layers/*/attention", "**/attention", "re:layers/[0-9]+/attention", Attention])
def test_globs_regexes_and_classes(pattern):
    expected = {f"layers/{n}/attention{below}" for n in (0, 1) for below in ("", "/query")}
    assert computing(PolicyMap({pattern: "f16"}), "f16") == expected


@pytest.mark.parametrize("pattern", ["layers_1", "layers/1", "re:layers/1"])
def test_an_index_may_be_spelled_either_way(pattern):
    assert "layers/1/attention/query" in computing(PolicyMap({pattern: "f16"}), "f16")
    assert "layers/0/attention/query" not in computing(PolicyMap({pattern: "f16"}), "f16")


def test_the_first_match_wins_also_against_a_longer_path():
    rules = PolicyMap({"**/query": "f64", "layers/0": "f16", "layers": "f32"})
    assert computing(rules, "f64") == {"layers/0/attention/query", "layers/1/attention/query"}
    assert computing(rules, "f16") == {"layers/0", "layers/0/attention"}
    assert "layers/1" in computing(rules, "f32")
    rules = PolicyMap({"layers": "f16", Dense: "f64"})
    assert computing(rules, "f64") >= {"embed", "head"} and "layers/0/attention/query" in computing(rules, "f16")


def test_the_rule_for_the_root_means_everything_but_islands():
    assert computing(PolicyMap({"": "f16"}), "f16") == set(SITES) - NORMS


# Float32 islands.


def test_the_norms_of_flax_and_everyones_are_islands_by_name():
    rules = PolicyMap()
    for name in ISLANDS:
        assert rules.is_island(type(name, (), {})) and rules.is_island(type("Mine", (type(name, (), {}),), {}))
    assert not any(rules.is_island(cls) for cls in (Module, Dense, type("MyLayerNormish", (), {}), None, LayerNorm()))


@pytest.mark.parametrize("pattern", ["", "layers", "layers/*", "layers/0", "**", "**/*", "*", "**/n*", "re:.*", Module])
def test_a_rule_on_an_ancestor_or_a_sweep_leaves_norms_alone(pattern):
    found = computing(PolicyMap({pattern: "f16"}), "f16")
    assert found.isdisjoint(NORMS - {"layers/1/norm/gate"})


def test_an_island_in_float64_is_no_narrower_than_what_is_around_it():
    for rules in (PolicyMap(default="f64"), PolicyMap({"*": "f64"}), PolicyMap({"layers": "f64"})):
        found = rules.resolve("layers/1/norm", SITES)
        assert (found.source, str(found.policy.param_dtype), str(found.policy.compute_dtype)) == (
            "island",
            *["float64"] * 2,
        )


@pytest.mark.parametrize("pattern", ["", "layers", "*", "**/*", "*/*/*", "re:.*", "layers/1/norm*"])
def test_what_stands_inside_an_island_is_as_sheltered_as_the_island(pattern):
    assert "layers/1/norm/gate" not in computing(PolicyMap({pattern: "f16"}), "f16")


def test_the_layer_inside_a_weight_norm_is_no_part_of_the_norm():
    """Its weights are normalised in float32; its product is the layer's own (NNX has it below, Linen beside)."""
    assert "weight/dense" in computing(PolicyMap(), "bf16")
    assert "weight/dense" in computing(PolicyMap({"weight/*": "f16"}), "f16")


@pytest.mark.parametrize(
    ("pattern", "freed"),
    [
        ("layers/0/norm", {"layers/0/norm"}),
        ("layers_0/norm", {"layers/0/norm"}),
        ("**/norm", {"layers/0/norm", "layers/1/norm", "layers/1/norm/gate"}),
        (LayerNorm, {"layers/0/norm"}),
        (RMSNorm, {"layers/1/norm", "layers/1/norm/gate"}),  # the name of a base of the user's class
        (GatedNorm, {"layers/1/norm", "layers/1/norm/gate"}),
        ("weight", {"weight", "weight/dense"}),
        (WeightNorm, {"weight", "weight/dense"}),
    ],
)
def test_only_its_class_or_exact_path_overrides_an_island(pattern, freed):
    assert computing(PolicyMap({pattern: "f16"}), "f16") == freed


def test_islands_stand_behind_the_users_own_rules_in_whatever_order():
    for rules in ({"layers": "f16", "**/norm": "f64"}, {"**/norm": "f64", "layers": "f16"}):
        assert computing(PolicyMap(rules), "f64") == {"layers/0/norm", "layers/1/norm", "layers/1/norm/gate"}


def test_a_numbered_twin_is_in_the_subtree_unless_an_earlier_rule_names_it():
    sites = {"": None, "mlp": Dense, "mlp/1": Dense}
    assert computing(PolicyMap({"mlp": "f16"}), "f16", sites) == {"mlp", "mlp/1"}
    assert computing(PolicyMap({"mlp_1": "f32", "mlp": "f16"}), "f16", sites) == {"mlp"}


def test_an_island_is_its_subtree():
    assert {"layers/1/norm", "layers/1/norm/gate"} <= computing(PolicyMap({"": "f16"}), "f32")


def test_a_rule_for_a_module_inside_an_island_acts_there_alone():
    for pattern in ("layers/1/norm/gate", "**/gate"):
        assert computing(PolicyMap({pattern: "f16"}), "f16") == {"layers/1/norm/gate"}


def test_an_island_inside_an_island_obeys_its_own_name_only():
    sites = {"": Module, "outer": WeightNorm, "outer/norm": LayerNorm}
    assert computing(PolicyMap({"outer": "f16"}), "f16", sites) == {"outer"}
    assert computing(PolicyMap({"outer/norm": "f16"}), "f16", sites) == {"outer/norm"}


def test_a_user_declares_an_island():
    rules = PolicyMap(islands=(Attention,))
    assert {"layers/0/attention", "layers/0/attention/query"} <= computing(rules, "f32")
    overridden = PolicyMap({Attention: "f16"}, islands=(Attention,))
    assert "layers/0/attention/query" in computing(overridden, "f16")
    assert "layers/0/attention" in computing(PolicyMap({"layers": "f16"}, islands=(Attention,)), "f32")


def test_an_islands_params_are_float32_and_it_does_not_hand_back():
    found = PolicyMap(default="bfloat16").resolve("layers/0/norm", SITES)
    assert str(found.policy) == "p=full,c=full,o=bf16" and not found.rule.hands_back
    assert (found.source, found.said_by) == ("island", "float32 island")


# What a rule says.


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("compute=float32", "p=full,c=full,o=bf16"),
        ("c=f32", "p=full,c=full,o=bf16"),
        ("params=bf16", "p=bf16,c=f16,o=bf16"),
        ("output=f32", "p=full,c=f16,o=full"),
        (" compute = f8_e4m3fn , output = f32 ", "p=full,c=f8_e4m3fn,o=full"),
        ("input=keep", "p=full,c=f16,o=bf16"),
        ("bf16", "p=bf16,c=bf16,o=bf16"),
        ("mixed_bfloat16", "p=full,c=bf16,o=full"),
        (get_policy("p=f64,c=f32,o=f16"), "p=f64,c=full,o=f16"),
        (jmp.get_policy("c=bf16"), "p=full,c=bf16,o=bf16"),
    ],
)
def test_a_key_that_is_not_named_comes_from_the_default(text, says):
    (rule,) = PolicyMap({"head": text}, default="p=f32,c=f16,o=bf16").rules
    assert str(rule.policy) == says


def test_only_a_rule_that_writes_output_hands_back():
    rules = PolicyMap(
        {"a": "output=f32", "b": "c=f32,o=f32", "c": "float32", "d": "compute=f32", "e": get_policy("float32")}
    ).rules
    assert [rule.hands_back for rule in rules] == [True, True, False, False, False]


def test_only_a_rule_that_writes_input_keep_keeps_its_input():
    rules = PolicyMap({"a": "input=keep", "b": "c=f32, input = keep", "c": "c=f32", "d": "float32"}).rules
    assert [rule.keeps_input for rule in rules] == [True, True, False, False]


def test_who_said_so():
    rules = PolicyMap({"head": "f32", Attention: "f16"})
    said = [
        rules.resolve(path, SITES).said_by for path in ("head", "layers/0/attention/query", "embed", "layers/0/norm")
    ]
    assert said == ["'head'", "Attention", "default", "float32 island"]


def test_the_dtypes_in_which_something_computes():
    assert PolicyMap({"head": "f32", "embed": "f16"}).compute_dtypes == {canonical(d) for d in ("f32", "f16", "bf16")}
    assert PolicyMap().compute_dtypes == {canonical("bf16")}  # islands are not counted


# One value.


def test_equal_maps_are_equal_and_hash_alike_however_they_are_written():
    one = PolicyMap({"head": "compute=float32", LayerNorm: "bf16"}, default="mixed_bfloat16", islands=(Attention,))
    two = PolicyMap(
        {"head": "c = f32", LayerNorm: jmp.get_policy("bfloat16")},
        Policy("f32", np.dtype("bfloat16"), "full"),
        (Attention,),
    )
    assert one == two and hash(one) == hash(two) and len({one, two}) == 1
    others = [
        PolicyMap({LayerNorm: "bf16", "head": "compute=float32"}, islands=(Attention,)),  # order decides who wins
        PolicyMap({"head": "compute=float32", LayerNorm: "bf16"}),
        PolicyMap({"head": "compute=float32,output=float32", LayerNorm: "bf16"}, islands=(Attention,)),
        PolicyMap({"head": "compute=float32", LayerNorm: "bf16"}, "mixed_float16", (Attention,)),
    ]
    assert len({one, *others}) == 5


def test_a_map_is_a_static_argument():
    traced = []

    def fn(rules, x):
        traced.append(rules)
        return rules.default.cast_to_compute(x)

    jitted = jax.jit(fn, static_argnums=0)
    for _ in range(3):
        out = jitted(PolicyMap({"head": "f32"}), np.ones(2, np.float32))
    assert len(traced) == 1 and out.dtype == canonical("bf16")


def test_a_map_cannot_be_changed():
    given = {"head": "f32"}
    rules = PolicyMap(given)
    given["embed"] = "f16"
    assert len(rules.rules) == 1
    with pytest.raises(AttributeError, match="cannot assign"):
        rules.default = get_policy("f32")


@pytest.mark.parametrize("given", ["mixed_float16", get_policy("mixed_float16"), jmp.get_policy("c=f16,o=f32"), {}])
def test_of_takes_whatever_names_a_policy(given):
    expected = PolicyMap(default="mixed_float16") if given != {} else PolicyMap()
    assert PolicyMap.of(given) == expected and PolicyMap.of(expected) is expected
    assert PolicyMap.of({"head": "f32"}) == PolicyMap({"head": "f32"})


# What is refused.


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"head": "compute=float33"}, r"Unknown dtype 'float33'; use one of half, full"),
        ({"head": "float33"}, r"Unknown dtype 'float33'; use one of .* preset: float32"),
        ({"head": "compute=int8"}, r"Unknown dtype 'int8'; use one of"),
        ({"head": "width=f32"}, r"Unknown key 'width' in 'width=f32'; write .* params, compute, output, dot, input"),
        ({"head": "c=f32,compute=f16"}, r"key 'compute' stands twice in 'c=f32,compute=f16'; give each"),
        ({"head": "input=keep,input=keep"}, r"key 'input' stands twice"),
        ({"head": "input=bf16"}, r"got input=bf16 in rule 'head'; only input=keep is legal, or leave it out"),
        ({"re:layers/(": "f32"}, r"rule 're:layers/\(' is not a regex: .*; without 're:' it would be a glob"),
    ],
)
def test_text_that_does_not_parse(rule, message):
    with pytest.raises(ValueError, match=message):
        PolicyMap(rule)


def test_a_rule_of_another_kind(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of this suite
    with pytest.raises(
        ValueError, match=r"got 3 for a rule; write a glob over paths, 're:' and a regex, or a module class"
    ):
        PolicyMap.of({3: "f32"})
    with pytest.raises(TypeError, match=r"got int for a policy; give a string, a jmp.Policy or an mpjax.Policy"):
        PolicyMap.of({"head": 16})


def refused(rules: dict, scanned: tuple[str, ...] = (), sites: dict = SITES, islands: tuple = ()) -> str:
    with pytest.raises(ValueError) as error:
        PolicyMap(rules, islands=islands).check(sites, frozenset(scanned))
    return str(error.value)


def test_fault_14_a_rule_that_matches_no_path_shows_near_misses():
    message = refused({"heed": "f32"})
    assert message == "rule 'heed' matches no path; did you mean 'head', 'embed'? model.explain(sample) lists them all"
    assert "'layers/0/attention/query', 'layers/1/attention/query'" in refused({"layers/0/attention/quary": "f32"})
    assert "'layers/0/attention'" in refused({"**/atention": "f32"})
    assert "matches no path; the paths are 'embed', 'layers/0'" in refused({"zzzz": "f32"})


def test_fault_14_a_class_that_is_not_in_the_model_shows_those_that_are():
    message = refused({Timestep: "f32"})
    assert message.startswith(
        "rule Timestep matches no module; the classes of this model are Attention, Dense, GatedNorm"
    )


@pytest.mark.parametrize(
    "rules",
    [
        {"head": "f32", "head*": "f16"},
        {"layers": "f32", "layers/0": "f16"},
        {"layers_0": "f32", "layers/0": "f16"},  # the same path, spelled twice
        {"**/query": "f32", "layers/*/attention/query": "f16"},
        {Dense: "f32", "head": "f16"},
    ],
)
def test_fault_14_a_shadowed_rule_is_named(rules):
    late = list(rules)[1]
    assert refused(rules).startswith(f"rule {late!r} never acts: every path it matches (")
    assert "is taken by an earlier rule" in refused(rules) and "put it before that rule" in refused(rules)


def test_a_narrow_rule_before_a_wide_one_acts():
    PolicyMap({"layers/0": "f16", "layers": "f32", "head": "f16", Dense: "f32"}).check(SITES)


def test_a_rule_that_is_shadowed_in_part_acts():
    PolicyMap({"layers/0": "f32", "layers": "f16"}).check(SITES)


def test_fault_14_a_sweep_that_meets_islands_only_says_how_to_mean_them():
    message = refused({"layers/*/n*": "f16"})
    assert (
        "('layers/0/norm', 'layers/1/norm', 'layers/1/norm/gate') is taken by an earlier rule or is a float32 island"
        in message
    )
    assert "name the island's class or exact path" in message


STACK = {"": Module, "layers": Module, "layers/attention": Attention, "layers/norm": LayerNorm, "head": Dense}


@pytest.mark.parametrize(
    "pattern",
    [
        "layers/0",
        "layers_0",
        "layers/11/attention",
        "layers/*/attention",
        "layers_?",
        "re:layers/0/attention",
        "re:layers/[0-3]/.*",
    ],
)
def test_fault_14_one_layer_of_a_scanned_stack_is_refused_with_the_reason(pattern):
    message = refused({pattern: "f16"}, scanned=("layers",), sites=STACK)
    assert f"rule {pattern!r} names one layer of the scanned stack 'layers'" in message
    assert "one traced body" in message and "write a rule for 'layers', or unroll the scan" in message


def test_a_scanned_stack_is_one_path():
    rules = PolicyMap({"layers": "f16", "head": "f32"})
    rules.check(STACK, frozenset({"layers"}))
    assert computing(rules, "f16", STACK) == {"layers", "layers/attention"}
    deep = {f"model/{path}" if path else "": cls for path, cls in STACK.items()}
    message = refused({"**/layers/0": "f16"}, scanned=("model/layers",), sites=deep)
    assert "one layer of the scanned stack 'model/layers'" in message


def test_default_islands_may_be_absent_but_declared_ones_may_not():
    PolicyMap().check({"": Module, "head": Dense})
    message = refused({}, islands=(Timestep,))
    assert message.startswith("island Timestep is no class of this model; its classes are Attention, Dense")


def test_a_path_that_only_the_params_know_has_no_class():
    sites = {"": None, "head": None}
    PolicyMap({"head": "f16"}).check(sites)
    assert computing(PolicyMap({"head": "f16"}), "f16", sites) == {"head"}


# How dense layers multiply.


def dots(rules, paths=tuple(SITES), sites=SITES):
    return {path: rules.dot_at(path, sites) for path in paths}


def test_a_recipe_of_the_default_is_inherited_but_not_where_a_rule_names_the_dtype():
    rules = PolicyMap(
        {
            "a": "output=f32",
            "b": "compute=f32",
            "c": "c=bf16,dot=int8",
            "d": "dot=none",
            "e": "bf16",
            "f": "input=keep",
        },
        default="mixed_fp8",
    )
    found = dots(rules, ("a", "b", "c", "d", "e", "f", "g", "a/below", "d/below"), {})
    assert found == {
        "a": "fp8", "b": None, "c": "int8", "d": None, "e": None, "f": "fp8", "g": "fp8", "a/below": "fp8",
        "d/below": None,
    }  # fmt: skip
    assert dots(PolicyMap({"a": "dot=fp8"}), ("a", "b"), {}) == {"a": "fp8", "b": None}


def test_heads_embeddings_and_islands_do_not_take_it():
    found = dots(PolicyMap(default="mixed_fp8"))
    assert found["layers/0/attention/query"] == "fp8"
    assert {path for path, dot in found.items() if dot is None} == {"embed", "head", *NORMS, "weight"}


@pytest.mark.parametrize(
    "name", ["lm_head", "wte", "score", "qa_outputs", "model/classifier", "cls/predictions", "heads/0"]
)
def test_heads_by_the_names_of_the_field(name):
    rules = PolicyMap(default="mixed_fp8")
    assert rules.dot_at(name, {}) is None and rules.dot_at(f"{name}/dense", {}) is None
    assert rules.dot_at("header", {}) == rules.dot_at("layers/0/output", {}) == "fp8"


def test_a_head_takes_it_where_its_class_or_exact_path_is_named():
    for pattern in ("head", "**/head", Dense):
        assert PolicyMap({pattern: "dot=fp8"}).dot_at("head", SITES) == "fp8"
    for pattern in ("", "*", "**", "h*", "re:head", Module):
        assert PolicyMap({pattern: "dot=fp8"}).dot_at("head", SITES) is None, pattern
    sites = {"": Module, "embed": Module, "embed/project": Dense}
    for pattern in ("embed", "embed/project", "**/project", Dense):
        assert PolicyMap({pattern: "dot=fp8"}).dot_at("embed/project", sites) == "fp8"
    for pattern in ("", "embed/*", "e*"):
        assert PolicyMap({pattern: "dot=fp8"}).dot_at("embed/project", sites) is None, pattern
    assert PolicyMap({"embed": "dot=fp8"}).dot_at("embed/head", sites) is None  # a head in there is not named yet


def test_a_map_with_a_recipe_is_another_map():
    one, two = PolicyMap(default="mixed_fp8"), PolicyMap(default="c=bf16,o=f32,dot=fp8")
    assert (
        one == two
        and hash(one) == hash(two)
        and one != PolicyMap()
        and one.compute_dtypes == PolicyMap().compute_dtypes
    )
    assert PolicyMap({"a": "dot=fp8"}) != PolicyMap({"a": "dot=int8"})
    with pytest.raises(ValueError, match=r"got dot=fp4; legal are fp8"):
        PolicyMap({"a": "dot=fp4"})


def test_only_flaxs_dense_layers_are_reached():
    class Mine(nn.Dense): ...

    assert all(map(is_dense, (nn.Dense, nn.DenseGeneral, nnx.Linear, nnx.LinearGeneral, Mine)))
    assert not any(map(is_dense, (Dense, nn.Embed, nn.Conv, nnx.Embed, None, nn.Dense(3))))
