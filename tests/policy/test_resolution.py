"""The resolution table says what each module computes in, and who said so."""

from __future__ import annotations

from flax import linen as nn, nnx

from mpjax.core.dtypes import canonical
from mpjax.policy.resolution import resolution_table
from mpjax.policy.rules import PolicyMap


class Model: ...


class Dense: ...


class LayerNorm: ...


SITES = {"": Model, "time": Dense, "layers": Model, "layers/norm": LayerNorm, "layers/up": Dense, "head": Dense}


def test_one_row_for_each_module_in_calling_order():
    rules = PolicyMap({"head": "compute=float32,output=float32", "**/up": "float16", "time": "input=keep"})
    table = resolution_table(rules, SITES, scanned=frozenset({"layers"}))
    assert [row.path for row in table.rows] == list(SITES)
    assert [row.cls for row in table.rows] == ["Model", "Dense", "Model", "LayerNorm", "Dense", "Dense"]
    assert [row.rule for row in table.rows] == ["default", "'time'", "default", "float32 island", "'**/up'", "'head'"]
    assert [row.compute.name for row in table.rows] == [
        "bfloat16",
        "bfloat16",
        "bfloat16",
        "float32",
        "float16",
        "float32",
    ]
    assert [row.param.name for row in table.rows] == [*["float32"] * 4, "float16", "float32"]
    assert [row.hands_back for row in table.rows] == ["full", "caller's", "caller's", "caller's", "caller's", "full"]
    assert [row.note for row in table.rows] == ["", "input kept", "scanned stack", "", "", ""]


def test_it_says_the_same_as_the_rules():
    rules = PolicyMap({"layers": "float16", Dense: "c=f32"}, default="mixed_bfloat16")
    for row in resolution_table(rules, SITES).rows:
        found = rules.resolve(row.path, SITES)
        assert (row.compute, row.param, row.rule) == (
            found.policy.compute_dtype,
            found.policy.param_dtype,
            found.said_by,
        )


def test_the_root_hands_back_the_models_output():
    def root(*args, **kwargs):
        return resolution_table(PolicyMap(*args, **kwargs), SITES).rows[0].hands_back

    assert root() == "full"
    assert root(default="c=bf16,o=f16") == "f16"
    assert root({"": "c=f32,o=bf16"}) == "bf16"
    assert root({"": "bfloat16"}, default="c=bf16,o=f16") == "f16"  # a preset does not hand back


def test_an_output_that_an_ancestor_rounds_is_noted():
    def rounded(path):
        return "layers" if path == "layers/up" else None

    alone = resolution_table(PolicyMap({"**/up": "output=float32"}), SITES, rounded_at=rounded)
    assert alone.rows[4].note == "rounded at 'layers': name it with output= too"
    both = resolution_table(PolicyMap({"layers": "output=float32"}), SITES, rounded_at=rounded)
    assert both.rows[4].note == ""
    silent = resolution_table(PolicyMap({"**/up": "float32"}), SITES, rounded_at=rounded)
    assert silent.rows[4].note == ""


def test_notes_stand_together():
    table = resolution_table(PolicyMap({"layers": "input=keep"}), SITES, scanned=frozenset({"layers"}))
    assert table.rows[2].note == "scanned stack, input kept"


def test_the_text_is_aligned_and_leaves_out_empty_notes():
    rules = PolicyMap({"head": "compute=float32"})
    plain = str(resolution_table(rules, SITES)).splitlines()
    assert plain[0] == "path         class      rule            params  compute  hands back"
    assert plain[1] == "·            Model      default         full    bf16     full"
    assert plain[4] == "layers/norm  LayerNorm  float32 island  full    full     caller's"
    assert all(line == line.rstrip() for line in plain)
    noted = str(resolution_table(rules, SITES, scanned=frozenset({"layers"}))).splitlines()
    assert noted[0].endswith("  note") and noted[3].endswith("scanned stack") and not noted[1].endswith("scanned stack")


def test_a_class_that_is_not_known():
    (row,) = resolution_table(PolicyMap(), {"": None}).rows
    assert (row.cls, row.compute) == ("?", canonical("bf16"))


def test_how_a_dense_layer_multiplies_is_noted():
    sites = {"": Model, "embed": Model, "embed/project": nn.Dense, "norm": nn.LayerNorm, "up": nn.Dense, "own": Dense,
             "down": nnx.Linear, "head": nn.DenseGeneral}  # fmt: skip
    table = resolution_table(PolicyMap({"down": "dot=none"}, default="mixed_fp8"), sites)
    assert {row.path: row.note for row in table.rows} == {
        "": "", "embed": "", "embed/project": "dot=none: 'embed' is head or embedding", "norm": "", "up": "dot=fp8",
        "own": "", "down": "", "head": "dot=none: 'head' is head or embedding",
    }  # fmt: skip
    assert not any(row.note for row in resolution_table(PolicyMap(), sites).rows)
