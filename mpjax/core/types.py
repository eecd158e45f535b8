"""The shared words: what each kind of pytree in this library is called."""

from typing import Any, TypeAlias

PyTree: TypeAlias = Any
"""Any nest of dicts, lists, tuples, dataclasses and None whose leaves are arrays."""

Params: TypeAlias = Any
"""What is trained: a pytree of float arrays in the param dtype (the master weights)."""

MState: TypeAlias = dict[str, Any]
"""What changes but is not trained: from collection name to a pytree (batch statistics, caches)."""

Batch: TypeAlias = Any
"""One batch of data: any pytree whose arrays share their leading axis."""

Metrics: TypeAlias = dict[str, Any]
"""From name to a scalar array."""

DTypeLike: TypeAlias = Any
"""What numpy or jax takes for a dtype: a name, an `np.dtype` or a scalar type such as `jnp.bfloat16`."""
