// Softmax-cross-entropy, row by row, on a GPU.
//
// The formulas stand in fastgpt/ops/cross_entropy.py, and how a row's maximum and its sum without
// the target make loss and gradient in csrc/cpu/cross_entropy.inl.h. Here a row is shared by a team
// of threads, as lies near for it:
//
//   kWarpRows   a warp for each row of a small vocabulary
//   kBlockRows  a block for each row, or a cluster of blocks where the GPU has them
//   kColumns    for classes that lie apart and positions side by side: a thread of each warp for a
//               position, so that a warp reads neighbours, and the warps share the classes
//
// Bytes: the forward reads the logits once. The backward reads them once and writes the gradient
// once. It begins with the last rows, which the forward has left in the second-level cache. Rows
// move as whole aligned vectors of 16 bytes, and the few classes before and behind them one by one.
//
// Each thread keeps its own maximum and sum (Milakov and Gimelshein, "Online normalizer calculation
// for softmax", 2018). Which classes a thread takes depends on the shape of the row and its
// alignment alone, and sums are taken in one order, so a row's bits do not depend on other rows.
#pragma once

#include <cmath>

#include "cross_entropy_launch.h"
#include "primitives.cuh"
#include "softcap.cuh"

namespace fastgpt::cuda {

enum Layout { kWarpRows, kBlockRows, kColumns };
// What a call asks of each class beside its exponential: nothing (weights without smoothing are the
// target's alone); smoothing or a cap; probabilities.
enum Kind { kPlain, kClasses, kProbabilities };

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Of a multiprocessor: enough bytes under way to hide the memory's latency.
template <class T, Kind kind>
constexpr int kBlocks = sizeof(T) == 8           ? 2
                        : kind == kProbabilities ? 3
                                                 : 4;
// Runs of classes that a thread reads before it uses the first of them.
template <class T, Kind kind>
constexpr int kRuns = kind != kPlain   ? 1
                      : sizeof(T) == 2 ? 2
                                       : 4;

// ---- numbers ----

template <class A>
FASTGPT_DEVICE A finite_or_zero(A m) {
  return std::fabs(m) < A(INFINITY) ? m : A(0);
}

// What rounding `sum` took from x + y (Knuth); of a sum that is finite.
template <class A>
FASTGPT_DEVICE A lost(A x, A y, A sum) {
  const A from_y = sum - x;
  return (x - (sum - from_y)) + (y - from_y);
}

// The logit y at `x`, and the cap's slope there.
template <class T>
FASTGPT_DEVICE acc_t<T> logit_of(const CrossEntropy& a, const T* x, acc_t<T>* slope) {
  const acc_t<T> v = widen(load(x));
  *slope = 1;
  return a.softcap == 0 ? v : Cap<T>(a.softcap)(v, slope);
}

// ---- teams ----

template <Layout layout>
struct Team {
  bool there;       // whether there is a row at all
  int64_t n, l;     // which
  int index, size;  // of the thread in the team

  // Teams in the rows' order, or from the last one on.
  template <class Arguments>
  FASTGPT_DEVICE Team(const Arguments& a, bool reversed) {
    const int rank = cluster_rank(), blocks = cluster_blocks();
    const int64_t teams = grid_blocks() / blocks, mine = block_index() / blocks;
    int64_t team = reversed ? teams - 1 - mine : mine;
    if constexpr (layout == kColumns) {
      const int64_t tiles = (a.positions + kWarp - 1) / kWarp;
      n = team / tiles;
      l = team % tiles * kWarp + lane_index();
      there = l < a.positions;
      index = rank * kWarps + warp_index();
      size = blocks * kWarps;
      return;
    }
    if (layout == kWarpRows) team = team * kWarps + warp_index();
    there = team < a.rows;
    n = a.positions == 1 ? team : team / a.positions;
    l = a.positions == 1 ? 0 : team % a.positions;
    index = layout == kWarpRows ? lane_index() : rank * kThreads + thread_index();
    size = layout == kWarpRows ? kWarp : blocks * kThreads;
  }

  // Whether the thread writes what is one number for the row.
  FASTGPT_DEVICE bool writes() const { return there && index == 0; }

  // The threads' numbers, reduced in one order, in each of them. A team of blocks ends with `end`,
  // and `site` tells one reduction of a kernel from another, whose memory they do not share.
  template <int site, int count, class A, class Operation>
  FASTGPT_DEVICE void reduce(A (&x)[count], const Operation& operation) const {
    if constexpr (layout != kColumns) {
      for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        for (A& v : x) v = operation(v, shuffle_xor(v, mask));
      }
    }
    if constexpr (layout != kWarpRows) reduce_warps<site>(x, operation);
  }

  // What any thread of the team has read or written before, it has done for the others.
  FASTGPT_DEVICE void barrier() const {
    if (layout == kWarpRows) {
      warp_barrier();
    } else if (cluster_blocks() == 1) {
      block_barrier();
    } else {
      cluster_barrier();
    }
  }

  // A block's memory must be there until the others have read it.
  FASTGPT_DEVICE void end() const {
    if (layout != kWarpRows && cluster_blocks() > 1) cluster_barrier();
  }

 private:
  template <int site, int count, class A, class Operation>
  FASTGPT_DEVICE static void reduce_warps(A (&x)[count], const Operation& operation) {
    // Of each warp and of the block: a number, or in columns one of each lane.
    constexpr int width = layout == kColumns ? kWarp : 1;
    FASTGPT_SHARED(A, parts, (kWarps + 1) * width * count);
    const int lane = layout == kColumns ? lane_index() : 0;
    const bool puts = layout == kColumns || lane_index() == 0;
    const auto at = [&](int row, int i) { return (row * width + lane) * count + i; };
    if (puts) {
      for (int i = 0; i < count; ++i) parts.store(at(warp_index(), i), x[i]);
    }
    block_barrier();
    for (int i = 0; i < count; ++i) {
      x[i] = parts.load(at(0, i));
      for (int warp = 1; warp < kWarps; ++warp) x[i] = operation(x[i], parts.load(at(warp, i)));
    }
    if (cluster_blocks() == 1) return;
    if (warp_index() == 0 && puts) {
      for (int i = 0; i < count; ++i) parts.store(at(kWarps, i), x[i]);
    }
    cluster_barrier();
    for (int i = 0; i < count; ++i) {
      x[i] = parts.load_from(0, at(kWarps, i));
      for (int rank = 1; rank < cluster_blocks(); ++rank) {
        x[i] = operation(x[i], parts.load_from(rank, at(kWarps, i)));
      }
    }
  }
};

struct Maximum {
  template <class A>
  FASTGPT_DEVICE A operator()(A x, A y) const {
    return x > y ? x : y;
  }
};

struct Sum {
  template <class A>
  FASTGPT_DEVICE A operator()(A x, A y) const {
    return x + y;
  }
};

// ---- a row's classes ----

template <int runs_, int width_>
struct Runs {
  static constexpr int runs = runs_, width = width_, count = runs_ * width_;
};

// Calls f(Runs, first, step) for all classes of a thread: so many runs of so many neighbours, which
// begin at the classes `first`, `first + step`, ... Runs of more than one begin at whole vectors of
// `row`, whose classes lie `row + j`; in columns there are none.
template <Layout layout, int runs, class T, class F>
FASTGPT_DEVICE void walk(const Team<layout>& team, const T* row, int classes, const F& f) {
  const int size = team.size;
  if constexpr (layout == kColumns) {
    constexpr int ahead = 4;
    int64_t j = team.index;
    for (; j + (ahead - 1) * size < classes; j += ahead * size) f(Runs<ahead, 1>{}, int(j), size);
    for (; j < classes; j += size) f(Runs<1, 1>{}, int(j), size);
  } else {
    constexpr int width = Vector<T>::width;
    const int ahead = int((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T));
    const int head = ahead < classes ? ahead : classes;
    const int vectors = (classes - head) / width, body = vectors * width;
    if (team.index < classes - body) {
      f(Runs<1, 1>{}, team.index < head ? team.index : team.index + body, 0);
    }
    int64_t v = team.index;
    for (; v + (runs - 1) * size < vectors; v += runs * size) {
      f(Runs<runs, width>{}, int(head + v * width), size * width);
    }
    for (; v < vectors; v += size) f(Runs<1, width>{}, int(head + v * width), size * width);
  }
}

// Whether y's whole vectors begin where x's do.
template <class T, class U>
FASTGPT_DEVICE bool in_phase(const T* x, const U* y) {
  if (sizeof(T) != sizeof(U)) {
    // A run is one vector of x and several of y: each of those must be whole.
    const int64_t ahead = int64_t(reinterpret_cast<uintptr_t>(x) / sizeof(T));
    return (int64_t(reinterpret_cast<uintptr_t>(y) / sizeof(U)) - ahead) % Vector<U>::width == 0;
  }
  return (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(y)) % 16 == 0;
}

// Numbers of type U at a distance of `column`.
template <class U>
struct Numbers {
  const U* row;
  int64_t column;
  bool whole;  // runs are vectors of it

  template <class R, class A>
  FASTGPT_DEVICE void load_runs(R, int first, int step, A (&x)[R::count]) const {
    constexpr int width = Vector<U>::width;
    if constexpr (R::width % width == 0) {
      if (whole) {
        Vector<U> raw[R::count / width];
        for (int i = 0; i < R::count / width; ++i) {
          const int run = i * width / R::width, within = i * width % R::width;
          raw[i] = load_vector(row + first + int64_t(run) * step + within);
        }
        for (int i = 0; i < R::count; ++i) x[i] = A(widen(raw[i / width].data[i % width]));
        return;
      }
    }
    for (int i = 0; i < R::count; ++i) {
      const int64_t j = first + int64_t(i / R::width) * step + i % R::width;
      x[i] = A(widen(load(row + j * column)));
    }
  }
};

// The weight c_j of each class: w_j, and of probabilities w_j (hard q_j + spread).
template <class T, Kind kind>
struct Shares {
  using A = acc_t<T>;
  const A* weight;  // or null
  Numbers<T> narrow;
  Numbers<A> wide;
  bool is_wide;
  A hard, spread;

  FASTGPT_DEVICE Shares(const CrossEntropy& a, int64_t n, int64_t l, const T* aligned)
      : weight(static_cast<const A*>(a.weight)), narrow{}, wide{}, is_wide(a.probabilities_wide) {
    if constexpr (kind == kProbabilities) {
      const int64_t at = n * a.probability_at.outer + l * a.probability_at.inner;
      const int64_t column = a.probability_at.column;
      const T* q = static_cast<const T*>(a.probabilities) + at;
      const A* wide_q = static_cast<const A*>(a.probabilities) + at;
      narrow = {q, column, column == 1 && in_phase(aligned, q)};
      wide = {wide_q, column, column == 1 && in_phase(aligned, wide_q)};
      hard = A(a.hard);
      spread = A(a.spread);
    }
  }

  template <class R>
  FASTGPT_DEVICE void load_runs(R runs, int first, int step, A (&c)[R::count]) const {
    if constexpr (kind == kProbabilities) {
      if (is_wide) {
        wide.load_runs(runs, first, step, c);
      } else {
        narrow.load_runs(runs, first, step, c);
      }
      for (A& v : c) v = hard * v + spread;
    } else {
      for (A& v : c) v = 1;
    }
    if (weight == nullptr) return;
    for (int i = 0; i < R::count; ++i) {
      c[i] *= load(weight + first + int64_t(i / R::width) * step + i % R::width);
    }
  }
};

// Whether class t is one of the runs.
template <class R>
FASTGPT_DEVICE bool holds(R, int t, int first, int step) {
  bool any = false;
  for (int run = 0; run < R::runs; ++run) {
    any |= unsigned(t - (first + run * step)) < unsigned(R::width);
  }
  return any;
}

// ---- the target ----

template <class T>
struct Target {
  bool counts;  // the row is not ignored, and there is one
  bool here;    // it has a target, in this slice of the classes
  int t;        // or -1
  acc_t<T> y, slope;

  template <Layout layout>
  FASTGPT_DEVICE Target(const CrossEntropy& a, const Team<layout>& team, const T* row)
      : counts(team.there), here(false), t(-1), y(0), slope(1) {
    if (!a.target || !team.there) return;
    const int64_t target = load(a.target + team.n * a.target_outer + team.l * a.target_inner);
    counts = target != a.ignore_index;
    here = counts && target >= 0 && target < a.classes;
    require(here || !counts || a.partial, "Target is out of bounds");
    if (!here) return;
    t = int(target);
    y = logit_of(a, row + target * a.at.column, &slope);
  }

  FASTGPT_DEVICE double weight(const CrossEntropy& a) const {
    return a.weight && here ? double(static_cast<const acc_t<T>*>(a.weight)[t]) : 1;
  }
};

// ---- forward ----

// Sums over the classes that a thread has seen, the target's exponential left out.
template <class T, bool shared>
struct Sums {
  using A = acc_t<T>;
  A m = A(-INFINITY);   // the largest logit
  A sum = 0;            // of exp(y - m)
  A dot = 0, mass = 0;  // of c (y - m), from 0 where m is infinite, and c

  FASTGPT_DEVICE void raise(A to) {
    if (to == m) return;
    const A d = m - to;
    A e = exp_of<T>(d);
    // The sum's exponentials are off by the rounding of their own differences as it is.
    if (sizeof(T) > 2 && d > A(-INFINITY)) e += e * lost(m, -to, d);
    sum *= e;
    if (shared) dot += mass * (finite_or_zero(m) - finite_or_zero(to));
    m = to;
  }

  template <int count>
  FASTGPT_DEVICE void add(const A (&y)[count], const A (&c)[count], bool of_target = false) {
    A top = m;
    for (const A v : y) top = std::fmax(top, v);  // which passes over NaN; the sum does not
    raise(top);
    const A from = finite_or_zero(m);
    A part = 0, dots = 0, masses = 0;
    for (int i = 0; i < count; ++i) {
      const A d = y[i] - from;
      if (!of_target) part += exp_of<T>(d);
      if (shared) dots += c[i] * d;
      if (shared) masses += c[i];
    }
    sum += part;
    if (shared) dot += dots;
    if (shared) mass += masses;
  }
};

// Loss and lse of a row, in R. `hard` is the share of the target and `spread` that of each class.
template <class R, class T, bool shared>
FASTGPT_DEVICE void finish(Sums<T, shared>& sums, const Target<T>& target, bool partial,
                           double hard, double spread, R* loss, R* lse) {
  using A = acc_t<T>;
  constexpr R nan = R(NAN);
  const A m = sums.m;
  if (partial && m == A(-INFINITY)) {
    // None of the probability is in this slice: what that costs shows in lse.
    sums.m = 0;
    *loss = 0;
    *lse = R(-INFINITY);
    return;
  }
  const R rest = R(sums.sum), shifted = R(target.y) - R(m);
  const R log_total = std::log(target.here ? rest + std::exp(shifted) : rest);
  const bool any_nan = sums.sum != sums.sum || target.y != target.y;
  *lse = std::fabs(m) < A(INFINITY) ? R(m) + log_total : any_nan ? nan : R(m);
  *loss = 0;
  // Not hard * plain where there is none: plain may be infinite.
  if (target.here) *loss = R(hard) * (shifted == 0 ? std::log1p(rest) : log_total - shifted);
  if (shared && spread != 0) {
    *loss += R(spread) * (R(sums.mass) * log_total - R(sums.dot));
  }
  if (m == A(INFINITY)) *loss = nan;
}

template <class T, Kind kind, Layout layout>
FASTGPT_KERNEL(kThreads, (kBlocks<T, kind>))
forward(const ForwardArguments a) {
  using A = acc_t<T>;
  constexpr bool shared = kind != kPlain;
  const Team<layout> team(a, false);
  if (layout == kWarpRows && !team.there) return;
  const T* row = static_cast<const T*>(a.logits) + team.n * a.at.outer + team.l * a.at.inner;
  const Target<T> target(a, team, row);
  Sums<T, shared> sums;
  if (target.counts) {
    const Numbers<T> logits{row, a.at.column, layout != kColumns};
    const Shares<T, kind> shares(a, team.n, team.l, row);
    const Cap<T> cap(a.softcap);
    const bool wanted = kind == kProbabilities || a.spread != 0;
    const auto add = [&](auto runs, int first, int step, bool of_target) {
      A y[decltype(runs)::count], c[decltype(runs)::count] = {};
      logits.load_runs(runs, first, step, y);
      if constexpr (shared) {
        A slope;
        if (a.softcap != 0) {
          for (A& v : y) v = cap(v, &slope);
        }
        if (wanted) shares.load_runs(runs, first, step, c);
      }
      // The target's exponential is left out; and without shares, so is the target.
      if (shared || !of_target) sums.add(y, c, of_target);
    };
    walk<layout, kRuns<T, kind>>(team, row, int(a.classes), [&](auto runs, int first, int step) {
      using R = decltype(runs);
      if (!holds(runs, target.t, first, step)) {
        add(runs, first, step, false);
        return;
      }
      // One run of a row: all others are spared the comparisons.
      FASTGPT_ROLLED for (int i = 0; i < R::count; ++i) {
        const int j = first + i / R::width * step + i % R::width;
        add(Runs<1, 1>{}, j, 0, j == target.t);
      }
    });
  }
  A top[] = {sums.m};
  team.template reduce<0>(top, Maximum{});
  sums.raise(top[0]);
  A parts[] = {sums.sum, sums.dot, sums.mass};
  if constexpr (shared) {
    team.template reduce<1>(parts, Sum{});
    sums.dot = parts[1], sums.mass = parts[2];
  } else {
    A part[] = {sums.sum};
    team.template reduce<1>(part, Sum{});
    parts[0] = part[0];
  }
  sums.sum = parts[0];
  team.end();
  if (!team.writes()) return;
  if (target.here && target.y > sums.m) sums.raise(target.y);
  const int64_t at = team.n * a.positions + team.l;
  const double hard = kind == kProbabilities ? 0 : a.hard * target.weight(a);
  const double spread = kind == kProbabilities ? 1 : a.spread;
  if (a.partial) {
    double loss = 0, lse = 0;
    if (target.counts) finish(sums, target, true, hard, spread, &loss, &lse);
    store(static_cast<double*>(a.loss) + at, loss);
    store(static_cast<double*>(a.lse) + at, lse);
  } else {
    A loss = 0, lse = 0;
    if (target.counts) finish(sums, target, false, hard, spread, &loss, &lse);
    store(static_cast<A*>(a.loss) + at, loss);
    store(static_cast<A*>(a.lse) + at, lse);
  }
  store(static_cast<A*>(a.row_max) + at, target.counts ? sums.m : A(0));
  // Of an infinite logit every gradient is NaN, and the backward sees no more than this of it.
  const A rest = sums.m == A(INFINITY) ? A(NAN) : sums.sum;
  store(static_cast<A*>(a.rest) + at, target.counts ? rest : A(0));
}

// ---- backward ----

// What the gradient of a row is made of: exp(y_j - m) scale - amount c_j, and the target's own.
template <class A>
struct Slopes {
  A m, scale, amount, at_target;
};

// `mass` is the sum of the shares, of probabilities alone.
template <class T>
FASTGPT_DEVICE Slopes<acc_t<T>> slopes_of(const BackwardArguments& a, int64_t n, int64_t l,
                                          const Target<T>& target, acc_t<T> mass) {
  using A = acc_t<T>;
  const auto upstream = [&](const Upstream& g) {
    return g.data ? load(static_cast<const A*>(g.data) + n * g.outer + l * g.inner) : A(0);
  };
  const int64_t at = n * a.positions + l;
  A g = upstream(a.grad_loss);
  const A g_lse = upstream(a.grad_lse);
  if (a.denominator) g /= load(static_cast<const A*>(a.denominator));
  const A m = load(static_cast<const A*>(a.row_max) + at);
  const A rest = load(static_cast<const A*>(a.rest) + at);
  A total = rest, total_lost = 0, at_target = 0, amount = g;
  if (!a.probabilities) {
    const A spread = A(a.spread);
    mass = spread == 0
               ? A(0)
               : A(a.spread * (a.total_weight_at ? load(a.total_weight_at) : double(a.classes)));
    amount = g * spread;
    if (target.here) {
      const A e = std::exp(target.y - m);
      total = rest + e;
      total_lost = lost(rest, e, total);
      const A p = total == 0 && a.partial ? A(0) : e / total;
      // 1 - p by whichever way does not cancel.
      const A others = e < rest || total == 0 ? 1 - p : rest / total;
      const A w = A(target.weight(a)), hard = A(a.hard) * w;
      at_target = g_lse * p - g * hard * others;
      if (spread != 0) at_target += g * (mass * p - spread * w);
      at_target *= target.slope;
      mass += hard;
    }
  }
  // Where a slice is all -inf, none of the probability is in it.
  const A sum = g * mass + g_lse;
  A scale = total == 0 && a.partial ? A(0) : sum / total;
  // By what the scale is off, every gradient of the row would be.
  if (sizeof(T) > 2 && total > 0 && std::fabs(scale) < A(INFINITY)) {
    scale += (std::fma(-scale, total, sum) - scale * total_lost) / total;
  }
  return {m, scale, amount, at_target};
}

template <class T, Kind kind, Layout layout>
FASTGPT_KERNEL(kThreads, (kBlocks<T, kind>))
backward(const BackwardArguments a) {
  using A = acc_t<T>;
  constexpr bool shared = kind != kPlain;
  const Team<layout> team(a, true);
  if (layout == kWarpRows && !team.there) return;
  const T* row = static_cast<const T*>(a.logits) + team.n * a.at.outer + team.l * a.at.inner;
  T* out = static_cast<T*>(a.grad_logits) + team.n * a.out.outer + team.l * a.out.inner;
  const Target<T> target(a, team, row);
  const Shares<T, kind> shares(a, team.n, team.l, out);
  A mass[] = {0};
  if constexpr (kind == kProbabilities) {
    if (target.counts) {
      walk<layout, kRuns<T, kind>>(team, out, int(a.classes), [&](auto runs, int first, int step) {
        A c[decltype(runs)::count];
        shares.load_runs(runs, first, step, c);
        for (const A v : c) mass[0] += v;
      });
    }
    team.template reduce<0>(mass, Sum{});
    team.end();
  } else if (a.grad_logits == a.logits) {
    // Every thread has read the target's logit before one writes over it.
    team.barrier();
  }
  if (!team.there) return;
  const auto put = [&](auto runs, int first, int step, const auto& y) {
    using R = decltype(runs);
    if constexpr (R::width > 1) {
      for (int run = 0; run < R::runs; ++run) {
        A part[R::width];
        for (int i = 0; i < R::width; ++i) part[i] = y[run * R::width + i];
        store_vector(out + first + int64_t(run) * step, narrow_vector<T>(part));
      }
    } else {
      for (int i = 0; i < R::count; ++i) {
        store(out + (first + int64_t(i) * step) * a.out.column, narrow<T>(y[i]));
      }
    }
  };
  if (!target.counts) {
    // Not 0 * p: the row may hold NaN, and the upstream gradient of a mean over no rows is inf.
    walk<layout, 1>(team, out, int(a.classes), [&](auto runs, int first, int step) {
      const A zeros[decltype(runs)::count] = {};
      put(runs, first, step, zeros);
    });
    return;
  }
  const Slopes<A> slopes = slopes_of(a, team.n, team.l, target, mass[0]);
  const Numbers<T> logits{row, a.at.column, layout != kColumns && in_phase(out, row)};
  const Cap<T> cap(a.softcap);
  const bool wanted = kind == kProbabilities || a.spread != 0;
  walk<layout, kRuns<T, kind>>(team, out, int(a.classes), [&](auto runs, int first, int step) {
    using R = decltype(runs);
    A y[R::count];
    logits.load_runs(runs, first, step, y);
    if constexpr (shared) {
      A c[R::count] = {}, slope[R::count];
      if (wanted) shares.load_runs(runs, first, step, c);
      for (int i = 0; i < R::count; ++i) {
        slope[i] = 1;
        if (a.softcap != 0) y[i] = cap(y[i], &slope[i]);
        y[i] = exp_of<T>(y[i] - slopes.m) * slopes.scale - slopes.amount * c[i];
        y[i] *= slope[i];
      }
    } else {
      for (A& v : y) v = exp_of<T>(v - slopes.m) * slopes.scale;
    }
    put(runs, first, step, y);
    // Over what the run says of it.
    if (holds(runs, target.t, first, step)) {
      store(out + target.t * a.out.column, narrow<T>(slopes.at_target));
    }
  });
}

// ---- the sum of the losses ----

constexpr int kSumThreads = 1024;

// One block: even of 2^20 rows it reads no more than a row of logits has.
template <class A>
FASTGPT_KERNEL(kSumThreads, 1)
sum_losses(const LossesArguments a) {
  double sum = 0, counted = 0;
  for (int64_t row = thread_index(); row < a.rows; row += kSumThreads) {
    sum += double(load(static_cast<const A*>(a.losses) + row));
    if (!a.denominator) continue;
    const int64_t n = a.positions == 1 ? row : row / a.positions;
    const int64_t l = a.positions == 1 ? 0 : row % a.positions;
    const int64_t t = load(a.target + n * a.target_outer + l * a.target_inner);
    if (t == a.ignore_index || t < 0 || t >= a.classes) continue;
    counted += a.weight ? double(load(static_cast<const A*>(a.weight) + t)) : 1;
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    sum += shuffle_xor(sum, mask);
    counted += shuffle_xor(counted, mask);
  }
  FASTGPT_SHARED(double, parts, 2 * kSumThreads / kWarp);
  if (lane_index() == 0) {
    parts.store(2 * warp_index(), sum);
    parts.store(2 * warp_index() + 1, counted);
  }
  block_barrier();
  if (thread_index() != 0) return;
  for (int warp = 1; warp < kSumThreads / kWarp; ++warp) {
    sum += parts.load(2 * warp);
    counted += parts.load(2 * warp + 1);
  }
  if (a.denominator) {
    sum /= counted;
    store(static_cast<A*>(a.denominator), A(counted));
  }
  store(static_cast<A*>(a.loss), A(sum));
}

}  // namespace fastgpt::cuda
