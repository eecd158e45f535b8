"""TARGET: what names a job on the command line, and what is said where it names none."""

from __future__ import annotations

import pytest

from mpjax.cli.target import Refused, job_factory, load_job

PROGRAM = """
import jax.numpy as jnp, optax, mpjax

def job(policy="float32", seed=0, width="2"):
    model = mpjax.Model(lambda rng, x: ({"w": jnp.full(int(width), float(seed))}, {}),
                        lambda p, m, x, rng=None: (x @ p["w"], m), policy=mpjax.PolicyMap.of(policy))
    return mpjax.Job(model, lambda p, m, x, rng: model.apply(p, m, x)[0].mean(), optax.sgd(0.1),
                     lambda n: jnp.ones((4, int(width))), sample=(jnp.ones((1, int(width))),))

def fixed():
    return job()

def none():
    return 3
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    (tmp_path / "my_program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_program"


def test_a_function_gets_policy_seed_and_settings(program):
    make = job_factory(f"{program}:job", ["width=5"])
    job = make("mixed_bfloat16", 3)
    assert str(job.model.policy.default) == "p=full,c=bf16,o=full"
    params, _ = job.model.init(None, None)
    assert params["w"].tolist() == [3.0] * 5
    assert str(make(None, None).model.policy.default) == "p=full,c=full,o=full"


@pytest.mark.parametrize(
    ("target", "settings", "policy", "said"),
    [
        ("my_program:jab", [], None, "jab"),
        ("no_such_module:job", [], None, "no_such_module"),
        ("my_program:job", ["width"], None, "NAME=VALUE"),
        ("my_program:job", ["depth=3"], None, "does not take depth; it takes policy, seed, width"),
        ("my_program:fixed", [], "float32", "does not take policy; it takes nothing"),
        ("my_program:none", [], None, "returned int; legal is a mpjax.Job"),
        ("no_such_experiment", [], None, "there are .*vision_digits"),
        ("numerics_underflow", [], None, "no job of its own"),
        ("mlp_jax", ["widht=3"], None, "no setting"),
        ("mlp_jax", ["preset=h100"], None, "got --preset=h100; legal are none"),
        ("mlp_jax", [], "bf17", "bf17"),
    ],
)
def test_what_names_no_job_is_refused_with_what_is_legal(program, target, settings, policy, said):
    with pytest.raises(Refused, match=said) as refused:
        load_job(target, policy, settings=settings)
    assert refused.value.code == 2


def test_an_experiment_gets_policy_seed_and_settings():
    job = load_job("vision_digits", "by_path", seed=1, settings=["width=32", "depth=1", "heads=2"])
    assert job.model.policy.resolve("head", {}).policy.output_dtype == "float32"
    assert job.model.policy.resolve("layers/0/attention", {}).policy.compute_dtype == "float16"


def test_data_that_is_not_there_exits_with_1(monkeypatch, tmp_path):
    monkeypatch.setenv("MPJAX_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(Refused, match="shakespeare") as refused:
        load_job("language_gpt")
    assert refused.value.code == 1
