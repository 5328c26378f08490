// Kernels whose products ptxas cannot leave under way, or whose registers it leaves as they are,
// for tests/test_cuda_build.py.
#include "primitives.cuh"

namespace fastgpt::cuda {

// The products of a warpgroup that wait at the end, or also between, where something else uses
// their registers.
template <bool between>
FASTGPT_DEVICE void multiply_often(float* out, int times) {
#ifdef FASTGPT_HOPPER
  FASTGPT_DYNAMIC_SHARED(bfloat16, tile, 0, 64 * 64);
  float d[32];
  for (float& x : d) x = 0;
  for (int i = 0; i < times; ++i) {
    warpgroup_fence(d);
    warpgroup_multiply(d, along(tile, 0), along(tile, 0), true);
    warpgroup_commit();
    if (between) d[0] += 1;
    warpgroup_wait<0>(d);
  }
  for (int i = 0; i < 32; ++i) out[thread_index() * 32 + i] = d[i];
#endif
}

FASTGPT_KERNEL(128, 1) good(float* out, int times) { multiply_often<false>(out, times); }
FASTGPT_KERNEL(128, 1) serialised(float* out, int times) { multiply_often<true>(out, times); }

// Without bounds, from which ptxas knows what a thread has at the entry.
__global__ void keeps_its_registers(float* out) {
#ifdef FASTGPT_HOPPER
  if (warp_index() < 4) {
    give_registers<24>();
  } else {
    take_registers<240>();
    out[thread_index()] = 1;
  }
#endif
}

}  // namespace fastgpt::cuda
