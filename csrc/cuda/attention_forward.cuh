// Attention, forward: a block of queries walks the keys that any of them sees.
//
// FlashAttention-2's order (Dao, 2023) on mma.sync: a warp has whole rows of queries, keeps their
// output and their scores in registers, and finds them there again as the first operand of the
// product with the values. Tiles of keys and of values take turns: while one is multiplied, the
// other arrives.
//
//   s = q k^T    x = score(s)    m' = max(m, x)    p = 2^(factor (x - m'))
//   l = l 2^(factor (m - m')) + sum p              o = o 2^(factor (m - m')) + (R p) v
//
// The difference comes first: the largest weight is exactly 1, also in 16 bits, and where the
// weights are all but certain o is that value exactly. Of each pair of a query and a key: an FMNMX,
// an FADD, an FMUL, an exponential, an FADD and half a conversion. Sums are multiplied only if a
// maximum of the warp has grown.
//
// What a query may not look at is hidden by selecting. NaN and infinities would still spread from a
// hidden value, as 0 * NaN; a block whose sum is not finite is computed again with zeros in their
// place, and they are added where they are seen.
#pragma once

#include "attention_tiles.cuh"

namespace fastgpt::cuda {

// 16 m_tiles queries of each warp and a tile of so many keys; and how many blocks a multiprocessor
// holds, by registers and by shared memory, on sm_80.
template <int width>
struct ForwardTiles {
  static constexpr int m_tiles = width <= 128 ? 2 : 1;
  static constexpr int rows = 16 * m_tiles * kAttentionWarps;
  static constexpr int keys = width <= 96 ? 64 : 32;
  static constexpr int blocks = 2;
  static constexpr int q = 0, k = q + rows * kPitch<width> * 2, v = k + keys * kPitch<width> * 2,
                       places = v + keys * kPitch<width> * 2,
                       votes = places + Queries<rows>::kPlaces * 4,
                       bytes = votes + kAttentionWarps * 4;
};

// From which scores are counted: 0 before the first key that is seen.
FASTGPT_DEVICE float level_of(float top) { return top == -INFINITY ? 0 : top; }

// What a warp found of the 16 queries from `first` on: the output, what rounding takes from it, and
// the statistics, of which four threads have a part of each sum.
template <class T, int n_tiles>
FASTGPT_DEVICE void store_rows(const AttentionForward& a, int batch, int head, int first,
                               const float (&acc)[n_tiles][4], const float (&top)[2],
                               const float (&sum)[2]) {
  T* const output = head_of<T>(a.output, batch, head);
  T* const rounding = head_of<T>(a.rounding, batch, head);
  FASTGPT_UNROLLED for (int h = 0; h < 2; ++h) {
    float total = sum[h];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    const int i = first + 8 * h + lane_index() / 4;
    if (i >= a.queries) continue;
    const float largest = level_of(top[h]);
    const int64_t row = (int64_t(batch) * a.query_heads + head) * a.queries + i;
    if (lane_index() % 4 == 0) {
      store(a.row_max + row, largest);
      store(a.row_sum + row, total);
      store(a.lse + row, largest * a.unit + std::log(total));
    }
    const float inverse = total == 0 ? 0 : a.rescale / total;
    FASTGPT_UNROLLED for (int n = 0; n < n_tiles; ++n) {
      const int column = 8 * n + lane_index() % 4 * 2, there = a.value_dim - column;
      const float x = acc[n][2 * h] * inverse, y = acc[n][2 * h + 1] * inverse;
      const uint32_t both = narrow_pair<T>(x, y);
      const float x_lost = x - widen(T{uint16_t(both)}),
                  y_lost = y - widen(T{uint16_t(both >> 16)});
      const bool aligned = a.value_dim % 2 == 0;
      store_pair(output + i * a.output.row + column, there, aligned, both);
      store_pair(rounding + i * a.rounding.row + column, there, aligned,
                 narrow_pair<T>(x_lost, y_lost));
    }
  }
}

// To the outputs of the `rows` queries from `first` on, where they are stored, the values they see
// that are not finite; by `threads` threads, of which this is one.
template <class T>
FASTGPT_DEVICE void add_what_is_not_finite(const AttentionForward& a, int batch, int head,
                                           int first, int rows, int thread, int threads) {
  T* const output = head_of<T>(a.output, batch, head);
  T* const rounding = head_of<T>(a.rounding, batch, head);
  const T* const value = head_of<T>(a.value, batch, head / a.group);
  const int count = smaller(rows, a.queries - first) * a.value_dim;
  FASTGPT_ROLLED for (int element = thread; element < count; element += threads) {
    const int i = first + element / a.value_dim, column = element % a.value_dim;
    const Span span = span_of(a, i);
    float spread = 0;
    FASTGPT_ROLLED for (int j = span.begin; j < span.end && spread == spread; ++j) {
      const float x = widen(load(value + j * a.value.row + column));
      if (!is_finite(x)) spread += x;
    }
    if (spread == 0) continue;
    T* const to = output + i * a.output.row + column;
    store(to, narrow<T>(widen(load(to)) + spread));
    store(rounding + i * a.rounding.row + column, narrow<T>(NAN));
  }
}

template <class T, int width>
FASTGPT_KERNEL(kAttentionThreads, (ForwardTiles<width>::blocks))
attention_forward(const AttentionForward a) {
  using Tiles = ForwardTiles<width>;
  constexpr int m_tiles = Tiles::m_tiles, rows = Tiles::rows, size = Tiles::keys;
  constexpr int pitch = kPitch<width>;
  FASTGPT_DYNAMIC_SHARED_BYTES(Tiles::bytes);
  FASTGPT_DYNAMIC_SHARED(T, q, Tiles::q, rows * pitch);
  FASTGPT_DYNAMIC_SHARED(T, k, Tiles::k, size * pitch);
  FASTGPT_DYNAMIC_SHARED(T, v, Tiles::v, size * pitch);
  FASTGPT_DYNAMIC_SHARED(int, places, Tiles::places, Queries<rows>::kPlaces);
  FASTGPT_DYNAMIC_SHARED(int, votes, Tiles::votes, kAttentionWarps);
  const Queries<rows> queries{places, {}};

  const QueryBlock block = query_block(a, rows, size);
  const int first = block.first, batch = block.batch, head = block.head;
  const KeyRange range = block.range;
  const Matrix<T> query(a.query, batch, head, a.queries, a.head_dim);
  const Matrix<T> key(a.key, batch, head / a.group, a.keys, a.head_dim);
  const Matrix<T> value(a.value, batch, head / a.group, a.keys, a.value_dim);
  const float slope = slope_of(a, batch, head);

  query.template copy<rows, width>(first, q, 0);
  for (int r = thread_index(); r < rows; r += kAttentionThreads) {
    queries.put_place(a, batch, head, r, first + r);
  }
  const int warp_row = 16 * m_tiles * warp_index();

  float acc[m_tiles][width / 8][4], sum[m_tiles][2], top[m_tiles][2];
  bool careful = false;
  for (;;) {
    for_each(acc, [](float& x, int, int, int) { x = 0; });
    const float sink = sink_of(a, batch, head);
    FASTGPT_UNROLLED for (int m = 0; m < m_tiles; ++m) {
      FASTGPT_UNROLLED for (int h = 0; h < 2; ++h) {
        top[m][h] = sink;
        // Of the four threads that share a row.
        sum[m][h] = lane_index() % 4 == 0 && sink != -INFINITY ? 1 : 0;
      }
    }
    if (range.begin < range.end) key.template copy<size, width>(range.begin, k, 0);
    copy_async_commit();
    for (int start = range.begin; start < range.end; start += size) {
      copy_async_wait<0>();
      block_barrier();  // the keys are there, and all are done with the values
      value.template copy<size, width>(start, v, 0);
      copy_async_commit();
      float s[m_tiles][size / 8][4];
      multiply_rows<width>(q, warp_row * pitch, k, 0, s);
      const Elements<false> at(warp_row, start);
      form_scores<false>(a, slope, queries, at, s, s);
      if (!range.all_seen(start, size)) hide(queries, at, -INFINITY, s);
      bool grows = false;
      float shrink[m_tiles][2];
      FASTGPT_UNROLLED for (int m = 0; m < m_tiles; ++m) {
        FASTGPT_UNROLLED for (int h = 0; h < 2; ++h) {
          float largest = s[m][0][2 * h];
          FASTGPT_UNROLLED for (int n = 0; n < size / 8; ++n) {
            largest = std::fmax(largest, std::fmax(s[m][n][2 * h], s[m][n][2 * h + 1]));
          }
          largest = std::fmax(largest, shuffle_xor(largest, 1));
          largest = std::fmax(largest, shuffle_xor(largest, 2));
          const float above = std::fmax(top[m][h], largest);
          grows |= above > top[m][h];
          shrink[m][h] = exp2_approximate((top[m][h] - level_of(above)) * a.factor);
          top[m][h] = above;
        }
      }
      // After the first tiles it seldom does.
      if (any(grows)) {
        for_each(acc, [&](float& x, int m, int, int e) { x *= shrink[m][e / 2]; });
        FASTGPT_UNROLLED for (int m = 0; m < m_tiles; ++m) {
          FASTGPT_UNROLLED for (int h = 0; h < 2; ++h) sum[m][h] *= shrink[m][h];
        }
      }
      FASTGPT_UNROLLED for (int m = 0; m < m_tiles; ++m) {
        FASTGPT_UNROLLED for (int h = 0; h < 2; ++h) {
          const float level = level_of(top[m][h]);
          float part = 0;
          FASTGPT_UNROLLED for (int n = 0; n < size / 8; ++n) {
            FASTGPT_UNROLLED for (int e = 2 * h; e < 2 * h + 2; ++e) {
              s[m][n][e] = exp2_approximate((s[m][n][e] - level) * a.factor);
              part += s[m][n][e];
            }
          }
          sum[m][h] += part;
        }
      }
      if (a.seeds) drop(a, queries, at, 1.0f, s);
      copy_async_wait<0>();
      block_barrier();  // the values are there, and all are done with the keys
      if (start + size < range.end) key.template copy<size, width>(start + size, k, 0);
      copy_async_commit();
      if (careful) {
        make_finite<size, width>(v, 0);
        block_barrier();
      }
      multiply_columns<width>(s, v, 0, acc);
    }
    if (!a.hides || careful) break;
    bool spread = false;
    for_each(acc, [&](float& x, int, int, int) { spread |= !is_finite(x); });
    if (!any_of_block(spread, votes)) break;
    careful = true;
  }
  copy_async_wait<0>();

  FASTGPT_UNROLLED for (int m = 0; m < m_tiles; ++m) {
    store_rows<T>(a, batch, head, first + warp_row + 16 * m, acc[m], top[m], sum[m]);
  }
  if (!careful) return;
  block_barrier();
  add_what_is_not_finite<T>(a, batch, head, first, rows, thread_index(), kAttentionThreads);
}

}  // namespace fastgpt::cuda
