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

import pytest

# Before jax is imported: the number of CPU devices is fixed when its backend starts. Where a GPU is asked for, the
# GPU's own devices are what counts.
if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import jaxtyping

jax.config.update("jax_numpy_rank_promotion", "raise")

# Before mpjax is imported: the hook checks each of its annotations, shapes and dtypes included, at every call. An int
# passes for a float, as PEP 484 has it.
assert "mpjax" not in sys.modules, "something imported mpjax before its annotations could be checked"
jaxtyping.install_import_hook("mpjax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

TESTS = Path(__file__).parent
STRICT = {"core", "policy", "numerics"}
OPTIMIZED = {"core", "policy", "numerics", "train", "store"}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Half the compile time, at a lower level of LLVM, where it is dtypes, structure and reports that are tested.

    The floors that make numbers, every test of a fault, and tests marked `optimized` (they promise the same bits from two
    programs) run as users' programs do.
    """
    path = item.path.relative_to(TESTS) if item.path.is_relative_to(TESTS) else Path("mpjax")
    numbers = path.parts[0] in OPTIMIZED or path.name.startswith("test_faults")
    quick = not numbers and item.get_closest_marker("optimized") is None
    jax.config.update("jax_disable_most_optimizations", quick)


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
