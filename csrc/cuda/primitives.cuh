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
#include <cuda.h>  // for a type: nothing of the driver is linked
#endif

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
// `count` of them in the shared memory of the block, as the Barriers `name`.
#define FASTGPT_BARRIERS(name, count)        \
  __shared__ uint64_t name##_storage[count]; \
  const ::fastgpt::cuda::Barriers name { name##_storage }
// A parameter that is the same for all threads, and whose address can be taken.
#define FASTGPT_GRID_CONSTANT __grid_constant__
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
#define FASTGPT_BARRIERS(name, count)         \
  static constexpr char name##_key[] = #name; \
  const ::fastgpt::cuda::Barriers name { &::fastgpt::cuda::twin::barriers(name##_key, count) }
#define FASTGPT_GRID_CONSTANT
#endif

// Defined where a kernel's code is for 9.0a: what needs it exists nowhere else. A kernel that does
// has its whole body under this condition.
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTGPT_HOPPER
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
namespace fastgpt::cuda {

// A tensor in global memory, of elements of 2 bytes, and the boxes it is copied in.
struct TensorMap {
  const void* base;
  int rank;
  int64_t sizes[5];    // the innermost dimension first
  int64_t strides[5];  // elements
  int box[5];
};

}  // namespace fastgpt::cuda

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

// ---- tensors ----

using TensorMap = CUtensorMap;  // made by tensor_map.h

#ifdef FASTGPT_HOPPER

// ---- barriers of copies and of some threads ----

// A phase of a barrier ends when so many threads have arrived and so many bytes have come as were
// expected of it; the first one has the parity 0.
struct Barriers {
  uint64_t* data;

  FASTGPT_DEVICE uint32_t address(int i) const { return shared_address(data + i); }

  // By one thread, before a barrier of all that use it.
  FASTGPT_DEVICE void init(int i, int arrivals) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(i)), "r"(arrivals)
                 : "memory");
  }

  FASTGPT_DEVICE void arrive(int i) const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(i)) : "memory");
  }

  // The phase then waits for these bytes too.
  FASTGPT_DEVICE void arrive_expecting(int i, int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(i)),
                 "r"(bytes)
                 : "memory");
  }

  // Until the phase of this parity has ended: the one under way, or the one before it.
  FASTGPT_DEVICE void wait(int i, int parity) const {
    uint32_t ended;
    do {
      asm volatile(
          "{\n"
          ".reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.b32 %0, 1, 0, p;\n"
          "}"
          : "=r"(ended)
          : "r"(address(i)), "r"(parity)
          : "memory");
    } while (!ended);
  }
};

// After this thread's inits, and before a copy is told of these barriers.
FASTGPT_DEVICE void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Lets copies and products see what this thread stored in shared memory; a barrier must follow.
FASTGPT_DEVICE void fence_asynchronous() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Until `threads` threads, of whole warps, have come to this barrier of the block, 1 to 15.
FASTGPT_DEVICE void named_barrier_sync(int barrier, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Comes to it and goes on.
FASTGPT_DEVICE void named_barrier_arrive(int barrier, int threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Whether this is the one lane that the warp has chosen.
FASTGPT_DEVICE bool elect_one() {
  uint32_t chosen;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}"
      : "=r"(chosen)
      :
      : "memory");
  return chosen;
}

// ---- registers ----

// From here on the threads of this warpgroup have `count` registers, fewer than before, or more: of
// what others gave.
template <int count>
FASTGPT_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
FASTGPT_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// ---- copies of tensors ----

FASTGPT_DEVICE void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The box of the tensor from these coordinates on, the innermost first, to the elements from `i`
// on; what lies outside of the tensor is 0. The barrier is told the bytes of the box. A row of a
// box has 64 elements, whose vectors of 16 bytes are exchanged as a product expects it.
template <class T>
FASTGPT_DEVICE void copy_tensor(const Shared<T>& to, int i, const TensorMap& map,
                                const Barriers& barriers, int barrier, int c0, int c1, int c2,
                                int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to.data + i)),
      "l"(&map), "r"(barriers.address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

template <class T>
FASTGPT_DEVICE void copy_tensor(const Shared<T>& to, int i, const TensorMap& map,
                                const Barriers& barriers, int barrier, int c0, int c1, int c2,
                                int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(to.data + i)),
      "l"(&map), "r"(barriers.address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// The other way; what lies outside of the tensor is not written.
template <class T>
FASTGPT_DEVICE void store_tensor(const TensorMap& map, const Shared<T>& from, int i, int c0, int c1,
                                 int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%1, {%2, %3, %4, %5}], [%0];" ::"r"(
          shared_address(from.data + i)),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

template <class T>
FASTGPT_DEVICE void store_tensor(const TensorMap& map, const Shared<T>& from, int i, int c0, int c1,
                                 int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%1, {%2, %3, %4, %5, %6}], [%0];" ::
          "r"(shared_address(from.data + i)),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// Ends the group of this thread's stores since the last one.
FASTGPT_DEVICE void store_tensor_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until all but the last `pending` groups have read the shared memory, which may then change.
template <int pending>
FASTGPT_DEVICE void store_tensor_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// Until they have written.
template <int pending>
FASTGPT_DEVICE void store_tensor_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- products of a warpgroup ----

// Where an operand lies: 16 along the sum for each of the rows of A or the columns of B, in a tile
// whose rows have 64 elements in the order of copy_tensor and whose first one is at a multiple of
// 1024 bytes. Along: the sum runs along the rows, of which the first one that is taken has element
// `i`. Across: the sum runs over 16 rows, of which `i` begins the first, and the columns after 64
// are `slab` elements further on.
template <class T>
struct Along {
  static constexpr int across = 0;
  uint64_t bits;
};
template <class T>
struct Across {
  static constexpr int across = 1;
  uint64_t bits;
};

// The fields of a matrix descriptor: addresses in units of 16 bytes, what separates groups of eight
// rows, and the swizzle of 128 bytes.
FASTGPT_DEVICE uint64_t matrix_descriptor(const void* p, int leading) {
  return uint64_t((shared_address(p) & 0x3ffff) >> 4) | uint64_t(leading) << 16 |
         uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

template <class T>
FASTGPT_DEVICE Along<T> along(const Shared<T>& tile, int i) {
  return {matrix_descriptor(tile.data + i, 1)};
}

template <class T>
FASTGPT_DEVICE Across<T> across(const Shared<T>& tile, int i, int slab) {
  return {matrix_descriptor(tile.data + i, slab * int(sizeof(T)) >> 4)};
}

// To the compiler they change here: nothing that makes or uses them is moved from one side to the
// other, nor past the waits and barriers on that side.
FASTGPT_DEVICE void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
FASTGPT_DEVICE void pin(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
template <class T, int count>
FASTGPT_DEVICE void pin(T (&registers)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) pin(registers[i]);
}

// What makes these registers is done before the wait that follows: ptxas moves arithmetic past a
// wait, but not past what might let others run, which this does only if all bits are set.
FASTGPT_DEVICE void finish(uint32_t bits) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.eq.u32 p, %0, 0xffffffff;\n"
      "@p nanosleep.u32 0;\n"
      "}" ::"r"(bits)
      : "memory");
}
FASTGPT_DEVICE uint32_t all_bits(float x) { return bit_cast<uint32_t>(x); }
FASTGPT_DEVICE uint32_t all_bits(uint32_t x) { return x; }
template <class T, int count>
FASTGPT_DEVICE uint32_t all_bits(const T (&registers)[count]) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) bits |= all_bits(registers[i]);
  return bits;
}
template <class T, int count>
FASTGPT_DEVICE void finish(T (&registers)[count]) {
  pin(registers);
  finish(all_bits(registers));
}

// Before a product that uses these registers, which were used by something else.
template <class... Registers>
FASTGPT_DEVICE void warpgroup_fence(Registers&... registers) {
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Ends the group of the products since the last one.
FASTGPT_DEVICE void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until all but the last `pending` groups are done, which wrote or read these registers.
template <int pending, class... Registers>
FASTGPT_DEVICE void warpgroup_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
  (pin(registers), ...);
}

template <int columns, class T>
struct Product;

// "%t0, %t1..." by the tens, of the first of which `t` is empty. After whole tens stands a comma.
#define FASTGPT_TEXT_2(t) "%" #t "0, %" #t "1"
#define FASTGPT_TEXT_4(t) FASTGPT_TEXT_2(t) ", %" #t "2, %" #t "3"
#define FASTGPT_TEXT_8(t) FASTGPT_TEXT_4(t) ", %" #t "4, %" #t "5, %" #t "6, %" #t "7"
#define FASTGPT_TEXT_10(t) FASTGPT_TEXT_8(t) ", %" #t "8, %" #t "9, "
#define FASTGPT_TEXT_30 FASTGPT_TEXT_10() FASTGPT_TEXT_10(1) FASTGPT_TEXT_10(2)
#define FASTGPT_TEXT_60 FASTGPT_TEXT_30 FASTGPT_TEXT_10(3) FASTGPT_TEXT_10(4) FASTGPT_TEXT_10(5)
#define FASTGPT_TEXT_120                                                                      \
  FASTGPT_TEXT_60 FASTGPT_TEXT_10(6) FASTGPT_TEXT_10(7) FASTGPT_TEXT_10(8) FASTGPT_TEXT_10(9) \
      FASTGPT_TEXT_10(10) FASTGPT_TEXT_10(11)
#define FASTGPT_REGISTERS_8(i)                                                                \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define FASTGPT_REGISTERS_32(i)                                                    \
  FASTGPT_REGISTERS_8(i), FASTGPT_REGISTERS_8(i + 8), FASTGPT_REGISTERS_8(i + 16), \
      FASTGPT_REGISTERS_8(i + 24)
#define FASTGPT_REGISTERS_64(i) FASTGPT_REGISTERS_32(i), FASTGPT_REGISTERS_32(i + 32)

// d_text and d_registers are the accumulators' lists; the operands that follow them are p0, p1...
#define FASTGPT_PRODUCT(T, type, columns, d_text, d_registers, p0, p1, p2, p3, p4, p5, p6)      \
  template <>                                                                                   \
  struct Product<columns, T> {                                                                  \
    template <int across_b>                                                                     \
    static FASTGPT_DEVICE void add(float (&d)[columns / 2], const uint32_t (&a)[4], uint64_t b, \
                                   int accumulate) {                                            \
      asm volatile(                                                                             \
          "{\n"                                                                                 \
          ".reg .pred p;\n"                                                                     \
          "setp.ne.b32 p, " p5                                                                  \
          ", 0;\n"                                                                              \
          "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" d_text     \
          "}, {" p0 ", " p1 ", " p2 ", " p3 "}, " p4 ", p, 1, 1, " p6                           \
          ";\n"                                                                                 \
          "}"                                                                                   \
          : FASTGPT_LIST d_registers                                                            \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(across_b)  \
          : "memory");                                                                          \
    }                                                                                           \
    template <int across_a, int across_b>                                                       \
    static FASTGPT_DEVICE void add(float (&d)[columns / 2], uint64_t a, uint64_t b,             \
                                   int accumulate) {                                            \
      asm volatile(                                                                             \
          "{\n"                                                                                 \
          ".reg .pred p;\n"                                                                     \
          "setp.ne.b32 p, " p2                                                                  \
          ", 0;\n"                                                                              \
          "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" d_text     \
          "}, " p0 ", " p1 ", p, 1, 1, " p3 ", " p4                                             \
          ";\n"                                                                                 \
          "}"                                                                                   \
          : FASTGPT_LIST d_registers                                                            \
          : "l"(a), "l"(b), "r"(accumulate), "n"(across_a), "n"(across_b)                       \
          : "memory");                                                                          \
    }                                                                                           \
  };
#define FASTGPT_LIST(...) __VA_ARGS__
#define FASTGPT_PRODUCTS(...)                    \
  FASTGPT_PRODUCT(bfloat16, "bf16", __VA_ARGS__) \
  FASTGPT_PRODUCT(float16, "f16", __VA_ARGS__)

FASTGPT_PRODUCTS(64, FASTGPT_TEXT_30 FASTGPT_TEXT_2(3), (FASTGPT_REGISTERS_32(0)), "%32", "%33",
                 "%34", "%35", "%36", "%37", "%38")
FASTGPT_PRODUCTS(80, FASTGPT_TEXT_30 FASTGPT_TEXT_8(3) ", %38, %39",
                 (FASTGPT_REGISTERS_32(0), FASTGPT_REGISTERS_8(32)), "%40", "%41", "%42", "%43",
                 "%44", "%45", "%46")
FASTGPT_PRODUCTS(96, FASTGPT_TEXT_30 FASTGPT_TEXT_10(3) FASTGPT_TEXT_8(4),
                 (FASTGPT_REGISTERS_32(0), FASTGPT_REGISTERS_8(32), FASTGPT_REGISTERS_8(40)), "%48",
                 "%49", "%50", "%51", "%52", "%53", "%54")
FASTGPT_PRODUCTS(128, FASTGPT_TEXT_60 FASTGPT_TEXT_4(6), (FASTGPT_REGISTERS_64(0)), "%64", "%65",
                 "%66", "%67", "%68", "%69", "%70")
FASTGPT_PRODUCTS(256, FASTGPT_TEXT_120 FASTGPT_TEXT_8(12),
                 (FASTGPT_REGISTERS_64(0), FASTGPT_REGISTERS_64(64)), "%128", "%129", "%130",
                 "%131", "%132", "%133", "%134")

#undef FASTGPT_PRODUCTS
#undef FASTGPT_LIST
#undef FASTGPT_PRODUCT
#undef FASTGPT_REGISTERS_64
#undef FASTGPT_REGISTERS_32
#undef FASTGPT_REGISTERS_8
#undef FASTGPT_TEXT_120
#undef FASTGPT_TEXT_60
#undef FASTGPT_TEXT_30
#undef FASTGPT_TEXT_10
#undef FASTGPT_TEXT_8
#undef FASTGPT_TEXT_4
#undef FASTGPT_TEXT_2

// D (64, columns) = A (64, 16) B (16, columns), or += where it accumulates, by the four warps of a
// warpgroup together, each with 16 rows. The accumulators and fragments of a warp's rows are those
// of multiply_add, eight columns after eight. It is done after the wait for its group; until then
// nobody touches its registers or writes its shared memory.
template <int words, template <class> class B, class T>
FASTGPT_DEVICE void warpgroup_multiply(float (&d)[words], const uint32_t (&a)[4], const B<T>& b,
                                       bool accumulate) {
  Product<2 * words, T>::template add<B<T>::across>(d, a, b.bits, accumulate);
}

template <int words, template <class> class B, class T>
FASTGPT_DEVICE void warpgroup_multiply(float (&d)[words], const Along<T>& a, const B<T>& b,
                                       bool accumulate) {
  Product<2 * words, T>::template add<Along<T>::across, B<T>::across>(d, a.bits, b.bits,
                                                                      accumulate);
}

#endif  // FASTGPT_HOPPER

}  // namespace fastgpt::cuda

#endif
