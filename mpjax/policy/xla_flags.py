"""XLA flags that were measured to help on a chip: a table, and one text for the environment that its user sets himself."""

from __future__ import annotations

import dataclasses
import os
import sys


@dataclasses.dataclass(frozen=True)
class Flag:
    """One row: what is set, what it does, and who measured that it helps.

    Attributes:
      name: as XLA spells it, without dashes.
      value: the text behind the equals sign.
      does: one sentence.
      record: the folder under `experiments/records/` that shows with and without.
    """

    name: str
    value: str
    does: str
    record: str

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


FLAGS: dict[str, tuple[Flag, ...]] = {
    "h100": (),
    "h200": (
        Flag(
            name="xla_gpu_experimental_enable_nccl_symmetric_buffers",
            value="true",
            does="Copy engines gather sharded params: a fully sharded step was 2.0 % shorter on two; needs NCCL 2.28, and memory "
            "beside jax's own.",
            record="2026-11-30-scaling-strong-h200",
        ),
    ),
}
"""From chip to its flags. Only what a record shows to help stands here; for an H100 that is nothing so far."""


def xla_flags(chip: str, flags: str | None = None) -> str:
    """The text for the environment's `XLA_FLAGS`, with what was measured to help on a chip added to what is set already.

        os.environ["XLA_FLAGS"] = mpjax.xla_flags("h200")       # before jax starts: nothing here does it for you

    For an H200 it is one flag, for params cut up over several: gathers by NCCL's symmetric memory. That needs NCCL 2.28 or newer
    (`pip show nvidia-nccl-cu13`), and takes memory which jax has not reserved. A step on one device is as it was.

    A flag that is set already, to whatever value, is left as it is. jax is not imported. XLA ends a process that has a flag
    which it does not know: each one here is known to jaxlib 0.10 to 0.12.

    Args:
      chip: a name in the table, `mpjax.policy.xla_flags.FLAGS`.
      flags: the flags to add to; by default those of the environment.

    Raises:
      ValueError: a chip that has no flags, or `XLA_FLAGS` that name a file.
      RuntimeError: jax's backend has started, and has read its flags; what would be added now is not heard.

    >>> xla_flags("h200", "--xla_gpu_experimental_enable_nccl_symmetric_buffers=false")
    '--xla_gpu_experimental_enable_nccl_symmetric_buffers=false'
    """
    if chip not in FLAGS:
        raise ValueError(f"got the chip {chip!r}, for which no flags were measured; legal are {', '.join(FLAGS)}")
    given = (os.environ.get("XLA_FLAGS", "") if flags is None else flags).strip()
    if given and not given.startswith("-"):
        raise ValueError(
            f"got XLA_FLAGS={given}, which XLA reads as the name of a file; legal are flags, --name=value; "
            "write those of the chip into that file"
        )
    names = {flag.lstrip("-").partition("=")[0] for flag in given.split()}
    added = [str(flag) for flag in FLAGS[chip] if flag.name not in names]
    if added and _started():
        raise RuntimeError(
            f"{' '.join(added)} came when jax's backend had started already, which reads its flags once; set XLA_FLAGS before "
            "the first use of jax, or in the shell"
        )
    return " ".join([given, *added] if given else added)


def _started() -> bool:
    """Whether jax has a backend; that is asked of jax only where somebody has imported it."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bool(bridge.backends_are_initialized())
