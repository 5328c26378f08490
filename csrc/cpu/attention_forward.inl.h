// The forward of attention for more than a few queries: blocks of them, and packed tiles of keys.

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
  A *scores, *output, *row_max, *row_sum, *factor, *kept;
  uint8_t* started;  // of a group of queries: whether it has seen a tile

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
    kept = own.take<A>(kKeyTile + 16);
    started = own.take<uint8_t>(kQueryBlock);
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

// The softmax of up to Tile::rows rows of products with the keys of one tile, as far as any of them
// sees: weights in the columns of `all`, and the running maximum and sum with the factor by which
// the sum shrinks.
template <class T>
static void softmax_rows(const AttentionForward& a, int64_t b, int64_t h, int64_t query,
                         int64_t rows, int64_t key, int64_t n, Range all,
                         const ForwardMemory<T>& to, int64_t r) {
  using L = Tiling<T>;
  using A = typename L::A;
  using E = typename L::E;
  using V = Vec<A>;
  constexpr int64_t lanes = (Tile::rows + V::width - 1) / V::width * V::width;
  const bool scaled = scaled_products(a);
  const A factor = score_factor<A>(a);
  A before[lanes] = {}, shift[lanes] = {};
  Range seen[Tile::rows];
  for (int64_t i = 0; i < rows; ++i) {
    seen[i] = visible(a, query + i, query + i, key, n);
    const int64_t first = align_down<T>(seen[i].begin);
    A* s = to.scores + (r + i) * kKeyTile;
    A& m = to.row_max[r + i];
    before[i] = m;
    if (!seen[i].empty()) {
      score_row<T>(a, scaled, b, h, query + i, key, seen[i], s, nullptr);
      const A top = row_maximum(s + first, seen[i].end - first);
      if (!(top <= m)) m = top;
    }
    // Anything finite will do while all that was seen is -inf.
    shift[i] = m == A(-INFINITY) ? A(0) : m;
  }
  for (int64_t i = 0; i < lanes; i += V::width) {
    // A NaN in `before` is in the sum as well, and stays there.
    V shrink[1] = {(V::load(before + i) - V::load(shift + i)) * V::all(factor)};
    exp2(shrink);
    shrink[0].store(before + i);
  }
  for (int64_t i = 0; i < rows; ++i) {
    to.factor[r + i] = before[i];
    const int64_t first = align_down<T>(seen[i].begin), count = seen[i].end - first;
    E* weights = to.weights + (r + i) * (kKeyTile / L::terms);
    if (seen[i].empty()) {
      zero_weights<A>(all.begin, all.end, weights);
      continue;
    }
    zero_weights<A>(all.begin, first, weights);
    zero_weights<A>(round_up(seen[i].end, L::width), all.end, weights);
    if (a.seeds) {
      dropout_factors(dropout_row(a, b, h, query + i), a.drop_below, key + first, count, to.kept);
    }
    const A sum = softmax_row(to.scores + (r + i) * kKeyTile + first, count, factor, shift[i],
                              a.seeds ? to.kept : nullptr, weights + first / L::terms);
    to.row_sum[r + i] = to.row_sum[r + i] * before[i] + sum;
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
  memset(to.started, 0, size_t(kQueryBlock));
  const Range seen = visible(a, query, query + rows - 1, 0, a.keys);
  for (int64_t t = seen.begin / l.tile; t * l.tile < seen.end; ++t) {
    const int64_t key = t * l.tile, tile = first_tile + t;
    const int64_t n = smaller(l.tile, seen.end - key);
    products<T>(a, query, rows, key, n, to.query, l.depth, to.keys + tile * l.tile * l.depth,
                l.depth, to.scores);
    for (int64_t r = 0; r < rows; r += Tile::rows) {
      const int64_t some = smaller(Tile::rows, rows - r);
      Range all = visible(a, query + r, query + r + some - 1, key, n);
      if (all.empty()) continue;
      all.begin = align_down<T>(all.begin);
      softmax_rows(a, b, h, query + r, some, key, n, all, to, r);
      const int64_t first = all.begin / L::terms;
      const Product<E> x{ceil_div(all.end, L::terms) - first,
                         to.weights + r * (kKeyTile / L::terms) + first,
                         kKeyTile / L::terms,
                         1,
                         to.values + (tile * (l.tile / L::terms) + first) * l.value_columns,
                         l.value_columns,
                         to.output + r * l.value_columns,
                         l.value_columns,
                         to.started[r] ? Into::kScaledSum : Into::kFresh,
                         to.factor + r};
      wide_product(x, int(some), registers, to.finite[tile]);
      to.started[r] = 1;
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    A* exact = to.output + r * l.value_columns;
    if (!to.started[r / Tile::rows * Tile::rows]) {
      memset(exact, 0, size_t(l.value_columns) * sizeof(A));
    }
    finish_row<T>(a, b, h, query + r, exact, to.row_max[r], to.row_sum[r]);
  }
}
