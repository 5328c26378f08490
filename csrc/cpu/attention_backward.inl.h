// The gradient of attention: blocks of queries and packed tiles of keys.

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
  // Of a row of a tile: what dropout leaves of its weights, and the softcap's slope.
  A *kept, *slope;
  // Of a tile of the mask's gradient.
  A* grad_mask;

  int64_t workspace_bytes, scratch_bytes;

  BackwardMemory(const AttentionBackward& a, const L& l, void* workspace, void* scratch) {
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
    kept = own.take<A>(kKeyTile + 16);
    slope = own.take<A>(kKeyTile);
    grad_mask = own.take<A>(a.grad_mask ? kQueryBlock * kKeyTile : 0);
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
    const int64_t row = first_row + r;
    const T* g = grad + r * a.grad_output.row;
    A& delta = to.delta[block * l.block + r];
    delta = dot<A>(g, at<T>(a.output, b, h, query + r), a.value_dim);
    if (L::rounds) delta += dot<A>(g, at<T>(a.rounding, b, h, query + r), a.value_dim);
    if (a.grad_lse) delta -= static_cast<const A*>(a.grad_lse)[row];
    finite &= delta * 0 == 0;
    if (!a.grad_sinks) continue;
    const A sum = static_cast<const A*>(a.row_sum)[row];
    Vec<A> power[1] = {Vec<A>::all(of_head<A>(a.sinks, a.sinks_batch, b, h) * A(kLog2e) -
                                   static_cast<const A*>(a.row_max)[row])};
    exp2(power);
    static_cast<A*>(a.grad_sinks)[row] = sum == 0 ? A(0) : -delta * power[0].reduce_max() / sum;
  }
  to.finite_queries[block] = finite;
}

// One row's products and dp of a tile to the weights R p and dy, from the first register on that
// the query sees. Where p is 1, ds is `at_one`: delta is dp but for that, though summed in another
// order. Where NaN may be about, what is masked gets 0 whatever m is, and ds is not p * dp where p
// is 0. `kept`: 1 or 0 for each weight, or null; `slope`: C', or null.
template <bool kFinite, bool kPlain, class A>
static inline void gradient_row(A* s, A* dp, int64_t n, A factor, A m, A inverse, A delta, A at_one,
                                A rescale, const A* kept, const A* slope) {
  using V = Vec<A>;
  const V zero = V::all(0);
  const V lowest = V::all(A(-INFINITY));
  in_step<V>(n, [&](int64_t j, auto&& p) {
    for (V& x : p) x = (V::load(s + j + (&x - p) * V::width) - V::all(m)) * V::all(factor);
    exp2(p);
    for (V& x : p) {
      const int64_t at = j + (&x - p) * V::width;
      x = x * V::all(inverse);
      if (!kFinite) x = where_equal(V::load(s + at), lowest, zero, x);
      V d = V::load(dp + at);
      if (!kPlain && kept) d = where_equal(V::load(kept + at), zero, zero, d * V::all(rescale));
      V ds = x * (d - V::all(delta));
      const V one = kFinite ? V::all(at_one) : fma(ds, zero, V::all(at_one));
      ds = where_equal(x, V::all(1), one, ds);
      if (!kPlain && slope) ds = ds * V::load(slope + at);
      if (!kFinite) ds = where_equal(x, zero, zero, ds);
      if (!kPlain && kept) x = x * V::load(kept + at);
      x.store(s + at);
      ds.store(dp + at);
    }
  });
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

// The columns of a tile in which the rows around query r of a block must hold numbers: those that
// its group of Tile::rows queries sees, and what the products for a group of keys read beyond that.
template <class T>
static inline Range columns_around(const Attention& a, int64_t query, int64_t rows, int64_t r,
                                   int64_t key, int64_t n) {
  constexpr int64_t width = Tiling<T>::width;
  const int64_t group = r / Tile::rows * Tile::rows;
  const Range seen =
      visible(a, query + group, query + smaller(group + Tile::rows, rows) - 1, key, n);
  return {align_down<T>(larger(0, seen.begin - Tile::rows)),
          round_up(smaller(n, seen.end + Tile::rows + 1), width)};
}

// p and dp of the packed tile of `n` keys and one block of queries, made R p and dy; ds if the mask
// is asked for (`of_mask`). Zeros around what a query sees.
template <class T>
static void gradient_tile(const AttentionBackward& a, const Tiling<T>& l,
                          const BackwardMemory<T>& to, int64_t key, int64_t n, bool finite,
                          int64_t block, bool of_mask) {
  using L = Tiling<T>;
  using A = typename L::A;
  const auto [head, b, h, query, rows] = l.query_block(a, block);
  products<T>(a, query, rows, key, n, to.query_a + block * l.block * to.query_row, to.query_row,
              to.keys_transposed, l.depth, to.scores);
  products<T>(a, query, rows, key, n, to.grad_a + block * l.block * to.grad_row, to.grad_row,
              to.values_transposed, l.value_depth, to.grad_scores);

  const bool scaled = scaled_products(a);
  const A factor = score_factor<A>(a);
  const A* row_max = static_cast<const A*>(a.row_max) + head * a.queries + query;
  const A* row_sum = static_cast<const A*>(a.row_sum) + head * a.queries + query;
  const A* grad_lse = static_cast<const A*>(a.grad_lse);
  if (grad_lse) grad_lse += head * a.queries + query;
  const A* delta = to.delta + block * l.block;
  const A* kept = a.seeds ? to.kept : nullptr;
  const A* slope = a.softcap != 0 && !of_mask ? to.slope : nullptr;
  const auto gradient_of_row =
      kept || slope ? (finite ? gradient_row<true, false, A> : gradient_row<false, false, A>)
                    : (finite ? gradient_row<true, true, A> : gradient_row<false, true, A>);
  for (int64_t r = 0; r < rows; ++r) {
    const Range around = columns_around<T>(a, query, rows, r, key, n);
    const Range seen = visible(a, query + r, query + r, key, n);
    A *s = to.scores + r * kKeyTile, *dp = to.grad_scores + r * kKeyTile;
    int64_t first = align_down<T>(seen.begin), last = round_up(seen.end, L::width);
    if (seen.empty()) {
      first = last = around.begin;
    } else {
      score_row<T>(a, scaled, b, h, query + r, key, seen, s, to.slope);
      if (kept) {
        dropout_factors(dropout_row(a, b, h, query + r), a.drop_below, key + first,
                        seen.end - first, to.kept);
      }
      gradient_of_row(s + first, dp + first, seen.end - first, factor, row_max[r],
                      row_sum[r] == 0 ? A(0) : 1 / row_sum[r], delta[r],
                      grad_lse ? grad_lse[r] : A(0), A(a.rescale), kept,
                      slope ? slope + first : nullptr);
    }
    A* both[] = {s, dp};
    for (A* x : both) {
      zero_weights<A>(around.begin, first, x);
      zero_weights<A>(last, around.end, x);
    }
  }
}

// What the packed tile of `tile_keys` keys and one block of queries give each other.
template <class T>
static void backward_tile(const AttentionBackward& a, const Tiling<T>& l,
                          const BackwardMemory<T>& to, int64_t key, int64_t tile_keys,
                          bool finite_keys, int64_t block, typename Tiling<T>::A* grad_query) {
  using L = Tiling<T>;
  using E = typename L::E;
  const auto [head, b, h, query, rows] = l.query_block(a, block);
  const Range all = visible(a, query, query + rows - 1, key, tile_keys);
  if (all.empty()) return;
  const int64_t n = all.end;
  const bool finite = finite_keys && to.finite_queries[block];
  gradient_tile(a, l, to, key, n, finite, block, false);

  constexpr int64_t pairs = kKeyTile / L::terms;
  if (L::terms != 1) {
    for (int64_t r = 0; r < rows; r += L::terms) {
      const Range around = columns_around<T>(a, query, rows, r, key, n);
      const int64_t end = smaller(r + L::terms, rows), count = around.end - around.begin;
      for (int64_t i = r; i < end; ++i) {
        pair_columns(to.grad_scores + i * kKeyTile + around.begin, count,
                     to.grad_rows + i * pairs + around.begin / L::terms);
      }
      const int64_t from = r * kKeyTile + around.begin;
      const int64_t into = r / L::terms * kKeyTile + around.begin;
      pair_rows(to.scores + from, end == r + 2, count, to.weights_pairs + into);
      pair_rows(to.grad_scores + from, end == r + 2, count, to.grad_pairs + into);
    }
  }

  const auto add = [&](const Product<E>& x, int64_t some, int64_t columns) {
    wide_product(x, int(some), columns / L::width, finite);
  };
  // Of the queries, those that see any of a group of keys.
  int64_t begin = 0, end = 0;
  for (int64_t j = align_down<T>(all.begin); j < n; j += Tile::rows) {
    const int64_t some = smaller(Tile::rows, n - j);
    while (begin < rows && a.end[query + begin] <= key + j) ++begin;
    while (end < rows && a.begin[query + end] < key + j + some) ++end;
    if (begin >= end) continue;
    const int64_t start = begin / L::terms, last = ceil_div(end, L::terms) - 1;
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
    const Range seen = visible(a, query + r, query + r + some - 1, key, n);
    if (seen.empty()) continue;
    const int64_t first = align_down<T>(seen.begin) / L::terms;
    add({ceil_div(seen.end, L::terms) - first, to.grad_rows + r * pairs + first, pairs, 1,
         to.keys + first * l.columns, l.columns, grad_query + r * l.columns, l.columns, Into::kSum,
         nullptr},
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
    if (t == chunk) {
      memset(grad_query + first * block_size, 0,
             size_t(group * l.query_blocks * block_size) * sizeof(A));
    }
    const bool finite = pack_key_tile(a, to, b, h, key, n);
    memset(to.grad_key, 0, size_t(n * l.columns) * sizeof(A));
    memset(to.grad_value, 0, size_t(n * l.value_columns) * sizeof(A));
    // Backwards: under a causal mask the first queries give a key its largest weights, and what is
    // added to a large sum is rounded at its size.
    for (int64_t block = first + group * l.query_blocks - 1; block >= first; --block) {
      backward_tile(a, l, to, key, n, finite, block, grad_query + block * block_size);
    }
    for (int64_t j = 0; j < n; ++j) {
      store_row(to.grad_key + j * l.columns, A(a.scale), a.head_dim,
                at<T>(a.grad_key, b, h, key + j));
      store_row(to.grad_value + j * l.value_columns, A(a.rescale), a.value_dim,
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

// ---- the gradient of the mask ----

// Each task has a tile of it, and walks over what shares the tile: the sequences and heads, and all
// queries or keys where the mask has one for all of them.
struct MaskTiles {
  int64_t batch, heads, blocks, tiles;  // into which the mask falls
  explicit MaskTiles(const Attention& a, int64_t query_blocks, int64_t key_tiles)
      : batch(a.mask.sizes[0]),
        heads(a.mask.sizes[1]),
        blocks(a.mask.sizes[2] == 1 ? 1 : query_blocks),
        tiles(a.mask.sizes[3] == 1 ? 1 : key_tiles) {}
  int64_t count() const { return batch * heads * blocks * tiles; }
};

template <class T>
static void mask_tile(const AttentionBackward& a, const Tiling<T>& l, const BackwardMemory<T>& to,
                      int64_t task) {
  using L = Tiling<T>;
  using A = typename L::A;
  const MaskTiles tiles(a, l.query_blocks, l.key_tiles);
  const int64_t tile = task % tiles.tiles, block = task / tiles.tiles % tiles.blocks;
  const int64_t mask_head = task / (tiles.tiles * tiles.blocks) % tiles.heads;
  const int64_t mask_batch = task / (tiles.tiles * tiles.blocks * tiles.heads);
  const int64_t* sizes = a.mask.sizes;
  const bool all_queries = sizes[2] == 1, all_keys = sizes[3] == 1;
  const auto of = [](int64_t size, int64_t one, int64_t all) {
    return Range{size == 1 ? 0 : one, size == 1 ? all : one + 1};
  };
  const Range batches = of(sizes[0], mask_batch, a.batch);
  const Range heads = of(sizes[1], mask_head, a.query_heads);
  const Range blocks = of(sizes[2], block, l.query_blocks);
  const Range key_tiles = of(sizes[3], tile, l.key_tiles);
  const int64_t group = a.query_heads / a.heads;

  memset(to.grad_mask, 0, size_t(kQueryBlock * kKeyTile) * sizeof(A));
  for (int64_t b = batches.begin; b < batches.end; ++b) {
    for (int64_t t = key_tiles.begin; t < key_tiles.end; ++t) {
      const int64_t key = t * l.tile, tile_keys = smaller(l.tile, a.keys - key);
      bool finite_keys = false;
      for (int64_t h = heads.begin; h < heads.end; ++h) {
        if (h == heads.begin || h % group == 0) {
          finite_keys = pack_key_tile(a, to, b, h / group, key, tile_keys);
        }
        for (int64_t i = blocks.begin; i < blocks.end; ++i) {
          const int64_t of_all = (b * a.query_heads + h) * l.query_blocks + i;
          const auto [head, b_, h_, query, rows] = l.query_block(a, of_all);
          const Range all = visible(a, query, query + rows - 1, key, tile_keys);
          if (all.empty()) continue;
          gradient_tile(a, l, to, key, all.end, finite_keys && to.finite_queries[of_all], of_all,
                        true);
          for (int64_t r = 0; r < rows; ++r) {
            const Range seen = visible(a, query + r, query + r, key, tile_keys);
            const A* ds = to.grad_scores + r * kKeyTile;
            A* sum = to.grad_mask + (all_queries ? 0 : r * kKeyTile);
            for (int64_t j = seen.begin; j < seen.end; ++j) sum[all_keys ? 0 : j] += ds[j];
          }
        }
      }
    }
  }
  const int64_t query = block * l.block, key = tile * l.tile;
  const int64_t rows = all_queries ? 1 : smaller(l.block, a.queries - query);
  const int64_t columns = all_keys ? 1 : smaller(l.tile, a.keys - key);
  A* out = static_cast<A*>(a.grad_mask) + (mask_batch * sizes[1] + mask_head) * sizes[2] * sizes[3];
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(out + (query + r) * sizes[3] + key, to.grad_mask + r * kKeyTile,
           size_t(columns) * sizeof(A));
  }
}

template <class T>
static Plan plan_backward(const AttentionBackward& a) {
  const Tiling<T> l(a, true);
  const BackwardMemory<T> memory(a, l, nullptr, nullptr);
  const int64_t mask_tiles = a.grad_mask ? MaskTiles(a, l.query_blocks, l.key_tiles).count() : 0;
  return {memory.workspace_bytes,
          memory.scratch_bytes,
          {l.all_query_blocks, a.batch * a.heads * memory.chunks, l.all_query_blocks, mask_tiles}};
}

template <class T>
static void run_backward(const AttentionBackward& a, int phase, int64_t task, void* workspace,
                         void* scratch) {
  const Tiling<T> l(a, true);
  const BackwardMemory<T> memory(a, l, workspace, scratch);
  constexpr decltype(&sum_chunks<T>) phases[] = {pack_query_block<T>, backward_chunk<T>,
                                                 sum_chunks<T>, mask_tile<T>};
  phases[phase](a, l, memory, task);
}
