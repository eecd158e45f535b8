"""A model's forward function, its policy inside, lowered to StableHLO and written to a file."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from mpjax.core.model import Model
from mpjax.core.types import MState, Params, PyTree
from mpjax.numerics.attention import unfused
from mpjax.store import tensors
from mpjax.store.export.forward import KIND, VERSION, Forward, plain
from mpjax.store.export.weights import words_of
from mpjax.store.trees import named_leaves, refilled

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export_forward(
    model: Model,
    params: Params,
    mstate: MState,
    *sample: PyTree,
    path: str | os.PathLike,
    batch: str | None = "b",
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    returns_mstate: bool = False,
    overwrite: bool = False,
    **kwargs: Any,
) -> Forward:
    """Write the forward function of a model, its policy inside, as a program that needs neither model nor Flax to run.

        forward(params, mstate, *inputs) = model.apply(params, mstate, *inputs, **kwargs)[0]

    Weights are arguments, in the dtypes of `params` here: give them as they will be served. The program says in StableHLO,
    whose products are in the compute dtypes of the policy, what was traced once. Attention is lowered unfused, since the
    fused kernel of one platform is no program for another, and jax promises no compatibility for it.

    Args:
      model: of `mpjax.wrap`, or bare functions.
      params: or `ShapeDtypeStruct`s of them; only shapes and dtypes are read.
      mstate: likewise; `{}` where there is none.
      *sample: the inputs after `(params, mstate)`, or their shapes.
      path: of the file to write: a safetensors file with the program's bytes, so that it is checked when it is read.
      batch: a name for the leading axis of every sample array, which may then have any size; None for the shapes as they are
        (symbolic shapes of `jax.export` among them).
      platforms: for which it is lowered: `cpu`, `cuda`, `rocm`, `tpu`.
      returns_mstate: whether the output is `(output, mstate)`, as a decoding cache needs it.
      overwrite: whether an existing file may be replaced.
      **kwargs: constants of the call: `method="encode"`, `train=False` (for a wrapped model that is the default).

    Returns:
      The program, as `load_forward` would give it back.

    Raises:
      ValueError: the program depends on the size of the batch; an array among the keywords; sample arrays that do not share
        their leading axis; an unknown platform; an output that is no nest of arrays in dicts, lists and tuples; an existing file.

    >>> import tempfile
    >>> from mpjax.store.export.forward import load_forward
    >>> model = Model(lambda rng, x: ({"w": jnp.ones(3)}, {}), lambda params, mstate, x, rng=None: (x @ params["w"], mstate))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = export_forward(model, *model.init(None, None), jnp.ones((2, 3)), path=f"{folder}/net.forward")
    ...     forward = load_forward(f"{folder}/net.forward")
    >>> forward.inputs[0].shape, forward.platforms
    ((b, 3), ('cpu', 'cuda', 'tpu'))
    """
    if isinstance(platforms, str) or not set(platforms) <= set(PLATFORMS):
        raise ValueError(
            f"got platforms={platforms!r}; legal is a tuple of some of {', '.join(PLATFORMS)}; name an NVIDIA GPU 'cuda'"
        )
    constants = ({"train": False} if model.table is not None else {}) | kwargs
    for name, value in constants.items():
        if any(hasattr(x, "shape") for x in jax.tree.leaves(value)):
            raise ValueError(
                f"got an array for the keyword {name}; a keyword is a constant of the program, and weights and inputs are "
                "positional; pass it by position"
            )

    def forward(plain_params: Any, plain_mstate: Any, *inputs: Any) -> Any:
        out, after = model.apply(
            refilled(params, named_leaves(plain_params)),
            refilled(mstate, named_leaves(plain_mstate)),
            *inputs,
            **constants,
        )
        return (out, plain(after)) if returns_mstate else out

    fixed = [_spec(plain(params)), _spec(plain(mstate)), *map(_spec, sample)]
    free = fixed if batch is None else [*fixed[:2], *_with_free_batch(fixed[2:], batch)]
    # Under the caller's own mesh it would be a program for as many devices.
    no_mesh = jax.sharding.Mesh(np.empty((), object), ())
    with unfused(), jax.set_mesh(no_mesh):
        try:
            program = export.export(jax.jit(forward), platforms=platforms)(*free)
        except Exception as error:
            if batch is None:
                raise
            jax.eval_shape(forward, *fixed)  # what fails with these shapes too is no matter of the batch
            raise ValueError(
                f"got a model whose program depends on the size of the batch ({_first_line(error)}); legal with batch={batch!r} "
                "is one that runs alike for every size; give batch=None to export it for the sample's"
            ) from error
    try:
        data = program.serialize()
    except ValueError as error:
        raise ValueError(
            f"got a program that jax cannot write ({_first_line(error)}); legal are inputs and outputs of arrays in dicts, "
            "lists and tuples, and operations of StableHLO; return such, or register the class by "
            "jax.export.register_pytree_node_serialization"
        ) from error
    metadata = {
        "jax": jax.__version__,
        "kind": KIND,
        "version": str(VERSION),
        "policy": json.dumps(words_of(model.policy)),
        "platforms": ",".join(platforms),
    }
    tensors.write(Path(path), {"program": np.frombuffer(data, np.uint8)}, metadata, overwrite)
    return Forward(program, words_of(model.policy))


def _with_free_batch(inputs: list[PyTree], batch: str) -> list[PyTree]:
    arrays = [x for x in jax.tree.leaves(inputs) if x.ndim]
    rows = {x.shape[0] for x in arrays}
    if len(rows) != 1:
        raise ValueError(
            f"got sample arrays of {sorted(rows) or 'no'} rows; legal with batch={batch!r} are arrays that share their leading "
            "axis, at least one; give batch=None to fix all shapes"
        )
    (symbol,) = export.symbolic_shape(batch)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((symbol, *x.shape[1:]), x.dtype) if x.ndim else x, inputs)


def _spec(tree: PyTree) -> PyTree:
    arrays = jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), tree)
    # As jax will have them: from 0.12 it warns of a shape of numpy's 64 bits.
    dtype = functools.partial(jax.dtypes.canonicalize_dtype, allow_extended_dtype=True)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype(x.dtype)), arrays)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
