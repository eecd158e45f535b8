"""States as plain pytree dataclasses: unflattening goes around the constructor, static fields are structure."""

from __future__ import annotations

import dataclasses
import pickle

import chex
import jax
import jax.numpy as jnp
import pytest

from mpjax.core.struct import pytree_dataclass, static_field


@pytest.fixture(scope="module")
def calls():
    return []


@pytest.fixture(scope="module")
def state(calls):
    @pytree_dataclass
    class State:
        first: object
        name: str = static_field(default="steps")
        second: object = None
        settings: tuple = static_field(default=())

        def __post_init__(self):
            calls.append(self)
            if not hasattr(self.first, "dtype"):
                raise TypeError("a check that jax's placeholders do not pass")

        @property
        def total(self):
            return self.first + self.second

    return State(jnp.float32(1), name="odd", second={"a": jnp.arange(2)}, settings=(3, "x"))


def test_data_are_leaves_in_order_and_static_fields_are_structure(state):
    leaves, structure = jax.tree.flatten(state)
    assert leaves[0] is state.first and leaves[1] is state.second["a"] and len(leaves) == 2
    same = structure.unflatten(leaves)
    assert (same.name, same.settings, type(same)) == ("odd", (3, "x"), type(state))
    assert jax.tree.structure(dataclasses.replace(state, name="other")) != structure


def test_unflattening_runs_no_constructor_and_no_check(state, calls):
    before = len(calls)
    for placeholder in (object(), None, "text", jax.ShapeDtypeStruct((), jnp.float32)):
        mapped = jax.tree.map(lambda _, placeholder=placeholder: placeholder, state)
        assert mapped.first is placeholder and mapped.name == "odd"
    assert len(calls) == before
    with pytest.raises(TypeError, match="placeholders do not pass"):
        dataclasses.replace(state, first=object())


def test_keys_are_the_names_of_the_fields(state):
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(state)
    ]
    assert paths == ["first", "second/a"]


def test_it_is_frozen(state):
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.first = 2


def test_a_static_field_is_another_compile_and_data_are_not(state):
    traced = []

    @jax.jit
    def step(state):
        traced.append(state.name)
        return dataclasses.replace(state, first=state.first * 2)

    for _ in range(3):
        state = step(state)
    assert traced == ["odd"] and float(state.first) == 8 and state.settings == (3, "x")
    step(dataclasses.replace(state, name="even"))
    assert traced == ["odd", "even"]


def test_vmap_scan_and_grad_go_through(state):
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    assert jax.vmap(lambda s: s.first)(stacked).tolist() == [1, 1]
    out, _ = jax.lax.scan(lambda s, _: (dataclasses.replace(s, first=s.first + 1), None), state, length=3)
    assert float(out.first) == 4
    grads = jax.grad(lambda first: dataclasses.replace(state, first=first).first ** 2)(jnp.float32(3))
    assert float(grads) == 6
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x, state), state)


@pytree_dataclass
class Named:
    x: object
    name: str = static_field(default="n")


def test_it_pickles():
    same = pickle.loads(pickle.dumps(Named(jnp.arange(2), "other")))
    assert same.name == "other" and same.x.tolist() == [0, 1]
