"""One JAX side: built, lowered and compiled once, then run as its user would call it."""

from __future__ import annotations

import importlib
import platform
import statistics
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from experiments.bench.program import Program
from experiments.bench.rows import GPT, Settings, Side, Work
from experiments.bench.timing import block_ms, clocked, host_ms

HOST_STEPS = 20


def room_of(work: Work, by: str) -> str:
    """The module that builds this work for a side."""
    name = "gpt" if isinstance(work, GPT) else "resnet"
    return f"experiments.bench.{name}" + ("" if by == "mpjax" else f"_{by}")


class Ready:
    """A program that is ready to run, lowered and compiled once, and the seconds that it took to get there."""

    def __init__(self, program: Program, compiler: Mapping[str, str | bool] | None = None):
        import jax

        self._wait = jax.block_until_ready
        self.step, self.state, self.batch = program
        lowered, traced = clocked(lambda: self.step.lower(self.state, self.batch))
        # `step(...)` finds what is compiled here, and compiles nothing again; but not what has options of its own.
        self.executable, compiled = clocked(lambda: lowered.compile(dict(compiler) if compiler else None))
        if compiler:
            self.step = self.executable
        self.seconds = {"trace": traced, "compile": compiled}
        self.metrics: dict[str, Any] = {}

    def call(self) -> None:
        """Send off one step, as a user does."""
        self.state, self.metrics = self.step(self.state, self.batch)

    def wait(self) -> None:
        """Until all that was sent is done."""
        self._wait((self.state, self.metrics))

    def losses(self, steps: int) -> list[float]:
        """The losses of the next steps; read at the end, so that the steps run as they do in training."""
        found = []
        for _ in range(steps):
            self.call()
            found.append(self.metrics["loss"])
        return [float(x) for x in found]


class Compiled(Ready):
    """A side that is ready to run, and what it took to get there."""

    def __init__(self, work: Work, side: Side, settings: Settings):
        room, imported = clocked(lambda: importlib.import_module(room_of(work, side.by)))
        import jax

        jax.config.update("jax_enable_compilation_cache", False)  # compile time is to be cold
        program, built = clocked(lambda: jax.block_until_ready(room.build(work, side, settings)))
        super().__init__(program, side.compiler)
        self.seconds = {"import": imported, "build": built, **self.seconds}


def measure(work: Work, side: Side, settings: Settings) -> dict[str, Any]:
    """All that is known of one side, in a process that does nothing else."""
    ready = Compiled(work, side, settings)
    peaks = {"compiled": peak_bytes()}
    losses = ready.losses(settings.losses)
    blocks = [block_ms(ready.call, ready.wait, settings.steps) for _ in range(settings.blocks)]
    host = host_ms(ready.call, ready.wait, HOST_STEPS)
    peaks["run"] = peak_bytes()
    from experiments.bench import products

    text = ready.executable.as_text()
    found: dict[str, Any] = {
        "seconds": ready.seconds, "losses": losses, "block_ms": blocks, "host_ms": statistics.median(host),
        "peak_bytes": peaks["run"], "peak_bytes_when_compiled": peaks["compiled"], "planned_bytes": planned(ready.executable),
        "xla_flops": xla_flops(ready.executable), "products": products.table(text), "environment": environment(),
    }  # fmt: skip
    if settings.profile:
        from experiments.bench import profile

        found["kernels"] = profile.kernels(ready.call, ready.wait, settings.profile, profile.origins(text))
    return found


def peak_bytes() -> int | None:
    """The most that the process had of the device's memory; None where the device does not tell (a CPU)."""
    import jax

    stats = jax.devices()[0].memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use")


def planned(executable: Any) -> dict[str, int]:
    """Bytes as XLA planned them; `peak` is arguments + new outputs + temporaries, at most what a run holds."""
    plan = executable.memory_analysis()
    arguments, temp = int(plan.argument_size_in_bytes), int(plan.temp_size_in_bytes)
    new = int(plan.output_size_in_bytes) - int(plan.alias_size_in_bytes)
    return {"arguments": arguments, "new outputs": new, "temporaries": temp, "peak": arguments + new + temp}


def xla_flops(executable: Any) -> float | None:
    """XLA's own count; it knows neither cuDNN's kernels nor, in some versions, cuBLAS's."""
    cost = executable.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return None if not cost else cost.get("flops")


def environment() -> dict[str, str]:
    """Device and versions."""
    import jax

    device = jax.devices()[0]
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return {"device": f"{device.device_kind} ({device.platform})", "python": platform.python_version(), **versions}
