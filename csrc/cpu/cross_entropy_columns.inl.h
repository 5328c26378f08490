// Softmax-cross-entropy of several rows at once, one in each lane of a register.
//
// For logits (N, C, L) whose positions lie together in memory and whose classes do not, so that a
// register holds one class of neighbouring positions; and forward for short rows, which are turned
// into that first, since what is done once for a row costs as much as its few classes. A row's
// numbers depend on no other's, nor on where its lane is.

// Registers of positions that are done at once. 256 bytes of each class, so that little is read of
// cache lines that are not used up, and four chains.
constexpr int kColumns = 4;
// Classes of a block, which the first-level cache holds.
constexpr int kColumnBlock = 64;
// Classes of rows that are short.
constexpr int kShortRow = 96;

// Up to K registers of rows.
template <class T, int K>
struct Lanes {
  using A = acc_t<T>;
  static constexpr int kLanes = K * Vec<A>::width;
  int count;
  int64_t row;             // the first one's number
  int64_t target[kLanes];  // -1: none here
  bool ignored[kLanes], any_ignored;

  Lanes(const CrossEntropy& a, int64_t n, int64_t l, int count_) : count(count_) {
    row = n * a.positions + l;
    any_ignored = false;
    for (int i = 0; i < count; ++i) {
      const int64_t t = a.target ? a.target[n * a.target_outer + l * a.target_inner] : -1;
      ignored[i] = a.target && t == a.ignore_index;
      any_ignored |= ignored[i];
      target[i] = !ignored[i] && t >= 0 && t < a.classes ? t : -1;
      if (++l == a.positions) ++n, l = 0;
    }
    for (int i = count; i < kLanes; ++i) ignored[i] = false, target[i] = -1;
  }
};

// Class c of K registers of positions, those behind the last one 0.
template <class T, int K>
struct Columns {
  using V = Vec<acc_t<T>>;
  const T* x;
  int64_t stride;
  int count;

  V load(int64_t c, int k) const {
    const T* at = x + c * stride + k * V::width;
    const int n = count - k * V::width;
    return n >= V::width ? V::load(at) : n > 0 ? load_partial(at, n, acc_t<T>(0)) : V::all(0);
  }

  const T* row_of(int i) const { return x + i; }

  // Classes [first, last) of them, to y, class by class.
  void fetch(int64_t first, int64_t last, acc_t<T>* y) const {
    for (int64_t c = first; c < last; ++c) {
      for (int k = 0; k < K; ++k, y += V::width) load(c, k).store(y);
    }
  }
};

// One register of short rows, turned.
template <class T>
struct ShortRows {
  using A = acc_t<T>;
  using V = Vec<A>;
  static constexpr int64_t stride = 1;
  const T* row[V::width];
  int count;

  const T* row_of(int i) const { return row[i]; }

  void fetch(int64_t first, int64_t last, A* y) const {
    for (int64_t c = first; c < last; c += V::width) {
      const int n = last - c < V::width ? int(last - c) : V::width;
      V tile[V::width];
      for (int i = 0; i < V::width; ++i) {
        tile[i] = i >= count      ? V::all(0)
                  : n == V::width ? V::load(row[i] + c)
                                  : load_partial(row[i] + c, n, A(0));
      }
      transpose(tile);
      for (int j = 0; j < n; ++j, y += V::width) tile[j].store(y);
    }
  }
};

// The weight c_j of class j in each lane: 1 or w_j, and for probabilities w_j (hard q_j + spread).
template <class A, int K>
struct ClassColumns {
  static constexpr bool kNone = false;
  const A* weight;  // or null
  Vec<A> at(int64_t c, int) const { return Vec<A>::all(weight ? weight[c] : A(1)); }
};

template <class A, class Q, int K>
struct ProbabilityColumns {
  static constexpr bool kNone = false;
  Columns<Q, K> q;
  const A* weight;
  A hard, spread;
  Vec<A> at(int64_t c, int k) const {
    const Vec<A> share = fma(q.load(c, k), Vec<A>::all(hard), Vec<A>::all(spread));
    return weight ? share * Vec<A>::all(weight[c]) : share;
  }
};

template <class T, int K, class Source, class Share>
static void forward_lanes(const CrossEntropyForward& a, const Lanes<T, K>& lanes,
                          const Source& source, bool shared, const Share& share, double hard,
                          double spread) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int width = V::width, kLanes = K * width;
  alignas(kCacheLine) A y[kColumnBlock * kLanes];
  alignas(kCacheLine) A m[kLanes], at_target[kLanes], from[kLanes], numbers[kLanes], masses[kLanes];
  Normaliser<A> sums[kLanes];
  Moments<A> moments[kLanes];
  for (A& v : at_target) v = 0;
  for (A& v : m) v = A(-INFINITY);
  for (int64_t first = 0; first < a.classes; first += kColumnBlock) {
    const int64_t last = first + kColumnBlock < a.classes ? first + kColumnBlock : a.classes;
    const int rows = int(last - first);
    source.fetch(first, last, y);
    V top[K];
    for (int k = 0; k < K; ++k) top[k] = V::load(m + k * width);
    const Cap<A> cap{A(a.softcap)};
    for (int j = 0; j < rows; ++j) {
      for (int k = 0; k < K; ++k) {
        A* at = y + j * kLanes + k * width;
        V v = V::load(at);
        if (a.softcap != 0) (v = cap(v).y).store(at);
        top[k] = max(top[k], v);
      }
    }
    for (int k = 0; k < K; ++k) top[k].store(m + k * width);
    for (int i = 0; i < kLanes; ++i) {
      sums[i].raise(m[i]);
      from[i] = is_finite(m[i]) ? m[i] : m[i] == A(-INFINITY) ? A(0) : m[i];
      if (lanes.target[i] >= first && lanes.target[i] < last) {
        A& hole = y[(lanes.target[i] - first) * kLanes + i];
        at_target[i] = hole;
        hole = A(-INFINITY);
      }
    }
    // Sums of a few terms each, for their rounding errors.
    constexpr int kParts = (sizeof(A) == 8 ? 16 : 8) / K;
    V part[K][kParts], origin[K];
    for (int k = 0; k < K; ++k) {
      origin[k] = V::load(from + k * width);
      for (V& v : part[k]) v = V::all(0);
    }
    const auto add = [&](int j, int k, V& sum) {
      sum = sum + ExpOf<T>::of(V::load(y + j * kLanes + k * width) - origin[k]);
    };
    int j = 0;
    for (; j + kParts <= rows; j += kParts) {
      for (int u = 0; u < kParts; ++u) {
        for (int k = 0; k < K; ++k) add(j + u, k, part[k][u]);
      }
    }
    for (; j < rows; ++j) {
      for (int k = 0; k < K; ++k) add(j, k, part[k][0]);
    }
    for (int k = 0; k < K; ++k) {
      for (int half = kParts / 2; half > 0; half /= 2) {
        for (int u = 0; u < half; ++u) part[k][u] = part[k][u] + part[k][u + half];
      }
      part[k][0].store(numbers + k * width);
    }
    for (int i = 0; i < kLanes; ++i) sums[i].sum += double(numbers[i]);
    if (!shared) continue;
    V dot[K], mass[K];
    for (int k = 0; k < K; ++k) dot[k] = mass[k] = V::all(0);
    for (int i = 0; i < kLanes; ++i) {
      if (!is_finite(from[i])) from[i] = 0;
      if (lanes.target[i] >= first && lanes.target[i] < last) {
        y[(lanes.target[i] - first) * kLanes + i] = at_target[i];
      }
    }
    for (int j = 0; j < rows; ++j) {
      for (int k = 0; k < K; ++k) {
        const V c = share.at(first + j, k);
        const V v = V::load(y + j * kLanes + k * width) - V::load(from + k * width);
        dot[k] = fma(c, v, dot[k]);
        mass[k] = mass[k] + c;
      }
    }
    for (int k = 0; k < K; ++k) {
      dot[k].store(numbers + k * width);
      mass[k].store(masses + k * width);
    }
    for (int i = 0; i < kLanes; ++i) {
      moments[i].count_from(from[i]);
      moments[i].dot += double(numbers[i]);
      moments[i].mass += double(masses[i]);
    }
  }
  const A* weight = static_cast<const A*>(a.weight);
  for (int i = 0; i < lanes.count; ++i) {
    RowLoss result{0, 0};
    if (lanes.ignored[i]) {
      sums[i].m = 0;
      sums[i].sum = 0;
    } else {
      const int64_t t = lanes.target[i];
      const double w = t >= 0 && weight ? double(weight[t]) : 1;
      result = row_loss(a, source.row_of(i), source.stride, sums[i], moments[i], t >= 0,
                        at_target[i], hard * w, spread);
    }
    store_row(a, lanes.row + i, sums[i], result);
  }
}

template <class T>
static void forward_columns(const CrossEntropyForward& a, int64_t n, int64_t l, int count) {
  using A = acc_t<T>;
  constexpr int K = kColumns;
  const Lanes<T, K> lanes(a, n, l, count);
  const Columns<T, K> x{static_cast<const T*>(a.logits) + n * a.at.outer + l, a.at.column, count};
  const A* weight = static_cast<const A*>(a.weight);
  const A hard = A(a.hard), spread = A(a.spread);
  if (!a.target) {
    with_probabilities<T>(a, n, l, [&](const auto* first) {
      using Q = stored_t<decltype(first)>;
      const Columns<Q, K> q{first, a.probability_at.column, count};
      forward_lanes(a, lanes, x, true, ProbabilityColumns<A, Q, K>{q, weight, hard, spread}, 0, 1);
    });
  } else {
    forward_lanes(a, lanes, x, a.spread != 0, ClassColumns<A, K>{weight}, a.hard, a.spread);
  }
}

// `count` rows from row (n, l) on; class indices only.
template <class T>
static void forward_short_rows(const CrossEntropyForward& a, int64_t n, int64_t l, int count) {
  using A = acc_t<T>;
  const Lanes<T, 1> lanes(a, n, l, count);
  ShortRows<T> x;
  x.count = count;
  for (int i = 0; i < count; ++i) {
    x.row[i] = static_cast<const T*>(a.logits) + n * a.at.outer + l * a.at.inner;
    if (++l == a.positions) ++n, l = 0;
  }
  const ClassColumns<A, 1> share{static_cast<const A*>(a.weight)};
  forward_lanes(a, lanes, x, a.spread != 0, share, a.hard, a.spread);
}

template <bool kCapped, class T, int K, class Share>
static void gradient_columns(const CrossEntropy& a, const Columns<T, K>& x, T* out, int64_t stride,
                             const acc_t<T>* m, const acc_t<T>* scale, const acc_t<T>* amount,
                             const acc_t<T>* kept, bool all_kept, const Share& share) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int width = V::width;
  const Cap<A> cap{A(a.softcap)};
  for (int64_t c = 0; c < a.classes; ++c, out += stride) {
    for (int k = 0; k < K; ++k) {
      const int i = k * width, n = x.count - i;
      if (n <= 0) break;
      const V v = x.load(c, k);
      const Capped<A> capped = kCapped ? cap(v) : Capped<A>{v, v};
      V y = ExpOf<T>::of(capped.y - V::load(m + i)) * V::load(scale + i);
      if (!Share::kNone) y = y - V::load(amount + i) * share.at(c, k);
      if (kCapped) y = y * capped.slope;
      if (!all_kept) y = where_equal(V::load(kept + i), V::all(1), y, V::all(0));
      if (n >= width) {
        y.store(out + i);
      } else {
        store_partial(y, out + i, n);
      }
    }
  }
}

template <class A, int K, class Share>
static void masses_of(const Share& share, int64_t classes, double* masses) {
  using V = Vec<A>;
  constexpr int width = V::width;
  for (int i = 0; i < K * width; ++i) masses[i] = 0;
  for (int64_t first = 0; first < classes; first += kColumnBlock) {
    const int64_t last = first + kColumnBlock < classes ? first + kColumnBlock : classes;
    V sum[K];
    for (V& v : sum) v = V::all(0);
    for (int64_t c = first; c < last; ++c) {
      for (int k = 0; k < K; ++k) sum[k] = sum[k] + share.at(c, k);
    }
    A lanes[width];
    for (int k = 0; k < K; ++k) {
      sum[k].store(lanes);
      for (int i = 0; i < width; ++i) masses[k * width + i] += double(lanes[i]);
    }
  }
}

template <class A, int K>
struct NoColumns {
  static constexpr bool kNone = true;
  Vec<A> at(int64_t, int) const { return Vec<A>::all(0); }
};
template <class T>
static void backward_columns(const CrossEntropyBackward& a, int64_t n, int64_t l, int count) {
  using A = acc_t<T>;
  constexpr int K = kColumns, kLanes = K * Vec<A>::width;
  const Lanes<T, K> lanes(a, n, l, count);
  const T* logits = static_cast<const T*>(a.logits) + n * a.at.outer + l;
  const Columns<T, K> x{logits, a.at.column, count};
  T* out = static_cast<T*>(a.grad_logits) + n * a.out.outer + l;
  const A* weight = static_cast<const A*>(a.weight);
  A m[kLanes] = {}, scale[kLanes] = {}, amount[kLanes] = {}, kept[kLanes] = {}, at_t[kLanes];
  const auto slopes = [&](int i) {
    m[i] = static_cast<const A*>(a.row_max)[lanes.row + i];
    kept[i] = 1;
    return slopes_of<A>(a, n, l + i);
  };
  const auto run = [&](const auto& share) {
    const bool all_kept = !lanes.any_ignored;
    if (a.softcap != 0) {
      gradient_columns<true>(a, x, out, a.out.column, m, scale, amount, kept, all_kept, share);
    } else {
      gradient_columns<false>(a, x, out, a.out.column, m, scale, amount, kept, all_kept, share);
    }
  };
  if (!a.target) {
    with_probabilities<T>(a, n, l, [&](const auto* first) {
      using Q = stored_t<decltype(first)>;
      const Columns<Q, K> q{first, a.probability_at.column, count};
      const ProbabilityColumns<A, Q, K> share{q, weight, A(a.hard), A(a.spread)};
      double masses[kLanes];
      masses_of<A, K>(share, a.classes, masses);
      for (int i = 0; i < count; ++i) {
        const Slopes s = slopes(i);
        scale[i] = scale_of<A>(a, s.g * masses[i] + s.g_lse, s.rest);
        amount[i] = A(s.g);
      }
      run(share);
    });
    return;
  }
  for (int i = 0; i < count; ++i) {
    if (lanes.ignored[i]) continue;
    const Slopes s = slopes(i);
    const TargetSlope<A> slope = target_slope(a, logits + i, a.at.column, lanes.target[i], m[i], s);
    scale[i] = scale_of<A>(a, s.g * slope.mass + s.g_lse, slope.total);
    amount[i] = A(s.g * a.spread);
    at_t[i] = slope.gradient;
  }
  if (a.spread == 0) {
    run(NoColumns<A, K>{});
  } else {
    run(ClassColumns<A, K>{weight});
  }
  for (int i = 0; i < count; ++i) {
    if (lanes.target[i] >= 0) out[lanes.target[i] * a.out.column + i] = narrow<T>(at_t[i]);
  }
}

// ---- the kernels ----

template <class T>
static void cross_entropy_forward(const CrossEntropyForward& a, int64_t begin, int64_t end) {
  constexpr int width = Vec<acc_t<T>>::width;
  // In double the sums of so few classes are better with one in each lane.
  const bool turned = !a.by_columns && a.target && a.classes <= kShortRow && width > 1 &&
                      sizeof(acc_t<T>) == sizeof(float);
  int64_t n = begin / a.positions, l = begin % a.positions;
  for (int64_t row = begin; row < end;) {
    // Neighbouring positions stand in a line up to the end of the sequence, short rows anywhere.
    int64_t count = 1;
    if (a.by_columns)
      count = a.positions - l < kColumns * width ? a.positions - l : kColumns * width;
    if (turned) count = width;
    if (count > end - row) count = end - row;
    if (a.by_columns) {
      forward_columns<T>(a, n, l, int(count));
    } else if (turned) {
      forward_short_rows<T>(a, n, l, int(count));
    } else {
      forward_row<T>(a, n, l);
    }
    row += count;
    l += count;
    if (l >= a.positions) n = row / a.positions, l = row % a.positions;
  }
}

template <class T>
static void cross_entropy_backward(const CrossEntropyBackward& a, int64_t begin, int64_t end) {
  constexpr int width = Vec<acc_t<T>>::width;
  int64_t n = begin / a.positions, l = begin % a.positions;
  for (int64_t row = begin; row < end;) {
    int64_t count = 1;
    if (a.by_columns) {
      count = a.positions - l < kColumns * width ? a.positions - l : kColumns * width;
      if (count > end - row) count = end - row;
      backward_columns<T>(a, n, l, int(count));
    } else {
      backward_row<T>(a, n, l);
    }
    row += count;
    l += count;
    if (l == a.positions) ++n, l = 0;
  }
  if (a.stream) stream_fence();
}
