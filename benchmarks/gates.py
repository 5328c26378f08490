"""The check that each provider must pass before it is measured.

Its gate is red if its error against float64, in the value or in one part of the gradient, is above
`allowed` times that of torch's own function on the same input. What rounding alone may do is never
red: half a unit in the last place of the part's largest number, and four of those in a loss, which
is one number, so that torch's own error in it is a matter of luck. A naive form exceeds torch's
error by its nature; it is held to being right in a few digits on these moderate inputs.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Tensor]
Errors = dict[str, float]  # largest absolute error of each part: of the value first


class Inputs(NamedTuple):
    """One call of an op, and of which tensors it is differentiated."""

    arguments: tuple[Tensor, ...]
    keywords: dict[str, Any]
    wanted: tuple[Tensor, ...]  # the gradients are of these; none: the value alone is wanted
    upstream: Tensor | None = None  # None: the value is a scalar

    def value(self, function: Function) -> Tensor:
        return function(*self.arguments, **self.keywords)

    def gradients(self, value: Tensor) -> tuple[Tensor, ...]:
        if not self.wanted:
            return ()
        return torch.autograd.grad(value, self.wanted, self.upstream)

    def copied(self) -> "Inputs":
        """The same call on leaves of its own; of the calls whose first argument is the leaf."""
        (leaf,) = self.wanted
        assert self.arguments[0] is leaf
        copy = leaf.detach().clone().requires_grad_()
        return self._replace(arguments=(copy, *self.arguments[1:]), wanted=(copy,))

    def restore(self, original: "Inputs") -> None:
        """Put the values of the call that this one was copied from back into its leaves."""
        with torch.no_grad():
            for mine, source in zip(self.wanted, original.wanted, strict=True):
                mine.copy_(source)


def red(
    errors: Errors, torch_errors: Errors, largest: Errors, allowed: float | None, dtype: torch.dtype
) -> str:
    """Why the gate is red; empty if it is green. `allowed` None: only roughly right."""
    for part, error in errors.items():
        own, value = torch_errors[part], largest[part]
        if allowed is None:
            limit = value * (0.05 if dtype.itemsize < 4 else 1e-4)
        else:
            rounding = torch.finfo(dtype).eps * (2 if part == "loss" else 0.5)
            limit = max(allowed * own, rounding * value)
        if not error <= limit:  # NaN is red too
            return (
                f"error {error:.2e} in {part} against float64, allowed {limit:.2e} "
                f"(torch's own {own:.2e})"
            )
    return ""


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


# ---- attention ----


def attention_errors(
    inputs: Inputs, functions: dict[str, Function]
) -> tuple[dict[str, Errors], Errors]:
    """The errors of each function in the output and each gradient, and the largest reference
    values they are errors of. The reference is torch's function in float64, for one key head at a
    time: on a GPU that function holds L x S scores.
    """

    def parts(inputs: Inputs, function: Function) -> dict[str, Tensor]:
        output = inputs.value(function)
        names = ("output", "grad_query", "grad_key", "grad_value")
        return dict(zip(names, (output.detach(), *inputs.gradients(output)), strict=True))

    assert inputs.upstream is not None
    got = {name: parts(inputs, function) for name, function in functions.items()}
    errors: dict[str, Errors] = {name: {} for name in functions}
    largest: Errors = {}
    query, key, _ = inputs.arguments
    H, group = key.shape[1], query.shape[1] // key.shape[1]
    for b, h in itertools.product(range(key.shape[0]), range(H)):

        def of_head(x: Tensor, b: int = b, h: int = h) -> Tensor:
            """Of the key head, or of the query heads that it serves."""
            heads = x.shape[1] // H
            return x.detach()[b : b + 1, h * heads : (h + 1) * heads]

        wide = tuple(of_head(x).double().requires_grad_() for x in inputs.arguments)
        keywords = {**inputs.keywords, "enable_gqa": group > 1}
        upstream = of_head(inputs.upstream).double()
        reference = parts(Inputs(wide, keywords, wide, upstream), F.scaled_dot_product_attention)
        for part, truth in reference.items():
            largest[part] = max(largest.get(part, 0.0), _largest(truth))
            for name in functions:
                error = _largest((of_head(got[name][part]) - truth).nan_to_num_(nan=math.inf))
                errors[name][part] = max(errors[name].get(part, 0.0), error)
    return errors, largest


# ---- cross-entropy ----


def cross_entropy_errors(
    inputs: Inputs, functions: dict[str, Function]
) -> tuple[dict[str, Errors], Errors]:
    """The errors of each function in the loss, in the gradient of the target's column and in that
    of the others, and the largest reference values they are errors of.

    The reference is computed for a few rows at a time: the logits in float64 would not fit.
    """
    (leaf,), target = inputs.wanted, inputs.arguments[1].flatten()
    classes = leaf.shape[-1]
    losses, gradients = {}, {}
    for name, function in functions.items():
        loss = inputs.value(function)
        losses[name] = loss.item()
        (gradient,) = inputs.gradients(loss)
        gradients[name] = gradient.reshape(-1, classes)

    errors = {name: {"loss": 0.0, "target": 0.0, "others": 0.0} for name in functions}
    largest = {"loss": 0.0, "target": 0.0, "others": 0.0}
    logits = leaf.detach().reshape(-1, classes)
    rows = len(logits)
    step = max(1, (8 << 20) // classes)
    for start in range(0, rows, step):
        some = slice(start, start + step)
        column = target[some].unsqueeze(1)
        log_p = torch.log_softmax(logits[some].double(), 1)
        largest["loss"] -= log_p.gather(1, column).sum().item() / rows
        reference = log_p.exp_()
        reference.scatter_add_(1, column, torch.full_like(column, -1, dtype=torch.float64))
        reference /= rows
        _update(largest, reference, column)
        for name in functions:
            _update(errors[name], gradients[name][some].double() - reference, column)
    for name in functions:
        errors[name]["loss"] = abs(losses[name] - largest["loss"])
    return errors, largest


def _update(errors: Errors, difference: Tensor, column: Tensor) -> None:
    difference = difference.abs().nan_to_num_(nan=math.inf)  # which max() would pass over
    errors["target"] = max(errors["target"], _largest(difference.gather(1, column)))
    errors["others"] = max(errors["others"], _largest(difference.scatter_(1, column, 0)))


# ---- linear cross-entropy ----


def linear_cross_entropy_errors(
    inputs: Inputs, functions: dict[str, Function]
) -> tuple[dict[str, Errors], Errors]:
    """The errors of each function in the loss, in the gradient of the inputs and in those of the
    rows of the matrix, of classes that are some row's target and of others, which are much smaller;
    and the largest reference values they are errors of.

    The reference is computed for a few rows at a time: the logits in float64 would not fit.
    """
    x, W, target = (tensor.detach() for tensor in inputs.arguments)
    got = {}
    for name, function in functions.items():
        loss = inputs.value(function)
        got[name] = loss.item(), inputs.gradients(loss)

    kept = target.ge(0).nonzero().squeeze(1)  # the ignored rows have gradients of 0
    wide = W.double()
    of_input = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    of_weight = torch.zeros_like(wide)
    truth = 0.0
    for rows in kept.split(max(1, (32 << 20) // len(W))):
        column = target[rows].unsqueeze(1)
        some = x[rows].double()
        log_p = torch.log_softmax(some @ wide.t(), 1)
        truth -= log_p.gather(1, column).sum().item() / len(kept)
        if inputs.wanted:
            gradient = log_p.exp_().scatter_add_(
                1, column, torch.full_like(column, -1, dtype=torch.float64)
            )
            gradient /= len(kept)
            of_input[rows] = gradient @ wide
            of_weight.addmm_(gradient.t(), some)

    largest = {"loss": abs(truth)}
    errors = {name: {"loss": abs(loss - truth)} for name, (loss, _) in got.items()}
    if inputs.wanted:
        targets = torch.zeros(len(W), dtype=torch.bool, device=W.device)
        targets[target[kept]] = True
        largest |= _linear_parts(of_input, of_weight, targets)
        for name, (_, (own_of_input, own_of_weight)) in got.items():
            errors[name] |= _linear_parts(
                own_of_input - of_input, own_of_weight - of_weight, targets
            )
    return errors, largest


def _linear_parts(of_input: Tensor, of_weight: Tensor, targets: Tensor) -> Errors:
    rows = of_weight.abs().amax(1).nan_to_num_(nan=math.inf)
    return {
        "input": _largest(of_input.abs().nan_to_num_(nan=math.inf)),
        "targets' weight": _largest(rows.where(targets, 0)),
        "others' weight": _largest(rows.where(~targets, 0)),
    }
