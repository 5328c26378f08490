"""Softmax-cross-entropy over rows, in Triton: the kernels, which cross_entropy.py launches.

For a row of C logits x, y = k tanh(x / k) with a softcap k and y = x without, m = max_j y_j and a
target t, d = y_t - m <= 0:

    rest  = sum over j != t of exp(y_j - m)         total = rest + exp(d)
    lse   = m + log(total)                          where d = 0, log1p(rest): no cancellation
    plain = log(total) - d
    p_j   = exp(y_j - m) / total                    1 - p_t = rest / total, exact as p_t -> 1

and, with class weights w (1 without them), their sum W, the share `hard` of the target and the
share `spread` of each class, upstream gradients g of the loss and g_lse of lse,

    loss = hard w_t plain + spread (W plain - sum_j w_j (y_j - y_t))
    dy_j = B p_j - g spread w_j                     B = g (hard w_t + spread W) + g_lse
    dy_t = g (spread (W p_t - w_t) - hard w_t rest / total) + g_lse p_t

Class probabilities q make c_j = w_j (hard q_j + spread) of sum A the shares of the classes. There
is no t: rest is the sum over all j, and of the terms of the loss none cancels another,

    loss = A log(rest) + sum_j c_j (m - y_j)        dy_j = B p_j - g c_j, B = g A + g_lse

Nor is there a t where the logits are a slice of the classes (PARTIAL) and the target is in another:
its terms are left out. A slice that is all -inf has none of the probability, and m = 0.

The forward reads the logits once and keeps m and rest; the backward reads them once more and writes
the gradient once. The maximum and the sum are taken together (Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018), by each thread over its own vectors.

A row of an odd number of classes begins at any address, so a wide row is a body of whole aligned
vectors of 128 bits and two edges, the few classes before and behind it. Narrow rows stay on chip,
several to a program.

What a call does not ask for is not compiled: the options are constants, and a tensor that is None
takes with it all that would be done with it.
"""

import triton
import triton.language as tl
from triton import knobs

from fastgpt.backends.triton.functions import cap_of, capped, exp

if knobs.runtime.interpret:
    from fastgpt.backends.triton import interpreter

    interpreter.correct()

# ---- functions of a number ----


@triton.jit
def _finite(m):
    """A maximum to subtract: over nothing but -inf it is 0, and exp(-inf - 0) no NaN."""
    return tl.where(m == float("-inf"), 0, m)


@triton.jit
def _or(x, default):
    return default if x is None else x


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0: the quotient makes good what rounding took from 1 + x."""
    above = 1 + x
    kept = above - 1
    return tl.where(kept == 0, x, tl.log(above) * (x / tl.where(kept == 0, 1, kept)))


# ---- a row's numbers, in scalars or in vectors of rows ----


@triton.jit
def _logits(at, there, cap, dtype: tl.constexpr, CAPPED: tl.constexpr):
    """y, which is -inf where nothing is."""
    y = tl.load(at, mask=there, other=float("-inf")).to(dtype)
    if CAPPED:
        y, _ = capped(y, cap, at.dtype.element_ty == tl.float32)
        y = tl.where(there, y, float("-inf"))
    return y


@triton.jit
def _target(
    targets, stride, first_class, rows, in_range, ignore_index, classes,
    PROBABILITIES: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """The rows' targets, -1 where there is none; which of them there are; and which rows count."""
    if PROBABILITIES:
        return tl.full(rows.shape, -1, tl.int32), in_range & (rows < 0), in_range
    t = tl.load(targets + rows * stride, mask=in_range, other=0)
    kept = in_range & (t != ignore_index)
    if first_class is not None:
        t -= first_class
    exists = (t >= 0) & (t < classes)
    here = kept & exists
    if not PARTIAL:
        tl.device_assert(exists | (kept == 0), "Target is out of bounds")
        kept = here
    return tl.where(here, t, -1).to(tl.int32), here, kept


@triton.jit
def _weights(weights, total_weight, t, here, classes, dtype: tl.constexpr):
    """w_t and W, which is only there when it is needed: for smoothing."""
    w_t = tl.full(t.shape, 1, dtype)
    W = tl.full((), classes, dtype)
    if weights is not None:
        w_t = tl.load(weights + t, mask=here, other=0)
    if total_weight is not None:
        W = tl.load(total_weight)
    return w_t, W


@triton.jit
def _reference(y_t):
    """What the logits are counted from in the smoothed sum: y_t, or 0 where that is no number."""
    return tl.where(tl.abs(y_t) < float("inf"), y_t, 0)


@triton.jit
def _at_target(
    x_rows, t, here, kept, cap, dtype: tl.constexpr,
    CAPPED: tl.constexpr, PROBABILITIES: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """y_t, which is -inf where there is no target, and the reference: the first logit for such."""
    if PROBABILITIES:
        y_t = tl.full(t.shape, float("-inf"), dtype)
        reference = y_t  # of no use
    else:
        near = x_rows + t
        if PARTIAL:
            near = x_rows + tl.where(here, t, 0)
        y_t = tl.load(near, mask=kept, other=0).to(dtype)
        if CAPPED:
            y_t, _ = capped(y_t, cap, x_rows.dtype.element_ty == tl.float32)
        reference = _reference(y_t)
        if PARTIAL:
            y_t = tl.where(here, y_t, float("-inf"))
    return y_t, reference


@triton.jit
def _shares(hard, spread, dtype: tl.constexpr):
    """float64 arguments (numbers, in the interpreter) in the accumulator type."""
    return tl.full((), hard, dtype), tl.full((), spread, dtype)


@triton.jit
def _share(
    q_at, there, column, weights, shares, dtype: tl.constexpr, SMOOTHED: tl.constexpr
):  # fmt: skip
    """c_j of class probabilities, 0 where nothing is."""
    c = tl.load(q_at, mask=there, other=0).to(dtype)
    if SMOOTHED:
        c = tl.where(there, shares[0] * c + shares[1], 0)
    if weights is not None:
        c *= tl.load(weights + column, mask=there, other=0)
    return c


@triton.jit
def _below(c, y, there, highest):
    """c_j (highest - y_j), 0 where nothing is: y is -inf there."""
    return tl.where(there, c * (highest - y), 0)


@triton.jit
def _spread_terms(y, there, column, reference, weights):
    """w_j (y_j - reference), 0 where nothing is."""
    term = y - reference
    if weights is not None:
        term *= tl.load(weights + column, mask=there, other=0)
    return tl.where(there, term, 0)


@triton.jit
def _log_total(y_t, m, rest):
    """log(rest + exp(y_t - m)), and lse."""
    d = y_t - m
    log_total = tl.where(d == 0, _log1p(rest), tl.log(rest + tl.exp(d)))
    infinite = tl.where(y_t == y_t, m, y_t)  # not that of a maximum over nothing but NaN
    return log_total, tl.where(tl.abs(m) < float("inf"), m + log_total, infinite)


@triton.jit
def _loss_of_class(
    y_t, reference, here, m, rest, w_t, W, spread_sum, hard, spread, dtype: tl.constexpr,
    SMOOTHED: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """The loss and lse, in `dtype`. `spread_sum` is that of w_j (y_j - reference)."""
    y_t, m = y_t.to(dtype), m.to(dtype)
    log_total, lse = _log_total(y_t, m, rest.to(dtype))
    loss = w_t * (log_total - (y_t - m))
    if SMOOTHED:
        hard, spread = _shares(hard, spread, dtype)
        loss *= hard
    if PARTIAL:
        loss = tl.where(here, loss, 0)
    if SMOOTHED:
        loss += spread * (W * (log_total - (reference.to(dtype) - m)) - spread_sum)
    return _none_of_nothing(loss, log_total, PARTIAL), lse


@triton.jit
def _loss_of_probabilities(
    A, below, y_t, m, rest, dtype: tl.constexpr, PARTIAL: tl.constexpr
):  # fmt: skip
    """The loss and lse, in `dtype`, from the sum of c_j (m - y_j)."""
    log_total, lse = _log_total(y_t.to(dtype), m.to(dtype), rest.to(dtype))
    return _none_of_nothing(A * log_total + below, log_total, PARTIAL), lse


@triton.jit
def _none_of_nothing(loss, log_total, PARTIAL: tl.constexpr):
    """0 where a slice has none of the probability: its lse, -inf, says that it costs infinity."""
    if PARTIAL:
        loss = tl.where(log_total == float("-inf"), 0, loss)
    return loss


@triton.jit
def _slopes(
    grad_losses, grad_stride, grad_lses, lse_stride, row_max, rests, x_at_target, A, weights,
    total_weight, rows, t, here, kept, classes, hard, spread, cap,
    SMOOTHED: tl.constexpr, CAPPED: tl.constexpr,
    PROBABILITIES: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """m, B / total, the factor of the shares in the gradient (g spread for the weights, g for
    probabilities), and the target's gradient: all of them 0 for an ignored row, whose upstream
    gradient may be the infinity of a mean over no rows.
    """
    g = tl.load(grad_losses + rows * grad_stride, mask=kept, other=0)
    m = tl.load(row_max + rows, mask=kept, other=0)
    rest = tl.load(rests + rows, mask=kept, other=1)
    if grad_lses is not None:
        g_lse = tl.load(grad_lses + rows * lse_stride, mask=kept, other=0)
    if PROBABILITIES:
        B = g * A
        if grad_lses is not None:
            B += g_lse
        return m, _probability(B, rest, PARTIAL), g, g
    y_t = tl.load(x_at_target, mask=here, other=0).to(g.dtype)
    if CAPPED:
        y_t, slope = capped(y_t, cap, x_at_target.dtype.element_ty == tl.float32)
    e_t = tl.exp(y_t - m)
    if PARTIAL:
        e_t = tl.where(here, e_t, 0)
    total = rest + e_t
    amount, W = _weights(weights, total_weight, t, here, classes, g.dtype)
    others = rest / total
    if PARTIAL:
        amount = tl.where(here, amount, 0)
        others = tl.where(total == 0, 1, others)
    at_target = -amount * others
    if SMOOTHED:
        hard, spread = _shares(hard, spread, g.dtype)
        at_target = hard * at_target + spread * (W * _probability(e_t, total, PARTIAL) - amount)
        amount = hard * amount + spread * W
        uniform = g * spread
    else:
        uniform = g
    at_target *= g
    B = g * amount
    if grad_lses is not None:
        # In float64 where that is the type of g_lse, since one may take most of the other away.
        at_target += (g_lse * _probability(e_t, total, PARTIAL)).to(g.dtype)
        B = (g.to(g_lse.dtype) * amount + g_lse).to(g.dtype)
    if CAPPED:
        at_target *= slope
    return m, _probability(B, total, PARTIAL), uniform, at_target


@triton.jit
def _probability(x, total, PARTIAL: tl.constexpr):
    """x / total; in a slice without any probability 0."""
    p = x / total
    if PARTIAL:
        p = tl.where(total == 0, 0, p)
    return p


@triton.jit
def _gradient(
    x_at, q_at, column, there, weights, slopes, floor, shares, cap, dtype: tl.constexpr,
    SMOOTHED: tl.constexpr, CAPPED: tl.constexpr, PROBABILITIES: tl.constexpr,
):  # fmt: skip
    """The gradient of some columns, from their logits, as if the target were not among them."""
    m, at_others, uniform, _ = slopes
    FULL: tl.constexpr = x_at.dtype.element_ty == tl.float32
    y = tl.load(x_at, mask=there, other=0).to(dtype)
    if CAPPED:
        y, slope = capped(y, cap, FULL)
    z = exp(y - m, FULL)
    if floor is not None:
        z = tl.where(z < floor, 0, z)
    z *= at_others
    if PROBABILITIES:
        z -= uniform * _share(q_at, there, column, weights, shares, dtype, SMOOTHED)
    elif SMOOTHED:
        if weights is not None:
            z -= uniform * tl.load(weights + column, mask=there, other=0)
        else:
            z -= uniform
    if CAPPED:
        z *= slope
    return z


# ---- wide rows: a program forward has one, a program backward a block of columns of one ----

# Their logits, probabilities and gradients are not specialized: a launch would find them to lie
# within 2 GiB and take AMD's buffer loads, which lose what `multiple_of` says and so fall to one
# class at a time.


@triton.jit
def _body(row, classes, LANES: tl.constexpr):
    """How many classes stand before the first whole vector, and in the whole vectors."""
    size: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    ahead = (-(row.to(tl.int64) // size)) & (LANES - 1)
    head = tl.minimum(ahead.to(tl.int32), classes)
    return head, tl.multiple_of((classes - head) // LANES * LANES, LANES)


@triton.jit
def _aligned(row, head, IN_PHASE: tl.constexpr):
    """The first class of the body, in a row that may be aligned otherwise than the body is."""
    first = row + head
    if IN_PHASE:
        first = tl.multiple_of(first, 16)
    return first


@triton.jit
def _edges(head, body, classes, LANES: tl.constexpr):
    """The columns before and behind the body, and which of them there are."""
    lane = tl.arange(0, 2 * LANES)
    before = lane < LANES
    column = tl.where(before, lane, lane - LANES + head + body)
    return column, tl.where(before, lane < head, column < classes)


@triton.jit
def _vectors(BLOCK: tl.constexpr, LANES: tl.constexpr):
    """The numbers of a block's classes, a row for each vector."""
    return tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def _put(y, value, offset, t, start, BLOCK: tl.constexpr):
    """y with a value at the target. All but one of a row's blocks are spared the comparison."""
    if (start <= t) & (t < start + BLOCK):
        y = tl.where(offset == t, value, y)
    return y


@triton.jit(debug=True, do_not_specialize=["logits", "targets"])
def forward_wide(
    logits,
    targets,
    weights,
    total_weight,
    losses,
    lses,
    row_max,
    rests,
    row_stride: tl.int64,
    target_stride: tl.int64,
    first_class,  # of the logits, from which the targets are counted; None: 0
    classes: tl.int32,
    ignore_index: tl.int64,
    hard: tl.float64,
    spread: tl.float64,
    softcap: tl.float64,
    SMOOTHED: tl.constexpr,
    CAPPED: tl.constexpr,
    PARTIAL: tl.constexpr,
    TARGET_IN_PHASE: tl.constexpr,  # rows of probabilities are aligned as those of the logits
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PROBABILITIES: tl.constexpr = targets.dtype.element_ty.is_floating()
    FULL: tl.constexpr = logits.dtype.element_ty == tl.float32
    dtype: tl.constexpr = row_max.dtype.element_ty
    wide: tl.constexpr = losses.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    t, here, kept = _target(
        targets, target_stride, first_class, row, row >= 0, ignore_index, classes,
        PROBABILITIES, PARTIAL,
    )  # fmt: skip
    if kept:
        x_row = logits + row * row_stride
        cap = cap_of(softcap, dtype)
        y_t, reference = _at_target(
            x_row, t, here, kept, cap, dtype, CAPPED, PROBABILITIES, PARTIAL
        )
        head, body = _body(x_row, classes, LANES)
        aligned = _aligned(x_row, head, True)
        m = tl.full((BLOCK // LANES,), float("-inf"), dtype)  # of each thread
        s = tl.zeros((BLOCK // LANES,), dtype)
        if PROBABILITIES:
            q_row = targets + row * target_stride
            q_aligned = _aligned(q_row, head, TARGET_IN_PHASE)
            shares = _shares(hard, spread, dtype)
            A = tl.zeros((BLOCK // LANES, LANES), dtype)
            below = tl.zeros((BLOCK // LANES, LANES), dtype)
        else:
            spread_sum = tl.zeros((BLOCK // LANES,), dtype)
        for start in range(0, body, BLOCK):
            offset = start + _vectors(BLOCK, LANES)
            there = offset < body
            y = _logits(aligned + offset, there, cap, dtype, CAPPED)
            if not PROBABILITIES:
                if SMOOTHED:
                    term = _spread_terms(y, there, head + offset, reference, weights)
                    spread_sum += tl.sum(term, 1)
                y = _put(y, float("-inf"), offset, t - head, start, BLOCK)  # no part of the rest
            highest = tl.maximum(m, tl.max(y, 1))
            shift = _finite(highest)
            s = s * exp(m - shift, FULL) + tl.sum(exp(y - shift[:, None], FULL), 1)
            if PROBABILITIES:
                c = _share(
                    q_aligned + offset, there, head + offset, weights, shares, dtype, SMOOTHED
                )
                below += A * (shift - _finite(m))[:, None]
                below += _below(c, y, there, shift[:, None])
                A += c
            m = highest
        column, there = _edges(head, body, classes, LANES)
        y_edge = _logits(x_row + column, there, cap, dtype, CAPPED)
        others = y_edge
        if not PROBABILITIES:
            others = tl.where(column == t, float("-inf"), y_edge)
        row_highest = tl.maximum(tl.maximum(tl.max(m, 0), tl.max(others, 0)), y_t)
        shift_row = _finite(row_highest)
        rest = tl.sum(s * exp(m - shift_row, FULL), 0) + tl.sum(exp(others - shift_row, FULL), 0)
        if PARTIAL:
            row_highest = shift_row
        if PROBABILITIES:
            c_edge = _share(q_row + column, there, column, weights, shares, dtype, SMOOTHED)
            below += A * (shift_row - _finite(m))[:, None]
            row_below = tl.sum(tl.sum(below, 1), 0)
            row_below += tl.sum(_below(c_edge, y_edge, there, shift_row), 0)
            row_A = tl.sum(tl.sum(A, 1), 0) + tl.sum(c_edge, 0)
            loss, lse = _loss_of_probabilities(
                row_A, row_below, y_t, row_highest, rest, wide, PARTIAL
            )
        else:
            row_spread = tl.sum(spread_sum, 0)
            if SMOOTHED:
                row_spread += tl.sum(_spread_terms(y_edge, there, column, reference, weights), 0)
            w_t, W = _weights(weights, total_weight, t, here, classes, dtype)
            loss, lse = _loss_of_class(
                y_t, reference, here, row_highest, rest, w_t, W, row_spread, hard, spread, wide,
                SMOOTHED, PARTIAL,
            )  # fmt: skip
        tl.store(losses + row, loss)
        tl.store(lses + row, lse)
        tl.store(row_max + row, row_highest)
        tl.store(rests + row, rest)
    else:
        tl.store(losses + row, 0.0)
        tl.store(lses + row, 0.0)
        tl.store(row_max + row, 0.0)
        tl.store(rests + row, 0.0)


@triton.jit(do_not_specialize=["targets"])
def shares_wide(
    targets,
    weights,
    amounts,
    target_stride: tl.int64,
    classes: tl.int32,
    hard: tl.float64,
    spread: tl.float64,
    SMOOTHED: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A of rows of probabilities, which each program of `backward_wide` needs before it begins."""
    dtype: tl.constexpr = amounts.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    q_row = targets + row * target_stride
    shares = _shares(hard, spread, dtype)
    head, body = _body(q_row, classes, LANES)
    aligned = _aligned(q_row, head, True)
    A = tl.zeros((BLOCK // LANES,), dtype)
    for start in range(0, body, BLOCK):
        offset = start + _vectors(BLOCK, LANES)
        there = offset < body
        c = _share(aligned + offset, there, head + offset, weights, shares, dtype, SMOOTHED)
        A += tl.sum(c, 1)
    column, there = _edges(head, body, classes, LANES)
    c_edge = _share(q_row + column, there, column, weights, shares, dtype, SMOOTHED)
    tl.store(amounts + row, tl.sum(A, 0) + tl.sum(c_edge, 0))


@triton.jit(debug=True, do_not_specialize=["logits", "targets", "gradients"])
def backward_wide(
    grad_losses,
    grad_lses,
    logits,
    targets,
    at_targets,  # the logits of the targets, where the gradient is written over the logits
    amounts,  # A of each row of probabilities
    weights,
    total_weight,
    row_max,
    rests,
    gradients,  # None: the logits
    gradient_stride,  # None: the number of classes
    floors,  # what exp(y - m) must reach, or else it is 0; None: everything does
    grad_stride: tl.int64,
    lse_stride: tl.int64,
    row_stride: tl.int64,
    target_stride: tl.int64,
    first_class,  # of the logits, from which the targets are counted; None: 0
    classes: tl.int32,
    stripes: tl.int32,  # of a row, each one program's
    stripe_blocks: tl.int32,
    ignore_index: tl.int64,
    hard: tl.float64,
    spread: tl.float64,
    softcap: tl.float64,
    SMOOTHED: tl.constexpr,
    CAPPED: tl.constexpr,
    PARTIAL: tl.constexpr,
    IN_PHASE: tl.constexpr,  # the rows of logits and gradient are aligned alike
    TARGET_IN_PHASE: tl.constexpr,  # rows of probabilities and gradient
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PROBABILITIES: tl.constexpr = targets.dtype.element_ty.is_floating()
    dtype: tl.constexpr = row_max.dtype.element_ty
    row = (tl.program_id(0) // stripes).to(tl.int64)
    stripe = tl.program_id(0) % stripes
    t, here, kept = _target(
        targets, target_stride, first_class, row, row >= 0, ignore_index, classes,
        PROBABILITIES, PARTIAL,
    )  # fmt: skip
    x_row = logits + row * row_stride
    q_row = x_row  # of no use to classes
    A = 0
    if PROBABILITIES:
        q_row = targets + row * target_stride
        A = tl.load(amounts + row)
    x_at_target = x_row + t
    if at_targets is not None:
        x_at_target = at_targets + row
    cap = cap_of(softcap, dtype)
    shares = _shares(hard, spread, dtype)
    slopes = _slopes(
        grad_losses, grad_stride, grad_lses, lse_stride, row_max, rests, x_at_target, A, weights,
        total_weight, row, t, here, kept, classes, hard, spread, cap,
        SMOOTHED, CAPPED, PROBABILITIES, PARTIAL,
    )  # fmt: skip
    out = x_row
    if gradients is not None:
        out = gradients + row * _or(gradient_stride, classes)
    floor = None
    if floors is not None:
        floor = tl.load(floors + row)
    head, body = _body(out, classes, LANES)
    x_aligned = _aligned(x_row, head, IN_PHASE)
    q_aligned = _aligned(q_row, head, TARGET_IN_PHASE)
    out_aligned = _aligned(out, head, True)
    first = stripe * stripe_blocks * BLOCK
    for start in range(first, tl.minimum(first + stripe_blocks * BLOCK, body), BLOCK):
        offset = start + _vectors(BLOCK, LANES)
        there = offset < body
        y = _gradient(
            x_aligned + offset, q_aligned + offset, head + offset, there & kept, weights, slopes,
            floor, shares, cap, dtype, SMOOTHED, CAPPED, PROBABILITIES,
        )  # fmt: skip
        if not PROBABILITIES:
            y = _put(y, slopes[3], offset, t - head, start, BLOCK)
        tl.store(out_aligned + offset, y.to(out.dtype.element_ty), mask=there)
    if stripe == 0:
        column, edge = _edges(head, body, classes, LANES)
        z = _gradient(
            x_row + column, q_row + column, column, edge & kept, weights, slopes,
            floor, shares, cap, dtype, SMOOTHED, CAPPED, PROBABILITIES,
        )  # fmt: skip
        if not PROBABILITIES:
            z = tl.where(column == t, slopes[3], z)
        tl.store(out + column, z.to(out.dtype.element_ty), mask=edge)


# ---- narrow rows: some to a program, each of them whole ----


@triton.jit(debug=True)
def forward_narrow(
    logits,
    targets,
    weights,
    total_weight,
    losses,
    lses,
    row_max,
    rests,
    row_stride: tl.int64,
    target_stride: tl.int64,
    first_class,  # of the logits, from which the targets are counted; None: 0
    N,
    classes: tl.int32,
    ignore_index: tl.int64,
    hard: tl.float64,
    spread: tl.float64,
    softcap: tl.float64,
    SMOOTHED: tl.constexpr,
    CAPPED: tl.constexpr,
    PARTIAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PROBABILITIES: tl.constexpr = targets.dtype.element_ty.is_floating()
    dtype: tl.constexpr = row_max.dtype.element_ty
    wide: tl.constexpr = losses.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_range = rows < N
    t, here, kept = _target(
        targets, target_stride, first_class, rows, in_range, ignore_index, classes,
        PROBABILITIES, PARTIAL,
    )  # fmt: skip
    x_rows = logits + rows * row_stride
    cap = cap_of(softcap, dtype)
    y_t, reference = _at_target(x_rows, t, here, kept, cap, dtype, CAPPED, PROBABILITIES, PARTIAL)
    column = tl.arange(0, BLOCK)[None, :]
    there = kept[:, None] & (column < classes)
    y = _logits(x_rows[:, None] + column, there, cap, dtype, CAPPED)
    m = tl.max(y, 1)
    shift = _finite(m)
    e = exp(y - shift[:, None], logits.dtype.element_ty == tl.float32)
    if PARTIAL:
        m = shift
    if PROBABILITIES:
        rest = tl.sum(e, 1)
        q_at = targets + rows[:, None] * target_stride + column
        shares = _shares(hard, spread, dtype)
        c = _share(q_at, there, column, weights, shares, dtype, SMOOTHED)
        below = tl.sum(_below(c, y, there, shift[:, None]), 1)
        loss, lse = _loss_of_probabilities(tl.sum(c, 1), below, y_t, m, rest, wide, PARTIAL)
    else:
        rest = tl.sum(tl.where(column == t[:, None], 0, e), 1)
        spread_sum = tl.zeros((ROWS,), dtype)
        if SMOOTHED:
            terms = _spread_terms(y, there, column, reference[:, None], weights)
            spread_sum = tl.sum(terms, 1)
        w_t, W = _weights(weights, total_weight, t, here, classes, dtype)
        loss, lse = _loss_of_class(
            y_t, reference, here, m, rest, w_t, W, spread_sum, hard, spread, wide,
            SMOOTHED, PARTIAL,
        )  # fmt: skip
    tl.store(losses + rows, tl.where(kept, loss, 0), mask=in_range)
    tl.store(lses + rows, tl.where(kept, lse, 0), mask=in_range)
    tl.store(row_max + rows, tl.where(kept, m, 0), mask=in_range)
    tl.store(rests + rows, tl.where(kept, rest, 0), mask=in_range)


@triton.jit(debug=True)
def backward_narrow(
    grad_losses,
    grad_lses,
    logits,
    targets,
    at_targets,  # the logits of the targets, where the gradient is written over the logits
    weights,
    total_weight,
    row_max,
    rests,
    gradients,  # None: the logits
    gradient_stride,  # None: the number of classes
    floors,  # what exp(y - m) must reach, or else it is 0; None: everything does
    grad_stride: tl.int64,
    lse_stride: tl.int64,
    row_stride: tl.int64,
    target_stride: tl.int64,
    first_class,  # of the logits, from which the targets are counted; None: 0
    N,
    classes: tl.int32,
    ignore_index: tl.int64,
    hard: tl.float64,
    spread: tl.float64,
    softcap: tl.float64,
    SMOOTHED: tl.constexpr,
    CAPPED: tl.constexpr,
    PARTIAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PROBABILITIES: tl.constexpr = targets.dtype.element_ty.is_floating()
    dtype: tl.constexpr = row_max.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    in_range = rows < N
    t, here, kept = _target(
        targets, target_stride, first_class, rows, in_range, ignore_index, classes,
        PROBABILITIES, PARTIAL,
    )  # fmt: skip
    x_rows = logits + rows * row_stride
    column = tl.arange(0, BLOCK)[None, :]
    there = in_range & (column < classes)
    shares = _shares(hard, spread, dtype)
    q_at = x_rows + column  # of no use to classes
    A = 0
    if PROBABILITIES:
        q_at = targets + rows * target_stride + column
        c = _share(q_at, there, column, weights, shares, dtype, SMOOTHED)
        A = tl.sum(c, 1, keep_dims=True)
    x_at_target = x_rows + t
    if at_targets is not None:
        x_at_target = at_targets + rows
    cap = cap_of(softcap, dtype)
    slopes = _slopes(
        grad_losses, grad_stride, grad_lses, lse_stride, row_max, rests, x_at_target, A, weights,
        total_weight, rows, t, here, kept, classes, hard, spread, cap,
        SMOOTHED, CAPPED, PROBABILITIES, PARTIAL,
    )  # fmt: skip
    floor = None
    if floors is not None:
        floor = tl.load(floors + rows, mask=in_range, other=0)
    y = _gradient(
        x_rows + column, q_at, column, there & kept, weights, slopes,
        floor, shares, cap, dtype, SMOOTHED, CAPPED, PROBABILITIES,
    )  # fmt: skip
    if not PROBABILITIES:
        y = tl.where(column == t, slopes[3], y)
    out = x_rows
    if gradients is not None:
        out = gradients + rows * _or(gradient_stride, classes)
    tl.store(out + column, y.to(out.dtype.element_ty), mask=there)
