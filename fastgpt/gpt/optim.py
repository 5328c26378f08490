"""The optimiser, and the learning rate of each step."""

import math

import torch
from torch import Tensor, nn

from .config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of a step: a linear rise to `lr`, then what `config.schedule` says.

    The first step is 0, the last is `config.steps` - 1. After the warm-up:

    cosine: half a cosine from `lr` down to `min_lr` (Loshchilov & Hutter 2017).
    step: `lr` times `decay_factor` for each `decay_every` steps done, `min_lr` at the least.
    wsd: warm-up, stable, decay (Hu et al. 2024): `lr`, and over the last `decay_share` of the steps
        a line down to `min_lr`. The stable part does not depend on `steps`, so that a run can be
        given more of them before its decay begins.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    last = config.steps - 1
    if config.schedule == "step":
        decays = (step - config.warmup) // config.steps_to_decay
        return max(config.lr * config.decay_factor**decays, config.last_lr)
    if config.schedule == "wsd":
        decay = round(config.decay_share * config.steps)
        share = min(max(last - step, 0) / max(decay, 1), 1.0)  # 1 ... 1 ... 0
    else:
        done = (step - config.warmup) / max(last - config.warmup, 1)  # 0 ... 1
        share = (1 + math.cos(math.pi * min(done, 1.0))) / 2  # 1 ... 0
    return config.last_lr + share * (config.lr - config.last_lr)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) that decays the matrices, and neither biases nor gains."""
    groups: dict[tuple[bool, type[Tensor]], list[Tensor]] = {}
    for parameter in model.parameters():
        # One kernel can't take parameters that fully_shard has cut up with others.
        kind = type(parameter.data)
        groups.setdefault((parameter.dim() >= 2, kind), []).append(parameter)
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in model.parameters())
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": config.weight_decay if is_matrix else 0.0}
            for (is_matrix, _), parameters in sorted(groups.items(), key=lambda g: not g[0][0])
        ],
        lr=config.lr, betas=config.betas, fused=fused,
    )  # fmt: skip
