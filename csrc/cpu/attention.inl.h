// Scaled dot-product attention and its gradient in tiles, for any instruction set.
//
// For a query row q_i, keys k_j and values v_j, with what is added to a score in b_ij (the mask's
// number, or 0 or -inf if it is boolean, and -slope |p_i - j|), C the softcap or nothing, and
// R_ij = kept / (1 - dropout_p) or 1:
//
//   y_ij = scale <q_i, k_j>           x_ij = C(y_ij) + b_ij      m_i = max_j x_ij
//   l_i = sum_j exp(x_ij - m_i)       p_ij = exp(x_ij - m_i) / l_i
//   o_i = sum_j R_ij p_ij v_j         lse_i = m_i + log l_i
//
// A head's sink takes part in m and l only. Backward, for the upstream gradients g_i of o_i and h_i
// of lse_i:
//
//   dp_ij = R_ij <g_i, v_j>           delta_i = sum_j p_ij dp_ij - h_i = <g_i, o_i> - h_i
//   ds_ij = p_ij (dp_ij - delta_i)    dy_ij = ds_ij C'(y_ij)
//   dv_j = sum_i R_ij p_ij g_i        dq_i = scale sum_j dy_ij k_j
//   dk_j = scale sum_i dy_ij q_i      db_ij = ds_ij             dsink = -sum_i p_i,sink delta_i
//
// The forward walks the keys of a block of queries with a running maximum (Milakov and Gimelshein
// 2018; Dao et al., "FlashAttention", 2022). The backward recomputes p from the saved m and l, and
// walks the queries of a tile of keys (Dao, "FlashAttention-2", 2023): dk and dv stay in the
// caches, and dq is summed over the tiles in a fixed order. Nothing of size L x S exists.
//
// FLOPs, of the pairs (i, j) that are allowed: 4 D per pair forward, 10 D backward, 4 D more for
// the gradient of a mask. Each query sees one stretch of keys, whose ends never fall from one query
// to the next: causality, a window and packed documents are all of that kind. They are followed to
// 6 queries by one register of keys; beyond that nothing is computed.

// At most so many queries in a block and keys in a tile.
constexpr int64_t kQueryBlock = 96;
constexpr int64_t kKeyTile = 384;

// ---- the tiles of one call ----

template <class T>
struct Tiling {
  using A = acc_t<T>;
  using E = operand_t<T>;
  static constexpr int64_t width = Vec<A>::width;
  static constexpr int64_t panel = Tile::registers * width;  // columns of B that lie together
  static constexpr int64_t terms = Operand<E>::terms;
  static constexpr bool rounds = sizeof(T) != sizeof(A);  // the output
  static_assert(kKeyTile % panel == 0 && kQueryBlock % 8 == 0, "packed memory has no other room");

  int64_t depth, value_depth;      // operands along head_dim and value_dim
  int64_t columns, value_columns;  // head_dim and value_dim in whole registers
  // Queries in a block and keys in a tile: fewer than there may be where there would be too few
  // tasks for a few threads, and no more than there are.
  int64_t block, tile;
  int64_t query_blocks, key_tiles;          // of one head
  int64_t all_query_blocks, all_key_tiles;  // of all heads

  explicit Tiling(const Attention& a, bool split_keys)
      : depth(ceil_div(a.head_dim, terms)),
        value_depth(ceil_div(a.value_dim, terms)),
        columns(round_up(a.head_dim, width)),
        value_columns(round_up(a.value_dim, width)),
        block(kQueryBlock),
        tile(kKeyTile) {
    const int64_t query_heads = a.batch * a.query_heads, heads = a.batch * a.heads;
    while (query_heads * ceil_div(a.queries, block) < 4 && block > kQueryBlock / 4) block /= 2;
    while (split_keys && heads * ceil_div(a.keys, tile) < 4 && tile > kKeyTile / 4) tile /= 2;
    block = smaller(block, round_up(a.queries, 2));
    tile = smaller(tile, round_up(a.keys, panel));
    query_blocks = ceil_div(a.queries, block);
    key_tiles = ceil_div(a.keys, tile);
    all_query_blocks = query_heads * query_blocks;
    all_key_tiles = heads * key_tiles;
  }

  struct QueryBlock {
    int64_t head, b, h;   // the head among those of all sequences; its sequence, its number there
    int64_t query, rows;  // the first query, and how many
  };
  QueryBlock query_block(const Attention& a, int64_t i) const {
    const int64_t head = i / query_blocks, query = i % query_blocks * block;
    return {head, head / a.query_heads, head % a.query_heads, query,
            smaller(block, a.queries - query)};
  }

  // A matrix of `rows` rows as the A of a product along its columns, and as the B of one along its
  // rows or, transposed, along its columns: (rows, depth), (rows / terms, columns) and
  // (rows / panel, depth, panel).
  static void pack_a(const T* x, int64_t row_stride, int64_t rows, int64_t n, E* out) {
    for (int64_t r = 0; r < rows; ++r)
      copy_row(x + r * row_stride, n, out + r * ceil_div(n, terms));
  }
  static void pack_b(const T* x, int64_t row_stride, int64_t rows, int64_t n, E* out) {
    const int64_t padded = round_up(n, width);
    for (int64_t r = 0; r < rows; r += terms) {
      const T* first = x + r * row_stride;
      const T* second = r + 1 < rows ? first + row_stride : nullptr;
      copy_row_of_b(first, second, n, padded, out + r / terms * padded);
    }
  }
  static void pack_transposed_b(const T* x, int64_t row_stride, int64_t rows, int64_t n, E* out) {
    for (int64_t start = 0; start < rows; start += panel, out += ceil_div(n, terms) * panel) {
      for (int64_t j = 0; j < panel; j += width) {
        for (int64_t d = 0; d < n; d += width * terms) {
          Vec<A> block[width];
          for (int64_t i = 0; i < width; ++i) {
            const int64_t r = start + j + i;
            block[i] =
                r < rows ? load_operands(x + r * row_stride + d, n - d, E()) : Vec<A>::all(0);
          }
          transpose(block);
          for (int64_t i = 0; i < width && d + i * terms < n; ++i) {
            block[i].store(reinterpret_cast<A*>(out + (d / terms + i) * panel + j));
          }
        }
      }
    }
  }
};

template <class T>
static inline const T* at(const Heads<const void>& x, int64_t b, int64_t h, int64_t row) {
  return static_cast<const T*>(x.data) + b * x.batch + h * x.head + row * x.row;
}
template <class T>
static inline T* at(const Heads<void>& x, int64_t b, int64_t h, int64_t row) {
  return static_cast<T*>(x.data) + b * x.batch + h * x.head + row * x.row;
}

// Columns [begin, end) of a tile of keys.
struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// Those of the `n` keys from `key` on that the queries `first` to `last` may look at, as far as
// their places go: where there are several, that some of them may look at.
static inline Range visible(const Attention& a, int64_t first, int64_t last, int64_t key,
                            int64_t n) {
  return {larger(0, smaller(n, a.begin[first] - key)), larger(0, smaller(n, a.end[last] - key))};
}

template <class T>
static inline int64_t align_down(int64_t column) {
  return column / Vec<acc_t<T>>::width * Vec<acc_t<T>>::width;
}

// ---- dropout ----

// The 32 bits of a weight, as fastgpt/ops/dropout.py defines them: two words for a row of weights,
// and a hash of the key's number between them.
struct DropoutRow {
  uint32_t before, between;
};

static DropoutRow dropout_row(const Attention& a, int64_t b, int64_t h, int64_t i) {
  const uint64_t seed = uint64_t(a.seeds[b]);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  uint32_t c0 = uint32_t(i), c1 = uint32_t(h), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t(0xD2511F53) * c0, odd = uint64_t(0xCD9E8D57) * c2;
    c0 = uint32_t(odd >> 32) ^ c1 ^ k0;
    c1 = uint32_t(odd);
    c2 = uint32_t(even >> 32) ^ c3 ^ k1;
    c3 = uint32_t(even);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {c0, c1};
}

// 1 or 0 for the n weights of the keys from `key` on; up to 15 more are written.
template <class A>
static void dropout_factors(const DropoutRow& row, uint32_t drop_below, int64_t key, int64_t n,
                            A* kept) {
  typedef uint32_t Words __attribute__((vector_size(64)));
  const Words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t j = 0; j < n; j += 16) {
    Words x = (lane + uint32_t(key + j)) ^ row.before;
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15 ^ row.between) * 0x846ca68bu;
    x ^= x >> 16;
    if (sizeof(A) == sizeof(float)) {
      const Words one = lane * 0u + bit_cast<uint32_t>(1.0f);
      const Words stays = Words(x >= drop_below) & one;
      memcpy(kept + j, &stays, sizeof(stays));
    } else {
      for (int t = 0; t < 16; ++t) kept[j + t] = A(x[t] >= drop_below);
    }
  }
}

// ---- scores ----

constexpr double kLog2e = 1.4426950408889634;

// A row of products s stands for scores of factor * s, in units of log 2, x log2(e), so that their
// exponential is a power of 2. If the scores are nothing but scaled products the factor holds the
// scale; otherwise they are formed, and their factor is 1. The saved maximum is one of s, whichever
// that is.
static inline bool scaled_products(const Attention& a) {
  return a.mask.kind == kNoMask && a.softcap == 0 && !a.slopes && !a.sinks && a.scale > 0;
}
template <class A>
static inline A score_factor(const Attention& a) {
  return scaled_products(a) ? A(a.scale * kLog2e) : A(1);
}

template <class A>
static inline A of_head(const void* x, int64_t batch_stride, int64_t b, int64_t h) {
  return static_cast<const A*>(x)[b * batch_stride + h];
}

// C(scale s) in place of the products, and C' as far as it is asked for.
template <class A>
static void cap_row(A* s, int64_t n, A scale, A softcap, A* slope) {
  using V = Vec<A>;
  const Cap<A> cap{softcap};
  for (int64_t j = 0; j < n; j += V::width) {
    const Capped<A> capped = cap(V::load(s + j) * V::all(scale));
    capped.y.store(s + j);
    if (slope) capped.slope.store(slope + j);
  }
}

// factor * s - slope |place - j| for the keys j from `key` on.
template <class A>
static void bias_row(A* s, int64_t n, A factor, A slope, int64_t place, int64_t key) {
  using V = Vec<A>;
  A lanes[V::width];
  for (int64_t i = 0; i < V::width; ++i) lanes[i] = A(i);
  V distance = V::load(lanes) + V::all(A(key - place));
  for (int64_t j = 0; j < n; j += V::width) {
    fma(V::all(-slope), abs(distance), V::load(s + j) * V::all(factor)).store(s + j);
    distance = distance + V::all(A(V::width));
  }
}

// Scores for a register of products and the mask's lanes.
template <class A>
static inline Vec<A> masked(Vec<A> s, Vec<A> factor, const uint8_t* allowed) {
  return where(allowed, s * factor, Vec<A>::all(A(-INFINITY)));
}
template <class A, class M>
static inline Vec<A> masked(Vec<A> s, Vec<A> factor, const M* bias) {
  using V = Vec<A>;
  const A largest = sizeof(A) == sizeof(float) ? A(3.40282347e38f) : A(1.7976931348623157e308);
  const V b = V::load(bias), infinity = V::all(A(INFINITY)), lowest = V::all(-A(INFINITY));
  // A mask of the smallest number is not one of -inf: it must not become that in other units.
  const V scaled = b * V::all(A(kLog2e));
  const V down = where_equal(scaled, lowest, V::all(-largest), scaled);
  const V units = where_equal(down, infinity, where_equal(b, infinity, b, V::all(largest)), down);
  // -inf hides a score of NaN, too.
  return where_equal(b, lowest, lowest, fma(s, factor, units));
}

template <class A, class M>
static void mask_row(A* s, int64_t n, A factor, const M* mask, int64_t column) {
  constexpr int64_t width = Vec<A>::width;
  for (int64_t j = 0; j < n; j += width) {
    const M* lanes = mask + j * column;
    M gathered[width] = {};
    if (column != 1 || j + width > n) {
      for (int64_t i = 0; i < width && j + i < n; ++i) gathered[i] = lanes[i * column];
      lanes = gathered;
    }
    masked(Vec<A>::load(s + j), Vec<A>::all(factor), lanes).store(s + j);
  }
}

// The scores of query i and the keys of one tile that it sees, of the products in s (from the
// tile's first column on), if they are more than scaled products: x log2(e). `slope`: where C'
// goes, if there is a softcap, or null.
template <class T>
static void form_scores(const Attention& a, int64_t b, int64_t h, int64_t i, int64_t key,
                        Range seen, acc_t<T>* s, acc_t<T>* slope) {
  using A = acc_t<T>;
  A factor = A(a.scale * kLog2e);
  const int64_t first = align_down<T>(seen.begin), count = seen.end - first;
  A* x = s + first;
  if (a.softcap != 0) {
    cap_row(x, count, A(a.scale), A(a.softcap), slope ? slope + first : nullptr);
    factor = A(kLog2e);
  }
  if (a.slopes) {
    const A head = of_head<A>(a.slopes, a.slopes_batch, b, h);
    bias_row(x, count, factor, head * A(kLog2e), a.place[i], key + first);
    factor = 1;
  }
  const AttentionMask& mask = a.mask;
  const int64_t start = b * mask.batch + h * mask.head + i * mask.row + (key + first) * mask.column;
  if (mask.kind == kBoolMask) {
    mask_row(x, count, factor, static_cast<const uint8_t*>(mask.data) + start, mask.column);
  } else if (mask.kind == kStorageMask) {
    mask_row(x, count, factor, static_cast<const T*>(mask.data) + start, mask.column);
  } else if (mask.kind == kAccumulatorMask) {
    mask_row(x, count, factor, static_cast<const A*>(mask.data) + start, mask.column);
  } else if (factor != 1) {
    for (int64_t k = 0; k < count; ++k) x[k] *= factor;
  }
}

// Makes scores of one row's products as far as the query sees, unless the factor does; fills the
// registers that they begin and end in with what the softmax makes 0 of. `scaled`: scaled_products.
template <class T>
static inline void score_row(const Attention& a, bool scaled, int64_t b, int64_t h, int64_t i,
                             int64_t key, Range seen, acc_t<T>* s, acc_t<T>* slope) {
  using A = acc_t<T>;
  if (!scaled) form_scores<T>(a, b, h, i, key, seen, s, slope);
  for (int64_t k = align_down<T>(seen.begin); k < seen.begin; ++k) s[k] = A(-INFINITY);
  for (int64_t k = seen.end; k % Vec<A>::width != 0; ++k) s[k] = A(-INFINITY);
}

// A long head_dim is summed in pieces, for accuracy.
constexpr int64_t kDepthPiece = 128;

// The products of up to Tile::rows rows of `a` with the columns [seen.begin, seen.end) of a panel
// of packed keys, in whole registers: the piece that begins at d of the sum.
template <class T>
static inline void panel_products(int64_t rows, const operand_t<T>* a, int64_t a_row,
                                  const operand_t<T>* b, int64_t d, int64_t depth, Range seen,
                                  acc_t<T>* s) {
  constexpr int64_t panel = Tiling<T>::panel, width = Tiling<T>::width;
  const int64_t first = seen.begin / width, registers = ceil_div(seen.end, width) - first;
  const Product<operand_t<T>> x{smaller(kDepthPiece, depth - d),
                                a + d,
                                a_row,
                                1,
                                b + d * panel + first * width,
                                panel,
                                s + first * width,
                                kKeyTile,
                                d == 0 ? Into::kFresh : Into::kSum,
                                nullptr};
  product(x, int(rows), int(registers));
}

// The products of the rows of `a` with the keys of one tile: s (rows, kKeyTile), as far as each
// group of Tile::rows queries sees.
template <class T>
static void products(const Attention& x, int64_t query, int64_t rows, int64_t key, int64_t n,
                     const operand_t<T>* a, int64_t a_row, const operand_t<T>* b, int64_t depth,
                     acc_t<T>* s) {
  constexpr int64_t panel = Tiling<T>::panel;
  const Range all = visible(x, query, query + rows - 1, key, n);
  for (int64_t start = all.begin / panel * panel; start < all.end; start += panel) {
    for (int64_t d = 0; d < depth; d += kDepthPiece) {
      for (int64_t r = 0; r < rows; r += Tile::rows) {
        const int64_t some = smaller(Tile::rows, rows - r);
        const Range seen = visible(x, query + r, query + r + some - 1, key, n);
        const Range here = {larger(0, seen.begin - start), smaller(seen.end - start, panel)};
        if (here.empty()) continue;
        panel_products<T>(some, a + r * a_row, a_row, b + start * depth, d, depth, here,
                          s + r * kKeyTile + start);
      }
    }
  }
}

// A register of weights at column j of a row, as the A of the next product.
template <class A>
static inline void store_weights(Vec<A> x, A* row, int64_t j) {
  x.store(row + j);
}
static inline void store_weights(Vec<float> x, bf16_pair* row, int64_t j) {
  x.store(row[j / 2].part);
}

template <class T>
static inline void store_row(const acc_t<T>* x, acc_t<T> factor, int64_t n, T* out) {
  using V = Vec<acc_t<T>>;
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) (V::load(x + i) * V::all(factor)).store(out + i);
  for (; i < n; ++i) out[i] = narrow<T>(x[i] * factor);
}

// What `store_row` rounded off, in T.
template <class T>
static inline void store_rounding(const acc_t<T>* x, acc_t<T> factor, int64_t n, const T* rounded,
                                  T* out) {
  using V = Vec<acc_t<T>>;
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) {
    (V::load(x + i) * V::all(factor) - V::load(rounded + i)).store(out + i);
  }
  for (; i < n; ++i) out[i] = narrow<T>(x[i] * factor - widen(rounded[i]));
}

// ---- softmax ----

template <class A>
static inline A row_maximum(const A* s, int64_t n) {
  using V = Vec<A>;
  V top = V::all(A(-INFINITY));
  for (int64_t j = 0; j < n; j += V::width) top = max(top, V::load(s + j));
  return top.reduce_max();
}

// Calls some(j, registers) for the columns j up to n, four registers at a time or one; returns the
// column behind the last of them.
template <class V, class Some>
static inline int64_t in_step(int64_t n, const Some& some) {
  int64_t j = 0;
  V four[4], one[1];
  for (; j + 3 * V::width < n; j += 4 * V::width) some(j, four);
  for (; j < n; j += V::width) some(j, one);
  return j;
}

// One row's products to weights 2^(factor (s - shift)); their sum. The difference first: the
// largest weight is 1 to the last bit, and stays so in 16 bits. `kept`: what dropout multiplies the
// weights by that are stored, or null.
template <class A, class E>
static inline A softmax_row(const A* s, int64_t n, A factor, A shift, const A* kept, E* weights) {
  using V = Vec<A>;
  V sum = V::all(0);
  const auto row = [&](const auto& last) {
    in_step<V>(n, [&](int64_t j, auto&& w) {
      for (V& x : w) x = (V::load(s + j + (&x - w) * V::width) - V::all(shift)) * V::all(factor);
      exp2(w);
      for (const V& x : w) {
        const int64_t at = j + (&x - w) * V::width;
        store_weights(last(x, at), weights, at);
        sum = sum + x;
      }
    });
  };
  if (kept) {
    row([&](V x, int64_t j) { return x * V::load(kept + j); });
  } else {
    row([](V x, int64_t) { return x; });
  }
  return sum.reduce_add();
}

// Zeros from column `begin` to `end`, in whole registers.
template <class A, class E>
static inline void zero_weights(int64_t begin, int64_t end, E* weights) {
  for (int64_t j = begin; j < end; j += Vec<A>::width) store_weights(Vec<A>::all(0), weights, j);
}

// A head's sink joins a row's maximum m and sum l; returns what the row's sums of values, and l,
// had to be multiplied by.
template <class A>
static inline A join_sink(A sink, A* m, A* l) {
  const auto power = [](A x) {
    Vec<A> one[1] = {Vec<A>::all(x)};
    exp2(one);
    return one[0].reduce_max();
  };
  sink *= A(kLog2e);
  if (sink == A(-INFINITY)) return 1;
  if (!(sink > *m)) {  // or one of them is NaN
    *l += power(sink - *m);
    return 1;
  }
  const A shrink = power(*m - sink);
  *m = sink;
  *l = *l * shrink + 1;
  return shrink;
}

// The results of query i, from its sum of weighted values, its maximum and its sum.
template <class T>
static void finish_row(const AttentionForward& a, int64_t b, int64_t h, int64_t i,
                       const acc_t<T>* values, acc_t<T> m, acc_t<T> l) {
  using A = acc_t<T>;
  A factor = A(a.rescale);
  if (a.sinks) factor *= join_sink(of_head<A>(a.sinks, a.sinks_batch, b, h), &m, &l);
  factor = l == 0 ? A(0) : factor / l;
  T* output = at<T>(a.output, b, h, i);
  store_row(values, factor, a.value_dim, output);
  if (sizeof(T) != sizeof(A)) {
    store_rounding(values, factor, a.value_dim, output, at<T>(a.rounding, b, h, i));
  }
  const int64_t row = (b * a.query_heads + h) * a.queries + i;
  static_cast<A*>(a.row_max)[row] = l == 0 ? A(0) : m;
  static_cast<A*>(a.row_sum)[row] = l;
  const double unit = scaled_products(a) ? a.scale : 1 / kLog2e;
  const double log_sum = sizeof(A) == sizeof(float) ? double(logf(float(l))) : log(double(l));
  static_cast<A*>(a.lse)[row] = l == 0 ? A(-INFINITY) : A(double(m) * unit + log_sum);
}
