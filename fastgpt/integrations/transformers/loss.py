"""The next-token loss of a patched model: from its logits, or from the hidden states instead."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.functional import cross_entropy, linear_cross_entropy


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """`transformers`' loss of the same name, without the copy of all logits in float32.

    Args:
        logits: (B, T, vocab_size).
        labels: (B, T), int64: position t is scored on the label at t + 1.
        num_items_in_batch: divide the sum by it, instead of by the number of labels that count.
        ignore_index: the label that does not count.
        shift_labels: (B, T): the labels to score position t on, as they are, instead of `labels`.

    Returns:
        The loss in nats, float32.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    with _loss_in_float32(logits):
        loss = cross_entropy(
            logits.reshape(-1, vocab_size),
            shift_labels.reshape(-1).to(logits.device),
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
    return _divided(loss, num_items_in_batch)


def hidden_states_loss(
    hidden_states: Tensor,
    head: nn.Linear,
    labels: Tensor,
    softcap: float | None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """`causal_lm_loss` of the logits softcap tanh(head(hidden_states) / softcap), never formed.

    `hidden_states` are (B, T, D); the rest is as there.
    """
    shift = shift_labels is None
    target = labels if shift_labels is None else shift_labels
    with _loss_in_float32(hidden_states):
        loss = linear_cross_entropy(
            hidden_states if shift else hidden_states.flatten(0, -2),
            head.weight,
            (target if shift else target.flatten()).to(hidden_states.device),
            linear_bias=head.bias,
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
            softcap=softcap,
            shift=shift,
        )
    return _divided(loss, num_items_in_batch)


def _loss_in_float32(x: Tensor) -> AbstractContextManager[Any]:
    """The loss of 16-bit inputs is rounded to their type outside of autocast, and not inside."""
    if x.dtype.itemsize >= 4 or torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, dtype=x.dtype)


def _divided(loss: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    loss = loss if num_items_in_batch is None else loss / num_items_in_batch
    return loss.float()
