"""What the raw operators of all ops share."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launcher(NamedTuple):
    """A backend's two raw operators, with the signatures that the op's `define` gives them."""

    forward: Any
    backward: Any


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which kernels compute: float64 for itself, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fold(info: Any, in_dims: tuple[int | None, ...], tensors: tuple[Any, ...]) -> list[Any]:
    """A batch of problems as one problem with batch_size times as many rows. None stays None."""

    def batched(x: Tensor | None, dim: int | None) -> Tensor | None:
        if x is None:
            return None
        if dim is None:
            x, dim = x.expand(info.batch_size, *x.shape), 0
        return x.movedim(dim, 0).flatten(0, 1)

    return [batched(x, dim) for x, dim in zip(tensors, in_dims, strict=True)]


def transformed() -> bool:
    """Whether a transform of torch.func, a dual level or the compiler surrounds the call."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )
