// Two loops for the instruction set of the compiler's flags: multiply-adds on registers alone, and
// the register-tiled products of csrc/cpu/gemm.h on matrices that fit the second-level cache.
// gemm.py compiles this file once for each set. Every function returns the number of floating-point
// operations that it did.
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

// clang-format off
#include "vec.h"
#include "gemm.h"
// clang-format on

template <class E>
E number(float x) {
  return E(x);
}

// sum + a product, with operands that no compiler can move out of the loop.
template <class A>
Vec<A> multiply_add_once(Vec<A> x, Vec<A> sum) {
  return fma(sum, x, x);
}

#if defined(FASTGPT_AVX512_BF16)
template <>
bf16_pair number<bf16_pair>(float x) {
  return {{narrow<bf16>(x), narrow<bf16>(x)}};
}

inline Vec<float> multiply_add_once(Operand<bf16_pair>::Register x, Vec<float> sum) {
  return fma(x, x, sum);
}
#endif

// Enough sums that no multiply-add waits for the one before it (4 cycles, two of them in each), and
// few enough for AVX2's 16 registers.
constexpr int kChains = 12;

template <class E>
double multiply_add(int64_t steps) {
  using A = decltype(term(E(), 0));
  volatile float start = 0.5f;  // so that the compiler can't compute the result itself
  const auto x = Operand<E>::all(number<E>(start));
  Vec<A> sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = Vec<A>::all(start + i);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = multiply_add_once(x, sum[i]);
  }
#pragma GCC unroll 12
  for (int i = 1; i < kChains; ++i) sum[0] = sum[0] + sum[i];
  volatile A sink = sum[0].reduce_add();
  (void)sink;
  return 2.0 * kChains * Vec<A>::width * Operand<E>::terms * double(steps);
}

// 272 KiB in float: A (m, k), B (k, n) and C (m, n) at their largest.
constexpr int64_t kM = 96, kN = 256, kK = 128;

// C = A B, `repeats` times. B lies in panels (k, one tile's columns), each of which stays in the
// first-level cache while the rows of A go by, as in attention's scores.
template <class E>
double product_of(int64_t m, int64_t n, int64_t k, int64_t repeats) {
  using A = decltype(term(E(), 0));
  constexpr int64_t panel = Tile::registers * Vec<A>::width;
  alignas(64) static thread_local E a[kM * kK], b[kK * kN];
  alignas(64) static thread_local A c[kM * kN];
  for (E& x : a) x = number<E>(0.5f);
  for (E& x : b) x = number<E>(0.5f);
  const int64_t steps = k / Operand<E>::terms;
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    for (int64_t column = 0; column < n; column += panel) {
      for (int64_t row = 0; row < m; row += Tile::rows) {
        const int rows = int(m - row < Tile::rows ? m - row : Tile::rows);
        const Product<E> x{
            steps, a + row * steps, steps,  1, b + column * steps, panel, c + row * n + column,
            n,     Into::kFresh,    nullptr};
        product(x, rows, Tile::registers);
      }
    }
    asm volatile("" : : "r"(c) : "memory");  // every repeat counts
  }
  return 2.0 * double(m * n * k) * double(repeats);
}

}  // namespace

#define FASTGPT_LOOPS(E, name)                                                            \
  extern "C" double multiply_add_##name(int64_t steps) { return multiply_add<E>(steps); } \
  extern "C" double product_##name(int64_t m, int64_t n, int64_t k, int64_t repeats) {    \
    return product_of<E>(m, n, k, repeats);                                               \
  }

FASTGPT_LOOPS(float, float32)
FASTGPT_LOOPS(double, float64)
#if defined(FASTGPT_AVX512_BF16)
FASTGPT_LOOPS(bf16_pair, bfloat16)
#endif
