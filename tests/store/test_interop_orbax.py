"""Orbax trees of others: read as they are stored, floats cast by rule, ints never."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn

import mpjax

X = np.ones((2, 3), np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(2)(x)


MODEL = mpjax.wrap(Net(), {"Dense_1": "param=bfloat16"})
LIKE = jax.eval_shape(MODEL.init, jax.random.key(0), X)
DROP = [("step|opt/.*", None)]


def theirs() -> dict:
    """Somebody's train state: what `LIKE` wants, and more."""
    rng = np.random.default_rng(0)
    params, mstate = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), LIKE)
    return {"params": params, **mstate, "opt": [{"mu": params}, np.int32(3)], "step": np.int32(16777217)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The same tree as each of Orbax's writers lays it down."""
    root, tree = tmp_path_factory.mktemp("orbax"), theirs()
    with ocp.StandardCheckpointer() as writer:
        writer.save(root / "standard", tree)
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(root / "pytree", tree)
    with ocp.CheckpointManager(root / "manager") as manager:
        manager.save(3, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
    return root


@pytest.mark.parametrize("place", ["standard", "pytree", "manager/3/default", "manager/3"])
def test_every_layout_of_orbax_fills_a_wrapped_model(place, written):
    found = mpjax.load_orbax(written / place, LIKE, DROP)
    tree = theirs()
    assert jax.tree.structure((found.params, found.mstate)) == jax.tree.structure(LIKE)
    np.testing.assert_array_equal(found.params["Dense_0"]["kernel"], tree["params"]["Dense_0"]["kernel"])
    np.testing.assert_array_equal(
        found.mstate["batch_stats"]["BatchNorm_0"]["var"], tree["batch_stats"]["BatchNorm_0"]["var"]
    )
    by_rule = tree["params"]["Dense_1"]["kernel"].astype(jnp.bfloat16)
    assert found.params["Dense_1"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.params["Dense_1"]["kernel"], by_rule)
    assert found.casts == {f"params/Dense/1/{name}": ("float32", "bfloat16") for name in ("kernel", "bias")}


def test_names_are_mapped(written):
    like = ({"up": LIKE[0]["Dense_0"], "down": {"kernel": jax.ShapeDtypeStruct((2, 4), "float32")}}, {})
    rename = [
        ("params/Dense_0/(.*)", r"params/up/\1"), ("params/Dense_1/kernel", "params/down/kernel", "transpose"), (".*", None),
    ]  # fmt: skip
    found = mpjax.load_orbax(written / "standard", like, rename)
    np.testing.assert_array_equal(found.params["down"]["kernel"], theirs()["params"]["Dense_1"]["kernel"].T)
    np.testing.assert_array_equal(found.params["up"]["bias"], theirs()["params"]["Dense_0"]["bias"])
    assert found.casts == {}


def test_an_int_is_never_rounded_into_a_float(written):
    """Orbax would: 16777217 comes back as 16777216 where a float32 is asked for."""
    only = [("step", "params/step"), (".*", None)]
    exact = mpjax.load_orbax(written / "standard", ({"step": jax.ShapeDtypeStruct((), "int32")}, {}), only)
    assert exact.params["step"] == 16777217 and exact.params["step"].dtype == jnp.int32
    with pytest.raises(ValueError, match=r"params/step is int32, in `like` float32.*\(floats are cast, ints never\)"):
        mpjax.load_orbax(written / "standard", ({"step": jax.ShapeDtypeStruct((), "float32")}, {}), only)


def test_what_does_not_fit_is_named(written):
    like = (LIKE[0] | {"Dense_2": LIKE[0]["Dense_1"]}, LIKE[1])
    with pytest.raises(ValueError, match=r"does not fit `like`") as caught:
        mpjax.load_orbax(written / "pytree", like)
    said = str(caught.value)
    assert (
        "missing: params/Dense/2/bias, params/Dense/2/kernel;" in said
        and "left over: opt/0/mu/BatchNorm/0/bias" in said
    )
    assert "step" in said and "(regex, None) drops what is not wanted" in said


def test_a_folder_that_is_no_tree_says_what_is_there(written, tmp_path):
    with pytest.raises(
        ValueError, match=r"no tree of Orbax \(no _METADATA\) \(below it: 3/default\); legal is the folder of one"
    ):
        mpjax.load_orbax(written / "manager", LIKE)
    with pytest.raises(ValueError, match=r"several items: pytree, standard; legal is the folder of one tree; name it"):
        mpjax.load_orbax(written, LIKE)
    with pytest.raises(FileNotFoundError, match=r"where no folder is; legal is one that Orbax wrote"):
        mpjax.load_orbax(tmp_path / "none", LIKE)
    (tmp_path / "_METADATA").write_text("{}")
    with pytest.raises(ValueError, match=r"which Orbax cannot read .*; legal is a whole checkpoint; try an older step"):
        mpjax.load_orbax(tmp_path, LIKE)
