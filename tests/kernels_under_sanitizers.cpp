// Runs every CPU kernel on buffers of exactly the size it may touch, for test_sanitizers.py to
// build with the address and undefined-behaviour sanitizers. Knows no torch. Its argument names the
// kernels; exits 0 if all is well.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../csrc/cpu/kernels.h"

using namespace fastgpt;

namespace {

constexpr int64_t kIgnore = -100;
std::mt19937 generator(0);

// A boolean mask's type, in which a number says whether a score may stay or is to be -inf.
constexpr DType kBool = kDTypes;
constexpr size_t kBytes[] = {4, 8, 2, 2, 1};

// One number in each storage type, and back.
void put(DType dtype, void* data, int64_t i, double x) {
  const float f = float(x);
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  switch (dtype) {
    case kFloat32:
      static_cast<float*>(data)[i] = f;
      break;
    case kFloat64:
      static_cast<double*>(data)[i] = x;
      break;
    case kBFloat16:
      static_cast<uint16_t*>(data)[i] = uint16_t(bits >> 16);
      break;
    case kBool:
      static_cast<uint8_t*>(data)[i] = x != -INFINITY;
      break;
    default:  // fp16: cut off, to infinity from 2^16 and to 0 below 2^-14
      static_cast<uint16_t*>(data)[i] =
          uint16_t(sign | (magnitude > 0x7f800000    ? 0x7e00
                           : magnitude >= 0x47800000 ? 0x7c00
                           : magnitude < 0x38800000  ? 0
                                                     : (magnitude >> 13) - 0x1c000));
  }
}

double get(DType dtype, const void* data, int64_t i) {
  if (dtype == kFloat32) return static_cast<const float*>(data)[i];
  if (dtype == kFloat64) return static_cast<const double*>(data)[i];
  if (dtype == kBool) return static_cast<const uint8_t*>(data)[i] ? 0 : -INFINITY;
  const uint16_t half = static_cast<const uint16_t*>(data)[i];
  if (dtype == kBFloat16) {
    const uint32_t bits = uint32_t(half) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  const int exponent = (half >> 10) & 31, fraction = half & 0x3ff;
  const double magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                           : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                          : std::ldexp(fraction, -24);
  return half & 0x8000 ? -magnitude : magnitude;
}

// What a call of cross-entropy is given.
struct LossOptions {
  bool stream, weighted, by_columns, probabilities, wide, partial, in_place;
  double smoothing, softcap;
};

template <class A>
bool check_cross_entropy(const Kernels& kernels, DType dtype, int64_t rows, int64_t classes,
                         const LossOptions& o) {
  // Exact allocations, so that one element too many is caught. By columns, the rows are the
  // positions of one sequence.
  const DType accumulator = dtype == kFloat64 ? kFloat64 : kFloat32;
  const DType q_dtype = o.wide ? accumulator : dtype;
  std::vector<uint8_t> logits(size_t(rows * classes) * kBytes[dtype]), grad(logits.size());
  std::vector<uint8_t> q(size_t(o.probabilities ? rows * classes : 0) * kBytes[q_dtype]);
  std::vector<int64_t> target(static_cast<size_t>(rows));
  std::vector<A> row_max(target.size()), rest(target.size()), g(target.size()), h(target.size());
  std::vector<uint8_t> loss(target.size() * (o.partial ? 8 : sizeof(A))), lse(loss.size());
  const DType loss_dtype = o.partial ? kFloat64 : accumulator;
  std::normal_distribution<double> normal(0, 3);
  const auto place = [&](int64_t r, int64_t j) {
    return o.by_columns ? j * rows + r : r * classes + j;
  };
  for (int64_t i = 0; i < rows * classes; ++i) put(dtype, logits.data(), i, normal(generator));
  for (int64_t i = 0; o.probabilities && i < rows * classes; ++i)
    put(q_dtype, q.data(), i, std::fabs(normal(generator)) / double(classes));
  for (int64_t r = 0; r < rows; ++r) {
    target[size_t(r)] = r % 5 == 4                ? kIgnore
                        : o.partial && r % 5 == 2 ? classes + r
                                                  : int64_t(generator() % uint64_t(classes));
    g[size_t(r)] = A(normal(generator));
    h[size_t(r)] = A(normal(generator));
  }
  std::vector<A> weight(size_t(o.weighted ? classes : 0));
  double weight_sum = o.weighted ? 0 : double(classes);
  for (A& w : weight) weight_sum += double(w = A(std::fabs(normal(generator))));

  CrossEntropy call{};
  call.logits = logits.data();
  call.at = o.by_columns ? Places{0, 1, rows} : Places{classes, 0, 1};
  call.by_columns = o.by_columns;
  call.positions = o.by_columns ? rows : 1;
  call.classes = classes;
  if (o.probabilities) {
    call.probabilities = q.data();
    call.probability_at = call.at;
    call.probabilities_wide = o.wide;
  } else {
    call.target = target.data();
    call.target_outer = o.by_columns ? 0 : 1;
    call.target_inner = o.by_columns ? 1 : 0;
  }
  call.ignore_index = kIgnore;
  call.partial = o.partial;
  if (o.weighted) call.weight = weight.data();
  call.hard = 1 - o.smoothing;
  call.spread = o.smoothing / double(classes);
  call.total_weight = o.smoothing == 0 ? 0 : weight_sum;
  call.softcap = o.softcap;
  CrossEntropyForward forward{};
  static_cast<CrossEntropy&>(forward) = call;
  forward.loss = loss.data();
  forward.lse = lse.data();
  forward.row_max = row_max.data();
  forward.rest = rest.data();
  kernels.cross_entropy_forward[dtype](forward, 0, rows);
  const std::vector<uint8_t> before = logits;
  CrossEntropyBackward backward{};
  static_cast<CrossEntropy&>(backward) = call;
  const int64_t outer = o.by_columns ? 0 : 1, inner = o.by_columns ? 1 : 0;
  backward.grad_loss = {g.data(), outer, inner};
  backward.grad_lse = {h.data(), outer, inner};
  backward.row_max = row_max.data();
  backward.rest = rest.data();
  backward.grad_logits = o.in_place ? logits.data() : grad.data();
  backward.out = call.at;
  backward.stream = o.stream;
  kernels.cross_entropy_backward[dtype](backward, 0, rows);

  const double tolerance = dtype == kFloat64 ? 1e-13 : dtype == kFloat32 ? 1e-5 : 2e-2;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = target[size_t(r)];
    const bool ignored = !o.probabilities && t == kIgnore;
    std::vector<double> y(static_cast<size_t>(classes)), slope(y.size(), 1.0);
    double total = 0;
    for (int64_t j = 0; j < classes; ++j) {
      double& v = y[size_t(j)] = get(dtype, before.data(), place(r, j));
      if (o.softcap != 0) {
        const double u = std::tanh(v / o.softcap);
        v = o.softcap * u;
        slope[size_t(j)] = 1 - u * u;
      }
      total += std::exp(v);
    }
    // What the row asks of class j.
    const auto asked = [&](int64_t j) {
      const double w = o.weighted ? double(weight[size_t(j)]) : 1;
      const double wanted =
          o.probabilities ? get(q_dtype, q.data(), place(r, j)) : (j == t ? 1.0 : 0.0);
      return w * (o.smoothing / double(classes) + (1 - o.smoothing) * wanted);
    };
    double expected_loss = 0, amount = 0;
    for (int64_t j = 0; j < classes && !ignored; ++j) {
      expected_loss += asked(j) * (std::log(total) - y[size_t(j)]);
      amount += asked(j);
    }
    const double expected_lse = ignored ? 0 : std::log(total);
    const double got_loss = get(loss_dtype, loss.data(), r),
                 got_lse = get(loss_dtype, lse.data(), r);
    bool good = std::fabs(got_loss - expected_loss) <= 1e-5 * (1 + expected_loss) &&
                std::fabs(got_lse - expected_lse) <= 1e-5 * (1 + std::fabs(expected_lse));
    const double upstream = double(g[size_t(r)]), of_lse = double(h[size_t(r)]);
    for (int64_t j = 0; j < classes; ++j) {
      const double p = std::exp(y[size_t(j)]) / total;
      const double expected =
          ignored ? 0 : slope[size_t(j)] * (upstream * (amount * p - asked(j)) + of_lse * p);
      const double got = get(dtype, backward.grad_logits, place(r, j));
      good =
          good && std::fabs(got - expected) <=
                      tolerance * (std::max(1.0, amount) * std::fabs(upstream) + std::fabs(of_lse));
    }
    if (!good) {
      std::printf(
          "%s: dtype %d, %lld classes, row %lld is wrong: weighted %d, columns %d, "
          "probabilities %d (wide %d), partial %d, in place %d, smoothing %g, cap %g\n",
          kernels.isa, int(dtype), static_cast<long long>(classes), static_cast<long long>(r),
          o.weighted, o.by_columns, o.probabilities, o.wide, o.partial, o.in_place, o.smoothing,
          o.softcap);
      return false;
    }
  }
  return true;
}

// ---- kernels in phases ----

// Exactly the bytes that a plan asks for, from the start of a cache line.
struct Lines {
  size_t size;
  std::unique_ptr<void, decltype(&std::free)> data;

  explicit Lines(int64_t bytes)
      : size(size_t(bytes)), data(std::aligned_alloc(64, size), std::free) {}
  void poison() const { memset(data.get(), 0xff, size); }
};

template <class Arguments>
void run_phases(const PhasedKernel<Arguments>& kernel, const Arguments& arguments, const Plan& plan,
                const Lines& workspace) {
  const Lines scratch(plan.scratch_bytes);
  workspace.poison();
  for (int phase = 0; phase < kPhases; ++phase) {
    // Any order will do, and no task may count on what another left in its scratch.
    for (int64_t task = plan.tasks[phase] - 1; task >= 0; --task) {
      scratch.poison();
      kernel.run(arguments, phase, task, workspace.data.get(), scratch.data.get());
    }
  }
}

template <class Arguments>
void run(const PhasedKernel<Arguments>& kernel, const Arguments& arguments) {
  const Plan plan = kernel.plan(arguments);
  run_phases(kernel, arguments, plan, Lines(plan.workspace_bytes));
}

// ---- linear cross-entropy ----

struct LinearOptions {
  bool biased, weighted, probabilities, wide, partial, filtered, of_input, of_matrix;
  double smoothing, softcap;
};

bool near(const char* name, double got, double expected, double tolerance) {
  if (std::fabs(got - expected) <= tolerance) return true;
  std::printf("%s is %g, not %g\n", name, got, expected);
  return false;
}

template <class A>
bool check_linear(const Kernels& kernels, DType dtype, int64_t N, int64_t C, int64_t D,
                  const LinearOptions& o) {
  const DType accumulator = dtype == kFloat64 ? kFloat64 : kFloat32;
  const DType q_dtype = o.wide ? accumulator : dtype;
  const auto bytes = [](int64_t n, DType type) {
    return std::vector<uint8_t>(size_t(n) * kBytes[type], 0xff);
  };
  std::normal_distribution<double> normal;
  // Rows at a distance, of which nothing may be read.
  const int64_t x_row = D + 3, w_row = D + 1;
  std::vector<uint8_t> x = bytes((N - 1) * x_row + D, dtype), w = bytes((C - 1) * w_row + D, dtype);
  std::vector<uint8_t> b = bytes(C, dtype), q = bytes(o.probabilities ? N * C : 0, q_dtype);
  const auto fill = [&](std::vector<uint8_t>& to, DType type, int64_t rows, int64_t columns,
                        int64_t step, double scale) {
    for (int64_t i = 0; i < rows * columns; ++i)
      put(type, to.data(), i / columns * step + i % columns, scale * normal(generator));
  };
  fill(x, dtype, N, D, x_row, 1);
  fill(w, dtype, C, D, w_row, 1 / std::sqrt(double(D)));
  fill(b, dtype, 1, C, C, 1);
  for (int64_t i = 0; i < int64_t(q.size() / kBytes[q_dtype]); ++i)
    put(q_dtype, q.data(), i, std::fabs(normal(generator)) / double(C));
  std::vector<int64_t> target(static_cast<size_t>(N)), row_of;
  std::vector<A> g(target.size()), h(g.size()), square(g.size()), weight(size_t(C), A(1));
  for (int64_t r = 0; r < N; ++r) {
    const bool ignored = !o.probabilities && r % 5 == 4;
    target[size_t(r)] = ignored                   ? kIgnore
                        : o.partial && r % 5 == 2 ? C + r
                                                  : int64_t(generator() % uint64_t(C));
    if (!ignored) row_of.push_back(r);
    for (std::vector<A>* v : {&g, &h, &square}) (*v)[size_t(r)] = A(normal(generator));
  }
  double total_weight = 0;
  for (A& v : weight) total_weight += double(v = o.weighted ? A(std::fabs(normal(generator))) : 1);

  LinearCrossEntropy a{};
  a.positions = 1;
  a.classes = C;
  if (o.probabilities) {
    a.probabilities = q.data();
    a.probability_at = {C, 0, 1};
    a.probabilities_wide = o.wide;
  } else {
    a.target = target.data();
    a.target_outer = 1;
  }
  a.ignore_index = kIgnore;
  a.partial = o.partial;
  if (o.weighted) a.weight = weight.data();
  a.hard = 1 - o.smoothing;
  a.spread = o.smoothing / double(C);
  a.total_weight = o.smoothing == 0 ? 0 : total_weight;
  a.softcap = o.softcap;
  a.rows = int64_t(row_of.size());
  a.depth = D;
  a.row_of = row_of.data();
  a.input = x.data();
  a.input_row = x_row;
  a.matrix = w.data();
  a.matrix_row = w_row;
  if (o.biased) a.bias = b.data();
  const DType loss_dtype = o.partial ? kFloat64 : accumulator;
  std::vector<uint8_t> loss = bytes(N, loss_dtype), lse = loss;
  a.loss = loss.data();
  a.lse = lse.data();
  a.grad_loss = {g.data(), 1, 0};
  a.grad_lse = {h.data(), 1, 0};
  a.grad_square = {square.data(), 1, 0};
  a.filter_eps = o.filtered ? 1e-3 : 0;
  std::vector<A> grad_x(size_t(N * D), A(NAN)), grad_w(size_t(C * D), A(NAN)),
      grad_b(size_t(C), A(NAN));
  const double tolerance = dtype == kFloat64 ? 1e-11 : dtype == kFloat32 ? 1e-4 : 3e-2;
  for (bool backward : {false, true}) {
    a.backward = backward;
    if (backward) {
      if (o.of_input) a.grad_input = grad_x.data();
      if (o.of_matrix) a.grad_matrix = grad_w.data();
      a.grad_bias = o.biased ? grad_b.data() : nullptr;
    }
    const PhasedKernel<LinearCrossEntropy>& kernel = kernels.linear_cross_entropy[dtype];
    const Plan plan = kernel.plan(a);
    const Lines workspace(plan.workspace_bytes);
    for (a.first_row = 0; a.first_row < a.rows; a.first_row += plan.chunk_rows) {
      a.chunk_rows = std::min(plan.chunk_rows, a.rows - a.first_row);
      run_phases(kernel, a, plan, workspace);
    }
  }
  const auto at = [&](const std::vector<uint8_t>& of, int64_t row, int64_t step, int64_t d) {
    return get(dtype, of.data(), row * step + d);
  };
  std::vector<double> want_w(grad_w.size()), want_b(grad_b.size());
  std::vector<double> y(static_cast<size_t>(C)), slope(y.size()), want_x(static_cast<size_t>(D));
  for (int64_t r : row_of) {
    double total = 0, amount = 0, want_loss = 0;
    for (int64_t j = 0; j < C; ++j) {
      double v = o.biased ? get(dtype, b.data(), j) : 0;
      for (int64_t d = 0; d < D; ++d) v += at(x, r, x_row, d) * at(w, j, w_row, d);
      const double u = o.softcap != 0 ? std::tanh(v / o.softcap) : 0;
      slope[size_t(j)] = 1 - u * u;
      y[size_t(j)] = o.softcap != 0 ? o.softcap * u : v;
      total += std::exp(y[size_t(j)]);
    }
    const auto asked = [&](int64_t j) {
      const double wanted =
          o.probabilities ? get(q_dtype, q.data(), r * C + j) : double(j == target[size_t(r)]);
      return double(weight[size_t(j)]) * (a.spread + a.hard * wanted);
    };
    for (int64_t j = 0; j < C; ++j) {
      want_loss += asked(j) * (std::log(total) - y[size_t(j)]);
      amount += asked(j);
    }
    const double want_lse = std::log(total), size = 1 + std::fabs(want_loss);
    if (!near("loss", get(loss_dtype, loss.data(), r), want_loss, tolerance * size)) return false;
    if (!near("lse", get(loss_dtype, lse.data(), r), want_lse, tolerance * size)) return false;
    const double of_loss = double(g[size_t(r)]);
    const double of_lse = double(h[size_t(r)]) + 2 * double(square[size_t(r)]) * want_lse;
    std::fill(want_x.begin(), want_x.end(), 0.0);
    for (int64_t j = 0; j < C; ++j) {
      const double p = std::exp(y[size_t(j)]) / total;
      const double s = slope[size_t(j)] * (of_loss * (amount * p - asked(j)) + of_lse * p);
      want_b[size_t(j)] += s;
      for (int64_t d = 0; d < D; ++d) {
        want_x[size_t(d)] += s * at(w, j, w_row, d);
        want_w[size_t(j * D + d)] += s * at(x, r, x_row, d);
      }
    }
    const double filtered = o.filtered ? 1e-3 * double(C) : 0;
    const double room =
        (tolerance + filtered) * (1 + amount * std::fabs(of_loss) + std::fabs(of_lse)) * 4;
    for (int64_t d = 0; d < D && o.of_input; ++d) {
      if (!near("dx", double(grad_x[size_t(r * D + d)]), want_x[size_t(d)], room)) return false;
    }
  }
  const double room = (tolerance + (o.filtered ? 1e-3 : 0)) * 40 * std::sqrt(double(N));
  for (size_t i = 0; o.of_matrix && i < want_w.size(); ++i) {
    if (!near("dw", double(grad_w[i]), want_w[i], room)) return false;
  }
  for (size_t i = 0; o.biased && i < want_b.size(); ++i) {
    if (!near("db", double(grad_b[i]), want_b[i], room)) return false;
  }
  for (int64_t r = 0; r < N; ++r) {
    const bool left = o.probabilities || target[size_t(r)] != kIgnore || !o.of_input;
    for (int64_t d = 0; d < D && !left; ++d) {
      if (std::isnan(grad_x[size_t(r * D + d)])) continue;
      std::printf("dx of an ignored row was written\n");
      return false;
    }
  }
  return true;
}

// How many calls were right, or -1.
int check_linear_of(int64_t N, int64_t C, int64_t D, int bits) {
  LinearOptions o{};
  o.biased = bits & 1;
  o.weighted = bits & 2;
  o.probabilities = bits & 4;
  o.smoothing = bits & 8 ? 0.3 : 0;
  o.softcap = bits & 16 ? 2 : 0;
  o.wide = bits & 8;
  o.partial = bits % 3 == 0;
  o.filtered = bits % 7 == 0;
  o.of_input = bits % 5 != 0;
  o.of_matrix = bits % 5 != 1;
  int checked = 0;
  for (int i = 0; i < isa_count(); ++i) {
    for (int dtype = 0; dtype < kDTypes; ++dtype) {
      const auto check = dtype == kFloat64 ? check_linear<double> : check_linear<float>;
      if (!check(isa_at(i), DType(dtype), N, C, D, o)) {
        std::printf("%s: dtype %d, N %lld, C %lld, D %lld, options %d\n", isa_at(i).isa, dtype,
                    static_cast<long long>(N), static_cast<long long>(C), static_cast<long long>(D),
                    bits);
        return -1;
      }
      ++checked;
    }
  }
  return checked;
}

// ---- attention ----

// A tensor (batch, heads, rows, columns) in an allocation that ends with its last number. Nothing
// may touch the gap between two rows, which also puts the rows at odd addresses. All starts as NaN:
// what is read too early, or never written, shows.
struct Tensor {
  static constexpr int64_t kGap = 3;
  DType dtype;
  int64_t batch, heads, rows, columns;
  std::vector<uint8_t> bytes;

  Tensor(DType type, int64_t b, int64_t h, int64_t r, int64_t c)
      : dtype(type),
        batch(b),
        heads(h),
        rows(r),
        columns(c),
        bytes(size_t(b * h * r * (c + kGap) - kGap) * kBytes[type], 0xff) {}

  int64_t row_stride() const { return columns + kGap; }
  int64_t head_stride() const { return rows * row_stride(); }
  int64_t batch_stride() const { return heads * head_stride(); }
  template <class Void>
  Heads<Void> view() {
    return {bytes.data(), batch_stride(), head_stride(), row_stride()};
  }

  int64_t count() const { return batch * heads * rows * columns; }
  int64_t place(int64_t i) const { return i / columns * row_stride() + i % columns; }
  std::vector<double> numbers() const {
    std::vector<double> x(static_cast<size_t>(count()));
    for (int64_t i = 0; i < count(); ++i) x[size_t(i)] = get(dtype, bytes.data(), place(i));
    return x;
  }

  void fill_normally() {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < count(); ++i) put(dtype, bytes.data(), place(i), normal(generator));
  }

  bool is(const char* name, const std::vector<double>& expected, double tolerance) const {
    const std::vector<double> got = numbers();
    for (size_t i = 0; i < got.size(); ++i) {
      const double x = expected[i];
      if (got[i] == x) continue;  // infinities too
      if (std::isnan(x) ? std::isnan(got[i])
                        : std::fabs(got[i] - x) <= tolerance * (1 + std::fabs(x)))
        continue;
      std::printf("%s[%zu] is %g, not %g\n", name, i, got[i], x);
      return false;
    }
    for (int64_t row = 1; row < batch * heads * rows; ++row) {
      const auto end = bytes.begin() + row * row_stride() * int64_t(kBytes[dtype]);
      if (std::all_of(end - kGap * int64_t(kBytes[dtype]), end, [](int x) { return x == 0xff; }))
        continue;
      std::printf("%s was written behind row %lld\n", name, static_cast<long long>(row - 1));
      return false;
    }
    return true;
  }
};

struct Shape {
  int64_t batch, query_heads, heads, queries, keys, head_dim, value_dim;
};

struct Mask {
  MaskKind kind;
  int64_t column;  // its stride
};

double dot(const double* x, const double* y, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

void add(double factor, const double* x, int64_t n, double* sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += factor * x[i];
}

// Whether dropout keeps a weight; fastgpt/ops/dropout.py has the definition.
bool keeps(int64_t seed, int64_t head, int64_t i, int64_t j, uint32_t below) {
  uint32_t c[4] = {uint32_t(i), uint32_t(head), 0, 0};
  uint32_t k[2] = {uint32_t(uint64_t(seed)), uint32_t(uint64_t(seed) >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t x = uint64_t(0xD2511F53) * c[0], y = uint64_t(0xCD9E8D57) * c[2];
    const uint32_t next[4] = {uint32_t(y >> 32) ^ c[1] ^ k[0], uint32_t(y),
                              uint32_t(x >> 32) ^ c[3] ^ k[1], uint32_t(x)};
    std::copy(next, next + 4, c);
    k[0] += 0x9E3779B9;
    k[1] += 0xBB67AE85;
  }
  uint32_t x = uint32_t(j) ^ c[0];
  x = (x ^ (x >> 16)) * 0x7feb352d;
  x = (x ^ (x >> 15) ^ c[1]) * 0x846ca68b;
  return (x ^ (x >> 16)) >= below;
}

enum Places { kFull, kCausal, kEverything };  // with every option that there is

// The arguments of one call, and what it should give.
struct Problem {
  Tensor query, key, value, grad_output, mask, slopes, sinks, grad_lse;
  std::vector<int64_t> spans, seeds;
  Attention arguments;
  std::vector<double> output, lse, row_sum, grad_query, grad_key, grad_value, grad_mask, grad_sinks;

  Problem(DType dtype, DType accumulator, const Shape& s, Places places, const Mask& m, bool nan)
      : query(dtype, s.batch, s.query_heads, s.queries, s.head_dim),
        key(dtype, s.batch, s.heads, s.keys, s.head_dim),
        value(dtype, s.batch, s.heads, s.keys, s.value_dim),
        grad_output(dtype, s.batch, s.query_heads, s.queries, s.value_dim),
        mask(m.kind == kBoolMask      ? kBool
             : m.kind == kStorageMask ? dtype
                                      : accumulator,
             s.batch, s.query_heads, s.queries, m.column == 0 ? 1 : s.keys),
        slopes(accumulator, 1, 1, 1, s.query_heads),
        sinks(accumulator, 1, 1, 1, s.query_heads),
        grad_lse(accumulator, 1, 1, 1, s.batch * s.query_heads * s.queries),
        arguments{} {
    for (Tensor* x : {&query, &key, &value, &grad_output, &mask, &slopes, &sinks, &grad_lse})
      x->fill_normally();
    // The first query of a head sees nothing, the others three of four keys (or heads).
    for (int64_t i = 0; i < mask.count(); ++i) {
      if (i / mask.columns % s.queries == 0 || generator() % 4 == 0)
        put(mask.dtype, mask.bytes.data(), mask.place(i), -INFINITY);
    }
    // In one head, and between keys that causality hides from more queries and from fewer.
    if (nan) put(dtype, value.bytes.data(), value.place(s.keys / 2 * s.value_dim), NAN);

    Attention& a = arguments;
    a.batch = s.batch;
    a.query_heads = s.query_heads;
    a.heads = s.heads;
    a.queries = s.queries;
    a.keys = s.keys;
    a.head_dim = s.head_dim;
    a.value_dim = s.value_dim;
    a.scale = 1 / std::sqrt(double(s.head_dim));
    a.rescale = 1;
    if (m.kind != kNoMask) {
      const Heads<const void> view = mask.view<const void>();
      a.mask = {m.kind,
                view.data,
                view.batch,
                view.head,
                view.row,
                m.column,
                {mask.batch, mask.heads, mask.rows, mask.columns}};
    }
    spans.resize(size_t(3 * s.queries));
    a.begin = spans.data();
    a.end = a.begin + s.queries;
    a.place = a.end + s.queries;
    int64_t first = 0, last = 0;
    for (int64_t i = 0; i < s.queries; ++i) {
      int64_t begin = 0, end = places == kCausal ? i + 1 : s.keys, place = i;
      if (places == kEverything) {  // stretches that leap, overlap, and are empty at times
        place = i * s.keys / s.queries;
        begin = place - int64_t(generator() % 70);
        end = place + int64_t(generator() % 40) - 10;
      }
      first = std::clamp(begin, first, s.keys);
      last = std::clamp(end, std::max(first, last), s.keys);
      spans[size_t(i)] = first;
      spans[size_t(s.queries + i)] = last;
      spans[size_t(2 * s.queries + i)] = place;
    }
    if (places == kEverything) {
      a.softcap = 2;
      a.slopes = slopes.bytes.data();
      a.sinks = sinks.bytes.data();
      for (int64_t b = 0; b < s.batch; ++b) seeds.push_back(int64_t(generator()) << 20);
      a.seeds = seeds.data();
      a.drop_below = 1u << 30;
      a.rescale = 1 / 0.75;
    }
    a.query = query.view<const void>();
    a.key = key.view<const void>();
    a.value = value.view<const void>();
    solve();
  }

  void solve() {
    const Attention& a = arguments;
    const std::vector<double> q = query.numbers(), k = key.numbers(), v = value.numbers(),
                              g = grad_output.numbers(), bias = mask.numbers(),
                              slope = slopes.numbers(), sink = sinks.numbers(),
                              h = grad_lse.numbers();
    output.resize(g.size());
    lse.resize(h.size());
    row_sum.resize(h.size());
    grad_query.resize(q.size());
    grad_key.resize(k.size());
    grad_value.resize(v.size());
    grad_mask.resize(bias.size());
    grad_sinks.resize(h.size());
    std::vector<double> p(static_cast<size_t>(a.keys)), slope_of_cap(p.size(), 1.0), kept(p.size());
    for (int64_t row = 0; row < int64_t(row_sum.size()); ++row) {
      const int64_t all_head = row / a.queries, i = row % a.queries;
      const int64_t head = all_head % a.query_heads;
      const int64_t first_key = all_head / (a.query_heads / a.heads) * a.keys;
      const double *query_row = &q[size_t(row * a.head_dim)],
                   *g_row = &g[size_t(row * a.value_dim)];
      const auto key_at = [&](int64_t j) { return size_t((first_key + j) * a.head_dim); };
      const auto value_at = [&](int64_t j) { return size_t((first_key + j) * a.value_dim); };
      const auto mask_at = [&](int64_t j) {
        return size_t(row * mask.columns + j * a.mask.column);
      };
      double* o = &output[size_t(row * a.value_dim)];

      double top = a.sinks ? sink[size_t(head)] : -INFINITY, total = 0;
      for (int64_t j = 0; j < a.keys; ++j) {
        double& score = p[size_t(j)];
        score = a.scale * dot(query_row, &k[key_at(j)], a.head_dim);
        if (a.softcap != 0) {
          const double t = std::tanh(score / a.softcap);
          score = a.softcap * t;
          slope_of_cap[size_t(j)] = 1 - t * t;
        }
        if (a.slopes) score -= slope[size_t(head)] * double(std::abs(a.place[i] - j));
        if (a.mask.kind != kNoMask) score += bias[mask_at(j)];
        if (j < a.begin[i] || j >= a.end[i]) score = -INFINITY;
        top = std::max(top, score);
        kept[size_t(j)] = 1;
        if (a.seeds && !keeps(a.seeds[all_head / a.query_heads], head, i, j, a.drop_below))
          kept[size_t(j)] = 0;
      }
      for (double& x : p) total += x = x == -INFINITY ? 0 : std::exp(x - top);
      const double p_sink = a.sinks ? std::exp(sink[size_t(head)] - top) : 0;
      total += p_sink;
      row_sum[size_t(row)] = total;
      lse[size_t(row)] = total == 0 ? -INFINITY : top + std::log(total);
      // What a query does not see is not 0 times it, which may be NaN.
      for (int64_t j = 0; j < a.keys; ++j) {
        if (p[size_t(j)] == 0) continue;
        p[size_t(j)] /= total;
        if (kept[size_t(j)] == 0) continue;
        add(a.rescale * p[size_t(j)], &v[value_at(j)], a.value_dim, o);
      }
      const double delta = dot(g_row, o, a.value_dim) - h[size_t(row)];
      grad_sinks[size_t(row)] = total == 0 ? 0 : -p_sink / total * delta;
      for (int64_t j = 0; j < a.keys; ++j) {
        if (p[size_t(j)] == 0) continue;
        const double r = a.rescale * kept[size_t(j)];
        const double dp = r == 0 ? 0 : r * dot(g_row, &v[value_at(j)], a.value_dim);
        const double ds = p[size_t(j)] * (dp - delta);
        const double dy = a.scale * ds * slope_of_cap[size_t(j)];
        add(r * p[size_t(j)], g_row, a.value_dim, &grad_value[value_at(j)]);
        add(dy, &k[key_at(j)], a.head_dim, &grad_query[size_t(row * a.head_dim)]);
        add(dy, query_row, a.head_dim, &grad_key[key_at(j)]);
        if (a.mask.kind != kNoMask) grad_mask[mask_at(j)] += ds;
      }
    }
  }
};

bool check_attention(const Kernels& kernels, DType dtype, DType accumulator, Problem& problem) {
  const Attention& a = problem.arguments;
  const double tolerances[] = {1e-5, 1e-12, 3e-2, 3e-3};
  const double tolerance = tolerances[dtype];
  Tensor output(dtype, a.batch, a.query_heads, a.queries, a.value_dim), rounding = output;
  Tensor row_max(accumulator, 1, 1, 1, a.batch * a.query_heads * a.queries),
      row_sum = row_max, lse = row_max, grad_sinks = row_max;
  const bool rounds = dtype != accumulator;
  AttentionForward forward;
  static_cast<Attention&>(forward) = a;
  // One thread packs the keys of many heads head by head; a hundred pack them all first.
  for (int64_t threads : {1, 100}) {
    for (Tensor* x : {&output, &rounding, &row_max, &row_sum, &lse})
      std::fill(x->bytes.begin(), x->bytes.end(), uint8_t(0xff));
    forward.threads = threads;
    forward.output = output.view<void>();
    forward.rounding = rounds ? rounding.view<void>() : Heads<void>{};
    forward.lse = lse.bytes.data();
    forward.row_max = row_max.bytes.data();
    forward.row_sum = row_sum.bytes.data();
    run(kernels.attention_forward[dtype], forward);
    if (!output.is("output", problem.output, tolerance)) return false;
    if (!row_sum.is("row_sum", problem.row_sum, 1e-5)) return false;
    if (!lse.is("lse", problem.lse, dtype == accumulator ? 1e-5 : 1e-2)) return false;
  }

  Tensor grad_query(dtype, a.batch, a.query_heads, a.queries, a.head_dim);
  Tensor grad_key(dtype, a.batch, a.heads, a.keys, a.head_dim);
  Tensor grad_value(dtype, a.batch, a.heads, a.keys, a.value_dim);
  AttentionBackward backward;
  static_cast<Attention&>(backward) = a;
  backward.grad_output = problem.grad_output.view<const void>();
  backward.output = output.view<const void>();
  backward.rounding = rounds ? rounding.view<const void>() : Heads<const void>{};
  // The gradient of a mask of numbers, of its own sizes.
  const bool of_mask = a.mask.kind == kStorageMask || a.mask.kind == kAccumulatorMask;
  Tensor grad_mask(accumulator, 1, 1, 1, problem.mask.count());
  backward.grad_lse = problem.grad_lse.bytes.data();
  backward.grad_mask = of_mask ? grad_mask.bytes.data() : nullptr;
  backward.grad_sinks = a.sinks ? grad_sinks.bytes.data() : nullptr;
  backward.row_max = row_max.bytes.data();
  backward.row_sum = row_sum.bytes.data();
  backward.grad_query = grad_query.view<void>();
  backward.grad_key = grad_key.view<void>();
  backward.grad_value = grad_value.view<void>();
  run(kernels.attention_backward[dtype], backward);
  return grad_query.is("grad_query", problem.grad_query, tolerance) &&
         grad_key.is("grad_key", problem.grad_key, tolerance) &&
         grad_value.is("grad_value", problem.grad_value, tolerance) &&
         (!of_mask || grad_mask.is("grad_mask", problem.grad_mask, tolerance)) &&
         (!a.sinks || grad_sinks.is("grad_sinks", problem.grad_sinks, tolerance));
}

// How many cases are right; -1 if one is not.
int check_attention_of(const Shape& s) {
  const Mask masks[] = {{kNoMask, 0},         {kBoolMask, 0},    {kBoolMask, 1},
                        {kStorageMask, 0},    {kStorageMask, 1}, {kAccumulatorMask, 0},
                        {kAccumulatorMask, 1}};
  int checked = 0;
  for (int t = 0; t < kDTypes; ++t) {
    const DType dtype = DType(t), accumulator = dtype == kFloat64 ? kFloat64 : kFloat32;
    for (int m = 0; m < 7; ++m) {
      for (Places places : {kFull, kCausal, kEverything}) {
        const Mask& mask = masks[m];
        const bool nan = (places == kCausal) != (m % 2 == 1);  // with and without, for every mask
        Problem problem(dtype, accumulator, s, places, mask, nan);
        for (int i = 0; i < isa_count(); ++i) {
          if (!check_attention(isa_at(i), dtype, accumulator, problem)) {
            std::printf(
                "%s: dtype %d, heads (%lld, %lld, %lld), %lld queries, %lld keys, columns %lld and "
                "%lld, places %d, mask %d of stride %lld, NaN %d\n",
                isa_at(i).isa, t, static_cast<long long>(s.batch),
                static_cast<long long>(s.query_heads), static_cast<long long>(s.heads),
                static_cast<long long>(s.queries), static_cast<long long>(s.keys),
                static_cast<long long>(s.head_dim), static_cast<long long>(s.value_dim),
                int(places), int(mask.kind), static_cast<long long>(mask.column), nan);
            return -1;
          }
          ++checked;
        }
      }
    }
  }
  return checked;
}

// Each: how many cases are right, or -1.

int check_all_cross_entropy() {
  const int64_t sizes[] = {1,  2,  3,  7,  8,   15,   16,   17,   31,
                           33, 63, 64, 65, 127, 1000, 2048, 2049, 4099};
  int checked = 0;
  for (int i = 0; i < isa_count(); ++i) {
    for (int dtype = 0; dtype < kDTypes; ++dtype) {
      for (int64_t classes : sizes) {
        const auto check =
            dtype == kFloat64 ? check_cross_entropy<double> : check_cross_entropy<float>;
        for (int bits = 0; bits < 64; ++bits) {
          LossOptions o{};
          o.stream = bits & 1;
          o.weighted = bits & 2;
          o.smoothing = bits & 4 ? 0.3 : 0;
          o.by_columns = bits & 8;
          o.probabilities = bits & 16;
          o.softcap = bits & 32 ? 5 : 0;
          o.wide = bits & 4;
          o.partial = bits % 3 == 0;
          o.in_place = !o.stream && bits % 5 != 0;
          // Beyond one block of columns it is the classes that matter.
          const int64_t rows = !o.by_columns ? 7 : classes < 200 ? 71 : 3;
          if (classes > 200 && bits % 4 != classes % 4 && bits > 7) continue;
          if (!check(isa_at(i), DType(dtype), rows, classes, o)) return -1;
          ++checked;
        }
      }
    }
  }
  return checked;
}

int check_all_linear() {
  int checked = 0;
  const int64_t linear[][3] = {
      {1, 1, 1},    {2, 5, 3},   {5, 6, 16},   {16, 7, 17},  {17, 13, 64},
      {35, 96, 65}, {7, 97, 31}, {19, 193, 2}, {33, 400, 9}, {2600, 7, 3},  // more than one chunk
  };
  for (const auto& [N, C, D] : linear) {
    for (int bits = 0; bits < 32; ++bits) {
      if (N * C > 2000 && bits % 3 != 1) continue;
      const int right = check_linear_of(N, C, D, bits);
      if (right < 0) return -1;
      checked += right;
    }
  }
  // More classes than a chunk's logits may take.
  const int right = check_linear_of(3, 800000, 1, 1);
  return right < 0 ? -1 : checked + right;
}

int check_all_attention() {
  int checked = 0;
  const Shape shapes[] = {
      {1, 1, 1, 1, 1, 1, 1},     {1, 1, 1, 6, 7, 17, 64},
      {1, 2, 1, 7, 16, 64, 1},   {2, 4, 2, 16, 17, 129, 17},
      {1, 1, 1, 17, 6, 1, 129},  {1, 1, 1, 95, 383, 17, 1},
      {1, 1, 1, 96, 384, 1, 17}, {1, 2, 1, 97, 385, 17, 1},
      {1, 1, 1, 385, 385, 1, 1},  // causality reaches the second tile of keys
      {2, 8, 4, 17, 16, 17, 1},   // the forward packs head by head
      {4, 4, 4, 7, 385, 1, 17},   // and the backward walks two tiles of keys in one task
  };
  for (const Shape& shape : shapes) {
    const int right = check_attention_of(shape);
    if (right < 0) return -1;
    checked += right;
  }
  return checked;
}

}  // namespace

int main(int count, char** names) {
  const std::string name = count == 2 ? names[1] : "";
  const int checked = name == "cross-entropy"          ? check_all_cross_entropy()
                      : name == "linear cross-entropy" ? check_all_linear()
                      : name == "attention"            ? check_all_attention()
                                                       : -1;
  if (checked < 0) return 1;
  std::printf("%d cases\n", checked);
  return 0;
}
