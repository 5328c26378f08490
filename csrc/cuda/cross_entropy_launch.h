// The launches of the cross-entropy kernels, for those who do not compile them.
#pragma once

#include "../cross_entropy.h"

namespace fastgpt::cuda {

// Of a call, by value. Classes are fewer than 2^31.
template <class Arguments>
struct OnDevice : Arguments {
  int64_t rows;  // N L
  // The sum of the weights, which is not on the host as `total_weight` is; null: of 1 each.
  const double* total_weight_at;
  // The accumulator type: what `grad_loss` is divided by; or null.
  const void* denominator;
};
using ForwardArguments = OnDevice<CrossEntropyForward>;
using BackwardArguments = OnDevice<CrossEntropyBackward>;

struct LossesArguments {
  int64_t rows, positions, classes;
  const void* losses;  // (rows,) accumulator type
  const int64_t* target;
  int64_t target_outer, target_inner;
  int64_t ignore_index;
  const void* weight;  // (classes,) accumulator type, or null
  void* loss;          // accumulator type: the sum, or the mean if there is a denominator
  void* denominator;   // accumulator type: of the mean; or null
};

// The kernels for one storage type, each of which returns at once: the stream runs it later.
struct Launches {
  void (*forward)(const ForwardArguments&, void* stream);
  void (*backward)(const BackwardArguments&, void* stream);
};
const Launches& launches_of(DType dtype);
extern const Launches float32_launches, float64_launches, bfloat16_launches, float16_launches;

// `wide`: whether the accumulator type is double.
void launch_sum_losses(bool wide, const LossesArguments&, void* stream);

}  // namespace fastgpt::cuda
