"""Where a step's time goes: kernels under jax's profiler, grouped by what they are."""

from __future__ import annotations

import collections
import contextlib
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.bench.timing import Call, Wait

KINDS = (
    ("attention", r"sdpa|flash|fmha|attention"),
    ("convolution", r"conv(?!ert)|fprop|dgrad|wgrad|winograd"),
    ("product", r"gemm|nvjet|cublas|cutlass|matmul|splitk|^dot"),
    ("", r"fusion|^triton"),
    ("batch norm", r"batch_?norm|bn_fw|bn_bw"),
    ("copy", r"memcpy|memset|^copy|transpose|nchw|nhwc"),
)
"""From kind to a pattern that the kernel's name holds, in any case; the first counts. "" and others: by their own name."""

TOP = 40

GPU = "/device:GPU"
"""So the name of a GPU's plane in a trace begins."""


class Kernel(NamedTuple):
    """A kernel that ran: its name, the HLO operation that it is of, if that is known, and its nanoseconds."""

    name: str
    op: str
    ns: float


def kind_of(name: str) -> str:
    """What a kernel is: one of `KINDS`, or its name without the number at its end.

    >>> kind_of("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NTN"), kind_of("input_reduce_fusion_12")
    ('product', 'input_reduce_fusion')
    """
    found = next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "")
    return found or re.sub(r"([._]\d+)+$", "", name)


def summary(kernels: Iterable[Kernel], steps: int, origin: Mapping[str, str]) -> dict[str, Any]:
    """Milliseconds and launches a step and the share of the whole, by kind, and of the dearest kernels each.

    Args:
      kernels: of all the steps.
      steps: how many there were.
      origin: from HLO operation to the JAX operation and module path that it comes from.
    """
    kinds: dict[str, list[float]] = collections.defaultdict(list)
    single: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for kernel in kernels:
        kinds[kind_of(kernel.name)].append(kernel.ns)
        single[kernel.name, kernel.op].append(kernel.ns)
    total = sum(sum(times) for times in kinds.values()) or 1.0

    def row(times: list[float]) -> dict[str, float]:
        return {"ms": sum(times) / steps / 1e6, "share": sum(times) / total, "launches": len(times) / steps}

    def dearest(item: tuple[Any, list[float]]) -> float:
        return -sum(item[1])

    by_kind = [{"kind": kind, **row(times)} for kind, times in sorted(kinds.items(), key=dearest)]
    top = [
        {"kernel": name, "op": op, "from": origin.get(op, ""), **row(times)}
        for (name, op), times in sorted(single.items(), key=dearest)[:TOP]
    ]
    return {"steps": steps, "ms": total / steps / 1e6, "kinds": by_kind, "top": top}


@contextlib.contextmanager
def traced(call: Call, wait: Wait, steps: int) -> Iterator[list[Path]]:
    """Run some steps under jax's profiler; the traces, which can be read in this block alone."""
    import jax

    call()
    wait()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                call()
            wait()
        with warnings.catch_warnings():
            # jaxlib makes types in a way that Python 3.12 calls outdated; as an error that would end the process.
            warnings.simplefilter("ignore", DeprecationWarning)
            yield list(Path(folder).rglob("*.xplane.pb"))


def kernels(call: Call, wait: Wait, steps: int, origin: Mapping[str, str]) -> dict[str, Any]:
    """Sum up what ran on the device in some steps."""
    with traced(call, wait, steps) as paths:
        return summary([kernel for path in paths for kernel in read(path)], steps, origin)


def read(path: Path) -> list[Kernel]:
    """The kernels in a trace: on a GPU all that ran in a stream; on a CPU what the host's threads did for an HLO operation."""
    import jax

    trace = jax.profiler.ProfileData.from_file(str(path))  # it owns what its planes point to
    planes = list(trace.planes)
    device = [line for plane in planes if plane.name.startswith(GPU) for line in streams(plane)]
    found = []
    for line in device or (line for plane in planes for line in plane.lines):
        for event in line.events:
            op = str(dict(event.stats).get("hlo_op", ""))
            if device or op:
                found.append(Kernel(event.name, op, float(event.duration_ns)))
    return found


def streams(plane: Any) -> list[Any]:
    """The lines of a GPU in which its kernels stand once: there may be others, derived from them by the profiler."""
    return [line for line in plane.lines if line.name.startswith("Stream")] or list(plane.lines)


def origins(hlo: str) -> dict[str, str]:
    """From each operation of a compiled program to where it comes from: `jit(step)/…/layers_0/norm1/…/mul`.

    >>> origins('ROOT add_fusion.1 = f32[] fusion(x), kind=kLoop, metadata={op_name="jit(f)/norm/add"}')
    {'add_fusion.1': 'jit(f)/norm/add'}
    """
    line = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{[^}]*?op_name="([^"]*)"', re.MULTILINE)
    return dict(line.findall(hlo))
