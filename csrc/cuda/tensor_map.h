// How a kernel is told of a tensor that it copies in boxes (copy_tensor).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "launch.h"

namespace fastgpt::cuda {

// A tensor of elements of 2 bytes and its boxes, the innermost dimension first, as the hardware
// demands them: `strides` are in elements, of which the first is 1 and the others multiples of 8; a
// box is a row of 64 elements by up to 256 in each of the other dimensions.
struct TensorShape {
  int rank;
  int64_t sizes[5];
  int64_t strides[5];
  int box[5];
};

inline void check_tensor_map(const void* data, const TensorShape& shape) {
  const auto check = [](bool holds, const std::string& what, int64_t found) {
    if (!holds)
      throw std::invalid_argument("a tensor that is copied in boxes has " + what + ", not " +
                                  std::to_string(found));
  };
  check(shape.rank >= 3 && shape.rank <= 5, "3 to 5 dimensions", shape.rank);
  const int64_t offset = int64_t(reinterpret_cast<uintptr_t>(data) % 16);
  check(offset == 0, "an address of 0 modulo 16", offset);
  check(shape.strides[0] == 1, "an innermost stride of 1", shape.strides[0]);
  check(shape.box[0] == 64, "boxes of 64 columns", shape.box[0]);
  for (int d = 0; d < shape.rank; ++d) {
    check(shape.sizes[d] >= 1 && shape.sizes[d] <= int64_t(1) << 32, "sizes of 1 to 2^32",
          shape.sizes[d]);
    check(shape.box[d] >= 1 && shape.box[d] <= 256, "boxes of 1 to 256", shape.box[d]);
    if (d == 0) continue;
    check(shape.strides[d] % 8 == 0, "strides that are multiples of 8", shape.strides[d]);
    check(shape.sizes[d] == 1 || (shape.strides[d] > 0 && shape.strides[d] < int64_t(1) << 39),
          "strides from 8 to below 2^39", shape.strides[d]);
  }
}

#ifdef __CUDACC__

// The driver's own function: found at run time, so that a machine without a driver can load this.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &result);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess) cudaGetLastError();  // or the next one to ask would be told of it
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (!found) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
  return found;
}

template <class T>
TensorMap make_tensor_map(const T* data, const TensorShape& shape) {
  static_assert(sizeof(T) == 2, "a tensor has elements of 2 bytes");
  check_tensor_map(data, shape);
  cuuint64_t sizes[5], strides[5];
  cuuint32_t box[5], steps[5];
  for (int d = 0; d < shape.rank; ++d) {
    sizes[d] = cuuint64_t(shape.sizes[d]);
    // The driver wants a stride that is not 0 even where nothing lies along it.
    if (d > 0) strides[d - 1] = cuuint64_t(shape.sizes[d] > 1 ? 2 * shape.strides[d] : 16);
    box[d] = cuuint32_t(shape.box[d]);
    steps[d] = 1;
  }
  TensorMap map;
  const CUresult result =
      tensor_map_encoder()(&map,
                           std::is_same_v<T, bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                       : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                           cuuint32_t(shape.rank), const_cast<T*>(data), sizes, strides, box, steps,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled failed: error " + std::to_string(int(result)));
  return map;
}

#else

template <class T>
TensorMap make_tensor_map(const T* data, const TensorShape& shape) {
  static_assert(sizeof(T) == 2, "a tensor has elements of 2 bytes");
  check_tensor_map(data, shape);
  TensorMap map = {data, shape.rank, {}, {}, {}};
  for (int d = 0; d < shape.rank; ++d) {
    map.sizes[d] = shape.sizes[d];
    map.strides[d] = shape.strides[d];
    map.box[d] = shape.box[d];
  }
  return map;
}

#endif

}  // namespace fastgpt::cuda
