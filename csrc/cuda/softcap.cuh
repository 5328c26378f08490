// The softcap of logits and of attention's scores, and its slope.
#pragma once

#include <cmath>

#include "primitives.cuh"

namespace fastgpt::cuda {

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

// e^x for x <= 0, as exact as logits of type T make it worth.
template <class T>
FASTGPT_DEVICE acc_t<T> exp_of(acc_t<T> x) {
  if constexpr (sizeof(T) == 2) {
    return exp2_approximate(x * 1.4426950408889634f);
  } else {
    return std::exp(x);
  }
}

// y = k tanh(x / k) and its slope, from e = exp(-2 |x| / k), neither by cancellation.
template <class T>
struct Cap {
  using A = acc_t<T>;
  // -2 / k in two parts, since rounding it would bend all logits the same way.
  A k, high, low;

  FASTGPT_DEVICE explicit Cap(double exact)
      : k(A(exact)), high(-2 / k), low(A(1 + exact * double(high) * 0.5) * high) {}

  FASTGPT_DEVICE A operator()(A x, A* slope) const {
    const A size = std::fabs(x);
    A b = size * high;
    if (b > -100) b += size * low;  // not inf - inf
    const A e = exp_of<T>(b), r = 1 / (1 + e);
    *slope = 4 * e * r * r;
    if (b > A(-1.6)) return x * ratio(b, e, r);
    const A far = k - 2 * k * (e * r);
    return x < 0 ? -far : far;
  }

 private:
  // y / x for small x / k = -b / 2.
  FASTGPT_DEVICE static A ratio(A b, A e, A r) {
    if constexpr (sizeof(A) == 8) {
      // (1 - e) r / (-b / 2), the b being that of the e that was rounded (Kahan).
      return e == 1 ? A(1) : 2 * (e - 1) / std::log(e) * r;
    } else {
      const A z = b * b;  // minimax in relative error, which is 3e-9
      A q = (3.8892522e-07f * z - 7.2511857e-06f) * z + 8.3257844e-05f;
      q = (q * z - 0.00084149773f) * z + 0.0083326687f;
      return 1 + z * (q * z - 0.083333247f);
    }
  }
};

}  // namespace fastgpt::cuda
