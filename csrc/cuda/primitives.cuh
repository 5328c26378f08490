// Every instruction of a GPU that is not plain C++, by a name of its own.
//
// Compiled by nvcc these are the instructions. Compiled by any other compiler they are the host
// twin's (twin.h), which runs a kernel's source as it stands, one fiber for each thread, and finds
// what a GPU would not tell: a missing barrier, shared memory read before it was written.
//
// Blocks and grids have one dimension.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTGPT_DEVICE __device__ __forceinline__
// Before a loop whose body is rarely run: one copy of it is enough.
#define FASTGPT_ROLLED _Pragma("unroll 1")
// Before a loop over registers: they have no index at run time.
#define FASTGPT_UNROLLED _Pragma("unroll")
// At most so many threads a block, of which a multiprocessor holds at least so many blocks.
#define FASTGPT_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// `count` elements in the shared memory of the block, as the Shared<type> `name`.
#define FASTGPT_SHARED(type, name, count)              \
  __shared__ __align__(16) type name##_storage[count]; \
  const ::fastgpt::cuda::Shared<type> name { name##_storage }
// The same in the memory that the launch gives to the block, `offset` bytes from its beginning: a
// multiple of 16. No two of them overlap.
#define FASTGPT_DYNAMIC_SHARED(type, name, offset, count)                      \
  const ::fastgpt::cuda::Shared<type> name {                                   \
    reinterpret_cast<type*>(::fastgpt::cuda::dynamic_shared_memory + (offset)) \
  }
// The kernel is launched with so many bytes of such memory. It stands in the PTX, for who asks how
// many blocks a multiprocessor holds.
#define FASTGPT_DYNAMIC_SHARED_BYTES(bytes) \
  asm volatile("// dynamic shared memory: %0" ::"n"(bytes))
#else
#define FASTGPT_DEVICE inline
#define FASTGPT_ROLLED
#define FASTGPT_UNROLLED
#define FASTGPT_KERNEL(threads, blocks) void
// The address of the name is the array's identity.
#define FASTGPT_SHARED(type, name, count)     \
  static constexpr char name##_key[] = #name; \
  [[maybe_unused]] const auto name = ::fastgpt::cuda::twin::shared<type>(name##_key, count)
#define FASTGPT_DYNAMIC_SHARED(type, name, offset, count) \
  static constexpr char name##_key[] = #name;             \
  [[maybe_unused]] const auto name =                      \
      ::fastgpt::cuda::twin::shared<type>(name##_key, count, int64_t(offset))
#define FASTGPT_DYNAMIC_SHARED_BYTES(bytes) ::fastgpt::cuda::twin::check_dynamic_bytes(bytes)
#endif

namespace fastgpt::cuda {

constexpr int kWarp = 32;

// ---- numbers ----

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// 16 bytes, which one instruction moves.
template <class T>
struct alignas(16) Vector {
  static constexpr int width = 16 / sizeof(T);
  T data[width];
};

template <class To, class From>
FASTGPT_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

FASTGPT_DEVICE float widen(float x) { return x; }
FASTGPT_DEVICE double widen(double x) { return x; }
FASTGPT_DEVICE float widen(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

// The float that `x` lies on, or else of its two neighbours the one with an odd last bit: rounded
// once more, to a type at least two bits shorter, that gives what rounding `x` at once would.
FASTGPT_DEVICE float round_to_odd(double x) {
  const float nearest = float(x);
  if (double(nearest) == x || x != x) return nearest;
  uint32_t bits = bit_cast<uint32_t>(nearest);
  const double magnitude = x < 0 ? -x : x;
  if (bit_cast<float>(bits & 0x7fffffffu) > magnitude) --bits;
  return bit_cast<float>(bits | 1);
}

}  // namespace fastgpt::cuda

#ifndef __CUDACC__
#include "twin.h"
#else

// What the device's own assert calls; declared by <cassert>, but not under NDEBUG.
extern "C" __device__ void __assert_fail(const char* condition, const char* file, unsigned line,
                                         const char* function) noexcept;

namespace fastgpt::cuda {

// ---- places ----

FASTGPT_DEVICE int thread_index() { return int(threadIdx.x); }
FASTGPT_DEVICE int block_threads() { return int(blockDim.x); }
FASTGPT_DEVICE int64_t block_index() { return blockIdx.x; }
FASTGPT_DEVICE int64_t grid_blocks() { return gridDim.x; }
FASTGPT_DEVICE int lane_index() { return int(threadIdx.x) % kWarp; }
FASTGPT_DEVICE int warp_index() { return int(threadIdx.x) / kWarp; }

FASTGPT_DEVICE int cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return int(rank);
}

FASTGPT_DEVICE int cluster_blocks() {
  uint32_t blocks = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
#endif
  return int(blocks);
}

// A failed one ends the kernel, and the host learns of it as cudaErrorAssert.
FASTGPT_DEVICE void require(bool condition, const char* what) {
  if (!condition) __assert_fail(what, "primitives.cuh", __LINE__, "require");
}

// ---- numbers ----

FASTGPT_DEVICE float widen(float16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

template <class T>
struct Narrow;
template <>
struct Narrow<float> {
  static FASTGPT_DEVICE float from(float x) { return x; }
  static FASTGPT_DEVICE float from(double x) { return float(x); }
};
template <>
struct Narrow<double> {
  static FASTGPT_DEVICE double from(double x) { return x; }
};
template <>
struct Narrow<bfloat16> {
  static FASTGPT_DEVICE bfloat16 from(float x) {
    bfloat16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
  }
  static FASTGPT_DEVICE bfloat16 from(double x) { return from(round_to_odd(x)); }
  // Two at once, the first in the lower half.
  static FASTGPT_DEVICE uint32_t pair(float first, float second) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
  }
};
template <>
struct Narrow<float16> {
  static FASTGPT_DEVICE float16 from(float x) {
    float16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
  }
  static FASTGPT_DEVICE float16 from(double x) { return from(round_to_odd(x)); }
  static FASTGPT_DEVICE uint32_t pair(float first, float second) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
  }
};

// Rounded to the nearest, ties to even.
template <class T>
FASTGPT_DEVICE T narrow(float x) {
  return Narrow<T>::from(x);
}
template <class T>
FASTGPT_DEVICE T narrow(double x) {
  return Narrow<T>::from(x);
}

template <class T, class A>
FASTGPT_DEVICE Vector<T> narrow_vector(const A (&x)[Vector<T>::width]) {
  Vector<T> y;
  if constexpr (sizeof(T) == 2 && sizeof(A) == 4) {
    uint32_t pairs[Vector<T>::width / 2];
#pragma unroll
    for (int i = 0; i < Vector<T>::width; i += 2) pairs[i / 2] = Narrow<T>::pair(x[i], x[i + 1]);
    memcpy(&y, pairs, sizeof(y));
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::width; ++i) y.data[i] = narrow<T>(x[i]);
  }
  return y;
}

// Two at once, the first in the lower half.
template <class T>
FASTGPT_DEVICE uint32_t narrow_pair(float first, float second) {
  return Narrow<T>::pair(first, second);
}

// 2^x with a relative error of some 2^-22; results below 2^-126 are 0.
FASTGPT_DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- global memory ----

// Each line is used once: it stays out of the L1 cache. Not by the path for constant data, since a
// kernel may write the memory it reads.
template <class T>
FASTGPT_DEVICE Vector<T> load_vector(const T* from) {
  uint32_t words[4];
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  Vector<T> x;
  memcpy(&x, words, sizeof(x));
  return x;
}

template <class T>
FASTGPT_DEVICE void store_vector(T* to, const Vector<T>& x) {
  uint32_t words[4];
  memcpy(words, &x, sizeof(words));
  asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

template <class T>
FASTGPT_DEVICE T load(const T* from) {
  return *from;
}

template <class T>
FASTGPT_DEVICE void store(T* to, T x) {
  *to = x;
}

// ---- shared memory ----

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];

FASTGPT_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

template <class T>
struct Shared {
  T* data;

  FASTGPT_DEVICE T load(int i) const { return data[i]; }
  FASTGPT_DEVICE void store(int i, T x) const { data[i] = x; }

  // Of the block with this rank in the cluster.
  FASTGPT_DEVICE T load_from(int rank, int i) const {
#if __CUDA_ARCH__ >= 900
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"(shared_address(data + i)), "r"(uint32_t(rank)));
    static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8,
                  "one load moves 1, 2, 4 or 8 bytes");
    if constexpr (sizeof(T) == 1) {
      uint32_t x;
      asm volatile("ld.shared::cluster.u8 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
      return bit_cast<T>(uint8_t(x));
    } else if constexpr (sizeof(T) == 2) {
      uint16_t x;
      asm volatile("ld.shared::cluster.u16 %0, [%1];" : "=h"(x) : "r"(address) : "memory");
      return bit_cast<T>(x);
    } else if constexpr (sizeof(T) == 4) {
      uint32_t x;
      asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
      return bit_cast<T>(x);
    } else {
      uint64_t x;
      asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(x) : "r"(address) : "memory");
      return bit_cast<T>(x);
    }
#else
    return load(i);
#endif
  }
};

// ---- warps, blocks and clusters ----

constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
FASTGPT_DEVICE T shuffle_xor(T x, int mask) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "lanes exchange 4 or 8 bytes");
  if constexpr (sizeof(T) == 4) {
    return bit_cast<T>(__shfl_xor_sync(kAllLanes, bit_cast<unsigned>(x), mask));
  } else {
    return bit_cast<T>(__shfl_xor_sync(kAllLanes, bit_cast<unsigned long long>(x), mask));
  }
}

template <class T>
FASTGPT_DEVICE T shuffle(T x, int from_lane) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "lanes exchange 4 or 8 bytes");
  if constexpr (sizeof(T) == 4) {
    return bit_cast<T>(__shfl_sync(kAllLanes, bit_cast<unsigned>(x), from_lane));
  } else {
    return bit_cast<T>(__shfl_sync(kAllLanes, bit_cast<unsigned long long>(x), from_lane));
  }
}

FASTGPT_DEVICE bool any(bool x) { return __any_sync(kAllLanes, x) != 0; }
FASTGPT_DEVICE bool all(bool x) { return __all_sync(kAllLanes, x) != 0; }

FASTGPT_DEVICE void warp_barrier() { __syncwarp(); }
FASTGPT_DEVICE void block_barrier() { __syncthreads(); }

FASTGPT_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#else
  __syncthreads();
#endif
}

// ---- asynchronous copies ----

// 16 bytes from global memory to the elements from `i` on, which are there for this thread after
// the wait for its group, and for the others after a barrier that follows.
template <class T>
FASTGPT_DEVICE void copy_async(const Shared<T>& to, int i, const T* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to.data + i)),
               "l"(__cvta_generic_to_global(from))
               : "memory");
}

// The same; or zeros, without a look at `from`, unless it is `there`.
template <class T>
FASTGPT_DEVICE void copy_async_if(bool there, const Shared<T>& to, int i, const T* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to.data + i)),
               "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0)
               : "memory");
}

// Ends the group of the copies since the last one.
FASTGPT_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last `pending` groups have arrived.
template <int pending>
FASTGPT_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- matrices ----

// Four matrices of 8 x 8 elements of 2 bytes. Lane 8 m + r gives the index of row r of matrix m;
// lane l receives in out[m] the elements 2 (l % 4) and the next one of row l / 4.
template <class T>
FASTGPT_DEVICE void load_matrices(const Shared<T>& from, int i, uint32_t (&out)[4]) {
  static_assert(sizeof(T) == 2, "a matrix has elements of 2 bytes");
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(from.data + i))
               : "memory");
}

// The same with rows and columns exchanged: the elements of column l / 4 in the rows 2 (l % 4) and
// the next one.
template <class T>
FASTGPT_DEVICE void load_matrices_transposed(const Shared<T>& from, int i, uint32_t (&out)[4]) {
  static_assert(sizeof(T) == 2, "a matrix has elements of 2 bytes");
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(from.data + i))
               : "memory");
}

// D (16, 8) += A (16, 16) B (16, 8). With g = l / 4 and c = 2 (l % 4), lane l holds
//   D: rows g, g and g + 8, g + 8 in the columns c, c + 1
//   A: pairs from the columns c of rows g and g + 8, then c + 8 of rows g and g + 8
//   B: pairs from the rows c and c + 8 of column g
FASTGPT_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

FASTGPT_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace fastgpt::cuda

#endif
