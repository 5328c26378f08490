// Runs attention's kernels in the host twin, as they are and with one barrier or one wait for
// asynchronous copies left out, each in turn. Prints a line for each of the latter: what was left
// out of which kernel, and what the twin says of it, or "passed". Fails if a kernel fails as it is.
#include <cstdio>
#include <string>
#include <vector>

#include "../csrc/cuda/launch.h"

namespace fastgpt::cuda {

// The number of the call that is left out of every thread, of those that a thread makes; -1: none.
int left_out_barrier = -1, left_out_wait = -1;
int barriers[1024], waits[1024];

inline void some_block_barrier() {
  if (barriers[thread_index()]++ != left_out_barrier) block_barrier();
}
template <int pending>
inline void some_copy_async_wait() {
  if (waits[thread_index()]++ != left_out_wait) copy_async_wait<pending>();
}

}  // namespace fastgpt::cuda

#define block_barrier some_block_barrier
#define copy_async_wait some_copy_async_wait
#include "../csrc/cuda/attention_backward.cuh"
#include "../csrc/cuda/attention_forward.cuh"
#include "cuda_attention_inputs.h"

using namespace fastgpt::cuda;

namespace {

constexpr int kWidth = 64, kLength = 130;  // three tiles of keys, or of queries

template <class Kernel, class Arguments>
std::string run(Kernel* kernel, const Arguments& a, int bytes) {
  for (int& n : barriers) n = 0;
  for (int& n : waits) n = 0;
  try {
    // One block, the one with most to do.
    launch(kernel, Grid{1, kAttentionThreads, 1, bytes}, nullptr, a);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "passed";
}

template <class Kernel, class Arguments>
bool check(const char* name, Kernel* kernel, const Arguments& a, int bytes) {
  left_out_barrier = left_out_wait = -1;
  const std::string whole = run(kernel, a, bytes);
  if (whole != "passed") {
    std::printf("%s: %s\n", name, whole.c_str());
    return false;
  }
  // The last wait is for copies of nothing.
  const int all_barriers = barriers[0], all_waits = waits[0] - 1;
  for (int i = 0; i < all_barriers; ++i) {
    left_out_barrier = i;
    std::printf("%s without barrier %d: %s\n", name, i, run(kernel, a, bytes).c_str());
  }
  left_out_barrier = -1;
  for (int i = 0; i < all_waits; ++i) {
    left_out_wait = i;
    std::printf("%s without wait %d: %s\n", name, i, run(kernel, a, bytes).c_str());
  }
  left_out_wait = -1;
  return true;
}

}  // namespace

int main() {
  Matrix16 q(1, kLength, kWidth), k(2, kLength, kWidth), v(3, kLength, kWidth),
      g(4, kLength, kWidth), o(5, kLength, kWidth), lost(6, kLength, kWidth),
      dq(7, kLength, kWidth), dk(8, kLength, kWidth), dv(9, kLength, kWidth);
  std::vector<float> lse(kLength), row_max(kLength), row_sum(kLength, 1), delta(kLength),
      inverse(kLength, 1);
  Attention shared{};
  attend(shared, q, k, v, 64, kLength);
  shared.section = 1;

  AttentionForward forward{};
  static_cast<Attention&>(forward) = shared;
  forward.output = o.heads<void>();
  forward.rounding = lost.heads<void>();
  forward.lse = lse.data(), forward.row_max = row_max.data(), forward.row_sum = row_sum.data();
  bool good =
      check("forward", &attention_forward<bfloat16, kWidth>, forward, ForwardTiles<kWidth>::bytes);

  AttentionBackward backward{};
  static_cast<Attention&>(backward) = shared;
  backward.grad_output = g.heads<const void>();
  backward.output = o.heads<const void>();
  backward.rounding = lost.heads<const void>();
  backward.row_max = row_max.data(), backward.row_sum = row_sum.data();
  backward.row_delta = delta.data(), backward.row_inverse = inverse.data();
  backward.slope = 1;
  backward.grad_query = dq.heads<void>();
  backward.grad_key = dk.heads<void>();
  backward.grad_value = dv.heads<void>();
  good &= check("query_gradient", &attention_query_gradient<bfloat16, kWidth>, backward,
                QueryGradientTiles<kWidth>::bytes);
  backward.queries = kLength;
  backward.keys = 64;
  good &= check("key_gradient", &attention_key_gradient<bfloat16, kWidth, true, true>, backward,
                KeyGradientTiles<kWidth>::bytes);
  return good ? 0 : 1;
}
