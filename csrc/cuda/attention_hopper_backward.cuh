// Attention, backward, for GPUs of 9.0a: the two passes of attention_backward.cuh, by warpgroups as
// in attention_hopper_forward.cuh. The two that multiply have 64 rows each of the block's 128, and
// take no turns: a tile's products take each of them two to three times as long as what lies
// between, so that the other's fill the tensor cores.
//
// A pass over the queries, per tile of keys:      S = Q K^T, dP = G V^T, dQ += dS K
// A pass over the keys, per tile of queries:      S = K Q^T, dP = V G^T, dV += P G, dK += dS Q
//
// The first operands P and dS come from the registers in which the products S and dP were left. A
// tile's weights are formed while dP is multiplied.
//
// As on Ampere, heads above 128 take a pass over the keys for each of dK and dV.
//
// Registers of a thread at width 128: of 240 in the pass over the queries 64 of dQ, 64 each of S
// and dP, 32 of dS; of 232 in that over the keys 64 each of dK and dV, 32 each of S and dP, 16 each
// of P and dS. There the copying warpgroup keeps 40, since it also tells what is known of each
// query.
#pragma once

#include "attention_backward.cuh"
#include "attention_hopper_tiles.cuh"

namespace fastgpt::cuda {

struct BackwardMaps {
  TensorMap query, grad_output, key, value;
};

// In bytes; the tiles at multiples of 1024. What options need beside S and dP has room in registers
// only with half as many keys.
template <int width, bool plain>
struct HopperQueryGradientTiles {
  static constexpr int rows = 128, keys = plain && width <= 128 ? 128 : 64;
  static constexpr int stages = width <= 128 ? 2 : 1;
  using Query = SlabTile<rows, width>;
  using Key = SlabTile<keys, width>;
  static constexpr int q = 0, g = q + Query::bytes, k = g + Query::bytes,
                       v = k + stages * Key::bytes, places = v + stages * Key::bytes,
                       numbers = places + Queries<rows>::kPlaces * 4,
                       votes = numbers + Queries<rows>::kNumbers * 4,
                       bytes = votes + kHopperThreads / kWarp * 4;
};

// The values are needed for the gradients of the keys only.
template <int width, bool of_keys>
struct HopperKeyGradientTiles {
  static constexpr int rows = 128, queries = 64;
  static constexpr int stages = width <= 128 || !of_keys ? 2 : 1;
  using Key = SlabTile<rows, width>;
  using Query = SlabTile<queries, width>;
  static constexpr int k = 0, v = k + Key::bytes, q = v + (of_keys ? Key::bytes : 0),
                       g = q + stages * Query::bytes, places = g + stages * Query::bytes,
                       numbers = places + stages * Queries<queries>::kPlaces * 4,
                       votes = numbers + stages * Queries<queries>::kNumbers * 4,
                       bytes = votes + kHopperThreads / kWarp * 4;
};

#ifdef FASTGPT_HOPPER

// Of weights p, in s, and products dp: what form_gradients makes of them.
template <int n_tiles, int count, bool transposed>
FASTGPT_DEVICE void form_plain_gradients(const Queries<count>& queries,
                                         const Elements<transposed>& at, bool all_seen,
                                         Products<1, n_tiles>& s, Products<1, n_tiles>& dp) {
  for_each(dp, [&](float& x, int m, int n, int e) {
    x = (x - queries.delta(at.query(m, n, e))) * s[m][n][e];
  });
  if (all_seen) return;
  hide(queries, at, 0.0f, s);
  hide(queries, at, 0.0f, dp);
}

// Of the 16 queries from `first` on, which are a warp's and have rows of whole vectors: the numbers
// of those that exist, and zeros. `row`: of the first one in the tile.
template <class T, int count>
FASTGPT_DEVICE void find_numbers(const AttentionBackward& a, int batch, int head, int first,
                                 const Queries<count>& queries, int row) {
  const float sink = sink_of(a, batch, head);
  const T* const upstream = head_of<T>(a.grad_output, batch, head);
  const T* const output = head_of<T>(a.output, batch, head);
  const T* const rounding = head_of<T>(a.rounding, batch, head);
  const int half = lane_index() / 16, lane = lane_index() % 16;
  // Two rows at once, and loads of so many of these under way.
  FASTGPT_UNROLLED for (int r = half; r < 16; r += 2) {
    const int i = first + r;
    float product = 0;
    if (i < a.queries) {
      for (int column = 8 * lane; column < a.value_dim; column += 8 * 16) {
        const Vector<T> g = load_vector(upstream + i * a.grad_output.row + column);
        const Vector<T> o = load_vector(output + i * a.output.row + column);
        const Vector<T> lost = load_vector(rounding + i * a.rounding.row + column);
        FASTGPT_UNROLLED for (int e = 0; e < 8; ++e) {
          product += (widen(o.data[e]) + widen(lost.data[e])) * widen(g.data[e]);
        }
      }
    }
    for (int mask = 8; mask > 0; mask /= 2) product += shuffle_xor(product, mask);
    if (lane != 0) continue;
    if (i < a.queries) {
      put_numbers(a, batch, head, sink, i, product, queries, row + r);
    } else {
      queries.put_numbers(row + r, 0, 0, 0);
    }
  }
}

#endif

// ---- the pass over the queries ----

// `plain`: see is_plain.
template <class T, int width, bool plain>
FASTGPT_KERNEL(kHopperThreads, 1)
attention_query_gradient_hopper(const AttentionBackward a,
                                const FASTGPT_GRID_CONSTANT BackwardMaps maps) {
#ifdef FASTGPT_HOPPER
  using Tiles = HopperQueryGradientTiles<width, plain>;
  using Query = typename Tiles::Query;
  using Key = typename Tiles::Key;
  constexpr int stages = Tiles::stages;
  FASTGPT_DYNAMIC_SHARED_BYTES(Tiles::bytes);
  FASTGPT_DYNAMIC_SHARED(T, q, Tiles::q, Query::elements);
  FASTGPT_DYNAMIC_SHARED(T, g, Tiles::g, Query::elements);
  FASTGPT_DYNAMIC_SHARED(T, k, Tiles::k, stages * Key::elements);
  FASTGPT_DYNAMIC_SHARED(T, v, Tiles::v, stages * Key::elements);
  FASTGPT_DYNAMIC_SHARED(int, places, Tiles::places, Queries<Tiles::rows>::kPlaces);
  FASTGPT_DYNAMIC_SHARED(float, numbers, Tiles::numbers, Queries<Tiles::rows>::kNumbers);
  FASTGPT_DYNAMIC_SHARED(int, votes, Tiles::votes, kHopperThreads / kWarp);
  FASTGPT_BARRIERS(queries_full, 1);
  FASTGPT_BARRIERS(k_full, stages);
  FASTGPT_BARRIERS(k_empty, stages);
  FASTGPT_BARRIERS(v_full, stages);
  FASTGPT_BARRIERS(v_empty, stages);
  const TileStream<T, Key, stages> keys{k, k_full, k_empty}, values{v, v_full, v_empty};
  const Queries<Tiles::rows> queries{places, numbers};

  const QueryBlock block = query_block(a, Tiles::rows, Tiles::keys);
  const int first = block.first, batch = block.batch, head = block.head;
  const KeyRange range = block.range;
  const int tiles = range.tiles(Tiles::keys);
  prepare(a, block, queries_full, keys, values, queries);

  if (warp_index() < 4) {
    give_registers<24>();
    if (warp_index() == 0 && elect_one() && tiles > 0) {
      queries_full.arrive_expecting(0, 2 * Query::bytes);
      copy_rows<Query>(q, 0, maps.query, queries_full, 0, first, head, batch);
      copy_rows<Query>(g, 0, maps.grad_output, queries_full, 0, first, head, batch);
    }
    copy_keys(a, keys, maps.key, values, maps.value, range.begin, tiles, head / a.group, batch,
              votes);
    return;
  }

  take_registers<240>();
  const int group = warp_index() / 4 - 1, warp_row = 16 * (warp_index() - 4);
  uint32_t q_at = Query::at(64 * group, 0);
  const float slope = slope_of(a, batch, head);
  find_numbers<T>(a, batch, head, first + warp_row, queries, warp_row);
  warp_barrier();
  constexpr int n_tiles = Tiles::keys / 8;
  float s[1][n_tiles][4], dp[1][n_tiles][4], acc[1][width / 8][4];
  uint32_t ds[n_tiles / 2][4];
  if (tiles > 0) queries_full.wait(0, 0);
  int step = 0;
  // Twice if a sum is not finite and that may come from a hidden key.
  bool careful = false;
  for (;; careful = true) {
    for_each(acc, [](float& x, int, int, int) { x = 0; });
    FASTGPT_ROLLED for (int t = 0; t < tiles; ++t) {
      const int start = range.begin + t * Tiles::keys;
      const Elements<false> at(warp_row, start);
      const bool all_seen = range.all_seen(start, Tiles::keys);
      pin(q_at);  // or descriptors of all of its columns are kept in registers
      keys.await(step + t);
      warpgroup_fence(s);
      multiply_tile_rows<width, Query, Key>(q, int(q_at), k, keys.place(step + t), s);
      values.await(step + t);
      warpgroup_fence(dp);
      multiply_tile_rows<width, Query, Key>(g, int(q_at), v, values.place(step + t), dp);
      if constexpr (plain) {
        warpgroup_wait<1>(s);
        weigh(a, queries, at, s);
        finish(s);
        warpgroup_wait<0>(dp);
      } else {
        warpgroup_wait<0>(s, dp);
      }
      values.release(step + t);
      if constexpr (plain) {
        form_plain_gradients(queries, at, all_seen, s, dp);
      } else {
        form_gradients(a, slope, queries, at, all_seen, s, dp);
      }
      round_products<T>(dp, ds);
      if (careful) {
        named_barrier_sync(1, kMultiplying);
        make_tile_finite<Key>(k, keys.place(step + t));
        named_barrier_sync(1, kMultiplying);
      }
      warpgroup_fence(acc, ds);
      multiply_tile_columns<Key>(ds, k, keys.place(step + t), acc);
      warpgroup_wait<0>(acc, ds);
      keys.release(step + t);
    }
    step += tiles;
    if (!a.hides || careful) break;
    bool spread = false;
    for_each(acc, [&](float& x, int, int, int) { spread |= !is_finite(x); });
    if (!any_of_warpgroups(spread, votes)) break;
  }

  T* const result = head_of<T>(a.grad_query, batch, head);
  store_rows(acc, a.slope, result, a.grad_query.row, first + warp_row, a.queries, a.head_dim);
  if (!careful) return;
  named_barrier_sync(1, kMultiplying);
  spoil_query_gradients<T>(a, batch, head, first, Tiles::rows, thread_index() - kWarpgroup,
                           kMultiplying);
#endif
}

// ---- the pass over the keys ----

template <class T, int width, bool plain, bool of_keys, bool of_values>
FASTGPT_KERNEL(kHopperThreads, 1)
attention_key_gradient_hopper(const AttentionBackward a,
                              const FASTGPT_GRID_CONSTANT BackwardMaps maps) {
#ifdef FASTGPT_HOPPER
  using Tiles = HopperKeyGradientTiles<width, of_keys>;
  using Query = typename Tiles::Query;
  using Key = typename Tiles::Key;
  constexpr int stages = Tiles::stages, size = Tiles::queries;
  FASTGPT_DYNAMIC_SHARED_BYTES(Tiles::bytes);
  FASTGPT_DYNAMIC_SHARED(T, k, Tiles::k, Key::elements);
  FASTGPT_DYNAMIC_SHARED(T, v, Tiles::v, of_keys ? Key::elements : 0);
  FASTGPT_DYNAMIC_SHARED(T, q, Tiles::q, stages * Query::elements);
  FASTGPT_DYNAMIC_SHARED(T, g, Tiles::g, stages * Query::elements);
  FASTGPT_DYNAMIC_SHARED(int, places, Tiles::places, stages* Queries<size>::kPlaces);
  FASTGPT_DYNAMIC_SHARED(float, numbers, Tiles::numbers, stages* Queries<size>::kNumbers);
  FASTGPT_DYNAMIC_SHARED(int, votes, Tiles::votes, kHopperThreads / kWarp);
  FASTGPT_BARRIERS(keys_full, 1);
  FASTGPT_BARRIERS(q_full, stages);
  FASTGPT_BARRIERS(q_empty, stages);
  FASTGPT_BARRIERS(g_full, stages);
  FASTGPT_BARRIERS(g_empty, stages);
  const TileStream<T, Query, stages> queries{q, q_full, q_empty}, upstream{g, g_full, g_empty};
  const auto known_of = [&](int step) {
    const int stage = queries.stage(step);
    return Queries<size>{places, numbers, stage * Queries<size>::kPlaces,
                         stage * Queries<size>::kNumbers};
  };

  // The first keys have most queries under a causal mask.
  const Place place((a.keys + Tiles::rows - 1) / Tiles::rows, a.section);
  const int first = place.tile * Tiles::rows;
  const int batch = place.head / a.heads, key_head = place.head % a.heads;
  const QueryRange range(a, first, smaller(first + Tiles::rows, a.keys) - 1);
  const QueryTiles all(range, size, key_head * a.group, a.group);

  constexpr int kTellers = size / kWarp;  // warps, with a thread for each query of a tile
  if (thread_index() == 0) {
    keys_full.init(0, 1);
    queries.init(1 + kTellers);
    upstream.init();
    fence_barriers();
  }
  block_barrier();

  // Twice if a sum is not finite and that may come from a hidden query.
  int step = 0;
  if (warp_index() < 4) {
    give_registers<40>();
    if (warp_index() == 0 && elect_one() && all.left > 0) {
      keys_full.arrive_expecting(0, (of_keys ? 2 : 1) * Key::bytes);
      copy_rows<Key>(k, 0, maps.key, keys_full, 0, first, key_head, batch);
      if (of_keys) copy_rows<Key>(v, 0, maps.value, keys_full, 0, first, key_head, batch);
    }
    for (bool careful = false;; careful = true) {
      if (warp_index() == 0 && elect_one()) {
        int filled = step;
        for (QueryTiles tile = all; tile.left > 0; tile.advance(), ++filled) {
          queries.fill(maps.query, filled, tile.start, tile.head, batch);
          upstream.fill(maps.grad_output, filled, tile.start, tile.head, batch);
        }
      } else if (warp_index() >= 1 && warp_index() <= kTellers) {
        const int r = thread_index() - kWarp;
        int told = step;
        for (QueryTiles tile = all; tile.left > 0; tile.advance(), ++told) {
          const int i = tile.start + r;
          float row_max = 0, inverse = 0, delta = 0;
          if (i < a.queries) {
            const int64_t row = (int64_t(batch) * a.query_heads + tile.head) * a.queries + i;
            row_max = load(a.row_max + row);
            inverse = load(a.row_inverse + row);
            delta = load(a.row_delta + row);
          }
          queries.await_room(told);
          const Queries<size> known = known_of(told);
          known.put_numbers(r, row_max, inverse, delta);
          known.put_place(a, batch, tile.head, r, i);
          warp_barrier();
          if (lane_index() == 0) queries.full.arrive(queries.stage(told));
        }
      }
      step += all.left;
      warp_barrier();
      if (!a.hides || careful || !any_of_warpgroups(false, votes)) break;
    }
    return;
  }

  take_registers<232>();
  const int group = warp_index() / 4 - 1, warp_row = 16 * (warp_index() - 4);
  uint32_t k_at = Key::at(64 * group, 0);
  const Elements<true> at(warp_row + first, 0);
  constexpr int n_tiles = size / 8;
  float s[1][n_tiles][4], dp[1][n_tiles][4];
  float grad_k[1][of_keys ? width / 8 : 1][4], grad_v[1][of_values ? width / 8 : 1][4];
  uint32_t p[n_tiles / 2][4], ds[n_tiles / 2][4];
  if (all.left > 0) keys_full.wait(0, 0);
  bool careful = false;
  for (;; careful = true) {
    for_each(grad_k, [](float& x, int, int, int) { x = 0; });
    for_each(grad_v, [](float& x, int, int, int) { x = 0; });
    FASTGPT_ROLLED for (QueryTiles tile = all; tile.left > 0; tile.advance(), ++step) {
      const int here = queries.place(step);
      const Queries<size> known = known_of(step);
      const bool all_seen = range.all_see(a, tile.start, size);
      pin(k_at);
      queries.await(step);
      warpgroup_fence(s);
      multiply_tile_rows<width, Key, Query>(k, int(k_at), q, here, s);
      upstream.await(step);
      if constexpr (of_keys) {
        warpgroup_fence(dp);
        multiply_tile_rows<width, Key, Query>(v, int(k_at), g, here, dp);
      }
      if constexpr (!of_keys) {
        warpgroup_wait<0>(s);
        form_weights(a, slope_of(a, batch, tile.head), known, at, all_seen, s);
      } else if constexpr (plain) {
        warpgroup_wait<1>(s);
        weigh(a, known, at, s);
        finish(s);
        warpgroup_wait<0>(dp);
        form_plain_gradients(known, at, all_seen, s, dp);
      } else {
        warpgroup_wait<0>(s, dp);
        form_gradients(a, slope_of(a, batch, tile.head), known, at, all_seen, s, dp);
      }
      if constexpr (of_values) round_products<T>(s, p);
      if constexpr (of_keys) round_products<T>(dp, ds);
      if (careful) {
        named_barrier_sync(1, kMultiplying);
        if (of_keys) make_tile_finite<Query>(q, here);
        if (of_values) make_tile_finite<Query>(g, here);
        named_barrier_sync(1, kMultiplying);
      }
      warpgroup_fence(grad_v, grad_k, p, ds);
      if constexpr (of_values) multiply_tile_columns<Query>(p, g, here, grad_v);
      if constexpr (of_keys) multiply_tile_columns<Query>(ds, q, here, grad_k);
      warpgroup_wait<0>(grad_v, grad_k, p, ds);
      warp_barrier();  // all lanes have read what is known of the queries
      queries.release(step);
      upstream.release(step);
    }
    if (!a.hides || careful) break;
    bool spread = false;
    for_each(grad_k, [&](float& x, int, int, int) { spread |= !is_finite(x); });
    for_each(grad_v, [&](float& x, int, int, int) { spread |= !is_finite(x); });
    if (!any_of_warpgroups(spread, votes)) break;
  }

  if constexpr (of_keys) {
    store_rows(grad_k, a.slope, head_of<T>(a.grad_key, batch, key_head), a.grad_key.row,
               first + warp_row, a.keys, a.head_dim);
  }
  if constexpr (of_values) {
    store_rows(grad_v, a.rescale, head_of<T>(a.grad_value, batch, key_head), a.grad_value.row,
               first + warp_row, a.keys, a.value_dim);
  }
  if (!careful) return;
  named_barrier_sync(1, kMultiplying);
  spoil_key_gradients<T, of_keys, of_values>(a, batch, key_head, first, Tiles::rows, range,
                                             thread_index() - kWarpgroup, kMultiplying);
#endif
}

// ---- the launch ----

template <class T>
BackwardMaps maps_of(const AttentionBackward& a, int query_rows, int key_rows) {
  return {
      map_of_heads<T>(a.query, a.batch, a.query_heads, a.queries, a.head_dim, query_rows),
      map_of_heads<T>(a.grad_output, a.batch, a.query_heads, a.queries, a.value_dim, query_rows),
      map_of_heads<T>(a.key, a.batch, a.heads, a.keys, a.head_dim, key_rows),
      map_of_heads<T>(a.value, a.batch, a.heads, a.keys, a.value_dim, key_rows)};
}

template <class T, int width, bool plain>
void launch_attention_backward_hopper(AttentionBackward a, int query_section, int key_section,
                                      void* stream) {
  const auto pass = [&](auto* kernel, int64_t length, int64_t heads, int rows, int section,
                        const BackwardMaps& maps, int bytes) {
    a.section = section;
    const int64_t tiles = (length + rows - 1) / rows;
    launch(kernel, Grid{a.batch * heads * tiles, kHopperThreads, 1, bytes}, Stream(stream), a,
           maps);
  };
  using OfQueries = HopperQueryGradientTiles<width, plain>;
  pass(&attention_query_gradient_hopper<T, width, plain>, a.queries, a.query_heads, OfQueries::rows,
       query_section, maps_of<T>(a, OfQueries::rows, OfQueries::keys), OfQueries::bytes);
  const auto over_keys = [&](auto* kernel, auto tiles) {
    using OfKeys = decltype(tiles);
    pass(kernel, a.keys, a.heads, OfKeys::rows, key_section,
         maps_of<T>(a, OfKeys::queries, OfKeys::rows), OfKeys::bytes);
  };
  if constexpr (width <= 128) {
    over_keys(&attention_key_gradient_hopper<T, width, plain, true, true>,
              HopperKeyGradientTiles<width, true>{});
  } else {
    over_keys(&attention_key_gradient_hopper<T, width, plain, true, false>,
              HopperKeyGradientTiles<width, true>{});
    over_keys(&attention_key_gradient_hopper<T, width, plain, false, true>,
              HopperKeyGradientTiles<width, false>{});
  }
}

// `query_section`, `key_section`: of the passes over the queries and over the keys.
template <class T, int width>
void launch_attention_backward_hopper(const AttentionBackward& a, int query_section,
                                      int key_section, void* stream) {
  if constexpr (width <= 128) {
    if (!is_plain(a)) {
      launch_attention_backward_hopper<T, width, false>(a, query_section, key_section, stream);
      return;
    }
  }
  launch_attention_backward_hopper<T, width, true>(a, query_section, key_section, stream);
}

}  // namespace fastgpt::cuda
