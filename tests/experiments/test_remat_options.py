"""The measurement of remat, shrunk: what runs again is counted by hand, and a name that is none is refused."""

from __future__ import annotations

import json

import pytest

from experiments import _run, remat_options

SMALL = {"width": 8, "depth": 2, "heads": 2, "vocabulary": 16, "context": 32, "batch_size": 2, "blocks": 1, "steps": 1}


def test_an_option_is_compiled_and_timed(tmp_path):
    """FLOPs by hand, of 64 tokens. A block: 4 projections of 8², up and down of 4 · 8² each, two products of attention of
    32 · 8; three times that, and all but `down` once more. The head: 3 products of 8 · 16."""
    config = remat_options.Config(**SMALL, options=("nothing",), workdir=str(tmp_path))
    found = remat_options.main(config)
    of = found["nothing"]
    block, again = 12 * 8 * 8 + 2 * 32 * 8, 8 * 8 * 8 + 2 * 32 * 8
    assert of["FLOPs"] == 2 * 64 * (2 * (3 * block + again) + 3 * 8 * 16)
    assert of["temp"] > 0 and of["shared"] > 0 and "error" not in of  # the state is donated
    assert len(of["step s"]) == 1 and of["step s"][0] > 0 < of["compile s"]
    told = json.loads((tmp_path / "table.json").read_text())["found"]
    assert told.keys() == found.keys() and told["nothing"]["temp"] == of["temp"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "table.json", "table.md"]


def test_an_option_that_is_none_is_refused(tmp_path):
    with pytest.raises(_run.Refused, match="got the options full; legal are none, nothing, attention"):
        remat_options.main(remat_options.Config(**SMALL, options=("full",), workdir=str(tmp_path)))
