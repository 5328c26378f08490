"""Linear cross-entropy in torch operations: the logits, whole, and their cross-entropy."""

from typing import Any

import torch
from torch import Tensor

from fastgpt.backends.eager.cross_entropy import cross_entropy


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int = -100,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Loss and lse of each row, (N,), of inputs (N, D) and a matrix (C, D); the options are
    `ops`' Options. The logits are of the inputs' type.
    """
    if not target.is_floating_point():
        # What an ignored row holds, NaN included, must reach no gradient: 0 * NaN is NaN.
        input = input.masked_fill((target == ignore_index).unsqueeze(1), 0)
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    return cross_entropy(logits, target, weight, ignore_index, *options)
