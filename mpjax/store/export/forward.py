"""A model's forward function from a file: a program that runs where the model's code is not."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from mpjax.core.types import MState, Params, PyTree
from mpjax.store import tensors
from mpjax.store.trees import named_leaves, nested

KIND, VERSION = "mpjax forward", 1
"""What the metadata say the file is. The version grows when an older reader would misread it."""


@dataclasses.dataclass(frozen=True)
class Forward:
    """A forward function without its model's code: `forward(params, mstate, *inputs) -> output`.

    Weights are arguments, in nested dicts as `load_export` gives them, of the dtypes with which it was exported; those of
    a file are read so by `load_export(path, like=forward.like)`.

    Args:
      program: what `jax.export` made; its StableHLO is `program.mlir_module()`.
      policy: the policy that is in the program, in words (`mpjax.policy.written`); None where the model has none.

    >>> import tempfile
    >>> from mpjax.core.model import Model
    >>> from mpjax.store.export.lowering import export_forward
    >>> model = Model(lambda rng, x: ({"w": jnp.ones(3)}, {}), lambda params, mstate, x, rng=None: (x @ params["w"], mstate))
    >>> params, mstate = model.init(None, None)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     forward = export_forward(model, params, mstate, jnp.ones((2, 3)), path=f"{folder}/net.forward")
    >>> forward(params, mstate, jnp.ones((5, 3))).shape
    (5,)
    """

    program: export.Exported
    policy: dict[str, Any] | None = None

    @property
    def like(self) -> tuple[Params, MState]:
        """(params, mstate) as shapes and dtypes."""
        params, mstate, *_ = self._specs
        return params, mstate

    @property
    def inputs(self) -> tuple[PyTree, ...]:
        """The inputs as shapes and dtypes; a free batch axis is a symbol."""
        return tuple(self._specs[2:])

    @property
    def platforms(self) -> tuple[str, ...]:
        """Where it runs."""
        return tuple(self.program.platforms)

    def __call__(self, params: Params, mstate: MState, *inputs: PyTree) -> Any:
        """The output.

        Raises:
          ValueError: weights or inputs are not those with which it was exported.
        """
        given = plain(params), plain(mstate), *(jax.tree.map(jnp.asarray, x) for x in inputs)
        self._check(given)
        return self._run(*given)

    @functools.cached_property
    def _run(self) -> Any:
        return jax.jit(self.program.call)

    @functools.cached_property
    def _specs(self) -> list[PyTree]:
        avals = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in self.program.in_avals]
        return list(jax.tree.unflatten(self.program.in_tree, avals)[0])

    def _check(self, given: tuple) -> None:
        names = ("params", "mstate", *(f"input {n}" for n in range(len(self._specs) - 2)))
        if len(given) != len(names):
            raise ValueError(
                f"got {len(given) - 2} inputs; legal are {len(names) - 2}; `forward.inputs` tells their shapes"
            )
        for name, tree, spec in zip(names, given, self._specs, strict=True):
            found, wanted = named_leaves({name: tree}), named_leaves({name: spec})
            for keys in found.keys() ^ wanted.keys():
                what = "is missing" if keys in wanted else "was not there when it was exported"
                raise ValueError(f"got arguments in which {'/'.join(keys)} {what}; {_MEND}")
            for keys, leaf in wanted.items():
                x = found[keys]
                if x.dtype != leaf.dtype or not _fits(x.shape, leaf.shape):
                    raise ValueError(
                        f"got {x.dtype}{list(x.shape)} at {'/'.join(keys)}; legal is {leaf.dtype}{list(leaf.shape)}; {_MEND}"
                    )


_MEND = "read weights by load_export(path, like=forward.like), and see forward.inputs for the inputs"


def load_forward(path: str | os.PathLike) -> Forward:
    """Read a program that `export_forward` wrote; neither Flax nor optax nor the model's code is needed to run it.

    Returns:
      A `Forward`: `forward(params, mstate, *inputs)`; `forward.like` for `load_export`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no such file, or damaged, or of a later jax. (What an older one wrote is read for as long as
        `jax.export` promises.)

    >>> load_forward("missing.forward")
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'missing.forward'
    """
    file = Path(path)
    arrays, metadata = tensors.read(file)
    tensors.check_kind(file, metadata, KIND, VERSION)
    try:
        program = export.deserialize(bytearray(arrays["program"].tobytes()))
        if metadata["jax"] != jax.__version__:
            program.mlir_module()  # what jax could not run it cannot print; else the first call would tell
        return Forward(program, json.loads(metadata["policy"]))
    except Exception as error:
        raise ValueError(
            f"got {file}, which jax {jax.__version__} cannot read; legal is a program of this jax or one not much older, and it is "
            f"of jax {metadata.get('jax', '?')}; install that one or a later, or export it again"
        ) from error


def plain(tree: PyTree) -> dict[str, Any]:
    """The tree as nested dicts of arrays, so that a file needs none of its classes."""
    return nested({keys: x if hasattr(x, "dtype") else jnp.asarray(x) for keys, x in named_leaves(tree).items()})


def _fits(shape: tuple, spec: tuple) -> bool:
    """Whether the shape is of the rank, and of the sizes that are fixed."""
    return len(shape) == len(spec) and all(not isinstance(n, int) or n == m for m, n in zip(shape, spec, strict=True))
