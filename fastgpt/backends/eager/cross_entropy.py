"""Cross-entropy in torch operations: the naive form that is taught, and the stable one."""

import re

import torch
from torch import Tensor


def naive_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The mean of -log softmax(logits)[target], written the way the formula reads.

    logits (N, C), target (N,) int64. For teaching and for tests: `exp` overflows for logits above
    88 in float32, and each line writes a whole (N, C) tensor.
    """
    counts = logits.exp()
    prob = counts / counts.sum(1, keepdim=True)
    rows = torch.arange(logits.shape[0], device=logits.device)
    return -prob[rows, target].log().mean()


def _log_softmax(logits: Tensor) -> Tensor:
    """log softmax over dim 1: subtracting the maximum stops overflow and changes nothing else."""
    if logits.shape[1] == 0:  # there is no maximum
        return logits
    shifted = logits - logits.amax(1, keepdim=True).detach()
    return shifted - shifted.exp().sum(1, keepdim=True).log()


def _reduce(loss: Tensor, denominator: Tensor | int, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / denominator


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """The whole contract of `torch.nn.functional.cross_entropy`, for logits (N, C, ...).

    Computes in float32 (float64 for float64) and returns that type.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if weight is not None:
        weight = weight.to(x.dtype)
    if target.is_floating_point():
        return _of_probabilities(x, target, weight, reduction, label_smoothing)
    return _of_classes(x, target.long(), weight, ignore_index, reduction, label_smoothing)


def _at_target(log_p: Tensor, y: Tensor) -> Tensor:
    """log_p_y for each row, with torch's IndexError for a class that does not exist."""
    try:
        return log_p.gather(1, y.unsqueeze(1)).squeeze(1)
    except RuntimeError as error:
        found = re.search(r"index (-?\d+) is out of bounds", str(error))
        if found is None:
            raise
        raise IndexError(
            f"Target {found[1]} is out of bounds: expected 0 <= target < {log_p.shape[1]} (the "
            "number of classes) or ignore_index."
        ) from None


def _of_classes(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """Target (N, ...) of classes y, smoothing s: -(1 - s) w_y log p_y - s / C sum_j w_j log p_j.

    The weighted mean divides by the sum of the targets' weights.
    """
    kept = target != ignore_index
    y = target.masked_fill(~kept, 0)
    # Zeroed before the softmax: NaN in an ignored row must reach neither the loss nor the gradient.
    log_p = _log_softmax(x.masked_fill(~kept.unsqueeze(1), 0))
    loss = -_at_target(log_p, y)
    row_weight = kept.to(x.dtype) if weight is None else weight[y] * kept
    loss = loss * row_weight if weight is not None else loss.masked_fill(~kept, 0)
    if label_smoothing > 0:
        if weight is not None:
            log_p = log_p * weight.view(-1, *[1] * (x.dim() - 2))
        smooth = -log_p.sum(1).masked_fill(~kept, 0)
        loss = (1 - label_smoothing) * loss + (label_smoothing / x.shape[1]) * smooth
    return _reduce(loss, row_weight.sum(), reduction)


def _of_probabilities(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float
) -> Tensor:
    """Target (N, C, ...) of probabilities q: -sum_j w_j q_j log p_j, the mean over positions."""
    q = target.to(torch.promote_types(x.dtype, target.dtype))
    if label_smoothing > 0:
        q = (1 - label_smoothing) * q + label_smoothing / x.shape[1]
    if weight is not None:
        q = q * weight.view(-1, *[1] * (x.dim() - 2))
    loss = -(q * _log_softmax(x)).sum(1)
    return _reduce(loss, loss.numel(), reduction)
