// Kernels that use the primitives of 9.0a, for cuda_primitives.cpp to run. Where a kernel has a
// parameter of the type Omitted, what it names is left out or wrong.
#pragma once

#include "../csrc/cuda/tensor_map.h"

namespace fastgpt::cuda {

enum class Omitted {
  kNothing,
  kBarrierFence,
  kBlockBarrier,
  kFullWait,
  kFullParity,
  kEmptyWait,
  kEmptyParity,
  kSomeBytes,
  kTooManyBytes,
  kProductFence,
  kProductWait,
  kAsynchronousFence,
  kTurn,
};

// Where copy_tensor leaves the element of a tile, the first one at a multiple of 1024 bytes: in
// rows of 64, the eights of row r exchanged by the three bits of r.
FASTGPT_DEVICE int place_in_tile(int row, int column) {
  return row * 64 + ((column / 8) ^ (row % 8)) * 8 + column % 8;
}

// ---- copies of tensors ----

// A box from (c0, c1, c2, c3) or so on, the columns of a row after each other.
template <int rank, class T>
FASTGPT_KERNEL(64, 1)
load_box(const FASTGPT_GRID_CONSTANT TensorMap map, T* out, int rows, int c0, int c1, int c2,
         int c3, int c4) {
#ifdef FASTGPT_HOPPER
  FASTGPT_DYNAMIC_SHARED(T, tile, 0, 64 * 64);
  FASTGPT_BARRIERS(full, 1);
  if (thread_index() == 0) {
    prefetch_tensor_map(map);
    full.init(0, 1);
    fence_barriers();
    full.arrive_expecting(0, rows * 128);
    if constexpr (rank == 5) {
      copy_tensor(tile, 0, map, full, 0, c0, c1, c2, c3, c4);
    } else {
      copy_tensor(tile, 0, map, full, 0, c0, c1, c2, c3);
    }
  }
  block_barrier();
  full.wait(0, 0);
  for (int row = 0; row < rows; ++row)
    out[row * 64 + thread_index()] = tile.load(place_in_tile(row, thread_index()));
#endif
}

// The other way.
template <int rank, class T>
FASTGPT_KERNEL(64, 1)
store_box(const FASTGPT_GRID_CONSTANT TensorMap map, const T* in, int rows, int c0, int c1, int c2,
          int c3, int c4) {
#ifdef FASTGPT_HOPPER
  FASTGPT_DYNAMIC_SHARED(T, tile, 0, 64 * 64);
  for (int row = 0; row < rows; ++row)
    tile.store(place_in_tile(row, thread_index()), in[row * 64 + thread_index()]);
  fence_asynchronous();
  block_barrier();
  if (thread_index() == 0) {
    if constexpr (rank == 5) {
      store_tensor(map, tile, 0, c0, c1, c2, c3, c4);
    } else {
      store_tensor(map, tile, 0, c0, c1, c2, c3);
    }
    store_tensor_commit();
    store_tensor_wait_read<0>();
  }
  block_barrier();
  tile.store(thread_index(), T());  // which must not reach the tensor
  if (thread_index() == 0) store_tensor_wait<0>();
#endif
}

// ---- products of a warpgroup ----

// C (64, columns) = A (64, 64) B: A from the shared memory or from registers, B (columns, 64), each
// row a column of the product, or across as (64, columns); of which the last box holds fewer than
// 64.
template <bool a_in_registers, bool across_b, int columns, class T>
FASTGPT_KERNEL(128, 1)
multiply_warpgroup(const FASTGPT_GRID_CONSTANT TensorMap a_map,
                   const FASTGPT_GRID_CONSTANT TensorMap b_map, const T* a, float* c) {
#ifdef FASTGPT_HOPPER
  FASTGPT_DYNAMIC_SHARED(T, a_tile, 0, 64 * 64);
  constexpr int boxes = (columns + 63) / 64;
  FASTGPT_DYNAMIC_SHARED(T, b_tile, 64 * 64 * 2, boxes * 64 * 64);
  FASTGPT_BARRIERS(full, 1);
  if (thread_index() == 0) {
    full.init(0, 1);
    fence_barriers();
    full.arrive_expecting(0, (1 + boxes) * 64 * 128);
    copy_tensor(a_tile, 0, a_map, full, 0, 0, 0, 0, 0);
    for (int i = 0; i < boxes; ++i)
      copy_tensor(b_tile, i * 64 * 64, b_map, full, 0, across_b ? 64 * i : 0, across_b ? 0 : 64 * i,
                  0, 0);
  }
  block_barrier();
  full.wait(0, 0);
  const int row = warp_index() * 16 + lane_index() / 4, column = lane_index() % 4 * 2;
  uint32_t fragments[4][4];
  for (int step = 0; step < 4; ++step)
    for (int i = 0; i < 4; ++i) {
      const T* const pair = a + (row + i % 2 * 8) * 64 + step * 16 + i / 2 * 8 + column;
      fragments[step][i] = pair[0].bits | uint32_t(pair[1].bits) << 16;
    }
  float d[columns / 2];
  for (float& x : d) x = 1e30f;  // which the first product is to forget
  warpgroup_fence(d, fragments);
  FASTGPT_UNROLLED
  for (int step = 0; step < 4; ++step) {
    const auto multiply = [&](const auto& b) {
      if constexpr (a_in_registers) {
        warpgroup_multiply(d, fragments[step], b, step > 0);
      } else {
        warpgroup_multiply(d, along(a_tile, step * 16), b, step > 0);
      }
    };
    if constexpr (across_b) {
      multiply(across(b_tile, step * 16 * 64, 64 * 64));
    } else {
      multiply(along(b_tile, step * 16));
    }
  }
  warpgroup_commit();
  warpgroup_wait<0>(d, fragments);
  for (int i = 0; i < columns / 2; ++i)
    c[(row + i / 2 % 2 * 8) * columns + i / 4 * 8 + column + i % 2] = d[i];
#endif
}

// C (64, 64) = A (64, 64 steps) B^T (64, 64 steps): a warpgroup multiplies what a thread of another
// one copies, by two stages.
template <Omitted omitted, class T>
FASTGPT_KERNEL(384, 1)
stream_products(const FASTGPT_GRID_CONSTANT TensorMap a_map,
                const FASTGPT_GRID_CONSTANT TensorMap b_map, float* c, int steps) {
#ifdef FASTGPT_HOPPER
  constexpr int tile = 64 * 64;
  FASTGPT_DYNAMIC_SHARED(T, a_tiles, 0, 2 * tile);
  FASTGPT_DYNAMIC_SHARED(T, b_tiles, 2 * 2 * tile, 2 * tile);
  FASTGPT_BARRIERS(full, 2);
  FASTGPT_BARRIERS(empty, 2);
  if (thread_index() == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      full.init(stage, 1);
      empty.init(stage, 128);
    }
    if constexpr (omitted != Omitted::kBarrierFence) fence_barriers();
  }
  if constexpr (omitted != Omitted::kBlockBarrier) block_barrier();
  if (warp_index() >= 4) {
    give_registers<24>();
    if (warp_index() == 4 && elect_one()) {
      for (int step = 0; step < steps; ++step) {
        const int stage = step % 2, round = step / 2 % 2;
        if constexpr (omitted != Omitted::kEmptyWait)
          empty.wait(stage, omitted == Omitted::kEmptyParity ? round : 1 - round);
        const int bytes = omitted == Omitted::kSomeBytes      ? 2 * tile
                          : omitted == Omitted::kTooManyBytes ? 4 * tile + 16
                                                              : 4 * tile;
        full.arrive_expecting(stage, bytes);
        copy_tensor(a_tiles, stage * tile, a_map, full, stage, step * 64, 0, 0, 0);
        copy_tensor(b_tiles, stage * tile, b_map, full, stage, step * 64, 0, 0, 0);
      }
    }
  } else {
    take_registers<232>();
    float d[32] = {};
    for (int step = 0; step < steps; ++step) {
      const int stage = step % 2, round = step / 2 % 2;
      if constexpr (omitted != Omitted::kFullWait)
        full.wait(stage, omitted == Omitted::kFullParity ? 1 - round : round);
      if constexpr (omitted != Omitted::kProductFence) warpgroup_fence(d);
      FASTGPT_UNROLLED
      for (int k = 0; k < 64; k += 16)
        warpgroup_multiply(d, along(a_tiles, stage * tile + k), along(b_tiles, stage * tile + k),
                           true);
      warpgroup_commit();
      if constexpr (omitted != Omitted::kProductWait) warpgroup_wait<0>(d);
      empty.arrive(stage);
    }
    warpgroup_wait<0>(d);
    const int row = warp_index() * 16 + lane_index() / 4, column = lane_index() % 4 * 2;
    for (int i = 0; i < 32; ++i) c[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + column + i % 2] = d[i];
  }
#endif
}

// C (64, 64) = A (64, 64) B^T, both stored by the threads themselves, for a product to see.
template <Omitted omitted, class T>
FASTGPT_KERNEL(128, 1)
multiply_stored(const T* a, const T* b, float* c) {
#ifdef FASTGPT_HOPPER
  FASTGPT_DYNAMIC_SHARED(T, a_tile, 0, 64 * 64);
  FASTGPT_DYNAMIC_SHARED(T, b_tile, 64 * 64 * 2, 64 * 64);
  for (int i = thread_index(); i < 64 * 64; i += block_threads()) {
    a_tile.store(place_in_tile(i / 64, i % 64), a[i]);
    b_tile.store(place_in_tile(i / 64, i % 64), b[i]);
  }
  if constexpr (omitted != Omitted::kAsynchronousFence) fence_asynchronous();
  if constexpr (omitted != Omitted::kBlockBarrier) block_barrier();
  float d[32];
  warpgroup_fence(d);
  FASTGPT_UNROLLED
  for (int k = 0; k < 64; k += 16) warpgroup_multiply(d, along(a_tile, k), along(b_tile, k), k > 0);
  warpgroup_commit();
  warpgroup_wait<0>(d);
  const int row = warp_index() * 16 + lane_index() / 4, column = lane_index() % 4 * 2;
  for (int i = 0; i < 32; ++i) c[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + column + i % 2] = d[i];
#endif
}

// ---- barriers of some threads ----

// Two teams take turns at a number in shared memory, which each of them multiplies and adds to.
template <Omitted omitted>
FASTGPT_KERNEL(256, 1)
take_turns(float* out, int rounds) {
#ifdef FASTGPT_HOPPER
  FASTGPT_SHARED(float, number, 1);
  if (thread_index() == 0) number.store(0, 1);
  block_barrier();
  const int team = warp_index() / 4;
  if (team == 1) named_barrier_arrive(1, 256);  // the first turn is the other's
  for (int round = 0; round < rounds; ++round) {
    if constexpr (omitted != Omitted::kTurn) named_barrier_sync(1 + team, 256);
    if (thread_index() % 128 == 77) number.store(0, 3 * number.load(0) + float(team));
    if constexpr (omitted != Omitted::kTurn)
      if (team == 0 || round + 1 < rounds) named_barrier_arrive(2 - team, 256);
  }
  block_barrier();
  if (thread_index() == 0) out[0] = number.load(0);
#endif
}

// How many lanes of each warp were elected, three times.
FASTGPT_KERNEL(256, 1) count_elected(int* out) {
#ifdef FASTGPT_HOPPER
  for (int i = 0; i < 3; ++i)
    if (elect_one()) out[warp_index()] += 1;
#endif
}

}  // namespace fastgpt::cuda
