// The device of a call, and the stream of its kernels.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace fastgpt::cuda {

using torch::stable::Tensor;

// For the time of a call, the tensors' device is the current one, and `stream` its current stream,
// so that the kernels come in order with torch's own, and into a graph that is being captured.
class Device {
 public:
#ifdef FASTGPT_TWIN
  explicit Device(const Tensor&) {}
#else
  explicit Device(const Tensor& like) : guard_(like.get_device_index()) {
    STD_TORCH_CHECK(
        aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
        "torch has no CUDA stream for this device");
  }
#endif
  void* stream = nullptr;

 private:
#ifndef FASTGPT_TWIN
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

}  // namespace fastgpt::cuda
