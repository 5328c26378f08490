// Tensors of an attention call, checked, as the arguments of the kernels of any device.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "cross_entropy_tensors.h"

namespace fastgpt {

// The kernels read rows of unit stride. vmap, transposes and expanded upstream gradients bring
// others.
inline Tensor with_unit_columns(const Tensor& x) {
  return x.size(3) == 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

// Rows of unit stride, for the kernels, of tensors of four dimensions.
inline void prepare(std::initializer_list<Tensor*> tensors) {
  for (Tensor* x : tensors) {
    STD_TORCH_CHECK(x->dim() == 4, "expected tensors of four dimensions, (B, heads, N, columns)");
    *x = with_unit_columns(*x);
  }
}

// (B, H, N, columns), in memory as (B, N, H, columns): what a model makes of it next is a view. Not
// the transpose of a new tensor, which autograd would take for a view of somebody's.
inline Tensor new_heads(const Tensor& heads, int64_t columns) {
  const int64_t B = heads.size(0), H = heads.size(1), N = heads.size(2);
  return new_strided(heads, {B, H, N, columns}, {N * H * columns, columns, H * columns, 1});
}

inline void check_heads(const Tensor& query, const Tensor& key, const Tensor& value) {
  STD_TORCH_CHECK(key.size(0) == query.size(0) && value.size(0) == query.size(0) &&
                      key.size(1) == value.size(1) && key.size(1) > 0 &&
                      query.size(1) % key.size(1) == 0 && key.size(2) == value.size(2) &&
                      key.size(3) == query.size(3),
                  "expected query (B, Hq, L, D), key (B, H, S, D) and value (B, H, S, Dv), Hq a "
                  "multiple of H");
  STD_TORCH_CHECK(
      key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
      "expected query, key and value of one type");
  STD_TORCH_CHECK(query.numel() > 0 && key.numel() > 0 && value.numel() > 0,
                  "expected query, key and value that are not empty");
}

// A number for each head, (B or 1, Hq): the data, contiguous, and the stride of a sequence.
struct OfHeads {
  std::optional<Tensor> kept;
  const void* data = nullptr;
  int64_t batch = 0;

  OfHeads(const char* name, const std::optional<Tensor>& x, const Tensor& query) {
    if (!x.has_value()) return;
    STD_TORCH_CHECK(x->dim() == 2 && (x->size(0) == 1 || x->size(0) == query.size(0)) &&
                        x->size(1) == query.size(1) &&
                        x->scalar_type() == accumulator_of(dtype_of(query)),
                    "expected ", name, " (B or 1, Hq) in the accumulator type");
    kept = torch::stable::contiguous(*x);
    data = kept->const_data_ptr();
    batch = x->size(0) == 1 ? 0 : x->size(1);
  }
};

// The raw operators' arguments after the tensors, in order.
struct AttentionOptions {
  int64_t left, right, offset;
  double scale, softcap, dropout_p;
};

// Which weights stay: the seeds (B,), contiguous, or none.
struct Dropout {
  std::optional<Tensor> seeds;
  uint32_t drop_below = 0;
  double rescale = 1;

  Dropout(const std::optional<Tensor>& given, const Tensor& query, double dropout_p) {
    if (!given.has_value()) return;
    STD_TORCH_CHECK(given->dim() == 1 && given->size(0) == query.size(0) &&
                        given->scalar_type() == ScalarType::Long,
                    "expected seeds (B,) of int64");
    STD_TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1, "expected a dropout_p between 0 and 1");
    seeds = torch::stable::contiguous(*given);
    // As fastgpt/ops/dropout.py: to the nearest, to even.
    const double below = std::nearbyint(dropout_p * 4294967296.0);
    drop_below = uint32_t(std::min(below, 4294967295.0));
    rescale = dropout_p < 1 ? 1 / (1 - dropout_p) : 0;
  }

  template <class Attention>
  void put_in(Attention& a) const {
    if (seeds.has_value()) a.seeds = static_cast<const int64_t*>(seeds->const_data_ptr());
    a.drop_below = drop_below;
    a.rescale = decltype(a.rescale)(rescale);
  }
};

// Of the backward: what came out of the forward, and the gradient of it.
inline void check_outputs(const Tensor& query, const Tensor& value, const Tensor& grad_output,
                          const Tensor& output, const Tensor& rounding) {
  const bool rounded = accumulator_of(dtype_of(query)) != query.scalar_type();
  const Tensor* outputs[] = {&grad_output, &output, &rounding};
  for (const Tensor* x : outputs) {
    const int64_t columns = x != &rounding || rounded ? value.size(3) : 0;
    STD_TORCH_CHECK(x->size(0) == query.size(0) && x->size(1) == query.size(1) &&
                        x->size(2) == query.size(2) && x->size(3) == columns &&
                        x->scalar_type() == query.scalar_type(),
                    "expected grad_output, output and, of 16-bit types, rounding (B, Hq, L, Dv) of "
                    "query's type");
  }
}

// A number for each query, made contiguous.
inline const void* rows_of(const Tensor& query, Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == query.size(0) && x.size(1) == query.size(1) &&
                      x.size(2) == query.size(2) &&
                      x.scalar_type() == accumulator_of(dtype_of(query)),
                  "expected grad_lse, row_max and row_sum (B, Hq, L) in the accumulator type");
  x = torch::stable::contiguous(x);
  return x.const_data_ptr();
}

}  // namespace fastgpt
