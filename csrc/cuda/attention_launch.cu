#include "attention_launch.h"

#include <stdexcept>
#include <string>

namespace fastgpt::cuda {

const AttentionLaunches& attention_launches_of(DType dtype, int columns) {
  const bool bfloat = dtype == kBFloat16;
  if (!bfloat && dtype != kFloat16) throw std::runtime_error("expected bfloat16 or float16");
  if (columns <= 64) return bfloat ? attention_bfloat16_64 : attention_float16_64;
  if (columns <= 80) return bfloat ? attention_bfloat16_80 : attention_float16_80;
  if (columns <= 96) return bfloat ? attention_bfloat16_96 : attention_float16_96;
  if (columns <= 128) return bfloat ? attention_bfloat16_128 : attention_float16_128;
  if (columns <= kWidestHead) return bfloat ? attention_bfloat16_256 : attention_float16_256;
  throw std::runtime_error("expected heads of at most " + std::to_string(kWidestHead) +
                           " columns, got " + std::to_string(columns));
}

HopperPasses& hopper_passes(int width) {
  static HopperPasses of_64, of_128;
  return width == 64 ? of_64 : of_128;
}

}  // namespace fastgpt::cuda
