// Attention, forward, for GPUs of 9.0a: the same results as attention_forward.cuh, by the
// instructions that need no registers for what they move and multiply.
//
// A block has 128 queries of one head and three warpgroups. One thread of the first copies tiles of
// 128 keys and of 128 values into two stages each (TMA), and its warpgroup gives its registers to
// the others. Each of these has 64 queries; their scores, weights and outputs stay in registers:
//
//   S = Q K_0^T; P = soften(S)
//   for each further tile t:  S = Q K_t^T, at once with O += P V_(t-1)
//                             soften(S), as soon as S is there, while O grows
//                             O = O shrink, P = S
//   O += P V_last
//
// and the two take turns to issue their products, so that one softens while the other multiplies
// (FlashAttention-3, Shah et al. 2024). A product's first operand comes from registers: P, as the
// product S left it, and rounded.
//
// Registers of a thread: 24 of the copying warpgroup, 240 of the others, of which S and O take 64
// each at width 128, and P 32.
#pragma once

#include "attention_forward.cuh"
#include "tensor_map.h"

namespace fastgpt::cuda {

constexpr int kWarpgroup = 4 * kWarp;
constexpr int kHopperThreads = 3 * kWarpgroup, kHopperRows = 128, kHopperKeys = 128;
constexpr int kStages = 2;  // of keys, and of values

struct HopperMaps {
  TensorMap query, key, value;
};

// In bytes; the tiles at multiples of 1024.
template <int width>
struct HopperTiles {
  static constexpr int tile = kHopperKeys * width;  // elements
  static constexpr int slab = kHopperKeys * 64;     // of a tile, in slabs of 64 columns
  static constexpr int q = 0, k = q + kHopperRows * width * 2, v = k + kStages * tile * 2,
                       places = v + kStages * tile * 2,
                       votes = places + Queries<kHopperRows>::kPlaces * 4,
                       bytes = votes + kHopperThreads / kWarp * 4;
};

#ifdef FASTGPT_HOPPER

// Whether any thread of the block says yes.
FASTGPT_DEVICE bool any_of_warpgroups(bool x, const Shared<int>& votes) {
  x = any(x);
  if (lane_index() == 0) votes.store(warp_index(), x);
  block_barrier();
  bool found = false;
  for (int warp = 0; warp < kHopperThreads / kWarp; ++warp) found |= votes.load(warp) != 0;
  return found;
}

// The tiles of keys and values, and the barriers of their stages: the tile `step`, counted through
// the whole block, is in the stage step % kStages.
template <class T, int width>
struct KeyStream {
  using Tiles = HopperTiles<width>;
  Shared<T> k, v;
  Barriers k_full, k_empty, v_full, v_empty;

  static constexpr int kReaders = 8;  // warps, of each of which one lane says that it is done

  FASTGPT_DEVICE void init() const {
    for (int stage = 0; stage < kStages; ++stage) {
      k_full.init(stage, 1);
      v_full.init(stage, 1);
      k_empty.init(stage, kReaders);
      v_empty.init(stage, kReaders);
    }
  }

  FASTGPT_DEVICE static int parity(int step) { return step / kStages % 2; }
  FASTGPT_DEVICE static int place(int step) { return step % kStages * Tiles::tile; }

  // By the thread that copies: the keys from `start` on of a head.
  FASTGPT_DEVICE static void fill(const Shared<T>& tiles, const TensorMap& map,
                                  const Barriers& full, const Barriers& empty, int step, int start,
                                  int head, int batch) {
    const int stage = step % kStages;
    empty.wait(stage, 1 - parity(step));  // for the first round at once
    full.arrive_expecting(stage, Tiles::tile * 2);
    for (int slab = 0; slab < width / 64; ++slab) {
      copy_tensor(tiles, place(step) + slab * Tiles::slab, map, full, stage, slab * 64, start, head,
                  batch);
    }
  }

  // By the warps that multiply.
  FASTGPT_DEVICE static void await(const Barriers& full, int step) {
    full.wait(step % kStages, parity(step));
  }
  FASTGPT_DEVICE static void release(const Barriers& empty, int step) {
    if (lane_index() == 0) empty.arrive(step % kStages);
  }
};

// What a thread of a warpgroup that multiplies holds: elements of the two rows lane / 4 and the
// eighth after it, of the 16 of its warp.
template <class T, int width, bool plain>
struct Rows {
  static constexpr int n_tiles = kHopperKeys / 8;
  float s[1][n_tiles][4];
  float o[1][width / 8][4];
  uint32_t p[n_tiles / 2][4];
  float top[2], sum[2], shrink[2];
  bool grows;

  // Registers of a product, one after the other.
  template <int tiles>
  static FASTGPT_DEVICE float (&flat(float (&x)[1][tiles][4]))[4 * tiles] {
    return reinterpret_cast<float (&)[4 * tiles]>(x);
  }

  // s = q k^T for the warpgroup's rows of q, from the element `at` on, without a wait.
  FASTGPT_DEVICE void multiply_keys(const Shared<T>& q, int at, const Shared<T>& k, int k_at) {
    FASTGPT_UNROLLED for (int c = 0; c < width; c += 16) {
      const int column = c / 64 * HopperTiles<width>::slab + c % 64;
      warpgroup_multiply(flat(s), along(q, at + column), along(k, k_at + column), c > 0);
    }
    warpgroup_commit();
  }

  // o += p v.
  FASTGPT_DEVICE void multiply_values(const Shared<T>& v, int v_at) {
    FASTGPT_UNROLLED for (int j = 0; j < kHopperKeys / 16; ++j) {
      warpgroup_multiply(flat(o), p[j], across(v, v_at + j * 16 * 64, HopperTiles<width>::slab),
                         true);
    }
    warpgroup_commit();
  }

  // Makes weights of products.
  FASTGPT_DEVICE void soften(const Attention& a, float slope, const Queries<kHopperRows>& queries,
                             const Elements<false>& at, bool all_seen) {
    if constexpr (!plain) form_scores<false>(a, slope, queries, at, s, s);
    if (!all_seen) hide(queries, at, -INFINITY, s);
    grows = false;
    FASTGPT_UNROLLED for (int h = 0; h < 2; ++h) {
      float largest = s[0][0][2 * h];
      FASTGPT_UNROLLED for (int n = 0; n < n_tiles; ++n) {
        largest = std::fmax(largest, std::fmax(s[0][n][2 * h], s[0][n][2 * h + 1]));
      }
      largest = std::fmax(largest, shuffle_xor(largest, 1));
      largest = std::fmax(largest, shuffle_xor(largest, 2));
      const float above = std::fmax(top[h], largest), level = level_of(above);
      grows |= above > top[h];
      shrink[h] = exp2_approximate((top[h] - level) * a.factor);
      top[h] = above;
      float part = 0;
      FASTGPT_UNROLLED for (int n = 0; n < n_tiles; ++n) {
        FASTGPT_UNROLLED for (int e = 2 * h; e < 2 * h + 2; ++e) {
          s[0][n][e] = exp2_approximate((s[0][n][e] - level) * a.factor);
          part += s[0][n][e];
        }
      }
      sum[h] = sum[h] * shrink[h] + part;
    }
    if constexpr (!plain) {
      if (a.seeds) drop(a, queries, at, 1.0f, s);
    }
  }

  // After `soften`, when no product uses them: the sums from the new maximum on, and p.
  FASTGPT_DEVICE void shrink_and_round() {
    if (any(grows)) for_each(o, [&](float& x, int, int, int e) { x *= shrink[e / 2]; });
    FASTGPT_UNROLLED for (int j = 0; j < n_tiles / 2; ++j) {
      FASTGPT_UNROLLED for (int i = 0; i < 4; ++i) {
        const float (&x)[4] = s[0][2 * j + i / 2];
        p[j][i] = narrow_pair<T>(x[i % 2 * 2], x[i % 2 * 2 + 1]);
      }
    }
  }
};

// Puts 0 in the place of what is not finite in a tile, for both warpgroups that multiply it.
template <int count, class T>
FASTGPT_DEVICE void make_tile_finite(const Shared<T>& tile, int at) {
  constexpr int threads = kHopperThreads - kWarpgroup;
  FASTGPT_ROLLED for (int i = thread_index() - kWarpgroup; i < count; i += threads) {
    if (!is_finite(widen(tile.load(at + i)))) tile.store(at + i, T{0});
  }
  fence_asynchronous();
  named_barrier_sync(3, threads);
}

#endif

// `plain`: a score is its product, and there is no dropout. The code of these options is several
// times that of all else.
template <class T, int width, bool plain>
FASTGPT_KERNEL(kHopperThreads, 1)
attention_forward_hopper(const AttentionForward a, const FASTGPT_GRID_CONSTANT HopperMaps maps) {
#ifdef FASTGPT_HOPPER
  using Tiles = HopperTiles<width>;
  FASTGPT_DYNAMIC_SHARED_BYTES(Tiles::bytes);
  FASTGPT_DYNAMIC_SHARED(T, q, Tiles::q, kHopperRows * width);
  FASTGPT_DYNAMIC_SHARED(T, k, Tiles::k, kStages * Tiles::tile);
  FASTGPT_DYNAMIC_SHARED(T, v, Tiles::v, kStages * Tiles::tile);
  FASTGPT_DYNAMIC_SHARED(int, places, Tiles::places, Queries<kHopperRows>::kPlaces);
  FASTGPT_DYNAMIC_SHARED(int, votes, Tiles::votes, kHopperThreads / kWarp);
  FASTGPT_BARRIERS(q_full, 1);
  FASTGPT_BARRIERS(k_full, kStages);
  FASTGPT_BARRIERS(k_empty, kStages);
  FASTGPT_BARRIERS(v_full, kStages);
  FASTGPT_BARRIERS(v_empty, kStages);
  const KeyStream<T, width> stream{k, v, k_full, k_empty, v_full, v_empty};
  const Queries<kHopperRows> queries{places, {}};

  const int query_tiles = (a.queries + kHopperRows - 1) / kHopperRows;
  const Place place(query_tiles, a.section);
  // The last queries have most keys under a causal mask.
  const int first = (query_tiles - 1 - place.tile) * kHopperRows;
  const int batch = place.head / a.query_heads, head = place.head % a.query_heads;
  const KeyRange range(a, first, smaller(first + kHopperRows, a.queries) - 1, kHopperKeys);
  const int tiles = (larger(range.end - range.begin, 0) + kHopperKeys - 1) / kHopperKeys;

  if (thread_index() == 0) {
    q_full.init(0, 1);
    stream.init();
    fence_barriers();
  }
  if (thread_index() < kHopperRows)
    queries.put_place(a, batch, head, thread_index(), first + thread_index());
  block_barrier();

  // Twice if a sum is not finite and that may come from a hidden value.
  int step = 0;
  if (warp_index() < 4) {
    give_registers<24>();
    if (warp_index() == 0 && elect_one() && tiles > 0) {
      q_full.arrive_expecting(0, kHopperRows * width * 2);
      for (int slab = 0; slab < width / 64; ++slab) {
        copy_tensor(q, slab * Tiles::slab, maps.query, q_full, 0, slab * 64, first, head, batch);
      }
    }
    for (bool careful = false;; careful = true) {
      if (warp_index() == 0 && elect_one()) {
        FASTGPT_ROLLED for (int t = 0; t < tiles; ++t) {
          const int start = range.begin + t * kHopperKeys;
          stream.fill(k, maps.key, k_full, k_empty, step + t, start, head / a.group, batch);
          stream.fill(v, maps.value, v_full, v_empty, step + t, start, head / a.group, batch);
        }
      }
      step += tiles;
      warp_barrier();
      if (!a.hides || careful || !any_of_warpgroups(false, votes)) break;
      block_barrier();  // before the next votes
    }
    return;
  }

  take_registers<240>();
  const int group = warp_index() / 4 - 1, warp_row = 16 * (warp_index() - 4);
  const int q_at = group * 64 * 64;
  constexpr int both = kHopperThreads - kWarpgroup;
  const float slope = slope_of(a, batch, head);
  const float sink = a.sinks ? load(a.sinks + batch * a.sinks_batch + head) / a.unit : -INFINITY;
  Rows<T, width, plain> rows;
  if (tiles > 0) q_full.wait(0, 0);
  bool careful = false;
  for (;; careful = true) {
    for_each(rows.o, [](float& x, int, int, int) { x = 0; });
    FASTGPT_UNROLLED for (int h = 0; h < 2; ++h) {
      rows.top[h] = sink;
      // Of the four threads that share a row.
      rows.sum[h] = lane_index() % 4 == 0 && sink != -INFINITY ? 1 : 0;
    }
    const auto soften = [&](int t) {
      const int start = range.begin + t * kHopperKeys;
      rows.soften(a, slope, queries, Elements<false>(warp_row, start),
                  range.all_seen(start, kHopperKeys));
    };
    const auto await_values = [&](int t) {
      stream.await(v_full, step + t);
      if (careful) make_tile_finite<Tiles::tile>(v, stream.place(step + t));
    };
    if (tiles > 0) {
      stream.await(k_full, step);
      warpgroup_fence(rows.s);
      rows.multiply_keys(q, q_at, k, stream.place(step));
      warpgroup_wait<0>(rows.s);
      stream.release(k_empty, step);
      soften(0);
      rows.shrink_and_round();
      // The first turn is the first warpgroup's.
      if (group == 1 && tiles > 1) named_barrier_arrive(1, both);
      FASTGPT_ROLLED for (int t = 1; t < tiles; ++t) {
        stream.await(k_full, step + t);
        await_values(t - 1);
        named_barrier_sync(1 + group, both);
        warpgroup_fence(rows.s, rows.o, rows.p);
        rows.multiply_keys(q, q_at, k, stream.place(step + t));
        rows.multiply_values(v, stream.place(step + t - 1));
        if (group == 0 || t + 1 < tiles) named_barrier_arrive(2 - group, both);
        warpgroup_wait<1>(rows.s);
        stream.release(k_empty, step + t);
        soften(t);
        // Or it is softened after the wait, with idle tensor cores.
        pin(rows.s);
        finish(rows.sum[0] + rows.sum[1]);
        warpgroup_wait<0>(rows.o, rows.p);
        stream.release(v_empty, step + t - 1);
        rows.shrink_and_round();
      }
      await_values(tiles - 1);
      warpgroup_fence(rows.o, rows.p);
      rows.multiply_values(v, stream.place(step + tiles - 1));
      warpgroup_wait<0>(rows.o, rows.p);
      stream.release(v_empty, step + tiles - 1);
      step += tiles;
    }
    if (!a.hides || careful) break;
    bool spread = false;
    for_each(rows.o, [&](float& x, int, int, int) { spread |= !is_finite(x); });
    if (!any_of_warpgroups(spread, votes)) break;
    block_barrier();
  }

  store_rows<T>(a, batch, head, first + warp_row, rows.o[0], rows.top, rows.sum);
  if (!careful) return;
  named_barrier_sync(3, both);
  add_what_is_not_finite<T>(a, batch, head, first, kHopperRows, thread_index() - kWarpgroup, both);
#endif
}

// ---- the launch ----

// Whether its tensors can be copied in boxes: rows of whole vectors, and nothing is repeated.
inline bool hopper_takes(const Attention& a) {
  const auto boxes = [](const Heads<const void>& x, int64_t batch, int64_t heads, int64_t rows) {
    return x.vectors && (batch == 1 || x.batch > 0) && (heads == 1 || x.head > 0) &&
           (rows == 1 || x.row > 0);
  };
  return a.keys > 0 && boxes(a.query, a.batch, a.query_heads, a.queries) &&
         boxes(a.key, a.batch, a.heads, a.keys) && boxes(a.value, a.batch, a.heads, a.keys);
}

template <class T>
TensorMap map_of_heads(const Heads<const void>& x, int64_t batch, int64_t heads, int64_t rows,
                       int64_t columns, int box) {
  return make_tensor_map(
      static_cast<const T*>(x.data),
      {4, {columns, rows, heads, batch}, {1, x.row, x.head, x.batch}, {64, box, 1, 1}});
}

template <class T, int width>
void launch_attention_forward_hopper(AttentionForward a, int section, void* stream) {
  a.section = section;
  const HopperMaps maps = {
      map_of_heads<T>(a.query, a.batch, a.query_heads, a.queries, a.head_dim, kHopperRows),
      map_of_heads<T>(a.key, a.batch, a.heads, a.keys, a.head_dim, kHopperKeys),
      map_of_heads<T>(a.value, a.batch, a.heads, a.keys, a.value_dim, kHopperKeys)};
  const int64_t tiles = (int64_t(a.queries) + kHopperRows - 1) / kHopperRows;
  const bool plain = !a.scaled && a.softcap == 0 && !a.slopes && !a.seeds;
  launch(
      plain ? &attention_forward_hopper<T, width, true>
            : &attention_forward_hopper<T, width, false>,
      Grid{int64_t(a.batch) * a.query_heads * tiles, kHopperThreads, 1, HopperTiles<width>::bytes},
      Stream(stream), a, maps);
}

}  // namespace fastgpt::cuda
