"""Gradients that vanish in float16, and the loss scale that brings them back.

Question   how much of a gradient is lost below float16's smallest number, and does loss scaling recover it?
Model      a deep sigmoid MLP in plain functions (no Flax). A sigmoid keeps activations near 0.5 and has a slope of at most
           1/4, so that each layer's gradient is a fraction of that of the layer after it.
Method     the same weights and digits four times: float64 (the reference), float16 without a scale, float16 with a static
           scale, and with the dynamic one from mpjax. For each layer: the share of gradient elements that are zero but
           are not in float64, and the relative error ‖g − g64‖ / ‖g64‖.
Expect     unscaled, the layers near the input vanish; scaled, every layer agrees with float64 to float16's accuracy.
Time       10 seconds on 2 CPU cores.
Run        python -m experiments.numerics_underflow --depth=12
Source     Micikevicius et al., Mixed Precision Training (2018), section 3.2.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys

import jax
import numpy as np
from rich.console import Console

import mpjax
from experiments import _data, _run
from mpjax.measure.plots import gradient_underflow
from mpjax.measure.table import policy_table, to_markdown


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, with its unit."""

    depth: int = 8
    """Hidden layers."""
    width: int = 64
    """Features a hidden layer."""
    gain: float = 1.0
    """Scale of the initial weights, in units of 1/√inputs."""
    batch_size: int = 128
    """Digits in the one batch."""
    static_scale: float = 2.0**15
    """The static loss scale, a factor."""
    seed: int = 0
    """Weights and data are derived from it (mpjax.seeds)."""
    workdir: str | None = None
    """The run's own folder, new or empty. Default: runs/numerics_underflow-date-time."""


def init(config: Config, seeds: mpjax.Seeds) -> list[np.ndarray]:
    """Weights of each layer, float64, exactly representable in float16 so that every precision starts alike."""
    sizes = [64, *[config.width] * config.depth, 10]
    random = np.random.default_rng(seeds.seed)
    weights = [random.normal(0, config.gain / np.sqrt(n), (n, m)) for n, m in itertools.pairwise(sizes)]
    return [w.astype(np.float16).astype(np.float64) for w in weights]


def loss_fn(params, image_BxF, label_B):
    """Mean cross-entropy of an MLP that computes in the dtype of its params."""
    h_BxF = image_BxF
    for w in params[:-1]:
        h_BxF = jax.nn.sigmoid(h_BxF @ w)
    return mpjax.losses.softmax_cross_entropy(h_BxF @ params[-1], label_B).mean()


def gradients(config: Config, dtype: str, loss_scale) -> tuple[list[np.ndarray], float]:
    """The gradient of each layer, as float64, and the scale under which it was found.

    A dynamic scale is given 60 tries: it shrinks while a gradient overflows, as the train step would let it.
    """
    seeds = mpjax.seeds(config.seed)
    data = _data.digits(config.seed).train
    image = data["image"][: config.batch_size].reshape(config.batch_size, -1)
    policy = mpjax.get_policy(dtype)
    args = policy.cast_to_compute((init(config, seeds), image)), data["label"][: config.batch_size]
    differentiate = jax.jit(lambda scale, x, label: mpjax.scaled_value_and_grad(loss_fn, scale)(*x, label)[1])
    grads = differentiate(loss_scale, *args)
    for _ in range(60):
        if mpjax.all_finite(grads):
            break
        loss_scale = loss_scale.adjust(mpjax.all_finite(grads))
        grads = differentiate(loss_scale, *args)
    return [np.asarray(g, np.float64) for g in grads], float(np.asarray(loss_scale.loss_scale))


def main(config: Config) -> dict[str, dict[str, list[float]]]:
    """Compare the four; returns for each the vanished share and the relative error of every layer."""
    folder = _run.open_folder(config, "numerics_underflow", goes_on=False)
    with jax.enable_x64(True):
        reference, _ = gradients(config, "f64", mpjax.NoOpLossScale())
    runs = {
        "unscaled": gradients(config, "f16", mpjax.NoOpLossScale()),
        "static scale": gradients(config, "f16", mpjax.static_loss_scale(config.static_scale)),
        "dynamic scale": gradients(config, "f16", mpjax.dynamic_loss_scale(2.0**24)),
    }
    found = {}
    for name, (grads, _) in runs.items():
        pairs = list(zip(grads, reference, strict=True))
        vanished = [float(((g == 0) & (r != 0)).sum() / max((r != 0).sum(), 1)) for g, r in pairs]
        error = [float(np.linalg.norm(g - r) / np.linalg.norm(r)) for g, r in pairs]
        found[name] = {"vanished": vanished, "error": error}
    layers = [f"layer {n}" for n in range(len(reference))]
    rows = [
        {
            "run": name,
            "scale": runs[name][1],
            "vanished, worst layer": max(v["vanished"]),
            "relative error, worst layer": max(v["error"]),
        }
        for name, v in found.items()
    ]
    Console().print(policy_table(rows, title="float16 gradients against float64"))
    shares, errors = ({name: v[key] for name, v in found.items()} for key in ("vanished", "error"))
    with folder.begin() as path:
        (path / "layers.json").write_text(json.dumps({"layers": layers, **found}, indent=2) + "\n")
        gradient_underflow(layers, shares, errors, path / "underflow.png")
        (path / "table.md").write_text(to_markdown(rows) + "\n")
    Console().print(f"written to {path}: config.json, layers.json, table.md, underflow.png")
    return found


if __name__ == "__main__":
    sys.exit(_run.start(Config, main, __doc__))
