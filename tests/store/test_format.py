"""A checkpoint of each format that was ever written is kept here, and must restore for ever.

`v1` was written on 2026-11-24 by `python -m tests.store.test_format FOLDER` (Python 3.11, jax 0.10.2, orbax 0.12.8).
When the format changes, write a `v2` beside it; never write this one again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax
from mpjax.core.model import Model
from mpjax.store.manifest import VERSION, check
from mpjax.train.state import TrainState
from tests.store.states import bits, blank

HERE = Path(__file__).parent


def tree() -> dict:
    """What was saved as step 5, in numbers that stand here."""
    eighths = np.arange(-8, 8) / 8
    return {
        "float32": jnp.asarray(eighths.reshape(4, 4), jnp.float32),
        "bfloat16": jnp.asarray(eighths, jnp.bfloat16),
        "float16": jnp.asarray(eighths, jnp.float16),
        "float8": jnp.asarray(eighths[8:], jnp.float8_e4m3fn),
        "int32": jnp.asarray([16777217, -5], jnp.int32),
        "bool": jnp.asarray([True, False]),
        "empty": jnp.zeros((0, 2)),
        "layers": [{"Dense_0": {"kernel": jnp.full((2, 2), 0.5)}}, {"Dense_0": {"kernel": jnp.full((2, 2), 0.25)}}],
        "numpy": np.asarray([2**40 + 1], np.int64),
        "numbers": (3, 0.1, True),
        "key": jax.random.key(7),
    }


def state() -> TrainState:
    """What was saved as step 12: ten updates and two skips, its numbers put in by hand."""
    model = Model(lambda rng, x: ({"w": jnp.zeros((2, 3))}, {"stats": {"mean": jnp.zeros(3)}}), lambda *a, **k: a)
    made = TrainState.create(
        model, optax.adamw(1e-3), jax.random.key(0), None, loss_scale=mpjax.dynamic_loss_scale(), ema_decay=0.9
    )
    leaves, structure = jax.tree.flatten(made)
    filled = [
        jax.random.key(3) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.full(x.shape, n + 1, x.dtype)
        for n, x in enumerate(leaves)
    ]
    counts = {"step": jnp.int32(10), "skipped": jnp.int32(2), "skipped_in_a_row": jnp.int32(0)}
    return dataclasses.replace(structure.unflatten(filled), **counts)


POLICY = {"head": "compute=float32,output=float32"}
EXTRA = {"epoch": 3, "loss": 0.1}


def write(directory: Path) -> None:
    mpjax.Checkpointer(directory / "tree").save(tree(), 5)
    mpjax.Checkpointer(directory / "state").save(state(), policy=POLICY, extra=EXTRA)


@pytest.mark.parametrize("version", range(1, VERSION + 1))
def test_every_format_restores_for_ever(version):
    folder = HERE / f"v{version}"
    assert bits(mpjax.Checkpointer(folder / "tree").restore(blank(tree()))) == bits(tree())
    checkpointer = mpjax.Checkpointer(folder / "state")
    assert bits(checkpointer.restore(blank(state()))) == bits(state())
    info = checkpointer.info()
    assert (info.step, info.extra) == (12, EXTRA) and info.policy["rules"] == {
        "head": "params=full,compute=full,output=full"
    }


def test_what_is_written_now_is_of_the_last_format(tmp_path):
    write(tmp_path)
    check(tmp_path / "tree" / "5")
    assert json.loads((tmp_path / "state" / "12" / "manifest.json").read_text())["version"] == VERSION
    old = json.loads((HERE / f"v{VERSION}" / "state" / "12" / "meta.json").read_text())
    new = json.loads((tmp_path / "state" / "12" / "meta.json").read_text())
    moves = {"saved", "versions"}
    assert {key: old[key] for key in old.keys() - moves} == {key: new[key] for key in new.keys() - moves}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
