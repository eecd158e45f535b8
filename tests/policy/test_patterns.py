"""How a rule names modules: globs over canonical paths, regexes when marked so, classes."""

from __future__ import annotations

import pytest

from mpjax.policy.patterns import governs, is_exact, lineage, names


class Module: ...


class Dense(Module): ...


class Wide(Dense): ...


PATHS = (
    "",
    "head",
    "layers/0",
    "layers/0/attention",
    "layers/0/attention/query",
    "layers/1/attention",
    "layers/10/mlp",
    "encoder/layers/0/attention",
    "Dense/0",
    "Dense/12",
    "layer_norm",
)


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("", {""}),
        ("head", {"head"}),
        ("layers/0", {"layers/0"}),
        ("layers_0", {"layers/0"}),  # an index, spelled the other way
        ("layers_0/attention", {"layers/0/attention"}),
        ("layers_*", {"layers/0"}),
        ("layers/?/attention", {"layers/0/attention", "layers/1/attention"}),
        ("layers/*/attention", {"layers/0/attention", "layers/1/attention"}),  # * stays in its segment
        ("layers/*/*", {"layers/0/attention", "layers/1/attention", "layers/10/mlp"}),
        ("layers_?/*", {"layers/0/attention", "layers/1/attention"}),
        ("**/attention", {"layers/0/attention", "layers/1/attention", "encoder/layers/0/attention"}),
        ("**/layers/0", {"layers/0"}),  # zero segments before it
        ("**/layers_0/attention", {"layers/0/attention", "encoder/layers/0/attention"}),
        ("layers/**/query", {"layers/0/attention/query"}),
        ("layers/**/0", {"layers/0"}),
        ("layers/0/**", {"layers/0", "layers/0/attention", "layers/0/attention/query"}),
        ("**/att*", {"layers/0/attention", "layers/1/attention", "encoder/layers/0/attention"}),
        ("Dense_*", {"Dense/0", "Dense/12"}),
        ("Dense_?", {"Dense/0"}),
        ("Dense_1", set()),
        ("Dense/12", {"Dense/12"}),
        ("layer_norm", {"layer_norm"}),
        ("layer?norm", {"layer_norm"}),
        ("layer/norm", set()),  # only an index stands behind a slash of its own
        ("HEAD", set()),
        ("hea", set()),
        ("ead", set()),
        ("h[e]ad", set()),  # brackets and dots are letters like any other
        ("h.ad", set()),
        ("re:head", {"head"}),
        ("re:hea", set()),  # a regex must match the whole path
        ("re:layers/[01]/attention", {"layers/0/attention", "layers/1/attention"}),
        (r"re:(.*/)?layers/\d+/attention", {"layers/0/attention", "layers/1/attention", "encoder/layers/0/attention"}),
        ("re:layers_0", set()),  # and is held to the canonical spelling
        ("re:", {""}),
        ("**", set(PATHS)),
    ],
)
def test_a_pattern_names_these_modules_and_no_others(pattern, named):
    assert {path for path in PATHS if names(pattern, path, Module)} == named


def test_a_class_names_its_instances_and_those_of_its_subclasses():
    assert [names(Dense, "a", cls) for cls in (Dense, Wide, Module, None)] == [True, True, False, False]
    assert not names(Wide, "a", Dense)


def test_a_rule_means_the_subtree():
    sites = {"": Module, "layers/0": Wide, "layers/0/attention": Module, "layers/0/attention/query": Dense}
    for pattern in ("layers/0", "layers_0", "layers", "re:layers/0", Wide, "", "**/attention", "*/*/attention"):
        assert governs(pattern, "layers/0/attention/query", sites)
    for pattern in ("layers/1", "head", "*/attention", "re:layers/0/.*/key", "query"):
        assert not governs(pattern, "layers/0/attention/query", sites)
    assert not governs(Dense, "head", sites)


def test_a_name_without_its_index_means_all_of_them():
    sites = {"": Module, "Dense/0": Dense, "Dense/1": Dense}
    for pattern in ("Dense", "Dense*", "D*"):
        assert [path for path in sites if governs(pattern, path, sites)] == ["Dense/0", "Dense/1"]


def test_lineage_runs_from_the_path_to_the_root():
    assert list(lineage("layers/0/norm")) == ["layers/0/norm", "layers/0", "layers", ""]
    assert list(lineage("")) == [""]


@pytest.mark.parametrize(
    ("pattern", "exact"),
    [
        ("layers/0/norm", True),
        ("layers_0/norm", True),
        ("layers/*/norm", True),
        ("**/norm", True),
        ("**/n*", False),
        ("**/nor?", False),
        ("layers/**", False),
        ("layers/0", False),
        ("norm", False),
        ("re:layers/0/norm", False),
        (Dense, False),
    ],
)
def test_exact_means_that_the_last_segment_is_spelled_out(pattern, exact):
    assert is_exact(pattern, "layers/0/norm") is exact


def test_an_index_is_spelled_out_too():
    assert is_exact("**/LayerNorm_0", "layers/0/LayerNorm/0") and is_exact("LayerNorm/1", "LayerNorm/1")
    assert not is_exact("LayerNorm_*", "LayerNorm/1") and not is_exact("LayerNorm", "LayerNorm/1")
