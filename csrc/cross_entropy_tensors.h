// Tensors of a cross-entropy call, checked, as the arguments of the kernels of any device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "cross_entropy.h"

namespace fastgpt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
  return kFloat32;
}

inline ScalarType accumulator_of(DType dtype) {
  return dtype == kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline Tensor new_strided(const Tensor& like, const std::vector<int64_t>& sizes,
                          const std::vector<int64_t>& strides) {
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{from(like),         from(sizes),        from(strides),
                                    from(std::nullopt), from(std::nullopt), from(std::nullopt),
                                    from(std::nullopt)};
  STD_TORCH_CHECK(torch_call_dispatcher("aten::new_empty_strided", "", stack.data(),
                                        TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
                  "no memory for a result of ", sizes.size(), " dimensions");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// ---- where rows lie ----

// Whether a row's classes lie apart and the positions of a sequence, or the rows, together.
inline bool by_columns(const Tensor& x) {
  return x.size(1) != 1 && x.stride(1) != 1 && x.dim() == 3 && x.stride(2) == 1;
}

// A plain tensor of N x L rows and how they lie, of (N, C) or (N, C, L).
inline Places places_of(const Tensor& x) {
  return {x.stride(0), x.dim() == 3 ? x.stride(2) : 0, x.stride(1)};
}

inline int64_t positions_of(const Tensor& x) { return x.dim() == 3 ? x.size(2) : 1; }

// The kernels read a row with unit stride, or neighbouring positions with unit stride. Other logits
// are copied: vmap and torch's zero tensors bring some.
inline bool readable(const Tensor& x) {
  return x.size(1) == 1 || x.stride(1) == 1 || by_columns(x);
}

inline Upstream upstream_of(const Tensor& g) {
  return {g.const_data_ptr(), g.stride(0), g.dim() == 2 ? g.stride(1) : 0};
}

// ---- with the reduction, for fastgpt/ops/cross_entropy_direct.py ----

enum Reduction { kNone = 0, kMean = 1, kSum = 2 };

// One tensor for what the backward needs of the rows, and for what the forward needs room: row_max,
// rest, lse and loss, a number for each row, and what a mean is divided by.
struct CrossEntropyStatistics {
  Tensor tensor;
  int64_t rows;

  static int64_t size(int64_t rows) { return 4 * rows + 1; }

  void* at(int64_t which) const {
    char* base = static_cast<char*>(tensor.mutable_data_ptr());
    return base + which * rows * int64_t(tensor.element_size());
  }
  void* row_max() const { return at(0); }
  void* rest() const { return at(1); }
  void* lse() const { return at(2); }
  void* loss() const { return at(3); }
  void* denominator() const { return at(4); }

  void put_in(CrossEntropyForward& a) const {
    a.row_max = row_max(), a.rest = rest(), a.lse = lse(), a.loss = loss();
  }
};

// ---- a call ----

inline void check_in_place(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2 || logits.dim() == 3, "expected logits (N, C) or (N, C, L)");
  STD_TORCH_CHECK(readable(logits), "expected logits whose classes or positions lie together");
}

// The raw operators' arguments after the tensors.
struct CrossEntropyOptions {
  int64_t ignore_index;
  double hard, spread, softcap;
  bool partial;

  void put_in(CrossEntropy& a) const {
    a.ignore_index = ignore_index;
    a.hard = hard, a.spread = spread, a.softcap = softcap;
    a.partial = partial;
  }
};

// The tensors, checked but for what the targets are, and held for as long as the kernels' pointers
// are used.
struct CrossEntropyTensors {
  Tensor logits, target;
  std::optional<Tensor> weight;
  DType dtype;
  int64_t positions, classes, rows;

  CrossEntropyTensors(const Tensor& logits_in, const Tensor& target_in,
                      const std::optional<Tensor>& weight_in)
      : logits(logits_in), target(target_in), weight(weight_in) {
    STD_TORCH_CHECK(logits.dim() == 2 || logits.dim() == 3, "expected logits (N, C) or (N, C, L)");
    classes = logits.size(1), positions = positions_of(logits);
    rows = logits.size(0) * positions;
    STD_TORCH_CHECK(classes > 0, "expected at least one class");
    dtype = dtype_of(logits);
    if (!readable(logits)) logits = torch::stable::contiguous(logits);
    if (of_probabilities()) {
      STD_TORCH_CHECK(target.dim() == logits.dim() && target.size(0) == logits.size(0) &&
                          target.size(1) == classes && positions_of(target) == positions,
                      "expected probabilities of the shape of the logits");
      STD_TORCH_CHECK(target.scalar_type() == logits.scalar_type() ||
                          target.scalar_type() == accumulator_of(dtype),
                      "expected probabilities of the logits' or the accumulator type");
      if (by_columns(logits) ? target.stride(2) != 1 : target.stride(1) != 1 && classes != 1) {
        target = like_logits(target);
      }
    } else {
      STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "expected int64 target");
      STD_TORCH_CHECK(target.dim() == logits.dim() - 1 && target.size(0) == logits.size(0) &&
                          (target.dim() == 1 || target.size(1) == positions),
                      "expected logits (N, C) and target (N,), or (N, C, L) and (N, L)");
    }
    if (weight.has_value()) {
      STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == classes &&
                          weight->scalar_type() == accumulator_of(dtype),
                      "expected weight of shape (C,) in the accumulator type");
      *weight = torch::stable::contiguous(*weight);
    }
  }

  bool of_probabilities() const { return target.scalar_type() != ScalarType::Long; }

  // A result for each row: (N,) or (N, L).
  Tensor per_row(ScalarType type) const {
    std::vector<int64_t> shape{logits.size(0)};
    if (logits.dim() == 3) shape.push_back(positions);
    return torch::stable::new_empty(logits, shape, type);
  }

  // The loss of a reduction.
  Tensor new_loss(int64_t reduction) const {
    const ScalarType type = accumulator_of(dtype);
    return reduction == kNone ? per_row(type) : torch::stable::new_empty(logits, {}, type);
  }

  CrossEntropyStatistics new_statistics() const {
    return {torch::stable::new_empty(logits, {CrossEntropyStatistics::size(rows)},
                                     accumulator_of(dtype)),
            rows};
  }

  // A dense gradient, its rows or columns as those of the logits.
  Tensor new_gradient() const {
    return logits.dim() == 2 || logits.stride(1) != 1
               ? torch::stable::new_empty(logits, logits.sizes())
               : new_strided(logits, {logits.size(0), classes, positions},
                             {classes * positions, 1, classes});
  }

  // But for the sum of the weights.
  void put_in(CrossEntropy& a) const {
    a.logits = logits.const_data_ptr();
    a.at = places_of(logits);
    a.by_columns = by_columns(logits);
    a.positions = positions;
    a.classes = classes;
    if (of_probabilities()) {
      a.probabilities = target.const_data_ptr();
      a.probability_at = places_of(target);
      a.probabilities_wide = target.scalar_type() != logits.scalar_type();
    } else {
      a.target = static_cast<const int64_t*>(target.const_data_ptr());
      a.target_outer = target.stride(0);
      a.target_inner = target.dim() == 2 ? target.stride(1) : 0;
    }
    if (weight.has_value()) a.weight = weight->const_data_ptr();
  }

  // What a backward is told of the loss, checked.
  void put_in(CrossEntropyBackward& a, const Tensor& grad_loss,
              const std::optional<Tensor>& grad_lse, const Tensor& row_max,
              const Tensor& rest) const {
    const Tensor* each[] = {&grad_loss, &row_max, &rest, grad_lse.has_value() ? &*grad_lse : &rest};
    for (const Tensor* v : each) {
      STD_TORCH_CHECK(v->dim() == logits.dim() - 1 && v->size(0) == logits.size(0) &&
                          (v->dim() == 1 || v->size(1) == positions) &&
                          v->scalar_type() == accumulator_of(dtype),
                      "expected grad_loss, grad_lse, row_max and rest of the shape of the "
                      "unreduced loss in the accumulator type");
    }
    STD_TORCH_CHECK(row_max.is_contiguous() && rest.is_contiguous(),
                    "expected contiguous row_max and rest");
    a.grad_loss = upstream_of(grad_loss);
    if (grad_lse.has_value()) a.grad_lse = upstream_of(*grad_lse);
    a.row_max = row_max.const_data_ptr();
    a.rest = rest.const_data_ptr();
  }

  // The same of a reduced loss. Returns the denominator of a mean, or null.
  const void* put_in(CrossEntropyBackward& a, const Tensor& grad_loss, const Tensor& statistics,
                     int64_t reduction) const {
    STD_TORCH_CHECK(statistics.numel() == CrossEntropyStatistics::size(rows) &&
                        statistics.is_contiguous() &&
                        statistics.scalar_type() == accumulator_of(dtype) &&
                        grad_loss.scalar_type() == statistics.scalar_type(),
                    "expected grad_loss and the forward's statistics in the accumulator type");
    const CrossEntropyStatistics saved{statistics, rows};
    a.row_max = saved.row_max();
    a.rest = saved.rest();
    a.grad_loss =
        reduction == kNone ? upstream_of(grad_loss) : Upstream{grad_loss.const_data_ptr(), 0, 0};
    return reduction == kMean ? saved.denominator() : nullptr;
  }

 private:
  // Rows of unit stride if the logits are so, else columns.
  Tensor like_logits(const Tensor& x) const {
    if (by_columns(logits) || x.dim() == 2) return torch::stable::contiguous(x);
    return torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(x, 1, 2)), 1,
                                    2);
  }
};

}  // namespace fastgpt
