// The launches of the attention kernels, for those who do not compile them.
#pragma once

#include <atomic>

#include "../cross_entropy.h"
#include "attention.h"

namespace fastgpt::cuda {

// Whether a tensor can be copied in boxes: rows of whole vectors, and nothing is repeated.
inline bool has_boxes(const Heads<const void>& x, int64_t batch, int64_t heads, int64_t rows) {
  return x.vectors && (batch == 1 || x.batch > 0) && (heads == 1 || x.head > 0) &&
         (rows == 1 || x.row > 0);
}

// The kernels for one storage type and for rows of up to `width` columns. A launch returns at once:
// the stream runs it later. Those in boxes, where the current device has them and they are switched
// on, demand of every tensor that it has some.
struct AttentionLaunches {
  bool (*forward_in_boxes)(const AttentionForward&);
  void (*forward)(const AttentionForward&, bool in_boxes, void* stream);
  bool (*backward_in_boxes)(const AttentionBackward&);
  void (*backward)(const AttentionBackward&, bool in_boxes, void* stream);
};

constexpr int kWidestHead = 256;

// Of bfloat16 or float16, for the narrowest width that is enough.
const AttentionLaunches& attention_launches_of(DType dtype, int columns);

// Which passes run Hopper's kernels where the GPU has code of theirs; all else runs Ampere's. For
// the whole process, since only one kind of GPU has such code.
struct HopperPasses {
  std::atomic<bool> forward{true}, backward{true};
};

HopperPasses& hopper_passes(int width);

#define FASTGPT_OF_ATTENTION(type)                                             \
  extern const AttentionLaunches attention_##type##_64, attention_##type##_80, \
      attention_##type##_96, attention_##type##_128, attention_##type##_256
FASTGPT_OF_ATTENTION(bfloat16);
FASTGPT_OF_ATTENTION(float16);
#undef FASTGPT_OF_ATTENTION

}  // namespace fastgpt::cuda
