// The only file that knows torch: checks, allocation, threading, and the operators' CPU kernels.
// The operators themselves (schemas, fake kernels, derivatives) are defined in fastgpt/ops.

#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "attention_tensors.h"
#include "cpu/kernels.h"
#include "cross_entropy_tensors.h"

namespace fastgpt {
namespace {

// Rows that one thread should at least have: less work than this costs less than waking a thread.
int64_t grain(int64_t row_elements) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, row_elements));
}

// A fresh allocation of this size comes as untouched pages, and faulting them in 4 KiB at a time
// costs more than the arithmetic that fills them.
void advise_huge_pages(const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t end = begin + size_t(tensor.numel()) * tensor.element_size();
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  // Only advice: where it is refused the pages are small and the result is the same.
  if (end > first + kHugePage) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
}

// Above this size a gradient is written around the caches, which it would only flush.
constexpr int64_t kStreamBytes = int64_t(8) << 20;
constexpr int64_t kStreamRowBytes = 4096;

// ---- cross-entropy ----

// Calls f(row, t) for each row's target.
template <class F>
void for_each_target(const Tensor& target, F f) {
  const int64_t* data = static_cast<const int64_t*>(target.const_data_ptr());
  const int64_t outer = target.size(0), inner = target.dim() == 2 ? target.size(1) : 1;
  const int64_t outer_stride = target.stride(0);
  const int64_t inner_stride = target.dim() == 2 ? target.stride(1) : 0;
  for (int64_t n = 0; n < outer; ++n) {
    for (int64_t l = 0; l < inner; ++l) {
      f(n * inner + l, data[n * outer_stride + l * inner_stride]);
    }
  }
}

// Before the parallel loop, where an exception would lose its text.
void check_targets(const Tensor& target, int64_t classes, int64_t ignore_index) {
  const auto wrong = [=](int64_t t) {
    return (t < 0) | (t >= classes) ? t != ignore_index : false;
  };
  bool any = false;
  for_each_target(target, [&](int64_t, int64_t t) { any |= wrong(t); });
  if (!any) return;
  for_each_target(target, [&](int64_t row, int64_t t) {
    STD_TORCH_CHECK(!wrong(t), "Target ", t, " is out of bounds. Row ", row, " of ", target.numel(),
                    ": expected 0 <= target < ", classes,
                    " (the number of classes) or ignore_index (", ignore_index, ").");
  });
}

// With what rounding takes from each partial sum (Neumaier, 1974): a smoothed loss is only as exact
// as this, and one after another the sums of a vocabulary lose a few bits of a double.
double sum_of(const double* data, int64_t count) {
  double sum = 0, lost = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double x = data[i], next = sum + x;
    lost += std::abs(sum) >= std::abs(x) ? (sum - next) + x : (x - next) + sum;
    sum = next;
  }
  return std::isfinite(sum) ? sum + lost : sum;
}

// Floats lose nothing that shows, in four chains that do not wait for one another.
double sum_of(const float* data, int64_t count) {
  double part[4] = {0, 0, 0, 0};
  for (int64_t i = 0; i < count; ++i) part[i % 4] += double(data[i]);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

double sum_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double
             ? sum_of(static_cast<const double*>(x.const_data_ptr()), x.numel())
             : sum_of(static_cast<const float*>(x.const_data_ptr()), x.numel());
}

// The sum of the weights, of 1 each without them. Only smoothing needs it.
double total_of(const std::optional<Tensor>& weight, int64_t classes,
                const CrossEntropyOptions& options) {
  if (options.spread == 0) return 0;
  return weight.has_value() ? sum_of(*weight) : double(classes);
}

// The tensors of a call, checked, their targets, too.
struct HostTensors : CrossEntropyTensors {
  HostTensors(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
              const CrossEntropyOptions& options)
      : CrossEntropyTensors(logits, target, weight), options_(options) {
    if (!of_probabilities() && !options.partial) {
      check_targets(this->target, classes, options.ignore_index);
    }
  }

  void put_in(CrossEntropy& a) const {
    CrossEntropyTensors::put_in(a);
    options_.put_in(a);
    a.total_weight = total_of(weight, classes, options_);
  }
  using CrossEntropyTensors::put_in;

 private:
  CrossEntropyOptions options_;
};

// The kernels do rows, or groups of neighbouring columns, which no thread's share cuts.
template <class Arguments>
void run_rows(const Kernel<Arguments>& kernel, const Arguments& a, int64_t rows) {
  torch::stable::parallel_for(0, rows, grain(a.classes),
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_forward_cpu(Tensor logits, Tensor target,
                                                                     std::optional<Tensor> weight,
                                                                     int64_t ignore_index,
                                                                     double hard, double spread,
                                                                     double softcap, bool partial) {
  const HostTensors tensors(logits, target, weight, {ignore_index, hard, spread, softcap, partial});
  const ScalarType accumulator = accumulator_of(tensors.dtype);
  const ScalarType wide = partial ? ScalarType::Double : accumulator;
  Tensor loss = tensors.per_row(wide), lse = tensors.per_row(wide);
  Tensor row_max = tensors.per_row(accumulator), rest = tensors.per_row(accumulator);
  CrossEntropyForward a{};
  tensors.put_in(a);
  a.loss = loss.mutable_data_ptr();
  a.lse = lse.mutable_data_ptr();
  a.row_max = row_max.mutable_data_ptr();
  a.rest = rest.mutable_data_ptr();
  run_rows(active_kernels().cross_entropy_forward[tensors.dtype], a, tensors.rows);
  return {loss, lse, row_max, rest};
}

// A new gradient, which `run_rows` writes.
Tensor new_gradient(const CrossEntropyTensors& tensors, CrossEntropyBackward& a) {
  Tensor gradient = tensors.new_gradient();
  const int64_t row_bytes = tensors.classes * int64_t(gradient.element_size());
  advise_huge_pages(gradient);
  a.grad_logits = gradient.mutable_data_ptr();
  a.out = places_of(gradient);
  a.stream = row_bytes >= kStreamRowBytes && tensors.rows * row_bytes >= kStreamBytes;
  return gradient;
}

// The targets are checked again: whoever calls the operator itself may not have run the forward.

Tensor cross_entropy_backward_cpu(Tensor grad_loss, std::optional<Tensor> grad_lse, Tensor logits,
                                  Tensor target, std::optional<Tensor> weight, Tensor row_max,
                                  Tensor rest, int64_t ignore_index, double hard, double spread,
                                  double softcap, bool partial) {
  const HostTensors tensors(logits, target, weight, {ignore_index, hard, spread, softcap, partial});
  CrossEntropyBackward a{};
  tensors.put_in(a);
  tensors.put_in(a, grad_loss, grad_lse, row_max, rest);
  Tensor gradient = new_gradient(tensors, a);
  run_rows(active_kernels().cross_entropy_backward[tensors.dtype], a, tensors.rows);
  return gradient;
}

void cross_entropy_backward_in_place_cpu(Tensor grad_loss, std::optional<Tensor> grad_lse,
                                         Tensor logits, Tensor target, std::optional<Tensor> weight,
                                         Tensor row_max, Tensor rest, int64_t ignore_index,
                                         double hard, double spread, double softcap, bool partial) {
  check_in_place(logits);
  const HostTensors tensors(logits, target, weight, {ignore_index, hard, spread, softcap, partial});
  CrossEntropyBackward a{};
  tensors.put_in(a);
  tensors.put_in(a, grad_loss, grad_lse, row_max, rest);
  a.grad_logits = logits.mutable_data_ptr();
  a.out = a.at;
  run_rows(active_kernels().cross_entropy_backward[tensors.dtype], a, tensors.rows);
}

// What a mean is divided by: the sum of the weights of the targets that count.
double denominator_of(const CrossEntropyTensors& tensors, int64_t ignore_index) {
  if (!tensors.weight.has_value()) {
    int64_t count = 0;
    for_each_target(tensors.target, [&](int64_t, int64_t t) { count += t != ignore_index; });
    return double(count);
  }
  const void* weight = tensors.weight->const_data_ptr();
  double sum = 0;
  for_each_target(tensors.target, [&](int64_t, int64_t t) {
    if (t == ignore_index) return;
    sum += tensors.dtype == kFloat64 ? static_cast<const double*>(weight)[t]
                                     : double(static_cast<const float*>(weight)[t]);
  });
  return sum;
}

double get(DType dtype, const void* x) {
  return dtype == kFloat64 ? *static_cast<const double*>(x) : double(*static_cast<const float*>(x));
}

void put(DType dtype, void* x, double value) {
  if (dtype == kFloat64) {
    *static_cast<double*>(x) = value;
  } else {
    *static_cast<float*>(x) = float(value);
  }
}

std::tuple<Tensor, Tensor> cross_entropy_reduced_cpu(Tensor logits, Tensor target,
                                                     std::optional<Tensor> weight,
                                                     int64_t ignore_index, double hard,
                                                     double spread, int64_t reduction) {
  const HostTensors tensors(logits, target, weight, {ignore_index, hard, spread, 0, false});
  const CrossEntropyStatistics statistics = tensors.new_statistics();
  CrossEntropyForward a{};
  tensors.put_in(a);
  statistics.put_in(a);
  Tensor loss = tensors.new_loss(reduction);
  if (reduction == kNone) a.loss = loss.mutable_data_ptr();
  run_rows(active_kernels().cross_entropy_forward[tensors.dtype], a, tensors.rows);
  if (reduction == kNone) return {loss, statistics.tensor};
  double sum = tensors.dtype == kFloat64 ? sum_of(static_cast<const double*>(a.loss), tensors.rows)
                                         : sum_of(static_cast<const float*>(a.loss), tensors.rows);
  if (reduction == kMean) {
    const double denominator = denominator_of(tensors, ignore_index);
    put(tensors.dtype, statistics.denominator(), denominator);
    sum /= denominator;
  }
  put(tensors.dtype, loss.mutable_data_ptr(), sum);
  return {loss, statistics.tensor};
}

Tensor cross_entropy_reduced_backward_cpu(Tensor grad_loss, Tensor logits, Tensor target,
                                          std::optional<Tensor> weight, Tensor statistics,
                                          int64_t ignore_index, double hard, double spread,
                                          int64_t reduction) {
  const HostTensors tensors(logits, target, weight, {ignore_index, hard, spread, 0, false});
  CrossEntropyBackward a{};
  tensors.put_in(a);
  const void* denominator = tensors.put_in(a, grad_loss, statistics, reduction);
  double mean = 0;
  float mean_as_float = 0;
  if (denominator) {
    mean = get(tensors.dtype, a.grad_loss.data) / get(tensors.dtype, denominator);
    mean_as_float = float(mean);
    a.grad_loss.data = tensors.dtype == kFloat64 ? static_cast<const void*>(&mean) : &mean_as_float;
  }
  Tensor gradient = new_gradient(tensors, a);
  run_rows(active_kernels().cross_entropy_backward[tensors.dtype], a, tensors.rows);
  return gradient;
}

// ---- kernels in phases ----

// The memory of a call, and the threads that share it.
template <class Arguments>
class Phases {
 public:
  // `work`: multiply-adds. `like`: a tensor of the device.
  Phases(const PhasedKernel<Arguments>& kernel, const Arguments& a, double work, const Tensor& like)
      : kernel_(kernel),
        plan_(kernel.plan(a)),
        threads_(
            int64_t(std::min<double>(torch::stable::get_num_threads(), 1 + work / kWorthAThread))),
        memory_(torch::stable::new_empty(like, {bytes()}, ScalarType::Byte)) {
    advise_huge_pages(memory_);
  }

  const Plan& plan() const { return plan_; }

  // One phase after another, the tasks of a phase by whichever thread is free: they differ in
  // length.
  void run(const Arguments& a) {
    const int64_t base = lines(reinterpret_cast<intptr_t>(memory_.mutable_data_ptr()));
    const auto at = [&](int64_t offset) { return reinterpret_cast<void*>(base + offset); };
    const int64_t workspace = lines(plan_.workspace_bytes), scratch = lines(plan_.scratch_bytes);
    for (int phase = 0; phase < kPhases; ++phase) {
      const int64_t tasks = plan_.tasks[phase];
      std::atomic<int64_t> next_task{0}, next_scratch{0};
      torch::stable::parallel_for(0, std::min(threads_, tasks), 1, [&](int64_t, int64_t) {
        void* own = at(workspace + scratch * next_scratch++);
        for (int64_t task; (task = next_task++) < tasks;) kernel_.run(a, phase, task, at(0), own);
      });
    }
  }

 private:
  // Waking a thread costs as much as so many multiply-adds.
  static constexpr double kWorthAThread = 1 << 20;
  static constexpr int64_t kLine = 64;
  static int64_t lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }
  int64_t bytes() const {
    return lines(plan_.workspace_bytes) + threads_ * lines(plan_.scratch_bytes) + kLine;
  }

  PhasedKernel<Arguments> kernel_;
  Plan plan_;
  int64_t threads_;
  Tensor memory_;
};

// ---- linear cross-entropy ----

Tensor with_unit_rows(const Tensor& x) {
  return x.stride(1) == 1 || x.size(1) == 1 ? x : torch::stable::contiguous(x);
}

// The tensors of a call, checked, and held for as long as the kernels' pointers are used.
struct LinearCrossEntropyTensors {
  Tensor input, matrix, target;
  std::optional<Tensor> bias, weight;
  DType dtype;
  int64_t rows, classes;
  std::vector<int64_t> kept;  // the rows that are not ignored

  LinearCrossEntropyTensors(const Tensor& input_in, const Tensor& matrix_in,
                            const std::optional<Tensor>& bias_in, const Tensor& target_in,
                            const std::optional<Tensor>& weight_in,
                            const CrossEntropyOptions& options)
      : input(input_in), matrix(matrix_in), target(target_in), bias(bias_in), weight(weight_in) {
    STD_TORCH_CHECK(input.dim() == 2 && matrix.dim() == 2 && input.size(1) == matrix.size(1) &&
                        matrix.numel() > 0,
                    "expected input (N, D) and linear_weight (C, D) with C > 0 and D > 0");
    STD_TORCH_CHECK(input.scalar_type() == matrix.scalar_type(),
                    "expected input and linear_weight of one type");
    dtype = dtype_of(input);
    rows = input.size(0), classes = matrix.size(0);
    const ScalarType accumulator = accumulator_of(dtype);
    const auto check_vector = [&](std::optional<Tensor>& x, ScalarType type, const char* what) {
      if (!x.has_value()) return;
      STD_TORCH_CHECK(x->dim() == 1 && x->size(0) == classes && x->scalar_type() == type,
                      "expected ", what);
      *x = torch::stable::contiguous(*x);
    };
    check_vector(bias, input.scalar_type(), "linear_bias (C,) of the type of input");
    check_vector(weight, accumulator, "weight (C,) in the accumulator type");
    input = with_unit_rows(input);
    matrix = with_unit_rows(matrix);
    if (target.scalar_type() == ScalarType::Long) {
      STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == rows, "expected target (N,)");
      if (!options.partial) check_targets(target, classes, options.ignore_index);
      target = torch::stable::contiguous(target);
      for_each_target(target, [&](int64_t row, int64_t t) {
        if (t != options.ignore_index) kept.push_back(row);
      });
    } else {
      STD_TORCH_CHECK(
          target.dim() == 2 && target.size(0) == rows && target.size(1) == classes &&
              (target.scalar_type() == input.scalar_type() || target.scalar_type() == accumulator),
          "expected probabilities (N, C) of input's or the accumulator type");
      for (int64_t row = 0; row < rows; ++row) kept.push_back(row);
    }
  }

  LinearCrossEntropy arguments(const CrossEntropyOptions& options) const {
    LinearCrossEntropy a{};
    a.positions = 1;
    a.classes = classes;
    if (target.scalar_type() == ScalarType::Long) {
      a.target = static_cast<const int64_t*>(target.const_data_ptr());
      a.target_outer = 1;
    } else {
      a.probabilities = target.const_data_ptr();
      a.probability_at = places_of(target);
      a.probabilities_wide = target.scalar_type() != input.scalar_type();
    }
    options.put_in(a);
    if (weight.has_value()) a.weight = weight->const_data_ptr();
    a.total_weight = total_of(weight, classes, options);
    a.rows = int64_t(kept.size());
    a.depth = input.size(1);
    a.row_of = kept.data();
    a.input = input.const_data_ptr();
    a.input_row = input.stride(0);
    a.matrix = matrix.const_data_ptr();
    a.matrix_row = matrix.stride(0);
    if (bias.has_value()) a.bias = bias->const_data_ptr();
    return a;
  }

  // (N,) for loss or lse, 0 where a row is ignored.
  Tensor per_row(const CrossEntropyOptions& options) const {
    Tensor x = torch::stable::new_empty(
        input, {rows}, options.partial ? ScalarType::Double : accumulator_of(dtype));
    if (int64_t(kept.size()) < rows) torch::stable::zero_(x);
    return x;
  }

  void run(LinearCrossEntropy& a) const {
    if (a.rows == 0) return;
    const double work = double(a.rows) * double(a.classes) * double(a.depth);
    Phases<LinearCrossEntropy> phases(active_kernels().linear_cross_entropy[dtype], a,
                                      (a.backward ? 3 : 1) * work, input);
    const int64_t step = phases.plan().chunk_rows;
    for (a.first_row = 0; a.first_row < a.rows; a.first_row += step) {
      a.chunk_rows = std::min(step, a.rows - a.first_row);
      phases.run(a);
    }
  }
};

std::tuple<Tensor, Tensor> linear_cross_entropy_forward_cpu(
    Tensor input, Tensor linear_weight, std::optional<Tensor> linear_bias, Tensor target,
    std::optional<Tensor> weight, int64_t ignore_index, double hard, double spread, double softcap,
    bool partial) {
  const CrossEntropyOptions options{ignore_index, hard, spread, softcap, partial};
  const LinearCrossEntropyTensors tensors(input, linear_weight, linear_bias, target, weight,
                                          options);
  Tensor loss = tensors.per_row(options), lse = tensors.per_row(options);
  LinearCrossEntropy a = tensors.arguments(options);
  a.loss = loss.mutable_data_ptr();
  a.lse = lse.mutable_data_ptr();
  tensors.run(a);
  return {loss, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_backward_cpu(
    Tensor grad_loss, std::optional<Tensor> grad_lse, std::optional<Tensor> grad_square,
    Tensor input, Tensor linear_weight, std::optional<Tensor> linear_bias, Tensor target,
    std::optional<Tensor> weight, int64_t ignore_index, double hard, double spread, double softcap,
    bool partial, double filter_eps, bool of_input, bool of_weight, bool of_bias) {
  const CrossEntropyOptions options{ignore_index, hard, spread, softcap, partial};
  const LinearCrossEntropyTensors tensors(input, linear_weight, linear_bias, target, weight,
                                          options);
  const ScalarType accumulator = accumulator_of(tensors.dtype);
  const auto upstream = [&](const Tensor& g) {
    STD_TORCH_CHECK(g.dim() == 1 && g.size(0) == tensors.rows && g.scalar_type() == accumulator,
                    "expected grad_loss, grad_lse and grad_square (N,) in the accumulator type");
    return upstream_of(g);
  };
  LinearCrossEntropy a = tensors.arguments(options);
  a.backward = true;
  a.filter_eps = filter_eps;
  a.grad_loss = upstream(grad_loss);
  if (grad_lse.has_value()) a.grad_lse = upstream(*grad_lse);
  if (grad_square.has_value()) a.grad_square = upstream(*grad_square);
  Tensor loss = tensors.per_row(options), lse = tensors.per_row(options);
  a.loss = loss.mutable_data_ptr();
  a.lse = lse.mutable_data_ptr();
  const int64_t depth = a.depth, classes = a.classes;
  // Whole only if there are rows, and each of them is one that counts.
  const auto gradient = [&](bool wanted, const std::vector<int64_t>& sizes, bool whole) {
    if (!wanted) return torch::stable::new_empty(input, {0}, accumulator);
    Tensor x = torch::stable::new_empty(input, sizes, accumulator);
    advise_huge_pages(x);
    if (!whole) torch::stable::zero_(x);
    return x;
  };
  Tensor grad_input = gradient(of_input, {tensors.rows, depth}, a.rows == tensors.rows);
  Tensor grad_weight = gradient(of_weight, {classes, depth}, a.rows > 0);
  Tensor grad_bias = gradient(of_bias, {classes}, a.rows > 0);
  if (of_input) a.grad_input = grad_input.mutable_data_ptr();
  if (of_weight) a.grad_matrix = grad_weight.mutable_data_ptr();
  if (of_bias) a.grad_bias = grad_bias.mutable_data_ptr();
  tensors.run(a);
  return {loss, lse, grad_input, grad_weight, grad_bias};
}

// ---- attention ----

Heads<const void> heads_of(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

Heads<void> heads_of_result(const Tensor& x) {
  return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

AttentionMask mask_of(const std::optional<Tensor>& mask, const Tensor& query, int64_t keys) {
  if (!mask.has_value()) return {kNoMask, nullptr, 0, 0, 0, 0, {}};
  STD_TORCH_CHECK(mask->dim() == 4, "expected attn_mask (B, H, L, S)");
  const int64_t sizes[] = {query.size(0), query.size(1), query.size(2), keys};
  int64_t strides[4];
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(mask->size(i) == sizes[i] || mask->size(i) == 1,
                    "expected attn_mask broadcastable to (B, H, L, S)");
    strides[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
  }
  const ScalarType type = mask->scalar_type();
  const MaskKind kind = type == ScalarType::Bool                  ? kBoolMask
                        : type == query.scalar_type()             ? kStorageMask
                        : type == accumulator_of(dtype_of(query)) ? kAccumulatorMask
                                                                  : kNoMask;
  STD_TORCH_CHECK(kind != kNoMask, "expected attn_mask of bool, query's or the accumulator type");
  return {kind,
          mask->const_data_ptr(),
          strides[0],
          strides[1],
          strides[2],
          strides[3],
          {mask->size(0), mask->size(1), mask->size(2), mask->size(3)}};
}

// The kernels' arguments, with the memory that they point to.
struct AttentionTensors {
  OfHeads slopes, sinks;
  Dropout dropout;
  std::vector<int64_t> spans;
  Attention arguments;

  AttentionTensors(const Tensor& query, const Tensor& key, const Tensor& value,
                   const std::optional<Tensor>& mask, const std::optional<Tensor>& alibi_slopes,
                   const std::optional<Tensor>& sink_logits,
                   const std::optional<Tensor>& given_spans,
                   const std::optional<Tensor>& given_seeds, const AttentionOptions& options)
      : slopes("alibi_slopes", alibi_slopes, query),
        sinks("sinks", sink_logits, query),
        dropout(given_seeds, query, options.dropout_p),
        arguments{} {
    check_heads(query, key, value);
    Attention& a = arguments;
    a.batch = query.size(0);
    a.query_heads = query.size(1);
    a.heads = key.size(1);
    a.queries = query.size(2);
    a.keys = key.size(2);
    a.head_dim = query.size(3);
    a.value_dim = value.size(3);
    take_spans(given_spans, options);
    a.scale = options.scale;
    a.softcap = options.softcap;
    a.mask = mask_of(mask, query, a.keys);
    a.slopes = slopes.data;
    a.slopes_batch = slopes.batch;
    a.sinks = sinks.data;
    a.sinks_batch = sinks.batch;
    dropout.put_in(a);
    a.query = heads_of(query);
    a.key = heads_of(key);
    a.value = heads_of(value);
  }

  // Where each query's keys begin and end, and its own place: given, or a window around it.
  void take_spans(const std::optional<Tensor>& given, const AttentionOptions& options) {
    Attention& a = arguments;
    const int64_t L = a.queries;
    spans.resize(size_t(3 * L));
    int64_t *begin = spans.data(), *end = begin + L, *place = end + L;
    if (given.has_value()) {
      STD_TORCH_CHECK(given->dim() == 2 && given->size(0) == 3 && given->size(1) == L &&
                          given->scalar_type() == ScalarType::Long,
                      "expected spans (3, L) of int64");
      const Tensor contiguous = torch::stable::contiguous(*given);
      memcpy(begin, contiguous.const_data_ptr(), spans.size() * sizeof(int64_t));
    }
    int64_t first = 0, last = 0;
    for (int64_t i = 0; i < L; ++i) {
      if (!given.has_value()) {
        place[i] = i + options.offset;
        begin[i] = place[i] - options.left;
        end[i] = place[i] + options.right + 1;
      }
      // Within the keys there are, and never falling.
      begin[i] = first = std::clamp<int64_t>(begin[i], first, a.keys);
      end[i] = last = std::clamp<int64_t>(end[i], std::max(first, last), a.keys);
    }
    a.begin = begin;
    a.end = end;
    a.place = place;
  }
};

template <class Arguments>
void run_attention(const PhasedKernel<Arguments>& kernel, const Arguments& a, const Tensor& like) {
  const double work = double(a.batch * a.query_heads) * double(a.queries) * double(a.keys) *
                      double(a.head_dim + a.value_dim);
  Phases<Arguments>(kernel, a, work, like).run(a);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_forward_cpu(
    Tensor query, Tensor key, Tensor value, std::optional<Tensor> mask,
    std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks, std::optional<Tensor> spans,
    std::optional<Tensor> seeds, int64_t left, int64_t right, int64_t offset, double scale,
    double softcap, double dropout_p) {
  prepare({&query, &key, &value});
  const DType dtype = dtype_of(query);
  const AttentionTensors tensors(query, key, value, mask, alibi_slopes, sinks, spans, seeds,
                                 {left, right, offset, scale, softcap, dropout_p});
  AttentionForward arguments;
  static_cast<Attention&>(arguments) = tensors.arguments;
  Tensor output = new_heads(query, value.size(3));
  Tensor rounding =
      new_heads(query, accumulator_of(dtype) == query.scalar_type() ? 0 : value.size(3));
  const auto per_row = [&] {
    return torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)},
                                    accumulator_of(dtype));
  };
  Tensor lse = per_row(), row_max = per_row(), row_sum = per_row();
  arguments.threads = torch::stable::get_num_threads();
  arguments.output = heads_of_result(output);
  arguments.rounding = heads_of_result(rounding);
  arguments.lse = lse.mutable_data_ptr();
  arguments.row_max = row_max.mutable_data_ptr();
  arguments.row_sum = row_sum.mutable_data_ptr();
  run_attention(active_kernels().attention_forward[dtype], arguments, query);
  return {output, lse, rounding, row_max, row_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    Tensor grad_output, std::optional<Tensor> grad_lse, Tensor query, Tensor key, Tensor value,
    std::optional<Tensor> mask, std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks,
    std::optional<Tensor> spans, std::optional<Tensor> seeds, Tensor output, Tensor rounding,
    Tensor row_max, Tensor row_sum, int64_t left, int64_t right, int64_t offset, double scale,
    double softcap, double dropout_p, bool of_mask) {
  prepare({&query, &key, &value, &grad_output, &output, &rounding});
  const DType dtype = dtype_of(query);
  const AttentionTensors tensors(query, key, value, mask, alibi_slopes, sinks, spans, seeds,
                                 {left, right, offset, scale, softcap, dropout_p});
  AttentionBackward arguments;
  static_cast<Attention&>(arguments) = tensors.arguments;
  const ScalarType accumulator = accumulator_of(dtype);
  const int64_t B = query.size(0), H = query.size(1), L = query.size(2);
  check_outputs(query, value, grad_output, output, rounding);
  STD_TORCH_CHECK(!of_mask || (mask.has_value() && mask->scalar_type() != ScalarType::Bool),
                  "expected an additive attn_mask, whose gradient is asked for");
  Tensor grad_query = new_heads(query, query.size(3));
  Tensor grad_key = new_heads(key, key.size(3));
  Tensor grad_value = new_heads(value, value.size(3));
  Tensor grad_mask =
      of_mask
          ? torch::stable::new_empty(
                query, {mask->size(0), mask->size(1), mask->size(2), mask->size(3)}, accumulator)
          : torch::stable::new_empty(query, {B, 0}, accumulator);
  Tensor grad_sinks = sinks.has_value() ? torch::stable::new_empty(query, {B, H, L}, accumulator)
                                        : torch::stable::new_empty(query, {B, 0, 0}, accumulator);
  arguments.grad_output = heads_of(grad_output);
  arguments.output = heads_of(output);
  arguments.rounding = heads_of(rounding);
  arguments.grad_lse = grad_lse.has_value() ? rows_of(query, *grad_lse) : nullptr;
  arguments.row_max = rows_of(query, row_max);
  arguments.row_sum = rows_of(query, row_sum);
  arguments.grad_query = heads_of_result(grad_query);
  arguments.grad_key = heads_of_result(grad_key);
  arguments.grad_value = heads_of_result(grad_value);
  arguments.grad_mask = of_mask ? grad_mask.mutable_data_ptr() : nullptr;
  arguments.grad_sinks = sinks.has_value() ? grad_sinks.mutable_data_ptr() : nullptr;
  run_attention(active_kernels().attention_backward[dtype], arguments, query);
  return {grad_query, grad_key, grad_value, grad_mask, grad_sinks};
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fastgpt::attention_forward_cpu));
  m.impl("attention_backward", TORCH_BOX(&fastgpt::attention_backward_cpu));
  m.impl("cross_entropy_forward", TORCH_BOX(&fastgpt::cross_entropy_forward_cpu));
  m.impl("cross_entropy_backward", TORCH_BOX(&fastgpt::cross_entropy_backward_cpu));
  m.impl("cross_entropy_backward_in_place",
         TORCH_BOX(&fastgpt::cross_entropy_backward_in_place_cpu));
  m.impl("linear_cross_entropy_forward", TORCH_BOX(&fastgpt::linear_cross_entropy_forward_cpu));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&fastgpt::linear_cross_entropy_backward_cpu));
  m.impl("cross_entropy_reduced", TORCH_BOX(&fastgpt::cross_entropy_reduced_cpu));
  m.impl("cross_entropy_reduced_backward", TORCH_BOX(&fastgpt::cross_entropy_reduced_backward_cpu));
}

// ---- the Python module: which instruction sets there are, and which one runs
// ----------------------

namespace {

PyObject* isas(PyObject*, PyObject*) {
  PyObject* names = PyTuple_New(fastgpt::isa_count());
  for (int i = 0; names != nullptr && i < fastgpt::isa_count(); ++i) {
    PyTuple_SetItem(names, i, PyUnicode_FromString(fastgpt::isa_at(i).isa));
  }
  return names;
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(fastgpt::active_kernels().isa); }

PyObject* set_isa(PyObject*, PyObject* name) {
  PyObject* utf8 = PyUnicode_AsUTF8String(name);
  if (utf8 == nullptr) return nullptr;
  const char* text = PyBytes_AsString(utf8);
  const bool found = text != nullptr && fastgpt::set_active_isa(text);
  Py_DECREF(utf8);
  if (!found) {
    return PyErr_Format(PyExc_ValueError, "this processor cannot run the instruction set %R", name);
  }
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"isas", isas, METH_NOARGS, "The instruction sets this processor can run, slowest first."},
    {"isa", isa, METH_NOARGS, "The instruction set that runs."},
    {"set_isa", set_isa, METH_O, "Choose the instruction set by name, for the whole process."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C",
                      "The CPU kernels of fastgpt.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
