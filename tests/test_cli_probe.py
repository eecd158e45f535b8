"""`mpjax probe`: what it prints and writes, and its exit codes."""

from __future__ import annotations

import json
import re
import sys

import pytest

from mpjax.cli import main

PROGRAM = """
import jax, jax.numpy as jnp, optax, mpjax
from flax import linen as nn

def job(policy="mixed_float16", size=1.0, mstate="passed"):
    model = mpjax.wrap(nn.Sequential([nn.Dense(3), nn.Dense(2)]), policy)

    def loss_fn(params, mstate_, batch, rng):
        y, _ = model.apply(params, mstate_ if mstate == "passed" else {}, batch)
        return jnp.square(y).mean()

    return mpjax.Job(model, loss_fn, optax.sgd(0.01), lambda n: jnp.full((4, 5), float(size)), sample=(jnp.ones((1, 5)),))
"""


@pytest.fixture
def target(tmp_path, monkeypatch):
    (tmp_path / "probed_program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    return "probed_program:job"


def test_every_module_stands_in_the_table_and_the_files_are_written(target, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["probe", target, "--policy", "mixed_float16", "--steps=5", "--every=2", "--time", f"--out={out}"]) == 0
    shown = capsys.readouterr().out
    assert "attempt 4, loss scale 32768" in shown and "gradient" in shown and "update" in shown
    rows = [line.split()[:3] for line in shown.splitlines()]
    for module in ("layers/0", "layers/1", "·"):
        assert [module, "activation", "float16"] in rows and [module, "gradient", "float16"] in rows
    assert ["layers/0/kernel", "update", "float32"] in rows
    assert "a plain step takes" in shown and "a probed step takes" in shown and "for N = 100" in shown
    attempts = [json.loads(line)["attempt"] for line in (out / "probe.jsonl").read_text().splitlines()]
    assert attempts == [0, 2, 4] and (out / "exponents.png").read_bytes()[:4] == b"\x89PNG"


def test_json_holds_the_last_probe_of_the_modules_that_were_asked(target, capsys):
    assert main(["probe", target, "--steps=3", "--every=2", "--only=layers/1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["attempt"] == 2
    assert {r["path"] for r in told["readings"] if r["kind"] != "update"} == {"layers/1"}


def test_a_run_that_is_never_finite_exits_with_1_and_names_the_culprit(target, capsys):
    assert main(["probe", target, "--policy=mixed_float16", "--steps=60", "--set", "size=1e5"]) == 1
    assert "first not finite in the forward pass: the root module" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--steps=0"], "at least 1"),
        (["--only=third"], "names none of the taps; they are layers/0"),
        (["--set", "mstate=lost"], "pass mstate on"),
        (["--set", "depth=3"], "does not take depth"),
    ],
)
def test_what_makes_no_sense_exits_with_2(target, argv, said, capsys):
    assert main(["probe", target, "--policy=float32", *argv]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_exits_with_1(target, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["probe", target, f"--out={tmp_path / 'file' / 'out'}"]) == 1
    assert "mpjax probe: got --out" in capsys.readouterr().err


def test_without_matplotlib_the_readings_are_kept_and_it_exits_with_1(target, tmp_path, monkeypatch, capsys):
    """As `pip install .` leaves it, without the extra `experiments`."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["probe", target, "--policy=float32", "--steps=1", f"--out={tmp_path}"]) == 1
    told = capsys.readouterr()
    assert "gradient" in told.out and (tmp_path / "probe.jsonl").exists()
    assert re.search(r"mpjax probe: got --out .*install mpjax\[experiments\]; `mpjax plot .*` draws it later", told.err)
