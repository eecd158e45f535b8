"""What is NNX's own: aliases, streams, the module that is only read and the one that is given back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mpjax
from mpjax.measure.audit import audit
from tests.wrap.zoo import SEQUENCE, TOKENS
from tests.wrap.zoo_nnx import LM, Decoder, Plain, Shared

KEY = jax.random.key(0)
X = SEQUENCE


def made(module, policy="mixed_bfloat16"):
    model = mpjax.wrap(module, policy)
    return model, *model.init(KEY)


def dots(model, params, mstate, *args, **kwargs):
    """Operand dtypes of every product by path."""
    found: dict[str, set] = {}
    for op in audit(lambda p, m: model.apply(p, m, *args, **kwargs)[0], params, mstate).select("dot").ops:
        found.setdefault(op.path, set()).update(op.operands)
    return found


class Net(nnx.Module):
    """BatchNorm, Dropout and a plain array: all kinds of state."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.offset = jnp.ones((1, 1, 16))

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.dropout(self.norm(x)) + self.offset.astype(x.dtype)


# ---- the user's object -----------------------------------------------------------------------------------------------


def snapshot(module):
    """The very objects, their classes and attributes, and every byte."""
    graph = [
        (p, id(node), type(node), dict(vars(node))) for p, node in nnx.iter_graph(module) if hasattr(node, "__dict__")
    ]
    values = [
        (keys, v.get_raw_value()) for keys, v in nnx.to_flat_state(nnx.state(module)) if isinstance(v, nnx.Variable)
    ]
    keys = jax.dtypes.prng_key
    data = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, keys) else x for _, x in values]
    return graph, [(k, id(x)) for k, x in values], [np.asarray(x).tobytes() for x in data]


def test_the_users_instance_is_untouched_by_ten_donated_steps():
    """FAULTS 21, 22: objects, classes, attributes, buffers and bytes are what they were."""
    module = Net(nnx.Rngs(0))
    before = snapshot(module)
    model, optimizer = mpjax.wrap(module, "mixed_bfloat16"), optax.adam(0.1)

    def loss_fn(params, mstate, batch, rng):
        y, mstate = model.apply(params, mstate, batch, rng=rng, train=True)
        return (y**2).mean(), mpjax.Aux(mstate)

    state = mpjax.TrainState.create(model, optimizer, KEY)
    step = mpjax.make_train_step(loss_fn, optimizer)
    start = jax.tree.map(np.array, state.params)
    for _ in range(10):
        state, _ = step(state, X)
    assert step._jitted._cache_size() == 1 and int(state.step) == 10
    assert not np.array_equal(start["layers"]["0"]["kernel"], state.params["layers"]["0"]["kernel"])
    assert snapshot(module) == before
    module(X)  # alive


def test_an_instance_keeps_its_values_and_a_constructor_draws_new_ones():
    instance = Net(nnx.Rngs(7))
    _, params, _ = made(instance)
    assert np.array_equal(params["layers"]["0"]["kernel"], instance.layers[0].kernel.get_value())
    model = mpjax.wrap(Net, "float32")
    a, b = (model.init(jax.random.key(seed))[0]["layers"]["0"]["kernel"] for seed in (0, 1))
    assert not np.array_equal(a, b)


def test_merge_gives_an_ordinary_module_back_that_trains_on():
    """The user's own classes with the trained values, no trace of the wrap; its use leaves params alone."""
    model, params, mstate = made(Net)
    trained = jax.tree.map(lambda x: x + 1, params)
    module = model.merge(trained, mstate)
    assert [type(node) for _, node in nnx.iter_modules(module)] == [
        type(node) for _, node in nnx.iter_modules(Net(nnx.Rngs(0)))
    ]
    assert type(module) is Net and type(module.layers[0].kernel) is nnx.Param and module.layers[0].dtype is None
    assert not any("mpjax" in name for _, node in nnx.iter_modules(module) for name in vars(node))
    assert np.array_equal(module.layers[1].bias.get_value(), trained["layers"]["1"]["bias"])
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def train(module, optimizer):
        grads = nnx.grad(lambda module: (module(X) ** 2).mean())(module)
        optimizer.update(module, grads)
        return module(X)

    assert train(module, optimizer).dtype == jnp.float32
    assert not np.array_equal(module.layers[1].kernel.get_value(), trained["layers"]["1"]["kernel"])
    assert np.array_equal(trained["layers"]["1"]["kernel"], params["layers"]["1"]["kernel"] + 1)
    with pytest.raises(ValueError, match="this Model has no NNX module to give back"):
        mpjax.Model(lambda: None, lambda: None).merge({}, {})


# ---- state -----------------------------------------------------------------------------------------------------------


def test_state_lies_in_collections_as_it_does_in_linen():
    _, params, mstate = made(Net)
    assert set(params) == {"layers", "norm"} and set(mstate) == {"arrays", "batch_stats", "rngs"}
    assert set(mstate["batch_stats"]["norm"]) == {"mean", "var"}
    inside = jax.jit(mpjax.wrap(Net, "float32").init)(KEY)
    assert jax.tree.structure(inside) == jax.tree.structure((params, mstate))


def test_a_plain_array_that_is_drawn_from_the_rng_is_drawn_under_jit_too():
    """NNX overlooks plain arrays while jax traces: they must be neither lost nor stale."""
    model = mpjax.wrap(Plain, "mixed_bfloat16")
    eager, jitted, other = model.init(KEY), jax.jit(model.init)(KEY), jax.jit(model.init)(jax.random.key(1))
    offsets = [mstate["arrays"]["offset"] for _, mstate in (eager, jitted, other)]
    np.testing.assert_allclose(offsets[0], offsets[1], rtol=1e-6)
    assert not np.allclose(offsets[0], offsets[2])
    assert not np.array_equal(np.asarray(eager[0]["w"]), np.asarray(other[0]["w"]))


def test_streams_are_reseeded_by_rng_and_advance_without_one():
    model, params, mstate = made(Net, "float32")

    def run(mstate, seed=None):
        rng = None if seed is None else jax.random.key(seed)
        return model.apply(params, mstate, X, rng=rng, train=True)

    (a, after), (b, _), (c, _) = run(mstate, 1), run(mstate, 1), run(mstate, 2)
    assert (a == b).all() and (a != c).any()
    count = mstate["rngs"]["dropout"]["rngs"]["count"]
    assert after["rngs"]["dropout"]["rngs"]["count"] == count == 0
    d, moved = run(mstate)
    e, _ = run(moved)
    assert moved["rngs"]["dropout"]["rngs"]["count"] == 1 and (d != e).any()
    scanned = mpjax.wrap(lambda rngs: LM(dropout=0.5, kind="scan", rngs=rngs), "float32")
    params, mstate = scanned.init(KEY)
    keys = jax.random.key_data(mstate["rngs"]["layers"]["attention"]["rngs"]["key"])
    assert len({bytes(np.asarray(key)) for key in keys}) == len(keys) == 3  # each layer drops on its own
    outs = [scanned.apply(params, mstate, TOKENS, rng=jax.random.key(n), train=True)[0] for n in (1, 1, 2)]
    assert (outs[0] == outs[1]).all() and (outs[0] != outs[2]).any()


def test_train_calls_train_and_eval_where_the_method_does_not_take_it():
    model, params, mstate = made(Net, "float32")
    kept, same = model.apply(params, mstate, X, train=False)
    assert (kept == model.apply(params, mstate, X, train=False, rng=KEY)[0]).all()
    assert np.array_equal(same["batch_stats"]["norm"]["mean"], mstate["batch_stats"]["norm"]["mean"])
    dropped, moved = model.apply(params, mstate, X, train=True, rng=KEY)
    assert 0.3 < float((dropped == 1.0).mean()) < 0.7
    assert not np.array_equal(moved["batch_stats"]["norm"]["mean"], mstate["batch_stats"]["norm"]["mean"])

    class Takes(nnx.Module):
        def __call__(self, x, train):
            return x + train

    model, params, mstate = made(lambda rngs: Takes(), "float32")
    assert [float(model.apply(params, mstate, jnp.zeros(()), **t)[0]) for t in ({}, {"train": True})] == [0.0, 1.0]
    assert float(model.apply(params, mstate, jnp.zeros(()), True)[0]) == 1.0


def test_train_reaches_a_sequence_of_layers():
    def layers(rngs):
        return nnx.Sequential(nnx.Sequential(nnx.relu, nnx.BatchNorm(8, rngs=rngs)), nnx.Dropout(0.5, rngs=rngs))

    model, params, mstate = made(layers, "float32")
    x = jnp.ones((4, 8))
    dropped, moved = model.apply(params, mstate, x, train=True, rng=KEY)
    kept, same = model.apply(params, mstate, x, train=False)
    assert (kept != 0).all() and (dropped == 0).all()  # a batch of equal rows has no variance
    ran, still = (jax.tree.leaves(state["batch_stats"]) for state in (moved, same))
    assert not np.array_equal(ran, still) and np.array_equal(still, jax.tree.leaves(mstate["batch_stats"]))


def test_a_decode_cache_computes_in_half_and_is_stored_as_it_was():
    model, params, mstate = made(Decoder)
    assert mstate["cache"]["attention"]["cached_key"].dtype == jnp.float32
    step = jax.jit(model.apply)
    for t in range(3):
        _, mstate = step(params, mstate, X[:, t : t + 1])
    assert set.union(*dots(model, params, mstate, X[:, :1]).values()) == {"bfloat16"}
    cache = mstate["cache"]["attention"]
    assert (cache["cached_key"].dtype, int(cache["cache_index"])) == (jnp.float32, 3)
    assert bool((cache["cached_key"][:, :3] != 0).any(-1).all()) and bool((cache["cached_key"][:, 3:] == 0).all())


def test_a_variable_that_is_no_param_is_never_cast():
    """A frequency that bfloat16 cannot hold reaches the code that reads it as it is."""

    class Reads(nnx.Module):
        def __init__(self, rngs):
            self.frequency, self.w = nnx.Variable(jnp.full(3, 1 + 2**-12)), nnx.Param(jnp.full(3, 1 + 2**-12))

        def __call__(self, x):
            return self.frequency[...] - 1, self.w - 1, self.w.T - 1, self.w[0] - 1

    model, params, mstate = made(Reads)
    free, *read = model.apply(params, mstate, X)[0]
    assert float(free[0]) == 2**-12 and all(float(jnp.ravel(w)[0]) == 0.0 for w in read)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_an_instance_that_has_sown_a_perturbation_and_a_param_that_is_a_dict():
    class Net(nnx.Module):
        def __init__(self):
            self.table = nnx.Param({"w": jnp.ones((X.shape[-1], 2)), "b": jnp.zeros((1, 1, 2))})
            self.noise = nnx.Perturbation(jnp.zeros((1, 1, 2)))

        def __call__(self, x):
            self.sow(nnx.Intermediate, "seen", x)
            return x @ self.table["w"] + self.table["b"] + self.noise

    net = Net()
    y = net(X)
    model, params, mstate = made(net, "float32")
    out, after = model.apply(params, mstate, X)
    assert (out == y).all() and jax.tree.structure(after) == jax.tree.structure(mstate) and len(net.seen) == 1
    assert sorted(params["table"]) == ["b", "w"] and (model.merge(params, mstate)(X) == y).all()


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_state_that_a_call_makes_and_params_that_do_not_fit_are_refused():
    class Makes(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jnp.ones(3))

        def __call__(self, x):
            self.seen = nnx.BatchStat(x)
            self.sow(nnx.Intermediate, "kept_out", x)
            return x * self.w[0]

    model, params, mstate = made(Makes)
    with pytest.raises(
        ValueError, match=r"the call made state that init did not know: seen; make it in the constructor"
    ):
        model.apply(params, mstate, X)
    model, params, mstate = made(Net)
    del params["layers"]["0"]["bias"]
    params["other"] = jnp.ones(2)
    with pytest.raises(ValueError, match=r"params do not fit .* missing \['layers/0/bias'\], extra \['other'\]"):
        model.apply(params, mstate, X)


def test_sharding_annotations_come_out_as_linens_boxes():
    from flax.core import meta

    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("in", "out"))

    def make(rngs):
        with nnx.use_eager_sharding(False):
            return nnx.Linear(16, 4, kernel_init=init, rngs=rngs)

    model, params, mstate = made(make)
    assert isinstance(params["kernel"], meta.Partitioned) and params["kernel"].names == ("in", "out")
    assert set.union(*dots(model, params, mstate, X).values()) == {"bfloat16"}
    grads = jax.eval_shape(jax.grad(lambda p: model.apply(p, mstate, X)[0].sum()), params)
    assert isinstance(grads["kernel"], meta.Partitioned) and grads["kernel"].value.dtype == jnp.float32


# ---- rules -----------------------------------------------------------------------------------------------------------


def lm(kind):
    return lambda rngs: LM(kind=kind, tied=False, rngs=rngs)


def test_a_rule_means_its_subtree_and_islands_stand():
    model, params, mstate = made(lm("loop"), {"layers/1": "float16", "head": "compute=float32,output=float32"})
    found = dots(model, params, mstate, TOKENS)
    assert {"layers/1/attention/query", "layers/1/attention", "layers/1/down", "head"} <= set(found)
    for path, dtypes in found.items():
        wanted = "float16" if path.startswith("layers/1") else "float32" if path == "head" else "bfloat16"
        assert dtypes == {wanted}, path
    ops = audit(lambda p: model.apply(p, mstate, TOKENS)[0], params).select("rsqrt").ops
    assert len(ops) == 7 and {d for op in ops for d in op.operands} == {"float32"}
    rows = {row.path: row for row in mpjax.wrap(lm("loop"), {"**/norm2": "bfloat16"}).table().rows}
    assert str(rows["layers/0/norm2"].compute) == "bfloat16" and str(rows["layers/0/norm1"].compute) == "float32"


@pytest.mark.parametrize("around", ["bare", "remat", "scan", "jit"])
def test_an_output_rule_hands_its_result_up_unrounded(around):
    """The dtype is known when the model is wrapped, so that no transform between the module and the root rounds it."""

    class Body(nnx.Module):
        def __init__(self, rngs):
            self.head = nnx.Linear(16, 16, rngs=rngs)

        def __call__(self, x):
            return self.head(x)

    class Root(nnx.Module):
        def __init__(self, rngs):
            self.body = Body(rngs)

        def __call__(self, x):
            if around == "scan":
                return nnx.scan(lambda body, x: body(x), in_axes=(None, 0), out_axes=0)(self.body, x)
            transform = {"bare": lambda f: f, "remat": nnx.remat, "jit": nnx.jit}[around]
            return transform(lambda body, x: body(x))(self.body, x)

    for rules, rounded in (({"body/head": "compute=float32,output=float32"}, False), ({"body/head": "float32"}, True)):
        model, params, mstate = made(Root, rules)
        out = model.apply(params, mstate, X)[0]
        assert bool((out == out.astype(jnp.bfloat16).astype(jnp.float32)).all()) is rounded


def test_coordinates_enter_unrounded_where_the_rule_keeps_input():
    class Time(nnx.Module):
        def __call__(self, t):
            return t.astype(jnp.float32) - 999

    class Root(nnx.Module):
        def __init__(self, rngs):
            self.time = Time()

        def __call__(self, t):
            return self.time(t)

    t = jnp.float32(999)
    for rules, wanted in (
        ({}, 1.0),
        ({"time": "input=keep"}, 1.0),  # the root has rounded already
        ({"": "input=keep"}, 1.0),  # the root keeps it, and hands it down in its own stream
        ({"time": "input=keep", "": "input=keep"}, 0.0),
    ):
        model, params, mstate = made(Root, rules)
        assert float(model.apply(params, mstate, t)[0]) == wanted


def test_a_float32_residual_stream_through_a_scan_wants_a_rule_that_says_so():
    """The body of an NNX scan is a function, so that the wrap cannot see its carry; the rule names both borders."""

    class Residual(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(16, 16, rngs=rngs)

        def __call__(self, x):
            return x + self.dense(x).astype(x.dtype)

    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: Residual(rngs)))(rngs)

        def __call__(self, x):
            scan = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return scan(x.astype(jnp.float32), self.layers)

    with pytest.raises(TypeError, match="carry"):
        model, params, mstate = made(Stack)
        jax.eval_shape(model.apply, params, mstate, X)
    model, params, mstate = made(Stack, {"layers/dense": "bfloat16", "layers": "input=keep,output=float32"})
    assert dots(model, params, mstate, X) == {"layers/dense": {"bfloat16"}}


def test_fault_14_aliases_must_agree():
    """One module under two names, and one Param in two modules: every name counts."""
    for rules, what in (({"same": "float16"}, "Linear"), ({"other": "float16"}, "Param")):
        with pytest.raises(ValueError, match=f"one shared {what} is at [23] paths whose rules conflict .*float16"):
            mpjax.wrap(Shared, rules)
    model, params, mstate = made(Shared, {"dense": "float16", "same": "float16", "other": "float16"})
    assert set.union(*dots(model, params, mstate, X).values()) == {"float16"}
    assert set(params) == {"dense", "other", "norm"} and set(params["other"]) == {
        "bias"
    }  # the shared Param is there once


def test_a_shared_module_whose_callers_differ_is_refused():
    class Caller(nnx.Module):
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, x):
            return self.inner(x)

    class Root(nnx.Module):
        def __init__(self, rngs):
            inner = nnx.Linear(16, 16, rngs=rngs)
            self.a, self.b = Caller(inner), Caller(inner)

        def __call__(self, x):
            return self.b(self.a(x))

    with pytest.raises(ValueError, match=r"one shared Linear is at 2 paths whose rules conflict"):
        mpjax.wrap(Root, {"a": "float32", "**/inner": "bfloat16"})


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"layer": "float16"}, r"rule 'layer' matches no path; did you mean 'layers"),
        ({"layers/1": "float16"}, r"names one layer of the scanned stack 'layers', whose layers are one traced body"),
        ({"layers": "float16", "layers/up": "float32"}, r"rule 'layers/up' never acts: .* earlier rule"),
        ({nnx.Conv: "float32"}, r"rule Conv matches no module; the classes of this model are"),
    ],
)
def test_fault_14_a_rule_that_never_acts_is_an_error_with_near_misses(rules, message):
    with pytest.raises(ValueError, match=message):
        mpjax.wrap(lm("scan"), rules)


def test_modules_under_nnx_jit_obey_their_own_rules():
    from tests.wrap.zoo_nnx import Jitted

    for rules, wanted in (
        ({"a": "float16"}, ["float16", "bfloat16"]),
        ({"b/dense": "float32"}, ["bfloat16", "float32"]),
    ):
        model, params, mstate = made(Jitted, rules)
        found = audit(model.apply, params, mstate, X).select("dot").ops
        assert [op.operands[0] for op in found] == wanted


def test_methods_are_entered_like_the_call():
    model, params, mstate = made(Shared)
    for method in ("encode", Shared.encode):
        hidden, _ = model.apply(params, mstate, X, method=method)
        assert hidden.dtype == jnp.float32
        assert set.union(*dots(model, params, mstate, X, method=method).values()) == {"bfloat16"}
    with pytest.raises(ValueError, match=r"got method='decode'; Shared has no such method"):
        model.apply(params, mstate, X, method="decode")


@pytest.mark.optimized
def test_a_method_may_be_a_function_of_ones_own():
    model, params, mstate = made(lambda rngs: nnx.Linear(X.shape[-1], 2, rngs=rngs))
    out = model.apply(params, mstate, X, method=lambda layer, x: 2 * layer(x))[0]
    assert out.dtype == jnp.float32 and (out == 2 * model.apply(params, mstate, X)[0]).all()


def test_cast_params_once_for_evaluation_gives_the_same_bits():
    model, params, mstate = made(lm("loop"), {"layers/1": "float16"})
    cast = model.cast_params(params)
    assert cast["layers"]["0"]["up"]["kernel"].dtype == jnp.bfloat16 and cast["norm"]["scale"].dtype == jnp.float32
    assert cast["layers"]["1"]["up"]["kernel"].dtype == jnp.float16
    run = jax.jit(lambda p: model.apply(p, mstate, TOKENS)[0])
    assert (run(params) == run(cast)).all()


def test_one_wrapped_model_may_run_inside_another():
    inner, inner_params, inner_mstate = made(Shared, "mixed_float16")

    class Outer(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(16, 16, rngs=rngs)

        def __call__(self, x):
            return self.dense(inner.apply(inner_params, inner_mstate, x)[0])

    model, params, mstate = made(Outer)
    ops = audit(lambda p: model.apply(p, mstate, X)[0], params).select("dot").ops
    assert [op.operands[0] for op in ops] == ["float16"] * 3 + ["bfloat16"]


def test_a_users_own_attention_fn_is_never_replaced():
    def theirs(query, key, value, **_):
        return query

    model, params, mstate = made(
        lambda rngs: nnx.MultiHeadAttention(2, 16, attention_fn=theirs, decode=False, rngs=rngs)
    )
    assert not audit(lambda p: model.apply(p, mstate, X)[0], params).select("exp").ops


def test_explain_is_the_resolution_table():
    model = mpjax.wrap(Net, {"layers/1": "output=float32"})
    assert [row.path for row in model.table().rows] == ["", "layers/0", "layers/1", "norm", "dropout"]
    lines = model.explain(X).splitlines()
    assert lines[3].split() == ["layers/1", "Linear", "'layers/1'", "full", "bf16", "full"]
    assert "float32 island" in lines[4]


def test_what_cannot_be_wrapped_is_refused():
    with pytest.raises(TypeError, match=r"got a constructor that returned int; wrap takes an nnx.Module or a function"):
        mpjax.wrap(lambda rngs: 3, "mixed_bfloat16")
    with pytest.raises(TypeError, match=r"got 3; wrap takes .* an nnx.Module, or a function from nnx.Rngs to one"):
        mpjax.wrap(3, "mixed_bfloat16")
