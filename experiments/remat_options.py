"""What each named rematerialisation costs in time and saves in memory, on a GPT.

Question   a step's memory is mostly what the backward pass keeps of the blocks. What does it take to keep less?
Model      GPT-2 (Radford et al., 2019), pre-norm, tied head; a linear + cross-entropy in chunks, so that logits take no part.
           The blocks are one `nn.scan`, or with --scan=False a loop; each is rematerialised under `mpjax.remat_policy`.
Options    none (no remat), and the names of `mpjax.remat_policy`.
Reads      temporaries of the compiled step, as XLA planned them, and with arguments the most that it holds; the median
           time of a step; FLOPs of its products against those without remat, as `mpjax.audit` counts them.
Method     one option after the other, each compiled, timed in blocks of steps on one batch, and dropped. An option that
           does not fit the device is told, and the next one is measured.
Time       a minute on 2 CPU cores.
Run        python -m experiments.remat_options
Full size  for a GPU: --width=768 --depth=12 --heads=12 --vocabulary=50304 --context=1024 --batch-size=16
           --blocks=5 --steps=10; --plan-only=True compiles and does not run
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.console import Console

import mpjax
from experiments import _run
from mpjax.measure.audit import audit
from mpjax.measure.memory import step_memory
from mpjax.measure.table import policy_table, to_markdown
from mpjax.measure.timing import time_blocks


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, with its unit. The defaults are for two CPU cores."""

    options: tuple[str, ...] = ("none", "nothing", "attention", "dots_no_batch", "dots", "everything", "offload")
    """What is kept of a block, in this order; none: no remat."""
    policy: str = "mixed_bfloat16"
    """Policy string of the model."""
    width: int = 64
    """Features a token."""
    depth: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads."""
    vocabulary: int = 512
    """Tokens."""
    context: int = 128
    """Tokens a row."""
    batch_size: int = 4
    """Rows a step."""
    scan: bool = True
    """The blocks are one scanned body; else a loop."""
    blocks: int = 3
    """Blocks of steps that are timed."""
    steps: int = 3
    """Steps a block."""
    plan_only: bool = False
    """Compile and do not run: memory and FLOPs alone."""
    seed: int = 0
    """Of init and batch."""
    workdir: str | None = None
    """The run's own folder, new or empty. Default: runs/remat_options-date-time."""


class Block(nn.Module):
    """Pre-norm transformer block, as the body of a scan. No dtype anywhere: the policy decides."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x_BxTxD, mask_1x1xTxT):
        h = nn.LayerNorm(name="norm1")(x_BxTxD)
        x_BxTxD = x_BxTxD + nn.MultiHeadDotProductAttention(self.heads, name="attention")(h, mask=mask_1x1xTxT)
        h_BxTxF = nn.gelu(nn.Dense(4 * self.width, name="up")(nn.LayerNorm(name="norm2")(x_BxTxD)))
        return x_BxTxD + nn.Dense(self.width, name="down")(h_BxTxF), None


class GPT(nn.Module):
    """A causal transformer that hands out its hidden states: the loss holds the head."""

    config: Config
    option: str

    @nn.compact
    def __call__(self, token_BxT):
        config, length = self.config, token_BxT.shape[1]
        x_BxTxD = nn.Embed(config.vocabulary, config.width, name="embed")(token_BxT)
        x_BxTxD += self.param("positions", nn.initializers.normal(0.02), (1, length, config.width))
        mask_1x1xTxT = jnp.tril(jnp.ones((1, 1, length, length), bool))
        body = Block
        if self.option != "none":  # in a scan nothing is there to merge a block's two passes with
            body = nn.remat(Block, prevent_cse=not config.scan, policy=mpjax.remat_policy(self.option))
        if config.scan:
            body = nn.scan(
                body,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=config.depth,
            )
        for n in range(1 if config.scan else config.depth):
            x_BxTxD, _ = body(config.width, config.heads, name=f"layers_{n}")(x_BxTxD, mask_1x1xTxT)
        return nn.LayerNorm(name="norm")(x_BxTxD)


def parts(config: Config, option: str) -> tuple[Any, Any, Any]:
    """The train step under one option, with the shapes of its state and its batch."""
    policy = mpjax.PolicyMap.of(config.policy)
    model, optimizer = mpjax.wrap(GPT(config, option), policy), optax.adamw(3e-4)

    def loss_fn(params, mstate, batch, rng):
        hidden_BxTxD, mstate = model.apply(params, mstate, batch["token"], rng=rng)
        total, weight = mpjax.losses.linear_softmax_cross_entropy(
            hidden_BxTxD, params["embed"]["embedding"], batch["next"], transposed=True,
            compute_dtype=policy.default.compute_dtype,
        )  # fmt: skip
        return total / weight, mpjax.Aux(mstate, {})

    def create(key):
        return mpjax.TrainState.create(model, optimizer, key, jnp.zeros((1, config.context), jnp.int32))

    tokens = np.random.default_rng(config.seed).integers(
        config.vocabulary, size=(config.batch_size, config.context + 1), dtype=np.int32
    )
    batch = {"token": tokens[:, :-1], "next": tokens[:, 1:]}
    return mpjax.make_train_step(loss_fn, optimizer, clip_norm=1.0), create, batch


def timed(compiled: Any, state: Any, batch: Any, config: Config) -> tuple[float, ...]:
    """Seconds a step, one number a block, of what was compiled already; the state is donated."""

    def call() -> Any:
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    return time_blocks(call, warmup=2, blocks=config.blocks, calls=config.steps).seconds


def measure(config: Config, option: str) -> dict[str, Any]:
    """Memory, FLOPs and time of the step under one option; what did not fit is told under "error"."""
    step, create, batch = parts(config, option)
    key = mpjax.seeds(config.seed).init
    shapes = jax.eval_shape(create, key)
    found: dict[str, Any] = {"FLOPs": sum(audit(step.pure, shapes, batch).flops_by_dtype().values())}
    start = time.perf_counter()
    try:
        compiled = step.lower(shapes, batch).compile()
        found |= step_memory(compiled)
        found["compile s"] = time.perf_counter() - start
        if not config.plan_only:
            found["step s"] = timed(compiled, jax.jit(create)(key), jax.device_put(batch), config)
    except jax.errors.JaxRuntimeError as error:
        found["error"] = str(error).partition("\n")[0]
    return found


def main(config: Config) -> dict[str, dict[str, Any]]:
    """Measure, show and write; returns what was found for each option."""
    opened = _run.open_folder(config, "remat_options", goes_on=False)
    wrong = [option for option in config.options if option not in Config.options]
    if wrong or not config.options:
        raise _run.Refused(f"got the options {', '.join(wrong) or 'of none'}; legal are {', '.join(Config.options)}")
    with opened.begin() as folder:
        found = {option: measure(config, option) for option in config.options}
        first = next(iter(found.values()))
        rows = []
        for option, of in found.items():
            seconds = np.array(of.get("step s", [np.nan])) * 1e3
            peak = of["arguments"] + of["outputs"] - of["shared"] + of["temp"] if "temp" in of else np.nan
            rows.append({
                "option": option, "temporaries (MiB)": of.get("temp", np.nan) / 2**20, "at most (MiB)": peak / 2**20,
                "ms a step": f"{np.median(seconds):.2f} ({seconds.min():.2f}–{seconds.max():.2f})",
                "FLOPs": of["FLOPs"] / first["FLOPs"], "compile (s)": of.get("compile s", np.nan), "error": of.get("error", ""),
            })  # fmt: skip
        device = jax.devices()[0].device_kind
        Console().print(policy_table(rows, title=f"{config.depth} blocks, {config.width} wide, {device}"))
        told = {"device": device, "jax": jax.__version__, "found": found}
        (folder / "table.json").write_text(json.dumps(told, indent=1) + "\n")
        (folder / "table.md").write_text(to_markdown(rows) + "\n")
    Console(soft_wrap=True).print(f"written to {folder}: config.json, table.json, table.md", highlight=False)
    return found


if __name__ == "__main__":
    sys.exit(_run.start(Config, main, __doc__))
