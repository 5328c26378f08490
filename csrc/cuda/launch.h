// How a kernel is started: by the CUDA runtime where nvcc compiles this, else in the host twin.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>

#include "primitives.cuh"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace fastgpt::cuda {

struct Grid {
  int64_t blocks;
  int threads;  // of a block
  int cluster;  // blocks of a cluster, which divide those of the grid; 1 needs no clusters
  int dynamic_bytes = 0;  // of shared memory for each block (FASTGPT_DYNAMIC_SHARED)
};

#ifdef __CUDACC__
using Stream = cudaStream_t;
#else
using Stream = void*;
#endif

constexpr int kLargestCluster = 8;  // that every GPU with clusters has

#ifdef __CUDACC__
// The largest cluster that kernels of this library may be launched in on the current device: 1
// where the code that runs there was compiled for an architecture without clusters, which takes no
// notice of one. `kernel` is any of them, since all are compiled for the same architectures.
template <class Kernel>
int largest_cluster(Kernel* kernel) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 1;
  int largest = known[device].load(std::memory_order_relaxed);
  if (largest == 0) {
    cudaFuncAttributes attributes = {};
    const bool answered = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
    largest = answered && attributes.ptxVersion >= 90 ? kLargestCluster : 1;
    known[device].store(largest, std::memory_order_relaxed);
  }
  return largest;
}
#else
// Of the GPU that the twin stands for, for the whole process.
inline std::atomic<int>& largest_cluster_of_twin() {
  static std::atomic<int> largest{kLargestCluster};
  return largest;
}

template <class Kernel>
int largest_cluster(Kernel*) {
  return largest_cluster_of_twin();
}
#endif

#ifdef __CUDACC__
// Whether this kernel of Hopper's has a body on the current device. Code for 9.0 without the "a"
// has none, nor has that of any other architecture; and such a kernel always has barriers in its
// static shared memory.
template <class Kernel>
bool runs_on_hopper(Kernel* kernel) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // 1: no, 2: yes
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    cudaFuncAttributes attributes = {};
    const bool answered = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
    answer = answered && attributes.sharedSizeBytes > 0 ? 2 : 1;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == 2;
}
#else
// Whether the twin stands for a GPU of Hopper's, for the whole process.
inline std::atomic<bool>& hopper_of_twin() {
  static std::atomic<bool> hopper{false};
  return hopper;
}

template <class Kernel>
bool runs_on_hopper(Kernel*) {
  return hopper_of_twin();
}
#endif

// So that the types of the parameters are the kernel's, whatever is given.
template <class T>
struct Given {
  using type = T;
};

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Grid& grid, [[maybe_unused]] Stream stream,
            typename Given<Parameters>::type... parameters) {
  if (grid.blocks == 0) return;
#ifdef __CUDACC__
  if (grid.blocks < 0 || grid.blocks > INT32_MAX)
    throw std::runtime_error("a grid cannot have " + std::to_string(grid.blocks) + " blocks");
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(grid.cluster);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(grid.blocks));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = size_t(grid.dynamic_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  constexpr int kUnasked = 48 << 10;  // what a kernel may have without having asked for it
  cudaError_t error = cudaSuccess;
  if (grid.dynamic_bytes > kUnasked) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 grid.dynamic_bytes);
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, parameters...);
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next one to ask would be told of this launch
    throw std::runtime_error(std::string("a kernel could not be launched: ") +
                             cudaGetErrorString(error));
  }
#else
  twin::run(grid.blocks, grid.threads, grid.cluster, grid.dynamic_bytes,
            [&] { kernel(parameters...); });
#endif
}

}  // namespace fastgpt::cuda
