// Attention, backward: two passes without atomics, so that every sum has one order.
//
//   p = 2^(factor (x - m)) / l   dp = R <g, v>              delta = <g, o> - h
//   ds = p (dp - delta)          dy = ds C'(scale s)
//   dq = scale dy k              dk = scale dy^T q          dv = (R p)^T g
//
// for the upstream gradients g of o and h of lse. A block of the first pass has queries and walks
// the keys that they see, for dq and delta. A block of the second has keys and walks the queries
// that see them, in all the query heads that share them, for dk and dv: it computes the scores
// transposed, so that p^T and dy^T lie in registers as the first operand of what is next. Two tiles
// of what is walked are in shared memory: one is multiplied while the other arrives.
//
// 7 products for 5, since both passes need s and dp; a pass for all of them would have to add up dq
// from many blocks. Head dims above 128 have no room in registers for dk and dv at once, and take a
// block for each: 8 products.
//
// What is not finite and hidden is kept from spreading as in the forward.
#pragma once

#include "attention_tiles.cuh"

namespace fastgpt::cuda {

// Of the pass over the queries: 16 queries of each warp, and a tile of so many keys.
template <int width>
struct QueryGradientTiles {
  static constexpr int rows = 16 * kAttentionWarps;
  static constexpr int keys = width <= 64 ? 64 : 32;
  static constexpr int blocks = width <= 128 ? 2 : 1;
  static constexpr int q = 0, g = q + rows * kPitch<width> * 2, k = g + rows * kPitch<width> * 2,
                       v = k + 2 * keys * kPitch<width> * 2,
                       places = v + 2 * keys * kPitch<width> * 2,
                       numbers = places + Queries<rows>::kPlaces * 4,
                       votes = numbers + Queries<rows>::kNumbers * 4,
                       bytes = votes + kAttentionWarps * 4;
};

// Of the pass over the keys: 16 keys of each warp, and a tile of so many queries.
template <int width>
struct KeyGradientTiles {
  static constexpr int rows = 16 * kAttentionWarps;
  static constexpr int queries = width <= 64 ? 64 : 32;
  static constexpr int blocks = width <= 128 ? 2 : 1;
  static constexpr int k = 0, v = k + rows * kPitch<width> * 2, q = v + rows * kPitch<width> * 2,
                       g = q + 2 * queries * kPitch<width> * 2,
                       places = g + 2 * queries * kPitch<width> * 2,
                       numbers = places + 2 * Queries<queries>::kPlaces * 4,
                       votes = numbers + 2 * Queries<queries>::kNumbers * 4,
                       bytes = votes + kAttentionWarps * 4;
};

// Makes weights of scores.
template <int m_tiles, int n_tiles, int count, bool transposed>
FASTGPT_DEVICE void weigh(const AttentionBackward& a, const Queries<count>& queries,
                          const Elements<transposed>& at, Products<m_tiles, n_tiles>& s) {
  for_each(s, [&](float& x, int m, int n, int e) {
    const int r = at.query(m, n, e);
    x = exp2_approximate((x - queries.row_max(r)) * a.factor) * queries.inverse(r);
  });
}

// Of products s and dp: the weights p, less those that are dropped but for their factor, and dy.
template <int m_tiles, int n_tiles, int count, bool transposed>
FASTGPT_DEVICE void form_gradients(const AttentionBackward& a, float slope,
                                   const Queries<count>& queries, const Elements<transposed>& at,
                                   bool all_seen, Products<m_tiles, n_tiles>& s,
                                   Products<m_tiles, n_tiles>& dp) {
  if (a.seeds) drop(a, queries, at, a.rescale, dp);
  for_each(dp, [&](float& x, int m, int n, int e) { x -= queries.delta(at.query(m, n, e)); });
  form_scores<true>(a, slope, queries, at, s, dp);
  weigh(a, queries, at, s);
  for_each(dp, [&](float& x, int m, int n, int e) { x *= s[m][n][e]; });
  if (!all_seen) {
    hide(queries, at, 0.0f, s);
    hide(queries, at, 0.0f, dp);
  }
  if (a.seeds) drop(a, queries, at, 1.0f, s);
}

// The same of products s alone: the weights.
template <int m_tiles, int n_tiles, int count, bool transposed>
FASTGPT_DEVICE void form_weights(const AttentionBackward& a, float slope,
                                 const Queries<count>& queries, const Elements<transposed>& at,
                                 bool all_seen, Products<m_tiles, n_tiles>& s) {
  form_scores<false>(a, slope, queries, at, s, s);
  weigh(a, queries, at, s);
  if (!all_seen) hide(queries, at, 0.0f, s);
  if (a.seeds) drop(a, queries, at, 1.0f, s);
}

// What there is to know of query i beside <g, o>, and what the pass over the keys is told of it.
template <int count>
FASTGPT_DEVICE void put_numbers(const AttentionBackward& a, int batch, int head, float sink, int i,
                                float product, const Queries<count>& queries, int r) {
  const int64_t row = (int64_t(batch) * a.query_heads + head) * a.queries + i;
  const float total = load(a.row_sum + row), largest = load(a.row_max + row);
  const float inverse = total == 0 ? 0 : 1 / total;
  const float delta = a.grad_lse ? product - load(a.grad_lse + row) : product;
  queries.put_numbers(r, largest, inverse, delta);
  store(a.row_delta + row, delta);
  store(a.row_inverse + row, inverse);
  if (a.grad_sinks) {
    const float p = exp2_approximate((sink - largest) * a.factor) * inverse;
    store(a.grad_sinks + row, p == 0 ? 0 : -p * delta);
  }
}

// Stores a warp's rows, from `first` on of those there are, times `factor`.
template <class T, int tiles>
FASTGPT_DEVICE void store_rows(const Products<1, tiles>& acc, float factor, T* to, int64_t row,
                               int first, int rows, int columns) {
  FASTGPT_UNROLLED for (int h = 0; h < 2; ++h) {
    const int r = first + 8 * h + lane_index() / 4;
    if (r >= rows) continue;
    FASTGPT_UNROLLED for (int n = 0; n < tiles; ++n) {
      const int column = 8 * n + lane_index() % 4 * 2;
      store_pair(to + r * row + column, columns - column, columns % 2 == 0,
                 narrow_pair<T>(acc[0][n][2 * h] * factor, acc[0][n][2 * h + 1] * factor));
    }
  }
}

// Puts NaN into the stored gradients of the `rows` queries from `first` on that see a key which is
// not finite; by `threads` threads, of which this is one.
template <class T>
FASTGPT_DEVICE void spoil_query_gradients(const AttentionBackward& a, int batch, int head,
                                          int first, int rows, int thread, int threads) {
  T* const result = head_of<T>(a.grad_query, batch, head);
  const T* const key = head_of<T>(a.key, batch, head / a.group);
  const int count = smaller(rows, a.queries - first) * a.head_dim;
  FASTGPT_ROLLED for (int element = thread; element < count; element += threads) {
    const int i = first + element / a.head_dim, column = element % a.head_dim;
    const Span span = span_of(a, i);
    bool spread = false;
    FASTGPT_ROLLED for (int j = span.begin; j < span.end && !spread; ++j) {
      spread = !is_finite(widen(load(key + j * a.key.row + column)));
    }
    if (spread) store(result + i * a.grad_query.row + column, narrow<T>(NAN));
  }
}

// The same for keys and for values, by what is not finite in the queries and in the upstream
// gradients of those that see them.
template <class T, bool of_keys, bool of_values>
FASTGPT_DEVICE void spoil_key_gradients(const AttentionBackward& a, int batch, int key_head,
                                        int first, int rows, const QueryRange& range, int thread,
                                        int threads) {
  T* const k_result = head_of<T>(a.grad_key, batch, key_head);
  T* const v_result = head_of<T>(a.grad_value, batch, key_head);
  // Adds up what is not finite in a column of the queries that see key j.
  const auto spread_of = [&](const Heads<const void>& x, int j, int column) {
    float spread = 0;
    FASTGPT_ROLLED for (int member = 0; member < a.group; ++member) {
      const T* const from = head_of<T>(x, batch, key_head * a.group + member) + column;
      FASTGPT_ROLLED for (int i = range.begin; i < range.end && spread == spread; ++i) {
        const float found = widen(load(from + i * x.row));
        if (is_finite(found)) continue;
        const Span span = span_of(a, i);
        if (j >= span.begin && j < span.end) spread += found;
      }
    }
    return spread;
  };
  const int keys = smaller(rows, a.keys - first);
  if constexpr (of_keys) {
    FASTGPT_ROLLED for (int e = thread; e < keys * a.head_dim; e += threads) {
      const int j = first + e / a.head_dim, column = e % a.head_dim;
      if (spread_of(a.query, j, column) == 0) continue;
      store(k_result + j * a.grad_key.row + column, narrow<T>(NAN));
    }
  }
  if constexpr (of_values) {
    FASTGPT_ROLLED for (int e = thread; e < keys * a.value_dim; e += threads) {
      const int j = first + e / a.value_dim, column = e % a.value_dim;
      const float spread = spread_of(a.grad_output, j, column);
      if (spread == 0) continue;
      T* const to = v_result + j * a.grad_value.row + column;
      store(to, narrow<T>(widen(load(to)) + spread));
    }
  }
}

// ---- the pass over the queries ----

template <class T, int width>
FASTGPT_KERNEL(kAttentionThreads, (QueryGradientTiles<width>::blocks))
attention_query_gradient(const AttentionBackward a) {
  using Tiles = QueryGradientTiles<width>;
  constexpr int rows = Tiles::rows, size = Tiles::keys, pitch = kPitch<width>;
  FASTGPT_DYNAMIC_SHARED_BYTES(Tiles::bytes);
  FASTGPT_DYNAMIC_SHARED(T, q, Tiles::q, rows * pitch);
  FASTGPT_DYNAMIC_SHARED(T, g, Tiles::g, rows * pitch);
  FASTGPT_DYNAMIC_SHARED(T, k, Tiles::k, 2 * size * pitch);
  FASTGPT_DYNAMIC_SHARED(T, v, Tiles::v, 2 * size * pitch);
  FASTGPT_DYNAMIC_SHARED(int, places, Tiles::places, Queries<rows>::kPlaces);
  FASTGPT_DYNAMIC_SHARED(float, numbers, Tiles::numbers, Queries<rows>::kNumbers);
  FASTGPT_DYNAMIC_SHARED(int, votes, Tiles::votes, kAttentionWarps);
  const Queries<rows> queries{places, numbers};

  const QueryBlock block = query_block(a, rows, size);
  const int first = block.first, batch = block.batch, head = block.head;
  const KeyRange range = block.range;
  const Matrix<T> query(a.query, batch, head, a.queries, a.head_dim);
  const Matrix<T> upstream(a.grad_output, batch, head, a.queries, a.value_dim);
  const Matrix<T> key(a.key, batch, head / a.group, a.keys, a.head_dim);
  const Matrix<T> value(a.value, batch, head / a.group, a.keys, a.value_dim);
  const float slope = slope_of(a, batch, head);
  const int warp_row = 16 * warp_index();
  const auto copy_keys = [&](int start, int stage) {
    key.template copy<size, width>(start, k, stage * size * pitch);
    value.template copy<size, width>(start, v, stage * size * pitch);
  };

  query.template copy<rows, width>(first, q, 0);
  upstream.template copy<rows, width>(first, g, 0);
  copy_async_commit();
  for (int r = thread_index(); r < rows; r += kAttentionThreads) {
    queries.put_place(a, batch, head, r, first + r);
  }
  const float sink = sink_of(a, batch, head);
  FASTGPT_ROLLED for (int r = warp_row; r < warp_row + 16; ++r) {
    const int i = first + r;
    if (i >= a.queries) {
      if (lane_index() == 0) queries.put_numbers(r, 0, 0, 0);
      continue;
    }
    const T* const o = head_of<T>(a.output, batch, head) + i * a.output.row;
    const T* const lost = head_of<T>(a.rounding, batch, head) + i * a.rounding.row;
    float delta = 0;
    for (int column = lane_index(); column < a.value_dim; column += kWarp) {
      const float x = widen(load(o + column)) + widen(load(lost + column));
      delta += x * widen(load(upstream.data + i * upstream.row + column));
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) delta += shuffle_xor(delta, mask);
    if (lane_index() == 0) put_numbers(a, batch, head, sink, i, delta, queries, r);
  }

  float acc[1][width / 8][4];
  bool careful = false;
  for (;;) {
    for_each(acc, [](float& x, int, int, int) { x = 0; });
    if (range.begin < range.end) copy_keys(range.begin, 0);
    copy_async_commit();
    int stage = 0;
    for (int start = range.begin; start < range.end; start += size, stage ^= 1) {
      const int here = stage * size * pitch;
      copy_async_wait<0>();
      block_barrier();  // this tile is there, and all are done with the other
      if (start + size < range.end) copy_keys(start + size, stage ^ 1);
      copy_async_commit();
      float s[1][size / 8][4], dp[1][size / 8][4];
      multiply_rows<width>(q, warp_row * pitch, k, here, s);
      multiply_rows<width>(g, warp_row * pitch, v, here, dp);
      const Elements<false> at(warp_row, start);
      form_gradients(a, slope, queries, at, range.all_seen(start, size), s, dp);
      if (careful) {
        block_barrier();
        make_finite<size, width>(k, here);
        block_barrier();
      }
      multiply_columns<width>(dp, k, here, acc);
    }
    if (!a.hides || careful) break;
    bool spread = false;
    for_each(acc, [&](float& x, int, int, int) { spread |= !is_finite(x); });
    if (!any_of_block(spread, votes)) break;
    careful = true;
  }
  copy_async_wait<0>();

  T* const result = head_of<T>(a.grad_query, batch, head);
  store_rows(acc, a.slope, result, a.grad_query.row, first + warp_row, a.queries, a.head_dim);
  if (!careful) return;
  block_barrier();
  spoil_query_gradients<T>(a, batch, head, first, rows, thread_index(), kAttentionThreads);
}

// ---- the pass over the keys ----

// Tiles of queries that see any of a block's keys, of one head after another. The last ones go
// first: under a causal mask the first queries give a key its largest weights, and what is added to
// a large sum is rounded at its size.
struct QueryTiles {
  int head, start;  // of the tile under way
  int left;         // tiles, with it

  FASTGPT_DEVICE QueryTiles(const QueryRange& range, int size, int first_head, int heads)
      : head(first_head),
        size(size),
        first(range.begin / size * size),
        last((range.end - 1) / size * size) {
    start = last;
    left = range.begin < range.end ? ((last - first) / size + 1) * heads : 0;
  }

  FASTGPT_DEVICE void advance() {
    --left;
    start -= size;
    if (start >= first) return;
    start = last;
    ++head;
  }

 private:
  int size, first, last;
};

template <class T, int width, bool of_keys, bool of_values>
FASTGPT_KERNEL(kAttentionThreads, (KeyGradientTiles<width>::blocks))
attention_key_gradient(const AttentionBackward a) {
  using Tiles = KeyGradientTiles<width>;
  constexpr int rows = Tiles::rows, size = Tiles::queries, pitch = kPitch<width>;
  FASTGPT_DYNAMIC_SHARED_BYTES(Tiles::bytes);
  FASTGPT_DYNAMIC_SHARED(T, k, Tiles::k, rows * pitch);
  FASTGPT_DYNAMIC_SHARED(T, v, Tiles::v, rows * pitch);
  FASTGPT_DYNAMIC_SHARED(T, q, Tiles::q, 2 * size * pitch);
  FASTGPT_DYNAMIC_SHARED(T, g, Tiles::g, 2 * size * pitch);
  FASTGPT_DYNAMIC_SHARED(int, places, Tiles::places, 2 * Queries<size>::kPlaces);
  FASTGPT_DYNAMIC_SHARED(float, numbers, Tiles::numbers, 2 * Queries<size>::kNumbers);
  FASTGPT_DYNAMIC_SHARED(int, votes, Tiles::votes, kAttentionWarps);
  const auto queries_at = [&](int stage) {
    return Queries<size>{places, numbers, stage * Queries<size>::kPlaces,
                         stage * Queries<size>::kNumbers};
  };

  // The first keys have most queries under a causal mask.
  const Place place((a.keys + rows - 1) / rows, a.section);
  const int first = place.tile * rows;
  const int batch = place.head / a.heads, key_head = place.head % a.heads;
  const Matrix<T> key(a.key, batch, key_head, a.keys, a.head_dim);
  const Matrix<T> value(a.value, batch, key_head, a.keys, a.value_dim);
  key.template copy<rows, width>(first, k, 0);
  if (of_keys) value.template copy<rows, width>(first, v, 0);
  const QueryRange range(a, first, smaller(first + rows, a.keys) - 1);
  const int warp_row = 16 * warp_index();

  const QueryTiles all(range, size, key_head * a.group, a.group);
  const auto copy_queries = [&](const QueryTiles& tile, int stage) {
    const int to = stage * size * pitch;
    const Matrix<T> query(a.query, batch, tile.head, a.queries, a.head_dim);
    const Matrix<T> upstream(a.grad_output, batch, tile.head, a.queries, a.value_dim);
    query.template copy<size, width>(tile.start, q, to);
    upstream.template copy<size, width>(tile.start, g, to);
  };
  // A thread's part of what is known of a tile's queries.
  float row_max = 0, inverse = 0, delta = 0;
  const auto load_numbers = [&](const QueryTiles& tile) {
    const int i = tile.start + thread_index();
    row_max = inverse = delta = 0;
    if (thread_index() >= size || i >= a.queries) return;
    const int64_t row = (int64_t(batch) * a.query_heads + tile.head) * a.queries + i;
    row_max = load(a.row_max + row);
    inverse = load(a.row_inverse + row);
    delta = load(a.row_delta + row);
  };
  const auto put_queries = [&](const QueryTiles& tile, int stage) {
    if (thread_index() >= size) return;
    const int i = tile.start + thread_index();
    queries_at(stage).put_numbers(thread_index(), row_max, inverse, delta);
    queries_at(stage).put_place(a, batch, tile.head, thread_index(), i);
  };

  float grad_k[1][of_keys ? width / 8 : 1][4], grad_v[1][of_values ? width / 8 : 1][4];
  bool careful = false;
  for (;;) {
    for_each(grad_k, [](float& x, int, int, int) { x = 0; });
    for_each(grad_v, [](float& x, int, int, int) { x = 0; });
    QueryTiles next = all;
    if (next.left > 0) {
      copy_queries(next, 0);
      load_numbers(next);
      put_queries(next, 0);
    }
    copy_async_commit();
    FASTGPT_ROLLED for (int stage = 0; next.left > 0; stage ^= 1) {
      const int here = stage * size * pitch;
      const QueryTiles tile = next;
      next.advance();
      copy_async_wait<0>();
      block_barrier();  // this tile is there, and all are done with the other
      if (next.left > 0) {
        copy_queries(next, stage ^ 1);
        load_numbers(next);
      }
      copy_async_commit();
      const Queries<size> queries = queries_at(stage);
      const Elements<true> at(warp_row + first, 0);
      const float slope = slope_of(a, batch, tile.head);
      const bool all_seen = range.all_see(a, tile.start, size);
      float s[1][size / 8][4];
      multiply_rows<width>(k, warp_row * pitch, q, here, s);
      if constexpr (of_keys) {
        float dp[1][size / 8][4];
        multiply_rows<width>(v, warp_row * pitch, g, here, dp);
        form_gradients(a, slope, queries, at, all_seen, s, dp);
        if (careful) {
          block_barrier();
          make_finite<size, width>(q, here);
          make_finite<size, width>(g, here);
          block_barrier();
        }
        if constexpr (of_values) multiply_columns<width>(s, g, here, grad_v);
        multiply_columns<width>(dp, q, here, grad_k);
      } else {
        form_weights(a, slope, queries, at, all_seen, s);
        if (careful) {
          block_barrier();
          make_finite<size, width>(g, here);
          block_barrier();
        }
        multiply_columns<width>(s, g, here, grad_v);
      }
      if (next.left > 0) put_queries(next, stage ^ 1);
    }
    if (!a.hides || careful) break;
    bool spread = false;
    for_each(grad_k, [&](float& x, int, int, int) { spread |= !is_finite(x); });
    for_each(grad_v, [&](float& x, int, int, int) { spread |= !is_finite(x); });
    if (!any_of_block(spread, votes)) break;
    careful = true;
  }
  copy_async_wait<0>();

  T* const k_result = head_of<T>(a.grad_key, batch, key_head);
  T* const v_result = head_of<T>(a.grad_value, batch, key_head);
  if constexpr (of_keys) {
    store_rows(grad_k, a.slope, k_result, a.grad_key.row, first + warp_row, a.keys, a.head_dim);
  }
  if constexpr (of_values) {
    store_rows(grad_v, a.rescale, v_result, a.grad_value.row, first + warp_row, a.keys,
               a.value_dim);
  }
  if (!careful) return;
  block_barrier();
  spoil_key_gradients<T, of_keys, of_values>(a, batch, key_head, first, rows, range, thread_index(),
                                             kAttentionThreads);
}

}  // namespace fastgpt::cuda
