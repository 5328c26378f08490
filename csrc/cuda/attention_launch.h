// The launches of the attention kernels, for those who do not compile them.
#pragma once

#include <atomic>

#include "../cross_entropy.h"
#include "attention.h"

namespace fastgpt::cuda {

// The kernels for one storage type and for rows of up to `width` columns, each of which returns at
// once: the stream runs it later.
struct AttentionLaunches {
  void (*forward)(const AttentionForward&, void* stream);
  void (*backward)(const AttentionBackward&, void* stream);
};

constexpr int kWidestHead = 256;

// Of bfloat16 or float16, for the narrowest width that is enough.
const AttentionLaunches& attention_launches_of(DType dtype, int columns);

// Which passes run Hopper's kernels where the GPU has code of theirs and TMA can copy the tensors;
// all else runs Ampere's. For the whole process, since only one kind of GPU has such code.
struct HopperPasses {
  std::atomic<bool> forward{true}, backward{true};
};

HopperPasses& hopper_passes(int width);  // 64 or 128: Hopper has no kernels for other heads

#define FASTGPT_OF_ATTENTION(type)                                             \
  extern const AttentionLaunches attention_##type##_64, attention_##type##_80, \
      attention_##type##_96, attention_##type##_128, attention_##type##_256
FASTGPT_OF_ATTENTION(bfloat16);
FASTGPT_OF_ATTENTION(float16);
#undef FASTGPT_OF_ATTENTION

}  // namespace fastgpt::cuda
