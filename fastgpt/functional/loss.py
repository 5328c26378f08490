"""`cross_entropy`: check the arguments, choose a backend, run it."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as torch_reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastgpt import dispatch
from fastgpt.backends.eager import cross_entropy as eager_cross_entropy
from fastgpt.functional.reduction import combine_and_reduce, plan_of
from fastgpt.ops import cross_entropy_direct as direct
from fastgpt.ops.cross_entropy import CrossEntropy, CrossEntropyCall, Options, kernel_view


def cross_entropy(
    input: Tensor,
    target: Tensor,
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
) -> Any:
    """Softmax-cross-entropy of logits, in one kernel forward and one backward.

    The signature, values, types and errors of `torch.nn.functional.cross_entropy`, and some more
    keywords. For class indices t the loss of a row x is lse - x_t, lse = logsumexp(x), and its
    gradient softmax(x) - onehot(t).

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...), float32, float64, bfloat16 or float16.
        target: class indices (), (N,) or (N, d1, ...), int64 or uint8; or probabilities, shaped
            like `input` and of a floating-point type, which are differentiated, too.
        weight: (C,) factor of each class, of `input`'s type.
        size_average, reduce: torch's deprecated forms of `reduction`.
        ignore_index: rows with this class count neither in the loss nor in the mean, and their
            gradient is zero whatever they hold.
        reduction: "none", "mean" (over the rows that count; with `weight` and class indices,
            divided by the sum of their weights) or "sum".
        label_smoothing: 0 to 1, the share of the target that is spread evenly over the classes.
        z_loss: adds z_loss * lse² to each row that counts; its mean is over those rows, whatever
            `weight` is (Chowdhery et al., "PaLM", 2022).
        softcap: takes softcap * tanh(x / softcap) for the logits (Gemma Team, "Gemma 2", 2024).
        inplace_backward: the backward writes the gradient over `input`, and needs no memory of its
            own. It can run once, and what else saved `input` for its backward raises then. The
            gradient has no derivative. Ignored by the compiler, which plans memory itself.
        return_lse: returns (loss, lse). lse is shaped like the unreduced loss, in float32 (float64
            for float64), after `softcap`, and is differentiable; 0 for an ignored row.
        process_group: `input`, `weight` and probabilities hold the classes of this rank only, those
            of the first rank first, in slices of any sizes; class indices are global. Every rank
            calls with the same rows and gets the loss over all classes, and its own part of the
            gradient.

    Returns:
        The loss in nats, of `input`'s type; under autocast, 16-bit logits give a float32 loss. It
        is computed in float32 (float64 for float64) before it is rounded. Differentiable any
        number of times, in both modes.

    Raises:
        IndexError: a class index is outside 0 <= t < C and not `ignore_index`. (RuntimeError
            inside a compiled graph, as with torch.)
        ValueError, RuntimeError, TypeError, NotImplementedError: as torch, for shapes and types
            that do not fit.

    Which backend ran, and why: `fastgpt.explain(fastgpt.cross_entropy, ...)`.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            inplace_backward=inplace_backward,
            return_lse=return_lse,
            process_group=process_group,
        )
    options = label_smoothing or z_loss or softcap or inplace_backward or return_lse
    unset = weight is None and size_average is None and reduce is None and process_group is None
    if unset and not options:
        plain = direct.shortcut(input, target, ignore_index, reduction)
        if plain is not None:
            return plain
    call = check_cross_entropy(
        input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing,
        z_loss, softcap, inplace_backward, return_lse, process_group,
    )  # fmt: skip
    backend = dispatch.choose("cross_entropy", call.logits.device.type, call)[-1].backend
    if backend == "native" and direct.serves(call):
        loss, lse = direct.cross_entropy(call), None
    else:
        loss, lse = _cross_entropy(call, backend)
    if call.reduction == "none":
        loss = loss.reshape(call.loss_shape)
    loss = loss if loss.dtype == call.loss_dtype else loss.to(call.loss_dtype)
    if not call.return_lse:
        return loss
    assert lse is not None
    return loss, lse.reshape(call.loss_shape)


def _cross_entropy(call: CrossEntropyCall, backend: str) -> tuple[Tensor, Tensor]:
    """The reduced loss, and lse (N, ...)."""
    plan = plan_of(call)
    loss, lse = _rows(
        call.logits, plan.target, plan.weight, plan.options, call.inplace_backward, backend
    )
    return combine_and_reduce(call, plan, loss, lse)


def _rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Loss and lse of each row, (N, ...)."""
    if inplace_backward and not torch.compiler.is_compiling():
        return direct.cross_entropy_in_place(logits, target, weight, options, backend)
    if backend == "eager":
        return eager_cross_entropy.cross_entropy(logits, target, weight, *options)
    x, t = kernel_view(logits, target)
    loss, lse, _, _ = CrossEntropy.apply(x, t, weight, *options, backend)
    shape = logits.shape[:1] + logits.shape[2:]
    return loss.view(shape), lse.view(shape)


def check_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size_average: bool | None,
    ignore_index: int,
    reduce: bool | None,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    inplace_backward: bool,
    return_lse: bool,
    process_group: Any,
    op: str = "cross_entropy",
) -> CrossEntropyCall:
    """Check a call of `op`, whose logits are `input`."""
    for name, value in (("input", input), ("target", target), ("weight", weight)):
        if not isinstance(value, Tensor) and not (name == "weight" and value is None):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if not isinstance(ignore_index, int | torch.SymInt):
        raise TypeError(f"{op}: ignore_index must be an int, got {ignore_index!r}")
    if size_average is not None or reduce is not None:
        reduction = torch_reduction.legacy_get_string(size_average, reduce)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(
            f"{reduction} is not a valid value for reduction: expected 'none', 'mean' or 'sum'"
        )
    if label_smoothing > 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if z_loss or softcap or inplace_backward or return_lse or process_group is not None:
        _check_extras(op, input, z_loss, softcap, inplace_backward, return_lse, process_group)
    if not input.is_floating_point():
        raise NotImplementedError(
            f"cross_entropy is not implemented for {input.dtype} logits: expected a "
            "floating-point type"
        )
    if input.dim() == 0:
        raise RuntimeError(f"{op}: expected logits (C,), (N, C) or (N, C, ...), got a scalar")
    for name, value in (("target", target), ("weight", weight)):
        if value is not None and value.device != input.device:
            raise RuntimeError(
                f"{op}: expected {name} on the device of the logits, {input.device}, "
                f"got {value.device}"
            )

    of_probabilities = target.is_floating_point() and target.shape == input.shape
    if of_probabilities:
        if ignore_index >= 0:
            raise RuntimeError(
                "ignore_index is not supported for floating point target: expected a negative one, "
                f"got {ignore_index}"
            )
        loss_shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else torch.Size()
    else:
        loss_shape = _check_classes(input, target)
    _check_weight(input, weight, of_probabilities)

    loss_dtype = input.dtype
    if of_probabilities:
        loss_dtype = torch.promote_types(loss_dtype, target.dtype)
        if weight is not None:
            loss_dtype = torch.promote_types(loss_dtype, weight.dtype)
    if loss_dtype.itemsize < 4 and torch.is_autocast_enabled(input.device.type):
        loss_dtype = torch.float32
    if input.dim() == 1:
        input = input.unsqueeze(0)
        target = target.unsqueeze(0) if of_probabilities else target.reshape(1)
    return CrossEntropyCall(
        input, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap or 0.0,
        inplace_backward, return_lse, process_group, loss_shape, loss_dtype,
    )  # fmt: skip


def _check_extras(
    op: str,
    input: Tensor,
    z_loss: float,
    softcap: float | None,
    inplace_backward: bool,
    return_lse: bool,
    process_group: Any,
) -> None:
    """Check the keywords that torch's function does not have."""
    for name, flag in (("inplace_backward", inplace_backward), ("return_lse", return_lse)):
        if not isinstance(flag, bool):
            raise TypeError(f"{op}: {name} must be a bool, got {flag!r}")
    for name, number in (("z_loss", z_loss), ("softcap", softcap or 0.0)):
        if not isinstance(number, float | int):
            raise TypeError(f"{op}: {name} must be a float, got {number!r}")
        if not 0 <= number < math.inf:
            raise ValueError(f"{op}: expected a finite {name} >= 0, got {number}")
    # A torch that was built without it has no such type.
    group = getattr(torch.distributed, "ProcessGroup", ())
    if process_group is not None and not isinstance(process_group, group):
        raise TypeError(
            f"{op}: process_group must be a torch.distributed.ProcessGroup, got {process_group!r}"
        )
    # The compiler ignores it, and a transform refuses it, but neither of them can ask for overlaps.
    asked = inplace_backward and not torch.compiler.is_compiling()
    if (
        asked
        and not torch._C._are_functorch_transforms_active()
        and torch._debug_has_internal_overlap(input) == 1
    ):
        raise RuntimeError(
            "cross_entropy: inplace_backward needs logits whose elements do not share memory, got "
            f"strides {input.stride()} for shape {list(input.shape)}"
        )


def _check_classes(input: Tensor, target: Tensor) -> torch.Size:
    """Check class-index targets against the logits; returns the shape of the unreduced loss."""
    if target.shape == input.shape:
        raise RuntimeError(
            "Expected floating point type for target with class probabilities (a target shaped "
            f"like the logits), got {target.dtype}"
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"expected target dtype to be Long or Byte, but got {target.dtype}")
    got, logits = list(target.shape), list(input.shape)
    if input.dim() == 1:
        if target.dim() > 1 or target.numel() != 1:
            raise ValueError(
                f"For 1D input, 1D target must have size 1, but got target size: {got}"
            )
        return torch.Size()
    batch = target.shape[0] if target.dim() > 0 else 0
    if batch != input.shape[0]:
        raise ValueError(
            f"Expected input batch_size ({input.shape[0]}) to match target batch_size ({batch}): "
            f"got logits {logits} and target {got}"
        )
    expected = logits[:1] + logits[2:]
    if got != expected:
        raise RuntimeError(f"Expected target size {expected} for logits {logits}, got {got}")
    return target.shape


def _check_weight(input: Tensor, weight: Tensor | None, of_probabilities: bool) -> None:
    if weight is None:
        return
    classes = input.shape[1] if input.dim() > 1 else input.shape[0]
    if weight.dim() != 1 or weight.shape[0] != classes:
        raise RuntimeError(
            f"weight tensor should be defined either for all {classes} classes or no classes "
            f"but got weight tensor of shape: {list(weight.shape)}"
        )
    if of_probabilities:
        return
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "cross_entropy is not differentiable with respect to weight for class-index targets: "
            "expected a weight that does not require grad"
        )
    if weight.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
        raise RuntimeError(
            f"expected weight of the logits' type {input.dtype} but found {weight.dtype}"
        )
