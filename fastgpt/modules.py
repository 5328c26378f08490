"""The `nn.Module` forms of the public functions."""

import math
from typing import Any

import torch
from torch import Tensor

from fastgpt.functional import cross_entropy, linear_cross_entropy


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


def linear_arguments(module: Any) -> dict[str, Any]:
    """What a module of linear cross-entropy, torch's or ours, has for the function's arguments."""
    shape, bias = (module.num_classes, *module.out_features), module.linear.bias
    return {
        "linear_weight": module.linear.weight.view(*shape, module.linear.in_features),
        "linear_bias": None if bias is None else bias.view(shape),
        "weight": module.weight,
        "reduction": module.reduction,
        "ignore_index": module.ignore_index,
        "label_smoothing": module.label_smoothing,
    }


class LinearCrossEntropyLoss(torch.nn.Module):
    """`torch.nn.LinearCrossEntropyLoss` (torch 2.13) on the fused kernels: same arguments, same
    state (`linear.weight`, `linear.bias` and `weight`), on any torch, and the further keywords of
    `fastgpt.linear_cross_entropy`.

    `forward(input, target)` takes the shapes and types of `fastgpt.linear_cross_entropy`. To share
    the matrix with an embedding, assign the embedding's parameter to `linear.weight`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        return_lse: bool = False,
        process_group: "torch.distributed.ProcessGroup | None" = None,
        shift: bool = False,
        filter_eps: float | None = None,
        recompute: bool = False,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(
                f"expected weight of shape {[num_classes]}, one for each class, got "
                f"{list(weight.shape)}"
            )
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"expected label_smoothing between 0 and 1, got {label_smoothing}")
        super().__init__()
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        self.linear = torch.nn.Linear(
            in_features, math.prod(out_features, start=num_classes), bias, device, dtype
        )
        self.register_buffer("weight", weight)
        self.weight: Tensor | None
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.extras: dict[str, Any] = {
            "options": options,
            "z_loss": z_loss,
            "softcap": softcap,
            "return_lse": return_lse,
            "process_group": process_group,
            "shift": shift,
            "filter_eps": filter_eps,
            "recompute": recompute,
        }

    def arguments(self) -> dict[str, Any]:
        """Those of `linear_cross_entropy` but input and target."""
        return linear_arguments(self) | self.extras

    def forward(self, input: Tensor, target: Tensor) -> Any:
        return linear_cross_entropy(input, target=target, **self.arguments())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
            f"out_features={self.out_features}, reduction={self.reduction}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
        )
