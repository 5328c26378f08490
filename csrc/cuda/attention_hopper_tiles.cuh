// What the passes of attention on GPUs of 9.0a share: a block of three warpgroups, of which one
// copies tiles through stages (TMA), and the other two multiply them (wgmma) and keep what they
// find in registers.
#pragma once

#include "attention_tiles.cuh"
#include "launch.h"
#include "tensor_map.h"

namespace fastgpt::cuda {

constexpr int kWarpgroup = 4 * kWarp;
constexpr int kHopperThreads = 3 * kWarpgroup, kMultiplying = 2 * kWarpgroup;

// `rows_` rows of `width` columns in shared memory: slabs of 64 columns, one after the other.
template <int rows_, int width>
struct SlabTile {
  static constexpr int rows = rows_, slabs = (width + 63) / 64;
  static constexpr int slab = rows * 64, elements = slabs * slab, bytes = 2 * elements;

  // Of the columns from `column` on, in the rows from `row` on.
  FASTGPT_DEVICE static constexpr int at(int row, int column) {
    return column / 64 * slab + row * 64 + column % 64;
  }
};

#ifdef FASTGPT_HOPPER

// Starts the copy of the rows from `start` on of a head; the barrier expects its bytes.
template <class Tile, class T>
FASTGPT_DEVICE void copy_rows(const Shared<T>& to, int at, const TensorMap& map,
                              const Barriers& full, int barrier, int start, int head, int batch) {
  FASTGPT_UNROLLED for (int slab = 0; slab < Tile::slabs; ++slab) {
    copy_tensor(to, at + slab * Tile::slab, map, full, barrier, slab * 64, start, head, batch);
  }
}

// Tiles of one tensor on their way through stages: the tile `step`, counted through the whole
// block, is in the stage step % stages.
template <class T, class Tile, int stages>
struct TileStream {
  Shared<T> tiles;
  Barriers full, empty;

  static constexpr int kReaders = kMultiplying / kWarp;  // warps; one lane says that it is done

  // `writers`: those who arrive at `full`, of whom one starts the copies.
  FASTGPT_DEVICE void init(int writers = 1) const {
    for (int stage = 0; stage < stages; ++stage) {
      full.init(stage, writers);
      empty.init(stage, kReaders);
    }
  }

  FASTGPT_DEVICE static int stage(int step) { return step % stages; }
  FASTGPT_DEVICE static int parity(int step) { return step / stages % 2; }
  FASTGPT_DEVICE static int place(int step) { return stage(step) * Tile::elements; }

  // By those that write: until the stage may be written. In the first round it may at once.
  FASTGPT_DEVICE void await_room(int step) const { empty.wait(stage(step), 1 - parity(step)); }

  FASTGPT_DEVICE void fill(const TensorMap& map, int step, int start, int head, int batch) const {
    await_room(step);
    full.arrive_expecting(stage(step), Tile::bytes);
    copy_rows<Tile>(tiles, place(step), map, full, stage(step), start, head, batch);
  }

  // By the warps that multiply.
  FASTGPT_DEVICE void await(int step) const { full.wait(stage(step), parity(step)); }
  FASTGPT_DEVICE void release(int step) const {
    if (lane_index() == 0) empty.arrive(stage(step));
  }
};

// Whether any thread of the block says yes. `votes` has an element for each warp, and is used once.
FASTGPT_DEVICE bool any_of_warpgroups(bool x, const Shared<int>& votes) {
  x = any(x);
  if (lane_index() == 0) votes.store(warp_index(), x);
  block_barrier();
  bool found = false;
  for (int warp = 0; warp < kHopperThreads / kWarp; ++warp) found |= votes.load(warp) != 0;
  return found;
}

// By the whole block, before all else: the barriers, `full` that of its queries, and the places.
template <class T, class Tile, int stages, int rows>
FASTGPT_DEVICE void prepare(const Attention& a, const QueryBlock& block, const Barriers& full,
                            const TileStream<T, Tile, stages>& keys,
                            const TileStream<T, Tile, stages>& values,
                            const Queries<rows>& queries) {
  const int thread = thread_index();
  if (thread == 0) {
    full.init(0, 1);
    keys.init();
    values.init();
    fence_barriers();
  }
  if (thread < rows) queries.put_place(a, block.batch, block.head, thread, block.first + thread);
  block_barrier();
}

// By the warpgroup that copies: the tiles of a head's keys from `begin` on and of its values, all
// of them again if the others vote for it.
template <class T, class Tile, int stages>
FASTGPT_DEVICE void copy_keys(const Attention& a, const TileStream<T, Tile, stages>& keys,
                              const TensorMap& key, const TileStream<T, Tile, stages>& values,
                              const TensorMap& value, int begin, int tiles, int head, int batch,
                              const Shared<int>& votes) {
  int step = 0;
  for (bool careful = false;; careful = true) {
    if (warp_index() == 0 && elect_one()) {
      FASTGPT_ROLLED for (int t = 0; t < tiles; ++t) {
        keys.fill(key, step + t, begin + t * Tile::rows, head, batch);
        values.fill(value, step + t, begin + t * Tile::rows, head, batch);
      }
    }
    step += tiles;
    warp_barrier();
    if (!a.hides || careful || !any_of_warpgroups(false, votes)) return;
  }
}

// Puts 0 in the place of what is not finite in a tile, by all threads that multiply. They meet
// before, if any of them may still read it, and have to meet after.
template <class Tile, class T>
FASTGPT_DEVICE void make_tile_finite(const Shared<T>& tile, int at) {
  FASTGPT_ROLLED for (int i = thread_index() - kWarpgroup; i < Tile::elements; i += kMultiplying) {
    if (!is_finite(widen(tile.load(at + i)))) tile.store(at + i, T{0});
  }
  fence_asynchronous();
}

// The registers of products, one after the other.
template <int n_tiles>
FASTGPT_DEVICE float (&flat(Products<1, n_tiles>& x))[4 * n_tiles] {
  return reinterpret_cast<float (&)[4 * n_tiles]>(x);
}

// s = 64 rows of `a` times the rows of `b`, along `width` columns; without a wait. The rows begin
// at the elements `a_at` and `b_at`.
template <int width, class A, class B, int n_tiles, class T>
FASTGPT_DEVICE void multiply_tile_rows(const Shared<T>& a, int a_at, const Shared<T>& b, int b_at,
                                       Products<1, n_tiles>& s) {
  static_assert(8 * n_tiles == B::rows, "a column of s for each row of b");
  FASTGPT_UNROLLED for (int c = 0; c < width; c += 16) {
    warpgroup_multiply(flat(s), along(a, a_at + A::at(0, c)), along(b, b_at + B::at(0, c)), c > 0);
  }
  warpgroup_commit();
}

// acc += p times the rows of `b`, which begin at the element `at`; without a wait.
template <class B, int steps, int n_tiles, class T>
FASTGPT_DEVICE void multiply_tile_columns(const uint32_t (&p)[steps][4], const Shared<T>& b, int at,
                                          Products<1, n_tiles>& acc) {
  static_assert(16 * steps == B::rows, "a column of p for each row of b");
  FASTGPT_UNROLLED for (int j = 0; j < steps; ++j) {
    warpgroup_multiply(flat(acc), p[j], across(b, at + B::at(16 * j, 0), B::slab), true);
  }
  warpgroup_commit();
}

// Where a product left them, the next one wants them as its first operand.
template <class T, int n_tiles>
FASTGPT_DEVICE void round_products(const Products<1, n_tiles>& s, uint32_t (&p)[n_tiles / 2][4]) {
  FASTGPT_UNROLLED for (int j = 0; j < n_tiles / 2; ++j) {
    FASTGPT_UNROLLED for (int i = 0; i < 4; ++i) {
      const float (&x)[4] = s[0][2 * j + i / 2];
      p[j][i] = narrow_pair<T>(x[i % 2 * 2], x[i % 2 * 2 + 1]);
    }
  }
}

#endif

// ---- the launch ----

// Whether boxes could hold the rows of these sizes.
inline bool fits_boxes(const Attention& a) {
  return a.head_dim % 8 == 0 && a.value_dim % 8 == 0 && a.queries > 0 && a.keys > 0;
}

template <class T>
TensorMap map_of_heads(const Heads<const void>& x, int64_t batch, int64_t heads, int64_t rows,
                       int64_t columns, int box) {
  return make_tensor_map(
      static_cast<const T*>(x.data),
      {4, {columns, rows, heads, batch}, {1, x.row, x.head, x.batch}, {64, box, 1, 1}});
}

// Whether a score is its product, and there is no dropout: such calls have kernels of their own,
// since the code of these options is several times that of all else.
inline bool is_plain(const Attention& a) {
  return !a.scaled && a.softcap == 0 && !a.slopes && !a.seeds;
}

}  // namespace fastgpt::cuda
