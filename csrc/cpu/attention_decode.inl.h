// The forward of attention for a few queries on many keys, as when text is generated: each key and
// value is read once, as it lies, and the keys are split over the tasks (Dao et al.,
// "Flash-Decoding", 2023). A task has one tile of keys and all queries of the heads that share it;
// a second phase joins what the tiles come to.
//
// Bytes: the keys and values, once. FLOPs: 4 D for each query and key.

// At most so many queries of all heads that share a key.
constexpr int64_t kFewQueries = 16;

static inline bool few_queries(const Attention& a) {
  return a.query_heads / a.heads * a.queries <= kFewQueries;
}

template <class T>
struct DecodeMemory {
  using L = Tiling<T>;
  using A = typename L::A;
  using E = typename L::E;
  // Bytes of values that are multiplied at once: a register tile walks them down for each of its
  // columns, and only the first walk should wait for memory.
  static constexpr int64_t value_bytes = 8192;

  int64_t queries;     // of all heads that share a key
  int64_t key_tiles;   // of a head
  int64_t value_rows;  // that are multiplied at once
  // Of a tile and a query: the sum of weighted values, its maximum and its sum.
  A *output, *row_max, *row_sum;
  // Of a task: the queries; a panel of keys; some values, if they must be converted; scores and
  // weights; and what dropout leaves.
  E *query, *keys;
  A *values, *scores, *kept;

  int64_t workspace_bytes, scratch_bytes;

  DecodeMemory(const AttentionForward& a, const L& l, void* workspace, void* scratch) {
    Carver shared(workspace), own(scratch);
    queries = a.query_heads / a.heads * a.queries;
    key_tiles = ceil_div(a.keys, kKeyTile);
    value_rows = larger(4, value_bytes / (l.value_columns * int64_t(sizeof(T))));
    const int64_t partial = a.batch * a.heads * key_tiles * queries;
    output = shared.take<A>(partial * l.value_columns);
    row_max = shared.take<A>(partial);
    row_sum = shared.take<A>(partial);
    query = own.take<E>(queries * l.depth);
    keys = own.take<E>(L::panel * l.depth);
    values = own.take<A>(value_rows * l.value_columns);
    scores = own.take<A>(queries * kKeyTile);
    kept = own.take<A>(kKeyTile + 16);
    workspace_bytes = shared.used;
    scratch_bytes = own.used;
  }

  int64_t partial(int64_t kv_head, int64_t tile, int64_t query_row) const {
    return (kv_head * key_tiles + tile) * queries + query_row;
  }
};

// Reads `rows` rows of n numbers in order, a number of each line of the cache: a processor that
// sees such a stream fetches it ahead, which it does not do for the packing's 64 bytes here and
// there.
template <class T>
static inline void fetch_rows(const T* x, int64_t row, int64_t rows, int64_t n) {
  constexpr int64_t line = 64 / int64_t(sizeof(T));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; i += line) {
      const char byte = *reinterpret_cast<const char*>(x + r * row + i);
      asm volatile("" : : "r"(byte));
    }
  }
}

// The products of the queries with the keys of the columns `all`, a panel at a time, each key
// packed while it is in the first cache. Summed as in the forward of many queries: the backward
// forms them so, and what it compares with the maximum has to be the same to the last bit.
template <class T>
static void few_products(const AttentionForward& a, const Tiling<T>& l, const DecodeMemory<T>& to,
                         const T* keys, Range all) {
  using L = Tiling<T>;
  for (int64_t start = all.begin / L::panel * L::panel; start < all.end; start += L::panel) {
    const int64_t some = smaller(L::panel, all.end - start);
    fetch_rows(keys + start * a.key.row, a.key.row, some, a.head_dim);
    L::pack_transposed_b(keys + start * a.key.row, a.key.row, some, a.head_dim, to.keys);
    for (int64_t d = 0; d < l.depth; d += kDepthPiece) {
      for (int64_t r = 0; r < to.queries; r += Tile::rows) {
        panel_products<T>(smaller(Tile::rows, to.queries - r), to.query + r * l.depth, l.depth,
                          to.keys, d, l.depth, {0, some}, to.scores + r * kKeyTile + start);
      }
    }
  }
}

template <class A, class B>
static inline Product<A, B> weighted(int64_t n, const A* weights, const B* rows, int64_t row,
                                     A* output, int64_t output_row) {
  return {n, weights, kKeyTile, 1, rows, row, output, output_row, Into::kSum, nullptr};
}

// Adds the weighted values of the columns [begin, end) of a tile to the sums of all queries.
template <class T>
static void add_values(const AttentionForward& a, const Tiling<T>& l, const DecodeMemory<T>& to,
                       const T* value, Range columns, acc_t<T>* output, bool finite) {
  using A = acc_t<T>;
  const int64_t registers = l.value_columns / Tiling<T>::width;
  const auto add = [&](const auto* rows, int64_t row, int64_t j, int64_t n) {
    for (int64_t r = 0; r < to.queries; r += Tile::rows) {
      wide_product(weighted(n, to.scores + r * kKeyTile + j, rows, row,
                            output + r * l.value_columns, l.value_columns),
                   int(smaller(Tile::rows, to.queries - r)), registers, finite);
    }
  };
  const bool whole = a.value_dim == l.value_columns;
  for (int64_t j = columns.begin; j < columns.end; j += to.value_rows) {
    const int64_t some = smaller(to.value_rows, columns.end - j);
    const T* x = value + j * a.value.row;
    if (whole) {
      add(x, a.value.row, j, some);
      continue;
    }
    for (int64_t i = 0; i < some; ++i) {
      A* row = to.values + i * l.value_columns;
      copy_row(x + i * a.value.row, a.value_dim, row);
      for (int64_t k = a.value_dim; k < l.value_columns; ++k) row[k] = 0;
    }
    add(to.values, l.value_columns, j, some);
  }
}

template <class T>
static void decode_tile(const AttentionForward& a, const Tiling<T>& l, const DecodeMemory<T>& to,
                        int64_t task) {
  using L = Tiling<T>;
  using A = typename L::A;
  const int64_t kv_head = task / to.key_tiles, tile = task % to.key_tiles;
  const int64_t b = kv_head / a.heads, kv = kv_head % a.heads;
  const int64_t group = a.query_heads / a.heads, key = tile * kKeyTile;
  const int64_t n = smaller(kKeyTile, a.keys - key), first = to.partial(kv_head, tile, 0);
  A *row_max = to.row_max + first, *row_sum = to.row_sum + first;
  for (int64_t r = 0; r < to.queries; ++r) {
    row_max[r] = A(-INFINITY);
    row_sum[r] = 0;
  }
  Range all = visible(a, 0, a.queries - 1, key, n);
  if (all.empty()) return;
  all.begin = align_down<T>(all.begin);

  for (int64_t r = 0; r < to.queries; ++r) {
    const T* q = at<T>(a.query, b, kv * group + r / a.queries, r % a.queries);
    copy_row(q, a.head_dim, to.query + r * l.depth);
  }
  few_products(a, l, to, at<T>(a.key, b, kv, key), all);
  const bool scaled = scaled_products(a);
  const A factor = score_factor<A>(a);
  for (int64_t r = 0; r < to.queries; ++r) {
    const int64_t h = kv * group + r / a.queries, i = r % a.queries;
    const Range seen = visible(a, i, i, key, n);
    A* s = to.scores + r * kKeyTile;
    if (seen.empty()) {
      zero_weights<A>(all.begin, all.end, s);
      continue;
    }
    const int64_t begin = align_down<T>(seen.begin), count = seen.end - begin;
    score_row<T>(a, scaled, b, h, i, key, seen, s, nullptr);
    A m = row_maximum(s + begin, count);
    zero_weights<A>(all.begin, begin, s);
    zero_weights<A>(round_up(seen.end, L::width), all.end, s);
    if (a.seeds) {
      dropout_factors(dropout_row(a, b, h, i), a.drop_below, key + begin, count, to.kept);
    }
    row_max[r] = m;
    row_sum[r] = softmax_row(s + begin, count, factor, m == A(-INFINITY) ? A(0) : m,
                             a.seeds ? to.kept : nullptr, s + begin);
  }
  const T* values = at<T>(a.value, b, kv, key);
  A* output = to.output + first * l.value_columns;
  const int64_t numbers = to.queries * l.value_columns;
  memset(output, 0, size_t(numbers) * sizeof(A));
  add_values(a, l, to, values, all, output, true);
  // A value that no query sees is not 0 times it, if it is not finite; seldom, so only then.
  bool finite = true;
  for (int64_t i = 0; i < numbers; ++i) finite &= output[i] * 0 == 0;
  if (!finite) {
    memset(output, 0, size_t(numbers) * sizeof(A));
    add_values(a, l, to, values, all, output, false);
  }
}

template <class T>
static void join_tiles(const AttentionForward& a, const Tiling<T>& l, const DecodeMemory<T>& to,
                       int64_t head) {
  using A = typename Tiling<T>::A;
  using V = Vec<A>;
  const int64_t b = head / a.query_heads, h = head % a.query_heads;
  const int64_t group = a.query_heads / a.heads, kv_head = b * a.heads + h / group;
  const A unit = score_factor<A>(a);
  A* total = to.values;  // of one query
  for (int64_t i = 0; i < a.queries; ++i) {
    const int64_t r = h % group * a.queries + i;
    const auto partial = [&](int64_t tile) { return to.partial(kv_head, tile, r); };
    A m = A(-INFINITY), sum = 0;
    for (int64_t t = 0; t < to.key_tiles; ++t) {
      if (!(to.row_max[partial(t)] <= m)) m = to.row_max[partial(t)];
    }
    memset(total, 0, size_t(l.value_columns) * sizeof(A));
    for (int64_t t = 0; t < to.key_tiles; ++t) {
      const int64_t p = partial(t);
      if (to.row_sum[p] == 0) continue;
      V shrink[1] = {V::all((to.row_max[p] - m) * unit)};
      exp2(shrink);
      const A factor = shrink[0].reduce_max();
      sum += factor * to.row_sum[p];
      const A* part = to.output + p * l.value_columns;
      for (int64_t k = 0; k < l.value_columns; k += V::width) {
        fma(V::load(part + k), V::all(factor), V::load(total + k)).store(total + k);
      }
    }
    finish_row<T>(a, b, h, i, total, m, sum);
  }
}

// ---- the forward's plan ----

template <class T>
static Plan plan_forward(const AttentionForward& a) {
  const Tiling<T> l(a, false);
  if (few_queries(a)) {
    const DecodeMemory<T> memory(a, l, nullptr, nullptr);
    return {memory.workspace_bytes,
            memory.scratch_bytes,
            {a.batch * a.heads * memory.key_tiles, a.batch * a.query_heads}};
  }
  const ForwardMemory<T> memory(a, l, nullptr, nullptr);
  return {memory.workspace_bytes,
          memory.scratch_bytes,
          {memory.by_head ? 0 : l.all_key_tiles,
           memory.by_head ? a.batch * a.heads : l.all_query_blocks}};
}

template <class T>
static void run_forward(const AttentionForward& a, int phase, int64_t task, void* workspace,
                        void* scratch) {
  const Tiling<T> l(a, false);
  if (few_queries(a)) {
    const DecodeMemory<T> memory(a, l, workspace, scratch);
    return phase == 0 ? decode_tile(a, l, memory, task) : join_tiles(a, l, memory, task);
  }
  const ForwardMemory<T> memory(a, l, workspace, scratch);
  if (phase == 0) return pack_forward(a, l, memory, task);
  if (!memory.by_head) return forward_block(a, l, memory, task);
  for (int64_t t = 0; t < l.key_tiles; ++t) pack_forward(a, l, memory, task * l.key_tiles + t);
  const int64_t blocks = a.query_heads / a.heads * l.query_blocks;
  for (int64_t i = 0; i < blocks; ++i) forward_block(a, l, memory, task * blocks + i);
}
