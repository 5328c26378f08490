// What the programs that leave parts of Hopper's attention out have in common: each wait, fence,
// barrier or arrival counts its calls, and does nothing in one of them. Included before the
// kernels.
#pragma once

#include <algorithm>
#include <cstdio>
#include <functional>
#include <initializer_list>
#include <iterator>
#include <string>

#include "../csrc/cuda/launch.h"
#include "../csrc/cuda/tensor_map.h"

namespace fastgpt::cuda {

enum Kind {
  kBlockBarrier,
  kCopiersBarrier,  // of a warp, one of the warpgroup that copies
  kReadersBarrier,  // and of those that multiply
  kNamedBarrier,
  kBarrierFence,
  kAsynchronousFence,
  kProductFence,
  kProductWait,
  kFullWait,
  kFullArrival,  // beside those of the copies
  kEmptyWait,    // by who copies
  kTellersWait,  // the same wait, by who writes beside the copies
  kEmptyArrival,
  kKinds,
};
constexpr const char* kNames[] = {"block_barrier",
                                  "copiers_warp_barrier",
                                  "readers_warp_barrier",
                                  "named_barrier",
                                  "fence_barriers",
                                  "fence_asynchronous",
                                  "warpgroup_fence",
                                  "warpgroup_wait",
                                  "full",
                                  "full_arrival",
                                  "empty",
                                  "tellers_empty",
                                  "arrival"};

// The number of the call that is left out of every thread, of those that a thread makes.
inline Kind left_out_kind = kKinds;
inline int left_out = -1;
inline int calls[kKinds][1024];
// Of each kind, those before the block votes whether to go carefully: what they leave is forgotten
// then, and the same calls of a block that has nothing to vote on are left out there.
inline int forgotten[kKinds];

inline bool is_left(Kind kind) {
  const int n = calls[kind][thread_index()]++;
  return kind != left_out_kind || n != left_out;
}

inline void some_block_barrier() {
  if (calls[kBlockBarrier][thread_index()] == 1) {
    for (int kind = 0; kind < kKinds; ++kind)
      forgotten[kind] = std::max(forgotten[kind], calls[kind][thread_index()]);
  }
  if (is_left(kBlockBarrier)) block_barrier();
}
inline void some_warp_barrier() {
  if (is_left(thread_index() < 128 ? kCopiersBarrier : kReadersBarrier)) warp_barrier();
}
inline void some_named_barrier_sync(int barrier, int threads) {
  if (is_left(kNamedBarrier)) named_barrier_sync(barrier, threads);
}
inline void some_fence_barriers() {
  if (is_left(kBarrierFence)) fence_barriers();
}
inline void some_fence_asynchronous() {
  if (is_left(kAsynchronousFence)) fence_asynchronous();
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
    const Kind kind = !producer ? kFullWait : warp_index() == 0 ? kEmptyWait : kTellersWait;
    if (!needed || is_left(kind)) Barriers::wait(i, parity);
  }
  void arrive(int i) const {
    if (is_left(thread_index() < 128 ? kFullArrival : kEmptyArrival)) Barriers::arrive(i);
  }
};

// Runs a kernel as it is, and without each call of these kinds. Prints a line for each of the
// latter: `prefix`, what was left out, and what the twin says of it, "other results", or "passed".
// False if the kernel fails as it is.
inline bool leave_out_each(const std::string& prefix, std::initializer_list<Kind> kinds,
                           const std::function<void()>& launch,
                           const std::function<std::string()>& results) {
  const auto run = [&]() -> std::string {
    for (auto& kind : calls)
      for (int& n : kind) n = 0;
    for (int& n : forgotten) n = 0;
    try {
      launch();
    } catch (const std::exception& error) {
      return error.what();
    }
    return "passed";
  };
  left_out = -1;
  const std::string whole = run();
  if (whole != "passed") {
    std::printf("%sas it is: %s\n", prefix.c_str(), whole.c_str());
    return false;
  }
  const std::string wanted = results();
  int first[kKinds], all[kKinds];
  for (int kind = 0; kind < kKinds; ++kind) {
    first[kind] = forgotten[kind];
    all[kind] = *std::max_element(std::begin(calls[kind]), std::end(calls[kind]));
  }
  for (const Kind kind : kinds) {
    left_out_kind = kind;
    for (left_out = first[kind]; left_out < all[kind]; ++left_out) {
      std::string outcome = run();
      if (outcome == "passed" && results() != wanted) outcome = "other results";
      std::printf("%swithout %s %d: %s\n", prefix.c_str(), kNames[kind], left_out, outcome.c_str());
    }
  }
  return true;
}

}  // namespace fastgpt::cuda

#define block_barrier some_block_barrier
#define warp_barrier some_warp_barrier
#define named_barrier_sync some_named_barrier_sync
#define fence_barriers some_fence_barriers
#define fence_asynchronous some_fence_asynchronous
#define warpgroup_fence some_warpgroup_fence
#define warpgroup_wait some_warpgroup_wait
#define Barriers SomeBarriers
