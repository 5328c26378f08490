"""Softmax-cross-entropy of class-index targets over rows, in Triton.

For a row x of C logits with target t, m = max_j x_j and d = x_t - m <= 0:

    rest  = sum over j != t of exp(x_j - m)         total = rest + exp(d)
    plain = log(total) - d                          where d = 0, log1p(rest): no cancellation
    p_j   = exp(x_j - m) / total                    1 - p_t = rest / total, exact as p_t -> 1

and, with class weights w (1 without them), their sum W, and label smoothing s over C classes,

    loss = (1 - s) w_t plain + s / C (W plain - sum_j w_j (x_j - x_t))
    dx_j = g (A p_j - s / C w_j)                    A = (1 - s) w_t + s / C W
    dx_t = g (s / C (W p_t - w_t) - (1 - s) w_t rest / total)

The forward reads the logits once and keeps m and rest; the backward reads them once more and writes
the gradient once. The maximum and the sum are taken together (Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018), by each thread over its own vectors.

A row of an odd number of classes begins at any address, so a wide row is a body of whole aligned
vectors of 128 bits and two edges, the few classes before and behind it. Rows of up to `NARROW`
classes stay on chip, several to a program.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from fastgpt.backends.triton.aot import Compilation
from fastgpt.backends.triton.chips import Chip, chip_of
from fastgpt.ops.cross_entropy import new_gradient, new_losses
from fastgpt.ops.raw import accumulator_dtype

if knobs.runtime.interpret:
    from fastgpt.backends.triton import interpreter

    interpreter.correct()

VECTOR_BYTES = 16  # of the widest load
NARROW = 1024  # classes of a row that stays on chip
# Blocks of a row that one program writes backward, since what it does before the first of them
# costs as much as two; and how many programs there should be before it writes more than one.
STRIPE = 8
PROGRAMS = 4096

# ---- a row's numbers, in scalars or in vectors of rows ----


@triton.jit
def _exp(x, FULL: tl.constexpr):
    """e^x of x <= 0. Below 2^-126 it is zero in float32: the other form spends more instructions.

    The product with log2(e) is rounded, and its relative error grows with |x|: to 1.3e-6 at -30.
    FULL, for float32 logits, takes whole powers of two out first (Cody and Waite, 1980).
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    if not FULL:
        return tl.exp2(x * 1.4426950408889634)
    # Not -inf, which would be subtracted from itself; e^-1000 is 0 all the same. NaN stays NaN.
    x = tl.maximum(x, -1000.0, propagate_nan=tl.PropagateNan.ALL)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) + n * 2.1219444005469058e-4  # the first product is exact
    return tl.exp2(r * 1.4426950408889634) * tl.exp2(n)


@triton.jit
def _finite(m):
    """A maximum to subtract: over nothing but -inf it is 0, and exp(-inf - 0) no NaN."""
    return tl.where(m == float("-inf"), 0, m)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0: the quotient makes good what rounding took from 1 + x."""
    above = 1 + x
    kept = above - 1
    return tl.where(kept == 0, x, tl.log(above) * (x / tl.where(kept == 0, 1, kept)))


@triton.jit
def _target(targets, stride, rows, in_range, ignore_index, classes):
    """The rows' targets, which are no class for those that are ignored; and which are kept."""
    t = tl.load(targets + rows * stride, mask=in_range, other=0)
    kept = in_range & (t != ignore_index)
    exists = (t >= 0) & (t < classes)
    tl.device_assert(exists | (kept == 0), "Target is out of bounds")
    kept = kept & exists
    return tl.where(kept, t, -1).to(tl.int32), kept


@triton.jit
def _weights(weights, total_weight, t, kept, classes, dtype: tl.constexpr):
    """w_t and W, which is only there when it is needed: for smoothing."""
    w_t = tl.full(t.shape, 1, dtype)
    W = tl.full((), classes, dtype)
    if weights is not None:
        w_t = tl.load(weights + t, mask=kept, other=0)
    if total_weight is not None:
        W = tl.load(total_weight)
    return w_t, W


@triton.jit
def _reference(x_t):
    """What the logits are counted from in the smoothed sum: x_t, or 0 where that is no number."""
    return tl.where(tl.abs(x_t) < float("inf"), x_t, 0)


@triton.jit
def _shares(hard, spread, dtype: tl.constexpr):
    """float64 arguments (numbers, in the interpreter) in the accumulator type."""
    return tl.full((), hard, dtype), tl.full((), spread, dtype)


@triton.jit
def _loss(x_t, m, rest, w_t, W, spread_sum, hard, spread, SMOOTHED: tl.constexpr):
    """The loss. `hard` is 1 - s, `spread` s / C, `spread_sum` that of w_j (x_j - reference)."""
    hard, spread = _shares(hard, spread, rest.dtype)
    d = x_t - m
    total = rest + tl.exp(d)
    plain = tl.where(d == 0, _log1p(rest), tl.log(total) - d)
    if not SMOOTHED:
        return w_t * plain
    normaliser = tl.where(_reference(x_t) == x_t, plain, m + tl.log(total))  # minus reference
    return hard * w_t * plain + spread * (W * normaliser - spread_sum)


@triton.jit
def _slopes(
    grad_losses, grad_stride, row_max, rests, x_rows, weights, total_weight,
    rows, t, kept, classes, hard, spread, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """m, g A / total, g s / C, and the target's gradient: all of them 0 for an ignored row, whose
    upstream gradient may be the infinity of a mean over no rows.
    """
    g = tl.load(grad_losses + rows * grad_stride, mask=kept, other=0)
    m = tl.load(row_max + rows, mask=kept, other=0)
    rest = tl.load(rests + rows, mask=kept, other=1)
    x_t = tl.load(x_rows + t, mask=kept, other=0).to(g.dtype)
    w_t, W = _weights(weights, total_weight, t, kept, classes, g.dtype)
    hard, spread = _shares(hard, spread, g.dtype)
    p_t = tl.exp(x_t - m)
    total = rest + p_t
    amount = hard * w_t
    at_target = -amount * (rest / total)
    if SMOOTHED:
        amount += spread * W
        at_target += spread * (W * (p_t / total) - w_t)
    return m, g * amount / total, g * spread, g * at_target


@triton.jit
def _gradient(x_at, column, there, weights, slopes, dtype: tl.constexpr, SMOOTHED: tl.constexpr):
    """The gradient of some columns, from their logits, as if the target were not among them."""
    m, at_others, uniform, _ = slopes
    x = tl.load(x_at, mask=there, other=0).to(dtype)
    y = _exp(x - m, x_at.dtype.element_ty == tl.float32) * at_others
    if SMOOTHED:
        if weights is not None:
            y -= uniform * tl.load(weights + column, mask=there, other=0)
        else:
            y -= uniform
    return y


# ---- wide rows: a program forward has one, a program backward a block of columns of one ----

# Their logits and gradients are not specialized: a launch would find them to lie within 2 GiB and
# take AMD's buffer loads, which lose what `multiple_of` says and so fall to one class at a time.


@triton.jit
def _body(row, classes, LANES: tl.constexpr):
    """How many classes stand before the first whole vector, and in the whole vectors."""
    size: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    ahead = (-(row.to(tl.int64) // size)) & (LANES - 1)
    head = tl.minimum(ahead.to(tl.int32), classes)
    return head, tl.multiple_of((classes - head) // LANES * LANES, LANES)


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
def _put(x, value, offset, t, start, BLOCK: tl.constexpr):
    """x with a value at the target. All but one of a row's blocks are spared the comparison."""
    if (start <= t) & (t < start + BLOCK):
        x = tl.where(offset == t, value, x)
    return x


@triton.jit
def _spread_terms(x, there, column, reference, weights):
    """w_j (x_j - reference), 0 where nothing is."""
    term = x - reference
    if weights is not None:
        term *= tl.load(weights + column, mask=there, other=0)
    return tl.where(there, term, 0)


@triton.jit(debug=True, do_not_specialize=["logits"])
def forward_wide(
    logits,
    targets,
    weights,
    total_weight,
    losses,
    row_max,
    rests,
    row_stride: tl.int64,
    target_stride: tl.int64,
    classes: tl.int32,
    ignore_index: tl.int64,
    hard: tl.float64,
    spread: tl.float64,
    SMOOTHED: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = losses.dtype.element_ty
    FULL: tl.constexpr = logits.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64)
    t, kept = _target(targets, target_stride, row, row >= 0, ignore_index, classes)
    if kept:
        x_row = logits + row * row_stride
        x_t = tl.load(x_row + t).to(dtype)
        reference = _reference(x_t)
        head, body = _body(x_row, classes, LANES)
        aligned = tl.multiple_of(x_row + head, 16)
        m = tl.full((BLOCK // LANES,), float("-inf"), dtype)  # of each thread
        s = tl.zeros((BLOCK // LANES,), dtype)
        spread_sum = tl.zeros((BLOCK // LANES,), dtype)
        for start in range(0, body, BLOCK):
            offset = start + _vectors(BLOCK, LANES)
            there = offset < body
            x = tl.load(aligned + offset, mask=there, other=float("-inf")).to(dtype)
            if SMOOTHED:
                term = _spread_terms(x, there, head + offset, reference, weights)
                spread_sum += tl.sum(term, 1)
            x = _put(x, float("-inf"), offset, t - head, start, BLOCK)  # no part of the rest
            highest = tl.maximum(m, tl.max(x, 1))
            shift = _finite(highest)
            s = s * _exp(m - shift, FULL) + tl.sum(_exp(x - shift[:, None], FULL), 1)
            m = highest
        column, there = _edges(head, body, classes, LANES)
        x_edge = tl.load(x_row + column, mask=there, other=float("-inf")).to(dtype)
        others = tl.where(column == t, float("-inf"), x_edge)
        row_highest = tl.maximum(tl.maximum(tl.max(m, 0), tl.max(others, 0)), x_t)
        shift_row = _finite(row_highest)
        rest = tl.sum(s * _exp(m - shift_row, FULL), 0) + tl.sum(_exp(others - shift_row, FULL), 0)
        row_spread = tl.sum(spread_sum, 0)
        if SMOOTHED:
            row_spread += tl.sum(_spread_terms(x_edge, there, column, reference, weights), 0)
        w_t, W = _weights(weights, total_weight, t, kept, classes, dtype)
        loss = _loss(x_t, row_highest, rest, w_t, W, row_spread, hard, spread, SMOOTHED)
        tl.store(losses + row, loss)
        tl.store(row_max + row, row_highest)
        tl.store(rests + row, rest)
    else:
        tl.store(losses + row, 0.0)
        tl.store(row_max + row, 0.0)
        tl.store(rests + row, 0.0)


@triton.jit(debug=True, do_not_specialize=["logits", "gradients"])
def backward_wide(
    grad_losses,
    logits,
    targets,
    weights,
    total_weight,
    row_max,
    rests,
    gradients,
    grad_stride: tl.int64,
    row_stride: tl.int64,
    target_stride: tl.int64,
    classes: tl.int32,
    stripes: tl.int32,  # of a row, each one program's
    stripe_blocks: tl.int32,
    ignore_index: tl.int64,
    hard: tl.float64,
    spread: tl.float64,
    SMOOTHED: tl.constexpr,
    IN_PHASE: tl.constexpr,  # the rows of logits and gradient are aligned alike
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = row_max.dtype.element_ty
    row = (tl.program_id(0) // stripes).to(tl.int64)
    stripe = tl.program_id(0) % stripes
    t, kept = _target(targets, target_stride, row, row >= 0, ignore_index, classes)
    x_row = logits + row * row_stride
    slopes = _slopes(
        grad_losses, grad_stride, row_max, rests, x_row, weights, total_weight,
        row, t, kept, classes, hard, spread, SMOOTHED,
    )  # fmt: skip
    out = gradients + row * classes
    head, body = _body(out, classes, LANES)
    x_aligned = x_row + head
    if IN_PHASE:
        x_aligned = tl.multiple_of(x_aligned, 16)
    out_aligned = tl.multiple_of(out + head, 16)
    first = stripe * stripe_blocks * BLOCK
    for start in range(first, tl.minimum(first + stripe_blocks * BLOCK, body), BLOCK):
        offset = start + _vectors(BLOCK, LANES)
        there = offset < body
        y = _gradient(
            x_aligned + offset, head + offset, there & kept, weights, slopes, dtype, SMOOTHED
        )
        y = _put(y, slopes[3], offset, t - head, start, BLOCK)
        tl.store(out_aligned + offset, y.to(out.dtype.element_ty), mask=there)
    if stripe == 0:
        column, edge = _edges(head, body, classes, LANES)
        z = _gradient(x_row + column, column, edge & kept, weights, slopes, dtype, SMOOTHED)
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
    row_max,
    rests,
    row_stride: tl.int64,
    target_stride: tl.int64,
    N,
    classes: tl.int32,
    ignore_index: tl.int64,
    hard: tl.float64,
    spread: tl.float64,
    SMOOTHED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = losses.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_range = rows < N
    t, kept = _target(targets, target_stride, rows, in_range, ignore_index, classes)
    x_rows = logits + rows * row_stride
    x_t = tl.load(x_rows + t, mask=kept, other=0).to(dtype)
    column = tl.arange(0, BLOCK)[None, :]
    there = kept[:, None] & (column < classes)
    x = tl.load(x_rows[:, None] + column, mask=there, other=float("-inf")).to(dtype)
    m = tl.max(x, 1)
    e = _exp(x - _finite(m)[:, None], logits.dtype.element_ty == tl.float32)
    rest = tl.sum(tl.where(column == t[:, None], 0, e), 1)
    spread_sum = tl.zeros((ROWS,), dtype)
    if SMOOTHED:
        reference = _reference(x_t)[:, None]
        spread_sum = tl.sum(_spread_terms(x, there, column, reference, weights), 1)
    w_t, W = _weights(weights, total_weight, t, kept, classes, dtype)
    loss = _loss(x_t, m, rest, w_t, W, spread_sum, hard, spread, SMOOTHED)
    tl.store(losses + rows, tl.where(kept, loss, 0), mask=in_range)
    tl.store(row_max + rows, tl.where(kept, m, 0), mask=in_range)
    tl.store(rests + rows, tl.where(kept, rest, 0), mask=in_range)


@triton.jit(debug=True)
def backward_narrow(
    grad_losses,
    logits,
    targets,
    weights,
    total_weight,
    row_max,
    rests,
    gradients,
    grad_stride: tl.int64,
    row_stride: tl.int64,
    target_stride: tl.int64,
    N,
    classes: tl.int32,
    ignore_index: tl.int64,
    hard: tl.float64,
    spread: tl.float64,
    SMOOTHED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    in_range = rows < N
    t, kept = _target(targets, target_stride, rows, in_range, ignore_index, classes)
    x_rows = logits + rows * row_stride
    slopes = _slopes(
        grad_losses, grad_stride, row_max, rests, x_rows, weights, total_weight,
        rows, t, kept, classes, hard, spread, SMOOTHED,
    )  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    there = in_range & (column < classes)
    dtype: tl.constexpr = row_max.dtype.element_ty
    y = _gradient(x_rows + column, column, there & kept, weights, slopes, dtype, SMOOTHED)
    y = tl.where(column == t, slopes[3], y)
    tl.store(gradients + rows * classes + column, y.to(gradients.dtype.element_ty), mask=there)


# ---- the launches ----


class Tile(NamedTuple):
    """How much a program takes, and by how many warps."""

    rows: int  # 1 for wide rows
    block: int  # classes, a power of two
    num_warps: int


def tile(classes: int, itemsize: int, warp_size: int) -> Tile:
    """The tile for rows of so many classes. Not of so many rows: a row's bits must not depend on
    the rows beside it.

    Two vectors of 128 bits for each thread keep enough bytes in flight for the memory, with the
    registers of two blocks of 8 warps to spare.
    """
    lanes = VECTOR_BYTES // itemsize
    if classes <= NARROW:
        block = triton.next_power_of_2(classes)
        return Tile(min(max(2048 // block, 1), 64), block, 4)
    num_warps = 8 if classes * itemsize > 32 * 1024 else 4
    return Tile(1, 2 * lanes * warp_size * num_warps, num_warps)


def _check(logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    N = logits.shape[0] if logits.dim() == 2 else -1
    if logits.dim() != 2 or target.shape != (N,) or logits.shape[1] == 0:
        raise RuntimeError(
            f"expected logits (N, C) of at least one class and target (N,), got "
            f"{list(logits.shape)} and {list(target.shape)}"
        )
    if logits.dtype not in POINTERS or target.dtype != torch.int64:
        raise RuntimeError(
            "expected logits of float32, float64, bfloat16 or float16 and a target of int64, got "
            f"{logits.dtype} and {target.dtype}"
        )
    if weight is not None:
        _check_vector("weight", weight, logits, logits.shape[1])


def _check_vector(name: str, x: Tensor, logits: Tensor, length: int) -> None:
    dtype = accumulator_dtype(logits.dtype)
    if x.shape != (length,) or x.dtype != dtype:
        raise RuntimeError(
            f"expected {name} [{length}] of type {dtype}, got {list(x.shape)} of {x.dtype}"
        )


def _check_targets(target: Tensor, classes: int, ignore_index: int) -> None:
    """On the CPU; on a GPU the kernel asserts, since looking would wait for the device."""
    if target.device.type != "cpu":
        return
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if len(wrong):
        raise RuntimeError(
            f"Target {int(wrong[0])} is out of bounds: expected 0 <= target < {classes} (the "
            f"number of classes) or ignore_index ({ignore_index})."
        )


def _prepare(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tile, dict[str, Any]]:
    """Logits of unit stride, their tile, and what forward and backward are told alike."""
    _check(logits, target, weight)
    _check_targets(target, logits.shape[1], ignore_index)
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        logits = logits.contiguous()
    N, C = logits.shape
    smoothed = label_smoothing != 0
    chosen = tile(C, logits.element_size(), chip_of(logits.device).warp_size)
    arguments = {
        "logits": logits,
        "targets": target,
        "weights": None if weight is None else weight.contiguous(),
        "total_weight": weight.sum() if weight is not None and smoothed else None,
        "row_stride": logits.stride(0),
        "target_stride": target.stride(0),
        "classes": C,
        "ignore_index": ignore_index,
        "hard": 1 - label_smoothing,
        "spread": label_smoothing / C,
        "SMOOTHED": smoothed,
        "BLOCK": chosen.block,
    }
    if C <= NARROW:
        arguments.update(N=N, ROWS=chosen.rows)
    else:
        arguments.update(LANES=VECTOR_BYTES // logits.element_size())
    return logits, chosen, arguments


def _launch(kernel: Any, programs: int, chosen: Tile, arguments: dict[str, Any]) -> None:
    with torch.cuda.device_of(arguments["logits"]):
        # The assertion of the target needs debug, which would check every sum of integers, too.
        kernel[(programs,)](**arguments, num_warps=chosen.num_warps, sanitize_overflow=False)


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw operator cross_entropy_forward: see `fastgpt.ops.cross_entropy.define`."""
    logits, chosen, arguments = _prepare(logits, target, weight, ignore_index, label_smoothing)
    outputs = losses, row_max, rests = new_losses(logits)
    N, C = logits.shape
    if N > 0:
        arguments.update(losses=losses, row_max=row_max, rests=rests)
        kernel = forward_narrow if C <= NARROW else forward_wide
        _launch(kernel, triton.cdiv(N, chosen.rows), chosen, arguments)
    return outputs


def backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_max: Tensor,
    rest: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The raw operator cross_entropy_backward: see `fastgpt.ops.cross_entropy.define`."""
    logits, chosen, arguments = _prepare(logits, target, weight, ignore_index, label_smoothing)
    N, C = logits.shape
    for name, x in (("grad_loss", grad_loss), ("row_max", row_max), ("rest", rest)):
        _check_vector(name, x, logits, N)
    if not (row_max.is_contiguous() and rest.is_contiguous()):
        raise RuntimeError("expected contiguous row_max and rest")
    gradient = new_gradient(grad_loss, logits)
    if N > 0:
        arguments.update(
            grad_losses=grad_loss,
            row_max=row_max,
            rests=rest,
            gradients=gradient,
            grad_stride=grad_loss.stride(0),
        )
        if C <= NARROW:
            _launch(backward_narrow, triton.cdiv(N, chosen.rows), chosen, arguments)
        else:
            blocks = triton.cdiv(C, chosen.block)
            stripe_blocks = max(1, min(STRIPE, N * blocks // PROGRAMS))
            stripes = triton.cdiv(blocks, stripe_blocks)
            arguments.update(
                stripes=stripes, stripe_blocks=stripe_blocks, IN_PHASE=_in_phase(logits, gradient)
            )
            _launch(backward_wide, N * stripes, chosen, arguments)
    return gradient


def _in_phase(x: Tensor, y: Tensor) -> bool:
    """Whether each row of x lies as far from a whole vector as that of y."""
    size = x.element_size()
    ahead = (x.data_ptr() - y.data_ptr()) % VECTOR_BYTES
    return ahead == 0 and (x.stride(0) - y.stride(0)) * size % VECTOR_BYTES == 0


# ---- ahead of time ----

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
}
_VALUES = {
    "row_stride": "i64",
    "target_stride": "i64",
    "grad_stride": "i64",
    "ignore_index": "i64",
    "N": "i32",
    "classes": "i32",
    "stripes": "i32",
    "stripe_blocks": "i32",
    "hard": "fp64",
    "spread": "fp64",
}


def compilations(chip: Chip) -> Iterator[Compilation]:
    """Each kernel for each type, plain and with weights and smoothing, at its stored tile."""
    for dtype, pointer in POINTERS.items():
        if dtype == torch.float16:  # bfloat16's tiles
            continue
        for C in (1000, 50257):
            for everything in (False, True):
                for which in ("forward", "backward"):
                    yield _compilation(chip, dtype, pointer, C, everything, which)


def _compilation(
    chip: Chip, dtype: torch.dtype, pointer: str, C: int, everything: bool, which: str
) -> Compilation:
    wide = C > NARROW
    lanes = VECTOR_BYTES // dtype.itemsize
    chosen = tile(C, dtype.itemsize, chip.warp_size)
    kernel = {
        ("forward", False): forward_narrow,
        ("forward", True): forward_wide,
        ("backward", False): backward_narrow,
        ("backward", True): backward_wide,
    }[which, wide]
    constants: dict[str, Any] = {"SMOOTHED": everything, "BLOCK": chosen.block}
    if wide:
        constants["LANES"] = lanes
        if which == "backward":
            constants["IN_PHASE"] = True
    else:
        constants["ROWS"] = chosen.rows
    if not everything:
        constants.update(weights=None, total_weight=None)
    accumulator = POINTERS[accumulator_dtype(dtype)]
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("logits", "gradients"):
            signature[name] = pointer
        else:
            signature[name] = "*i64" if name == "targets" else _VALUES.get(name, accumulator)
    instructions = {}
    if wide and chip.backend == "cuda":
        form = {2: "v4.b32", 4: "v4.b32", 8: "v2.b64"}[dtype.itemsize]
        instructions["128-bit loads"] = rf"ld\.global(\.\w+)*\.{form}"
        if which == "backward":
            instructions["128-bit stores"] = rf"st\.global(\.\w+)*\.{form}"
    elif wide:
        # An assertion's call of the host has such instructions, too, of another form.
        instructions["128-bit loads"] = r"global_load_dwordx4 v\[\d+:\d+\], v\[\d+:\d+\], off\n"
        if which == "backward":
            instructions["128-bit stores"] = (
                r"global_store_dwordx4 v\[\d+:\d+\], v\[\d+:\d+\], off\n"
            )
    name = str(dtype).removeprefix("torch.")
    return Compilation(
        name=f"cross-entropy {which} {name} {'wide' if wide else 'narrow'}"
        + (" weights, smoothing" if everything else ""),
        kernel=kernel,
        signature=signature,
        constants=constants,
        divisible=tuple(n for n, kind in signature.items() if kind.startswith("*")),
        options={"num_warps": chosen.num_warps, "debug": True, "sanitize_overflow": False},
        instructions=instructions,
        work="1 read of the logits" if which == "forward" else "1 read and 1 write of the logits",
    )
