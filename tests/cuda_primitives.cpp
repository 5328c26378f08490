// Runs the kernels of cuda_primitives.cuh and cuda_primitives_hopper.cuh, and prints a line for
// each case: its name and "passed", or what went wrong. Compiled by a C++ compiler they run in the
// host twin, with more cases, of kernels that are wrong, whose launch must fail with the right
// words. Compiled by nvcc (-x cu) they run on a GPU, those of Hopper on one of 9.0.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <regex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda_primitives.cuh"

using namespace fastgpt::cuda;

namespace {

// ---- cases ----

struct Case {
  const char* name;
  void (*run)();
};

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Registration {
  Registration(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

#define CASE(name)                              \
  void name();                                  \
  const Registration name##_case(#name, &name); \
  void name()

void check(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

template <class A, class B>
void check_equal(const A& found, const B& wanted, const std::string& where) {
  check(found == wanted, where + ": " + std::to_string(found) + ", not " + std::to_string(wanted));
}

// Elements that both a kernel and this program may use, on whole vectors.
template <class T>
struct Buffer {
  using Chunk = Vector<unsigned char>;
  T* data;
  int size;

  explicit Buffer(int n) : size(n) {
#ifdef __CUDACC__
    check(cudaMallocManaged(&data, size_t(n) * sizeof(T)) == cudaSuccess, "no memory");
#else
    data = reinterpret_cast<T*>(new Chunk[size_t(n) * sizeof(T) / sizeof(Chunk) + 1]);
#endif
    memset(static_cast<void*>(data), 0, size_t(n) * sizeof(T));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
#ifdef __CUDACC__
    cudaFree(data);
#else
    delete[] reinterpret_cast<Chunk*>(data);
#endif
  }
  T& operator[](int i) { return data[i]; }
};

// Launch, and wait.
template <class... Parameters>
void run(void (*kernel)(Parameters...), const Grid& grid,
         typename Given<Parameters>::type... parameters) {
  launch(kernel, grid, Stream(), parameters...);
#ifdef __CUDACC__
  const cudaError_t error = cudaDeviceSynchronize();
  check(error == cudaSuccess, cudaGetErrorString(error));
#endif
}

// ---- places ----

CASE(places) {
  for (const int cluster : {1, 2, 8}) {
    Buffer<Place> out(16 * 96);
    run(tell_places, {16, 96, cluster}, out.data);
    for (int i = 0; i < 16 * 96; ++i) {
      const int block = i / 96, thread = i % 96;
      check_equal(out[i].block, block, "block");
      check_equal(out[i].blocks, 16, "blocks");
      check_equal(out[i].thread, thread, "thread");
      check_equal(out[i].threads, 96, "threads");
      check_equal(out[i].lane, thread % 32, "lane");
      check_equal(out[i].warp, thread / 32, "warp");
      check_equal(out[i].rank, block % cluster, "rank");
      check_equal(out[i].cluster, cluster, "blocks of the cluster");
    }
  }
}

CASE(grid_without_blocks_is_not_launched) { run(tell_places, {0, 96, 1}, nullptr); }

// ---- numbers ----

// What the bits of a number of `exponent_bits` mean, by the formats' definition.
double meaning(uint16_t bits, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits);
}

template <class T>
constexpr int kExponentBits = 8;
template <>
constexpr int kExponentBits<float16> = 5;

bool same(double x, double y) {
  return (std::isnan(x) && std::isnan(y)) || (x == y && std::signbit(x) == std::signbit(y));
}

template <class T>
void check_widen() {
  Buffer<T> in(1 << 16);
  Buffer<float> out(1 << 16);
  for (int i = 0; i < 1 << 16; ++i) in[i] = T{uint16_t(i)};
  run(widen_all<T>, {1, 256, 1}, in.data, out.data, 1 << 16);
  for (int i = 0; i < 1 << 16; ++i)
    check(same(out[i], meaning(uint16_t(i), kExponentBits<T>)), "bits " + std::to_string(i));
}

CASE(bfloat16_widens_every_pattern) { check_widen<bfloat16>(); }
CASE(float16_widens_every_pattern) { check_widen<float16>(); }

template <class A>
A next_to(A x, A towards) {
  return std::nextafter(x, towards);
}

// Every number, every point halfway to the next one of the same sign, and that point's neighbours.
template <class T, class A>
void check_narrow() {
  constexpr int exponent_bits = kExponentBits<T>;
  constexpr int largest = ((1 << exponent_bits) - 1) << (15 - exponent_bits);  // infinity
  const A infinity = std::numeric_limits<A>::infinity();
  std::vector<A> in;
  std::vector<uint16_t> wanted;
  const auto add = [&](A x, int bits) {
    in.insert(in.end(), {x, -x});
    wanted.insert(wanted.end(), {uint16_t(bits), uint16_t(bits | 0x8000)});
  };
  for (int i = 0; i < largest; ++i) {
    const double x = meaning(uint16_t(i), exponent_bits);
    // After the largest number, the one that the format would have with a larger exponent.
    const double step = i + 1 < largest ? meaning(uint16_t(i + 1), exponent_bits) - x
                                        : x - meaning(uint16_t(i - 1), exponent_bits);
    const A half = A(x + step / 2);
    add(A(x), i);
    add(half, i + i % 2);
    // Subnormal floats have nothing between.
    if (double(half) != x && double(next_to(half, A(0))) > x) add(next_to(half, A(0)), i);
    add(next_to(half, infinity), i + 1);
  }
  add(infinity, largest);
  add(std::numeric_limits<A>::max(), largest);
  add(std::numeric_limits<A>::denorm_min(), 0);
  while (in.size() % 8) add(A(1), ((1 << (exponent_bits - 1)) - 1) << (15 - exponent_bits));
  const int n = int(in.size());
  Buffer<A> x(n);
  Buffer<T> one_by_one(n), vectors(n);
  for (int i = 0; i < n; ++i) x[i] = in[size_t(i)];
  run(narrow_all<T, A>, {1, 256, 1}, x.data, one_by_one.data, n);
  run(narrow_vectors<T, A>, {1, 256, 1}, x.data, vectors.data, n);
  for (int i = 0; i < n; ++i) {
    char text[64];
    snprintf(text, sizeof(text), "%a", double(x[i]));
    check_equal(one_by_one[i].bits, wanted[size_t(i)], text);
    check_equal(vectors[i].bits, wanted[size_t(i)], std::string(text) + " in a vector");
  }

  // NaN, with what is not dropped of its bits zero too.
  for (const uint64_t bits : {0x7ff8000000000000u, 0xfff8000000000000u, 0x7ff0000020000000u}) {
    double wide;
    memcpy(&wide, &bits, sizeof(wide));
    Buffer<A> nan(8);
    Buffer<T> out(8);
    for (int i = 0; i < 8; ++i) nan[i] = A(wide);
    run(narrow_all<T, A>, {1, 32, 1}, nan.data, out.data, 8);
    check(std::isnan(meaning(out[7].bits, exponent_bits)), "NaN");
    run(narrow_vectors<T, A>, {1, 32, 1}, nan.data, out.data, 8);
    check(std::isnan(meaning(out[7].bits, exponent_bits)), "NaN in a vector");
  }
}

CASE(float_narrows_to_bfloat16) { check_narrow<bfloat16, float>(); }
CASE(float_narrows_to_float16) { check_narrow<float16, float>(); }
CASE(double_narrows_to_bfloat16_rounding_once) { check_narrow<bfloat16, double>(); }
CASE(double_narrows_to_float16_rounding_once) { check_narrow<float16, double>(); }

CASE(float_and_double_narrow_to_each_other) {
  Buffer<double> doubles(4), widened(4);
  Buffer<float> floats(4), vectors(4);
  const double in[] = {0.1, 1 + 0x1p-24, 1 + 0x3p-24, -1e300};
  for (int i = 0; i < 4; ++i) doubles[i] = in[i];
  run(narrow_all<float, double>, {1, 32, 1}, doubles.data, floats.data, 4);
  run(narrow_vectors<float, double>, {1, 32, 1}, doubles.data, vectors.data, 4);
  const float wanted[] = {0.1f, 1.0f, 1 + 0x1p-22f, -INFINITY};
  for (int i = 0; i < 4; ++i) {
    check_equal(floats[i], wanted[i], "float");
    check_equal(vectors[i], wanted[i], "float in a vector");
  }
  run(narrow_all<double, float>, {1, 32, 1}, floats.data, widened.data, 4);
  for (int i = 0; i < 4; ++i) check_equal(widened[i], double(wanted[i]), "double");
}

CASE(exp2_is_right_to_some_bits_and_flushes_small_results) {
  std::vector<float> in;
  for (float x = -126; x <= 127; x += 0.37f) in.push_back(x);
  const int usual = int(in.size());
  const float special[] = {-INFINITY, -1000, -127, -126.5f, -126, 0, 1e-42f, 10, 128, INFINITY};
  const float wanted[] = {0, 0, 0, 0, 0x1p-126f, 1, 1, 1024, INFINITY, INFINITY};
  in.insert(in.end(), std::begin(special), std::end(special));
  in.push_back(NAN);
  const int n = int(in.size());
  Buffer<float> x(n), y(n);
  for (int i = 0; i < n; ++i) x[i] = in[size_t(i)];
  run(exp2_all, {1, 256, 1}, x.data, y.data, n);
  for (int i = 0; i < usual; ++i)
    check(std::fabs(y[i] / std::exp2(double(x[i])) - 1) < 0x1p-21, std::to_string(x[i]));
  for (int i = 0; i < 10; ++i) check_equal(y[usual + i], wanted[i], std::to_string(special[i]));
  check(std::isnan(y[n - 1]), "NaN");
}

// ---- global memory ----

template <class T>
void check_copy() {
  constexpr int n = 5003;
  Buffer<T> in(n), out(n + 1);
  for (int i = 0; i < n; ++i) {
    const uint64_t bits = uint64_t(i) * 0x9e3779b97f4a7c15u;
    memcpy(static_cast<void*>(&in[i]), &bits, sizeof(T));
  }
  memset(static_cast<void*>(&out[n]), 0x5a, sizeof(T));
  run(copy<T>, {1, 256, 1}, in.data, out.data, n);
  check(memcmp(in.data, out.data, n * sizeof(T)) == 0, "what was copied");
  check(*reinterpret_cast<unsigned char*>(&out[n]) == 0x5a, "what lies behind it");
}

CASE(vectors_of_float_are_copied) { check_copy<float>(); }
CASE(vectors_of_double_are_copied) { check_copy<double>(); }
CASE(vectors_of_bfloat16_are_copied) { check_copy<bfloat16>(); }
CASE(vectors_of_float16_are_copied) { check_copy<float16>(); }

// ---- warps, blocks and clusters ----

template <class T>
void check_warps() {
  Buffer<T> in(256), sums(256), before(256);
  for (int i = 0; i < 256; ++i) in[i] = T(i * i - 1000);
  run(reduce_warps<T>, {1, 256, 1}, in.data, sums.data, before.data);
  for (int i = 0; i < 256; ++i) {
    T sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += in[i / 32 * 32 + lane];
    check_equal(sums[i], sum, "sum of thread " + std::to_string(i));
    check_equal(before[i], in[i / 32 * 32 + (i + 31) % 32], "before " + std::to_string(i));
  }
}

CASE(shuffles_of_float) { check_warps<float>(); }
CASE(shuffles_of_double) { check_warps<double>(); }
CASE(shuffles_of_uint32) { check_warps<uint32_t>(); }
CASE(shuffles_of_int64) { check_warps<int64_t>(); }

CASE(votes_are_the_warps) {
  Buffer<int> in(128), any_out(128), all_out(128);
  // None, one, all but one, all.
  for (int i = 0; i < 128; ++i) in[i] = i < 32 ? 0 : i < 64 ? i == 45 : i < 96 ? i != 77 : i;
  run(vote, {1, 128, 1}, in.data, any_out.data, all_out.data);
  for (int i = 0; i < 128; ++i) {
    check_equal(any_out[i], i >= 32, "any of thread " + std::to_string(i));
    check_equal(all_out[i], i >= 96, "all of thread " + std::to_string(i));
  }
}

template <Missing missing = Missing::kNothing>
void check_exchange() {
  Buffer<float> in(20 * 32), out(20 * 32);
  for (int i = 0; i < in.size; ++i) in[i] = float(i % 37);
  run(exchange_in_warps<missing>, {1, 256, 1}, in.data, out.data, 20);
  for (int i = 0; i < in.size; ++i) {
    float sum = 0;
    for (int j = 0; j < 8; ++j) sum += in[i / 8 * 8 + j];
    check_equal(out[i], sum, "sum " + std::to_string(i));
  }
}

CASE(warp_barrier_orders_a_warps_accesses) { check_exchange(); }

template <class T, Missing missing = Missing::kNothing>
void check_blocks() {
  Buffer<T> in(10 * 1024), out(10);
  for (int i = 0; i < in.size; ++i) in[i] = T(i % 101 - 50);
  run(reduce_blocks<missing, T>, {3, 256, 1}, in.data, out.data, 10);
  for (int row = 0; row < 10; ++row) {
    T sum = 0;
    for (int i = 0; i < 1024; ++i) sum += in[row * 1024 + i];
    check_equal(out[row], sum, "row " + std::to_string(row));
  }
}

CASE(block_reduction_of_float) { check_blocks<float>(); }
CASE(block_reduction_of_double) { check_blocks<double>(); }
CASE(block_reduction_of_int64) { check_blocks<int64_t>(); }

template <class T, Missing missing = Missing::kNothing>
void check_clusters(int cluster) {
  Buffer<T> in(16 * 64), out(16);
  for (int i = 0; i < in.size; ++i) in[i] = T(i % 7 + i / 64);
  run(reduce_clusters<missing, T>, {16, 64, cluster}, in.data, out.data);
  for (int block = 0; block < 16; ++block) {
    T sum = 0;
    for (int i = 0; i < cluster * 64; ++i) sum = T(sum + in[block / cluster * cluster * 64 + i]);
    check_equal(out[block], sum, "block " + std::to_string(block));
  }
}

CASE(cluster_reduction_of_1_block) { check_clusters<float>(1); }
CASE(cluster_reduction_of_2_blocks) { check_clusters<float>(2); }
CASE(cluster_reduction_of_8_blocks) { check_clusters<float>(8); }
CASE(cluster_reduction_of_1_byte_each) { check_clusters<uint8_t>(8); }
CASE(cluster_reduction_of_2_bytes_each) { check_clusters<uint16_t>(8); }
CASE(cluster_reduction_of_8_bytes_each) { check_clusters<double>(8); }

// ---- asynchronous copies ----

template <Missing missing = Missing::kNothing>
void check_add_rows(int rows) {
  Buffer<float> in(rows * 1024), out(1024);
  for (int i = 0; i < in.size; ++i) in[i] = float(i % 113);
  run(add_rows<missing>, {1, 256, 1}, in.data, out.data, rows);
  for (int i = 0; i < 1024; ++i) {
    float sum = 0;
    for (int row = 0; row < rows; ++row) sum += in[row * 1024 + i];
    check_equal(out[i], sum, "column " + std::to_string(i));
  }
}

CASE(asynchronous_copies_of_one_row) { check_add_rows(1); }
CASE(asynchronous_copies_of_seven_rows) { check_add_rows(7); }

template <class T>
void check_narrow_some(int there) {
  Buffer<float> in(1024);
  Buffer<uint32_t> out(512);
  Buffer<T> each(1024);
  for (int i = 0; i < in.size; ++i) in[i] = 0.37f * float(i - 500);
  run(narrow_all<T, float>, {1, 256, 1}, in.data, each.data, 1024);
  run(narrow_some<T>, {1, 256, 1, kPairsBytes}, in.data, out.data, there);
  for (int i = 0; i < 1024; ++i) {
    const uint16_t found = uint16_t(out[i / 2] >> 16 * (i % 2));
    check_equal(found, i < there ? each[i].bits : uint16_t(0), "element " + std::to_string(i));
  }
}

CASE(pairs_of_bfloat16_through_dynamic_memory) { check_narrow_some<bfloat16>(1024); }
CASE(pairs_of_float16_that_are_only_partly_there) { check_narrow_some<float16>(508); }

// ---- matrices ----

// Small integers, of which every sum is exact.
constexpr int kLargest = 8;

template <class T>
T integer(int i) {
  static const std::vector<T> all = [] {
    std::vector<T> found(2 * kLargest + 1);
    for (int bits = 0; bits < 1 << 16; ++bits) {
      const double x = meaning(uint16_t(bits), kExponentBits<T>);
      if (std::fabs(x) <= kLargest && x == std::rint(x))
        found[size_t(x + kLargest)] = T{uint16_t(bits)};
    }
    return found;
  }();
  return all[size_t(i + kLargest)];
}

template <class T>
struct Operands {
  int m, n, k;
  std::vector<int> a, b;  // (m, k) and (k, n)
  Operands(int rows, int columns, int depth) : m(rows), n(columns), k(depth) {
    std::mt19937 generator(0);
    std::uniform_int_distribution<int> numbers(-kLargest, kLargest);
    for (int i = 0; i < m * k; ++i) a.push_back(numbers(generator));
    for (int i = 0; i < k * n; ++i) b.push_back(numbers(generator));
  }
  void check_product(Buffer<float>& c) const {
    for (int row = 0; row < m; ++row) {
      for (int column = 0; column < n; ++column) {
        int sum = 0;
        for (int i = 0; i < k; ++i) sum += a[size_t(row * k + i)] * b[size_t(i * n + column)];
        check_equal(c[row * n + column], float(sum),
                    "row " + std::to_string(row) + ", column " + std::to_string(column));
      }
    }
  }
};

template <class T>
void check_fragments() {
  const Operands<T> operands(16, 8, 16);
  Buffer<T> a(16 * 16), b(16 * 8);
  Buffer<float> c(16 * 8);
  for (int i = 0; i < 16 * 16; ++i) a[i] = integer<T>(operands.a[size_t(i)]);
  for (int i = 0; i < 16 * 8; ++i) b[i] = integer<T>(operands.b[size_t(i)]);
  run(multiply_fragments<T>, {1, 32, 1}, a.data, b.data, c.data);
  operands.check_product(c);
}

CASE(fragments_of_bfloat16_are_the_ptx_isas) { check_fragments<bfloat16>(); }
CASE(fragments_of_float16_are_the_ptx_isas) { check_fragments<float16>(); }

template <class T, bool rows_of_b>
void check_multiply() {
  constexpr int k = 80;
  const Operands<T> operands(16, 16, k);
  Buffer<T> a(16 * k), b(k * 16);
  Buffer<float> c(16 * 16);
  for (int i = 0; i < 16 * k; ++i) a[i] = integer<T>(operands.a[size_t(i)]);
  for (int i = 0; i < k; ++i)
    for (int j = 0; j < 16; ++j)
      b[rows_of_b ? i * 16 + j : j * k + i] = integer<T>(operands.b[size_t(i * 16 + j)]);
  run(multiply<rows_of_b, T>, {1, 32, 1}, a.data, b.data, c.data, k);
  operands.check_product(c);
}

CASE(product_of_bfloat16) { check_multiply<bfloat16, false>(); }
CASE(product_of_float16) { check_multiply<float16, false>(); }
CASE(product_of_bfloat16_transposed) { check_multiply<bfloat16, true>(); }
CASE(product_of_float16_transposed) { check_multiply<float16, true>(); }

// ---- conditions ----

CASE(condition_that_holds_changes_nothing) {
  Buffer<int> in(256);
  run(require_below, {1, 256, 1}, in.data, 1);
}

}  // namespace

#include "cuda_primitives_hopper.h"
#ifndef __CUDACC__
#include "cuda_primitives_broken.h"
#include "cuda_primitives_hopper_broken.h"
#endif

int main() {
  bool passed = true;
  for (const Case& each : cases()) {
    std::string outcome = "passed";
    try {
      each.run();
    } catch (const std::exception& error) {
      outcome = error.what();
      passed = false;
    }
    printf("%s: %s\n", each.name, outcome.c_str());
  }
  return passed ? 0 : 1;
}
