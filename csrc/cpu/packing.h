// Matrices as operands of the products of gemm.h, and memory for them.

static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// n numbers as operands along the sum, the last pair filled up with zero.
template <class T>
static inline void copy_row(const T* x, int64_t n, acc_t<T>* out) {
  using V = Vec<acc_t<T>>;
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) V::load(x + i).store(out + i);
  for (; i < n; ++i) out[i] = widen(x[i]);
}

// The library's copy: what a compiler makes of the loop above is slow for a short row.
static inline void copy_row(const float* x, int64_t n, float* out) {
  memcpy(out, x, size_t(n) * sizeof(float));
}
static inline void copy_row(const double* x, int64_t n, double* out) {
  memcpy(out, x, size_t(n) * sizeof(double));
}
static inline void copy_row(const bf16* x, int64_t n, bf16_pair* out) {
  memcpy(static_cast<void*>(out), x, size_t(n) * sizeof(bf16));
  if (n % 2 != 0) out[n / 2].part[1] = bf16{0};
}

// A register of operands along the sum, zeros behind the n numbers that there are.
template <class T>
static inline Vec<acc_t<T>> load_operands(const T* x, int64_t n, acc_t<T>) {
  using V = Vec<acc_t<T>>;
  return n >= V::width ? V::load(x) : load_partial<acc_t<T>>(x, int(n), acc_t<T>(0));
}

// One row of B for `copy_row`'s A, or two: `padded` columns, zeros behind the n that there are.
template <class T>
static inline void copy_row_of_b(const T* x, const T*, int64_t n, int64_t padded, acc_t<T>* out) {
  copy_row(x, n, out);
  for (int64_t i = n; i < padded; ++i) out[i] = 0;
}

#if defined(FASTGPT_AVX512_BF16)
// Pairs in the lanes of floats, which are only moved.
static inline Vec<float> load_operands(const bf16* x, int64_t n, bf16_pair) {
  bf16 pairs[2 * Vec<float>::width] = {};
  if (n < 2 * Vec<float>::width) x = static_cast<bf16*>(memcpy(pairs, x, size_t(n) * sizeof(bf16)));
  return {_mm512_loadu_ps(x)};
}

static inline void copy_row_of_b(const bf16* first, const bf16* second, int64_t n, int64_t padded,
                                 bf16_pair* out) {
  using V = Vec<float>;
  const auto part = [&](const bf16* x, int64_t i) {
    if (x == nullptr) return V::all(0);
    return i + V::width <= n ? V::load(x + i) : load_partial<float>(x + i, int(n - i), 0.0f);
  };
  for (int64_t i = 0; i < padded; i += V::width)
    store_pairs(part(first, i), part(second, i), out + i);
}
#endif

template <class A, class T>
static inline A dot(const T* x, const T* y, int64_t n) {
  using V = Vec<A>;
  V sum = V::all(0);
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) sum = fma(V::load(x + i), V::load(y + i), sum);
  A rest = sum.reduce_add();
  for (; i < n; ++i) rest += widen(x[i]) * widen(y[i]);
  return rest;
}

// Whether n numbers are finite, and so small that their products with others as small are, too (by
// Cauchy and Schwarz, if their squares have a finite sum).
template <class T>
static inline bool all_finite(const T* x, int64_t n) {
  return dot<acc_t<T>>(x, x, n) < acc_t<T>(INFINITY);
}

template <class T>
static inline bool all_finite(const T* x, int64_t row_stride, int64_t rows, int64_t n) {
  bool finite = true;
  for (int64_t r = 0; r < rows; ++r) finite &= all_finite(x + r * row_stride, n);
  return finite;
}

// Cuts a block of memory into arrays, each on a cache line of its own; with a null base it only
// counts.
struct Carver {
  uintptr_t base;
  int64_t used = 0;

  explicit Carver(void* p) : base(reinterpret_cast<uintptr_t>(p)) {}

  template <class X>
  X* take(int64_t count) {
    X* p = reinterpret_cast<X*>(base + uintptr_t(used));
    used += round_up(count * int64_t(sizeof(X)), 64);
    return p;
  }
};
