"""Calls of both ops that the tests of streams, graphs and compilation share, with the backends they
run on.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from device_oracle import BACKENDS, both, normal, targets
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


def loss_with_everything(seed: int = 0, device: str = "cuda") -> Call:
    def function(x: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        loss, lse = fastgpt.cross_entropy(
            x, t, weight, label_smoothing=0.1, softcap=5.0, z_loss=1e-2, return_lse=True
        )
        return loss + 0.1 * lse.mean().to(loss.dtype)

    x = normal(33, 1003, dtype=torch.float16, device=device, seed=seed, scale=3).requires_grad_()
    t = targets(33, 1003, device, seed)
    t[::7] = -100
    weight = normal(1003, dtype=torch.float16, device=device, seed=seed + 10).abs() + 0.5
    upstream = torch.tensor(1.5, dtype=torch.float16, device=device)
    return Call(function, (x,), (t, weight), upstream)


def loss_of_probabilities(seed: int = 0, device: str = "cuda") -> Call:
    x = normal(33, 1003, dtype=torch.bfloat16, device=device, seed=seed).requires_grad_()
    q = torch.softmax(normal(33, 1003, device=device, seed=seed + 10), 1).requires_grad_()
    return Call(fastgpt.cross_entropy, (x, q), (), torch.tensor(1.5, device=device))


def loss_by_columns(seed: int = 0, device: str = "cuda") -> Call:
    x = normal(3, 700, 37, dtype=torch.bfloat16, device=device, seed=seed).requires_grad_()
    t = targets(3 * 37, 700, device, seed).view(3, 37)
    upstream = torch.tensor(1.5, dtype=torch.bfloat16, device=device)
    return Call(fastgpt.cross_entropy, (x,), (t,), upstream)


def loss_of_wide_rows(seed: int = 0, device: str = "cuda") -> Call:
    """Too wide for one multiprocessor to hold a row."""
    x = normal(5, 150_001, device=device, seed=seed).requires_grad_()
    upstream = torch.tensor(1.5, device=device)
    return Call(fastgpt.cross_entropy, (x,), (targets(5, 150_001, device, seed),), upstream)


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


LOSSES = (plain_loss, loss_with_options)
# Run on CUDA's own kernels only: Triton's do not take columns, and each takes seconds to compile.
NATIVE_LOSSES = (loss_with_everything, loss_of_probabilities, loss_by_columns, loss_of_wide_rows)
ATTENTION = (attention, attention_with_mask)

# For tests with the argument `make` and the fixture `kernels`, on whose backend the call runs.
calls = pytest.mark.parametrize(
    ("make", "kernels"),
    [
        pytest.param(make, backend, id=f"{make.__name__}-{backend}")
        for backend in BACKENDS
        for make in LOSSES + (NATIVE_LOSSES if backend == "native" else ATTENTION)
    ],
    indirect=["kernels"],
)
