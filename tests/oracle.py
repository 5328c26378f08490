"""What the tests compare with: cross-entropy, attention and their gradients in a wider type; error
measures; and the memory that a call holds.

The formulas stand apart from both the kernels and the eager backend; the target's gradient is the
sum of the others', so that it holds at p -> 1.
"""

import math
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
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)


def gradient_of(function, logits, upstream):
    """The value of function(logits), and the gradient of the logits for this upstream gradient."""
    return gradients_of(function, [logits], upstream)


def gradients_of(function, inputs, upstream):
    """The value of function(*inputs), and the gradient of each for this upstream gradient."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream)


def wide(x: torch.Tensor) -> np.ndarray:
    """`x` as a NumPy array of a wider type: long double for float64, float64 for the rest."""
    kind = np.longdouble if x.dtype == torch.float64 else np.float64
    return x.detach().double().numpy().astype(kind)


class Exact(NamedTuple):
    """Loss (N,) and gradient (N, C) of rows, as NumPy arrays of a type wider than the input's."""

    loss: np.ndarray
    gradient: np.ndarray


def exact(
    logits: torch.Tensor,
    target: torch.Tensor,
    upstream: torch.Tensor,
    weight: torch.Tensor | None = None,
    smoothing: float = 0.0,
) -> Exact:
    """Unreduced loss of (N, C) logits and the gradient for `upstream` (N,), in long double for
    float64 input and float64 for the rest.

    With class weights w and smoothing s: sum over j of c_j (-log p_j), where c_j is s / C w_j and
    at the target (1 - s) w_t more.
    """
    x = wide(logits)
    classes = x.shape[1]
    g = upstream.double().numpy().astype(x.dtype)
    w = np.ones(classes, x.dtype) if weight is None else weight.double().numpy().astype(x.dtype)
    hard, spread = (
        (1 - x.dtype.type(smoothing)) * w[target.numpy()],
        x.dtype.type(smoothing) / classes,
    )
    rows, t = np.arange(x.shape[0]), target.numpy()
    shifted = x - x.max(1, keepdims=True)
    at_target = shifted[rows, t]
    others = np.exp(shifted)
    others[rows, t] = 0
    rest = others.sum(1)
    total = rest + np.exp(at_target)
    # Where the target is the maximum, log(total) = log1p(rest) without the cancellation.
    nll = np.where(at_target == 0, np.log1p(rest), np.log(total) - at_target)
    loss = hard * nll
    gradient = (hard + spread * w.sum())[:, None] * others / total[:, None]
    gradient[rows, t] = -hard * rest / total
    if smoothing:
        loss += spread * (w * (nll[:, None] + at_target[:, None] - shifted)).sum(1)
        gradient -= spread * w
        gradient[rows, t] += spread * w.sum() * np.exp(at_target) / total
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


# ---- attention ----

TENSORS = ("output", "grad_query", "grad_key", "grad_value")


def random_qkv(
    B=2, Hq=2, H=2, L=5, S=7, D=8, Dv=8, *, dtype=torch.float64, size=1.0, offset=0.0, seed=0
):
    """Query (B, Hq, L, D), key (B, H, S, D) and value (B, H, S, Dv): normal, times `size`, plus
    `offset`.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, Hq, L, D), (B, H, S, D), (B, H, S, Dv)
    return [
        (torch.randn(s, generator=generator, dtype=torch.float64) * size + offset).to(dtype)
        for s in shapes
    ]


def upstream_for(query, value, seed=1):
    """A random upstream gradient (..., Hq, L, Dv) of the output."""
    return random_like(query.new_empty(*query.shape[:-1], value.shape[-1]), seed)


def attention_gradients(function, inputs, upstream=None, **options):
    """The output and the gradients of query, key and value."""
    if upstream is None:
        upstream = upstream_for(inputs[0], inputs[2])
    return gradients_of(lambda *x: function(*x, **options), inputs, upstream)


def random_mask(*shape, seed=1):
    """bool, at least one key for each query."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(shape, generator=generator) < 0.6
    allowed[..., 0] = True
    return allowed


def additive(allowed, dtype=torch.float64):
    """A random additive mask, -inf where a boolean one is False."""
    return random_like(torch.empty(allowed.shape, dtype=dtype)).masked_fill(~allowed, -math.inf)


def exact_attention(
    query, key, value, upstream, *, attn_mask=None, is_causal=False, scale=None
) -> tuple[np.ndarray, ...]:
    """Output and the gradients of query, key and value, for 4-dimensional inputs in a wider type.

        P = softmax(scale Q K^T + mask)    O = P V    dP = dO V^T    dS = P (dP - rowsum(P dP))
        dQ = scale dS K                    dK = scale dS^T Q         dV = P^T dO

    A mask and `is_causal` must both allow a position. Keys and values are summed over the group of
    query heads that share them.
    """
    q, k, v, g = map(wide, (query, key, value, upstream))
    (B, Hq, L, D), (H, S) = q.shape, k.shape[1:3]
    k, v = (x.repeat(Hq // H, axis=1) for x in (k, v))
    scale = 1 / np.sqrt(q.dtype.type(D)) if scale is None else q.dtype.type(scale)
    scores = q @ k.mT * scale
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.double().numpy()
    elif attn_mask is not None:
        scores = np.where(attn_mask.numpy(), scores, -np.inf)
    if is_causal:
        scores = np.where(np.tri(L, S, dtype=bool), scores, -np.inf)
    highest = scores.max(-1, keepdims=True)
    p = np.exp(scores - np.where(highest == -np.inf, 0, highest))
    total = p.sum(-1, keepdims=True)
    p = p / np.where(total == 0, 1, total)
    dp = g @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale

    def of_group(gradient):
        return gradient.reshape(B, H, Hq // H, S, -1).sum(2)

    return (
        p @ v,
        ds @ k,
        of_group(ds.mT @ q),
        of_group(p.mT @ g),
    )


def relative_errors(found, truth) -> list[float]:
    """The largest error of each tensor, relative to the largest magnitude of its truth."""
    return [
        float(abs(got.double().numpy() - want).max() / abs(want).max())
        for got, want in zip(found, truth, strict=True)
    ]
