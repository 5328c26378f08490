"""The public functions: check the arguments, choose a backend, run it."""

import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import _reduction as torch_reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastgpt import dispatch
from fastgpt.backends.eager import attention as eager_attention
from fastgpt.backends.eager import cross_entropy as eager_cross_entropy
from fastgpt.dispatch import Decision
from fastgpt.ops import cross_entropy_direct as direct
from fastgpt.ops.attention import AttentionCall, forward_of, four_dimensional, scores_shape
from fastgpt.ops.attention_forms import UNLIMITED
from fastgpt.ops.cross_entropy import CrossEntropy, CrossEntropyCall, Options, kernel_view, shares
from fastgpt.ops.dropout import draw_seed
from fastgpt.ops.raw import accumulator_dtype
from fastgpt.ops.vocab_parallel import all_gather, combine, ranks_of

# ---- cross-entropy ----

# What an ignored row's target becomes where targets are counted from a slice's first class.
IGNORED_IN_SLICE = -(1 << 63)


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
    call = _check_cross_entropy(
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
    accumulator = accumulator_dtype(call.logits.dtype)
    weight = None if call.weight is None else call.weight.to(accumulator)
    ranks = None if call.process_group is None else ranks_of(call.process_group)
    logits, target, ignore_index = call.logits, call.target, call.ignore_index
    of_probabilities = target.is_floating_point()
    if not of_probabilities:
        target = target.long()
    ignored = None if of_probabilities else target == ignore_index
    classes: int | float = logits.shape[1]
    if ranks is not None:
        sizes = all_gather(torch.tensor(classes, device=logits.device), ranks)
        if call.label_smoothing > 0:
            classes = int(sizes.sum())
        if ignored is not None:
            target = _of_this_slice(target, ignored, sizes, ranks.rank)
            ignore_index = IGNORED_IN_SLICE
    options = Options(
        ignore_index, *shares(call.label_smoothing, classes), call.softcap, ranks is not None
    )
    loss, lse = _rows(logits, target, weight, options, call.inplace_backward, backend)
    at_target = None
    if ranks is not None:
        total, at_target = _shares(logits, target, weight, options)
        loss, lse, at_target = combine(loss, lse, total.expand_as(lse), at_target, ranks)
        if ignored is not None:
            loss, lse = loss.masked_fill(ignored, 0), lse.masked_fill(ignored, 0)
        loss, lse = loss.to(accumulator), lse.to(accumulator)
    elif weight is not None and ignored is not None:
        at_target = weight[target.masked_fill(ignored, 0)].masked_fill(ignored, 0)
    if call.reduction == "none":
        return (loss + call.z_loss * lse.square() if call.z_loss else loss), lse
    loss = _sum_rows(loss)
    count: Tensor | int = lse.numel() if ignored is None else lse.numel() - ignored.sum()
    if call.reduction == "mean":
        denominator = count if at_target is None or ignored is None else _sum_rows(at_target)
        loss = loss / denominator
    if call.z_loss:
        z = call.z_loss * _sum_rows(lse.square())
        loss = loss + (z / count if call.reduction == "mean" else z)
    return loss.to(accumulator), lse


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


def _of_this_slice(target: Tensor, ignored: Tensor, sizes: Tensor, rank: int) -> Tensor:
    """Global class indices counted from this rank's first class."""
    wrong = ((target < 0) | (target >= sizes.sum())) & ~ignored
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(~wrong.any())
    elif wrong.any():
        raise IndexError(
            f"Target {target[wrong][0].item()} is out of bounds: expected 0 <= target < "
            f"{sizes.sum().item()} (the number of classes of all ranks) or ignore_index."
        )
    return (target - sizes[:rank].sum()).masked_fill(ignored, IGNORED_IN_SLICE)


def _shares(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """A and the target's weight, (N, ...), of the classes that are here, in float64."""
    everywhere = float(logits.shape[1]) if weight is None else weight.double().sum()
    if target.is_floating_point():
        q = target if weight is None else target * weight.view(-1, *[1] * (target.dim() - 2))
        total = options.hard * q.sum(1, dtype=torch.float64) + options.spread * everywhere
        return total, torch.zeros_like(total)
    here = (target >= 0) & (target < logits.shape[1])
    at_target = here.double()
    if weight is not None:
        at_target = weight.double()[target.masked_fill(~here, 0)].masked_fill(~here, 0)
    return options.hard * at_target + options.spread * everywhere, at_target


def _sum_rows(rows: Tensor) -> Tensor:
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


def _check_cross_entropy(
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
    if z_loss or softcap or inplace_backward or return_lse or process_group is not None:
        _check_extras(input, z_loss, softcap, inplace_backward, return_lse, process_group)
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
        input, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap or 0.0,
        inplace_backward, return_lse, process_group, loss_shape, loss_dtype,
    )  # fmt: skip


def _check_extras(
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
            raise TypeError(f"cross_entropy: {name} must be a bool, got {flag!r}")
    for name, number in (("z_loss", z_loss), ("softcap", softcap or 0.0)):
        if not isinstance(number, float | int):
            raise TypeError(f"cross_entropy: {name} must be a float, got {number!r}")
        if not 0 <= number < math.inf:
            raise ValueError(f"cross_entropy: expected a finite {name} >= 0, got {number}")
    # A torch that was built without it has no such type.
    group = getattr(torch.distributed, "ProcessGroup", ())
    if process_group is not None and not isinstance(process_group, group):
        raise TypeError(
            "cross_entropy: process_group must be a torch.distributed.ProcessGroup, got "
            f"{process_group!r}"
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
    *,
    causal_alignment: str = "top_left",
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Any:
    """softmax(Q K^T * scale + mask) V, with the signature of torch's function of the same name.

    Vaswani et al., "Attention Is All You Need", 2017. Each of the L query positions collects
    values from the S key positions it may look at: all of them in an encoder, those up to its own
    in a decoder (`is_causal`), another sequence's in cross-attention.

    Args:
        query: (..., Hq, L, D), of a floating-point type.
        key: (..., H, S, D); value: (..., H, S, Dv), of query's type.
        attn_mask: broadcastable to (..., Hq, L, S): bool, True where a query may look at a key, or
            of query's type or float32, added to the scores, and differentiated, too.
        dropout_p: the probability of dropping a weight; applied whenever it is above zero. The
            seed is drawn from torch's generator; which weights go is a function of it and their
            places, the same on every backend.
        is_causal: query i looks at keys j <= p of those that `attn_mask` allows; p is its own
            place, see `causal_alignment`.
        scale: default 1 / sqrt(D).
        enable_gqa: grouped queries: Hq is a multiple of H, and each key head serves Hq / H query
            heads.
        causal_alignment: "top_left", torch's: query i stands at key p = i; or "bottom_right", at
            p = i + S - L, so that the last query stands at the last key.
        window: (left, right): query i looks at the keys p - left ... p + right only; -1 is no
            limit. With `is_causal`, right is 0. Tiles of keys outside are skipped.
        softcap: c takes c tanh(x / c) for the scaled scores x, before mask and bias (Gemma 2).
        alibi_slopes: (Hq,) or (B, Hq): -slope |p - j| is added to the scores (Press et al., "Train
            Short, Test Long", 2022).
        sinks: (Hq,): a logit for each head that joins the softmax's denominator and nothing else
            (gpt-oss; Xiao et al., "Efficient Streaming Language Models", 2023). Differentiated.
        return_lse: return (output, lse).
        cu_seqlens_q, cu_seqlens_k: (documents + 1,) int32 or int64: where the documents begin that
            lie one after the other along L and S, and where the last one ends. A query looks at its
            own document only, in which alignment, window and distance are counted. Without
            `cu_seqlens_k` both are the same. On a GPU the boundaries are not checked.

    Returns:
        (..., Hq, L, Dv), of query's type; under autocast, of autocast's, to which query, key, value
        and attn_mask are cast unless they are float64. A query that may look at nothing gets zeros.
        Differentiable any number of times, in both modes. In the kernels no tensor of size L x S
        exists, up to second order; what a mask hides, NaN included, reaches neither output nor
        gradient (the second order keeps to that for finite numbers only); heads whose innermost
        stride is not 1 are copied first.
        lse: (..., Hq, L) float32, or float64 for it, differentiable: the logsumexp of a query's
            scores after softcap, bias and mask, with its sink; -inf if it may look at nothing.

    Raises:
        RuntimeError, TypeError, ValueError: as torch, for shapes and types that do not fit.

    Which backend ran, and why: `fastgpt.explain(fastgpt.scaled_dot_product_attention, ...)`.
    """
    tensors = query, key, value, attn_mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            scaled_dot_product_attention,
            tensors,
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            causal_alignment=causal_alignment,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            return_lse=return_lse,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )
    call = _check_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, causal_alignment,
        window, softcap, alibi_slopes, sinks, return_lse, cu_seqlens_q, cu_seqlens_k,
    )  # fmt: skip
    device = call.query.device
    backend = dispatch.choose("scaled_dot_product_attention", device.type, call)[-1].backend
    seed = draw_seed(device) if call.dropout_p > 0 else None
    if backend == "eager":
        return eager_attention.scaled_dot_product_attention(call, seed)
    inputs, options, output_shape = four_dimensional(call, seed)
    run = forward_of(inputs, backend)
    output, lse = run(*inputs, *options)[:2]
    # Not a view of itself, which could not be changed in place.
    output = output if output.shape == output_shape else output.reshape(output_shape)
    if not return_lse:
        return output
    return output, lse if lse.shape == output_shape[:-1] else lse.reshape(output_shape[:-1])


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
    causal_alignment: str,
    window: tuple[int, int] | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    return_lse: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
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
    bottom_right, limits, softcap = False, (UNLIMITED, UNLIMITED), softcap or 0.0
    extras = (window, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k)
    if (
        causal_alignment != "top_left"
        or softcap
        or return_lse
        or any(x is not None for x in extras)
    ):
        bottom_right, limits = _check_attention_extras(
            query, scores, causal_alignment, window, softcap, alibi_slopes, sinks, return_lse,
            cu_seqlens_q, cu_seqlens_k,
        )  # fmt: skip
    cu_seqlens = None
    if cu_seqlens_q is not None:
        cu_seqlens = cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    if is_causal:
        limits = limits[0], 0
    return AttentionCall(
        query, key, value, attn_mask, dropout_p, scale, enable_gqa,
        bottom_right, limits, softcap, alibi_slopes, sinks, return_lse, cu_seqlens, scores,
    )  # fmt: skip


def _check_attention_extras(
    query: Tensor,
    scores: torch.Size,
    causal_alignment: str,
    window: tuple[int, int] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    return_lse: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[bool, tuple[int, int]]:
    """Check the keywords that torch's function does not have; returns whether the alignment is to
    the bottom right, and the window's limits.
    """
    op = "scaled_dot_product_attention"
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(
            f"{op}: expected causal_alignment 'top_left' or 'bottom_right', got "
            f"{causal_alignment!r}"
        )
    if not isinstance(return_lse, bool):
        raise TypeError(f"{op}: return_lse must be a bool, got {return_lse!r}")
    if not isinstance(softcap, float | int):
        raise TypeError(f"{op}: softcap must be a float, got {softcap!r}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"{op}: expected a finite softcap >= 0, got {softcap}")
    limits = (UNLIMITED, UNLIMITED)
    if window is not None:
        sides = tuple(window) if isinstance(window, tuple | list) else ()
        if len(sides) != 2 or not all(type(n) is int and n >= -1 for n in sides):
            raise ValueError(
                f"{op}: expected a window (left, right) of integers >= -1, got {window!r}"
            )
        left, right = (UNLIMITED if n == -1 else min(n, UNLIMITED) for n in sides)
        limits = left, right
    heads = scores[-3] if len(scores) > 2 else 1
    batch = math.prod(scores[:-3])
    for name, x in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if x is None:
            continue
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{op}: expected a floating-point Tensor {name}, got {found}")
        shapes = [[heads], [batch, heads]] if name == "alibi_slopes" else [[heads]]
        if list(x.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            raise RuntimeError(f"{op}: expected {name} of shape {expected}, got {list(x.shape)}")
        if x.device != query.device:
            raise RuntimeError(
                f"{op}: expected {name} on the device of query, {query.device}, got {x.device}"
            )
    if cu_seqlens_k is not None and cu_seqlens_q is None:
        raise ValueError(f"{op}: expected cu_seqlens_q beside cu_seqlens_k, got None")
    for name, x, total in (
        ("cu_seqlens_q", cu_seqlens_q, scores[-2]),
        ("cu_seqlens_k", cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, scores[-1]),
    ):
        if x is not None and cu_seqlens_q is not None:
            _check_boundaries(op, name, x, cu_seqlens_q, query, total)
    return causal_alignment == "bottom_right", limits


def _check_boundaries(
    op: str, name: str, x: Tensor, cu_seqlens_q: Tensor, query: Tensor, total: int
) -> None:
    """Check the boundaries of documents; their values only where they can be read for nothing."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: expected an int32 or int64 Tensor {name}, got {found}")
    if x.dim() != 1 or x.shape[0] < 2 or x.shape != cu_seqlens_q.shape:
        raise RuntimeError(
            f"{op}: expected {name} (documents + 1,), of as many documents for queries as for keys,"
            f" got {list(x.shape)} beside cu_seqlens_q {list(cu_seqlens_q.shape)}"
        )
    if x.device != query.device:
        raise RuntimeError(
            f"{op}: expected {name} on the device of query, {query.device}, got {x.device}"
        )
    readable = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if not readable or torch._C._are_functorch_transforms_active():
        return
    boundaries = x.tolist()
    if boundaries[0] != 0 or boundaries[-1] != total or boundaries != sorted(boundaries):
        raise ValueError(
            f"{op}: expected {name} to rise from 0 to {total}, the length, got {boundaries}"
        )


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
            **getattr(function, "extras", {}),
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
    return check(*bound.arguments.values())
