#include "cross_entropy.cuh"
#include "launch.h"

namespace fastgpt::cuda {

void launch_sum_losses(bool wide, const LossesArguments& a, void* stream) {
  const auto kernel = wide ? &sum_losses<double> : &sum_losses<float>;
  launch(kernel, Grid{1, kSumThreads, 1}, Stream(stream), a);
}

const Launches& launches_of(DType dtype) {
  static const Launches* const by_dtype[kDTypes] = {&float32_launches, &float64_launches,
                                                    &bfloat16_launches, &float16_launches};
  return *by_dtype[dtype];
}

}  // namespace fastgpt::cuda
