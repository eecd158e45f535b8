"""The ground that the other tests stand on is really there."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax._src import compiler

import mpjax


def test_annotations_of_mpjax_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError):
        mpjax.select_tree(jnp.ones(3, bool), 0, 0)


def test_warnings_are_errors():
    with pytest.raises(UserWarning):
        warnings.warn("seen", stacklevel=1)


def test_rank_promotion_raises():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones(3) + jnp.ones((2, 3))


def test_dtype_promotion_is_standard_outside_the_pure_floors():
    assert (jnp.ones(2, jnp.bfloat16) + np.ones(2, np.float32)).dtype == jnp.float32


def test_eight_devices_on_a_cpu():
    if jax.default_backend() == "cpu":
        assert len(jax.devices()) == 8


def level_and_overrides():
    options = compiler.get_compile_options(1, 1)
    level = options.executable_build_options.debug_options.xla_backend_optimization_level
    return level, [name for name, _ in options.env_option_overrides]


def test_most_tests_are_compiled_quickly(quick_environment):
    has_emitters = "XLA_FLAGS" in quick_environment
    assert level_and_overrides() == (0, ["xla_cpu_use_fusion_emitters"] * has_emitters)


@pytest.mark.optimized
def test_some_are_compiled_as_users_programs_are():
    level, overrides = level_and_overrides()
    assert level > 0 and overrides == []


@pytest.mark.gpu
def test_a_gpu_multiplies():
    x = jnp.ones((16, 16), jnp.bfloat16)
    assert jax.devices()[0].platform == "gpu"
    assert float((x @ x).sum()) == 16.0**3
