"""`mpjax lint TARGET`: a line for each finding and exit code 1, or one line that says nothing was found."""

from __future__ import annotations

import json

import pytest

from mpjax.cli import main

PROGRAM = """
import jax, jax.numpy as jnp, optax, mpjax
from flax import linen as nn

class Net(nn.Module):
    careful: bool
    @nn.compact
    def __call__(self, x):
        h = nn.Dense(8, name="up")(x)
        return nn.relu(h) if self.careful else jax.nn.softmax(h)

def job(policy="mixed_bfloat16", careful="no"):
    model = mpjax.wrap(Net(careful == "yes"), policy)
    return mpjax.Job(model, lambda p, m, x, rng: model.apply(p, m, x)[0].mean(), optax.sgd(0.1),
                     lambda n: jnp.ones((4, 8)), sample=(jnp.ones((1, 8)),))
"""


@pytest.fixture(autouse=True)
def program(tmp_path, monkeypatch):
    (tmp_path / "net_to_lint.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)


def test_findings_are_lines_and_exit_with_1(capsys):
    assert main(["lint", "net_to_lint:job"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    path, finding, mend = line.split(": ")
    assert path == "·" and finding == "a softmax whose exponentials are bfloat16" and mend.startswith("cast its")


def test_nothing_found_says_so_with_the_table_of_flops(capsys):
    assert main(["lint", "net_to_lint:job", "--set", "careful=yes"]) == 0
    first, *table = capsys.readouterr().out.splitlines()
    assert first.startswith("net_to_lint:job: nothing was found")
    assert table[0].split() == ["kind", "dtype", "ops", "bytes", "FLOPs", "share"]
    # By hand: 2·4·8·8 of x·W, as much of xᵀ·g; each reads and writes 32 + 64 + 32 numbers of 2 bytes.
    assert table[1].split() == ["dot", "bfloat16", "2", "512", "1.02e+03", "100.0%"]


def test_the_policy_decides(capsys):
    assert main(["lint", "net_to_lint:job", "--policy", "float32"]) == 0


def test_json(capsys):
    assert main(["lint", "net_to_lint:job", "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert found["rule"] == "half softmax" and found["path"] == "·" and found["count"] == 1
    assert main(["lint", "net_to_lint:job", "--policy=float32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_target_that_is_none_exits_with_2(capsys):
    assert main(["lint", "net_to_lint:jab"]) == 2
    assert "jab" in capsys.readouterr().err
