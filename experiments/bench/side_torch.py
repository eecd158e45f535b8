"""The PyTorch side: autocast, torch.compile, a fused optimizer; in float16 a GradScaler."""

from __future__ import annotations

import importlib
import platform
import statistics
from typing import Any

from experiments.bench.rows import Settings, Side, Work
from experiments.bench.side_jax import HOST_STEPS, room_of
from experiments.bench.timing import block_ms, clocked, host_ms


class Ready:
    """A side that is ready to run. PyTorch compiles in its first step."""

    def __init__(self, work: Work, side: Side, settings: Settings):
        room, imported = clocked(lambda: importlib.import_module(room_of(work, side.by)))
        import torch

        torch.manual_seed(settings.seed)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        self.torch, self.device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype, self.clip_norm = getattr(torch, side.policy), settings.clip_norm
        (self.model, self.optimizer, self.batch), built = clocked(lambda: room.build(work, settings, self.device))
        self.scaler = torch.amp.GradScaler(self.device, enabled=side.policy == "float16")
        # On a CPU only the twin's model is tried, and a C++ compiler need not be there.
        self.forward = torch.compile(self.model) if self.device == "cuda" else self.model
        self.seconds = {"import": imported, "build": built}
        self.loss: Any = None

    def call(self) -> None:
        """Send off one step."""
        with self.torch.autocast(self.device, dtype=self.dtype):
            self.loss = self.forward(*self.batch)
        self.scaler.scale(self.loss).backward()
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = self.loss.detach()

    def wait(self) -> None:
        """Until all that was sent is done."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def losses(self, steps: int) -> list[float]:
        """The losses of the next steps; read at the end."""
        found = []
        for _ in range(steps):
            self.call()
            found.append(self.loss)
        return [float(x) for x in found]


def measure(work: Work, side: Side, settings: Settings) -> dict[str, Any]:
    """All that is known of one side, in a process that does nothing else."""
    ready = Ready(work, side, settings)
    first, compiled = clocked(lambda: ready.losses(1))  # traces and compiles, forward and backward, and takes one step
    ready.seconds["compile"] = compiled
    losses = first + ready.losses(settings.losses - 1)
    ready.wait()
    if ready.device == "cuda":
        ready.torch.cuda.reset_peak_memory_stats()  # a kernel may have been chosen by trying others
    blocks = [block_ms(ready.call, ready.wait, settings.steps) for _ in range(settings.blocks)]
    host = host_ms(ready.call, ready.wait, HOST_STEPS)
    found: dict[str, Any] = {
        "seconds": ready.seconds, "losses": losses, "block_ms": blocks, "host_ms": statistics.median(host),
        "peak_bytes": ready.torch.cuda.max_memory_allocated() if ready.device == "cuda" else None,
        "environment": _environment(ready),
    }  # fmt: skip
    if settings.profile:
        found["kernels"] = _kernels(ready, settings.profile)
    return found


def _environment(ready: Ready) -> dict[str, str]:
    torch = ready.torch
    device = torch.cuda.get_device_name() if ready.device == "cuda" else "cpu"
    return {"device": device, "python": platform.python_version(), "torch": torch.__version__}


def _kernels(ready: Ready, steps: int) -> dict[str, Any]:
    from torch import profiler

    from experiments.bench.profile import Kernel, summary

    ready.call()
    ready.wait()
    with profiler.profile() as ran:
        for _ in range(steps):
            ready.call()
        ready.wait()
    # What the compiler names a range of kernels is no kernel.
    on_gpu = [
        event
        for event in ran.events()
        if str(event.device_type).endswith("CUDA") and not getattr(event, "is_user_annotation", False)
    ]
    return summary([Kernel(event.name, "", event.self_device_time_total * 1e3) for event in on_gpu], steps, {})
