"""`explain`: which kernel a call would run on."""

import inspect
from typing import Any, NamedTuple

import torch

from fastgpt import dispatch
from fastgpt.dispatch import Decision
from fastgpt.functional.attention import check_attention, scaled_dot_product_attention
from fastgpt.functional.linear_loss import check_linear_cross_entropy, linear_cross_entropy
from fastgpt.functional.loss import check_cross_entropy, cross_entropy


class Explanation(NamedTuple):
    """Which backend would run a call, and the decision on each backend asked, the last one yes."""

    op: str
    device: str
    backend: str
    decisions: tuple[Decision, ...]
    kernels: str = ""  # which of two generations of the backend's kernels, and why

    def __str__(self) -> str:
        runs = f"{self.op} on {self.device} runs on {self.backend}"
        skipped = [f"\n  {d.backend}: {d.reason}" for d in self.decisions[:-1]]
        return runs + (f", {self.kernels}" if self.kernels else "") + "".join(skipped)


def explain(function: Any, /, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend `function(*args, **kwargs)` would run on, and why not on those preferred to it.

    `function` is `fastgpt.cross_entropy`, `linear_cross_entropy` or `scaled_dot_product_attention`,
    torch's function of one of these names (answered as inside `fastgpt.drop_in()`), or a
    `CrossEntropyLoss` or `LinearCrossEntropyLoss` module. Checks the arguments and raises as the
    call would; runs nothing. Any other function is a TypeError.
    """
    F = torch.nn.functional
    if arguments := _linear_arguments(function):
        names = {"input": 0, "target": 1}
        found = {name: args[i] for name, i in names.items() if i < len(args)}
        args, kwargs, function = (), {**arguments, **found, **kwargs}, linear_cross_entropy
    if isinstance(function, torch.nn.CrossEntropyLoss):
        kwargs = {
            "weight": function.weight,
            "ignore_index": function.ignore_index,
            "reduction": function.reduction,
            "label_smoothing": function.label_smoothing,
            **getattr(function, "extras", {}),
            **kwargs,
        }
        function = cross_entropy
    if function in (cross_entropy, F.cross_entropy):
        op, call = "cross_entropy", _bind(cross_entropy, check_cross_entropy, args, kwargs)
        device = call.logits.device.type
    elif function in (linear_cross_entropy, getattr(F, "linear_cross_entropy", None)):
        op = "linear_cross_entropy"
        call = _bind(linear_cross_entropy, check_linear_cross_entropy, args, kwargs)
        device = call.input.device.type
    elif function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        op = "scaled_dot_product_attention"
        call = _bind(scaled_dot_product_attention, check_attention, args, kwargs)
        device = call.query.device.type
    else:
        raise TypeError(
            "explain: expected cross_entropy, linear_cross_entropy, scaled_dot_product_attention, "
            f"a CrossEntropyLoss or a LinearCrossEntropyLoss, got {function!r}"
        )
    decisions = tuple(dispatch.choose(op, device, call))
    backend = decisions[-1].backend
    kernels = dispatch.lookup(op, backend, device).kernels(call)
    return Explanation(op, device, backend, decisions, kernels)


def _linear_arguments(module: Any) -> dict[str, Any]:
    """What a module of linear cross-entropy, ours or torch's, passes on beside input and target."""
    from fastgpt.modules import LinearCrossEntropyLoss, linear_arguments  # they import this package

    if isinstance(module, LinearCrossEntropyLoss):
        return module.arguments()
    if isinstance(module, getattr(torch.nn, "LinearCrossEntropyLoss", ())):
        return linear_arguments(module)
    return {}


def _bind(public: Any, check: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    bound = inspect.signature(public).bind(*args, **kwargs)
    bound.apply_defaults()
    return check(*bound.arguments.values())
