"""The measurement of remat, shrunk: what runs again is counted by hand, and a name that is none is refused."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax
from experiments import _run, remat_options
from mpjax.measure.audit import audit
from tests.train.toys import linear_model

SMALL = {"width": 8, "depth": 2, "heads": 2, "vocabulary": 16, "context": 32, "batch_size": 2, "blocks": 1, "steps": 1}


def test_what_runs_again_is_counted_by_hand():
    """FLOPs of 64 tokens. A block: 4 projections of 8², up and down of 4 · 8² each, two products of attention of 32 · 8;
    three times that, and all but `down` once more. The head: 3 products of 8 · 16."""
    step, create, batch = remat_options.parts(remat_options.Config(**SMALL), "nothing")
    state = jax.eval_shape(create, jax.random.key(0))
    block, again = 12 * 8 * 8 + 2 * 32 * 8, 8 * 8 * 8 + 2 * 32 * 8
    flops = sum(audit(step.pure, state, batch).flops_by_dtype().values())
    assert flops == 2 * 64 * (2 * (3 * block + again) + 3 * 8 * 16)
    assert state.params["layers_0"]["up"]["kernel"].shape == (2, 8, 32)


def test_each_option_is_compiled_and_timed_and_one_that_does_not_fit_is_told(tmp_path, monkeypatch):
    """On a model of two numbers, which compiles at once."""
    made = []

    def parts(config, option):
        def loss_fn(params, mstate, batch, rng):
            return jnp.square(linear_model().apply(params, mstate, batch)[0]).mean()

        made.append(option)
        optimizer = optax.sgd(0.1)
        step = mpjax.make_train_step(loss_fn, optimizer)
        if option == "dots":
            monkeypatch.setattr(type(step), "lower", too_large)
        return step, lambda key: mpjax.TrainState.create(linear_model(), optimizer, key), np.ones((2, 3), np.float32)

    def too_large(self, state, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    monkeypatch.setattr(remat_options, "parts", parts)
    config = remat_options.Config(**SMALL, options=("none", "dots"), workdir=str(tmp_path))
    found = remat_options.main(config)
    assert made == ["none", "dots"] and len(found["none"]["step s"]) == 1 and found["none"]["step s"][0] > 0
    assert found["none"]["shared"] > 0  # the state is donated
    assert found["dots"]["error"] == "RESOURCE_EXHAUSTED: out of memory" and "temp" not in found["dots"]
    told = json.loads((tmp_path / "table.json").read_text())["found"]
    assert told.keys() == found.keys() and told["none"]["temp"] == found["none"]["temp"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "table.json", "table.md"]


def test_an_option_that_is_none_is_refused(tmp_path):
    with pytest.raises(_run.Refused, match="got the options full; legal are none, nothing, attention"):
        remat_options.main(remat_options.Config(**SMALL, options=("full",), workdir=str(tmp_path)))
