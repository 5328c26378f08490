"""What both losses do around their rows: slices of the classes on several ranks, and reductions."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt.ops.cross_entropy import CrossEntropyCall, Options, shares
from fastgpt.ops.raw import accumulator_dtype, sum_rows
from fastgpt.ops.vocab_parallel import Ranks, all_gather, combine, ranks_of

# What an ignored row's target becomes where targets are counted from a slice's first class.
IGNORED_IN_SLICE = -(1 << 63)


class Plan(NamedTuple):
    """A call as its rows are computed: by kernels, on one of several ranks or the only one."""

    target: Tensor  # int64, counted from this rank's first class, or probabilities
    weight: Tensor | None  # of the accumulator type
    options: Options
    ranks: Ranks | None
    ignored: Tensor | None  # which rows; None for probabilities


def plan_of(call: CrossEntropyCall) -> Plan:
    """What the kernels of this process are told."""
    accumulator = accumulator_dtype(call.logits.dtype)
    weight = None if call.weight is None else call.weight.to(accumulator)
    ranks = None if call.process_group is None else ranks_of(call.process_group)
    target, ignore_index = call.target, call.ignore_index
    of_probabilities = target.is_floating_point()
    if not of_probabilities:
        target = target.long()
    ignored = None if of_probabilities else target == ignore_index
    classes: int | float = call.logits.shape[1]
    if ranks is not None:
        sizes = all_gather(torch.tensor(classes, device=target.device), ranks)
        if call.label_smoothing > 0:
            classes = int(sizes.sum())
        if ignored is not None:
            target = _of_this_slice(target, ignored, sizes, ranks.rank)
            ignore_index = IGNORED_IN_SLICE
    options = Options(
        ignore_index, *shares(call.label_smoothing, classes), call.softcap, ranks is not None
    )
    return Plan(target, weight, options, ranks, ignored)


def combine_and_reduce(
    call: CrossEntropyCall, plan: Plan, loss: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """From loss and lse (N, ...) of this rank's classes to the reduced loss and lse of all."""
    if plan.ranks is None:
        return reduce(call, plan, target_weights(plan), loss, lse), lse
    total, at_target = _shares(call.logits.shape[1], plan)
    loss, lse, at_target = combine(loss, lse, total.expand_as(lse), at_target, plan.ranks)
    if plan.ignored is not None:
        loss, lse = loss.masked_fill(plan.ignored, 0), lse.masked_fill(plan.ignored, 0)
    accumulator = accumulator_dtype(call.logits.dtype)
    loss, lse = loss.to(accumulator), lse.to(accumulator)
    return reduce(call, plan, at_target, loss, lse), lse


def target_weights(plan: Plan) -> Tensor | None:
    """The weight of each row's target, 0 for an ignored row; None without weights or targets."""
    if plan.weight is None or plan.ignored is None:
        return None
    return plan.weight[plan.target.masked_fill(plan.ignored, 0)].masked_fill(plan.ignored, 0)


def divisors(
    call: CrossEntropyCall, plan: Plan, at_target: Tensor | None
) -> tuple[Tensor | int, Tensor | int]:
    """What the sums over the rows of loss and of lse² are divided by."""
    if call.reduction != "mean":
        return 1, 1
    ignored = plan.ignored
    if ignored is None:
        rows = math.prod(call.target.shape[:1] + call.target.shape[2:])
        return rows, rows
    count = ignored.numel() - ignored.sum()
    return (count if at_target is None else sum_rows(at_target)), count


def reduce(
    call: CrossEntropyCall, plan: Plan, at_target: Tensor | None, loss: Tensor, lse: Tensor
) -> Tensor:
    """The reduced loss, with the z-loss, from loss and lse (N, ...)."""
    if call.reduction == "none":
        return loss + call.z_loss * lse.square() if call.z_loss else loss
    divisor, count = divisors(call, plan, at_target)
    mean = call.reduction == "mean"
    loss = sum_rows(loss) / divisor if mean else sum_rows(loss)
    if call.z_loss:
        z = call.z_loss * sum_rows(lse.square())
        loss = loss + (z / count if mean else z)
    return loss.to(accumulator_dtype(call.logits.dtype))


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


def _shares(classes: int, plan: Plan) -> tuple[Tensor, Tensor]:
    """A and the target's weight, (N, ...), of the classes that are here, in float64."""
    target, weight, options = plan.target, plan.weight, plan.options
    everywhere = float(classes) if weight is None else weight.double().sum()
    if target.is_floating_point():
        q = target if weight is None else target * weight.view(-1, *[1] * (target.dim() - 2))
        total = options.hard * q.sum(1, dtype=torch.float64) + options.spread * everywhere
        return total, torch.zeros_like(total)
    here = (target >= 0) & (target < classes)
    at_target = here.double()
    if weight is not None:
        at_target = weight.double()[target.masked_fill(~here, 0)].masked_fill(~here, 0)
    return options.hard * at_target + options.spread * everywhere, at_target
