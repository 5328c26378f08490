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
// Bytes: the forward reads the logits once, the backward reads them once and writes the gradient
// once. m and the sum are found in one sweep (Milakov and Gimelshein, "Online normalizer
// calculation for softmax", 2018) in blocks that stay in the first-level cache: a block's maximum
// first, then its sum. Blocks are added in double, so the error does not grow with C.

// Speeds and distances: benchmarks/NOTES.md.
constexpr int64_t kCacheLine = 64;  // bytes
constexpr int64_t kAhead = 4096;    // bytes: the hardware's own prefetcher stops at a page's end

template <class A>
struct Normaliser {
  A m;         // the maximum of what was seen
  double sum;  // of exp(x - m)

  template <class T>
  void add(const T* x, int64_t count) {
    // 32 additions in each of the four chains below; 8 KiB of the accumulator type on AVX-512.
    constexpr int64_t block = 128 * Vec<A>::width;
    for (int64_t start = 0; start < count; start += block) {
      add_block(x + start, count - start < block ? count - start : block);
    }
  }

 private:
  template <class T>
  void add_block(const T* x, int64_t count) {
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
    const A at_target = widen(x[target]);
    Normaliser<A> others{at_target, 0.0};
    others.add(x, target);
    others.add(x + target + 1, a.classes - target - 1);
    const double shifted = double(at_target) - double(others.m);
    *row_max = others.m;
    *rest = A(others.sum);
    *loss = A(shifted == 0 ? log1p(others.sum) : log(others.sum + ::exp(shifted)) - shifted);
  }
}

// out_j = exp(x_j - m) * scale
template <class T, bool kStream>
static void scaled_exp(const T* x, T* out, int64_t count, acc_t<T> m, acc_t<T> scale) {
  using V = Vec<acc_t<T>>;
  constexpr int width = V::width;
  const V shift = V::all(m), factor = V::all(scale);
  const auto partial = [&](int64_t i, int n) {
    store_partial(exp(load_partial(x + i, n, m) - shift) * factor, out + i, n);
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
    const V y = exp(V::load(x + i) - shift) * factor;
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
    const A scale = A(double(grad) / total);
    if (a.stream) {
      scaled_exp<T, true>(x, out, a.classes, m, scale);
    } else {
      scaled_exp<T, false>(x, out, a.classes, m, scale);
    }
    out[target] = narrow<T>(A(-double(grad) * others));
  }
  if (a.stream) stream_fence();
}
