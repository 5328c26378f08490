// Softmax-cross-entropy of class-index targets, row by row, for any instruction set.
//
// For a row x of C logits with target t, and m = max_j x_j:
//
//   rest  = sum_{j != t} exp(x_j - m)           total = rest + exp(x_t - m)
//   loss  = log(total) - (x_t - m)              (log1p(rest) where the target is the maximum)
//   dx_j  = g exp(x_j - m) / total  (j != t)    dx_t = -g rest / total
//
// Keeping the target out of the sum costs nothing and saves both ends: at p_t -> 1 the loss is not
// lost in the rounding of 1 + rest, nor the target's gradient in that of p_t - 1.
//
// With class weights w (1 without them, their sum W), label smoothing s and spread = s / C:
//
//   loss' = (1 - s) w_t loss + spread (W loss - sum_j w_j (x_j - x_t))
//   dx_j  = g (A p_j - spread w_j)              A = (1 - s) w_t + spread W
//   dx_t  = g (spread (W p_t - w_t) - (1 - s) w_t rest / total)
//
// Bytes: the forward reads the logits once, the backward reads them once and writes the gradient
// once. m and the sum are found in one sweep (Milakov and Gimelshein, "Online normalizer
// calculation for softmax", 2018) in blocks that stay in the first-level cache: a block's maximum
// first, then its sum. Blocks are added in double, so the error does not grow with C.

// Speeds and distances: benchmarks/NOTES.md.
constexpr int64_t kCacheLine = 64;  // bytes
constexpr int64_t kAhead = 4096;    // bytes: the hardware's own prefetcher stops at a page's end

// 32 additions in each of four chains; 8 KiB of the accumulator type on AVX-512.
template <class A>
constexpr int64_t kBlock = 128 * Vec<A>::width;

template <class A>
struct Normaliser {
  A m;         // the maximum of what was seen
  double sum;  // of exp(x - m)

  // At most kBlock logits.
  template <class T>
  void add(const T* x, int64_t count) {
    using V = Vec<A>;
    constexpr int width = V::width;
    const int64_t full = count - count % width;
    const int tail = int(count - full);
    const V last = load_partial<A>(x + full, tail, A(-INFINITY));

    // Four independent chains, here and below, to cover the latency of an instruction.
    V top[4] = {last, last, last, last};
    int64_t i = 0;
    for (; i + 4 * width <= full; i += 4 * width) {
      for (int k = 0; k < 4; ++k) top[k] = max(top[k], V::load(x + i + k * width));
    }
    for (; i < full; i += width) top[0] = max(top[0], V::load(x + i));
    const A block_max = max(max(top[0], top[1]), max(top[2], top[3])).reduce_max();

    if (block_max > m) {
      sum *= ::exp(double(m) - double(block_max));
      m = block_max;
    }
    // Anything finite will do while all that was seen is -inf.
    const V shift = V::all(m == A(-INFINITY) ? A(0) : m);
    V part[4] = {exp(last - shift), V::all(0), V::all(0), V::all(0)};
    for (i = 0; i + 4 * width <= full; i += 4 * width) {
      for (int k = 0; k < 4; ++k) {
        // This sweep reads the cache and would leave the memory idle: fetch the next block.
        if (k * width * sizeof(T) % kCacheLine == 0) prefetch(x + count + i + k * width);
        part[k] = part[k] + exp(V::load(x + i + k * width) - shift);
      }
    }
    for (; i < full; i += width) part[0] = part[0] + exp(V::load(x + i) - shift);
    sum += double(((part[0] + part[1]) + (part[2] + part[3])).reduce_add());
  }
};

// The sum of w_j (x_j - reference) over at most kBlock logits, which are in the cache by now.
// Without weights they are 1.
template <class T, class A>
static double spread_block(const T* x, const A* weight, int64_t count, A reference) {
  using V = Vec<A>;
  constexpr int width = V::width;
  const V from = V::all(reference);
  V part[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
  const auto add = [&](V& sum, int64_t i) {
    const V difference = V::load(x + i) - from;
    sum = weight ? fma(difference, V::load(weight + i), sum) : sum + difference;
  };
  int64_t i = 0;
  for (; i + 4 * width <= count; i += 4 * width) {
    for (int k = 0; k < 4; ++k) add(part[k], i + k * width);
  }
  for (; i + width <= count; i += width) add(part[0], i);
  const int tail = int(count - i);
  const V difference = load_partial(x + i, tail, reference) - from;
  part[1] = weight ? fma(difference, load_partial(weight + i, tail, A(0)), part[1])
                   : part[1] + difference;
  return double(((part[0] + part[1]) + (part[2] + part[3])).reduce_add());
}

template <class T>
static void cross_entropy_forward(const CrossEntropyForward& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t row = begin; row < end; ++row) {
    A* loss = static_cast<A*>(a.loss) + row;
    A* row_max = static_cast<A*>(a.row_max) + row;
    A* rest = static_cast<A*>(a.rest) + row;
    const int64_t target = a.target[row * a.target_stride];
    if (target == a.ignore_index) {
      *loss = *row_max = *rest = 0;
      continue;
    }
    const T* x = static_cast<const T*>(a.logits) + row * a.row_stride;
    const A* weight = static_cast<const A*>(a.weight);
    const A at_target = widen(x[target]);
    // What the logits are counted from in the spread sum: the target's, if that is a number.
    const A reference = at_target - at_target == 0 ? at_target : A(0);
    Normaliser<A> others{at_target, 0.0};
    double spread_sum = 0;
    const auto add = [&](int64_t first, int64_t last) {
      for (int64_t start = first; start < last; start += kBlock<A>) {
        const int64_t count = last - start < kBlock<A> ? last - start : kBlock<A>;
        others.add(x + start, count);
        if (a.smoothing != 0) {
          spread_sum +=
              spread_block(x + start, weight ? weight + start : nullptr, count, reference);
        }
      }
    };
    add(0, target);
    add(target + 1, a.classes);
    const double shifted = double(at_target) - double(others.m);
    const double total = others.sum + ::exp(shifted);
    const double plain = shifted == 0 ? log1p(others.sum) : log(total) - shifted;
    const double w_t = weight ? double(weight[target]) : 1;
    double result = w_t * plain;
    if (a.smoothing != 0) {
      if (reference != at_target) spread_sum += w_t * double(at_target);
      const double normaliser = reference == at_target ? plain : double(others.m) + log(total);
      result = (1 - a.smoothing) * result +
               a.smoothing / double(a.classes) * (a.total_weight * normaliser - spread_sum);
    }
    *row_max = others.m;
    *rest = A(others.sum);
    *loss = A(result);
  }
}

enum Spread { kNone, kEven, kWeighted };

// out_j = exp(x_j - m) * scale - uniform w_j, the last term without weights the same for all.
template <class T, bool kStream, Spread kSpread>
static void scaled_exp(const T* x, T* out, int64_t count, acc_t<T> m, acc_t<T> scale,
                       acc_t<T> uniform, const acc_t<T>* weight) {
  using V = Vec<acc_t<T>>;
  constexpr int width = V::width;
  const V shift = V::all(m), factor = V::all(scale), less = V::all(-uniform);
  const auto gradient = [&](V e, V w) {
    if (kSpread == kNone) return e * factor;
    return fma(e, factor, kSpread == kWeighted ? less * w : less);
  };
  const auto partial = [&](int64_t i, int n) {
    const V w = kSpread == kWeighted ? load_partial(weight + i, n, acc_t<T>(0)) : less;
    store_partial(gradient(exp(load_partial(x + i, n, m) - shift), w), out + i, n);
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
    const V w = kSpread == kWeighted ? V::load(weight + i) : less;
    const V y = gradient(exp(V::load(x + i) - shift), w);
    if (kStream) {
      y.stream(out + i);
    } else {
      y.store(out + i);
    }
  }
  partial(i, int(count - i));
}

template <class T>
static void cross_entropy_backward(const CrossEntropyBackward& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t row = begin; row < end; ++row) {
    T* out = static_cast<T*>(a.grad_logits) + row * a.classes;
    const int64_t target = a.target[row * a.target_stride];
    if (target == a.ignore_index) {
      // Not 0 * p: the row may hold NaN, and the upstream gradient of a mean over no rows is inf.
      memset(static_cast<void*>(out), 0, size_t(a.classes) * sizeof(T));
      continue;
    }
    const T* x = static_cast<const T*>(a.logits) + row * a.row_stride;
    const A m = static_cast<const A*>(a.row_max)[row];
    const A rest = static_cast<const A*>(a.rest)[row];
    const A grad = static_cast<const A*>(a.grad_loss)[row * a.grad_loss_stride];
    const double at_target = ::exp(double(widen(x[target])) - double(m));
    const double total = double(rest) + at_target;
    // 1 - p_t by whichever way does not cancel.
    const double others = at_target < double(rest) ? 1 - at_target / total : double(rest) / total;
    const A* weight = static_cast<const A*>(a.weight);
    const double w_t = weight ? double(weight[target]) : 1;
    const double hard = (1 - a.smoothing) * w_t, spread = a.smoothing / double(a.classes);
    const double amount = hard + spread * a.total_weight;
    const A scale = A(double(grad) * amount / total), uniform = A(double(grad) * spread);
    const auto run =
        a.smoothing == 0 ? (a.stream ? scaled_exp<T, true, kNone> : scaled_exp<T, false, kNone>)
        : weight ? (a.stream ? scaled_exp<T, true, kWeighted> : scaled_exp<T, false, kWeighted>)
                 : (a.stream ? scaled_exp<T, true, kEven> : scaled_exp<T, false, kEven>);
    run(x, out, a.classes, m, scale, uniform, weight);
    const double at_t = spread * (a.total_weight * (at_target / total) - w_t) - hard * others;
    out[target] = narrow<T>(A(double(grad) * at_t));
  }
  if (a.stream) stream_fence();
}
