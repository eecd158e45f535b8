"""The wheel: what is in it, and that it works in an environment that holds nothing else."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mpjax

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.installs

TINY_RUN = """
import warnings; warnings.simplefilter("error")
from pathlib import Path
import jax, jax.numpy as jnp, optax
from flax import linen as nn
import mpjax

assert Path(mpjax.__file__).is_relative_to(Path(__import__("sys").prefix)), mpjax.__file__
model = mpjax.wrap(nn.Dense(1), "mixed_float16")
optimizer = optax.sgd(0.1)

def loss_fn(params, mstate, batch, rng):
    y, mstate = model.apply(params, mstate, batch["x"], rng=rng, train=True)
    return ((y - batch["y"]) ** 2).mean(), mpjax.Aux(mstate, {})

batch = {"x": jnp.ones((4, 3)), "y": jnp.ones((4, 1))}
state = mpjax.TrainState.create(model, optimizer, jax.random.key(0), batch["x"])
step = mpjax.make_train_step(loss_fn, optimizer)
first = None
for _ in range(20):
    state, metrics = step(state, batch)
    first = first or float(metrics["loss"])
assert int(state.step) == 20 and float(metrics["loss"]) < first / 10, metrics
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out), cwd=ROOT)
    (built,) = out.glob("*.whl")
    return built


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wheel_holds_the_package_its_types_and_its_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "mpjax/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert {name.partition("/")[0] for name in names} == {"mpjax", f"mpjax-{mpjax.__version__}.dist-info"}
    in_tree = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mpjax").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == in_tree


def test_the_wheel_asks_for_the_runtime_dependencies_and_no_more(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"mpjax-{mpjax.__version__}.dist-info/METADATA"))
    needs = metadata.get_all("Requires-Dist")
    runtime = {re.split(r"[\[<>=~!; ]", need)[0] for need in needs if "extra ==" not in need}
    ours = "jax jaxlib flax optax chex jmp orbax-checkpoint jaxtyping tyro rich scipy safetensors flatbuffers"
    assert runtime == set(ours.split())
    assert set(metadata.get_all("Provides-Extra")) == set(
        "cuda12 cuda13 tpu experiments movielens notebooks docs test dev".split()
    )
    assert (metadata["Requires-Python"], metadata["Version"]) == (">=3.11", mpjax.__version__)


def test_the_wheel_works_in_an_empty_environment(wheel, tmp_path):
    from uv import find_uv_bin

    python = str(tmp_path / "venv" / "bin" / "python")
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    constraints = str(ROOT / "constraints.txt")
    run(find_uv_bin(), "pip", "install", "--python", python, "-c", constraints, str(wheel), cwd=tmp_path)
    (tmp_path / "tiny.py").write_text(TINY_RUN, encoding="utf-8")
    run(python, "tiny.py", cwd=tmp_path)
    assert run(str(tmp_path / "venv" / "bin" / "mpjax"), "--version", cwd=tmp_path) == f"mpjax {mpjax.__version__}\n"
