// Scaled dot-product attention and its gradient in tiles, for any instruction set.
//
// For a query row q_i, keys k_j and values v_j, with the mask's b_ij (0 or -inf if it is boolean):
//
//   x_ij = scale <q_i, k_j> + b_ij    m_i = max_j x_ij    l_i = sum_j exp(x_ij - m_i)
//   p_ij = exp(x_ij - m_i) / l_i      o_i = sum_j p_ij v_j
//
// and backward, for an upstream gradient g_i of o_i:
//
//   dp_ij = <g_i, v_j>        delta_i = sum_j p_ij dp_ij = <g_i, o_i>
//   ds_ij = p_ij (dp_ij - delta_i)
//   dv_j = sum_i p_ij g_i     dq_i = scale sum_j ds_ij k_j     dk_j = scale sum_i ds_ij q_i
//
// The forward walks the keys of a block of queries with a running maximum (Milakov and Gimelshein
// 2018; Dao et al., "FlashAttention", 2022). The backward recomputes p from the saved m and l, and
// walks the queries of a tile of keys (Dao, "FlashAttention-2", 2023): dk and dv stay in the
// caches, and dq is summed over the tiles in a fixed order. Nothing of size L x S exists.
//
// FLOPs, of the pairs (i, j) that are allowed: 4 D per pair forward, 10 D backward. A causal mask
// is followed to 6 queries by one register of keys; beyond that nothing is computed.

// At most so many queries in a block and keys in a tile.
constexpr int64_t kQueryBlock = 96;
constexpr int64_t kKeyTile = 384;

static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- packing ----

// n numbers as operands along the sum, the last pair filled up with zero.
template <class T>
static inline void copy_row(const T* x, int64_t n, acc_t<T>* out) {
  using V = Vec<acc_t<T>>;
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) V::load(x + i).store(out + i);
  for (; i < n; ++i) out[i] = widen(x[i]);
}

// The library's copy: what a compiler makes of the loop above is slow for a short row.
static inline void copy_row(const float* x, int64_t n, float* out) {
  memcpy(out, x, size_t(n) * sizeof(float));
}
static inline void copy_row(const double* x, int64_t n, double* out) {
  memcpy(out, x, size_t(n) * sizeof(double));
}
static inline void copy_row(const bf16* x, int64_t n, bf16_pair* out) {
  memcpy(static_cast<void*>(out), x, size_t(n) * sizeof(bf16));
  if (n % 2 != 0) out[n / 2].part[1] = bf16{0};
}

// A register of operands along the sum, zeros behind the n numbers that there are.
template <class T>
static inline Vec<acc_t<T>> load_operands(const T* x, int64_t n, acc_t<T>) {
  using V = Vec<acc_t<T>>;
  return n >= V::width ? V::load(x) : load_partial<acc_t<T>>(x, int(n), acc_t<T>(0));
}

// One row of B for `copy_row`'s A, or two: `padded` columns, zeros behind the n that there are.
template <class T>
static inline void copy_row_of_b(const T* x, const T*, int64_t n, int64_t padded, acc_t<T>* out) {
  copy_row(x, n, out);
  for (int64_t i = n; i < padded; ++i) out[i] = 0;
}

#if defined(FASTGPT_AVX512_BF16)
// Pairs in the lanes of floats, which are only moved.
static inline Vec<float> load_operands(const bf16* x, int64_t n, bf16_pair) {
  bf16 pairs[2 * Vec<float>::width] = {};
  if (n < 2 * Vec<float>::width) x = static_cast<bf16*>(memcpy(pairs, x, size_t(n) * sizeof(bf16)));
  return {_mm512_loadu_ps(x)};
}

static inline void copy_row_of_b(const bf16* first, const bf16* second, int64_t n, int64_t padded,
                                 bf16_pair* out) {
  using V = Vec<float>;
  const auto part = [&](const bf16* x, int64_t i) {
    if (x == nullptr) return V::all(0);
    return i + V::width <= n ? V::load(x + i) : load_partial<float>(x + i, int(n - i), 0.0f);
  };
  for (int64_t i = 0; i < padded; i += V::width)
    store_pairs(part(first, i), part(second, i), out + i);
}
#endif

template <class A, class T>
static inline A dot(const T* x, const T* y, int64_t n) {
  using V = Vec<A>;
  V sum = V::all(0);
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) sum = fma(V::load(x + i), V::load(y + i), sum);
  A rest = sum.reduce_add();
  for (; i < n; ++i) rest += widen(x[i]) * widen(y[i]);
  return rest;
}

// Whether n numbers are finite, and so small that their products with others as small are, too (by
// Cauchy and Schwarz, if their squares have a finite sum).
template <class T>
static inline bool all_finite(const T* x, int64_t n) {
  return dot<acc_t<T>>(x, x, n) < acc_t<T>(INFINITY);
}

template <class T>
static inline bool all_finite(const T* x, int64_t row_stride, int64_t rows, int64_t n) {
  bool finite = true;
  for (int64_t r = 0; r < rows; ++r) finite &= all_finite(x + r * row_stride, n);
  return finite;
}

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

// Cuts a block of memory into arrays, each on a cache line of its own; with a null base it only
// counts.
struct Carver {
  uintptr_t base;
  int64_t used = 0;

  explicit Carver(void* p) : base(reinterpret_cast<uintptr_t>(p)) {}

  template <class X>
  X* take(int64_t count) {
    X* p = reinterpret_cast<X*>(base + uintptr_t(used));
    used += round_up(count * int64_t(sizeof(X)), 64);
    return p;
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

// How many of the `n` keys from `key` on a query may look at, as far as causality goes.
static inline int64_t visible_keys(const Attention& a, int64_t query, int64_t key, int64_t n) {
  return a.causal ? larger(0, smaller(n, query + 1 - key)) : n;
}

// ---- scores ----

constexpr double kLog2e = 1.4426950408889634;

// A row of products s stands for scores of factor * s, in units of log 2, x log2(e), so that their
// exponential is a power of 2. Without a mask the factor holds the scale; a mask is added to scores
// proper, and their factor is 1. The saved maximum is one of s, whichever that is.

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

// Applies the mask to the products of query i with the n keys from j on, fills the register that n
// ends in with what the softmax makes 0 of, and returns the factor that s still lacks.
template <class T>
static inline acc_t<T> mask_row(const Attention& a, int64_t b, int64_t h, int64_t i, int64_t j,
                                int64_t n, acc_t<T>* s) {
  using A = acc_t<T>;
  A factor = A(a.scale * kLog2e);
  const AttentionMask& mask = a.mask;
  const int64_t start = b * mask.batch + h * mask.head + i * mask.row + j * mask.column;
  if (mask.kind == kBoolMask) {
    mask_row(s, n, factor, static_cast<const uint8_t*>(mask.data) + start, mask.column);
  } else if (mask.kind == kStorageMask) {
    mask_row(s, n, factor, static_cast<const T*>(mask.data) + start, mask.column);
  } else if (mask.kind == kAccumulatorMask) {
    mask_row(s, n, factor, static_cast<const A*>(mask.data) + start, mask.column);
  } else if (!(factor > 0)) {
    // So that what is filled in below stays the smallest.
    for (int64_t k = 0; k < n; ++k) s[k] *= factor;
  }
  if (mask.kind != kNoMask || !(factor > 0)) factor = 1;
  for (int64_t k = n; k % Vec<A>::width != 0; ++k) s[k] = A(-INFINITY);
  return factor;
}

// The products of the rows of `a` with the keys of one tile: s (rows, kKeyTile), as far as each
// group of Tile::rows queries sees. A long head_dim is summed in pieces, for accuracy.
template <class T>
static void products(const Attention& x, int64_t query, int64_t rows, int64_t key, int64_t n,
                     const operand_t<T>* a, int64_t a_row, const operand_t<T>* b, int64_t depth,
                     acc_t<T>* s) {
  using L = Tiling<T>;
  constexpr int64_t most = 128;
  for (int64_t start = 0; start < n; start += L::panel) {
    for (int64_t d = 0; d < depth; d += most) {
      for (int64_t r = 0; r < rows; r += Tile::rows) {
        const int64_t some = smaller(Tile::rows, rows - r);
        const int64_t seen = visible_keys(x, query + r + some - 1, key, n) - start;
        if (seen <= 0) continue;
        const int registers = int(ceil_div(smaller(seen, L::panel), L::width));
        product<operand_t<T>>(
            {smaller(most, depth - d), a + r * a_row + d, a_row, 1, b, L::panel,
             s + r * kKeyTile + start, kKeyTile, d == 0 ? Into::kFresh : Into::kSum, nullptr},
            int(some), registers);
      }
      b += smaller(most, depth - d) * L::panel;
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

// ---- forward ----

template <class T>
struct ForwardMemory {
  using L = Tiling<T>;
  using A = typename L::A;
  using E = typename L::E;

  // Of the tiles of every head, or of the task's head alone: K transposed, V, and whether V is
  // finite. Where there are heads enough, a task packs one for itself and does all its queries.
  E *keys, *values;
  uint8_t* finite;
  bool by_head;
  // Of a block of queries.
  E *query, *weights;
  A *scores, *output, *row_max, *row_sum, *factor;

  int64_t workspace_bytes, scratch_bytes;

  ForwardMemory(const AttentionForward& a, const L& l, void* workspace, void* scratch) {
    Carver shared(workspace), own(scratch);
    by_head = a.batch * a.heads >= 8 * a.threads;
    Carver& packed = by_head ? own : shared;
    const int64_t tiles = by_head ? l.key_tiles : l.all_key_tiles;
    keys = packed.take<E>(tiles * l.tile * l.depth);
    values = packed.take<E>(tiles * l.tile / L::terms * l.value_columns);
    finite = packed.take<uint8_t>(tiles);
    query = own.take<E>(kQueryBlock * l.depth);
    scores = own.take<A>(kQueryBlock * kKeyTile);
    weights = L::terms == 1 ? reinterpret_cast<E*>(scores)
                            : own.take<E>(kQueryBlock * kKeyTile / L::terms);
    output = own.take<A>(kQueryBlock * l.value_columns);
    row_max = own.take<A>(kQueryBlock);
    row_sum = own.take<A>(kQueryBlock);
    factor = own.take<A>(kQueryBlock);
    workspace_bytes = shared.used;
    scratch_bytes = own.used;
  }
};

template <class T>
static void pack_forward(const AttentionForward& a, const Tiling<T>& l, const ForwardMemory<T>& to,
                         int64_t task) {
  using L = Tiling<T>;
  const int64_t head = task / l.key_tiles, key = task % l.key_tiles * l.tile;
  const int64_t tile = to.by_head ? task % l.key_tiles : task;
  const int64_t b = head / a.heads, h = head % a.heads, n = smaller(l.tile, a.keys - key);
  const T* value = at<T>(a.value, b, h, key);
  L::pack_transposed_b(at<T>(a.key, b, h, key), a.key.row, n, a.head_dim,
                       to.keys + tile * l.tile * l.depth);
  L::pack_b(value, a.value.row, n, a.value_dim,
            to.values + tile * (l.tile / L::terms) * l.value_columns);
  to.finite[tile] = all_finite(value, a.value.row, n, a.value_dim);
}

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

// One row's products to weights 2^(factor (s - shift)), zeros from n up to `padded`; their sum. The
// difference first: the largest weight is 1 to the last bit, and stays so in 16 bits.
template <class A, class E>
static inline A softmax_row(const A* s, int64_t n, int64_t padded, A factor, A shift, E* weights) {
  using V = Vec<A>;
  V sum = V::all(0);
  const auto some = [&](int64_t j, auto&& w) {
    for (V& x : w) x = (V::load(s + j + (&x - w) * V::width) - V::all(shift)) * V::all(factor);
    exp2(w);
    for (const V& x : w) {
      store_weights(x, weights, j + (&x - w) * V::width);
      sum = sum + x;
    }
  };
  int64_t j = in_step<V>(n, some);
  for (; j < padded; j += V::width) store_weights(V::all(0), weights, j);
  return sum.reduce_add();
}

// The softmax of up to Tile::rows rows of products with the n keys from `key` on, as far as the
// last of them sees: weights, and the running maximum and sum with the factor by which the sum
// shrinks.
template <class T>
static void softmax_rows(const AttentionForward& a, int64_t b, int64_t h, int64_t query,
                         int64_t rows, int64_t key, int64_t n, const ForwardMemory<T>& to,
                         int64_t r) {
  using L = Tiling<T>;
  using A = typename L::A;
  using V = Vec<A>;
  constexpr int64_t lanes = (Tile::rows + V::width - 1) / V::width * V::width;
  A factor[lanes] = {}, before[lanes] = {}, shift[lanes] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t visible = visible_keys(a, query + i, key, n);
    A* s = to.scores + (r + i) * kKeyTile;
    factor[i] = mask_row<T>(a, b, h, query + i, key, visible, s);
    const A top = row_maximum(s, visible);
    A& m = to.row_max[r + i];
    before[i] = m;
    if (!(top <= m)) m = top;
    // Anything finite will do while all that was seen is -inf.
    shift[i] = m == A(-INFINITY) ? A(0) : m;
  }
  for (int64_t i = 0; i < lanes; i += V::width) {
    // A NaN in `before` is in the sum as well, and stays there.
    V shrink[1] = {(V::load(before + i) - V::load(shift + i)) * V::load(factor + i)};
    exp2(shrink);
    shrink[0].store(before + i);
  }
  for (int64_t i = 0; i < rows; ++i) {
    to.factor[r + i] = before[i];
    to.row_sum[r + i] =
        to.row_sum[r + i] * before[i] +
        softmax_row(to.scores + (r + i) * kKeyTile, visible_keys(a, query + i, key, n), n,
                    factor[i], shift[i], to.weights + (r + i) * (kKeyTile / L::terms));
  }
}

template <class T>
static void forward_block(const AttentionForward& a, const Tiling<T>& l, const ForwardMemory<T>& to,
                          int64_t task) {
  using L = Tiling<T>;
  using A = typename L::A;
  using E = typename L::E;
  // The last block first: under a causal mask it is the longest.
  const int64_t block = task + l.query_blocks - 1 - 2 * (task % l.query_blocks);
  const auto [head, b, h, query, rows] = l.query_block(a, block);
  const int64_t kv_head = b * a.heads + h / (a.query_heads / a.heads);
  const int64_t first_tile = to.by_head ? 0 : kv_head * l.key_tiles;
  const int64_t registers = l.value_columns / L::width;

  L::pack_a(at<T>(a.query, b, h, query), a.query.row, rows, a.head_dim, to.query);
  for (int64_t r = 0; r < rows; ++r) {
    to.row_max[r] = A(-INFINITY);
    to.row_sum[r] = 0;
  }
  const int64_t seen = visible_keys(a, query + rows - 1, 0, a.keys);
  for (int64_t key = 0; key < seen; key += l.tile) {
    const int64_t tile = first_tile + key / l.tile;
    const int64_t n = smaller(l.tile, seen - key);
    products<T>(a, query, rows, key, n, to.query, l.depth, to.keys + tile * l.tile * l.depth,
                l.depth, to.scores);
    for (int64_t r = 0; r < rows; r += Tile::rows) {
      const int64_t some = smaller(Tile::rows, rows - r);
      const int64_t sum_over = visible_keys(a, query + r + some - 1, key, n);
      if (sum_over == 0) continue;
      softmax_rows(a, b, h, query + r, some, key, sum_over, to, r);
      const Product<E> x{ceil_div(sum_over, L::terms),
                         to.weights + r * (kKeyTile / L::terms),
                         kKeyTile / L::terms,
                         1,
                         to.values + tile * (l.tile / L::terms) * l.value_columns,
                         l.value_columns,
                         to.output + r * l.value_columns,
                         l.value_columns,
                         key == 0 ? Into::kFresh : Into::kScaledSum,
                         to.factor + r};
      wide_product(x, int(some), registers, to.finite[tile]);
    }
  }
  A* row_max = static_cast<A*>(a.row_max) + head * a.queries + query;
  A* row_sum = static_cast<A*>(a.row_sum) + head * a.queries + query;
  for (int64_t r = 0; r < rows; ++r) {
    const A sum = to.row_sum[r], factor = sum == 0 ? A(0) : 1 / sum;
    A* exact = to.output + r * l.value_columns;
    T* output = at<T>(a.output, b, h, query + r);
    store_row(exact, factor, a.value_dim, output);
    if (L::rounds) {
      store_rounding(exact, factor, a.value_dim, output, at<T>(a.rounding, b, h, query + r));
    }
    row_max[r] = sum == 0 ? A(0) : to.row_max[r];
    row_sum[r] = sum;
  }
}

template <class T>
static AttentionPlan plan_forward(const AttentionForward& a) {
  const Tiling<T> l(a, false);
  const ForwardMemory<T> memory(a, l, nullptr, nullptr);
  return {memory.workspace_bytes,
          memory.scratch_bytes,
          {memory.by_head ? 0 : l.all_key_tiles,
           memory.by_head ? a.batch * a.heads : l.all_query_blocks, 0}};
}

template <class T>
static void run_forward(const AttentionForward& a, int phase, int64_t task, void* workspace,
                        void* scratch) {
  const Tiling<T> l(a, false);
  const ForwardMemory<T> memory(a, l, workspace, scratch);
  if (phase == 0) return pack_forward(a, l, memory, task);
  if (!memory.by_head) return forward_block(a, l, memory, task);
  for (int64_t t = 0; t < l.key_tiles; ++t) pack_forward(a, l, memory, task * l.key_tiles + t);
  const int64_t blocks = a.query_heads / a.heads * l.query_blocks;
  for (int64_t i = 0; i < blocks; ++i) forward_block(a, l, memory, task * blocks + i);
}

// ---- backward ----

template <class T>
struct BackwardMemory {
  using L = Tiling<T>;
  using A = typename L::A;
  using E = typename L::E;

  // Of a block of queries: Q and the upstream gradient G, as A and as B of a product; delta; and
  // whether Q, G, delta and the statistics are finite.
  E *query_a, *query_b, *grad_a, *grad_b;
  int64_t query_row, grad_row;  // operands between rows of the `_a`
  A* delta;
  uint8_t* finite_queries;
  // Of a block of queries and a chunk of the keys: dq.
  A* grad_query;
  int64_t chunks;

  // Of a tile of keys, which only one task reads: K and V transposed, and K.
  E *keys_transposed, *values_transposed, *keys;
  // The scores or weights, dp or ds of a tile; with pairs of operands, the weights and ds as pairs
  // of queries, and ds as pairs of keys.
  A *scores, *grad_scores;
  E *weights_pairs, *grad_pairs, *grad_rows;
  A *grad_key, *grad_value;

  int64_t workspace_bytes, scratch_bytes;

  BackwardMemory(const Attention& a, const L& l, void* workspace, void* scratch) {
    Carver shared(workspace), own(scratch);
    const int64_t kv_heads = a.batch * a.heads;
    const int64_t blocks = l.all_query_blocks;
    query_b = shared.take<E>(blocks * (l.block / L::terms) * l.columns);
    grad_b = shared.take<E>(blocks * (l.block / L::terms) * l.value_columns);
    if (L::terms == 1) {
      query_a = query_b;
      grad_a = grad_b;
      query_row = l.columns;
      grad_row = l.value_columns;
    } else {
      query_a = shared.take<E>(blocks * l.block * l.depth);
      grad_a = shared.take<E>(blocks * l.block * l.value_depth);
      query_row = l.depth;
      grad_row = l.value_depth;
    }
    delta = shared.take<A>(blocks * l.block);
    finite_queries = shared.take<uint8_t>(blocks);
    // More tasks when there are few heads; each chunk costs a dq.
    chunks = smaller(larger(1, smaller(4, ceil_div(16, kv_heads))), l.key_tiles);
    grad_query = shared.take<A>(chunks * blocks * l.block * l.columns);

    keys_transposed = own.take<E>(kKeyTile * l.depth);
    values_transposed = own.take<E>(kKeyTile * l.value_depth);
    keys = own.take<E>(kKeyTile / L::terms * l.columns);
    scores = own.take<A>(kQueryBlock * kKeyTile);
    grad_scores = own.take<A>(kQueryBlock * kKeyTile);
    if (L::terms == 1) {
      weights_pairs = reinterpret_cast<E*>(scores);
      grad_pairs = grad_rows = reinterpret_cast<E*>(grad_scores);
    } else {
      weights_pairs = own.take<E>(kQueryBlock / L::terms * kKeyTile);
      grad_pairs = own.take<E>(kQueryBlock / L::terms * kKeyTile);
      grad_rows = own.take<E>(kQueryBlock * kKeyTile / L::terms);
    }
    grad_key = own.take<A>(kKeyTile * l.columns);
    grad_value = own.take<A>(kKeyTile * l.value_columns);
    workspace_bytes = shared.used;
    scratch_bytes = own.used;
  }
};

// Returns whether the keys and values are finite.
template <class T>
static bool pack_key_tile(const AttentionBackward& a, const BackwardMemory<T>& to, int64_t b,
                          int64_t h, int64_t key, int64_t n) {
  using L = Tiling<T>;
  const T *keys = at<T>(a.key, b, h, key), *values = at<T>(a.value, b, h, key);
  L::pack_transposed_b(keys, a.key.row, n, a.head_dim, to.keys_transposed);
  L::pack_transposed_b(values, a.value.row, n, a.value_dim, to.values_transposed);
  L::pack_b(keys, a.key.row, n, a.head_dim, to.keys);
  return all_finite(keys, a.key.row, n, a.head_dim) &&
         all_finite(values, a.value.row, n, a.value_dim);
}

template <class T>
static void pack_query_block(const AttentionBackward& a, const Tiling<T>& l,
                             const BackwardMemory<T>& to, int64_t block) {
  using L = Tiling<T>;
  using A = typename L::A;
  const auto [head, b, h, query, rows] = l.query_block(a, block);
  const T* q = at<T>(a.query, b, h, query);
  const T* grad = at<T>(a.grad_output, b, h, query);
  L::pack_b(q, a.query.row, rows, a.head_dim,
            to.query_b + block * (l.block / L::terms) * l.columns);
  L::pack_b(grad, a.grad_output.row, rows, a.value_dim,
            to.grad_b + block * (l.block / L::terms) * l.value_columns);
  if (L::terms != 1) {
    L::pack_a(q, a.query.row, rows, a.head_dim, to.query_a + block * l.block * l.depth);
    L::pack_a(grad, a.grad_output.row, rows, a.value_dim,
              to.grad_a + block * l.block * l.value_depth);
  }
  const int64_t first_row = head * a.queries + query;
  bool finite = all_finite(static_cast<const A*>(a.row_max) + first_row, rows) &&
                all_finite(static_cast<const A*>(a.row_sum) + first_row, rows) &&
                all_finite(q, a.query.row, rows, a.head_dim) &&
                all_finite(grad, a.grad_output.row, rows, a.value_dim);
  for (int64_t r = 0; r < rows; ++r) {
    const T* g = grad + r * a.grad_output.row;
    A& delta = to.delta[block * l.block + r];
    delta = dot<A>(g, at<T>(a.output, b, h, query + r), a.value_dim);
    if (L::rounds) delta += dot<A>(g, at<T>(a.rounding, b, h, query + r), a.value_dim);
    finite &= delta * 0 == 0;
  }
  to.finite_queries[block] = finite;
}

// One row's products and dp of a tile to the weights p and ds; zeros from n up to `padded`. Where p
// is 1, ds is 0: delta is dp, though summed in another order. Where NaN may be about, what is
// masked gets 0 whatever m is, and ds is not p * dp where p is 0.
template <bool kFinite, class A>
static inline void gradient_row(A* s, A* dp, int64_t n, int64_t padded, A factor, A m, A inverse,
                                A delta) {
  using V = Vec<A>;
  const V zero = V::all(0);
  const V lowest = V::all(A(-INFINITY));
  const auto some = [&](int64_t j, auto&& p) {
    for (V& x : p) x = (V::load(s + j + (&x - p) * V::width) - V::all(m)) * V::all(factor);
    exp2(p);
    for (V& x : p) {
      const int64_t at = j + (&x - p) * V::width;
      x = x * V::all(inverse);
      if (!kFinite) x = where_equal(V::load(s + at), lowest, zero, x);
      V ds = x * (V::load(dp + at) - V::all(delta));
      ds = where_equal(x, V::all(1), kFinite ? zero : ds * zero, ds);
      if (!kFinite) ds = where_equal(x, zero, zero, ds);
      x.store(s + at);
      ds.store(dp + at);
    }
  };
  int64_t j = in_step<V>(n, some);
  for (; j < padded; j += V::width) {
    zero.store(s + j);
    zero.store(dp + j);
  }
}

// Weights as operands of a product along the queries (pairs of rows) or along the keys (pairs
// within a row). Where an operand is one number they are that already.
template <class A>
static inline void pair_rows(const A*, bool, int64_t, A*) {}
template <class A>
static inline void pair_columns(const A*, int64_t, A*) {}

#if defined(FASTGPT_AVX512_BF16)
// The row at `x` and, if there is one, the row below it.
static inline void pair_rows(const float* x, bool second, int64_t n, bf16_pair* out) {
  using V = Vec<float>;
  for (int64_t j = 0; j < n; j += V::width) {
    store_pairs(V::load(x + j), second ? V::load(x + kKeyTile + j) : V::all(0), out + j);
  }
}
static inline void pair_columns(const float* x, int64_t n, bf16_pair* out) {
  for (int64_t j = 0; j < n; j += Vec<float>::width) {
    store_weights(Vec<float>::load(x + j), out, j);
  }
}
#endif

// What the packed tile of `tile_keys` keys and one block of queries give each other. `into`:
// whether this is the first tile that the block's dq sees.
template <class T>
static void backward_tile(const AttentionBackward& a, const Tiling<T>& l,
                          const BackwardMemory<T>& to, int64_t key, int64_t tile_keys,
                          bool finite_keys, int64_t block, typename Tiling<T>::A* grad_query,
                          Into into) {
  using L = Tiling<T>;
  using A = typename L::A;
  using E = typename L::E;
  const auto [head, b, h, query, rows] = l.query_block(a, block);
  const int64_t n = visible_keys(a, query + rows - 1, key, tile_keys);
  if (into == Into::kFresh) {
    // The queries that see nothing of this tile, and so nothing of the chunk's later ones.
    const int64_t blind = a.causal ? larger(0, smaller(rows, key - query)) : 0;
    memset(grad_query, 0, size_t(blind * l.columns) * sizeof(A));
  }
  if (n == 0) return;

  products<T>(a, query, rows, key, n, to.query_a + block * l.block * to.query_row, to.query_row,
              to.keys_transposed, l.depth, to.scores);
  products<T>(a, query, rows, key, n, to.grad_a + block * l.block * to.grad_row, to.grad_row,
              to.values_transposed, l.value_depth, to.grad_scores);

  const A* row_max = static_cast<const A*>(a.row_max) + head * a.queries + query;
  const A* row_sum = static_cast<const A*>(a.row_sum) + head * a.queries + query;
  const A* delta = to.delta + block * l.block;
  const bool finite = finite_keys && to.finite_queries[block];
  constexpr int64_t pairs = kKeyTile / L::terms;
  for (int64_t r = 0; r < rows; r += L::terms) {
    const int64_t end = smaller(r + L::terms, rows);
    // The products below read up to Tile::rows beyond what a query sees.
    const int64_t padded = smaller(n, visible_keys(a, query + end - 1, key, n) + Tile::rows + 1);
    for (int64_t i = r; i < end; ++i) {
      A *s = to.scores + i * kKeyTile, *dp = to.grad_scores + i * kKeyTile;
      const int64_t visible = visible_keys(a, query + i, key, n);
      const A factor = mask_row<T>(a, b, h, query + i, key, visible, s);
      (finite ? gradient_row<true, A>
              : gradient_row<false, A>)(s, dp, visible, padded, factor, row_max[i],
                                        row_sum[i] == 0 ? A(0) : 1 / row_sum[i], delta[i]);
      pair_columns(dp, padded, to.grad_rows + i * pairs);
    }
    pair_rows(to.scores + r * kKeyTile, end == r + 2, padded,
              to.weights_pairs + r / L::terms * kKeyTile);
    pair_rows(to.grad_scores + r * kKeyTile, end == r + 2, padded,
              to.grad_pairs + r / L::terms * kKeyTile);
  }

  const auto add = [&](const Product<E>& x, int64_t some, int64_t columns) {
    wide_product(x, int(some), columns / L::width, finite);
  };
  for (int64_t j = 0; j < n; j += Tile::rows) {
    // The queries before these keys do not see them.
    const int64_t start = a.causal ? larger(0, key + j - query) / L::terms : 0;
    const int64_t last = ceil_div(rows, L::terms) - 1;
    const int64_t some = smaller(Tile::rows, n - j);
    // Backwards, as the blocks are, and for the same reason.
    const int64_t from = block * (l.block / L::terms) + last;
    add({last + 1 - start, to.weights_pairs + last * kKeyTile + j, 1, -kKeyTile,
         to.grad_b + from * l.value_columns, -l.value_columns, to.grad_value + j * l.value_columns,
         l.value_columns, Into::kSum, nullptr},
        some, l.value_columns);
    add({last + 1 - start, to.grad_pairs + last * kKeyTile + j, 1, -kKeyTile,
         to.query_b + from * l.columns, -l.columns, to.grad_key + j * l.columns, l.columns,
         Into::kSum, nullptr},
        some, l.columns);
  }
  for (int64_t r = 0; r < rows; r += Tile::rows) {
    const int64_t some = smaller(Tile::rows, rows - r);
    const int64_t seen = visible_keys(a, query + r + some - 1, key, n);
    if (seen == 0) continue;
    add({ceil_div(seen, L::terms), to.grad_rows + r * pairs, pairs, 1, to.keys, l.columns,
         grad_query + r * l.columns, l.columns, into, nullptr},
        some, l.columns);
  }
}

template <class T>
static void backward_chunk(const AttentionBackward& a, const Tiling<T>& l,
                           const BackwardMemory<T>& to, int64_t task) {
  using A = typename Tiling<T>::A;
  const int64_t kv_head = task / to.chunks, chunk = task % to.chunks;
  const int64_t b = kv_head / a.heads, h = kv_head % a.heads;
  const int64_t group = a.query_heads / a.heads;
  const int64_t first = (b * a.query_heads + h * group) * l.query_blocks;  // of the group's blocks
  const int64_t block_size = l.block * l.columns;
  A* grad_query = to.grad_query + chunk * l.all_query_blocks * block_size;
  // Every chunks-th tile: under a causal mask, early keys have more work than late ones.
  for (int64_t t = chunk; t < l.key_tiles; t += to.chunks) {
    const int64_t key = t * l.tile, n = smaller(l.tile, a.keys - key);
    const bool finite = pack_key_tile(a, to, b, h, key, n);
    memset(to.grad_key, 0, size_t(n * l.columns) * sizeof(A));
    memset(to.grad_value, 0, size_t(n * l.value_columns) * sizeof(A));
    // Backwards: under a causal mask the first queries give a key its largest weights, and what is
    // added to a large sum is rounded at its size.
    for (int64_t block = first + group * l.query_blocks - 1; block >= first; --block) {
      backward_tile(a, l, to, key, n, finite, block, grad_query + block * block_size,
                    t == chunk ? Into::kFresh : Into::kSum);
    }
    for (int64_t j = 0; j < n; ++j) {
      store_row(to.grad_key + j * l.columns, A(a.scale), a.head_dim,
                at<T>(a.grad_key, b, h, key + j));
      store_row(to.grad_value + j * l.value_columns, A(1), a.value_dim,
                at<T>(a.grad_value, b, h, key + j));
    }
  }
}

template <class T>
static void sum_chunks(const AttentionBackward& a, const Tiling<T>& l, const BackwardMemory<T>& to,
                       int64_t block) {
  using A = typename Tiling<T>::A;
  using V = Vec<A>;
  const auto [head, b, h, query, rows] = l.query_block(a, block);
  A* total = to.grad_query + block * l.block * l.columns;
  for (int64_t chunk = 1; chunk < to.chunks; ++chunk) {
    const A* part = total + chunk * l.all_query_blocks * l.block * l.columns;
    for (int64_t i = 0; i < rows * l.columns; i += V::width) {
      (V::load(total + i) + V::load(part + i)).store(total + i);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    store_row(total + r * l.columns, A(a.scale), a.head_dim, at<T>(a.grad_query, b, h, query + r));
  }
}

template <class T>
static AttentionPlan plan_backward(const AttentionBackward& a) {
  const Tiling<T> l(a, true);
  const BackwardMemory<T> memory(a, l, nullptr, nullptr);
  return {memory.workspace_bytes,
          memory.scratch_bytes,
          {l.all_query_blocks, a.batch * a.heads * memory.chunks, l.all_query_blocks}};
}

template <class T>
static void run_backward(const AttentionBackward& a, int phase, int64_t task, void* workspace,
                         void* scratch) {
  const Tiling<T> l(a, true);
  const BackwardMemory<T> memory(a, l, workspace, scratch);
  constexpr decltype(&sum_chunks<T>) phases[] = {pack_query_block<T>, backward_chunk<T>,
                                                 sum_chunks<T>};
  phases[phase](a, l, memory, task);
}
