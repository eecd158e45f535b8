"""The GPT in PyTorch, as nanoGPT writes it: fused projections, scaled_dot_product_attention, a fused AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from experiments.bench import data
from experiments.bench.rows import GPT as Work, Settings

EPS = 1e-6
"""Of the norms: Flax's default, so that the twins are one model."""


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, work: Work):
        super().__init__()
        width, self.heads, fused = work.width, work.heads, work.fused_qkv
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=EPS) for _ in range(2))
        self.qkv = nn.ModuleList(
            [nn.Linear(width, 3 * width)] if fused else [nn.Linear(width, width) for _ in range(3)]
        )
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BxTxD):
        h_BxTxD = self.norm1(x_BxTxD)
        made = [project(h_BxTxD) for project in self.qkv]
        parts = made[0].chunk(3, -1) if len(made) == 1 else made
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts)
        y_BxHxTxK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BxTxD = x_BxTxD + self.out(y_BxHxTxK.transpose(1, 2).flatten(2))
        return x_BxTxD + self.down(F.gelu(self.up(self.norm2(x_BxTxD)), approximate="tanh"))


class GPT(nn.Module):
    """From tokens and the tokens that follow to the mean loss, as one graph."""

    def __init__(self, work: Work):
        super().__init__()
        self.embed = nn.Embedding(work.vocabulary, work.width)
        self.positions = nn.Parameter(torch.empty(1, work.context, work.width))
        self.layers = nn.ModuleList(Block(work) for _ in range(work.layers))
        self.norm = nn.LayerNorm(work.width, eps=EPS)
        for table in (self.embed.weight, self.positions):
            nn.init.normal_(table, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)  # LeCun's, as in Flax
                nn.init.zeros_(module.bias)

    def forward(self, token_BxT, next_BxT):
        x_BxTxD = self.embed(token_BxT) + self.positions
        for layer in self.layers:
            x_BxTxD = layer(x_BxTxD)
        logits_BxTxV = F.linear(self.norm(x_BxTxD), self.embed.weight)
        return F.cross_entropy(logits_BxTxV.flatten(0, 1), next_BxT.flatten())


def copy_params(model: GPT, params: Mapping[str, Any]) -> None:
    """Take the params of the Flax twins, so that all begin alike. Flax's kernels lie the other way round."""

    def norm(module: nn.Module, source: Mapping[str, Any]) -> dict:
        return {module.weight: source["scale"], module.bias: source["bias"]}

    def linear(module: nn.Module, source: Mapping[str, Any]) -> dict:
        return {module.weight: np.asarray(source["kernel"]).T, module.bias: source["bias"]}

    pairs = {model.embed.weight: params["embed"]["embedding"], model.positions: params["positions"]}
    pairs |= norm(model.norm, params["norm"])
    for n, layer in enumerate(model.layers):
        source = params[f"layers_{n}"]
        names = ("qkv",) if len(layer.qkv) == 1 else ("query", "key", "value")
        for module, name in zip(layer.qkv, names, strict=True):
            pairs |= linear(module, source["attention"][name])
        pairs |= linear(layer.out, source["attention"]["out"])
        for name in ("up", "down"):
            pairs |= linear(getattr(layer, name), source[name])
        for name in ("norm1", "norm2"):
            pairs |= norm(getattr(layer, name), source[name])
    with torch.no_grad():
        for target, value in pairs.items():
            target.copy_(torch.from_numpy(np.array(value)))


def build(work: Work, settings: Settings, device: str) -> tuple[nn.Module, torch.optim.Optimizer, tuple]:
    """The model, its optimizer, and what the model is called with."""
    model = GPT(work).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=device == "cuda"
    )
    token_BxT1 = torch.from_numpy(data.tokens(work, settings.seed)).long().to(device)
    return model, optimizer, (token_BxT1[:, :-1].contiguous(), token_BxT1[:, 1:].contiguous())
