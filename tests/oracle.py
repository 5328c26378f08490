"""What the tests compare with: cross-entropy and its gradient in a wider type, and error measures.

The formulas stand apart from both the kernels and the eager backend; the target's gradient is the
sum of the others', so that it holds at p -> 1.
"""

from typing import NamedTuple

import numpy as np
import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FULL_DTYPES = (torch.float32, torch.float64)
REDUCED_DTYPES = (torch.bfloat16, torch.float16)


def half_ulp(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def random_logits(n, classes, *, dtype=torch.float32, scale=1.0, seed=0):
    """Logits (n, classes) from a normal distribution times `scale`, and targets (n,)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64) * scale
    target = torch.randint(classes, (n,), generator=generator)
    return logits.to(dtype), target


def random_like(x: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """An upstream gradient: normal, of `x`'s shape and type, and no stranger to either sign."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)


def gradient_of(function, logits, upstream):
    """The value of function(logits), and the gradient of the logits for this upstream gradient."""
    logits = logits.detach().requires_grad_()
    value = function(logits)
    (gradient,) = torch.autograd.grad(value, logits, upstream)
    return value.detach(), gradient


class Exact(NamedTuple):
    """Loss (N,) and gradient (N, C) of rows, as NumPy arrays of a type wider than the input's."""

    loss: np.ndarray
    gradient: np.ndarray


def exact(logits: torch.Tensor, target: torch.Tensor, upstream: torch.Tensor) -> Exact:
    """Unreduced loss of (N, C) logits and the gradient for `upstream` (N,), in long double for
    float64 input and float64 for the rest.
    """
    wide = np.longdouble if logits.dtype == torch.float64 else np.float64
    x, g = logits.double().numpy().astype(wide), upstream.double().numpy().astype(wide)
    rows, t = np.arange(x.shape[0]), target.numpy()
    shifted = x - x.max(1, keepdims=True)
    at_target = shifted[rows, t]
    others = np.exp(shifted)
    others[rows, t] = 0
    rest = others.sum(1)
    total = rest + np.exp(at_target)
    # Where the target is the maximum, log(total) = log1p(rest) without the cancellation.
    loss = np.where(at_target == 0, np.log1p(rest), np.log(total) - at_target)
    gradient = others / total[:, None]
    gradient[rows, t] = -rest / total
    return Exact(loss, gradient * g[:, None])


class Errors(NamedTuple):
    """The largest errors of a batch, each relative to the largest magnitude of its own kind."""

    loss: float = 0.0
    target_column: float = 0.0  # of the gradient
    other_columns: float = 0.0

    def pooled(self, other: "Errors") -> "Errors":
        return Errors(*map(max, self, other))


def errors(loss, gradient, target, truth: Exact) -> Errors:
    rows, t = np.arange(len(target)), target.numpy()

    def relative(got, want):
        difference, size = abs(got - want), abs(want)
        if difference.ndim == 2:  # the target column is a kind of its own
            difference[rows, t] = size[rows, t] = 0
        if size.max(initial=0) == 0:
            assert difference.max(initial=0) == 0, "expected zeros"
            return 0.0
        return float(difference.max() / size.max())

    got, want = gradient.double().numpy(), truth.gradient
    return Errors(
        relative(loss.double().numpy(), truth.loss),
        relative(got[rows, t], want[rows, t]),
        relative(got, want),
    )


def within_half_ulp(got: torch.Tensor, want: np.ndarray, slack: float, flushed=False) -> bool:
    """Whether every element is `want` rounded once to its type; `slack` is the relative error of
    the arithmetic before. `flushed`: subnormal numbers may be zero instead.
    """
    info = torch.finfo(got.dtype)
    tiny = info.smallest_normal if flushed else 0.5 * info.smallest_normal * info.eps
    bound = (half_ulp(got.dtype) + slack) * abs(want) + tiny
    return bool((abs(got.double().numpy() - want) <= bound).all())
