"""Who is measured, and the check that each must pass before it is.

A provider is a function (logits, target) -> mean loss. Its gate is red, and it is not measured, if
its error against float64 in the loss, in the gradient of the target's column or in that of the
others is above `allowed` times that of `torch.nn.functional.cross_entropy` on the same input. What
rounding alone may do is never red: half a unit in the last place of the largest gradient, and four
of those in the loss, which is one number, so that torch's own error in it is a matter of luck. The
naive form exceeds torch's error by its nature; it is held to being right in a few digits on these
moderate logits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgpt
from benchmarks.shapes import CrossEntropyShape
from fastgpt.backends.eager.cross_entropy import naive_cross_entropy

LossFunction = Callable[[Tensor, Tensor], Tensor]


class UnavailableError(Exception):
    """A provider can't run here, or not on this shape; the text is printed in its row."""


@dataclass(frozen=True)
class Provider:
    name: str
    build: Callable[[CrossEntropyShape], LossFunction]  # may raise UnavailableError
    allowed: float | None = 2.0  # times torch's own error; None: only roughly right


def _fastgpt(shape: CrossEntropyShape) -> LossFunction:
    return fastgpt.cross_entropy


def _eager(shape: CrossEntropyShape) -> LossFunction:
    return F.cross_entropy


def _compiled(shape: CrossEntropyShape) -> LossFunction:
    """Compiled for this very shape, and warmed up on it."""
    torch._dynamo.reset()
    compiled = torch.compile(F.cross_entropy, dynamic=False, fullgraph=True)
    leaf, logits, target = shape.inputs()
    try:
        torch.autograd.grad(compiled(logits, target), leaf)
    except torch._dynamo.exc.BackendCompilerFailed as error:  # for example, no C++ compiler
        inner = error.inner_exception
        first = (str(inner).strip().splitlines() or [""])[0]
        raise UnavailableError(f"{type(inner).__name__}: {first}") from error
    return compiled


def _naive(shape: CrossEntropyShape) -> LossFunction:
    if shape.sequence:
        raise UnavailableError("takes (N, C) only")
    return naive_cross_entropy


FASTGPT = "fastgpt"
EAGER = "torch eager"
COMPILED = "torch.compile"
NAIVE = "naive"

CROSS_ENTROPY = (
    Provider(FASTGPT, _fastgpt),
    Provider(EAGER, _eager),
    Provider(COMPILED, _compiled),
    Provider(NAIVE, _naive, allowed=None),
)


# ---- the gate ----


@dataclass
class Errors:
    """Largest absolute errors against float64."""

    loss: float
    target: float = 0.0  # of the gradient of the target's column
    others: float = 0.0  # of the gradient elsewhere


def cross_entropy_errors(
    shape: CrossEntropyShape, functions: dict[str, LossFunction]
) -> tuple[dict[str, Errors], Errors]:
    """The errors of each function, and the largest reference values they are errors of.

    The reference is computed for a few rows at a time: the logits in float64 would not fit.
    """
    leaf, logits, target = shape.inputs()
    losses, gradients = {}, {}
    for name, function in functions.items():
        loss = function(logits, target)
        losses[name] = loss.item()
        (gradient,) = torch.autograd.grad(loss, leaf)
        gradients[name] = gradient.reshape(shape.rows, shape.classes)

    errors = {name: Errors(0.0) for name in functions}
    largest = Errors(0.0)
    rows = leaf.detach().view(shape.rows, shape.classes)
    flat_target = target.flatten()
    total = 0.0
    step = max(1, (8 << 20) // shape.classes)
    for start in range(0, shape.rows, step):
        some = slice(start, start + step)
        column = flat_target[some].unsqueeze(1)
        log_p = torch.log_softmax(rows[some].double(), 1)
        total -= log_p.gather(1, column).sum().item()
        reference = log_p.exp_()
        reference.scatter_add_(1, column, torch.full_like(column, -1, dtype=torch.float64))
        reference /= shape.rows
        _update(largest, reference.abs(), column)
        for name in functions:
            _update(errors[name], (gradients[name][some].double() - reference).abs_(), column)
    largest.loss = total / shape.rows
    for name in functions:
        errors[name].loss = abs(losses[name] - largest.loss)
    return errors, largest


def _update(errors: Errors, difference: Tensor, column: Tensor) -> None:
    difference = difference.nan_to_num(nan=math.inf)  # which max() below would pass over
    errors.target = max(errors.target, difference.gather(1, column).max().item())
    errors.others = max(errors.others, difference.scatter_(1, column, 0).max().item())


def red(
    provider: Provider, errors: Errors, torch_errors: Errors, largest: Errors, dtype: torch.dtype
) -> str:
    """Why the gate is red; empty if it is green."""
    for part in ("loss", "target", "others"):
        error, own, value = (getattr(e, part) for e in (errors, torch_errors, largest))
        if provider.allowed is None:
            limit = value * (0.05 if dtype.itemsize < 4 else 1e-4)
        else:
            rounding = torch.finfo(dtype).eps * (2 if part == "loss" else 0.5)
            limit = max(provider.allowed * own, rounding * value)
        if not error <= limit:  # NaN is red too
            where = "the loss" if part == "loss" else f"the gradient ({part})"
            return (
                f"{provider.name}: error {error:.2e} in {where} against float64, allowed "
                f"{limit:.2e} (torch's own {own:.2e})"
            )
    return ""
