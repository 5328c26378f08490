// Register-tiled products of small matrices: C (m, n) += A (m, k) B (k, n), for any instruction
// set.
//
// A is read one number at a time and broadcast, so any strides will do, a transposed A included. B
// is read a register at a time: its rows lie `b_step` apart and are padded to whole registers. C
// stays in registers over the whole sum: with R rows and N registers of columns, R N products cost
// R + N loads. AVX-512 has registers for 6 x 4, one row of B and a number of A; AVX2 for 6 x 2. For
// the portable 4 x 2 see benchmarks/NOTES.md.
//
// A and B hold operands E (vec.h): float, double, or bf16_pair, two neighbours along k. Then k and
// the strides of A and B count pairs, and C is float. B may be of another type that is widened to
// E.

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Tile {
#if defined(FASTGPT_AVX512)
  static constexpr int rows = 6, registers = 4;
#elif defined(FASTGPT_AVX2)
  static constexpr int rows = 6, registers = 2;
#else
  static constexpr int rows = 4, registers = 2;
#endif
};

// What becomes of C's old contents.
enum class Into { kFresh, kSum, kScaledSum };

template <class E, class B = E>
struct Product {
  using A = decltype(term(E(), 0));
  int64_t k;
  const E* a;
  int64_t a_row, a_step;  // between rows of A, and along k
  const B* b;
  int64_t b_step;  // between rows of B
  A* c;
  int64_t c_row;
  Into into;
  const A* factor;  // (m,) of C's old rows; for kScaledSum
};

// How a register of B is read.
template <class E, class B>
struct Widened {
  static Vec<E> load(const B* p) { return Vec<E>::load(p); }
};
template <class E>
struct Widened<E, E> : Operand<E> {};

template <class E, int kRows, int kRegisters, class B>
static void tile_product(const Product<E, B>& x) {
  using A = typename Product<E>::A;
  using V = Vec<A>;
  constexpr int width = V::width;
  V c[kRows][kRegisters];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kRegisters; ++i) c[r][i] = V::all(0);
  }
  const E* a = x.a;
  const B* b = x.b;
  const int64_t a_row = x.a_row, a_step = x.a_step, b_step = x.b_step;
  for (int64_t k = x.k; k > 0; --k) {
    typename Operand<E>::Register row[kRegisters];
#pragma GCC unroll 4
    for (int i = 0; i < kRegisters; ++i) row[i] = Widened<E, B>::load(b + i * width);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto number = Operand<E>::all(a[r * a_row]);
#pragma GCC unroll 4
      for (int i = 0; i < kRegisters; ++i) c[r][i] = fma(number, row[i], c[r][i]);
    }
    a += a_step;
    b += b_step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    // Last, so that C's size does not round every term.
    const V factor = V::all(x.into == Into::kScaledSum ? x.factor[r] : A(1));
#pragma GCC unroll 4
    for (int i = 0; i < kRegisters; ++i) {
      A* p = x.c + r * x.c_row + i * width;
      (x.into == Into::kFresh ? c[r][i] : fma(V::load(p), factor, c[r][i])).store(p);
    }
  }
}

template <class E, int kRows, class B>
static inline void product_of_rows(const Product<E, B>& x, int registers) {
  switch (registers) {
    case 1:
      return tile_product<E, kRows, 1>(x);
    case 2:
      return tile_product<E, kRows, 2>(x);
#if defined(FASTGPT_AVX512)
    case 3:
      return tile_product<E, kRows, 3>(x);
    case 4:
      return tile_product<E, kRows, 4>(x);
#endif
  }
}

// One tile of C: `rows` <= Tile::rows by `registers` <= Tile::registers.
template <class E, class B>
static inline void product(const Product<E, B>& x, int rows, int registers) {
  switch (rows) {
    case 1:
      return product_of_rows<E, 1>(x, registers);
    case 2:
      return product_of_rows<E, 2>(x, registers);
    case 3:
      return product_of_rows<E, 3>(x, registers);
    case 4:
      return product_of_rows<E, 4>(x, registers);
#if defined(FASTGPT_AVX512) || defined(FASTGPT_AVX2)
    case 5:
      return product_of_rows<E, 5>(x, registers);
    case 6:
      return product_of_rows<E, 6>(x, registers);
#endif
  }
}

template <class B>
static inline auto term_of_b(B x, int) {
  return widen(x);
}
#if defined(FASTGPT_AVX512_BF16)
static inline float term_of_b(bf16_pair x, int i) { return term(x, i); }
#endif

// Leaves out the terms in which A is zero: where B may hold infinities or NaN, 0 * B is not
// nothing.
template <class E, class B>
static void careful_product(const Product<E, B>& x, int rows, int64_t registers) {
  using A = typename Product<E>::A;
  const int64_t columns = registers * Vec<A>::width;
  for (int r = 0; r < rows; ++r) {
    A* c = x.c + r * x.c_row;
    for (int64_t j = 0; j < columns; ++j) {
      if (x.into == Into::kFresh) c[j] = 0;
      if (x.into == Into::kScaledSum) c[j] *= x.factor[r];
    }
    for (int64_t k = 0; k < x.k; ++k) {
      for (int i = 0; i < Operand<E>::terms; ++i) {
        const A number = term(x.a[r * x.a_row + k * x.a_step], i);
        if (number == 0) continue;
        for (int64_t j = 0; j < columns; ++j) c[j] += number * term_of_b(x.b[k * x.b_step + j], i);
      }
    }
  }
}

// Up to Tile::rows rows of C and any number of registers, in strips as even as they can be: five
// registers go as 3 + 2, not 4 + 1. `finite` promises that B is.
template <class E, class B>
static inline void wide_product(Product<E, B> x, int rows, int64_t registers, bool finite) {
  if (!finite) return careful_product(x, rows, registers);
  constexpr int width = Vec<typename Product<E>::A>::width;
  for (int64_t strips = ceil_div(registers, Tile::registers); strips > 0; --strips) {
    const int some = int(ceil_div(registers, strips));
    product(x, rows, some);
    x.b += some * width;
    x.c += some * width;
    registers -= some;
  }
}
