"""The measurement of remat, shrunk: less is kept, more is computed, and a name that is none is refused."""

from __future__ import annotations

import json

import pytest

from experiments import _run, remat_options

SMALL = {"width": 8, "depth": 2, "heads": 2, "vocabulary": 16, "context": 32, "batch_size": 2, "blocks": 1, "steps": 1}


def test_less_is_kept_and_more_is_computed(tmp_path):
    config = remat_options.Config(**SMALL, options=("none", "nothing"), workdir=str(tmp_path))
    found = remat_options.main(config)
    none, nothing = found["none"], found["nothing"]
    assert nothing["temp"] < none["temp"] and nothing["arguments"] == none["arguments"]
    # Per block, by hand: 2 · 64 tokens · 8² · (4 projections, up of 4 more) run again, and QKᵀ of 2 · 64 · 32 · 8 twice.
    assert nothing["FLOPs"] - none["FLOPs"] == 2 * (2 * 64 * 64 * 8 + 2 * 2 * 64 * 32 * 8)
    assert len(none["step s"]) == 1 and none["step s"][0] > 0 and "error" not in nothing
    told = json.loads((tmp_path / "table.json").read_text())["found"]
    assert told.keys() == found.keys() and told["none"]["temp"] == none["temp"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "table.json", "table.md"]


def test_an_option_that_is_none_is_refused(tmp_path):
    with pytest.raises(_run.Refused, match="got the options full; legal are none, nothing, attention"):
        remat_options.main(remat_options.Config(**SMALL, options=("full",), workdir=str(tmp_path)))
