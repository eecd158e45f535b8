"""What `import mpjax` promises: every name is there, also jmp's, and asking for one loads no more than it needs."""

from __future__ import annotations

import re
import subprocess
import sys

import jmp
import pytest

import mpjax


@pytest.mark.parametrize("name", mpjax.__all__)
def test_a_public_name_resolves(name):
    assert getattr(mpjax, name) is not None
    assert name in dir(mpjax)


def test_import_star_gives_the_public_names():
    names: dict[str, object] = {}
    exec("from mpjax import *", names)
    assert set(mpjax.__all__) <= set(names)


def test_every_public_name_of_jmp_is_in_mpjax():
    theirs = {name for name in dir(jmp) if not name.startswith("_")}
    assert theirs and theirs <= set(mpjax.__all__)


def test_a_wrong_name_says_what_is_near():
    with pytest.raises(AttributeError, match="has no attribute 'get_polcy'; did you mean 'get_policy'"):
        _ = mpjax.get_polcy
    with pytest.raises(AttributeError, match=re.escape("no attribute 'zzz'; dir(mpjax) lists what it has")):
        _ = mpjax.zzz


def test_the_version_is_one_that_pip_reads():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|(a|b|rc)\d+)?", mpjax.__version__)


def loaded_by(program: str, after: str = "pass") -> set[str]:
    """The modules that `program` loads in a fresh interpreter, beyond those that `after` had loaded before it."""
    report = f"""
import sys
{after}
before = set(sys.modules)
try:
    exec({program!r}, {{"sys": sys}})
except SystemExit:
    pass
print('\\nLOADED', *set(sys.modules) - before)
"""
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


def third_party(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names) - {"mpjax"}


def test_import_mpjax_loads_nothing_else():
    assert third_party(loaded_by("import mpjax")) == set()


def test_help_loads_tyro_and_no_jax():
    loaded = third_party(loaded_by("from mpjax.cli import main; main(['--help'])"))
    assert "tyro" in loaded
    assert not loaded & {"jax", "numpy", "flax", "optax", "orbax", "matplotlib", "rich"}


def test_the_hardware_table_is_shown_without_jax():
    assert not loaded_by("from mpjax.cli import main; main(['hardware'])") & {"jax", "jmp", "flax"}


def test_using_every_name_loads_little_more_than_jax_flax_optax_and_jmp():
    loaded = loaded_by(
        "import mpjax; [getattr(mpjax, name) for name in mpjax.__all__]", after="import jax, flax.linen, optax, jmp"
    )
    # Of jax and numpy themselves only small rooms that they had not loaded yet (jax.ad_checkpoint, numpy.typing).
    assert third_party(loaded) - {"jax", "numpy"} <= {"jaxtyping", "wadler_lindig", "typing_extensions"}
    assert "flax.nnx" not in loaded


@pytest.mark.parametrize(
    "order",
    ["import mpjax; before = mpjax.wrap; import mpjax.wrap as room; assert before is room", "import mpjax.wrap"],
)
def test_wrap_can_be_called_whatever_was_imported_first(order):
    assert "mpjax.wrap" in loaded_by(
        f"{order}\nassert callable(mpjax.wrap) and mpjax.wrap is sys.modules['mpjax.wrap']"
    )


def test_wrap_is_the_package_and_its_function():
    from flax import linen as nn

    import mpjax.wrap.linen as door

    assert mpjax.wrap.linen is door
    assert isinstance(mpjax.wrap(nn.Dense(2), "bfloat16"), mpjax.Model)
