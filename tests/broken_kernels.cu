// Kernels that are broken on purpose, for tests/test_cuda_build.py.

// The only good one.
__global__ void __launch_bounds__(256, 4) good(const float* in, float* out) {
  out[threadIdx.x] = 2 * in[threadIdx.x];
}

// 32 registers a thread, and 64 numbers that are needed until the end.
__global__ void __launch_bounds__(1024, 2) spills(const float* in, float* out) {
  float x[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i] = in[i * 1024 + threadIdx.x];
  for (int round = 0; round < 9; ++round) {
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i] = x[i] * x[(i + 7) % 64] + in[round];
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) out[i * 1024 + threadIdx.x] = x[i];
}

// An index that is not known before it runs: the numbers lie in memory.
__global__ void __launch_bounds__(128, 4) has_a_stack(const float* in, float* out, int last) {
  float x[16];
  for (int i = 0; i < 16; ++i) x[i] = in[i * last];
  for (int i = 0; i < 16; ++i) out[i] = x[(i * last + threadIdx.x) % 16];
}

// Four blocks of 48 KiB do not fit 164 KiB.
__global__ void __launch_bounds__(128, 4) shares_too_much(const float* in, float* out) {
  __shared__ float x[48 * 256];
  for (int i = threadIdx.x; i < 48 * 256; i += 128) x[i] = in[i];
  __syncthreads();
  out[threadIdx.x] = x[int(in[threadIdx.x])];
}

__global__ void states_no_bounds(float* out) { out[threadIdx.x] = 1; }

__global__ void __launch_bounds__(256) states_no_blocks(float* out) { out[threadIdx.x] = 1; }
