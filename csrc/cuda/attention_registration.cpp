// Attention's CUDA kernels as operators, and in the host twin as operators of its own; see
// registration.cpp.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../attention_tensors.h"
#include "attention_launch.h"
#include "device.h"

namespace fastgpt::cuda {
namespace {

constexpr int64_t kLongest = 1 << 30;  // sequence

template <class Void>
Heads<Void> heads_of(Void* data, const Tensor& x) {
  int64_t strides[3];
  bool vectors = reinterpret_cast<uintptr_t>(data) % 16 == 0 && x.size(3) % 8 == 0;
  for (int64_t dim = 0; dim < 3; ++dim) {
    strides[dim] = x.size(dim) == 1 ? 0 : x.stride(dim);  // that of a single one may be anything
    vectors &= strides[dim] % 8 == 0;
  }
  return {data, strides[0], strides[1], strides[2], vectors};
}
Heads<const void> heads_of(const Tensor& x) { return heads_of(x.const_data_ptr(), x); }
Heads<void> heads_of_result(const Tensor& x) { return heads_of(x.mutable_data_ptr(), x); }

// For kernels that copy in boxes: what has none is copied before, so that a view has the bits of
// its copy.
void put_boxes(Tensor& x, Heads<const void>& heads) {
  if (has_boxes(heads, x.size(0), x.size(1), x.size(2))) return;
  Tensor copy = new_heads(x, x.size(3));
  torch::stable::copy_(copy, x);
  x = copy;
  heads = heads_of(x);
}

// The arguments of a call, with the memory that they point to.
struct AttentionTensors {
  OfHeads slopes, sinks;
  std::optional<Tensor> spans;
  Dropout dropout;
  Attention arguments;

  AttentionTensors(const Tensor& query, const Tensor& key, const Tensor& value,
                   const std::optional<Tensor>& mask, const std::optional<Tensor>& alibi_slopes,
                   const std::optional<Tensor>& sink_logits,
                   const std::optional<Tensor>& given_spans,
                   const std::optional<Tensor>& given_seeds, const AttentionOptions& options)
      : slopes("alibi_slopes", alibi_slopes, query),
        sinks("sinks", sink_logits, query),
        spans(given_spans),
        dropout(given_seeds, query, options.dropout_p),
        arguments{} {
    check_heads(query, key, value);
    for (const Tensor* x : {&query, &key, &value}) check_device(query, *x);
    for (const auto* x : {&mask, &alibi_slopes, &sink_logits, &given_spans, &given_seeds}) {
      if (x->has_value()) check_device(query, **x);
    }
    const DType dtype = dtype_of(query);
    STD_TORCH_CHECK(dtype == kBFloat16 || dtype == kFloat16,
                    "expected query, key and value of bfloat16 or float16");
    STD_TORCH_CHECK(!mask.has_value(), "expected no attn_mask: the CUDA kernels have none");
    STD_TORCH_CHECK(query.size(3) <= kWidestHead && value.size(3) <= kWidestHead,
                    "expected heads of at most ", kWidestHead, " columns, got ", query.size(3),
                    " and ", value.size(3));
    STD_TORCH_CHECK(query.size(2) < kLongest && key.size(2) < kLongest &&
                        query.size(0) * query.size(1) < kLongest,
                    "expected fewer than 2^30 queries and keys, and heads of all sequences");
    Attention& a = arguments;
    a.batch = int(query.size(0));
    a.query_heads = int(query.size(1));
    a.heads = int(key.size(1));
    a.group = a.query_heads / a.heads;
    a.queries = int(query.size(2));
    a.keys = int(key.size(2));
    a.head_dim = int(query.size(3));
    a.value_dim = int(value.size(3));
    a.query = heads_of(query);
    a.key = heads_of(key);
    a.value = heads_of(value);
    take_spans(options);
    take_scale(options);
    dropout.put_in(a);
  }

 private:
  static void check_device(const Tensor& query, const Tensor& x) {
    STD_TORCH_CHECK(x.get_device_index() == query.get_device_index() &&
                        x.device().type() == query.device().type(),
                    "expected all tensors on query's device");
  }

  void take_spans(const AttentionOptions& options) {
    Attention& a = arguments;
    if (spans.has_value()) {
      STD_TORCH_CHECK(spans->dim() == 2 && spans->size(0) == 3 && spans->size(1) == a.queries &&
                          spans->scalar_type() == ScalarType::Long,
                      "expected spans (3, L) of int64");
      spans = torch::stable::contiguous(*spans);
      a.spans = static_cast<const int64_t*>(spans->const_data_ptr());
    }
    a.before = options.offset - options.left;
    a.after = options.offset + options.right + 1;
    a.offset = options.offset;
    a.hides = a.spans || a.before + a.queries - 1 > 0 || a.after < a.keys;
  }

  void take_scale(const AttentionOptions& options) {
    Attention& a = arguments;
    constexpr double log2e = 1.4426950408889634;
    a.slopes = static_cast<const float*>(slopes.data);
    a.slopes_batch = slopes.batch;
    a.sinks = static_cast<const float*>(sinks.data);
    a.sinks_batch = sinks.batch;
    a.softcap = options.softcap;
    a.scale = float(options.scale);
    // A sink is put in units of the scale, which must leave it finite.
    constexpr double least = 1e-6;
    a.scaled =
        options.softcap != 0 || slopes.data || !(options.scale > (sinks.data ? least : 1e-30));
    a.unit = a.scaled ? 1 : a.scale;
    a.factor = float((a.scaled ? 1 : options.scale) * log2e);
  }
};

int columns_of(const Attention& a) { return std::max(a.head_dim, a.value_dim); }

Tensor new_rows(const Tensor& query) {
  return torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)},
                                  ScalarType::Float);
}

float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    Tensor query, Tensor key, Tensor value, std::optional<Tensor> mask,
    std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks, std::optional<Tensor> spans,
    std::optional<Tensor> seeds, int64_t left, int64_t right, int64_t offset, double scale,
    double softcap, double dropout_p) {
  const Device device(query);
  prepare({&query, &key, &value});
  const AttentionTensors tensors(query, key, value, mask, alibi_slopes, sinks, spans, seeds,
                                 {left, right, offset, scale, softcap, dropout_p});
  AttentionForward a{};
  static_cast<Attention&>(a) = tensors.arguments;
  Tensor output = new_heads(query, value.size(3)), rounding = new_heads(query, value.size(3));
  Tensor lse = new_rows(query), row_max = new_rows(query), row_sum = new_rows(query);
  a.output = heads_of_result(output);
  a.rounding = heads_of_result(rounding);
  a.lse = floats(lse);
  a.row_max = floats(row_max);
  a.row_sum = floats(row_sum);
  const AttentionLaunches& launches = attention_launches_of(dtype_of(query), columns_of(a));
  const bool in_boxes = launches.forward_in_boxes(a);
  if (in_boxes) {
    put_boxes(query, a.query);
    put_boxes(key, a.key);
    put_boxes(value, a.value);
  }
  launches.forward(a, in_boxes, device.stream);
  return {output, lse, rounding, row_max, row_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_output, std::optional<Tensor> grad_lse, Tensor query, Tensor key, Tensor value,
    std::optional<Tensor> mask, std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks,
    std::optional<Tensor> spans, std::optional<Tensor> seeds, Tensor output, Tensor rounding,
    Tensor row_max, Tensor row_sum, int64_t left, int64_t right, int64_t offset, double scale,
    double softcap, double dropout_p, bool) {
  const Device device(query);
  prepare({&query, &key, &value, &grad_output, &output, &rounding});
  const AttentionTensors tensors(query, key, value, mask, alibi_slopes, sinks, spans, seeds,
                                 {left, right, offset, scale, softcap, dropout_p});
  check_outputs(query, value, grad_output, output, rounding);
  AttentionBackward a{};
  static_cast<Attention&>(a) = tensors.arguments;
  Tensor grad_query = new_heads(query, query.size(3)), grad_key = new_heads(key, key.size(3));
  Tensor grad_value = new_heads(value, value.size(3));
  Tensor delta = new_rows(query), inverse = new_rows(query);
  const int64_t B = query.size(0);
  Tensor grad_mask = torch::stable::new_empty(query, {B, 0}, ScalarType::Float);
  Tensor grad_sinks = sinks.has_value()
                          ? new_rows(query)
                          : torch::stable::new_empty(query, {B, 0, 0}, ScalarType::Float);
  a.grad_output = heads_of(grad_output);
  a.output = heads_of(output);
  a.rounding = heads_of(rounding);
  if (grad_lse.has_value()) a.grad_lse = static_cast<const float*>(rows_of(query, *grad_lse));
  a.row_max = static_cast<const float*>(rows_of(query, row_max));
  a.row_sum = static_cast<const float*>(rows_of(query, row_sum));
  a.row_delta = floats(delta);
  a.row_inverse = floats(inverse);
  // A single key has the weight 1 whatever its score is.
  const bool certain = a.keys == 1 && !sinks.has_value() && !grad_lse.has_value();
  a.slope = certain ? 0 : a.scale;
  a.grad_query = heads_of_result(grad_query);
  a.grad_key = heads_of_result(grad_key);
  a.grad_value = heads_of_result(grad_value);
  if (sinks.has_value()) a.grad_sinks = floats(grad_sinks);
  const AttentionLaunches& launches = attention_launches_of(dtype_of(query), columns_of(a));
  const bool in_boxes = launches.backward_in_boxes(a);
  if (in_boxes) {
    put_boxes(query, a.query);
    put_boxes(key, a.key);
    put_boxes(value, a.value);
    put_boxes(grad_output, a.grad_output);
    put_boxes(output, a.output);
    put_boxes(rounding, a.rounding);
  }
  launches.backward(a, in_boxes, device.stream);
  return {grad_query, grad_key, grad_value, grad_mask, grad_sinks};
}

void set_hopper_passes(int64_t width, bool forward, bool backward) {
  HopperPasses& passes = hopper_passes(int(width));
  passes.forward = forward;
  passes.backward = backward;
}

}  // namespace
}  // namespace fastgpt::cuda

#ifdef FASTGPT_TWIN
#define FASTGPT_SETTINGS fastgpt_twin_settings
#else
#define FASTGPT_SETTINGS fastgpt_settings
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(FASTGPT_SETTINGS, m) {
  m.def("hopper_passes(int width, bool forward, bool backward) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(FASTGPT_SETTINGS, CompositeExplicitAutograd, m) {
  m.impl("hopper_passes", TORCH_BOX(&fastgpt::cuda::set_hopper_passes));
}

#ifdef FASTGPT_TWIN
STABLE_TORCH_LIBRARY_IMPL(fastgpt_twin, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
#endif
  m.impl("attention_forward", TORCH_BOX(&fastgpt::cuda::forward));
  m.impl("attention_backward", TORCH_BOX(&fastgpt::cuda::backward));
}
