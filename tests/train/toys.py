"""Toy models for the tests of the step: fingerprints of a state, and a model into which a batch carries poison."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpjax.core.model import Model
from mpjax.core.tree import path_of
from mpjax.measure.jaxprs import sub_jaxprs
from mpjax.train.state import Aux, TrainState


def fingerprint(tree: Any) -> dict[str, tuple]:
    """From path to (dtype, shape, hash of the bytes) of every leaf: equal if and only if every byte is."""
    return {path_of(keys): _bytes_of(x) for keys, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _bytes_of(x: Any) -> tuple:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    x = np.asarray(x)
    return str(x.dtype), x.shape, hashlib.sha256(x.tobytes()).hexdigest()


def held(state: TrainState) -> dict[str, tuple]:
    """What a skipped step must leave alone, to the last byte: all but the loss scale and the counters of steps."""
    return fingerprint((state.params, state.mstate, state.opt_state, state.ema, state.rng))


def equations(jaxpr: Any) -> list[Any]:
    """Every equation of a jaxpr, those of inner jaxprs right behind the equation that holds them."""
    return [e for eqn in jaxpr.eqns for e in (eqn, *(e for inner in sub_jaxprs(eqn) for e in equations(inner)))]


def linear_model(width: int = 3, dtype: Any = jnp.float32) -> Model:
    """`x @ w + b`, params in `dtype`, computed in float32."""

    def init(rng: jax.Array, *sample: Any) -> tuple[dict, dict]:
        return {"w": jnp.zeros(width, dtype), "b": jnp.zeros((), dtype)}, {}

    def apply(params: Any, mstate: Any, x: jax.Array, rng: Any = None) -> tuple[jax.Array, Any]:
        return x @ params["w"].astype(jnp.float32) + params["b"].astype(jnp.float32), mstate

    return Model(init, apply)


class Seen(NamedTuple):
    """What an optimizer was given: the state of `recording`."""

    grads: Any
    params: Any
    calls: jax.Array


def recording(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, with the last gradients and params that it was given in its state."""

    def init(params: Any) -> tuple:
        return Seen(params, params, jnp.zeros((), jnp.int32)), inner.init(params)

    def update(grads: Any, state: tuple, params: Any = None) -> tuple:
        updates, after = inner.update(grads, state[1], params)
        return updates, (Seen(grads, params, state[0].calls + 1), after)

    return optax.GradientTransformation(init, update)


# A model with a vector, a matrix and a scalar to poison, and two kinds of statistics. Its batch has a row of poison for
# every place where a number can go bad, zero where none is wanted, so that one compiled step meets every fault.

ROWS = 4
SHAPES: dict[str, tuple[int, ...]] = {"layers/0/kernel": (2, 2), "layers/0/bias": (2,), "out": ()}
STATISTICS = ("last", "mean")
MARK = {2.0**8: np.nan, 2.0**12: np.inf, 2.0**16: -np.inf}
"""A gradient of about this size makes `spoiling` answer with this update: the only way from a batch into an update alone."""


def poisonable_init(rng: jax.Array, *sample: Any) -> tuple[dict, dict]:
    keys = iter(jax.random.split(rng, 3))
    kernel, bias, out = (0.5 * jax.random.normal(next(keys), shape) for shape in SHAPES.values())
    stats = {"mean": jnp.zeros(2), "last": jnp.zeros(2), "count": jnp.zeros((), jnp.int32)}
    return {"layers": [{"kernel": kernel, "bias": bias}], "out": out}, {"stats": stats}


@jax.custom_vjp
def _inject(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    return x


_inject.defvjp(lambda x, c: (x, c), lambda c, g: (g + c, jnp.zeros_like(c)))


def poisonable_loss(params: Any, mstate: Any, batch: Any, rng: Any) -> tuple[jax.Array, Aux]:
    poison = batch["poison"]
    leaves = {"layers/0/kernel": params["layers"][0]["kernel"], "layers/0/bias": params["layers"][0]["bias"]}
    leaves["out"] = params["out"]
    marks = sum((poison["update"][path].sum(0) * x).sum() for path, x in leaves.items())
    leaves = {path: _inject(x, poison["grads"][path].sum(0)) for path, x in leaves.items()}
    rows = jax.vmap(lambda x: jnp.tanh(x @ leaves["layers/0/kernel"] + leaves["layers/0/bias"]).sum() * leaves["out"])
    loss = jnp.square(rows(batch["x"]) - batch["y"]).mean() + marks
    mean = batch["x"].mean(0)
    old, bad = mstate["stats"], poison["stats"]
    stats = {
        "mean": 0.75 * old["mean"] + 0.25 * mean + bad["mean"].sum(0),
        "last": mean + bad["last"].sum(0),  # the next micro-batch overwrites it, poison and all
        "count": old["count"] + 1,
    }
    return loss + jax.lax.stop_gradient(poison["loss"].sum()), Aux({"stats": stats}, {"rows": batch["x"].sum()})


def spoiling(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, whose update, and nothing else, goes bad where a gradient is about one of `MARK`."""

    def spoil(u: jax.Array, g: jax.Array) -> jax.Array:
        for mark, bad in MARK.items():
            u = jnp.where((mark / 8 < g) & (g < 2 * mark), jnp.asarray(bad, u.dtype), u)  # a mean over 4 is mark / 4
        return u

    def update(grads: Any, state: Any, params: Any = None) -> tuple:
        updates, state = inner.update(grads, state, params)
        return jax.tree.map(spoil, updates, grads), state

    return optax.GradientTransformation(inner.init, update)


poisonable = Model(poisonable_init, lambda params, mstate, *args, rng=None: (None, mstate))


def clean_batch(seed: int = 0) -> dict[str, Any]:
    """A batch without poison, numpy throughout."""
    rng = np.random.default_rng(seed)
    zeros = {path: np.zeros((ROWS, *shape), np.float32) for path, shape in SHAPES.items()}
    return {
        "x": rng.normal(size=(ROWS, 2)).astype(np.float32),
        "y": rng.normal(size=ROWS).astype(np.float32),
        "poison": {
            "grads": zeros,
            "update": {path: x.copy() for path, x in zeros.items()},
            "loss": np.zeros(ROWS, np.float32),
            "stats": {name: np.zeros((ROWS, 2), np.float32) for name in STATISTICS},
        },
    }


class Place(NamedTuple):
    """One element into which a batch can carry poison: the kind, the leaf and the index in it."""

    kind: str
    leaf: str
    index: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind}-{self.leaf}{list(self.index)}"


def places() -> list[Place]:
    """Every element of every gradient leaf, of the loss, of the batch statistics, and of the candidate update."""
    params = [(path, i) for path, shape in SHAPES.items() for i in np.ndindex(shape)]
    stats = [(name, i) for name in STATISTICS for i in np.ndindex(2)]
    return [
        *(Place("grads", path, i) for path, i in params),
        Place("loss", "", ()),
        *(Place("stats", name, i) for name, i in stats),
        *(Place("update", path, i) for path, i in params),
    ]


def poisoned_batch(place: Place, value: float, row: int = 0) -> dict[str, Any]:
    """The clean batch with one bad number at `place`, carried by one of its rows."""
    batch = clean_batch()
    target = batch["poison"][place.kind]
    target = target[place.leaf] if place.leaf else target
    if place.kind == "update":
        value = next(mark for mark, bad in MARK.items() if np.array_equal(bad, value, equal_nan=True))
    target[(row, *place.index)] = value
    return batch
