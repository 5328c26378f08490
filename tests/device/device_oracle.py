"""What the device tests compare with: both ops and their gradients in float64, on the device."""

import math
import os

import torch

import fastgpt
from fastgpt import dispatch

REHEARSED = os.environ.get("FASTGPT_TEST_DEVICE") == "cpu"  # in Triton's interpreter

# Whose cross-entropy kernels are tested: also CUDA's own, where there is CUDA.
BACKENDS = ("triton",) if REHEARSED or torch.version.hip else ("triton", "native")


def cross_entropy(*args, **kwargs):
    return _held(fastgpt.cross_entropy, *args, **kwargs)


def attention(*args, **kwargs):
    return _held(fastgpt.scaled_dot_product_attention, *args, **kwargs)


def _held(function, *args, **kwargs):
    """On the backend that the test prefers, Triton where it prefers none, and on no other."""
    explanation = fastgpt.explain(function, *args, **kwargs)
    assert explanation.backend == (dispatch.preferred() or "triton"), str(explanation)
    return function(*args, **kwargs)


def half_ulp(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def wider(dtype: torch.dtype) -> torch.dtype:
    """The type in which the kernels compute."""
    return torch.promote_types(dtype, torch.float32)


def normal(*size, dtype=torch.float32, device="cuda", seed=0, scale=1.0):
    """The same numbers on every device, for sizes that a CPU fills at once."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator, dtype=torch.float64) * scale
    return x.to(device=device, dtype=dtype)


def targets(n, classes, device="cuda", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(classes, (n,), generator=generator).to(device)


def assert_close(got, want, tolerance: float, name: str = ""):
    """Within `tolerance` of the largest magnitude, NaN nowhere."""
    error = (got.double() - want).abs().max().item()
    largest = want.abs().max().item()
    assert error <= tolerance * largest, f"{name}: error {error:.3g} of {largest:.3g}"


def both(function, leaves, upstream):
    """The value of function(*leaves) and the gradients for an upstream gradient."""
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream)


# ---- cross-entropy ----


def exact_cross_entropy(
    logits,
    target,
    upstream,
    *,
    weight=None,
    ignore_index=-100,
    reduction="none",
    label_smoothing=0.0,
):
    """Loss and gradient of logits (N, C): with q_j the share of class j in the target,

    loss = - sum_j w_j q_j log p_j          dx = g (p sum_j w_j q_j - w q)
    """
    x = logits.detach().double()
    classes = x.shape[1]
    kept = target != ignore_index
    onehot = torch.arange(classes, device=x.device) == target.unsqueeze(1)
    q = (1 - label_smoothing) * onehot + label_smoothing / classes
    w = torch.ones(classes, device=x.device) if weight is None else weight
    wq = (w.double() * q).masked_fill(~kept.unsqueeze(1), 0)
    log_p = torch.log_softmax(x.masked_fill(~kept.unsqueeze(1), 0), 1)
    loss = -(wq * log_p).sum(1)
    g = upstream.double()
    if reduction == "mean":
        weights = (w.double() * onehot).sum(1).masked_fill(~kept, 0).sum()
        loss, g = loss.sum() / weights, g / weights
    elif reduction == "sum":
        loss = loss.sum()
    g = g.expand(len(x)).unsqueeze(1)
    gradient = g * (log_p.exp() * wq.sum(1, keepdim=True) - wq)
    return loss, gradient.masked_fill(~kept.unsqueeze(1), 0)


def check_cross_entropy(got, logits, target, upstream, *, range_of=8.0, **options):
    """`got` is loss and gradient. They are rounded once to their type; before that, exp's relative
    error grows with the range of the logits, whose difference is rounded to the accumulator's.
    """
    loss, gradient = got
    truth, truths = exact_cross_entropy(logits, target, upstream, **options)
    dtype = logits.dtype
    assert loss.dtype == gradient.dtype == dtype
    tolerance = half_ulp(dtype) + 16 * half_ulp(wider(dtype)) * max(1.0, range_of / 8)
    assert_close(loss, truth, tolerance, "loss")
    # The target's column is larger than the others by a factor of the classes.
    rows = target.masked_fill(target == options.get("ignore_index", -100), 0).unsqueeze(1)
    assert_close(gradient.gather(1, rows), truths.gather(1, rows), tolerance, "gradient of target")
    if logits.shape[1] > 1:
        others = (x.double().scatter(1, rows, 0) for x in (gradient, truths))
        assert_close(*others, tolerance, "gradient of the others")


def check_against_eager(function, leaves, upstream):
    """The value of function(*leaves) and its gradients: against the eager backend in float64. Each
    is rounded once to the first leaf's type, or to a wider one.
    """
    before = [x.detach().double().requires_grad_() for x in leaves]  # it may write over them
    got = both(function, leaves, upstream)
    with fastgpt.backend("eager"):
        want = both(function, before, upstream.double())
    dtype = leaves[0].dtype
    tolerance = half_ulp(dtype) + 64 * half_ulp(wider(dtype))
    for name, ours, truth in zip(("value", "gradient", "target's"), got, want, strict=False):
        assert_close(ours, truth, tolerance, name)
    return got


# ---- attention ----


def exact_attention(
    query, key, value, upstream, *, attn_mask=None, is_causal=False, scale=None, rows=None
):
    """Output and gradients of query, key and value. With `rows`, a slice of the queries, those
    queries alone.
    """
    q, k, v = (x.detach().double().requires_grad_() for x in (query, key, value))
    group = q.shape[1] // k.shape[1]
    L, S = q.shape[2], k.shape[2]
    i = torch.arange(L, device=q.device)
    if rows is not None:
        i, upstream = i[rows], upstream[:, :, rows]
    chosen = q[:, :, i]
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    scores = chosen @ k.repeat_interleave(group, 1).mT * scale
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.double()
    if is_causal:
        scores = scores.masked_fill(torch.arange(S, device=q.device) > i[:, None], -math.inf)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    p = torch.softmax(scores.masked_fill(empty, 0), -1).masked_fill(empty, 0)
    output = p @ v.repeat_interleave(group, 1)
    return output.detach(), *torch.autograd.grad(output, (q, k, v), upstream.double())


TENSORS = ("output", "grad_query", "grad_key", "grad_value")


def attention_tolerance(dtype: torch.dtype) -> float:
    """Relative to the largest magnitude, and to 1 where that is less."""
    return 64 * half_ulp(wider(dtype)) + 6 * half_ulp(dtype)


def check_attention(got, truth, dtype):
    for name, ours, want in zip(TENSORS, got, truth, strict=True):
        assert ours.dtype == dtype, name
        assert ours.shape == want.shape, name
        error = (ours.double() - want).abs().max().item()
        limit = attention_tolerance(dtype) * max(1.0, want.abs().max().item())
        assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:.3g}"
