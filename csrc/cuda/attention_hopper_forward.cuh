// Attention, forward, for GPUs of 9.0a: the same results as attention_forward.cuh, by the
// instructions that need no registers for what they move and multiply.
//
// A block has 128 queries of one head and three warpgroups. One thread of the first copies tiles of
// keys and of values into two stages each (TMA), and its warpgroup gives its registers to the
// others. Each of these has 64 queries; their scores, weights and outputs stay in registers:
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
// Registers of a thread: 24 of the copying warpgroup, 240 of the others, of which S takes half as
// many as a tile has keys, P a quarter, and O half the width: 160 at 128, and 188 at 256.
#pragma once

#include "attention_forward.cuh"
#include "attention_hopper_tiles.cuh"

namespace fastgpt::cuda {

struct ForwardMaps {
  TensorMap query, key, value;
};

// In bytes; the tiles at multiples of 1024. At width 256 they and the static memory, in whole
// kilobytes, are all that a block may have.
template <int width>
struct HopperForwardTiles {
  static constexpr int rows = 128, keys = width <= 128 ? 128 : 80;
  static constexpr int stages = 2;  // of keys, and of values
  using Query = SlabTile<rows, width>;
  using Key = SlabTile<keys, width>;
  static constexpr int q = 0, k = q + Query::bytes, v = k + stages * Key::bytes,
                       bytes = v + stages * Key::bytes;
};

#ifdef FASTGPT_HOPPER

// What a thread of a warpgroup that multiplies holds: elements of the two rows lane / 4 and the
// eighth after it, of the 16 of its warp.
template <class T, int width, bool plain>
struct Rows {
  using Tiles = HopperForwardTiles<width>;
  static constexpr int n_tiles = Tiles::keys / 8;
  float s[1][n_tiles][4];
  float o[1][width / 8][4];
  uint32_t p[n_tiles / 2][4];
  float top[2], sum[2], shrink[2];
  bool grows;

  // Makes weights of products.
  FASTGPT_DEVICE void soften(const Attention& a, float slope, const Queries<Tiles::rows>& queries,
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
    round_products<T>(s, p);
  }
};

#endif

// `plain`: see is_plain.
template <class T, int width, bool plain>
FASTGPT_KERNEL(kHopperThreads, 1)
attention_forward_hopper(const AttentionForward a, const FASTGPT_GRID_CONSTANT ForwardMaps maps) {
#ifdef FASTGPT_HOPPER
  using Tiles = HopperForwardTiles<width>;
  using Query = typename Tiles::Query;
  using Key = typename Tiles::Key;
  constexpr int stages = Tiles::stages;
  FASTGPT_DYNAMIC_SHARED_BYTES(Tiles::bytes);
  FASTGPT_DYNAMIC_SHARED(T, q, Tiles::q, Query::elements);
  FASTGPT_DYNAMIC_SHARED(T, k, Tiles::k, stages * Key::elements);
  FASTGPT_DYNAMIC_SHARED(T, v, Tiles::v, stages * Key::elements);
  FASTGPT_SHARED(int, places, Queries<Tiles::rows>::kPlaces);
  FASTGPT_SHARED(int, votes, kHopperThreads / kWarp);
  FASTGPT_BARRIERS(q_full, 1);
  FASTGPT_BARRIERS(k_full, stages);
  FASTGPT_BARRIERS(k_empty, stages);
  FASTGPT_BARRIERS(v_full, stages);
  FASTGPT_BARRIERS(v_empty, stages);
  const TileStream<T, Key, stages> keys{k, k_full, k_empty}, values{v, v_full, v_empty};
  const Queries<Tiles::rows> queries{places, {}};

  const QueryBlock block = query_block(a, Tiles::rows, Tiles::keys);
  const int first = block.first, batch = block.batch, head = block.head;
  const KeyRange range = block.range;
  const int tiles = range.tiles(Tiles::keys);
  prepare(a, block, q_full, keys, values, queries);

  if (warp_index() < 4) {
    give_registers<24>();
    if (warp_index() == 0 && elect_one() && tiles > 0) {
      q_full.arrive_expecting(0, Query::bytes);
      copy_rows<Query>(q, 0, maps.query, q_full, 0, first, head, batch);
    }
    copy_keys(a, keys, maps.key, values, maps.value, range.begin, tiles, head / a.group, batch,
              votes);
    return;
  }

  take_registers<240>();
  const int group = warp_index() / 4 - 1, warp_row = 16 * (warp_index() - 4);
  const int q_at = Query::at(64 * group, 0);
  const float slope = slope_of(a, batch, head);
  const float sink = sink_of(a, batch, head);
  Rows<T, width, plain> rows;
  if (tiles > 0) q_full.wait(0, 0);
  int step = 0;
  // Twice if a sum is not finite and that may come from a hidden value.
  bool careful = false;
  for (;; careful = true) {
    for_each(rows.o, [](float& x, int, int, int) { x = 0; });
    FASTGPT_UNROLLED for (int h = 0; h < 2; ++h) {
      rows.top[h] = sink;
      // Of the four threads that share a row.
      rows.sum[h] = lane_index() % 4 == 0 && sink != -INFINITY ? 1 : 0;
    }
    const auto soften = [&](int t) {
      const int start = range.begin + t * Tiles::keys;
      rows.soften(a, slope, queries, Elements<false>(warp_row, start),
                  range.all_seen(start, Tiles::keys));
    };
    const auto await_values = [&](int t) {
      values.await(step + t);
      if (!careful) return;
      make_tile_finite<Key>(v, values.place(step + t));
      named_barrier_sync(3, kMultiplying);
    };
    if (tiles > 0) {
      keys.await(step);
      warpgroup_fence(rows.s);
      multiply_tile_rows<width, Query, Key>(q, q_at, k, keys.place(step), rows.s);
      warpgroup_wait<0>(rows.s);
      keys.release(step);
      soften(0);
      rows.shrink_and_round();
      // The first turn is the first warpgroup's.
      if (group == 1 && tiles > 1) named_barrier_arrive(1, kMultiplying);
      FASTGPT_ROLLED for (int t = 1; t < tiles; ++t) {
        keys.await(step + t);
        await_values(t - 1);
        named_barrier_sync(1 + group, kMultiplying);
        warpgroup_fence(rows.s, rows.o, rows.p);
        multiply_tile_rows<width, Query, Key>(q, q_at, k, keys.place(step + t), rows.s);
        multiply_tile_columns<Key>(rows.p, v, values.place(step + t - 1), rows.o);
        if (group == 0 || t + 1 < tiles) named_barrier_arrive(2 - group, kMultiplying);
        warpgroup_wait<1>(rows.s);
        keys.release(step + t);
        soften(t);
        // Or it is softened after the wait, with idle tensor cores.
        pin(rows.s);
        finish(rows.sum);
        warpgroup_wait<0>(rows.o, rows.p);
        values.release(step + t - 1);
        rows.shrink_and_round();
      }
      await_values(tiles - 1);
      warpgroup_fence(rows.o, rows.p);
      multiply_tile_columns<Key>(rows.p, v, values.place(step + tiles - 1), rows.o);
      warpgroup_wait<0>(rows.o, rows.p);
      values.release(step + tiles - 1);
      step += tiles;
    }
    if (!a.hides || careful) break;
    bool spread = false;
    for_each(rows.o, [&](float& x, int, int, int) { spread |= !is_finite(x); });
    if (!any_of_warpgroups(spread, votes)) break;
  }

  store_rows<T>(a, batch, head, first + warp_row, rows.o[0], rows.top, rows.sum);
  if (!careful) return;
  named_barrier_sync(3, kMultiplying);
  add_what_is_not_finite<T>(a, batch, head, first, Tiles::rows, thread_index() - kWarpgroup,
                            kMultiplying);
#endif
}

template <class T, int width>
void launch_attention_forward_hopper(AttentionForward a, int section, void* stream) {
  using Tiles = HopperForwardTiles<width>;
  a.section = section;
  const ForwardMaps maps = {
      map_of_heads<T>(a.query, a.batch, a.query_heads, a.queries, a.head_dim, Tiles::rows),
      map_of_heads<T>(a.key, a.batch, a.heads, a.keys, a.head_dim, Tiles::keys),
      map_of_heads<T>(a.value, a.batch, a.heads, a.keys, a.value_dim, Tiles::keys)};
  const int64_t tiles = (int64_t(a.queries) + Tiles::rows - 1) / Tiles::rows;
  launch(is_plain(a) ? &attention_forward_hopper<T, width, true>
                     : &attention_forward_hopper<T, width, false>,
         Grid{int64_t(a.batch) * a.query_heads * tiles, kHopperThreads, 1, Tiles::bytes},
         Stream(stream), a, maps);
}

}  // namespace fastgpt::cuda
