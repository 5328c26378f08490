#include "attention_launch.h"

#include <stdexcept>
#include <string>

namespace fastgpt::cuda {

namespace {

constexpr int kWidths[] = {64, 80, 96, 128, kWidestHead};
constexpr int kWidthCount = sizeof(kWidths) / sizeof(kWidths[0]);

// Of the narrowest one that is enough.
int width_index(int columns) {
  for (int i = 0; i < kWidthCount; ++i)
    if (columns <= kWidths[i]) return i;
  throw std::runtime_error("expected heads of at most " + std::to_string(kWidestHead) +
                           " columns, got " + std::to_string(columns));
}

}  // namespace

const AttentionLaunches& attention_launches_of(DType dtype, int columns) {
  static const AttentionLaunches* const bfloat[] = {&attention_bfloat16_64, &attention_bfloat16_80,
                                                    &attention_bfloat16_96, &attention_bfloat16_128,
                                                    &attention_bfloat16_256};
  static const AttentionLaunches* const half[] = {&attention_float16_64, &attention_float16_80,
                                                  &attention_float16_96, &attention_float16_128,
                                                  &attention_float16_256};
  if (dtype != kBFloat16 && dtype != kFloat16)
    throw std::runtime_error("expected bfloat16 or float16");
  return *(dtype == kBFloat16 ? bfloat : half)[width_index(columns)];
}

HopperPasses& hopper_passes(int width) {
  static HopperPasses passes[kWidthCount];
  return passes[width_index(width)];
}

}  // namespace fastgpt::cuda
