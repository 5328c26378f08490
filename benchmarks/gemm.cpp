// The rate of multiply-adds on registers alone, for the instruction set of the compiler's flags.
// gemm.py compiles this file once for each.
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

#include "vec.h"

// Enough sums that no multiply-add waits for the one before it (4 cycles, two of them in each), and
// few enough for AVX2's 16 registers.
constexpr int kChains = 12;

template <class A>
double multiply_add(int64_t steps) {
  volatile A start = A(0.5);  // so that the compiler can't compute the result itself
  const Vec<A> x = Vec<A>::all(start), y = Vec<A>::all(start);
  Vec<A> sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = Vec<A>::all(start + i);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = fma(sum[i], x, y);
  }
  for (int i = 1; i < kChains; ++i) sum[0] = sum[0] + sum[i];
  volatile A sink = sum[0].reduce_add();
  (void)sink;
  return 2.0 * kChains * Vec<A>::width * double(steps);
}

#if defined(FASTGPT_AVX512_BF16)
double multiply_add_bf16(int64_t steps) {
  volatile int32_t start = 0x3f003f00;  // a half, twice
  const __m512bh x = (__m512bh)_mm512_set1_epi32(start);
  __m512 sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = _mm512_set1_ps(float(i));
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], x, x);
  }
  for (int i = 1; i < kChains; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
  volatile float sink = _mm512_reduce_add_ps(sum[0]);
  (void)sink;
  return 2.0 * kChains * 32 * double(steps);
}
#endif

}  // namespace

// Both return the number of floating-point operations that were done.
extern "C" {
double multiply_add_float32(int64_t steps) { return multiply_add<float>(steps); }
double multiply_add_float64(int64_t steps) { return multiply_add<double>(steps); }
#if defined(FASTGPT_AVX512_BF16)
double multiply_add_bfloat16(int64_t steps) { return multiply_add_bf16(steps); }
#endif
}
