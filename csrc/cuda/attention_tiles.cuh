// What the passes of attention share, whatever moves and multiplies their tiles: which block does
// which tile, which keys a query sees, and what makes a score of a product. Below that, the matrix
// products of warps by mma.sync, on tiles in shared memory.
#pragma once

#include <cmath>

#include "attention.h"
#include "primitives.cuh"
#include "softcap.cuh"

namespace fastgpt::cuda {

FASTGPT_DEVICE int smaller(int x, int y) { return x < y ? x : y; }
FASTGPT_DEVICE int larger(int x, int y) { return x > y ? x : y; }
FASTGPT_DEVICE int clamp_to(int64_t x, int low, int high) {
  return x < low ? low : x > high ? high : int(x);
}
FASTGPT_DEVICE bool is_finite(float x) { return std::fabs(x) < INFINITY; }

// ---- places ----

// This block's tile and head. All tiles of the first `section` heads go before the next heads', so
// that what the running blocks read of them fits the cache.
struct Place {
  int tile, head;

  FASTGPT_DEVICE Place(int tiles, int section) {
    const int64_t heads = grid_blocks() / tiles, all = int64_t(section) * tiles;
    const int64_t first = block_index() / all * section, within = block_index() - first * tiles;
    const int64_t width = heads - first < section ? heads - first : section;
    tile = int(within / width);
    head = int(first + within % width);
  }
};

template <class T>
FASTGPT_DEVICE const T* head_of(const Heads<const void>& x, int batch, int head) {
  return static_cast<const T*>(x.data) + batch * x.batch + head * x.head;
}
template <class T>
FASTGPT_DEVICE T* head_of(const Heads<void>& x, int batch, int head) {
  return static_cast<T*>(x.data) + batch * x.batch + head * x.head;
}

// ---- which keys a query sees ----

// The keys begin <= j < end, where begin <= end.
struct Span {
  int begin, end;
};

FASTGPT_DEVICE Span span_of(const Attention& a, int i) {
  const int64_t begin = a.spans ? load(a.spans + i) : i + a.before;
  const int64_t end = a.spans ? load(a.spans + a.queries + i) : i + a.after;
  const int from = clamp_to(begin, 0, a.keys);
  return {from, clamp_to(end, from, a.keys)};
}

FASTGPT_DEVICE int place_of(const Attention& a, int i) {
  return int(a.spans ? load(a.spans + 2 * int64_t(a.queries) + i) : i + a.offset);
}

// Of the tiles of `size` keys: those from `begin` to `end` hold a key that any of the queries
// [first, last] sees; each of the queries sees all that is from `whole` to `stop`.
struct KeyRange {
  int begin, end, whole, stop;

  FASTGPT_DEVICE KeyRange(const Attention& a, int first, int last, int size) {
    const Span low = span_of(a, first), high = span_of(a, last);
    begin = low.begin / size * size;
    end = high.end;
    whole = high.begin;
    stop = low.end;
  }

  FASTGPT_DEVICE int tiles(int size) const { return (larger(end - begin, 0) + size - 1) / size; }

  FASTGPT_DEVICE bool all_seen(int start, int size) const {
    return start >= whole && start + size <= stop;
  }
};

// The `rows` queries of this block, from `first` on of one head, and what they see in tiles of
// `size` keys.
struct QueryBlock {
  int first, batch, head;
  KeyRange range;
};

FASTGPT_DEVICE QueryBlock query_block(const Attention& a, int rows, int size) {
  const int tiles = (a.queries + rows - 1) / rows;
  const Place place(tiles, a.section);
  // The last queries have most keys under a causal mask.
  const int first = (tiles - 1 - place.tile) * rows;
  return {first, place.head / a.query_heads, place.head % a.query_heads,
          KeyRange(a, first, smaller(first + rows, a.queries) - 1, size)};
}

// The queries that see any of the keys [first, last]: begin <= i < end; and all of them: whole <= i
// < stop.
struct QueryRange {
  int begin, end, whole, stop;

  FASTGPT_DEVICE QueryRange(const Attention& a, int first, int last) {
    if (a.spans) {
      // Bounds never fall: each is the number of queries whose bound is at most some key.
      begin = count(a, a.spans + a.queries, first);
      whole = count(a, a.spans + a.queries, last);
      stop = count(a, a.spans, first);
      end = count(a, a.spans, last);
    } else {
      begin = clamp_to(first - a.after + 1, 0, a.queries);
      whole = clamp_to(last - a.after + 1, 0, a.queries);
      stop = clamp_to(first - a.before + 1, 0, a.queries);
      end = clamp_to(last - a.before + 1, 0, a.queries);
    }
  }

  // There are no queries behind the last, and no harm in what is said of them.
  FASTGPT_DEVICE bool all_see(const Attention& a, int start, int size) const {
    return start >= whole && (start + size <= stop || stop == a.queries);
  }

 private:
  FASTGPT_DEVICE static int count(const Attention& a, const int64_t* bounds, int key) {
    int least = 0, most = a.queries;
    while (least < most) {
      const int middle = (least + most) / 2;
      if (load(bounds + middle) <= key) {
        least = middle + 1;
      } else {
        most = middle;
      }
    }
    return least;
  }
};

// ---- dropout ----

// The two words of query i, between which the numbers of its keys are hashed; see
// fastgpt/ops/dropout.py.
struct DropoutWords {
  uint32_t before, between;
};

FASTGPT_DEVICE DropoutWords dropout_words(const Attention& a, int batch, int head, int i) {
  const uint64_t seed = uint64_t(load(a.seeds + batch));
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  uint32_t c0 = uint32_t(i), c1 = uint32_t(head), c2 = 0, c3 = 0;
  FASTGPT_ROLLED for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t(0xD2511F53) * c0, odd = uint64_t(0xCD9E8D57) * c2;
    c0 = uint32_t(odd >> 32) ^ c1 ^ k0;
    c1 = uint32_t(odd);
    c2 = uint32_t(even >> 32) ^ c3 ^ k1;
    c3 = uint32_t(even);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1};
}

FASTGPT_DEVICE bool kept(const Attention& a, DropoutWords words, int j) {
  uint32_t x = uint32_t(j) ^ words.before;
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15 ^ words.between) * 0x846ca68bu;
  return (x ^ x >> 16) >= a.drop_below;
}

// ---- what is known of each query of a tile, in shared memory ----

template <int count>
struct Queries {
  static constexpr int kPlaces = 5 * count, kNumbers = 3 * count;

  Shared<int> places;     // begin, end, place and the words of dropout of each
  Shared<float> numbers;  // of the backward: row_max, row_inverse and row_delta of each
  int places_at = 0, numbers_at = 0;

  FASTGPT_DEVICE Span span(int r) const {
    return {places.load(places_at + r), places.load(places_at + count + r)};
  }
  FASTGPT_DEVICE int place(int r) const { return places.load(places_at + 2 * count + r); }
  FASTGPT_DEVICE DropoutWords words(int r) const {
    return {uint32_t(places.load(places_at + 3 * count + r)),
            uint32_t(places.load(places_at + 4 * count + r))};
  }
  FASTGPT_DEVICE float row_max(int r) const { return numbers.load(numbers_at + r); }
  FASTGPT_DEVICE float inverse(int r) const { return numbers.load(numbers_at + count + r); }
  FASTGPT_DEVICE float delta(int r) const { return numbers.load(numbers_at + 2 * count + r); }

  // Of query i; one that does not exist sees nothing.
  FASTGPT_DEVICE void put_place(const Attention& a, int batch, int head, int r, int i) const {
    const bool exists = i < a.queries;
    const Span span = exists ? span_of(a, i) : Span{0, 0};
    places.store(places_at + r, span.begin);
    places.store(places_at + count + r, span.end);
    places.store(places_at + 2 * count + r, exists ? place_of(a, i) : 0);
    if (!a.seeds) return;
    const DropoutWords words = dropout_words(a, batch, head, i);
    places.store(places_at + 3 * count + r, int(words.before));
    places.store(places_at + 4 * count + r, int(words.between));
  }

  FASTGPT_DEVICE void put_numbers(int r, float row_max, float inverse, float delta) const {
    numbers.store(numbers_at + r, row_max);
    numbers.store(numbers_at + count + r, inverse);
    numbers.store(numbers_at + 2 * count + r, delta);
  }
};

// ---- the elements of a tile that a thread holds ----

// Products of 16 `m_tiles` rows and 8 `n_tiles` columns, of which a warp holds 16 x 8 in each [4]
// as multiply_add gives them.
template <int m_tiles, int n_tiles>
using Products = float[m_tiles][n_tiles][4];

// Which query (of the tile) and which key (of all) they stand for: queries are the rows, or, if
// `transposed`, the columns. `row`: the warp's first one.
template <bool transposed>
struct Elements {
  int first_row, first_column;  // of this thread: of the queries' tile, and among the keys; or
                                // the other way round

  FASTGPT_DEVICE Elements(int row, int column)
      : first_row(row + lane_index() / 4), first_column(column + lane_index() % 4 * 2) {}

  FASTGPT_DEVICE int query(int m, int n, int e) const {
    return transposed ? column(n, e) : row(m, e);
  }
  FASTGPT_DEVICE int key(int m, int n, int e) const {
    return transposed ? row(m, e) : column(n, e);
  }

 private:
  FASTGPT_DEVICE int row(int m, int e) const { return first_row + 16 * m + e / 2 * 8; }
  FASTGPT_DEVICE int column(int n, int e) const { return first_column + 8 * n + e % 2; }
};

// Calls f(element, m, n, e) for each.
template <int m_tiles, int n_tiles, class F>
FASTGPT_DEVICE void for_each(Products<m_tiles, n_tiles>& x, const F& f) {
  FASTGPT_UNROLLED for (int m = 0; m < m_tiles; ++m) {
    FASTGPT_UNROLLED for (int n = 0; n < n_tiles; ++n) {
      FASTGPT_UNROLLED for (int e = 0; e < 4; ++e) f(x[m][n][e], m, n, e);
    }
  }
}

// Makes scores x of products s, unless the factor alone does. `gradient`: in the backward what ds
// would be for a score, which is multiplied by C'; or null.
template <bool with_gradient, int m_tiles, int n_tiles, int count, bool transposed>
FASTGPT_DEVICE void form_scores(const Attention& a, float slope, const Queries<count>& queries,
                                const Elements<transposed>& at, Products<m_tiles, n_tiles>& s,
                                Products<m_tiles, n_tiles>& gradient) {
  if (a.scaled) for_each(s, [&](float& x, int, int, int) { x *= a.scale; });
  if (a.softcap != 0) {
    const Cap<bfloat16> cap(a.softcap);
    for_each(s, [&](float& x, int m, int n, int e) {
      float derivative;
      x = cap(x, &derivative);
      if (with_gradient) gradient[m][n][e] *= derivative;
    });
  }
  if (a.slopes) {
    for_each(s, [&](float& x, int m, int n, int e) {
      const int distance = queries.place(at.query(m, n, e)) - at.key(m, n, e);
      x -= slope * std::fabs(float(distance));
    });
  }
}

// Puts `hidden` where a query does not see a key.
template <int m_tiles, int n_tiles, int count, bool transposed>
FASTGPT_DEVICE void hide(const Queries<count>& queries, const Elements<transposed>& at,
                         float hidden, Products<m_tiles, n_tiles>& s) {
  for_each(s, [&](float& x, int m, int n, int e) {
    const Span span = queries.span(at.query(m, n, e));
    if (unsigned(at.key(m, n, e) - span.begin) >= unsigned(span.end - span.begin)) x = hidden;
  });
}

// Puts 0 where dropout does not keep a weight, and multiplies what it keeps.
template <int m_tiles, int n_tiles, int count, bool transposed>
FASTGPT_DEVICE void drop(const Attention& a, const Queries<count>& queries,
                         const Elements<transposed>& at, float rescale,
                         Products<m_tiles, n_tiles>& p) {
  for_each(p, [&](float& x, int m, int n, int e) {
    x = kept(a, queries.words(at.query(m, n, e)), at.key(m, n, e)) ? x * rescale : 0;
  });
}

FASTGPT_DEVICE float slope_of(const Attention& a, int batch, int head) {
  return a.slopes ? load(a.slopes + batch * a.slopes_batch + head) : 0;
}

FASTGPT_DEVICE float sink_of(const Attention& a, int batch, int head) {
  return a.sinks ? load(a.sinks + batch * a.sinks_batch + head) / a.unit : -INFINITY;
}

// ---- tiles in shared memory, and their products by mma.sync ----

constexpr int kAttentionWarps = 4, kAttentionThreads = kAttentionWarps * kWarp;

// Elements from one row to the next: an odd number of times 16 bytes, so that the eight rows of a
// matrix lie in different banks.
template <int width>
constexpr int kPitch = width + 8;

// Rows of one head, and how many of them and of their columns there are.
template <class T>
struct Matrix {
  const T* data;
  int64_t row;
  int rows, columns;
  bool vectors;

  FASTGPT_DEVICE Matrix(const Heads<const void>& x, int batch, int head, int rows, int columns)
      : data(head_of<T>(x, batch, head)),
        row(x.row),
        rows(rows),
        columns(columns),
        vectors(x.vectors) {}

  // Starts a copy of the rows from `start` on to `to`, from the element `at` on, with zeros where
  // there is nothing. What is no vector is there for others after a barrier.
  template <int count, int width>
  FASTGPT_DEVICE void copy(int start, const Shared<T>& to, int at) const {
    constexpr int in_row = width / 8;
    if (!vectors) {
      FASTGPT_ROLLED for (int i = thread_index(); i < count * width; i += kAttentionThreads) {
        const int r = i / width, column = i % width;
        const bool there = start + r < rows && column < columns;
        to.store(at + r * kPitch<width> + column,
                 there ? load(data + (start + r) * row + column) : T{0});
      }
    } else if constexpr (kAttentionThreads % in_row == 0) {
      // A thread stays in its column.
      constexpr int step = kAttentionThreads / in_row;
      static_assert(count % step == 0, "every thread has as many vectors");
      const int r = thread_index() / in_row, column = thread_index() % in_row * 8;
      const int there = column < columns ? rows - start - r : 0;
      const T* from = data + (start + r) * row + column;
      at += r * kPitch<width> + column;
      FASTGPT_UNROLLED for (int i = 0; i < count; i += step, from += step * row) {
        copy_async_if(i < there, to, at + i * kPitch<width>, from);
      }
    } else {
      FASTGPT_ROLLED for (int v = thread_index(); v < count * in_row; v += kAttentionThreads) {
        const int r = v / in_row, column = v % in_row * 8;
        const bool there = start + r < rows && column < columns;
        copy_async_if(there, to, at + r * kPitch<width> + column,
                      there ? data + (start + r) * row + column : data);
      }
    }
  }
};

// Puts 0 in the place of what is not finite in a tile that all have waited for. Between barriers.
template <int count, int width, class T>
FASTGPT_DEVICE void make_finite(const Shared<T>& tile, int at) {
  FASTGPT_ROLLED for (int i = thread_index(); i < count * width; i += kAttentionThreads) {
    const int element = at + i / width * kPitch<width> + i % width;
    if (!is_finite(widen(tile.load(element)))) tile.store(element, T{0});
  }
}

// s = the 16 m_tiles rows of `a` times the 8 n_tiles rows of `b`, along their columns.
template <int width, int m_tiles, int n_tiles, class T>
FASTGPT_DEVICE void multiply_rows(const Shared<T>& a, int a_at, const Shared<T>& b, int b_at,
                                  Products<m_tiles, n_tiles>& s) {
  static_assert(width % 16 == 0 && n_tiles % 2 == 0, "matrices are loaded four at once");
  const int lane = lane_index(), matrix = lane / 8, row = lane % 8;
  const int a_lane = a_at + (matrix % 2 * 8 + row) * kPitch<width> + matrix / 2 * 8;
  const int b_lane = b_at + (matrix / 2 * 8 + row) * kPitch<width> + matrix % 2 * 8;
  for_each(s, [](float& x, int, int, int) { x = 0; });
  FASTGPT_UNROLLED for (int k = 0; k < width; k += 16) {
    uint32_t rows[m_tiles][4];
    FASTGPT_UNROLLED for (int m = 0; m < m_tiles; ++m) {
      load_matrices(a, a_lane + 16 * m * kPitch<width> + k, rows[m]);
    }
    FASTGPT_UNROLLED for (int n = 0; n < n_tiles; n += 2) {
      uint32_t both[4];
      load_matrices(b, b_lane + 8 * n * kPitch<width> + k, both);
      const uint32_t first[] = {both[0], both[1]}, second[] = {both[2], both[3]};
      FASTGPT_UNROLLED for (int m = 0; m < m_tiles; ++m) {
        multiply_add(s[m][n], rows[m], first, T{});
        multiply_add(s[m][n + 1], rows[m], second, T{});
      }
    }
  }
}

// acc += p times the 8 n_tiles rows of `b`, p rounded to T.
template <int width, int m_tiles, int n_tiles, class T>
FASTGPT_DEVICE void multiply_columns(const Products<m_tiles, n_tiles>& p, const Shared<T>& b,
                                     int b_at, Products<m_tiles, width / 8>& acc) {
  static_assert(width % 16 == 0 && n_tiles % 2 == 0, "matrices are loaded four at once");
  const int lane = lane_index(), matrix = lane / 8, row = lane % 8;
  const int b_lane = b_at + (matrix % 2 * 8 + row) * kPitch<width> + matrix / 2 * 8;
  FASTGPT_UNROLLED for (int k = 0; k < n_tiles; k += 2) {
    uint32_t rows[m_tiles][4];
    FASTGPT_UNROLLED for (int m = 0; m < m_tiles; ++m) {
      // Where a product left them, A wants them.
      FASTGPT_UNROLLED for (int i = 0; i < 4; ++i) {
        const float (&x)[4] = p[m][k + i / 2];
        rows[m][i] = narrow_pair<T>(x[i % 2 * 2], x[i % 2 * 2 + 1]);
      }
    }
    FASTGPT_UNROLLED for (int n = 0; n < width / 8; n += 2) {
      uint32_t both[4];
      load_matrices_transposed(b, b_lane + 8 * k * kPitch<width> + 8 * n, both);
      const uint32_t first[] = {both[0], both[1]}, second[] = {both[2], both[3]};
      FASTGPT_UNROLLED for (int m = 0; m < m_tiles; ++m) {
        multiply_add(acc[m][n], rows[m], first, T{});
        multiply_add(acc[m][n + 1], rows[m], second, T{});
      }
    }
  }
}

// Whether any thread of the block says yes. `votes` has an element for each warp, and is used once.
FASTGPT_DEVICE bool any_of_block(bool x, const Shared<int>& votes) {
  x = any(x);
  if (lane_index() == 0) votes.store(warp_index(), x);
  block_barrier();
  bool found = false;
  for (int warp = 0; warp < kAttentionWarps; ++warp) found |= votes.load(warp) != 0;
  return found;
}

// Two neighbouring elements, of which `count` exist, of a row of which both or none are aligned.
template <class T>
FASTGPT_DEVICE void store_pair(T* to, int count, bool aligned, uint32_t both) {
  if (aligned && count >= 2) {
    store(reinterpret_cast<uint32_t*>(to), both);
    return;
  }
  if (count > 0) store(to, T{uint16_t(both)});
  if (count > 1) store(to + 1, T{uint16_t(both >> 16)});
}

}  // namespace fastgpt::cuda
