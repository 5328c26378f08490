"""Functions of a number that the kernels of several ops share."""

import triton
import triton.language as tl


@triton.jit
def exp(x, FULL: tl.constexpr):
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
    r = (x - n * 0.693359375) + n * 2.1219444005468059e-4  # the first product is exact
    return tl.exp2(r * 1.4426950408889634) * tl.exp2(n)


@triton.jit
def cap_of(softcap, dtype: tl.constexpr):
    """k, and -2 / k in two parts, since rounding it would bend all logits the same way."""
    exact = tl.full((), softcap, tl.float64)
    k = exact.to(dtype)
    high = -2 / k
    return k, high, (1 + exact * high.to(tl.float64) * 0.5).to(dtype) * high


@triton.jit
def capped(x, cap, FULL: tl.constexpr):
    """y = k tanh(x / k) and its derivative, from e = exp(-2 |x| / k), neither by cancellation."""
    k, high, low = cap
    b = tl.abs(x) * high
    b = tl.where(b > -100, b + tl.abs(x) * low, b)  # not inf - inf
    e = exp(b, FULL)
    r = 1 / (1 + e)
    # y / x for small x / k = -b / 2
    if x.dtype == tl.float64:
        # (1 - e) r / (-b / 2), the b being that of the e that was rounded (Kahan).
        ratio = tl.where(e == 1, 1, 2 * (e - 1) / tl.where(e == 1, 1, tl.log(e)) * r)
    else:
        z = b * b  # minimax in relative error, which is 3e-9
        q = (3.8892522e-07 * z - 7.2511857e-06) * z + 8.3257844e-05
        q = (q * z - 0.00084149773) * z + 0.0083326687
        ratio = 1 + z * (q * z - 0.083333247)
    er = e * r
    far = k - 2 * k * er
    return tl.where(b > -1.6, x * ratio, tl.where(x < 0, -far, far)), 4 * er * r
