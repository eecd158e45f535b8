"""What every test stands on: eight CPU devices, checked annotations, no silent promotion, warnings as errors.

Warnings become errors in `pyproject.toml` (`filterwarnings`). No Flax or optax code that the suite runs needs rank
promotion, so it raises everywhere. Dtype promotion is strict where the code under test is ours alone; Flax and optax
promote on purpose (adamw, LayerNorm in bfloat16, recurrent cells), and there the auditor stands guard instead.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before jax is imported: the number of CPU devices is fixed when its backend starts. Where a GPU is asked for, the
# GPU's own devices are what counts.
if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import jaxtyping
from jax._src import compiler

jax.config.update("jax_numpy_rank_promotion", "raise")

# Before mpjax is imported: the hook checks each of its annotations, shapes and dtypes included, at every call. An int
# passes for a float, as PEP 484 has it.
assert "mpjax" not in sys.modules, "something imported mpjax before its annotations could be checked"
jaxtyping.install_import_hook("mpjax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

TESTS = Path(__file__).parent
STRICT = {"core", "policy", "numerics"}
OPTIMIZED = {"core", "policy", "numerics"}


users_options = compiler.get_compile_options


def quick_options(*args: Any, **kwargs: Any) -> Any:
    """XLA's CPU loops without its fusion emitters, which took two thirds of the compile time of a train step.

    jax has a setting for LLVM's level and none for this one: `XLA_FLAGS` is read once a process, and
    `jax.jit(compiler_options=...)` stands in the code under test.
    """
    options = users_options(*args, **kwargs)
    if has_fusion_emitters():
        options.env_option_overrides = [*options.env_option_overrides, EMITTERS_OFF]
    return options


EMITTERS_OFF = ("xla_cpu_use_fusion_emitters", False)


@functools.cache
def has_fusion_emitters() -> bool:
    """Whether this XLA can do without them: that of jax 0.10 can, that of 0.12 has no such option any more."""
    lowered = jax.jit(lambda: 0).lower()
    quick, compiler.get_compile_options = compiler.get_compile_options, users_options
    try:
        lowered.compile(dict([EMITTERS_OFF]))
    except jax.errors.JaxRuntimeError:
        return False
    finally:
        compiler.get_compile_options = quick
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A quarter of the compile time, by LLVM's lowest level and XLA's older loops, where it is dtypes, structure and
    reports that are tested.

    The floors `core`, `policy` and `numerics`, every test of a fault, and tests marked `optimized` (they promise the same
    bits from two programs) run as users' programs do.
    """
    path = item.path.relative_to(TESTS) if item.path.is_relative_to(TESTS) else Path("mpjax")
    numbers = path.parts[0] in OPTIMIZED or path.name.startswith("test_faults")
    quick = not numbers and item.get_closest_marker("optimized") is None
    jax.config.update("jax_disable_most_optimizations", quick)
    compiler.get_compile_options = quick_options if quick else users_options


@pytest.fixture(scope="session")
def quick_environment() -> dict[str, str]:
    """The same for a process of a test's own that jax's settings reach by its environment."""
    flags = {"XLA_FLAGS": f"--{EMITTERS_OFF[0]}=false"} if has_fusion_emitters() else {}
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | flags


@pytest.fixture(autouse=True)
def dtype_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """Strict dtype promotion in the folders of pure floors, jax's standard one elsewhere."""
    folder = request.path.relative_to(TESTS).parts[0]
    with jax.numpy_dtype_promotion("strict" if folder in STRICT else "standard"):
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what cannot run on this machine: counted as deselected, not as passed. CI leaves out only `gpu`."""
    impossible = [item for item in items if any(not possible(mark.name) for mark in item.iter_markers())]
    if impossible:
        config.hook.pytest_deselected(items=impossible)
        items[:] = [item for item in items if item not in impossible]


@functools.cache
def possible(mark: str) -> bool:
    """Whether tests marked so can run here: `gpu` needs one, `installs` needs uv and the build backend."""
    if mark == "gpu":
        return jax.default_backend() == "gpu"
    if mark == "installs":
        tools = all(importlib.util.find_spec(name) for name in ("uv", "hatchling"))
        return tools or "CI" in os.environ
    return True
