"""The culprit: an overflow is planted somewhere in a model, and its name is asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import mpjax
from mpjax.measure.culprit import CulpritHook, diagnose
from mpjax.measure.origins import Run, first_origin
from tests.train.toys import held
from tests.wrap import zoo, zoo_nnx

# ---- planting --------------------------------------------------------------------------------------------------------

PLANTED: dict[str, str] = {}
"""At most one place and the direction of its overflow; read while jax traces."""


def overflowing(x):
    """Infinity made from a finite number, in whatever dtype: exp(100) is over float32's largest."""
    return x + jnp.exp(jnp.zeros_like(x) + jnp.asarray(100, x.dtype))


@jax.custom_vjp
def spoils_gradient(x):
    return x


spoils_gradient.defvjp(lambda x: (x, None), lambda _, g: (overflowing(g),))


def spot(place, tree):
    """A functional operation at a place; the one that is planted overflows."""
    spoil = {"forward": overflowing, "backward": spoils_gradient, None: lambda x: x}[PLANTED.get(place)]
    return jax.tree.map(lambda x: spoil(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


@contextlib.contextmanager
def planted(place, direction):
    PLANTED[place] = direction
    try:
        yield
    finally:
        del PLANTED[place]


# ---- three models ----------------------------------------------------------------------------------------------------


def linen_spots(next_fun, args, kwargs, context):
    """Every Linen module's own result is a place, called by its path."""
    out = next_fun(*args, **kwargs)
    return spot("/".join(context.module.path), out) if context.method_name == "__call__" else out


class Gated(nn.Module):
    """A block whose gate and softmax are functions, with places between its modules."""

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm(name="norm")(x)
        h = nn.Dense(8, name="up")(h)
        h = spot("layers:gate", jax.nn.sigmoid(h)) * h
        h = spot("layers:softmax", jax.nn.softmax(h))
        h = nn.Dense(4, name="down")(h)
        return x + spot("layers:end", h), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = spot(":begin", nn.Dense(4, name="first")(x))
        body = nn.remat(Gated, prevent_cse=False)
        x, _ = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="layers")(x, None)
        return nn.Dense(2, name="head")(spot(":pooled", x.mean(1)))


class Planting(nn.Module):
    """A model whose modules' results are places. (From here the interceptor runs inside of the wrap's, not around it.)"""

    net: nn.Module

    def __call__(self, x):
        with nn.intercept_methods(linen_spots):
            return self.net(x)


@functools.cache
def planted_class(cls):
    def call(self, *args, **kwargs):
        return spot(self.place, cls.__call__(self, *args, **kwargs))

    return type(cls)(cls.__name__, (cls,), {"__call__": call})


def planted_nnx(constructor):
    """The same for NNX: every module with a `__call__` is of a subclass whose result is a place."""

    def make(rngs):
        module = constructor(rngs)
        for keys, node in list(nnx.iter_modules(module)):
            if not isinstance(node, (nnx.List, nnx.Dict)) and callable(node):
                node.place = "/".join(map(str, keys))
                object.__setattr__(node, "__class__", planted_class(type(node)))
        return module

    return make


IMAGES = jax.random.normal(jax.random.key(5), (2, 6, 16))
MODELS = {
    "functions in a scanned, rematerialised stack": (
        Planting(Stack()),
        jax.random.normal(jax.random.key(4), (2, 3, 4)),
    ),
    "attention under a mask": (Planting(zoo.Attention()), IMAGES),
    "convolutions": (planted_nnx(lambda rngs: zoo_nnx.ConvNet(rngs=rngs)), IMAGES),
}
FUNCTIONS = {
    "layers:gate": "net/layers", "layers:softmax": "net/layers", "layers:end": "net/layers",
    ":begin": "net", ":pooled": "net",
}  # fmt: skip
"""Places among functional operations, and the module whose code they stand in."""


@functools.cache
def parts(name):
    """(loss function, state, sample, {place: canonical path})."""
    module, sample = MODELS[name]
    model = mpjax.wrap(module, "mixed_bfloat16")
    paths = [row.path for row in model.table(sample).rows]
    places = {path: path for path in paths}
    if isinstance(module, nn.Module):
        raw = {"/".join(keys): "/".join(keys).replace("layers_", "layers/") for keys in _linen_paths(module, sample)}
        places = {place: path for place, path in raw.items() if path in paths}
    if isinstance(getattr(module, "net", None), Stack):
        places |= FUNCTIONS

    def loss_fn(params, mstate, batch, rng):
        out, mstate = model.apply(params, mstate, batch)
        return jnp.square(out).mean(), mpjax.Aux(mstate)

    state = mpjax.TrainState.create(model, optax.sgd(0.1), jax.random.key(0), sample)
    return model, loss_fn, state, sample, places


def _linen_paths(module, sample):
    found = []

    def note(next_fun, args, kwargs, context):
        if context.method_name == "__call__" and context.module.scope is not None:
            found.append(context.module.path)  # without the root: what plants is inside of it
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(module.init, jax.random.key(0), sample)
    return [path for path in dict.fromkeys(found) if path]


@functools.cache
def asked(name, place, direction):
    """What is found, once for each of the 28 that the 40 draws name."""
    model, loss_fn, state, sample, _ = parts(name)
    with planted(place, direction):
        # A fresh function: jax would answer with the trace of an unplanted one.
        return diagnose(model, state, sample, lambda *args: loss_fn(*args))


def draws(count=40, seed=0):
    random = np.random.default_rng(seed)
    chosen = []
    for i in range(count):
        name = list(MODELS)[i % len(MODELS)]
        places = list(parts(name)[-1])
        chosen.append((name, places[random.integers(len(places))], ("forward", "backward")[random.integers(2)]))
    return chosen


def test_forty_overflows_are_all_found():
    """Over every kind of place: modules, scanned layers under remat, functions; forward and backward."""
    wrong = []
    drawn = draws()
    for name, place, direction in drawn:
        path = parts(name)[-1][place]
        found = asked(name, place, direction)
        if (found.path, found.phase, found.in_module, found.operation.partition("(")[0]) != (
            path,
            direction,
            True,
            "exp",
        ):
            wrong.append((name, place, direction, str(found)))
    assert not wrong
    assert {direction for _, _, direction in drawn} == {"forward", "backward"}
    paths = {parts(name)[-1][place] for name, place, _ in drawn}
    assert {place for _, place, _ in drawn} & FUNCTIONS.keys() and any(p.startswith("net/layers") for p in paths)


def test_nothing_planted_nothing_found():
    for name in MODELS:
        model, loss_fn, state, sample, _ = parts(name)
        assert diagnose(model, state, sample, loss_fn, optax.sgd(0.1)) is None


# ---- what is said of them --------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """A scanned stack of one linear layer, so that a number can be made large in one of its layers."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Linear, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack(name="layers")(x, None)[0]


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(4, name="dense", use_bias=False)(x), None


def deep(kernels, policy="mixed_float16", loss_of=jnp.sum, scale=None):
    """A model whose three layers multiply by these numbers, and a batch of ones."""
    model = mpjax.wrap(Deep(), policy)
    params = {"layers": {"dense": {"kernel": jnp.stack([jnp.eye(4) * k for k in kernels])}}}

    def loss_fn(params, mstate, batch, rng):
        return loss_of(model.apply(params, mstate, batch)[0])

    given = dataclasses.replace(model, init=lambda rng, *sample: (params, {}))  # nothing to compile
    state = mpjax.TrainState.create(
        given, optax.sgd(0.1), jax.random.key(0), jnp.ones((2, 4)),
        loss_scale=None if scale is None else mpjax.dynamic_loss_scale(scale),
    )  # fmt: skip
    return model, state, jnp.ones((2, 4)), loss_fn


def test_which_layer_of_a_stack_and_how_large_what_went_in():
    """100 · 200 = 20,000 is a float16; four times that is none."""
    found = diagnose(*deep([100.0, 200.0, 4.0], scale=1.0))
    assert (found.path, found.phase, found.layer, found.kind) == ("layers/dense", "forward", 2, "+inf")
    assert (found.operation, found.amax, found.trips) == ("dot_general(float16) -> float16", 20000.0, ((2, 3),))
    said = str(found)
    assert "first not finite in the forward pass: layers/dense, iteration 2 of 3" in said
    assert "largest finite operand 2e+04" in said and "{'layers/dense': 'compute=float32'}" in said


def test_a_gradient_that_overflows_under_the_loss_scale_is_backward():
    """8 · 2^13 is past 65504; with half the scale nothing is."""
    found = diagnose(*deep([1 / 8, 1 / 2, 8.0], scale=2.0**13))
    assert (found.path, found.phase, found.layer, found.loss_scale) == ("layers/dense", "backward", 2, 2.0**13)
    assert found.amax == 2.0**13 and diagnose(*deep([1 / 8, 1 / 2, 8.0], scale=2.0**12)) is None


def test_the_next_module_that_gets_it_is_named_too():
    """2^17 from the loss is no float16 where it enters the model, in the root's own cast; the stack receives it."""
    found = diagnose(*deep([1.0] * 3, scale=2.0**17))
    assert (found.path, found.phase, found.in_module, found.reached) == ("", "backward", True, "layers/dense")
    assert "convert_element_type(float32) -> float16 made +inf" in str(found)
    assert "the root module" in str(found) and "layers/dense was the next to get it" in str(found)


def test_an_infinity_that_reaches_nothing_is_no_culprit():
    """log 0 behind a where, and a mask of −inf in a softmax; then a row that is masked wholly."""

    def loss_of(masked):
        def loss(y):
            logs = jnp.where(y > 0, jnp.log(jax.lax.stop_gradient(y) - 1), y)  # log 0, and all of it taken
            scores = jnp.where(jnp.broadcast_to(jnp.arange(4), y.shape) < masked, -jnp.inf, y)
            return jnp.where(jnp.isfinite(logs), logs, jax.nn.softmax(scores)).sum()

        return loss

    assert diagnose(*deep([1.0] * 3, "float32", loss_of(3))) is None
    found = diagnose(*deep([1.0] * 3, "float32", loss_of(4)))
    assert not found.in_module and found.where == "the loss function, outside of the model"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_data_and_bad_params_are_named_as_such(bad):
    model, state, batch, loss_fn = deep([1.0] * 3, "float32")
    found = diagnose(model, state, {"x": batch.at[0, 0].set(bad)}, lambda p, m, b, r: loss_fn(p, m, b["x"], r))
    assert (found.path, found.phase) == ("batch/x", "input") and "batch/x holds" in str(found)
    kernel = state.params["layers"]["dense"]["kernel"].at[1, 0, 0].set(bad)
    poisoned = mpjax.TrainState.create(
        model, optax.sgd(0.1), jax.random.key(0), batch, params={"layers": {"dense": {"kernel": kernel}}}
    )
    assert diagnose(model, poisoned, batch, loss_fn).path == "params/layers/dense/kernel"


def test_an_update_that_is_not_finite_is_the_optimizers():
    model, state, batch, loss_fn = deep([1.0] * 3, "float32")
    optimizer = optax.scale(jnp.inf)
    state = mpjax.TrainState.create(model, optimizer, jax.random.key(0), batch)
    found = diagnose(model, state, batch, loss_fn, optimizer)
    assert found.phase == "update" and "the optimizer's update" in str(found)
    assert diagnose(model, state, batch, loss_fn) is None


def test_the_micro_batch_is_named():
    model, state, batch, loss_fn = deep([100.0, 200.0, 1.0], scale=1.0)
    batch = jnp.ones((6, 4)).at[1].set(4.0)  # row 1 is the first of the second micro-batch
    found = diagnose(model, state, batch, loss_fn, accumulate=3)
    assert found.path == "layers/dense" and found.trips == ((1, 3), (1, 3))


def test_loops_conditions_and_derivatives_of_ones_own_are_entered():
    """while, cond, custom_jvp, custom_vjp: the operation inside is found, at the trip at which it overflowed."""

    @jax.custom_jvp
    def own(x):
        return jnp.exp(x)

    own.defjvp(lambda primals, tangents: (own(*primals), own(*primals) * tangents[0]))

    def program(x):
        _, y = jax.lax.while_loop(
            lambda c: c[0] < 5, lambda c: (c[0] + 1, jax.lax.cond(c[0] > 2, own, jnp.sin, c[1] + 40)), (0, x)
        )
        return y

    closed = jax.make_jaxpr(program)(1.0)
    run = Run()
    origin = first_origin(run.evaluate(closed, [np.float32(1.0)], ["x"]))
    # sin leaves about 1, then exp(41) = 6e17 at trip 3, whose exp is infinite at trip 4.
    assert origin.operation.startswith("exp") and origin.trips == ((4, None),)
    assert origin.amax == pytest.approx(np.exp(40 + np.float64(_sine_chain(1.0))), rel=1e-4)


def _sine_chain(x):
    for _ in range(3):
        x = np.sin(x + 40)
    return x


# ---- in the loop -----------------------------------------------------------------------------------------------------


def test_fit_names_the_culprit_when_it_stops():
    _, state, batch, loss_fn = deep([100.0, 200.0, 4.0], scale=8.0)
    before = held(state)
    step = mpjax.make_train_step(loss_fn, optax.sgd(0.1), donate=False)
    hook = CulpritHook()
    with pytest.raises(
        mpjax.NonFiniteError, match=r"first not finite in the forward pass: layers/dense, iteration 2 of 3"
    ):
        mpjax.fit(step, state, lambda attempt: batch, attempts=10, hooks=[hook], max_consecutive_skips=3)
    assert hook.culprit.amax == 20000.0 and held(state) == before


def test_the_culprit_is_sought_under_the_scale_at_which_the_step_failed():
    """Only a scale over 2^12 overflows; the third skip in a row ran at 2^13, and by then the scale is below."""
    _, state, batch, loss_fn = deep([1 / 8, 1 / 2, 8.0], scale=2.0**15)
    step = mpjax.make_train_step(loss_fn, optax.sgd(0.1))
    hook = CulpritHook()
    with pytest.raises(mpjax.NonFiniteError, match="backward pass: layers/dense"):
        mpjax.fit(step, state, lambda attempt: batch, attempts=10, hooks=[hook], max_consecutive_skips=3)
    assert hook.culprit.loss_scale == 2.0**13


def test_without_the_hook_nothing_is_diagnosed():
    _, state, batch, loss_fn = deep([100.0, 200.0, 4.0], scale=8.0)
    step = mpjax.make_train_step(loss_fn, optax.sgd(0.1))
    with pytest.raises(mpjax.NonFiniteError) as stopped:
        mpjax.fit(step, state, lambda attempt: batch, attempts=10, max_consecutive_skips=3)
    assert "first not" not in str(stopped.value) and "params are those of step 0" in str(stopped.value)


@pytest.mark.parametrize("reduce_dtype", [None, "float32"])
def test_on_eight_devices(reduce_dtype):
    mesh = jax.make_mesh((8,), ("data",))
    _, state, _, loss_fn = deep([100.0, 200.0, 1.0], scale=1.0)
    batch = mpjax.shard_batch(jnp.ones((8, 4)).at[5].set(4.0), mesh)
    step = mpjax.make_train_step(loss_fn, optax.sgd(0.1), mesh=mesh, reduce_dtype=reduce_dtype)
    hook = CulpritHook()
    with pytest.raises(mpjax.NonFiniteError, match="forward pass: layers/dense, iteration 1 of 3"):
        mpjax.fit(
            step, mpjax.shard_state(state, mesh), lambda n: batch, attempts=9, hooks=[hook], max_consecutive_skips=2
        )
