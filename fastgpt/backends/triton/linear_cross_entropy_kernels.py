"""Linear cross-entropy, in Triton: from slices of the classes to all of them.

The other kernels are those of the cross-entropy (cross_entropy_kernels.py), which see a row of
logits in slices s of the classes. Of each they give loss_s = sum_j c_j (lse_s - y_j) and lse_s, in
float64, and with A_s = sum_j c_j of sum A, P_s = exp(lse_s - lse), the row's are

    lse  = logsumexp over s of lse_s          loss = sum over s of loss_s + A_s (lse - lse_s)

whose terms are of one sign. The part of the gradient in a slice, for upstream gradients g of loss,
g_lse of lse and h of lse², is that of loss_s and lse_s with the upstream gradients

    of loss_s  = g
    of lse_s   = g (P_s (A - A_s) - A_s (1 - P_s)) + (g_lse + 2 h lse) P_s

of which the second may be all but the opposite of the first times A_s: so it is in float64. The
slice with the largest lse_s has lse - lse_s and 1 - P_s from the sum of the others.
"""

import triton
import triton.language as tl
from triton import knobs

from fastgpt.backends.triton.cross_entropy_kernels import _finite, _log1p, _shares

if knobs.runtime.interpret:
    from fastgpt.backends.triton import interpreter

    interpreter.correct()


@triton.jit
def _amount(
    s, t, here, w_t, weight_sums, slice_classes, classes, hard, spread, dtype: tl.constexpr,
    SMOOTHED: tl.constexpr,
):  # fmt: skip
    """A_s, rounded as the cross-entropy's kernels round it."""
    A = tl.where(here & (t // slice_classes == s), w_t, 0).to(dtype)
    if SMOOTHED:
        W = tl.full((), tl.minimum(slice_classes, classes - s * slice_classes), dtype)
        if weight_sums is not None:
            W = tl.load(weight_sums + s)
        hard, spread = _shares(hard, spread, dtype)
        A = hard * A + spread * W
    return A.to(tl.float64)


@triton.jit(debug=True)
def combine(
    targets,
    weights,
    weight_sums,  # (slices,)
    slice_losses,  # (slices, N) float64, as far apart as all that are of this shape
    slice_lses,  # the same; with grad_losses it becomes the upstream gradient of itself
    row_max,  # (slices, N)
    floors,  # (slices, N), what exp(y - row_max) must reach for its class to count; or None
    losses,
    lses,
    grad_losses,
    grad_lses,
    grad_squares,
    target_stride: tl.int64,
    grad_stride: tl.int64,
    lse_stride: tl.int64,
    square_stride: tl.int64,
    N: tl.int32,
    slices: tl.int32,
    slice_stride: tl.int32,
    slice_classes: tl.int32,
    classes: tl.int32,
    ignore_index: tl.int64,
    hard: tl.float64,
    spread: tl.float64,
    filter_eps: tl.float64,
    SMOOTHED: tl.constexpr,
    PARTIAL: tl.constexpr,  # the slices together are one of several, as Options has it
    ROWS: tl.constexpr,
):
    dtype: tl.constexpr = row_max.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_range = rows < N
    t = tl.load(targets + rows * target_stride, mask=in_range, other=0)
    kept = in_range & (t != ignore_index)
    here = kept & (t >= 0) & (t < classes)
    if not PARTIAL:
        tl.device_assert(here | (kept == 0), "Target is out of bounds")
        kept = here
    w_t = tl.full((ROWS,), 1, dtype)
    if weights is not None:
        w_t = tl.load(weights + t, mask=here, other=0)
    highest = tl.full((ROWS,), float("-inf"), tl.float64)
    top = tl.full((ROWS,), -1, tl.int32)
    for s in range(slices):
        lse_s = tl.load(slice_lses + s * slice_stride + rows, mask=kept, other=0)
        top = tl.where(lse_s > highest, s, top)
        highest = tl.maximum(highest, lse_s)
    m = _finite(highest)
    rest = tl.zeros((ROWS,), tl.float64)  # without the top one's, which is 1
    for s in range(slices):
        lse_s = tl.load(slice_lses + s * slice_stride + rows, mask=kept, other=0)
        rest += tl.where(top == s, 0, tl.exp(lse_s - m))
    exists = top >= 0  # or else all are -inf or NaN
    log_total = tl.where(exists, _log1p(rest), tl.log(rest))
    lse = tl.where(m == float("inf"), m, m + log_total)
    loss = tl.zeros((ROWS,), tl.float64)
    A = tl.zeros((ROWS,), tl.float64)
    for s in range(slices):
        at = s * slice_stride + rows
        A_s = _amount(
            s, t, here, w_t, weight_sums, slice_classes, classes, hard, spread, dtype, SMOOTHED
        )
        missing = lse - tl.load(slice_lses + at, mask=kept, other=0)
        missing = tl.where(top == s, log_total, missing)
        loss_s = tl.load(slice_losses + at, mask=kept, other=0)
        loss += loss_s + tl.where(A_s == 0, 0, A_s * missing)  # not 0 * inf: all may be -inf
        A += A_s
    nothing = tl.zeros((ROWS,), tl.int1)
    if PARTIAL:  # as in one slice of nothing but -inf
        nothing = lse == float("-inf")
        loss = tl.where(nothing, 0, loss)
    tl.store(losses + rows, tl.where(kept, loss, 0), mask=in_range)
    tl.store(lses + rows, tl.where(kept, lse, 0), mask=in_range)
    if grad_losses is not None:
        g = tl.load(grad_losses + rows * grad_stride, mask=kept, other=0).to(tl.float64)
        g_lse = tl.zeros((ROWS,), tl.float64)
        if grad_lses is not None:
            g_lse += tl.load(grad_lses + rows * lse_stride, mask=kept, other=0)
        if grad_squares is not None:
            h = tl.load(grad_squares + rows * square_stride, mask=kept, other=0)
            g_lse += 2 * h.to(tl.float64) * lse
        for s in range(slices):
            at = s * slice_stride + rows
            A_s = _amount(
                s, t, here, w_t, weight_sums, slice_classes, classes, hard, spread, dtype, SMOOTHED
            )
            share = tl.exp(tl.load(slice_lses + at, mask=kept, other=0) - m)
            others = tl.where(top == s, rest, 1 + rest - share)
            share = tl.where(top == s, 1, share)
            total = tl.where(exists, 1 + rest, rest)
            gradient = g * (share * (A - A_s) - others * A_s) + g_lse * share
            gradient = tl.where(nothing, 0, gradient / total)
            tl.store(slice_lses + at, tl.where(kept, gradient, 0), mask=in_range)
            if floors is not None:
                eps = tl.full((), filter_eps, tl.float64)
                floor = eps * tl.exp(lse - tl.load(row_max + at, mask=kept, other=0))
                tl.store(floors + at, tl.where(kept, floor, 0), mask=in_range)
