"""Scaled dot-product attention in torch operations: softmax(Q K^T / sqrt(D)) V, written out."""

import math
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops.attention import AttentionCall
from fastgpt.ops.dropout import keep_mask, rescale, seeds_of


def causal_mask(rows: int, columns: int, device: torch.device) -> Tensor:
    """(L, S) bool: position i may look at position j <= i, torch's top-left alignment."""
    return torch.ones(rows, columns, dtype=torch.bool, device=device).tril()


def scaled_dot_product_attention(call: AttentionCall, seed: Tensor | None) -> Any:
    """The contract of the public function, with the L x S scores in memory.

    A query that may look at nothing gets zeros. 16-bit inputs are computed in float32. `seed`: of
    the dropout, if there is any. Returns output and lse if asked for both.
    """
    device = call.query.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):  # which would take the products to 16 bits
            return scaled_dot_product_attention(call, seed)
    dtype = call.query.dtype
    work = torch.promote_types(dtype, torch.float32)
    q, k, v = (x.to(work) for x in call[:3])
    if call.enable_gqa:  # one key and value head serves a group of query heads
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
        v = v.repeat_interleave(q.shape[-3] // v.shape[-3], dim=-3)
    # Without the scale the scores' variance is head_dim and the softmax starts out nearly one-hot.
    scale = 1 / math.sqrt(max(q.shape[-1], 1)) if call.scale is None else call.scale
    scores = q @ k.transpose(-2, -1) * scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    L, S = scores.shape[-2:]
    hidden, place = positions(call, L, S)
    if call.alibi_slopes is not None:
        distance = (place - torch.arange(S, device=place.device)).abs()
        scores = scores - _by_head(call.alibi_slopes.to(work), scores) * distance
    if call.attn_mask is not None and call.attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~call.attn_mask, -math.inf)
    elif call.attn_mask is not None:
        scores = scores + call.attn_mask.to(work)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    if call.sinks is not None:  # a key that takes its share of the weight and has no value
        sink = _by_head(call.sinks.to(work), scores).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    empty = None
    if call.attn_mask is not None or hidden is not None:
        empty = (scores == -math.inf).all(-1, keepdim=True)
        scores = scores.masked_fill(empty, 0)
    weights = torch.softmax(scores, dim=-1)
    weights = weights if empty is None else weights.masked_fill(empty, 0)
    weights = weights if call.sinks is None else weights[..., :-1]
    lse = None
    if call.return_lse:
        lse = torch.logsumexp(scores, -1)
        lse = lse if empty is None else lse.masked_fill(empty.squeeze(-1), -math.inf)
    if seed is not None:
        heads = scores.shape[-3] if scores.dim() > 2 else 1
        batch = math.prod(scores.shape[:-3])
        keep = keep_mask(seeds_of(seed, batch), heads, 0, L, S, call.dropout_p)
        weights = weights * keep.reshape(weights.shape) * rescale(call.dropout_p)
    output = (weights @ v).to(dtype)
    return (output, lse) if call.return_lse else output


def positions(call: AttentionCall, L: int, S: int) -> tuple[Tensor | None, Tensor]:
    """Which keys a query's place hides from it, (L, S) bool or None; and that place, (L, 1).

    Query i of a document stands at its key i, or so that the last query stands at the last key.
    """
    device = call.query.device
    i, j = torch.arange(L, device=device).unsqueeze(1), torch.arange(S, device=device)
    place = i + (S - L if call.bottom_right else 0)
    hidden = None
    if call.cu_seqlens is not None:
        cu_q, cu_k = (x.to(torch.int64) for x in call.cu_seqlens)
        q_document, k_document = (
            torch.bucketize(x, cu[1:].contiguous(), right=True) for x, cu in ((i, cu_q), (j, cu_k))
        )
        hidden = (q_document != k_document) | (i >= cu_q[-1]) | (j >= cu_k[-1])
        edge = 1 if call.bottom_right else 0  # the end of a document, or its begin
        q_document = q_document.clamp(max=cu_q.shape[0] - 2)  # behind the last one is none
        place = i - cu_q[q_document + edge] + cu_k[q_document + edge]
    left, right = call.window
    if right < L + S:  # a place may be before the first key
        hidden = _either(hidden, j > place + right)
    if left < L + S:
        hidden = _either(hidden, j < place - left)
    return hidden, place


def _by_head(x: Tensor, scores: Tensor) -> Tensor:
    """(H,) or (B, H), broadcastable with the scores (..., H, L, S), or (L, S) of one head."""
    if x.dim() > 1 or scores.dim() == 2:
        return x.reshape(*scores.shape[:-3], *(-1,) * (scores.dim() > 2), 1, 1)
    return x[:, None, None]


def _either(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a | b
