"""The public functions: check the arguments, choose a backend, run it."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import _reduction as torch_reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastgpt import dispatch
from fastgpt.backends.eager import attention as eager_attention
from fastgpt.backends.eager import cross_entropy as eager_cross_entropy
from fastgpt.dispatch import Decision
from fastgpt.ops.attention import Attention, AttentionCall, four_dimensional, scores_shape
from fastgpt.ops.cross_entropy import CrossEntropy, CrossEntropyCall, class_rows
from fastgpt.ops.raw import accumulator_dtype

# ---- cross-entropy ----


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Softmax-cross-entropy of logits, in one kernel forward and one backward.

    The signature, values, types and errors of `torch.nn.functional.cross_entropy`. For class
    indices t the loss of a row x is logsumexp(x) - x_t and its gradient softmax(x) - onehot(t).

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...), float32, float64, bfloat16 or float16.
        target: class indices (), (N,) or (N, d1, ...), int64 or uint8; or probabilities, shaped
            like `input` and of a floating-point type.
        weight: (C,) factor of each class, of `input`'s type.
        size_average, reduce: torch's deprecated forms of `reduction`.
        ignore_index: rows with this class count neither in the loss nor in the mean, and their
            gradient is zero whatever they hold.
        reduction: "none", "mean" (over the rows that count; with `weight` and class indices,
            divided by the sum of their weights) or "sum".
        label_smoothing: 0 to 1, the share of the target that is spread evenly over the classes.

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
        )
    call = _check_cross_entropy(
        input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
    )
    backend = dispatch.choose("cross_entropy", call.logits.device.type, call)[-1].backend
    if backend == "eager":
        loss = eager_cross_entropy.cross_entropy(*call[:6])
    else:
        loss = _fused_cross_entropy(call, backend)
    if call.reduction == "none":
        loss = loss.reshape(call.loss_shape)
    return loss.to(call.loss_dtype)


def _fused_cross_entropy(call: CrossEntropyCall, backend: str) -> Tensor:
    logits, target = class_rows(call.logits), call.target.long().reshape(-1)
    weight = call.weight
    if weight is not None:
        weight = weight.to(accumulator_dtype(call.logits.dtype))
    smoothing = max(float(call.label_smoothing), 0.0)  # below zero it is none, as torch's
    loss, _, _ = CrossEntropy.apply(logits, target, weight, call.ignore_index, smoothing, backend)
    if call.reduction == "none":
        return loss
    total = _sum_rows(loss)
    if call.reduction == "sum":
        return total
    kept = target != call.ignore_index
    if weight is None:
        return total / kept.sum()
    at_target = weight.index_select(0, target.masked_fill(~kept, 0))
    return total / _sum_rows(at_target.masked_fill(~kept, 0))


def _sum_rows(loss: Tensor) -> Tensor:
    """The sum of (N,) with the same bits for any number of threads.

    torch gives each thread a stretch of a long vector, and the bits depend on where it is cut. A
    matrix is cut between its rows, so a long vector is summed as one first.
    """
    columns = 4096
    if loss.shape[0] <= columns:
        return loss.sum()
    return (
        torch.nn.functional.pad(loss, (0, -loss.shape[0] % columns)).view(-1, columns).sum(1).sum()
    )


def _check_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size_average: bool | None,
    ignore_index: int,
    reduce: bool | None,
    reduction: str,
    label_smoothing: float,
) -> CrossEntropyCall:
    for name, value in (("input", input), ("target", target), ("weight", weight)):
        if not isinstance(value, Tensor) and not (name == "weight" and value is None):
            raise TypeError(f"cross_entropy: {name} must be a Tensor, got {type(value).__name__}")
    if not isinstance(ignore_index, int | torch.SymInt):
        raise TypeError(f"cross_entropy: ignore_index must be an int, got {ignore_index!r}")
    if size_average is not None or reduce is not None:
        reduction = torch_reduction.legacy_get_string(size_average, reduce)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(
            f"{reduction} is not a valid value for reduction: expected 'none', 'mean' or 'sum'"
        )
    if label_smoothing > 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if not input.is_floating_point():
        raise NotImplementedError(
            f"cross_entropy is not implemented for {input.dtype} logits: expected a "
            "floating-point type"
        )
    if input.dim() == 0:
        raise RuntimeError(
            "cross_entropy: expected logits (C,), (N, C) or (N, C, ...), got a scalar"
        )
    for name, value in (("target", target), ("weight", weight)):
        if value is not None and value.device != input.device:
            raise RuntimeError(
                f"cross_entropy: expected {name} on the device of the logits, {input.device}, "
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
        input, target, weight, ignore_index, reduction, label_smoothing, loss_shape, loss_dtype
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


# ---- attention ----


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(Q K^T * scale + mask) V, with the signature of torch's function of the same name.

    Vaswani et al., "Attention Is All You Need", 2017. Each of the L query positions collects
    values from the S key positions it may look at: all of them in an encoder, those up to its own
    in a decoder (`is_causal`), another sequence's in cross-attention.

    Args:
        query: (..., Hq, L, D), of a floating-point type.
        key: (..., H, S, D); value: (..., H, S, Dv), of query's type.
        attn_mask: broadcastable to (..., Hq, L, S): bool, True where a query may look at a key, or
            of query's type or float32, added to the scores.
        dropout_p: the probability of dropping a weight; applied whenever it is above zero.
        is_causal: query i looks at keys j <= i (top-left alignment where L != S), of those that
            `attn_mask` allows.
        scale: default 1 / sqrt(D).
        enable_gqa: grouped queries: Hq is a multiple of H, and each key head serves Hq / H query
            heads.

    Returns:
        (..., Hq, L, Dv), of query's type; under autocast, of autocast's, to which all arguments
        but float64 ones are cast. A query that may look at nothing gets zeros. Differentiable any
        number of times, in both modes. On the CPU kernel no tensor of size L x S exists, up to
        second order; what a mask hides, NaN included, reaches neither output nor gradient (the
        second order keeps to that for finite numbers only); heads whose innermost stride is not 1
        are copied first.

    Raises:
        RuntimeError, TypeError: as torch, for shapes and types that do not fit.

    Which backend ran, and why: `fastgpt.explain(fastgpt.scaled_dot_product_attention, ...)`.
    """
    if has_torch_function_variadic(query, key, value, attn_mask):
        return handle_torch_function(
            scaled_dot_product_attention,
            (query, key, value, attn_mask),
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    call = _check_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    device = call.query.device.type
    backend = dispatch.choose("scaled_dot_product_attention", device, call)[-1].backend
    if backend == "eager":
        return eager_attention.scaled_dot_product_attention(*call)
    q, k, v, mask, factor, output_shape = four_dimensional(call)
    output: Tensor = Attention.apply(q, k, v, mask, call.is_causal, factor, backend)[0]
    # Not a view of itself, which could not be changed in place.
    return output if output.shape == output_shape else output.reshape(output_shape)


def _autocast(device: str, *tensors: Tensor | None) -> Any:
    """The tensors as torch's autocast passes them on: float64 and what is not a float as it is."""
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast to ask
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    ]


def _check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> AttentionCall:
    op = "scaled_dot_product_attention"
    for name, x in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if not isinstance(x, Tensor) and not (name == "attn_mask" and x is None):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}")
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"{op}: {name} must be a bool, got {flag!r}")
    if not isinstance(scale, float | int | torch.SymFloat | torch.SymInt | None):
        raise TypeError(f"{op}: scale must be a float, got {scale!r}")
    query, key, value, attn_mask = _autocast(query.device.type, query, key, value, attn_mask)
    shapes = f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)}"
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise RuntimeError(
            f"{op}: expected (..., L, D) for all of query, key and value, got {shapes}"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(
            f"{op}: expected query, key and value of one type, got {query.dtype}, {key.dtype} and "
            f"{value.dtype}"
        )
    if not query.is_floating_point():
        raise RuntimeError(f"{op}: expected a floating-point type, got {query.dtype}")
    for name, x in (("key", key), ("value", value), ("attn_mask", attn_mask)):
        if x is not None and x.device != query.device:
            raise RuntimeError(
                f"{op}: expected {name} on the device of query, {query.device}, got {x.device}"
            )
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(f"{op}: expected query and key of one head_dim, got {shapes}")
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(f"{op}: expected as many keys as values, got {shapes}")
    if enable_gqa and (
        min(query.dim(), key.dim(), value.dim()) < 3
        or any(x.shape[-3] == 0 or query.shape[-3] % x.shape[-3] != 0 for x in (key, value))
    ):
        raise RuntimeError(
            f"{op}: enable_gqa expects query heads that are a multiple of the key and value heads, "
            f"got {shapes}"
        )
    scores = scores_shape(query, key, value, enable_gqa)
    if attn_mask is not None and torch.broadcast_shapes(scores, attn_mask.shape) != scores:
        raise RuntimeError(
            f"{op}: expected attn_mask broadcastable to {list(scores)}, got "
            f"{list(attn_mask.shape)} with {shapes}"
        )
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype, torch.float32):
        raise RuntimeError(
            f"{op}: expected attn_mask of type bool, {query.dtype} or float32, got "
            f"{attn_mask.dtype}"
        )
    if not 0 <= dropout_p <= 1:
        raise RuntimeError(f"{op}: expected a dropout_p between 0 and 1, got {dropout_p}")
    return AttentionCall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


# ---- which kernel a call would run ----


class Explanation(NamedTuple):
    """Which backend would run a call, and the decision on each backend asked, the last one yes."""

    op: str
    device: str
    backend: str
    decisions: tuple[Decision, ...]

    def __str__(self) -> str:
        skipped = [f"\n  {d.backend}: {d.reason}" for d in self.decisions[:-1]]
        return f"{self.op} on {self.device} runs on {self.backend}" + "".join(skipped)


def explain(function: Any, /, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend `function(*args, **kwargs)` would run on, and why not on those preferred to it.

    `function` is `fastgpt.cross_entropy`, `fastgpt.scaled_dot_product_attention`, torch's function
    of either name (answered as inside `fastgpt.drop_in()`), or a `CrossEntropyLoss` module. Checks
    the arguments and raises as the call would; runs nothing. Any other function is a
    TypeError.
    """
    F = torch.nn.functional
    if isinstance(function, torch.nn.CrossEntropyLoss):
        kwargs = {
            "weight": function.weight,
            "ignore_index": function.ignore_index,
            "reduction": function.reduction,
            "label_smoothing": function.label_smoothing,
            **kwargs,
        }
        function = cross_entropy
    if function in (cross_entropy, F.cross_entropy):
        op, call = "cross_entropy", _bind(cross_entropy, _check_cross_entropy, args, kwargs)
        device = call.logits.device.type
    elif function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        op = "scaled_dot_product_attention"
        call = _bind(scaled_dot_product_attention, _check_attention, args, kwargs)
        device = call.query.device.type
    else:
        raise TypeError(
            "explain: expected cross_entropy, scaled_dot_product_attention or a CrossEntropyLoss, "
            f"got {function!r}"
        )
    decisions = tuple(dispatch.choose(op, device, call))
    return Explanation(op, device, decisions[-1].backend, decisions)


def _bind(public: Any, check: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    bound = inspect.signature(public).bind(*args, **kwargs)
    bound.apply_defaults()
    return check(*bound.args)
