"""The `nn.Module` forms of the public functions."""

import torch
from torch import Tensor

from fastgpt.functional import cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on the fused kernels: same arguments, same state.

    `forward(input, target)` takes the shapes and types of `fastgpt.cross_entropy`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
