"""What is compared: works (a model and its shapes), sides (who trains it, and how), and the rows that bring them together."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, TypeAlias


@dataclasses.dataclass(frozen=True)
class GPT:
    """A GPT-2: pre-norm blocks, learned positions, GELU, a head that is the embedding transposed; no dropout."""

    width: int
    layers: int
    heads: int
    context: int
    batch: int
    vocabulary: int = 50304
    """50,257 tokens, rounded up to a multiple of 128, as nanoGPT has it."""
    fused_qkv: bool = True
    """One projection makes query, key and value, as in nanoGPT and llm.c; else there are three."""
    unit: str = "tok"

    @property
    def items(self) -> int:
        """Tokens a step."""
        return self.context * self.batch


@dataclasses.dataclass(frozen=True)
class ResNet:
    """A ResNet of bottlenecks whose stride is in the 3×3 convolution (v1.5)."""

    stages: tuple[int, ...]
    size: int
    batch: int
    classes: int = 1000
    width: int = 64
    unit: str = "img"

    @property
    def items(self) -> int:
        """Pictures a step."""
        return self.batch


Work: TypeAlias = GPT | ResNet

WORKS: dict[str, Work] = {
    "gpt2-124m": GPT(width=768, layers=12, heads=12, context=1024, batch=16),
    "gpt-1.3b": GPT(width=2048, layers=24, heads=16, context=1024, batch=8),
    "resnet50": ResNet(stages=(3, 4, 6, 3), size=224, batch=256),
}
TINY: dict[str, Work] = {
    "gpt2-124m": GPT(width=32, layers=2, heads=2, context=32, batch=4, vocabulary=128),
    "gpt-1.3b": GPT(width=64, layers=2, heads=4, context=32, batch=2, vocabulary=128),
    "resnet50": ResNet(stages=(1, 1), size=16, batch=4, classes=10, width=8),
}


@dataclasses.dataclass(frozen=True)
class Side:
    """Who trains a work, and how."""

    by: Literal["mpjax", "flax", "torch"]
    policy: str
    """mpjax: a policy string. flax and torch: the dtype in which layers compute; torch in float16 has its GradScaler."""
    loss: Literal["plain", "chunked"] = "plain"
    """chunked: `mpjax.losses.linear_softmax_cross_entropy` on the tied head, 4,096 tokens at a time."""
    recompute: bool = False
    """The backward pass computes the GELU again, from its input, and keeps only that, as PyTorch's compiler does unasked."""
    skip: str = "nonfinite"
    """mpjax only: what the step looks at before it applies an update."""
    compiler: dict[str, str | bool] = dataclasses.field(default_factory=dict)
    """flax and mpjax: options of XLA for this step alone, named as in `XLA_FLAGS`."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table. The first side is the one that the others are divided by."""

    work: str
    sides: dict[str, Side]
    formats: tuple[str, ...] = ("bfloat16",)
    """Of the products whose rate is measured beside them; shares are of the first."""


BF16 = "mixed_bfloat16"
FP8 = "mixed_fp8"
FP8_DELAYED = "params=float32,compute=bfloat16,output=float32,dot=fp8_delayed"
_tuned = functools.partial(Side, "mpjax", loss="chunked", recompute=True, skip="gradients")
"""What a user of mpjax can choose for a transformer's speed and memory."""
_FP8_SIDES = {"bf16": _tuned(BF16), "fp8": _tuned(FP8), "fp8-delayed": _tuned(FP8_DELAYED)}
_FP8_FORMATS = ("bfloat16", "float8_e4m3fn", "float8_e4m3fn×float8_e5m2")
XLA: dict[str, dict[str, str | bool]] = {
    "no-triton-gemm": {"xla_gpu_enable_triton_gemm": False},
    "any-triton-gemm": {"xla_gpu_triton_gemm_any": True},
    "fusion-autotuner": {"xla_gpu_experimental_enable_fusion_autotuner": True},
    "block-level-fusion": {"xla_gpu_experimental_enable_fusion_block_level_rewriter": True},
    "cudnn-layer-norm": {"xla_gpu_enable_cudnn_layer_norm": True},
    "no-command-buffers": {"xla_gpu_enable_command_buffer": ""},
    "all-command-buffers": {
        "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION"
    },
    "latency-hiding": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "conv-fusion": {"xla_gpu_experimental_enable_conv_fusion": True},
}
"""Candidates for `mpjax.xla_flags`: what jaxlib 0.10 to 0.12 all parse and one GPU could gain by."""

ROWS: dict[str, Row] = {
    "gpt2-bf16": Row("gpt2-124m", {
        "flax": Side("flax", "bfloat16"),
        "mpjax": Side("mpjax", BF16),
        "mpjax-gradients": Side("mpjax", BF16, skip="gradients"),
        "mpjax-off": Side("mpjax", BF16, skip="off"),
        "mpjax-tuned": _tuned(BF16),
        "torch": Side("torch", "bfloat16"),
    }),
    "gpt2-xla": Row("gpt2-124m", {"default": _tuned(BF16)} | {
        name: _tuned(BF16, compiler=options) for name, options in XLA.items() if name != "conv-fusion"
    }),
    "gpt2-fp8": Row("gpt2-124m", _FP8_SIDES, _FP8_FORMATS),
    "gpt2-f16": Row("gpt2-124m", {
        "bf16": _tuned(BF16),
        "f16": _tuned("mixed_float16"),
        "torch": Side("torch", "float16"),
    }, ("bfloat16", "float16")),
    "resnet50-bf16": Row("resnet50", {
        "flax": Side("flax", "bfloat16"),
        "mpjax": Side("mpjax", BF16),
        "mpjax-gradients": Side("mpjax", BF16, skip="gradients"),
        "mpjax-off": Side("mpjax", BF16, skip="off"),
        "torch": Side("torch", "bfloat16"),
    }),
    "resnet50-xla": Row("resnet50", {"default": Side("mpjax", BF16, skip="gradients")} | {
        name: Side("mpjax", BF16, skip="gradients", compiler=XLA[name])
        for name in ("no-triton-gemm", "fusion-autotuner", "all-command-buffers", "conv-fusion")
    }),
    "gpt-1.3b": Row("gpt-1.3b", {
        "flax": Side("flax", "bfloat16"),
        **_FP8_SIDES,
        "torch": Side("torch", "bfloat16"),
    }, _FP8_FORMATS),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is the same for every side of a run."""

    tiny: bool = False
    """The work shrunk to run on a CPU."""
    losses: int = 20
    """First steps, whose losses are kept; they also warm up."""
    steps: int = 10
    """Steps a block."""
    blocks: int = 10
    """Blocks that are timed."""
    clip_norm: float | None = None
    """Largest global norm of the gradient, for all sides alike."""
    fused_qkv: bool = True
    """Of a GPT: one projection for query, key and value, or three."""
    profile: int = 0
    """Steps that are profiled after the timing; 0 for none."""
    seed: int = 0
    """Of params and data."""

    def work(self, row: Row) -> Work:
        """The row's work as it is run under these settings."""
        work = (TINY if self.tiny else WORKS)[row.work]
        return dataclasses.replace(work, fused_qkv=self.fused_qkv) if isinstance(work, GPT) else work
