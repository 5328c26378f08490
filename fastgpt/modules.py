"""The `nn.Module` forms of the public functions."""

from typing import Any

import torch
from torch import Tensor

from fastgpt.functional import cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on the fused kernels: same arguments, same state, and the further
    keywords of `fastgpt.cross_entropy`.

    `forward(input, target)` takes the shapes and types of `fastgpt.cross_entropy`.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        inplace_backward: bool = False,
        return_lse: bool = False,
        process_group: "torch.distributed.ProcessGroup | None" = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.extras: dict[str, Any] = {
            "z_loss": z_loss,
            "softcap": softcap,
            "inplace_backward": inplace_backward,
            "return_lse": return_lse,
            "process_group": process_group,
        }

    def forward(self, input: Tensor, target: Tensor) -> Any:
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **self.extras,
        )
