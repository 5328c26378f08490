"""The token embedding and the output layer, one matrix, in slices of the vocabulary.

Each of R processes has the rows of its tokens, V / R of them, and the blocks' work on its n tokens
of each batch. What is exchanged is features, C numbers a token: the embedding of every token goes
from the process that has its row to the one that works on it; before the output layer every process
gets the features of all tokens, for the logits of its own slice (ops/vocab_parallel.py). Neither
the matrix, nor its gradient, nor the optimiser's two moments of it are anywhere whole.

The loss is then that of the whole batch on every process, and the slice's gradient that of it. In
between, the blocks' gradients are averaged over the processes, as if each had a loss of its own
tokens, the mean of which is the loss. That of its own tokens is R times their part of the loss: so
gradients are multiplied by R on the way into the blocks, and divided by it on the way out.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

import fastgpt
from fastgpt.ops.vocab_parallel import Ranks, Shared, all_gather, ranks_of

from .errors import UsageError
from .model import GPT, LossFunction


def share_out_vocabulary(
    model: GPT, group: "torch.distributed.ProcessGroup"
) -> dict[str, list[int]]:
    """Leave the model this process's slice of its matrix.

    Returns how many rows of the parameter each process has. Raises UsageError if one had none.
    """
    ranks = ranks_of(group)
    weight = model.transformer.wte.weight
    if ranks.size > len(weight):
        raise UsageError(
            f"a vocabulary of {len(weight)} can't be shared out over {ranks.size} processes"
        )
    bounds = [len(weight) * r // ranks.size for r in range(ranks.size + 1)]
    start, stop = bounds[ranks.rank], bounds[ranks.rank + 1]
    embedding = SlicedEmbedding(nn.Parameter(weight.detach()[start:stop].clone()), start, ranks)
    model.transformer.wte = embedding  # type: ignore[assignment]
    model.lm_head.weight = embedding.weight
    model.lm_head.out_features = stop - start
    return {"transformer.wte.weight": [b - a for a, b in pairwise(bounds)]}


class SlicedEmbedding(nn.Module):
    """`nn.Embedding` of which this process has the rows from `start` on."""

    def __init__(self, weight: nn.Parameter, start: int, ranks: Ranks) -> None:
        super().__init__()
        self.weight, self.start, self.ranks = weight, start, ranks

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, C); the other processes' idx are of the same shape."""
        wanted = all_gather(idx, self.ranks) - self.start  # (R, B, T)
        elsewhere = (wanted < 0) | (wanted >= len(self.weight))
        rows = F.embedding(wanted.masked_fill(elsewhere, 0), self.weight)  # (R, B, T, C)
        rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0)
        return _FromOwners.apply(rows, *self.ranks)


def vocabulary_loss(name: str, group: "torch.distributed.ProcessGroup") -> LossFunction:
    """`model.loss_function(name)` of all processes' tokens, with this one's slice of the matrix."""
    ranks = ranks_of(group)
    if name == "linear_cross_entropy":
        loss_fn: Any = partial(fastgpt.linear_cross_entropy, process_group=group)
    elif name == "cross_entropy":

        def loss_fn(x: Tensor, weight: Tensor, targets: Tensor) -> Any:
            logits = F.linear(Shared.apply(x, *ranks), weight)
            return fastgpt.cross_entropy(logits, targets, process_group=group)

    else:
        raise UsageError(
            f"tensor_parallel needs the loss linear_cross_entropy or cross_entropy, got {name!r}"
        )

    def of_all(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        x = _ToAll.apply(x, *ranks).flatten(0, 1)  # (R, n, C) -> (R n, C)
        return loss_fn(x, weight, all_gather(targets, ranks).flatten())

    return of_all


class _FromOwners(Function):
    """(R, B, T, C), for each process's tokens what this one has of them, to (B, T, C) of its own.

    Of the numbers that are added all but one are zero, so that the sum is exact.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, name: str, size: int, rank: int) -> Tensor:
        ctx.ranks = Ranks(name, size, rank)
        operators = torch.ops._c10d_functional
        rows = operators.reduce_scatter_tensor.default(rows.contiguous(), "sum", size, name)
        return operators.wait_tensor.default(rows).squeeze(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return all_gather(gradient, ctx.ranks) / ctx.ranks.size, None, None, None


class _ToAll(Function):
    """(n, C) of this process's tokens to (R, n, C) of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, size: int, rank: int) -> Tensor:
        ctx.ranks = Ranks(name, size, rank)
        return all_gather(x, ctx.ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return gradient[ctx.ranks.rank] * ctx.ranks.size, None, None, None
