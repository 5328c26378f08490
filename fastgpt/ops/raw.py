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


def one_by_one(info: Any, in_dims: tuple[int | None, ...], operator: Any, inputs: Any) -> Any:
    """A batch of problems, one after another: the outputs and their batch dimensions, for a vmap
    rule.
    """
    outputs = [
        operator(
            *(
                x if dim is None else x.select(dim, i)
                for x, dim in zip(inputs, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs), 0
    return tuple(map(torch.stack, zip(*outputs, strict=True))), (0,) * len(outputs[0])


def transformed() -> bool:
    """Whether a transform of torch.func, a dual level or the compiler surrounds the call."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def below_autograd(operator: Any, *arguments: Any) -> Any:
    """What a raw operator returns where nothing is to be differentiated: its derivatives, which
    `register_autograd` keeps in Python, are not asked.
    """
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def sum_rows(rows: Tensor) -> Tensor:
    """The sum of all numbers, with the same bits for any number of threads.

    torch gives each thread a stretch of a long vector, and the bits depend on where it is cut. A
    matrix is cut between its rows, so a long vector is summed as one first.
    """
    columns = 4096
    rows = rows.reshape(-1)
    if rows.shape[0] <= columns:
        return rows.sum()
    return (
        torch.nn.functional.pad(rows, (0, -rows.shape[0] % columns)).view(-1, columns).sum(1).sum()
    )


@torch.compiler.assume_constant_result
def differentiates() -> bool:
    """Whether a transform of torch.func or a dual level surrounds the call, in a compiled function,
    too: a constant for the compiler, which traces each stack of transforms anew.
    """
    return (
        bool(torch._C._functorch.get_interpreter_stack())
        or torch.autograd.forward_ad._current_level >= 0
    )
