"""Scaled dot-product attention and its gradient in Triton.

For a query row q_i, keys k_j and values v_j of one head, with the mask's b_ij (0 or -inf if it is
boolean):

    x_ij = scale <q_i, k_j> + b_ij    m_i = max_j x_ij    l_i = sum_j exp(x_ij - m_i)
    p_ij = exp(x_ij - m_i) / l_i      o_i = sum_j p_ij v_j

and backward, for an upstream gradient g_i of o_i:

    dp_ij = <g_i, v_j>        delta_i = sum_j p_ij dp_ij = <g_i, o_i>
    ds_ij = p_ij (dp_ij - delta_i)
    dv_j = sum_i p_ij g_i     dq_i = scale sum_j ds_ij k_j     dk_j = scale sum_i ds_ij q_i

The forward walks the keys of a block of queries with a running maximum (Milakov and Gimelshein
2018; Dao et al., "FlashAttention", 2022). The backward recomputes p from the saved m and l in two
passes without atomics, so that its sums have one order: a program of the first walks the keys of a
block of queries, for dq and delta; one of the second the queries of a block of keys, in all the
query heads that share them, for dk and dv (Dao, "FlashAttention-2", 2023). Nothing of size L x S
exists.

FLOPs of the pairs (i, j) that are allowed: 2 (D + Dv) per pair forward; backward 4 D + 2 Dv for dq
and 4 D + 4 Dv for dk and dv. A causal mask is followed to the tile.

Scores s become exp2(factor (s - m)), the difference first: the largest weight is exactly 1, also in
16 bits, and large scores keep their accuracy. They are the products <q_i, k_j> themselves, with the
scale in the factor, unless a mask is added to them or the scale is not positive (`SCALED`); the
saved m is one of s, whichever that is.

What a query may not look at is hidden by selecting. NaN and infinities still spread from a hidden
row of x through sums p x, as 0 * NaN; a program in whose result anything is not finite computes it
again by `careful_product`, which leaves them out.
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
from fastgpt.backends.triton.tiles import Config
from fastgpt.ops.attention import new_gradients, new_outputs
from fastgpt.ops.raw import accumulator_dtype

if knobs.runtime.interpret:
    from fastgpt.backends.triton import interpreter

    interpreter.correct()

INTERPRETED = knobs.runtime.interpret
INFINITY = tl.constexpr(math.inf)
NO_MASK = tl.constexpr(0)
BOOL_MASK = tl.constexpr(1)
ADDITIVE_MASK = tl.constexpr(2)
# Columns of a result that the careful path computes at once, and keys or queries at a time. The
# interpreter's time is the number of steps.
SLICE = tl.constexpr(64 if INTERPRETED else 16)

# ---- numbers ----


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, `a` rounded to b's type."""
    return tl.dot(a.to(b.dtype), b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def outer(a, b, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b^T."""
    return product(a, b.T, tl.full([a.shape[0], b.shape[0]], 0.0, dtype), PRECISION)


@triton.jit
def careful_product(weights, seen, x, acc, plus, minus, PRECISION: tl.constexpr):
    """acc + weights @ x, of what is finite in x; what is not, where it is seen, is counted: in
    `plus` inf and NaN, in `minus` -inf and NaN.
    """
    wide = x.to(acc.dtype)
    finite = tl.abs(wide) < INFINITY
    acc = product(weights, tl.where(finite, wide, 0.0).to(x.dtype), acc, PRECISION)
    seen = tl.where(seen, 1.0, 0.0)
    high = tl.where(finite | (wide < 0), 0.0, 1.0)
    low = tl.where(finite | (wide > 0), 0.0, 1.0)
    plus = product(seen, high.to(x.dtype), plus, PRECISION)
    minus = product(seen, low.to(x.dtype), minus, PRECISION)
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
def any_spread(x, exists, MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """Whether a number in the rows that exist is not finite, in one reduction; never where nothing
    is hidden, since then it belongs there.
    """
    if MASK == NO_MASK and not CAUSAL:
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


@triton.jit
def visible(
    i, j, queries, keys, mask, mask_row, mask_column, dtype: tl.constexpr, HIDES: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Whether query i and key j exist and the query may look at the key; and what an additive mask
    adds. One of i and j is a column, the other a row.
    """
    seen = True
    bias = 0.0
    if HIDES:
        seen = (i < queries) & (j < keys)
    if MASK != NO_MASK:
        # Without causality, so that the loads of whole vectors stay whole.
        at = mask + (i.to(tl.int64) * mask_row + j.to(tl.int64) * mask_column)
        if MASK == BOOL_MASK:
            seen = tl.load(at, mask=seen, other=0) != 0
        else:
            bias = tl.load(at, mask=seen, other=-INFINITY).to(dtype)
            seen = bias != -INFINITY
    if HIDES and CAUSAL:
        seen &= j <= i
    return seen, bias


@triton.jit
def scores(
    s, seen, bias, scale, HIDES: tl.constexpr, SCALED: tl.constexpr, MASK: tl.constexpr
):  # fmt: skip
    """The scores that the products s stand for, -inf where nothing is seen."""
    if SCALED:
        s *= scale
    if MASK == ADDITIVE_MASK:
        s += bias
    if HIDES:
        s = tl.where(seen, s, -INFINITY)
    return s


# ---- forward ----


@triton.jit
def forward_tiles(
    acc, total, peak, q, begin, end, i, batch, kv_head, queries, keys, scale, factor,
    key, k_row, key_tiles, value, v_row, value_tiles, mask, mask_row, mask_column,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HIDES: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The running sum of weights and values (M, Dv), sum of weights and maximum (M,), after the
    keys [begin, end). HIDES: not every query sees every key.
    """
    for start in range(begin, end, BLOCK_N):
        k = load_tile(key, k_row, key_tiles, batch, kv_head, start, keys, BLOCK_N, HEAD_DIM,
                      q.shape[1], HIDES)  # fmt: skip
        s = outer(q, k, acc.dtype, PRECISION)
        j = start + tl.arange(0, BLOCK_N)
        seen, bias = visible(i[:, None], j[None, :], queries, keys, mask, mask_row, mask_column,
                             acc.dtype, HIDES, MASK, CAUSAL)  # fmt: skip
        s = scores(s, seen, bias, scale, HIDES, SCALED, MASK)
        above = tl.maximum(peak, tl.max(s, 1))
        level = above
        if MASK != NO_MASK:  # before the first key that is seen
            level = tl.where(above == -INFINITY, 0.0, above)
        p = tl.exp2((s - level[:, None]) * factor)
        shrink = tl.exp2((peak - level) * factor)
        total = total * shrink + tl.sum(p, 1)
        v = load_tile(value, v_row, value_tiles, batch, kv_head, start, keys, BLOCK_N, VALUE_DIM,
                      acc.shape[1], HIDES)  # fmt: skip
        acc = product(p, v, acc * shrink[:, None], PRECISION)
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
    output, rounding, o_row, q, peak, inverse, first, end, queries, keys, scale, factor,
    key, k_row, value, v_row, mask, mask_row, mask_column,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o of a block of queries, from the keys before `end`."""
    BLOCK_M: tl.constexpr = q.shape[0]
    i = first + tl.arange(0, BLOCK_M)
    for column in range(0, VALUE_DIM, SLICE):
        acc = tl.full([BLOCK_M, SLICE], 0.0, scale.dtype)
        plus = tl.full([BLOCK_M, SLICE], 0.0, scale.dtype)
        minus = tl.full([BLOCK_M, SLICE], 0.0, scale.dtype)
        for start in tl.range(0, end, SLICE, num_stages=1):
            j = start + tl.arange(0, SLICE)
            k = load_rows(key, k_row, start, keys, 0, SLICE, HEAD_DIM, q.shape[1], True)
            v = load_rows(value, v_row, start, keys, column, SLICE, VALUE_DIM, SLICE, True)
            s = outer(q, k, scale.dtype, PRECISION)
            seen, bias = visible(i[:, None], j[None, :], queries, keys, mask, mask_row,
                                 mask_column, scale.dtype, True, MASK, CAUSAL)  # fmt: skip
            s = scores(s, seen, bias, scale, True, SCALED, MASK)
            p = tl.exp2((s - peak[:, None]) * factor)
            acc, plus, minus = careful_product(p, seen, v, acc, plus, minus, PRECISION)
        store_output(with_infinities(acc, plus, minus), inverse, output, rounding, o_row, first,
                     queries, column, VALUE_DIM)  # fmt: skip


@triton.jit
def forward_kernel(
    query, key, value, mask, output, rounding, row_max, row_sum, key_tiles, value_tiles,
    scale: tl.float64, factor: tl.float64, heads, group, section, queries, keys,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_column,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """output, rounding (BLOCK_M, Dv), row_max and row_sum (BLOCK_M,) of a block of queries."""
    dtype: tl.constexpr = row_max.dtype.element_ty
    scale = tl.full([], scale, dtype)
    factor = tl.full([], factor, dtype)
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
    if MASK != NO_MASK:
        mask += batch.to(tl.int64) * mask_batch + head.to(tl.int64) * mask_head

    i = first + tl.arange(0, BLOCK_M)
    q = load_rows(query, q_row, first, queries, 0, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    acc = tl.full([BLOCK_M, BLOCK_DV], 0.0, dtype)
    total = tl.full([BLOCK_M], 0.0, dtype)
    peak = tl.full([BLOCK_M], -INFINITY, dtype)

    end = tl.minimum(keys, first + BLOCK_M) if CAUSAL else keys
    whole = 0  # the keys before it are in tiles of which every query sees all
    if MASK == NO_MASK:
        whole = (tl.minimum(keys, first + 1) if CAUSAL else keys) // BLOCK_N * BLOCK_N
        acc, total, peak = forward_tiles(
            acc, total, peak, q, 0, whole, i, batch, kv_head, queries, keys, scale, factor,
            key, k_row, key_tiles, value, v_row, value_tiles, mask, mask_row, mask_column,
            HEAD_DIM, VALUE_DIM, False, MASK, CAUSAL, SCALED, PRECISION, BLOCK_N,
        )  # fmt: skip
    acc, total, peak = forward_tiles(
        acc, total, peak, q, whole, end, i, batch, kv_head, queries, keys, scale, factor,
        key, k_row, key_tiles, value, v_row, value_tiles, mask, mask_row, mask_column,
        HEAD_DIM, VALUE_DIM, True, MASK, CAUSAL, SCALED, PRECISION, BLOCK_N,
    )  # fmt: skip

    exists = i < queries
    if MASK != NO_MASK:
        peak = tl.where(peak == -INFINITY, 0.0, peak)
    inverse = tl.where(total == 0, 0.0, 1.0 / total)
    rows = all_head.to(tl.int64) * queries + i
    tl.store(row_max + rows, peak, mask=exists)
    tl.store(row_sum + rows, total, mask=exists)
    o_row = heads * VALUE_DIM
    at = batch.to(tl.int64) * queries * o_row + head * VALUE_DIM
    output += at
    if output.dtype.element_ty != dtype:
        rounding += at
    if any_spread(acc, exists, MASK, CAUSAL):
        store_careful_output(
            output, rounding, o_row, q, peak, inverse, first, end, queries, keys, scale, factor,
            key, k_row, value, v_row, mask, mask_row, mask_column,
            HEAD_DIM, VALUE_DIM, MASK, CAUSAL, SCALED, PRECISION,
        )  # fmt: skip
    else:
        store_output(acc, inverse, output, rounding, o_row, first, queries, 0, VALUE_DIM)


# ---- backward ----


@triton.jit
def gradient_tile(
    s, dp, peak, inverse, delta, seen, bias, scale, factor, HIDES: tl.constexpr,
    SCALED: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """The weights p and ds of a tile, from its products s and dp and the statistics of its queries,
    a column or a row.
    """
    s = scores(s, seen, bias, scale, False, SCALED, MASK)
    p = tl.exp2((s - peak) * factor) * inverse
    ds = p * (dp - delta)
    if HIDES:
        p = tl.where(seen, p, 0.0)
        ds = tl.where(seen, ds, 0.0)
    return p, ds


@triton.jit
def query_gradient_tiles(
    acc, q, g, peak, inverse, delta, begin, end, i, batch, kv_head, queries, keys, scale, factor,
    key, k_row, key_tiles, value, v_row, value_tiles, mask, mask_row, mask_column,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HIDES: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum of ds k (M, D), with that of the keys [begin, end)."""
    for start in range(begin, end, BLOCK_N):
        k = load_tile(key, k_row, key_tiles, batch, kv_head, start, keys, BLOCK_N, HEAD_DIM,
                      q.shape[1], HIDES)  # fmt: skip
        v = load_tile(value, v_row, value_tiles, batch, kv_head, start, keys, BLOCK_N, VALUE_DIM,
                      g.shape[1], HIDES)  # fmt: skip
        s = outer(q, k, acc.dtype, PRECISION)
        dp = outer(g, v, acc.dtype, PRECISION)
        j = start + tl.arange(0, BLOCK_N)
        seen, bias = visible(i[:, None], j[None, :], queries, keys, mask, mask_row, mask_column,
                             acc.dtype, HIDES, MASK, CAUSAL)  # fmt: skip
        _, ds = gradient_tile(s, dp, peak[:, None], inverse[:, None], delta[:, None], seen, bias,
                              scale, factor, HIDES, SCALED, MASK)  # fmt: skip
        acc = product(ds, k, acc, PRECISION)
    return acc


@triton.jit
def store_careful_query_gradient(
    grad_query, d_row, q, g, peak, inverse, delta, first, end, queries, keys, scale, factor, slope,
    key, k_row, value, v_row, mask, mask_row, mask_column,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, from the keys before `end`."""
    BLOCK_M: tl.constexpr = q.shape[0]
    i = first + tl.arange(0, BLOCK_M)
    for column in range(0, HEAD_DIM, SLICE):
        acc = tl.full([BLOCK_M, SLICE], 0.0, scale.dtype)
        plus = tl.full([BLOCK_M, SLICE], 0.0, scale.dtype)
        minus = tl.full([BLOCK_M, SLICE], 0.0, scale.dtype)
        for start in tl.range(0, end, SLICE, num_stages=1):
            j = start + tl.arange(0, SLICE)
            k = load_rows(key, k_row, start, keys, 0, SLICE, HEAD_DIM, q.shape[1], True)
            v = load_rows(value, v_row, start, keys, 0, SLICE, VALUE_DIM, g.shape[1], True)
            some = load_rows(key, k_row, start, keys, column, SLICE, HEAD_DIM, SLICE, True)
            s = outer(q, k, scale.dtype, PRECISION)
            dp = outer(g, v, scale.dtype, PRECISION)
            seen, bias = visible(i[:, None], j[None, :], queries, keys, mask, mask_row,
                                 mask_column, scale.dtype, True, MASK, CAUSAL)  # fmt: skip
            _, ds = gradient_tile(s, dp, peak[:, None], inverse[:, None], delta[:, None], seen,
                                  bias, scale, factor, True, SCALED, MASK)  # fmt: skip
            acc, plus, minus = careful_product(ds, seen, some, acc, plus, minus, PRECISION)
        total = with_nan(acc, plus, minus) * slope
        store_rows(grad_query, total, d_row, first, queries, column, HEAD_DIM)


@triton.jit
def query_gradient_kernel(
    grad_output, query, key, value, mask, output, rounding, row_max, row_sum, grad_query,
    row_delta, row_inverse, key_tiles, value_tiles,
    scale: tl.float64, factor: tl.float64, slope: tl.float64, heads, group, section, queries, keys,
    g_batch, g_head, g_row, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, mask_batch, mask_head, mask_row, mask_column,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dq (BLOCK_M, D), delta and 1 / l (BLOCK_M,) of a block of queries."""
    dtype: tl.constexpr = row_max.dtype.element_ty
    scale = tl.full([], scale, dtype)
    factor = tl.full([], factor, dtype)
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
    if MASK != NO_MASK:
        mask += batch.to(tl.int64) * mask_batch + head.to(tl.int64) * mask_head

    i = first + tl.arange(0, BLOCK_M)
    exists = i < queries
    rows = all_head.to(tl.int64) * queries + i
    peak = tl.load(row_max + rows, mask=exists, other=0.0)
    total = tl.load(row_sum + rows, mask=exists, other=0.0)
    inverse = tl.where(total == 0, 0.0, 1.0 / total)
    o_row = heads * VALUE_DIM
    at = batch.to(tl.int64) * queries * o_row + head * VALUE_DIM
    g = load_rows(grad_output, g_row, first, queries, 0, BLOCK_M, VALUE_DIM, BLOCK_DV, True)
    o = load_rows(output + at, o_row, first, queries, 0, BLOCK_M, VALUE_DIM, BLOCK_DV, True)
    o = o.to(dtype)
    if output.dtype.element_ty != dtype:
        lost = load_rows(
            rounding + at, o_row, first, queries, 0, BLOCK_M, VALUE_DIM, BLOCK_DV, True
        )
        o += lost.to(dtype)
    delta = tl.sum(g.to(dtype) * o, 1)
    tl.store(row_delta + rows, delta, mask=exists)
    tl.store(row_inverse + rows, inverse, mask=exists)

    q = load_rows(query, q_row, first, queries, 0, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    acc = tl.full([BLOCK_M, BLOCK_D], 0.0, dtype)
    end = tl.minimum(keys, first + BLOCK_M) if CAUSAL else keys
    whole = 0
    if MASK == NO_MASK:
        whole = (tl.minimum(keys, first + 1) if CAUSAL else keys) // BLOCK_N * BLOCK_N
        acc = query_gradient_tiles(
            acc, q, g, peak, inverse, delta, 0, whole, i, batch, kv_head, queries, keys, scale,
            factor, key, k_row, key_tiles, value, v_row, value_tiles, mask, mask_row, mask_column,
            HEAD_DIM, VALUE_DIM, False, MASK, CAUSAL, SCALED, PRECISION, BLOCK_N,
        )  # fmt: skip
    acc = query_gradient_tiles(
        acc, q, g, peak, inverse, delta, whole, end, i, batch, kv_head, queries, keys, scale,
        factor, key, k_row, key_tiles, value, v_row, value_tiles, mask, mask_row, mask_column,
        HEAD_DIM, VALUE_DIM, True, MASK, CAUSAL, SCALED, PRECISION, BLOCK_N,
    )  # fmt: skip

    d_row = heads * HEAD_DIM
    grad_query += batch.to(tl.int64) * queries * d_row + head * HEAD_DIM
    if any_spread(acc, exists, MASK, CAUSAL):
        store_careful_query_gradient(
            grad_query, d_row, q, g, peak, inverse, delta, first, end, queries, keys, scale, factor,
            slope, key, k_row, value, v_row, mask, mask_row, mask_column,
            HEAD_DIM, VALUE_DIM, MASK, CAUSAL, SCALED, PRECISION,
        )  # fmt: skip
    else:
        store_rows(grad_query, acc * slope, d_row, first, queries, 0, HEAD_DIM)


@triton.jit
def key_gradient_tiles(
    grad_k, grad_v, k, v, begin, end, j, batch, kv_head, group, heads, queries, keys, scale, factor,
    row_max, row_inverse, row_delta, query, q_head, q_row, query_tiles,
    grad_output, g_head, g_row, grad_tiles, mask, mask_head, mask_row, mask_column,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HIDES: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The sums of ds^T q (N, D) and p^T g (N, Dv), with those of the tiles [begin, end) of queries
    of each head of the group, the last one first: under a causal mask the first queries give a key
    its largest weights, and what is added to a large sum is rounded at its size.
    """
    for step in range(group * (end - begin)):
        head = kv_head * group + step // (end - begin)
        start = (end - 1 - step % (end - begin)) * BLOCK_M
        q = load_tile(query + head.to(tl.int64) * q_head, q_row, query_tiles, batch, head, start,
                      queries, BLOCK_M, HEAD_DIM, k.shape[1], True)  # fmt: skip
        g = load_tile(grad_output + head.to(tl.int64) * g_head, g_row, grad_tiles, batch, head,
                      start, queries, BLOCK_M, VALUE_DIM, v.shape[1], True)  # fmt: skip
        i = start + tl.arange(0, BLOCK_M)
        # 1 / l is 0 for queries that do not exist, and so are their weights.
        exists = i < queries
        rows = (batch.to(tl.int64) * heads + head) * queries + i
        peak = tl.load(row_max + rows, mask=exists, other=0.0)
        inverse = tl.load(row_inverse + rows, mask=exists, other=0.0)
        delta = tl.load(row_delta + rows, mask=exists, other=0.0)
        s = outer(k, q, grad_k.dtype, PRECISION)
        dp = outer(v, g, grad_k.dtype, PRECISION)
        b = mask
        if MASK != NO_MASK:
            b = mask + head.to(tl.int64) * mask_head
        seen, bias = visible(i[None, :], j[:, None], queries, keys, b, mask_row, mask_column,
                             grad_k.dtype, HIDES, MASK, CAUSAL)  # fmt: skip
        p, ds = gradient_tile(s, dp, peak[None, :], inverse[None, :], delta[None, :], seen, bias,
                              scale, factor, HIDES, SCALED, MASK)  # fmt: skip
        grad_v = product(p, g, grad_v, PRECISION)
        grad_k = product(ds, q, grad_k, PRECISION)
    return grad_k, grad_v


@triton.jit
def store_careful_key_gradient(
    result, result_row, k, v, first, begin, batch, kv_head, group, heads, queries, keys, scale,
    factor, slope, row_max, row_inverse, row_delta, query, q_head, q_row,
    grad_output, g_head, g_row, mask, mask_head, mask_row, mask_column,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr, OF_VALUE: tl.constexpr,
):  # fmt: skip
    """dv if OF_VALUE, else dk, of a block of keys, from the queries from `begin` on."""
    COLUMNS: tl.constexpr = VALUE_DIM if OF_VALUE else HEAD_DIM
    dtype: tl.constexpr = scale.dtype
    j = first + tl.arange(0, k.shape[0])
    for column in range(0, COLUMNS, SLICE):
        acc = tl.full([k.shape[0], SLICE], 0.0, dtype)
        plus = tl.full([k.shape[0], SLICE], 0.0, dtype)
        minus = tl.full([k.shape[0], SLICE], 0.0, dtype)
        for member in range(group):
            head = kv_head * group + member
            x = query + head.to(tl.int64) * q_head
            y = grad_output + head.to(tl.int64) * g_head
            rows = (batch.to(tl.int64) * heads + head) * queries
            b = mask
            if MASK != NO_MASK:
                b = mask + head.to(tl.int64) * mask_head
            for start in tl.range(begin, queries, SLICE, num_stages=1):
                q = load_rows(x, q_row, start, queries, 0, SLICE, HEAD_DIM, k.shape[1], True)
                g = load_rows(y, g_row, start, queries, 0, SLICE, VALUE_DIM, v.shape[1], True)
                i = start + tl.arange(0, SLICE)
                peak = tl.load(row_max + rows + i, mask=i < queries, other=0.0)
                inverse = tl.load(row_inverse + rows + i, mask=i < queries, other=0.0)
                delta = tl.load(row_delta + rows + i, mask=i < queries, other=0.0)
                s = outer(k, q, dtype, PRECISION)
                dp = outer(v, g, dtype, PRECISION)
                seen, bias = visible(i[None, :], j[:, None], queries, keys, b, mask_row,
                                     mask_column, dtype, True, MASK, CAUSAL)  # fmt: skip
                p, ds = gradient_tile(s, dp, peak[None, :], inverse[None, :], delta[None, :], seen,
                                      bias, scale, factor, True, SCALED, MASK)  # fmt: skip
                if OF_VALUE:
                    some = load_rows(y, g_row, start, queries, column, SLICE, COLUMNS, SLICE, True)
                    acc, plus, minus = careful_product(p, seen, some, acc, plus, minus, PRECISION)
                else:
                    some = load_rows(x, q_row, start, queries, column, SLICE, COLUMNS, SLICE, True)
                    acc, plus, minus = careful_product(ds, seen, some, acc, plus, minus, PRECISION)
        if OF_VALUE:
            total = with_infinities(acc, plus, minus)
        else:
            total = with_nan(acc, plus, minus) * slope
        store_rows(result, total, result_row, first, keys, column, COLUMNS)


@triton.jit
def key_gradient_kernel(
    grad_output, query, key, value, mask, row_max, row_inverse, row_delta, grad_key, grad_value,
    query_tiles, grad_tiles,
    scale: tl.float64, factor: tl.float64, slope: tl.float64, heads, group, section, queries, keys,
    g_batch, g_head, g_row, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, mask_batch, mask_head, mask_row, mask_column,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dk (BLOCK_N, D) and dv (BLOCK_N, Dv) of a block of keys, over the heads of its group."""
    dtype: tl.constexpr = row_max.dtype.element_ty
    scale = tl.full([], scale, dtype)
    factor = tl.full([], factor, dtype)
    slope = tl.full([], slope, dtype)
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
    if MASK != NO_MASK:
        mask += batch.to(tl.int64) * mask_batch
    j = first + tl.arange(0, BLOCK_N)
    exists = j < keys
    k = load_rows(key, k_row, first, keys, 0, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = load_rows(value, v_row, first, keys, 0, BLOCK_N, VALUE_DIM, BLOCK_DV, True)
    grad_k = tl.full([BLOCK_N, BLOCK_D], 0.0, dtype)
    grad_v = tl.full([BLOCK_N, BLOCK_DV], 0.0, dtype)

    # Tiles of queries: from the first that sees any of these keys; and from the first in which
    # every query sees all of them.
    tiles = tl.cdiv(queries, BLOCK_M)
    begin = tl.minimum(first // BLOCK_M, tiles) if CAUSAL else 0
    whole = tl.minimum(tl.cdiv(first + BLOCK_N - 1, BLOCK_M), tiles) if CAUSAL else 0
    if MASK == NO_MASK:
        grad_k, grad_v = key_gradient_tiles(
            grad_k, grad_v, k, v, whole, tiles, j, batch, kv_head, group, heads, queries, keys,
            scale, factor, row_max, row_inverse, row_delta, query, q_head, q_row, query_tiles,
            grad_output, g_head, g_row, grad_tiles, mask, mask_head, mask_row, mask_column,
            HEAD_DIM, VALUE_DIM, False, MASK, CAUSAL, SCALED, PRECISION, BLOCK_M,
        )  # fmt: skip
    if CAUSAL or MASK != NO_MASK:
        grad_k, grad_v = key_gradient_tiles(
            grad_k, grad_v, k, v, begin, whole if MASK == NO_MASK else tiles, j, batch, kv_head,
            group, heads, queries, keys, scale, factor, row_max, row_inverse, row_delta,
            query, q_head, q_row, query_tiles, grad_output, g_head, g_row, grad_tiles,
            mask, mask_head, mask_row, mask_column,
            HEAD_DIM, VALUE_DIM, True, MASK, CAUSAL, SCALED, PRECISION, BLOCK_M,
        )  # fmt: skip

    k_out = kv_heads * HEAD_DIM
    v_out = kv_heads * VALUE_DIM
    grad_key += batch.to(tl.int64) * keys * k_out + kv_head * HEAD_DIM
    grad_value += batch.to(tl.int64) * keys * v_out + kv_head * VALUE_DIM
    # Both together, so that neither sum is kept in registers meanwhile.
    if any_spread(grad_k, exists, MASK, CAUSAL) | any_spread(grad_v, exists, MASK, CAUSAL):
        store_careful_key_gradient(
            grad_key, k_out, k, v, first, begin * BLOCK_M, batch, kv_head, group, heads,
            queries, keys, scale, factor, slope, row_max, row_inverse, row_delta,
            query, q_head, q_row, grad_output, g_head, g_row,
            mask, mask_head, mask_row, mask_column,
            HEAD_DIM, VALUE_DIM, MASK, CAUSAL, SCALED, PRECISION, False,
        )  # fmt: skip
        store_careful_key_gradient(
            grad_value, v_out, k, v, first, begin * BLOCK_M, batch, kv_head, group, heads,
            queries, keys, scale, factor, slope, row_max, row_inverse, row_delta,
            query, q_head, q_row, grad_output, g_head, g_row,
            mask, mask_head, mask_row, mask_column,
            HEAD_DIM, VALUE_DIM, MASK, CAUSAL, SCALED, PRECISION, True,
        )  # fmt: skip
    else:
        store_rows(grad_key, grad_k * slope, k_out, first, keys, 0, HEAD_DIM)
        store_rows(grad_value, grad_v, v_out, first, keys, 0, VALUE_DIM)


# ---- launching ----

# What the keys and values, or queries and upstream gradients, of the heads in flight may take: half
# of the second-level cache of the smallest of these chips.
_CACHE = 16 << 20


class _Call(NamedTuple):
    """A checked call, its tensors of unit innermost stride."""

    query: Tensor  # (B, Hq, L, D)
    key: Tensor  # (B, H, S, D)
    value: Tensor  # (B, H, S, Dv)
    attn_mask: Tensor | None  # (B or 1, Hq or 1, L or 1, S or 1)
    is_causal: bool
    scale: float


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


def _unit_columns(x: Tensor) -> Tensor:
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def _positions_first(x: Tensor) -> Tensor:
    """(B, H, N, columns), in memory (B, N, H, columns), as `new_outputs` makes it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> _Call:
    """Raises RuntimeError for what the kernels cannot read."""
    for x in (query, key, value):
        _check(x.dim() == 4, "tensors of four dimensions, (B, heads, N, columns)")
        _check(x.dtype == query.dtype, "query, key and value of one type")
        _check(x.device == query.device, "query, key and value on one device")
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
    if attn_mask is not None:
        _check(attn_mask.dim() == 4, "attn_mask (B, H, L, S)")
        _check(
            all(n in (1, m) for n, m in zip(attn_mask.shape, (B, Hq, L, S), strict=True)),
            "attn_mask broadcastable to (B, H, L, S)",
        )
        _check(
            attn_mask.dtype in (torch.bool, query.dtype, accumulator_dtype(query.dtype)),
            "attn_mask of bool, query's or the accumulator type",
        )
        _check(attn_mask.device == query.device, "attn_mask on query's device")
    query, key, value = map(_unit_columns, (query, key, value))
    return _Call(query, key, value, attn_mask, is_causal, scale)


def _precision() -> str:
    """That of torch's own products of float32 matrices."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _strides(prefix: str, x: Tensor) -> dict[str, int]:
    names = (f"{prefix}_batch", f"{prefix}_head", f"{prefix}_row", f"{prefix}_column")
    return dict(zip(names, x.stride()[: 4 if prefix == "mask" else 3], strict=False))


def _shared_arguments(call: _Call) -> dict[str, Any]:
    """The arguments that all kernels have."""
    B, Hq, L, D = call.query.shape
    H, S = call.key.shape[1:3]
    mask = call.attn_mask
    if mask is None:
        kind, strides = NO_MASK, dict.fromkeys(("mask_batch", "mask_head", "mask_row"), 0)
        strides["mask_column"] = 0
    else:
        kind = BOOL_MASK if mask.dtype == torch.bool else ADDITIVE_MASK
        strides = _strides("mask", mask.expand(B, Hq, L, S))
    scaled = kind is ADDITIVE_MASK or not call.scale > 0
    return {
        "query": call.query,
        "key": call.key,
        "value": call.value,
        "mask": mask,
        "scale": call.scale,
        "factor": math.log2(math.e) * (1.0 if scaled else call.scale),
        "heads": Hq,
        "group": Hq // H,
        "queries": L,
        "keys": S,
        **_strides("q", call.query),
        **_strides("k", call.key),
        **_strides("v", call.value),
        **strides,
        "HEAD_DIM": D,
        "VALUE_DIM": call.value.shape[3],
        "MASK": kind.value,
        "CAUSAL": call.is_causal,
        "SCALED": scaled,
        "PRECISION": _precision(),
        "BLOCK_D": tiles.padded(D),
        "BLOCK_DV": tiles.padded(call.value.shape[3]),
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
    dtype, mask = call.query.dtype, call.attn_mask
    width = tiles.padded(max(D, Dv))
    problem = tiles.Problem(kernel, dtype.itemsize, width, mask is not None)
    if not autotune.enabled():
        return launch(tiles.best(problem, chip)).run
    lengths = (triton.next_power_of_2(n) for n in (B * Hq, Hq // H, L, S))
    kind = "" if mask is None else str(mask.dtype)
    key = (str(dtype), tiles.padded(D), tiles.padded(Dv), *lengths, kind, call.is_causal)
    config = autotune.best(
        f"attention {kernel}",
        key,
        chip,
        tiles.candidates(problem, chip),
        lambda config: launch(config).run(),
    )
    return launch(config).run


def _forward_launch(
    call: _Call, results: tuple[Tensor, Tensor, Tensor, Tensor], config: Config, chip: Chip
) -> _Launch:
    output, rounding, row_max, row_sum = results
    B, Hq, L, _ = call.query.shape
    arguments = {
        **_shared_arguments(call),
        **_descriptors(chip, ("key_tiles", "value_tiles"), (call.key, call.value), config.block_n),
        "output": output,
        "rounding": rounding,
        "row_max": row_max,
        "row_sum": row_sum,
        "section": _key_section(call),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    return _Launch(forward_kernel, B * Hq * triton.cdiv(L, config.block_m), arguments, config)


def _gradient_arguments(call: _Call, grad_output: Tensor) -> dict[str, Any]:
    # The weight of a single key is 1, whatever the key: its score has no gradient.
    slope = call.scale if call.key.shape[2] > 1 else 0.0
    return {
        **_shared_arguments(call),
        "grad_output": grad_output,
        **_strides("g", grad_output),
        "slope": slope,
    }


def _query_gradient_launch(
    call: _Call,
    grad_output: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    grad_query: Tensor,
    statistics: Tensor,
    config: Config,
    chip: Chip,
) -> _Launch:
    output, rounding, row_max, row_sum = saved
    B, Hq, L, _ = call.query.shape
    arguments = {
        **_gradient_arguments(call, grad_output),
        **_descriptors(chip, ("key_tiles", "value_tiles"), (call.key, call.value), config.block_n),
        "output": output,
        "rounding": rounding,
        "row_max": row_max,
        "row_sum": row_sum,
        "grad_query": grad_query,
        "row_delta": statistics[0],
        "row_inverse": statistics[1],
        "section": _key_section(call),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    programs = B * Hq * triton.cdiv(L, config.block_m)
    return _Launch(query_gradient_kernel, programs, arguments, config)


def _key_gradient_launch(
    call: _Call,
    grad_output: Tensor,
    row_max: Tensor,
    gradients: tuple[Tensor, Tensor],
    statistics: Tensor,
    config: Config,
    chip: Chip,
) -> _Launch:
    B, H, S, _ = call.key.shape
    arguments = {
        **_gradient_arguments(call, grad_output),
        **_descriptors(
            chip, ("query_tiles", "grad_tiles"), (call.query, grad_output), config.block_m
        ),
        "row_max": row_max,
        "row_delta": statistics[0],
        "row_inverse": statistics[1],
        "grad_key": gradients[0],
        "grad_value": gradients[1],
        "section": _section(
            B * H, _bytes_of_head(call.query, grad_output) * call.query.shape[1] // H
        ),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    programs = B * H * triton.cdiv(S, config.block_n)
    return _Launch(key_gradient_kernel, programs, arguments, config)


def _bytes_of_head(*tensors: Tensor) -> int:
    return sum(x.shape[2] * x.shape[3] * x.element_size() for x in tensors)


def _key_section(call: _Call) -> int:
    """In query heads."""
    B, H = call.key.shape[:2]
    group = call.query.shape[1] // H
    return group * _section(B * H, _bytes_of_head(call.key, call.value))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The raw operator's kernel; see `ops.attention.Attention`."""
    call = _checked(query, key, value, attn_mask, is_causal, scale)
    chip = chip_of(query.device)
    results = new_outputs(*call[:3])
    with torch.cuda.device_of(query):  # launches go to the current GPU
        _tiled("forward", call, chip, lambda c: _forward_launch(call, results, c, chip))()
    return results


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    output: Tensor,
    rounding: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw operator's kernel; see `ops.attention.AttentionBackward`."""
    call = _checked(query, key, value, attn_mask, is_causal, scale)
    dtype = accumulator_dtype(query.dtype)
    heads = (*query.shape[:3], value.shape[3])
    for x, columns in (
        (grad_output, heads[3]),
        (output, heads[3]),
        (rounding, heads[3] if dtype != query.dtype else 0),
    ):
        _check(
            x.shape == (*heads[:3], columns) and x.dtype == query.dtype,
            "grad_output, output and, of 16-bit types, rounding (B, Hq, L, Dv) of query's type",
        )
    for x in (row_max, row_sum):
        _check(
            x.shape == heads[:3] and x.dtype == dtype,
            "row_max and row_sum (B, Hq, L) in the accumulator type",
        )
    grad_output = _unit_columns(grad_output)
    saved = (
        _positions_first(output),
        _positions_first(rounding),
        row_max.contiguous(),
        row_sum.contiguous(),
    )
    chip = chip_of(query.device)
    grad_query, grad_key, grad_value = new_gradients(grad_output, *call[:3])
    statistics = row_max.new_empty((2, *heads[:3]))  # delta and 1 / l

    def query_launch(config: Config) -> _Launch:
        return _query_gradient_launch(
            call, grad_output, saved, grad_query, statistics, config, chip
        )

    def key_launch(config: Config) -> _Launch:
        gradients = (grad_key, grad_value)
        return _key_gradient_launch(
            call, grad_output, saved[2], gradients, statistics, config, chip
        )

    with torch.cuda.device_of(query):  # launches go to the current GPU
        _tiled("query gradient", call, chip, query_launch)()
        _tiled("key gradient", call, chip, key_launch)()
    return grad_query, grad_key, grad_value


# ---- ahead of time ----

_TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*i1",
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
}
VARIANTS = {
    "full": (None, False),
    "causal": (None, True),
    "causal, bool mask": ("bool", True),
    "additive mask": ("additive", False),
}


def compilation(
    kernel: str, dtype: torch.dtype, head_dim: int, variant: str, config: Config, chip: Chip
) -> Compilation:
    """One of `tiles.KERNELS` in one of VARIANTS."""
    B, H, N = 2, 16, 4096
    masked, is_causal = VARIANTS[variant]

    def new(columns: int) -> Tensor:
        return torch.empty(B, N, H, columns, dtype=dtype, device="meta").transpose(1, 2)

    mask = None
    if masked is not None:
        of_mask = torch.bool if masked == "bool" else accumulator_dtype(dtype)
        mask = torch.empty(B, 1, N, N, dtype=of_mask, device="meta")
    call = _checked(new(head_dim), new(head_dim), new(head_dim), mask, is_causal, head_dim**-0.5)
    saved = new_outputs(*call[:3])
    statistics = saved[2].new_empty(2, B, H, N)
    grad_output = new(head_dim)
    gradients = new_gradients(grad_output, *call[:3])
    if kernel == "forward":
        launch = _forward_launch(call, saved, config, chip)
    elif kernel == "query gradient":
        launch = _query_gradient_launch(
            call, grad_output, saved, gradients[0], statistics, config, chip
        )
    else:
        launch = _key_gradient_launch(
            call, grad_output, saved[2], gradients[1:], statistics, config, chip
        )
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
        variants = ["additive mask"] if problem.masked else ["causal"]
        if problem.itemsize == 2 and problem.width == 128:
            variants.append("causal, bool mask" if problem.masked else "full")
        for variant in variants:
            yield compilation(
                problem.kernel, of_size[problem.itemsize], problem.width, variant, config, chip
            )
