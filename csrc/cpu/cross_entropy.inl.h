// Softmax-cross-entropy, row by row, for any instruction set.
//
// The formulas with all their options stand in fastgpt/ops/cross_entropy.py. For a row of logits y
// (capped, if there is a cap) with target t, and m = max_j y_j:
//
//   rest  = sum_{j != t} exp(y_j - m)           total = rest + exp(y_t - m)
//   loss  = log(total) - (y_t - m)              (log1p(rest) where the target is the maximum)
//   dy_j  = B p_j  (j != t), p = exp(y - m) / total, and B = g without options
//   dy_t  = -g rest / total
//
// Keeping the target out of the sum costs nothing and saves both ends: at p_t -> 1 the loss is not
// lost in the rounding of 1 + rest, nor the target's gradient in that of p_t - 1.
//
// What is shared out over the classes by the weights c_j of smoothing or of probabilities adds
// sum_j c_j (lse - y_j) = mass log(total) - dot, with mass = sum_j c_j and dot = sum_j c_j (y_j -
// m).
//
// Bytes: the forward reads the logits once, the backward reads them once and writes the gradient
// once. m and the sum are found in one sweep (Milakov and Gimelshein, "Online normalizer
// calculation for softmax", 2018) in blocks that stay in the first-level cache. Blocks are added in
// double, so the error does not grow with C.

// Speeds and distances: benchmarks/NOTES.md.
constexpr int64_t kCacheLine = 64;  // bytes
constexpr int64_t kAhead = 4096;    // bytes: the hardware's own prefetcher stops at a page's end

// 32 additions in each of four chains; 8 KiB of the accumulator type on AVX-512.
template <class A>
constexpr int64_t kBlock = 128 * Vec<A>::width;

template <class A>
static bool is_finite(A x) {
  return x - x == 0;
}

// ---- the cap ----

// The logit y at `x`, and the cap's slope there.
template <class T>
static acc_t<T> logit_of(const CrossEntropy& a, const T* x, acc_t<T>* slope) {
  using A = acc_t<T>;
  if (a.softcap == 0) {
    if (slope) *slope = 1;
    return widen(*x);
  }
  // To the same bits as in a register of others.
  const Capped<A> capped = Cap<A>{A(a.softcap)}(Vec<A>::all(widen(*x)));
  if (slope) *slope = capped.slope.reduce_max();
  return capped.y.reduce_max();
}

// ---- what the classes share ----

// The weight c_j of class j: 1 or w_j, and for probabilities w_j (hard q_j + spread). There is a
// streaming backward for those that are `kStreamed`.
template <class A>
struct EvenShare {
  static constexpr bool kNone = false, kStreamed = true;
  Vec<A> at(int64_t) const { return Vec<A>::all(1); }
  Vec<A> partial(int64_t, int n) const { return first_lanes(A(1), n); }
};

template <class A>
struct WeightedShare {
  static constexpr bool kNone = false, kStreamed = true;
  const A* weight;
  Vec<A> at(int64_t i) const { return Vec<A>::load(weight + i); }
  Vec<A> partial(int64_t i, int n) const { return load_partial(weight + i, n, A(0)); }
};

template <class A, class Q>
struct ProbabilityShare {
  static constexpr bool kNone = false, kStreamed = false;
  const Q* q;
  const A* weight;  // or null
  A hard, spread;
  Vec<A> at(int64_t i) const {
    const Vec<A> c = fma(Vec<A>::load(q + i), Vec<A>::all(hard), Vec<A>::all(spread));
    return weight ? c * Vec<A>::load(weight + i) : c;
  }
  Vec<A> partial(int64_t i, int n) const {
    const Vec<A> c = fma(load_partial(q + i, n, A(0)), Vec<A>::all(hard), first_lanes(spread, n));
    return weight ? c * load_partial(weight + i, n, A(0)) : c;
  }
};

// Calls f with where the probabilities of row (n, l) begin, of the type that they are stored in.
template <class T, class F>
static void with_probabilities(const CrossEntropy& a, int64_t n, int64_t l, const F& f) {
  const int64_t place = n * a.probability_at.outer + l * a.probability_at.inner;
  if (a.probabilities_wide) {
    f(static_cast<const acc_t<T>*>(a.probabilities) + place);
  } else {
    f(static_cast<const T*>(a.probabilities) + place);
  }
}

// Of a pointer to probabilities.
template <class Pointer>
struct stored;
template <class T>
struct stored<const T*> {
  using type = T;
};
template <class Pointer>
using stored_t = typename stored<Pointer>::type;

// The sums over a row of c_j (y_j - reference) and c_j.
template <class A>
struct Moments {
  A reference = 0;
  double dot = 0, mass = 0;

  void count_from(A from) {
    if (mass != 0) dot += mass * (double(reference) - double(from));
    reference = from;
  }

  // At most kBlock logits y, whose first is class `first`, counted from `from` now, which is
  // finite and no less than they are, so that terms of one sign are added.
  template <class T, class Share>
  void add(const T* y, int64_t first, int64_t count, A from, const Share& share) {
    using V = Vec<A>;
    constexpr int width = V::width;
    count_from(from);
    const V origin = V::all(from);
    V dots[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
    V masses[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
    int64_t i = 0;
    const auto step = [&](int k, int64_t i) {
      const V c = share.at(first + i);
      dots[k] = fma(c, V::load(y + i) - origin, dots[k]);
      masses[k] = masses[k] + c;
    };
    for (; i + 4 * width <= count; i += 4 * width) {
      for (int k = 0; k < 4; ++k) step(k, i + k * width);
    }
    for (; i + width <= count; i += width) step(0, i);
    for (; i < count; i += width) {  // once
      const int n = int(count - i);
      const V c = share.partial(first + i, n);
      dots[1] = fma(c, load_partial(y + i, n, from) - origin, dots[1]);
      masses[1] = masses[1] + c;
    }
    dot += double(((dots[0] + dots[1]) + (dots[2] + dots[3])).reduce_add());
    mass += double(((masses[0] + masses[1]) + (masses[2] + masses[3])).reduce_add());
  }
};

// ---- forward ----

template <class A>
struct Normaliser {
  A m = A(-INFINITY);  // the maximum of what was seen
  double sum = 0;      // of exp(y - m), the target's left out

  void raise(A to) {
    if (!(to > m)) return;
    if (sum != 0) sum *= ::exp(double(m) - double(to));
    m = to;
  }

  // A block, read once and counted from the maximum before it. That does unless it rises far above:
  // then large differences, rounded in more than the last bits of small ones, would count most. So
  // it is left to be seen, and false.
  template <class T>
  bool add_at_once(const T* x) {
    using V = Vec<A>;
    constexpr int width = V::width;
    constexpr A kFar = 1;
    if (!is_finite(m)) return false;
    const V from = V::all(m);
    // Four independent chains, here and below, to cover the latency of an instruction.
    V top[4] = {from, from, from, from};
    V part[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
    for (int64_t i = 0; i < kBlock<A>; i += 4 * width) {
      for (int k = 0; k < 4; ++k) {
        const T* at = x + i + k * width;
        if (k * width * sizeof(T) % kCacheLine == 0) prefetch(at + kAhead / int64_t(sizeof(T)));
        const V y = V::load(at);
        top[k] = max(top[k], y);
        part[k] = part[k] + ExpOf<T>::of(y - from);
      }
    }
    const A highest = max(max(top[0], top[1]), max(top[2], top[3])).reduce_max();
    if (!(highest - m <= kFar)) return false;
    sum += double(((part[0] + part[1]) + (part[2] + part[3])).reduce_add());
    raise(highest);
    return true;
  }

  // Whole registers, at most kBlock logits, of which none is above m; once of the type E.
  template <class E, class T>
  void add(const T* x, int count) {
    using V = Vec<A>;
    constexpr int width = V::width;
    // Anything finite will do while all that was seen is -inf.
    const V from = V::all(m == A(-INFINITY) ? A(0) : m);
    V part[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
    int i = 0;
    for (; i + 4 * width <= count; i += 4 * width) {
      for (int k = 0; k < 4; ++k)
        part[k] = part[k] + ExpOf<E>::of(V::load(x + i + k * width) - from);
    }
    for (; i < count; i += width) part[0] = part[0] + ExpOf<E>::of(V::load(x + i) - from);
    sum += double(((part[0] + part[1]) + (part[2] + part[3])).reduce_add());
  }
};

template <class T>
static acc_t<T> highest(const T* x) {
  using V = Vec<acc_t<T>>;
  constexpr int width = V::width;
  V top[4];
  for (V& v : top) v = V::all(acc_t<T>(-INFINITY));
  for (int64_t i = 0; i < kBlock<acc_t<T>>; i += 4 * width) {
    for (int k = 0; k < 4; ++k) top[k] = max(top[k], V::load(x + i + k * width));
  }
  return max(max(top[0], top[1]), max(top[2], top[3])).reduce_max();
}

// The block's logits y, padded with -inf to whole registers, and -inf for the number `hole`, if it
// is one of them; returns how many that makes. `top` is the largest.
template <class T>
static int fetch(const T* x, int count, int64_t hole, double softcap, acc_t<T>* y, acc_t<T>* top) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int width = V::width;
  constexpr A none = A(-INFINITY);
  const int lane = hole >= 0 && hole < count ? int(hole) : -1;
  V highest = V::all(none);
  int i = 0;
  const auto put = [&](V v) {
    v = except_lane(v, lane - i, none);
    v.store(y + i);
    highest = max(highest, v);
  };
  if (softcap == 0) {
    for (; i + width <= count; i += width) put(V::load(x + i));
    if (i < count) {
      put(load_partial(x + i, count - i, none));
      i += width;
    }
  } else {
    const Cap<A> cap{A(softcap)};
    for (; i + width <= count; i += width) put(cap(V::load(x + i)).y);
    if (i < count) {
      const int tail = count - i;
      cap(load_partial(x + i, tail, A(0))).y.store(y + i);
      put(load_partial(y + i, tail, none));
      i += width;
    }
  }
  *top = highest.reduce_max();
  return i;
}

// Asked only of rows whose maximum is infinite: there the sums don't tell.
template <class T>
static bool any_nan(const T* x, int64_t column, int64_t classes) {
  for (int64_t i = 0; i < classes; ++i) {
    const acc_t<T> v = widen(x[i * column]);
    if (v != v) return true;
  }
  return false;
}

// What one row comes to.
struct RowLoss {
  double loss, lse;
};

// From the sums over a row: `at_target` is y_t, of a row that has a target `here`.
template <class A>
static RowLoss loss_of_sums(const CrossEntropy& a, Normaliser<A>& sums, const Moments<A>& moments,
                            bool here, A at_target, double hard, double spread) {
  if (a.partial && sums.m == A(-INFINITY)) {
    // None of the probability is in this slice: what that costs shows in lse.
    sums.m = 0;
    return {0, -INFINITY};
  }
  const double shifted = double(at_target) - double(sums.m);
  const double total = here ? sums.sum + ::exp(shifted) : sums.sum;
  const double log_total = log(total);
  RowLoss row{0, is_finite(sums.m) ? double(sums.m) + log_total : double(sums.m)};
  // Not hard * plain where there is none: plain may be infinite.
  if (here) row.loss = hard * (shifted == 0 ? log1p(sums.sum) : log_total - shifted);
  if (spread != 0) {
    const double moved = moments.mass * (double(moments.reference) - double(sums.m));
    row.loss += spread * (moments.mass * log_total - (moments.dot + moved));
  }
  return row;
}

// The same of the row whose first logit is `x`, `column` from the next: its NaN are looked for.
template <class T, class A>
static RowLoss row_loss(const CrossEntropy& a, const T* x, int64_t column, Normaliser<A>& sums,
                        const Moments<A>& moments, bool here, A at_target, double hard,
                        double spread) {
  if (!is_finite(sums.m) && any_nan(x, column, a.classes)) return {double(NAN), double(NAN)};
  return loss_of_sums(a, sums, moments, here, at_target, hard, spread);
}

// The sums over a row whose classes lie together; `at_target` is y_t, if there is a target.
template <class T, class Share>
static void sum_row(const CrossEntropy& a, const T* x, int64_t target, bool shared,
                    const Share& share, acc_t<T> at_target, Normaliser<acc_t<T>>& sums,
                    Moments<acc_t<T>>& moments) {
  using A = acc_t<T>;
  alignas(kCacheLine) A y[kBlock<A>];
  for (int64_t start = 0; start < a.classes; start += kBlock<A>) {
    const int64_t left = a.classes - start, count = left < kBlock<A> ? left : kBlock<A>;
    const bool has_target = target >= start && target < start + count;
    const auto share_out = [&](const auto* block) {
      if (shared) moments.add(block, start, count, is_finite(sums.m) ? sums.m : A(0), share);
    };
    if (count == kBlock<A> && !has_target && a.softcap == 0) {
      if (start == 0 || !sums.add_at_once(x + start)) {
        sums.raise(highest(x + start));
        sums.template add<T>(x + start, int(count));
      }
      share_out(x + start);
      continue;
    }
    A top;
    const int padded = fetch(x + start, int(count), target - start, a.softcap, y, &top);
    sums.raise(has_target && at_target > top ? at_target : top);
    sums.template add<T>(y, padded);
    if (has_target) y[target - start] = at_target;
    share_out(y);
  }
}

template <class A>
static void store_row(const CrossEntropyForward& a, int64_t row, const Normaliser<A>& sums,
                      const RowLoss& result) {
  static_cast<A*>(a.row_max)[row] = sums.m;
  static_cast<A*>(a.rest)[row] = A(sums.sum);
  if (a.partial) {
    static_cast<double*>(a.loss)[row] = result.loss;
    static_cast<double*>(a.lse)[row] = result.lse;
  } else {
    static_cast<A*>(a.loss)[row] = A(result.loss);
    static_cast<A*>(a.lse)[row] = A(result.lse);
  }
}

template <class T>
static void forward_row(const CrossEntropyForward& a, int64_t n, int64_t l) {
  using A = acc_t<T>;
  const int64_t row = n * a.positions + l;
  Normaliser<A> sums;
  Moments<A> moments;
  RowLoss result{0, 0};
  const T* x = static_cast<const T*>(a.logits) + n * a.at.outer + l * a.at.inner;
  const A* weight = static_cast<const A*>(a.weight);
  const int64_t target = a.target ? a.target[n * a.target_outer + l * a.target_inner] : -1;
  const auto finish = [&](bool here, A at_target, double hard, double spread) {
    result = row_loss(a, x, 1, sums, moments, here, at_target, hard, spread);
  };
  if (!a.target) {
    with_probabilities<T>(a, n, l, [&](const auto* q) {
      const ProbabilityShare<A, stored_t<decltype(q)>> share{q, weight, A(a.hard), A(a.spread)};
      sum_row(a, x, -1, true, share, A(0), sums, moments);
    });
    finish(false, A(0), 0, 1);
  } else if (target != a.ignore_index) {
    const bool here = target >= 0 && target < a.classes;
    const A at_target = here ? logit_of(a, x + target, nullptr) : A(0);
    if (weight) {
      sum_row(a, x, target, a.spread != 0, WeightedShare<A>{weight}, at_target, sums, moments);
    } else {
      sum_row(a, x, target, a.spread != 0, EvenShare<A>{}, at_target, sums, moments);
    }
    finish(here, at_target, a.hard * (weight && here ? double(weight[target]) : 1), a.spread);
  } else {
    sums.m = 0;
  }
  store_row(a, row, sums, result);
}

// ---- backward ----

template <class A>
struct NoShare {
  static constexpr bool kNone = true, kStreamed = true;
  Vec<A> at(int64_t) const { return Vec<A>::all(0); }
  Vec<A> partial(int64_t, int) const { return Vec<A>::all(0); }
};

// out_j = (exp(y_j - m) scale - amount c_j) dy_j/dx_j. `out` may be `x`.
template <bool kStream, bool kCapped, class T, class Share>
static void gradient_row(const T* x, T* out, int64_t count, acc_t<T> m, acc_t<T> scale,
                         acc_t<T> amount, const Share& share, acc_t<T> softcap) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int width = V::width;
  const V from = V::all(m), factor = V::all(scale), less = V::all(-amount);
  const Cap<A> cap{softcap};
  const auto gradient = [&](V x, V c) {
    const Capped<A> capped = kCapped ? cap(x) : Capped<A>{x, x};
    V y = ExpOf<T>::of(capped.y - from) * factor;
    if (!Share::kNone) y = fma(less, c, y);
    return kCapped ? y * capped.slope : y;
  };
  const auto partial = [&](int64_t i, int n) {
    if (n == 0) return;
    const V v = load_partial(x + i, n, kCapped ? A(0) : m);
    store_partial(gradient(v, share.partial(i, n)), out + i, n);
  };
  int64_t i = 0;
  if (kStream) {
    constexpr uintptr_t bytes = width * sizeof(T);
    const int64_t ahead =
        int64_t((bytes - reinterpret_cast<uintptr_t>(out) % bytes) % bytes / sizeof(T));
    i = ahead < count ? ahead : count;
    partial(0, int(i));
  }
  for (; i + width <= count; i += width) {
    prefetch(x + i + kAhead / int64_t(sizeof(T)));
    const V y = gradient(V::load(x + i), share.at(i));
    if (kStream) {
      y.stream(out + i);
    } else {
      y.store(out + i);
    }
  }
  partial(i, int(count - i));
}

// The sum of a row's shares.
template <class A, class Share>
static double mass_of(const Share& share, int64_t classes) {
  using V = Vec<A>;
  double mass = 0;
  for (int64_t start = 0; start < classes; start += kBlock<A>) {
    const int64_t end = start + kBlock<A> < classes ? start + kBlock<A> : classes;
    V sum[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
    int64_t i = start;
    for (; i + V::width <= end; i += V::width) {
      V& part = sum[(i - start) / V::width % 4];
      part = part + share.at(i);
    }
    if (i < end) sum[3] = sum[3] + share.partial(i, int(end - i));
    mass += double(((sum[0] + sum[1]) + (sum[2] + sum[3])).reduce_add());
  }
  return mass;
}

// What exp(y - m) is multiplied by.
template <class A>
static A scale_of(const CrossEntropy& a, double B, double total) {
  // Where a slice is all -inf, none of the probability is in it.
  return total == 0 && a.partial ? A(0) : A(B / total);
}

// The upstream gradients of a row, and its rest.
struct Slopes {
  double g, g_lse, rest;
};

template <class A>
static Slopes slopes_of(const CrossEntropyBackward& a, int64_t n, int64_t l) {
  const auto upstream = [&](const Upstream& g) {
    return g.data ? double(static_cast<const A*>(g.data)[n * g.outer + l * g.inner]) : 0;
  };
  const double rest = double(static_cast<const A*>(a.rest)[n * a.positions + l]);
  return {upstream(a.grad_loss), upstream(a.grad_lse), rest};
}

// What a row of class t asks: the mass of its shares, exp(y - m) summed, and the target's gradient.
template <class A>
struct TargetSlope {
  bool here;
  double mass, total;
  A gradient;
};

template <class T>
static TargetSlope<acc_t<T>> target_slope(const CrossEntropy& a, const T* x, int64_t column,
                                          int64_t target, acc_t<T> m, const Slopes& s) {
  using A = acc_t<T>;
  const auto [g, g_lse, rest] = s;
  const bool here = target >= 0 && target < a.classes;
  const double shared = a.spread * a.total_weight;
  if (!here) return {false, shared, rest, A(0)};
  A slope;
  const A y = logit_of(a, x + target * column, &slope);
  const double at_target = ::exp(double(y) - double(m)), total = rest + at_target;
  const double p = total == 0 && a.partial ? 0 : at_target / total;
  // 1 - p by whichever way does not cancel.
  const double others = at_target < rest || total == 0 ? 1 - p : rest / total;
  const double w = a.weight ? double(static_cast<const A*>(a.weight)[target]) : 1;
  double gradient = g_lse * p - g * a.hard * w * others;
  if (a.spread != 0) gradient += g * (shared * p - a.spread * w);
  return {true, a.hard * w + shared, total, A(gradient) * slope};
}

template <class T>
static void backward_row(const CrossEntropyBackward& a, int64_t n, int64_t l) {
  using A = acc_t<T>;
  const int64_t row = n * a.positions + l;
  T* out = static_cast<T*>(a.grad_logits) + n * a.out.outer + l * a.out.inner;
  const int64_t target = a.target ? a.target[n * a.target_outer + l * a.target_inner] : -1;
  if (a.target && target == a.ignore_index) {
    // Not 0 * p: the row may hold NaN, and the upstream gradient of a mean over no rows is inf.
    memset(static_cast<void*>(out), 0, size_t(a.classes) * sizeof(T));
    return;
  }
  const T* x = static_cast<const T*>(a.logits) + n * a.at.outer + l * a.at.inner;
  const A* weight = static_cast<const A*>(a.weight);
  const A m = static_cast<const A*>(a.row_max)[row];
  const Slopes s = slopes_of<A>(a, n, l);
  const A softcap = A(a.softcap);
  const auto run = [&](double mass, double amount, double total, auto share) {
    const A scale = scale_of<A>(a, s.g * mass + s.g_lse, total);
    if (a.softcap != 0) {
      gradient_row<false, true>(x, out, a.classes, m, scale, A(s.g * amount), share, softcap);
      return;
    }
    if constexpr (decltype(share)::kStreamed) {
      if (a.stream) {
        gradient_row<true, false>(x, out, a.classes, m, scale, A(s.g * amount), share, softcap);
        return;
      }
    }
    gradient_row<false, false>(x, out, a.classes, m, scale, A(s.g * amount), share, softcap);
  };
  if (!a.target) {
    with_probabilities<T>(a, n, l, [&](const auto* q) {
      const ProbabilityShare<A, stored_t<decltype(q)>> share{q, weight, A(a.hard), A(a.spread)};
      run(mass_of<A>(share, a.classes), 1, s.rest, share);
    });
    return;
  }
  const TargetSlope<A> slope = target_slope<T>(a, x, 1, target, m, s);
  if (a.spread == 0) {
    run(slope.mass, 0, slope.total, NoShare<A>{});
  } else if (weight) {
    run(slope.mass, a.spread, slope.total, WeightedShare<A>{weight});
  } else {
    run(slope.mass, a.spread, slope.total, EvenShare<A>{});
  }
  if (slope.here) out[target] = narrow<T>(slope.gradient);
}
