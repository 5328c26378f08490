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


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int = -100,
    hard: float = 1.0,
    spread: float = 0.0,
    softcap: float = 0.0,
    partial: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss and lse of each row, (N, ...), for logits (N, C, ...); the options are `ops`' Options.

    Target (N, ...) of classes t: -hard w_t log p_t - spread sum_j w_j log p_j. Target (N, C, ...)
    of probabilities q: -sum_j w_j (hard q_j + spread) log p_j. Computes in float32 (float64 for
    float64, and for a slice of the classes) and returns that type.
    """
    of_probabilities = target.is_floating_point()
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if partial:
        x = x.double()
    here = kept = None
    if not of_probabilities:
        target = target.long()
        kept = target != ignore_index
        here = kept & (target >= 0) & (target < x.shape[1]) if partial else kept
        # Zeroed before the softmax: NaN in an ignored row must reach neither loss nor gradient.
        x = x.masked_fill(~kept.unsqueeze(1), 0)
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    dead = None
    if partial:  # all of a slice's classes at -inf: their softmax would be NaN
        dead = (x == -torch.inf).all(1)
        x = x.masked_fill(dead.unsqueeze(1), 0)
    log_p, lse = _log_softmax(x), torch.logsumexp(x, 1)
    if dead is not None:
        lse = lse.masked_fill(dead, -torch.inf)
    columns = None
    if weight is not None:
        weight = weight.to(x.dtype)
        columns = weight.view(-1, *[1] * (x.dim() - 2))
    if here is None or kept is None:
        q = target.to(torch.promote_types(x.dtype, target.dtype))
        if spread:
            q = hard * q + spread
        elif hard != 1:
            q = hard * q
        return -(q * log_p if columns is None else q * columns * log_p).sum(1), lse
    t = target.masked_fill(~here, 0)
    none = x.shape[1] == 0 and not here.any()  # no class 0 that could stand in for no class
    loss = log_p.sum(1) if none else -_at_target(log_p, t)
    if weight is not None and not none:
        loss = loss * weight[t]
    if hard != 1:
        loss = hard * loss
    loss = loss.masked_fill(~here, 0)
    if spread:
        even = -(log_p if columns is None else log_p * columns).sum(1).masked_fill(~kept, 0)
        loss = loss + spread * even
    return loss, lse.masked_fill(~kept, 0)
