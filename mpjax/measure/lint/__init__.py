"""The build lint: is a step's precision what was meant? Read off its jaxpr, before anything is trained."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.core.dtypes import canonical
from mpjax.core.model import SINKS, Model
from mpjax.core.tree import path_of
from mpjax.core.types import DTypeLike
from mpjax.measure.jaxprs import trace
from mpjax.measure.lint.finding import ComputeOf, Finding, merged
from mpjax.measure.lint.numerics import long_sums, softmaxes, variances
from mpjax.measure.lint.operations import float64_leaks, mixed_products, wide_products
from mpjax.measure.lint.params import twice_cast
from mpjax.measure.lint.saved import wide_residuals
from mpjax.measure.program import Node, Program, Value
from mpjax.policy.patterns import lineage
from mpjax.policy.rules import PolicyMap
from mpjax.train.accumulate import cut, mean_loss
from mpjax.train.job import Job
from mpjax.train.state import TrainState, split_trainable
from mpjax.train.step import TrainStep

RULES: tuple[Callable[[Program, ComputeOf], Iterator[Finding]], ...] = (
    mixed_products, wide_products, softmaxes, variances, long_sums, float64_leaks,
)  # fmt: skip
"""The rules about single programs. Two more need to know more: `twice_cast` the params, `wide_residuals` what is saved."""


def lint(job: Job, **step_options: Any) -> tuple[Finding, ...]:
    """What is wrong with the precision of a job's train step, if anything: read off its jaxpr, nothing is trained.

    - mixed product: a product or convolution of two float dtypes
    - wide product: a float32 one where the policy computes in half
    - half softmax: exponentials in half that are summed and divided by
    - half variance: squares summed in half, or the root of a sum in half
    - long sum: a sum in half of more terms than the format counts
    - float64: where no policy asks for it
    - param cast twice: rounded, then converted again
    - wide residual: a float32 activation kept for the backward pass where the policy computes in half

    What XLA makes of the program later is not seen, nor the inside of a foreign kernel.

    Args:
      job: what is trained. Its policy and its model's table say what is meant where. Of a model of bare functions nobody
        can tell where it ends and the float32 loss begins: all products are held to its policy's default, no residuals are.
      **step_options: those of `make_train_step` under which it is trained: `accumulate=4`.

    Returns:
      The findings in program order, one for each rule and path. `str` of one is `path: finding: how to mend`.

    >>> import jax.numpy as jnp, optax
    >>> model = Model(lambda rng, x: ({"w": jnp.ones((4, 4))}, {}),
    ...               lambda p, m, x, rng=None: (x.astype(jnp.bfloat16) @ p["w"], m),
    ...               policy=PolicyMap.of("mixed_bfloat16"))
    >>> job = Job(model, lambda p, m, x, rng: model.apply(p, m, x)[0].mean(), optax.sgd(0.1), lambda n: jnp.ones((8, 4)),
    ...           sample=(jnp.ones((1, 4)),))
    >>> [found.rule for found in lint(job)]
    ['mixed product']
    """
    step = job.step(**step_options)
    state = jax.eval_shape(job.state, jax.random.key(0))
    batch = job.batches(0)
    compute_of, names_float64 = _of_policy(job.model, job.sample)
    program = trace(step.pure, state, batch)
    labels = dataclasses.replace(jax.tree.map(lambda _: "", state), params=_paths(state.params))
    params = {v: name for v, name in zip(program.inputs, jax.tree.leaves(labels), strict=False) if name}
    rules = [rule for rule in RULES if not (names_float64 and rule is float64_leaks)]
    return merged(
        (
            *(found for rule in rules for found in rule(program, compute_of)),
            *twice_cast(program, params),
            *(wide_residuals(_saved_by(step, state, batch), compute_of) if job.model.table is not None else ()),
        )
    )


def lint_function(
    fn: Callable[..., Any],
    *args: Any,
    compute_of: Callable[[str], DTypeLike | None] = lambda path: None,
    params: int | None = 0,
) -> tuple[Finding, ...]:
    """The same rules for any function of arrays, without a job: its forward and its backward pass.

    Args:
      fn: a function that jax can trace, such as a loss.
      *args: its arguments: pytrees of arrays or `ShapeDtypeStruct`s.
      compute_of: from a module's path ("" outside of any) to the dtype in which it is to compute; None where none is
        meant, so that the two rules about a policy have nothing to say.
      params: the position of the argument that is differentiated; None: the function is read as it is, and nothing is
        said about params and what is saved.

    >>> loss = lambda w, x: jnp.tanh(x @ w).sum()
    >>> [found] = lint_function(loss, jnp.ones((4, 4)), jnp.ones((8, 4)), compute_of=lambda path: "bf16", params=None)
    >>> found.path, found.what
    ('outside of any module', 'a float32 product where the policy computes in bfloat16')
    """

    @functools.cache
    def meant(path: str) -> np.dtype | None:
        found = compute_of(path)
        return None if found is None else canonical(found)

    def of_node(node: Node) -> np.dtype | None:
        return meant(node.path)

    if params is None:
        program = trace(fn, *args)
        return merged(found for rule in RULES for found in rule(program, of_node))

    def split(tree: Any) -> Any:
        return jax.vjp(lambda tree: fn(*args[:params], tree, *args[params + 1 :]), tree)

    def both_passes(tree: Any) -> Any:
        out, pullback = split(tree)
        return out, pullback(jax.tree.map(jnp.ones_like, out))

    program = trace(lambda tree, *_: both_passes(tree), args[params])
    named: dict[Value, str] = dict(zip(program.inputs, jax.tree.leaves(_paths(args[params])), strict=True))
    saved = trace(lambda tree: jax.tree.leaves(split(tree)[1]), args[params])
    return merged(
        (
            *(found for rule in RULES for found in rule(program, of_node)),
            *twice_cast(program, named),
            *wide_residuals(saved, of_node),
        )
    )


def _saved_by(step: TrainStep, state: TrainState, batch: Any) -> Program:
    """The program whose results are what the backward pass of a step keeps, of one micro-batch."""
    trained, frozen = split_trainable(state.params, state.trainable)
    rest = {name: tree for name, tree in state.mstate.items() if name != SINKS}

    def residuals(trained: Any, frozen: Any, mstate: Any, sinks: Any, batch: Any, rng: Any, scale: Any) -> list[Any]:
        if step.accumulate > 1:
            batch = jax.tree.map(lambda x: x[0], cut(batch, step.accumulate))
        loss_of = mean_loss(step.loss_fn, frozen, mstate, batch, rng)

        def scaled(trained: Any, sinks: Any) -> tuple[jax.Array, tuple]:
            loss, parts = loss_of(trained, sinks)
            return scale.scale(loss), parts

        return jax.tree.leaves(jax.vjp(scaled, trained, sinks, has_aux=True)[1])

    sinks = state.mstate.get(SINKS, {})
    return trace(residuals, trained, frozen, rest, sinks, batch, state.rng, state.loss_scale)


def _of_policy(model: Model, sample: tuple) -> tuple[ComputeOf, bool]:
    """What the policy of a model says of each node, and whether it names float64 anywhere."""
    if model.policy is None:
        return lambda node: None, False
    rules = PolicyMap.of(model.policy)
    policies = [rules.default, *(rule.policy for rule in rules.rules)]
    dtypes = {dtype for p in policies for dtype in (p.param_dtype, p.compute_dtype, p.output_dtype)}
    names_float64 = np.dtype("float64") in dtypes
    if model.table is None:
        return lambda node: rules.default.compute_dtype, names_float64
    computes = {row.path: row.compute for row in model.table(*sample).rows}

    @functools.cache
    def at(path: str) -> np.dtype:
        return next((computes[p] for p in lineage(path) if p in computes), rules.default.compute_dtype)

    return lambda node: at(node.path) if node.in_wrapped else None, names_float64


def _paths(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda keys, _: path_of(keys) or "param", params)
