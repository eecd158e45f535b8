"""States for the tests of checkpoints: one with every kind of leaf, and train states of every shape that there is."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

from mpjax.core.model import Model
from mpjax.numerics.loss_scale import dynamic_loss_scale
from mpjax.train.state import TrainState

KEY = jax.random.key(11)


def every_kind() -> dict[str, Any]:
    """Bits that are easily lost: ints beyond 2²⁴, −0, payloads of NaN, subnormals, narrow formats, nothing at all, keys."""
    odd = np.array([0x7FC12345, 0xFFC00001, 0x80000000, 0x00000001, 0x3F800000], np.uint32).view(np.float32)
    narrow = {
        name: jnp.asarray(np.array([0.5, -1.0, 2.0, 0.25]).astype(getattr(ml_dtypes, name)))
        for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float4_e2m1fn", "int4")
    }
    return {
        "odd": jnp.asarray(odd),
        "minus_zero": jnp.full((8, 4), -0.0),
        "big": jnp.array([16777217, -(2**31)], jnp.int32),
        "half": jnp.asarray(np.array([65504.0, 6e-8], np.float16)),
        "bools": jnp.array([[True], [False]]),
        "complex": jnp.array([1 + 2j], jnp.complex64),
        "empty": jnp.zeros((0, 3), jnp.bfloat16),
        "scalar": jnp.float32(1 / 3),
        "keys": jax.random.split(jax.random.key(1), 3),
        "rbg": jax.random.key(2, impl="rbg"),
        "no_keys": jax.random.split(jax.random.key(1), 3)[:0],
        "numpy": np.arange(3, dtype=np.int64) + 2**53,
        "numpy_scalar": np.float64(0.1),
        "numbers": [True, 2**70, 0.1, -0.0],
        "nothing": None,
        "a_1": jnp.ones(1),
        "a": {"1": jnp.zeros(2), "dotted.name/and ü": jnp.ones(3)},
        **narrow,
    }


def bare_model() -> Model:
    """Two layers with statistics, of bare functions: quick to make."""

    def init(rng: jax.Array, *sample: Any) -> tuple[dict, dict]:
        first, second = jax.random.split(rng)
        params = {
            "layer_0": {"kernel": jax.random.normal(first, (4, 3)), "bias": jnp.zeros(3)},
            "layer_1": {"kernel": jax.random.normal(second, (3, 2))},
        }
        return params, {"batch_stats": {"mean": jnp.zeros(3), "count": jnp.int32(0)}}

    def apply(params: Any, mstate: Any, x: jax.Array, rng: Any = None) -> tuple[jax.Array, Any]:
        h = x @ params["layer_0"]["kernel"] + params["layer_0"]["bias"][None]
        stats = {"mean": h.mean(0), "count": mstate["batch_stats"]["count"] + 1}
        return h @ params["layer_1"]["kernel"], {"batch_stats": stats}

    return Model(init, apply)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "adamw with a schedule": optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0, 9))
    ),
    "injected": optax.inject_hyperparams(optax.adam)(1e-3),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=2),
    "masked": optax.masked(optax.adam(1e-3), {"layer_0": {"kernel": True, "bias": False}, "layer_1": {"kernel": True}}),
}


@functools.cache
def train_state(optimizer: str = "sgd", scaled: bool = False, **options: Any) -> TrainState:
    """Made once for all tests that ask for the same: none may donate it."""
    scale = dynamic_loss_scale() if scaled else None
    return TrainState.create(bare_model(), OPTIMIZERS[optimizer], KEY, jnp.ones((1, 4)), loss_scale=scale, **options)


def blank(tree: Any) -> Any:
    """The same structure, every leaf another value of its kind, so that what is restored cannot be what was there."""

    def other(x: Any) -> Any:
        if isinstance(x, bool | int | float) and not isinstance(x, np.generic):
            return type(x)(0)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.full_like(jax.random.key_data(x), 7), impl=jax.random.key_impl(x))
        filled = np.full(x.shape, 1, np.float32).astype(x.dtype)
        return filled[()] if isinstance(x, np.generic) else filled if isinstance(x, np.ndarray) else jnp.asarray(filled)

    return jax.tree.map(other, tree)


def bits(tree: Any) -> dict[str, tuple]:
    """From key path to (kind, dtype, shape, bytes) of every leaf: equal if and only if every bit is."""
    return {jax.tree_util.keystr(keys): _bits(x) for keys, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _bits(x: Any) -> tuple:
    if isinstance(x, bool | int | float) and not isinstance(x, np.generic):
        return type(x).__name__, repr(x)
    kind, dtype = ("jax" if isinstance(x, jax.Array) else type(x).__name__), str(x.dtype)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return kind, dtype, x.shape, np.asarray(jax.random.key_data(x)).tobytes()
    return kind, dtype, x.shape, np.asarray(x).tobytes()
