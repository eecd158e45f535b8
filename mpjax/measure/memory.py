"""What a compiled step takes of the device's memory."""

from __future__ import annotations

from typing import Any


def step_memory(compiled: Any) -> dict[str, int]:
    """Bytes of a function's arguments, outputs, shared (donated) memory and temporaries, as XLA planned them.

    They are those of one device, and what a run holds at its peak is at most arguments + outputs − shared + temp.

    Args:
      compiled: what `jax.jit(f).lower(...)` gives, compiled or not; for a train step `step.lower(state, batch)`.

    Returns:
      `temp`, `arguments`, `outputs` and `shared` (outputs that take the memory of a donated argument), each in bytes.

    Raises:
      ValueError: the backend plans no memory.

    >>> import jax, jax.numpy as jnp
    >>> step_memory(jax.jit(lambda x: x + 1).lower(jnp.ones(8, jnp.float32)))["arguments"]
    32
    """
    found = (compiled.compile() if hasattr(compiled, "compile") else compiled).memory_analysis()
    if found is None:
        raise ValueError(
            "got a backend that reports no memory plan; legal are CPU, GPU and TPU; compile for one of those"
        )
    return {
        "temp": int(found.temp_size_in_bytes),
        "arguments": int(found.argument_size_in_bytes),
        "outputs": int(found.output_size_in_bytes),
        "shared": int(found.alias_size_in_bytes),
    }
