"""The optimiser and its schedule."""

import math

import torch
from torch import nn

from .config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of a step: a linear rise to `lr`, then half a cosine down to `min_lr`.

    The first step is 0, the last is `config.steps` - 1. (Loshchilov & Hutter 2017.)
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(config.steps - 1 - config.warmup, 1)  # 0 ... 1
    share = (1 + math.cos(math.pi * min(done, 1.0))) / 2  # 1 ... 0
    return config.last_lr + share * (config.lr - config.last_lr)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) that decays the matrices, and neither biases nor gains."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)
