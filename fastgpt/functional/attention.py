"""`scaled_dot_product_attention`: check the arguments, choose a backend, run it."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastgpt import dispatch
from fastgpt.backends.eager import attention as eager_attention
from fastgpt.functional.autocast import autocast
from fastgpt.ops import attention_direct as direct
from fastgpt.ops.attention import AttentionCall, four_dimensional, scores_shape
from fastgpt.ops.attention_forms import UNLIMITED
from fastgpt.ops.dropout import draw_seed

_SCALES = float, int, torch.SymFloat, torch.SymInt, type(None)


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
    call = check_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, causal_alignment,
        window, softcap, alibi_slopes, sinks, return_lse, cu_seqlens_q, cu_seqlens_k,
    )  # fmt: skip
    device = call.query.device
    backend = dispatch.choose("scaled_dot_product_attention", device.type, call)[-1].backend
    seed = draw_seed(device) if call.dropout_p > 0 else None
    if backend == "eager":
        return eager_attention.scaled_dot_product_attention(call, seed)
    inputs, options, output_shape = four_dimensional(call, seed)
    output, lse, *_ = direct.attention(inputs, options, backend)
    # Not a view of itself, which could not be changed in place.
    output = output if output.shape == output_shape else output.reshape(output_shape)
    if not return_lse:
        return output
    return output, lse if lse.shape == output_shape[:-1] else lse.reshape(output_shape[:-1])


def check_attention(
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
    if not isinstance(scale, _SCALES):
        raise TypeError(f"{op}: scale must be a float, got {scale!r}")
    query, key, value, attn_mask = autocast(query.device.type, query, key, value, attn_mask)
    q, k, v = query.shape, key.shape, value.shape
    dtype, device = query.dtype, query.device
    if len(q) < 2 or len(k) < 2 or len(v) < 2:
        raise RuntimeError(
            f"{op}: expected (..., L, D) for all of query, key and value, got {_text(q, k, v)}"
        )
    if not dtype == key.dtype == value.dtype:
        raise RuntimeError(
            f"{op}: expected query, key and value of one type, got {dtype}, {key.dtype} and "
            f"{value.dtype}"
        )
    if not query.is_floating_point():
        raise RuntimeError(f"{op}: expected a floating-point type, got {dtype}")
    for name, x in (("key", key), ("value", value), ("attn_mask", attn_mask)):
        if x is not None and x.device != device:
            raise RuntimeError(
                f"{op}: expected {name} on the device of query, {device}, got {x.device}"
            )
    if q[-1] != k[-1]:
        raise RuntimeError(f"{op}: expected query and key of one head_dim, got {_text(q, k, v)}")
    if k[-2] != v[-2]:
        raise RuntimeError(f"{op}: expected as many keys as values, got {_text(q, k, v)}")
    if enable_gqa and (
        min(len(q), len(k), len(v)) < 3 or any(x[-3] == 0 or q[-3] % x[-3] != 0 for x in (k, v))
    ):
        raise RuntimeError(
            f"{op}: enable_gqa expects query heads that are a multiple of the key and value heads, "
            f"got {_text(q, k, v)}"
        )
    scores = scores_shape(q, k, v, enable_gqa)
    if attn_mask is not None:
        if not _broadcasts(attn_mask.shape, scores):
            raise RuntimeError(
                f"{op}: expected attn_mask broadcastable to {list(scores)}, got "
                f"{list(attn_mask.shape)} with {_text(q, k, v)}"
            )
        if attn_mask.dtype not in (torch.bool, dtype, torch.float32):
            raise RuntimeError(
                f"{op}: expected attn_mask of type bool, {dtype} or float32, got {attn_mask.dtype}"
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


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    missing = len(to) - len(shape)
    return missing >= 0 and all(n == 1 or n == m for n, m in zip(shape, to[missing:], strict=True))


def _text(query: torch.Size, key: torch.Size, value: torch.Size) -> str:
    return f"query {list(query)}, key {list(key)} and value {list(value)}"


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
