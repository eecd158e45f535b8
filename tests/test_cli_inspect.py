"""`mpjax inspect TARGET`: the table of modules, params, memory, FLOPs, and the time of a step."""

from __future__ import annotations

import json

import pytest

from mpjax.cli import main
from mpjax.measure import rates
from mpjax.measure.rates import ProductRate
from mpjax.measure.timing import Timing

PROGRAM = """
import jax.numpy as jnp, optax, mpjax
from flax import linen as nn

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, use_bias=False, kernel_init=nn.initializers.zeros, name="layers_0")(x)
        return nn.Dense(4, use_bias=False, kernel_init=nn.initializers.zeros, name="head")(x)

def of(model):
    return mpjax.Job(model, lambda p, m, x, rng: jnp.square(model.apply(p, m, x)[0]).mean(), optax.sgd(0.1),
                     lambda attempt: jnp.ones((32, 8)), sample=(jnp.ones((1, 8)),))

def wrapped(policy="mixed_bfloat16"):
    return of(mpjax.wrap(Net(), mpjax.PolicyMap({"head": "compute=float32"}, default=policy)))

def bare():
    return of(mpjax.Model(lambda rng, x: ({"w": jnp.zeros((8, 2))}, {}), lambda p, m, x, rng=None: (x @ p["w"], m)))
"""


@pytest.fixture(autouse=True)
def program(tmp_path, monkeypatch):
    (tmp_path / "my_job.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_wrapped_job_in_json(monkeypatch, capsys):
    monkeypatch.setattr(
        rates, "product_rates", lambda formats: tuple(ProductRate(name, 1000, Timing((1e-3,))) for name in formats)
    )
    assert main(["inspect", "my_job:wrapped", "--policy", "mixed_float16", "--time", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(row["path"], row["compute"]) for row in told["modules"]] == [
        ("", "float16"), ("layers/0", "float16"), ("head", "float32")
    ]  # fmt: skip
    assert told["policy"] == "p=full,c=f16,o=full, 'head': p=full,c=full,o=full"
    assert told["params"] == [
        {"module": "head", "count": 64, "bytes_by_dtype": {"float32": 256}},
        {"module": "layers", "count": 128, "bytes_by_dtype": {"float32": 512}},
    ]
    assert told["memory"]["arguments"]["master weights"] == 768
    assert told["memory"]["temporaries"]["gradients"] == 768
    up, down = 2 * 32 * 8 * 16, 2 * 32 * 16 * 4
    assert told["flops"] == {"float16": 2 * up, "float32": 3 * down}  # nothing goes back into the batch
    time = told["time"]
    assert time["rates"] == {"float32": 2.0, "tf32": 2.0, "float16": 2.0}
    floor_ms = (2 * up + 3 * down) / 2e12 * 1e3
    assert time["share"] == pytest.approx(floor_ms / time["milliseconds"], rel=1e-12)


def test_bare_functions_have_no_table_but_the_rest(capsys):
    assert main(["inspect", "my_job:bare"]) == 0
    shown = capsys.readouterr().out
    assert "No table of modules" in shown and "no policy that is known" in shown
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert cells == [
        ["w", "16", "float32 64 B"],
        ["all", "16", "float32 64 B"],
        ["float32", "2048", "100.0%"],  # y = x w and w's gradient: 2 · 2 · 32 · 8 · 2
    ]
    lines = {line[:22].strip(): line[22:34].strip() for line in shown.splitlines()}
    assert (lines["master weights"], lines["batch"], lines["logits"]) == ("64 B", "1.00 KiB", "–")


def test_what_is_no_target_exits_with_2(capsys):
    assert main(["inspect", "my_job:none"]) == 2
    assert "none" in capsys.readouterr().err
