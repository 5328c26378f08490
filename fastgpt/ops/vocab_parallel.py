"""Cross-entropy over classes that the ranks of a process group hold in slices.

Rank r finds, over its own slice, each row's loss_r = sum_j c_j (lse_r - y_j), lse_r and
A_r = sum_j c_j (ops/cross_entropy.py). The row's loss over all classes is

    lse = logsumexp over r of lse_r        loss = sum over r of loss_r + A_r (lse - lse_r)

whose terms are all of one sign, so that nothing cancels where the target's rank has all but all of
the probability. So one all-gather of some numbers a row is all that the ranks exchange, and it
holds for every option, derivative and kernel: each rank's kernel gets its share of the gradient
through loss_r and lse_r. Every rank has every sum, in the order of the ranks, and so the same bits.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

if torch.distributed.is_available():  # defines the operators
    import torch.distributed._functional_collectives


class Ranks(NamedTuple):
    """A process group, in what the compiler takes for constants."""

    name: str
    size: int
    rank: int


def ranks_of(group: "torch.distributed.ProcessGroup") -> Ranks:
    """The ranks of a group that this process is in."""
    return Ranks(group.group_name, group.size(), group.rank())


def all_gather(x: Tensor, ranks: Ranks) -> Tensor:
    """(R, ...) of all ranks' x (...), without a gradient."""
    operators = torch.ops._c10d_functional  # what every newer collective of torch is made of
    rows = x.detach().contiguous().unsqueeze(0)
    gathered = operators.all_gather_into_tensor.default(rows, ranks.size, ranks.name)
    return operators.wait_tensor.default(gathered)


# What follows the gathering is computed on every rank alike. So a gradient of all ranks' numbers is
# on every rank already, and this rank's part of it is its row; and the gradient of a row that was
# taken on each rank is that of all rows, gathered again.


class _Gather(Function):
    @staticmethod
    def forward(x: Tensor, name: str, size: int, rank: int) -> Tensor:
        return all_gather(x, Ranks(name, size, rank))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.ranks = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _Row.apply(gradient, *ctx.ranks), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _Gather.apply(tangent, *ctx.ranks)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *ranks: Any) -> tuple[Tensor, int]:
        return _Gather.apply(x.movedim(in_dims[0], -1), *ranks), -1


class _Row(Function):
    @staticmethod
    def forward(x: Tensor, name: str, size: int, rank: int) -> Tensor:
        return x[rank].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.ranks = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _Gather.apply(gradient, *ctx.ranks), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _Row.apply(tangent, *ctx.ranks)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *ranks: Any) -> tuple[Tensor, int]:
        return _Row.apply(x.movedim(in_dims[0], -1), *ranks), -1


# A matrix whose columns the ranks share out multiplies what every rank has: its gradient is the sum
# of theirs, which then every rank has again.


class Shared(Function):
    """x, which all ranks have alike, where each goes on with a part of the classes of its own."""

    @staticmethod
    def forward(x: Tensor, name: str, size: int, rank: int) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.ranks = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _Sum.apply(gradient, *ctx.ranks), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return Shared.apply(tangent, *ctx.ranks)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *ranks: Any) -> tuple[Tensor, Any]:
        return Shared.apply(x, *ranks), in_dims[0]


class _Sum(Function):
    @staticmethod
    def forward(x: Tensor, name: str, size: int, rank: int) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return all_gather(x, Ranks(name, size, rank)).sum(0, dtype=wide).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.ranks = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return Shared.apply(gradient, *ctx.ranks), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _Sum.apply(tangent, *ctx.ranks)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *ranks: Any) -> tuple[Tensor, Any]:
        return _Sum.apply(x, *ranks), in_dims[0]


torch._dynamo.allow_in_graph(Shared)
torch._dynamo.allow_in_graph(_Sum)
torch._dynamo.allow_in_graph(_Gather)
torch._dynamo.allow_in_graph(_Row)


def combine(
    loss: Tensor, lse: Tensor, total: Tensor, at_target: Tensor, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """From loss_r, lse_r, A_r and the target's weight (0 where another rank has it), all (N, ...)
    float64: loss, lse and the target's weight over all classes.
    """
    losses, lses, totals, weights = _Gather.apply(
        torch.stack([loss, lse, total, at_target]), *ranks
    ).unbind(1)
    lse = torch.logsumexp(lses, 0)
    # Not 0 * inf, where a slice has nothing but -inf and no share of the target.
    absent = totals == 0
    missing = (lse - lses.masked_fill(absent, 0)).masked_fill(absent, 0)
    return (losses + totals * missing).sum(0), lse, weights.sum(0)
