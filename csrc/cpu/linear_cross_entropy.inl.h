// The cross-entropy of a linear layer, and its gradients, for any instruction set.
//
// For rows x_i and a matrix of C rows w_j the logits are y_ij = <x_i, w_j> + b_j, capped if there
// is a cap. With S (rows, C) what cross_entropy.inl.h makes of them, the gradient of the logits,
//
//   dx_i = sum_j S_ij w_j      dw_j = sum_i S_ij x_i      db_j = sum_i S_ij
//
// The logits of a chunk of the rows exist at a time, transposed: a class has its numbers of all
// rows side by side. So the logits are products whose A is the matrix, read as it lies, and whose B
// is the packed chunk, which stays in the second-level cache; the sums over the classes of a row
// are sums over registers; and S, made of the logits of some classes in the caches, is the A of
// both products that follow.
//
// FLOPs: 2 rows C D forward, 6 with the gradients; 8 if logits are formed twice, which is done only
// where those of 16 rows would not fit. Bytes, for each chunk: the matrix twice, its gradient read
// and written, the logits written once and read once.
//
// A chunk's classes fall into groups, and each group is the task of one thread. A group has its own
// part of the sums over the classes, and they are added up in order.

constexpr int64_t kClassBlock = 96;  // of Tile::rows, and of pairs
constexpr int64_t kRowStep = 16;     // of registers, and of pairs
constexpr int64_t kChunkRows = 256;
constexpr int64_t kLogitBytes = int64_t(48) << 20;
constexpr int64_t kPartBytes = int64_t(12) << 20;  // of the groups' parts of dx
constexpr int64_t kFewRows = int64_t(1) << 21;     // logits: chunks of less cost more than they do
constexpr int64_t kGroups = 32;
constexpr int64_t kDepth = 192;      // operands: longer sums are of pieces, for accuracy
constexpr int64_t kRowPadding = 16;  // numbers: rows of a power of 2 would share cache lines

// Columns of a matrix that lie together, in registers: as even as they can be.
struct Strip {
  int64_t first, registers;
};

template <class F>
static inline void for_each_strip(int64_t registers, const F& f) {
  int64_t first = 0;
  for (int64_t strips = ceil_div(registers, Tile::registers); strips > 0; --strips) {
    const int64_t some = ceil_div(registers - first, strips);
    f(Strip{first, some});
    first += some;
  }
}

// How the work of a call falls apart, by its sizes alone.
template <class T>
struct LinearTiling {
  using A = acc_t<T>;
  using E = operand_t<T>;
  static constexpr int64_t width = Vec<A>::width;
  static constexpr int64_t terms = Operand<E>::terms;

  int64_t depth;     // operands along it
  int64_t columns;   // depth in whole registers
  int64_t rows;      // of a chunk, a multiple of kRowStep
  int64_t live;      // of this chunk: the last one may have fewer
  int64_t row_step;  // between classes of a tile
  int64_t block;     // classes
  int64_t blocks;    // of a group
  int64_t groups;
  bool keeps_logits;  // from the one phase to the other

  explicit LinearTiling(const LinearCrossEntropy& a)
      : depth(ceil_div(a.depth, terms)), columns(round_up(a.depth, width)) {
    constexpr int64_t size = sizeof(A);
    const auto fit = [](int64_t bytes, int64_t of_one) { return bytes / of_one; };
    rows = larger(kChunkRows, smaller(fit(kFewRows, a.classes), 8 * kChunkRows));
    // Eight groups' parts of dx, beside one another.
    rows = smaller(rows, fit(kPartBytes, 8 * columns * size));
    const int64_t kept = fit(kLogitBytes, a.classes * size);
    keeps_logits = kept >= kRowStep;
    if (keeps_logits) rows = smaller(rows, kept);
    rows = larger(rows / kRowStep * kRowStep, kRowStep);
    const int64_t chunks = larger(1, ceil_div(a.rows, rows));
    rows = larger(kRowStep, round_up(ceil_div(a.rows, chunks), kRowStep));
    row_step = rows + kRowPadding;
    block = smaller(kClassBlock, round_up(ceil_div(a.classes, 8), 12));
    const int64_t all = ceil_div(a.classes, block);
    const int64_t fitting = smaller(all, fit(kPartBytes, rows * columns * size));
    // A power of 2, which two threads or four share evenly.
    groups = 1;
    while (2 * groups <= smaller(kGroups, fitting)) groups *= 2;
    blocks = ceil_div(all, groups);
    groups = ceil_div(all, blocks);
    live = smaller(rows, round_up(a.chunk_rows, kRowStep));
  }

  int64_t first_class(int64_t group) const { return group * blocks * block; }
  int64_t end_class(const LinearCrossEntropy& a, int64_t group) const {
    return smaller(a.classes, first_class(group + 1));
  }
};

template <class T>
struct LinearMemory {
  using L = LinearTiling<T>;
  using A = typename L::A;
  using E = typename L::E;

  // Of the chunk: as the B of the logits (depth, rows), and of dw (rows, columns), by strips.
  E *input_transposed, *input;
  A* logits;  // (classes, row_step)
  // Of each group, (groups, rows): the sums over its classes.
  A *group_max, *group_reference;
  double *group_sum, *group_dot, *group_mass;
  A* grad_input;  // (groups, rows, columns), by strips
  // Of each row: the target's logit, if it is here; and what makes S of the logits.
  A *at_target, *row_max, *scale, *amount, *lowest, *target_gradient;

  // Of a task.
  A* tile;                 // (block, row_step): logits, then S
  A* capped;               // the same, where there is a cap
  A* share;                // the weight of each class in each row, where it is not one for all rows
  A *from, *part;          // (rows,)
  E* matrix;               // packed rows of it: Tile::rows as A, or a strip of a block as B
  E *pairs, *class_pairs;  // S as operands along the rows, and along the classes
  A* product;              // (block, a strip) of dw that cannot be added where it belongs
  int64_t* active;         // (block,) the classes that have any gradient

  int64_t workspace_bytes, scratch_bytes;

  LinearMemory(const LinearCrossEntropy& a, const L& l, void* workspace, void* scratch) {
    Carver shared(workspace), own(scratch);
    constexpr int64_t strip = Tile::registers * L::width;
    input_transposed = shared.take<E>(l.depth * l.rows);
    input = shared.take<E>(a.grad_matrix ? l.rows / L::terms * l.columns : 0);
    logits = shared.take<A>(a.backward && l.keeps_logits ? a.classes * l.row_step : 0);
    const int64_t sums = l.groups * l.rows;
    group_max = shared.take<A>(sums);
    group_reference = shared.take<A>(sums);
    group_sum = shared.take<double>(sums);
    group_dot = shared.take<double>(sums);
    group_mass = shared.take<double>(sums);
    grad_input = shared.take<A>(a.grad_input ? sums * l.columns : 0);
    A** of_rows[] = {&at_target, &row_max, &scale, &amount, &lowest, &target_gradient};
    for (A** x : of_rows) *x = shared.take<A>(l.rows);

    const int64_t tile_size = l.block * l.row_step;
    tile = own.take<A>(tile_size);
    capped = own.take<A>(a.softcap != 0 ? tile_size : 0);
    share = own.take<A>(a.target ? 0 : tile_size);
    from = own.take<A>(l.rows);
    part = own.take<A>(l.rows);
    matrix = own.take<E>(larger(Tile::rows * l.depth, l.block / L::terms * strip));
    if (L::terms == 1) {
      pairs = class_pairs = reinterpret_cast<E*>(tile);
    } else {
      pairs = own.take<E>(tile_size / L::terms);
      class_pairs = own.take<E>(tile_size / L::terms);
    }
    product = own.take<A>(l.block * strip);
    active = own.take<int64_t>(l.block);
    workspace_bytes = shared.used;
    scratch_bytes = own.used;
  }
};

template <class T>
static inline const T* input_row(const LinearCrossEntropy& a, int64_t r) {
  return static_cast<const T*>(a.input) + a.row_of[a.first_row + r] * a.input_row;
}
template <class T>
static inline const T* matrix_row(const LinearCrossEntropy& a, int64_t c) {
  return static_cast<const T*>(a.matrix) + c * a.matrix_row;
}

// ---- the chunk, packed ----

// kRowStep rows of it; zeros for those that are not there.
template <class T>
static void pack_rows(const LinearCrossEntropy& a, const LinearTiling<T>& l,
                      const LinearMemory<T>& to, int64_t task) {
  using L = LinearTiling<T>;
  using A = typename L::A;
  using E = typename L::E;
  constexpr int64_t width = L::width, terms = L::terms;
  const int64_t first = task * kRowStep, end = first + kRowStep;
  if (first >= l.live) return;
  const auto row = [&](int64_t r) { return r < a.chunk_rows ? input_row<T>(a, r) : nullptr; };
  for_each_strip(l.live / width, [&](Strip s) {
    const int64_t begin = larger(first, s.first * width);
    const int64_t until = smaller(end, (s.first + s.registers) * width);
    E* strip = to.input_transposed + s.first * width * l.depth;
    for (int64_t r = begin; r < until; r += width) {
      for (int64_t d = 0; d < a.depth; d += width * terms) {
        Vec<A> x[width];
        for (int64_t i = 0; i < width; ++i) {
          const T* p = row(r + i);
          x[i] = p ? load_operands(p + d, a.depth - d, E()) : Vec<A>::all(0);
        }
        transpose(x);
        for (int64_t i = 0; i < width && d + i * terms < a.depth; ++i) {
          E* out = strip + (d / terms + i) * s.registers * width + r - s.first * width;
          x[i].store(reinterpret_cast<A*>(out));
        }
      }
    }
  });
  if (!a.grad_matrix) return;
  for_each_strip(l.columns / width, [&](Strip s) {
    const int64_t from = s.first * width, columns = s.registers * width;
    const int64_t n = smaller(columns, a.depth - from);
    E* strip = to.input + from * (l.rows / terms);
    for (int64_t r = first; r < end; r += terms) {
      E* out = strip + r / terms * columns;
      const T *one = row(r), *other = terms == 1 ? nullptr : row(r + 1);
      if (one) {
        copy_row_of_b(one + from, other ? other + from : nullptr, n, columns, out);
      } else {
        memset(static_cast<void*>(out), 0, size_t(columns) * sizeof(E));
      }
    }
  });
}

// ---- logits and the sums over them ----

// The operands of matrix row c and those behind it as the A of a product, as they lie if they can
// be read so, else packed; and the distance between them.
template <class T>
static inline const operand_t<T>* as_operands(const LinearCrossEntropy& a, const LinearTiling<T>& l,
                                              const LinearMemory<T>& to, int64_t c, int64_t rows,
                                              int64_t* step) {
  using E = operand_t<T>;
  constexpr int64_t terms = Operand<E>::terms;
  constexpr bool as_it_lies = sizeof(E) == terms * sizeof(T);
  if (as_it_lies && a.depth % terms == 0 && a.matrix_row % terms == 0) {
    *step = a.matrix_row / terms;
    return reinterpret_cast<const E*>(matrix_row<T>(a, c));
  }
  *step = l.depth;
  for (int64_t i = 0; i < rows; ++i)
    copy_row(matrix_row<T>(a, c + i), a.depth, to.matrix + i * l.depth);
  return to.matrix;
}

// Logits without a cap of `n` classes from `first` on, into `out`.
template <class T>
static void logit_block(const LinearCrossEntropy& a, const LinearTiling<T>& l,
                        const LinearMemory<T>& to, int64_t first, int64_t n, acc_t<T>* out) {
  using A = acc_t<T>;
  using V = Vec<A>;
  using E = operand_t<T>;
  constexpr int64_t width = V::width;
  for (int64_t c = 0; c < n; c += Tile::rows) {
    const int64_t some = smaller(Tile::rows, n - c);
    int64_t step;
    const E* rows = as_operands(a, l, to, first + c, some, &step);
    for_each_strip(l.live / width, [&](Strip s) {
      const int64_t columns = s.registers * width;
      const E* strip = to.input_transposed + s.first * width * l.depth;
      for (int64_t d = 0; d < l.depth; d += kDepth) {
        const Product<E> x{smaller(kDepth, l.depth - d),
                           rows + d,
                           step,
                           1,
                           strip + d * columns,
                           columns,
                           out + c * l.row_step + s.first * width,
                           l.row_step,
                           d == 0 ? Into::kFresh : Into::kSum,
                           nullptr};
        product(x, int(some), int(s.registers));
      }
    });
  }
  if (!a.bias) return;
  for (int64_t c = 0; c < n; ++c) {
    const V b = V::all(widen(static_cast<const T*>(a.bias)[first + c]));
    A* y = out + c * l.row_step;
    for (int64_t r = 0; r < l.live; r += width) (V::load(y + r) + b).store(y + r);
  }
}

// The weights c_j of `n` classes from `first` on in each row of probabilities.
template <class T>
static void share_block(const LinearCrossEntropy& a, const LinearTiling<T>& l,
                        const LinearMemory<T>& to, int64_t first, int64_t n) {
  using A = acc_t<T>;
  const A* weight = static_cast<const A*>(a.weight);
  const A hard = A(a.hard), spread = A(a.spread);
  for (int64_t r = 0; r < l.live; ++r) {
    if (r >= a.chunk_rows) {
      for (int64_t c = 0; c < n; ++c) to.share[c * l.row_step + r] = 0;
      continue;
    }
    with_probabilities<T>(a, a.row_of[a.first_row + r], 0, [&](const auto* q) {
      for (int64_t c = 0; c < n; ++c) {
        const A of_class = hard * widen(q[(first + c) * a.probability_at.column]) + spread;
        to.share[c * l.row_step + r] = weight ? of_class * weight[first + c] : of_class;
      }
    });
  }
}

// Calls f(row, class within the block) for the targets among `n` classes from `first` on.
template <class F>
static inline void for_each_target(const LinearCrossEntropy& a, int64_t first, int64_t n,
                                   const F& f) {
  if (!a.target) return;
  for (int64_t r = 0; r < a.chunk_rows; ++r) {
    const int64_t c = a.target[a.row_of[a.first_row + r]] - first;
    if (c >= 0 && c < n) f(r, c);
  }
}

// The sums over the classes of a group so far, of each row.
template <class A>
struct GroupSums {
  A *max, *reference;
  double *sum, *dot, *mass;
};

// Adds a block of logits y, which has -inf for the targets; `share` of its classes, if any.
template <class T>
static void add_block(const LinearTiling<T>& l, const LinearMemory<T>& to, const acc_t<T>* y,
                      int64_t n, const GroupSums<acc_t<T>>& g) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int64_t width = V::width;
  memcpy(to.from, g.max, size_t(l.live) * sizeof(A));
  for (int64_t c = 0; c < n; ++c) {
    const A* row = y + c * l.row_step;
    for (int64_t r = 0; r < l.live; r += width)
      max(V::load(to.from + r), V::load(row + r)).store(to.from + r);
  }
  for (int64_t r = 0; r < l.live; ++r) {
    Normaliser<A> sums{g.max[r], g.sum[r]};
    sums.raise(to.from[r]);
    g.max[r] = sums.m;
    g.sum[r] = sums.sum;
    // Anything finite will do while all that was seen is -inf.
    to.from[r] = sums.m == A(-INFINITY) ? A(0) : sums.m;
  }
  memset(to.part, 0, size_t(l.live) * sizeof(A));
  for (int64_t c = 0; c < n; ++c) {
    const A* row = y + c * l.row_step;
    for (int64_t r = 0; r < l.live; r += width) {
      const V e = ExpOf<T>::of(V::load(row + r) - V::load(to.from + r));
      (V::load(to.part + r) + e).store(to.part + r);
    }
  }
  for (int64_t r = 0; r < l.live; ++r) g.sum[r] += double(to.part[r]);
}

// Adds c_j (y_j - from) and c_j of a block, targets included. `share`: of each class and row, or
// null; `weight`: of each class, or null.
template <class T>
static void add_moments(const LinearTiling<T>& l, const LinearMemory<T>& to, const acc_t<T>* y,
                        int64_t n, const acc_t<T>* share, const acc_t<T>* weight,
                        const GroupSums<acc_t<T>>& g) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int64_t width = V::width;
  for (int64_t r = 0; r < l.live; ++r) {
    Moments<A> moments{g.reference[r], g.dot[r], g.mass[r]};
    moments.count_from(is_finite(to.from[r]) ? to.from[r] : A(0));
    g.reference[r] = moments.reference;
    g.dot[r] = moments.dot;
  }
  for (int64_t r = 0; r < l.live; r += width) {
    const V origin = V::load(g.reference + r);
    V dot = V::all(0), mass = V::all(0);
    for (int64_t c = 0; c < n; ++c) {
      const V of_class = share    ? V::load(share + c * l.row_step + r)
                         : weight ? V::all(weight[c])
                                  : V::all(1);
      dot = fma(of_class, V::load(y + c * l.row_step + r) - origin, dot);
      mass = mass + of_class;
    }
    A dots[width], masses[width];
    dot.store(dots);
    mass.store(masses);
    for (int64_t i = 0; i < width; ++i) {
      g.dot[r + i] += double(dots[i]);
      g.mass[r + i] += double(masses[i]);
    }
  }
}

template <class T>
static void sum_group(const LinearCrossEntropy& a, const LinearTiling<T>& l,
                      const LinearMemory<T>& to, int64_t group) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr A none = A(-INFINITY);
  const int64_t at = group * l.rows;
  const GroupSums<A> g{to.group_max + at, to.group_reference + at, to.group_sum + at,
                       to.group_dot + at, to.group_mass + at};
  for (int64_t r = 0; r < l.live; ++r) {
    g.max[r] = none;
    g.reference[r] = 0;
    g.sum[r] = g.dot[r] = g.mass[r] = 0;
  }
  const A* weight = static_cast<const A*>(a.weight);
  const bool shared = !a.target || a.spread != 0;
  const bool keeps = a.backward && l.keeps_logits;
  const int64_t end = l.end_class(a, group);
  for (int64_t first = l.first_class(group); first < end; first += l.block) {
    const int64_t n = smaller(l.block, end - first);
    A* x = keeps ? to.logits + first * l.row_step : to.tile;
    logit_block(a, l, to, first, n, x);
    A* y = x;
    if (a.softcap != 0) {
      y = to.capped;
      const Cap<A> cap{A(a.softcap)};
      for (int64_t i = 0; i < n * l.row_step; i += V::width) cap(V::load(x + i)).y.store(y + i);
    }
    for_each_target(a, first, n, [&](int64_t r, int64_t c) {
      to.at_target[r] = x[c * l.row_step + r];
      y[c * l.row_step + r] = none;
    });
    add_block(l, to, y, n, g);
    for_each_target(a, first, n, [&](int64_t r, int64_t c) {
      y[c * l.row_step + r] = logit_of(a, to.at_target + r, nullptr);
    });
    if (!shared) continue;
    if (!a.target) share_block(a, l, to, first, n);
    add_moments(l, to, y, n, a.target ? nullptr : to.share, weight ? weight + first : nullptr, g);
  }
}

// ---- what a row comes to ----

template <class A>
static double upstream_of_row(const Upstream& g, int64_t row) {
  return g.data ? double(static_cast<const A*>(g.data)[row * g.outer]) : 0;
}

template <class T>
static void finish_row(const LinearCrossEntropy& a, const LinearTiling<T>& l,
                       const LinearMemory<T>& to, int64_t r) {
  using A = acc_t<T>;
  const int64_t row = a.row_of[a.first_row + r];
  Normaliser<A> sums;
  for (int64_t g = 0; g < l.groups; ++g) sums.raise(to.group_max[g * l.rows + r]);
  for (int64_t g = 0; g < l.groups; ++g) {
    const double sum = to.group_sum[g * l.rows + r];
    if (sum != 0) sums.sum += sum * ::exp(double(to.group_max[g * l.rows + r]) - double(sums.m));
  }
  const int64_t target = a.target ? a.target[row] : -1;
  const bool here = target >= 0 && target < a.classes;
  const A y = here ? logit_of(a, to.at_target + r, nullptr) : A(0);
  if (here) sums.raise(y);
  Moments<A> moments;
  moments.reference = is_finite(sums.m) ? sums.m : A(0);
  if (!a.target || a.spread != 0) {
    for (int64_t g = 0; g < l.groups; ++g) {
      const int64_t at = g * l.rows + r;
      Moments<A> part{to.group_reference[at], to.group_dot[at], to.group_mass[at]};
      part.count_from(moments.reference);
      moments.dot += part.dot;
      moments.mass += part.mass;
    }
  }
  const A* weight = static_cast<const A*>(a.weight);
  const double of_target = a.hard * (weight && here ? double(weight[target]) : 1);
  const RowLoss result =
      loss_of_sums(a, sums, moments, here, y, a.target ? of_target : 0, a.target ? a.spread : 1);
  if (a.partial) {
    static_cast<double*>(a.loss)[row] = result.loss;
    static_cast<double*>(a.lse)[row] = result.lse;
  } else {
    static_cast<A*>(a.loss)[row] = A(result.loss);
    static_cast<A*>(a.lse)[row] = A(result.lse);
  }
  if (!a.backward) return;

  Slopes s{upstream_of_row<A>(a.grad_loss, row), upstream_of_row<A>(a.grad_lse, row), sums.sum};
  if (a.grad_square.data) s.g_lse += 2 * upstream_of_row<A>(a.grad_square, row) * result.lse;
  double mass = moments.mass, total = sums.sum;
  if (a.target) {
    const TargetSlope<A> slope = target_slope<A>(a, to.at_target + r, 0, target, sums.m, s);
    mass = slope.mass;
    total = slope.total;
    to.target_gradient[r] = slope.gradient;
  }
  to.row_max[r] = sums.m;
  to.scale[r] = scale_of<A>(a, s.g * mass + s.g_lse, total);
  to.amount[r] = A(a.target ? s.g * a.spread : s.g);
  to.lowest[r] = A(a.filter_eps * total);
}

template <class T>
static void finish_rows(const LinearCrossEntropy& a, const LinearTiling<T>& l,
                        const LinearMemory<T>& to, int64_t task) {
  const int64_t first = task * kRowStep;
  for (int64_t r = first; r < smaller(first + kRowStep, l.live); ++r) {
    if (r < a.chunk_rows) {
      finish_row(a, l, to, r);
    } else {
      to.row_max[r] = to.scale[r] = to.amount[r] = to.lowest[r] = 0;
    }
  }
}

// ---- gradients ----

// S of `n` classes from `first` on in the tile, of logits `x` without a cap, which may lie there.
template <class T>
static void slope_block(const LinearCrossEntropy& a, const LinearTiling<T>& l,
                        const LinearMemory<T>& to, const acc_t<T>* x, int64_t first, int64_t n) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int64_t width = V::width;
  const A* weight = static_cast<const A*>(a.weight);
  const bool of_probabilities = !a.target;
  if (of_probabilities) share_block(a, l, to, first, n);
  const Cap<A> cap{A(a.softcap)};
  const V zero = V::all(0);
  for (int64_t c = 0; c < n; ++c) {
    const A of_class = weight ? weight[first + c] : A(1);
    const A* in = x + c * l.row_step;
    A* out = to.tile + c * l.row_step;
    for (int64_t r = 0; r < l.live; r += width) {
      V y = V::load(in + r), slope = V::all(1);
      if (a.softcap != 0) {
        const Capped<A> capped = cap(y);
        y = capped.y;
        slope = capped.slope;
      }
      V e = ExpOf<T>::of(y - V::load(to.row_max + r));
      if (a.filter_eps != 0) {
        // NaN stays: it is not equal to itself, nor below anything.
        const V lowest = V::load(to.lowest + r);
        e = where_equal(max(e, lowest), e, e, e * zero);
      }
      V s = e * V::load(to.scale + r);
      if (of_probabilities) {
        s = s - V::load(to.amount + r) * V::load(to.share + c * l.row_step + r);
      } else if (a.spread != 0) {
        s = s - V::load(to.amount + r) * V::all(of_class);
      }
      (a.softcap != 0 ? s * slope : s).store(out + r);
    }
    // Whatever stands in the place of rows that are not there, x * 0 must be 0.
    for (int64_t r = a.chunk_rows; r < l.live; ++r) out[r] = 0;
  }
  for_each_target(a, first, n, [&](int64_t r, int64_t c) {
    to.tile[c * l.row_step + r] = to.target_gradient[r];
  });
}

// Moves the classes of the tile that have any gradient together, into `active`; how many there are.
template <class T>
static int64_t active_classes(const LinearCrossEntropy& a, const LinearTiling<T>& l,
                              const LinearMemory<T>& to, int64_t n) {
  using A = acc_t<T>;
  int64_t count = 0;
  for (int64_t c = 0; c < n; ++c) {
    const A* row = to.tile + c * l.row_step;
    bool any = a.filter_eps == 0;
    for (int64_t r = 0; r < a.chunk_rows && !any; ++r) any = row[r] != 0;
    if (!any) continue;
    if (count != c) memcpy(to.tile + count * l.row_step, row, size_t(l.live) * sizeof(A));
    to.active[count++] = c;
  }
  return count;
}

// S as operands, where they are not the numbers of the tile.
template <class A>
static inline void pair_tile(const A*, int64_t, int64_t, int64_t, A*, A*) {}

#if defined(FASTGPT_AVX512_BF16)
static inline void pair_tile(const float* tile, int64_t n, int64_t rows, int64_t step,
                             bf16_pair* pairs, bf16_pair* class_pairs) {
  using V = Vec<float>;
  for (int64_t c = 0; c < n; c += 2) {
    const float *one = tile + c * step, *other = c + 1 < n ? one + step : nullptr;
    bf16* along_rows = reinterpret_cast<bf16*>(pairs) + c * step;
    bf16_pair* along_classes = class_pairs + c / 2 * step;
    for (int64_t r = 0; r < rows; r += V::width) {
      const V x = V::load(one + r), y = other ? V::load(other + r) : V::all(0);
      x.store(along_rows + r);
      if (other) y.store(along_rows + step + r);
      store_pairs(x, y, along_classes + r);
    }
  }
}
#endif

// `n` is a multiple of kRowStep.
template <class A>
static inline A sum_of_row(const A* x, int64_t n) {
  using V = Vec<A>;
  constexpr int64_t chains = V::width < 4 ? 16 : 4;
  V sum[chains];
  for (V& v : sum) v = V::all(0);
  int64_t i = 0;
  for (; i + chains * V::width <= n; i += chains * V::width) {
    for (int64_t k = 0; k < chains; ++k) sum[k] = sum[k] + V::load(x + i + k * V::width);
  }
  for (; i < n; i += V::width) sum[0] = sum[0] + V::load(x + i);
  for (int64_t some = chains / 2; some > 0; some /= 2) {
    for (int64_t k = 0; k < some; ++k) sum[k] = sum[k] + sum[k + some];
  }
  return sum[0].reduce_add();
}

// Memory that is needed after some products, asked for while they run, a few lines with each.
struct Ahead {
  const char *next, *end;
  int64_t step;  // bytes

  Ahead(const void* from, int64_t bytes, int64_t products)
      : next(static_cast<const char*>(from)),
        end(next + bytes),
        step(round_up(ceil_div(bytes, larger(1, products)), kCacheLine)) {}
  void ask() {
    const char* until = end - next < step ? end : next + step;
    for (; next < until; next += kCacheLine) prefetch(next);
  }
};

// Adds a tile of a product to numbers that are not in the caches: they are asked for now, and
// needed at its end.
template <class E>
static inline void far_product(const Product<E>& x, int rows, int registers, Ahead& ahead) {
  ahead.ask();
  constexpr int64_t line = kCacheLine / int64_t(sizeof(typename Product<E>::A));
  const int64_t columns = registers * Vec<typename Product<E>::A>::width;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < columns; j += line) prefetch(x.c + r * x.c_row + j);
  }
  product(x, rows, registers);
}

// dw of the `n` active classes of the block at `first`.
template <class T>
static void add_matrix_gradient(const LinearCrossEntropy& a, const LinearTiling<T>& l,
                                const LinearMemory<T>& to, int64_t first, int64_t n) {
  using L = LinearTiling<T>;
  using A = typename L::A;
  using E = typename L::E;
  constexpr int64_t width = L::width;
  A* gradient = static_cast<A*>(a.grad_matrix) + first * a.depth;
  const bool fresh = a.first_row == 0 && a.filter_eps == 0;
  const int64_t k = ceil_div(a.chunk_rows, L::terms), step = l.row_step / L::terms;
  // The rows of the matrix, which the other gradient packs.
  const int64_t strips = ceil_div(l.columns / width, Tile::registers);
  Ahead ahead(matrix_row<T>(a, first), n * a.matrix_row * int64_t(sizeof(T)),
              strips * ceil_div(n, Tile::rows));
  for_each_strip(l.columns / width, [&](Strip s) {
    const int64_t from = s.first * width, columns = s.registers * width;
    const E* strip = to.input + from * (l.rows / L::terms);
    for (int64_t c = 0; c < n; c += Tile::rows) {
      const int64_t some = smaller(Tile::rows, n - c);
      const bool together = to.active[c + some - 1] - to.active[c] == some - 1;
      Product<E> x{k, to.pairs + c * step, step,   1, strip, columns, nullptr,
                   0, Into::kSum,          nullptr};
      if (together && from + columns <= a.depth) {
        x.c = gradient + to.active[c] * a.depth + from;
        x.c_row = a.depth;
        if (fresh) x.into = Into::kFresh;
        far_product(x, int(some), int(s.registers), ahead);
        continue;
      }
      x.c = to.product;
      x.c_row = columns;
      x.into = Into::kFresh;
      product(x, int(some), int(s.registers));
      for (int64_t i = 0; i < some; ++i) {
        A* out = gradient + to.active[c + i] * a.depth + from;
        const A* in = to.product + i * columns;
        for (int64_t j = 0; j < smaller(columns, a.depth - from); ++j)
          out[j] = fresh ? in[j] : out[j] + in[j];
      }
    }
  });
}

// The group's part of dx, of the `n` active classes of the block at `first`.
template <class T>
static void add_input_gradient(const LinearCrossEntropy& a, const LinearTiling<T>& l,
                               const LinearMemory<T>& to, int64_t first, int64_t n, bool fresh,
                               acc_t<T>* gradient) {
  using L = LinearTiling<T>;
  using E = typename L::E;
  constexpr int64_t width = L::width, terms = L::terms;
  const int64_t k = ceil_div(n, terms);
  // The logits of the next block.
  const int64_t strips = ceil_div(l.columns / width, Tile::registers);
  Ahead ahead(to.logits + (first + l.block) * l.row_step,
              l.keeps_logits ? l.block * l.row_step * int64_t(sizeof(acc_t<T>)) : 0,
              strips * ceil_div(a.chunk_rows, Tile::rows));
  for_each_strip(l.columns / width, [&](Strip s) {
    const int64_t from = s.first * width, columns = s.registers * width;
    const int64_t there = smaller(columns, a.depth - from);
    const auto row = [&](int64_t i) {
      return i < n ? matrix_row<T>(a, first + to.active[i]) + from : nullptr;
    };
    for (int64_t i = 0; i < k; ++i) {
      copy_row_of_b(row(i * terms), row(i * terms + terms - 1), there, columns,
                    to.matrix + i * columns);
    }
    for (int64_t r = 0; r < a.chunk_rows; r += Tile::rows) {
      const Product<E> x{k,
                         to.class_pairs + r,
                         1,
                         l.row_step,
                         to.matrix,
                         columns,
                         gradient + from * l.rows + r * columns,
                         columns,
                         fresh ? Into::kFresh : Into::kSum,
                         nullptr};
      far_product(x, int(smaller(Tile::rows, a.chunk_rows - r)), int(s.registers), ahead);
    }
  });
}

template <class T>
static void gradient_group(const LinearCrossEntropy& a, const LinearTiling<T>& l,
                           const LinearMemory<T>& to, int64_t group) {
  using A = acc_t<T>;
  A* grad_input = to.grad_input + group * l.rows * l.columns;
  const int64_t end = l.end_class(a, group);
  if (a.filter_eps != 0) {
    if (a.grad_input) memset(grad_input, 0, size_t(l.rows * l.columns) * sizeof(A));
    const int64_t first = l.first_class(group);
    if (a.grad_matrix && a.first_row == 0) {
      memset(static_cast<A*>(a.grad_matrix) + first * a.depth, 0,
             size_t((end - first) * a.depth) * sizeof(A));
    }
  }
  for (int64_t first = l.first_class(group); first < end; first += l.block) {
    const int64_t all = smaller(l.block, end - first);
    const A* x = to.tile;
    if (l.keeps_logits) {
      x = to.logits + first * l.row_step;
    } else {
      logit_block(a, l, to, first, all, to.tile);
    }
    slope_block(a, l, to, x, first, all);
    if (a.grad_bias) {
      A* out = static_cast<A*>(a.grad_bias) + first;
      for (int64_t c = 0; c < all; ++c) {
        const A sum = sum_of_row(to.tile + c * l.row_step, l.live);
        out[c] = a.first_row == 0 ? sum : out[c] + sum;
      }
    }
    if (!a.grad_matrix && !a.grad_input) continue;
    const int64_t n = active_classes(a, l, to, all);
    if (n == 0) continue;
    pair_tile(to.tile, n, l.live, l.row_step, to.pairs, to.class_pairs);
    if (a.grad_matrix) add_matrix_gradient(a, l, to, first, n);
    if (a.grad_input) {
      const bool fresh = first == l.first_class(group) && a.filter_eps == 0;
      add_input_gradient(a, l, to, first, n, fresh, grad_input);
    }
  }
}

// dx of kRowStep rows: the groups' parts, in order.
template <class T>
static void sum_groups(const LinearCrossEntropy& a, const LinearTiling<T>& l,
                       const LinearMemory<T>& to, int64_t task) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int64_t width = V::width;
  const int64_t first = task * kRowStep, end = smaller(first + kRowStep, a.chunk_rows);
  for (int64_t r = first; r < end; ++r) {
    A* out = static_cast<A*>(a.grad_input) + a.row_of[a.first_row + r] * a.depth;
    for_each_strip(l.columns / width, [&](Strip s) {
      const int64_t from = s.first * width, columns = s.registers * width;
      const A* part = to.grad_input + from * l.rows + r * columns;
      for (int64_t j = 0; j < columns && from + j < a.depth; j += width) {
        V sum = V::load(part + j);
        for (int64_t g = 1; g < l.groups; ++g)
          sum = sum + V::load(part + g * l.rows * l.columns + j);
        const int64_t left = a.depth - from - j;
        if (left >= width) {
          sum.store(out + from + j);
        } else {
          store_partial(sum, out + from + j, int(left));
        }
      }
    });
  }
}

template <class T>
static Plan plan_linear(const LinearCrossEntropy& a) {
  const LinearTiling<T> l(a);
  const LinearMemory<T> memory(a, l, nullptr, nullptr);
  const int64_t steps = l.rows / kRowStep;
  return {memory.workspace_bytes,
          memory.scratch_bytes,
          {steps, l.groups, steps, a.backward ? l.groups : 0, a.grad_input ? steps : 0},
          l.rows};
}

template <class T>
static void run_linear(const LinearCrossEntropy& a, int phase, int64_t task, void* workspace,
                       void* scratch) {
  const LinearTiling<T> l(a);
  const LinearMemory<T> memory(a, l, workspace, scratch);
  constexpr decltype(&sum_group<T>) phases[] = {pack_rows<T>, sum_group<T>, finish_rows<T>,
                                                gradient_group<T>, sum_groups<T>};
  phases[phase](a, l, memory, task);
}
