"""Calls of both ops that the tests of streams, graphs and compilation share."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from device_oracle import both, normal, targets
from torch import Tensor

import fastgpt


class Call(NamedTuple):
    """A differentiable call. Its numbers are new for each seed, its shapes are not."""

    function: Callable[..., Tensor]  # of leaves and constants
    leaves: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    upstream: Tensor

    def run(self) -> tuple[Tensor, ...]:
        """The value and the gradients of the leaves."""
        return both(lambda *x: self.function(*x, *self.constants), self.leaves, self.upstream)

    def fill(self, other: "Call") -> None:
        """With another call's numbers, in place."""
        mine = (*self.leaves, *self.constants, self.upstream)
        theirs = (*other.leaves, *other.constants, other.upstream)
        with torch.no_grad():
            for x, y in zip(mine, theirs, strict=True):
                x.copy_(y)


def plain_loss(seed: int = 0, device: str = "cuda") -> Call:
    x = normal(96, 5003, dtype=torch.bfloat16, device=device, seed=seed).requires_grad_()
    upstream = torch.tensor(1.5, dtype=torch.bfloat16, device=device)
    return Call(fastgpt.cross_entropy, (x,), (targets(96, 5003, device, seed),), upstream)


def loss_with_options(seed: int = 0, device: str = "cuda") -> Call:
    def function(x: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        return fastgpt.cross_entropy(x, t, weight, ignore_index=3, label_smoothing=0.1)

    x = normal(96, 700, device=device, seed=seed).requires_grad_()
    t = targets(96, 700, device, seed)
    t[::7] = 3
    weight = normal(700, device=device, seed=seed + 10).abs() + 0.5
    return Call(function, (x,), (t, weight), torch.tensor(1.5, device=device))


def attention(seed: int = 0, device: str = "cuda") -> Call:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastgpt.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    sizes = (2, 4, 200, 64), (2, 2, 200, 64), (2, 2, 200, 64), (2, 4, 200, 64)
    *leaves, upstream = (
        normal(*size, dtype=torch.bfloat16, device=device, seed=seed + i)
        for i, size in enumerate(sizes)
    )
    return Call(function, tuple(x.requires_grad_() for x in leaves), (), upstream)


def attention_with_mask(seed: int = 0, device: str = "cuda") -> Call:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return fastgpt.scaled_dot_product_attention(q, k, v, mask)

    *leaves, upstream = (
        normal(2, 3, 150, 80, dtype=torch.float16, device=device, seed=seed + i) for i in range(4)
    )
    mask = normal(2, 1, 150, 150, device=device, seed=seed + 20) > -0.5
    return Call(function, tuple(x.requires_grad_() for x in leaves), (mask,), upstream)


CALLS = (plain_loss, loss_with_options, attention, attention_with_mask)
