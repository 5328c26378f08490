"""`linear_cross_entropy`: check the arguments, choose a backend, run it."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastgpt import dispatch
from fastgpt.backends.eager import linear_cross_entropy as eager
from fastgpt.functional.autocast import autocast
from fastgpt.functional.loss import check_cross_entropy
from fastgpt.functional.reduction import (
    Plan,
    combine_and_reduce,
    divisors,
    plan_of,
    reduce,
    target_weights,
)
from fastgpt.ops import linear_cross_entropy_direct as direct
from fastgpt.ops.linear_cross_entropy import LinearCrossEntropy, LinearCrossEntropyCall, Problem
from fastgpt.ops.raw import accumulator_dtype, differentiates
from fastgpt.ops.vocab_parallel import Shared


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
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
) -> Any:
    """`cross_entropy` of the logits `input @ linear_weight.T + linear_bias`, which never exist.

    The signature, values, types and errors of `torch.nn.functional.linear_cross_entropy` (torch
    2.13), and some more keywords. A chunk of the rows has its logits at a time: beyond inputs and
    gradients the fused backends need at most 64 MiB, and a float32 copy of 16-bit gradients.

    Args:
        input: (D,) or (N, D), of a floating-point type.
        linear_weight: (C, D), or (C, d1, ..., D) for one matrix at each of d1 x ... positions, of
            input's type.
        target: class indices (), (N,) or (N, d1, ...), int64 or uint8; or probabilities (C,),
            (N, C) or (N, C, d1, ...), which are differentiated, too.
        linear_bias: (C,) or (C, d1, ...), of input's type.
        weight, reduction, label_smoothing: as in `cross_entropy`.
        ignore_index: rows with this class count neither in the loss nor in the mean, cost nothing
            and have a gradient of zero, whatever they hold. None, the only value for probabilities,
            is -100.
        options: torch's LinearCrossEntropyOptions are accepted; there is nothing to choose.
        z_loss, softcap, return_lse: as in `cross_entropy`.
        process_group: linear_weight, linear_bias, weight and probabilities are those of this rank's
            classes, as in `cross_entropy`; `input` is the same on all ranks, and its gradient, that
            of the whole loss, too.
        shift: each position predicts the next one. `input` is (B, T, D) and `target` (B, T) (or
            (B, T, C)); position t goes with target t + 1 of its own sequence, the last one with
            none. The unreduced loss is (B, T - 1).
        filter_eps: leave out of the gradient the part of those classes whose probability is below
            it. On the CPU, classes that are below it in a whole chunk of rows are not multiplied.
            The loss is exact; each number of the logits' gradient is off by at most `filter_eps`
            times the row's upstream gradient, which adds up over the vocabulary. None: exact.
            Eager is always exact, and so are second derivatives.
        recompute: form the gradients in the backward, from logits that are formed again. It is so
            in any case under transforms, for `reduction="none"`, several ranks, positions or
            probabilities that need a gradient, and where the gradient of lse is used.
            Else the forward forms them: a quarter less arithmetic altogether, but a forward whose
            gradients are never asked for costs three times as much (under `torch.no_grad` it does
            not), and the gradients take their memory from the forward on.

    Returns:
        The loss in nats, of `input`'s type; under autocast inputs are cast to its type, except
        float64, and the loss is float32. It is computed in float32 (float64 for float64) before it
        is rounded, and so are the gradients. Differentiable any number of times, in both modes;
        beyond the first order by torch operations on chunks of the rows.
        With `return_lse`, (loss, lse), where lse has the shape of the unreduced loss.

    Raises:
        IndexError: a class index is outside 0 <= t < C and not `ignore_index`. (RuntimeError
            inside a compiled graph, as with torch.)
        ValueError, RuntimeError, TypeError, NotImplementedError: as torch, for shapes and types
            that do not fit.

    Which backend ran, and why: `fastgpt.explain(fastgpt.linear_cross_entropy, ...)`.
    """
    if has_torch_function_variadic(input, linear_weight, target, linear_bias, weight):
        return handle_torch_function(
            linear_cross_entropy,
            (input, linear_weight, target, linear_bias, weight),
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
            z_loss=z_loss,
            softcap=softcap,
            return_lse=return_lse,
            process_group=process_group,
            shift=shift,
            filter_eps=filter_eps,
            recompute=recompute,
        )
    call = check_linear_cross_entropy(
        input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
        label_smoothing, options, z_loss, softcap, return_lse, process_group, shift, filter_eps,
        recompute,
    )  # fmt: skip
    device = call.input.device.type
    backend = dispatch.choose("linear_cross_entropy", device, call)[-1].backend
    plan = plan_of(call.loss)
    if _formed_in_forward(call, backend):
        loss, lse = _formed(call, plan, backend)
    else:
        loss, lse = combine_and_reduce(call.loss, plan, *_rows(call, plan, backend))
    if call.loss.reduction == "none":
        loss = _unflattened(loss, call)
    loss = loss if loss.dtype == call.loss.loss_dtype else loss.to(call.loss.loss_dtype)
    return (loss, _unflattened(lse, call)) if return_lse else loss


def _unflattened(rows: Tensor, call: LinearCrossEntropyCall) -> Tensor:
    """(N, ...) in the shape of the unreduced loss."""
    if call.sequences is None:
        return rows.reshape(call.loss.loss_shape)
    B, T = call.sequences
    pairs = max(0, T - 1)
    return rows.reshape(B, rows.numel() // B if B else pairs)[:, :pairs]


def _rows(call: LinearCrossEntropyCall, plan: Plan, backend: str) -> tuple[Tensor, Tensor]:
    """Loss and lse of each row, (N, ...)."""
    x, target = call.input, plan.target
    if plan.ranks is not None:
        x = Shared.apply(x, *plan.ranks)
    shape = call.loss.logits.shape[:1] + call.loss.logits.shape[2:]
    if call.linear_weight.dim() == 2:
        loss, lse = _rows_of(
            Problem(x, call.linear_weight, call.linear_bias, target, plan.weight),
            call, plan, backend,
        )  # fmt: skip
        return loss, lse
    of_probabilities = target.is_floating_point()
    target = target.flatten(2 if of_probabilities else 1)
    matrices, biases = call.linear_weight.unbind(1), call.linear_bias
    positions = [
        _rows_of(
            Problem(x, W, None if biases is None else biases[:, i], target[..., i], plan.weight),
            call, plan, backend,
        )
        for i, W in enumerate(matrices)
    ]  # fmt: skip
    if not positions:  # of no numbers, but with gradients
        bias = None if biases is None else biases.flatten()
        lse = torch.nn.functional.linear(x, call.linear_weight.flatten(0, 1), bias)
        lse = lse.to(accumulator_dtype(x.dtype)).view(shape)
        return lse + target.sum(1).view(shape) if of_probabilities else lse.clone(), lse
    loss, lse = (torch.stack(rows, 1).view(shape) for rows in zip(*positions, strict=True))
    return loss, lse


def _rows_of(
    problem: Problem, call: LinearCrossEntropyCall, plan: Plan, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "eager":
        return eager.linear_cross_entropy(*problem, *plan.options)
    return LinearCrossEntropy.apply(*problem, *plan.options, call.filter_eps, backend)


def _formed_in_forward(call: LinearCrossEntropyCall, backend: str) -> bool:
    tensors = call.input, call.linear_weight, call.linear_bias
    return (
        backend != "eager"
        and not call.recompute
        and call.loss.reduction != "none"
        and call.loss.process_group is None
        and call.linear_weight.dim() == 2
        and torch.is_grad_enabled()
        and any(x is not None and x.requires_grad for x in tensors)
        and not call.loss.target.requires_grad
        and not differentiates()
    )


def _formed(call: LinearCrossEntropyCall, plan: Plan, backend: str) -> tuple[Tensor, Tensor]:
    problem = Problem(call.input, call.linear_weight, call.linear_bias, plan.target, plan.weight)
    at_target = target_weights(plan)
    divisor, count = divisors(call.loss, plan, at_target)
    ones = call.input.new_ones((), dtype=accumulator_dtype(call.input.dtype))
    grad_loss = ones / divisor
    grad_square = call.loss.z_loss * (ones / count) if call.loss.z_loss else None
    if torch.compiler.is_compiling():
        return direct.linear_cross_entropy_in_graph(
            problem, (grad_loss, grad_square), plan.options, call.filter_eps, backend
        )

    # What the graph keeps: the inputs are not in it but as what a backward frees.
    of_loss, filter_eps = call.loss, call.filter_eps

    def reduced(loss: Tensor, lse: Tensor) -> Tensor:
        return reduce(of_loss, plan, at_target, loss, lse)

    def again(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        loss, lse = LinearCrossEntropy.apply(*tensors, *plan.options, filter_eps, backend)
        return reduced(loss, lse), lse

    rows = call.input.shape[:1]
    upstream = grad_loss.expand(rows), None if grad_square is None else grad_square.expand(rows)
    return direct.linear_cross_entropy(
        problem, upstream, plan.options, call.filter_eps, backend, reduced, again
    )


# ---- the arguments ----

_OP = "linear_cross_entropy"


def check_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
    options: Any,
    z_loss: float,
    softcap: float | None,
    return_lse: bool,
    process_group: Any,
    shift: bool,
    filter_eps: float | None,
    recompute: bool,
) -> LinearCrossEntropyCall:
    tensors = {"input": input, "linear_weight": linear_weight, "target": target}
    if linear_bias is not None:
        tensors["linear_bias"] = linear_bias
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{_OP}: {name} must be a Tensor, got {type(x).__name__}")
    known = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is not None and (known is None or not isinstance(options, known)):
        raise TypeError(
            f"{_OP}: options must be a torch.nn.LinearCrossEntropyOptions, got {options!r}"
        )
    for name, flag in (("shift", shift), ("recompute", recompute)):
        if not isinstance(flag, bool):
            raise TypeError(f"{_OP}: {name} must be a bool, got {flag!r}")
    if filter_eps is not None and not isinstance(filter_eps, float | int):
        raise TypeError(f"{_OP}: filter_eps must be a float or None, got {filter_eps!r}")
    if filter_eps is not None and not 0 <= filter_eps < 1:
        raise ValueError(f"{_OP}: expected 0 <= filter_eps < 1, got {filter_eps}")
    sequences = None
    if shift:
        input, target, sequences = _next_tokens(input, linear_weight, target, ignore_index)
    logits_shape = _check_matrix(input, linear_weight, linear_bias)
    if target.shape == logits_shape and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    for name, x in tensors.items():
        if x.device != input.device:
            raise RuntimeError(
                f"{_OP}: expected {name} on the device of input, {input.device}, got {x.device}"
            )
    device = input.device.type
    input, linear_weight, linear_bias = autocast(device, input, linear_weight, linear_bias)
    if not input.is_floating_point():
        raise NotImplementedError(
            f"{_OP} is not implemented for {input.dtype} input: expected a floating-point type"
        )
    for name, x in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if x is not None and x.dtype != input.dtype:
            raise RuntimeError(
                f"{_OP}: expected {name} of input's type {input.dtype}, got {x.dtype}"
            )
    # Shape, type and device of the logits, and one number of memory.
    logits = input.new_empty(()).expand(logits_shape)
    loss = check_cross_entropy(
        logits, target, weight, None, -100 if ignore_index is None else ignore_index, None,
        reduction, label_smoothing, z_loss, softcap, False, return_lse, process_group, _OP,
    )  # fmt: skip
    if linear_weight.dim() > 2:
        linear_weight = linear_weight.flatten(1, -2)
        linear_bias = None if linear_bias is None else linear_bias.flatten(1)
    return LinearCrossEntropyCall(
        input if input.dim() == 2 else input.unsqueeze(0),
        linear_weight, linear_bias, loss, sequences, float(filter_eps or 0), recompute,
    )  # fmt: skip


def _next_tokens(
    input: Tensor, linear_weight: Tensor, target: Tensor, ignore_index: int | None
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Input (N, D) and the target of its rows, of B sequences of T tokens, and (B, T)."""
    if input.dim() != 3 or linear_weight.dim() != 2:
        raise RuntimeError(
            f"{_OP}: with shift=True expected input (B, T, D) and linear_weight (C, D), got "
            f"{list(input.shape)} and {list(linear_weight.shape)}"
        )
    B, T = input.shape[:2]
    if target.shape[:2] != (B, T):
        raise ValueError(
            f"{_OP}: with shift=True expected target {[B, T]} or {[B, T, len(linear_weight)]} for "
            f"input {list(input.shape)}, got {list(target.shape)}"
        )
    if target.dim() == 2 and target.dtype in (torch.int64, torch.uint8) and T > 0:
        # The last position is a row that is ignored, so that the input need not be copied.
        nothing = -100 if ignore_index is None else ignore_index
        target = torch.nn.functional.pad(target[:, 1:].long(), (0, 1), value=nothing)
    else:
        input, target = input[:, :-1], target[:, 1:]
    return input.flatten(0, 1), target.flatten(0, 1), (B, T)


def _check_matrix(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> torch.Size:
    """Check the shapes of the linear layer; returns that of the logits."""
    if not 1 <= input.dim() <= 2:
        raise RuntimeError(
            f"{_OP}: expected input of 1 or 2 dimensions, got {input.dim()}: {list(input.shape)}"
        )
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"{_OP}: expected linear_weight of at least 2 dimensions, got {linear_weight.dim()}"
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            f"{_OP}: expected input and linear_weight of one last dimension, got "
            f"{input.shape[-1]} and {linear_weight.shape[-1]}"
        )
    outputs = linear_weight.shape[:-1]
    if linear_bias is not None and linear_bias.shape != outputs:
        raise RuntimeError(
            f"{_OP}: expected linear_bias {list(outputs)}, got {list(linear_bias.shape)}"
        )
    if len(outputs) > 1 and input.dim() == 1:
        raise RuntimeError(
            f"{_OP}: linear_weight {list(linear_weight.shape)} needs input (N, "
            f"{input.shape[-1]}), got {list(input.shape)}"
        )
    return torch.Size(input.shape[:-1] + outputs)
