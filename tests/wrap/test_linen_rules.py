"""Rules on real Linen modules: who wins, what is handed back, what is refused, and that the user's module is untouched."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.errors import ScopeParamShapeError

import mpjax
from mpjax.measure.audit import audit
from tests.wrap.zoo import LM, SEQUENCE, TOKENS, Block, ConvNet, Decoder, RMSNorm, Shared


def dots(model, params, mstate, *args, **kwargs):
    """From module path to the operand dtypes of its products."""
    found = audit(lambda p, m: model.apply(p, m, *args, **kwargs)[0], params, mstate)
    return {op.path: set(op.operands) for op in found.ops if op.kind == "dot"}


def made(module, rules, *args):
    model = mpjax.wrap(module, rules)
    return model, *jax.jit(model.init)(jax.random.key(0), *args)


def outlined(module, rules, *args):
    """As `made`, with shapes for params: where only dtypes are read, nothing need be computed."""
    model = mpjax.wrap(module, rules)
    return model, *jax.eval_shape(model.init, jax.random.key(0), *args)


def output(model, params, mstate, *args, **kwargs):
    return jax.jit(lambda p, m: model.apply(p, m, *args, **kwargs)[0])(params, mstate)


def test_a_rule_means_its_subtree_and_the_rest_keeps_the_default():
    model, params, mstate = outlined(LM(tied=False), {"layers/1": "compute=float16", "head": "compute=float32"}, TOKENS)
    found = dots(model, params, mstate, TOKENS)
    assert {dtype for path, used in found.items() if "layers/1/" in path for dtype in used} == {"float16"}
    assert {dtype for path, used in found.items() if path.endswith("head") for dtype in used} == {"float32"}
    rest = [used for path, used in found.items() if "layers/1/" not in path and not path.endswith("head")]
    assert rest and all(used == {"bfloat16"} for used in rest)


def test_a_float16_subtree_converts_at_its_two_borders_and_nowhere_else():
    """DESIGN decision 2: what passes between bf16 modules is bf16, and nothing promotes in silence."""
    seen = {}

    def spy(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if args:
            seen["/".join(context.module.path)] = (args[0].dtype.name, jax.tree.leaves(out)[0].dtype.name)
        return out

    model, params, mstate = outlined(Shared(), {"blocks/0": "compute=float16"}, SEQUENCE)
    with nn.intercept_methods(spy):  # outside of mpjax's interceptor: it sees what callers pass and get
        jax.eval_shape(model.apply, params, mstate, SEQUENCE)
    assert seen["dense"] == seen["blocks_1"] == ("bfloat16", "bfloat16")
    assert seen["blocks_0"] == ("bfloat16", "bfloat16")
    assert dots(model, params, mstate, SEQUENCE).popitem()[1] <= {"bfloat16", "float16"}


def test_only_a_rule_that_names_output_hands_back_its_own_dtype():
    """The head's float32 logits reach the caller unrounded; a preset, which names no output, is rounded to the stream."""
    module = LM(tied=False)
    exact = mpjax.wrap(module, {"head": "compute=float32,output=float32"})
    rounded = mpjax.wrap(module, {"head": "float32"})
    params, mstate = jax.jit(exact.init)(jax.random.key(0), TOKENS)
    unrounded, through_bf16 = (np.asarray(output(m, params, mstate, TOKENS)) for m in (exact, rounded))
    assert unrounded.dtype == through_bf16.dtype == np.float32
    assert (through_bf16.astype(jnp.bfloat16) == through_bf16).all()
    assert (unrounded.astype(jnp.bfloat16) == through_bf16).all() and (unrounded != through_bf16).any()


def test_output_dtype_of_the_default_acts_at_the_boundary_only():
    half = mpjax.wrap(LM(), "c=bf16,o=bf16")
    full = mpjax.wrap(LM(), "c=bf16,o=f32")
    params, mstate = jax.jit(half.init)(jax.random.key(0), TOKENS)
    out, wide = (output(m, params, mstate, TOKENS) for m in (half, full))
    assert (out.dtype, wide.dtype) == (jnp.bfloat16, jnp.float32)
    assert (out.astype(jnp.float32) == wide).all()


def test_an_output_rule_that_remat_would_round_says_so():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Middle(name="middle")(x)

    class Middle(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(nn.Dense)(4, name="dense")(x)

    model = mpjax.wrap(Outer(), {"**/dense": "compute=float32,output=float32"})
    assert "rounded at 'middle': name it with output= too" in model.explain(SEQUENCE)
    params, mstate = model.init(jax.random.key(0), SEQUENCE)
    out = model.apply(params, mstate, SEQUENCE)[0]
    assert (out.astype(jnp.bfloat16) == out).all()
    mended = mpjax.wrap(Outer(), {"**/dense": "compute=float32,output=float32", "middle": "output=float32"})
    assert "rounded" not in mended.explain(SEQUENCE)
    out = mended.apply(params, mstate, SEQUENCE)[0]
    assert not (out.astype(jnp.bfloat16) == out).all()


def test_coordinates_enter_unrounded_where_the_rule_keeps_input():
    class Timed(nn.Module):
        @nn.compact
        def __call__(self, t):
            return nn.Dense(2, use_bias=False, kernel_init=nn.initializers.ones)(Clock(name="clock")(t)), t

    class Clock(nn.Module):
        @nn.compact
        def __call__(self, t):
            return t - 998.0

    t = jnp.array([[999.0]])
    plain, params, mstate = made(Timed(), "mixed_bfloat16", t)
    assert float(plain.apply(params, mstate, t)[0][0][0, 0]) == 0.0  # 999 and 998 are 1000 in bfloat16
    kept = mpjax.wrap(Timed(), {"clock": "compute=float32,input=keep", "": "input=keep"})
    out, passed = kept.apply(params, mstate, t)[0]
    assert (float(out[0, 0]), float(passed[0, 0])) == (1.0, 999.0)


def test_islands_stand_behind_the_users_rules_but_only_their_name_reaches_them():
    block = Block(16)
    classes = {"norm1": "RMSNorm", "norm2": "LayerNorm"}
    for rules in ({"": "compute=float16"}, {"**": "compute=float16"}, {"*": "compute=float16"}):
        text = mpjax.wrap(block, rules).explain(SEQUENCE)
        rows = {line.split()[0]: line for line in text.splitlines()}
        assert all("float32 island" in rows[path] and cls in rows[path] for path, cls in classes.items())
    assert rows["attention/query"].split()[2:5] == ["'*'", "full", "f16"]
    by_class = mpjax.wrap(block, {nn.LayerNorm: "compute=bfloat16"}).explain(SEQUENCE)
    by_path = mpjax.wrap(block, {"norm2": "compute=bfloat16"}).explain(SEQUENCE)
    assert "norm2" in by_class and "island" not in next(x for x in by_class.splitlines() if x.startswith("norm2"))
    assert "island" not in next(x for x in by_path.splitlines() if x.startswith("norm2"))
    assert "float32 island" in next(x for x in by_path.splitlines() if x.startswith("norm1"))


def test_a_users_own_class_is_declared_an_island():
    class Careful(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(16, name="dense")(jnp.exp(x))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Careful(name="careful")(nn.Dense(16, name="dense")(x))

    rules = mpjax.PolicyMap(islands=(Careful,))
    model, params, mstate = outlined(Net(), rules, SEQUENCE)
    found = dots(model, params, mstate, SEQUENCE)
    assert [used for path, used in found.items() if path.endswith("careful/dense")] == [{"float32"}]
    with pytest.raises(ValueError, match=r"island RMSNorm is no class of this model; its classes are .*Careful"):
        mpjax.wrap(Net(), mpjax.PolicyMap(islands=(RMSNorm,))).explain(SEQUENCE)


@pytest.mark.parametrize(
    ("module", "rules", "message"),
    [
        (
            LM(),
            {"haed": "float32"},
            r"rule 'haed' matches no path; did you mean .*; model.explain|rule 'haed' matches no path",
        ),
        (LM(), {"layers/*/atention": "float32"}, r"did you mean 'layers/\d/attention'"),
        (
            LM(),
            {"layers": "bf16", "layers/0": "float32"},
            r"rule 'layers/0' never acts: every path it matches .* earlier",
        ),
        (LM(), {"norm*": "float16"}, r"rule 'norm\*' never acts: .* is a float32 island; .* name the island's class"),
        (LM(kind="scan"), {"layers_1": "float32"}, r"'layers_1' names one layer of the scanned stack 'layers'"),
        (LM(kind="scan+remat"), {"layers/0/block": "float32"}, r"names one layer of the scanned stack 'layers'"),
        (LM(), {nn.Conv: "float32"}, r"rule Conv matches no module; the classes of this model are .*Embed"),
        (LM(), {"re:layers/9": "float32"}, r"rule 're:layers/9' matches no path"),
    ],
)
def test_fault_14_a_rule_that_never_acts_is_an_error_with_near_misses(module, rules, message):
    model = mpjax.wrap(module, rules)
    for call in (lambda: model.init(jax.random.key(0), TOKENS), lambda: model.explain(TOKENS)):
        with pytest.raises(ValueError, match=message):
            call()
    _, params, mstate = outlined(module, "mixed_bfloat16", TOKENS)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.apply, params, mstate, TOKENS)


def test_a_rule_for_a_method_that_this_call_does_not_reach_is_no_error():
    model, params, mstate = made(Shared(), {"blocks": "float32"}, SEQUENCE)
    out, _ = model.apply(params, mstate, SEQUENCE, method="encode")
    assert out.shape == SEQUENCE.shape
    fresh = mpjax.wrap(Shared(), {"blocks": "float32"})  # has never seen the whole model, only its params
    assert (fresh.apply(params, mstate, SEQUENCE, method="encode")[0] == out).all()


def test_explain_is_the_resolution_table():
    table = mpjax.wrap(Shared(), {"blocks/0": "compute=float32", "blocks_1": "float16"}).explain(SEQUENCE)
    assert [line.split() for line in table.splitlines()] == [
        ["path", "class", "rule", "params", "compute", "hands", "back"],
        ["·", "Shared", "default", "full", "bf16", "full"],
        ["dense", "Dense", "default", "full", "bf16", "caller's"],
        ["norm", "LayerNorm", "float32", "island", "full", "full", "caller's"],
        ["blocks/0", "Dense", "'blocks/0'", "full", "full", "caller's"],
        ["blocks/1", "Dense", "'blocks_1'", "f16", "f16", "caller's"],
    ]


def test_params_come_in_their_param_dtype_and_init_runs_in_float32():
    """An initialiser that ran in bfloat16 would leave float32 params with 8 bits."""
    _, params, _ = made(Shared(), {"blocks_1": "float16"}, SEQUENCE)
    assert params["blocks_1"]["kernel"].dtype == jnp.float16
    assert params["dense"]["kernel"].dtype == jnp.float32
    reference = Shared().init(jax.random.key(0), SEQUENCE)["params"]
    assert (params["dense"]["kernel"] == reference["dense"]["kernel"]).all()

    stored_low = nn.Dense(4, param_dtype=jnp.bfloat16)
    params = mpjax.wrap(stored_low, "mixed_bfloat16").init(jax.random.key(0), SEQUENCE)[0]
    assert (params["kernel"] == nn.Dense(4).init(jax.random.key(0), SEQUENCE)["params"]["kernel"]).all()
    assert stored_low.param_dtype == jnp.bfloat16


def test_the_users_module_is_untouched():
    """FAULTS 22: the fields that a call sets are put back, also when the call fails."""
    module = nn.MultiHeadDotProductAttention(2)
    before = {name: getattr(module, name) for name in module.__dataclass_fields__}
    bound = []

    def spy(next_fun, args, kwargs, context):
        module = context.module
        if isinstance(module, nn.MultiHeadDotProductAttention):
            bound.append(module)
        return next_fun(*args, **kwargs)

    model, params, mstate = outlined(module, "mixed_float16", SEQUENCE)
    with nn.intercept_methods(spy):
        jax.eval_shape(model.apply, params, mstate, SEQUENCE)
        with pytest.raises(ScopeParamShapeError, match="/query"):
            jax.eval_shape(model.apply, params, mstate, SEQUENCE[..., :4])
    assert {name: getattr(module, name) for name in module.__dataclass_fields__} == before
    assert bound and all(m.dtype is None and m.attention_fn is nn.dot_product_attention for m in bound)


def test_a_users_own_attention_fn_is_never_replaced():
    calls = []

    def mine(query, key, value, **kwargs):
        calls.append(query.dtype)
        return nn.dot_product_attention(query, key, value)

    module = nn.MultiHeadDotProductAttention(2, attention_fn=mine)
    model, params, mstate = outlined(module, "mixed_bfloat16", SEQUENCE)
    calls.clear()
    jax.eval_shape(model.apply, params, mstate, SEQUENCE)
    assert [str(dtype) for dtype in calls] == ["float32", "bfloat16"]  # seen without the policy, then run under it


def test_a_fully_masked_row_has_finite_output_and_no_gradient():
    """FAULTS 9, with dropout's mask logic kept: gradients are tested, not only outputs."""
    module = nn.MultiHeadDotProductAttention(2)
    mask = jnp.ones((4, 1, 8, 8), bool).at[0, :, 3].set(False)
    for policy in ("mixed_bfloat16", "mixed_float16"):
        model, params, mstate = made(module, policy, SEQUENCE)

        def row(x, model=model, params=params, mstate=mstate):
            out = model.apply(params, mstate, SEQUENCE.at[0, 3].set(x), mask=mask)[0]
            return out[0, 3].sum(), out

        gradient, out = jax.jit(jax.grad(row, has_aux=True))(SEQUENCE[0, 3])
        assert bool(jnp.isfinite(out).all()) and bool(jnp.isfinite(gradient).all())

        def masked(p, model=model, mstate=mstate):
            return model.apply(p, mstate, SEQUENCE, mask=mask & False)[0].sum()

        grads = jax.jit(jax.grad(masked))(params)
        assert float(jnp.abs(grads["query"]["kernel"]).max()) == float(jnp.abs(grads["key"]["kernel"]).max()) == 0.0
        assert float(jnp.abs(grads["value"]["kernel"]).max()) > 0.0


def test_batch_statistics_are_float32_before_and_after():
    """FAULTS 10, and they are those of the float32 model to bfloat16's rounding of its input."""
    model, params, mstate = made(ConvNet(), "mixed_bfloat16", SEQUENCE)
    new = jax.jit(lambda p, m: model.apply(p, m, SEQUENCE, train=True)[1])(params, mstate)
    assert {x.dtype.name for x in jax.tree.leaves((mstate, new))} == {"float32"}
    stats = new["batch_stats"]["BatchNorm_0"]
    assert not (stats["mean"].astype(jnp.bfloat16) == stats["mean"]).all()


def test_a_decode_cache_computes_in_half_and_is_stored_as_it_was():
    model, params, mstate = made(Decoder(), "mixed_bfloat16", SEQUENCE)
    assert mstate["cache"]["attention"]["cached_key"].dtype == jnp.float32
    step = jax.jit(model.apply)
    for t in range(3):
        _, mstate = step(params, mstate, SEQUENCE[:, t : t + 1])
    assert set.union(*dots(model, params, mstate, SEQUENCE[:, :1]).values()) == {"bfloat16"}
    cache = mstate["cache"]["attention"]
    assert (cache["cached_key"].dtype, int(cache["cache_index"])) == (jnp.float32, 3)
    assert bool((cache["cached_key"][:, :3] != 0).any(-1).all()) and bool((cache["cached_key"][:, 3:] == 0).all())


def test_train_reaches_the_method_that_takes_it_and_no_other():
    class Needs(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dropout(0.5, deterministic=not train)(x)

    model, params, mstate = made(Needs(), "float32", SEQUENCE)
    assert (model.apply(params, mstate, SEQUENCE)[0] == SEQUENCE).all()
    dropped = model.apply(params, mstate, SEQUENCE, train=True, rng=jax.random.key(1))[0]
    assert 0.3 < float((dropped == 0).mean()) < 0.7
    by_place = model.apply(params, mstate, SEQUENCE, True, rng=jax.random.key(1))[0]
    assert (by_place == dropped).all() and model.init(jax.random.key(0), SEQUENCE, True) == ({}, {})
    plain, params, mstate = made(nn.Dense(2), "float32", SEQUENCE)
    assert plain.apply(params, mstate, SEQUENCE, train=True)[0].shape == (4, 8, 2)


def test_state_that_a_call_adds_to_is_refused_and_what_sow_replaces_comes_out():
    class Sows(nn.Module):
        options: dict

        @nn.compact
        def __call__(self, x):
            self.sow("losses", "balance", x.mean(), **self.options)
            return x

    model, params, mstate = made(Sows({}), "float32", SEQUENCE)
    with pytest.raises(ValueError, match=r"added to mstate\['losses'\].*what init gave.*reduce_fn"):
        model.apply(params, mstate, SEQUENCE)
    one = {"init_fn": lambda: 0.0, "reduce_fn": lambda old, new: new}
    model, params, mstate = made(Sows(one), "float32", SEQUENCE)
    _, after = model.apply(params, mstate, 2 * SEQUENCE)
    assert float(after["losses"]["balance"]) == 2 * float(SEQUENCE.mean())


@pytest.mark.optimized
def test_cast_params_once_for_evaluation_gives_the_same_bits():
    rules = {"layers_1": "compute=float16"}
    model, params, mstate = made(LM(), rules, TOKENS)
    cast = model.cast_params(params)
    assert cast["layers_0"]["up"]["kernel"].dtype == jnp.bfloat16
    assert cast["layers_1"]["up"]["kernel"].dtype == jnp.float16
    assert cast["layers_0"]["norm1"]["scale"].dtype == cast["norm"]["bias"].dtype == jnp.float32
    assert (output(model, cast, mstate, TOKENS) == output(model, params, mstate, TOKENS)).all()
    with pytest.raises(ValueError, match="call init, apply or explain once before"):
        mpjax.wrap(LM(), rules).cast_params(params)


def test_cast_params_go_through_a_scan():
    """Whose carry, in the user's own module, would come in bfloat16 and leave a float32 norm in float32."""
    model, params, mstate = made(LM(kind="scan"), "mixed_bfloat16", TOKENS)
    cast = model.cast_params(params)
    assert cast["layers"]["block"]["up"]["kernel"].dtype == jnp.bfloat16
    assert (output(model, cast, mstate, TOKENS) == output(model, params, mstate, TOKENS)).all()


class TreeOfParams(nn.Module):
    """One param is a tree, beside a layer that reads its own and a norm that is an island."""

    @nn.compact
    def __call__(self, x_BxD):
        affine = self.param(
            "affine", lambda key: {"w": jax.random.normal(key, (4, 4)), "b": {"deep": jnp.full(4, 1 / 3)}}
        )
        y_BxD = x_BxD @ affine["w"] + affine["b"]["deep"][None]
        return nn.Dense(4, name="dense")(nn.LayerNorm(name="norm")(y_BxD))


@pytest.mark.parametrize("remat", [False, True])
def test_a_param_that_is_a_tree_is_cast_where_it_is_read(remat):
    """Beside it the norm, whose name in the scope is a tree, too, still reads float32."""
    x_BxD = jnp.ones((2, 4))
    model, params, mstate = made((nn.remat(TreeOfParams) if remat else TreeOfParams)(), "mixed_bfloat16", x_BxD)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    found = audit(lambda p: model.apply(p, mstate, x_BxD)[0], params)
    assert found.share("bfloat16") == 1 and set(found.dtypes("rsqrt")) == {"float32"}
    scale = jnp.float32(1 + 2**-12)  # which bfloat16 does not hold
    scaled = params | {"norm": {"scale": jnp.full(4, scale), "bias": jnp.zeros(4)}}
    rules = dict.fromkeys(("norm", "dense"), "compute=float32,output=float32")
    widen = mpjax.wrap(TreeOfParams(), mpjax.PolicyMap(rules, default="params=float32,compute=bfloat16,output=float32"))
    y, one = (widen.apply(p, mstate, jnp.arange(8.0).reshape(2, 4))[0] for p in (scaled, params))
    assert not np.array_equal(y, one)
    gradient = jax.grad(lambda p: model.apply(p, mstate, x_BxD)[0].astype(jnp.float32).sum())(params)
    assert {x.dtype.name for x in jax.tree.leaves(gradient)} == {"float32"}


def test_what_a_module_hands_out_beside_arrays_comes_out():
    class Told(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x), {"by": "dense", "layers": 1}

    model = mpjax.wrap(Told(), "mixed_bfloat16")
    (out, told), _ = model.apply(*model.init(jax.random.key(0), jnp.ones((1, 3))), jnp.ones((1, 3)))
    assert out.dtype == jnp.float32 and told == {"by": "dense", "layers": 1}


def test_what_cannot_be_wrapped_is_refused():
    with pytest.raises(TypeError, match=r"wrap takes a flax.linen Module instance \(nn.Dense\(8\), not nn.Dense\)"):
        mpjax.wrap(nn.Dense, "mixed_bfloat16")
    with pytest.raises(ValueError, match=r"got compute dtype float8_e4m3fn; .* use bfloat16 here"):
        mpjax.wrap(nn.Dense(2), {"**": "compute=f8_e4m3fn"})
    with pytest.raises(ValueError, match=r"got method='decode'; Shared has no such method"):
        made(Shared(), "float32", SEQUENCE)[0].apply({}, {}, SEQUENCE, method="decode")


def test_sharding_boxes_of_a_users_params_stay():
    module = nn.Dense(4, kernel_init=nn.with_partitioning(nn.initializers.ones, ("in", "out")))
    model, params, mstate = made(module, "mixed_bfloat16", SEQUENCE)
    assert isinstance(params["kernel"], nn.Partitioned) and params["kernel"].value.dtype == jnp.float32
    assert dots(model, params, mstate, SEQUENCE) and set.union(*dots(model, params, mstate, SEQUENCE).values()) == {
        "bfloat16"
    }
    grads = jax.eval_shape(jax.grad(lambda p: model.apply(p, mstate, SEQUENCE)[0].sum()), params)
    assert isinstance(grads["kernel"], nn.Partitioned) and grads["kernel"].value.dtype == jnp.float32
