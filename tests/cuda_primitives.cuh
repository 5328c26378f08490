// Kernels that use every primitive of csrc/cuda, for cuda_primitives.cpp to run. Where a kernel has
// a parameter of the type Missing, what it names is left out, and the kernel is wrong.
#pragma once

#include "../csrc/cuda/launch.h"

namespace fastgpt::cuda {

enum class Missing { kNothing, kFirstBarrier, kLastBarrier, kWait };

// ---- places ----

struct Place {
  int64_t block, blocks;
  int thread, threads, lane, warp, rank, cluster;
};

FASTGPT_KERNEL(256, 1) tell_places(Place* out) {
  out[block_index() * block_threads() + thread_index()] = {
      block_index(), grid_blocks(), thread_index(), block_threads(),
      lane_index(),  warp_index(),  cluster_rank(), cluster_blocks()};
}

// ---- numbers ----

template <class T>
FASTGPT_KERNEL(256, 1)
widen_all(const T* in, decltype(widen(T()))* out, int n) {
  for (int i = thread_index(); i < n; i += block_threads()) out[i] = widen(in[i]);
}

template <class T, class A>
FASTGPT_KERNEL(256, 1)
narrow_all(const A* in, T* out, int n) {
  for (int i = thread_index(); i < n; i += block_threads()) out[i] = narrow<T>(in[i]);
}

// n is a multiple of a vector's width.
template <class T, class A>
FASTGPT_KERNEL(256, 1)
narrow_vectors(const A* in, T* out, int n) {
  constexpr int width = Vector<T>::width;
  for (int i = thread_index() * width; i < n; i += block_threads() * width) {
    A x[width];
    for (int j = 0; j < width; ++j) x[j] = in[i + j];
    store_vector(out + i, narrow_vector<T>(x));
  }
}

FASTGPT_KERNEL(256, 1) exp2_all(const float* in, float* out, int n) {
  for (int i = thread_index(); i < n; i += block_threads()) out[i] = exp2_approximate(in[i]);
}

// ---- global memory ----

// By vectors and then, what is left, one by one.
template <class T>
FASTGPT_KERNEL(256, 1)
copy(const T* in, T* out, int n) {
  constexpr int width = Vector<T>::width;
  const int whole = n / width * width;
  for (int i = thread_index() * width; i < whole; i += block_threads() * width)
    store_vector(out + i, load_vector(in + i));
  for (int i = whole + thread_index(); i < n; i += block_threads()) store(out + i, load(in + i));
}

// ---- warps, blocks and clusters ----

// Every thread's sum over its warp, and the value of the lane before it.
template <class T>
FASTGPT_KERNEL(256, 1)
reduce_warps(const T* in, T* sums, T* before) {
  const int i = thread_index();
  T sum = in[i];
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  sums[i] = sum;
  before[i] = shuffle(in[i], (lane_index() + kWarp - 1) % kWarp);
}

// Whether any and whether all lanes of the warp have a number that is not 0.
FASTGPT_KERNEL(256, 1) vote(const int* in, int* any_out, int* all_out) {
  const int i = thread_index();
  any_out[i] = any(in[i] != 0);
  all_out[i] = all(in[i] != 0);
}

// Each row's sums of the groups of eight neighbours, the row of a warp, for many rows.
template <Missing missing>
FASTGPT_KERNEL(256, 1)
exchange_in_warps(const float* in, float* out, int rows) {
  FASTGPT_SHARED(float, values, 256);
  for (int row = warp_index(); row < rows; row += block_threads() / kWarp) {
    values.store(thread_index(), in[row * kWarp + lane_index()]);
    if constexpr (missing != Missing::kFirstBarrier) warp_barrier();
    float sum = 0;
    for (int i = 0; i < 8; ++i) sum += values.load(thread_index() / 8 * 8 + i);
    out[row * kWarp + lane_index()] = sum;
    if constexpr (missing != Missing::kLastBarrier) warp_barrier();
  }
}

// The sum of every row of 1024, a block's.
template <Missing missing, class T>
FASTGPT_KERNEL(256, 1)
reduce_blocks(const T* in, T* out, int rows) {
  FASTGPT_SHARED(T, sums, 256 / kWarp);
  for (int64_t row = block_index(); row < rows; row += grid_blocks()) {
    T sum = 0;
    for (int i = thread_index(); i < 1024; i += block_threads()) sum += in[row * 1024 + i];
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane_index() == 0) sums.store(warp_index(), sum);
    if constexpr (missing != Missing::kFirstBarrier) block_barrier();
    sum = 0;
    for (int i = 0; i < block_threads() / kWarp; ++i) sum += sums.load(i);
    if (thread_index() == 0) out[row] = sum;
    if constexpr (missing != Missing::kLastBarrier) block_barrier();
  }
}

// The sum over the threads of a cluster, in every block.
template <Missing missing, class T>
FASTGPT_KERNEL(256, 1)
reduce_clusters(const T* in, T* out) {
  FASTGPT_SHARED(T, values, 256);
  FASTGPT_SHARED(T, sums, 2);
  values.store(thread_index(), in[block_index() * block_threads() + thread_index()]);
  block_barrier();
  if (thread_index() == 0) {
    T sum = 0;
    for (int i = 0; i < block_threads(); ++i) sum = T(sum + values.load(i));
    sums.store(1, sum);
  }
  if constexpr (missing != Missing::kFirstBarrier) cluster_barrier();
  if (thread_index() == 0) {
    T sum = 0;
    for (int rank = 0; rank < cluster_blocks(); ++rank) sum = T(sum + sums.load_from(rank, 1));
    out[block_index()] = sum;
  }
  if constexpr (missing != Missing::kLastBarrier) cluster_barrier();
}

// ---- asynchronous copies ----

// The sums of the columns of (rows, 1024) floats, while the row after the next one is on its way.
template <Missing missing>
FASTGPT_KERNEL(256, 1)
add_rows(const float* in, float* out, int rows) {
  FASTGPT_SHARED(float, buffer, 2 * 1024);
  const int place = thread_index() * 4;
  for (int row = 0; row < 2; ++row) {
    if (row < rows) copy_async(buffer, row * 1024 + place, in + row * 1024 + place);
    copy_async_commit();
  }
  float sums[4] = {};
  for (int row = 0; row < rows; ++row) {
    if constexpr (missing != Missing::kWait) copy_async_wait<1>();
    if constexpr (missing != Missing::kFirstBarrier) block_barrier();
    // What another thread copied.
    for (int i = 0; i < 4; ++i) sums[i] += buffer.load(row % 2 * 1024 + thread_index() + 256 * i);
    if constexpr (missing != Missing::kLastBarrier) block_barrier();
    if (row + 2 < rows) copy_async(buffer, row % 2 * 1024 + place, in + (row + 2) * 1024 + place);
    copy_async_commit();
  }
  for (int i = 0; i < 4; ++i) out[thread_index() + 256 * i] = sums[i];
}

// 1024 numbers in pairs of type T, of which those from `there` on, a multiple of 4, are 0 and not
// looked at: through memory that the launch gives, more than a kernel could declare.
constexpr int kPairsAt = 96 << 10, kPairsBytes = kPairsAt + 512 * 4;
template <class T>
FASTGPT_KERNEL(256, 1)
narrow_some(const float* in, uint32_t* out, int there) {
  FASTGPT_DYNAMIC_SHARED_BYTES(kPairsBytes);
  FASTGPT_DYNAMIC_SHARED(float, wide, 0, 1024);
  FASTGPT_DYNAMIC_SHARED(uint32_t, pairs, kPairsAt, 512);
  const int place = thread_index() * 4;
  copy_async_if(place < there, wide, place, in + place);
  copy_async_commit();
  copy_async_wait<0>();
  for (int i = 0; i < 2; ++i) {
    const float first = wide.load(place + 2 * i), second = wide.load(place + 2 * i + 1);
    pairs.store(thread_index() * 2 + i, narrow_pair<T>(first, second));
  }
  block_barrier();
  for (int i = 0; i < 2; ++i) out[thread_index() + 256 * i] = pairs.load(thread_index() + 256 * i);
}

// ---- matrices ----

// C (16, 8) = A (16, 16) B (16, 8), the registers filled element by element as the PTX ISA's
// figures of the fragments of m16n8k16 have them, in its words: groupID, threadID_in_group, a_i.
template <class T>
FASTGPT_KERNEL(32, 1)
multiply_fragments(const T* a, const T* b, float* c) {
  const int group = lane_index() >> 2, thread_in_group = lane_index() % 4;
  uint32_t a_registers[4] = {}, b_registers[2] = {};
  for (int i = 0; i < 8; ++i) {
    const int row = (i >= 0 && i < 2) || (i >= 4 && i < 6) ? group : group + 8;
    const int col = i < 4 ? thread_in_group * 2 + (i & 1) : thread_in_group * 2 + (i & 1) + 8;
    a_registers[i / 2] |= uint32_t(a[row * 16 + col].bits) << 16 * (i % 2);
  }
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? thread_in_group * 2 + (i & 1) : thread_in_group * 2 + (i & 1) + 8;
    b_registers[i / 2] |= uint32_t(b[row * 8 + group].bits) << 16 * (i % 2);
  }
  float c_registers[4] = {};
  multiply_add(c_registers, a_registers, b_registers, T());
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8;
    c[row * 8 + thread_in_group * 2 + (i & 1)] = c_registers[i];
  }
}

// C (16, 16) = A (16, k) B, by steps of 16 along k of which one is on its way while another is
// multiplied. B is (16, k), each row a column of the product, or as `rows_of_b` has it (k, 16).
template <bool rows_of_b, class T>
FASTGPT_KERNEL(32, 1)
multiply(const T* a, const T* b, float* c, int k) {
  FASTGPT_SHARED(T, a_step, 2 * 256);
  FASTGPT_SHARED(T, b_step, 2 * 256);
  const int lane = lane_index();
  // A lane copies half a row of each.
  const auto fetch = [&](int step) {
    const int row = lane / 2, half = lane % 2 * 8, first = step * 16;
    const int to = step % 2 * 256 + row * 16 + half;
    copy_async(a_step, to, a + row * k + first + half);
    copy_async(b_step, to, rows_of_b ? b + (first + row) * 16 + half : b + row * k + first + half);
  };
  fetch(0);
  copy_async_commit();
  float sums[2][4] = {};
  for (int step = 0; step < k / 16; ++step) {
    if ((step + 1) * 16 < k) fetch(step + 1);
    copy_async_commit();
    copy_async_wait<1>();
    warp_barrier();
    // Matrix m of A: rows from 8 (m % 2), columns from 8 (m / 2). Of B, the two halves along k of
    // the first 8 columns of the product, then of the last.
    const int m = lane / 8, r = lane % 8, buffer = step % 2 * 256;
    uint32_t a_registers[4], b_registers[4];
    load_matrices(a_step, buffer + (m % 2 * 8 + r) * 16 + m / 2 * 8, a_registers);
    if constexpr (rows_of_b) {
      load_matrices_transposed(b_step, buffer + (m % 2 * 8 + r) * 16 + m / 2 * 8, b_registers);
    } else {
      load_matrices(b_step, buffer + (m / 2 * 8 + r) * 16 + m % 2 * 8, b_registers);
    }
    for (int tile = 0; tile < 2; ++tile) {
      const uint32_t b_tile[2] = {b_registers[2 * tile], b_registers[2 * tile + 1]};
      multiply_add(sums[tile], a_registers, b_tile, T());
    }
    warp_barrier();
  }
  for (int tile = 0; tile < 2; ++tile)
    for (int i = 0; i < 4; ++i)
      c[(lane / 4 + i / 2 * 8) * 16 + tile * 8 + lane % 4 * 2 + i % 2] = sums[tile][i];
}

// ---- conditions ----

FASTGPT_KERNEL(256, 1) require_below(const int* in, int limit) {
  require(in[thread_index()] < limit, "a number below the limit");
}

}  // namespace fastgpt::cuda
