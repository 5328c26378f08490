"""What no fused backend covers, and the reasons that `explain` gives."""

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastgpt.dispatch import nested_forward_levels
from fastgpt.ops.attention import AttentionCall
from fastgpt.ops.cross_entropy import CrossEntropyCall, by_columns, class_rows, positions
from fastgpt.ops.linear_cross_entropy import LinearCrossEntropyCall
from fastgpt.ops.raw import accumulator_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def cross_entropy(call: CrossEntropyCall, rows: bool) -> str:
    """Why no kernel can do this call; empty where one can. `rows`: whether the kernels read only
    rows whose classes lie together.
    """
    logits, target = call.logits, call.target
    reason = _tensor("logits", logits)
    if reason:
        return reason
    if logits.shape[1] == 0:
        return "no classes"
    if reason := _strides(logits, rows):
        return f"strides: {reason}"
    if call.inplace_backward and _apart(logits):
        return "strides: neither the classes of a row nor the positions lie together"
    if target.is_floating_point() and (reason := _probabilities(call, rows)):
        return reason
    return _transforms()


def _probabilities(call: CrossEntropyCall, rows: bool) -> str:
    logits, target = call.logits, call.target
    if reason := _probability_type(target, logits):
        return reason
    if reason := _strides(target, rows):
        return f"strides of the probabilities: {reason}"
    if call.weight is not None and call.weight.requires_grad and torch.is_grad_enabled():
        return "a gradient of weight"
    return ""


def _probability_type(target: torch.Tensor, logits: torch.Tensor) -> str:
    if target.dtype not in (logits.dtype, accumulator_dtype(logits.dtype)):
        return f"probabilities of type {target.dtype} for logits of type {logits.dtype}"
    return _tensor("probabilities", target)


def _strides(logits: torch.Tensor, rows: bool) -> str:
    if rows and class_rows(logits) is None:
        return "the classes of a row do not lie together, or the rows at no one distance"
    if rows:
        return ""
    if positions(logits) is None:
        return "the positions of a row lie at no one distance"
    return ""


def _apart(logits: torch.Tensor) -> bool:
    """Whether neither the classes of a row nor the positions lie together: they are copied."""
    x = positions(logits)
    return x is not None and x.shape[1] != 1 and x.stride(1) != 1 and not by_columns(x)


def linear_cross_entropy(call: LinearCrossEntropyCall) -> str:
    """Why no kernel can do this call; empty where one can."""
    target, weight = call.loss.target, call.loss.weight
    tensors = [("input", call.input), ("linear_weight", call.linear_weight)]
    if call.linear_bias is not None:
        tensors.append(("linear_bias", call.linear_bias))
    for name, x in tensors:
        if reason := _tensor(name, x):
            return reason
        if 0 in x.shape[name == "input" :]:  # no rows will do
            return f"an empty {name}"
    if target.is_floating_point():
        if reason := _probability_type(target, call.input):
            return reason
        if weight is not None and weight.requires_grad and torch.is_grad_enabled():
            return "a gradient of weight"
    return _transforms()


def attention(call: AttentionCall, max_head_dim: int) -> str:
    """Why no kernel can do this call; empty where one for heads up to `max_head_dim` can."""
    for name, x in (("query", call.query), ("key", call.key), ("value", call.value)):
        reason = _tensor(name, x)
        if reason:
            return reason
        if x.numel() == 0:
            return f"an empty {name}"
        if x.shape[-1] > max_head_dim:
            return f"a head_dim of {x.shape[-1]} in {name}, above {max_head_dim}"
    if call.enable_gqa and call.key.shape[-3] != call.value.shape[-3]:
        return "key and value heads that differ"
    mask = call.attn_mask
    for x in (mask, call.alibi_slopes, call.sinks, *(call.cu_seqlens or ())):
        if x is not None and is_traceable_wrapper_subclass(x):
            return f"a tensor subclass, {type(x).__name__}"
    slopes = call.alibi_slopes
    if slopes is not None and slopes.requires_grad and torch.is_grad_enabled():
        return "a gradient of alibi_slopes"
    return _transforms()


def _tensor(name: str, x: torch.Tensor) -> str:
    if x.dtype not in DTYPES:
        return f"{name} of type {x.dtype}"
    if is_traceable_wrapper_subclass(x):
        return f"a tensor subclass, {type(x).__name__}"
    if x.layout != torch.strided:
        return f"{name} of layout {x.layout}"
    return ""


def _transforms() -> str:
    if nested_forward_levels() > 1:
        return "nested forward-mode levels, in which torch loses a custom function's second tangent"
    return ""
