"""The ResNet in PyTorch, channels last. Written out, since torchvision need not be there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from experiments.bench import data
from experiments.bench.rows import ResNet as Work, Settings


def conv(inputs: int, outputs: int, taps: int, stride: int = 1) -> nn.Conv2d:
    """Without a bias: a norm follows."""
    return nn.Conv2d(inputs, outputs, taps, stride, padding=taps // 2, bias=False)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions round a shortcut; the stride is in the 3×3 (v1.5)."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        nn.init.zeros_(self.norm3.weight)
        self.fits = stride == 1 and inputs == 4 * width
        if not self.fits:
            self.shortcut, self.shortcut_norm = conv(inputs, 4 * width, 1, stride), nn.BatchNorm2d(4 * width)

    def forward(self, x_BxCxHxW):
        y_BxCxHxW = F.relu(self.norm1(self.conv1(x_BxCxHxW)))
        y_BxCxHxW = F.relu(self.norm2(self.conv2(y_BxCxHxW)))
        y_BxCxHxW = self.norm3(self.conv3(y_BxCxHxW))
        if not self.fits:
            x_BxCxHxW = self.shortcut_norm(self.shortcut(x_BxCxHxW))
        return F.relu(x_BxCxHxW + y_BxCxHxW)


class ResNet(nn.Module):
    """From pictures and labels to the mean loss, as one graph."""

    def __init__(self, work: Work):
        super().__init__()
        self.stem, self.norm = conv(3, work.width, 7, 2), nn.BatchNorm2d(work.width)
        blocks, inputs = {}, work.width
        for stage, count in enumerate(work.stages):
            for n in range(count):
                blocks[f"stage{stage}_{n}"] = Bottleneck(inputs, work.width * 2**stage, 2 if stage and not n else 1)
                inputs = 4 * work.width * 2**stage
        self.blocks, self.head = nn.ModuleDict(blocks), nn.Linear(inputs, work.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)  # LeCun's, as in Flax

    def forward(self, image_BxCxHxW, label_B):
        x_BxCxHxW = F.max_pool2d(F.relu(self.norm(self.stem(image_BxCxHxW))), 3, 2, padding=1)
        for block in self.blocks.values():
            x_BxCxHxW = block(x_BxCxHxW)
        return F.cross_entropy(self.head(x_BxCxHxW.mean((2, 3))), label_B)


def copy_params(model: ResNet, params: Mapping[str, Any]) -> None:
    """Take the params of the Flax twins, so that all begin alike."""
    places = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    orders = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
    with torch.no_grad():
        for name, module in model.named_modules():
            source: Any = params
            for part in name.removeprefix("blocks.").split("."):
                source = source.get(part, {}) if part else {}
            for key, value in source.items():
                if key in places:
                    value = np.asarray(value).transpose(orders[np.ndim(value)])
                    getattr(module, places[key]).copy_(torch.from_numpy(np.array(value)))


def build(work: Work, settings: Settings, device: str) -> tuple[nn.Module, torch.optim.Optimizer, tuple]:
    """The model, its optimizer, and what the model is called with."""
    model = ResNet(work).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=device == "cuda")
    batch = data.pictures(work, settings.seed)
    image = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).to(device, memory_format=torch.channels_last)
    return model, optimizer, (image, torch.from_numpy(batch["label"]).long().to(device))
