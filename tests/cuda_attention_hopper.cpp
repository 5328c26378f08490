// Runs Hopper's forward of attention in the host twin, as it is and with one wait, fence, barrier
// or arrival left out, each in turn; see leave_out_each.
#include <vector>

#include "cuda_attention_hopper_broken.h"
//
#include "../csrc/cuda/attention_hopper_forward.cuh"
#include "cuda_attention_inputs.h"

using namespace fastgpt::cuda;

namespace {

constexpr int kWidth = 64, kQueries = 128, kKeys = 4 * 128 - 5;

}  // namespace

int main() {
  Matrix16 q(1, kKeys, kWidth), k(2, kKeys, kWidth), v(3, kKeys, kWidth), o(4, kKeys, kWidth),
      lost(5, kKeys, kWidth);
  std::vector<float> lse(kQueries), row_max(kQueries), row_sum(kQueries);
  AttentionForward a{};
  attend(a, q, k, v, kQueries, kKeys);
  a.output = o.heads<void>();
  a.rounding = lost.heads<void>();
  a.lse = lse.data(), a.row_max = row_max.data(), a.row_sum = row_sum.data();
  const bool good = leave_out_each(
      "",
      {kBlockBarrier, kBarrierFence, kProductFence, kProductWait, kFullWait, kEmptyWait,
       kEmptyArrival},
      [&] { launch_attention_forward_hopper<bfloat16, kWidth>(a, 1, nullptr); },
      [&] { return bytes_of(lse) + bytes_of(o.memory); });
  return good ? 0 : 1;
}
