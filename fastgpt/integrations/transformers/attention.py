"""The attention and the masks of a patched model, as `transformers` registers them.

What reaches the attention as its mask tells by its number of dimensions what it says:

- none, or (B, S) bool: which keys are not padding. Causality and the window are the kernel's, with
  the last query at the last key; S may be less than the keys of a cache that is not full.
- (B or 1, heads or 1, L or 1, S or 1), bool or added to the scores: all there is to say. A mask of
  the user's own arrives like this, and patterns that are not a window of the past.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import AttentionInterface
from transformers.utils.import_utils import is_tracing

from fastgpt.functional import scaled_dot_product_attention

NAME = "fastgpt"

# Arguments of other models' attention that change what it computes.
UNSUPPORTED = ("position_bias", "s_aux", "head_mask", "block_table", "k_cache", "v_cache")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query (B, Hq, L, D) to key (B, H, S, D) and value (B, H, S, Dv).

    Returns (B, L, Hq, Dv), and None for the weights, which never exist.

    Args:
        module: the layer; its `is_causal` counts where the argument is None.
        attention_mask: see above.
        sliding_window: the keys a query looks at, itself among them, unless a 4-D mask says it all.
        cu_seq_lens_q, cu_seq_lens_k: where the documents begin that one row (B = 1) is packed of.

    Raises:
        NotImplementedError: for an argument that another model's attention has and this one not.
        ValueError: packed documents in several rows, or boundaries that do not fit.
    """
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"fastgpt's attention does not know the argument {name!r} of "
                f"{type(module).__name__}: unpatch the model"
            )
    if cu_seq_lens_q is not None and query.shape[0] != 1:
        raise ValueError(
            "fastgpt's attention expects packed documents (cu_seq_lens_q) in one row, got a batch "
            f"of {query.shape[0]}"
        )
    causal, window = False, None
    if attention_mask is None or attention_mask.dim() == 2:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        window = (sliding_window - 1, 0) if causal and sliding_window is not None else None
        if attention_mask is not None:
            keys = attention_mask.shape[1]
            key, value = key[:, :, :keys], value[:, :, :keys]
            attention_mask = attention_mask[:, None, None, :]
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        causal_alignment="bottom_right",
        window=window,
        softcap=softcap,
        cu_seqlens_q=cu_seq_lens_q,
        cu_seqlens_k=cu_seq_lens_k,
    )
    return output.transpose(1, 2), None


def mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """What the attention needs to be told beside causality and a window.

    Query i stands at position q_offset + i of the sequence, key j at kv_offset + j;
    `attention_mask` (B, positions) is False for those that are padding. The arguments, q_length and
    q_offset among the others, are those of `transformers.masking_utils.sdpa_mask`, which makes the
    4-D masks. The first versions of `transformers` 5 pass the queries' positions instead, as
    cache_position.
    """
    positions = kwargs.get("cache_position")
    if positions is None:
        q_length, q_offset, device = kwargs["q_length"], kwargs["q_offset"], kwargs["device"]
    else:
        q_length, q_offset, device = positions.shape[0], positions[0], positions.device

    if mask_function is bidirectional_mask_function:
        seen = _padding(attention_mask, kv_offset, kv_length)
        if seen is None:
            seen = torch.ones(1, 1, dtype=torch.bool, device=device)
        return seen[:, None, None, :]

    # `transformers` allows the skip where nothing else is laid over causality and the window.
    chunked = getattr(config, "attention_chunk_size", None) is not None
    plain = mask_function is causal_mask_function or (local_size is not None and not chunked)
    if plain and allow_is_causal_skip and not use_vmap and not _is_traced(q_offset):
        keys = int(q_offset) + q_length - kv_offset  # up to that of the last query
        if keys <= kv_length:
            seen = _padding(attention_mask, kv_offset, keys)
            if seen is None or (not is_tracing(seen) and bool(seen.all())):
                if keys == kv_length:
                    return None
                seen = torch.ones(1, 1, dtype=torch.bool, device=device).expand(batch_size, keys)
            # `generate` may hand the mask back as that of the positions, which it is from 0 on.
            if kv_offset == 0:
                return seen
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        **kwargs,
    )


def _padding(attention_mask: Tensor | None, offset: int, keys: int) -> Tensor | None:
    """(B, keys), True where a key is not padding; those beyond the mask are."""
    if attention_mask is None:
        return None
    seen = attention_mask[:, offset : offset + keys]
    return F.pad(seen, (0, keys - seen.shape[1])) if seen.shape[1] < keys else seen


def _is_traced(offset: int | Tensor) -> bool:
    """Whether the offset is a number of the graph, which a static cache counts on the device."""
    return isinstance(offset, Tensor) and is_tracing(offset)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
