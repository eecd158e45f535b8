"""The README's example runs as it stands there, and what it says of files and commands is so."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import mpjax

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


class Net(nn.Module):
    """A module with the paths that the example's rules name."""

    @nn.compact
    def __call__(self, image, train=False):
        x = image.reshape(image.shape[0], -1, 16)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm(name="norm")(x))
        return nn.Dense(10, name="head")(x.mean(1))


def test_the_example_runs_as_it_stands(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, on_devices, going_on, serving = re.findall(r"```python\n(.*?)```", README, re.S)
    images = jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
    names = {"module": Net(), "sample": images[:1], "batch": {"image": images, "label": jnp.arange(8)}}
    exec(compile(code, "README.md", "exec"), names)
    assert int(names["state"].step) + int(names["state"].skipped) == 1
    assert {"loss", "accuracy", "grad_norm", "loss_scale"} <= names["metrics"].keys()
    table = capsys.readouterr().out
    assert "'**/attention'" in table and "float32 island" in table
    apart = dict(names)
    exec(compile(on_devices, "README.md", "exec"), apart)
    assert len(apart["state"].params["head"]["kernel"].sharding.device_set) == jax.device_count() > 1
    assert bool(jnp.isfinite(apart["metrics"]["loss"]))
    step, state = names["step"], names["state"]
    twice = going_on.replace("10_000", "3"), going_on.replace("10_000", "5")
    for text, steps in zip(twice, ([1, 2], [3, 4]), strict=True):  # one was made above
        run = dict(names) | {"state": jax.tree.map(jnp.copy, state), "batches": lambda _: names["batch"]}
        exec(compile(text, "README.md", "exec"), run)
        assert [row["attempt"] for row in run["result"].history] == steps
    mpjax.export_weights(state.params, "net.safetensors", "float32", mstate=state.mstate)
    run = dict(names)
    exec(compile(serving, "README.md", "exec"), run)
    expected, _ = jax.jit(names["model"].apply)(state.params, state.mstate, run["sample"])
    assert jnp.array_equal(run["y"], expected) and run["forward"](state.params, {}, images).shape == (8, 10)
    losses = []
    for _ in range(30):
        state, metrics = step(state, names["batch"])
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


def test_what_it_points_to_exists():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{command}:", makefile, re.M), command


def test_each_figure_cites_its_record():
    """A results table stands under a link to the record that it came from, and repeats it to the letter."""
    records = re.findall(r"\]\((experiments/records/[^)]+)\)", README)
    assert records
    for record in {Path(r).parts[2] for r in records}:
        assert (ROOT / "experiments" / "records" / record / "README.md").exists()
    table = next(iter(re.findall(r"\n\n(\| policy .*?)\n\n", README, re.S)))
    assert any(table in path.read_text(encoding="utf-8") for path in (ROOT / "experiments/records").rglob("*.md"))


@pytest.mark.parametrize("name", ["jax", "flax", "optax", "jmp"])
def test_runtime_dependencies_are_named_in_the_project_file(name):
    assert re.search(rf'^  "{name}>=', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
