// The operators' CUDA kernels: checks, allocation, and the stream. With FASTGPT_TWIN the same for
// the host twin, as operators of their own that take CPU tensors.

#include <Python.h>

#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>
#include <type_traits>

#include "../cross_entropy_tensors.h"
#include "cross_entropy_launch.h"
#include "device.h"
#ifdef FASTGPT_TWIN
#include "launch.h"
#endif

namespace fastgpt::cuda {
namespace {

// aten::sum in float64, on the device.
Tensor sum_of(const Tensor& x) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(x), from(std::optional<ScalarType>(ScalarType::Double))};
  STD_TORCH_CHECK(
      torch_call_dispatcher("aten::sum", "", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
      "no memory for the sum of the weights");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

struct DeviceTensors : CrossEntropyTensors {
  std::optional<Tensor> total_weight;

  DeviceTensors(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight)
      : CrossEntropyTensors(logits, target, weight) {
    STD_TORCH_CHECK(classes < std::numeric_limits<int32_t>::max() / 2,
                    "expected fewer than 2^30 classes, got ", classes);
    check_device(target, "target");
    if (weight.has_value()) check_device(*weight, "weight");
  }

  void check_device(const Tensor& x, const char* name) const {
    STD_TORCH_CHECK(x.get_device_index() == logits.get_device_index() &&
                        x.device().type() == logits.device().type(),
                    "expected ", name, " on the device of the logits");
  }

  template <class Arguments>
  OnDevice<Arguments> arguments(const CrossEntropyOptions& options) {
    OnDevice<Arguments> a{};
    put_in(a);
    options.put_in(a);
    a.rows = rows;
    if constexpr (std::is_same_v<Arguments, CrossEntropyBackward>) {
      // Which smoothing needs. The forward sums what it reads itself.
      if (weight.has_value() && options.spread != 0 && !of_probabilities()) {
        total_weight = sum_of(*weight);
        a.total_weight_at = static_cast<const double*>(total_weight->const_data_ptr());
      }
    }
    return a;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor logits, Tensor target,
                                                   std::optional<Tensor> weight,
                                                   int64_t ignore_index, double hard, double spread,
                                                   double softcap, bool partial) {
  const Device device(logits);
  DeviceTensors tensors(logits, target, weight);
  const ScalarType accumulator = accumulator_of(tensors.dtype);
  const ScalarType wide = partial ? ScalarType::Double : accumulator;
  Tensor loss = tensors.per_row(wide), lse = tensors.per_row(wide);
  Tensor row_max = tensors.per_row(accumulator), rest = tensors.per_row(accumulator);
  ForwardArguments a =
      tensors.arguments<CrossEntropyForward>({ignore_index, hard, spread, softcap, partial});
  a.loss = loss.mutable_data_ptr();
  a.lse = lse.mutable_data_ptr();
  a.row_max = row_max.mutable_data_ptr();
  a.rest = rest.mutable_data_ptr();
  launches_of(tensors.dtype).forward(a, device.stream);
  return {loss, lse, row_max, rest};
}

Tensor backward(Tensor grad_loss, std::optional<Tensor> grad_lse, Tensor logits, Tensor target,
                std::optional<Tensor> weight, Tensor row_max, Tensor rest, int64_t ignore_index,
                double hard, double spread, double softcap, bool partial) {
  const Device device(logits);
  DeviceTensors tensors(logits, target, weight);
  BackwardArguments a =
      tensors.arguments<CrossEntropyBackward>({ignore_index, hard, spread, softcap, partial});
  tensors.put_in(a, grad_loss, grad_lse, row_max, rest);
  Tensor gradient = tensors.new_gradient();
  a.grad_logits = gradient.mutable_data_ptr();
  a.out = places_of(gradient);
  launches_of(tensors.dtype).backward(a, device.stream);
  return gradient;
}

void backward_in_place(Tensor grad_loss, std::optional<Tensor> grad_lse, Tensor logits,
                       Tensor target, std::optional<Tensor> weight, Tensor row_max, Tensor rest,
                       int64_t ignore_index, double hard, double spread, double softcap,
                       bool partial) {
  check_in_place(logits);
  const Device device(logits);
  DeviceTensors tensors(logits, target, weight);
  BackwardArguments a =
      tensors.arguments<CrossEntropyBackward>({ignore_index, hard, spread, softcap, partial});
  tensors.put_in(a, grad_loss, grad_lse, row_max, rest);
  a.grad_logits = logits.mutable_data_ptr();
  a.out = a.at;
  launches_of(tensors.dtype).backward(a, device.stream);
}

std::tuple<Tensor, Tensor> reduced(Tensor logits, Tensor target, std::optional<Tensor> weight,
                                   int64_t ignore_index, double hard, double spread,
                                   int64_t reduction) {
  const Device device(logits);
  DeviceTensors tensors(logits, target, weight);
  const CrossEntropyStatistics statistics = tensors.new_statistics();
  Tensor loss = tensors.new_loss(reduction);
  ForwardArguments a =
      tensors.arguments<CrossEntropyForward>({ignore_index, hard, spread, 0, false});
  statistics.put_in(a);
  if (reduction == kNone) a.loss = loss.mutable_data_ptr();
  launches_of(tensors.dtype).forward(a, device.stream);
  if (reduction == kNone) return {loss, statistics.tensor};
  LossesArguments sums{};
  sums.rows = tensors.rows, sums.positions = a.positions, sums.classes = a.classes;
  sums.losses = a.loss;
  sums.target = a.target, sums.target_outer = a.target_outer, sums.target_inner = a.target_inner;
  sums.ignore_index = ignore_index;
  sums.weight = a.weight;
  sums.loss = loss.mutable_data_ptr();
  if (reduction == kMean) sums.denominator = statistics.denominator();
  launch_sum_losses(tensors.dtype == kFloat64, sums, device.stream);
  return {loss, statistics.tensor};
}

Tensor reduced_backward(Tensor grad_loss, Tensor logits, Tensor target,
                        std::optional<Tensor> weight, Tensor statistics, int64_t ignore_index,
                        double hard, double spread, int64_t reduction) {
  const Device device(logits);
  DeviceTensors tensors(logits, target, weight);
  BackwardArguments a =
      tensors.arguments<CrossEntropyBackward>({ignore_index, hard, spread, 0, false});
  a.denominator = tensors.put_in(a, grad_loss, statistics, reduction);
  Tensor gradient = tensors.new_gradient();
  a.grad_logits = gradient.mutable_data_ptr();
  a.out = places_of(gradient);
  launches_of(tensors.dtype).backward(a, device.stream);
  return gradient;
}

#ifdef FASTGPT_TWIN
void set_largest_cluster(int64_t blocks) { largest_cluster_of_twin() = int(blocks); }
void set_hopper(bool on) { hopper_of_twin() = on; }
#endif

}  // namespace
}  // namespace fastgpt::cuda

#ifdef FASTGPT_TWIN
// To stand for a GPU without clusters, or with them; and for one that runs Hopper's kernels.
STABLE_TORCH_LIBRARY(fastgpt_twin_settings, m) {
  m.def("largest_cluster(int blocks) -> ()");
  m.def("hopper(bool on) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgpt_twin_settings, CompositeExplicitAutograd, m) {
  m.impl("largest_cluster", TORCH_BOX(&fastgpt::cuda::set_largest_cluster));
  m.impl("hopper", TORCH_BOX(&fastgpt::cuda::set_hopper));
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt_twin, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
#endif
  m.impl("cross_entropy_forward", TORCH_BOX(&fastgpt::cuda::forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&fastgpt::cuda::backward));
  m.impl("cross_entropy_backward_in_place", TORCH_BOX(&fastgpt::cuda::backward_in_place));
  m.impl("cross_entropy_reduced", TORCH_BOX(&fastgpt::cuda::reduced));
  m.impl("cross_entropy_reduced_backward", TORCH_BOX(&fastgpt::cuda::reduced_backward));
}

#ifndef FASTGPT_TWIN
namespace {
PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_cuda",
                      "The CUDA kernels of fastgpt.",
                      -1,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};
}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
#endif
