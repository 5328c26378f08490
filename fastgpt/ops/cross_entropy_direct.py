"""Functions for calls outside of every transform: with less between the caller and the kernel.

`CrossEntropy` of ops/cross_entropy.py holds under vmap, jvp and the compiler, and its `apply` pays
for that some 25 µs. These two do not, so they are old-style Functions, without `setup_context`.

- `_Reduced` takes the reduction into the kernel, too. Its gradient under `create_graph=True` is
  `CrossEntropyBackward`, and so differentiable again.
- `_InPlace` writes the gradient over the logits. That can be done once, and not differentiated.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastgpt import dispatch
from fastgpt.backends.eager import cross_entropy as eager
from fastgpt.ops.cross_entropy import (
    LAUNCHERS,
    CrossEntropyBackward,
    CrossEntropyCall,
    Options,
    _refuse_weight_gradient,
    kernel_view,
    launch,
    new_gradient,
    shares,
)
from fastgpt.ops.raw import accumulator_dtype, transformed

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


class Reduced(NamedTuple):
    """The two operators of a namespace that take the reduction into the kernel."""

    forward: Any
    backward: Any


def define(namespace: str) -> None:
    """Define the operators of `_Reduced` in `namespace`, beside those of ops/cross_entropy.py; the
    kernels are registered elsewhere.

    The arguments are those of `cross_entropy_forward`; the loss is reduced, in the accumulator
    type. statistics, one vector of 4 rows + 1 numbers of that type, holds row_max and rest of each
    row, two more numbers of each row, and what a mean was divided by.
    """
    names = [f"{namespace}::cross_entropy_reduced{which}" for which in ("", "_backward")]
    forward, backward = names
    options = "int ignore_index, float hard, float spread, int reduction"
    torch.library.define(
        forward,
        f"(Tensor logits, Tensor target, Tensor? weight, {options})"
        " -> (Tensor loss, Tensor statistics)",
    )
    torch.library.define(
        backward,
        "(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, Tensor statistics,"
        f" {options}) -> Tensor",
    )
    torch.library.register_fake(forward, _new_reduced)
    torch.library.register_fake(
        backward, lambda grad_loss, logits, *_: new_gradient(grad_loss, None, logits)
    )
    operators = getattr(torch.ops, namespace)
    OPERATORS[namespace] = Reduced(
        operators.cross_entropy_reduced.default, operators.cross_entropy_reduced_backward.default
    )


def _new_reduced(
    logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    dtype = accumulator_dtype(logits.dtype)
    shape = target.shape if options[-1] == REDUCTIONS["none"] else ()
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(4 * target.numel() + 1, dtype=dtype),
    )


OPERATORS: dict[str, Reduced] = {}  # by namespace
define("fastgpt")


def serves(call: CrossEntropyCall) -> bool:
    """Whether `cross_entropy` of this module does a call that the native backend covers."""
    return not (
        call.z_loss
        or call.softcap
        or call.inplace_backward
        or call.return_lse
        or call.process_group is not None
        or call.target.is_floating_point()
        or transformed()
    )


class _Reduced(Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        hard: float,
        spread: float,
        reduction: int,
    ) -> Tensor:
        # Those beside the native backend's launcher, for the backward of this call, too.
        forward, ctx.operator = OPERATORS[LAUNCHERS["native"].forward.namespace]
        loss, statistics = launch(
            forward, logits, target, weight, ignore_index, hard, spread, reduction
        )
        ctx.save_for_backward(logits, target, weight, statistics)
        ctx.options = ignore_index, hard, spread, reduction
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        logits, target, weight, statistics = ctx.saved_tensors
        *options, reduction = ctx.options
        if not (torch.is_grad_enabled() or transformed()):
            gradient = ctx.operator(
                grad_loss, logits, target, weight, statistics, *options, reduction
            )
            return gradient, None, None, None, None, None, None
        _refuse_weight_gradient(ctx.needs_input_grad[2])
        # row_max, rest, two more numbers of each row, and what a mean is divided by.
        row_max, rest, _, _ = statistics[:-1].view(4, *target.shape)
        if reduction == REDUCTIONS["mean"]:
            grad_loss = grad_loss / statistics[-1]
        gradient = CrossEntropyBackward.apply(
            grad_loss.expand(target.shape), None, logits, target, weight, row_max, rest,
            *Options(*options), "native",
        )  # fmt: skip
        return gradient, None, None, None, None, None, None


# torch's own apply, without what Function.apply does for transforms.
_differentiable = super(Function, _Reduced).apply


def _reduced(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    """The loss; by the operator itself where nothing requires a gradient."""
    if torch.is_grad_enabled() and (
        logits.requires_grad or (weight is not None and weight.requires_grad)
    ):
        return _differentiable(logits, target, weight, *options)
    forward = OPERATORS[LAUNCHERS["native"].forward.namespace].forward
    return launch(forward, logits, target, weight, *options)[0]


def shortcut(logits: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor | None:
    """The loss of the plainest of calls, without weight, options and checks; None for all others.

    On a few rows the checks would take as long as the kernel. What is let through here passes them.
    """
    if (
        transformed()
        or type(logits) not in (Tensor, torch.nn.Parameter)
        or type(target) is not Tensor
        or logits.dtype not in (torch.float32, torch.float64)
        or target.dtype is not torch.int64
        or type(ignore_index) is not int
        or reduction not in REDUCTIONS
        or not logits.is_cpu
        or not target.is_cpu
        or logits.layout is not torch.strided
        or logits.dim() != 2
        or logits.shape[1] == 0
        or logits.stride(1) != 1
        or target.shape != logits.shape[:1]
        or dispatch.asked_for() not in (None, "native")
        or not dispatch.lookup("cross_entropy", "native", "cpu").available
    ):
        return None
    return _reduced(logits, target, None, ignore_index, 1.0, 0.0, REDUCTIONS[reduction])


def cross_entropy(call: CrossEntropyCall) -> Tensor:
    """The reduced loss of class indices, in the accumulator type."""
    logits, target = kernel_view(call.logits, call.target)
    if target.dtype != torch.int64:
        target = target.long()
    weight = call.weight
    if weight is not None:
        weight = weight.to(accumulator_dtype(logits.dtype))
    hard, spread = shares(call.label_smoothing, logits.shape[1])
    return _reduced(
        logits, target, weight, call.ignore_index, hard, spread, REDUCTIONS[call.reduction]
    )


def _in_place(backend: str) -> Any:
    namespace = LAUNCHERS[backend].forward.namespace
    return getattr(torch.ops, namespace).cross_entropy_backward_in_place.default


def _eager_in_place(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
) -> None:
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        values = eager.cross_entropy(leaf, target, weight, *options)
    wanted = [(v, g) for v, g in zip(values, (grad_loss, grad_lse), strict=True) if g is not None]
    outputs, upstream = zip(*wanted, strict=True)
    (gradient,) = torch.autograd.grad(outputs, leaf, upstream)
    logits.detach().copy_(gradient)


class _InPlace(Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: Options,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        statistics: list[Tensor] = []
        if backend == "eager":
            loss, lse = eager.cross_entropy(logits, target, weight, *options)
        else:
            x, t = kernel_view(logits, target)
            loss, lse, *statistics = launch(LAUNCHERS[backend].forward, x, t, weight, *options)
        ctx.save_for_backward(logits, target, weight, *statistics)
        ctx.options, ctx.backend, ctx.spent = options, backend, False
        ctx.set_materialize_grads(False)
        shape = logits.shape[:1] + logits.shape[2:]
        return loss.view(shape), lse.view(shape)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        if ctx.spent:
            raise RuntimeError(
                "cross_entropy: with inplace_backward=True the backward can run only once: the "
                "first has written the gradient over the logits. Leave it out for "
                "retain_graph=True."
            )
        if torch.is_grad_enabled():
            raise RuntimeError(
                "cross_entropy: with inplace_backward=True the gradient is not differentiable: "
                "leave it out for create_graph=True"
            )
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            raise RuntimeError(
                "cross_entropy: inplace_backward=True has no gradient of target or weight"
            )
        if grad_loss is None and grad_lse is None:
            return (None,) * 5
        logits, target, weight, *statistics = ctx.saved_tensors
        ctx.spent = True
        with torch.no_grad():
            if ctx.backend == "eager":
                _eager_in_place(logits, target, weight, ctx.options, grad_loss, grad_lse)
            else:
                x, t = kernel_view(logits.detach(), target)
                g, g_lse = (
                    None if g is None else g.to(statistics[0].dtype).reshape(statistics[0].shape)
                    for g in (grad_loss, grad_lse)
                )
                g = torch.zeros_like(statistics[0]) if g is None else g
                _in_place(ctx.backend)(g, g_lse, x, t, weight, *statistics, *ctx.options)
                torch.autograd.graph.increment_version(logits)
        return logits.detach(), None, None, None, None


def cross_entropy_in_place(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options, backend: str
) -> tuple[Tensor, Tensor]:
    """Loss and lse of each row, (N, ...), whose backward writes over the logits."""
    if transformed():
        raise RuntimeError(
            "cross_entropy: inplace_backward=True works neither inside torch.func transforms nor "
            "in forward mode"
        )
    return _InPlace.apply(logits, target, weight, options, backend)
