"""Scaled dot-product attention and its gradient in Triton.

For a query row q_i, keys k_j and values v_j of one head, with the softcap C (or nothing), what is
added b_ij (the mask, 0 or -inf if it is boolean, and ALiBi's -slope |place_i - j|), the factors
R_ij of dropout (or 1) and a sink s (or none):

    x_ij = C(scale <q_i, k_j>) + b_ij    m_i = max(s, max_j x_ij)
    l_i = exp(s - m_i) + sum_j exp(x_ij - m_i)
    p_ij = exp(x_ij - m_i) / l_i         o_i = sum_j R_ij p_ij v_j      lse_i = m_i + log(l_i)

and backward, for upstream gradients g_i of o_i and h_i of lse_i:

    dp_ij = R_ij <g_i, v_j>              delta_i = sum_j p_ij dp_ij - h_i = <g_i, o_i> - h_i
    ds_ij = p_ij (dp_ij - delta_i)       dy_ij = ds_ij C'(scale <q_i, k_j>)
    dv_j = sum_i R_ij p_ij g_i           dq_i = scale sum_j dy_ij k_j
    dk_j = scale sum_i dy_ij q_i         dmask_ij = ds_ij
    dsink_i = -exp(s - m_i) / l_i delta_i

The forward walks the keys of a block of queries with a running maximum (Milakov and Gimelshein
2018; Dao et al., "FlashAttention", 2022). The backward recomputes p from the saved m and l in two
passes without atomics, so that its sums have one order: a program of the first walks the keys of a
block of queries, for dq and delta; one of the second the queries of a block of keys, in all the
query heads that share them, for dk and dv (Dao, "FlashAttention-2", 2023). A third, for dmask, is
run only if it is asked for. Nothing of size L x S exists that the caller did not bring.

FLOPs of the pairs (i, j) that are seen: 2 (D + Dv) per pair forward; backward 4 D + 2 Dv for dq and
4 D + 4 Dv for dk and dv. A query sees a span of keys, of which neither end falls from one query to
the next: tiles outside of the spans are left out, and those inside need no test.

Scores s become exp2(factor (s - m)), the difference first: the largest weight is exactly 1, also in
16 bits, and large scores keep their accuracy. They are the products <q_i, k_j> themselves, with the
scale in the factor, unless something is done to them or the scale is not positive (`SCALED`); the
saved m is one of s, whichever that is.

What a query may not look at is hidden by selecting. NaN and infinities still spread from a hidden
row of x through sums p x, as 0 * NaN; a program in whose result anything is not finite computes it
again by `careful_product`, which leaves them out.

What a call does not ask for is not compiled: the options are constants, and a tensor that is None
takes with it all that would be done with it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt.backends.coverage import DTYPES
from fastgpt.backends.triton import autotune, tiles
from fastgpt.backends.triton.aot import Compilation
from fastgpt.backends.triton.chips import Chip, chip_of
from fastgpt.backends.triton.functions import cap_of, capped
from fastgpt.backends.triton.tiles import Config
from fastgpt.ops.attention import new_gradients, new_outputs
from fastgpt.ops.attention_forms import UNLIMITED, Inputs, Options
from fastgpt.ops.dropout import rescale, threshold
from fastgpt.ops.raw import accumulator_dtype

if knobs.runtime.interpret:
    from fastgpt.backends.triton import interpreter

    interpreter.correct()

INTERPRETED = knobs.runtime.interpret
INFINITY = tl.constexpr(math.inf)
# The bits of KIND, which a kernel is compiled for: what a call asks for.
BOOL_MASK = tl.constexpr(1 << 0)
ADDITIVE_MASK = tl.constexpr(1 << 1)
LEFT = tl.constexpr(1 << 2)  # the spans have a first key
RIGHT = tl.constexpr(1 << 3)  # they have a last one
GAPS = tl.constexpr(1 << 4)  # a query may see nothing of the first tile
SCALED = tl.constexpr(1 << 5)
CAPPED = tl.constexpr(1 << 6)
ALIBI = tl.constexpr(1 << 7)
DROPS = tl.constexpr(1 << 8)
FULL = tl.constexpr(1 << 9)  # float32 inputs
TF32 = tl.constexpr(1 << 10)
MASKED = tl.constexpr(0b0011)
HIDING = tl.constexpr(0b1111)
# Columns of a result that the careful path computes at once, and keys or queries at a time. The
# interpreter's time is the number of steps.
SLICE = tl.constexpr(64 if INTERPRETED else 16)

# ---- numbers ----


@triton.jit
def product(a, b, acc, KIND: tl.constexpr):
    """acc + a @ b, `a` rounded to b's type."""
    PRECISION: tl.constexpr = "tf32" if TF32 & KIND else "ieee"
    return tl.dot(a.to(b.dtype), b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def outer(a, b, dtype: tl.constexpr, KIND: tl.constexpr):
    """a @ b^T."""
    return product(a, b.T, tl.full([a.shape[0], b.shape[0]], 0.0, dtype), KIND)


@triton.jit
def careful_product(weights, seen, x, acc, plus, minus, KIND: tl.constexpr):
    """acc + weights @ x, of what is finite in x; what is not, where it is seen, is counted: in
    `plus` inf and NaN, in `minus` -inf and NaN.
    """
    wide = x.to(acc.dtype)
    finite = tl.abs(wide) < INFINITY
    acc = product(weights, tl.where(finite, wide, 0.0).to(x.dtype), acc, KIND)
    seen = tl.where(seen, 1.0, 0.0)
    high = tl.where(finite | (wide < 0), 0.0, 1.0)
    low = tl.where(finite | (wide > 0), 0.0, 1.0)
    plus = product(seen, high.to(x.dtype), plus, KIND)
    minus = product(seen, low.to(x.dtype), minus, KIND)
    return acc, plus, minus


@triton.jit
def with_infinities(acc, plus, minus):
    """The sum with the infinities that `careful_product` counted, NaN where there are both."""
    return acc + tl.where(plus > 0, INFINITY, 0.0) - tl.where(minus > 0, INFINITY, 0.0)


@triton.jit
def with_nan(acc, plus, minus):
    """NaN where `careful_product` counted anything: of weights of any sign."""
    count = plus + minus
    return with_infinities(acc, count, count)


@triton.jit
def any_spread(x, exists, SPREADS: tl.constexpr):
    """Whether a number in the rows that exist is not finite, in one reduction; never where nothing
    is hidden, since then it belongs there.
    """
    if not SPREADS:
        spread: tl.constexpr = False
    else:
        spread = tl.max(tl.where((tl.abs(x) < INFINITY) | ~exists[:, None], 0, 1), axis=None) != 0
    return spread


# ---- places ----


@triton.jit
def place(tiles, section):
    """This program's tile and head. All tiles of the first `section` heads go before the next
    heads', so that what the running programs read of them fits the cache.
    """
    program = tl.program_id(0)
    heads = tl.num_programs(0) // tiles
    first = program // (section * tiles) * section
    within = program - first * tiles
    width = tl.minimum(section, heads - first)
    return within // width, first + within % width


@triton.jit
def load_rows(
    x, row_stride, start, rows, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """(ROWS, WIDTH) of x (rows, COLUMNS), from row `start` and `column` on; zeros beyond x, of
    which rows are looked at only if BOUNDED.
    """
    i = start + tl.arange(0, ROWS)
    j = column + tl.arange(0, WIDTH)
    at = x + i.to(tl.int64)[:, None] * row_stride + j[None, :]
    if BOUNDED and COLUMNS // WIDTH * WIDTH != COLUMNS:
        return tl.load(at, mask=(i < rows)[:, None] & (j < COLUMNS)[None, :], other=0.0)
    if BOUNDED:
        return tl.load(at, mask=(i < rows)[:, None], other=0.0)
    if COLUMNS // WIDTH * WIDTH != COLUMNS:
        return tl.load(at, mask=(j < COLUMNS)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def load_tile(
    x, row_stride, descriptor, batch, head, start, rows, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Whole rows of one head: by its pointer, or through a descriptor of all heads if there is one,
    which fills up with zeros, too.
    """
    if descriptor is None:
        found = load_rows(x, row_stride, start, rows, 0, ROWS, COLUMNS, WIDTH, BOUNDED)
    else:
        found = descriptor.load([batch, head, start, 0]).reshape(ROWS, WIDTH)
    return found


@triton.jit
def store_rows(x, values, row_stride, start, rows, column, COLUMNS: tl.constexpr):
    """The inverse of `load_rows`, of values (ROWS, WIDTH)."""
    i = start + tl.arange(0, values.shape[0])
    j = column + tl.arange(0, values.shape[1])
    at = x + i.to(tl.int64)[:, None] * row_stride + j[None, :]
    exists = (i < rows)[:, None] & (j < COLUMNS)[None, :]
    tl.store(at, values.to(x.dtype.element_ty), mask=exists)


# ---- scores ----


class Rule(NamedTuple):
    """How the products of queries and keys become scores, and which keys a query sees."""

    queries: Any
    keys: Any
    scale: Any
    factor: Any
    cap: Any
    mask_row: Any
    mask_column: Any
    spans: Any
    before: Any  # query i sees the keys i + before <= j < i + after
    after: Any
    offset: Any
    threshold: Any
    rescale: Any


class Rows(NamedTuple):
    """Queries of one head."""

    i: Any
    low: Any  # the first key that each sees, and the one behind its last
    high: Any
    place: Any  # its own among the keys
    a: Any  # the words of dropout
    c: Any
    mask: Any  # the head's
    slope: Any  # the head's, of ALiBi


class Keys(NamedTuple):
    """The keys and values of one head."""

    key: Any
    k_row: Any
    key_tiles: Any
    value: Any
    v_row: Any
    value_tiles: Any
    batch: Any
    head: Any


@triton.jit
def sight(i, rule, KIND: tl.constexpr):
    """The first key that queries see, the one behind the last, and their place; 0 of what the rule
    does without, since a function returns no None.
    """
    low = 0
    high = 0
    place = 0
    if rule.spans is None:
        if LEFT & KIND:
            low = i + rule.before
        if RIGHT & KIND:
            high = i + rule.after
        if ALIBI & KIND:
            place = i + rule.offset
    else:
        exists = i < rule.queries
        low = tl.load(rule.spans + i, mask=exists, other=0).to(tl.int32)
        high = tl.load(rule.spans + rule.queries + i, mask=exists, other=0).to(tl.int32)
        if ALIBI & KIND:
            place = tl.load(rule.spans + 2 * rule.queries + i, mask=exists, other=0).to(tl.int32)
    return low, high, place


@triton.jit
def sight_of_keys(first, last, rule, KIND: tl.constexpr):
    """The queries that see any of the keys first ... last: [begin, end); and all: [whole, stop)."""
    begin = 0
    whole = 0
    stop = rule.queries
    end = rule.queries
    if rule.spans is None:
        if RIGHT & KIND:
            begin = tl.minimum(tl.maximum(first - rule.after + 1, 0), rule.queries)
            whole = tl.minimum(tl.maximum(last - rule.after + 1, 0), rule.queries)
        if LEFT & KIND:
            stop = tl.minimum(tl.maximum(first - rule.before + 1, 0), rule.queries)
            end = tl.minimum(tl.maximum(last - rule.before + 1, 0), rule.queries)
    else:
        # Each is the number of queries whose bound is not above a key: all four at once.
        which = tl.arange(0, 4)
        bounds = rule.spans + tl.where(which < 2, rule.queries, 0)
        key = tl.where((which == 0) | (which == 2), first, last)
        least = tl.full([4], 0, tl.int32)
        most = least + rule.queries
        size = least.max(0) + rule.queries
        while size > 0:
            middle = (least + most) // 2
            bound = tl.load(bounds + middle, mask=least < most, other=0)
            below = (bound <= key) & (least < most)
            most = tl.where(below, most, middle)
            least = tl.where(below, middle + 1, least)
            size //= 2
        begin = tl.sum(tl.where(which == 0, least, 0), 0)
        whole = tl.sum(tl.where(which == 1, least, 0), 0)
        stop = tl.sum(tl.where(which == 2, least, 0), 0)
        end = tl.sum(tl.where(which == 3, least, 0), 0)
    return begin, whole, stop, end


@triton.jit
def key_range(first, rule, KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys [begin, end) that any of a block of queries sees, `begin` at a tile's; and among
    them those of whole tiles that every one of them sees, [whole, stop).
    """
    last = tl.minimum(first + BLOCK_M, rule.queries) - 1
    low, high, _ = sight(first, rule, KIND)
    last_low, last_high, _ = sight(last, rule, KIND)
    begin = 0
    whole = 0
    stop = rule.keys // BLOCK_N * BLOCK_N
    end = rule.keys
    if RIGHT & KIND:
        stop = tl.minimum(tl.maximum(high, 0), rule.keys) // BLOCK_N * BLOCK_N
        end = tl.minimum(tl.maximum(last_high, 0), rule.keys)
    if LEFT & KIND:
        edge = tl.cdiv(end, BLOCK_N) * BLOCK_N
        begin = tl.minimum(tl.maximum(low, 0) // BLOCK_N * BLOCK_N, edge)
        whole = tl.minimum(tl.cdiv(tl.maximum(last_low, 0), BLOCK_N) * BLOCK_N, edge)
        stop = tl.maximum(stop, whole)
    if MASKED & KIND:
        whole = begin
        stop = begin
    return begin, whole, stop, end


@triton.jit
def across(x, axis: tl.constexpr):
    """A vector as one of the tiles' columns (0) or rows (1)."""
    return x[:, None] if axis == 0 else x[None, :]


@triton.jit
def visible(
    j, rows, rule, KIND: tl.constexpr, axis: tl.constexpr, dtype: tl.constexpr, HIDES: tl.constexpr
):
    """Whether queries and keys exist and the query may look at the key; and what an additive mask
    adds.
    """
    i = across(rows.i, axis)
    seen = True
    bias = 0.0
    if HIDES:
        seen = (i < rule.queries) & (j < rule.keys)
    if MASKED & KIND:
        # Without the spans, so that the loads of whole vectors stay whole.
        at = rows.mask + (i.to(tl.int64) * rule.mask_row + j.to(tl.int64) * rule.mask_column)
        if BOOL_MASK & KIND:
            seen = tl.load(at, mask=seen, other=0) != 0
        else:
            bias = tl.load(at, mask=seen, other=-INFINITY).to(dtype)
            seen = bias != -INFINITY
    if HIDES and RIGHT & KIND:
        seen &= j < across(rows.high, axis)
    if HIDES and LEFT & KIND:
        seen &= j >= across(rows.low, axis)
    return seen, bias


@triton.jit
def scores(s, j, rows, rule, KIND: tl.constexpr, axis: tl.constexpr, HIDES: tl.constexpr):
    """The scores that the products s stand for; which of them are seen; and C'. Queries are along
    an axis, keys j along the other.
    """
    j = across(j, 1 - axis)
    seen, bias = visible(j, rows, rule, KIND, axis, s.dtype, HIDES)
    derivative = 1.0
    if SCALED & KIND:
        s *= rule.scale
    if CAPPED & KIND:
        s, derivative = capped(s, rule.cap, FULL & KIND != 0)
    if ALIBI & KIND:
        s -= rows.slope * tl.abs(across(rows.place, axis).to(s.dtype) - j.to(s.dtype))
    if ADDITIVE_MASK & KIND:
        s += bias
    return s, seen, derivative


@triton.jit
def words(seeds, batch, head, i):
    """The two words of each query that `kept` needs; see ops/dropout.py."""
    seed = tl.load(seeds + batch)
    a, c, _, _ = tl.philox(seed, i, head, 0, 0)
    return a, c


@triton.jit
def kept(j, rows, rule, KIND: tl.constexpr, axis: tl.constexpr):
    """Which weights dropout keeps; see ops/dropout.py."""
    x = across(j, 1 - axis).to(tl.uint32) ^ across(rows.a, axis)
    x = (x ^ (x >> 16)) * tl.full([], 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15) ^ across(rows.c, axis)
    x = x * tl.full([], 0x846CA68B, tl.uint32)
    return (x ^ (x >> 16)) >= rule.threshold


# ---- forward ----


@triton.jit
def forward_tiles(
    acc, total, peak, q, begin, end, gap_at, gap, rows, kv, rule,
    KIND: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HIDES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The running sum of weights and values (M, Dv), sum of weights and maximum (M,), after the
    keys [begin, end), with those from `gap_at` on further by `gap`. HIDES: not every query sees
    every key.
    """
    for x in range(begin, end, BLOCK_N):
        start = x
        if HIDES and LEFT & KIND:
            start += tl.where(x >= gap_at, gap, 0)
        k = load_tile(kv.key, kv.k_row, kv.key_tiles, kv.batch, kv.head, start, rule.keys, BLOCK_N,
                      HEAD_DIM, q.shape[1], HIDES)  # fmt: skip
        s = outer(q, k, acc.dtype, KIND)
        j = start + tl.arange(0, BLOCK_N)
        s, seen, _ = scores(s, j, rows, rule, KIND, 0, HIDES)
        if HIDES:
            s = tl.where(seen, s, -INFINITY)
        above = tl.maximum(peak, tl.max(s, 1))
        level = above
        if HIDES and GAPS & KIND:  # before the first key that is seen
            level = tl.where(above == -INFINITY, 0.0, above)
        p = tl.exp2((s - level[:, None]) * rule.factor)
        shrink = tl.exp2((peak - level) * rule.factor)
        total = total * shrink + tl.sum(p, 1)
        if DROPS & KIND:
            p = tl.where(kept(j, rows, rule, KIND, 0), p, 0.0)
        v = load_tile(kv.value, kv.v_row, kv.value_tiles, kv.batch, kv.head, start, rule.keys,
                      BLOCK_N, VALUE_DIM, acc.shape[1], HIDES)  # fmt: skip
        acc = product(p, v, acc * shrink[:, None], KIND)
        peak = above
    return acc, total, peak


@triton.jit
def store_output(
    acc, inverse, output, rounding, row_stride, start, rows, column, COLUMNS: tl.constexpr
):
    """o = acc / l, and what it loses when it is rounded."""
    o = acc * inverse[:, None]
    store_rows(output, o, row_stride, start, rows, column, COLUMNS)
    if output.dtype.element_ty != acc.dtype:
        lost = o - o.to(output.dtype.element_ty).to(acc.dtype)
        store_rows(rounding, lost, row_stride, start, rows, column, COLUMNS)


@triton.jit
def store_careful_output(
    output, rounding, o_row, q, peak, inverse, first, begin, end, rows, kv, rule,
    KIND: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """o of a block of queries, from the keys [begin, end)."""
    dtype: tl.constexpr = peak.dtype
    BLOCK_M: tl.constexpr = q.shape[0]
    for column in range(0, VALUE_DIM, SLICE):
        acc = tl.full([BLOCK_M, SLICE], 0.0, dtype)
        plus = tl.full([BLOCK_M, SLICE], 0.0, dtype)
        minus = tl.full([BLOCK_M, SLICE], 0.0, dtype)
        for start in tl.range(begin, end, SLICE, num_stages=1):
            j = start + tl.arange(0, SLICE)
            k = load_rows(kv.key, kv.k_row, start, rule.keys, 0, SLICE, HEAD_DIM, q.shape[1],
                          True)  # fmt: skip
            v = load_rows(kv.value, kv.v_row, start, rule.keys, column, SLICE, VALUE_DIM,
                          SLICE, True)  # fmt: skip
            s = outer(q, k, dtype, KIND)
            s, seen, _ = scores(s, j, rows, rule, KIND, 0, True)
            s = tl.where(seen, s, -INFINITY)
            p = tl.exp2((s - peak[:, None]) * rule.factor)
            if DROPS & KIND:
                p = tl.where(kept(j, rows, rule, KIND, 0), p, 0.0)
            acc, plus, minus = careful_product(p, seen, v, acc, plus, minus, KIND)
        store_output(with_infinities(acc, plus, minus), inverse, output, rounding, o_row, first,
                     rule.queries, column, VALUE_DIM)  # fmt: skip


@triton.jit
def forward_kernel(
    query, key, value, mask, alibi, sinks, spans, seeds,
    output, lse, rounding, row_max, row_sum, key_tiles, value_tiles,
    scale: tl.float64, factor: tl.float64, unit: tl.float64, softcap: tl.float64,
    threshold: tl.float64, rescale: tl.float64,
    heads, group, section, queries, keys, before, after, offset,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_column, alibi_batch, sinks_batch,
    KIND: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """output, rounding (BLOCK_M, Dv), lse, row_max and row_sum (BLOCK_M,) of a block of queries."""
    dtype: tl.constexpr = row_max.dtype.element_ty
    rule = Rule(
        queries, keys, tl.full([], scale, dtype), tl.full([], factor, dtype),
        cap_of(softcap, dtype) if CAPPED & KIND else None, mask_row, mask_column,
        spans, before, after, offset, tl.full([], threshold, tl.float64).to(tl.uint32),
        tl.full([], rescale, dtype),
    )  # fmt: skip
    tiles = tl.cdiv(queries, BLOCK_M)
    tile, all_head = place(tiles, section)
    # The last queries have most keys under a causal mask.
    first = (tiles - 1 - tile) * BLOCK_M
    batch = all_head // heads
    head = all_head % heads
    kv_head = head // group
    query += batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    key += batch.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    value += batch.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    if MASKED & KIND:
        mask += batch.to(tl.int64) * mask_batch + head.to(tl.int64) * mask_head
    kv = Keys(key, k_row, key_tiles, value, v_row, value_tiles, batch, kv_head)

    i = first + tl.arange(0, BLOCK_M)
    q = load_rows(query, q_row, first, queries, 0, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    low, high, own = sight(i, rule, KIND)
    slope = tl.load(alibi + batch * alibi_batch + head) if ALIBI & KIND else None
    a = None
    c = None
    if DROPS & KIND:
        a, c = words(seeds, batch, head, i)
    rows = Rows(i, low, high, own, a, c, mask, slope)
    acc = tl.full([BLOCK_M, BLOCK_DV], 0.0, dtype)
    total = tl.full([BLOCK_M], 0.0, dtype)
    peak = tl.full([BLOCK_M], -INFINITY, dtype)
    if sinks is not None:
        sink = tl.load(sinks + batch * sinks_batch + head) / tl.full([], unit, dtype)
        peak = tl.full([BLOCK_M], 0.0, dtype) + sink
        total = tl.where(peak == -INFINITY, 0.0, 1.0).to(dtype)

    begin, whole, stop, end = key_range(first, rule, KIND, BLOCK_M, BLOCK_N)
    edge = stop  # of the keys that not every query sees, of which [whole, whole + gap) are left out
    gap = 0
    if LEFT & KIND:
        edge = begin
        gap = stop - whole
    if not MASKED & KIND:
        acc, total, peak = forward_tiles(
            acc, total, peak, q, whole, stop, 0, 0, rows, kv, rule, KIND, HEAD_DIM, VALUE_DIM,
            False, BLOCK_N,
        )  # fmt: skip
    acc, total, peak = forward_tiles(
        acc, total, peak, q, edge, end - gap, whole, gap, rows, kv, rule,
        KIND, HEAD_DIM, VALUE_DIM, True, BLOCK_N,
    )  # fmt: skip

    exists = i < queries
    if GAPS & KIND:
        peak = tl.where(peak == -INFINITY, 0.0, peak)
    inverse = tl.where(total == 0, 0.0, 1.0 / total)
    at = all_head.to(tl.int64) * queries + i
    tl.store(row_max + at, peak, mask=exists)
    tl.store(row_sum + at, total, mask=exists)
    tl.store(lse + at, peak * tl.full([], unit, dtype) + tl.log(total), mask=exists)
    if DROPS & KIND:
        inverse *= rule.rescale
    o_row = heads * VALUE_DIM
    o_at = batch.to(tl.int64) * queries * o_row + head * VALUE_DIM
    output += o_at
    if output.dtype.element_ty != dtype:
        rounding += o_at
    if any_spread(acc, exists, HIDING & KIND != 0):
        store_careful_output(
            output, rounding, o_row, q, peak, inverse, first, begin, end, rows, kv, rule, KIND,
            HEAD_DIM, VALUE_DIM,
        )  # fmt: skip
    else:
        store_output(acc, inverse, output, rounding, o_row, first, queries, 0, VALUE_DIM)


# ---- backward ----


@triton.jit
def gradient_tile(
    s, dp, j, peak, inverse, delta, rows, rule, KIND: tl.constexpr, axis: tl.constexpr,
    HIDES: tl.constexpr, OF_SCORES: tl.constexpr,
):  # fmt: skip
    """The weights p that dropout keeps, but for its factor; what is seen; and of a tile of products
    s and dp, with the statistics of its queries, ds if OF_SCORES, else dy.
    """
    x, seen, derivative = scores(s, j, rows, rule, KIND, axis, HIDES)
    p = tl.exp2((x - across(peak, axis)) * rule.factor) * across(inverse, axis)
    if DROPS & KIND:
        stays = kept(j, rows, rule, KIND, axis)
        dp = tl.where(stays, dp * rule.rescale, 0.0)
    ds = p * (dp - across(delta, axis))
    if CAPPED & KIND and not OF_SCORES:
        ds *= derivative
    if DROPS & KIND:
        p = tl.where(stays, p, 0.0)
    if HIDES:
        p = tl.where(seen, p, 0.0)
        ds = tl.where(seen, ds, 0.0)
    return p, seen, ds


@triton.jit
def query_gradient_tiles(
    acc, q, g, peak, inverse, delta, begin, end, gap_at, gap, rows, kv, rule,
    KIND: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HIDES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum of dy k (M, D), with that of the keys that `forward_tiles` takes."""
    for x in range(begin, end, BLOCK_N):
        start = x
        if HIDES and LEFT & KIND:
            start += tl.where(x >= gap_at, gap, 0)
        k = load_tile(kv.key, kv.k_row, kv.key_tiles, kv.batch, kv.head, start, rule.keys, BLOCK_N,
                      HEAD_DIM, q.shape[1], HIDES)  # fmt: skip
        v = load_tile(kv.value, kv.v_row, kv.value_tiles, kv.batch, kv.head, start, rule.keys,
                      BLOCK_N, VALUE_DIM, g.shape[1], HIDES)  # fmt: skip
        s = outer(q, k, acc.dtype, KIND)
        dp = outer(g, v, acc.dtype, KIND)
        j = start + tl.arange(0, BLOCK_N)
        _, _, dy = gradient_tile(s, dp, j, peak, inverse, delta, rows, rule, KIND, 0, HIDES, False)
        acc = product(dy, k, acc, KIND)
    return acc


@triton.jit
def store_careful_query_gradient(
    grad_query, d_row, q, g, peak, inverse, delta, slope, first, begin, end, rows, kv, rule,
    KIND: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, from the keys [begin, end)."""
    dtype: tl.constexpr = peak.dtype
    BLOCK_M: tl.constexpr = q.shape[0]
    for column in range(0, HEAD_DIM, SLICE):
        acc = tl.full([BLOCK_M, SLICE], 0.0, dtype)
        plus = tl.full([BLOCK_M, SLICE], 0.0, dtype)
        minus = tl.full([BLOCK_M, SLICE], 0.0, dtype)
        for start in tl.range(begin, end, SLICE, num_stages=1):
            j = start + tl.arange(0, SLICE)
            k = load_rows(kv.key, kv.k_row, start, rule.keys, 0, SLICE, HEAD_DIM, q.shape[1],
                          True)  # fmt: skip
            v = load_rows(kv.value, kv.v_row, start, rule.keys, 0, SLICE, VALUE_DIM,
                          g.shape[1], True)  # fmt: skip
            some = load_rows(kv.key, kv.k_row, start, rule.keys, column, SLICE, HEAD_DIM,
                             SLICE, True)  # fmt: skip
            s = outer(q, k, dtype, KIND)
            dp = outer(g, v, dtype, KIND)
            _, seen, dy = gradient_tile(
                s, dp, j, peak, inverse, delta, rows, rule, KIND, 0, True, False
            )
            acc, plus, minus = careful_product(dy, seen, some, acc, plus, minus, KIND)
        total = with_nan(acc, plus, minus) * slope
        store_rows(grad_query, total, d_row, first, rule.queries, column, HEAD_DIM)


@triton.jit
def query_gradient_kernel(
    grad_output, grad_lse, query, key, value, mask, alibi, sinks, spans, seeds,
    output, rounding, row_max, row_sum, grad_query, grad_sinks,
    row_delta, row_inverse, row_a, row_c, key_tiles, value_tiles,
    scale: tl.float64, factor: tl.float64, unit: tl.float64, softcap: tl.float64,
    threshold: tl.float64, rescale: tl.float64, slope: tl.float64,
    heads, group, section, queries, keys, before, after, offset,
    g_batch, g_head, g_row, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, mask_batch, mask_head, mask_row, mask_column, alibi_batch, sinks_batch,
    KIND: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dq (BLOCK_M, D), the sink's gradient and, for the other kernels, delta, 1 / l and the words
    of dropout (BLOCK_M,) of a block of queries.
    """
    dtype: tl.constexpr = row_max.dtype.element_ty
    rule = Rule(
        queries, keys, tl.full([], scale, dtype), tl.full([], factor, dtype),
        cap_of(softcap, dtype) if CAPPED & KIND else None, mask_row, mask_column,
        spans, before, after, offset, tl.full([], threshold, tl.float64).to(tl.uint32),
        tl.full([], rescale, dtype),
    )  # fmt: skip
    slope = tl.full([], slope, dtype)
    tiles = tl.cdiv(queries, BLOCK_M)
    tile, all_head = place(tiles, section)
    # The last queries have most keys under a causal mask.
    first = (tiles - 1 - tile) * BLOCK_M
    batch = all_head // heads
    head = all_head % heads
    kv_head = head // group
    query += batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    grad_output += batch.to(tl.int64) * g_batch + head.to(tl.int64) * g_head
    key += batch.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    value += batch.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    if MASKED & KIND:
        mask += batch.to(tl.int64) * mask_batch + head.to(tl.int64) * mask_head
    kv = Keys(key, k_row, key_tiles, value, v_row, value_tiles, batch, kv_head)

    i = first + tl.arange(0, BLOCK_M)
    exists = i < queries
    at = all_head.to(tl.int64) * queries + i
    peak = tl.load(row_max + at, mask=exists, other=0.0)
    total = tl.load(row_sum + at, mask=exists, other=0.0)
    inverse = tl.where(total == 0, 0.0, 1.0 / total)
    o_row = heads * VALUE_DIM
    o_at = batch.to(tl.int64) * queries * o_row + head * VALUE_DIM
    g = load_rows(grad_output, g_row, first, queries, 0, BLOCK_M, VALUE_DIM, BLOCK_DV, True)
    o = load_rows(output + o_at, o_row, first, queries, 0, BLOCK_M, VALUE_DIM, BLOCK_DV, True)
    o = o.to(dtype)
    if output.dtype.element_ty != dtype:
        lost = load_rows(
            rounding + o_at, o_row, first, queries, 0, BLOCK_M, VALUE_DIM, BLOCK_DV, True
        )
        o += lost.to(dtype)
    delta = tl.sum(g.to(dtype) * o, 1)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + at, mask=exists, other=0.0)
    tl.store(row_delta + at, delta, mask=exists)
    tl.store(row_inverse + at, inverse, mask=exists)
    if sinks is not None:
        sink = tl.load(sinks + batch * sinks_batch + head) / tl.full([], unit, dtype)
        p = tl.exp2((sink - peak) * rule.factor) * inverse
        tl.store(grad_sinks + at, tl.where(p == 0, 0.0, -p * delta), mask=exists)

    q = load_rows(query, q_row, first, queries, 0, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    low, high, own = sight(i, rule, KIND)
    a = None
    c = None
    if DROPS & KIND:
        a, c = words(seeds, batch, head, i)
        tl.store(row_a + at, a.to(tl.int32, bitcast=True), mask=exists)
        tl.store(row_c + at, c.to(tl.int32, bitcast=True), mask=exists)
    rows = Rows(
        i, low, high, own, a, c, mask,
        tl.load(alibi + batch * alibi_batch + head) if ALIBI & KIND else None,
    )  # fmt: skip
    acc = tl.full([BLOCK_M, BLOCK_D], 0.0, dtype)
    begin, whole, stop, end = key_range(first, rule, KIND, BLOCK_M, BLOCK_N)
    edge = stop  # of the keys that not every query sees, of which [whole, whole + gap) are left out
    gap = 0
    if LEFT & KIND:
        edge = begin
        gap = stop - whole
    if not MASKED & KIND:
        acc = query_gradient_tiles(
            acc, q, g, peak, inverse, delta, whole, stop, 0, 0, rows, kv, rule, KIND, HEAD_DIM,
            VALUE_DIM, False, BLOCK_N,
        )  # fmt: skip
    acc = query_gradient_tiles(
        acc, q, g, peak, inverse, delta, edge, end - gap, whole, gap, rows, kv, rule,
        KIND, HEAD_DIM, VALUE_DIM, True, BLOCK_N,
    )  # fmt: skip

    d_row = heads * HEAD_DIM
    grad_query += batch.to(tl.int64) * queries * d_row + head * HEAD_DIM
    if any_spread(acc, exists, HIDING & KIND != 0):
        store_careful_query_gradient(
            grad_query, d_row, q, g, peak, inverse, delta, slope, first, begin, end, rows, kv, rule,
            KIND, HEAD_DIM, VALUE_DIM,
        )  # fmt: skip
    else:
        store_rows(grad_query, acc * slope, d_row, first, queries, 0, HEAD_DIM)


class Queries(NamedTuple):
    """The queries and upstream gradients of the heads that share a key head, their statistics, and
    what they are hidden by.
    """

    query: Any
    q_head: Any
    q_row: Any
    query_tiles: Any
    grad_output: Any
    g_head: Any
    g_row: Any
    grad_tiles: Any
    row_max: Any
    row_inverse: Any
    row_delta: Any
    row_a: Any
    row_c: Any
    mask: Any
    mask_head: Any
    alibi: Any
    batch: Any
    kv_head: Any
    group: Any
    heads: Any


@triton.jit
def some_queries(i, head, those, rule, KIND: tl.constexpr):
    """Of one of the heads: the largest score, 1 / l and delta, and `Rows`."""
    # 1 / l is 0 for queries that do not exist, and so are their weights.
    exists = i < rule.queries
    at = (those.batch.to(tl.int64) * those.heads + head) * rule.queries + i
    peak = tl.load(those.row_max + at, mask=exists, other=0.0)
    inverse = tl.load(those.row_inverse + at, mask=exists, other=0.0)
    delta = tl.load(those.row_delta + at, mask=exists, other=0.0)
    low, high, own = sight(i, rule, KIND)
    a = 0
    c = 0
    mask = those.row_max  # any pointer
    slope = 0.0
    if DROPS & KIND:
        a = tl.load(those.row_a + at, mask=exists, other=0).to(tl.uint32, bitcast=True)
        c = tl.load(those.row_c + at, mask=exists, other=0).to(tl.uint32, bitcast=True)
    if MASKED & KIND:
        mask = those.mask + head.to(tl.int64) * those.mask_head
    if ALIBI & KIND:
        slope = tl.load(those.alibi + head)
    return peak, inverse, delta, Rows(i, low, high, own, a, c, mask, slope)


@triton.jit
def key_gradient_tiles(
    grad_k, grad_v, k, v, begin, end, gap_at, gap, j, those, rule,
    KIND: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HIDES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The sums of dy^T q (N, D) and p^T g (N, Dv), with those of the tiles [begin, end) of queries,
    from `gap_at` on further by `gap`, of each head of the group, the last one first: under a causal
    mask the first queries give a key its largest weights, and what is added to a large sum is
    rounded at its size.
    """
    for step in range(those.group * (end - begin)):
        head = those.kv_head * those.group + step // (end - begin)
        tile = end - 1 - step % (end - begin)
        if HIDES and LEFT & KIND:
            tile += tl.where(tile >= gap_at, gap, 0)
        start = tile * BLOCK_M
        q = load_tile(those.query + head.to(tl.int64) * those.q_head, those.q_row,
                      those.query_tiles, those.batch, head, start, rule.queries, BLOCK_M,
                      HEAD_DIM, k.shape[1], True)  # fmt: skip
        g = load_tile(those.grad_output + head.to(tl.int64) * those.g_head, those.g_row,
                      those.grad_tiles, those.batch, head, start, rule.queries, BLOCK_M,
                      VALUE_DIM, v.shape[1], True)  # fmt: skip
        i = start + tl.arange(0, BLOCK_M)
        peak, inverse, delta, rows = some_queries(i, head, those, rule, KIND)
        s = outer(k, q, grad_k.dtype, KIND)
        dp = outer(v, g, grad_k.dtype, KIND)
        p, _, dy = gradient_tile(s, dp, j, peak, inverse, delta, rows, rule, KIND, 1, HIDES, False)
        grad_v = product(p, g, grad_v, KIND)
        grad_k = product(dy, q, grad_k, KIND)
    return grad_k, grad_v


@triton.jit
def store_careful_key_gradient(
    result, result_row, k, v, slope, first, begin, end, those, rule,
    KIND: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, OF_VALUE: tl.constexpr,
):  # fmt: skip
    """dv if OF_VALUE, else dk, of a block of keys, from the queries [begin, end)."""
    COLUMNS: tl.constexpr = VALUE_DIM if OF_VALUE else HEAD_DIM
    dtype: tl.constexpr = slope.dtype
    j = first + tl.arange(0, k.shape[0])
    for column in range(0, COLUMNS, SLICE):
        acc = tl.full([k.shape[0], SLICE], 0.0, dtype)
        plus = tl.full([k.shape[0], SLICE], 0.0, dtype)
        minus = tl.full([k.shape[0], SLICE], 0.0, dtype)
        for member in range(those.group):
            head = those.kv_head * those.group + member
            x = those.query + head.to(tl.int64) * those.q_head
            y = those.grad_output + head.to(tl.int64) * those.g_head
            for start in tl.range(begin, end, SLICE, num_stages=1):
                q = load_rows(x, those.q_row, start, rule.queries, 0, SLICE, HEAD_DIM,
                              k.shape[1], True)  # fmt: skip
                g = load_rows(y, those.g_row, start, rule.queries, 0, SLICE, VALUE_DIM,
                              v.shape[1], True)  # fmt: skip
                i = start + tl.arange(0, SLICE)
                peak, inverse, delta, rows = some_queries(i, head, those, rule, KIND)
                s = outer(k, q, dtype, KIND)
                dp = outer(v, g, dtype, KIND)
                p, seen, dy = gradient_tile(
                    s, dp, j, peak, inverse, delta, rows, rule, KIND, 1, True, False
                )
                if OF_VALUE:
                    some = load_rows(y, those.g_row, start, rule.queries, column, SLICE, COLUMNS,
                                     SLICE, True)  # fmt: skip
                    acc, plus, minus = careful_product(p, seen, some, acc, plus, minus, KIND)
                else:
                    some = load_rows(x, those.q_row, start, rule.queries, column, SLICE, COLUMNS,
                                     SLICE, True)  # fmt: skip
                    acc, plus, minus = careful_product(dy, seen, some, acc, plus, minus, KIND)
        total = (
            with_infinities(acc, plus, minus) if OF_VALUE else with_nan(acc, plus, minus) * slope
        )
        if OF_VALUE and DROPS & KIND:
            total *= rule.rescale
        store_rows(result, total, result_row, first, rule.keys, column, COLUMNS)


@triton.jit
def key_gradient_kernel(
    grad_output, query, key, value, mask, alibi, spans, row_max, row_inverse, row_delta,
    row_a, row_c, grad_key, grad_value, query_tiles, grad_tiles,
    scale: tl.float64, factor: tl.float64, softcap: tl.float64, threshold: tl.float64,
    rescale: tl.float64, slope: tl.float64,
    heads, group, section, queries, keys, before, after, offset,
    g_batch, g_head, g_row, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, mask_batch, mask_head, mask_row, mask_column, alibi_batch,
    KIND: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dk (BLOCK_N, D) and dv (BLOCK_N, Dv) of a block of keys, over the heads of its group."""
    dtype: tl.constexpr = row_max.dtype.element_ty
    rule = Rule(
        queries, keys, tl.full([], scale, dtype), tl.full([], factor, dtype),
        cap_of(softcap, dtype) if CAPPED & KIND else None, mask_row, mask_column,
        spans, before, after, offset, tl.full([], threshold, tl.float64).to(tl.uint32),
        tl.full([], rescale, dtype),
    )  # fmt: skip
    # The first keys have most queries under a causal mask.
    tile, all_head = place(tl.cdiv(keys, BLOCK_N), section)
    first = tile * BLOCK_N
    kv_heads = heads // group
    batch = all_head // kv_heads
    kv_head = all_head % kv_heads
    key += batch.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    value += batch.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    query += batch.to(tl.int64) * q_batch
    grad_output += batch.to(tl.int64) * g_batch
    if MASKED & KIND:
        mask += batch.to(tl.int64) * mask_batch
    if ALIBI & KIND:
        alibi += batch * alibi_batch
    those = Queries(
        query, q_head, q_row, query_tiles, grad_output, g_head, g_row, grad_tiles,
        row_max, row_inverse, row_delta, row_a, row_c, mask, mask_head, alibi,
        batch, kv_head, group, heads,
    )  # fmt: skip
    j = first + tl.arange(0, BLOCK_N)
    exists = j < keys
    k = load_rows(key, k_row, first, keys, 0, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = load_rows(value, v_row, first, keys, 0, BLOCK_N, VALUE_DIM, BLOCK_DV, True)
    grad_k = tl.full([BLOCK_N, BLOCK_D], 0.0, dtype)
    grad_v = tl.full([BLOCK_N, BLOCK_DV], 0.0, dtype)

    # Tiles of queries: [begin, end) see any of these keys, and all in [whole, stop) see all.
    begin, whole, stop, end = sight_of_keys(
        first, tl.minimum(first + BLOCK_N, keys) - 1, rule, KIND
    )
    begin = begin // BLOCK_M
    end = tl.maximum(tl.cdiv(end, BLOCK_M), begin)
    if not MASKED & KIND:
        whole = tl.minimum(tl.maximum(tl.cdiv(whole, BLOCK_M), begin), end)
        stop = tl.maximum(tl.where(stop == queries, end, stop // BLOCK_M), whole)
        grad_k, grad_v = key_gradient_tiles(
            grad_k, grad_v, k, v, whole, stop, 0, 0, j, those, rule, KIND, HEAD_DIM, VALUE_DIM,
            False, BLOCK_M,
        )  # fmt: skip
    if HIDING & KIND:
        gap = 0
        if not MASKED & KIND:
            gap = stop - whole
        grad_k, grad_v = key_gradient_tiles(
            grad_k, grad_v, k, v, begin, end - gap, whole, gap, j, those, rule,
            KIND, HEAD_DIM, VALUE_DIM, True, BLOCK_M,
        )  # fmt: skip

    k_out = kv_heads * HEAD_DIM
    v_out = kv_heads * VALUE_DIM
    grad_key += batch.to(tl.int64) * keys * k_out + kv_head * HEAD_DIM
    grad_value += batch.to(tl.int64) * keys * v_out + kv_head * VALUE_DIM
    slope = tl.full([], slope, dtype)
    # Both together, so that neither sum is kept in registers meanwhile.
    SPREADS: tl.constexpr = HIDING & KIND != 0
    if any_spread(grad_k, exists, SPREADS) | any_spread(grad_v, exists, SPREADS):
        begin *= BLOCK_M
        end = tl.minimum(end * BLOCK_M, queries) if LEFT & KIND else queries
        store_careful_key_gradient(
            grad_key, k_out, k, v, slope, first, begin, end, those, rule,
            KIND, HEAD_DIM, VALUE_DIM, False,
        )  # fmt: skip
        store_careful_key_gradient(
            grad_value, v_out, k, v, slope, first, begin, end, those, rule,
            KIND, HEAD_DIM, VALUE_DIM, True,
        )  # fmt: skip
    else:
        if DROPS & KIND:
            grad_v *= rule.rescale
        store_rows(grad_key, grad_k * slope, k_out, first, keys, 0, HEAD_DIM)
        store_rows(grad_value, grad_v, v_out, first, keys, 0, VALUE_DIM)


@triton.jit
def mask_gradient_kernel(
    grad_output, query, key, value, mask, alibi, spans, row_max, row_inverse, row_delta,
    row_a, row_c, grad_mask,
    scale: tl.float64, factor: tl.float64, softcap: tl.float64, threshold: tl.float64,
    rescale: tl.float64,
    heads, group, queries, keys, before, after, offset, shared_batches, shared_heads, own_heads,
    g_batch, g_head, g_row, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, mask_batch, mask_head, mask_row, mask_column, alibi_batch,
    KIND: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ONE_ROW: tl.constexpr,
    ONE_COLUMN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """A tile (BLOCK_M, BLOCK_N) of the mask's gradient, or one row or column of it if the mask has
    ONE_ROW or ONE_COLUMN: the sum of ds over whatever shares it.
    """
    dtype: tl.constexpr = row_max.dtype.element_ty
    rule = Rule(
        queries, keys, tl.full([], scale, dtype), tl.full([], factor, dtype),
        cap_of(softcap, dtype) if CAPPED & KIND else None, mask_row, mask_column,
        spans, before, after, offset, tl.full([], threshold, tl.float64).to(tl.uint32),
        tl.full([], rescale, dtype),
    )  # fmt: skip
    row_tiles = 1 if ONE_ROW else tl.cdiv(queries, BLOCK_M)
    column_tiles = 1 if ONE_COLUMN else tl.cdiv(keys, BLOCK_N)
    program = tl.program_id(0)
    column_tile = program % column_tiles
    row_tile = program // column_tiles % row_tiles
    own = program // column_tiles // row_tiles
    first_tile = row_tile
    last_tile = row_tile + 1
    first_key = column_tile * BLOCK_N
    last_key = tl.minimum(first_key + BLOCK_N, keys)
    if ONE_ROW:
        last_tile = tl.cdiv(queries, BLOCK_M)
    if ONE_COLUMN:
        last_key = keys

    acc = tl.full([BLOCK_M, BLOCK_N], 0.0, dtype)
    for member in range(shared_batches * shared_heads):
        batch = own // own_heads + member // shared_heads
        head = own % own_heads + member % shared_heads
        kv_head = head // group
        k_at = key + batch.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
        v_at = value + batch.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
        those = Queries(
            query + batch.to(tl.int64) * q_batch, q_head, q_row, None,
            grad_output + batch.to(tl.int64) * g_batch, g_head, g_row, None,
            row_max, row_inverse, row_delta, row_a, row_c,
            mask + batch.to(tl.int64) * mask_batch, mask_head,
            alibi + batch * alibi_batch if ALIBI & KIND else None, batch, kv_head, group, heads,
        )  # fmt: skip
        q_at = those.query + head.to(tl.int64) * q_head
        g_at = those.grad_output + head.to(tl.int64) * g_head
        for tile in range(first_tile, last_tile):
            first = tile * BLOCK_M
            span = key_range(first, rule, KIND, BLOCK_M, BLOCK_N)
            q = load_rows(q_at, q_row, first, queries, 0, BLOCK_M, HEAD_DIM, BLOCK_D, True)
            g = load_rows(g_at, g_row, first, queries, 0, BLOCK_M, VALUE_DIM, BLOCK_DV, True)
            i = first + tl.arange(0, BLOCK_M)
            peak, inverse, delta, rows = some_queries(i, head, those, rule, KIND)
            begin = tl.maximum(span[0], first_key)
            end = tl.minimum(span[3], last_key)
            for start in range(begin, end, BLOCK_N):
                k = load_rows(k_at, k_row, start, keys, 0, BLOCK_N, HEAD_DIM, BLOCK_D, True)
                v = load_rows(v_at, v_row, start, keys, 0, BLOCK_N, VALUE_DIM, BLOCK_DV, True)
                s = outer(q, k, dtype, KIND)
                dp = outer(g, v, dtype, KIND)
                j = start + tl.arange(0, BLOCK_N)
                _, _, ds = gradient_tile(
                    s, dp, j, peak, inverse, delta, rows, rule, KIND, 0, True, True
                )
                acc += ds

    i = first_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    j = first_key + tl.arange(0, BLOCK_N)
    if ONE_ROW and ONE_COLUMN:
        tl.store(grad_mask + own, tl.sum(tl.sum(acc, 1), 0))
    elif ONE_ROW:
        tl.store(grad_mask + own.to(tl.int64) * keys + j, tl.sum(acc, 0), mask=j < keys)
    elif ONE_COLUMN:
        tl.store(grad_mask + own.to(tl.int64) * queries + i, tl.sum(acc, 1), mask=i < queries)
    else:
        at = grad_mask + (own.to(tl.int64) * queries + i)[:, None] * keys + j[None, :]
        tl.store(at, acc, mask=(i < queries)[:, None] & (j < keys)[None, :])


# ---- launching ----

# What the keys and values, or queries and upstream gradients, of the heads in flight may take: half
# of the second-level cache of the smallest of these chips.
_CACHE = 16 << 20


class _Band(NamedTuple):
    """Which keys a query sees by its place: i + before <= j < i + after, as far as there is a limit
    that hides anything.
    """

    left: bool
    right: bool
    before: int
    after: int
    offset: int  # its place is i + offset
    gaps: bool  # whether a query may see nothing of the first tile of keys

    @classmethod
    def of(cls, options: Options, L: int, S: int) -> "_Band":
        left, right, offset = options[:3]
        has_left = left < UNLIMITED and offset + L - 1 - left > 0
        has_right = right < UNLIMITED and offset + right < S - 1
        before = max(-L, min(offset - left, S)) if has_left else 0
        after = max(-L, min(offset + right + 1, S)) if has_right else 0
        gaps = has_left or (has_right and after < 1)
        return cls(has_left, has_right, before, after, offset, gaps)


_OF_DOCUMENTS = _Band(True, True, 0, 0, 0, True)


class _Call(NamedTuple):
    """A checked call, its tensors of unit innermost stride."""

    query: Tensor  # (B, Hq, L, D)
    key: Tensor  # (B, H, S, D)
    value: Tensor  # (B, H, S, Dv)
    attn_mask: Tensor | None  # (B or 1, Hq or 1, L or 1, S or 1)
    alibi_slopes: Tensor | None  # (B or 1, Hq)
    sinks: Tensor | None  # (B or 1, Hq)
    spans: Tensor | None  # (3, L)
    seeds: Tensor | None  # (B,)
    band: _Band
    options: Options

    @property
    def scaled(self) -> bool:
        """Whether scores are more than products, with the scale in the factor. Sinks alone are put
        in units of the scale, which must leave them finite.
        """
        added = self.alibi_slopes is not None or _additive(self.attn_mask)
        least = 0.0 if self.sinks is None else 1e-6
        return added or self.options.softcap != 0 or not self.options.scale > least


class _Launch(NamedTuple):
    """A kernel with its arguments; `run` starts it."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    config: Config

    def run(self) -> None:
        options = {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}
        self.kernel[(self.programs,)](**self.arguments, **options)


def _check(holds: bool, expected: str) -> None:
    if not holds:
        raise RuntimeError(f"expected {expected}")


def _additive(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype != torch.bool


def _unit_columns(x: Tensor) -> Tensor:
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def _positions_first(x: Tensor) -> Tensor:
    """(B, H, N, columns), in memory (B, N, H, columns), as `new_outputs` makes it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _checked(inputs: Inputs, options: Options) -> _Call:
    """Raises RuntimeError for what the kernels cannot read."""
    query, key, value, attn_mask = inputs[:4]
    for x in (query, key, value):
        _check(x.dim() == 4, "tensors of four dimensions, (B, heads, N, columns)")
        _check(x.dtype == query.dtype, "query, key and value of one type")
    _check(query.dtype in DTYPES, f"one of {DTYPES}, got {query.dtype}")
    B, Hq, L, D = query.shape
    H, S = key.shape[1:3]
    _check(
        key.shape == (B, H, S, D) and value.shape[:3] == (B, H, S) and H > 0 and Hq % H == 0,
        "query (B, Hq, L, D), key (B, H, S, D) and value (B, H, S, Dv), Hq a multiple of H",
    )
    _check(
        min(x.numel() for x in (query, key, value)) > 0, "query, key and value that are not empty"
    )
    work = accumulator_dtype(query.dtype)
    if attn_mask is not None:
        _check(attn_mask.dim() == 4, "attn_mask (B, H, L, S)")
        _check(
            all(n in (1, m) for n, m in zip(attn_mask.shape, (B, Hq, L, S), strict=True)),
            "attn_mask broadcastable to (B, H, L, S)",
        )
        _check(
            attn_mask.dtype in (torch.bool, query.dtype, work),
            "attn_mask of bool, query's or the accumulator type",
        )
    for by_head in (inputs.alibi_slopes, inputs.sinks):
        _check(
            by_head is None or (by_head.shape in ((B, Hq), (1, Hq)) and by_head.dtype == work),
            "alibi_slopes and sinks (B or 1, Hq) in the accumulator type",
        )
    spans, seeds = inputs.spans, inputs.seeds
    _check(
        spans is None or (spans.shape == (3, L) and spans.dtype == torch.int64),
        "spans (3, L) of int64",
    )
    _check(
        seeds is None or (seeds.shape == (B,) and seeds.dtype == torch.int64), "seeds (B,) of int64"
    )
    _check(
        all(x is None or x.device == query.device for x in inputs), "all tensors on query's device"
    )
    query, key, value = map(_unit_columns, (query, key, value))
    others = [None if x is None else x.contiguous() for x in inputs[4:]]
    slopes, sinks, spans, seeds = others
    band = _Band.of(options, L, S) if spans is None else _OF_DOCUMENTS
    return _Call(query, key, value, attn_mask, slopes, sinks, spans, seeds, band, options)


def _strides(prefix: str, x: Tensor) -> dict[str, int]:
    names = (f"{prefix}_batch", f"{prefix}_head", f"{prefix}_row", f"{prefix}_column")
    return dict(zip(names, x.stride()[: 4 if prefix == "mask" else 3], strict=False))


def _kind(call: _Call) -> int:
    """The bits for which a kernel is compiled."""
    bits = {
        BOOL_MASK: call.attn_mask is not None and not _additive(call.attn_mask),
        ADDITIVE_MASK: _additive(call.attn_mask),
        LEFT: call.band.left,
        RIGHT: call.band.right,
        GAPS: call.band.gaps or call.attn_mask is not None,
        SCALED: call.scaled,
        CAPPED: call.options.softcap != 0,
        ALIBI: call.alibi_slopes is not None,
        DROPS: call.seeds is not None,
        FULL: call.query.dtype == torch.float32,
        # As torch's own products of float32 matrices.
        TF32: torch.backends.cuda.matmul.fp32_precision == "tf32",
    }
    return sum(bit.value for bit, wanted in bits.items() if wanted)


def _shared_arguments(call: _Call) -> dict[str, Any]:
    """The arguments that all kernels have."""
    B, Hq, L, D = call.query.shape
    H, S = call.key.shape[1:3]
    mask, band, options = call.attn_mask, call.band, call.options
    if mask is None:
        strides = dict.fromkeys(("mask_batch", "mask_head", "mask_row", "mask_column"), 0)
    else:
        strides = _strides("mask", mask.expand(B, Hq, L, S))
    return {
        "query": call.query,
        "key": call.key,
        "value": call.value,
        "mask": mask,
        "alibi": call.alibi_slopes,
        "spans": call.spans,
        "scale": options.scale,
        "factor": math.log2(math.e) * (1.0 if call.scaled else options.scale),
        "softcap": options.softcap,
        "threshold": float(threshold(options.dropout_p)),
        "rescale": rescale(options.dropout_p),
        "heads": Hq,
        "group": Hq // H,
        "queries": L,
        "keys": S,
        "before": band.before,
        "after": band.after,
        "offset": band.offset,
        **_strides("q", call.query),
        **_strides("k", call.key),
        **_strides("v", call.value),
        **strides,
        "alibi_batch": _batch_stride(call.alibi_slopes),
        "KIND": _kind(call),
        "HEAD_DIM": D,
        "VALUE_DIM": call.value.shape[3],
        "BLOCK_D": tiles.padded(D),
        "BLOCK_DV": tiles.padded(call.value.shape[3]),
    }


def _batch_stride(x: Tensor | None) -> int:
    """Of (B or 1, Hq)."""
    return 0 if x is None or x.shape[0] == 1 else x.shape[1]


def _row_arguments(call: _Call) -> dict[str, Any]:
    """Those of the kernels whose programs have a block of queries."""
    return {
        "sinks": call.sinks,
        "seeds": call.seeds,
        "unit": 1.0 if call.scaled else call.options.scale,
        "sinks_batch": _batch_stride(call.sinks),
        "section": _key_section(call),
    }


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor | None:
    """For tiles of so many rows of x (B, H, N, columns); None where the copy engine cannot read it:
    its strides are positive multiples of 16 bytes.
    """
    strides = [s if n > 1 else 16 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    aligned = (x.data_ptr(), *(s * x.element_size() for s in strides))
    if min(strides) <= 0 or any(n % 16 for n in aligned):
        return None
    block = [1, 1, rows, tiles.padded(x.shape[3])]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block)


def _descriptors(
    chip: Chip, names: tuple[str, str], tensors: tuple[Tensor, Tensor], rows: int
) -> dict[str, TensorDescriptor | None]:
    """Of both or of neither."""
    found = [None, None]
    if chip.descriptors and tensors[0].element_size() == 2:
        both = [_descriptor(x, rows) for x in tensors]
        found = both if None not in both else found
    return dict(zip(names, found, strict=True))


def _section(heads: int, head_bytes: int) -> int:
    """How many heads run at the same time, for what they read to stay in the cache."""
    return max(1, min(heads, _CACHE // head_bytes))


def _tiled(
    kernel: str, call: _Call, chip: Chip, launch: Callable[[Config], _Launch]
) -> Callable[[], None]:
    """The launch with its tile: the stored one, or with FASTGPT_AUTOTUNE=1 the fastest."""
    if INTERPRETED:
        return launch(tiles.INTERPRETED[kernel]).run
    B, Hq, L, D = call.query.shape
    H, S, Dv = *call.key.shape[1:3], call.value.shape[3]
    dtype, mask, band = call.query.dtype, call.attn_mask, call.band
    problem = _problem(kernel, call)
    if not autotune.enabled():
        return launch(tiles.best(problem, chip)).run
    lengths = (triton.next_power_of_2(n) for n in (B * Hq, Hq // H, L, S))
    options = (
        "" if mask is None else str(mask.dtype),
        band.left,
        band.right,
        triton.next_power_of_2(max(band.after - band.before, 1)),
        *(x is not None for x in call[4:8]),
        call.options.softcap != 0,
    )
    key = (str(dtype), tiles.padded(D), tiles.padded(Dv), *lengths, *options)
    config = autotune.best(
        f"attention {kernel}",
        key,
        chip,
        tiles.candidates(problem, chip),
        lambda config: launch(config).run(),
    )
    return launch(config).run


def _problem(kernel: str, call: _Call) -> tiles.Problem:
    options = tiles.SPANS if call.band.left else tiles.PLAIN
    if call.options.softcap != 0 or not (call.alibi_slopes is call.seeds is None):
        options = tiles.SCORES
    width = tiles.padded(max(call.query.shape[3], call.value.shape[3]))
    masked = call.attn_mask is not None
    return tiles.Problem(kernel, call.query.dtype.itemsize, width, masked, options)


class _Gradients(NamedTuple):
    """What the backward writes; and, for the kernels after the first, what that leaves them."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor
    sinks: Tensor
    delta: Tensor  # (B, Hq, L), as those below
    inverse: Tensor  # 1 / l
    a: Tensor | None  # the words of dropout
    c: Tensor | None


def _new_gradients(call: _Call, of_mask: bool) -> _Gradients:
    query = call.query
    results = new_gradients(*call[:4], call.sinks, of_mask)
    delta, inverse = query.new_empty(
        (2, *query.shape[:3]), dtype=accumulator_dtype(query.dtype)
    ).unbind(0)
    a = c = None
    if call.seeds is not None:
        a, c = query.new_empty((2, *query.shape[:3]), dtype=torch.int32).unbind(0)
    return _Gradients(*results, delta, inverse, a, c)


class _Upstream(NamedTuple):
    """What the backward reads beside the inputs."""

    grad_output: Tensor
    grad_lse: Tensor | None
    output: Tensor
    rounding: Tensor
    row_max: Tensor
    row_sum: Tensor


def _forward_launch(
    call: _Call, results: tuple[Tensor, ...], config: Config, chip: Chip
) -> _Launch:
    names = ("output", "lse", "rounding", "row_max", "row_sum")
    B, Hq, L, _ = call.query.shape
    arguments = {
        **_shared_arguments(call),
        **_row_arguments(call),
        **_descriptors(chip, ("key_tiles", "value_tiles"), (call.key, call.value), config.block_n),
        **dict(zip(names, results, strict=True)),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    return _Launch(forward_kernel, B * Hq * triton.cdiv(L, config.block_m), arguments, config)


def _gradient_arguments(call: _Call, upstream: _Upstream, gradients: _Gradients) -> dict[str, Any]:
    return {
        **_shared_arguments(call),
        "grad_output": upstream.grad_output,
        **_strides("g", upstream.grad_output),
        "row_max": upstream.row_max,
        "row_delta": gradients.delta,
        "row_inverse": gradients.inverse,
        "row_a": gradients.a,
        "row_c": gradients.c,
    }


def _certain(call: _Call, upstream: _Upstream) -> bool:
    """Whether there is a single key, of weight 1 whatever it is: its score has no gradient."""
    return call.key.shape[2] == 1 and call.sinks is None and upstream.grad_lse is None


def _query_gradient_launch(
    call: _Call, upstream: _Upstream, gradients: _Gradients, config: Config, chip: Chip
) -> _Launch:
    B, Hq, L, _ = call.query.shape
    arguments = {
        **_gradient_arguments(call, upstream, gradients),
        **_row_arguments(call),
        **_descriptors(chip, ("key_tiles", "value_tiles"), (call.key, call.value), config.block_n),
        "grad_lse": upstream.grad_lse,
        "output": upstream.output,
        "rounding": upstream.rounding,
        "row_sum": upstream.row_sum,
        "grad_query": gradients.query,
        "grad_sinks": gradients.sinks,
        "slope": 0.0 if _certain(call, upstream) else call.options.scale,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    programs = B * Hq * triton.cdiv(L, config.block_m)
    return _Launch(query_gradient_kernel, programs, arguments, config)


def _key_gradient_launch(
    call: _Call, upstream: _Upstream, gradients: _Gradients, config: Config, chip: Chip
) -> _Launch:
    B, H, S, _ = call.key.shape
    both = (call.query, upstream.grad_output)
    arguments = {
        **_gradient_arguments(call, upstream, gradients),
        **_descriptors(chip, ("query_tiles", "grad_tiles"), both, config.block_m),
        "grad_key": gradients.key,
        "grad_value": gradients.value,
        "slope": 0.0 if _certain(call, upstream) else call.options.scale,
        "section": _section(B * H, _bytes_of_head(*both) * call.query.shape[1] // H),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    programs = B * H * triton.cdiv(S, config.block_n)
    return _Launch(key_gradient_kernel, programs, arguments, config)


def _mask_gradient_launch(
    call: _Call, upstream: _Upstream, gradients: _Gradients, config: Config
) -> _Launch:
    B, Hq = call.query.shape[:2]
    batches, heads, rows, columns = gradients.attn_mask.shape
    arguments = {
        **_gradient_arguments(call, upstream, gradients),
        "grad_mask": gradients.attn_mask,
        "shared_batches": B // batches,
        "shared_heads": Hq // heads,
        "own_heads": heads,
        "ONE_ROW": rows == 1,
        "ONE_COLUMN": columns == 1,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    programs = batches * heads * triton.cdiv(rows, config.block_m)
    programs *= triton.cdiv(columns, config.block_n)
    return _Launch(mask_gradient_kernel, programs, arguments, config)


def _bytes_of_head(*tensors: Tensor) -> int:
    return sum(x.shape[2] * x.shape[3] * x.element_size() for x in tensors)


def _key_section(call: _Call) -> int:
    """In query heads."""
    B, H = call.key.shape[:2]
    group = call.query.shape[1] // H
    return group * _section(B * H, _bytes_of_head(call.key, call.value))


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """The raw operator's kernel; see `ops.attention.define`."""
    call = _checked(Inputs(*arguments[:8]), Options(*arguments[8:]))
    chip = chip_of(call.query.device)
    results = new_outputs(*call[:3])
    with torch.cuda.device_of(call.query):  # launches go to the current GPU
        _tiled("forward", call, chip, lambda c: _forward_launch(call, results, c, chip))()
    return results


def backward(grad_output: Tensor, grad_lse: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """The raw operator's kernel; see `ops.attention.define`."""
    call = _checked(Inputs(*arguments[:8]), Options(*arguments[12:18]))
    of_mask = arguments[18]
    upstream = _checked_upstream(call, _Upstream(grad_output, grad_lse, *arguments[8:12]))
    _check(not of_mask or _additive(call.attn_mask), "a floating attn_mask for a gradient")
    chip = chip_of(call.query.device)
    gradients = _new_gradients(call, of_mask)
    parts = (call, upstream, gradients)
    with torch.cuda.device_of(call.query):  # launches go to the current GPU
        _tiled("query gradient", call, chip, lambda c: _query_gradient_launch(*parts, c, chip))()
        _tiled("key gradient", call, chip, lambda c: _key_gradient_launch(*parts, c, chip))()
        if of_mask and _certain(call, upstream):
            gradients.attn_mask.zero_()
        elif of_mask:
            _tiled("mask gradient", call, chip, lambda c: _mask_gradient_launch(*parts, c))()
    return gradients[:5]


def _checked_upstream(call: _Call, upstream: _Upstream) -> _Upstream:
    """Raises RuntimeError for what the kernels cannot read."""
    query, dtype = call.query, accumulator_dtype(call.query.dtype)
    heads, columns = query.shape[:3], call.value.shape[3]
    grad_output, grad_lse, output, rounding, row_max, row_sum = upstream
    for x, n in (
        (grad_output, columns),
        (output, columns),
        (rounding, columns if dtype != query.dtype else 0),
    ):
        _check(
            x.shape == (*heads, n) and x.dtype == query.dtype,
            "grad_output, output and, of 16-bit types, rounding (B, Hq, L, Dv) of query's type",
        )
    for x in (row_max, row_sum, row_max if grad_lse is None else grad_lse):
        _check(
            x.shape == heads and x.dtype == dtype,
            "grad_lse, row_max and row_sum (B, Hq, L) in the accumulator type",
        )
    return _Upstream(
        _unit_columns(grad_output),
        None if grad_lse is None else grad_lse.contiguous(),
        _positions_first(output),
        _positions_first(rounding),
        row_max.contiguous(),
        row_sum.contiguous(),
    )


# ---- ahead of time ----

_TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def _compilation(
    name: str, launch: _Launch, instructions: dict[str, str], work: str
) -> Compilation:
    """Of a launch on tensors without memory."""
    signature, constants, divisible = {}, {}, []
    for parameter in launch.kernel.params:
        x = launch.arguments[parameter.name]
        kind = "constexpr"
        if isinstance(x, TensorDescriptor):
            kind = f"tensordesc<{_TYPES[x.base.dtype][1:]}{x.block_shape}>"
        elif isinstance(x, Tensor):
            kind = _TYPES[x.dtype]
            divisible.append(parameter.name)
        elif parameter.annotation_type:
            kind = parameter.annotation_type
        elif not parameter.is_constexpr and x is not None and x != 1:
            kind = "i32"
            if x % 16 == 0:
                divisible.append(parameter.name)
        if kind == "constexpr":
            constants[parameter.name] = x
        signature[parameter.name] = kind
    config = launch.config
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return Compilation(
        name, launch.kernel, signature, constants, tuple(divisible), options, instructions, work
    )


WORK = {
    "forward": "2 (D + Dv) FLOP for each pair of query and key",
    "query gradient": "4 D + 2 Dv FLOP for each pair of query and key",
    "key gradient": "4 D + 4 Dv FLOP for each pair of query and key",
    "mask gradient": "2 (D + Dv) FLOP for each pair of query and key",
}


class _Variant(NamedTuple):
    """A call to compile."""

    mask: torch.dtype | None = None  # of the inputs' type: float32
    causal: bool = False
    left: int = UNLIMITED
    documents: bool = False
    dropout_p: float = 0.0
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False  # and a gradient of lse


VARIANTS = {
    "full": _Variant(),
    "causal": _Variant(causal=True),
    "causal, bool mask": _Variant(torch.bool, True),
    "additive mask": _Variant(torch.float32),
    "window": _Variant(causal=True, left=1000),
    "documents": _Variant(causal=True, documents=True, sinks=True),
    "dropout": _Variant(causal=True, dropout_p=0.1),
    "everything": _Variant(None, True, 1000, False, 0.1, 50.0, True, True),
    "everything, additive mask": _Variant(torch.float32, True, 0, True, 0.1, 50.0, True, True),
}


def _example(dtype: torch.dtype, head_dim: int, variant: _Variant) -> _Call:
    """A call without memory."""
    B, H, N = 2, 16, 4096
    work = accumulator_dtype(dtype)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    heads = [empty(dtype, B, N, H, head_dim).transpose(1, 2) for _ in range(3)]
    mask = None
    if variant.mask is not None:
        mask = empty(torch.bool if variant.mask == torch.bool else work, B, 1, N, N)
    inputs = Inputs(
        heads[0],
        heads[1],
        heads[2],
        mask,
        empty(work, 1, H) if variant.alibi else None,
        empty(work, 1, H) if variant.sinks else None,
        empty(torch.int64, 3, N) if variant.documents else None,
        empty(torch.int64, B) if variant.dropout_p else None,
    )
    right = 0 if variant.causal else UNLIMITED
    options = (variant.left, right, 0, head_dim**-0.5, variant.softcap, variant.dropout_p)
    return _checked(inputs, Options(*options))


def compilation(
    kernel: str, dtype: torch.dtype, head_dim: int, variant: str, config: Config, chip: Chip
) -> Compilation:
    """One of `tiles.KERNELS` in one of VARIANTS."""
    call = _example(dtype, head_dim, VARIANTS[variant])
    results = new_outputs(*call[:3])
    output, lse, *statistics = results
    of_lse = lse if VARIANTS[variant].sinks else None
    upstream = _Upstream(torch.empty_like(call.value), of_lse, output, *statistics)
    parts = (call, upstream, _new_gradients(call, kernel == "mask gradient"))
    if kernel == "forward":
        launch = _forward_launch(call, results, config, chip)
    elif kernel == "query gradient":
        launch = _query_gradient_launch(*parts, config, chip)
    elif kernel == "key gradient":
        launch = _key_gradient_launch(*parts, config, chip)
    else:
        launch = _mask_gradient_launch(*parts, config)
    name = f"attention {kernel} {str(dtype).removeprefix('torch.')} d{head_dim} {variant}"
    instructions = _matrix_instructions(chip) if dtype.itemsize == 2 else {}
    return _compilation(name, launch, instructions, WORK[kernel])


def _matrix_instructions(chip: Chip) -> dict[str, str]:
    pattern = {
        "sm_80": r"mma\.sync",
        "sm_90": r"wgmma\.mma_async|mma\.sync",
        "sm_100": r"tcgen05\.mma|mma\.sync",
        "gfx942": r"v_mfma_",
    }[chip.name]
    return {"matrix instructions": pattern}


def compilations(chip: Chip) -> Iterator[Compilation]:
    """Every stored tile of the chip; each variant for a head_dim of practice only. The tiles of
    bfloat16 are float16's, too.
    """
    of_size = {x.itemsize: x for x in (torch.bfloat16, torch.float32, torch.float64)}
    for problem, config in tiles.stored(chip):
        practice = problem.itemsize == 2 and problem.width in (64, 128)
        if problem.options == tiles.SCORES and problem.masked:
            variants = ["everything, additive mask"]
        elif problem.options == tiles.SCORES:
            variants = ["everything", "dropout"] if practice else ["everything"]
        elif problem.options == tiles.SPANS:
            variants = ["window", "documents"] if practice else ["window"]
        else:
            variants = ["additive mask"] if problem.masked else ["causal"]
            if practice and problem.width == 128 and problem.kernel != "mask gradient":
                variants.append("causal, bool mask" if problem.masked else "full")
        for variant in variants:
            yield compilation(
                problem.kernel, of_size[problem.itemsize], problem.width, variant, config, chip
            )
