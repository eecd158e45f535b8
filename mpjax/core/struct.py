"""States as plain pytree dataclasses: each field is data or static, and unflattening checks nothing."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

C = TypeVar("C")


def static_field(**options: Any) -> Any:
    """A field that is part of the tree's structure, not a leaf: hashable, and a change of it is another compile."""
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(static_field, dataclasses.field))
def pytree_dataclass(cls: type[C]) -> type[C]:
    """A frozen dataclass registered as a pytree with named keys.

    jax, Orbax and sharding unflatten states with placeholders (`object()`, `None`, shardings) in place of arrays, so
    unflatten goes around the constructor and whatever checks or conversions stand in it.

    >>> @pytree_dataclass
    ... class Counter:
    ...     count: int
    ...     name: str = static_field(default="steps")
    >>> jax.tree.map(lambda x: x + 1, Counter(1))
    Counter(count=2, name='steps')
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    data = [field.name for field in fields if not field.metadata.get("static")]
    static = [field.name for field in fields if field.metadata.get("static")]

    def flatten_with_keys(self: Any) -> tuple[tuple, tuple]:
        keyed = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in data)
        return keyed, tuple(getattr(self, name) for name in static)

    def flatten(self: Any) -> tuple[tuple, tuple]:
        return tuple(getattr(self, name) for name in data), tuple(getattr(self, name) for name in static)

    def unflatten(meta: tuple, leaves: Any) -> C:
        self = object.__new__(cls)
        for name, value in (*zip(data, leaves, strict=True), *zip(static, meta, strict=True)):
            object.__setattr__(self, name, value)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
