// Runs Hopper's forward of attention in the host twin, as it is and with one wait, fence, barrier
// or arrival left out, each in turn. Prints a line for each of the latter: what was left out, and
// what the twin says of it, "other results", or "passed". Fails if the kernel fails as it is.
#include <cstdio>
#include <string>
#include <vector>

#include "../csrc/cuda/launch.h"
#include "../csrc/cuda/tensor_map.h"

namespace fastgpt::cuda {

enum Kind {
  kBlockBarrier,
  kBarrierFence,
  kProductFence,
  kProductWait,
  kFullWait,
  kEmptyWait,
  kEmptyArrival,
  kKinds,
};
constexpr const char* kNames[] = {"block_barrier",  "fence_barriers", "warpgroup_fence",
                                  "warpgroup_wait", "full",           "empty",
                                  "arrival"};

// The number of the call that is left out of every thread, of those that a thread makes.
Kind left_out_kind = kKinds;
int left_out = -1;
int calls[kKinds][1024];

inline bool is_left(Kind kind) {
  const int n = calls[kind][thread_index()]++;
  return kind != left_out_kind || n != left_out;
}

inline void some_block_barrier() {
  if (is_left(kBlockBarrier)) block_barrier();
}
inline void some_fence_barriers() {
  if (is_left(kBarrierFence)) fence_barriers();
}
template <class... Registers>
inline void some_warpgroup_fence(Registers&... registers) {
  if (is_left(kProductFence)) warpgroup_fence(registers...);
}
template <int pending, class... Registers>
inline void some_warpgroup_wait(Registers&... registers) {
  if (is_left(kProductWait)) warpgroup_wait<pending>(registers...);
}

struct SomeBarriers : Barriers {
  void wait(int i, int parity) const {
    const bool producer = thread_index() < 128;
    // The stages of the first round are empty.
    const bool needed = !producer || at(i).phase > 0 || parity == 0;
    if (!needed || is_left(producer ? kEmptyWait : kFullWait)) Barriers::wait(i, parity);
  }
  void arrive(int i) const {
    if (is_left(kEmptyArrival)) Barriers::arrive(i);
  }
};

}  // namespace fastgpt::cuda

#define block_barrier some_block_barrier
#define fence_barriers some_fence_barriers
#define warpgroup_fence some_warpgroup_fence
#define warpgroup_wait some_warpgroup_wait
#define Barriers SomeBarriers
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
  const auto run = [&]() -> std::string {
    for (auto& kind : calls)
      for (int& n : kind) n = 0;
    try {
      launch_attention_forward_hopper<bfloat16, kWidth>(a, 1, nullptr);
    } catch (const std::exception& error) {
      return error.what();
    }
    return "passed";
  };

  const std::string whole = run();
  if (whole != "passed") {
    std::printf("as it is: %s\n", whole.c_str());
    return 1;
  }
  int all[kKinds] = {};
  for (int kind = 0; kind < kKinds; ++kind)
    for (const int n : calls[kind]) all[kind] = n > all[kind] ? n : all[kind];
  const std::vector<float> wanted = lse;
  const Matrix16 output = o;
  for (int kind = 0; kind < kKinds; ++kind) {
    for (left_out = 0; left_out < all[kind]; ++left_out) {
      left_out_kind = Kind(kind);
      std::string outcome = run();
      if (outcome == "passed" &&
          (lse != wanted || memcmp(o.memory.data(), output.memory.data(),
                                   o.memory.size() * sizeof(Vector<bfloat16>)) != 0))
        outcome = "other results";
      std::printf("without %s %d: %s\n", kNames[kind], left_out, outcome.c_str());
    }
  }
  return 0;
}
