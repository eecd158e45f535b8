"""Which part of a param lies on which device: rules by path, read against a mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from mpjax.core.tree import path_of
from mpjax.core.types import PyTree
from mpjax.policy.patterns import governs

Axis: TypeAlias = str | tuple[str, ...]

LONG = 256
"""From here on a dimension is one of features or of tokens. A shorter one may be a stack of layers, which a scan slices, of
experts or of heads, or the window of a convolution."""


@dataclasses.dataclass(frozen=True)
class Fsdp:
    """A rule that picks a dimension for each param by its shape; made by `fsdp`."""

    axis: Axis
    min_size: int

    def spec(self, shape: tuple[int, ...], devices: int) -> PartitionSpec:
        legal = [i for i, n in enumerate(shape) if n and n % devices == 0]
        if not legal or math.prod(shape) < self.min_size:
            return PartitionSpec()
        dimension = max(legal, key=lambda i: min(shape[i], LONG))  # the first of those that are alike
        return PartitionSpec(*[None] * dimension, self.axis)


Rule: TypeAlias = PartitionSpec | Fsdp | str
Rules: TypeAlias = Mapping[str, Rule] | Fsdp | str | None


def fsdp(axis: Axis = "data", min_size: int = 2**16) -> Fsdp:
    """A rule for `shard_state` that cuts each param it matches along one dimension that the axis divides.

        dimension = the first of argmax over {i : shape[i] divisible by the devices of the axis} of min(shape[i], 256)
        replicated where there is none, or where the param has fewer than min_size elements

    So a matrix with two long dimensions is cut along the first, whichever is longer: the parts of the devices follow each
    other in memory, as a gather leaves them. Of kernels cut along their last dimension each part was transposed before it
    was gathered, and once more where the optimizer met its gradient: 7 % of a step
    (experiments/records/2026-11-29-scaling-fsdp-h200). A stack of fewer than 256 layers is cut within the layers.

    Args:
      axis: the mesh axis, or a tuple of them, over which params are cut; usually the one over which the batch is.
      min_size: smaller params (elements, not bytes) stay whole: gathering them costs more than it saves.

    Returns:
      A value for the rules of `shard_state`, alone or behind a glob. The string `"fsdp"` is `fsdp()`.

    Source: Rajbhandari et al., ZeRO (2020); Zhao et al., PyTorch FSDP (2023).

    >>> tuple(fsdp(min_size=1).spec((3, 16, 8), devices=8))
    (None, 'data')
    """
    if not isinstance(min_size, int) or min_size < 0:
        raise ValueError(f"got min_size={min_size!r}; legal is a number of elements ≥ 0")
    return Fsdp(axis, min_size)


def devices_along(mesh: Mesh, axis: Axis, who: str) -> int:
    """How many devices lie along one or several mesh axes."""
    names = axis if isinstance(axis, tuple) else (axis,)
    missing = [name for name in names if name not in mesh.shape]
    if missing or not names:
        raise ValueError(
            f"{who} is to lie along the mesh axis {missing[0] if missing else axis!r}, which this mesh lacks; "
            f"it has {', '.join(f'{name!r} ({n})' for name, n in mesh.shape.items())}: name one of these"
        )
    return math.prod(mesh.shape[name] for name in names)


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with every axis `Auto`. `jax.make_mesh` makes them `Explicit`, which puts shardings into the types of
    arrays and so refuses many a product in a model that was not written for it."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def refuse_explicit_around(mesh: Mesh) -> None:
    """Refuse a step on `Auto` axes under a `jax.set_mesh` of `Explicit` ones, which jax does at its first sum."""
    around = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in around.axis_types and AxisType.Explicit not in mesh.axis_types:
        raise ValueError(
            f"jax.set_mesh has set a mesh of Explicit axes, {', '.join(map(repr, around.axis_names))}, as jax.make_mesh makes "
            "them, and the state lies on Auto ones, as shard_state places it; leave jax.set_mesh out, or make that mesh with "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(around.axis_names)}"
        )


def mesh_of(x: Any) -> Mesh | None:
    """The mesh on which an array lies; None for what lies on none, or is only traced."""
    place = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    return place.mesh if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh) else None


def place_on(mesh: Mesh, keys: tuple, x: Any) -> Sharding:
    """Where a step on a mesh leaves one leaf of its state: where it lies, or on every device a number that lies on none of
    the mesh (another loss scale, another key); an array there is refused, since nobody has said how it is cut."""
    place = getattr(x, "sharding", None)
    if place is not None and place.device_set == set(mesh.devices.flat):
        return place
    if jnp.ndim(x):
        raise ValueError(
            f"the state lies on a mesh of {mesh.devices.size} devices, and its {path_of(keys)} of shape {jnp.shape(x)} does not; "
            "place all of it anew: mpjax.shard_state(state, mesh, rules)"
        )
    return NamedSharding(mesh, PartitionSpec())


class Placement:
    """Which rule placed which param, and where each leaf of the params lies, by its key path."""

    def __init__(self, mesh: Mesh, rules: dict[str, Rule]) -> None:
        self.mesh, self.rules = mesh, rules
        self.acted: set[str] = set()
        self.placed: dict[tuple, tuple[tuple[int, ...], NamedSharding]] = {}

    def place(self, keys: tuple, param: Any) -> PyTree:
        """The sharding of one param, inside its box if it has one."""
        path = path_of(keys)

        def leaf(inner: tuple, x: Any) -> NamedSharding:
            sharding = NamedSharding(self.mesh, self._spec(path, param, x))
            self.placed[(*keys, *inner)] = jnp.shape(x), sharding
            return sharding

        return jax.tree_util.tree_map_with_path(leaf, param)

    def of_twin(self, keys: tuple, x: Any) -> NamedSharding | None:
        """The sharding of the param whose key path ends this one (the longest, as `b` also ends `a/b`), if the shape is its."""
        suffix = next((keys[i:] for i in range(len(keys) + 1) if keys[i:] in self.placed), None)
        shape, sharding = (None, None) if suffix is None else self.placed[suffix]
        return sharding if shape == jnp.shape(x) else None

    def _spec(self, path: str, param: Any, x: Any) -> PartitionSpec:
        shape = jnp.shape(x)
        glob = next((glob for glob in self.rules if governs(glob, path, {})), None)
        if glob is not None:
            self.acted.add(glob)
            rule = self.rules[glob]
            if isinstance(rule, Fsdp):
                return rule.spec(shape, devices_along(self.mesh, rule.axis, f"rule {glob!r}: {path}"))
            return self._checked(rule, f"rule {glob!r}", path, shape)
        if is_box(param):
            return self._checked(param.get_partition_spec(), "its own metadata (a rule overrides it)", path, shape)
        own = getattr(x, "sharding", None)
        if isinstance(own, NamedSharding) and isinstance(own.mesh, Mesh) and automatic(own.mesh) == self.mesh:
            return own.spec
        return PartitionSpec()

    def _checked(self, spec: Any, origin: str, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        if not isinstance(spec, PartitionSpec):
            raise ValueError(
                f"{origin} gives {spec!r} to {path}; legal is a jax.sharding.PartitionSpec, 'fsdp' or mpjax.fsdp(axis)"
            )
        if len(spec) > len(shape):
            raise ValueError(
                f"{origin} gives {spec} to {path}, which has {len(shape)} dimensions {shape}; legal is one entry for each "
                "at most: shorten the spec, or let the rule match less"
            )
        used: list[str] = []
        for i, axis in enumerate(spec):
            if axis is None:
                continue
            used += axis if isinstance(axis, tuple) else (axis,)
            n = devices_along(self.mesh, axis, f"{origin}: dimension {i} of {path}")
            if shape[i] % n:
                raise ValueError(
                    f"{origin} cuts dimension {i} of {path}, {shape[i]} of {shape}, over the {n} devices of mesh axis "
                    f"{axis!r}, which do not divide it; pad it, cut another dimension, or leave it whole (None)"
                )
        again = next((name for name in used if used.count(name) > 1), None)
        if again is not None:
            raise ValueError(
                f"{origin} gives {spec} to {path}, which names the mesh axis {again!r} twice; legal is once: cut one dimension"
            )
        return spec

    def refuse_idle(self, paths: list[str]) -> None:
        for glob in self.rules:
            hits = [path for path in paths if governs(glob, path, {})]
            if not hits:  # a misspelt one would replicate in silence what it meant to cut
                raise ValueError(
                    f"rule {glob!r} matches no param; the paths are {', '.join(paths[:8])}{', …' * (len(paths) > 8)}: "
                    "correct or drop it"
                )
            if glob not in self.acted:
                raise ValueError(
                    f"rule {glob!r} never acts: an earlier rule takes all that it matches ({', '.join(hits[:4])}); "
                    "put it before that rule, or drop it"
                )


def as_mapping(rules: Rules) -> dict[str, Rule]:
    mapping = (
        dict(rules) if isinstance(rules, Mapping) else {} if rules is None else {"": rules}
    )  # the root's subtree is all, a bare array too
    return {glob: fsdp() if rule == "fsdp" else rule for glob, rule in mapping.items()}


def is_box(x: Any) -> bool:
    """Whether this is one of Linen's boxes around a param, known by what it can do: this floor does not know Flax."""
    return hasattr(x, "get_partition_spec")
