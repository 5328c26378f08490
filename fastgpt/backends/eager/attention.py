"""Scaled dot-product attention in torch operations: softmax(Q K^T / sqrt(D)) V, written out."""

import math

import torch
from torch import Tensor


def causal_mask(rows: int, columns: int, device: torch.device) -> Tensor:
    """(L, S) bool: position i may look at position j <= i, torch's top-left alignment."""
    return torch.ones(rows, columns, dtype=torch.bool, device=device).tril()


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """The contract of torch's function of this name, with the L x S scores in memory.

    A query that may look at nothing gets zeros. 16-bit inputs are computed in float32.
    """
    device = query.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):  # which would take the products to 16 bits
            return scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
    dtype = query.dtype
    work = torch.promote_types(dtype, torch.float32)
    q, k, v = query.to(work), key.to(work), value.to(work)
    if enable_gqa:  # one key and value head serves a group of query heads
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
        v = v.repeat_interleave(q.shape[-3] // v.shape[-3], dim=-3)
    # Without the scale the scores' variance is head_dim and the softmax starts out nearly one-hot.
    if scale is None:
        scale = 1 / math.sqrt(max(q.shape[-1], 1))
    scores = q @ k.transpose(-2, -1) * scale
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask.to(work)
    if is_causal:
        hidden = ~causal_mask(q.shape[-2], k.shape[-2], q.device)
        scores = scores.masked_fill(hidden, -math.inf)
    if attn_mask is None:  # no row is empty: every query may look at the first key
        weights = torch.softmax(scores, dim=-1)
    else:
        empty = (scores == -math.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(empty, 0), dim=-1).masked_fill(empty, 0)
    weights = torch.dropout(weights, dropout_p, train=dropout_p > 0)
    return (weights @ v).to(dtype)
