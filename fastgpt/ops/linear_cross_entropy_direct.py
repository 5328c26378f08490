"""The reduced loss outside of transforms: gradients formed in the forward.

A loss that is one number has gradients that are known but for a factor, its upstream gradient,
as soon as a chunk of rows has its logits; so they are formed then, and not from logits formed
again. That is 6 N C D multiply-adds of a forward and backward in place of 8, and N D + C D numbers
of the accumulator type held from the forward to the backward. The first backward scales them and
gives them away, another one forms them again, to the same bits, and one that must be differentiable
goes the general way (ops/linear_cross_entropy.py).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgpt.ops.cross_entropy import Options, launch
from fastgpt.ops.linear_cross_entropy import LAUNCHERS, LinearCrossEntropyBackward, Problem
from fastgpt.ops.raw import sum_rows, transformed

# From loss and lse of each row to the reduced loss.
Reduction = Callable[[Tensor, Tensor], Tensor]


class _Formed(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        upstream: tuple[Tensor, Tensor | None],
        options: Options,
        filter_eps: float,
        backend: str,
        reduced: Reduction,
        again: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        # In no function that ctx keeps is ctx itself: the cycle would outlive the graph.
        wanted = ctx.needs_input_grad[:3]

        def form(problem: Problem) -> list[Tensor]:
            grad_loss, grad_square = upstream
            return launch(
                LAUNCHERS[backend].backward, grad_loss, None, grad_square, *problem, *options,
                filter_eps, *wanted,
            )  # fmt: skip

        problem = Problem(input, linear_weight, linear_bias, target, weight)
        loss, lse, *ctx.formed = form(problem)
        ctx.wanted, ctx.form, ctx.again = wanted, form, again
        ctx.save_for_backward(*problem)
        ctx.set_materialize_grads(False)
        return reduced(loss, lse), lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        nothing = (None,) * 8
        if grad is None and grad_lse is None:
            return None, None, None, *nothing
        problem = Problem(*ctx.saved_tensors)
        differentiable = torch.is_grad_enabled()
        general = differentiable or transformed() or grad_lse is not None
        if general or grad is None or not _is_plain(grad):
            return *_by_the_general_way(ctx, problem, grad, grad_lse, differentiable), *nothing
        # To look at a number on a GPU would wait for it, and a fake tensor has none.
        factor = grad.item() if type(grad) is Tensor and grad.is_cpu else None
        if factor is not None and not math.isfinite(factor):  # 0 of an ignored row would be NaN
            return *_by_the_general_way(ctx, problem, grad, None, differentiable), *nothing
        formed, ctx.formed = ctx.formed or ctx.form(problem)[2:], None
        if factor != 1:
            formed = [x.mul_(grad) for x in formed]
        dtype = problem.input.dtype
        gradients = [x.to(dtype) if w else None for x, w in zip(formed, ctx.wanted, strict=True)]
        return *gradients, *nothing


def _is_plain(x: Tensor) -> bool:
    """Whether x has memory of its own: what stands for a batch of them, of vmap or of
    `is_grads_batched`, has not.
    """
    key = getattr(torch._C.DispatchKey, torch._C._dispatch_key_for_device(x.device.type))
    return torch._C._dispatch_keys(x).has(key)


def _by_the_general_way(
    ctx: Any, problem: Problem, grad: Tensor | None, grad_lse: Tensor | None, differentiable: bool
) -> list[Tensor | None]:
    tensors = list(problem[:3])
    if not differentiable:
        tensors = [
            None if x is None else x.detach().requires_grad_(wanted)
            for x, wanted in zip(tensors, ctx.wanted, strict=True)
        ]
    with torch.enable_grad():
        values = ctx.again(*tensors, *problem[3:])
    pairs = [(v, g) for v, g in zip(values, (grad, grad_lse), strict=True) if g is not None]
    leaves = [x for x, wanted in zip(tensors, ctx.wanted, strict=True) if wanted and x is not None]
    outputs, upstream = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, leaves, upstream, create_graph=differentiable))
    return [next(found) if wanted else None for wanted in ctx.wanted]


def linear_cross_entropy(
    problem: Problem,
    upstream: tuple[Tensor, Tensor | None],
    options: Options,
    filter_eps: float,
    backend: str,
    reduced: Reduction,
    again: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """The loss `reduced` makes of the rows, and lse (N,).

    `upstream`: of that loss, the gradients of each row's loss and lse², in the accumulator type.
    `again(*problem)` gives loss and lse by differentiable ways.
    """
    return _Formed.apply(*problem, upstream, options, filter_eps, backend, reduced, again)


# ---- in a compiled graph ----


class _FormedInGraph(Function):
    """The same for the compiler, which keeps the gradients, cannot differentiate them again, and
    must not see a tensor handed over.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        grad_loss: Tensor,
        grad_square: Tensor | None,
        ignore_index: int,
        hard: float,
        spread: float,
        softcap: float,
        partial: bool,
        filter_eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.options = ignore_index, hard, spread, softcap, partial, filter_eps
        ctx.wanted, ctx.backend = ctx.needs_input_grad[:3], backend
        rows = input.shape[:1]
        squares = None if grad_square is None else grad_square.expand(rows)
        problem = Problem(input, linear_weight, linear_bias, target, weight)
        loss, lse, *formed = LAUNCHERS[backend].backward(
            grad_loss.expand(rows), None, squares, *problem, *ctx.options, *ctx.wanted
        )
        ctx.save_for_backward(*problem, grad_loss, grad_square, lse, *formed)
        ctx.set_materialize_grads(False)
        value = sum_rows(loss) * grad_loss
        if grad_square is not None:
            value = value + sum_rows(lse.square()) * grad_square
        return value, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        *problem, grad_loss, grad_square, lse = ctx.saved_tensors[:8]
        formed = ctx.saved_tensors[8:]
        dtype = problem[0].dtype
        if grad_lse is not None:
            g = torch.zeros_like(grad_loss) if grad is None else grad
            if grad_square is not None:
                grad_lse = grad_lse + 2 * g * grad_square * lse
            formed = LinearCrossEntropyBackward.apply(
                (g * grad_loss).expand_as(lse), grad_lse, *problem, *ctx.options, *ctx.wanted,
                ctx.backend,
            )  # fmt: skip
        elif grad is not None:
            formed = [x * grad for x in formed]
        else:
            return (None,) * 14
        gradients = [x.to(dtype) if w else None for x, w in zip(formed, ctx.wanted, strict=True)]
        return *gradients, *(None,) * 11


torch._dynamo.allow_in_graph(_FormedInGraph)


def linear_cross_entropy_in_graph(
    problem: Problem,
    upstream: tuple[Tensor, Tensor | None],
    options: Options,
    filter_eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The sum of the rows' losses times one number, and of lse² times another, and lse (N,)."""
    return _FormedInGraph.apply(*problem, *upstream, *options, filter_eps, backend)
